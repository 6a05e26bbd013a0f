//! Decodes JPEG to RGB bytes, either the whole image or its top rows.

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::{MAX_SIDE, Reason, check_size};
use crate::images::geometry::Size;

/// Colors of the last pixel before decoding. An image may have one of them, but not both.
const UNTOUCHED: [[u8; 3]; 2] = [[1, 254, 3], [254, 1, 252]];

/// A decoder. In strict mode, it refuses bytes between the segments of the header.
fn decoder(bytes: &[u8], strict: bool) -> JpegDecoder<ZCursor<&[u8]>> {
    let options = DecoderOptions::default()
        .set_strict_mode(strict)
        .set_max_width(MAX_SIDE)
        .set_max_height(MAX_SIDE)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    JpegDecoder::new_with_options(ZCursor::new(bytes), options)
}

pub(super) fn size(bytes: &[u8]) -> Result<Size, Reason> {
    if let Some(frame) = Frame::find(bytes) {
        return Ok((frame.height, frame.width));
    }
    let mut decoder = decoder(bytes, true);
    decoder.decode_headers().map_err(|e| e.to_string())?;
    let (width, height) = decoder.dimensions().ok_or("it has no dimensions")?;
    Ok((height, width))
}

pub(super) fn decode(bytes: &[u8], rgb: &mut Vec<u8>) -> Result<Size, Reason> {
    let frame = Frame::find(bytes);
    if frame.as_ref().is_some_and(|frame| frame.wider_color) {
        return Err("its color has more columns than its brightness, which is not supported".into());
    }
    if frame.as_ref().is_some_and(|frame| frame.split) {
        return Err("its colors are stored one after another, which is not supported; save it again".into());
    }
    let padded = frame.as_ref().is_some_and(|frame| frame.padded);
    let guarded = frame.and_then(|frame| with_guard(bytes, frame.scan_at));
    let bytes = guarded.as_deref().unwrap_or(bytes);
    // If a marker interrupts the scan, the decoder stops without an error. It writes rows from the
    // first to the last, so the last pixel shows whether all were written.
    for untouched in UNTOUCHED {
        let mut decoder = decoder(bytes, !padded);
        decoder.decode_headers().map_err(|e| e.to_string())?;
        let (width, height) = decoder.dimensions().ok_or("it has no dimensions")?;
        check_size(width, height)?;
        let strict = decoder.options().set_strict_mode(true);
        decoder.set_options(strict);
        rgb.clear();
        rgb.resize((width * height - 1) * 3, 0);
        rgb.extend(untouched);
        decoder.decode_into(rgb).map_err(|e| e.to_string())?;
        if !rgb.ends_with(&untouched) {
            return Ok((height, width));
        }
    }
    Err("its data end before its last row".into())
}

/// A copy with bits of one before the end of the image. No code of a JPEG consists of ones only, so
/// a scan that ends too early becomes an error. Without them, the decoder makes up the missing
/// blocks. `None` if no end of image follows the header of the first scan at `scan_at`.
fn with_guard(bytes: &[u8], scan_at: usize) -> Option<Vec<u8>> {
    /// More ones than the bits of a value and the longest code together.
    const ONES: [[u8; 2]; 8] = [[0xFF, 0x00]; 8];
    let end = scan_at + bytes.get(scan_at..)?.windows(2).rposition(|pair| pair == [0xFF, 0xD9])?;
    Some([&bytes[..end], ONES.as_flattened(), &bytes[end..]].concat())
}

/// Decodes at least `rows` rows. It writes a lower height into the header, and the decoder stops at
/// this height.
pub(super) fn decode_top(bytes: &mut [u8], rows: usize, rgb: &mut Vec<u8>) -> Result<Size, Reason> {
    if let Some(frame) = Frame::find(bytes)
        && frame.one_scan
    {
        // One more row of blocks: with subsampled color, it contributes to the pixels of the row
        // above.
        let height = (rows.div_ceil(frame.block_rows) + 1) * frame.block_rows;
        if let Ok(height) = u16::try_from(height)
            && usize::from(height) < frame.height
        {
            bytes[frame.height_at..frame.height_at + 2].copy_from_slice(&height.to_be_bytes());
        }
    }
    decode(bytes, rgb)
}

/// The content of the frame header (ITU-T T.81, B.2.2). Files with unusual segments before it are
/// not supported.
struct Frame {
    height: usize,
    width: usize,
    /// Position of the two bytes of the height.
    height_at: usize,
    /// Position of the header of the first scan.
    scan_at: usize,
    /// Rows of pixels per row of blocks.
    block_rows: usize,
    /// Whether rows are stored one after another: the JPEG is sequential and has all components in
    /// one scan.
    one_scan: bool,
    /// Whether the JPEG is sequential and has its components in several scans. The decoder misplaces
    /// the blocks of many such files.
    split: bool,
    /// Whether a component has more columns than the first one, which is brightness. The decoder
    /// decodes such files wrongly. It decodes more rows correctly.
    wider_color: bool,
    /// Whether there are zeros between segments. Fill bytes 0xFF do not count: they are part of the
    /// format.
    padded: bool,
}

impl Frame {
    fn find(bytes: &[u8]) -> Option<Self> {
        let mut at = 2; // after the start of image
        let mut frame = None;
        let mut padded = false;
        loop {
            let zeros = bytes.get(at..)?.iter().position(|&byte| byte != 0)?;
            padded |= zeros > 0;
            at += zeros;
            (bytes[at] == 0xFF).then_some(())?;
            at += bytes[at..].iter().position(|&byte| byte != 0xFF)?;
            let marker = bytes[at];
            let length = usize::from(u16::from_be_bytes(*bytes.get(at + 1..)?.first_chunk()?));
            let segment = bytes.get(at + 3..at + 1 + length)?;
            match marker {
                0x00 | 0x01 | 0xD0..=0xD9 => return None, // markers without a length
                0xDA => {
                    let (frame, num_components): (Self, u8) = frame?;
                    let whole = *segment.first()? == num_components;
                    let (one_scan, split) = (frame.one_scan && whole, frame.one_scan && !whole);
                    return Some(Self { scan_at: at, one_scan, split, padded, ..frame });
                }
                0xC4 | 0xC8 | 0xCC => {} // tables, whose numbers lie between those of frames
                0xC0..=0xCF if frame.is_some() => return None,
                0xC0..=0xCF => {
                    let &[_, h1, h0, w1, w0, num_components, ref components @ ..] = segment else { return None };
                    let components = components.as_chunks::<3>().0;
                    let [_, first, _] = components.first()?;
                    let tallest = components.iter().map(|[_, factors, _]| factors & 15).max()?;
                    let found = Self {
                        height: usize::from(u16::from_be_bytes([h1, h0])),
                        width: usize::from(u16::from_be_bytes([w1, w0])),
                        height_at: at + 4,
                        scan_at: 0,
                        block_rows: 8 * usize::from(tallest.max(1)),
                        one_scan: marker <= 0xC1,
                        split: false,
                        wider_color: components.iter().any(|[_, factors, _]| factors >> 4 > first >> 4),
                        padded,
                    };
                    (found.height > 0 && found.width > 0).then_some(())?;
                    frame = Some((found, num_components));
                }
                _ => {}
            }
            at += 1 + length;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file's headers: an application's segment, the frame and one scan, of 300 x 400 pixels in
    /// color.
    fn headers(frame: u8, components_in_scan: u8) -> Vec<u8> {
        [
            &[0xFF, 0xD8, 0xFF, 0xE0, 0, 4, 1, 2][..],
            &[0xFF, 0xC4, 0, 3, 0], // a table, whose number lies between those of frames
            &[0xFF, 0xFF, frame, 0, 17, 8, 0x01, 0x2C, 0x01, 0x90, 3, 1, 0x22, 0, 2, 0x11, 1, 3, 0x11, 1],
            &[0xFF, 0xDA, 0, 3, components_in_scan],
        ]
        .concat()
    }

    #[test]
    fn a_frame_is_found_and_known_to_be_cut_safely_or_not() {
        for (marker, components_in_scan, one_scan) in
            [(0xC0, 3, true), (0xC1, 3, true), (0xC2, 3, false), (0xC0, 1, false)]
        {
            let bytes = headers(marker, components_in_scan);
            let frame = Frame::find(&bytes).unwrap();
            assert_eq!((frame.height, frame.width, frame.block_rows, frame.one_scan), (300, 400, 16, one_scan));
            assert_eq!(bytes[frame.height_at..][..2], [0x01, 0x2C]);
            for end in 0..bytes.len() {
                assert!(Frame::find(&bytes[..end]).is_none(), "cut at {end}");
            }
        }
        let two_frames = [&headers(0xC0, 3)[..33], &headers(0xC0, 3)[13..]].concat();
        assert!(Frame::find(&two_frames).is_none());
    }

    #[test]
    fn a_height_is_lowered_to_whole_blocks_and_one_more_and_never_raised() {
        // 16 rows to a block: 40 rows need 3 blocks and have a fourth; 270 need 17, and 18 blocks
        // are all 300 rows already.
        for (rows, height) in [(1, 32), (40, 64), (256, 272), (257, 288), (272, 288), (273, 300), (300, 300)] {
            let mut bytes = headers(0xC0, 3);
            assert!(decode_top(&mut bytes, rows, &mut Vec::new()).is_err()); // no image follows
            assert_eq!(size(&bytes), Ok((height, 400)), "{rows} rows");
        }
        let mut bytes = headers(0xC2, 3);
        assert!(decode_top(&mut bytes, 1, &mut Vec::new()).is_err());
        assert_eq!(bytes, headers(0xC2, 3));
    }

    const BASELINE: &[u8] = include_bytes!("../../../tests/seeds/baseline.jpg");

    /// Position of a segment in [`BASELINE`].
    fn segment(marker: u8) -> usize {
        BASELINE.windows(2).position(|pair| pair == [0xFF, marker]).unwrap()
    }

    #[test]
    fn a_scan_that_a_marker_interrupts_is_refused_and_shows_no_earlier_image() {
        let scan = segment(0xDA);
        let header = &BASELINE[scan..scan + 14];
        let comment = [0xFF, 0xFE, 0, 4, 1, 2];
        for interruption in [header, &comment] {
            let cut = scan + 14 + (BASELINE.len() - scan) / 4;
            let bytes = [&BASELINE[..cut], interruption, &[0xFF, 0xD9]].concat();
            let (mut fresh, mut used) = (Vec::new(), vec![77; 10_000]);
            for rgb in [&mut fresh, &mut used] {
                assert_eq!(decode(&bytes, rgb), Err("its data end before its last row".into()));
            }
            assert_eq!(fresh, used);
        }
    }

    #[test]
    fn a_scan_that_ends_too_early_is_refused() {
        const PROGRESSIVE: &[u8] = include_bytes!("../../../tests/seeds/progressive.jpg");
        let mut plain = Vec::new();
        decode(BASELINE, &mut plain).unwrap();
        for cut in segment(0xDA) + 14..BASELINE.len() - 2 {
            let mut rgb = Vec::new();
            // The last byte may have only the bits of one that fill it up.
            let found = decode(&[&BASELINE[..cut], &[0xFF, 0xD9]].concat(), &mut rgb);
            assert!(found.is_err() || (cut + 1 == BASELINE.len() - 2 && rgb == plain), "cut at {cut}");
        }
        let middle = PROGRESSIVE.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap() + 30;
        assert!(decode(&[&PROGRESSIVE[..middle], &[0xFF, 0xD9]].concat(), &mut Vec::new()).is_err());
    }

    #[test]
    fn components_in_several_scans_of_a_sequential_jpeg_are_refused() {
        let scan = segment(0xDA);
        // One scan of the first component, and the other two in a second scan.
        let first = [&[0xFF, 0xDA, 0, 8, 1, 1, 0, 0, 0x3F, 0], &BASELINE[scan + 14..BASELINE.len() - 2]].concat();
        let bytes = [&BASELINE[..scan], &first, &BASELINE[scan..]].concat();
        let refused = "its colors are stored one after another, which is not supported; save it again";
        assert_eq!(decode(&bytes, &mut Vec::new()), Err(refused.into()));
    }

    #[test]
    fn a_segment_after_a_complete_scan_interrupts_nothing() {
        let comment = [&BASELINE[..BASELINE.len() - 2], &[0xFF, 0xFE, 0, 4, 1, 2, 0xFF, 0xD9]].concat();
        let (mut plain, mut commented) = (Vec::new(), vec![77; 10_000]);
        assert_eq!(decode(BASELINE, &mut plain), Ok((27, 19)));
        assert_eq!(decode(&comment, &mut commented), Ok((27, 19)));
        assert_eq!(plain, commented);
    }

    #[test]
    fn padding_between_segments_is_skipped_and_other_bytes_are_refused() {
        let mut plain = Vec::new();
        decode(BASELINE, &mut plain).unwrap();
        for marker in [0xDB, 0xC0, 0xC4, 0xDA] {
            let with = |between: &[u8]| [&BASELINE[..segment(marker)], between, &BASELINE[segment(marker)..]].concat();
            for padding in [&[0][..], &[0; 50], &[0xFF; 50], &[0, 0, 0, 0xFF, 0xFF]] {
                let mut bytes = with(padding);
                let mut rgb = Vec::new();
                assert_eq!(decode(&bytes, &mut rgb), Ok((27, 19)), "{marker:X}");
                assert_eq!(rgb, plain);
                assert_eq!(size(&bytes), Ok((27, 19)));
                assert_eq!(decode_top(&mut bytes, 1, &mut rgb), Ok((27, 19)));
            }
            assert!(decode(&with(b"between"), &mut Vec::new()).is_err());
        }
    }

    #[test]
    fn color_with_more_columns_than_brightness_is_refused() {
        let refused = Err("its color has more columns than its brightness, which is not supported".into());
        let factors_at = segment(0xC0) + 11;
        for (factors, wider) in [
            ([0x11, 0x22, 0x22], true),
            ([0x12, 0x22, 0x22], true),
            ([0x11, 0x11, 0x21], true),
            ([0x21, 0x12, 0x12], false),
        ] {
            let mut bytes = BASELINE.to_vec();
            for (component, factors) in factors.into_iter().enumerate() {
                bytes[factors_at + 3 * component] = factors;
            }
            assert_eq!(decode(&bytes, &mut Vec::new()) == refused, wider, "{factors:X?}");
        }
    }
}
