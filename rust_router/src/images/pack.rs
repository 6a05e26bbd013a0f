//! Packs: files with many encoded images, their labels, and a text about their origin.
//!
//! All numbers are little-endian. A pack consists of a header of 64 bytes, the images, the index
//! and the text.
//!
//! | bytes | header |
//! |---|---|
//! | 0–7 | `ADVMPACK` |
//! | 8–11 | version, 1 |
//! | 12–15 | CRC-32 of index and text |
//! | 16–23 | n, number of images |
//! | 24–31 | start of the index |
//! | 32–39 | length of the text |
//!
//! The index contains n + 1 positions (u64: the starts of the images, then the start of the index)
//! and n labels (i64).

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::atomic::NewFile;
use crate::error::FileError;
use crate::images::error::{Error, Result};
use crate::images::source::{Encoded, Span};

const MAGIC: &[u8; 8] = b"ADVMPACK";
const VERSION: u32 = 1;
const HEADER: u64 = 64;

/// Writes a pack. If it is dropped before [`PackWriter::finish`], no file remains.
#[derive(Debug)]
pub struct PackWriter {
    file: NewFile,
    path: PathBuf,
    starts: Vec<u64>,
    labels: Vec<i64>,
}

impl PackWriter {
    /// Starts a pack. The file appears at `path` after [`PackWriter::finish`].
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn create(path: &Path) -> Result<Self> {
        let mut file = NewFile::create(path)?;
        file.out.write_all(&[0; HEADER as usize]).map_err(|e| FileError::io("write", path, e))?;
        Ok(Self { file, path: path.to_owned(), starts: vec![HEADER], labels: Vec::new() })
    }

    /// Adds one encoded image.
    ///
    /// # Errors
    /// The image has no bytes, or the disk is full.
    pub fn add(&mut self, image: &[u8], label: i64) -> Result<()> {
        let row = self.labels.len();
        if image.is_empty() {
            return Err(Error::Empty { row });
        }
        self.file.out.write_all(image).map_err(|e| FileError::io("write", &self.path, e))?;
        self.starts.push(self.starts[row] + image.len() as u64);
        self.labels.push(label);
        Ok(())
    }

    /// Writes index, text and header, and renames the file to its final name.
    ///
    /// # Errors
    /// The disk is full.
    pub fn finish(mut self, text: &str) -> Result<()> {
        let mut index: Vec<u8> = self.starts.iter().flat_map(|start| start.to_le_bytes()).collect();
        index.extend(self.labels.iter().flat_map(|label| label.to_le_bytes()));
        index.extend(text.as_bytes());
        let mut header = Vec::with_capacity(HEADER as usize);
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend(crc32fast::hash(&index).to_le_bytes());
        header.extend((self.labels.len() as u64).to_le_bytes());
        header.extend(self.starts[self.labels.len()].to_le_bytes());
        header.extend((text.len() as u64).to_le_bytes());
        let out = &mut self.file.out;
        let written = out.write_all(&index).and_then(|()| out.rewind()).and_then(|()| out.write_all(&header));
        written.map_err(|e| FileError::io("write", &self.path, e))?;
        Ok(self.file.commit()?)
    }
}

/// The index of a pack.
#[derive(Debug, PartialEq, Eq)]
pub struct Pack {
    /// The position of each image in the pack.
    pub spans: Vec<Span>,
    /// The label of each image.
    pub labels: Vec<i64>,
    /// The text about the origin of the images.
    pub text: String,
}

impl Pack {
    /// Reads and checks header, index and text of a pack. It does not read the images.
    ///
    /// # Errors
    /// The file is missing, is not a pack, or is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| FileError::io("read", path, e))?;
        let pack = Self::read(BufReader::new(file));
        Ok(pack.map_err(|reason| FileError::Format { what: "pack", path: path.to_owned(), reason })?)
    }

    /// Reads a pack from any reader, like [`Self::open`]. The used memory is at most a small
    /// multiple of the number of bytes.
    ///
    /// # Errors
    /// The bytes are not a complete pack. The error is the reason.
    pub fn read(mut file: impl Read + Seek) -> std::result::Result<Self, String> {
        let length = file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
        let mut header = [0; HEADER as usize];
        file.rewind().and_then(|()| file.read_exact(&mut header)).map_err(|e| e.to_string())?;
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let (version, crc) = (number(8) as u32, (number(8) >> 32) as u32);
        if &header[..8] != MAGIC || version != VERSION {
            return Err(format!("expected {} version {VERSION}", String::from_utf8_lossy(MAGIC)));
        }
        let (n, index_start, text_length) = (number(16), number(24), number(32));
        let index_length = n.checked_mul(16).and_then(|bytes| bytes.checked_add(8));
        let end = index_length.and_then(|bytes| index_start.checked_add(bytes)?.checked_add(text_length));
        if end != Some(length) {
            return Err(format!("it has {length} bytes, which are not those its header counts"));
        }
        let mut index = Vec::new();
        let read = file.seek(SeekFrom::Start(index_start)).and_then(|_| file.read_to_end(&mut index));
        read.map_err(|e| e.to_string())?;
        if crc32fast::hash(&index) != crc {
            return Err("the checksum of its index differs".into());
        }
        let text = index.split_off((length - text_length - index_start) as usize);
        let text = String::from_utf8(text).map_err(|e| e.to_string())?;
        let labels = index.split_off(8 * (n as usize + 1));
        let starts: Vec<u64> = index.as_chunks().0.iter().map(|&bytes| u64::from_le_bytes(bytes)).collect();
        let labels = labels.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect();
        if starts[0] != HEADER || starts[n as usize] != index_start || !starts.is_sorted_by(|a, b| a < b) {
            return Err("its images do not lie one after another".into());
        }
        let spans = starts.windows(2).map(|pair| Span { file: 0, offset: pair[0], length: pair[1] - pair[0] });
        Ok(Self { spans: spans.collect(), labels, text })
    }

    /// The images of the pack at `path`.
    ///
    /// # Errors
    /// An image has more bytes than an image may have.
    pub fn source(&self, path: &Path) -> Result<Encoded> {
        Encoded::new(vec![path.to_owned()], self.spans.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn pack(folder: &Path, images: &[&[u8]]) -> Vec<u8> {
        let path = folder.join("images.pack");
        let mut writer = PackWriter::create(&path).unwrap();
        for (image, label) in images.iter().zip(-1..) {
            writer.add(image, label).unwrap();
        }
        writer.finish("from ünit tests").unwrap();
        std::fs::read(&path).unwrap()
    }

    #[test]
    fn what_was_packed_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        pack(folder.path(), &[b"first", b"2nd"]);
        let path = folder.path().join("images.pack");
        let opened = Pack::open(&path).unwrap();
        assert_eq!((opened.labels.as_slice(), opened.text.as_str()), (&[-1, 0][..], "from ünit tests"));
        let source = opened.source(&path).unwrap();
        let mut bytes = Vec::new();
        source.read(1, &mut bytes).unwrap();
        assert_eq!(bytes, b"2nd");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(Pack::read(Cursor::new(pack(folder.path(), &[]))).unwrap().spans.is_empty());
    }

    #[test]
    fn a_pack_given_up_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = PackWriter::create(&folder.path().join("images.pack")).unwrap();
        writer.add(b"first", 0).unwrap();
        assert!(writer.add(b"", 0).is_err());
        drop(writer);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_pack_cut_or_changed_anywhere_but_in_its_images_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let whole = pack(folder.path(), &[b"first", b"2nd"]);
        for end in 0..whole.len() {
            assert!(Pack::read(Cursor::new(&whole[..end])).is_err(), "cut at {end}");
        }
        let images = HEADER as usize..HEADER as usize + 8;
        for place in (0..40).chain(images.end..whole.len()) {
            let mut changed = whole.clone();
            changed[place] ^= 0x40;
            assert!(Pack::read(Cursor::new(changed)).is_err(), "changed at {place}");
        }
        assert!(Pack::read(Cursor::new([&whole[..], &[0]].concat())).is_err());
    }
}
