//! `kvoyant demo`: a real model over long texts, with every method, against dense attention.
//!
//! | room | job |
//! |---|---|
//! | [`crate::trial`] | what is asked, and one method's answers |
//! | [`report`], [`table`], [`why`] | what is shown |

mod report;
mod table;
mod why;

use std::convert::Infallible;
use std::time::Instant;

use kvoyant_engine::{DaemonError, DaemonKv, Decoder, DecoderOptions, ForwardError};
use kvoyant_kernels::Path as KernelPath;
use kvoyant_methods::{Budget, MethodSpec, SpecError};

use self::report::{Report, Row};
use self::why::{Effort, Spilled};
use crate::args::DemoArgs;
use crate::artifact_cache::ArtifactError;
use crate::late;
use crate::machine::Machine;
use crate::model::{self, ModelError};
use crate::private_daemon::{self, PrivateDaemon};
use crate::progress::Progress;
use crate::session::{self, SessionError};
use crate::trial::measure::Asked;
use crate::trial::plan::{Plan, PlanError, Size};
use crate::trial::prepare;

/// The rows after `dense`: what each is called, and the daemon's method.
const ROWS: &[(&str, &str)] = &[
    ("full", "full"),
    ("kvoyant", "kvoyant:budget=1%,hint=ahead"),
    ("kvoyant", "kvoyant:budget=3%,hint=ahead"),
    ("kvoyant", "kvoyant:budget=6%,hint=ahead"),
    ("infinigen", "infinigen:budget=3%"),
    ("infinigen", "infinigen:budget=6%"),
    ("infinigen", "infinigen:budget=12%"),
    ("infinigen-alpha", "infinigen:alpha=5"),
    ("quest", "quest:budget=3%"),
    ("quest", "quest:budget=6%"),
    ("quest", "quest:budget=12%"),
    ("window", "window"),
    ("random", "random:budget=12%"),
];

/// How much of the largest batch's KV the device can hold: a cache, as a GPU's would be, not a second copy.
const SLAB_SHARE: f64 = 0.3;

/// What the demo cannot go on without.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    /// No model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Nothing to ask.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// No calibration.
    #[error(transparent)]
    Calibrate(#[from] ArtifactError),
    /// No daemon.
    #[error(transparent)]
    Start(#[from] private_daemon::DaemonError),
    /// No session.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A row's method is none.
    #[error(transparent)]
    Spec(#[from] SpecError),
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
    /// The result cannot be written.
    #[error("the result is no JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// Runs the demo; what belongs on stdout.
///
/// # Errors
/// If anything is missing or fails.
pub(crate) fn run(args: &DemoArgs) -> Result<String, DemoError> {
    let progress = Progress::new();
    let chosen = model::open(&args.model, progress)?;
    let model = chosen.model;
    let size = Size::demo(args.context);
    let plan = Plan::new(&model, &size, args.text.as_deref(), args.seed)?;
    let mut asked = Asked::new(&plan);
    let methods = ROWS.iter().map(|(_, spec)| spec.parse()).collect::<Result<Vec<MethodSpec>, _>>()?;
    let longest = args.context + size.room;
    let mut options = session::options(&model, methods, longest, asked.batch_max(), progress)?;
    args.late.set(&mut options);

    let shape = session::shape(&model);
    let batch_tokens = asked.batch_max() * args.context;
    let mut arguments = args.daemon.for_serve();
    arguments.extend(session::sizes(
        &shape,
        plan.prefill_tokens() + 2 * asked.batch_max() * size.room,
        (batch_tokens as f64 * SLAB_SHARE) as usize,
        args.daemon.host_budget,
    ));
    let daemon = PrivateDaemon::start(&arguments)?;
    let failed = |error| DemoError::Daemon { error, said: daemon.last_words() };
    let mut kv: DaemonKv = session::connect(&model, &daemon.socket(), options)?;
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());

    let since = Instant::now();
    let mut prepared = prepare::read(&mut decoder, &mut kv, &plan, progress).map_err(failed)?;
    let mut effort = Effort {
        texts: plan.contexts.len() + plan.continued.len(),
        context: args.context,
        prefill_seconds: since.elapsed().as_secs_f64(),
        prefill_tokens: plan.prefill_tokens(),
        questions: asked.questions(),
        tiny: chosen.tiny,
        device: kv.model().device_session().map(|_| session::device(&kv)),
        spilled: None,
    };

    let step = progress.step("answering: dense", ROWS.len() as u64 + 1);
    let (mut dense, mut copied) =
        prepare::copy(&mut kv, &prepared, &shape).map_err(|error| failed(error.into()))?;
    let of_dense = asked.dense_row(&mut decoder, &mut dense, &mut copied)?;
    let mut rows = vec![Row::new("dense", None, &of_dense)];
    drop((dense, copied));
    for (method, (name, spec)) in ROWS.iter().enumerate() {
        step.advance(1);
        step.rename(format!("answering: {spec}"));
        let measured = asked.row_of(&mut decoder, &mut kv, &mut prepared, method, false).map_err(failed)?;
        let budget = kv.methods()[method].budget().and_then(Budget::as_share);
        rows.push(Row::new(name, budget, &measured));
    }
    drop(step);
    late::say(&kv);
    effort.spilled = Spilled::of(&kv, args.daemon.host_budget);

    if args.json {
        let kernels = KernelPath::best().to_string();
        let report =
            Report { machine: Machine::this(&kernels, &session::device(&kv)), rows, spilled: effort.spilled };
        return Ok(serde_json::to_string_pretty(&report)? + "\n");
    }
    let colour = console::Term::stdout().is_term() && console::colors_enabled();
    Ok(format!("{}\n{}", table::render(&rows, colour), why::lines(&rows, &effort)))
}
