//! One sequence's answer, token by token.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::decoder::{Decoder, REFILLS, StepTiming};
use crate::error::{ForwardError, TextError};
use crate::kv::KvBackend;
use crate::sampling::Sampler;

/// When an answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GenerateOptions {
    /// At most so many tokens.
    pub max_tokens: usize,
    /// Go on past the model's end tokens.
    pub ignore_end: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_tokens: 256, ignore_end: false }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The model said so.
    End,
    /// `max_tokens` were generated.
    MaxTokens,
    /// The model's context is full.
    ContextFull,
    /// The callback asked to stop.
    Interrupted,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Generated {
    /// Its tokens, without the end token.
    pub tokens: Vec<u32>,
    /// Its text.
    pub text: String,
    /// Why it ended.
    pub stop: StopReason,
    /// Sum over all steps.
    pub timing: StepTiming,
    /// Time spent choosing tokens.
    pub sampling: Duration,
    /// Steps that were run.
    pub steps: usize,
}

/// Why generation failed.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError<E: std::error::Error + 'static> {
    /// The forward pass.
    #[error(transparent)]
    Forward(#[from] ForwardError<E>),
    /// The text.
    #[error(transparent)]
    Text(#[from] TextError),
}

/// A sequence that has been read.
#[derive(Debug, Clone)]
pub struct Prompt<'a> {
    /// All its tokens.
    pub tokens: &'a [u32],
    /// Logits of the last one.
    pub logits: Vec<f32>,
}

/// Continues a prefilled sequence. Rows that are lost on the way, by a disk or with a daemon that dies, are computed again, and the answer
/// goes on; `on_text` gets text as it becomes readable, with the timing of the step that made it.
///
/// # Errors
/// The forward pass's or the tokenizer's own; a full context is not one.
pub fn generate<B: KvBackend>(
    decoder: &mut Decoder,
    backend: &mut B,
    sequence: &mut B::Sequence,
    Prompt { tokens: prompt, mut logits }: Prompt<'_>,
    sampler: &mut Sampler,
    options: GenerateOptions,
    on_text: &mut dyn FnMut(&str, &StepTiming) -> ControlFlow<()>,
) -> Result<Generated, GenerateError<B::Error>> {
    let model = decoder.model().clone();
    let mut stream = model.tokenizer().stream();
    let mut answer = Generated {
        tokens: Vec::new(),
        text: String::new(),
        stop: StopReason::MaxTokens,
        timing: StepTiming::default(),
        sampling: Duration::ZERO,
        steps: 0,
    };
    let mut timing = StepTiming::default();
    while answer.tokens.len() < options.max_tokens {
        let begin = Instant::now();
        let token = sampler.sample(&logits);
        answer.sampling += begin.elapsed();
        if model.tokenizer().is_end(token) && !options.ignore_end {
            answer.stop = StopReason::End;
            break;
        }
        answer.tokens.push(token);
        let text = stream.push(token)?;
        answer.text.push_str(&text);
        if on_text(&text, &timing).is_break() {
            answer.stop = StopReason::Interrupted;
            break;
        }
        if answer.tokens.len() == options.max_tokens {
            break;
        }
        if backend.tokens(sequence) >= model.config().context_tokens {
            answer.stop = StopReason::ContextFull;
            break;
        }
        let mut refilled = 0;
        let step = loop {
            match decoder.step(backend, &mut [&mut *sequence], &[token]) {
                Ok(step) => break step,
                Err(error) => {
                    // The token of the step is the answer's last one, and not among them yet.
                    let before = answer.tokens.len() - 1;
                    let made: Vec<u32> = prompt.iter().chain(&answer.tokens[..before]).copied().collect();
                    // Of a sequence that began before this prompt nobody knows what to compute again.
                    let known = made.len() == backend.tokens(sequence);
                    refilled += 1;
                    if !known || refilled > REFILLS || decoder.refill(backend, sequence, &made)? == 0 {
                        return Err(error.into());
                    }
                }
            }
        };
        logits = step.logits;
        timing = step.timing;
        answer.timing += timing;
        answer.steps += 1;
    }
    let rest = stream.finish()?;
    if !rest.is_empty() {
        answer.text.push_str(&rest);
        // Nothing is left to stop.
        let _ = on_text(&rest, &timing);
    }
    Ok(answer)
}
