//! Attention rows for methods that learn from them: those of a prompt's last tokens when it is complete, and one after
//! every step of each layer that the daemon selects for.
//!
//! Rows are computed in the session's extents, which hold every row wherever attention ran. What that costs is the method's,
//! and stands in [`StepStats::feedback`](super::StepStats) (time) and [`StepStats::feedback_bytes`](super::StepStats).

use std::ops::Range;
use std::time::Instant;

use kvoyant_client::Answer;
use kvoyant_methods::Feedback;
use rayon::prelude::*;

use super::attention::{Pass, scores_of};
use super::{DaemonError, DaemonKv, DaemonSequence};

/// An attention row of one member and layer, for when the step's token is appended.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) member: usize,
    pub(super) layer: usize,
    pub(super) tokens: usize,
    pub(super) full: bool,
    /// `[Hkv][blocks]`.
    pub(super) blocks: Vec<f32>,
}

/// Softmax over the rows of `attended` tokens, the largest of the group's query heads, and of each block of tokens: `[blocks]`
/// of the `tokens` first tokens. Empty where rows have been dropped for good, so that nobody knows which token is which.
fn blocks_of(
    pass: &Pass<'_>,
    sequence: &DaemonSequence,
    (head, queries): (usize, &[f32]),
    attended: &[Range<usize>],
    (tokens, block): (usize, usize),
) -> Vec<f32> {
    let rows: usize = attended.iter().map(ExactSizeIterator::len).sum();
    let scores = scores_of(pass, sequence, head, queries, attended);
    let group = queries.len() / pass.shape.head_dim;
    if scores.len() != group * rows {
        return Vec::new();
    }
    let mut blocks = vec![0.0_f32; tokens.div_ceil(block)];
    for scores in scores.chunks_exact(rows.max(1)) {
        let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = scores.iter().map(|score| (score - most).exp()).sum();
        for (token, score) in attended.iter().cloned().flatten().zip(scores) {
            let weight = (score - most).exp() / sum;
            let largest = &mut blocks[token / block];
            *largest = largest.max(weight);
        }
    }
    blocks
}

impl DaemonKv {
    /// Sends the attention rows of the prompt's last tokens, as many as the method wants, oldest first.
    pub(super) fn report_prompt(&mut self, sequence: &mut DaemonSequence) -> Result<(), DaemonError> {
        let Some(Feedback { block, prompt_rows, .. }) = self.needs_of(sequence).feedback else {
            return Ok(());
        };
        let since = Instant::now();
        let (tails, from) = sequence.take_tails();
        let sequence = &*sequence;
        let (d, width) = (self.shape.head_dim, self.shape.query_heads * self.shape.head_dim);
        let group = self.shape.group() * d;
        for (layer, tail) in tails.iter().enumerate() {
            let kept = tail.queries.len() / width;
            let first = (tail.end - kept).max(from).max(tail.end.saturating_sub(prompt_rows));
            let pass = self.pass(layer, true);
            let _lease = self.lease(layer, &[(sequence, tail.end)])?;
            let rows: Vec<Vec<f32>> = (first..tail.end.min(sequence.tokens()))
                .into_par_iter()
                .map(|position| {
                    let tokens = position + 1;
                    let query = &tail.queries[(position + kept - tail.end) * width..][..width];
                    let heads = query.chunks_exact(group).enumerate();
                    heads
                        .flat_map(|head| {
                            blocks_of(
                                &pass,
                                sequence,
                                head,
                                std::slice::from_ref(&(0..tokens)),
                                (tokens, block),
                            )
                        })
                        .collect()
                })
                .collect();
            for (row, position) in rows.iter().zip(first..) {
                if !row.is_empty() {
                    self.model.feedback(sequence.inner(), layer, position + 1, true, row)?;
                }
            }
        }
        self.stats.feedback += since.elapsed();
        Ok(())
    }

    /// Computes the rows of a layer of a step, for members whose methods learn from them. `answer` is that of `members`.
    pub(super) fn collect_rows(
        &mut self,
        layer: usize,
        members: &[usize],
        answer: &Answer,
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
    ) {
        let since = Instant::now();
        let width = self.shape.query_heads * self.shape.head_dim;
        let group = self.shape.group() * self.shape.head_dim;
        let pass = self.pass(layer, true);
        let (mut new, mut bytes) = (Vec::new(), 0);
        for (at, &member) in members.iter().enumerate() {
            let (sequence, tokens) = (batch[at], positions[at] + 1);
            let Some(feedback) = self.needs_of(sequence).feedback else { continue };
            let every = feedback.calibrate_every;
            let full = every > 0 && (sequence.steps() + 1).is_multiple_of(every);
            let query = &queries[at * width..(at + 1) * width];
            let blocks: Vec<f32> = query
                .par_chunks_exact(group)
                .enumerate()
                .flat_map_iter(|(head, queries)| {
                    let attended = if full {
                        std::iter::once(0..tokens).collect()
                    } else {
                        pass.attended(answer, (at, head), tokens - 1)
                    };
                    blocks_of(&pass, sequence, (head, queries), &attended, (tokens, feedback.block))
                })
                .collect();
            if full {
                let all = self.shape.kv_heads * tokens;
                let attended = |head| -> usize {
                    pass.attended(answer, (at, head), tokens - 1).iter().map(ExactSizeIterator::len).sum()
                };
                let beyond = all.saturating_sub((0..self.shape.kv_heads).map(attended).sum());
                bytes += (beyond * self.shape.row_bytes() / 2) as u64;
            }
            if blocks.len() == self.shape.kv_heads * tokens.div_ceil(feedback.block) {
                new.push(Row { member, layer, tokens, full, blocks });
            }
        }
        self.rows.extend(new);
        self.stats.feedback_bytes += bytes;
        self.stats.feedback += since.elapsed();
    }

    /// Sends the step's rows, once its tokens are appended.
    pub(super) fn send_rows(&mut self, batch: &[&mut DaemonSequence]) -> Result<(), DaemonError> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let since = Instant::now();
        for row in std::mem::take(&mut self.rows) {
            let sequence = batch[row.member].inner();
            self.model.feedback(sequence, row.layer, row.tokens, row.full, &row.blocks)?;
        }
        self.stats.feedback += since.elapsed();
        Ok(())
    }
}
