//! JPEG and PNG to RGB bytes, told apart by their first bytes, never by a file's name.
//!
//! Grey, CMYK, palette, 16-bit and interlaced images become 8-bit RGB; an alpha channel is dropped and EXIF is not read,
//! as Pillow's `convert("RGB")` does. JPEG differs from libjpeg-turbo by a few levels at most: its inverse cosine
//! transform rounds otherwise.

use std::io::Cursor;

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::augment::Size;

/// Largest image that is decoded, in pixels (8192 x 8192): what a hostile header can make one thread allocate.
pub const MAX_PIXELS: usize = 1 << 26;

/// Longest side of an image, in pixels.
const MAX_SIDE: usize = 1 << 16;

/// Why bytes are not an image we can show.
pub type Reason = String;

/// Formats by their first bytes.
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
            _ => Err(format!("expected JPEG or PNG, got bytes that begin with {:02X?}", &bytes[..bytes.len().min(4)])),
        }
    }
}

/// Decodes an image into `rgb`, whose memory is used again, and returns its height and width.
///
/// # Errors
/// Bytes that are not a whole JPEG or PNG image of at most [`MAX_PIXELS`].
pub fn decode(bytes: &[u8], rgb: &mut Vec<u8>) -> Result<Size, Reason> {
    match Format::of(bytes)? {
        Format::Jpeg => jpeg(bytes, rgb),
        Format::Png => png(bytes, rgb),
    }
}

/// Height and width, from the header alone.
///
/// # Errors
/// Bytes that do not begin like a JPEG or PNG image.
pub fn size(bytes: &[u8]) -> Result<Size, Reason> {
    match Format::of(bytes)? {
        Format::Jpeg => {
            let mut decoder = jpeg_decoder(bytes);
            decoder.decode_headers().map_err(|e| e.to_string())?;
            let (width, height) = decoder.dimensions().ok_or("it has no dimensions")?;
            Ok((height, width))
        }
        Format::Png => {
            let reader = png_decoder(bytes).read_info().map_err(|e| e.to_string())?;
            Ok((reader.info().height as usize, reader.info().width as usize))
        }
    }
}

fn jpeg_decoder(bytes: &[u8]) -> JpegDecoder<ZCursor<&[u8]>> {
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(MAX_SIDE)
        .set_max_height(MAX_SIDE)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    JpegDecoder::new_with_options(ZCursor::new(bytes), options)
}

fn jpeg(bytes: &[u8], rgb: &mut Vec<u8>) -> Result<Size, Reason> {
    let mut decoder = jpeg_decoder(bytes);
    decoder.decode_headers().map_err(|e| e.to_string())?;
    let (width, height) = decoder.dimensions().ok_or("it has no dimensions")?;
    check_size(width, height)?;
    rgb.resize(width * height * 3, 0);
    decoder.decode_into(rgb).map_err(|e| e.to_string())?;
    Ok((height, width))
}

fn png_decoder(bytes: &[u8]) -> png::Decoder<Cursor<&[u8]>> {
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: MAX_PIXELS * 4 });
    decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    decoder
}

fn png(bytes: &[u8], rgb: &mut Vec<u8>) -> Result<Size, Reason> {
    let mut reader = png_decoder(bytes).read_info().map_err(|e| e.to_string())?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    check_size(width, height)?;
    let pixels = width * height;
    let samples = reader.output_color_type().0.samples();
    let size = reader.output_buffer_size().ok_or("its size overflows")?;
    rgb.resize(size.max(pixels * 3), 0);
    reader.next_frame(rgb).map_err(|e| e.to_string())?;
    match samples {
        3 => {}
        4 => {
            for pixel in 0..pixels {
                rgb.copy_within(4 * pixel..4 * pixel + 3, 3 * pixel);
            }
        }
        grey => {
            // Backwards, because the three bytes of a pixel end behind its grey one.
            for pixel in (0..pixels).rev() {
                let level = rgb[grey * pixel];
                rgb[3 * pixel..3 * pixel + 3].fill(level);
            }
        }
    }
    rgb.truncate(pixels * 3);
    Ok((height, width))
}

fn check_size(width: usize, height: usize) -> Result<(), Reason> {
    let fits = width > 0 && height > 0 && width.checked_mul(height).is_some_and(|pixels| pixels <= MAX_PIXELS);
    if fits { Ok(()) } else { Err(format!("expected 1 to {MAX_PIXELS} pixels, got {width} x {height}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(reason(b"GIF89a"), "expected JPEG or PNG, got bytes that begin with [47, 49, 46, 38]");
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
