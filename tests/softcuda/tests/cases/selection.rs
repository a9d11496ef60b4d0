//! Scores of digests, and the choice among them.

use kvoyant_kernels::cuda::launch::tile_rows;
use kvoyant_kernels::cuda::params::{HammingParams, QuestParams, RowRun, ScoresParams, TopKParams};
use kvoyant_kernels::{Dtype, Kernels, Run, TopKScratch};

use super::{Device, Numbers, assert_close, stored};

const HEADS: usize = 3;

pub(crate) fn scores_bounds_and_distances_are_those_of_the_cpu(device: &mut impl Device) {
    for (d, group) in [(64, 1), (128, 5), (40, 10), (256, 8)] {
        for dtype in Dtype::ALL {
            let mut numbers = Numbers::new(d as u64);
            let queries = numbers.normal(HEADS * group * d);
            scores(device, dtype, d, group, &queries, &mut numbers);
            bounds(device, dtype, d, group, &queries, &mut numbers);
        }
    }
    for (words, group) in [(1, 1), (2, 4), (5, 3)] {
        distances(device, words, group);
    }
}

fn scores(
    device: &mut impl Device,
    dtype: Dtype,
    d: usize,
    group: usize,
    queries: &[f32],
    numbers: &mut Numbers,
) {
    let (rows, stride) = (300, 330);
    let row_bytes = 2 * d * dtype.bytes();
    let memory = stored(dtype, &numbers.normal(rows * 2 * d));
    let memory_at = device.upload_mapped(&memory);
    let (mut runs, mut offsets, mut wanted) = (Vec::new(), vec![0], vec![f32::NAN; HEADS * group * stride]);
    for head in 0..HEADS {
        let mut host = Vec::new();
        let mut left = stride;
        for _ in 0..[0, 4, 150][head] {
            let first = numbers.below(rows);
            let n = numbers.below(if head == 1 { rows - first } else { 3 }.min(left) + 1).min(rows - first);
            left -= n;
            let address = memory_at + (first * row_bytes) as u64;
            runs.push(RowRun { address, rows: n as u32, pad: 0 });
            host.push(Run::new(memory[first * row_bytes..].as_ptr(), n));
        }
        offsets.push(runs.len() as u32);
        let values = &queries[head * group * d..][..group * d];
        let out = &mut wanted[head * group * stride..][..group * stride];
        // SAFETY: the runs lie within `memory`, which nobody writes to.
        unsafe { Kernels::best().scores(dtype, values, group, d, &host, out, stride) };
    }
    let out = device.put(&vec![f32::NAN; wanted.len()]);
    let params = ScoresParams {
        queries: device.put(queries),
        runs: device.put(&runs),
        offsets: device.put(&offsets),
        out,
        dtype: u32::from(dtype.code()),
        d: d as u32,
        group: group as u32,
        heads: HEADS as u32,
        row_bytes: row_bytes as u32,
        out_stride: stride as u32,
        tile_rows: tile_rows(dtype, d as u32, group as u32).unwrap(),
        splits: 2,
    };
    device.launch("score", "partial_scores", &params, params.launch());
    let mut got = device.get::<f32>(out, wanted.len());
    // What nobody wrote is NaN in both.
    for (got, wanted) in
        got.iter_mut().zip(&mut wanted).filter(|(got, wanted)| got.is_nan() && wanted.is_nan())
    {
        (*got, *wanted) = (0.0, 0.0);
    }
    assert_close(&format!("scores, {dtype}, d={d}, group={group}"), &got, &wanted);
}

fn bounds(
    device: &mut impl Device,
    dtype: Dtype,
    d: usize,
    group: usize,
    queries: &[f32],
    numbers: &mut Numbers,
) {
    let (stride, lengths) = (90, [90_u32, 0, 33]);
    let mut minmax = numbers.normal(HEADS * stride * 2 * d);
    for page in minmax.chunks_exact_mut(2 * d) {
        let (min, max) = page.split_at_mut(d);
        for (min, max) in min.iter_mut().zip(max) {
            (*min, *max) = (min.min(*max), max.max(*min));
        }
    }
    let minmax = stored(dtype, &minmax);
    let mut wanted = vec![-1.0; HEADS * group * stride];
    for (head, length) in lengths.into_iter().enumerate() {
        for page in 0..length as usize {
            let mut digest = vec![0.0; 2 * d];
            let bytes = 2 * d * dtype.bytes();
            Kernels::best().to_f32(dtype, &minmax[(head * stride + page) * bytes..][..bytes], &mut digest);
            let mut bounds = vec![0.0; group];
            Kernels::best().page_bounds(
                &queries[head * group * d..][..group * d],
                group,
                &digest,
                &mut bounds,
            );
            for (h, bound) in bounds.into_iter().enumerate() {
                wanted[(head * group + h) * stride + page] = bound;
            }
        }
    }
    let out = device.put(&vec![-1.0_f32; wanted.len()]);
    let params = QuestParams {
        queries: device.put(queries),
        minmax: device.put(&minmax),
        out,
        lengths: device.put(&lengths),
        dtype: u32::from(dtype.code()),
        d: d as u32,
        group: group as u32,
        heads: HEADS as u32,
        pages: 0,
        stride: stride as u32,
        out_stride: stride as u32,
        tile_rows: tile_rows(dtype, d as u32, group as u32).unwrap(),
        splits: 2,
        pad: 0,
    };
    device.launch("score", "quest_bounds", &params, params.launch());
    let got = device.get::<f32>(out, wanted.len());
    assert_close(&format!("bounds, {dtype}, d={d}, group={group}"), &got, &wanted);
}

fn distances(device: &mut impl Device, words: usize, group: usize) {
    let (rows, stride) = (250, 260);
    let mut numbers = Numbers::new(words as u64);
    let mut bits = |n: usize| -> Vec<u64> { (0..n).map(|_| numbers.bits()).collect() };
    let (queries, codes) = (bits(HEADS * group * words), bits(HEADS * stride * words));
    let mut wanted = vec![u32::MAX; HEADS * group * stride];
    for head in 0..HEADS {
        let queries = &queries[head * group * words..][..group * words];
        let codes = &codes[head * stride * words..][..rows * words];
        Kernels::best().hamming(queries, group, codes, &mut wanted[head * group * stride..], stride);
    }
    let out = device.put(&vec![u32::MAX; wanted.len()]);
    let params = HammingParams {
        queries: device.put(&queries),
        codes: device.put(&codes),
        out,
        lengths: 0,
        heads: HEADS as u32,
        group: group as u32,
        words: words as u32,
        rows: rows as u32,
        stride: stride as u32,
        out_stride: stride as u32,
    };
    device.launch("score", "hamming", &params, params.launch());
    assert_eq!(device.get::<u32>(out, wanted.len()), wanted, "{words} words");
}

pub(crate) fn the_best_scores_are_chosen_exactly_as_on_the_cpu(device: &mut impl Device) {
    let mut numbers = Numbers::new(7);
    let lengths: [usize; 6] = [1, 31, 256, 257, 1000, 5000];
    let stride = 5003;
    let mut scores = vec![f32::NAN; lengths.len() * stride];
    for (head, n) in lengths.into_iter().enumerate() {
        let values = numbers.normal(n);
        for (i, (score, value)) in scores[head * stride..].iter_mut().zip(values).enumerate() {
            // Many ties, and all that has a rule of its own.
            *score = match i % 11 {
                0 => (value * 2.0).round(),
                1 => 0.0,
                2 => -0.0,
                3 if head % 2 == 0 => f32::NAN,
                4 if head % 2 == 0 => f32::NEG_INFINITY,
                5 if i % 5 == 0 => f32::INFINITY,
                _ => value,
            };
        }
    }
    for k in [0, 1, 5, 31, 200, 999, 4999, 6000] {
        let ids_stride = k.min(5000) + 3;
        let params = TopKParams {
            scores: device.put(&scores),
            lengths: device.put(&lengths.map(|n| n as u32)),
            ids: device.put(&vec![u32::MAX; lengths.len() * ids_stride]),
            counts: device.put(&[u32::MAX; 6]),
            heads: lengths.len() as u32,
            n: 0,
            stride: stride as u32,
            k: k as u32,
            ids_stride: ids_stride as u32,
            pad: 0,
        };
        device.launch("select", "top_k", &params, params.launch());
        let ids = device.get::<u32>(params.ids, lengths.len() * ids_stride);
        let counts = device.get::<u32>(params.counts, lengths.len());
        for (head, n) in lengths.into_iter().enumerate() {
            let mut wanted = Vec::new();
            let scores = &scores[head * stride..][..n];
            Kernels::best().top_k(scores, k, &mut TopKScratch::default(), &mut wanted);
            assert_eq!(counts[head] as usize, wanted.len(), "k={k} n={n}");
            let (written, rest) = ids[head * ids_stride..][..ids_stride].split_at(wanted.len());
            assert_eq!(written, wanted, "k={k} n={n}");
            assert!(rest.iter().all(|id| *id == u32::MAX), "k={k} n={n}");
        }
    }
}
