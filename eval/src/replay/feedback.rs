//! Attention rows for methods that learn from them, as an engine would report them.

use kvoyant_methods::Replay;

use super::{LayerOutcome, Run};
use crate::truth::{StepTruth, kv_head_of};

impl Run<'_> {
    /// The attention row of a step, as the engine would report it.
    pub(super) fn feed_back(
        &self,
        replay: &mut Replay,
        truth: &StepTruth,
        attended: &[Vec<usize>],
        step: usize,
        out: &mut LayerOutcome,
    ) {
        let Some(feedback) = self.method.needs().feedback else { return };
        let full = feedback.calibrate_every > 0 && (step + 1).is_multiple_of(feedback.calibrate_every);
        let tokens = truth.probabilities.first().map_or(0, Vec::len);
        if full {
            out.feedback_keys += attended.iter().map(|attended| tokens - attended.len()).sum::<usize>();
            return self.send(replay, &truth.probabilities, tokens, true);
        }
        let rows: Vec<Vec<f32>> = truth
            .probabilities
            .iter()
            .enumerate()
            .map(|(head, row)| {
                let attended = &attended[kv_head_of(self.of.trace, head)];
                let total: f32 = attended.iter().map(|token| row[*token]).sum();
                let mut over = vec![0.0; tokens];
                for &token in attended {
                    over[token] = (row[token] / total.max(f32::MIN_POSITIVE)).min(1.0);
                }
                over
            })
            .collect();
        self.send(replay, &rows, tokens, false);
    }

    /// Sends attention rows `[Hq]` of `[tokens]`: the largest of a group, max-pooled in blocks.
    pub(super) fn send(&self, replay: &mut Replay, rows: &[Vec<f32>], tokens: usize, full: bool) {
        let Some(feedback) = self.method.needs().feedback else { return };
        let group = self.of.shape.group();
        for head in 0..self.of.shape.kv_heads {
            let blocks: Vec<f32> = (0..tokens.div_ceil(feedback.block))
                .map(|block| {
                    let range = block * feedback.block..((block + 1) * feedback.block).min(tokens);
                    let rows = &rows[head * group..][..group];
                    rows.iter().flat_map(|row| &row[range.clone()]).fold(0.0_f32, |a, b| a.max(*b))
                })
                .collect();
            replay.feedback(self.method, head, &blocks, full);
        }
    }
}
