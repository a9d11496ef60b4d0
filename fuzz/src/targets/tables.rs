//! Block tables and page tables, as a client gets them from a daemon that may say anything.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use kvoyant_client::{Client, Error, Hint, Member, Model, Options, Ready, Sequence};
use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::control::{MemoryKind, Mode, TableRef, ToClient, ToDaemon, decode, encode, features};
use kvoyant_protocol::device::SlabRef;
use kvoyant_protocol::layout::{Layout, Limits};
use kvoyant_protocol::memory::{Memfd, Seals, SharedMapping};
use kvoyant_protocol::packet;
use kvoyant_protocol::ring::{Consumer, Producer};
use kvoyant_protocol::wire::{Completion, Operation, Request, SequenceId, Status};
use kvoyant_tests::fake::{HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS, spec};

use crate::input::Input;
use crate::service::PATIENCE;

const PAGE_ROWS: u32 = 16;
const CAPACITY: u32 = 8;
const ROOM: u32 = PAGE_ROWS * CAPACITY;
const SLAB_BYTES: usize = 1 << 16;
const BOOT: u64 = 0x0bad_b007;

/// Rows of one head that are copied out, and not only looked at.
const COPIED_MAX: usize = 1 << 12;

/// Whatever an answer says, its rows lie in the session's memory, or it is an error.
///
/// # Panics
/// If it is not so.
pub fn run(bytes: &[u8]) {
    thread_local!(static LIAR: RefCell<Option<Liar>> = const { RefCell::new(None) });
    LIAR.with_borrow_mut(|liar| {
        let there = liar.get_or_insert_with(Liar::new);
        // After an answer that is none, a client ends its session.
        if !there.lie(&mut Input(bytes)) {
            *liar = None;
        }
    });
}

/// Both sides of a session: a client, and what its daemon says.
struct Liar {
    /// Goes first, so that the client need not wait for what nobody answers.
    _socket: OwnedFd,
    model: Model,
    sequence: Sequence,
    layout: Layout,
    c2d: SharedMapping,
    d2c: SharedMapping,
    table: SharedMapping,
    requests: Consumer,
    completions: Producer,
}

/// A file that the client may only read, and our map of it.
fn shown(bytes: usize) -> (OwnedFd, SharedMapping) {
    let file = Memfd::create("fuzz", bytes).expect("a memfd");
    let map = file.map(true).expect("a map");
    file.seal(Seals::frozen_for_readers()).expect("a seal");
    (file.try_clone().expect("a descriptor"), map)
}

impl Liar {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("liar.sock");
        let listener = packet::listen_at(&path, 0o600).expect("a socket");
        let limits = Limits { ring_slots: 4, table_bytes: 1 << 16, hint_bytes: 1 << 12, ..Limits::default() };
        let layout = Layout::new(limits).expect("limits");
        let client = std::thread::spawn(move || {
            let options = Options { name: "fuzz".into(), limits, spin: Duration::ZERO, ..Options::default() };
            let model = Client::connect(&path, options)?.register(spec(&["quest"]), &[])?;
            let sequence = model.open(0, ROOM as usize)?;
            Ok::<_, Error>((model, sequence, folder))
        });
        // Sequenced packets, but accepting is the same as on a stream.
        let socket = OwnedFd::from(UnixListener::from(listener).accept().expect("a client").0);
        let hear = || decode::<ToDaemon>(&packet::receive(socket.as_fd()).expect("a message").bytes);
        let say = |message: &ToClient, fds: &[&OwnedFd]| {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            packet::send(socket.as_fd(), &encode(message), &fds).expect("a client that listens");
        };
        assert!(matches!(hear(), Ok(ToDaemon::Hello { .. })));
        let c2d = Memfd::create("fuzz", layout.c2d_bytes).expect("a memfd");
        c2d.seal(Seals::size_only()).expect("a seal");
        let (d2c_fd, d2c) = shown(layout.d2c_bytes);
        let features = features::COMMON;
        let welcome = ToClient::Welcome { features, session: 1, boot_id: BOOT, limits, minor: 0 };
        say(&welcome, &[&c2d.try_clone().expect("a descriptor"), &d2c_fd]);
        assert_eq!(hear(), Ok(ToDaemon::Mapped));
        say(&ToClient::Sealed, &[]);
        assert!(matches!(hear(), Ok(ToDaemon::Register(_))));
        let slab = SlabRef::Host { bytes: SLAB_BYTES as u64 };
        let (device, mode) = ("host".into(), Mode::Slab);
        let registered =
            ToClient::Registered { device, mode, page_rows: PAGE_ROWS, slab, spills: false, scarce: false };
        say(&registered, &[&shown(SLAB_BYTES).0]);
        assert!(matches!(hear(), Ok(ToDaemon::Open { .. })));
        let extent = Memfd::create("fuzz", EXTENT_BYTES).expect("a memfd");
        extent.seal(Seals::fixed_size()).expect("a seal");
        let memory = |kind, bytes: usize| ToClient::Memory { kind, first: 0, bytes: bytes as u64 };
        say(&memory(MemoryKind::Extents, EXTENT_BYTES), &[&extent.try_clone().expect("a descriptor")]);
        let (table_fd, table) = shown(4096);
        say(&memory(MemoryKind::Tables, 4096), &[&table_fd]);
        let sequence = SequenceId { slot: 0, generation: 1 };
        let at = TableRef { file: 0, offset: 0, capacity: CAPACITY };
        say(&ToClient::Opened { sequence, table: at, room: ROOM }, &[]);
        let (model, sequence, _folder) = client.join().expect("a client").expect("a session");
        let c2d = c2d.map_read_only().expect("a map");
        let (requests, completions) = (Consumer::requests(layout), Producer::completions(layout));
        Self { _socket: socket, model, sequence, layout, c2d, d2c, table, requests, completions }
    }

    /// Answers one request as the input says, and reads the answer. False if the session is over.
    fn lie(&mut self, input: &mut Input<'_>) -> bool {
        let members = 1 + usize::from(input.u8() % 3);
        let member = Member { sequence: &self.sequence, position: 1, hint: Hint::None };
        let Ok(pending) = self.model.speculate(1, &vec![member; members]) else { return false };
        assert_eq!(self.requests.available(&self.c2d), Ok(1));
        let request = Request::parse(&self.requests.peek(&self.c2d), &self.layout.limits);
        self.requests.advance(&self.d2c);
        let Ok(Request { operation: Operation::Speculate(asked), .. }) = request else {
            panic!("{request:?} came instead of a speculation")
        };
        let flags = input.u8();
        let completion = Completion {
            status: if flags & 4 == 0 { Status::Ready } else { Status::HostFull },
            layer: 1,
            batch: if flags & 8 == 0 { members as u32 } else { input.u32() },
            ticket: asked.ticket,
            bytes_moved: 0,
            rows_selected: input.u32(),
            rows_hit: 0,
            rows_in_place: 0,
            rows_resident: 0,
            queue_ns: 0,
            select_ns: 0,
            transfer_ns: 0,
            table_bytes: if flags & 16 == 0 { input.u16().into() } else { input.u32() },
            partials: flags & 1 != 0,
            rest: flags & 2 != 0,
            boot_id: if flags & 32 == 0 { BOOT } else { input.u64() },
            generation: if flags & 64 == 0 { 0 } else { u32::from(input.u8()) },
        };
        let words = input.chunk();
        self.table.write(0, &vec![0xff; 4096]).expect("a page table");
        self.table.write(0, words).expect("a page table");
        let table = &input.0[..input.0.len().min(self.layout.limits.table_bytes as usize)];
        self.d2c.write(self.layout.table(asked.ticket), table).expect("a block table");
        self.completions.room(&self.c2d).expect("a ring");
        self.completions.stage(&self.d2c, &completion.encode());
        self.completions.publish(&self.d2c, &self.c2d);
        self.pages();
        match pending.wait(PATIENCE) {
            Ok(ready) => {
                self.look_at(&ready);
                true
            }
            Err(Error::NotReady { .. }) => true,
            Err(Error::Deadline { .. }) => panic!("an answer was not seen"),
            Err(error) => {
                assert!(!error.to_string().is_empty());
                matches!(error, Error::Broken(_))
            }
        }
    }

    /// Everything that can be asked of an answer.
    fn look_at(&self, ready: &Ready) {
        for member in 0..ready.members() {
            for kv_head in 0..KV_HEADS {
                let (mut runs, mut rows) = (Vec::new(), 0);
                ready.runs(member, kv_head, &mut runs).expect("rows in host memory");
                for (run, named) in runs.iter().zip(ready.tokens(member, kv_head)) {
                    assert!(run.rows == named.rows && !(run.rows > 0 && run.rows_ptr.is_null()));
                    rows += run.rows;
                }
                let _ = (ready.rows(member, kv_head), ready.resident(member, kv_head));
                if rows <= COPIED_MAX {
                    let mut bytes = Vec::new();
                    ready.copy_rows(member, kv_head, &mut bytes).expect("rows that were checked");
                    assert_eq!(bytes.len(), rows * 8 * HEAD_DIM);
                    let ends = runs.iter().filter(|run| run.rows > 0).count();
                    assert!(ends <= runs.len());
                }
            }
            if let Some(partial) = ready.partial(member) {
                assert_eq!((partial.lse.len(), partial.out.len()), (QUERY_HEADS, QUERY_HEADS * HEAD_DIM));
            }
            if let Some(rest) = ready.rest(member) {
                assert_eq!(rest.sums().count(), QUERY_HEADS);
                let mut mean = vec![0.0; HEAD_DIM];
                (0..QUERY_HEADS).for_each(|head| rest.mean(head, &mut mean));
            }
        }
    }

    /// The page table, read and written through.
    fn pages(&self) {
        let row = vec![0; 8 * HEAD_DIM];
        let mut rows = vec![0; 8 * HEAD_DIM * ROOM as usize];
        let mut runs = Vec::new();
        for layer in 0..=LAYERS {
            for kv_head in 0..=KV_HEADS {
                let _ = self.sequence.read_rows(layer, kv_head, 0..ROOM as usize, &mut rows);
                let _ = self.sequence.write_rows(layer, kv_head, 17, &row);
                self.sequence.local_runs(layer, kv_head, 0..ROOM as usize + 1, &mut runs);
            }
        }
        let _ = (self.sequence.first_lost(), self.sequence.take_missed());
    }
}

/// Good answers: of runs in the slab and in extents, with a partial attention and an estimate behind them, and pages of every
/// kind.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    use kvoyant_protocol::wire::{BlockRun, HeadEntry};
    let words = [0_u32, 1, 2, u32::MAX - 1, u32::MAX - 2, u32::MAX, 1000, 5_000_000].map(u32::to_le_bytes);
    let answer = |members: u8, flags: u8, behind: usize| {
        let heads: Vec<HeadEntry> = (0..u32::from(members) * KV_HEADS as u32)
            .map(|head| HeadEntry { first_run: head, runs: 2, rows: 5, resident: 1 })
            .collect();
        let runs: Vec<BlockRun> = (0..=heads.len() as u32)
            .map(|run| BlockRun::new(run * 16, run, 2 + run % 2, run % 3 == 0))
            .collect();
        let mut table = bytemuck::cast_slice::<_, u8>(&heads).to_vec();
        table.extend_from_slice(bytemuck::cast_slice(&runs));
        table.resize(table.len() + behind * usize::from(members), 1);
        let mut input = vec![members - 1, flags];
        input.extend_from_slice(&5_u32.to_le_bytes());
        input.extend_from_slice(&(table.len() as u16).to_le_bytes());
        input.push(words.as_flattened().len() as u8);
        input.extend_from_slice(words.as_flattened());
        input.extend_from_slice(&table);
        input
    };
    let partial = 4 * (1 + QUERY_HEADS * (1 + HEAD_DIM));
    let rest = QUERY_HEADS * (28 + 2 * HEAD_DIM);
    vec![
        answer(1, 0, 0),
        answer(3, 0, 0),
        answer(2, 1, partial),
        answer(1, 2, rest),
        answer(1, 3, partial + rest),
        answer(1, 4, 0),
    ]
}
