//! Statistics of pathways: `cargo bench -p rust_router --bench pathways`.
#![allow(clippy::expect_used, missing_docs, reason = "nobody calls a benchmark")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use rust_router::rng::{Purpose, Stream};
use rust_router::routes::channels::Channels;
use rust_router::routes::diversity::{self, PairBudget};
use rust_router::routes::key::Key;
use rust_router::routes::log::{RouteLog, Rows};
use rust_router::routes::pathways;
use rust_router::routes::similarity;

const LAYERS: usize = 20;

/// Two experts of 120 of 240 channels in each of 20 layers: 4,800 channels.
fn channels() -> Channels {
    let mut channels = Channels::new();
    for _ in 0..LAYERS {
        let members = (0..480).map(|i| (i % 240 < 120) == (i / 240 == 0)).collect();
        channels.push(members, 240).expect("two experts");
    }
    channels
}

/// A log of `n` samples with random pathways under two conditions.
fn log(n: i64) -> RouteLog {
    let stream = Stream { seed: 0, stream: 0 };
    let indices: Vec<i64> = (0..n).collect();
    let classes: Vec<i32> = (0..n).map(|i| (i % 1000) as i32).collect();
    let mut log = RouteLog::new(vec![2; LAYERS]).expect("two experts per layer");
    for (epoch, condition) in ["clean", "pgd"].into_iter().enumerate() {
        let bits = indices.iter().map(|&i| stream.block(Purpose::Crop, epoch as u64, i as u64, 0)[0]);
        let experts: Vec<u8> = bits.flat_map(|word| (0..LAYERS).map(move |layer| (word >> layer & 1) as u8)).collect();
        let rows = Rows { indices: &indices, experts: &experts, labels: &classes, predictions: &classes };
        log.append(Key { condition: condition.into(), epoch: 0 }, rows).expect("rows of this model");
    }
    log
}

fn similarities(criterion: &mut Criterion) {
    let key = Key { condition: "clean".into(), epoch: 0 };
    let (channels, mut log) = (channels(), log(10_000));
    let table = log.table(&key).expect("rows").clone();
    let mask: Vec<bool> = (0..4800).map(|c| c % 3 == 0).collect();
    criterion.bench_function("one_vs_10k", |bench| {
        bench.iter(|| similarity::with_mask(black_box(&table), &channels, &mask));
    });
    let budget = PairBudget { max_exact: u64::MAX, sampled: 0, seed: 0 };
    criterion.bench_function("all_pairs_10k", |bench| {
        bench.iter(|| diversity::diversity(black_box(&table), &channels, 50, budget));
    });
}

fn summaries(criterion: &mut Criterion) {
    let mut log = log(1_281_167);
    let [clean, pgd] = ["clean", "pgd"].map(|condition| Key { condition: condition.into(), epoch: 0 });
    let (clean, pgd) = log.pair(&clean, &pgd).expect("rows");
    let mut group = criterion.benchmark_group("1m3");
    group.sample_size(10);
    group.bench_function("load_by_class", |bench| bench.iter(|| pathways::load(black_box(clean), 1000, 2)));
    group.bench_function("unique", |bench| bench.iter(|| pathways::unique(black_box(clean)).len()));
    group.bench_function("compare", |bench| bench.iter(|| pathways::compare(black_box(clean), pgd)));
    group.finish();
}

criterion_group!(benches, similarities, summaries);
criterion_main!(benches);
