//! Filling one batch, on one thread or several, always with the same bytes.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use crate::augment::{CropFlip, Layout, Levels, Window, write};
use crate::error::{Error, Result};
use crate::rng::Stream;
use crate::source::Source;

/// Threads that fill batches. They belong to the process that made them.
#[derive(Debug)]
pub struct Workers {
    pool: Option<rayon::ThreadPool>,
    process: u32,
}

impl Workers {
    /// `num_threads` threads; with 1 the caller's own thread does the work.
    ///
    /// # Errors
    /// No threads asked for, or more than the system gives.
    pub fn new(num_threads: usize) -> Result<Self> {
        let process = std::process::id();
        let pool = match num_threads {
            0 => return Err(Error::Argument("expected at least 1 loader thread, got 0".into())),
            1 => None,
            _ => {
                let builder = rayon::ThreadPoolBuilder::new().num_threads(num_threads);
                let named = builder.thread_name(|i| format!("loader-{i}"));
                Some(named.build().map_err(|e| Error::Threads { num_threads, reason: e.to_string() })?)
            }
        };
        Ok(Self { pool, process })
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // The threads of a pool do not exist in a forked child, where telling them to end could wait for ever.
        if self.process != std::process::id() {
            std::mem::forget(self.pool.take());
        }
    }
}

/// What is done with every image, whatever the batch.
#[derive(Debug)]
pub struct Recipe<T> {
    /// Random numbers.
    pub stream: Stream,
    /// Augmentation, or none.
    pub augment: Option<CropFlip>,
    /// What bytes become.
    pub levels: Box<Levels<T>>,
    /// Order of the batch's axes.
    pub layout: Layout,
}

/// Which images a batch has, and of what size.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Rows of the source, in the batch's order.
    pub rows: &'a [i64],
    /// The epoch that sees them.
    pub epoch: u64,
    /// Height of the batch's images.
    pub height: usize,
    /// Width of the batch's images.
    pub width: usize,
    /// Looked at before every image: once set, the rest of the batch is not made.
    pub stop: &'a AtomicBool,
}

/// Fills `out`, `rows.len()` images of `height * width * 3` elements; the result depends on the recipe, the rows and
/// the epoch alone.
///
/// # Errors
/// A buffer of another size, a row the source does not have, an image of another size than the batch's, or being
/// stopped.
pub fn fill<T: Copy + Send + Sync>(
    workers: &Workers,
    source: &dyn Source,
    recipe: &Recipe<T>,
    request: Request<'_>,
    out: &mut [T],
) -> Result<()> {
    let Request { rows, epoch, height, width, stop } = request;
    let elements = height * width * 3;
    if elements == 0 || out.len() != rows.len() * elements {
        let message =
            format!("expected a buffer of {} x {height} x {width} x 3, got {} elements", rows.len(), out.len());
        return Err(Error::Argument(message));
    }
    let one = |(&row, out): (&i64, &mut [T])| {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped);
        }
        let index = usize::try_from(row).map_err(|_| Error::Row { row, len: source.len() })?;
        let image = source.image(index)?;
        if (image.height, image.width) != (height, width) {
            let (h, w) = (image.height, image.width);
            return Err(Error::Argument(format!("expected images of {height}x{width}, but image {row} is {h}x{w}")));
        }
        let window = match recipe.augment {
            Some(augment) => augment.window(recipe.stream, epoch, index as u64),
            None => Window::default(),
        };
        write(image, window, &recipe.levels, recipe.layout, height, out);
        Ok(())
    };
    match &workers.pool {
        None => rows.iter().zip(out.chunks_exact_mut(elements)).try_for_each(one),
        Some(pool) => pool.install(|| rows.par_iter().zip(out.par_chunks_exact_mut(elements)).try_for_each(one)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::augment::byte_levels;
    use crate::source::Pixels;

    fn recipe() -> Recipe<u8> {
        let augment = Some(CropFlip { padding: 2, flip: true });
        Recipe { stream: Stream { seed: 1, stream: 2 }, augment, levels: byte_levels(), layout: Layout::Planar }
    }

    fn batch(num_threads: usize, rows: &[i64], stop: &AtomicBool) -> Result<Vec<u8>> {
        let rgb: Vec<u8> = (0..10 * 4 * 5 * 3_usize).map(|v| v as u8).collect();
        let mut out = vec![0; rows.len() * 60];
        let source = Pixels::new(&rgb, 4, 5)?;
        let request = Request { rows, epoch: 3, height: 4, width: 5, stop };
        fill(&Workers::new(num_threads)?, &source, &recipe(), request, &mut out)?;
        Ok(out)
    }

    #[test]
    fn bytes_do_not_depend_on_the_threads_or_the_company() {
        let rows = [9, 0, 3, 3, 7, 1, 2];
        let alone = batch(1, &rows, &AtomicBool::new(false)).unwrap();
        for num_threads in [2, 7] {
            assert_eq!(batch(num_threads, &rows, &AtomicBool::new(false)).unwrap(), alone);
        }
        assert_eq!(batch(1, &rows[1..3], &AtomicBool::new(false)).unwrap(), alone[60..180]);
    }

    #[test]
    fn rows_outside_the_source_are_named() {
        for row in [-1, 10] {
            let message = batch(2, &[0, row], &AtomicBool::new(false)).unwrap_err().to_string();
            assert_eq!(message, format!("row {row} is outside the 10 images of the source; use rows from 0 to 9"));
        }
    }

    #[test]
    fn a_stopped_batch_says_so() {
        assert!(matches!(batch(1, &[0], &AtomicBool::new(true)), Err(Error::Stopped)));
    }
}
