//! Resizes a part of an image with an antialiased bilinear filter, as Pillow and torchvision do.

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions};

use crate::images::geometry::{ImageView, Part, Size};

/// A resizer that reuses its memory.
#[derive(Default)]
pub struct Resizer {
    inner: fast_image_resize::Resizer,
    rgb: Vec<u8>,
}

impl Resizer {
    /// Resizes `part` of `image` to `size`. Pixels outside the part have no influence.
    ///
    /// # Errors
    /// The part or the size is impossible. The error is the reason.
    pub fn resize(&mut self, image: ImageView<'_>, part: Part, size: Size) -> Result<ImageView<'_>, String> {
        let side = |pixels: usize| u32::try_from(pixels).map_err(|e| e.to_string());
        let (height, width) = size;
        self.rgb.resize(height * width * 3, 0);
        // The typed interface compiles the resizer for RGB bytes only and not for all types of
        // pixels.
        let source = TypedImageRef::<U8x3>::from_buffer(side(image.width)?, side(image.height)?, image.rgb);
        let source = source.map_err(|e| e.to_string())?;
        let (left, top) = (side(part.left)?, side(part.top)?);
        let source = TypedCroppedImage::from_ref(&source, left, top, side(part.width)?, side(part.height)?);
        let target = TypedImage::<U8x3>::from_buffer(side(width)?, side(height)?, &mut self.rgb);
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).use_alpha(false);
        let (source, mut target) = (source.map_err(|e| e.to_string())?, target.map_err(|e| e.to_string())?);
        self.inner.resize_typed(&source, &mut target, &options).map_err(|e| e.to_string())?;
        Ok(ImageView { rgb: &self.rgb, height, width })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halving_averages_over_a_tent_and_ignores_what_is_cropped_away() {
        // The part has gray levels 0 8 16 24, between two columns of 255 that are cropped. The
        // filter is a tent of radius 2 around the centers 1 and 3 of the part. Its weights are 1.5
        // : 1.5 : 0.5 (sum 3.5), and 0.5 : 1.5 : 1.5: (1.5 * 0 + 1.5 * 8 + 0.5 * 16) / 3.5 = 5.7
        // and (0.5 * 8 + 1.5 * 16 + 1.5 * 24) / 3.5 = 18.3.
        let rgb: Vec<u8> = [255, 0, 8, 16, 24, 255].iter().flat_map(|&level| [level; 3]).collect();
        let image = ImageView { rgb: &rgb, height: 1, width: 6 };
        let part = Part { top: 0, left: 1, height: 1, width: 4 };
        let mut resizer = Resizer::default();
        assert_eq!(resizer.resize(image, part, (1, 2)).unwrap().rgb, [6, 6, 6, 18, 18, 18]);
        let outside = Part { left: 4, ..part };
        assert!(resizer.resize(image, outside, (1, 2)).is_err());
    }
}
