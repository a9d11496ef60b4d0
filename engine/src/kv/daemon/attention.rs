//! Attention over rows in the session's memory: sinks, what the daemon answered with, window.
//!
//! The one place here that hands addresses to kernels.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ops::Range;

use kvoyant_client::{Answer, Ready};
use kvoyant_kernels::Run;
use rayon::prelude::*;

use super::super::KvShape;
use super::super::attend::{attend_runs, weights_of_runs};
use super::sequence::DaemonSequence;
use super::stats::StepStats;

/// Rows below which a step attends on the calling thread: waking another one costs more than it saves.
const PARALLEL_ROWS: usize = 256;

/// One layer of one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) shape: &'a KvShape,
    pub(super) sinks: usize,
    pub(super) window: usize,
    pub(super) layer: usize,
    /// Whether the daemon selects rows; else the layer attends to all that it sees.
    pub(super) selects: bool,
}

thread_local! {
    static RUNS: RefCell<Vec<Run>> = const { RefCell::new(Vec::new()) };
}

impl Pass<'_> {
    /// First token of the window, sinks left out.
    fn window_start(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window).max(self.sinks.min(position + 1))
    }

    /// The tokens that are read in the session's extents: those before what the daemon selects, and those behind it.
    pub(super) fn local(&self, position: usize) -> [Range<usize>; 2] {
        let end = position + 1;
        if self.selects {
            [0..self.sinks.min(end), self.window_start(position)..end]
        } else {
            [self.shape.first_visible(self.layer, position)..end, end..end]
        }
    }

    /// The rows that member `i` attends to, in token order. `ready` is there if the daemon selects.
    fn runs(
        &self,
        ready: Option<&Ready>,
        (i, head): (usize, usize),
        sequence: &DaemonSequence,
        position: usize,
        runs: &mut Vec<Run>,
    ) {
        let [before, behind] = self.local(position);
        sequence.inner().local_runs(self.layer, head, before, runs);
        if let Some(ready) = ready
            && let Err(error) = ready.runs(i, head, runs)
        {
            // Answers on a device are attended there: see `DaemonKv::attend`.
            unreachable!("{error}");
        }
        sequence.inner().local_runs(self.layer, head, behind, runs);
    }

    /// `queries` and `out` are `[batch][Hq][d]`.
    pub(super) fn attend(
        &self,
        ready: Option<&Ready>,
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) {
        let KvShape { kv_heads, head_dim: d, dtype, .. } = *self.shape;
        let group_values = self.shape.group() * d;
        // One task per (sequence, KV head): `queries` and `out` are laid out in that order.
        let one = |(task, (q, o)): (usize, (&[f32], &mut [f32]))| {
            let (i, head) = (task / kv_heads, task % kv_heads);
            RUNS.with_borrow_mut(|runs| {
                runs.clear();
                self.runs(ready, (i, head), batch[i], positions[i], runs);
                // SAFETY: the runs lie in mappings that the sequence and the answer keep alive for this call. Extents
                // are written by this session alone, and not at these rows while a step of it runs; slab slots of an
                // answer are left alone until it is dropped.
                unsafe { attend_runs(dtype, q, d, runs, o) };
            });
        };
        let rows = match ready {
            None => positions.iter().sum::<usize>(),
            Some(ready) => ready.completion().rows_selected as usize / kv_heads + batch.len() * self.window,
        };
        if rows < PARALLEL_ROWS {
            queries.chunks(group_values).zip(out.chunks_mut(group_values)).enumerate().for_each(one);
        } else {
            queries.par_chunks(group_values).zip(out.par_chunks_mut(group_values)).enumerate().for_each(one);
        }
    }

    /// Adds the share of the true attention that the attended rows cover, one share per query head.
    pub(super) fn add_mass(
        &self,
        answer: &Answer,
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        stats: &mut StepStats,
    ) {
        let KvShape { kv_heads, head_dim: d, dtype, .. } = *self.shape;
        let group_values = self.shape.group() * d;
        let shares: Vec<f64> = queries
            .par_chunks(group_values)
            .enumerate()
            .flat_map_iter(|(task, q)| {
                let (i, head) = (task / kv_heads, task % kv_heads);
                let end = positions[i] + 1;
                let mut runs = Vec::new();
                batch[i].inner().local_runs(self.layer, head, 0..end, &mut runs);
                // SAFETY: as in `attend`.
                let weights = unsafe { weights_of_runs(dtype, q, d, &runs) };
                let mut attended = vec![false; end];
                attended[..self.sinks.min(end)].fill(true);
                attended[self.window_start(positions[i])..].fill(true);
                for run in answer.tokens(i, head) {
                    let tokens = run.token..run.token.saturating_add(run.rows);
                    attended.get_mut(tokens).into_iter().for_each(|tokens| tokens.fill(true));
                }
                // A pool that dropped rows for good leaves fewer rows than tokens, and then nothing can be said.
                let whole = weights.len() == q.len() / d * end;
                let share = move |weights: &[f32]| {
                    weights
                        .iter()
                        .zip(&attended)
                        .filter(|(_, attended)| **attended)
                        .map(|(w, _)| f64::from(*w))
                        .sum()
                };
                weights.chunks(end).filter(|_| whole).map(share).collect::<Vec<f64>>()
            })
            .collect();
        stats.mass_count += shares.len() as u64;
        stats.mass += shares.iter().sum::<f64>();
    }
}
