//! Graph mode's kernels: the same parameters every time, and other contents of memory.

use kvoyant_kernels::cuda::launch::tile_rows;
use kvoyant_kernels::cuda::params::{
    FAILED_RANGE, NO_PAGE, Position, ReportHeader, ReportParams, ResidencyEntry, ResidencyHeader,
    ResolveParams,
};
use kvoyant_kernels::{AttendScratch, Dtype, Kernels, Run};

use super::{Device, Numbers, assert_close, stored};

const D: usize = 64;
const GROUP: usize = 3;
const KV_HEADS: usize = 2;
const TOKENS: usize = 200;
const PAGE_ROWS: usize = 8;
const PAGES_PER_EXTENT: usize = 20;
const PAGE_CAPACITY: usize = TOKENS / PAGE_ROWS;
const WINDOW: usize = 16;
/// More than the window: its rows begin and end anywhere in the ring.
const RING: usize = 24;
const CAPACITY: usize = 64;
const RECORD: usize = 16 + CAPACITY * 8;
const ROW: usize = 2 * D * 2;

/// All rows of one layer, `[kv head][token]`, and where copies of them lie.
struct Layer {
    rows: Vec<u8>,
    slab: Vec<u8>,
    records: Vec<u8>,
    selected: Vec<u32>,
    counts: [u32; KV_HEADS],
}

impl Layer {
    fn row(&self, head: usize, token: usize) -> &[u8] {
        &self.rows[(head * TOKENS + token) * ROW..][..ROW]
    }

    /// Selects some tokens of each head, and keeps every second one of them in the slab.
    fn select(&mut self, numbers: &mut Numbers, position: Position, version: u64) {
        for head in 0..KV_HEADS {
            let middle = position.sinks..position.first_window;
            let mut ids: Vec<u32> = middle.filter(|_| numbers.below(4) == 0).take(CAPACITY).collect();
            let kept: Vec<ResidencyEntry> = ids
                .iter()
                .step_by(2)
                .enumerate()
                .map(|(i, token)| ResidencyEntry { token: *token, slot: (head * CAPACITY + i) as u32 })
                .collect();
            for entry in &kept {
                let row = self.row(head, entry.token as usize).to_vec();
                self.slab[entry.slot as usize * ROW..][..ROW].copy_from_slice(&row);
            }
            let header = ResidencyHeader { version, count: kept.len() as u32, pad: 0 };
            let record = &mut self.records[head * RECORD..][..RECORD];
            record[..16].copy_from_slice(bytemuck::bytes_of(&header));
            record[16..][..kept.len() * 8].copy_from_slice(bytemuck::cast_slice(&kept));
            // What is the engine's own may be selected, too: it must not count twice.
            ids.extend([0, position.tokens - 1]);
            ids.rotate_left(1);
            self.counts[head] = ids.len() as u32;
            self.selected[head * CAPACITY..][..ids.len()].copy_from_slice(&ids);
        }
    }

    fn expected(&self, queries: &[f32], position: Position) -> (Vec<f32>, Vec<f32>) {
        let (mut out, mut lse) = (vec![0.0; KV_HEADS * GROUP * D], vec![0.0; KV_HEADS * GROUP]);
        for head in 0..KV_HEADS {
            let local = (0..position.sinks).chain(position.first_window..position.tokens);
            let ids = &self.selected[head * CAPACITY..][..self.counts[head] as usize];
            let middle =
                ids.iter().copied().filter(|id| (position.sinks..position.first_window).contains(id));
            let tokens = local.chain(middle).map(|token| token as usize);
            let runs: Vec<Run> = tokens.map(|token| Run::new(self.row(head, token).as_ptr(), 1)).collect();
            let queries = &queries[head * GROUP * D..][..GROUP * D];
            let (out, lse) = (&mut out[head * GROUP * D..][..GROUP * D], &mut lse[head * GROUP..][..GROUP]);
            let (kernels, mut scratch) = (Kernels::best(), AttendScratch::default());
            // SAFETY: the runs lie within `rows`, which nobody writes to.
            unsafe { kernels.attend(Dtype::F16, queries, GROUP, D, 0.125, &runs, &mut scratch, out, lse) };
        }
        (out, lse)
    }
}

/// The rows of each head's tokens in pages that lie all over two extents.
fn extents(layer: &Layer) -> (Vec<u32>, [Vec<u8>; 2]) {
    let page_bytes = PAGE_ROWS * ROW;
    let mut extents = [(); 2].map(|()| vec![0xff_u8; (PAGES_PER_EXTENT + 10) * page_bytes]);
    let mut table = vec![NO_PAGE; KV_HEADS * PAGE_CAPACITY];
    // Pages are not in the order of tokens: 7 is prime to the 50 that are used.
    let mut page = 0;
    for head in 0..KV_HEADS {
        for block in 0..PAGE_CAPACITY {
            page = (page + 7) % (2 * PAGES_PER_EXTENT + 10);
            let (extent, place) = (page / PAGES_PER_EXTENT, page % PAGES_PER_EXTENT);
            if extent < 2 {
                table[head * PAGE_CAPACITY + block] = page as u32;
                let rows = &layer.rows[(head * TOKENS + block * PAGE_ROWS) * ROW..][..page_bytes];
                extents[extent][place * page_bytes..][..page_bytes].copy_from_slice(rows);
            }
        }
    }
    (table, extents)
}

pub(crate) fn a_captured_kernel_follows_residency_and_position_from_replay_to_replay(
    device: &mut impl Device,
) {
    let mut numbers = Numbers::new(21);
    let rows = stored(Dtype::F16, &numbers.normal(KV_HEADS * TOKENS * 2 * D));
    let mut layer = Layer {
        rows,
        slab: vec![0xff; KV_HEADS * CAPACITY * ROW],
        records: vec![0; KV_HEADS * RECORD],
        selected: vec![u32::MAX; KV_HEADS * CAPACITY],
        counts: [0; KV_HEADS],
    };
    let (pages, memory) = extents(&layer);
    let addresses = [device.upload_mapped(&memory[0]), device.upload_mapped(&memory[1])];
    let params = ResolveParams {
        queries: device.put(&[0.0_f32; KV_HEADS * GROUP * D]),
        out: device.put(&[f32::NAN; KV_HEADS * GROUP * D]),
        lse: device.put(&[f32::NAN; KV_HEADS * GROUP]),
        ids: device.put(&layer.selected),
        counts: device.put(&layer.counts),
        misses: device.put(&[0_u32; KV_HEADS]),
        position: device.put(&[Position::default()]),
        residency: device.upload(&layer.records),
        expected: device.put(&[0_u64]),
        slab: device.upload(&layer.slab),
        pages: device.upload_mapped(bytemuck::cast_slice(&pages)),
        extents: device.put(&addresses),
        sinks: device.upload(&layer.rows),
        window: device.upload(&vec![0xff; KV_HEADS * RING * ROW]),
        failed: device.put(&[0_u32]),
        residency_stride: RECORD as u64,
        sinks_stride: (TOKENS * ROW) as u64,
        window_stride: (RING * ROW) as u64,
        dtype: u32::from(Dtype::F16.code()),
        d: D as u32,
        group: GROUP as u32,
        kv_heads: KV_HEADS as u32,
        row_bytes: ROW as u32,
        ids_stride: CAPACITY as u32,
        residency_capacity: CAPACITY as u32,
        slab_rows: (KV_HEADS * CAPACITY) as u32,
        page_capacity: PAGE_CAPACITY as u32,
        page_rows: PAGE_ROWS as u32,
        pages_per_extent: PAGES_PER_EXTENT as u32,
        extent_count: 2,
        window_rows: RING as u32,
        tile_rows: tile_rows(Dtype::F16, D as u32, GROUP as u32).unwrap(),
        splits: 1,
        scale: 0.125,
    };
    let mut resolve = |layer: &mut Layer, step: u32, expected: u64| {
        let tokens = 117 + step;
        let position = Position { sinks: 4, first_window: tokens - WINDOW as u32, tokens, pad: 0 };
        let mut numbers = Numbers::new(u64::from(step));
        let queries = numbers.normal(KV_HEADS * GROUP * D);
        layer.select(&mut numbers, position, 100 + u64::from(step));
        // A token that has no page can be selected: it is left out, and said.
        let lost = |head: usize, id: u32| pages[head * PAGE_CAPACITY + id as usize / PAGE_ROWS] == NO_PAGE;
        let mut lost_any = false;
        let hit = |head: usize, layer: &Layer, id: u32| {
            let count =
                u32::from_le_bytes(layer.records[head * RECORD + 8..][..4].try_into().unwrap()) as usize;
            let entries: &[ResidencyEntry] =
                bytemuck::cast_slice(&layer.records[head * RECORD + 16..][..count * 8]);
            expected == 100 + u64::from(step) && entries.iter().any(|entry| entry.token == id)
        };
        let mut misses = [0; KV_HEADS];
        let mut without_lost = Vec::new();
        for (head, misses) in misses.iter_mut().enumerate() {
            let ids = layer.selected[head * CAPACITY..][..layer.counts[head] as usize].to_vec();
            let far = |id: &u32| (position.sinks..position.first_window).contains(id);
            let missed: Vec<u32> =
                ids.iter().copied().filter(far).filter(|id| !hit(head, layer, *id)).collect();
            *misses = missed.len() as u32;
            lost_any |= missed.iter().any(|id| lost(head, *id));
            without_lost.push(
                ids.into_iter().filter(|id| !missed.contains(id) || !lost(head, *id)).collect::<Vec<u32>>(),
            );
        }
        device.write(params.queries, bytemuck::cast_slice(&queries));
        device.write(params.ids, bytemuck::cast_slice(&layer.selected));
        device.write(params.counts, bytemuck::cast_slice(&layer.counts));
        device.write(params.position, bytemuck::bytes_of(&position));
        device.write(params.residency, &layer.records);
        device.write(params.slab, &layer.slab);
        device.write(params.expected, bytemuck::bytes_of(&expected));
        device.write(params.failed, &[0; 4]);
        for head in 0..KV_HEADS {
            for token in position.first_window..position.tokens {
                let place = (head * RING + token as usize % RING) * ROW;
                device.write(params.window + place as u64, layer.row(head, token as usize));
            }
        }
        device.replay("residency", "resolve_attend", &params, params.launch());
        for (head, ids) in without_lost.iter().enumerate() {
            layer.counts[head] = ids.len() as u32;
            layer.selected[head * CAPACITY..][..ids.len()].copy_from_slice(ids);
        }
        let (out, lse) = layer.expected(&queries, position);
        assert_close("out", &device.get::<f32>(params.out, out.len()), &out);
        assert_close("lse", &device.get::<f32>(params.lse, lse.len()), &lse);
        assert_eq!(device.get::<u32>(params.misses, KV_HEADS), misses);
        let failed = if lost_any { FAILED_RANGE } else { 0 };
        assert_eq!(device.get::<u32>(params.failed, 1), [failed]);
        misses
    };
    let mut counts = Vec::new();
    for step in 0..6 {
        // Every second time the record is of another version than expected: nothing is a hit.
        let expected = if step % 2 == 0 { 100 + u64::from(step) } else { 7 };
        counts.push(resolve(&mut layer, step, expected));
    }
    assert!(counts.iter().flatten().all(|misses| *misses > 0));
    let all = |from: usize| counts.iter().skip(from).step_by(2).flatten().sum::<u32>();
    assert!(all(0) < all(1), "hits are no misses");
}

pub(crate) fn reports_go_round_a_mailbox_and_say_which_they_are(device: &mut impl Device) {
    let (heads, capacity, slots) = (3, 300, 4);
    let slot_bytes = ReportHeader::report_bytes(heads, capacity).next_multiple_of(64);
    let params = ReportParams {
        ids: device.put(&vec![0_u32; (heads * capacity) as usize]),
        counts: device.put(&[0_u32; 3]),
        misses: device.put(&[0_u32; 3]),
        position: device.put(&[Position::default()]),
        counter: device.put(&[0_u64]),
        mailbox: device.upload_mapped(&vec![0; (slot_bytes * u64::from(slots)) as usize]),
        sequence: 0xfeed,
        slots,
        slot_bytes: slot_bytes as u32,
        layer: 5,
        heads,
        capacity,
        pad: 0,
    };
    let mut numbers = Numbers::new(9);
    for number in 1..=10_u64 {
        let ids: Vec<u32> = (0..heads * capacity).map(|_| numbers.bits() as u32).collect();
        // The last one claims more ids than there is room for.
        let counts = [numbers.below(300) as u32, 0, 300 + number as u32];
        let position = Position { tokens: 1000 + number as u32, ..Position::default() };
        device.write(params.ids, bytemuck::cast_slice(&ids));
        device.write(params.counts, bytemuck::cast_slice(&counts));
        device.write(params.misses, bytemuck::cast_slice(&[1_u32, 2, number as u32]));
        device.write(params.position, bytemuck::bytes_of(&position));
        device.replay("residency", "report", &params, params.launch());
        let slot = params.mailbox + number % u64::from(slots) * slot_bytes;
        let header = device.get::<ReportHeader>(slot, 1)[0];
        let wanted =
            ReportHeader { number, sequence: 0xfeed, layer: 5, heads, capacity, tokens: position.tokens };
        assert_eq!(header, wanted);
        let body =
            device.get::<u32>(slot + size_of::<ReportHeader>() as u64, (heads * (2 + capacity)) as usize);
        assert_eq!(body[..6], [counts[0], 0, 300, 1, 2, number as u32]);
        for (head, count) in [counts[0], 0, 300].into_iter().enumerate() {
            let first = head * capacity as usize;
            assert_eq!(body[6 + first..][..count as usize], ids[first..][..count as usize]);
        }
        // The one before is still there.
        let before = params.mailbox + (number - 1) % u64::from(slots) * slot_bytes;
        assert_eq!(device.get::<u64>(before, 1), [number - 1]);
    }
    assert_eq!(device.get::<u64>(params.counter, 1), [10]);
}
