//! Sparse prefill: a chunk of a prompt attends over sinks, what the daemon selects for a sample of its queries, the window
//! before it, and itself.

use kvoyant_client::{Hint, Member, SCORES_MAX};
use kvoyant_methods::RowPart;
use rayon::prelude::*;

use super::options::BLOCK_QUERIES;
use super::{DaemonError, DaemonKv, DaemonSequence};
use crate::decoder::causal::{Gathered, attend_gathered};

/// At most `most` of a chunk's queries `[T][width]`, evenly spread, the last among them; and how many.
fn sample(queries: &[f32], width: usize, most: usize) -> (Vec<f32>, usize) {
    let tokens = queries.len() / width;
    let count = tokens.min(most);
    let token = |i: usize| (i + 1) * tokens / count - 1;
    let values =
        (0..count).flat_map(|i| &queries[token(i) * width..(token(i) + 1) * width]).copied().collect();
    (values, count)
}

impl DaemonKv {
    /// See [`crate::KvBackend::attend_chunk`].
    pub(super) fn attend_selected(
        &mut self,
        layer: usize,
        sequence: &mut DaemonSequence,
        start: usize,
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<bool, DaemonError> {
        let needs = self.needs_of(sequence);
        let whole = needs.part == RowPart::Whole && !needs.drops_rows && needs.cpu_attention.is_none();
        let selects = needs.hint.is_query() && whole;
        if !self.speculates(layer) || !selects || sequence.digests().is_some() {
            return Ok(false);
        }
        // What it selects by must be known by now; statistics of the first chunk stand for the prompt's.
        self.send_statistics(sequence)?;
        let (d, width) = (self.shape.head_dim, self.shape.query_heads * self.shape.head_dim);
        let tokens = queries.len() / width;
        // The daemon keeps a score of each query for each token before the chunk.
        let group = self.shape.query_heads / self.shape.kv_heads;
        let most = (SCORES_MAX / (group * start.max(1))).clamp(1, BLOCK_QUERIES);
        let (hint, count) = sample(queries, width, most);
        let member = Member { sequence: sequence.inner(), position: start, hint: Hint::Query(&hint) };
        self.asks_again();
        let pending = self.model.speculate_block(layer, &[member], count)?;
        // A chunk of a prompt can attend to all rows as well.
        let Some(ready) = self.wait(pending)? else { return Ok(false) };
        let pass = self.pass(layer, true);
        let (layout, row_bytes) = (self.shape.layout(), self.shape.row_bytes());
        let on_host = self.device.is_none();
        let heads = (0..self.shape.kv_heads)
            .into_par_iter()
            .map(|head| {
                let mut rows = Vec::new();
                let local = |tokens: std::ops::Range<usize>, rows: &mut Vec<u8>| {
                    let at = rows.len();
                    rows.resize(at + tokens.len() * row_bytes, 0);
                    sequence.inner().read_rows(layer, head, tokens, &mut rows[at..])
                };
                local(0..self.options.sinks.min(start), &mut rows)?;
                if on_host {
                    ready.copy_rows(0, head, &mut rows)?;
                } else {
                    // Attention of prompts runs on the CPU, which reads the same rows in the extents.
                    for run in ready.tokens(0, head) {
                        local(run.token..run.token + run.rows, &mut rows)?;
                    }
                }
                local(pass.window_start(start).min(start)..start + tokens, &mut rows)?;
                let values = rows.len() / row_bytes * d;
                let (mut k, mut v) = (vec![0.0; values], vec![0.0; values]);
                layout.decode_keys(&rows, &mut k);
                layout.decode_values(&rows, &mut v);
                Ok((k, v))
            })
            .collect::<Result<Vec<_>, DaemonError>>()?;
        let gathered = Gathered { query_heads: self.shape.query_heads, d, queries, heads: &heads };
        attend_gathered(&gathered, out);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_spread_over_the_chunk_and_has_its_last_query() {
        let queries: Vec<f32> = (0..200).map(|t| t as f32).collect();
        let (values, count) = sample(&queries, 1, 64);
        assert_eq!((count, values.len(), values[63]), (64, 64, 199.0));
        assert!(values.windows(2).all(|pair| (3.0..=4.0).contains(&(pair[1] - pair[0]))));
        assert_eq!(sample(&queries[..3], 1, 64), (vec![0.0, 1.0, 2.0], 3));
        assert_eq!(sample(&queries, 1, 1), (vec![199.0], 1));
    }
}
