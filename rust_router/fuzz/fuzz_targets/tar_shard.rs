//! Bytes that claim to be a tar shard: every image it lists lies in them, or it is refused.
#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;
use rust_router::shard;

fuzz_target!(|bytes: &[u8]| {
    // The checksums of all header blocks are put right, so that their content is looked at.
    let mut bytes = bytes.to_vec();
    for header in bytes.chunks_exact_mut(512) {
        if header.iter().any(|&byte| byte != 0) {
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    if let Ok(samples) = shard::read(Cursor::new(&bytes)) {
        for sample in samples {
            assert!(sample.length > 0 && sample.offset + sample.length <= bytes.len() as u64);
        }
    }
});
