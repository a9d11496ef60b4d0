//! One daemon of several, and how the next is made of what it has left.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use kvoyant_methods::Artifacts;
use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::control::{Mode, ModelSpec, PageWord};
use kvoyant_protocol::futex::Bell;
use kvoyant_protocol::layout::Limits;
use kvoyant_protocol::wire::SequenceId;

use super::super::{About, HeldExtent, Keeping, Left, Progress};
use super::{KV_HEADS, LAYERS, PATIENCE, ROW_BYTES, ROWS, SESSION};
use crate::device::host::{HostDevice, Shape as Link};
use crate::journal::{self, FrameLog};
use crate::keep::{Keep, Piece};
use crate::lane::model::{ModelState, Placement};
use crate::lane::spill::SpillTo;
use crate::lane::tests;
use crate::tiers::budget::ArenaBudget;
use crate::tiers::extent::Extent;
use crate::tiers::nvme::{CHUNK_BYTES, EngineChoice, Spill, SpillError, SpillReport, SpillSettings};
use crate::tiers::pool::{ExtentPool, PoolSettings, Supply};

/// What is there whichever daemon serves.
pub(super) struct Place {
    pub(super) folder: tempfile::TempDir,
    pub(super) keep: Arc<Keep>,
    pub(super) engine: EngineChoice,
}

/// A daemon's side of the session.
pub(super) struct Daemon {
    pub(super) model: ModelState,
    pub(super) keeping: Keeping,
    pub(super) progress: Progress,
    pub(super) pool: ExtentPool,
    pub(super) spill: Arc<Spill>,
    report: Arc<SpillReport>,
}

fn spec() -> ModelSpec {
    let (layers, page_rows, heads) = (LAYERS as u32, ROWS as u32, KV_HEADS as u32);
    let small = tests::spec(&["given"]);
    ModelSpec { layers, page_rows, query_heads: heads, kv_heads: heads, dense_layers: 0, ..small }
}

fn about() -> About {
    About {
        session: SESSION,
        uid: 1,
        client: "test".into(),
        token: [1, 2],
        limits: Limits { sequences_max: 16, ..Limits::default() },
        features: 0,
        spec: spec(),
        artifacts: Vec::new(),
    }
}

/// A model without anything in it.
fn model(spill: &Arc<Spill>, extents: Supply) -> ModelState {
    let device = HostDevice::new(Mode::InPlace, 1, Link::default()).unwrap();
    let slab = tests::slab(0);
    let spill = Some(SpillTo { spill: Arc::clone(spill), host_share: 0.4 });
    let placement = Placement { keep: 1.0, device_share: 1.0, spill, check_every: 0 };
    ModelState::new(spec(), &Artifacts::none(), 16, extents, &device, slab, placement).unwrap()
}

impl Daemon {
    fn parts(place: &Place, claimed: bool) -> (ExtentPool, Arc<Spill>, Arc<SpillReport>) {
        let budget = Arc::new(ArenaBudget::new(EXTENT_BYTES as u64));
        let pool = ExtentPool::start(budget, PoolSettings::unpinned()).unwrap();
        let settings = SpillSettings {
            paths: vec![place.folder.path().to_path_buf()],
            bytes: 24 * CHUNK_BYTES,
            engine: place.engine,
            ..SpillSettings::default()
        };
        let since = Instant::now();
        // The kernel lets go of a dead daemon's files some time after its end.
        let spill = loop {
            match Spill::start_over(&settings, claimed) {
                Err(SpillError::Busy { .. }) if since.elapsed() < PATIENCE => std::thread::yield_now(),
                started => break started.unwrap(),
            }
        };
        (pool, spill, Arc::new(SpillReport::new(Arc::new(Bell::default()))))
    }

    pub(super) fn new(place: &Place) -> Self {
        let (pool, spill, report) = Self::parts(place, false);
        let mut model = model(&spill, pool.supply(1));
        model.attach_spill(SESSION, &report);
        let keeping = Keeping::begin(Arc::clone(&place.keep), &about()).unwrap();
        let progress = Progress {
            requests: 0,
            generation: 0,
            controls: 0,
            tickets: 0,
            released_through: 0,
            stats: Vec::new(),
            seeds: 0,
            unsettled: Vec::new(),
            planned: Vec::new(),
            open: Vec::new(),
            limbo: Vec::new(),
            taken: Vec::new(),
        };
        model.tables.watch();
        model.meta.watch();
        Self { model, keeping, progress, pool, spill, report }
    }

    /// The daemon after the one that has just died.
    pub(super) fn again(place: &Place) -> Self {
        let (pool, spill, report) = Self::parts(place, true);
        let mut files: BTreeMap<Piece, _> =
            place.keep.take().into_iter().map(|(name, file)| (name.piece, file)).collect();
        for (piece, file) in &files {
            place.keep.add(SESSION, *piece, file.try_clone().unwrap()).unwrap();
        }
        let journals = [0, 1].map(|index| files.remove(&Piece::Journal(index)).unwrap());
        let found = journal::read([&journals[0], &journals[1]].map(AsFd::as_fd)).unwrap();
        let (current, number) = (found.current, found.number);
        let left = Left::of(found).unwrap();
        let own =
            left.held.extents.iter().flatten().map(|held: &HeldExtent| files.remove(&held.piece()).unwrap());
        let extents = pool.adopt(1, own.map(|file| Extent::adopt(file).unwrap()).collect()).unwrap();
        let log = FrameLog::over(files.remove(&Piece::Frames).unwrap()).unwrap();
        let mut model = model(&spill, extents.empty());
        left.fill(&mut model, extents, Vec::new(), log).unwrap();
        spill.settle();
        model.attach_spill(SESSION, &report);
        let journal = journal::Journal::over(SESSION, journals, current, number);
        let controls = (left.progress.controls, left.answer.clone());
        let keeping =
            Keeping::over(Arc::clone(&place.keep), journal, &left.about, controls, left.held.extents.clone());
        model.tables.watch();
        model.meta.watch();
        Self { model, keeping, progress: left.progress, pool, spill, report }
    }

    pub(super) fn marks(&self, frame: u32) -> [u64; 2] {
        let (extent, offset) = self.model.arena.geometry().locate(frame * ROWS as u32);
        let memory = self.model.arena.memory(extent);
        [offset, offset + (ROWS - 1) * ROW_BYTES].map(|at| memory.load_u64(at))
    }

    pub(super) fn word(&self, id: SequenceId, head: usize, page: usize) -> PageWord {
        let sequence = self.model.sequence(id).unwrap();
        self.model.page_word(sequence.table, head * sequence.capacity + page)
    }

    /// What is in a page, wherever it is.
    pub(super) fn read(&self, id: SequenceId, head: usize, page: usize) -> [u64; 2] {
        let sequence = self.model.sequence(id).unwrap();
        match self.word(id, head, page) {
            PageWord::Page(frame) => self.marks(frame),
            PageWord::Spilled => {
                let mut bytes = Vec::new();
                let index = head * sequence.capacity + page;
                let state = self.model.spill.as_ref().unwrap();
                state.read_now(&self.model.meta, (sequence.slots.unwrap(), index), &mut bytes).unwrap();
                [0, (ROWS - 1) * ROW_BYTES]
                    .map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()))
            }
            word => panic!("page {page} of head {head} of {id} is {word:?}"),
        }
    }

    /// Takes up to so many ends of operations in.
    pub(super) fn take_ended(&mut self, most: u64) {
        self.model.submit_pages();
        for _ in 0..most {
            let Some(ended) = self.report.pop() else { break };
            let arrived = self.model.page_ended(&ended);
            assert!(!arrived.lost, "{ended:?}");
        }
    }

    /// Waits for all operations.
    pub(super) fn quiet(&mut self) {
        let since = Instant::now();
        while self.model.spill.as_ref().unwrap().is_busy() {
            self.take_ended(u64::MAX);
            std::thread::yield_now();
            assert!(since.elapsed() < PATIENCE, "operations do not end");
        }
    }
}
