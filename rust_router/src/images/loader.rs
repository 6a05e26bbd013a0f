//! Fills batches on one thread or several. The bytes do not depend on the number of threads.

use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::images::augment::Transform;
use crate::images::batch::{Layout, Levels, write};
use crate::images::error::{Error, MAX_THREADS, Result};
use crate::images::resize::Resizer;
use crate::images::source::{Scratch, Source};
use crate::rng::Stream;

/// Threads that fill batches. They belong to the process that created them.
#[derive(Debug)]
pub struct Workers {
    pool: Option<rayon::ThreadPool>,
    process: u32,
}

impl Workers {
    /// Starts `num_threads` threads. With 1, the calling thread does the work.
    ///
    /// # Errors
    /// `num_threads` is not in 1..=[`MAX_THREADS`], or the system cannot start so many threads.
    pub fn new(num_threads: usize) -> Result<Self> {
        let process = std::process::id();
        let pool = match num_threads {
            1 => None,
            2..=MAX_THREADS => {
                let builder = rayon::ThreadPoolBuilder::new().num_threads(num_threads);
                let named = builder.thread_name(|i| format!("loader-{i}"));
                Some(named.build().map_err(|e| Error::Threads { num_threads, reason: e.to_string() })?)
            }
            _ => return Err(Error::NumThreads { num_threads }),
        };
        Ok(Self { pool, process })
    }

    /// Whether the calling thread fills the batches.
    #[must_use]
    pub fn are_only_the_caller(&self) -> bool {
        self.pool.is_none()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // A forked child does not have the threads of the pool. Ending them there could block
        // forever.
        if self.process != std::process::id() {
            std::mem::forget(self.pool.take());
        }
    }
}

/// The processing of every image, which is the same in all batches.
#[derive(Debug)]
pub struct Recipe<T> {
    /// Random numbers of crops and flips.
    pub stream: Stream,
    /// Crops, flips and resizing.
    pub transform: Transform,
    /// The values of bytes in the batch.
    pub levels: Box<Levels<T>>,
    /// Order of the batch's axes.
    pub layout: Layout,
    /// Whether an image that cannot be read or decoded is left out. Otherwise such an image is an
    /// error.
    pub skip_bad: bool,
}

/// An image that was left out.
#[derive(Debug)]
pub struct Skipped {
    /// Its position in the batch, which is filled with zeros.
    pub position: usize,
    /// The reason.
    pub error: Error,
}

/// The images of one batch, and their size.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Rows of the source, in the order of the batch.
    pub rows: &'a [i64],
    /// The epoch, which selects the random numbers.
    pub epoch: u64,
    /// Height of the images in the batch, in pixels.
    pub height: usize,
    /// Width of the images in the batch, in pixels.
    pub width: usize,
    /// Called before every image. If it returns true, the remaining images are not made.
    pub stop: &'a (dyn Fn() -> bool + Sync),
}

thread_local! {
    static SCRATCH: RefCell<(Scratch, Resizer)> = RefCell::default();
}

/// Fills `out` with `rows.len()` images of `height * width * 3` elements. Returns the skipped
/// images in the order of the batch. The result depends only on the source, the recipe, the rows
/// and the epoch.
///
/// # Errors
/// The buffer has the wrong size; the source lacks a row; the transform cannot produce the size of
/// the batch; an image cannot be read or decoded, and `skip_bad` is false; or `stop` returned true.
pub fn fill<T: Copy + Send + Sync>(
    workers: &Workers,
    source: &dyn Source,
    recipe: &Recipe<T>,
    request: Request<'_>,
    out: &mut [T],
) -> Result<Vec<Skipped>> {
    let Request { rows, height, width, .. } = request;
    let elements = height * width * 3;
    if elements == 0 || out.len() != rows.len() * elements {
        return Err(Error::Buffer { num_images: rows.len(), size: (height, width), elements: out.len() });
    }
    let skipped = Mutex::new(Vec::new());
    let one = |(position, (&row, out)): (usize, (&i64, &mut [T]))| match show(source, recipe, request, row, out) {
        Err(error @ Error::Sample { .. }) if recipe.skip_bad => {
            out.fill(recipe.levels[0][0]);
            skipped.lock().unwrap_or_else(PoisonError::into_inner).push(Skipped { position, error });
            Ok(())
        }
        result => result,
    };
    match &workers.pool {
        None => rows.iter().zip(out.chunks_exact_mut(elements)).enumerate().try_for_each(one)?,
        Some(pool) => {
            pool.install(|| rows.par_iter().zip(out.par_chunks_exact_mut(elements)).enumerate().try_for_each(one))?;
        }
    }
    let mut skipped = skipped.into_inner().unwrap_or_else(PoisonError::into_inner);
    skipped.sort_unstable_by_key(|skipped| skipped.position);
    Ok(skipped)
}

/// Writes one image.
fn show<T: Copy>(source: &dyn Source, recipe: &Recipe<T>, request: Request<'_>, row: i64, out: &mut [T]) -> Result<()> {
    let Request { epoch, height, width, stop, .. } = request;
    if stop() {
        return Err(Error::Stopped);
    }
    let index = usize::try_from(row).map_err(|_| Error::Row { row, len: source.len() })?;
    SCRATCH.with_borrow_mut(|(scratch, resizer)| {
        let choose = |size| recipe.transform.view(recipe.stream, epoch, index as u64, size, (height, width));
        let (mut image, view) = source.image(index, scratch, &choose)?;
        if let Some((part, size)) = view.resized {
            image = resizer.resize(image, part, size).map_err(|reason| Error::Resize { row: index, reason })?;
        }
        write(image, view.window, &recipe.levels, recipe.layout, height, out);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::batch::byte_levels;
    use crate::images::geometry::{ImageView, Size, View};
    use crate::images::source::{Encoded, Pixels, Span};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    fn recipe() -> Recipe<u8> {
        Recipe {
            stream: Stream { seed: 1, stream: 2 },
            transform: Transform::CropFlip { padding: 2, flip: true },
            levels: byte_levels(),
            layout: Layout::Planar,
            skip_bad: false,
        }
    }

    fn batch(num_threads: usize, rows: &[i64]) -> Result<Vec<u8>> {
        let rgb: Vec<u8> = (0..10 * 4 * 5 * 3_usize).map(|v| v as u8).collect();
        let mut out = vec![0; rows.len() * 60];
        let source = Pixels::new(&rgb, 4, 5)?;
        let request = Request { rows, epoch: 3, height: 4, width: 5, stop: &|| false };
        fill(&Workers::new(num_threads)?, &source, &recipe(), request, &mut out)?;
        Ok(out)
    }

    #[test]
    fn bytes_do_not_depend_on_the_threads_or_the_company() {
        let rows = [9, 0, 3, 3, 7, 1, 2];
        let alone = batch(1, &rows).unwrap();
        for num_threads in [2, 7] {
            assert_eq!(batch(num_threads, &rows).unwrap(), alone);
        }
        assert_eq!(batch(1, &rows[1..3]).unwrap(), alone[60..180]);
    }

    #[test]
    fn rows_outside_the_source_are_named() {
        for row in [-1, 10] {
            let message = batch(2, &[0, row]).unwrap_err().to_string();
            assert_eq!(message, format!("row {row} is outside the 10 images of the source; use rows from 0 to 9"));
        }
    }

    #[test]
    fn a_number_of_threads_out_of_range_starts_none() {
        for num_threads in [0, MAX_THREADS + 1, usize::MAX] {
            let message = Workers::new(num_threads).unwrap_err().to_string();
            assert_eq!(message, format!("expected 1 to 1024 loader threads, got {num_threads}"));
        }
    }

    /// A source that requests a stop while its third image is made.
    #[derive(Default)]
    struct Impatient {
        shown: AtomicUsize,
        stop: AtomicBool,
    }

    impl Source for Impatient {
        fn len(&self) -> usize {
            1000
        }

        fn image<'a>(
            &'a self,
            _: usize,
            _: &'a mut Scratch,
            choose: &dyn Fn(Size) -> Result<View>,
        ) -> Result<(ImageView<'a>, View)> {
            if self.shown.fetch_add(1, Ordering::SeqCst) == 2 {
                self.stop.store(true, Ordering::SeqCst);
            }
            Ok((ImageView { rgb: &[7; 60], height: 4, width: 5 }, choose((4, 5))?))
        }
    }

    #[test]
    fn a_stopped_batch_ends_with_the_images_that_are_being_made() {
        let rows: Vec<i64> = (0..1000).collect();
        for num_threads in [1, 2, 7] {
            let source = Impatient::default();
            let stop = || source.stop.load(Ordering::SeqCst);
            let request = Request { rows: &rows, epoch: 0, height: 4, width: 5, stop: &stop };
            let workers = Workers::new(num_threads).unwrap();
            let result = fill(&workers, &source, &recipe(), request, &mut vec![0; 60 * 1000]);
            assert!(matches!(result, Err(Error::Stopped)));
            // Three, and one more on every other thread, which may have asked just before.
            let shown = source.shown.into_inner();
            assert!((3..=2 + num_threads).contains(&shown), "{shown} images on {num_threads} threads");
        }
    }

    #[test]
    fn a_bad_image_ends_the_batch_or_is_left_out_and_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("images");
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 5, 4);
        encoder.set_color(png::ColorType::Rgb);
        encoder.write_header().unwrap().write_image_data(&[9; 60]).unwrap();
        let length = bytes.len() as u64;
        bytes.extend([0; 10]);
        std::fs::write(&path, bytes).unwrap();
        let spans = vec![Span { file: 0, offset: 0, length }, Span { file: 0, offset: length, length: 10 }];
        let source = Encoded::new(vec![path], spans).unwrap();
        let workers = Workers::new(2).unwrap();
        let request = Request { rows: &[1, 0, 1], epoch: 0, height: 4, width: 5, stop: &|| false };
        let mut out = vec![7; 180];
        let mut recipe = Recipe { transform: Transform::AsTheyAre, ..recipe() };
        let message = fill(&workers, &source, &recipe, request, &mut out).unwrap_err().to_string();
        assert!(message.starts_with("image 1 (") && message.contains("expected JPEG or PNG"), "{message}");
        recipe.skip_bad = true;
        let skipped = fill(&workers, &source, &recipe, request, &mut out).unwrap();
        assert_eq!(skipped.iter().map(|s| s.position).collect::<Vec<_>>(), [0, 2]);
        assert_eq!(out, [[0; 60], [9; 60], [0; 60]].concat());
    }
}
