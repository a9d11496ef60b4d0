//! What a client says to a daemon once it has a session: requests, batch tables, hints, and control messages between them.

use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use kvoyant_methods::{MethodSpec, registry};
use kvoyant_protocol::control::{MemoryKind, SelectedBy, ToClient, ToDaemon, decode, encode, features};
use kvoyant_protocol::device::SlabRef;
use kvoyant_protocol::layout::{PageGeometry, d2c};
use kvoyant_protocol::packet;
use kvoyant_protocol::ring::Consumer;
use kvoyant_protocol::wire::{
    Append, BatchEntry, BlockRun, Completion, FeedbackRows, HeadEntry, Observe, Operation, Request,
    SequenceId, Served, Speculate, Status,
};
use kvoyant_tests::fake::{HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS, spec};
use kvoyant_tests::raw::Raw;

use crate::input::Input;
use crate::service::{self, PATIENCE};

/// How long a request may stay in the ring: one whose doorbell never rings stays for ever.
const LANE: Duration = Duration::from_millis(50);

/// Requests of one input.
const REQUESTS_MAX: usize = 64;

/// Methods that need no artifact.
static METHODS: LazyLock<Vec<&str>> = LazyLock::new(|| {
    let needs_none =
        |name: &&str| name.parse::<MethodSpec>().is_ok_and(|method| method.artifacts().is_empty());
    registry::names().filter(needs_none).collect()
});

/// Whatever a session says, the daemon goes on or ends it, and what it answers lies within the session's memory.
///
/// # Panics
/// If it is not so, or anything in the daemon panics.
pub fn run(bytes: &[u8]) {
    let mut input = Input(bytes);
    let method = u16::from(input.u8()) % METHODS.len() as u16;
    let Some(mut session) = Session::open(method) else { return };
    for _ in 0..REQUESTS_MAX {
        if input.is_empty() || !session.say(&mut input) || !session.settle() {
            break;
        }
    }
}

struct Session {
    raw: Raw,
    consumer: Consumer,
    sequence: SequenceId,
    appended: u32,
    ticket: u64,
    slab_bytes: usize,
    pages: PageGeometry,
}

impl Session {
    /// A session with a sequence. Sessions before it may still hold what it needs.
    fn open(method: u16) -> Option<Self> {
        let since = Instant::now();
        loop {
            let mut raw = Raw::greet(&service::socket(), features::COMMON);
            let registered = raw.register(spec(&METHODS), &[]).expect("an answer");
            let Ok(ToClient::Registered { page_rows, slab, .. }) = decode(&registered.bytes) else {
                panic!("the daemon refuses a good model: {:?}", decode::<ToClient>(&registered.bytes));
            };
            let slab_bytes = if let SlabRef::Host { bytes } = slab { bytes as usize } else { 0 };
            let open = ToDaemon::Open { method, tokens: 256, by: SelectedBy::Lane };
            match raw.call(&open) {
                Ok(ToClient::Opened { sequence, .. }) => {
                    let consumer = Consumer::completions(raw.layout);
                    let pages = PageGeometry {
                        page_rows: page_rows as usize,
                        row_bytes: 2 * HEAD_DIM * size_of::<f32>(),
                    };
                    return Some(Self { raw, consumer, sequence, appended: 0, ticket: 0, slab_bytes, pages });
                }
                Ok(ToClient::Failed(failure)) => {
                    assert!(
                        since.elapsed() < PATIENCE,
                        "nothing comes back from sessions that ended: {failure}"
                    );
                    std::thread::sleep(Duration::from_millis(2));
                }
                other => panic!("{other:?} came instead of a sequence"),
            }
        }
    }

    /// One thing that the input says. False if the session has ended.
    fn say(&mut self, input: &mut Input<'_>) -> bool {
        let own = BatchEntry { sequence: self.sequence, position: self.appended, value: 0 };
        match input.u8() % 8 {
            0 => {
                let rows = u32::from(input.u8());
                let layer = (input.u8() & 1 == 1).then(|| u16::from(input.u8()));
                self.push(Operation::Append(Append { layer, batch: 1 }), BatchEntry { value: rows, ..own });
                self.appended += if layer.is_none() { rows } else { 0 };
            }
            1 | 2 => {
                let flags = input.u8();
                self.ticket += 1;
                let hints = input.chunk();
                let _ = self.raw.c2d.write(self.raw.layout.hints(self.raw.tail), hints);
                let query = (QUERY_HEADS * HEAD_DIM * size_of::<f32>()) as u32;
                let speculate = Speculate {
                    layer: u16::from(input.u8()) % (LAYERS as u16 + 1),
                    batch: 1,
                    ticket: self.ticket,
                    hint_bytes: if flags & 64 == 0 { query } else { input.u16().into() },
                    queries: if flags & 32 == 0 { 1 } else { input.u8().into() },
                    deadline_ns: if flags & 16 == 0 { 0 } else { input.u64() },
                    doorbell: flags & 8 != 0,
                    floors: flags & 4 != 0,
                    rest: flags & 2 != 0,
                    fetch: flags & 1 != 0,
                };
                let position = if flags & 128 == 0 { self.appended } else { input.u32() };
                self.push(Operation::Speculate(speculate), BatchEntry { position, ..own });
            }
            3 => {
                let descriptor = input.array::<64>();
                let entries: Vec<_> = (0..input.u8() % 4)
                    .map(|_| {
                        let own = input.u8() & 1 == 0;
                        let other = SequenceId { slot: input.u32(), generation: input.u32() };
                        let sequence = if own { self.sequence } else { other };
                        BatchEntry { sequence, position: input.u32(), value: input.u32() }
                    })
                    .collect();
                self.raw.push_raw(&descriptor, &entries);
            }
            4 => {
                let mut message = encode(&ToDaemon::Mapped);
                message.truncate(if input.u8() & 1 == 0 { 12 } else { 0 });
                message.extend_from_slice(input.chunk());
                return self.call(&message);
            }
            5 => {
                let payload = input.chunk();
                let _ = self.raw.c2d.write(self.raw.layout.hints(self.raw.tail), payload);
                let (layer, bytes) = (u16::from(input.u8()) % (LAYERS as u16 + 1), input.u16());
                let payload_bytes =
                    if bytes & 1 == 0 { bytes.into() } else { (4 * KV_HEADS * HEAD_DIM) as u32 };
                let operation = match bytes % 3 {
                    0 => Operation::Observe(Observe { layer, payload_bytes }),
                    1 => Operation::Feedback(FeedbackRows { layer, payload_bytes, full: bytes & 8 == 0 }),
                    _ => Operation::Mark { payload_bytes },
                };
                self.push(operation, BatchEntry { position: self.appended, value: input.u32(), ..own });
            }
            6 => {
                let request = Request { release_through: input.u64(), operation: Operation::Release };
                self.raw.push(&request, &[]);
            }
            _ => {
                let tail = if input.u8() & 1 == 0 { self.raw.tail } else { input.u32() };
                self.raw.publish(tail);
            }
        }
        true
    }

    fn push(&mut self, operation: Operation, entry: BatchEntry) {
        let request = Request { release_through: self.ticket.saturating_sub(4), operation };
        self.raw.push(&request, &[entry]);
    }

    /// Says it on the control socket. What is answered need only be a message; what is not need not be answered.
    fn call(&mut self, message: &[u8]) -> bool {
        let asks = decode::<ToDaemon>(message);
        self.raw.say(message);
        match asks {
            Ok(ToDaemon::Goodbye) => true,
            Ok(_) => match self.raw.hear() {
                Ok(ToClient::Opened { sequence, .. } | ToClient::Resumed { sequence, .. }) => {
                    (self.sequence, self.appended) = (sequence, 0);
                    true
                }
                heard => heard.is_ok(),
            },
            Err(_) => self.raw.hear().is_ok(),
        }
    }

    /// Waits until the lane has taken in everything, and looks at what it answers. False if the session has ended, or the lane
    /// waits for what does not come.
    fn settle(&mut self) -> bool {
        let since = Instant::now();
        while self.raw.d2c.load_u32(d2c::REQUEST_HEAD) != self.raw.tail {
            if since.elapsed() > LANE || packet::hung_up(self.raw.as_fd()).unwrap_or(true) {
                return false;
            }
            std::thread::yield_now();
        }
        let limits = self.raw.layout.limits;
        let boot_id = self.raw.d2c.load_u64(d2c::BOOT_ID);
        let served = Served { boot_id, generation: 0 };
        while self.consumer.available(&self.raw.d2c).expect("a ring of a good daemon's") > 0 {
            let descriptor = self.consumer.peek(&self.raw.d2c);
            let completion = Completion::parse(&descriptor, &limits, served).expect("a good daemon's answer");
            self.consumer.advance(&self.raw.c2d);
            if completion.status == Status::Ready {
                self.check(&completion);
            }
        }
        true
    }

    /// Whether an answer's rows lie in the session's memory.
    fn check(&self, completion: &Completion) {
        let at = self.raw.layout.table(completion.ticket);
        let mut table = vec![0; completion.table_bytes as usize];
        self.raw.d2c.read(at, &mut table).expect("a block table");
        let heads = completion.batch as usize * KV_HEADS;
        let (entries, behind) = table.split_at(heads * size_of::<HeadEntry>());
        let extents = self.raw.memory.iter().filter(|(kind, _)| *kind != MemoryKind::Tables).count();
        for entry in entries.chunks_exact(size_of::<HeadEntry>()) {
            let head: HeadEntry = bytemuck::pod_read_unaligned(entry);
            let first = head.first_run as usize * size_of::<BlockRun>();
            let runs = &behind[first..first + head.runs as usize * size_of::<BlockRun>()];
            let mut rows = 0;
            for run in runs.chunks_exact(size_of::<BlockRun>()) {
                let run: BlockRun = bytemuck::pod_read_unaligned(run);
                rows += run.rows();
                if run.in_slab() {
                    let end = (run.row + run.rows()) as usize * self.pages.row_bytes;
                    assert!(
                        end <= self.slab_bytes,
                        "{run:?} ends behind a slab of {} bytes",
                        self.slab_bytes
                    );
                } else {
                    let (extent, _) = self.pages.locate(run.row);
                    assert!(extent < extents, "{run:?} lies in extent {extent} of {extents}");
                }
            }
            assert_eq!(rows, head.rows);
        }
    }
}

/// A prompt and a step by each method, and some mistakes.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let hints = |flags: u8| [&[1, flags, 64][..], &[0x3c; 64], &[1]].concat();
    let append = |rows: u8| vec![0, rows, 0];
    let observe = || [&[5, 32][..], &[0x3c; 32], &[1, 3, 0], &[0; 4]].concat();
    let fork =
        ToDaemon::Fork { parent: SequenceId { slot: 0, generation: 0 }, method: None, by: SelectedBy::Lane };
    let control = |message: &ToDaemon| {
        let body = &encode(message)[12..];
        [&[4, 0, body.len() as u8][..], body].concat()
    };
    let mut seeds: Vec<Vec<u8>> = (0..METHODS.len() as u8)
        .map(|method| {
            [vec![method], append(200), observe(), hints(0), append(1), hints(0), hints(32)].concat()
        })
        .collect();
    seeds.push([vec![1], append(100), hints(2), hints(1), hints(4), hints(16), vec![6], vec![2; 8]].concat());
    seeds.push([vec![0], append(64), control(&fork), append(3), hints(0)].concat());
    let close = ToDaemon::Close { sequences: vec![SequenceId { slot: 0, generation: 0 }] };
    seeds.push([vec![2], append(64), control(&close), hints(0), vec![7, 1, 9, 0, 0, 0]].concat());
    seeds
}
