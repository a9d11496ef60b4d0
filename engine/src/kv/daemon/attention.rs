//! Attention over rows in the session's memory: sinks, what the daemon answered with, window.
//!
//! The one place here that hands addresses to kernels.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ops::Range;

use kvoyant_client::{Answer, Ready};
use kvoyant_kernels::{Kernels, Run};
use kvoyant_methods::Selection;
use rayon::prelude::*;

use super::super::KvShape;
use super::super::attend::{attend_runs, scores_of_runs};
use super::sequence::DaemonSequence;

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

/// Which rows of a layer that the daemon selects for are attended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// Sinks and window.
    Local,
    /// The same without the current token's row, which may not be there yet.
    LocalBefore,
    /// Those of the answer.
    Answer,
    /// All of them.
    All,
}

/// What says which rows were selected.
pub(super) trait Named: Sync {
    /// The tokens of a member's KV head, rising.
    fn tokens_of(&self, member: usize, kv_head: usize) -> Vec<Range<usize>>;

    /// How many rows of a member were attended that it does not name, all heads together.
    fn cpu_rows(&self, member: usize) -> usize;
}

impl Named for Answer {
    fn tokens_of(&self, member: usize, kv_head: usize) -> Vec<Range<usize>> {
        self.tokens(member, kv_head).map(|run| run.token..run.token + run.rows).collect()
    }

    fn cpu_rows(&self, member: usize) -> usize {
        self.partial(member).map_or(0, |partial| partial.rows as usize)
    }
}

/// One member's, a selection for each KV head.
impl Named for [Selection] {
    fn tokens_of(&self, _member: usize, kv_head: usize) -> Vec<Range<usize>> {
        self[kv_head].head(0).iter().map(|range| range.first as usize..range.end() as usize).collect()
    }

    fn cpu_rows(&self, _member: usize) -> usize {
        0
    }
}

/// A group's queries and output, `[g][d]` each, and log-sum-exps, `[g]`.
type GroupRows<'a> = ((&'a [f32], &'a mut [f32]), &'a mut [f32]);

thread_local! {
    static RUNS: RefCell<Vec<Run>> = const { RefCell::new(Vec::new()) };
}

impl Pass<'_> {
    /// First token of the window, sinks left out.
    pub(super) fn window_start(&self, position: usize) -> usize {
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
        rows: Rows,
        runs: &mut Vec<Run>,
    ) {
        let [before, mut behind] = self.local(position);
        if rows == Rows::LocalBefore {
            behind.end = behind.end.min(position).max(behind.start);
        }
        if rows != Rows::Answer {
            sequence.inner().local_runs(self.layer, head, before, runs);
        }
        if let Some(ready) = ready
            && let Err(error) = ready.runs(i, head, runs)
        {
            // Answers on a device are attended there: see `DaemonKv::attend`.
            unreachable!("{error}");
        }
        if rows != Rows::Answer {
            sequence.inner().local_runs(self.layer, head, behind, runs);
        }
    }

    /// The tokens whose rows member `i` attends to, in order.
    pub(super) fn attended(
        &self,
        answer: &Answer,
        (i, head): (usize, usize),
        position: usize,
    ) -> Vec<Range<usize>> {
        let [before, behind] = self.local(position);
        let selected = answer.tokens(i, head).map(|run| run.token..run.token + run.rows);
        std::iter::once(before).chain(selected).chain([behind]).collect()
    }

    /// `queries` and `out` are `[batch][Hq][d]`, `lse` is `[batch][Hq]`. What the daemon's CPU has attended is merged in.
    pub(super) fn attend(
        &self,
        ready: Option<&Ready>,
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        (out, lse): (&mut [f32], &mut [f32]),
    ) {
        self.attend_rows(Rows::All, ready, |_| true, batch, positions, queries, (&mut *out, &mut *lse));
        if let Some(ready) = ready {
            self.merge(ready, batch.len(), (out, lse));
        }
    }

    /// The same, but that members of which `local` is true leave out the answer's rows.
    pub(super) fn attend_local(
        &self,
        ready: &Ready,
        local: &[bool],
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        (out, lse): (&mut [f32], &mut [f32]),
    ) {
        let with_answer = |i: usize| !local[i];
        self.attend_rows(
            Rows::All,
            Some(ready),
            with_answer,
            batch,
            positions,
            queries,
            (&mut *out, &mut *lse),
        );
        self.merge(ready, batch.len(), (out, lse));
    }

    /// Attention over a part of the rows, with nothing merged.
    pub(super) fn attend_part(
        &self,
        rows: Rows,
        ready: Option<&Ready>,
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        (out, lse): (&mut [f32], &mut [f32]),
    ) {
        self.attend_rows(rows, ready, |_| true, batch, positions, queries, (out, lse));
    }

    /// Attention of a KV head's queries `[group][d]` over the session's own rows of these tokens, on the calling thread.
    pub(super) fn attend_own(
        &self,
        sequence: &DaemonSequence,
        head: usize,
        tokens: impl IntoIterator<Item = Range<usize>>,
        queries: &[f32],
        (out, lse): (&mut [f32], &mut [f32]),
    ) {
        RUNS.with_borrow_mut(|runs| {
            runs.clear();
            sequence.inner().local_runs_of(self.layer, head, tokens, runs);
            // SAFETY: the runs lie in mappings that the sequence keeps alive for this call. Extents are written by this session alone, and
            // not at these rows while a step of it runs.
            unsafe { attend_runs(self.shape.layout(), queries, runs, out, lse) };
        });
    }

    #[allow(clippy::too_many_arguments)]
    fn attend_rows(
        &self,
        which: Rows,
        ready: Option<&Ready>,
        with_answer: impl Fn(usize) -> bool + Sync,
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        (out, lse): (&mut [f32], &mut [f32]),
    ) {
        let (kv_heads, d, group) = (self.shape.kv_heads, self.shape.head_dim, self.shape.group());
        let (group_values, layout) = (group * d, self.shape.layout());
        // One task per (sequence, KV head): `queries`, `out` and `lse` are laid out in that order.
        let one = |(task, ((q, o), lse)): (usize, GroupRows<'_>)| {
            let (i, head) = (task / kv_heads, task % kv_heads);
            RUNS.with_borrow_mut(|runs| {
                runs.clear();
                let answer = ready.filter(|_| with_answer(i));
                self.runs(answer, (i, head), batch[i], positions[i], which, runs);
                // SAFETY: the runs lie in mappings that the sequence and the answer keep alive for this call. Extents
                // are written by this session alone, and not at these rows while a step of it runs; slab slots of an
                // answer are left alone until it is dropped.
                unsafe { attend_runs(layout, q, runs, o, lse) };
            });
        };
        let rows = match ready {
            None if which != Rows::All => batch.len() * (self.sinks + self.window),
            None => positions.iter().sum::<usize>(),
            Some(ready) => ready.completion().rows_selected as usize / kv_heads + batch.len() * self.window,
        };
        if rows < PARALLEL_ROWS {
            let heads = queries.chunks(group_values).zip(out.chunks_mut(group_values));
            heads.zip(lse.chunks_mut(group)).enumerate().for_each(one);
        } else {
            let heads = queries.par_chunks(group_values).zip(out.par_chunks_mut(group_values));
            heads.zip(lse.par_chunks_mut(group)).enumerate().for_each(one);
        }
    }

    /// Merges what the daemon's CPU has attended.
    pub(super) fn merge(&self, answer: &Answer, members: usize, (out, lse): (&mut [f32], &mut [f32])) {
        let width = self.shape.query_heads * self.shape.head_dim;
        let own = out.chunks_exact_mut(width).zip(lse.chunks_exact_mut(self.shape.query_heads));
        for (i, (out, lse)) in own.enumerate().take(members) {
            if let Some(partial) = answer.partial(i) {
                Kernels::best().merge(out, lse, partial.out, partial.lse);
            }
        }
    }
}

/// Attention over all rows of sequences that have lost their daemon; `queries` and `out` are `[batch][Hq][d]`.
pub(super) fn attend_alone(
    pass: &Pass<'_>,
    batch: &[&DaemonSequence],
    positions: &[usize],
    queries: &[f32],
    out: &mut [f32],
) {
    let (kv_heads, group, row_bytes) = (pass.shape.kv_heads, pass.shape.group(), pass.shape.row_bytes());
    let values = group * pass.shape.head_dim;
    queries.par_chunks(values).zip(out.par_chunks_mut(values)).enumerate().for_each(|(task, (q, o))| {
        let (sequence, position, head) =
            (batch[task / kv_heads], positions[task / kv_heads], task % kv_heads);
        let tokens = pass.shape.first_visible(pass.layer, position)..position + 1;
        let (mut runs, mut lse) = (Vec::new(), vec![0.0; group]);
        if let Some(own) = sequence.own() {
            own.runs(sequence.inner(), (pass.layer, head, kv_heads), tokens, row_bytes, &mut runs);
        }
        // SAFETY: the runs lie in mappings that the sequence keeps alive, and in memory that it owns and is borrowed here. Neither is
        // written to while a step attends: extents are read only where the daemon never moves pages, and else what they held was copied.
        unsafe { attend_runs(pass.shape.layout(), q, &runs, o, &mut lse) };
    });
}

/// Scores of a KV head's queries `[group][d]` over the session's own rows of these tokens, scaled by `1/√d`:
/// `[group][rows]`. Rows that have been dropped for good are left out.
pub(super) fn scores_of(
    pass: &Pass<'_>,
    sequence: &DaemonSequence,
    head: usize,
    queries: &[f32],
    tokens: &[Range<usize>],
) -> Vec<f32> {
    let mut runs = Vec::new();
    for tokens in tokens {
        sequence.inner().local_runs(pass.layer, head, tokens.clone(), &mut runs);
    }
    // SAFETY: as in `Pass::attend`.
    unsafe { scores_of_runs(pass.shape.layout(), queries, &runs) }
}

/// Dense attention of a KV head's queries `[group][d]` over the session's own rows of the first `end` tokens:
/// `[group][d]`, and `[group]` log-sum-exps.
pub(super) fn dense_of(
    pass: &Pass<'_>,
    sequence: &DaemonSequence,
    head: usize,
    queries: &[f32],
    end: usize,
) -> (Vec<f32>, Vec<f32>) {
    let mut runs = Vec::new();
    sequence.inner().local_runs(pass.layer, head, 0..end, &mut runs);
    let (mut out, mut lse) = (vec![0.0; queries.len()], vec![0.0; queries.len() / pass.shape.head_dim]);
    // SAFETY: as in `Pass::attend`.
    unsafe { attend_runs(pass.shape.layout(), queries, &runs, &mut out, &mut lse) };
    (out, lse)
}
