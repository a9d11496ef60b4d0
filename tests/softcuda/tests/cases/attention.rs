//! Attention over a block table, and the merge of its parts.

use kvoyant_kernels::cuda::launch::{splits, tile_rows};
use kvoyant_kernels::cuda::params::{AttendParams, FAILED_RANGE, FAILED_STATUS, MergeParams, RowRun};
use kvoyant_kernels::{AttendScratch, Dtype, Kernels, Run};

use super::{Device, Numbers, assert_close, stored};

/// Rows of the slab, of each extent and of the local memory.
const ROWS: usize = 96;

/// Where rows lie: local, the slab, two extents.
const PLACES: usize = 4;

/// Rows in all places, and the table and local runs that name some.
struct Scene {
    dtype: Dtype,
    d: usize,
    group: usize,
    kv_heads: usize,
    members: usize,
    memory: [Vec<u8>; PLACES],
    table: Vec<u32>,
    /// Of each head: first row and rows.
    local: Vec<Vec<(usize, usize)>>,
    /// Of each head, in the table: place, first row and rows.
    far: Vec<Vec<(usize, usize, usize)>>,
    queries: Vec<f32>,
}

/// Values and log-sums.
type Answer = (Vec<f32>, Vec<f32>);

impl Scene {
    fn new(seed: u64, dtype: Dtype, d: usize, group: usize, kv_heads: usize, members: usize) -> Self {
        let mut numbers = Numbers::new(seed);
        let memory = [(); PLACES].map(|()| stored(dtype, &numbers.normal(ROWS * 2 * d)));
        let heads = kv_heads * members;
        let mut pick = |most: usize| {
            let first = numbers.below(ROWS);
            (first, numbers.below(most.min(ROWS - first) + 1), 1 + numbers.below(3))
        };
        let (mut entries, mut runs) = (Vec::new(), Vec::new());
        let (mut local, mut far) = (Vec::new(), Vec::new());
        for head in 0..heads {
            local.push((0..head % 3).map(|_| pick(40)).map(|(first, n, _)| (first, n)).collect());
            let count = [0, 5, 300][(head + 1) % 3];
            entries.extend([runs.len() as u32 / 3, count, 0, 0]);
            let mut rows = Vec::new();
            for _ in 0..count {
                let (first, n, place) = pick(if count > 10 { 2 } else { 90 });
                let base = if place == 3 { ROWS } else { 0 };
                let in_slab = u32::from(place == 1) << 31;
                runs.extend([(base + first) as u32, 0, n as u32 | in_slab]);
                rows.push((place, first, n));
            }
            far.push(rows);
        }
        entries.extend(runs);
        let queries = numbers.normal(heads * group * d);
        Self { dtype, d, group, kv_heads, members, memory, table: entries, local, far, queries }
    }

    fn heads(&self) -> usize {
        self.kv_heads * self.members
    }

    fn row_bytes(&self) -> usize {
        2 * self.d * self.dtype.bytes()
    }

    fn params(&self, device: &mut impl Device) -> AttendParams {
        let (d, group) = (self.d as u32, self.group as u32);
        let places: Vec<u64> = (0..PLACES)
            .map(|place| match place {
                0 | 1 => device.upload(&self.memory[place]),
                _ => device.upload_mapped(&self.memory[place]),
            })
            .collect();
        let (mut runs, mut offsets) = (Vec::new(), vec![0]);
        for local in &self.local {
            runs.extend(local.iter().map(|(first, n)| RowRun {
                address: places[0] + (first * self.row_bytes()) as u64,
                rows: *n as u32,
                pad: 0,
            }));
            offsets.push(runs.len() as u32);
        }
        AttendParams {
            queries: device.put(&self.queries),
            table: device.put(&self.table),
            slab: places[1],
            extents: device.put(&places[2..]),
            local_runs: device.put(&runs),
            local_offsets: device.put(&offsets),
            failed: device.put(&[0_u32]),
            dtype: u32::from(self.dtype.code()),
            d,
            group,
            kv_heads: self.kv_heads as u32,
            members: self.members as u32,
            row_bytes: self.row_bytes() as u32,
            slab_rows: ROWS as u32,
            rows_per_extent: ROWS as u32,
            extent_count: 2,
            table_runs: (self.table.len() as u32).saturating_sub(4 * self.heads() as u32) / 3,
            tile_rows: tile_rows(self.dtype, d, group).unwrap(),
            splits: 1,
            scale: 1.0 / (d as f32).sqrt(),
            ..AttendParams::default()
        }
    }

    /// The parts' addresses and their number of values.
    fn launch(&self, device: &mut impl Device, params: &mut AttendParams) -> (usize, usize) {
        let heads = self.heads() * self.group;
        let n = heads * params.splits as usize;
        params.out = device.put(&vec![f32::NAN; n * self.d]);
        params.lse = device.put(&vec![f32::NAN; n]);
        device.launch("attend", "attend", params, params.launch());
        (heads * self.d, heads)
    }

    fn attend(&self, device: &mut impl Device, mut params: AttendParams) -> Answer {
        let (values, heads) = self.launch(device, &mut params);
        (device.get(params.out, values), device.get(params.lse, heads))
    }

    fn expected(&self, with_table: bool) -> Answer {
        let at = |place: usize, first: usize, n| {
            Run::new(self.memory[place][first * self.row_bytes()..].as_ptr(), n)
        };
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for (head, (local, far)) in self.local.iter().zip(&self.far).enumerate() {
            let mut runs: Vec<Run> = local.iter().map(|(first, n)| at(0, *first, *n)).collect();
            if with_table {
                runs.extend(far.iter().map(|(place, first, n)| at(*place, *first, *n)));
            }
            let values = self.group * self.d;
            let (mut o, mut l) = (vec![0.0; values], vec![0.0; self.group]);
            let queries = &self.queries[head * values..][..values];
            let scale = 1.0 / (self.d as f32).sqrt();
            let (kernels, mut scratch) = (Kernels::best(), AttendScratch::default());
            // SAFETY: the runs lie within the scene's vectors, which nobody writes to.
            unsafe {
                kernels.attend(
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

pub(crate) fn paged_attention_is_that_of_the_cpu_for_every_storage_type_dimension_and_group(
    device: &mut impl Device,
) {
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
            let params = scene.params(device);
            let (out, lse) = scene.attend(device, params);
            let (wanted_out, wanted_lse) = scene.expected(true);
            let what = format!("{dtype} d={d} group={group}");
            assert_close(&format!("{what}: out"), &out, &wanted_out);
            assert_close(&format!("{what}: lse"), &lse, &wanted_lse);
            assert_eq!(device.get::<u32>(params.failed, 1), [0]);
        }
    }
}

pub(crate) fn a_table_whose_status_is_another_is_not_read(device: &mut impl Device) {
    let scene = Scene::new(3, Dtype::F16, 64, 2, 2, 2);
    let ready = 7_u64 << 8 | 1;
    let params = AttendParams { status: device.put(&[ready]), expected: ready, ..scene.params(device) };
    let (out, _) = scene.attend(device, params);
    assert_close("out", &out, &scene.expected(true).0);
    assert_eq!(device.get::<u32>(params.failed, 1), [0]);
    let (out, lse) = scene.attend(device, AttendParams { expected: 8 << 8 | 1, ..params });
    assert_close("local out", &out, &scene.expected(false).0);
    assert_close("local lse", &lse, &scene.expected(false).1);
    assert_eq!(device.get::<u32>(params.failed, 1), [FAILED_STATUS]);
}

pub(crate) fn runs_that_lead_outside_are_left_out_and_told(device: &mut impl Device) {
    let last = ROWS as u32 - 1;
    let slab = 1 << 31;
    let tables = [
        [0, 1, 0, 0, last, 0, 2 | slab],
        [0, 1, 0, 0, last, 0, 2],
        [0, 1, 0, 0, 2 * ROWS as u32, 0, 1],
        [0, 1, 0, 0, u32::MAX, 0, 2],
        [1, 1, 0, 0, 0, 0, 1],
        [u32::MAX, 2, 0, 0, 0, 0, 1],
    ];
    for table in tables {
        let mut scene = Scene::new(4, Dtype::F32, 16, 1, 1, 1);
        scene.table = table.to_vec();
        let params = scene.params(device);
        let (out, lse) = scene.attend(device, params);
        assert_eq!(device.get::<u32>(params.failed, 1), [FAILED_RANGE], "{table:?}");
        assert!(out.iter().all(|value| *value == 0.0));
        assert_eq!(lse, [f32::NEG_INFINITY]);
    }
}

pub(crate) fn splits_of_one_head_merge_to_the_whole(device: &mut impl Device) {
    let scene = Scene::new(5, Dtype::Bf16, 64, 4, 2, 2);
    let parts = splits(4, 4096, 8);
    assert_eq!(parts, 8);
    let mut params = scene.params(device);
    params.splits = parts;
    let (values, heads) = scene.launch(device, &mut params);
    let (out, lse) = (params.out, params.lse);
    let (out_bytes, lse_bytes) = (values as u64 * 4, heads as u64 * 4);
    let all = MergeParams {
        out,
        lse,
        first_out: out,
        first_lse: lse,
        parts_out: out + out_bytes,
        parts_lse: lse + lse_bytes,
        parts: parts - 1,
        heads: heads as u32,
        d: scene.d as u32,
        pad: 0,
    };
    let other = (device.put(&vec![0.0_f32; values]), device.put(&vec![0.0_f32; heads]));
    let apart = MergeParams { out: other.0, lse: other.1, ..all };
    let at_once = MergeParams { first_out: 0, first_lse: 0, parts_out: out, parts_lse: lse, parts, ..apart };
    let (wanted_out, wanted_lse) = scene.expected(true);
    // The last one overwrites a part.
    for (what, params) in [("one apart", apart), ("at once", at_once), ("in place", all)] {
        device.launch("merge", "lse_merge", &params, params.launch());
        assert_close(&format!("{what}: out"), &device.get::<f32>(params.out, values), &wanted_out);
        assert_close(&format!("{what}: lse"), &device.get::<f32>(params.lse, heads), &wanted_lse);
    }
}
