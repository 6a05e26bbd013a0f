//! Bytes that claim to be a route log: rows that a model can have, which every statistic can be made of, or refused.
#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;
use rust_router::{pathways, route_file};

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut log) = route_file::read(Cursor::new(bytes)) else {
        return;
    };
    let num_experts = log.num_experts().to_vec();
    let keys: Vec<_> = log.keys().cloned().collect();
    for (a, b) in keys.iter().zip(keys.iter().cycle().skip(1)) {
        let (a, b) = log.pair(a, b).expect("a key of the log");
        assert!(a.rows().indices.is_sorted_by(|x, y| x < y));
        for row in 0..a.len() {
            assert!(a.pathway(row).iter().zip(&num_experts).all(|(&expert, &n)| u16::from(expert) < n));
        }
        let unique = pathways::unique(a);
        assert_eq!(unique.iter().map(|(_, count)| count).sum::<u64>(), a.len() as u64);
        drop(pathways::load(a, 3, 256));
        drop(pathways::compare(a, b));
    }
});
