//! Random crops, flips and resizing. The selected part of an image depends on its size and its
//! random words only.

use crate::images::error::{Error, Result};
use crate::images::geometry::{Part, Size, View, Window};
use crate::rng::{Purpose, Stream, below, unit};

/// The transform of every image. [`mirrored`] decides about flips.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Transform {
    /// No change: images have the size of the batch.
    AsTheyAre,
    /// Zero padding, a random crop of the original size, and a random flip (CIFAR's augmentation).
    CropFlip {
        /// Number of zero pixels on each side.
        padding: u32,
        /// Whether an image is mirrored with probability 1/2.
        flip: bool,
    },
    /// A random rectangle of the image, resized to the size of the batch (ImageNet's augmentation).
    RandomResizedCrop {
        /// Lowest and highest area of the rectangle, as a share of the image's area.
        scale: (f64, f64),
        /// Lowest and highest ratio of width to height.
        ratio: (f64, f64),
        /// Whether an image is mirrored with probability 1/2.
        flip: bool,
    },
    /// Resizing by the shorter side, then a center crop (ImageNet's evaluation).
    ResizeCenterCrop {
        /// Length of the shorter side in pixels.
        resize: usize,
    },
}

impl Transform {
    /// The part of image `index`, of size `image`, that is shown in `epoch` in a batch of images of
    /// size `out`.
    ///
    /// # Errors
    /// The transform cannot produce the size `out` from an image of size `image`.
    pub fn view(self, stream: Stream, epoch: u64, index: u64, image: Size, out: Size) -> Result<View> {
        let upright = Window::default();
        match self {
            Self::AsTheyAre | Self::CropFlip { .. } if image != out => {
                Err(Error::ImageSize { index, size: image, expected: out })
            }
            Self::AsTheyAre => Ok(View { resized: None, window: upright }),
            Self::CropFlip { padding, flip } => {
                let [y, x, ..] = stream.block(Purpose::Crop, epoch, index, 0);
                let places = 2 * u64::from(padding) + 1;
                let offset = |word| below(word, places) as isize - padding as isize;
                let mirrored = flip && mirrored(stream, epoch, index);
                Ok(View { resized: None, window: Window { top: offset(y), left: offset(x), mirrored } })
            }
            Self::RandomResizedCrop { scale, ratio, flip } => {
                let part = random_part(stream, epoch, index, image, scale, ratio);
                let mirrored = flip && mirrored(stream, epoch, index);
                Ok(View { resized: Some((part, out)), window: Window { mirrored, ..upright } })
            }
            Self::ResizeCenterCrop { resize } => {
                let (height, width) = image;
                let longer = |long: usize, short: usize| long * resize / short;
                let size =
                    if height <= width { (resize, longer(width, height)) } else { (longer(height, width), resize) };
                if size.0 < out.0 || size.1 < out.1 {
                    return Err(Error::ResizeTooSmall { resize, out });
                }
                let part = Part { top: 0, left: 0, height, width };
                // torchvision's center_crop uses Python's round, which rounds halves to the even
                // number.
                let middle = |of: usize, shown: usize| ((of - shown) as f64 / 2.0).round_ties_even() as isize;
                let window = Window { top: middle(size.0, out.0), left: middle(size.1, out.1), mirrored: false };
                Ok(View { resized: Some((part, size)), window })
            }
        }
    }
}

/// Whether image `index` is mirrored in `epoch`: the highest bit of its random word.
#[must_use]
pub fn mirrored(stream: Stream, epoch: u64, index: u64) -> bool {
    stream.block(Purpose::Flip, epoch, index, 0)[0] >> 63 == 1
}

/// The algorithm of torchvision's `RandomResizedCrop.get_params`. Each of ten attempts uses one
/// block of words (area, ratio, top, left). If all attempts fail, the result is the largest
/// centered rectangle of an allowed ratio.
fn random_part(
    stream: Stream,
    epoch: u64,
    index: u64,
    (height, width): Size,
    scale: (f64, f64),
    ratio: (f64, f64),
) -> Part {
    let area = (height * width) as f64;
    let between = |word, (low, high): (f64, f64)| low + (high - low) * unit(word);
    for attempt in 0..10 {
        let [area_word, ratio_word, top, left] = stream.block(Purpose::Crop, epoch, index, attempt);
        let target = area * between(area_word, scale);
        let aspect = between(ratio_word, (ratio.0.ln(), ratio.1.ln())).exp();
        let w = (target * aspect).sqrt().round_ties_even() as usize;
        let h = (target / aspect).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let place = |word, free: usize| below(word, free as u64 + 1) as usize;
            return Part { top: place(top, height - h), left: place(left, width - w), height: h, width: w };
        }
    }
    let actual = width as f64 / height as f64;
    let (h, w) = if actual < ratio.0 {
        ((width as f64 / ratio.0).round_ties_even() as usize, width)
    } else if actual > ratio.1 {
        (height, (height as f64 * ratio.1).round_ties_even() as usize)
    } else {
        (height, width)
    };
    let (h, w) = (h.clamp(1, height), w.clamp(1, width));
    Part { top: (height - h) / 2, left: (width - w) / 2, height: h, width: w }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: Stream = Stream { seed: 3, stream: 1 };

    proptest! {
        #[test]
        fn crops_stay_within_the_padding(epoch: u64, index: u64, padding in 0..9_u32) {
            let view = Transform::CropFlip { padding, flip: true }.view(STREAM, epoch, index, (8, 8), (8, 8)).unwrap();
            let Window { top, left, .. } = view.window;
            prop_assert!(top.unsigned_abs() <= padding as usize && left.unsigned_abs() <= padding as usize);
        }

        #[test]
        fn random_parts_lie_in_the_image_with_area_and_ratio_as_asked(
            index: u64, height in 1..400_usize, width in 1..400_usize,
        ) {
            let (scale, ratio) = ((0.25, 1.0), (0.75, 4.0 / 3.0));
            let part = random_part(STREAM, 0, index, (height, width), scale, ratio);
            prop_assert!(part.height >= 1 && part.top + part.height <= height);
            prop_assert!(part.width >= 1 && part.left + part.width <= width);
            // Rounding each side by half a pixel moves the ratio of sides of 20 pixels and more by
            // less than 6 %.
            if part.height >= 20 && part.width >= 20 {
                let aspect = part.width as f64 / part.height as f64;
                prop_assert!((0.7..1.42).contains(&aspect), "{}", aspect);
            }
        }

        #[test]
        fn the_middle_lies_in_the_resized_image(height in 1..300_usize, width in 1..300_usize, crop in 1..64_usize) {
            let view = Transform::ResizeCenterCrop { resize: 64 }.view(STREAM, 0, 0, (height, width), (crop, crop)).unwrap();
            let (_, size) = view.resized.unwrap();
            prop_assert_eq!(size.0.min(size.1), 64);
            prop_assert!(view.window.top as usize + crop <= size.0 && view.window.left as usize + crop <= size.1);
        }
    }

    #[test]
    fn an_image_of_another_size_is_named() {
        let message = Transform::AsTheyAre.view(STREAM, 0, 7, (3, 4), (32, 32)).unwrap_err().to_string();
        assert!(message.starts_with("expected images of 32x32, but image 7 is 3x4"), "{message}");
    }
}
