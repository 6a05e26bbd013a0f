//! Decodes PNG to RGB bytes.

use std::io::Cursor;

use super::{Reason, check_size};
use crate::images::geometry::{MAX_PIXELS, Size};

fn decoder(bytes: &[u8]) -> png::Decoder<Cursor<&[u8]>> {
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: MAX_PIXELS * 4 });
    decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    decoder
}

pub(super) fn size(bytes: &[u8]) -> Result<Size, Reason> {
    let reader = decoder(bytes).read_info().map_err(|e| e.to_string())?;
    Ok((reader.info().height as usize, reader.info().width as usize))
}

pub(super) fn decode(bytes: &[u8], rgb: &mut Vec<u8>) -> Result<Size, Reason> {
    let mut reader = decoder(bytes).read_info().map_err(|e| e.to_string())?;
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
        gray => {
            // From the last pixel to the first: the RGB bytes of a pixel must not overwrite gray
            // bytes not yet read.
            for pixel in (0..pixels).rev() {
                let level = rgb[gray * pixel];
                rgb[3 * pixel..3 * pixel + 3].fill(level);
            }
        }
    }
    rgb.truncate(pixels * 3);
    Ok((height, width))
}
