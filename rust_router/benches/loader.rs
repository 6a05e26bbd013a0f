//! Images per second of the loader's core: `cargo bench -p rust_router --bench loader`.
#![allow(clippy::expect_used, missing_docs, reason = "nobody calls a benchmark")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rust_router::images::augment::Transform;
use rust_router::images::batch::{Layout, byte_levels, float_levels};
use rust_router::images::loader::{Recipe, Request, Workers, fill};
use rust_router::images::source::Pixels;
use rust_router::rng::Stream;

const STREAM: Stream = Stream { seed: 0, stream: 0 };
const CROP_FLIP: Transform = Transform::CropFlip { padding: 4, flip: true };
const BATCH: usize = 512;

/// The size of CIFAR-10's training set.
fn images() -> Vec<u8> {
    (0..50_000_u64)
        .flat_map(|i| STREAM.permutation(i, 96).expect("memory").into_iter().flat_map(|v| [v as u8; 32]))
        .collect()
}

fn crop_flip(criterion: &mut Criterion) {
    let images = images();
    let source = Pixels::new(&images, 32, 32).expect("whole images");
    let order = STREAM.permutation(0, 50_000).expect("memory");
    let mut group = criterion.benchmark_group("crop_flip");
    group.throughput(Throughput::Elements(BATCH as u64));
    let request = |turn: usize| {
        let start = turn * BATCH % (order.len() - BATCH);
        Request { rows: &order[start..start + BATCH], epoch: 1, height: 32, width: 32, stop: &|| false }
    };
    for num_threads in [1, 2] {
        let workers = Workers::new(num_threads).expect("threads");
        let levels = float_levels([0.5; 3], [0.25; 3]);
        let recipe = Recipe { stream: STREAM, transform: CROP_FLIP, levels, layout: Layout::Planar, skip_bad: false };
        let mut out = vec![0.0_f32; BATCH * 3072];
        let mut turn = 0;
        group.bench_function(format!("f32_{num_threads}t"), |bench| {
            bench.iter(|| {
                turn += 1;
                fill(&workers, &source, &recipe, request(turn), black_box(&mut out))
            });
        });
    }
    let workers = Workers::new(1).expect("threads");
    let recipe = Recipe {
        stream: STREAM,
        transform: CROP_FLIP,
        levels: byte_levels(),
        layout: Layout::Interleaved,
        skip_bad: false,
    };
    let mut out = vec![0_u8; BATCH * 3072];
    let mut turn = 0;
    group.bench_function("u8_interleaved_1t", |bench| {
        bench.iter(|| {
            turn += 1;
            fill(&workers, &source, &recipe, request(turn), black_box(&mut out))
        });
    });
    group.finish();
}

fn shuffle(criterion: &mut Criterion) {
    criterion.bench_function("epoch_order_1m3", |bench| {
        bench.iter(|| STREAM.permutation(black_box(3), 1_281_167).expect("memory"))
    });
}

criterion_group!(benches, crop_flip, shuffle);
criterion_main!(benches);
