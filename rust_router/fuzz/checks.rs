//! Properties that hold for any bytes: a reader reads or refuses them, and does not panic.
//!
//! The fuzz targets and the tests of the crate share these checks.

use std::io::Cursor;

use rust_router::images::pack::Pack;
use rust_router::images::source::guarded;
use rust_router::images::{decode, geometry};
use rust_router::routes::{file, pathways};

/// Larger images are not decoded, because decoding them is slow.
const MAX_PIXELS: usize = 1 << 20;

/// A decoded JPEG has the size in its header, and decoding its top rows gives the top of the whole
/// image, whatever the buffer held before.
pub fn jpeg(bytes: &[u8]) {
    let mut bytes = [&[0xFF, 0xD8, 0xFF], bytes.get(3..).unwrap_or_default()].concat();
    let Some((rgb, (height, width))) = image(&bytes) else { return };
    let rows = height.div_ceil(3);
    let mut top = vec![0xA5; rgb.len()];
    let shown = decode::decode_top(&mut bytes, rows, &mut top);
    assert!(shown.is_ok_and(|(shown, same)| shown >= rows && same == width), "the whole was decoded");
    assert_eq!(top[..rows * width * 3], rgb[..rows * width * 3]);
}

/// A decoded PNG has the size in its header. All checksums are corrected first, so that the decoder
/// reaches the content.
pub fn png(bytes: &[u8]) {
    let mut bytes = [b"\x89PNG\r\n\x1A\n", bytes.get(8..).unwrap_or_default()].concat();
    let mut at = 8;
    while let Some(&length) = bytes.get(at..).and_then(<[u8]>::first_chunk) {
        let length = u32::from_be_bytes(length) as usize;
        let Some(end) = at.checked_add(8 + length).filter(|end| end + 4 <= bytes.len()) else { break };
        let sum = crc(&bytes[at + 4..end]).to_be_bytes();
        bytes[end..end + 4].copy_from_slice(&sum);
        at = end + 4;
    }
    image(&bytes);
}

fn image(bytes: &[u8]) -> Option<(Vec<u8>, geometry::Size)> {
    let size = guarded(|| decode::size(bytes)).ok()?;
    assert!(size.0 * size.1 <= geometry::MAX_PIXELS);
    if size.0 * size.1 > MAX_PIXELS {
        return None;
    }
    let mut rgb = Vec::new();
    let decoded = guarded(|| decode::decode(bytes, &mut rgb)).ok()?;
    assert_eq!(decoded, size);
    assert_eq!(rgb.len(), size.0 * size.1 * 3);
    Some((rgb, size))
}

/// Every image in the index of a pack lies within the pack. The checksum of the index is corrected
/// first.
pub fn pack(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    let index = bytes.get(24..).and_then(<[u8]>::first_chunk).map(|&index| u64::from_le_bytes(index) as usize);
    if let Some(sum) = index.and_then(|index| bytes.get(index..)).map(crc) {
        bytes[12..16].copy_from_slice(&sum.to_le_bytes());
    }
    let Ok(pack) = Pack::read(Cursor::new(&bytes)) else { return };
    assert_eq!(pack.spans.len(), pack.labels.len());
    for span in pack.spans {
        assert!(span.length > 0 && span.offset + span.length <= bytes.len() as u64);
    }
}

/// Every statistic can be computed of a route log that was read.
pub fn route_log(bytes: &[u8]) {
    let Ok(mut log) = file::read(Cursor::new(bytes)) else { return };
    let num_experts = log.num_experts().to_vec();
    let keys: Vec<_> = log.keys().cloned().collect();
    for (a, b) in keys.iter().zip(keys.iter().cycle().skip(1)) {
        let pair = log.pair(a, b);
        assert!(pair.is_ok(), "every key of the log has rows");
        let Ok((a, b)) = pair else { return };
        assert!(a.rows().indices.is_sorted_by(|x, y| x < y));
        for row in 0..a.len() {
            assert!(a.pathway(row).iter().zip(&num_experts).all(|(&expert, &n)| u16::from(expert) < n));
        }
        let unique = pathways::unique(a);
        assert_eq!(unique.iter().map(|(_, count)| count).sum::<u64>(), a.len() as u64);
        drop(pathways::load(a, 3, 256));
        drop(pathways::compare(a, b));
    }
}

/// CRC-32 as in zip and PNG, bit by bit.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}
