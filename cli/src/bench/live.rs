//! Rows from a real model: one daemon, texts read once, every method on forks of them.

use std::sync::Arc;

use kvoyant_engine::{DaemonKv, Decoder, DecoderOptions, Format, IdsRequest, KvShape, Model};
use kvoyant_eval::model::{self as modelled, Seen};
use kvoyant_eval::row::Row;
use kvoyant_eval::tasks::Task;
use kvoyant_kernels::{Kernels, TopKScratch};
use kvoyant_methods::full::FullSpec;
use kvoyant_methods::{Budget, HintSource, MethodSpec, Shape};

use super::compared::{Clusters, Sample, by_task};
use super::ladder::{PLAIN, Rung};
use super::{BenchError, Effort};
use crate::args::MethodsArgs;
use crate::private_daemon::PrivateDaemon;
use crate::progress::Progress;
use crate::session;
use crate::trial::measure::{Asked, Measured};
use crate::trial::plan::{Plan, Size};
use crate::trial::prepare;

/// How much of the largest batch's KV the device can hold: a cache, as a GPU's would be, not a second copy.
const SLAB_SHARE: f64 = 0.3;

/// Methods that one session takes at most.
const METHODS_OF_A_SESSION: usize = 60;

/// Rows of a page, as the daemon has them by default.
const PAGE_ROWS: usize = 32;

/// Bytes of arena for each byte of tables and digests: they may take a quarter of it.
const ARENA_FOR_TABLES: usize = 4;

/// What a length gave.
#[derive(Debug)]
pub(super) struct Found {
    /// One a method.
    pub(super) samples: Vec<Sample>,
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
    let mut found = Found { samples: Vec::new(), device: String::new() };
    for (at, (format, rungs)) in sessions(rungs).into_iter().enumerate() {
        let shape = KvShape::new(model.config(), format);
        if let Err(error) = shape.check() {
            progress.note(&format!("rows as {format} are left out: {error}"));
            continue;
        }
        let methods: Vec<MethodSpec> = rungs.iter().map(|rung| rung.spec.clone()).collect();
        let options =
            session::options(model, methods.clone(), length + size.room, asked.batch_max(), progress)?;
        let methods_shape = options.shape(&shape, PAGE_ROWS);
        let artifacts = options.artifacts.clone();
        let built = methods
            .iter()
            .map(|spec| kvoyant_methods::build(spec, &methods_shape, &artifacts))
            .collect::<Result<Vec<_>, _>>()?;
        let batch_tokens = asked.batch_max() * length;
        let kept =
            kept_bytes(&built, &methods_shape, plan.prefill_tokens(), asked.batch_max(), length + size.room);
        let mut arguments = args.daemon.for_serve();
        arguments.extend(session::sizes(
            &shape,
            plan.prefill_tokens()
                + 2 * asked.batch_max() * size.room
                + ARENA_FOR_TABLES * (kept as usize).div_ceil(shape.token_bytes()),
            (batch_tokens as f64 * SLAB_SHARE) as usize,
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
        for (method, rung) in rungs.iter().enumerate() {
            let spec = &rung.spec;
            if spec.hint() == HintSource::Ids
                && let Some(budget) = rung.budget
            {
                let (sinks, window) = (methods_shape.sinks, methods_shape.window);
                kv.set_ids(move |request| best(request, budget, sinks, window));
            }
            step.advance(1);
            step.rename(format!("{length} tokens: {spec}"));
            let measured = asked.row_of(&mut decoder, &mut kv, &mut prepared, method).map_err(failed)?;
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
                partial_bytes: if built[method].needs().cpu_attention.is_some() {
                    (methods_shape.query_heads * (methods_shape.head_dim + 1) * size_of::<f32>()) as f64
                } else {
                    0.0
                },
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

/// The tokens with the largest true scores of each KV head (mean over its group of the softmax), as an engine with native sparse
/// attention would name them.
fn best(request: &IdsRequest<'_>, budget: Budget, sinks: usize, window: usize) -> Vec<Vec<u32>> {
    let tokens = request.position + 1;
    let candidates = sinks..tokens.saturating_sub(window).max(sinks);
    let (kernels, mut scratch) = (Kernels::best(), TopKScratch::default());
    let wanted = budget.rows_of(tokens).min(candidates.len());
    request
        .heads()
        .map(|head| {
            let scores = (request.scores)(head);
            let mut mean = vec![0.0; candidates.len()];
            for row in scores.chunks_exact(request.position.max(1)) {
                kernels.softmax_add(&row[candidates.clone()], 1.0, &mut mean);
            }
            let mut ids = Vec::new();
            kernels.top_k(&mean, wanted, &mut scratch, &mut ids);
            ids.sort_unstable();
            ids.iter_mut().for_each(|id| *id += candidates.start as u32);
            ids
        })
        .collect()
}

/// Rows by sessions: all that can share one in as few as possible, each method that drops rows for good and each other format
/// of rows in one of its own.
fn sessions(rungs: &[Rung]) -> Vec<(Format, Vec<Rung>)> {
    let pooled = |rung: &&Rung| rung.spec.to_string().contains("pool=");
    let (alone, shared): (Vec<&Rung>, Vec<&Rung>) =
        rungs.iter().partition(|rung| pooled(rung) || rung.format != PLAIN);
    let mut all: Vec<(Format, Vec<Rung>)> = shared
        .chunks(METHODS_OF_A_SESSION)
        .map(|chunk| (PLAIN, chunk.iter().map(|rung| (*rung).clone()).collect()))
        .collect();
    if all.is_empty() {
        // Dense needs all rows as they are: what it is compared with may have dropped some.
        let full = MethodSpec::new(FullSpec);
        all.push((PLAIN, vec![Rung { spec: full, budget: None, format: PLAIN }]));
    }
    all.extend(alone.into_iter().map(|rung| (rung.format, vec![rung.clone()])));
    all
}

/// Bytes of digests, states and memories of one sequence of `tokens` tokens, and of what the engine keeps for the method.
fn digest_bytes(method: &dyn kvoyant_methods::Method, shape: &Shape, tokens: usize) -> f64 {
    let pages = tokens.div_ceil(shape.page_rows) * method.digest_bytes();
    let of_head = pages + method.head_state_bytes() + method.memory_bytes(tokens);
    ((shape.layers - shape.dense_layers) * (shape.kv_heads * of_head + method.device_bytes(tokens))) as f64
}

/// Bytes of digests and memories that a session may hold at once: digests of every method for what was read, and those of the
/// largest for a whole batch of its own.
fn kept_bytes(
    methods: &[Box<dyn kvoyant_methods::Method>],
    shape: &Shape,
    read: usize,
    batch: usize,
    tokens: usize,
) -> f64 {
    let mut names = std::collections::BTreeSet::new();
    let kinds = methods.iter().filter(|method| names.insert(method.name()));
    let of_all: f64 = kinds.map(|method| digest_bytes(&**method, shape, read)).sum();
    // Memories grow by doubling.
    let room = tokens.next_power_of_two();
    let largest = methods.iter().map(|method| digest_bytes(&**method, shape, room)).fold(0.0, f64::max);
    of_all + largest * batch as f64
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
    partial_bytes: 0.0,
};

/// The query that a method selects by, in a word.
pub(super) fn hint_name(hint: HintSource) -> &'static str {
    match hint {
        HintSource::None => "none",
        HintSource::Ahead => "ahead",
        HintSource::Previous => "previous",
        HintSource::Current => "current",
        HintSource::Ids => "ids",
    }
}

fn sample(told: &Told<'_>, length: usize, measured: &Measured) -> Sample {
    let costs = &measured.costs;
    let bytes_per_token = costs.bytes_per_token + told.partial_bytes * told.selected_layers as f64;
    let selected_bytes = told.kv_bytes * told.selected_layers as f64 / told.layers.max(1) as f64;
    let digest_share = if selected_bytes > 0.0 { told.digest / selected_bytes } else { 0.0 };
    let layer_bytes = selected_bytes / told.selected_layers.max(1) as f64;
    let seen = Seen {
        hint: told.hint,
        moved_share: if selected_bytes > 0.0 { bytes_per_token / selected_bytes } else { 0.0 },
        ahead_share: if selected_bytes > 0.0 { costs.ahead_bytes_per_token / selected_bytes } else { 0.0 },
        attended_share: costs.selected_share - costs.cpu_share,
        cpu_share: costs.cpu_share,
        select_s_per_byte: match costs.select_us {
            Some(us) if layer_bytes > 0.0 => us * 1e-6 / layer_bytes,
            _ => 0.0,
        },
    };
    let scores: Vec<(String, f64)> =
        measured.scores.iter().map(|(task, score)| (task.name().to_owned(), *score)).collect();
    let accuracy = scores.iter().map(|(_, score)| score).sum::<f64>() / scores.len().max(1) as f64;
    let row = Row {
        method: told.method.to_owned(),
        spec: told.spec.to_owned(),
        row_format: told.row_format.to_owned(),
        source: "model".into(),
        length,
        hint: hint_name(told.hint).into(),
        budget: told.budget,
        tasks: by_task(&scores),
        accuracy: Some(accuracy),
        tokens_equal_dense: Some(measured.agreement.equal()),
        kl_to_dense: Some(measured.agreement.kl()),
        perplexity: Some(measured.agreement.perplexity()),
        attention_mass: Some(costs.attention_mass),
        missed_mass: Some(1.0 - costs.attention_mass),
        top_k_recall: costs.top_k_recall,
        output_error: costs.output_error,
        selected_share: costs.selected_share,
        kv_moved_share: costs.kv_moved_share,
        bytes_per_token,
        resident_bytes: costs.resident_share * selected_bytes,
        resident_share: costs.resident_share,
        digest_bytes: told.digest,
        digest_share,
        select_us: costs.select_us,
        hit_rate: costs.hit_rate,
        ms_per_token: Some(measured.clock.ms_per_token()),
        stall_share: Some(costs.stall_share),
        modelled: if told.layers > 0 { modelled::all(&seen) } else { Vec::new() },
        ..Row::default()
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
        assert_eq!(sessions[2].1[0], rungs[0]);
        assert_eq!(sessions[3].0, Format::Int4 { group: 64 });
        let alone = super::sessions(&rungs[..1]);
        assert_eq!(alone.len(), 2);
        assert_eq!((alone[0].0, alone[0].1[0].spec.name()), (PLAIN, "full"));
    }
}
