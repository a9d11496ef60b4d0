//! Traces and the daemon count alike: for the same keys and queries a method selects the same rows in plain memory and in the
//! daemon, and as many bytes move as the model of residency says that traces are replayed with.

use kvoyant_client::{Hint, Member, Model, Sequence};
use kvoyant_eval::residency::Resident;
use kvoyant_methods::{
    Artifacts, Dtype, HintSource, Method, Replay, RowPart, Scratch, SelectContext, Shape, registry,
};
use kvoyant_protocol::wire::Stat;
use kvoyant_tests::{Daemon, PATIENCE, fake, wait_until};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const D: usize = fake::HEAD_DIM;
const LAYER: usize = 1;
const PROMPT: usize = 300;

/// Numbers in `[-1, 1)` that depend on where they belong.
fn noise(count: usize, seed: usize) -> Vec<f32> {
    let mut state = seed as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn keys_of(token: usize) -> Vec<f32> {
    noise(fake::KV_HEADS * D, token + 1)
}

/// The method in a form that nobody has to calibrate, and with a small budget where it has one.
fn spec_of(name: &str) -> String {
    let options = match name {
        "infinigen" => "budget=10%,skew=off",
        "shadowkv" => "budget=10%,rank=8",
        "hata" | "clo" => "budget=10%,weights=random",
        "attention-predictor" => "budget=10%,weights=average",
        "hetero" => "budget=10%,roles=none",
        "louver" => "budget=10%,cap=10%",
        // What is resident is named beside the selection.
        "kvoyant" => "budget=10%,resident=off",
        "full" | "given" | "window" => return name.to_owned(),
        "mix" => return "mix:rest=(quest:budget=10%)".to_owned(),
        _ => "budget=10%",
    };
    format!("{name}:{options}")
}

struct Pair {
    model: Model,
    sequence: Sequence,
    method: Box<dyn Method>,
    shape: Shape,
    replay: Replay,
}

impl Pair {
    fn new(daemon: &Daemon, spec: &str) -> Self {
        let model = fake::connect(daemon, &[spec]);
        let shape = Shape {
            layers: fake::LAYERS,
            query_heads: fake::QUERY_HEADS,
            kv_heads: fake::KV_HEADS,
            head_dim: D,
            value_dim: D,
            page_rows: model.page_rows(),
            sinks: fake::SINKS,
            window: fake::WINDOW,
            dense_layers: 1,
            dtype: Dtype::F32,
            fingerprint: model.spec().fingerprint.parse().unwrap(),
        };
        let method = kvoyant_methods::build(&spec.parse().unwrap(), &shape, &Artifacts::none()).unwrap();
        let replay = Replay::new(&*method, &shape, LAYER, 512);
        let sequence = model.open(0, 0).unwrap();
        Self { model, sequence, method, shape, replay }
    }

    fn extend(&mut self, tokens: usize) {
        let range = self.replay.tokens()..tokens;
        self.model.reserve(&[(&self.sequence, tokens)]).unwrap();
        for layer in 0..fake::LAYERS {
            for token in range.clone() {
                let values = noise(fake::KV_HEADS * D, 100_000 + token);
                self.sequence.write(layer, token, &keys_of(token), &values).unwrap();
            }
        }
        self.model.append(&[(&self.sequence, range.len())]).unwrap();
        let keys: Vec<f32> = range.flat_map(keys_of).collect();
        self.replay.append(&*self.method, &keys, usize::MAX);
    }

    fn observe(&mut self) {
        if !self.method.needs().observe {
            return;
        }
        let sums: Vec<f32> = noise(fake::KV_HEADS * D, 7).iter().map(|sum| sum.abs()).collect();
        for layer in 0..fake::LAYERS {
            self.model.observe(&self.sequence, layer, &sums).unwrap();
        }
        for (head, sums) in sums.chunks(D).enumerate() {
            self.replay.observe(&*self.method, head, sums);
        }
    }
}

#[test]
fn every_method_selects_and_moves_in_the_daemon_what_it_does_in_a_replay() {
    let daemon = Daemon::start(DAEMON, &[]);
    for name in registry::names() {
        let spec = spec_of(name);
        let mut pair = Pair::new(&daemon, &spec);
        pair.extend(PROMPT);
        pair.observe();
        let needs = pair.method.needs();
        let part = if needs.part == RowPart::Values { 1 } else { 2 };
        let row_bytes = (part * D * Dtype::F32.bytes()) as u64;
        // Room for all that is ever selected: which rows leave a full slab is the daemon's own rule, by pages of slots.
        let mut resident = vec![Resident::new(PROMPT); fake::KV_HEADS];
        let (mut ahead, mut scratch) = (0, Scratch::new());
        // Cold, the same again, and another query.
        for (step, seed) in [3, 3, 4].into_iter().enumerate() {
            let tokens = PROMPT + step;
            pair.extend(tokens);
            // What was planned for this step is brought between two requests.
            wait_until(&format!("{spec}: {ahead} rows brought ahead"), || {
                pair.model.stat(Stat::PrefetchedRows) as usize == ahead
            });
            let query = noise(fake::QUERY_HEADS * D, seed);
            let named: Vec<u32> = (20..40).map(|token| token * seed as u32).collect();
            let ids: Vec<u32> =
                (0..fake::KV_HEADS).flat_map(|_| std::iter::once(20).chain(named.clone())).collect();
            let hint = match needs.hint {
                HintSource::None => Hint::None,
                HintSource::Ids => Hint::Ids(&ids),
                _ => Hint::Query(&query),
            };
            let member = Member { sequence: &pair.sequence, position: tokens - 1, hint };
            let ready = pair.model.speculate(LAYER, &[member]).unwrap().wait(PATIENCE).unwrap();
            let context = SelectContext {
                ids: if needs.hint == HintSource::Ids { &ids } else { &[] },
                sequence_seed: 1,
                step: step as u64,
                ..SelectContext::new(
                    &pair.shape,
                    LAYER,
                    tokens,
                    if needs.hint.is_query() { &query } else { &[] },
                )
            };
            let selection = pair.replay.select_with(&*pair.method, &context, &mut scratch);
            let completion = *ready.completion();
            let rows: usize = (0..fake::KV_HEADS).map(|head| selection.rows(head)).sum();
            assert_eq!(completion.rows_selected as usize, rows, "{spec}, step {step}");
            if name == "random" {
                // Its draws depend on the sequence's own seed, so that only how many there are can be compared.
                assert_eq!(
                    completion.bytes_moved,
                    u64::from(completion.rows_selected - completion.rows_hit) * row_bytes
                );
                continue;
            }
            let missing: usize = resident
                .iter_mut()
                .enumerate()
                .map(|(head, resident)| resident.take(selection.head(head)).missing)
                .sum();
            if needs.cpu_attention.is_some() {
                // What is missing is attended where it lies, and, where that is much, fetched behind the answer's back.
                assert_eq!(completion.bytes_moved, 0, "{spec}, step {step}");
                let partial = ready.partial(0).map_or(0, |partial| partial.rows as usize);
                assert_eq!(partial, missing, "{spec}, step {step}");
                ahead += missing;
            } else {
                for head in 0..fake::KV_HEADS {
                    let found: Vec<u32> = ready
                        .tokens(0, head)
                        .flat_map(|run| run.token as u32..(run.token + run.rows) as u32)
                        .collect();
                    assert_eq!(found, selection.tokens(head).collect::<Vec<_>>(), "{spec}, step {step}");
                }
                assert_eq!(completion.bytes_moved, missing as u64 * row_bytes, "{spec}, step {step}");
            }
            drop(ready);
            if needs.prefetch
                && let Some(next) = pair.replay.prefetch(&*pair.method, &mut scratch)
            {
                ahead += resident
                    .iter_mut()
                    .enumerate()
                    .map(|(head, resident)| resident.take(next.head(head)).missing)
                    .sum::<usize>();
            }
        }
    }
}
