//! Certificates against the truth, many of them: over keys that break careless bounds, generated traces, and captured ones.
//!
//! ```sh
//! cargo run --release -p kvoyant-eval --example certificates            # ten million checks, some minutes on two cores
//! cargo run --release -p kvoyant-eval --example certificates -- 100000 trace.safetensors
//! ```
//!
//! A check is one query head's answer of one step: rows chosen and attended in f64, the rest estimated and merged, and what its certificate
//! says compared with dense attention in f64. Ends with an error if any certificate is below the truth; also if bounds that are wrong on
//! purpose are not found out.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use kvoyant_eval::generate::{Generator, Kind};
use kvoyant_eval::trace::Trace;
use kvoyant_kernels::{Dtype, Kernels, RestSums, SplitMix64};
use kvoyant_methods::{Artifacts, Fingerprint, Method, MethodSpec, Replay, Scratch, SelectContext, Shape};
use rayon::prelude::*;

/// Checks without an argument.
const CHECKS: usize = 10_000_000;
/// Of a hundred checks, those over generated traces; the others are adversarial. Those over captured traces, as many as their steps have, come on
/// top.
const GENERATED: usize = 4;
/// Checks of bounds that are wrong on purpose.
const CANARY: usize = 20_000;
/// Queries of one set of adversarial keys.
const QUERIES: usize = 48;

const METHODS: [&str; 6] = [
    "kvoyant:budget=3%",
    "kvoyant:budget=3%,bits=4,group=16",
    "kvoyant:budget=8,scope=head",
    "kvoyant:budget=8,bits=4,scope=layer",
    "kvoyant:max_missed_mass=0.02",
    "kvoyant:max_missed_mass=0.3,bits=4",
];

/// What attention in f32 may be off by, whatever was left out, over the largest value times the root of their number.
const ROUNDING: f64 = 1e-5;

/// Makes wrong bounds of right ones.
type Spoil = fn(&RestSums) -> RestSums;

#[derive(Debug, Default)]
struct Count {
    checks: usize,
    missed_mass: usize,
    error: usize,
    /// What certificates say over what was missed, in bins of 5 %.
    ratios: BTreeMap<u32, usize>,
    worst: Option<String>,
}

impl Count {
    fn add(mut self, other: Self) -> Self {
        self.checks += other.checks;
        self.missed_mass += other.missed_mass;
        self.error += other.error;
        other.ratios.into_iter().for_each(|(bin, count)| *self.ratios.entry(bin).or_default() += count);
        self.worst = self.worst.or(other.worst);
        self
    }

    fn median_ratio(&self) -> f64 {
        let all: usize = self.ratios.values().sum();
        let mut below = 0;
        let middle = self.ratios.iter().find(|(_, count)| {
            below += **count;
            2 * below >= all
        });
        middle.map_or(f64::NAN, |(bin, _)| 1.05_f64.powi(*bin as i32 + 1))
    }
}

/// One layer of a sequence, and how bounds are spoilt, if they are.
struct Subject<'a> {
    method: &'a dyn Method,
    shape: Shape,
    layer: usize,
    kept: &'a mut Replay,
    spoilt: Option<Spoil>,
}

impl Subject<'_> {
    /// Checks every query head of a step with `tokens` tokens.
    fn check(&mut self, tokens: usize, query: &[f32], name: &str, count: &mut Count) {
        let Shape { query_heads, kv_heads, head_dim: d, .. } = self.shape;
        let candidates = self.shape.candidates(tokens);
        let local = |t: &usize| !candidates.contains(t);
        let scale = 1.0 / (d as f64).sqrt();
        let scores: Vec<Vec<f64>> = (0..query_heads)
            .map(|head| {
                let (query, keys) = (&query[head * d..][..d], self.kept.keys(head * kv_heads / query_heads));
                let score = |key: &[f32]| {
                    key.iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>() * scale
                };
                keys.chunks_exact(d).take(tokens).map(score).collect()
            })
            .collect();
        let floors: Vec<f32> = scores
            .iter()
            .map(|scores| {
                let top = (0..tokens).filter(local).map(|t| scores[t]).fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = (0..tokens).filter(local).map(|t| (scores[t] - top).exp()).sum();
                (top + sum.ln()) as f32
            })
            .collect();
        let context =
            SelectContext { floors: &floors, ..SelectContext::new(&self.shape, self.layer, tokens, query) };
        let (chosen, rest) = self.kept.select_with_rest(self.method, &context, &mut Scratch::new());
        for (head, scores) in scores.iter().enumerate() {
            let kv_head = head * kv_heads / query_heads;
            let mut attended: Vec<bool> = (0..tokens).map(|t| local(&t)).collect();
            chosen.tokens(kv_head).for_each(|t| attended[t as usize] = true);
            let values = &self.kept.values(kv_head)[..tokens * d];
            let truth = Dense::of(scores, values, d, |_| true);
            let part = Dense::of(scores, values, d, |t| attended[t]);
            // Not one less the other: of two shares near 1 only rounding would be left.
            let left = scores.iter().zip(&attended).filter(|(_, attended)| !**attended);
            let missed: f64 = left.map(|(score, _)| (score - truth.lse).exp()).sum();
            let sums = self.spoilt.map_or(rest.sums()[head], |spoil| spoil(&rest.sums()[head]));
            let mut answer: Vec<f32> = part.out.iter().map(|value| *value as f32).collect();
            Kernels::best().merge(&mut answer, &mut [part.lse as f32], rest.mean(head), &[sums.lse()]);
            let said = sums.certify(part.lse as f32, &answer);
            let error: f64 = truth.out.iter().zip(&answer).map(|(t, a)| (t - f64::from(*a)).powi(2)).sum();
            let largest = values.iter().fold(0.0_f64, |most, value| most.max(f64::from(value.abs())));
            let short = f64::from(said.missed_mass) < missed * (1.0 - 1e-9);
            let off = f64::from(said.error) + ROUNDING * largest * (d as f64).sqrt() < error.sqrt();
            count.checks += 1;
            count.missed_mass += usize::from(short);
            count.error += usize::from(off);
            if missed > 1e-6 {
                let ratio = (f64::from(said.missed_mass) / missed).max(1.0);
                *count.ratios.entry((ratio.ln() / 1.05_f64.ln()) as u32).or_default() += 1;
            }
            if (short || off) && count.worst.is_none() {
                let error = error.sqrt();
                count.worst = Some(format!("{name}: missed {missed:.6e}, error {error:.6e}, said {said:?}"));
            }
        }
    }
}

/// Attention over some rows, in f64.
struct Dense {
    out: Vec<f64>,
    lse: f64,
}

impl Dense {
    fn of(scores: &[f64], values: &[f32], d: usize, attended: impl Fn(usize) -> bool) -> Self {
        let rows = || (0..scores.len()).filter(|t| attended(*t));
        let top = rows().map(|t| scores[t]).fold(f64::NEG_INFINITY, f64::max);
        let (mut out, mut sum) = (vec![0.0; d], 0.0);
        for t in rows() {
            let weight = (scores[t] - top).exp();
            sum += weight;
            out.iter_mut().zip(&values[t * d..]).for_each(|(o, v)| *o += weight * f64::from(*v));
        }
        out.iter_mut().for_each(|o| *o /= sum);
        Self { out, lse: top + sum.ln() }
    }
}

/// Keys of kinds that break careless bounds, `[tokens][heads · d]`.
fn adversarial(kind: usize, tokens: usize, width: usize, random: &mut SplitMix64) -> Vec<f32> {
    let mut keys: Vec<f32> = (0..tokens * width).map(|_| random.normal()).collect();
    for (t, row) in keys.chunks_exact_mut(width).enumerate() {
        match kind {
            0 => {}
            // Nearly constant channels, far from zero.
            1 => row.iter_mut().step_by(4).for_each(|k| *k = 1000.0 + *k * 1e-2),
            2 => row.iter_mut().for_each(|k| *k *= 30.0),
            // Ties everywhere.
            3 => row.fill(0.25),
            // One channel of a row.
            4 => row[t % width] *= 1000.0,
            // The edges of f16.
            5 => row.iter_mut().skip(2).step_by(8).for_each(|k| *k = k.signum() * 65000.0),
            6 => row.iter_mut().for_each(|k| *k *= 1e-7),
            7 => row.iter_mut().for_each(|k| *k = if *k > 2.0 { 60000.0 } else { *k * 1e-6 }),
            _ => row.iter_mut().for_each(|k| *k += 3.0 * (t as f32 * 0.1).sin()),
        }
    }
    keys
}

const KINDS: usize = 9;

/// Checks of one set of adversarial keys, among them those of a sequence so short that little or nothing can be left out.
fn of_keys(seed: u64, spoilt: Option<Spoil>) -> Count {
    let mut random = SplitMix64::new(seed);
    let kind = seed as usize % KINDS;
    let method = METHODS[(seed as usize / KINDS) % METHODS.len()];
    let shape = Shape {
        layers: 1,
        query_heads: 4,
        kv_heads: 2,
        head_dim: 8,
        value_dim: 8,
        page_rows: if seed.is_multiple_of(2) { 32 } else { 96 },
        sinks: 2,
        window: 8,
        dense_layers: 0,
        dtype: Dtype::F16,
        fingerprint: Fingerprint([0; 16]),
    };
    let tokens = 12 + random.below(300);
    let spec: MethodSpec = method.parse().expect("the methods here are written as they are read");
    let method = kvoyant_methods::build(&spec, &shape, &Artifacts::none()).expect("any model will do");
    let mut kept = Replay::new(&*method, &shape, 0, tokens);
    let keys = adversarial(kind, tokens, 16, &mut random);
    let values: Vec<f32> = (0..tokens * 16).map(|_| random.normal() + 1.0).collect();
    kept.append_rows(&*method, &keys, &values, 29);
    let mut count = Count::default();
    let name = format!("{spec}, kind {kind}, seed {seed}");
    let mut subject = Subject { method: &*method, shape, layer: 0, kept: &mut kept, spoilt };
    for _ in 0..QUERIES {
        let scale = 0.01 + 4.0 * random.unit() as f32;
        let query: Vec<f32> = (0..32).map(|_| random.normal() * scale).collect();
        subject.check(tokens, &query, &name, &mut count);
    }
    count
}

/// Checks of every step of one layer of a trace.
fn of_trace(trace: &Trace, layer: usize, method: &str, name: &str) -> Count {
    let shape = trace.methods_shape(32);
    let spec: MethodSpec = method.parse().expect("the methods here are written as they are read");
    let method = kvoyant_methods::build(&spec, &shape, &Artifacts::none()).expect("any model will do");
    let mut kept = Replay::new(&*method, &shape, layer, trace.shape.tokens);
    let (heads, d) = (shape.kv_heads, shape.head_dim);
    // `[tokens][Hkv][d]`, as rows are appended.
    let rows = |of: fn(&Trace, usize, usize) -> &[f32]| -> Vec<f32> {
        (0..trace.shape.tokens)
            .flat_map(|t| {
                (0..heads).flat_map(move |head| of(trace, layer, head)[t * d..][..d].iter().copied())
            })
            .collect()
    };
    kept.append_rows(&*method, &rows(Trace::keys), &rows(Trace::values), 64);
    let mut count = Count::default();
    let name = format!("{spec}, {name}, layer {layer}");
    let mut subject = Subject { method: &*method, shape, layer, kept: &mut kept, spoilt: None };
    for step in 0..trace.shape.steps {
        let tokens = trace.shape.tokens - trace.shape.steps + step + 1;
        subject.check(tokens, trace.query(layer, step), &name, &mut count);
    }
    count
}

/// Batches until there are so many checks.
fn until(wanted: usize, batch: impl Fn(u64) -> Count + Sync) -> Count {
    let (mut all, mut next) = (Count::default(), 0);
    while all.checks < wanted {
        let found = (next..next + 64).into_par_iter().map(&batch).reduce(Count::default, Count::add);
        (all, next) = (all.add(found), next + 64);
    }
    all
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let checks = match arguments.next().map(|text| text.parse::<usize>()) {
        None => CHECKS,
        Some(Ok(checks)) => checks,
        Some(Err(error)) => {
            eprintln!("the first argument is how many checks to make: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut traces = Vec::new();
    for path in arguments {
        match Trace::read(Path::new(&path)) {
            Ok(trace) => traces.push((path, trace)),
            Err(error) => {
                eprintln!("{path}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    let generated = checks * GENERATED / 100;
    println!(
        "{:<13} {:>10} {:>22} {:>18} {:>16}",
        "keys", "checks", "missed mass too low", "error too low", "median ratio"
    );
    let mut ok = true;
    let mut show = |name: &str, count: &Count| {
        let (short, off, ratio) = (count.missed_mass, count.error, count.median_ratio());
        println!("{name:<13} {:>10} {short:>22} {off:>18} {ratio:>16.2}", count.checks);
        if let Some(worst) = &count.worst {
            println!("    {worst}");
        }
        ok &= short + off == 0;
    };
    show("adversarial", &until(checks - generated, |seed| of_keys(seed, None)));
    if generated > 0 {
        let batch = |seed: u64| {
            let kind = Kind::ALL[seed as usize % Kind::ALL.len()];
            let trace = Generator { tokens: 1024, layers: 1, ..Generator::new(kind, seed) }.trace();
            of_trace(&trace, 0, METHODS[(seed as usize / Kind::ALL.len()) % METHODS.len()], &trace.source)
        };
        show("generated", &until(generated, batch));
    }
    if !traces.is_empty() {
        let layers: Vec<_> = traces
            .iter()
            .flat_map(|(path, trace)| {
                (trace.shape.dense_layers..trace.shape.layers).map(move |l| (path, trace, l))
            })
            .collect();
        // As many methods as there are; a trace has no more to say than its own steps.
        let all: Vec<_> =
            METHODS.iter().flat_map(|method| layers.iter().map(move |of| (method, of))).collect();
        let one = |(method, (path, trace, layer)): &(&&str, &(&String, &Trace, usize))| {
            of_trace(trace, *layer, method, path)
        };
        show("captured", &all.par_iter().map(one).reduce(Count::default, Count::add));
    }
    let spoils: [(&str, Spoil); 2] = [
        ("no margins", |sums| RestSums { upper: sums.weight, ..*sums }),
        ("no spreads", |sums| RestSums { spread: 0.0, ..*sums }),
    ];
    for (name, spoil) in spoils {
        let count = until(CANARY, |seed| of_keys(seed, Some(spoil)));
        let found = count.missed_mass + count.error;
        println!("canary, {name}: {found} of {} are found out", count.checks);
        ok &= found > 0;
    }
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
