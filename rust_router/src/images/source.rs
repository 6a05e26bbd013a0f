//! Sources of images. A source returns the RGB bytes of an image by its row number, from memory or
//! from files.

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::images::decode;
use crate::images::error::{Error, Result};
use crate::images::geometry::{ImageView, Size, View};

/// Reusable memory of one thread.
#[derive(Debug, Default)]
pub struct Scratch {
    encoded: Vec<u8>,
    rgb: Vec<u8>,
}

/// Images by row number. Several threads may read at the same time.
pub trait Source: Sync {
    /// Number of images.
    fn len(&self) -> usize;

    /// Whether there are no images.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns image `row` and its view. The bytes lie in the source's own memory or in `scratch`.
    /// `choose` maps the size of the image to the view. The source decodes only the rows that this
    /// view needs.
    ///
    /// # Errors
    /// The source has no such row, the image cannot be read or decoded, or `choose` returns an
    /// error.
    fn image<'a>(
        &'a self,
        row: usize,
        scratch: &'a mut Scratch,
        choose: &dyn Fn(Size) -> Result<View>,
    ) -> Result<(ImageView<'a>, View)>;
}

/// Images of one size in memory: `[num, height, width, 3]`.
#[derive(Clone, Copy, Debug)]
pub struct Pixels<'a> {
    rgb: &'a [u8],
    height: usize,
    width: usize,
}

impl<'a> Pixels<'a> {
    /// Uses `rgb` as images of `height * width * 3` bytes.
    ///
    /// # Errors
    /// `rgb` is not a whole number of such images.
    pub fn new(rgb: &'a [u8], height: usize, width: usize) -> Result<Self> {
        let bytes = height * width * 3;
        if bytes == 0 || !rgb.len().is_multiple_of(bytes) {
            return Err(Error::Pixels { size: (height, width), bytes: rgb.len() });
        }
        Ok(Self { rgb, height, width })
    }
}

impl Source for Pixels<'_> {
    fn len(&self) -> usize {
        self.rgb.len() / (self.height * self.width * 3)
    }

    fn image<'a>(
        &'a self,
        row: usize,
        _: &'a mut Scratch,
        choose: &dyn Fn(Size) -> Result<View>,
    ) -> Result<(ImageView<'a>, View)> {
        let bytes = self.height * self.width * 3;
        let rgb = row.checked_mul(bytes).and_then(|start| self.rgb.get(start..)?.get(..bytes));
        let rgb = rgb.ok_or(Error::Row { row: row as i64, len: self.len() })?;
        let view = choose((self.height, self.width))?;
        view.check().map_err(|reason| Error::Resize { row, reason })?;
        Ok((ImageView { rgb, height: self.height, width: self.width }, view))
    }
}

/// The position of one encoded image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Number of the file in the source.
    pub file: u32,
    /// First byte in the file.
    pub offset: u64,
    /// Number of bytes. 0 means all bytes up to the end of the file.
    pub length: u64,
}

/// JPEG and PNG images in files. An image is a whole file or a part of a pack.
#[derive(Debug)]
pub struct Encoded {
    files: Vec<PathBuf>,
    /// Files that are kept open, as far as [`KEPT`] allows. The list is empty if there are too many
    /// files.
    handles: Vec<OnceLock<KeptFile>>,
    spans: Vec<Span>,
}

/// Number of files that all sources of this process keep open. Each data set has several sources,
/// and a process may have 1024 open files by default.
static KEPT: AtomicUsize = AtomicUsize::new(0);

/// An open file that is counted in [`KEPT`].
#[derive(Debug)]
struct KeptFile(File);

impl KeptFile {
    /// Counts an open file, or returns it if too many are kept already.
    fn new(file: File) -> std::result::Result<Self, File> {
        if KEPT.fetch_add(1, Ordering::Relaxed) < Encoded::MAX_OPEN {
            return Ok(Self(file));
        }
        KEPT.fetch_sub(1, Ordering::Relaxed);
        Err(file)
    }
}

impl Drop for KeptFile {
    fn drop(&mut self) {
        KEPT.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Encoded {
    /// Highest number of files that all sources together keep open.
    const MAX_OPEN: usize = 512;
    /// Highest number of bytes of an encoded image.
    const MAX_BYTES: u64 = 1 << 28;

    /// The images at `spans` of `files`. This function does not read the files.
    ///
    /// # Errors
    /// A span has a file number outside `files`, or is longer than an image may be.
    pub fn new(files: Vec<PathBuf>, spans: Vec<Span>) -> Result<Self> {
        for (row, span) in spans.iter().enumerate() {
            if span.file as usize >= files.len() || span.length > Self::MAX_BYTES {
                let (file, length, most, num_files) = (span.file, span.length, Self::MAX_BYTES, files.len());
                return Err(Error::Span { row, length, file, most, num_files });
            }
        }
        let shared = if files.len() <= Self::MAX_OPEN { files.len() } else { 0 };
        let handles = (0..shared).map(|_| OnceLock::new()).collect();
        Ok(Self { files, handles, spans })
    }

    /// Height and width of image `row`, read from its header.
    ///
    /// # Errors
    /// The errors of [`Source::image`].
    pub fn size(&self, row: usize) -> Result<Size> {
        let mut bytes = Vec::new();
        let span = self.read(row, &mut bytes)?;
        guarded(|| decode::size(&bytes)).map_err(|reason| self.sample(row, span, reason))
    }

    /// Reads the encoded bytes of image `row` into `bytes`.
    ///
    /// # Errors
    /// The source has no such row, or the file cannot be read or is too short.
    pub fn read(&self, row: usize, bytes: &mut Vec<u8>) -> Result<Span> {
        let span = *self.spans.get(row).ok_or(Error::Row { row: row as i64, len: self.spans.len() })?;
        let path = &self.files[span.file as usize];
        let read = |bytes: &mut Vec<u8>| match self.handles.get(span.file as usize) {
            Some(handle) => read_kept(handle, path, span, bytes),
            None => read_span(&open_regular(path)?, span, bytes),
        };
        read(bytes).map_err(|e| self.sample(row, span, e.to_string()))?;
        Ok(span)
    }

    fn sample(&self, row: usize, span: Span, reason: String) -> Error {
        Error::Sample { row, file: self.files[span.file as usize].clone(), offset: span.offset, reason }
    }
}

/// The reason given for a panic in a decoder, which means a damaged image and must not end the
/// epoch.
const PANIC: &str = "the decoder gave up on it";

/// Runs a decoder; errors and panics both become an `Err` with a reason.
///
/// # Errors
/// The errors of `decode`, and panics.
pub fn guarded<T>(
    decode: impl FnOnce() -> std::result::Result<T, decode::Reason>,
) -> std::result::Result<T, decode::Reason> {
    // After a panic the buffer may contain anything. The next image overwrites it.
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|_| Err(PANIC.into()))
}

impl Source for Encoded {
    fn len(&self) -> usize {
        self.spans.len()
    }

    fn image<'a>(
        &'a self,
        row: usize,
        scratch: &'a mut Scratch,
        choose: &dyn Fn(Size) -> Result<View>,
    ) -> Result<(ImageView<'a>, View)> {
        let Scratch { encoded, rgb } = scratch;
        let span = self.read(row, encoded)?;
        let bad = |reason| self.sample(row, span, reason);
        let size = guarded(|| decode::size(encoded)).map_err(bad)?;
        let view = choose(size)?;
        view.check().map_err(bad)?;
        let shown = guarded(|| decode::decode_top(encoded, view.bottom(size), rgb)).map_err(bad)?;
        if shown.0 < view.bottom(size) || shown.1 != size.1 {
            return Err(bad("its headers contradict each other".into()));
        }
        Ok((ImageView { rgb, height: shown.0, width: shown.1 }, view))
    }
}

/// Reads a span of a file, and keeps the file open unless too many are.
fn read_kept(handle: &OnceLock<KeptFile>, path: &Path, span: Span, bytes: &mut Vec<u8>) -> io::Result<()> {
    if let Some(KeptFile(file)) = handle.get() {
        return read_span(file, span, bytes);
    }
    match KeptFile::new(open_regular(path)?) {
        Ok(file) => read_span(&handle.get_or_init(|| file).0, span, bytes),
        Err(file) => read_span(&file, span, bytes),
    }
}

/// Opens a regular file. Opening a named pipe would block until there is a writer, and a device may
/// have no end.
fn open_regular(path: &Path) -> io::Result<File> {
    if std::fs::metadata(path)?.is_file() {
        File::open(path)
    } else {
        Err(io::Error::other("it is not a regular file"))
    }
}

fn read_span(file: &File, span: Span, bytes: &mut Vec<u8>) -> io::Result<()> {
    let end = file.metadata()?.len();
    let length = if span.length == 0 { end.saturating_sub(span.offset) } else { span.length };
    let fits = span.offset.checked_add(length).is_some_and(|last| last <= end) && length <= Encoded::MAX_BYTES;
    if !fits {
        let message = format!("{length} bytes from {} on are not in its {end} bytes", span.offset);
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
    }
    bytes.resize(length as usize, 0);
    read_exact_at(file, bytes, span.offset)
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                bytes = &mut bytes[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::augment::Transform;
    use crate::images::geometry::Window;
    use crate::rng::Stream;

    #[test]
    fn an_image_of_one_row_is_not_enlarged_beyond_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("1x60000.png");
        let mut encoder = png::Encoder::new(File::create(&path).unwrap(), 60_000, 1);
        encoder.set_color(png::ColorType::Grayscale);
        encoder.write_header().unwrap().write_image_data(&[0; 60_000]).unwrap();
        let source = Encoded::new(vec![path], vec![Span { file: 0, offset: 0, length: 0 }]).unwrap();
        let transform = Transform::ResizeCenterCrop { resize: 2000 };
        let choose = |size| transform.view(Stream { seed: 0, stream: 0 }, 0, 0, size, (224, 224));
        let message = source.image(0, &mut Scratch::default(), &choose).unwrap_err().to_string();
        let reason = "it would be resized to 2000 x 120000000, more than 67108864 pixels";
        assert!(message.ends_with(reason), "{message}");
        let raw = Pixels::new(&[0; 180_000], 1, 60_000).unwrap();
        let message = raw.image(0, &mut Scratch::default(), &choose).unwrap_err().to_string();
        assert_eq!(message, format!("image 0: {reason}"));
    }

    #[test]
    fn sources_share_the_number_of_files_that_are_kept_open() {
        let folder = tempfile::tempdir().unwrap();
        let source = |name: &str| {
            let paths: Vec<PathBuf> = (0..300).map(|i| folder.path().join(format!("{name}{i}"))).collect();
            paths.iter().for_each(|path| std::fs::write(path, b"image").unwrap());
            let spans = (0..300).map(|file| Span { file, offset: 0, length: 0 }).collect();
            Encoded::new(paths, spans).unwrap()
        };
        let read = |source: &Encoded| {
            let mut bytes = Vec::new();
            for row in 0..300 {
                source.read(row, &mut bytes).unwrap();
                assert_eq!(bytes, b"image");
            }
        };
        let kept = |source: &Encoded| source.handles.iter().filter(|handle| handle.get().is_some()).count();
        let (first, second) = (source("first"), source("second"));
        read(&first);
        read(&second);
        assert!(kept(&first) > 0 && kept(&first) + kept(&second) <= Encoded::MAX_OPEN);
        drop(first);
        read(&second);
        assert!(kept(&second) > 250, "the files of a source that is gone are closed");
    }

    #[test]
    fn a_span_that_cannot_be_read_names_its_file_and_row() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("images.pack");
        std::fs::write(&path, b"0123456789").unwrap();
        let spans = vec![
            Span { file: 0, offset: 2, length: 3 },
            Span { file: 0, offset: 8, length: 3 },
            Span { file: 1, offset: 0, length: 0 },
            Span { file: 0, offset: u64::MAX, length: 5 },
        ];
        let source = Encoded::new(vec![path.clone(), folder.path().join("gone.jpg")], spans).unwrap();
        let mut bytes = Vec::new();
        source.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, b"234");
        let choose = |_| Ok(View { resized: None, window: Window::default() });
        let message = |row| source.image(row, &mut Scratch::default(), &choose).unwrap_err().to_string();
        let pack = path.display();
        assert_eq!(
            message(0),
            format!("image 0 ({pack} at byte 2): expected JPEG or PNG, got bytes that begin with [32, 33, 34]")
        );
        assert_eq!(message(1), format!("image 1 ({pack} at byte 8): 3 bytes from 8 on are not in its 10 bytes"));
        assert!(message(2).contains("gone.jpg at byte 0): "));
        assert!(message(3).contains("are not in its 10 bytes"));
        let outside = Encoded::new(vec![], vec![Span { file: 0, offset: 0, length: 1 }]).unwrap_err().to_string();
        assert!(outside.starts_with("image 0 is said to be 1 bytes of file 0; expected"), "{outside}");
    }
}
