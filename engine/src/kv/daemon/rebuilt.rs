//! Keys that are rebuilt instead of moved (ShadowKV, Sun et al., ICML'25): low-rank factors of a prompt's keys before RoPE,
//! made when the prompt is complete and shared by forks.
//!
//! Rows of later tokens are in no factors: their keys are read in the session's extents. Where rows are copied to a slab, such keys
//! count among the bytes moved, each time: only V of them has come.

use std::sync::Arc;

use kvoyant_client::Ready;
use kvoyant_kernels::quantise::Format;
use kvoyant_kernels::{Dtype, Kernels, RowLayout};
use kvoyant_methods::shadowkv::{Factors, ShadowKvSpec};
use kvoyant_methods::{Budget, MethodSpec, RowPart};
use rayon::prelude::*;

use super::super::attend::attend;
use super::attention::Pass;
use super::lease::lease_of;
use super::{DaemonError, DaemonKv, DaemonSequence};
use crate::rope::Rope;

/// The factors of a prompt at each rank that a method of the session has, and how many of their tokens are still this sequence's.
#[derive(Debug, Clone, Default)]
pub(super) struct Rebuilt {
    made: Arc<Vec<AtRank>>,
    pub(super) tokens: usize,
}

/// The factors of every layer that the daemon selects for.
#[derive(Debug)]
struct AtRank {
    rank: Budget,
    layers: Vec<Option<Factors>>,
}

impl Rebuilt {
    fn factors(&self, rank: Budget, layer: usize) -> Option<&Factors> {
        let at_rank = self.made.iter().find(|made| made.rank == rank)?;
        at_rank.layers.get(layer).and_then(Option::as_ref)
    }
}

/// The rank of a method whose keys are rebuilt.
fn rank_of(spec: &MethodSpec) -> Option<Budget> {
    spec.options::<ShadowKvSpec>().map(|spec| spec.rank)
}

impl DaemonKv {
    /// The rank of the keys of this sequence's method; `None`: its keys are moved.
    pub(super) fn rebuilt_rank(&self, sequence: &DaemonSequence) -> Option<Budget> {
        let method = sequence.method();
        if self.needs[method].part == RowPart::Values { rank_of(&self.options.methods[method]) } else { None }
    }

    /// Whether the session can serve methods whose keys are rebuilt, if it has any.
    pub(super) fn check_rebuilt(&self) -> Result<(), DaemonError> {
        let rebuilds = self.needs.iter().zip(&self.options.methods);
        for (_, method) in rebuilds.filter(|(needs, _)| needs.part == RowPart::Values) {
            let why = if self.device.is_some() {
                "attention runs on a GPU, which has no kernel for that"
            } else if self.options.rope.is_none() {
                "`DaemonOptions::rope` does not say how they are rotated"
            } else if rank_of(method).is_none() {
                "nobody says at which rank"
            } else {
                continue;
            };
            return Err(DaemonError::Rebuilt { method: Box::new(method.clone()), why });
        }
        Ok(())
    }

    /// Makes the factors of a complete prompt, once, for all methods of the session that rebuild keys: forks may choose them.
    pub(super) fn factorise(&self, sequence: &mut DaemonSequence) -> Result<(), DaemonError> {
        let rebuilding = self.needs.iter().zip(&self.options.methods);
        let mut ranks: Vec<Budget> = Vec::new();
        for (_, method) in rebuilding.filter(|(needs, _)| needs.part == RowPart::Values) {
            ranks.extend(rank_of(method).filter(|rank| !ranks.contains(rank)));
        }
        if ranks.is_empty() {
            return Ok(());
        }
        let (tokens, Some(rope)) = (sequence.tokens(), &self.options.rope) else { return Ok(()) };
        if tokens == 0 || !sequence.rebuilt().made.is_empty() {
            return Ok(());
        }
        let back = rope.table(0..tokens).inverse();
        let (heads, d) = (self.shape.kv_heads, self.shape.head_dim);
        let (layout, row_bytes) = (self.shape.layout(), self.shape.row_bytes());
        let inner = sequence.inner();
        let selected: Vec<bool> = (0..self.shape.layers).map(|layer| self.speculates(layer)).collect();
        // Layers that have to be brought back to memory come one after the other.
        let at_once = if self.model.spills() { selected.len() } else { 1 };
        let (whole, model, deadline) = (&*sequence, &self.model, self.options.deadline);
        let layers = selected
            .into_par_iter()
            .with_min_len(at_once)
            .enumerate()
            .map(|(layer, selected)| {
                if !selected {
                    return Ok(vec![None; ranks.len()]);
                }
                let _lease = lease_of(model, deadline, layer, &[(whole, tokens)])?;
                let mut all = vec![0.0; tokens * heads * d];
                let (mut rows, mut keys) = (vec![0; tokens * row_bytes], vec![0.0; tokens * d]);
                for head in 0..heads {
                    inner.read_rows(layer, head, 0..tokens, &mut rows)?;
                    layout.decode_keys(&rows, &mut keys);
                    for (token, key) in keys.chunks_exact_mut(d).enumerate() {
                        back.rotate(token, key);
                        all[(token * heads + head) * d..][..d].copy_from_slice(key);
                    }
                }
                Ok(ranks.iter().map(|rank| Some(Factors::new(&all, heads * d, d, *rank))).collect())
            })
            .collect::<Result<Vec<Vec<_>>, DaemonError>>()?;
        let mut made: Vec<AtRank> = ranks
            .iter()
            .map(|rank| AtRank { rank: *rank, layers: Vec::with_capacity(layers.len()) })
            .collect();
        for layer in layers {
            made.iter_mut().zip(layer).for_each(|(made, factors)| made.layers.push(factors));
        }
        sequence.set_rebuilt(Rebuilt { made: Arc::new(made), tokens });
        Ok(())
    }
}

impl Pass<'_> {
    /// Attention of member `i` over its selected rows, V as it was moved and K as it is rebuilt, into `out: [Hq][d]` and
    /// `lse: [Hq]`: to be merged with that over the local rows. How many rows are in no factors.
    pub(super) fn attend_rebuilt(
        &self,
        ready: &Ready,
        (i, sequence, rank): (usize, &DaemonSequence, Budget),
        rope: &Rope,
        queries: &[f32],
        (out, lse): (&mut [f32], &mut [f32]),
    ) -> Result<usize, DaemonError> {
        let (d, group) = (self.shape.head_dim, self.shape.group());
        let (layout, row_bytes) = (self.shape.layout(), self.shape.row_bytes());
        let plain = RowLayout::KeyValue { d, format: Format::Plain(Dtype::F32) };
        let rebuilt = sequence.rebuilt();
        let factors = rebuilt.factors(rank, self.layer);
        let in_factors = |token: usize| factors.filter(|made| token < rebuilt.tokens.min(made.tokens()));
        let heads = queries.par_chunks_exact(group * d).zip(out.par_chunks_exact_mut(group * d));
        let heads = heads.zip(lse.par_chunks_exact_mut(group)).enumerate();
        let in_none = heads.map(|(head, ((q, out), lse))| {
            let mut moved = Vec::new();
            ready.copy_rows(i, head, &mut moved)?;
            let mut values = vec![0.0; moved.len() / row_bytes * d];
            layout.decode_values(&moved, &mut values);
            let tokens: Vec<usize> =
                ready.tokens(i, head).flat_map(|run| run.token..run.token + run.rows).collect();
            let table = rope.table(tokens.iter().copied());
            let mut rows = Vec::with_capacity(tokens.len() * 2 * d);
            let (mut key, mut real) = (vec![0.0; d], vec![0; row_bytes]);
            for (at, &token) in tokens.iter().enumerate() {
                match in_factors(token) {
                    Some(factors) => {
                        factors.rebuild(token, head, &mut key);
                        table.rotate(at, &mut key);
                    }
                    None => {
                        sequence.inner().read_rows(self.layer, head, token..token + 1, &mut real)?;
                        layout.decode_keys(&real, &mut key);
                    }
                }
                rows.extend_from_slice(&key);
                rows.extend_from_slice(&values[at * d..(at + 1) * d]);
            }
            attend(plain, q, &[bytemuck::cast_slice(&rows)], out, lse);
            Ok::<usize, DaemonError>(tokens.iter().filter(|token| in_factors(**token).is_none()).count())
        });
        in_none.sum()
    }

    /// Attention of a group, some of whose members have keys rebuilt at a rank: local rows as they are, selected ones rebuilt. How
    /// many of these are in no factors.
    pub(super) fn attend_with_rebuilt(
        &self,
        ready: &Ready,
        (batch, positions): (&[&DaemonSequence], &[usize]),
        (ranks, rope): (&[Option<Budget>], &Rope),
        queries: &[f32],
        (out, lse): (&mut [f32], &mut [f32]),
    ) -> Result<usize, DaemonError> {
        let (width, heads) = (self.shape.query_heads * self.shape.head_dim, self.shape.query_heads);
        let local: Vec<bool> = ranks.iter().map(Option::is_some).collect();
        self.attend_local(ready, &local, batch, positions, queries, (&mut *out, &mut *lse));
        let (mut part, mut part_lse) = (vec![0.0; width], vec![0.0; heads]);
        let mut whole = 0;
        for (i, rank) in ranks.iter().enumerate() {
            let Some(rank) = *rank else { continue };
            let own = i * width..(i + 1) * width;
            let parts = (&mut part[..], &mut part_lse[..]);
            whole += self.attend_rebuilt(ready, (i, batch[i], rank), rope, &queries[own.clone()], parts)?;
            let lse = &mut lse[i * heads..(i + 1) * heads];
            Kernels::best().merge(&mut out[own], lse, &part, &part_lse);
        }
        Ok(whole)
    }
}
