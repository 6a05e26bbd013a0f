//! Bytes that claim to be JPEG: decoded to as many pixels as they say, or refused; and the same from the top alone.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rust_router::decode;

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = [&[0xFF, 0xD8, 0xFF], bytes].concat();
    // Honest giants are slow, not wrong.
    if !decode::size(&bytes).is_ok_and(|(height, width)| height * width <= 1 << 20) {
        return;
    }
    let mut rgb = Vec::new();
    if let Ok((height, width)) = decode::decode(&bytes, &mut rgb) {
        assert_eq!(rgb.len(), height * width * 3);
        assert_eq!(decode::size(&bytes), Ok((height, width)));
        let rows = height.div_ceil(3);
        let mut top = Vec::new();
        let (shown, same) = decode::decode_top(&mut bytes, rows, &mut top).expect("the whole was decoded");
        assert!(shown >= rows && same == width);
        assert_eq!(top[..rows * width * 3], rgb[..rows * width * 3]);
    }
});
