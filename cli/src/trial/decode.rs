//! Decoding, the same for every backend: answers as one batch, and a text's true continuation.

use std::time::Duration;

use kvoyant_engine::{Decoder, ForwardError, KvBackend, StepTiming, Tokenizer, argmax};
use kvoyant_eval::tasks::Question;

/// How long decoding took, and for what.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Clock {
    /// Where the steps' time went.
    pub(crate) timing: StepTiming,
    /// Tokens decoded in it, over all sequences.
    pub(crate) tokens: usize,
}

impl Clock {
    fn add(&mut self, timing: StepTiming, tokens: usize) {
        self.timing += timing;
        self.tokens += tokens;
    }

    /// Milliseconds a token.
    pub(crate) fn ms_per_token(&self) -> f64 {
        millis(self.timing.total) / self.tokens.max(1) as f64
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Greedy answers. Sequence `i` holds everything up to its last token, `last[i]`, which is the first that
/// goes through the backend's attention. Who has answered, or has taken as many tokens as the question allows, leaves the batch.
/// `seen` is called after each step, with its number.
///
/// # Errors
/// As [`Decoder::step`].
pub(crate) fn answers<B: KvBackend>(
    decoder: &mut Decoder,
    backend: &mut B,
    sequences: &mut [B::Sequence],
    questions: &[&Question],
    last: &[u32],
    clock: &mut Clock,
    mut seen: impl FnMut(&mut B, usize),
) -> Result<Vec<String>, ForwardError<B::Error>> {
    let model = decoder.model().clone();
    let tokenizer = model.tokenizer();
    let mut said = vec![Vec::new(); sequences.len()];
    let mut texts = vec![String::new(); sequences.len()];
    let mut next = last.to_vec();
    let mut left: Vec<usize> = (0..sequences.len()).collect();
    for step in 0.. {
        if left.is_empty() {
            break;
        }
        let tokens: Vec<u32> = left.iter().map(|&i| next[i]).collect();
        let mut batch: Vec<&mut B::Sequence> =
            sequences.iter_mut().enumerate().filter(|(i, _)| left.contains(i)).map(|(_, s)| s).collect();
        let out = decoder.step(backend, &mut batch, &tokens)?;
        clock.add(out.timing, tokens.len());
        seen(backend, step);
        let members = std::mem::take(&mut left);
        for (row, &i) in members.iter().enumerate() {
            let token = argmax(out.of(row, members.len()));
            next[i] = token;
            if tokenizer.is_end(token) {
                continue;
            }
            said[i].push(token);
            texts[i] = text(tokenizer, &said[i]);
            if said[i].len() < questions[i].most_tokens && !questions[i].is_over(&texts[i]) {
                left.push(i);
            }
        }
    }
    Ok(texts)
}

/// What tokens read; nothing if the tokenizer cannot say.
fn text(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    tokenizer.decode(tokens).unwrap_or_default()
}

/// Feeds true tokens one by one, all sequences as one batch: `truths[i]` is what sequence `i` is fed, and one
/// more, which is only predicted. `before` is called before each step and says whether the step's time counts;
/// `seen` gets, after it, the backend and each sequence's logits `[vocabulary]` with the true next token.
///
/// # Errors
/// As [`Decoder::step`].
pub(crate) fn forced<B: KvBackend>(
    decoder: &mut Decoder,
    backend: &mut B,
    sequences: &mut [B::Sequence],
    truths: &[&[u32]],
    clock: &mut Clock,
    mut before: impl FnMut(&mut B, usize) -> bool,
    mut seen: impl FnMut(&mut B, usize, &[(&[f32], u32)]),
) -> Result<(), ForwardError<B::Error>> {
    let steps = truths.iter().map(|truth| truth.len()).min().unwrap_or(0).saturating_sub(1);
    for step in 0..steps {
        let counts = before(backend, step);
        let tokens: Vec<u32> = truths.iter().map(|truth| truth[step]).collect();
        let mut batch: Vec<&mut B::Sequence> = sequences.iter_mut().collect();
        let out = decoder.step(backend, &mut batch, &tokens)?;
        if counts {
            clock.add(out.timing, tokens.len());
        }
        let logits: Vec<(&[f32], u32)> =
            truths.iter().enumerate().map(|(i, truth)| (out.of(i, tokens.len()), truth[step + 1])).collect();
        seen(backend, step, &logits);
    }
    Ok(())
}
