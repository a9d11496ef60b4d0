//! Rows from traces.

use std::path::Path;

use kvoyant_eval::generate::{Generator, Kind};
use kvoyant_eval::replay::{KEEP, Outcome, Prepared, ReplayError};
use kvoyant_eval::row::{Row, Skipped};
use kvoyant_eval::trace::Trace;
use kvoyant_methods::{Artifacts, Budget, HintNorm, HintSource, MethodError};

use super::BenchError;
use super::compared::Sample;
use super::cost::Cost;
use super::ladder::{PLAIN, Rung};
use crate::artifact_cache;
use crate::progress::Progress;

/// The budget that says what stays resident under a method without one: the largest that is compared by default.
const KEPT_SHARE: f64 = 0.12;

/// What traces gave.
#[derive(Debug, Default)]
pub(super) struct Replays {
    /// One a method and trace.
    pub(super) samples: Vec<Sample>,
    /// What has none.
    pub(super) skipped: Vec<Skipped>,
}

/// Every method over a captured trace; artifacts are those that the cache has of its model.
pub(super) fn file(path: &Path, rungs: &[Rung], progress: Progress) -> Result<Replays, BenchError> {
    let trace = Trace::read(path).map_err(|error| BenchError::Trace { path: path.to_owned(), error })?;
    let name = path.file_stem().map_or_else(|| "trace".into(), |stem| stem.to_string_lossy().into_owned());
    let artifacts = artifact_cache::cached(trace.fingerprint);
    over(&trace, &format!("trace:{name}"), artifacts, rungs, progress)
}

/// Every method over the generated traces.
pub(super) fn generated(seed: u64, rungs: &[Rung], progress: Progress) -> Result<Replays, BenchError> {
    let mut found = Replays::default();
    for kind in Kind::ALL {
        let trace = Generator::new(kind, seed).trace();
        let source = format!("generated:{}", kind.name());
        let of_kind = over(&trace, &source, Artifacts::none(), rungs, progress)?;
        found.samples.extend(of_kind.samples);
        found.skipped.extend(of_kind.skipped);
    }
    Ok(found)
}

fn over(
    trace: &Trace,
    source: &str,
    mut artifacts: Artifacts,
    rungs: &[Rung],
    progress: Progress,
) -> Result<Replays, BenchError> {
    let step = progress.step(format!("{source}: dense"), rungs.len() as u64 + 1);
    let prepared = Prepared::new(trace)?;
    if artifacts.skew().is_none() && trace.shape.prompt_queries > 0 {
        artifacts.insert(prepared.skew()?);
    }
    let mut found = Replays::default();
    for rung in rungs {
        step.advance(1);
        let mut skip = |rung: &Rung, reason: String| {
            let (spec, format) = (rung.spec.to_string(), rung.format.to_string());
            found.skipped.push(Skipped { spec, format, source: source.to_owned(), reason });
        };
        if rung.format != PLAIN {
            skip(rung, "how rows are stored is seen with a real model: a trace has them as they are".into());
            continue;
        }
        if rung.spec.hint() == HintSource::Ahead
            && !matches!(rung.spec.hint_norm(), None | Some(HintNorm::Own))
        {
            skip(
                rung,
                "a trace has hints by each layer's own norm: other hints are seen with a real model".into(),
            );
            continue;
        }
        let rung = &replayable(rung, &artifacts);
        let spec = &rung.spec;
        step.rename(format!("{source}: {spec}"));
        let tokens = trace.shape.tokens;
        let kept = rung.budget.map_or((KEPT_SHARE * tokens as f64) as usize, |budget| budget.rows_of(tokens));
        match prepared.run(spec, &artifacts, rung.budget, (KEEP * kept as f64) as usize) {
            Ok(outcome) => found.samples.push(sample(&prepared, source, rung, &outcome)),
            // A method that lacks what only calibration can make, or does not fit the trace's shape, has no row.
            Err(ReplayError::Method(
                error @ (MethodError::ArtifactMissing { .. } | MethodError::Unsuitable { .. }),
            )) => skip(rung, error.to_string()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}

/// The form of a method that a trace can show: without an artifact that nobody has made for it, the untrained one; and one that moves
/// the keys which only an engine could rebuild. The row says so in its specification.
fn replayable(rung: &Rung, artifacts: &Artifacts) -> Rung {
    let has = |kind| artifacts.iter().any(|artifact| artifact.kind() == kind);
    let missing = rung.spec.artifact().is_some_and(|kind| !has(kind));
    let option = match rung.spec.name() {
        "hata" | "clo" if missing => "weights=random",
        "attention-predictor" if missing => "weights=average",
        "hetero" if missing => "roles=none",
        "shadowkv" => "keys=moved",
        _ => return rung.clone(),
    };
    let text = rung.spec.to_string();
    let join = if text.contains(':') { ',' } else { ':' };
    match format!("{text}{join}{option}").parse() {
        Ok(spec) => Rung { spec, ..rung.clone() },
        // The user has set that option.
        Err(_) => rung.clone(),
    }
}

fn sample(prepared: &Prepared<'_>, source: &str, rung: &Rung, outcome: &Outcome) -> Sample {
    let (shape, spec) = (&prepared.trace().shape, &rung.spec);
    let cost = Cost {
        hint: spec.hint(),
        kv_bytes: prepared.kv_bytes(),
        layers: shape.layers - shape.dense_layers,
        bytes_per_token: outcome.bytes_per_token,
        bytes_per_token_steady: outcome.bytes_per_token_steady,
        feedback_bytes_per_token: outcome.feedback_bytes_per_token,
        ahead_bytes_per_token: outcome.ahead_bytes_per_token,
        selected_share: outcome.selected_share,
        cpu_share: outcome.rows_on_cpu / shape.tokens as f64,
        resident_share: outcome.resident_bytes / prepared.kv_bytes(),
        attends_resident: outcome.attends_resident,
        digest_bytes: outcome.digest_bytes,
        select_us: Some(outcome.select_us),
        hit_rate: outcome.hit_rate,
    };
    let row = Row {
        method: spec.name().to_owned(),
        spec: spec.to_string(),
        row_format: shape.dtype.name().to_owned(),
        source: source.to_owned(),
        length: shape.tokens,
        budget: rung.budget.and_then(Budget::as_share),
        attention_mass: Some(outcome.attention_mass),
        missed_mass: Some(outcome.missed_mass),
        top_k_recall: rung.budget.map(|_| outcome.top_k_recall),
        output_error: Some(outcome.output_error),
        kv_moved_share: outcome.bytes_per_token / prepared.held_bytes(),
        ..cost.row()
    };
    Sample { row, mass: outcome.mass_of_steps.clone(), ..Sample::default() }
}
