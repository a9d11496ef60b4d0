//! What methods keep may come from an image that somebody else wrote: whatever the bytes are, a method must not fail, and must select
//! within the candidates.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use kvoyant_methods::infinigen::SkewArtifact;
use kvoyant_methods::registry::names;
use kvoyant_methods::replay::View;
use kvoyant_methods::{
    Append, Artifact, ArtifactKind, Artifacts, Dtype, FeedbackRow, Fingerprint, InTime, Method, MethodSpec,
    Rest, RowSource, Scratch, SelectContext, Selection, Shape, Tensor, TensorArtifact, TokenRange, Truncated,
    build, mark,
};
use proptest::prelude::*;

const HEADS: usize = 2;
const D: usize = 8;
const PAGE: usize = 32;

const SPECS: &[&str] = &[
    "full",
    "window",
    "random:budget=24",
    "oracle:budget=24",
    "given",
    "quest:budget=24",
    "quest:budget=24,page=8,digest=int8",
    "scout:budget=64,page=8",
    "freekv:budget=24,page=4,tau=-1",
    "freekv:budget=40,page=2,tau=-1",
    "freekv:budget=40,page=2",
    "shadowkv:budget=24",
    "shadowkv:budget=24,chunk=4,outliers=3,keys=moved",
    "hata:budget=24",
    "hata:budget=24,weights=random,bits=70,norm=off",
    "clo:budget=24,tau=-1",
    "clo:budget=24,weights=random,tau=0.9",
    "infinigen",
    "infinigen:budget=24,pool=60%",
    "infinigen:alpha=5,granularity=page,pool=40,count=head",
    "infinigen:skew=off,pool=20%,partial=100%",
    "louver:budget=24,cap=30",
    "louver:tau=sample-gap,gate=centre,group=4",
    "resv",
    "resv:ratio=100%,budget=24,distance=2,recent=16,clusters=100%",
    "resv:score=raw,distance=33,budget=24",
    "attention-predictor:budget=32",
    "attention-predictor:weights=average,budget=24",
    "dynsplit:budget=24,min=1,max=7,score=marks,candidates=word",
    "dynsplit:budget=24,min=4,max=16,digest=mean",
    "dynsplit:budget=24,boundary=fixed,page=8",
    "hetero:budget=24,every=1,looks=1",
    "hetero:budget=24,every=3,looks=2,drift=1",
    "hetero:budget=24,roles=none,every=0",
    "kvoyant:budget=8",
    "kvoyant:budget=24,scope=layer,bits=4,group=16",
    "kvoyant:budget=24,scope=head,roles=stability,late=leave,reuse=0.5",
    "kvoyant:budget=24,hint=ahead,late=leave,reuse=0.9",
    "kvoyant:max_missed_mass=0.05,hint=ahead",
    "mix:0/0=(quest:budget=24),0/1=(attention-predictor:budget=24),rest=(quest:budget=12)",
    "mix:*/0=(resv:hint=ahead),*/1=(infinigen:budget=24,pool=60%)",
    "mix:*/0=(dynsplit:budget=24),*/1=(resv)",
];

/// Numbers from a seed (xorshift64*).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 33) as usize % bound.max(1)
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (self.next() >> 40) as f32 / (1 << 22) as f32 - 2.0).collect()
    }
}

/// How bytes lie.
#[derive(Debug, Clone, Copy)]
enum Lie {
    Random,
    Ones,
    Zeros,
    /// What was there, but for some words.
    Words,
}

impl Lie {
    fn tell(self, bytes: &mut [u8], rng: &mut Rng) {
        match self {
            Self::Random => bytes.iter_mut().for_each(|byte| *byte = rng.next() as u8),
            Self::Ones => bytes.fill(0xff),
            Self::Zeros => bytes.fill(0),
            Self::Words => {
                // Numbers lie in front, in whole words; what they say of the rest is believed only while they are left alone.
                let front = rng.below(2) * 32;
                for _ in 0..rng.below(12) {
                    let most = if rng.below(2) * front > 0 { bytes.len().min(front) } else { bytes.len() };
                    let at = rng.below(most) / 4 * 4;
                    let word = match rng.below(8) {
                        0 => u32::MAX,
                        1 => rng.next() as u32,
                        2 => f32::NAN.to_bits(),
                        3 => f32::INFINITY.to_bits(),
                        4 | 5 => rng.below(16) as u32,
                        _ => rng.below(200) as u32,
                    };
                    if let Some(place) = bytes.get_mut(at..at + 4) {
                        place.copy_from_slice(&word.to_le_bytes());
                    }
                }
            }
        }
    }
}

fn shape(dtype: Dtype) -> Shape {
    Shape {
        layers: 2,
        query_heads: 4,
        kv_heads: HEADS,
        head_dim: D,
        value_dim: D,
        page_rows: PAGE,
        sinks: 4,
        window: 8,
        dense_layers: 0,
        dtype,
        fingerprint: Fingerprint([7; 16]),
    }
}

fn artifacts(shape: &Shape) -> Artifacts {
    let square: Vec<f32> = (0..D * D).map(|at| f32::from(u8::from(at % (D + 1) == 0))).collect();
    let skew = SkewArtifact::new(shape, square.repeat(shape.layers * HEADS)).unwrap();
    let mut rng = Rng(9);
    let mut tensors = |kind, all: &[(&str, &[usize])], settings: &[(&str, &str)]| {
        let tensors = all.iter().map(|(name, sides)| {
            let values = match *name {
                "role" => [3.0, 1.0].repeat(shape.layers),
                "pivot" => vec![0.0; shape.layers * HEADS],
                "stability" => vec![0.5; shape.layers * HEADS],
                _ => rng.values(sides.iter().product()),
            };
            ((*name).to_owned(), Tensor { shape: sides.to_vec(), values })
        });
        let settings: BTreeMap<String, String> =
            settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let artifact = TensorArtifact::new(kind, shape.fingerprint, tensors.collect(), settings).unwrap();
        Artifact::Tensors(Arc::new(artifact))
    };
    let heads = [shape.layers, HEADS];
    let roles: [(&str, &[usize]); 3] = [("role", &heads), ("pivot", &heads), ("stability", &heads)];
    let predictor: [(&str, &[usize]); 6] = [
        ("conv1.weight", &[16, 1, 3, 3]),
        ("conv1.bias", &[16]),
        ("conv2.weight", &[32, 16, 3, 3]),
        ("conv2.bias", &[32]),
        ("head.weight", &[32]),
        ("head.bias", &[1]),
    ];
    [
        Artifact::Skew(Arc::new(skew)),
        tensors(ArtifactKind::Hash, &[("hash", &[shape.layers, HEADS, D, 64])], &[("bits", "64")]),
        tensors(ArtifactKind::Predictor, &predictor, &[("history", "64"), ("block", "16")]),
        tensors(ArtifactKind::Roles, &roles, &[]),
    ]
    .into_iter()
    .collect()
}

/// Keys of one KV head after the other.
struct Rows(Vec<Vec<f32>>);

impl RowSource for Rows {
    fn scores(&self, kv_head: usize, tokens: Range<usize>, queries: &[f32], out: &mut [f32]) {
        let keys = &self.0[kv_head][tokens.start * D..tokens.end * D];
        for (query, out) in queries.chunks_exact(D).zip(out.chunks_exact_mut(tokens.len().max(1))) {
            for (key, score) in keys.chunks_exact(D).zip(out) {
                *score = query.iter().zip(key).map(|(q, k)| q * k).sum();
            }
        }
    }

    fn keys(&self, kv_head: usize, tokens: Range<usize>, out: &mut [f32]) {
        out.copy_from_slice(&self.0[kv_head][tokens.start * D..tokens.end * D]);
    }
}

/// What is kept of a layer, as a lane keeps it.
struct Kept {
    pages: Vec<Vec<Vec<u8>>>,
    states: Vec<Vec<u8>>,
    memories: Vec<Vec<u8>>,
    sequence: Vec<u8>,
    notes: Vec<Vec<u8>>,
}

impl Kept {
    fn view(&mut self) -> View<'_> {
        let Self { pages, states, memories, sequence, notes } = self;
        View { pages, states, memories, sequence, notes }
    }
}

/// One sequence's life.
struct Life<'a> {
    method: &'a dyn Method,
    shape: Shape,
    layer: usize,
    kept: Kept,
    rows: Rows,
    marks: Vec<u8>,
    tokens: usize,
    room: usize,
    hint: Vec<f32>,
    rng: Rng,
    scratch: Scratch,
}

impl<'a> Life<'a> {
    fn new(method: &'a dyn Method, shape: &Shape, mut rng: Rng) -> Self {
        let (layer, room) = (rng.below(2), 160);
        let states = (0..HEADS).map(|head| {
            let mut state = vec![0; method.head_state_bytes()];
            method.init_state(layer, head, &mut state);
            state
        });
        let kept = Kept {
            pages: vec![Vec::new(); HEADS],
            states: states.collect(),
            memories: vec![vec![0; method.memory_bytes(room)]; HEADS],
            sequence: vec![0; method.sequence_bytes()],
            notes: vec![vec![0; method.note_bytes()]; HEADS],
        };
        let hint = rng.values(3 * 2 * HEADS * D);
        let rows = Rows(vec![Vec::new(); HEADS]);
        let (marks, scratch) = (Vec::new(), Scratch::new());
        Self { method, shape: *shape, layer, kept, rows, marks, tokens: 0, room, hint, rng, scratch }
    }

    fn tell(&mut self, lie: Lie) {
        let Kept { pages, states, memories, sequence, notes } = &mut self.kept;
        let all = pages.iter_mut().flatten().chain(states).chain(memories).chain(notes);
        all.chain(std::iter::once(sequence)).for_each(|bytes| lie.tell(bytes, &mut self.rng));
    }

    fn grow(&mut self, count: usize) {
        let (first, tokens) = (self.tokens, self.tokens + count);
        if tokens > self.room {
            self.room = tokens.next_power_of_two();
            for memory in &mut self.kept.memories {
                let mut new = vec![0; self.method.memory_bytes(self.room)];
                self.method.grow_memory(memory, &mut new);
                *memory = new;
            }
        }
        for rows in &mut self.rows.0 {
            rows.extend(self.rng.values(count * D));
        }
        self.marks.extend((0..count).map(|_| self.rng.next() as u8 % (mark::LINE + 1)));
        self.tokens = tokens;
        (0..HEADS).for_each(|head| self.digest(head, first));
    }

    fn digest(&mut self, kv_head: usize, from: usize) {
        let needs = self.method.needs();
        let (mut token, to) = (needs.digestible(from), needs.digestible(self.tokens));
        while token < to {
            let first_row = token % PAGE;
            let most = if needs.sealed_rows == 0 { self.rng.below(40) + 1 } else { usize::MAX };
            let count = most.min(to - token).min(PAGE - first_row);
            let pages = &mut self.kept.pages[kv_head];
            if pages.len() <= token / PAGE {
                pages.resize(token / PAGE + 1, vec![0xff; self.method.digest_bytes()]);
            }
            let keys = &self.rows.0[kv_head][token * D..(token + count) * D];
            let append = Append {
                layer: self.layer,
                kv_head,
                state: &self.kept.states[kv_head],
                keys,
                values: if needs.values { keys } else { &[] },
                first_token: token,
                first_row,
                marks: &self.marks[token..token + count],
            };
            let memory = &mut self.kept.memories[kv_head];
            self.method.on_append(&append, &mut pages[token / PAGE], memory, &mut self.scratch);
            token += count;
        }
        if needs.drops_rows {
            let mut victims = 0;
            self.method.on_admit(to, &mut self.kept.memories[kv_head], &mut |_| victims += 1);
            assert!(victims <= to, "{victims} victims among {to} rows");
        }
    }

    fn truncate(&mut self, tokens: usize) {
        self.tokens = tokens;
        self.marks.truncate(tokens);
        let mut from = tokens / PAGE * PAGE;
        for head in 0..HEADS {
            self.rows.0[head].truncate(tokens * D);
            self.kept.pages[head].truncate(tokens.div_ceil(PAGE));
            let memory = &mut self.kept.memories[head];
            if self.method.on_truncate(tokens, memory) == Truncated::Rebuild {
                memory.fill(0);
                from = 0;
            }
        }
        (0..HEADS).for_each(|head| self.digest(head, from));
    }

    fn observe(&mut self) {
        for head in 0..HEADS {
            let sums = self.rng.values(D);
            if self.method.observe(self.layer, head, &sums, &mut self.kept.states[head]) {
                self.digest(head, 0);
            }
        }
    }

    fn feedback(&mut self) {
        let Some(wanted) = self.method.needs().feedback else { return };
        for kv_head in 0..HEADS {
            let blocks: Vec<f32> =
                self.rng.values(self.tokens.div_ceil(wanted.block)).iter().map(|x| x.abs() / 2.0).collect();
            let row =
                FeedbackRow { layer: self.layer, kv_head, tokens: self.tokens, blocks: &blocks, full: true };
            self.method.on_feedback(&row, &mut self.kept.memories[kv_head]);
        }
    }

    /// A selection, and what a lane does around it.
    fn select(&mut self) {
        let Self { method, shape, layer, kept, rows, tokens, hint, rng, scratch, .. } = self;
        let needs = method.needs();
        // Of the token to come, most often.
        let tokens = if rng.below(4) == 0 { rng.below(*tokens) + 1 } else { *tokens + 1 };
        let queries = if rng.below(4) == 0 { 3 } else { 1 };
        let candidates = shape.candidates(tokens);
        let ids = [2, 0, (tokens / 2) as u32, 0];
        let floors = rng.values(queries * 2 * HEADS);
        let mut resident = Selection::new();
        for _ in 0..HEADS {
            candidates
                .clone()
                .filter(|_| rng.below(3) == 0)
                .for_each(|token| resident.push(token, token + 1));
            resident.finish_head();
        }
        let in_time = InTime { resident: &resident, first_head: 0, room: rng.below(30) };
        let asks = (needs.leaves_late || needs.sees_resident) && rng.below(2) == 0;
        let context = SelectContext {
            queries,
            rows,
            ids: &ids,
            floors: if rng.below(2) == 0 { &floors } else { &[] },
            in_time: asks.then_some(in_time),
            ..SelectContext::new(shape, *layer, tokens, &hint[..queries * 2 * HEADS * D])
        };
        let (mut out, mut rest) = (Selection::new(), Rest::new());
        let check = |out: &Selection| {
            assert_eq!(out.heads(), HEADS);
            for head in 0..HEADS {
                let ranges: &[TokenRange] = out.head(head);
                let within = |range: &TokenRange| {
                    range.count > 0
                        && range.first as usize >= candidates.start
                        && range.end() as usize <= candidates.end
                };
                assert!(ranges.iter().all(within), "{ranges:?} of {candidates:?}");
                assert!(ranges.windows(2).all(|pair| pair[0].end() < pair[1].first), "{ranges:?}");
            }
        };
        if needs.rest && queries == 1 && rng.below(2) == 0 {
            method.select_with_rest(&context, &mut kept.view(), scratch, &mut out, &mut rest);
            check(&out);
        } else {
            method.select(&context, &mut kept.view(), scratch, &mut out);
            check(&out);
            if needs.rest && queries == 1 {
                method.rest(&context, &out, &mut kept.view(), scratch, &mut rest);
                check(rest.exact());
            }
        }
        method.steer(&context, &out, &mut kept.view());
        if needs.drops_rows {
            (0..HEADS).for_each(|head| method.on_selected(out.head(head), &mut kept.memories[head]));
        }
        if needs.prefetch && rng.below(4) > 0 {
            let context = SelectContext { queries: 1, hint: &[], floors: &[], in_time: None, ..context };
            if method.prefetch(&context, &mut kept.view(), scratch, &mut out) {
                check(&out);
            }
        }
    }

    fn step(&mut self) {
        match self.rng.below(12) {
            0 => self.grow(1),
            1 => {
                let count = self.rng.below(90);
                self.grow(count);
            }
            2 => {
                let tokens = self.rng.below(self.tokens + 1);
                self.truncate(tokens);
                self.grow(20);
            }
            3 => self.observe(),
            4 => self.feedback(),
            5 => self.hint = self.rng.values(3 * 2 * HEADS * D),
            _ => self.select(),
        }
    }
}

fn live(method: &dyn Method, shape: &Shape, lie: Lie, seed: u64) {
    let mut life = Life::new(method, shape, Rng(seed | 1));
    let tokens = 20 + life.rng.below(140);
    life.grow(tokens);
    if method.needs().observe {
        life.observe();
    }
    (0..5).for_each(|_| life.feedback());
    (0..3).for_each(|_| life.select());
    for _ in 0..3 {
        life.tell(lie);
        (0..8).for_each(|_| life.step());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn whatever_is_kept_no_method_fails_and_each_selects_candidates(
        lie in prop::sample::select(vec![Lie::Random, Lie::Ones, Lie::Zeros, Lie::Words, Lie::Words, Lie::Words]),
        dtype in prop::sample::select(Dtype::ALL.to_vec()),
        seed: u64,
    ) {
        let shape = shape(dtype);
        let artifacts = artifacts(&shape);
        for text in SPECS {
            let method = build(&text.parse::<MethodSpec>().unwrap(), &shape, &artifacts).unwrap();
            let result = catch_unwind(AssertUnwindSafe(|| live(&*method, &shape, lie, seed)));
            prop_assert!(result.is_ok(), "{text}: what it says is above");
        }
    }
}

#[test]
fn no_method_is_left_out() {
    let tried: BTreeSet<&str> = SPECS.iter().filter_map(|text| text.split(':').next()).collect();
    assert_eq!(tried, names().collect());
}

/// Images whose first word says that there are more tokens than anybody has.
#[test]
fn a_number_of_tokens_that_no_memory_holds_is_not_believed() {
    let shape = shape(Dtype::F32);
    let artifacts = artifacts(&shape);
    for text in SPECS {
        let method = build(&text.parse::<MethodSpec>().unwrap(), &shape, &artifacts).unwrap();
        let mut old = vec![0; method.memory_bytes(64)];
        old.iter_mut().take(12).for_each(|byte| *byte = 0xff);
        method.grow_memory(&old, &mut vec![0; method.memory_bytes(128)]);
    }
}
