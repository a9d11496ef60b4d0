//! What a session can make its lane keep has bounds that only the lane itself can see.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kvoyant_methods::Artifacts;
use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::control::{Failure, Mode, ModelSpec, SelectedBy, ToDaemon};
use kvoyant_protocol::layout::{Layout, Limits};
use kvoyant_protocol::memory::Memfd;
use kvoyant_protocol::quota::Quota;
use kvoyant_protocol::wire::{BatchEntry, SequenceId};
use tokio::sync::oneshot;

use crate::device::host::{HostDevice, Shape as Link};
use crate::device::{Importer, SlabRequest};
use crate::lane::background::Background;
use crate::lane::close::Closing;
use crate::lane::images::{Drawing, ImageOutcome, ImageRequest};
use crate::lane::model::{HEAP_FILE_BYTES, ModelState, Placement};
use crate::lane::select::{Answer, Turn};
use crate::lane::sequences::LayerSlots;
use crate::lane::session::LaneSession;
use crate::lane::{Command, LaneHandle};
use crate::quota::Ledger;
use crate::status::SessionStatus;
use crate::tiers::budget::ArenaBudget;
use crate::tiers::pool::{ExtentPool, PoolSettings};
use crate::tiers::residency::SlotSet;

const LAYERS: usize = 3;
const QUERY_HEADS: usize = 4;
const HEAD_DIM: usize = 32;

/// A model of small heads whose first layer is dense.
pub(super) fn spec(methods: &[&str]) -> ModelSpec {
    ModelSpec {
        name: "small".into(),
        fingerprint: "0".repeat(32),
        adapter: String::new(),
        rope: String::new(),
        layers: LAYERS as u32,
        query_heads: QUERY_HEADS as u32,
        kv_heads: 2,
        head_dim: HEAD_DIM as u32,
        latent_values: 0,
        dtype: kvoyant_kernels::Dtype::F32.code(),
        page_rows: 0,
        sinks: 4,
        window: 16,
        dense_layers: 1,
        sliding_layers: Vec::new(),
        methods: methods.iter().map(ToString::to_string).collect(),
        slab_bytes: 0,
        graph: None,
        artifacts: Vec::new(),
    }
}

/// What its slab is asked for with.
pub(super) fn slab(bytes: usize) -> SlabRequest {
    SlabRequest {
        session: 1,
        bytes,
        records: 0,
        layout: Layout::new(Limits::default()).unwrap(),
        d2c: Arc::new(Memfd::create("lane-test", 4096).unwrap().map(true).unwrap()),
        features: 0,
        importer: Arc::new(Importer { process: None, closed: AtomicBool::new(false) }),
        account: Ledger::default().account(1),
    }
}

/// Such a model with a slab.
struct Served {
    pool: ExtentPool,
    model: ModelState,
}

impl Served {
    fn new(methods: &[&str]) -> Self {
        let budget = Arc::new(ArenaBudget::new(4 * EXTENT_BYTES as u64));
        let pool = ExtentPool::start(budget, PoolSettings::unpinned()).unwrap();
        let device = HostDevice::new(Mode::Slab, 1, Link::default()).unwrap();
        let model = ModelState::new(
            spec(methods),
            &Artifacts::none(),
            8,
            pool.supply(1),
            &device,
            slab(8 << 20),
            Placement { keep: 1.0, device_share: 1.0, spill: None, check_every: 0 },
        )
        .unwrap();
        Self { pool, model }
    }

    /// As a lane and its control plane do it together.
    fn open(&mut self, method: u16, tokens: u32) -> Result<SequenceId, Failure> {
        let extents = self.model.missing_extents(&ToDaemon::Open { method, tokens, by: SelectedBy::Lane });
        if extents > 0 {
            self.model.arena.add(self.pool.request(1, extents).unwrap().blocking_recv().unwrap().unwrap());
        }
        self.model.open(method, tokens, SelectedBy::Lane)
    }

    /// A sequence of rows of zeros.
    fn filled(&mut self, tokens: u32) -> SequenceId {
        let id = self.open(0, tokens).unwrap();
        for layer in 0..LAYERS {
            self.model.sequence_mut(id).unwrap().lens[layer] = tokens;
            self.model.build_layer(id, layer).unwrap();
        }
        id
    }

    fn speculate(&mut self, id: SequenceId, layer: usize, ticket: u64) {
        let entry = BatchEntry { sequence: id, position: 200, value: 0 };
        let (mut answer, mut background) = (Answer::default(), Background::default());
        self.model.buffers.hint = vec![1.0; QUERY_HEADS * HEAD_DIM];
        let turn = Turn { ticket, released_through: 0, room: None };
        self.model.speculate(layer, &entry, 1, turn, &mut answer, &mut background).unwrap();
    }
}

#[test]
fn a_layer_waits_once_for_its_next_step_however_often_it_is_asked_for() {
    let mut served = Served::new(&["freekv:budget=20%,tau=-1"]);
    let (held, other) = (served.filled(200), served.filled(200));
    let mut ticket = 0;
    for _ in 0..100 {
        for layer in 1..LAYERS {
            for id in [other, held] {
                ticket += 1;
                served.speculate(id, layer, ticket);
            }
        }
    }
    assert_eq!(served.model.planned.len(), 2 * (LAYERS - 1), "after {ticket} requests");
    let mut background = Background::default();
    background.clear(1, served.model.rows_per_extent());
    assert!(!served.model.prefetch_next(ticket - 4, &mut background), "every last answer is being read");
    assert_eq!(served.model.planned.len(), 2 * (LAYERS - 1), "and who waits goes on waiting");
    // The first layer's answers have been let go of: one of each sequence is prepared, and no more.
    assert!(served.model.prefetch_next(ticket - 2, &mut background));
    assert!(served.model.prefetch_next(ticket - 2, &mut background));
    assert!(!served.model.prefetch_next(ticket - 2, &mut background));
    assert_eq!(served.model.planned.len(), LAYERS - 1);
    served.model.close(other).unwrap();
    assert!(served.model.planned.iter().all(|(id, _)| *id == held), "{:?}", served.model.planned);
    served.model.close(held).unwrap();
    assert!(served.model.planned.is_empty());
}

#[test]
fn partial_attentions_are_begun_only_where_their_table_has_room() {
    let served = Served::new(&["scout:query=true"]);
    let of_one = 4 * (1 + QUERY_HEADS * (1 + HEAD_DIM));
    let mut answer = Answer::default();
    let most = 10 * of_one + of_one / 2;
    let begun = (0..1000).filter(|_| served.model.begin_partial(&mut answer, most)).count();
    assert_eq!((begun, answer.partials.len() * 4), (10, 10 * of_one));
    // What lies before them in the table takes their room.
    let mut answer = Answer { runs: vec![bytemuck::Zeroable::zeroed(); 100], ..Answer::default() };
    let entries = size_of_val(answer.runs.as_slice());
    assert!(!served.model.begin_partial(&mut answer, entries + of_one - 1));
    assert!(answer.partials.is_empty() && answer.partials.capacity() == 0);
    assert!(served.model.begin_partial(&mut answer, entries + of_one));
}

#[test]
fn room_for_tables_is_asked_for_by_what_a_sequences_own_method_keeps_and_before_anything_is_taken() {
    let mut served = Served::new(&["window", "resv"]);
    let tokens = 80_000;
    let budget = Arc::clone(served.pool.budget());
    // What is left is enough for page tables, and for no memory of that many tokens.
    let pages = (tokens as usize).div_ceil(served.model.shape.page_rows);
    let [plain, wanted] = [0, 1].map(|method| served.model.tables_of([method], pages));
    let (left, apart) = (32 << 20, 2 * HEAP_FILE_BYTES as u64);
    budget.take_tables(budget.free_table_bytes() - left, 0).unwrap();
    assert!(plain < apart / 4 && wanted > left - apart, "{plain} and {wanted}");
    for _ in 0..3 {
        let refused = served.open(1, tokens);
        assert!(matches!(refused, Err(Failure::TablesFull { .. })), "{refused:?}");
    }
    assert_eq!(served.model.open_sequences(), 0);
    let plain = served.open(0, tokens).unwrap();
    // Grown to that, a sequence with a memory keeps what it has.
    let kept = served.open(1, 100).unwrap();
    let grown = served.model.reserve(&[(kept, tokens)]);
    assert!(matches!(grown, Err(Failure::TablesFull { .. })), "{grown:?}");
    assert_eq!(served.model.sequence(kept).unwrap().room, 128);
    let fork = served.model.fork(plain, Some(1), SelectedBy::Lane);
    assert!(matches!(fork, Err(Failure::TablesFull { .. })), "{fork:?}");
    served.model.close(plain).unwrap();
    served.model.reserve(&[(kept, 200)]).unwrap();
}

#[test]
fn what_a_lane_keeps_of_a_sequence_counts_with_its_users_tables_until_it_is_closed() {
    let mut lane = Served::new(&["full"]);
    let tables = |lane: &Served| lane.model.arena.purse().account().held(Quota::Tables);
    let first = lane.open(0, 10).unwrap();
    let before = tables(&lane);
    let more: Vec<_> = (0..6).map(|_| lane.open(0, 10).unwrap()).collect();
    let each = LAYERS * size_of::<LayerSlots>();
    assert!(tables(&lane) >= before + 6 * each as u64, "{before} and then {}", tables(&lane));
    more.into_iter().chain([first]).for_each(|id| lane.model.close(id).unwrap());
    assert!(tables(&lane) < before);
}

#[test]
fn a_close_of_many_goes_on_where_it_was_left_and_tells_of_the_first_bad_handle_in_the_end() {
    let mut lane = Served::new(&["quest"]);
    let before = (lane.model.meta.used_bytes(), lane.model.tables.used_bytes());
    let [first, kept, last] = [3000, 0, 100].map(|tokens| lane.filled(tokens));
    let nobody = SequenceId { slot: 7, generation: 9 };
    let mut closing = Closing::of(vec![first, nobody, first, last]);
    let mut pieces = 1;
    while !lane.model.close_some(&mut closing, || true) {
        pieces += 1;
        // Whatever is half closed is either open or not.
        let open = lane.model.open_handles().filter(|id| lane.model.sequence(*id).is_ok()).count();
        assert_eq!(open, lane.model.open_sequences());
    }
    assert!(pieces >= 4, "{pieces}");
    assert_eq!(closing.result(), Err(Failure::NoSuchSequence(nobody)));
    assert!(lane.model.open_handles().eq([kept]));
    assert_eq!(lane.model.arena.used_pages(), 0);
    lane.model.close(kept).unwrap();
    assert!(lane.model.pools.iter().all(|pool| pool.blocks.used() == 0));
    // Digest blocks stay with their pool.
    let blocks: usize =
        lane.model.pools.iter().flat_map(|pool| pool.blocks.regions()).map(|region| region.len).sum();
    assert_eq!((lane.model.meta.used_bytes() - blocks, lane.model.tables.used_bytes()), before);
}

#[test]
fn layers_give_way_in_the_order_in_which_they_were_used_and_none_that_is_still_read() {
    let mut lane = Served::new(&["quest:budget=40"]);
    let mut ids: Vec<_> = (0..6).map(|_| lane.filled(400)).collect();
    let mut random = fastrand::Rng::with_seed(7);
    let (mut ticket, mut released, mut gone) = (0, 0, 0);
    for round in 0..600 {
        let (id, layer) = (ids[random.usize(..ids.len())], random.usize(1..LAYERS));
        match random.u8(..20) {
            0 => {
                lane.model.close(id).unwrap();
                ids.retain(|open| *open != id);
                ids.push(lane.filled(400));
            }
            1 => lane.model.truncate(id, 300, released).unwrap(),
            _ if lane.model.sequence(id).is_ok_and(|sequence| sequence.lens[layer] >= 201) => {
                ticket += 1;
                lane.speculate(id, layer, ticket);
            }
            _ => {}
        }
        released = released.max(ticket.saturating_sub(random.u64(..8)));
        lane.model.settle(released);
        let mut having: Vec<(u64, SequenceId, usize, usize)> = Vec::new();
        for id in lane.model.open_handles() {
            for (layer, slots) in lane.model.sequence(id).unwrap().residency.iter().enumerate() {
                let pages = slots.heads.iter().map(SlotSet::pages).sum();
                having.extend((pages > 0).then_some((slots.last_ticket, id, layer, pages)));
            }
        }
        having.sort_unstable();
        let free = lane.model.slab.as_ref().unwrap().pages.free();
        let wanted = if round % 3 == 0 { free + random.usize(..20) } else { 0 };
        let mut left = free;
        let mut stay = having.clone();
        stay.retain(|(last, _, _, pages)| {
            let goes = left < wanted && *last <= released;
            left += if goes { *pages } else { 0 };
            !goes
        });
        gone += having.len() - stay.len();
        lane.model.make_room(wanted, Turn { ticket: 0, released_through: released, room: None });
        for (_, id, layer, pages) in having {
            let heads = &lane.model.sequence(id).unwrap().residency[layer].heads;
            let has: usize = heads.iter().map(SlotSet::pages).sum();
            let stays = stay.iter().any(|(_, of, at, _)| (*of, *at) == (id, layer));
            assert_eq!(has, if stays { pages } else { 0 }, "round {round}: layer {layer} of {id}");
        }
    }
    assert!(gone > 100, "{gone} layers gave way");
}

#[test]
fn a_full_arena_names_who_would_free_what_is_missing_and_no_more_than_that() {
    let mut lane = Served::new(&["full"]);
    let [small, large, fork] = {
        let (small, large) = (lane.filled(100), lane.open(0, 40_000).unwrap());
        [small, large, lane.model.fork(small, None, SelectedBy::Lane).unwrap()]
    };
    let named = |lane: &Served, missing, asking: &[SequenceId]| match lane
        .model
        .backpressure(missing, missing, asking)
    {
        Failure::Backpressure { closing, .. } => closing,
        other => panic!("{other}"),
    };
    let all = lane.model.arena.used_pages();
    assert_eq!(named(&lane, 1, &[]), [large]);
    assert_eq!(named(&lane, 1, &[large]), [], "what forks share is freed by none of them");
    lane.model.close(fork).unwrap();
    assert_eq!(named(&lane, 1, &[large]), [small]);
    assert_eq!(named(&lane, all, &[]), [large, small]);
    assert_eq!(named(&lane, all + 1, &[]), []);
}

#[test]
fn digests_that_are_described_in_pieces_are_those_that_are_described_at_once() {
    let mut lane = Served::new(&["quest"]);
    let sequence = lane.filled(5000);
    let mut described = |at_once: bool| {
        let ImageOutcome::Portrait(portrait) =
            lane.model.image(ImageRequest::Describe { sequence, digests: true })
        else {
            panic!("no portrait")
        };
        let (mut drawing, mut pieces) = (Drawing::of(sequence, portrait), 1);
        while !lane.model.draw_some(&mut drawing, || !at_once) {
            pieces += 1;
        }
        let ImageOutcome::Portrait(portrait) = drawing.done() else { panic!("no portrait") };
        (portrait.digests, pieces)
    };
    let ((whole, once), (parts, pieces)) = (described(true), described(false));
    assert_eq!((once, whole.len()), (1, 1));
    assert!(pieces > 2, "{pieces}");
    // One block of each page of the two layers that rows are selected in.
    assert_eq!(whole[0].pages.len(), 5000_usize.div_ceil(lane.model.shape.page_rows) * 2 * (LAYERS - 1));
    assert_eq!(whole, parts);
}

#[test]
fn a_session_is_not_taken_apart_while_somebody_reads_or_fills_its_pages() {
    let mut served = Served::new(&["full"]);
    let sequence = served.filled(100);
    let described = served.model.image(ImageRequest::Describe { sequence, digests: false });
    assert!(matches!(described, ImageOutcome::Portrait(_)), "{described:?}");
    let asked = ImageRequest::Lend { sequence, layers: 0..1, pages: 0..1 };
    let ImageOutcome::Lent(lent) = served.model.image(asked) else { panic!("no pages") };
    let Served { pool, model } = served;
    let device = HostDevice::new(Mode::Slab, 1, Link::default()).unwrap();
    let lane = LaneHandle::start(0, None, Duration::ZERO, Arc::new(device)).unwrap();
    let layout = Layout::new(Limits::default()).unwrap();
    let memory = |bytes| Memfd::create("lane-test", bytes).unwrap().map(true).unwrap();
    let mut session = LaneSession::new(
        1,
        Arc::new(SessionStatus::new(1, "test".into(), 1, 1, 0)),
        layout,
        memory(layout.c2d_bytes),
        Arc::new(memory(layout.d2c_bytes)),
        kvoyant_protocol::wire::Served::default(),
        Ledger::default().account(1),
    );
    session.model = Some(Box::new(model));
    lane.send(Command::Attach(Box::new(session), Arc::default()));
    let (done, mut ended) = oneshot::channel();
    lane.send(Command::Detach(1, done));
    // The client is gone, and whoever works on a page beside the lane goes on.
    std::thread::sleep(Duration::from_millis(300));
    assert!(ended.try_recv().is_err());
    lent[0].memory.write(lent[0].offset, &[1]).unwrap();
    assert_eq!(pool.budget().used_bytes(), EXTENT_BYTES as u64, "nobody else has it");
    drop(lent);
    ended.blocking_recv().unwrap();
    let since = Instant::now();
    while pool.budget().used_bytes() > 0 {
        assert!(since.elapsed() < Duration::from_secs(60), "its extent comes back");
        std::thread::sleep(Duration::from_millis(1));
    }
}
