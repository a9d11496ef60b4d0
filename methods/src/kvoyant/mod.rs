//! `kvoyant`, the default: choose rows, attend to all that is there, estimate what is left, and bound what the answer misses.
//!
//! *Digest* ([`kvoyant_kernels::CodeLayout`]): when a block of rows is full, its keys in codes of 4 or 6 bits, the means of its values, and how far
//! both are off. A page is a whole number of blocks. No row of a block that is not full has one: such rows are selected always, and there are
//! none where the window is at least as long as a block.
//!
//! *Weights.* A query gives every row an estimated score `s` and a margin `m` that bounds its error; its weight is `e^s`, and its share
//! of the attention `e^s / (Σ e^s + F)`, where F is what the query gives to sinks and window, if that is known ([`SelectContext::floors`]).
//!
//! *Selection.* The rows with the largest mean share in their group of query heads: as many as a budget says, in the mean of
//! all layers, heads and steps, or as many as it takes until no query head can miss more than it may.
//!
//! *Rest.* What is not attended is estimated by its weights and mean values, and merged like any partial attention; the sums that come with
//! it certify the answer ([`crate::RestSums`]). Where the selection was made ahead, by a predicted query, the true one names rows that it
//! missed: they are attended exactly, too.

pub mod spec;

mod choose;
mod steer;
#[cfg(test)]
mod tests;
mod weigh;

use kvoyant_kernels::{CodeLayout, CodeSums, CodeTaken, CodeWeights, Kernels};

pub use spec::{Amount, Certify, KvoyantSpec, MissedMass, Scope};

use crate::context::{InTime, SelectContext};
use crate::error::MethodError;
use crate::method::{Append, DigestKey, Method};
use crate::needs::{HintSource, Needs};
use crate::registry::Entry;
use crate::rest::{Rest, RestSums};
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::MethodSpec;
use crate::store::Store;
use choose::Wanted;
use steer::Steering;

/// The method's name.
pub const NAME: &str = "kvoyant";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "rows by codes of their keys, the rest estimated, answers certified",
    parse: |options| Ok(Box::new(KvoyantSpec::from_options(options)?)),
};

/// Bytes of what a selection leaves for each layer and head: the share of the last row that the budget alone let in, as f32. Behind it, with
/// `reuse`, lie the queries that it was made by, `[g][d]` f32.
const CUT_BYTES: usize = size_of::<f32>();

/// Selects, estimates and certifies.
#[derive(Debug)]
pub struct Kvoyant {
    shape: Shape,
    options: KvoyantSpec,
    spec: MethodSpec,
    /// Of a block.
    layout: CodeLayout,
    kernels: Kernels,
    /// What heads get of the budget by their roles, `[layers][kv_heads]`, 1 in the mean of a layer; none where all are alike.
    parts: Vec<Vec<f32>>,
}

/// Rows of a block, unless groups or pages say otherwise.
const BLOCK_ROWS: usize = 32;

/// Rows of a block, of pages of so many.
fn block_rows(page_rows: usize, group: Option<usize>) -> usize {
    let rows = group.unwrap_or(0).max(BLOCK_ROWS);
    if page_rows.is_multiple_of(rows) { rows } else { page_rows }
}

impl Kvoyant {
    /// For a model of that shape.
    ///
    /// # Errors
    /// There are no codes for its pages in groups of that many rows.
    pub fn new(options: KvoyantSpec, shape: &Shape) -> Result<Self, MethodError> {
        let rows = block_rows(shape.page_rows, options.group);
        let group = options.group.unwrap_or(rows);
        let layout = CodeLayout::new(shape.head_dim, shape.value_dim, rows, options.bits, group)
            .map_err(|error| MethodError::Unsuitable { method: NAME, reason: error.to_string() })?;
        Ok(Self {
            shape: *shape,
            options,
            spec: MethodSpec::new(options),
            layout,
            kernels: Kernels::best(),
            parts: Vec::new(),
        })
    }

    /// With other parts of the budget for each head, `[layers][kv_heads]`.
    fn with_parts(self, parts: Vec<Vec<f32>>) -> Self {
        Self { parts, ..self }
    }

    /// What a head gets for each row of the budget.
    fn part(&self, layer: usize, head: usize) -> f32 {
        self.parts.get(layer).and_then(|heads| heads.get(head)).copied().unwrap_or(1.0)
    }

    /// Whether rows of all heads compete with one another.
    fn chooses_together(&self) -> bool {
        self.options.scope == Scope::Layer && matches!(self.options.amount, Amount::Budget(_))
    }

    fn blocks_of_a_page(&self) -> usize {
        self.shape.page_rows / self.layout.rows()
    }

    /// How many rows a head gets, for a request of one token.
    fn wanted(&self, context: &SelectContext<'_>, steering: &Steering) -> Wanted {
        let budget = self.options.rows_of(context.tokens);
        match (self.options.amount, self.options.scope) {
            (Amount::MissedMass(missed), _) => Wanted::Missed(missed.get()),
            (Amount::Budget(all), _)
                if spec::is_everything(all, context.tokens, self.shape.candidates(context.tokens).len()) =>
            {
                Wanted::Everything
            }
            (Amount::Budget(_), Scope::Threshold) if context.queries == 1 => match steering.share(context) {
                Some(share) => Wanted::Above { share, least: spec::part_of(budget, self.options.floor) },
                None => Wanted::Best(budget),
            },
            (Amount::Budget(_), _) => Wanted::Best(budget),
        }
    }

    /// Estimates what is left of a head's weights, of which those of attended rows are 0.
    fn rest_of(&self, context: &SelectContext<'_>, head: usize, left: usize, at: Scan<'_>, out: &mut Rest) {
        let Scan { store, scratch, seen } = at;
        let sums = self.sum(head, store, scratch, &seen, None);
        self.push_rest(context, &sums, left, scratch, out);
    }

    /// Takes the rows with a larger share than this, at least so many, and estimates the others in the same pass: as [`Kvoyant::mix`],
    /// [`Kvoyant::choose`], [`Kvoyant::forget`] and [`Kvoyant::rest_of`] do one after the other. False where it takes these.
    fn choose_at_once(
        &self,
        context: &SelectContext<'_>,
        head: usize,
        wanted: Wanted,
        at: Scan<'_>,
        out: &mut Rest,
    ) -> bool {
        // Rows that are no candidates have a share of 0.
        let Wanted::Above { share: share @ 0.0.., least } = wanted else { return false };
        let Scan { store, scratch, seen } = at;
        if context.in_time.is_some() || !self.all_known(&scratch.margins) {
            return false;
        }
        scratch.ids.clear();
        let sums = self.sum(head, store, scratch, &seen, Some(share));
        let done = scratch.ids.len() >= least.min(seen.rows.len());
        if done {
            self.push_rest(context, &sums, seen.rows.len() - scratch.ids.len(), scratch, out);
        }
        done
    }

    /// Sums of a head's rows by their weights; `scratch.means` gets those of values. Rows with a share above `taken` are left out of them,
    /// and added to `scratch.ids`.
    fn sum(
        &self,
        head: usize,
        store: &dyn Store,
        scratch: &mut Scratch,
        seen: &weigh::Seen,
        taken: Option<f32>,
    ) -> Vec<CodeSums> {
        let Scratch { scores, margins, factors, means, ids, .. } = scratch;
        let (g, dv) = (self.shape.group(), self.shape.value_dim);
        means.clear();
        means.resize(g * dv, 0.0);
        let mut sums = vec![CodeSums::default(); g];
        let (layout, rows, groups) = (&self.layout, self.layout.rows(), self.layout.groups());
        for (block, blocks) in self.stretches(store, head, seen, 0..seen.blocks.len()) {
            let of = CodeWeights {
                rows: &scores[block * rows..],
                stride: seen.stride(rows),
                margins: &margins[block * groups..],
                margin_stride: seen.stride(groups),
            };
            if let Some(threshold) = taken {
                let first = (block * rows) as u32;
                let mut taken = CodeTaken { factors, threshold, first, ids };
                self.kernels.code_rest_below(layout, blocks, &of, &mut taken, &mut sums, means);
            } else {
                self.kernels.code_rest(layout, blocks, &of, &mut sums, means);
            }
        }
        sums
    }

    /// Adds what is left of a head, `left` rows, from their sums.
    fn push_rest(
        &self,
        context: &SelectContext<'_>,
        sums: &[CodeSums],
        left: usize,
        scratch: &Scratch,
        out: &mut Rest,
    ) {
        let dv = self.shape.value_dim;
        let certified = self.options.certifies(context.step);
        for (h, sums) in sums.iter().enumerate() {
            let (mean, into) = out.push();
            *into = RestSums::of_codes(sums, scratch.maxima[h], left);
            if into.weight > 0.0 {
                let scale = 1.0 / into.weight;
                mean.iter_mut().zip(&scratch.means[h * dv..]).for_each(|(mean, sum)| *mean = sum * scale);
            }
            if !self.options.tail {
                (into.weight, into.scatter) = (0.0, f32::INFINITY);
            }
            if !certified {
                *into = into.uncertified();
            }
        }
    }

    fn choose_all(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
        mut rest: Option<&mut Rest>,
    ) {
        out.clear();
        let steering = Steering::read(store.sequence());
        let candidates = self.shape.candidates(context.tokens);
        let wanted = self.wanted(context, &steering);
        for head in context.heads.clone() {
            let seen = self.seen(context);
            // Where nobody waits for late rows, they are left out of everything too.
            let whole = matches!(wanted, Wanted::Everything) && context.in_time.is_none();
            if candidates.is_empty() || whole {
                out.push(candidates.start, candidates.end);
                out.finish_head();
                if let Some(rest) = rest.as_deref_mut() {
                    for _ in 0..self.shape.group() {
                        rest.push();
                    }
                }
                // No share at which a budget ended.
                store.note(head).iter_mut().take(size_of::<f32>()).for_each(|byte| *byte = 0);
                continue;
            }
            self.weigh(context, &*store, head, &seen, scratch);
            let wanted = wanted.of_part(self.part(context.layer, head));
            let at_once = rest.as_deref_mut().is_some_and(|rest| {
                let at = Scan { store: &*store, scratch: &mut *scratch, seen: seen.clone() };
                self.choose_at_once(context, head, wanted, at, rest)
            });
            let cut = if at_once {
                0.0
            } else {
                self.mix(&seen, scratch);
                self.choose(context, head, &wanted, &seen, scratch)
            };
            store.note(head).iter_mut().zip(cut.to_le_bytes()).for_each(|(kept, byte)| *kept = byte);
            if let Some(in_time) = context.in_time {
                let near = self.is_near(context, head, store.note(head));
                let in_time = InTime { room: if near { 0 } else { in_time.room }, ..in_time };
                let left = self.leave_out(head, in_time, &seen, scratch);
                if near { out.spare(left) } else { out.leave(left) }
            }
            for id in &scratch.ids {
                let token = seen.first_token(self.layout.rows()) + *id as usize;
                out.push(token, token + 1);
            }
            out.push(seen.sealed_end, candidates.end);
            out.finish_head();
            if at_once {
                // The rest is there.
            } else if let Some(rest) = rest.as_deref_mut() {
                self.forget(&seen, scratch);
                let left = seen.rows.len() - scratch.ids.len();
                self.rest_of(context, head, left, Scan { store: &*store, scratch, seen }, rest);
            } else {
                self.keep(head, scratch);
            }
        }
    }
}

/// What is looked at for one head.
struct Scan<'a> {
    store: &'a dyn Store,
    scratch: &'a mut Scratch,
    seen: weigh::Seen,
}

impl Method for Kvoyant {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs {
            hint: self.options.hint,
            digest: true,
            values: true,
            sealed_rows: self.layout.rows(),
            floors: true,
            rest: self.options.tail || self.options.certificate != Certify::Off,
            attend_resident: self.options.resident,
            heads_together: self.chooses_together(),
            leaves_late: !self.options.waits && !self.chooses_together(),
            sees_resident: self.options.reuse.is_some() && !self.chooses_together(),
            ..Needs::default()
        }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        let levels = u64::from(self.options.bits.levels());
        let (group, bytes) = (self.layout.group() as u64, self.layout.bytes() as u64);
        // What selections leave lies with the digests, and is longer where queries are kept.
        let values = self.shape.value_dim as u64 | u64::from(self.options.reuse.is_some()) << 32;
        Some(DigestKey { method: NAME, parameters: [levels, group, bytes, values] })
    }

    fn digest_bytes(&self) -> usize {
        self.blocks_of_a_page() * self.layout.bytes()
    }

    fn sequence_bytes(&self) -> usize {
        steer::BYTES
    }

    fn note_bytes(&self) -> usize {
        match self.options.reuse {
            Some(_) => CUT_BYTES + self.shape.group() * self.shape.head_dim * size_of::<f32>(),
            None => CUT_BYTES,
        }
    }

    fn on_append(&self, append: &Append<'_>, digest: &mut [u8], _memory: &mut [u8], _scratch: &mut Scratch) {
        let (rows, bytes) = (self.layout.rows(), self.layout.bytes());
        let (keys, values) = (rows * self.shape.head_dim, rows * self.shape.value_dim);
        let whole = append.first_row.is_multiple_of(rows) && append.keys.len().is_multiple_of(keys);
        debug_assert!(whole, "blocks come whole");
        if !whole {
            return;
        }
        let blocks = digest[append.first_row / rows * bytes..].chunks_exact_mut(bytes);
        for ((keys, values), block) in
            append.keys.chunks_exact(keys).zip(append.values.chunks_exact(values)).zip(blocks)
        {
            self.layout.encode(keys, values, block);
        }
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        if self.chooses_together() {
            self.choose_together(context, store, scratch, out);
        } else {
            self.choose_all(context, store, scratch, out, None);
        }
    }

    fn select_with_rest(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
        rest: &mut Rest,
    ) {
        if self.chooses_together() {
            self.select(context, store, scratch, out);
            return self.rest(context, out, store, scratch, rest);
        }
        rest.clear(self.shape.value_dim);
        self.choose_all(context, store, scratch, out, Some(rest));
        context.heads.clone().for_each(|_| rest.exact_mut().finish_head());
    }

    fn rest(
        &self,
        context: &SelectContext<'_>,
        attended: &Selection,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Rest,
    ) {
        out.clear(self.shape.value_dim);
        let steering = Steering::read(store.sequence());
        for (at, head) in context.heads.clone().enumerate() {
            let seen = self.seen(context);
            if !self.recall(head, scratch) {
                self.weigh(context, &*store, head, &seen, scratch);
            }
            let corrects = self.options.hint != HintSource::Current;
            if corrects {
                self.mix(&seen, scratch);
            }
            let mut left = seen.rows.len();
            let first = seen.first_token(self.layout.rows());
            for range in attended.head(at) {
                // Rows without a digest have no weight to be set to 0.
                let from = (range.first as usize).max(first + seen.rows.start);
                let to = (range.end() as usize).min(first + seen.rows.end);
                if from < to {
                    left -= to - from;
                    self.forget_rows(&seen, from - first..to - first, scratch);
                    if corrects {
                        // Below any threshold, so that none of them is chosen again.
                        scratch.group[from - first..to - first].fill(-2.0);
                    }
                }
            }
            // Rows without a digest that are not attended cannot be estimated, only attended now.
            let mut exact =
                attended_gap(attended, at, seen.sealed_end..self.shape.candidates(context.tokens).end);
            if corrects {
                self.correct(context, head, &steering, &seen, scratch);
                left -= scratch.ids.len();
                self.forget(&seen, scratch);
                for id in &scratch.ids {
                    let token = first + *id as usize;
                    out.exact_mut().push(token, token + 1);
                }
            }
            exact.drain(..).for_each(|(from, to)| out.exact_mut().push(from, to));
            out.exact_mut().finish_head();
            self.rest_of(context, head, left, Scan { store: &*store, scratch, seen }, out);
        }
    }

    fn steer(&self, context: &SelectContext<'_>, selected: &Selection, store: &mut dyn Store) {
        let steers =
            self.options.scope == Scope::Threshold && matches!(self.options.amount, Amount::Budget(_));
        if !steers || context.queries != 1 || self.shape.candidates(context.tokens).is_empty() {
            return;
        }
        // Nobody can want more than there is: what is not there is not owed.
        let budget = self.options.rows_of(context.tokens).min(self.shape.candidates(context.tokens).len());
        // A head's threshold is the common one by its part.
        let part = |head| self.part(context.layer, head);
        let cut =
            |head| store.note(head).first_chunk().map_or(0.0, |cut| part(head) * f32::from_le_bytes(*cut));
        let cuts: Vec<f32> = context.heads.clone().map(cut).collect();
        // What was left out was wanted all the same: no threshold makes it come.
        let selected = selected.wanted();
        let parts: f32 = context.heads.clone().map(part).sum();
        let wanted = (budget as f64 * f64::from(parts)).round() as usize;
        let bytes = store.sequence();
        let mut steering = Steering::read(bytes);
        steering.note(context, selected, wanted, &cuts);
        steering.write(bytes);
    }
}

/// The parts of a range that a head's attended rows leave out.
fn attended_gap(attended: &Selection, head: usize, range: std::ops::Range<usize>) -> Vec<(usize, usize)> {
    let (mut gaps, mut from) = (Vec::new(), range.start);
    for part in attended.head(head) {
        let (first, end) = (part.first as usize, part.end() as usize);
        if first > from && from < range.end {
            gaps.push((from, first.min(range.end)));
        }
        from = from.max(end);
    }
    if from < range.end {
        gaps.push((from, range.end));
    }
    gaps
}
