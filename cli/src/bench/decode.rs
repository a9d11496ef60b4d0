//! `kvoyant bench decode`: where a decoded token's time goes, after a long text, with plain attention and with methods.
//!
//! A text is read once; every setting decodes from a fork of it, in turns, round after round, so that what else the machine does falls
//! on all alike.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::ops::ControlFlow;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use kvoyant_engine::{
    DaemonError, DaemonKv, DaemonSequence, Decoder, DecoderOptions, DenseKv, DenseSequence, ForwardError,
    KvBackend, Logits, Model, PrefillOptions, StepTiming, TextError, argmax,
};
use kvoyant_eval::texts::Filler;
use kvoyant_kernels::Path as KernelPath;
use kvoyant_methods::full::FullSpec;
use kvoyant_methods::{MethodError, MethodSpec};
use serde::Serialize;

use crate::args::{DecodeArgs, method};
use crate::artifact_cache::ArtifactError;
use crate::machine::Machine;
use crate::model::{self, ModelError};
use crate::private_daemon::{self, PrivateDaemon};
use crate::progress::Progress;
use crate::session::{self, Hints, SessionError};
use crate::trial::prepare::{Forks, copy_rows};

/// Seed of the text.
const SEED: u64 = 1;

/// Steps of a round that are not counted: the first ones find nothing on the device, and caches cold.
const WARM_UP: usize = 2;

/// How many times a text's KV the daemon gets room for, and as much again for each method: tables and digests may take a quarter.
const ROOM: usize = 2;

/// An attention to measure.
#[derive(Clone, Debug)]
pub(crate) enum Setting {
    /// Plain attention, in this process.
    Dense,
    /// A method of the daemon.
    Method(MethodSpec),
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "dense" { Ok(Self::Dense) } else { method::parse(text).map(Self::Method) }
    }
}

impl Setting {
    fn name(&self) -> String {
        match self {
            Self::Dense => "dense".to_owned(),
            Self::Method(spec) => spec.to_string(),
        }
    }
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DecodeError {
    /// A text and its steps are more than the model has positions for.
    #[error("{length} tokens and {steps} steps are more than the model's {context} positions")]
    TooLong {
        /// Tokens of the text.
        length: usize,
        /// Steps after it, warm-up included.
        steps: usize,
        /// Positions.
        context: usize,
    },
    /// No model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer refused the text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// No calibration.
    #[error(transparent)]
    Calibrate(#[from] ArtifactError),
    /// No daemon.
    #[error(transparent)]
    Start(#[from] private_daemon::DaemonError),
    /// No session.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Hints cannot be made as a method wants.
    #[error(transparent)]
    Hints(#[from] MethodError),
    /// Plain attention failed.
    #[error(transparent)]
    Dense(#[from] ForwardError<Infallible>),
    /// The daemon failed on the way.
    #[error("{error}; the daemon's last words: {said}")]
    Daemon {
        /// What failed.
        error: ForwardError<DaemonError>,
        /// What it said.
        said: String,
    },
    /// Whoever sets the pace is gone.
    #[error("the pace cannot be read: {0}")]
    Pace(#[source] io::Error),
    /// The result cannot be written.
    #[error("the result is no JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// One step's times.
#[derive(Clone, Copy, Debug)]
struct Step {
    timing: StepTiming,
    /// Of `timing.attend`, waiting for the daemon.
    wait: Duration,
}

/// Medians over the steps of all rounds, in milliseconds a token.
#[derive(Clone, Debug, Serialize)]
struct Row {
    length: usize,
    attention: String,
    ms_per_token: f64,
    /// Linear layers, norms, RoPE.
    linear_ms: f64,
    /// Computing and sending hints.
    hint_ms: f64,
    /// Writing the new rows.
    append_ms: f64,
    /// Attention, without waiting.
    attend_ms: f64,
    /// Waiting for the daemon's answers.
    wait_ms: f64,
    /// Median of each round: what the machine did meanwhile.
    rounds_ms: Vec<f64>,
}

/// The whole result, in the shape of every benchmark.
#[derive(Debug, Serialize)]
struct Report<'a> {
    machine: Machine,
    /// Threads of the engine.
    threads: usize,
    rounds: usize,
    steps: usize,
    rows: &'a [Row],
}

/// Measures; what belongs on stdout.
///
/// # Errors
/// If anything is missing or fails.
pub(crate) fn decode(args: &DecodeArgs) -> Result<String, DecodeError> {
    let progress = Progress::new();
    let model = model::open(&args.model, progress)?.model;
    let (context, steps) = (model.config().context_tokens, args.steps.saturating_add(WARM_UP));
    if let Some(length) = args.lengths.iter().copied().find(|length| length.saturating_add(steps) > context) {
        return Err(DecodeError::TooLong { length, steps, context });
    }
    let mut device = "host".to_owned();
    let mut rows = Vec::new();
    for &length in &args.lengths {
        pace(args, None)?;
        let tokens = text(&model, length)?;
        let bench = Bench { args, model: &model, tokens: &tokens, progress };
        rows.extend(bench.measure(&mut device)?);
    }
    if args.json {
        let machine = Machine::this(&KernelPath::best().to_string(), &device);
        let threads = kvoyant_engine::threads();
        let report = Report { machine, threads, rounds: args.rounds, steps: args.steps, rows: &rows };
        return Ok(serde_json::to_string(&report)? + "\n");
    }
    Ok(render(&rows))
}

/// With `--paced`, says what is done and waits for a line before what comes next.
fn pace(args: &DecodeArgs, done: Option<&str>) -> Result<(), DecodeError> {
    if !args.paced {
        return Ok(());
    }
    if let Some(done) = done {
        let mut out = io::stdout().lock();
        writeln!(out, "{done}").and_then(|()| out.flush()).map_err(DecodeError::Pace)?;
        return Ok(());
    }
    match io::stdin().read_line(&mut String::new()) {
        Ok(0) => Err(DecodeError::Pace(io::ErrorKind::UnexpectedEof.into())),
        Ok(_) => Ok(()),
        Err(error) => Err(DecodeError::Pace(error)),
    }
}

/// A text of so many tokens.
fn text(model: &Model, length: usize) -> Result<Vec<u32>, TextError> {
    let tokenizer = model.tokenizer();
    let count = |text: &str| tokenizer.encode(text, false).map_or(usize::MAX / 2, |tokens| tokens.len());
    // It stops before a sentence that is too long: so, a little more.
    let text = Filler::new(None, SEED).take(length + length / 8 + 64, &count).concat();
    let mut tokens = tokenizer.encode(&text, true)?;
    tokens.truncate(length);
    Ok(tokens)
}

/// One text.
#[derive(Clone, Copy)]
struct Bench<'a> {
    args: &'a DecodeArgs,
    model: &'a Arc<Model>,
    tokens: &'a [u32],
    progress: Progress,
}

/// A daemon's session, the text read in it, and a fork of that for each method.
struct Held {
    kv: DaemonKv,
    parents: Vec<DaemonSequence>,
    hints: Hints,
    /// Last, so that it outlives the session.
    daemon: PrivateDaemon,
}

impl Bench<'_> {
    fn methods(&self) -> Vec<MethodSpec> {
        let method = |setting: &Setting| match setting {
            Setting::Dense => None,
            Setting::Method(spec) => Some(spec.clone()),
        };
        self.args.attention.iter().filter_map(method).collect()
    }

    fn measure(&self, device: &mut String) -> Result<Vec<Row>, DecodeError> {
        let shape = session::shape(self.model);
        let mut dense_kv = DenseKv::new(shape.clone());
        let mut dense = dense_kv.sequence();
        let mut decoder = Decoder::new(self.model.clone(), DecoderOptions::default());
        let methods = self.methods();
        let mut held = None;
        let first = if methods.is_empty() {
            self.read(&mut decoder, &mut dense_kv, &mut dense)?
        } else {
            let (mut own, first) = self.hold(&mut decoder, methods)?;
            *device = session::device(&own.kv);
            let said = |error| DecodeError::Daemon { error, said: own.daemon.last_words() };
            copy_rows(&mut own.kv, &own.parents[0], &mut dense_kv, &mut dense, &shape)
                .map_err(|error| said(error.into()))?;
            held = Some(own);
            first
        };
        pace(self.args, Some("read"))?;
        let settings = &self.args.attention;
        let mut rounds: Vec<Vec<Vec<Step>>> = vec![Vec::new(); settings.len()];
        let step = self
            .progress
            .step(format!("{} tokens", self.tokens.len()), (self.args.rounds * settings.len()) as u64);
        for _ in 0..self.args.rounds {
            pace(self.args, None)?;
            let mut method = 0;
            for (setting, rounds) in settings.iter().zip(&mut rounds) {
                rounds.push(match (setting, &mut held) {
                    (Setting::Method(spec), Some(held)) => {
                        method += 1;
                        self.round_of(spec, held, method, first)?
                    }
                    _ => self.dense_round(&mut decoder, &mut dense_kv, &mut dense, first)?,
                });
                step.advance(1);
            }
            pace(self.args, Some("round"))?;
        }
        let rows = settings.iter().zip(rounds);
        Ok(rows.map(|(setting, rounds)| row(self.tokens.len(), setting, &rounds)).collect())
    }

    /// Starts a daemon and reads the text into it. The first parent is the text as it was read.
    fn hold(&self, decoder: &mut Decoder, methods: Vec<MethodSpec>) -> Result<(Held, u32), DecodeError> {
        let most = self.tokens.len() + self.args.steps + WARM_UP;
        let shape = session::shape(self.model);
        // What reads keeps nothing of its own.
        let all: Vec<MethodSpec> = [MethodSpec::new(FullSpec)].into_iter().chain(methods).collect();
        let count = all.len();
        let mut options = session::options(self.model, all, most, 1, self.progress)?;
        options.selects = self.args.selects.into();
        let mut arguments = self.args.daemon.for_serve();
        arguments.extend(session::sizes(&shape, ROOM * count * most, most, self.args.daemon.host_budget));
        let hints = Hints::new(self.model, &options.artifacts)?;
        let daemon = PrivateDaemon::start(&arguments)?;
        let mut kv = session::connect(self.model, &daemon.socket(), options)?;
        let said = |error| DecodeError::Daemon { error, said: daemon.last_words() };
        let mut text = Forks::open(&mut kv).map_err(|error| said(error.into()))?;
        let first = self.read(decoder, &mut kv, &mut text).map_err(said)?;
        let mut parents = vec![text];
        for method in 1..count {
            let fork =
                DaemonKv::fork(&mut kv, &mut parents[0], Some(method)).map_err(|error| said(error.into()))?;
            parents.push(fork);
        }
        Ok((Held { kv, parents, hints, daemon }, first))
    }

    /// Reads the text; the token that follows.
    fn read<B: KvBackend>(
        &self,
        decoder: &mut Decoder,
        kv: &mut B,
        sequence: &mut B::Sequence,
    ) -> Result<u32, ForwardError<B::Error>> {
        let step = self.progress.step("reading", self.tokens.len() as u64);
        let mut report = |done: usize, _| {
            step.set(done as u64);
            ControlFlow::Continue(())
        };
        let options =
            PrefillOptions { logits: Logits::Last, progress: Some(&mut report), ..PrefillOptions::default() };
        Ok(argmax(&decoder.prefill(kv, sequence, self.tokens, options)?))
    }

    fn dense_round(
        &self,
        decoder: &mut Decoder,
        kv: &mut DenseKv,
        parent: &mut DenseSequence,
        first: u32,
    ) -> Result<Vec<Step>, DecodeError> {
        let mut fork = DenseKv::fork(kv, parent);
        Ok(self.steps(decoder, kv, &mut fork, first, |_| Duration::ZERO)?)
    }

    fn round_of(
        &self,
        spec: &MethodSpec,
        held: &mut Held,
        method: usize,
        first: u32,
    ) -> Result<Vec<Step>, DecodeError> {
        let hint_norm = held.hints.of(spec);
        let mut decoder =
            Decoder::new(self.model.clone(), DecoderOptions { hint_norm, ..DecoderOptions::default() });
        let Held { kv, parents, daemon, .. } = held;
        let said = |error| DecodeError::Daemon { error, said: daemon.last_words() };
        let mut fork = DaemonKv::fork(kv, &mut parents[method], None).map_err(|error| said(error.into()))?;
        kv.take_stats();
        let steps =
            self.steps(&mut decoder, kv, &mut fork, first, |kv| kv.take_stats().wait).map_err(said)?;
        kv.close(vec![fork]).map_err(|error| said(error.into()))?;
        Ok(steps)
    }

    /// A round's steps: greedy, through end tokens too.
    fn steps<B: KvBackend>(
        &self,
        decoder: &mut Decoder,
        kv: &mut B,
        sequence: &mut B::Sequence,
        first: u32,
        waited: impl Fn(&mut B) -> Duration,
    ) -> Result<Vec<Step>, ForwardError<B::Error>> {
        let mut token = first;
        let mut steps = Vec::with_capacity(self.args.steps);
        for i in 0..self.args.steps + WARM_UP {
            let out = decoder.step(kv, &mut [&mut *sequence], &[token])?;
            token = argmax(&out.logits);
            let wait = waited(kv);
            if i >= WARM_UP {
                steps.push(Step { timing: out.timing, wait });
            }
        }
        Ok(steps)
    }
}

fn row(length: usize, setting: &Setting, rounds: &[Vec<Step>]) -> Row {
    let of = |part: fn(&Step) -> Duration| median(rounds.iter().flatten().map(part).collect());
    Row {
        length,
        attention: setting.name(),
        ms_per_token: of(|step| step.timing.total),
        linear_ms: of(|step| step.timing.linear),
        hint_ms: of(|step| step.timing.hint),
        append_ms: of(|step| step.timing.append),
        attend_ms: of(|step| step.timing.attend.saturating_sub(step.wait)),
        wait_ms: of(|step| step.wait),
        rounds_ms: rounds
            .iter()
            .map(|steps| median(steps.iter().map(|step| step.timing.total).collect()))
            .collect(),
    }
}

/// In milliseconds; 0 of nothing.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    let middle = times.len() / 2;
    let time = match times.len() {
        0 => Duration::ZERO,
        n if n.is_multiple_of(2) => (times[middle - 1] + times[middle]) / 2,
        _ => times[middle],
    };
    time.as_secs_f64() * 1e3
}

/// The table.
fn render(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.attention.chars().count()).max().unwrap_or(0).max(9);
    let mut out = format!(
        "{:>7} {:width$} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}   (median ms a token)\n",
        "tokens", "attention", "total", "linear", "hint", "append", "attend", "waiting"
    );
    for row in rows {
        let _ = writeln!(
            out,
            "{:>7} {:width$} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2}",
            row.length,
            row.attention,
            row.ms_per_token,
            row.linear_ms,
            row.hint_ms,
            row.append_ms,
            row.attend_ms,
            row.wait_ms
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_dense_or_a_method() {
        assert_eq!("dense".parse::<Setting>().unwrap().name(), "dense");
        assert!("infinigen:budget=6%".parse::<Setting>().unwrap().name().starts_with("infinigen"));
        assert!("nothing".parse::<Setting>().is_err());
    }

    #[test]
    fn a_row_is_of_medians_and_attention_is_told_from_waiting() {
        let step = |total: u64, attend: u64, wait: u64| {
            let ms = Duration::from_millis;
            let timing = StepTiming { total: ms(total), attend: ms(attend), ..StepTiming::default() };
            Step { timing, wait: ms(wait) }
        };
        let rounds = [vec![step(10, 5, 1), step(30, 6, 2)], vec![step(12, 9, 3), step(900, 800, 700)]];
        let row = row(64, &Setting::Dense, &rounds);
        assert!((row.ms_per_token - 21.0).abs() < 1e-9);
        assert!((row.attend_ms - 5.0).abs() < 1e-9 && (row.wait_ms - 2.5).abs() < 1e-9);
        assert_eq!(row.rounds_ms, [20.0, 456.0]);
        let table = render(&[row]);
        assert!(table.lines().nth(1).unwrap().contains("21.00"), "{table}");
    }
}
