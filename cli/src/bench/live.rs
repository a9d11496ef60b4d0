//! Rows from a real model: one daemon, texts read once, every method on forks of them.

use std::sync::Arc;

use kvoyant_engine::{DaemonKv, DaemonSequence, Decoder, DecoderOptions, Format, IdsRequest, KvShape, Model};
use kvoyant_eval::replay::estimate_bytes;
use kvoyant_eval::row::{Row, Skipped};
use kvoyant_eval::tasks::Task;
use kvoyant_kernels::{Kernels, TopKScratch};
use kvoyant_methods::full::{self, FullSpec};
use kvoyant_methods::{Budget, DigestKey, HintSource, MethodSpec, Needs, Shape};

use super::compared::{Clusters, Sample, by_task};
use super::cost::Cost;
use super::ladder::{PLAIN, Rung};
use super::{BenchError, Effort};
use crate::args::MethodsArgs;
use crate::private_daemon::PrivateDaemon;
use crate::progress::Progress;
use crate::session::{self, Hints};
use crate::trial::measure::{Asked, Measured};
use crate::trial::plan::{Plan, Size};
use crate::trial::prepare::{self, Prepared};

/// How much of the largest batch's KV the device can hold: a cache, as a GPU's would be, not a second copy.
const SLAB_SHARE: f64 = 0.3;

/// What rows call a real model.
const SOURCE: &str = "model";

/// Methods that one session takes at most.
const METHODS_OF_A_SESSION: usize = 60;

/// Rows of a page, as the daemon has them by default.
const PAGE_ROWS: usize = 32;

/// Sequences whose digests and memories there is room for besides those that are open.
const HELD_BESIDE: usize = 6;

/// What the methods before leave of tables is in pieces, of which the longest may not do for the next one's.
const PIECES: f64 = 1.5;

/// Bytes of arena for each byte of tables and digests: they may take a quarter of it.
const ARENA_FOR_TABLES: usize = 4;

/// What a length gave.
#[derive(Debug)]
pub(super) struct Found {
    /// One a method.
    pub(super) samples: Vec<Sample>,
    /// What has none.
    pub(super) skipped: Vec<Skipped>,
    /// The daemon's device.
    pub(super) device: String,
}

impl Effort {
    /// What is asked in texts of `context` tokens.
    fn size(self, context: usize) -> Size {
        let (contexts, continuations, steps) = match self {
            Self::Quick => (1, 6, 16),
            Self::Long => (3, 12, 24),
        };
        let kinds = [&Task::FACTS[..], &Task::WORDS[..]];
        Size { context, contexts: kinds.repeat(contexts), continuations, steps, room: 160 }
    }
}

/// Every method on texts of `length` tokens.
pub(super) fn rows(
    model: &Arc<Model>,
    length: usize,
    rungs: &[Rung],
    effort: Effort,
    args: &MethodsArgs,
    progress: Progress,
) -> Result<Found, BenchError> {
    let size = effort.size(length);
    let plan = Plan::new(model, &size, None, args.seed)?;
    let mut asked = Asked::new(&plan);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut found = Found { samples: Vec::new(), skipped: Vec::new(), device: String::new() };
    for (at, (format, rungs)) in sessions(rungs).into_iter().enumerate() {
        let shape = KvShape::new(model.config(), format);
        if let Err(error) = shape.check() {
            found.skipped.extend(rungs.iter().map(|rung| Skipped {
                spec: rung.spec.to_string(),
                format: format.to_string(),
                source: SOURCE.into(),
                reason: error.to_string(),
            }));
            continue;
        }
        let mut methods: Vec<MethodSpec> = rungs.iter().map(|rung| rung.spec.clone()).collect();
        // Texts are read by the first method, which keeps nothing of them, unless it is the only one that may.
        let before = usize::from(!pooled(&rungs[0]) && methods[0].name() != full::NAME);
        methods.splice(0..0, std::iter::repeat_n(MethodSpec::new(FullSpec), before));
        let options =
            session::options(model, methods.clone(), length + size.room, asked.batch_max(), progress)?;
        let methods_shape = options.shape(&shape, PAGE_ROWS);
        let artifacts = options.artifacts.clone();
        let hints = Hints::new(model, &artifacts)?;
        let built = methods
            .iter()
            .map(|spec| kvoyant_methods::build(spec, &methods_shape, &artifacts))
            .collect::<Result<Vec<_>, _>>()?;
        let batch_tokens = asked.batch_max() * length;
        let kept =
            kept_bytes(&built, &methods_shape, (asked.sequences(), asked.batch_max()), length + size.room);
        let mut arguments = args.daemon.for_serve();
        arguments.extend(session::sizes(
            &shape,
            plan.prefill_tokens()
                + 2 * asked.batch_max() * size.room
                + ARENA_FOR_TABLES * (kept as usize).div_ceil(shape.token_bytes()),
            (batch_tokens as f64 * SLAB_SHARE) as usize,
            args.daemon.host_budget,
        ));
        let daemon = PrivateDaemon::start(&arguments)?;
        let failed = |error| BenchError::Daemon { error, said: daemon.last_words() };
        let mut kv: DaemonKv = session::connect_as(format, model, &daemon.socket(), options)?;
        let mut prepared = prepare::read(&mut decoder, &mut kv, &plan, progress).map_err(failed)?;
        let step = progress.step(format!("{length} tokens: dense"), methods.len() as u64 + 1);
        if at == 0 {
            // The first session has plain rows: what others are compared with.
            let (mut dense, mut copied) =
                prepare::copy(&mut kv, &prepared, &shape).map_err(|error| failed(error.into()))?;
            let measured = asked.dense_row(&mut decoder, &mut dense, &mut copied)?;
            found.samples.push(sample(&DENSE, length, &measured));
        }
        found.device = session::device(&kv);
        let mut kind: Option<(Option<DigestKey>, Prepared<DaemonSequence>)> = None;
        for (rung, method) in rungs.iter().zip(before..) {
            let spec = &rung.spec;
            if spec.hint() == HintSource::Ids
                && let Some(budget) = rung.budget
            {
                let (sinks, window) = (methods_shape.sinks, methods_shape.window);
                kv.set_ids(move |request| best(request, budget, sinks, window));
            }
            step.advance(1);
            step.rename(format!("{length} tokens: {spec}"));
            // What was read stays for the rows to come: what every method keeps of it would add up there. Digests are shared by
            // all budgets of a kind, memories are one row's.
            let needs = built[method].needs();
            let key = built[method].digest_key();
            let apart = needs.memory && !needs.drops_rows;
            if !needs.memory && kind.as_ref().is_none_or(|(last, _)| *last != key) {
                if let Some((_, last)) = kind.take() {
                    last.close(&kv).map_err(|error| failed(error.into()))?;
                }
                kind = Some((key, prepared.forked(&mut kv).map_err(|error| failed(error.into()))?));
            }
            let of = kind.as_mut().filter(|_| !needs.memory).map_or(&mut prepared, |(_, forks)| forks);
            decoder.set_hint_norm(hints.of(spec));
            let measured = asked.row_of(&mut decoder, &mut kv, of, method, apart).map_err(failed)?;
            let digest = digest_bytes(&*built[method], &methods_shape, length);
            let told = Told {
                method: spec.name(),
                spec: &spec.to_string(),
                hint: spec.hint(),
                budget: rung.budget.and_then(Budget::as_share),
                row_format: &format.to_string(),
                kv_bytes: (length * shape.token_bytes()) as f64,
                selected_layers: (0..shape.layers).filter(|layer| kv.speculates(*layer)).count(),
                layers: shape.layers,
                digest,
                attends_resident: needs.attend_resident,
                partial_bytes: partial_bytes(&needs, &methods_shape),
            };
            found.samples.push(sample(&told, length, &measured));
        }
    }
    let clusters = Clusters {
        continuations: plan.continued.iter().map(|text| text.starts.len()).sum(),
        questions: plan.contexts.iter().map(|context| context.questions.len()).collect(),
    };
    found.samples.iter_mut().for_each(|sample| sample.clusters = clusters.clone());
    Ok(found)
}

/// Bytes of what the CPU attends or estimates for a layer and hands over instead of rows.
fn partial_bytes(needs: &Needs, shape: &Shape) -> f64 {
    let attended = needs.cpu_attention.is_some() || (needs.rest && needs.hint != HintSource::Current);
    let partial = usize::from(attended) * (shape.value_dim + 1) * size_of::<f32>();
    let estimate = usize::from(needs.rest) * estimate_bytes(shape.value_dim);
    (shape.query_heads * (partial + estimate)) as f64
}

/// The candidates with most of the attention of each KV head (mean over its group), as an engine with native sparse attention would name
/// them.
fn best(request: &IdsRequest<'_>, budget: Budget, sinks: usize, window: usize) -> Vec<Vec<u32>> {
    let tokens = request.position + 1;
    let candidates = sinks..tokens.saturating_sub(window).max(sinks);
    let (kernels, mut scratch) = (Kernels::best(), TopKScratch::default());
    let wanted = budget.rows_of(tokens).min(candidates.len());
    request
        .heads()
        .map(|head| {
            let scores = (request.scores)(head);
            let mut mean = vec![0.0; tokens];
            for row in scores.chunks_exact(tokens) {
                kernels.softmax_add(row, 1.0, &mut mean);
            }
            let mut ids = Vec::new();
            kernels.top_k(&mean[candidates.clone()], wanted, &mut scratch, &mut ids);
            ids.sort_unstable();
            ids.iter_mut().for_each(|id| *id += candidates.start as u32);
            ids
        })
        .collect()
}

/// Rows by sessions: all that can share one in as few as possible, each method that drops rows for good and each other format
/// of rows in one of its own.
fn sessions(rungs: &[Rung]) -> Vec<(Format, Vec<Rung>)> {
    let (alone, shared): (Vec<&Rung>, Vec<&Rung>) = rungs.iter().partition(|rung| pooled(rung));
    let (shared, stored): (Vec<&Rung>, Vec<&Rung>) =
        shared.into_iter().partition(|rung| rung.format == PLAIN);
    let mut all: Vec<(Format, Vec<Rung>)> = shared
        .chunks(METHODS_OF_A_SESSION)
        .map(|chunk| (PLAIN, chunk.iter().map(|rung| (*rung).clone()).collect()))
        .collect();
    if all.is_empty() {
        // Dense needs all rows as they are: what it is compared with may have dropped some.
        let full = MethodSpec::new(FullSpec);
        all.push((PLAIN, vec![Rung { spec: full, budget: None, format: PLAIN }]));
    }
    for rung in stored {
        match all
            .iter_mut()
            .find(|(format, rungs)| *format == rung.format && rungs.len() < METHODS_OF_A_SESSION)
        {
            Some((_, rungs)) => rungs.push(rung.clone()),
            None => all.push((rung.format, vec![rung.clone()])),
        }
    }
    all.extend(alone.into_iter().map(|rung| (rung.format, vec![rung.clone()])));
    all
}

/// Whether its rows are dropped for good.
fn pooled(rung: &Rung) -> bool {
    rung.spec.to_string().contains("pool=")
}

/// Bytes of digests, states and memories of one layer of a sequence of `tokens` tokens in the daemon.
fn in_daemon(method: &dyn kvoyant_methods::Method, shape: &Shape, tokens: usize) -> usize {
    let pages = tokens.div_ceil(shape.page_rows) * method.digest_bytes();
    shape.kv_heads * (pages + method.head_state_bytes() + method.memory_bytes(tokens))
}

/// The same of all layers, with what the engine keeps for the method.
fn digest_bytes(method: &dyn kvoyant_methods::Method, shape: &Shape, tokens: usize) -> f64 {
    let of_layer = in_daemon(method, shape, tokens) + method.device_bytes(tokens);
    ((shape.layers - shape.dense_layers) * of_layer) as f64
}

/// Bytes of digests and memories that a session may hold at once. Of a method that shares its digests they are those of all
/// `sequences`, of one with memories those of a `batch` of its own, and of some more: while one is forked or grows, the daemon wants room
/// for both.
fn kept_bytes(
    methods: &[Box<dyn kvoyant_methods::Method>],
    shape: &Shape,
    (sequences, batch): (usize, usize),
    tokens: usize,
) -> f64 {
    let kept = |method: &dyn kvoyant_methods::Method| {
        let needs = method.needs();
        let held = if needs.memory && !needs.drops_rows { batch } else { sequences + batch };
        // Memories grow by doubling.
        let tokens = if needs.memory { tokens.next_power_of_two() } else { tokens };
        (in_daemon(method, shape, tokens) * (held + HELD_BESIDE)) as f64 * PIECES
    };
    // The daemon keeps them for dense layers too.
    methods.iter().map(|method| kept(&**method)).fold(0.0, f64::max) * shape.layers as f64
}

/// What is known of a method besides what was measured.
struct Told<'a> {
    method: &'a str,
    spec: &'a str,
    hint: HintSource,
    budget: Option<f64>,
    row_format: &'a str,
    /// Bytes of all rows of a sequence.
    kv_bytes: f64,
    selected_layers: usize,
    layers: usize,
    digest: f64,
    attends_resident: bool,
    /// Bytes of a layer's partial attention, where the CPU attends.
    partial_bytes: f64,
}

/// Plain attention in this process, as a method.
const DENSE: Told<'static> = Told {
    method: "dense",
    spec: "dense",
    hint: HintSource::None,
    budget: None,
    row_format: "f16",
    kv_bytes: 0.0,
    selected_layers: 0,
    layers: 0,
    digest: 0.0,
    attends_resident: false,
    partial_bytes: 0.0,
};

fn sample(told: &Told<'_>, length: usize, measured: &Measured) -> Sample {
    let costs = &measured.costs;
    let partials = told.partial_bytes * told.selected_layers as f64;
    let selected_bytes = told.kv_bytes * told.selected_layers as f64 / told.layers.max(1) as f64;
    let cost = Cost {
        hint: told.hint,
        kv_bytes: selected_bytes,
        layers: told.selected_layers,
        bytes_per_token: costs.bytes_per_token + partials,
        bytes_per_token_steady: costs.bytes_per_token_steady + partials,
        feedback_bytes_per_token: costs.feedback_bytes_per_token,
        ahead_bytes_per_token: costs.ahead_bytes_per_token,
        selected_share: costs.selected_share,
        cpu_share: costs.cpu_share,
        resident_share: costs.resident_share,
        attends_resident: told.attends_resident,
        digest_bytes: told.digest,
        select_us: costs.select_us,
        hit_rate: costs.hit_rate,
    };
    let scores: Vec<(String, f64)> =
        measured.scores.iter().map(|(task, score)| (task.name().to_owned(), *score)).collect();
    let accuracy = scores.iter().map(|(_, score)| score).sum::<f64>() / scores.len().max(1) as f64;
    let row = Row {
        method: told.method.to_owned(),
        spec: told.spec.to_owned(),
        row_format: told.row_format.to_owned(),
        source: SOURCE.into(),
        length,
        budget: told.budget,
        tasks: by_task(&scores),
        accuracy: Some(accuracy),
        tokens_equal_dense: Some(measured.agreement.equal()),
        kl_to_dense: Some(measured.agreement.kl()),
        perplexity: Some(measured.agreement.perplexity()),
        attention_mass: costs.attention_mass,
        missed_mass: costs.attention_mass.map(|mass| 1.0 - mass),
        top_k_recall: costs.top_k_recall,
        output_error: costs.output_error,
        certified_missed_mass: costs.certified_missed_mass,
        certificate_ratio: costs.certificate_ratio,
        certificate_violations: costs.certificate_violations,
        kv_moved_share: costs.kv_moved_share + partials / told.kv_bytes.max(1.0),
        ms_per_token: Some(measured.clock.ms_per_token()),
        stall_share: Some(costs.stall_share),
        ..cost.row()
    };
    Sample { row, kl: measured.agreement.kls().to_vec(), scores, ..Sample::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_with_a_pool_have_a_session_of_their_own_and_no_session_has_too_many() {
        let parse = |text: &str| Rung { spec: text.parse().unwrap(), budget: None, format: PLAIN };
        let mut rungs = vec![parse("infinigen:budget=6%,pool=80%"), parse("full")];
        rungs.extend((1..=70).map(|i| parse(&format!("random:budget={i}%"))));
        rungs.push(Rung { format: Format::Int4 { group: 64 }, ..parse("full") });
        let sessions = sessions(&rungs);
        let sizes: Vec<usize> = sessions.iter().map(|(_, rungs)| rungs.len()).collect();
        assert_eq!(sizes, [60, 11, 1, 1]);
        assert_eq!(sessions[2].0, Format::Int4 { group: 64 });
        assert_eq!(sessions[3].1[0], rungs[0]);
        let alone = super::sessions(&rungs[..1]);
        assert_eq!(alone.len(), 2);
        assert_eq!((alone[0].0, alone[0].1[0].spec.name()), (PLAIN, "full"));
    }
}
