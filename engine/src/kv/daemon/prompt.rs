//! The prompt: its statistics, the queries that are kept of it, and what is sent when it is complete.

use kvoyant_methods::{HintSource, Needs, Shape, infinigen};
use rayon::prelude::*;

use super::{DaemonError, DaemonKv, DaemonSequence};

impl DaemonKv {
    /// Sends what is due at the end of a prompt: the statistics of its queries, once per sequence, attention rows that its
    /// method learns from; and makes what keys are rebuilt from.
    pub(super) fn finish_prompt(&mut self, sequence: &mut DaemonSequence) -> Result<(), DaemonError> {
        self.send_statistics(sequence)?;
        self.factorise(sequence)?;
        self.report_prompt(sequence)
    }

    /// Sends the statistics of the prompt's queries, once per sequence.
    pub(super) fn send_statistics(&self, sequence: &mut DaemonSequence) -> Result<(), DaemonError> {
        let Some(sums) = sequence.take_sums() else { return Ok(()) };
        let width = self.shape.kv_heads * self.shape.head_dim;
        for (layer, sums) in sums.chunks_exact(width).enumerate() {
            self.model.observe(sequence.inner(), layer, sums)?;
        }
        Ok(())
    }

    /// Adds rows of a prompt, per KV head, to a layer's statistics, until they have been sent.
    pub(super) fn add_sums<'r>(
        &self,
        layer: usize,
        sequence: &mut DaemonSequence,
        rows: impl Fn(&Shape, usize) -> infinigen::HeadRows<'r> + Sync,
    ) {
        let (shape, d) = (&self.methods_shape, self.shape.head_dim);
        let width = shape.kv_heads * d;
        let Some(sums) = sequence.sums_mut(self.shape.layers * width) else { return };
        let turned = self.statistics.is_some_and(|statistics| statistics.skew);
        let skew = self.options.artifacts.skew().filter(|_| turned);
        sums[layer * width..(layer + 1) * width].par_chunks_exact_mut(d).enumerate().for_each(
            |(head, sums)| {
                let matrix = skew.map_or(&[][..], |skew| skew.matrix(layer, head));
                infinigen::column_sums(matrix, &rows(shape, head), sums);
            },
        );
    }

    /// Keeps what a chunk's queries are wanted for later. A fork may choose another method, so what any of the session's
    /// methods wants is kept.
    pub(super) fn keep_queries(
        &self,
        layer: usize,
        sequence: &mut DaemonSequence,
        start: usize,
        queries: &[f32],
    ) {
        let width = self.shape.query_heads * self.shape.head_dim;
        let rows = self.needs.iter().filter_map(|needs| needs.feedback).map(|feedback| feedback.prompt_rows);
        let most = rows.max().unwrap_or(0);
        if most > 0 && self.speculates(layer) {
            sequence.keep_queries(layer, start, queries, width, most);
        }
        if self.keeps_last() {
            sequence.set_last(layer, &queries[queries.len() - width..]);
        }
    }

    /// Whether the newest token's query is wanted one step later.
    pub(super) fn keeps_last(&self) -> bool {
        let previous = |needs: &Needs| needs.hint == HintSource::Previous;
        self.needs.iter().any(previous)
    }
}
