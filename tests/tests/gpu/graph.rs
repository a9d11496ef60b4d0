//! Graph mode: attention that is captured once and replayed, while the daemon brings in what was missed.
//!
//! The GPU is softcuda; each test runs in a child process whose driver it is.
#![allow(unsafe_code)]

use std::time::Duration;

use kvoyant_client::cuda::{
    GraphBuffers, GraphKernels, GraphOptions, GraphSequence, KernelCache, OwnRows, Stream,
};
use kvoyant_client::{
    Client, Dtype, Error, Failure, GraphSpec, Hint, Member, Model, ModelSpec, Options, Status,
};
use kvoyant_cuda::{Context, DeviceBuffer, ExecGraph, Priority};
use kvoyant_kernels::cuda::params::ReportHeader;
use kvoyant_kernels::{AttendScratch, Kernels, Run};
use kvoyant_protocol::control::{ToClient, ToDaemon, features};
use kvoyant_protocol::graph::{GraphLayout, sequence_word};
use kvoyant_protocol::memory::{Memfd, Seals};
use kvoyant_protocol::wire::Stat;
use kvoyant_tests::fake::{self, HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS, SINKS, WINDOW};
use kvoyant_tests::raw::Raw;
use kvoyant_tests::softcuda::{Machine, on_softcuda};
use kvoyant_tests::this_test;
use kvoyant_tests::{Daemon, wait_until};
use nix::sys::signal::{Signal, kill};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const GRAPH: GraphSpec = GraphSpec { rows: 48, sequences: 2, reports: 32 };
const GROUP: usize = QUERY_HEADS / KV_HEADS;
const ROW: usize = 2 * HEAD_DIM * 4;
const TOKENS_MAX: usize = 512;
/// Layers that rows are selected in.
const SELECTED: std::ops::Range<usize> = 1..LAYERS;
const SCALE: f32 = 0.2;

fn start() -> Daemon {
    let state = std::env::temp_dir().join(format!("kvoyant-graph-{}", std::process::id()));
    Daemon::start(DAEMON, &["--device", "cuda:0", "--slab", "4MiB", "--state", &state.display().to_string()])
}

fn spec() -> ModelSpec {
    ModelSpec { graph: Some(GRAPH), ..fake::spec(&["full"]) }
}

/// A small number that depends on all of these.
fn number(parts: [usize; 5]) -> u32 {
    let mixed = parts.iter().fold(0x9e37_79b9_7f4a_7c15_u64, |sum, part| {
        (sum ^ (*part as u64).wrapping_add(0x632b_e59b)).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29)
    });
    (mixed >> 33) as u32
}

fn value(parts: [usize; 5]) -> f32 {
    (number(parts) % 2000) as f32 / 1000.0 - 1.0
}

/// The row of a token, as the engine writes it the `seed`th time.
fn row(seed: usize, layer: usize, head: usize, token: usize) -> Vec<u8> {
    (0..2 * HEAD_DIM).flat_map(|i| value([seed, layer, head, token, i]).to_le_bytes()).collect()
}

/// What one layer of an engine has on the device.
struct Layer {
    memory: DeviceBuffer,
    buffers: GraphBuffers,
}

impl Layer {
    fn new(context: &Context) -> Self {
        let memory = context.alloc(1 << 20).unwrap();
        let mut at = memory.ptr();
        let mut place = |bytes: usize| {
            let here = at;
            at += bytes.next_multiple_of(256) as u64;
            here
        };
        let buffers = GraphBuffers {
            queries: place(QUERY_HEADS * HEAD_DIM * 4),
            ids: place(KV_HEADS * GRAPH.rows as usize * 4),
            counts: place(KV_HEADS * 4),
            out: place(QUERY_HEADS * HEAD_DIM * 4),
            lse: place(QUERY_HEADS * 4),
            sinks: OwnRows { address: place(KV_HEADS * SINKS * ROW), stride: (SINKS * ROW) as u64 },
            window: OwnRows { address: place(KV_HEADS * WINDOW * ROW), stride: (WINDOW * ROW) as u64 },
            window_rows: WINDOW as u32,
        };
        Self { memory, buffers }
    }
}

/// An engine that has one sequence in graph mode.
struct Engine {
    model: Model,
    sequence: GraphSequence,
    layers: Vec<Layer>,
    graph: ExecGraph,
    stream: Stream,
    /// `[layer][KV head][token]`.
    rows: Vec<Vec<Vec<Vec<u8>>>>,
    seed: usize,
}

impl Engine {
    fn connect(daemon: &Daemon, splits: u32) -> Self {
        let client = Client::connect(&daemon.socket(), Options::default()).unwrap();
        Self::new(client.register(spec(), &[]).unwrap(), 0, splits)
    }

    fn new(model: Model, slot: u32, splits: u32) -> Self {
        let device = model.device_session().unwrap();
        let context = device.context().clone();
        let folder = tempfile::tempdir().unwrap();
        let kernels = GraphKernels::load(device, &KernelCache::new(folder.path())).unwrap();
        let sequence = model.open(0, 64).unwrap();
        let options = GraphOptions { slot, tokens: TOKENS_MAX, splits, scale: SCALE };
        let sequence = model.graph(sequence, &kernels, options).unwrap();
        let stream = context.stream(Priority::Normal).unwrap();
        let layers: Vec<_> = SELECTED.map(|_| Layer::new(&context)).collect();
        for layer in &layers {
            // SAFETY: all of an allocation of ours.
            unsafe { stream.fill(layer.memory.ptr(), 0, layer.memory.len()) }.unwrap();
        }
        let captured = stream.capture::<Error>(|stream| {
            SELECTED.zip(&layers).try_for_each(|(index, layer)| {
                // SAFETY: buffers of the shapes that are wanted, which live as long as the engine, whose stream is one.
                unsafe { sequence.attend(index, &layer.buffers, stream) }
            })
        });
        let graph = captured.unwrap().instantiate().unwrap();
        let rows = vec![vec![Vec::new(); KV_HEADS]; LAYERS];
        Self { model, sequence, layers, graph, stream, rows, seed: 1 }
    }

    fn tokens(&self) -> usize {
        self.rows[0][0].len()
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        let context = self.stream.context();
        let pinned = context.pinned(bytes.len()).unwrap();
        // SAFETY: memory of ours of that size.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), pinned.as_ptr(), bytes.len()) };
        // SAFETY: into a buffer of ours; the pinned memory lives until the stream is done.
        unsafe { self.stream.copy_h2d(address, pinned.as_ptr(), bytes.len()) }.unwrap();
        self.stream.synchronize().unwrap();
    }

    fn get(&self, address: u64, values: usize) -> Vec<f32> {
        let pinned = self.stream.context().pinned(values * 4).unwrap();
        // SAFETY: out of a buffer of ours into pinned memory of that size, which lives until the stream is done.
        unsafe { self.stream.copy_d2h(pinned.as_ptr(), address, values * 4) }.unwrap();
        self.stream.synchronize().unwrap();
        // SAFETY: aligned memory of ours, which nobody writes any more.
        unsafe { std::slice::from_raw_parts(pinned.as_ptr().cast::<f32>(), values) }.to_vec()
    }

    /// Writes and appends rows up to `tokens`, and keeps sinks and window on the device.
    fn grow(&mut self, tokens: usize) {
        if tokens > self.sequence.sequence().room() {
            self.sequence.reserve((tokens + 32).min(TOKENS_MAX), &self.stream).unwrap();
        }
        let first = self.tokens();
        for layer in 0..LAYERS {
            for head in 0..KV_HEADS {
                for token in first..tokens {
                    let row = row(self.seed, layer, head, token);
                    self.sequence.sequence().write_rows(layer, head, token, &row).unwrap();
                    self.rows[layer][head].push(row);
                }
            }
        }
        self.model.append(&[(self.sequence.sequence(), tokens - first)]).unwrap();
        self.refresh_own();
    }

    fn refresh_own(&self) {
        let tokens = self.tokens();
        for (index, layer) in SELECTED.zip(&self.layers) {
            let (mut sinks, mut window) = (vec![0; KV_HEADS * SINKS * ROW], vec![0; KV_HEADS * WINDOW * ROW]);
            for head in 0..KV_HEADS {
                for token in 0..tokens.min(SINKS) {
                    sinks[(head * SINKS + token) * ROW..][..ROW]
                        .copy_from_slice(&self.rows[index][head][token]);
                }
                for token in tokens.saturating_sub(WINDOW)..tokens {
                    window[(head * WINDOW + token % WINDOW) * ROW..][..ROW]
                        .copy_from_slice(&self.rows[index][head][token]);
                }
            }
            self.put(layer.buffers.sinks.address, &sinks);
            self.put(layer.buffers.window.address, &window);
        }
    }

    /// Every `every`th token between sinks and window, beginning somewhere else for each head; in no order.
    fn choose(&self, salt: usize, every: usize) -> Vec<Vec<Vec<u32>>> {
        let far = SINKS..self.tokens() - WINDOW;
        let heads = |layer: usize| {
            let ids = |head: usize| {
                let all = far.clone().filter(|token| (token + layer + head + salt).is_multiple_of(every));
                let mut ids: Vec<u32> = all.map(|token| token as u32).take(GRAPH.rows as usize).collect();
                let by = salt % 5 % ids.len().max(1);
                ids.rotate_left(by);
                ids
            };
            (0..KV_HEADS).map(ids).collect()
        };
        SELECTED.map(heads).collect()
    }

    /// Replays the graph over what was chosen, and compares every layer with the same attention on the CPU.
    fn step(&self, chosen: &[Vec<Vec<u32>>], salt: usize) {
        let queries: Vec<Vec<f32>> = SELECTED
            .map(|layer| (0..QUERY_HEADS * HEAD_DIM).map(|i| value([salt, layer, 7, 7, i])).collect())
            .collect();
        for ((layer, chosen), queries) in self.layers.iter().zip(chosen).zip(&queries) {
            let mut ids = vec![u32::MAX; KV_HEADS * GRAPH.rows as usize];
            for (head, chosen) in chosen.iter().enumerate() {
                ids[head * GRAPH.rows as usize..][..chosen.len()].copy_from_slice(chosen);
            }
            let counts: Vec<u32> = chosen.iter().map(|chosen| chosen.len() as u32).collect();
            let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
            self.put(layer.buffers.ids, &bytes(&ids));
            self.put(layer.buffers.counts, &bytes(&counts));
            self.put(layer.buffers.queries, &bytes(&queries.iter().map(|v| v.to_bits()).collect::<Vec<_>>()));
        }
        self.sequence.set_position(self.tokens(), &self.stream).unwrap();
        // SAFETY: what the graph reads and writes lives as long as the engine.
        unsafe { self.graph.launch(&self.stream) }.unwrap();
        self.stream.synchronize().unwrap();
        for ((index, layer), (chosen, queries)) in SELECTED.zip(&self.layers).zip(chosen.iter().zip(&queries))
        {
            let out = self.get(layer.buffers.out, QUERY_HEADS * HEAD_DIM);
            let lse = self.get(layer.buffers.lse, QUERY_HEADS);
            for (head, chosen) in chosen.iter().enumerate() {
                let (wanted, wanted_lse) = self.expected(index, head, chosen, queries);
                close(&out[head * GROUP * HEAD_DIM..][..GROUP * HEAD_DIM], &wanted, index, head);
                close(&lse[head * GROUP..][..GROUP], &wanted_lse, index, head);
            }
        }
        assert!(!self.sequence.failed(&self.stream).unwrap(), "a row was left out");
    }

    fn expected(&self, layer: usize, head: usize, ids: &[u32], queries: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let tokens = self.tokens();
        let own = (0..SINKS).chain(tokens - WINDOW..tokens);
        let all = own.chain(ids.iter().map(|id| *id as usize));
        let rows: Vec<&[u8]> = all.map(|token| self.rows[layer][head][token].as_slice()).collect();
        let runs: Vec<Run> = rows.iter().map(|row| Run::new(row.as_ptr(), 1)).collect();
        let (mut out, mut lse) = (vec![0.0; GROUP * HEAD_DIM], vec![0.0; GROUP]);
        let queries = &queries[head * GROUP * HEAD_DIM..][..GROUP * HEAD_DIM];
        let (kernels, mut scratch) = (Kernels::best(), AttendScratch::default());
        // SAFETY: every run is a whole row that nobody writes to.
        unsafe {
            kernels.attend(
                Dtype::F32,
                queries,
                GROUP,
                HEAD_DIM,
                SCALE,
                &runs,
                &mut scratch,
                &mut out,
                &mut lse,
            );
        }
        (out, lse)
    }

    fn stat(&self, stat: Stat) -> u64 {
        self.model.stat(stat)
    }

    /// Replays until a whole step finds everything in the slab.
    fn settle(&self, chosen: &[Vec<Vec<u32>>]) {
        wait_until("a step without a miss", || {
            let (reports, lost) = (self.stat(Stat::GraphReports), self.stat(Stat::GraphLost));
            let misses = self.stat(Stat::GraphMisses);
            self.step(chosen, 3);
            let made = SELECTED.len() as u64;
            wait_until("the step's reports", || {
                self.stat(Stat::GraphReports) + self.stat(Stat::GraphLost) >= reports + lost + made
            });
            self.stat(Stat::GraphReports) == reports + made && self.stat(Stat::GraphMisses) == misses
        });
    }
}

fn close(found: &[f32], wanted: &[f32], layer: usize, head: usize) {
    for (found, wanted) in found.iter().zip(wanted) {
        assert!(
            (found - wanted).abs() <= 1e-4 * wanted.abs().max(1.0),
            "layer {layer} head {head}: {found} where {wanted} was to come"
        );
    }
}

#[test]
fn a_captured_step_is_right_at_every_replay_while_ids_and_position_change() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start();
    for splits in [1, 3] {
        let mut engine = Engine::connect(&daemon, splits);
        engine.grow(150);
        for step in 0..14 {
            let tokens = engine.tokens() + 1;
            engine.grow(tokens);
            engine.step(&engine.choose(step, 3 + step % 4), step);
        }
        wait_until("the reports", || engine.stat(Stat::GraphReports) + engine.stat(Stat::GraphLost) >= 28);
        // A table that has grown is known to the captured kernels, too.
        engine.grow(400);
        engine.step(&engine.choose(1, 9), 99);
        engine.settle(&engine.choose(1, 9));
        let status = daemon.wait_for("hits", |status| status.sessions.iter().any(|s| s.graph_hits > 0));
        assert!(status.sessions.iter().any(|session| session.graph_reports > 0));
    }
}

#[test]
fn what_was_missed_is_there_at_the_next_step_and_only_new_rows_move() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start();
    let mut engine = Engine::connect(&daemon, 1);
    engine.grow(200);
    let mut chosen = engine.choose(0, 8);
    let selected = chosen.iter().flatten().map(Vec::len).sum::<usize>() as u64;
    engine.step(&chosen, 1);
    wait_until("the first reports", || engine.stat(Stat::GraphReports) == SELECTED.len() as u64);
    assert_eq!((engine.stat(Stat::GraphMisses), engine.stat(Stat::GraphHits)), (selected, 0));
    engine.settle(&chosen);
    let moved = engine.stat(Stat::BytesMoved);
    assert_eq!(moved, selected * ROW as u64, "every row moved once");
    // One more row for each head, and one less.
    for ids in chosen.iter_mut().flatten() {
        let new = (SINKS as u32..).find(|token| !ids.contains(token)).unwrap();
        ids[0] = new;
    }
    engine.settle(&chosen);
    let new = (SELECTED.len() * KV_HEADS * ROW) as u64;
    assert_eq!(engine.stat(Stat::BytesMoved) - moved, new, "only the new rows moved");
}

#[test]
fn rows_that_were_truncated_and_written_anew_are_never_read_from_the_slab() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start();
    let mut engine = Engine::connect(&daemon, 1);
    for round in 0..4 {
        engine.grow(180);
        let chosen = engine.choose(0, 5);
        engine.settle(&chosen);
        engine.sequence.truncate(90, &engine.stream).unwrap();
        engine.rows.iter_mut().flatten().for_each(|rows| rows.truncate(90));
        engine.seed = 2 + round;
        engine.grow(180);
        engine.step(&chosen, round);
        engine.step(&chosen, round + 1);
    }
}

#[test]
fn reports_that_are_lost_cost_misses_and_nothing_else() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start();
    let mut engine = Engine::connect(&daemon, 1);
    engine.grow(200);
    engine.settle(&engine.choose(0, 8));
    daemon.stop();
    for step in 0..30 {
        engine.step(&engine.choose(step, 4 + step % 5), step);
    }
    kill(daemon.pid(), Signal::SIGCONT).unwrap();
    wait_until("the lapped mailbox being noticed", || engine.stat(Stat::GraphLost) > 0);
    engine.settle(&engine.choose(2, 7));
}

#[test]
fn replays_stay_right_when_the_daemon_dies() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start();
    let mut engine = Engine::connect(&daemon, 1);
    engine.grow(200);
    engine.settle(&engine.choose(0, 8));
    for step in 0..4 {
        engine.step(&engine.choose(step, 6), step);
    }
    let (status, _) = daemon.end(Signal::SIGKILL);
    assert!(!status.success());
    for step in 0..12 {
        engine.step(&engine.choose(step, 3 + step % 4), step);
    }
}

#[test]
fn a_slot_serves_one_sequence_at_a_time_and_none_that_is_speculated() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start();
    let mut engine = Engine::connect(&daemon, 1);
    engine.grow(100);
    let member = Member { sequence: engine.sequence.sequence(), position: 100, hint: Hint::None };
    let answer = engine.model.speculate(1, &[member]).unwrap().wait(Duration::from_secs(30));
    assert!(matches!(answer, Err(Error::NotReady { status: Status::InGraphMode, .. })), "{answer:?}");
    let kernels = {
        let folder = tempfile::tempdir().unwrap();
        GraphKernels::load(engine.model.device_session().unwrap(), &KernelCache::new(folder.path())).unwrap()
    };
    let serve = |slot, tokens| {
        let options = GraphOptions { slot, tokens, splits: 1, scale: SCALE };
        engine.model.graph(engine.model.open(0, 64).unwrap(), &kernels, options)
    };
    for (slot, reason) in [(0, "slot 0 is that of"), (2, "slot 2 is not one of 2")] {
        match serve(slot, TOKENS_MAX) {
            Err(Error::Failed(Failure::Graph { reason: said, .. })) => {
                assert!(said.contains(reason), "{said}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(serve(1, 32), Err(Error::Size { .. })));
    // A slot that was used before tells the next sequence nothing.
    engine.settle(&engine.choose(0, 4));
    let model = engine.model.clone();
    drop(engine);
    let mut next = Engine::new(model, 0, 1);
    next.seed = 5;
    next.grow(100);
    next.step(&next.choose(0, 4), 1);
    next.settle(&next.choose(0, 4));
}

#[test]
fn two_sequences_of_a_session_keep_their_rows_apart() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start();
    let mut first = Engine::connect(&daemon, 1);
    let mut second = Engine::new(first.model.clone(), 1, 1);
    second.seed = 9;
    first.grow(150);
    second.grow(170);
    for step in 0..10 {
        first.step(&first.choose(step / 3, 6), step);
        second.step(&second.choose(step / 2, 6), step);
    }
    let hits = first.stat(Stat::GraphHits);
    wait_until("hits of both", || {
        first.step(&first.choose(0, 6), 1);
        second.step(&second.choose(0, 6), 1);
        first.stat(Stat::GraphHits) > hits
    });
}

#[test]
fn a_report_that_cannot_be_ends_its_session_alone_with_the_reason() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start();
    let mut neighbour = Engine::connect(&daemon, 1);
    neighbour.grow(120);
    let layout = GraphLayout::new(GRAPH, LAYERS as u32, KV_HEADS as u32).unwrap();
    let good = |sequence| ReportHeader {
        number: 1,
        sequence,
        layer: 1,
        heads: KV_HEADS as u32,
        capacity: GRAPH.rows,
        tokens: 64,
    };
    type Change = fn(&mut ReportHeader, &mut Vec<u32>);
    let lies: [(Change, &str); 7] = [
        (|header, _| header.layer = 99, "layer 99"),
        (|header, _| header.layer = 0, "layer 0"),
        (|header, _| header.sequence ^= 1 << 40, "not served in graph mode"),
        (|header, _| header.heads = 3, "3 KV heads"),
        (|_, words| words[0] = GRAPH.rows + 1, "49 ids"),
        (|_, words| words[2 * KV_HEADS] = 1 << 20, "token 1048576"),
        (|header, _| header.number = 2, "report 2 cannot lie"),
    ];
    for (change, reason) in lies {
        let (mut raw, fds) = Raw::connect_with(&daemon.socket(), spec(), features::COMMON | features::CUDA);
        let mailbox = fds.into_iter().next_back().expect("the mailbox");
        let bytes = layout.mailbox_bytes() as usize;
        let mailbox = Memfd::from_peer(mailbox, bytes, Seals::fixed_size()).unwrap().map(false).unwrap();
        let sequence = raw.open(64);
        assert_eq!(raw.call(&ToDaemon::Graph { sequence, slot: 0 }), Ok(ToClient::Done));
        let (mut header, mut words) = (good(sequence_word(sequence)), vec![1, 0, 0, 0, 5]);
        change(&mut header, &mut words);
        let at = layout.report(1) as usize;
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        mailbox.write(at + size_of::<ReportHeader>(), &body).unwrap();
        let number = std::mem::take(&mut header.number);
        mailbox.write_pod(at, &header).unwrap();
        mailbox.store_u64(at, number);
        match raw.hear() {
            Ok(ToClient::Failed(Failure::Protocol(said))) => assert!(said.contains(reason), "{said}"),
            other => panic!("{reason}: {other:?}"),
        }
        neighbour.step(&neighbour.choose(0, 5), 1);
    }
    neighbour.settle(&neighbour.choose(0, 5));
}

#[test]
fn graph_mode_is_refused_where_it_cannot_be() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let register = |daemon: &Daemon, graph| {
        let client = Client::connect(&daemon.socket(), Options::default()).unwrap();
        client.register(ModelSpec { graph: Some(graph), ..spec() }, &[])
    };
    let host = Daemon::start(DAEMON, &[]);
    let refused = register(&host, GRAPH).unwrap_err();
    assert!(matches!(&refused, Error::Failed(Failure::Device(_))), "{refused}");
    let gpu = start();
    let refused = register(&gpu, GraphSpec { reports: 33, ..GRAPH }).unwrap_err();
    assert!(refused.to_string().contains("graph.reports"), "{refused}");
    // A model without it serves none.
    let model = fake::connect(&gpu, &["full"]);
    let folder = tempfile::tempdir().unwrap();
    let device = model.device_session().unwrap();
    let kernels = GraphKernels::load(device, &KernelCache::new(folder.path())).unwrap();
    let options = GraphOptions { slot: 0, tokens: TOKENS_MAX, splits: 1, scale: SCALE };
    let refused = model.graph(model.open(0, 64).unwrap(), &kernels, options).unwrap_err();
    assert!(matches!(refused, Error::NoDevice(_)), "{refused}");
}
