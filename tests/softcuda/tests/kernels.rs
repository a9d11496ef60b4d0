//! The kernels of `kernels/cuda`, compiled for this processor, against the CPU's.

mod shim;

use std::sync::atomic::{AtomicU32, Ordering};

use kvoyant_kernels::cuda::launch::{splits, tile_rows};
use kvoyant_kernels::cuda::params::{
    AttendParams, FAILED_RANGE, FAILED_STATUS, GatherParams, GatherRun, RowRun,
};
use kvoyant_kernels::{AttendScratch, Dtype, Kernels, Run};
use shim::{Numbers, address, launch, stored};

#[test]
fn runs_of_every_length_and_alignment_are_gathered_byte_for_byte() {
    let mut numbers = Numbers::new(1);
    let source: Vec<u64> = (0..40_000).map(|_| numbers.bits()).collect();
    let source: &[u8] = bytemuck::cast_slice(&source);
    for (count, longest, step) in [(1, 200_000, 16), (37, 512, 16), (50, 9000, 4), (64, 5000, 1), (3, 0, 1)] {
        let mut runs = Vec::new();
        let mut wanted = vec![0_u8; 320_000];
        let mut got = vec![0_u64; 40_000];
        let got_at = got.as_mut_ptr() as u64;
        let mut at = 0;
        for _ in 0..count {
            let bytes = if longest == 0 { 0 } else { numbers.below(longest / step + 1) * step };
            let from = numbers.below((source.len() - bytes) / step + 1) * step;
            wanted[at..at + bytes].copy_from_slice(&source[from..from + bytes]);
            runs.push(GatherRun {
                src: address(source) + from as u64,
                dst: got_at + at as u64,
                bytes: bytes as u64,
            });
            at += bytes;
        }
        let params = GatherParams { runs: address(&runs), count, pad: 0 };
        let longest = runs.iter().map(|run| run.bytes).max().unwrap();
        launch("gather", "gather_runs", &params, params.launch(longest));
        assert!(bytemuck::cast_slice::<u64, u8>(&got) == wanted, "{count} runs of up to {longest} bytes");
    }
}

/// Rows in a slab, in two extents and in local runs, and the table that names them.
struct Scene {
    dtype: Dtype,
    d: usize,
    group: usize,
    kv_heads: usize,
    members: usize,
    slab: Vec<u8>,
    extents: [Vec<u8>; 2],
    local: Vec<u8>,
    table: Vec<u32>,
    local_runs: Vec<RowRun>,
    local_offsets: Vec<u32>,
    queries: Vec<f32>,
    /// Of each head: local runs, then those of the table.
    wanted: Vec<(Vec<Run>, Vec<Run>)>,
}

const ROWS: usize = 96;

impl Scene {
    fn new(seed: u64, dtype: Dtype, d: usize, group: usize, kv_heads: usize, members: usize) -> Self {
        let mut numbers = Numbers::new(seed);
        let row_bytes = 2 * d * dtype.bytes();
        let mut rows = |n: usize| stored(dtype, &numbers.normal(n * 2 * d));
        let (slab, extents, local) = (rows(ROWS), [rows(ROWS), rows(ROWS)], rows(ROWS));
        let heads = kv_heads * members;
        let (mut entries, mut runs) = (Vec::new(), Vec::new());
        let (mut local_runs, mut local_offsets, mut wanted) = (Vec::new(), vec![0], Vec::new());
        let mut numbers = Numbers::new(seed + 1);
        let mut pick = |most: usize| {
            let first = numbers.below(ROWS);
            (first, numbers.below(most.min(ROWS - first) + 1), numbers.below(3))
        };
        for head in 0..heads {
            let (mut near, mut far) = (Vec::new(), Vec::new());
            for _ in 0..head % 3 {
                let (first, n, _) = pick(40);
                let at = local[first * row_bytes..].as_ptr();
                local_runs.push(RowRun { address: at as u64, rows: n as u32, pad: 0 });
                near.push(Run::new(at, n));
            }
            local_offsets.push(local_runs.len() as u32);
            let first_run = runs.len() as u32 / 3;
            let count = [0, 5, 300][(head + 1) % 3];
            for _ in 0..count {
                let (first, n, place) = pick(if count > 10 { 2 } else { 90 });
                let (memory, base, in_slab) = match place {
                    0 => (&slab, 0, 1 << 31),
                    1 => (&extents[0], 0, 0),
                    _ => (&extents[1], ROWS, 0),
                };
                runs.extend([(base + first) as u32, 0, n as u32 | in_slab]);
                far.push(Run::new(memory[first * row_bytes..].as_ptr(), n));
            }
            let rows: usize = far.iter().map(|run| run.rows).sum();
            entries.extend([first_run, count, rows as u32, 0]);
            wanted.push((near, far));
        }
        entries.extend(runs);
        let queries = numbers.normal(heads * group * d);
        let table = entries;
        Self {
            dtype,
            d,
            group,
            kv_heads,
            members,
            slab,
            extents,
            local,
            table,
            local_runs,
            local_offsets,
            queries,
            wanted,
        }
    }

    fn heads(&self) -> usize {
        self.kv_heads * self.members
    }

    fn params(&self) -> AttendParams {
        let (d, group) = (self.d as u32, self.group as u32);
        AttendParams {
            queries: address(&self.queries),
            table: address(&self.table),
            slab: address(&self.slab),
            local_runs: address(&self.local_runs),
            local_offsets: address(&self.local_offsets),
            dtype: u32::from(self.dtype.code()),
            d,
            group,
            kv_heads: self.kv_heads as u32,
            members: self.members as u32,
            row_bytes: 2 * d * self.dtype.bytes() as u32,
            slab_rows: ROWS as u32,
            rows_per_extent: ROWS as u32,
            extent_count: 2,
            table_runs: (self.table.len() as u32 - 4 * self.heads() as u32) / 3,
            tile_rows: tile_rows(self.dtype, d, group).unwrap(),
            splits: 1,
            scale: 1.0 / (d as f32).sqrt(),
            ..AttendParams::default()
        }
    }

    /// Values and log-sums, without splits.
    fn attend(&self, mut params: AttendParams) -> (Vec<f32>, Vec<f32>) {
        let extents: Vec<u64> = self.extents.iter().map(|extent| address(extent)).collect();
        let heads = self.heads() * self.group * params.splits as usize;
        let (mut out, mut lse) = (vec![f32::NAN; heads * self.d], vec![f32::NAN; heads]);
        params.extents = address(&extents);
        params.out = out.as_mut_ptr() as u64;
        params.lse = lse.as_mut_ptr() as u64;
        launch("attend", "attend", &params, params.launch());
        (out, lse)
    }

    fn expected(&self, with_table: bool) -> (Vec<f32>, Vec<f32>) {
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for (head, (near, far)) in self.wanted.iter().enumerate() {
            let mut runs = near.clone();
            if with_table {
                runs.extend(far);
            }
            let values = self.group * self.d;
            let (mut o, mut l) = (vec![0.0; values], vec![0.0; self.group]);
            let queries = &self.queries[head * values..][..values];
            let scale = 1.0 / (self.d as f32).sqrt();
            let mut scratch = AttendScratch::default();
            // SAFETY: the runs lie within the scene's vectors, which nobody writes to.
            unsafe {
                Kernels::best().attend(
                    self.dtype,
                    queries,
                    self.group,
                    self.d,
                    scale,
                    &runs,
                    &mut scratch,
                    &mut o,
                    &mut l,
                );
            }
            out.extend(o);
            lse.extend(l);
        }
        (out, lse)
    }
}

fn assert_close(what: &str, got: &[f32], wanted: &[f32]) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    for (i, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let near = got == wanted || (got - wanted).abs() <= 2e-5 * wanted.abs().max(1.0);
        assert!(near, "{what}[{i}]: {got} instead of {wanted}");
    }
}

#[test]
fn paged_attention_is_that_of_the_cpu_for_every_storage_type_dimension_and_group() {
    let shapes = [
        (16, 1, 2, 3),
        (64, 4, 2, 1),
        (128, 8, 1, 2),
        (80, 3, 2, 2),
        (256, 2, 1, 2),
        (36, 12, 1, 3),
        (7, 1, 1, 3),
    ];
    for (i, (d, group, kv_heads, members)) in shapes.into_iter().enumerate() {
        for dtype in Dtype::ALL {
            let scene = Scene::new(10 + i as u64, dtype, d, group, kv_heads, members);
            let (out, lse) = scene.attend(scene.params());
            let (wanted_out, wanted_lse) = scene.expected(true);
            let what = format!("{dtype} d={d} group={group}");
            assert_close(&format!("{what}: out"), &out, &wanted_out);
            assert_close(&format!("{what}: lse"), &lse, &wanted_lse);
        }
    }
}

#[test]
fn a_table_whose_status_is_another_is_not_read() {
    let scene = Scene::new(3, Dtype::F16, 64, 2, 2, 2);
    let (status, failed) = ([7_u64 << 8 | 1], AtomicU32::new(0));
    let params = AttendParams {
        status: address(&status),
        expected: 7 << 8 | 1,
        failed: failed.as_ptr() as u64,
        ..scene.params()
    };
    let (out, _) = scene.attend(params);
    assert_close("out", &out, &scene.expected(true).0);
    assert_eq!(failed.load(Ordering::Relaxed), 0);
    let (out, lse) = scene.attend(AttendParams { expected: 8 << 8 | 1, ..params });
    assert_close("local out", &out, &scene.expected(false).0);
    assert_close("local lse", &lse, &scene.expected(false).1);
    assert_eq!(failed.load(Ordering::Relaxed), FAILED_STATUS);
}

#[test]
fn runs_that_lead_outside_are_left_out_and_told() {
    for (row, in_slab) in
        [(ROWS as u32 - 1, 1 << 31), (ROWS as u32 - 1, 0), (2 * ROWS as u32, 0), (u32::MAX, 0)]
    {
        let mut scene = Scene::new(4, Dtype::F32, 16, 1, 1, 1);
        scene.table = vec![0, 1, 2, 0, row, 0, 2 | in_slab];
        let failed = AtomicU32::new(0);
        let (out, lse) = scene.attend(AttendParams { failed: failed.as_ptr() as u64, ..scene.params() });
        assert_eq!(failed.load(Ordering::Relaxed), FAILED_RANGE);
        assert!(out.iter().all(|value| *value == 0.0));
        assert_eq!(lse, [f32::NEG_INFINITY]);
    }
    let mut scene = Scene::new(4, Dtype::F32, 16, 1, 1, 1);
    scene.table = vec![1, 1, 2, 0, 0, 0, 2];
    let failed = AtomicU32::new(0);
    scene.attend(AttendParams { failed: failed.as_ptr() as u64, ..scene.params() });
    assert_eq!(failed.load(Ordering::Relaxed), FAILED_RANGE);
}

#[test]
fn splits_of_one_head_merge_to_the_whole() {
    let scene = Scene::new(5, Dtype::Bf16, 64, 4, 2, 2);
    let parts = splits(4, 4096, 8);
    assert_eq!(parts, 8);
    let (outs, lses) = scene.attend(AttendParams { splits: parts, ..scene.params() });
    let heads = scene.heads() * scene.group;
    let (mut out, mut lse) = (vec![0.0; heads * scene.d], vec![f32::NEG_INFINITY; heads]);
    for (part, part_lse) in outs.chunks(heads * scene.d).zip(lses.chunks(heads)) {
        Kernels::best().merge(&mut out, &mut lse, part, part_lse);
    }
    assert_close("out", &out, &scene.expected(true).0);
    assert_close("lse", &lse, &scene.expected(true).1);
    assert!(!scene.local.is_empty());
}
