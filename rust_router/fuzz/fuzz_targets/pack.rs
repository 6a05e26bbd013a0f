//! Bytes that claim to be a pack: every image it lists lies in them, or it is refused.
#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;
use rust_router::pack::Pack;

fuzz_target!(|bytes: &[u8]| {
    // The checksum of what lies behind the header is put right, so that its content is looked at.
    let mut bytes = bytes.to_vec();
    if let Some(index) = bytes.get(24..32).map(|b| u64::from_le_bytes(b.try_into().unwrap())) {
        if let Some(tail) = usize::try_from(index).ok().and_then(|index| bytes.get(index..)) {
            let crc = crc(tail).to_le_bytes();
            bytes[12..16].copy_from_slice(&crc);
        }
    }
    if let Ok(pack) = Pack::read(Cursor::new(&bytes)) {
        assert_eq!(pack.spans.len(), pack.labels.len());
        for span in pack.spans {
            assert!(span.length > 0 && span.offset + span.length <= bytes.len() as u64);
        }
    }
});

/// CRC-32 as in zip and PNG, bit by bit.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}
