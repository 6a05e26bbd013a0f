//! Random and mutated bytes. Every reader reads or refuses them within its limits, and never
//! panics.

#[path = "../fuzz/checks.rs"]
mod checks;

use rust_router::rng::{Purpose, Stream, below};
use rust_router::routes::key::Key;
use rust_router::routes::log::{RouteLog, Rows};

/// Number of mutants of each seed file. More are tested with `HOSTILE_ROUNDS=100000 cargo test
/// --release -p rust_router hostile`.
fn rounds() -> u64 {
    std::env::var("HOSTILE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(400)
}

/// Random words of one mutant.
struct Words {
    seed: u64,
    round: u64,
    drawn: u64,
}

impl Words {
    fn below(&mut self, bound: usize) -> usize {
        self.drawn += 1;
        let word = Stream { seed: self.seed, stream: 0 }.block(Purpose::Pairs, 0, self.round, self.drawn)[0];
        below(word, bound.max(1) as u64) as usize
    }
}

/// A copy with some bytes changed, removed, repeated or moved, or only random bytes.
fn mutant(seed: &[u8], words: &mut Words) -> Vec<u8> {
    const EDGES: [u8; 6] = [0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF];
    if words.below(20) == 0 {
        return (0..words.below(300)).map(|_| words.below(256) as u8).collect();
    }
    let mut bytes = seed.to_vec();
    for _ in 0..=words.below(4) {
        // Half of the places are in the first 64 bytes, where headers are.
        let within = if words.below(2) == 0 { bytes.len() } else { bytes.len().min(64) };
        let at = words.below(within);
        match words.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << words.below(8),
            1 if at < bytes.len() => bytes[at] = words.below(256) as u8,
            2 if at < bytes.len() => bytes[at] = EDGES[words.below(EDGES.len())],
            3 => bytes.truncate(at),
            4 => bytes.insert(at.min(bytes.len()), words.below(256) as u8),
            5 => {
                let end = (at + words.below(16)).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
            _ => {
                let end = (at + words.below(16)).min(bytes.len());
                let piece = bytes[at.min(end)..end].to_vec();
                let to = words.below(bytes.len());
                bytes.splice(to..to, piece);
            }
        }
    }
    bytes
}

fn survive(check: fn(&[u8]), seeds: &[Vec<u8>]) {
    for (seed, bytes) in (0..).zip(seeds) {
        check(bytes);
        for round in 0..rounds() {
            check(&mutant(bytes, &mut Words { seed, round, drawn: 0 }));
        }
    }
}

#[test]
fn hostile_jpeg_is_decoded_or_refused() {
    let seeds = [
        &include_bytes!("seeds/baseline.jpg")[..],
        include_bytes!("seeds/progressive.jpg"),
        include_bytes!("seeds/gray.jpg"),
        include_bytes!("seeds/cmyk.jpg"),
    ];
    survive(checks::jpeg, &seeds.map(<[u8]>::to_vec));
}

#[test]
fn hostile_png_is_decoded_or_refused() {
    use png::{BitDepth, ColorType};
    let kinds = [
        (ColorType::Rgb, BitDepth::Eight, 3 * 7 * 5),
        (ColorType::Rgba, BitDepth::Sixteen, 8 * 7 * 5),
        (ColorType::Grayscale, BitDepth::Two, 2 * 5),
        (ColorType::Indexed, BitDepth::Four, 4 * 5),
    ];
    let seeds = kinds.map(|(color, depth, length)| {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 7, 5);
        encoder.set_color(color);
        encoder.set_depth(depth);
        if color == ColorType::Indexed {
            encoder.set_palette((0..48).collect::<Vec<u8>>());
        }
        let data: Vec<u8> = (0..length).map(|byte| (byte * 37) as u8).collect();
        encoder.write_header().unwrap().write_image_data(&data).unwrap();
        bytes
    });
    survive(checks::png, &seeds);
}

#[test]
fn hostile_packs_are_opened_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pack");
    let mut writer = rust_router::images::pack::PackWriter::create(&path).unwrap();
    for (image, label) in [b"first".as_slice(), b"2nd", b"the third"].into_iter().zip(-1..) {
        writer.add(image, label).unwrap();
    }
    writer.finish("where they came from").unwrap();
    survive(checks::pack, &[std::fs::read(&path).unwrap()]);
}

#[test]
fn hostile_route_logs_are_loaded_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("routes.npz");
    let mut log = RouteLog::new(vec![2, 3]).unwrap();
    for epoch in [0, 7] {
        let rows = Rows { indices: &[5, 1], experts: &[0, 2, 1, 0], labels: &[3, -1], predictions: &[-1, 2] };
        log.append(Key { condition: "clean".into(), epoch }, rows).unwrap();
    }
    rust_router::routes::file::save(&mut log, &path).unwrap();
    survive(checks::route_log, &[std::fs::read(&path).unwrap()]);
}
