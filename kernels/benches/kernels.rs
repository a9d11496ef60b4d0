//! Throughput of the hot kernels on every path of this machine: `cargo bench -p kvoyant-kernels [-- FILTER]`.
//!
//! Names end in the path. Bytes are what a kernel has to read (and, for copies, what it moves, once), in decimal GB/s.

// The macros of criterion make public functions.
#![allow(missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvoyant_kernels::{AttendScratch, CopyRun, Dtype, Kernels, Path, Run, TopKScratch};

fn paths() -> impl Iterator<Item = Kernels> {
    Path::available().into_iter().filter_map(|path| Kernels::on(path).ok())
}

/// Reproducible values within ±1.
fn values(n: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    // The sum of a few comes close to a bell, as scores do.
    (0..n).map(|_| (next() + next() + next() + next()) * 0.5).collect()
}

fn stored(dtype: Dtype, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n * dtype.bytes()];
    Kernels::best().from_f32(dtype, &values(n), &mut bytes);
    bytes
}

/// `count` of `all` places, in an order that no prefetcher guesses.
fn scattered(count: usize, all: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |i| (i * 7_919 + 13) % all)
}

fn attend(c: &mut Criterion) {
    let mut group = c.benchmark_group("attend");
    // Rows held, rows attended, rows per run: pages within L2, pages within L3, single rows scattered over L3 and over memory.
    let cases = [
        ("pages in L2", 2_048, 2_048, 32),
        ("pages in L3", 32_768, 32_768, 32),
        ("rows in L3", 32_768, 4_096, 1),
        ("rows in memory", 1 << 20, 32_768, 1),
    ];
    for (d, queries) in [(64, 3), (128, 4)] {
        for (name, held, attended, rows) in cases {
            let held = held * 64 / d;
            let attended = attended * 64 / d;
            let row_bytes = 4 * d;
            let bytes = stored(Dtype::F16, held * 2 * d);
            let runs: Vec<Run> = scattered(attended / rows, held / rows)
                .map(|place| Run::new(bytes[place * rows * row_bytes..].as_ptr(), rows))
                .collect();
            let q = values(queries * d);
            group.throughput(Throughput::BytesDecimal((attended * row_bytes) as u64));
            for kernels in paths() {
                let (mut out, mut lse) = (vec![0.0; queries * d], vec![0.0; queries]);
                let mut scratch = AttendScratch::default();
                let id = BenchmarkId::new(format!("f16 d={d} g={queries} {name}"), kernels.path());
                group.bench_function(id, |b| {
                    b.iter(|| {
                        let (q, runs) = (black_box(&q), black_box(&runs));
                        // SAFETY: the runs lie within `bytes`.
                        unsafe {
                            kernels.attend(
                                Dtype::F16,
                                q,
                                queries,
                                d,
                                0.125,
                                runs,
                                &mut scratch,
                                &mut out,
                                &mut lse,
                            );
                        }
                    });
                });
            }
        }
    }
    group.finish();
}

fn score_columns(c: &mut Criterion) {
    let mut group = c.benchmark_group("score_columns");
    let (dims, tokens, pages, queries) = (19, 32, 512, 3);
    for dtype in [Dtype::F16, Dtype::F32] {
        let page = dims * tokens * dtype.bytes();
        let (blocks, q) = (stored(dtype, dims * tokens * pages), values(queries * dims));
        let mut out = vec![0.0; queries * tokens * pages];
        group.throughput(Throughput::BytesDecimal(blocks.len() as u64));
        for kernels in paths() {
            let id = BenchmarkId::new(
                format!("{dtype} dims={dims} g={queries} pages of {tokens}"),
                kernels.path(),
            );
            group.bench_function(id, |b| {
                b.iter(|| {
                    for (i, block) in black_box(&blocks).chunks_exact(page).enumerate() {
                        let out = &mut out[i * tokens..];
                        kernels.score_columns(dtype, &q, queries, block, tokens, out, tokens * pages);
                    }
                });
            });
        }
    }
    group.finish();
}

fn top_k(c: &mut Criterion) {
    let mut group = c.benchmark_group("top_k");
    for (n, k) in [(2_048, 128), (2_048, 512), (16_384, 1_024), (131_072, 2_048)] {
        let scores = values(n);
        group.throughput(Throughput::BytesDecimal((n * 4) as u64));
        for kernels in paths() {
            let (mut scratch, mut out) = (TopKScratch::default(), Vec::new());
            group.bench_function(BenchmarkId::new(format!("{k} of {n}"), kernels.path()), |b| {
                b.iter(|| kernels.top_k(black_box(&scores), k, &mut scratch, &mut out));
            });
        }
    }
    group.finish();
}

fn softmax_add(c: &mut Criterion) {
    let mut group = c.benchmark_group("softmax_add");
    let n = 4_096;
    let (scores, mut acc) = (values(n), vec![0.0; n]);
    group.throughput(Throughput::BytesDecimal((n * 4) as u64));
    for kernels in paths() {
        group.bench_function(BenchmarkId::new(format!("{n}"), kernels.path()), |b| {
            b.iter(|| kernels.softmax_add(black_box(&scores), 0.125, &mut acc));
        });
    }
    group.finish();
}

fn copy_runs(c: &mut Criterion) {
    let mut group = c.benchmark_group("copy_runs");
    // Bytes per run, runs, bytes that the sources are scattered over: rows and pages, within L3 and through memory.
    let cases = [
        ("rows in L3", 256, 4_096, 8 << 20),
        ("rows in memory", 256, 1 << 17, 256 << 20),
        ("pages in L3", 8_192, 128, 8 << 20),
        ("pages in memory", 8_192, 8_192, 256 << 20),
    ];
    for (name, bytes, count, spread) in cases {
        let source = vec![1_u8; spread];
        let mut copy = vec![0_u8; bytes * count + 64];
        let start = copy.as_ptr().align_offset(64);
        let runs: Vec<CopyRun> = scattered(count, spread / bytes)
            .zip(copy[start..].chunks_exact_mut(bytes))
            .map(|(place, to)| CopyRun { src: source[place * bytes..].as_ptr(), dst: to.as_mut_ptr(), bytes })
            .collect();
        group.throughput(Throughput::BytesDecimal((bytes * count) as u64));
        for kernels in paths() {
            group.bench_function(BenchmarkId::new(name, kernels.path()), |b| {
                // SAFETY: the runs lie within `source` and `copy`, and their destinations are apart.
                b.iter(|| unsafe { kernels.copy_runs(black_box(&runs)) });
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = kernels;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(300))
        .sample_size(10)
        .without_plots();
    targets = attend, score_columns, top_k, softmax_add, copy_runs
}
criterion_main!(kernels);
