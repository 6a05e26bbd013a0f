//! Decodes JPEG and PNG to RGB bytes. The first bytes of an image determine its format, not the
//! name of the file.
//!
//! Gray, CMYK, palette, 16-bit and interlaced images become 8-bit RGB. As with Pillow's
//! `convert("RGB")`, an alpha channel is dropped and EXIF is ignored. Decoded JPEG images differ
//! from those of libjpeg-turbo by a few of 255 levels, because the inverse cosine transform rounds
//! differently.

mod foreign;
mod jpeg;
mod png;

use crate::images::geometry::{MAX_PIXELS, Size};

/// Longest side of an image, in pixels.
const MAX_SIDE: usize = 1 << 16;

/// The reason why bytes cannot be decoded.
pub type Reason = String;

/// The formats.
enum Format {
    Jpeg,
    Png,
}

impl Format {
    fn of(bytes: &[u8]) -> Result<Self, Reason> {
        match bytes {
            [] => Err("it is empty".into()),
            [0xFF, 0xD8, 0xFF, ..] => Ok(Self::Jpeg),
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1A, b'\n', ..] => Ok(Self::Png),
            _ => Err(format!("expected JPEG or PNG, got {}", foreign::described(bytes))),
        }
    }
}

/// Decodes an image into `rgb`, reusing its memory. Returns height and width.
///
/// # Errors
/// The bytes are not a complete JPEG or PNG image of at most [`MAX_PIXELS`].
pub fn decode(bytes: &[u8], rgb: &mut Vec<u8>) -> Result<Size, Reason> {
    match Format::of(bytes)? {
        Format::Jpeg => jpeg::decode(bytes, rgb),
        Format::Png => png::decode(bytes, rgb),
    }
}

/// Decodes at least the first `rows` rows of an image. Returns the number of decoded rows and the
/// width.
///
/// The pixels equal those of [`decode`]. Damage below these rows may remain undetected. The
/// function may change the height in the header of `bytes`.
///
/// # Errors
/// The errors of [`decode`].
pub fn decode_top(bytes: &mut [u8], rows: usize, rgb: &mut Vec<u8>) -> Result<Size, Reason> {
    match Format::of(bytes)? {
        Format::Jpeg => jpeg::decode_top(bytes, rows, rgb),
        Format::Png => png::decode(bytes, rgb),
    }
}

/// Height and width of an image, from its header.
///
/// # Errors
/// The bytes do not start with the header of a JPEG or PNG image of at most [`MAX_PIXELS`].
pub fn size(bytes: &[u8]) -> Result<Size, Reason> {
    let (height, width) = match Format::of(bytes)? {
        Format::Jpeg => jpeg::size(bytes),
        Format::Png => png::size(bytes),
    }?;
    check_size(width, height)?;
    Ok((height, width))
}

fn check_size(width: usize, height: usize) -> Result<(), Reason> {
    let fits = width > 0 && height > 0 && width.checked_mul(height).is_some_and(|pixels| pixels <= MAX_PIXELS);
    if fits { Ok(()) } else { Err(format!("expected 1 to {MAX_PIXELS} pixels, got {width} x {height}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::png;

    fn png_of(color: png::ColorType, depth: png::BitDepth, size: (u32, u32), data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, size.0, size.1);
        encoder.set_color(color);
        encoder.set_depth(depth);
        if color == png::ColorType::Indexed {
            encoder.set_palette(vec![1, 2, 3, 4, 5, 6]);
        }
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(data).unwrap();
        writer.finish().unwrap();
        bytes
    }

    #[test]
    fn every_kind_of_png_becomes_rgb() {
        use png::{BitDepth, ColorType};
        let cases: [(ColorType, BitDepth, &[u8], [u8; 6]); 6] = [
            (ColorType::Rgb, BitDepth::Eight, &[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
            (ColorType::Rgba, BitDepth::Eight, &[1, 2, 3, 0, 4, 5, 6, 255], [1, 2, 3, 4, 5, 6]),
            (ColorType::Grayscale, BitDepth::Eight, &[7, 9], [7, 7, 7, 9, 9, 9]),
            (ColorType::GrayscaleAlpha, BitDepth::Eight, &[7, 0, 9, 255], [7, 7, 7, 9, 9, 9]),
            (ColorType::Indexed, BitDepth::One, &[0b0100_0000], [1, 2, 3, 4, 5, 6]),
            (ColorType::Grayscale, BitDepth::Sixteen, &[7, 200, 9, 0], [7, 7, 7, 9, 9, 9]),
        ];
        for (color, depth, data, expected) in cases {
            let bytes = png_of(color, depth, (2, 1), data);
            let mut rgb = vec![99; 50];
            assert_eq!(decode(&bytes, &mut rgb).unwrap(), (1, 2));
            assert_eq!(rgb, expected, "{color:?}");
            assert_eq!(size(&bytes).unwrap(), (1, 2));
        }
    }

    #[test]
    fn what_is_no_image_says_why() {
        let reason = |bytes: &[u8]| decode(bytes, &mut Vec::new()).unwrap_err();
        assert_eq!(reason(b""), "it is empty");
        assert_eq!(reason(b"junk"), "expected JPEG or PNG, got bytes that begin with [6A, 75, 6E, 6B]");
        let remedy = "convert it to JPEG or PNG, for example with Pillow or ImageMagick";
        assert_eq!(reason(b"GIF89a"), format!("expected JPEG or PNG, got GIF; {remedy}"));
        let whole = png_of(png::ColorType::Rgb, png::BitDepth::Eight, (5, 7), &[100; 105]);
        for end in 8..whole.len() - 12 {
            assert!(decode(&whole[..end], &mut Vec::new()).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn a_png_that_claims_to_be_giant_is_refused_before_memory_is_taken() {
        let mut bytes = png_of(png::ColorType::Rgb, png::BitDepth::Eight, (1, 1), &[1, 2, 3]);
        bytes[16..20].copy_from_slice(&70_000_u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&70_000_u32.to_be_bytes());
        let crc = crc32fast::hash(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        let mut rgb = Vec::new();
        let reason = decode(&bytes, &mut rgb).unwrap_err();
        assert_eq!(reason, "expected 1 to 67108864 pixels, got 70000 x 70000");
        assert_eq!(rgb.capacity(), 0);
    }
}
