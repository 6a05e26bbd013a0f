//! Writes images into a batch: converts the values, and orders the axes.

use crate::images::geometry::{ImageView, Window};

/// Order of a batch's axes in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Channels before rows and columns: `[batch, 3, height, width]`.
    Planar,
    /// Channels last: `[batch, height, width, 3]`.
    Interleaved,
}

/// A table `[channel][byte]` of the values that bytes have in a batch.
pub type Levels<T> = [[T; 256]; 3];

/// The table that keeps bytes unchanged.
#[must_use]
pub fn byte_levels() -> Box<Levels<u8>> {
    tabulate(|_, level| level)
}

/// The table of `(byte / 255 - mean[c]) / std[c]` in 32-bit floats. Each operation is rounded as in
/// torch and NumPy.
#[must_use]
pub fn float_levels(mean: [f32; 3], std: [f32; 3]) -> Box<Levels<f32>> {
    tabulate(|c, level| (f32::from(level) / 255.0 - mean[c]) / std[c])
}

fn tabulate<T: Copy + Default>(value: impl Fn(usize, u8) -> T) -> Box<Levels<T>> {
    let mut levels = Box::new([[T::default(); 256]; 3]);
    for (c, channel) in levels.iter_mut().enumerate() {
        channel.iter_mut().zip(0..=255).for_each(|(entry, level)| *entry = value(c, level));
    }
    levels
}

/// Writes the part of `image` that starts at `window` and has `height` rows into `out`.
///
/// `out` has `3 * height * width` elements, which determines the width.
pub fn write<T: Copy>(
    image: ImageView<'_>,
    window: Window,
    levels: &Levels<T>,
    layout: Layout,
    height: usize,
    out: &mut [T],
) {
    let width = out.len() / (3 * height);
    // The columns of the window that lie inside the image. All other columns are zero.
    let inside = clip(window.left, width, image.width);
    let source_start = if inside.is_empty() { 0 } else { 3 * inside.start.saturating_add_signed(window.left) };
    let source_len = 3 * inside.len();
    let target = if window.mirrored { width - inside.end..width - inside.start } else { inside };
    let row_of = |y: usize| {
        let row = y.checked_add_signed(window.top).filter(|&row| row < image.height)?;
        Some(&image.rgb[3 * row * image.width + source_start..][..source_len])
    };
    match layout {
        // Writes one plane after another: reading a cached row three times is faster than writing
        // three planes at once.
        Layout::Planar => {
            for c in 0..3 {
                let levels = &levels[c];
                let plane = &mut out[c * height * width..][..height * width];
                for (y, row) in plane.chunks_exact_mut(width).enumerate() {
                    let Some(source) = row_of(y) else {
                        row.fill(levels[0]);
                        continue;
                    };
                    let row = frame(row, &target, levels[0]);
                    let (pixels, _) = source.as_chunks::<3>();
                    let put = |(out, pixel): (&mut T, &[u8; 3])| *out = levels[usize::from(pixel[c])];
                    if window.mirrored {
                        row.iter_mut().rev().zip(pixels).for_each(put);
                    } else {
                        row.iter_mut().zip(pixels).for_each(put);
                    }
                }
            }
        }
        Layout::Interleaved => {
            let zero = [levels[0][0], levels[1][0], levels[2][0]];
            let put = |(out, pixel): (&mut [T; 3], &[u8; 3])| {
                *out = std::array::from_fn(|c| levels[c][usize::from(pixel[c])]);
            };
            for (y, row) in out.chunks_exact_mut(3 * width).enumerate() {
                let (row, _) = row.as_chunks_mut::<3>();
                let Some(source) = row_of(y) else {
                    row.fill(zero);
                    continue;
                };
                let row = frame(row, &target, zero);
                let (pixels, _) = source.as_chunks::<3>();
                if window.mirrored {
                    row.iter_mut().rev().zip(pixels).for_each(put);
                } else {
                    row.iter_mut().zip(pixels).for_each(put);
                }
            }
        }
    }
}

/// The numbers `i` in `0..len` with `i + offset` in `0..limit`.
fn clip(offset: isize, len: usize, limit: usize) -> std::ops::Range<usize> {
    let end = limit.saturating_add_signed(offset.saturating_neg()).min(len);
    let start = 0_usize.saturating_add_signed(offset.saturating_neg()).min(end);
    start..end
}

/// Fills a row outside `inside` with `zero`, and returns the part inside.
fn frame<'a, T: Copy>(row: &'a mut [T], inside: &std::ops::Range<usize>, zero: T) -> &'a mut [T] {
    row[..inside.start].fill(zero);
    row[inside.end..].fill(zero);
    &mut row[inside.clone()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, one element at a time.
    fn reference(
        image: ImageView<'_>,
        window: Window,
        height: usize,
        width: usize,
        c: usize,
        y: usize,
        x: usize,
    ) -> u8 {
        assert!(y < height);
        let column = if window.mirrored { width - 1 - x } else { x };
        let (row, column) = (y as isize + window.top, column as isize + window.left);
        let in_image = (0..image.height as isize).contains(&row) && (0..image.width as isize).contains(&column);
        if in_image { image.rgb[(row as usize * image.width + column as usize) * 3 + c] } else { 0 }
    }

    proptest! {
        #[test]
        fn a_window_shows_the_image_and_zeros_around_it(
            (ih, iw, h, w) in (1..6_usize, 1..6_usize, 1..8_usize, 1..8_usize),
            (top, left) in (-9..9_isize, -9..9_isize),
            mirrored: bool,
        ) {
            let rgb: Vec<u8> = (1..=ih * iw * 3).map(|v| v as u8).collect();
            let image = ImageView { rgb: &rgb, height: ih, width: iw };
            let window = Window { top, left, mirrored };
            let mut planar = vec![255_u8; 3 * h * w];
            let mut interleaved = planar.clone();
            write(image, window, &byte_levels(), Layout::Planar, h, &mut planar);
            write(image, window, &byte_levels(), Layout::Interleaved, h, &mut interleaved);
            for (c, y, x) in (0..3).flat_map(|c| (0..h).flat_map(move |y| (0..w).map(move |x| (c, y, x)))) {
                let expected = reference(image, window, h, w, c, y, x);
                prop_assert_eq!(planar[(c * h + y) * w + x], expected);
                prop_assert_eq!(interleaved[(y * w + x) * 3 + c], expected);
            }
        }
    }

    #[test]
    fn floats_are_levels_over_255_normalized() {
        let levels = float_levels([0.0, 0.5, 0.25], [1.0, 0.5, 0.25]);
        assert_eq!(levels[0][255], 1.0);
        assert_eq!(levels[0][51], 0.2); // 51 / 255
        assert_eq!(levels[1][255], 1.0); // (1 - 0.5) / 0.5
        assert_eq!(levels[2][0], -1.0); // (0 - 0.25) / 0.25
    }
}
