//! `kvoyant capture`: what attention saw while a model read a text, as a trace for `kvoyant bench methods`.

use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;

use kvoyant_engine::{Capture, CaptureOptions, ForwardError, TextError};
use kvoyant_eval::texts::Filler;
use kvoyant_eval::trace::{Trace, TraceError, TraceShape};

use crate::args::CaptureArgs;
use crate::model::{self, ModelError};
use crate::output;
use crate::progress::Progress;
use crate::session;

/// Seed of our own text.
const SEED: u64 = 1;

/// Queries kept of the prompt's last tokens: what methods that learn from attention are shown of it.
const PROMPT_QUERIES: usize = 64;

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaptureError {
    /// The text cannot be read.
    #[error("the text {} cannot be read: {error}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// There is too little of it.
    #[error("the text has {tokens} tokens, and {steps} steps want more: give a longer text or fewer --steps")]
    Short {
        /// What it has.
        tokens: usize,
        /// Steps wanted.
        steps: usize,
    },
    /// No model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer refused the text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The model could not read it.
    #[error(transparent)]
    Forward(#[from] ForwardError<std::convert::Infallible>),
    /// The trace cannot be written.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

/// Captures, and says what was written where.
///
/// # Errors
/// If anything is missing or fails.
pub(crate) fn text(args: &CaptureArgs) -> Result<String, CaptureError> {
    output::check_written(&args.out).map_err(|error| TraceError::Io { path: args.out.clone(), error })?;
    let progress = Progress::new();
    let read = |path: &PathBuf| {
        std::fs::read_to_string(path).map_err(|error| CaptureError::Read { path: path.clone(), error })
    };
    let text = args.text.as_ref().map(read).transpose()?;
    let model = model::open(&args.model, progress)?.model;
    let most = args.tokens.min(model.config().context_tokens);
    let tokenizer = model.tokenizer();
    let mut tokens = if let Some(text) = &text {
        tokenizer.encode(text, true)?
    } else {
        let count = |text: &str| tokenizer.encode(text, false).map_or(usize::MAX / 2, |tokens| tokens.len());
        let text = Filler::new(None, SEED).take(most.saturating_sub(1), &count).concat();
        tokenizer.encode(&text, true)?
    };
    tokens.truncate(most);
    if args.steps == 0 || tokens.len() <= args.steps {
        return Err(CaptureError::Short { tokens: tokens.len(), steps: args.steps });
    }
    let step = progress.step("capturing", tokens.len() as u64);
    let options = CaptureOptions { steps: args.steps, prompt_queries: PROMPT_QUERIES, ..Default::default() };
    let capture = Capture::take(&model, &tokens, options, &mut |done, _| {
        step.set(done as u64);
        ControlFlow::Continue(())
    })?;
    drop(step);
    let source = match &args.text {
        Some(path) => path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        None => format!("chronicle {SEED}"),
    };
    let methods_shape = session::methods_shape(&model);
    let shape = TraceShape {
        layers: capture.shape.layers,
        query_heads: capture.shape.query_heads,
        kv_heads: capture.shape.kv_heads,
        head_dim: capture.shape.head_dim,
        tokens: capture.tokens,
        steps: capture.steps,
        prompt_queries: capture.prompt_queries,
        sinks: methods_shape.sinks,
        window: methods_shape.window,
        dense_layers: methods_shape.dense_layers,
        dtype: methods_shape.dtype,
    };
    let trace = Trace {
        shape,
        fingerprint: methods_shape.fingerprint,
        model: model.name().to_owned(),
        source,
        q: capture.q,
        hint: capture.hint,
        prompt_q: capture.prompt_q,
        k: capture.k,
        v: capture.v,
        marks: capture.marks,
    };
    trace.write(&args.out)?;
    if args.json {
        let said = serde_json::json!({"path": args.out, "tokens": shape.tokens, "steps": shape.steps});
        return Ok(format!("{said:#}\n"));
    }
    Ok(format!("{}: {} tokens, {} steps\n", args.out.display(), shape.tokens, shape.steps))
}
