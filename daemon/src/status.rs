//! What the daemon shows of itself: counters that lanes write and the admin socket reads.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use kvoyant_protocol::wire::{STATS, Stat};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod state;

use crate::device::Device;
use crate::keeper::Keeper;
use crate::metrics::{Endings, How, Seen, Snapshot, Times, Users};
use crate::quota::{Access, AccessReport, UserReport};
use crate::tiers::nvme::{self, Spill};
use crate::tiers::pool::ExtentPool;

/// What a method keeps, or several that share it. Lanes write, anybody reads.
#[derive(Debug)]
pub struct KeptBytes {
    /// Its name; those of methods that share digests, with `+` between them.
    pub method: String,
    /// Bytes of digests, their tables and states.
    pub digest_bytes: AtomicU64,
    /// Bytes of memories.
    pub memory_bytes: AtomicU64,
}

impl KeptBytes {
    /// Nothing yet, under that name.
    #[must_use]
    pub fn new(method: String) -> Self {
        Self { method, digest_bytes: AtomicU64::new(0), memory_bytes: AtomicU64::new(0) }
    }

    fn report(&self) -> MethodReport {
        MethodReport {
            method: self.method.clone(),
            digest_bytes: self.digest_bytes.load(Ordering::Relaxed),
            memory_bytes: self.memory_bytes.load(Ordering::Relaxed),
        }
    }
}

/// One session's counters. Lanes write, anybody reads.
#[derive(Debug)]
pub struct SessionStatus {
    /// Number of the session.
    pub id: u64,
    /// Name that the client gave.
    pub client: String,
    /// Process of the client, as the kernel says.
    pub pid: i32,
    /// User of the client, as the kernel says.
    pub uid: u32,
    /// Lane that serves it.
    pub lane: usize,
    /// Model that it registered.
    pub model: Mutex<String>,
    /// Open sequences.
    pub sequences: AtomicU64,
    /// Tokens in them.
    pub tokens: AtomicU64,
    /// Pages in use.
    pub pages: AtomicU64,
    /// Bytes of a page.
    pub page_bytes: AtomicU64,
    /// Extents.
    pub extents: AtomicU64,
    /// Bytes of all that methods keep.
    pub digest_bytes: AtomicU64,
    /// The same by method; once a model is registered.
    pub kept: OnceLock<Vec<KeptBytes>>,
    /// Pages of the slab in use.
    pub slab_pages: AtomicU64,
    /// Counters in the order of [`Stat`].
    pub stats: [AtomicU64; STATS],
    /// Times of its requests.
    pub times: Times,
    /// What is seen of it besides.
    pub seen: Seen,
    /// Bytes of its files of tables and digests in which nothing is, and of the longest span of them.
    pub table_room: [AtomicU64; 2],
}

impl SessionStatus {
    /// A new session's counters.
    #[must_use]
    pub fn new(id: u64, client: String, pid: i32, uid: u32, lane: usize) -> Self {
        Self {
            id,
            client,
            pid,
            uid,
            lane,
            model: Mutex::new(String::new()),
            sequences: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            page_bytes: AtomicU64::new(0),
            extents: AtomicU64::new(0),
            digest_bytes: AtomicU64::new(0),
            kept: OnceLock::new(),
            slab_pages: AtomicU64::new(0),
            stats: std::array::from_fn(|_| AtomicU64::new(0)),
            times: Times::default(),
            seen: Seen::default(),
            table_room: Default::default(),
        }
    }

    /// Its counters in the order of [`Stat`].
    #[must_use]
    pub fn counters(&self) -> [u64; STATS] {
        std::array::from_fn(|stat| self.stats[stat].load(Ordering::Relaxed))
    }

    fn report(&self) -> SessionReport {
        let get = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        let stat = |stat: Stat| get(&self.stats[stat as usize]);
        SessionReport {
            id: self.id,
            client: self.client.clone(),
            pid: self.pid,
            uid: self.uid,
            lane: self.lane,
            model: self.model.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            sequences: get(&self.sequences),
            tokens: get(&self.tokens),
            pages: get(&self.pages),
            pages_peak: stat(Stat::PagesPeak),
            spilled_pages: stat(Stat::PagesSpilled),
            page_bytes: get(&self.page_bytes),
            kv_bytes: get(&self.pages) * get(&self.page_bytes),
            extents: get(&self.extents),
            digest_bytes: get(&self.digest_bytes),
            methods: self.kept.get().into_iter().flatten().map(KeptBytes::report).collect(),
            slab_bytes: get(&self.slab_pages) * get(&self.page_bytes),
            speculations: stat(Stat::Speculations),
            rows_selected: stat(Stat::RowsSelected),
            rows_hit: stat(Stat::RowsHit),
            rows_in_place: stat(Stat::RowsInPlace),
            rows_appended: stat(Stat::RowsAppended),
            bytes_moved: stat(Stat::BytesMoved),
            select_ns: stat(Stat::SelectNs),
            transfer_ns: stat(Stat::TransferNs),
            graph_reports: stat(Stat::GraphReports),
            graph_hits: stat(Stat::GraphHits),
            graph_misses: stat(Stat::GraphMisses),
            graph_lost: stat(Stat::GraphLost),
            cpu_rows: stat(Stat::CpuRows),
            prefetched_rows: stat(Stat::PrefetchedRows),
            prefetch_bytes: stat(Stat::PrefetchBytes),
            estimated_rows: stat(Stat::EstimatedRows),
            late_rows: stat(Stat::LateRows),
            pages_written: stat(Stat::PagesWritten),
            pages_read: stat(Stat::PagesRead),
            pages_lost: stat(Stat::PagesLost),
            page_wait_ns: stat(Stat::PageWaitNs),
            certified_heads: stat(Stat::CertifiedHeads),
            missed_heads: [
                stat(Stat::MissedTo0001),
                stat(Stat::MissedTo001),
                stat(Stat::MissedTo005),
                stat(Stat::MissedTo02),
                stat(Stat::MissedMore),
            ],
        }
    }
}

/// Sessions, and what those that have ended had done. One lock for both: no counter is ever seen to go back.
#[derive(Debug, Default)]
struct Sessions {
    open: BTreeMap<u64, Arc<SessionStatus>>,
    past: Users,
}

/// All sessions, and what the daemon is.
#[derive(Debug)]
pub struct Registry {
    sessions: Mutex<Sessions>,
    endings: Endings,
    /// Whether no new sessions are taken.
    draining: AtomicBool,
    pool: Arc<ExtentPool>,
    device: Arc<dyn Device>,
    mode: String,
    lanes: usize,
    boot_id: u64,
    spill: Option<Arc<Spill>>,
    keeper: Option<Arc<Keeper>>,
    access: Arc<Access>,
    started: Instant,
}

impl Registry {
    /// An empty registry.
    #[must_use]
    pub fn new(
        pool: Arc<ExtentPool>,
        device: Arc<dyn Device>,
        mode: String,
        lanes: usize,
        boot_id: u64,
    ) -> Self {
        let (sessions, endings, started) = (Mutex::default(), Endings::default(), Instant::now());
        Self {
            sessions,
            endings,
            draining: AtomicBool::new(false),
            pool,
            device,
            mode,
            lanes,
            boot_id,
            spill: None,
            keeper: None,
            access: Arc::default(),
            started,
        }
    }

    /// The same, of a daemon that these users may connect to.
    #[must_use]
    pub fn with_access(self, access: Access) -> Self {
        Self { access: Arc::new(access), ..self }
    }

    /// Who may connect.
    #[must_use]
    pub fn access(&self) -> Arc<Access> {
        Arc::clone(&self.access)
    }

    /// The same, of a daemon whose pages can leave host memory, or that keeps images.
    #[must_use]
    pub fn with_stores(self, spill: Option<Arc<Spill>>, keeper: Option<Arc<Keeper>>) -> Self {
        Self { spill, keeper, ..self }
    }

    /// What changes with every start.
    #[must_use]
    pub fn boot_id(&self) -> u64 {
        self.boot_id
    }

    fn sessions(&self) -> std::sync::MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a session.
    pub fn add(&self, status: Arc<SessionStatus>) {
        self.sessions().open.insert(status.id, status);
    }

    /// Removes a session; what it has done stays counted.
    pub fn remove(&self, id: u64) {
        let mut sessions = self.sessions();
        if let Some(session) = sessions.open.remove(&id) {
            sessions.past.of(session.uid).add_session(&session);
        }
    }

    /// Counts the end of a session, or of an attempt at one.
    pub fn ended(&self, how: How) {
        self.endings.add(how);
    }

    /// A session, by its number.
    #[must_use]
    pub fn session(&self, id: u64) -> Option<Arc<SessionStatus>> {
        self.sessions().open.get(&id).cloned()
    }

    /// Everything, at this moment.
    #[must_use]
    pub fn report(&self) -> StatusReport {
        let sessions = self.sessions().open.values().map(|session| session.report()).collect();
        self.report_of(sessions)
    }

    /// Everything, and what has been done since the start, at this moment.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let mut table_room = [0; 2];
        let (reports, users) = {
            let sessions = self.sessions();
            let mut users = sessions.past.clone();
            for session in sessions.open.values() {
                users.of(session.uid).add_session(session);
                let [free, longest] = session.table_room.each_ref().map(|cell| cell.load(Ordering::Relaxed));
                table_room = [table_room[0] + free, table_room[1].max(longest)];
            }
            (sessions.open.values().map(|session| session.report()).collect(), users)
        };
        let endings = self.endings.counts().collect();
        Snapshot { status: self.report_of(reports), users, endings, table_room }
    }

    fn report_of(&self, sessions: Vec<SessionReport>) -> StatusReport {
        let pool = self.pool.report();
        let sum = |value: fn(&SessionReport) -> u64| sessions.iter().map(value).sum();
        StatusReport {
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: kvoyant_protocol::VERSION,
            boot_id: format!("{:016x}", self.boot_id),
            uptime_s: self.started.elapsed().as_secs_f64(),
            device: self.device.name().into(),
            gpu: self.device.report(),
            mode: self.mode.clone(),
            lanes: self.lanes,
            draining: self.is_draining(),
            log_lines_dropped: crate::log::dropped_lines(),
            arena: ArenaReport {
                total_bytes: self.pool.budget().total_bytes(),
                used_bytes: self.pool.budget().used_bytes(),
                locked_bytes: pool.pinned_bytes,
                pool,
            },
            totals: Totals {
                sessions: sessions.len() as u64,
                sequences: sum(|s| s.sequences),
                tokens: sum(|s| s.tokens),
                pages: sum(|s| s.pages),
                kv_bytes: sum(|s| s.kv_bytes),
                digest_bytes: sum(|s| s.digest_bytes),
                slab_bytes: sum(|s| s.slab_bytes),
                bytes_moved: sum(|s| s.bytes_moved),
            },
            spill: self.spill.as_ref().map(|spill| spill.report()).unwrap_or_default(),
            store: self.keeper.as_ref().map(|keeper| keeper.report()),
            sessions,
            access: self.access.report(),
            users: self.pool.budget().ledger().report(),
        }
    }
}

/// The daemon's status, as the admin socket gives it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StatusReport {
    /// Version of the daemon.
    pub version: String,
    /// Version of the protocol.
    pub protocol: u32,
    /// Changes with every start, hex.
    pub boot_id: String,
    /// Seconds since its start.
    pub uptime_s: f64,
    /// Name of the device.
    pub device: String,
    /// What a GPU holds; absent where the host is the device.
    #[serde(default)]
    pub gpu: Option<DeviceReport>,
    /// `slab` or `in-place`.
    pub mode: String,
    /// Lanes.
    pub lanes: usize,
    /// Whether no new sessions are taken.
    #[serde(default)]
    pub draining: bool,
    /// Lines of the log that were dropped because nobody read it.
    #[serde(default)]
    pub log_lines_dropped: u64,
    /// Host memory.
    pub arena: ArenaReport,
    /// All sessions together.
    pub totals: Totals,
    /// Places on disk for pages that leave host memory.
    #[serde(default)]
    pub spill: Vec<nvme::DeviceReport>,
    /// Where images are kept; absent where none are.
    #[serde(default)]
    pub store: Option<StoreReport>,
    /// Each session.
    pub sessions: Vec<SessionReport>,
    /// Who may connect.
    #[serde(default)]
    pub access: AccessReport,
    /// What each user has who ever connected.
    #[serde(default)]
    pub users: Vec<UserReport>,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "GpuReport")]
pub struct DeviceReport {
    /// What the driver calls it.
    pub model: String,
    /// Version of the driver's CUDA, such as `12.8`.
    pub driver: String,
    /// Bytes of its memory.
    pub total_bytes: u64,
    /// Bytes that sessions may have together.
    pub set_aside_bytes: u64,
    /// Bytes that sessions have in slabs and boards.
    pub used_bytes: u64,
    /// Of that, bytes of ended sessions whose processes may still have them open.
    pub quarantined_bytes: u64,
    /// Bytes in use when the daemon had opened it: its own context, and whatever else runs there.
    pub busy_at_start_bytes: u64,
    /// How slabs are exported: `descriptor`, `handle`, or both as clients can.
    pub export: String,
    /// How clients' streams are signalled: `timeline64`, `timeline32` or `events`.
    pub signal: String,
    /// Transfers by engine since the start: `dma`, `staged`, `zerocopy`.
    pub transfers: [u64; 3],
    /// Where the transfer costs come from: `measured`, or `estimated` until `kvoyant calibrate` has run.
    pub costs: String,
    /// Why the device is lost; absent while it works.
    pub lost: Option<String>,
}

/// Where images are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StoreReport {
    /// The folder of this machine.
    pub folder: PathBuf,
    /// The store behind it, without user, password and query; absent if there is none.
    pub remote: Option<String>,
    /// Images that have yet to be copied there.
    pub waiting: u64,
    /// What the store behind it said last, if that was no success.
    pub remote_error: Option<String>,
}

/// Host memory for KV.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ArenaReport {
    /// What sessions may have together.
    pub total_bytes: u64,
    /// What they have in extents.
    pub used_bytes: u64,
    /// Locked into memory, in use or ready.
    pub locked_bytes: u64,
    /// Extents beyond those in use.
    pub pool: PoolReport,
}

/// What the pool of extents does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PoolState {
    /// It makes, wipes or destroys extents.
    Filling,
    /// Everything is as it is to be.
    Idle,
    /// Something could not be done, and `trouble` says what; what there is goes on being used.
    Failed,
}

/// Extents that are made ahead of time and kept for reuse.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PoolReport {
    /// Bytes of all extents there are: in use, ready, or being wiped.
    pub made_bytes: u64,
    /// Of these, bytes that a session could have at once.
    pub ready_bytes: u64,
    /// Of all, bytes that are pinned.
    pub pinned_bytes: u64,
    /// Of all, bytes in huge pages that were set aside.
    pub huge_bytes: u64,
    /// Bytes that are to be there ahead of time.
    pub ahead_bytes: u64,
    /// NUMA node that extents are made on.
    pub numa_node: Option<u32>,
    /// How they are pinned, or `none`.
    pub pin: String,
    /// What it does.
    pub state: PoolState,
    /// Why extents are not pinned, or could not be made.
    pub trouble: Option<String>,
}

/// Sums over all sessions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Totals {
    /// Sessions.
    pub sessions: u64,
    /// Open sequences.
    pub sequences: u64,
    /// Tokens in them; what forks share counts for each.
    pub tokens: u64,
    /// Pages in use; what forks share counts once.
    pub pages: u64,
    /// Bytes of those pages.
    pub kv_bytes: u64,
    /// Bytes of digests.
    pub digest_bytes: u64,
    /// Bytes of slab pages in use.
    pub slab_bytes: u64,
    /// Bytes copied to devices since the sessions began.
    pub bytes_moved: u64,
}

/// What a method of a session keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MethodReport {
    /// Its name; those of methods that share digests, with `+` between them.
    pub method: String,
    /// Bytes of digests, their tables and states.
    pub digest_bytes: u64,
    /// Bytes of memories.
    pub memory_bytes: u64,
}

/// One session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs, reason = "the fields are those of SessionStatus and Stat")]
pub struct SessionReport {
    pub id: u64,
    pub client: String,
    pub pid: i32,
    pub uid: u32,
    pub lane: usize,
    pub model: String,
    pub sequences: u64,
    pub tokens: u64,
    pub pages: u64,
    /// Most pages in host memory at a time, where pages can leave it.
    #[serde(default)]
    pub pages_peak: u64,
    /// Pages on disk alone.
    #[serde(default)]
    pub spilled_pages: u64,
    pub page_bytes: u64,
    pub kv_bytes: u64,
    pub extents: u64,
    /// Digests, states and memories.
    pub digest_bytes: u64,
    /// The same by method, for those that keep anything.
    #[serde(default)]
    pub methods: Vec<MethodReport>,
    pub slab_bytes: u64,
    pub speculations: u64,
    pub rows_selected: u64,
    pub rows_hit: u64,
    pub rows_in_place: u64,
    pub rows_appended: u64,
    pub bytes_moved: u64,
    pub select_ns: u64,
    pub transfer_ns: u64,
    #[serde(default)]
    pub graph_reports: u64,
    #[serde(default)]
    pub graph_hits: u64,
    #[serde(default)]
    pub graph_misses: u64,
    #[serde(default)]
    pub graph_lost: u64,
    /// Rows attended by the daemon's CPU.
    pub cpu_rows: u64,
    /// Rows brought to the device ahead of any request.
    pub prefetched_rows: u64,
    /// Bytes copied for them.
    pub prefetch_bytes: u64,
    /// Rows that answers left out and estimated, all query heads together.
    #[serde(default)]
    pub estimated_rows: u64,
    /// Rows that were left out of answers because they would have come after their deadline.
    #[serde(default)]
    pub late_rows: u64,
    /// Pages written to disk.
    #[serde(default)]
    pub pages_written: u64,
    /// Pages read back.
    #[serde(default)]
    pub pages_read: u64,
    /// Pages that could not be read back whole.
    #[serde(default)]
    pub pages_lost: u64,
    /// Time that answers waited for pages, in ns.
    #[serde(default)]
    pub page_wait_ns: u64,
    /// Query heads of which the lane could tell how much they may have missed.
    #[serde(default)]
    pub certified_heads: u64,
    /// Of these, by the share of their attention that they may have missed at most: up to 0.1 %, 1 %, 5 % and 20 %, and more. A bound
    /// of the lane's, which does not know what selected rows got; the client's own certificates are tighter.
    #[serde(default)]
    pub missed_heads: [u64; 5],
}
