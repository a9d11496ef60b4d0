//! `kvoyant run`: one prompt, one answer.

mod image;
mod prompt;
mod stats;

use std::convert::Infallible;
use std::io::{self, Write};
use std::ops::ControlFlow;

use kvoyant_engine::{
    DaemonError, DaemonKv, DaemonSequence, Decoder, DecoderOptions, DenseKv, FormatError, ForwardError,
    GenerateError, GenerateOptions, KvBackend, KvShape, Logits, Model, PrefillOptions, Prompt, Sampler,
    SamplerOptions, StopReason, generate,
};
use kvoyant_methods::infinigen::{Amount, InfinigenSpec};
use kvoyant_methods::{HintSource, MethodError, MethodSpec};

use self::image::ImageError;
use self::prompt::PromptError;
use self::stats::Times;
use crate::args::{Attention, Prefill, RunArgs, ShareFor};
use crate::artifact_cache::ArtifactError;
use crate::late;
use crate::model::{self, ModelError};
use crate::private_daemon::{self, PrivateDaemon};
use crate::progress::Progress;
use crate::session::{self, Hints, SessionError};

/// Tokens of a chunk whose rows are selected together.
const SPARSE_CHUNK_TOKENS: usize = 256;

/// What `run` cannot go on without.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// No prompt.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// `--budget` for a method that has none.
    #[error("the method {method} has no budget: leave --budget away, or choose another method")]
    NoBudget {
        /// Which method.
        method: &'static str,
    },
    /// A method for other engines.
    #[error(
        "the method {method} is for engines that name rows themselves, which `run` does not: choose one that `kvoyant run --help` names"
    )]
    NamesNone {
        /// Which method.
        method: Box<MethodSpec>,
    },
    /// It could not be suspended.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A threshold and a budget.
    #[error(
        "alpha and cap are one rule for how much is selected and --budget is another: leave one of them away"
    )]
    TwoAmounts,
    /// No model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// No calibration.
    #[error(transparent)]
    Calibrate(#[from] ArtifactError),
    /// The hints' corrections are not the model's.
    #[error(transparent)]
    Hints(#[from] MethodError),
    /// The format cannot store the model's heads.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// No daemon.
    #[error(transparent)]
    Start(#[from] private_daemon::DaemonError),
    /// No session.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Plain attention failed.
    #[error(transparent)]
    Dense(#[from] AnswerError<Infallible>),
    /// The daemon failed on the way.
    #[error(transparent)]
    Daemon(#[from] AnswerError<DaemonError>),
}

/// Why an answer broke off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnswerError<E: std::error::Error + 'static> {
    /// Reading the prompt failed.
    #[error(transparent)]
    Prefill(#[from] ForwardError<E>),
    /// Decoding failed.
    #[error(transparent)]
    Generate(#[from] GenerateError<E>),
    /// Standard output failed.
    #[error("the answer cannot be written: {0}")]
    Output(io::Error),
}

/// Answers the prompt on stdout.
///
/// # Errors
/// If anything is missing or fails.
pub(crate) fn run(args: &RunArgs) -> Result<(), RunError> {
    let progress = Progress::on_a_terminal();
    let method = method(args)?;
    args.suspend.as_deref().map_or(Ok(()), image::check_name)?;
    let text = prompt::text(args)?;
    let model = model::open(&args.model, progress)?.model;
    let tokens = prompt::tokens(text, args.raw, &model)?;
    let most = match args.resume {
        None => (tokens.len() + args.max_tokens as usize).min(model.config().context_tokens),
        // How much is in the image only the daemon knows, and answers must have room for rows of all of it.
        Some(_) => model.config().context_tokens,
    };

    let shape = session::shape(&model);
    let shape = KvShape { format: args.kv_format.unwrap_or(shape.format), ..shape };

    if args.attention == Some(Attention::Dense) {
        let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
        shape.check()?;
        let mut kv = DenseKv::new(shape);
        let mut sequence = kv.sequence();
        let read = Reading { tokens: &tokens, begun: 0 };
        let times = answer(
            args,
            &mut decoder,
            &mut kv,
            &mut sequence,
            (read, |_: &mut DenseKv, _: &_| Ok(())),
            progress,
        )?;
        if args.stats {
            stats::print(&times, None);
        }
        return Ok(());
    }

    let mut options = session::options_with(&model, vec![method.clone()], most, 1, &args.artifact, progress)?;
    options.selects = args.selects.into();
    args.late.set(&mut options);
    let hint_norm = Hints::new(&model, &options.artifacts)?.of(&method);
    // It must live as long as the session.
    let own = match &args.socket {
        Some(_) => None,
        None => Some(PrivateDaemon::start(&serve_arguments(args, &model, most))?),
    };
    let socket = match (&args.socket, &own) {
        (Some(path), _) => path.clone(),
        (None, Some(daemon)) => daemon.socket(),
        (None, None) => unreachable!("without a socket there is a daemon of our own"),
    };
    let mut kv = DaemonKv::connect(&socket, shape, options).map_err(SessionError::from)?;
    if let Some(name) = &args.suspend {
        image::check_room(&socket, name, overwrites(args))?;
    }
    let plain = DecoderOptions { hint_norm, ..DecoderOptions::default() };
    let options = match args.prefill {
        Prefill::Dense => plain,
        Prefill::Sparse => {
            DecoderOptions { chunk_tokens: SPARSE_CHUNK_TOKENS, sparse_prefill: true, ..plain }
        }
    };
    let mut decoder = Decoder::new(model.clone(), options);
    let sequence = match (&args.resume, args.share_prefix) {
        (Some(image), _) => kv.resume(image, Some(0)),
        (None, Some(_)) => kv.attach(0, &tokens),
        (None, None) => kv.sequence(0),
    };
    let mut sequence = sequence.map_err(SessionError::from)?;
    // What has been attached to is a part of the prompt, and what was resumed comes before it.
    let begun = if args.resume.is_some() { 0 } else { sequence.tokens() };
    if args.share_prefix.is_some() && args.stats {
        crate::say::say(format_args!(
            "{begun} of {} tokens of the prompt were published before",
            tokens.len()
        ));
    }
    let publish = args.share_prefix.map(|share| share == ShareFor::All);
    let read = |kv: &mut DaemonKv, sequence: &DaemonSequence| {
        // What a sparse prefill cost is not the steps'.
        kv.take_stats();
        let published = publish.map_or(Ok(()), |shared| kv.publish(sequence, &tokens, shared).map(drop));
        match published {
            // The answer is what was asked for, and the daemon's loss is told behind it.
            Err(error) if error.is_daemon_lost() => {
                crate::say::say(format_args!("the prompt is not published: {error}"));
                Ok(())
            }
            published => published,
        }
    };
    let reading = Reading { tokens: &tokens, begun };
    let times = answer(args, &mut decoder, &mut kv, &mut sequence, (reading, read), progress)?;
    late::say(&kv);
    if let Some(image) = &args.suspend {
        kv.suspend(sequence, image, overwrites(args)).map_err(SessionError::from)?;
    }
    if args.stats {
        let held = kv.shape().token_bytes();
        stats::print(&times, Some((&method, kv.take_stats(), held)));
        if let Some(paged) = kv.paged() {
            stats::print_paged(&paged);
        }
    }
    Ok(())
}

/// Whether the image that it is suspended as may take another one's place.
fn overwrites(args: &RunArgs) -> bool {
    args.overwrite || args.resume == args.suspend
}

/// The method with its budget.
fn method(args: &RunArgs) -> Result<MethodSpec, RunError> {
    if args.method.hint() == HintSource::Ids {
        return Err(RunError::NamesNone { method: Box::new(args.method.clone()) });
    }
    match args.budget {
        None => Ok(args.method.clone()),
        Some(budget) => {
            // A threshold that the user wrote and a budget contradict one another; the default one gives way.
            if let Some(spec) = args.method.options::<InfinigenSpec>()
                && matches!(spec.amount, Amount::Threshold { .. })
                && spec.amount != InfinigenSpec::default().amount
            {
                return Err(RunError::TwoAmounts);
            }
            let method = args.method.clone().with_budget(budget);
            if method.budget().is_none() {
                return Err(RunError::NoBudget { method: method.name() });
            }
            Ok(method)
        }
    }
}

/// A daemon that holds one sequence of `most` tokens, all of it on the device if it is to be copied at all.
fn serve_arguments(args: &RunArgs, model: &Model, most: usize) -> Vec<String> {
    let mut all = args.daemon.for_serve();
    all.extend(session::sizes(&session::shape(model), most, most, args.daemon.host_budget));
    all
}

/// A prompt, and how much of it is there already.
#[derive(Clone, Copy, Debug)]
struct Reading<'a> {
    tokens: &'a [u32],
    begun: usize,
}

/// Reads the prompt, says so to `read`, and writes the answer.
fn answer<B: KvBackend>(
    args: &RunArgs,
    decoder: &mut Decoder,
    kv: &mut B,
    sequence: &mut B::Sequence,
    (Reading { tokens, begun }, read): (
        Reading<'_>,
        impl FnOnce(&mut B, &B::Sequence) -> Result<(), B::Error>,
    ),
    progress: Progress,
) -> Result<Times, AnswerError<B::Error>> {
    let mut times = Times::new(tokens.len());
    let step = progress.step("reading the prompt", tokens.len() as u64);
    let mut report = |done: usize, _| {
        step.set(done as u64);
        ControlFlow::Continue(())
    };
    let options =
        PrefillOptions { logits: Logits::Last, progress: Some(&mut report), ..PrefillOptions::default() };
    let logits = match begun {
        0 => decoder.prefill(kv, sequence, tokens, options)?,
        _ => decoder.prefill_rest(kv, sequence, tokens, options)?,
    };
    times.read();
    drop(step);
    read(kv, sequence).map_err(ForwardError::from)?;

    let mut sampler = Sampler::new(SamplerOptions {
        temperature: args.temperature.unwrap_or(0.0) as f32,
        top_p: args.top_p.unwrap_or(1.0) as f32,
        seed: args.seed,
    });
    let options = GenerateOptions { max_tokens: args.max_tokens as usize, ..GenerateOptions::default() };
    let mut out = io::stdout().lock();
    let mut failed = None;
    let mut say = |text: &str| match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ControlFlow::Continue(()),
        Err(error) => {
            failed = Some(error);
            ControlFlow::Break(())
        }
    };
    let made = generate(
        decoder,
        kv,
        sequence,
        Prompt { tokens, logits },
        &mut sampler,
        options,
        &mut |text, timing| {
            times.token(*timing);
            if args.json { ControlFlow::Continue(()) } else { say(text) }
        },
    )?;
    if args.json {
        let _ = say(&format!("{:#}\n", stats::json(&made, &times)));
    } else if made.stop != StopReason::Interrupted {
        // Whether the line's end can be written is known by `failed`.
        let _ = say("\n");
    }
    match failed {
        // A reader that has seen enough is no error.
        Some(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(AnswerError::Output(error)),
        _ => Ok(times),
    }
}
