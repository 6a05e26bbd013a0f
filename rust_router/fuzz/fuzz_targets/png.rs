//! Bytes that claim to be PNG: decoded to as many pixels as they say, or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rust_router::decode;

fuzz_target!(|bytes: &[u8]| {
    let bytes = [b"\x89PNG\r\n\x1A\n", bytes].concat();
    // Honest giants are slow, not wrong.
    if !decode::size(&bytes).is_ok_and(|(height, width)| height.saturating_mul(width) <= 1 << 20) {
        return;
    }
    let mut rgb = Vec::new();
    if let Ok((height, width)) = decode::decode(&bytes, &mut rgb) {
        assert_eq!(rgb.len(), height * width * 3);
        assert_eq!(decode::size(&bytes), Ok((height, width)));
    }
});
