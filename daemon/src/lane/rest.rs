//! Rows that answers leave out: estimated by the sequence's method, with the sums that certify what its client makes of both.
//!
//! Where a method selects by a layer's true query, the estimate comes with the selection. Where it selects ahead, the client asks again
//! once it has the true query: for the rest of the layer's last answer, of which the lane has kept which rows it named.

use kvoyant_kernels::{Dtype, Kernels};
use kvoyant_methods::{HintSource, RestSums, Selection};
use kvoyant_protocol::control::SelectedBy;
use kvoyant_protocol::wire::{BatchEntry, HeadEntry, RestEntry, RestLayout, SequenceId, Stat, Status};

use crate::device::rows::PageRows;
use crate::lane::digests::Digested;
use crate::lane::model::ModelState;
use crate::lane::select::Answer;
use crate::lane::spill::Before;

/// Bounds of the counters of certified heads, by what they may have missed at most.
const MISSED: [(f64, Stat); 4] = [
    (0.001, Stat::MissedTo0001),
    (0.01, Stat::MissedTo001),
    (0.05, Stat::MissedTo005),
    (0.2, Stat::MissedTo02),
];

impl ModelState {
    /// How estimates lie in an answer.
    fn rest_layout(&self) -> RestLayout {
        RestLayout { query_heads: self.shape.query_heads, values: self.layout.value_values() }
    }

    /// Whether the sequence's method estimates what it leaves out, by the true query.
    pub(super) fn estimates(&self, id: SequenceId) -> bool {
        self.sequence(id).is_ok_and(|sequence| self.methods[sequence.method].needs().rest)
    }

    /// Whether the estimate comes with the selection.
    pub(super) fn estimates_at_once(&self, id: SequenceId) -> bool {
        let at_once = |needs: kvoyant_methods::Needs| needs.rest && needs.hint == HintSource::Current;
        self.sequence(id).is_ok_and(|sequence| at_once(self.methods[sequence.method].needs()))
    }

    /// Gives an answer the empty estimate of one more member; false where a table of at most so many bytes would not hold it.
    pub fn begin_rest(&self, answer: &mut Answer, most: usize) -> bool {
        let layout = self.rest_layout();
        let nothing = entry_of(&RestSums::NOTHING);
        let entries = size_of_val(answer.heads.as_slice()) + size_of_val(answer.runs.as_slice());
        let words = answer.partials.len() + answer.rests.len() + layout.words();
        if entries + words * size_of::<u32>() > most {
            return false;
        }
        for _ in 0..layout.query_heads {
            answer.rests.extend_from_slice(bytemuck::cast_slice(&[nothing]));
        }
        answer.rests.resize(answer.rests.len() + layout.query_heads * layout.mean_words(), 0);
        true
    }

    /// Puts the estimate in the buffers in the place of the last member's.
    pub(super) fn put_rest(&mut self, answer: &mut Answer) {
        let layout = self.rest_layout();
        let rest = &self.buffers.rest;
        if rest.heads() != layout.query_heads || answer.rests.len() < layout.words() {
            return;
        }
        let at = answer.rests.len() - layout.words();
        let (entries, means) =
            answer.rests[at..].split_at_mut(layout.query_heads * size_of::<RestEntry>() / 4);
        let entries = entries.chunks_exact_mut(size_of::<RestEntry>() / 4);
        let means = means.chunks_exact_mut(layout.mean_words());
        for (head, ((words, to), sums)) in entries.zip(means).zip(rest.sums()).enumerate() {
            let changed = round_mean(rest.mean(head), bytemuck::cast_slice_mut(to));
            let added = f64::from(sums.weight) * changed;
            let scatter = if added == 0.0 {
                sums.scatter
            } else {
                ((f64::from(sums.scatter) + added) as f32).next_up()
            };
            let sums = RestSums { scatter, ..*sums };
            words.copy_from_slice(bytemuck::cast_slice(&[entry_of(&sums)]));
            answer.estimated_rows += u64::from(sums.rows);
        }
        answer.has_rest = true;
        self.count_missed(answer);
    }

    /// Counts what query heads may have missed, as far as the lane can tell: it knows what the query gives to rows that are attended in
    /// any case, where the client said so, and nothing of what it gave to those that were selected.
    fn count_missed(&self, answer: &mut Answer) {
        let certified = |sums: &&RestSums| sums.rows == 0 || sums.is_certified();
        for (sums, floor) in self.buffers.rest.sums().iter().zip(&self.buffers.floors) {
            if !certified(&sums) {
                continue;
            }
            let attended = (f64::from(*floor) - f64::from(sums.max)).exp();
            let missed = if sums.rows == 0 { 0.0 } else { 1.0 / (1.0 + attended / f64::from(sums.upper)) };
            let stat =
                MISSED.iter().find(|(bound, _)| missed <= *bound).map_or(Stat::MissedMore, |(_, stat)| *stat);
            answer.missed.push(stat);
        }
    }

    /// Remembers which rows the layer's last answer named.
    pub(super) fn keep_named(&mut self, id: SequenceId, layer: usize, answer: &Answer) {
        if !self.estimates(id) || self.estimates_at_once(id) {
            return;
        }
        let heads = self.shape.kv_heads;
        let Ok(sequence) = self.sequence_mut(id) else { return };
        name(answer, heads, &mut sequence.residency[layer].named);
    }

    /// Estimates what the answer's last member does not name, by the hint in the buffers: rows that happen to be resident are named beside
    /// those that were selected.
    pub(super) fn estimate_unnamed(
        &mut self,
        id: SequenceId,
        layer: usize,
        tokens: usize,
        answer: &mut Answer,
    ) {
        let mut named = std::mem::take(&mut self.buffers.named);
        name(answer, self.shape.kv_heads, &mut named);
        self.estimate(id, layer, tokens, &named);
        self.buffers.named = named;
        if self.buffers.rest.exact().total_rows() > 0 {
            // Rows without a digest that were selected and have no page: nothing is known of them.
            self.buffers.rest.uncertify();
        }
        self.put_rest(answer);
    }

    /// The rest of a layer's last answer for one member, by the true query in the buffers. Rows that the method wants attended now are
    /// attended where they lie.
    pub fn rest_of_last(
        &mut self,
        layer: usize,
        entry: &BatchEntry,
        answer: &mut Answer,
    ) -> Result<(), Status> {
        let id = entry.sequence;
        let tokens = entry.position as usize + 1;
        let candidates = self.shape.candidates(tokens);
        let heads = self.shape.kv_heads;
        let sequence = self.sequence(id).map_err(|_| Status::NoSuchSequence)?;
        if sequence.by == SelectedBy::Client {
            return Err(Status::SelectedByClient);
        }
        let nothing = HeadEntry { first_run: answer.runs.len() as u32, runs: 0, rows: 0, resident: 0 };
        answer.heads.extend(std::iter::repeat_n(nothing, heads));
        if candidates.is_empty() || !self.methods[sequence.method].needs().rest {
            return Ok(());
        }
        if candidates.end > sequence.lens[layer] as usize {
            return Err(Status::NotAppended);
        }
        if self.digested(id, layer, candidates.end, tokens - 1) != Digested::Yes {
            return Err(Status::NotAppended);
        }
        self.estimate_last(id, layer, tokens)?;
        self.put_rest(answer);
        self.attend_exact(id, layer, answer)
    }

    /// Estimates what the layer's last answer did not name, by the hint in the buffers.
    fn estimate_last(&mut self, id: SequenceId, layer: usize, tokens: usize) -> Result<(), Status> {
        let heads = self.shape.kv_heads;
        let mut named = std::mem::take(
            &mut self.sequence_mut(id).map_err(|_| Status::NoSuchSequence)?.residency[layer].named,
        );
        if named.heads() != heads {
            // Nothing was answered for this layer yet.
            named.clear();
            (0..heads).for_each(|_| named.finish_head());
        }
        self.estimate(id, layer, tokens, &named);
        if let Ok(sequence) = self.sequence_mut(id) {
            sequence.residency[layer].named = named;
        }
        Ok(())
    }

    /// Has the rows brought back that the method wants attended once it knows the query in the buffers; [`Self::rest_of_last`] finds the
    /// same ones.
    pub(crate) fn bring_exact(&mut self, layer: usize, entry: &BatchEntry) -> Before {
        let id = entry.sequence;
        let tokens = entry.position as usize + 1;
        let Ok(sequence) = self.sequence(id) else { return Before::Ready };
        let end = self.shape.candidates(tokens).end;
        let can_be = sequence.by == SelectedBy::Lane
            && self.estimates(id)
            && end <= sequence.lens[layer] as usize
            && self.digested(id, layer, end, tokens - 1) == Digested::Yes;
        if !can_be || self.estimate_last(id, layer, tokens).is_err() {
            return Before::Ready;
        }
        if let Some(state) = &mut self.spill {
            state.hold(id, layer);
        }
        let rows = self.shape.page_rows as u32;
        let mut wanted = Answer::default();
        for kv_head in 0..self.shape.kv_heads {
            let ranges: Vec<_> = self.buffers.rest.exact().head(kv_head).to_vec();
            for page in ranges.iter().flat_map(|range| range.first / rows..range.end().div_ceil(rows)) {
                // What is lost, or finds no room, is for the request itself to refuse.
                let head = layer * self.shape.kv_heads + kv_head;
                if self.page_for(id, (head, page as usize), &mut wanted).is_err() {
                    return Before::Ready;
                }
            }
        }
        if wanted.reads.is_empty() { Before::Ready } else { Before::Later }
    }

    /// Attends the rows that the estimate in the buffers leaves to be attended, by the hint there.
    fn attend_exact(&mut self, id: SequenceId, layer: usize, answer: &mut Answer) -> Result<(), Status> {
        if self.buffers.rest.exact().total_rows() == 0 {
            return Ok(());
        }
        let layout = self.partial_layout();
        let (group, d, values) = (self.shape.group(), self.shape.head_dim, layout.values);
        let Some(at) = answer.partials.len().checked_sub(layout.words()) else { return Err(Status::Failed) };
        let mut partial = std::mem::take(&mut self.buffers.partial);
        let memory = std::mem::take(&mut self.buffers.pages);
        let sequence = self.sequence(id).map_err(|_| Status::NoSuchSequence)?;
        let pages = sequence.layer_pages(layer, self.shape.kv_heads);
        let rows = PageRows::new(&self.arena, &self.tables, self.layout, pages, memory);
        let heads = 0..self.shape.kv_heads;
        if let Some(status) =
            heads.clone().find_map(|head| rows.away(head, self.buffers.rest.exact().head(head)))
        {
            (self.buffers.pages, self.buffers.partial) = (rows.into_scratch(), partial);
            return Err(status);
        }
        let mut attended = 0;
        for kv_head in 0..self.shape.kv_heads {
            partial.resize(group * (values + 1), 0.0);
            let (out, lse) = partial.split_at_mut(group * values);
            let queries = &self.buffers.hint[kv_head * group * d..][..group * d];
            let exact = self.buffers.rest.exact().head(kv_head);
            attended += rows.attend(kv_head, exact, queries, 1.0 / (d as f32).sqrt(), out, lse) as u32;
            let (all_lse, all_out) = answer.partials[at + 1..].split_at_mut(layout.query_heads);
            all_lse[kv_head * group..][..group].copy_from_slice(bytemuck::cast_slice(lse));
            all_out[kv_head * group * values..][..group * values].copy_from_slice(bytemuck::cast_slice(out));
        }
        answer.partials[at] = attended;
        answer.cpu_rows = answer.cpu_rows.saturating_add(attended);
        answer.rows = answer.rows.saturating_add(attended);
        self.buffers.pages = rows.into_scratch();
        self.buffers.partial = partial;
        Ok(())
    }
}

/// The rows that the last member of an answer names.
pub(super) fn name(answer: &Answer, heads: usize, named: &mut Selection) {
    named.clear();
    let Some(first) = answer.heads.len().checked_sub(heads) else { return };
    for head in &answer.heads[first..] {
        for run in &answer.runs[head.first_run as usize..][..head.runs as usize] {
            named.push(run.token as usize, (run.token + run.rows()) as usize);
        }
        named.finish_head();
    }
}

/// A mean value as f16; how far that is from it.
fn round_mean(mean: &[f32], to: &mut [u8]) -> f64 {
    const MOST: f32 = 65504.0;
    let bytes = 2 * mean.len();
    let within: Vec<f32> = mean.iter().map(|value| value.clamp(-MOST, MOST)).collect();
    let kernels = Kernels::best();
    kernels.from_f32(Dtype::F16, &within, &mut to[..bytes]);
    let mut rounded = vec![0.0; mean.len()];
    kernels.to_f32(Dtype::F16, &to[..bytes], &mut rounded);
    let squares = mean.iter().zip(&rounded).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    squares.sum::<f64>().sqrt()
}

fn entry_of(sums: &RestSums) -> RestEntry {
    let RestSums { max, weight, upper, lower, scatter, spread, rows } = *sums;
    RestEntry { max, weight, upper, lower, scatter, spread, rows }
}
