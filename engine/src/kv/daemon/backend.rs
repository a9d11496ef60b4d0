//! What the calls of the decoder do with the daemon.

use std::ops::Range;

use kvoyant_client::{Fallback, Mode};
use kvoyant_kernels::Kernels;
use kvoyant_methods::{Budget, HintSource, infinigen};
use rayon::prelude::*;

use super::super::KvShape;
use super::ask::{Asked, Moment, Partial, Waiting};
use super::attention::{Pass, Rows};
use super::device::Layer;
use super::measure::Attended;
use super::sequence::Summed;
use super::{DaemonError, DaemonKv, DaemonSequence};

/// Members of a step that attend together.
struct Group {
    /// Indices into the step's batch.
    members: Vec<usize>,
    /// The answer that they wait for; without one they attend to everything.
    asked: Option<Waiting>,
    /// What they have attended already.
    local: Option<Partial>,
}

/// Rows of one layer of one step: `[batch][Hq][d]`, and where they go.
struct Heads<'a> {
    queries: &'a [f32],
    out: &'a mut [f32],
}

impl DaemonKv {
    pub(super) fn pass(&self, layer: usize, selects: bool) -> Pass<'_> {
        let (sinks, window) = (self.options.sinks, self.options.window);
        Pass { shape: &self.shape, sinks, window, layer, selects }
    }

    /// The groups of a layer: those that were asked for, and who was not and has not attended yet, who attends to everything.
    fn groups(&mut self, layer: usize, members: usize, attended: &[usize]) -> Vec<Group> {
        let asked = std::mem::take(&mut self.pending[layer]);
        let mut left: Vec<usize> = (0..members).filter(|member| !attended.contains(member)).collect();
        let mut groups = Vec::with_capacity(asked.len() + 1);
        for Asked { members, answer, local } in asked {
            left.retain(|member| !members.contains(member));
            groups.push(Group { members, asked: Some(answer), local });
        }
        if !left.is_empty() {
            groups.push(Group { members: left, asked: None, local: None });
        }
        groups
    }

    /// Attention of one group, whose members `batch` has.
    fn attend_group(
        &mut self,
        layer: usize,
        Group { members, asked, local }: Group,
        batch: &[&DaemonSequence],
        positions: &[usize],
        Heads { queries, out }: Heads<'_>,
    ) -> Result<(), DaemonError> {
        if let Some(asked) = &asked
            && self.is_late(asked)?
        {
            self.attend_late(layer, batch, positions, queries, out);
            return Ok(());
        }
        let learns = batch.iter().any(|sequence| self.needs_of(sequence).feedback.is_some());
        let attends = batch.iter().any(|sequence| self.needs_of(sequence).cpu_attention.is_some());
        let estimates = batch.iter().any(|sequence| self.needs_of(sequence).rest);
        let mut lse = vec![0.0; members.len() * self.shape.query_heads];
        let deadline = self.options.deadline;
        let reads_all = asked.is_none() || self.measure || learns;
        let whole: Vec<_> = batch.iter().copied().zip(positions.iter().copied()).collect();
        let _lease = if reads_all { self.lease(layer, &whole)? } else { None };
        let answer = if let Some(device) = &mut self.device {
            let asked = match asked {
                None => None,
                Some(Waiting::Stream(pending)) => Some(pending),
                Some(Waiting::Host(pending)) => Some(pending.on_stream()?),
                Some(Waiting::Nobody) => None,
            };
            let pass = Pass {
                shape: &self.shape,
                sinks: self.options.sinks,
                window: self.options.window,
                layer,
                selects: asked.is_some(),
            };
            let keeps = self.options.fallback == Fallback::Partial;
            let wanted = self.measure || learns || attends || estimates || keeps;
            let attended = Layer { pass, batch, positions, queries };
            let answered = device.attend(attended, asked, deadline, wanted, (&mut *out, &mut lse))?;
            let Some(answered) = answered else { return Ok(()) };
            self.stats.answered(answered.waited, &answered.completion, &mut self.generation);
            let Some(answer) = answered.answer else { return Ok(()) };
            pass.merge(&answer, batch.len(), (&mut *out, &mut lse));
            self.keep_named_rows(layer, &answer, &members);
            answer
        } else {
            let ready = match asked {
                Some(Waiting::Host(pending)) => {
                    let Some(ready) = self.wait(pending)? else {
                        self.attend_late(layer, batch, positions, queries, out);
                        return Ok(());
                    };
                    self.keep_named_rows(layer, &ready, &members);
                    Some(ready)
                }
                // Streams are asked for where there is a device alone.
                Some(Waiting::Stream(_) | Waiting::Nobody) | None => None,
            };
            let pass = self.pass(layer, ready.is_some());
            let ranks: Vec<Option<Budget>> =
                batch.iter().map(|sequence| self.rebuilt_rank(sequence)).collect();
            match (&ready, &local, &self.options.rope) {
                (Some(ready), Some(local), _) => {
                    pass.attend_part(
                        Rows::Answer,
                        Some(ready),
                        batch,
                        positions,
                        queries,
                        (&mut *out, &mut lse),
                    );
                    Kernels::best().merge(out, &mut lse, &local.out, &local.lse);
                    pass.merge(ready, batch.len(), (&mut *out, &mut lse));
                }
                (Some(ready), None, Some(rope)) if ranks.iter().any(Option::is_some) => {
                    let members = (batch, positions);
                    let into = (&mut *out, &mut lse[..]);
                    let whole = pass.attend_with_rebuilt(ready, members, (&ranks, rope), queries, into)?;
                    if self.model.mode() == Mode::Slab {
                        self.stats.bytes_moved += (whole * self.shape.row_bytes() / 2) as u64;
                    }
                }
                (ready, ..) => pass.attend(ready.as_ref(), batch, positions, queries, (&mut *out, &mut lse)),
            }
            let Some(ready) = ready else { return Ok(()) };
            if !(self.measure || learns || attends || estimates) {
                return Ok(());
            }
            (*ready).clone()
        };
        let (mut certificates, mut exact) = (Vec::new(), Vec::new());
        if estimates {
            let attended = (&mut *out, &mut lse[..]);
            (certificates, exact) = self.add_rest(layer, &answer, batch, positions, queries, attended)?;
        }
        let partials = (0..members.len()).filter_map(|member| answer.partial(member));
        self.stats.rows_cpu += partials.map(|partial| u64::from(partial.rows)).sum::<u64>();
        if self.measure {
            let attended = Attended { queries, out, certificates: &certificates, exact: &exact };
            let measured = self.pass(layer, true).measure(&answer, batch, positions, attended);
            self.stats.measured += measured;
        }
        if learns {
            self.collect_rows(layer, &members, &answer, batch, positions, queries);
        }
        Ok(())
    }
}

impl DaemonKv {
    pub(super) fn store_there(
        &mut self,
        layer: usize,
        sequence: &mut DaemonSequence,
        start: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), DaemonError> {
        let KvShape { kv_heads, head_dim: d, .. } = self.shape;
        let (layout, row_bytes) = (self.shape.layout(), self.shape.row_bytes());
        let tokens = k.len() / (kv_heads * d);
        // A step that failed before this prefill is over.
        self.in_step = false;
        if self.statistics.is_some_and(|statistics| statistics.keys) {
            let there = sequence.sums_up(layer, Summed::Keys, &(start..start + tokens));
            let k = &k[there * kv_heads * d..];
            self.add_sums(layer, sequence, |shape, head| infinigen::HeadRows::keys(k, shape, head));
        }
        self.make_room(&[(sequence, start + tokens)])?;
        let sequence = sequence.inner();
        (0..kv_heads).into_par_iter().try_for_each(|head| {
            let mut rows = vec![0; tokens * row_bytes];
            for (t, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
                let at = (t * kv_heads + head) * d;
                layout.encode(&k[at..at + d], &v[at..at + d], row);
            }
            Ok(sequence.write_rows(layer, head, start, &rows)?)
        })
    }

    pub(super) fn read_there(
        &mut self,
        layer: usize,
        sequence: &DaemonSequence,
        tokens: Range<usize>,
        k: &mut [f32],
        v: &mut [f32],
    ) -> Result<(), DaemonError> {
        let (layout, row_bytes) = (self.shape.layout(), self.shape.row_bytes());
        let _lease = self.lease(layer, &[(sequence, tokens.end)])?;
        let head_values = tokens.len() * self.shape.head_dim;
        let sequence = sequence.inner();
        k.par_chunks_mut(head_values).zip(v.par_chunks_mut(head_values)).enumerate().try_for_each(
            |(head, (k, v))| {
                let mut rows = vec![0; tokens.len() * row_bytes];
                sequence.read_rows(layer, head, tokens.clone(), &mut rows)?;
                layout.decode_keys(&rows, k);
                layout.decode_values(&rows, v);
                Ok(())
            },
        )
    }

    pub(super) fn observe_queries_there(
        &mut self,
        layer: usize,
        sequence: &mut DaemonSequence,
        start: usize,
        queries: &[f32],
    ) -> Result<(), DaemonError> {
        if self.statistics.is_some() {
            let width = self.methods_shape.query_heads * self.methods_shape.head_dim;
            let there = sequence.sums_up(layer, Summed::Queries, &(start..start + queries.len() / width));
            let new = &queries[there * width..];
            self.add_sums(layer, sequence, |shape, head| infinigen::HeadRows::queries(new, shape, head));
        }
        self.keep_queries(layer, sequence, start, queries);
        Ok(())
    }

    pub(super) fn commit_there(
        &mut self,
        sequence: &mut DaemonSequence,
        tokens: usize,
    ) -> Result<(), DaemonError> {
        let new = tokens - sequence.tokens();
        sequence.set_tokens(tokens);
        if !self.in_step && new > 0 {
            self.tell(sequence)?;
            self.model.append(&[(sequence.inner(), new)])?;
            self.digest(sequence, tokens)?;
        }
        Ok(())
    }

    pub(super) fn begin_step_there(
        &mut self,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
    ) -> Result<(), DaemonError> {
        self.asks_again();
        self.in_step = false;
        self.pending.iter_mut().for_each(Vec::clear);
        self.chosen.iter_mut().for_each(Vec::clear);
        self.asked.fill(None);
        self.rows.clear();
        self.named.clear();
        let still = self.stands_still()?;
        for (sequence, position) in batch.iter_mut().zip(positions) {
            if !still {
                self.tell(sequence)?;
                self.finish_prompt(sequence)?;
            }
            self.digest(sequence, *position)?;
        }
        let unasked = still && batch.iter().any(|sequence| sequence.has_prompt_to_finish());
        self.begin_asking(unasked)?;
        let wanted: Vec<_> =
            batch.iter().zip(positions).map(|(sequence, position)| (&**sequence, position + 1)).collect();
        self.make_room(&wanted)?;
        self.in_step = true;
        self.hinted = batch.iter().any(|sequence| self.needs_of(sequence).hint == HintSource::Ahead);
        // A first layer that is not dense has nothing before it to be predicted from: members that want to be asked by
        // a prediction attend to everything there.
        if self.speculates(0) {
            self.ask(Moment::Ahead, 0, &shared(batch), positions, &[])?;
        }
        Ok(())
    }

    pub(super) fn hint_there(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        queries: &[f32],
    ) -> Result<(), DaemonError> {
        self.ask(Moment::Ahead, layer, &shared(batch), positions, queries)?;
        self.choose_here(layer, batch, positions, queries)
    }

    pub(super) fn append_there(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        k: &[f32],
        v: &[f32],
    ) -> Result<(), DaemonError> {
        let next = layer + 1;
        if !self.hinted && next < self.shape.layers && self.speculates(next) {
            self.ask(Moment::Ahead, next, &shared(batch), positions, &[])?;
        }
        let KvShape { kv_heads, head_dim: d, .. } = self.shape;
        let layout = self.shape.layout();
        let mut row = vec![0; self.shape.row_bytes()];
        for (i, sequence) in batch.iter().enumerate() {
            for head in 0..kv_heads {
                let at = (i * kv_heads + head) * d;
                layout.encode(&k[at..at + d], &v[at..at + d], &mut row);
                sequence.inner().write_rows(layer, head, positions[i], &row)?;
            }
        }
        Ok(())
    }

    pub(super) fn attend_there(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<(), DaemonError> {
        if let Some(asked) = self.asked[layer].take() {
            // The shortest of the last steps, nearly: what is late then is late at most now and then.
            let took = asked.elapsed();
            self.hidden[layer] =
                Some(self.hidden[layer].map_or(took, |before| took.min(before + before / 16)));
        }
        let mut attended = Vec::new();
        if self.speculates(layer) {
            self.ask(Moment::Current, layer, &shared(batch), positions, queries)?;
            attended = self.attend_here(layer, batch, positions, queries, out)?;
        }
        let width = self.shape.query_heads * self.shape.head_dim;
        for group in self.groups(layer, batch.len(), &attended) {
            if group.members.len() == batch.len() {
                let heads = Heads { queries, out: &mut *out };
                self.attend_group(layer, group, &shared(batch), positions, heads)?;
                continue;
            }
            let members = group.members.clone();
            let part: Vec<&DaemonSequence> = members.iter().map(|i| &*batch[*i]).collect();
            let at: Vec<usize> = members.iter().map(|i| positions[*i]).collect();
            let own = |i: &usize| i * width..(i + 1) * width;
            let asking: Vec<f32> = members.iter().flat_map(|i| &queries[own(i)]).copied().collect();
            let mut attended = vec![0.0; asking.len()];
            let heads = Heads { queries: &asking, out: &mut attended };
            self.attend_group(layer, group, &part, &at, heads)?;
            for (i, attended) in members.iter().zip(attended.chunks_exact(width)) {
                out[own(i)].copy_from_slice(attended);
            }
        }
        for (member, named) in std::mem::take(&mut self.named) {
            batch[member].set_named(layer, named);
        }
        self.check_missed(layer, &shared(batch))?;
        if self.keeps_last() {
            for (sequence, query) in batch.iter_mut().zip(queries.chunks_exact(width)) {
                sequence.set_last(layer, query);
            }
        }
        Ok(())
    }

    pub(super) fn end_step_there(&mut self, batch: &mut [&mut DaemonSequence]) -> Result<(), DaemonError> {
        self.in_step = false;
        if self.unasked || self.stands_still()? {
            self.rows.clear();
            batch.iter_mut().for_each(|sequence| {
                sequence.held_back().row();
                sequence.stepped();
            });
            return Ok(());
        }
        self.tell_all(&shared(batch))?;
        let appended: Vec<_> = batch.iter().map(|sequence| (sequence.inner(), 1)).collect();
        self.model.append(&appended)?;
        batch.iter_mut().for_each(|sequence| sequence.stepped());
        self.send_rows(batch)
    }

    pub(super) fn mark_tokens_there(
        &mut self,
        sequence: &mut DaemonSequence,
        start: usize,
        marks: &[u8],
    ) -> Result<(), DaemonError> {
        self.asks_again();
        self.make_room(&[(sequence, start + marks.len())])?;
        if self.stands_still()? {
            sequence.held_back().marks(start, marks);
            return Ok(());
        }
        self.tell(sequence)?;
        Ok(self.model.mark(sequence.inner(), start, marks)?)
    }
}

pub(super) fn shared<'a>(batch: &'a [&mut DaemonSequence]) -> Vec<&'a DaemonSequence> {
    batch.iter().map(|sequence| &**sequence).collect()
}
