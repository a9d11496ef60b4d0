//! Selection on this process's own threads, for sequences that [`kvoyant_client::local`] suits: one task for each KV head, which attends to
//! sinks and window, chooses rows, attends to those, and merges and certifies what it left out.
//!
//! Rows that are chosen ahead of their layer, by a predicted query, are chosen when the hint comes, and what they missed is made good
//! when the layer attends, as with the daemon.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvoyant_client::SelectedBy;
use kvoyant_client::local::{HeadAnswer, HeadRequest, LocalDigests, LocalMethod, Setting, Work};
use kvoyant_kernels::Kernels;
use kvoyant_methods::{Artifacts, Certificate, HintSource, MethodError, MethodSpec, Selection, Shape};
use rayon::prelude::*;

use super::attention::Pass;
use super::measure::{Attended, Exact};
use super::options::Selects;
use super::{DaemonError, DaemonKv, DaemonOptions, DaemonSequence};

/// Tokens below which a layer's heads are looked at one after the other: waking another thread costs more than it saves.
const PARALLEL_TOKENS: usize = 512;

/// The methods of a session that select in this process, by index.
pub(super) fn methods(
    options: &DaemonOptions,
    model: &kvoyant_client::Model,
    shape: &Shape,
    artifacts: &Artifacts,
) -> Result<Vec<Option<LocalMethod>>, MethodError> {
    let setting = Setting {
        cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        threads: rayon::current_num_threads(),
    };
    let here = |spec: &MethodSpec| {
        let method =
            LocalMethod::new(kvoyant_methods::build(spec, shape, artifacts)?, *shape, model.layout());
        Ok(method.filter(|method| {
            let work = Work {
                kv_heads: shape.kv_heads,
                digest_bytes: method.digest_bytes_per_row() * options.context_tokens as f64,
                width: shape.query_heads * shape.head_dim,
                ahead: method.needs().hint != HintSource::Current,
            };
            match options.selects {
                Selects::Auto => setting.prefers_client(&work),
                Selects::Client => true,
                Selects::Lane => false,
            }
        }))
    };
    // Rows that leave memory are the lane's to bring back.
    if model.mode() == kvoyant_client::Mode::InPlace && !model.spills() {
        options.methods.iter().map(here).collect()
    } else {
        Ok(options.methods.iter().map(|_| None).collect())
    }
}

/// Rows that were chosen for a layer ahead of it.
#[derive(Debug)]
pub(super) struct Chosen {
    /// Index into the step's batch.
    member: usize,
    /// Of each KV head.
    selections: Vec<Selection>,
}

/// One KV head of one member.
struct Head<'a> {
    member: usize,
    kv_head: usize,
    sequence: &'a DaemonSequence,
    digests: &'a LocalDigests,
    method: &'a LocalMethod,
    tokens: usize,
    /// Of all heads, `[Hq][d]`.
    query: &'a [f32],
}

/// What came of it.
struct Done {
    member: usize,
    kv_head: usize,
    selection: Selection,
    note: Vec<u8>,
    certificates: Vec<Option<Certificate>>,
    /// Rows attended because the true query asked for them, and the log-sum-exps over them.
    exact: Exact,
    selecting: Duration,
}

impl Head<'_> {
    /// The head's queries `[group][d]`.
    fn queries(&self, pass: &Pass<'_>) -> &[f32] {
        let values = pass.shape.group() * pass.shape.head_dim;
        &self.query[self.kv_head * values..][..values]
    }

    fn request<'r>(&'r self, layer: usize, query: &'r [f32], floors: &'r [f32]) -> HeadRequest<'r> {
        HeadRequest { layer, kv_head: self.kv_head, tokens: self.tokens, query, floors }
    }

    /// Floors of all heads of which this one's are known.
    fn floors(&self, pass: &Pass<'_>, lse: &[f32]) -> Vec<f32> {
        let mut floors = vec![f32::NEG_INFINITY; pass.shape.query_heads];
        floors[self.kv_head * pass.shape.group()..][..lse.len()].copy_from_slice(lse);
        floors
    }

    /// Chooses rows by a query, which may be a predicted one. `local`: what it gives to the rows that are attended in any case.
    fn choose(
        &self,
        pass: &Pass<'_>,
        query: &[f32],
        local: Option<&[f32]>,
        whole: bool,
        answer: &mut HeadAnswer,
    ) -> Result<(), kvoyant_client::Error> {
        let floors = local.map_or_else(Vec::new, |lse| self.floors(pass, lse));
        self.method.select(self.digests, self.request(pass.layer, query, &floors), whole, answer)
    }

    /// Attention over all that the head attends to, into `out` `[group][d]`. `chosen`: what was chosen ahead.
    fn attend(
        &self,
        pass: &Pass<'_>,
        chosen: Option<&Selection>,
        answer: &mut HeadAnswer,
        (out, lse): (&mut [f32], &mut [f32]),
    ) -> Result<Done, kvoyant_client::Error> {
        let needs = *self.method.needs();
        let (d, group, queries) = (pass.shape.head_dim, pass.shape.group(), self.queries(pass));
        let attend = |rows: &mut dyn Iterator<Item = Range<usize>>, (out, lse): (&mut [f32], &mut [f32])| {
            pass.attend_own(self.sequence, self.kv_head, rows, queries, (out, lse));
        };
        let local = pass.local(self.tokens - 1);
        // What the true query gives to sinks and window is wanted before rows are chosen by it, and only then apart from theirs. That of a
        // step before says nothing of this one's.
        let floored = needs.floors && needs.hint == HintSource::Current;
        let mut beside = (Vec::new(), Vec::new());
        if floored {
            beside = (vec![0.0; group * d], vec![0.0; group]);
            attend(&mut local.clone().into_iter(), (&mut beside.0, &mut beside.1));
        }
        let since = Instant::now();
        match chosen {
            Some(selection) => answer.set(selection),
            None => self.choose_now(pass, floored.then_some(&beside.1), answer)?,
        }
        // Before anything else is asked.
        let note = answer.note(self.method, self.kv_head).to_vec();
        let mut selecting = since.elapsed();
        if floored {
            attend(&mut rows_of(&answer.selection), (&mut *out, &mut *lse));
            Kernels::best().merge(out, lse, &beside.0, &beside.1);
        } else {
            let [before, behind] = local;
            let selected = rows_of(&answer.selection);
            attend(&mut std::iter::once(before).chain(selected).chain([behind]), (&mut *out, &mut *lse));
        }
        let mut exact = Exact { rows: 0, lse: vec![f32::NEG_INFINITY; group] };
        if needs.rest && needs.hint != HintSource::Current {
            let since = Instant::now();
            let (floors, selection) = (self.floors(pass, lse), answer.selection.clone());
            let request = self.request(pass.layer, self.query, &floors);
            self.method.rest(self.digests, request, &selection, answer)?;
            selecting += since.elapsed();
            exact.rows = answer.rest.exact().total_rows() as u32;
            if exact.rows > 0 {
                let mut other = (vec![0.0; group * d], vec![0.0; group]);
                attend(&mut rows_of(answer.rest.exact()), (&mut other.0, &mut other.1));
                Kernels::best().merge(out, lse, &other.0, &other.1);
                exact.lse = other.1;
            }
        }
        let mut certificates = vec![None; group];
        for (h, sums) in answer.rest.sums().iter().enumerate().take(group) {
            let (out, lse) = (&mut out[h * d..][..d], &mut lse[h..=h]);
            let attended = lse[0];
            Kernels::best().merge(out, lse, answer.rest.mean(h), &[sums.lse()]);
            if sums.rows == 0 || sums.is_certified() {
                certificates[h] = Some(sums.certify(attended, out));
            }
        }
        let (member, kv_head, selection) = (self.member, self.kv_head, answer.selection.clone());
        Ok(Done { member, kv_head, selection, note, certificates, exact, selecting })
    }

    /// Chooses rows by what the method selects by, when the layer is about to attend.
    fn choose_now(
        &self,
        pass: &Pass<'_>,
        local: Option<&[f32]>,
        answer: &mut HeadAnswer,
    ) -> Result<(), kvoyant_client::Error> {
        let needs = self.method.needs();
        let last = self.sequence.last(pass.layer);
        // A sequence without a past has nothing to choose from either.
        let nothing = vec![0.0; if last.is_empty() { self.query.len() } else { 0 }];
        let query = match needs.hint {
            HintSource::Previous if last.is_empty() => &nothing,
            HintSource::Previous => last,
            HintSource::None => &[],
            _ => self.query,
        };
        self.choose(pass, query, local, needs.rest && needs.hint == HintSource::Current, answer)
    }
}

/// The rows of a selection of one head.
fn rows_of(selection: &Selection) -> impl Iterator<Item = Range<usize>> + use<'_> {
    selection.head(0).iter().map(|range| range.first as usize..range.end() as usize)
}

/// Working memory of tasks, for those to come. Not a thread's own: one that waits for another may begin a second task.
#[derive(Debug, Default)]
pub(super) struct Spare(Mutex<Vec<HeadAnswer>>);

impl Spare {
    fn with<T>(&self, task: impl FnOnce(&mut HeadAnswer) -> T) -> T {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = lock().pop();
        let mut answer = taken.unwrap_or_else(|| HeadAnswer::with_help(join));
        let result = task(&mut answer);
        lock().push(answer);
        result
    }
}

/// Two parts of a scan, on as many threads as are idle.
fn join(first: &mut (dyn FnMut() + Send), second: &mut (dyn FnMut() + Send)) {
    rayon::join(first, second);
}

impl DaemonKv {
    /// The method of a sequence that selects in this process.
    pub(super) fn here(&self, method: usize) -> Option<&LocalMethod> {
        self.local[method].as_ref()
    }

    /// Who selects for a method.
    pub(super) fn selector(&self, method: usize) -> SelectedBy {
        if self.here(method).is_some() { SelectedBy::Client } else { SelectedBy::Lane }
    }

    /// Gives a new sequence the digests of its method, where they are kept here. A fork's begin as its parent's, if they are of the same kind.
    pub(super) fn begin_digests(&mut self, sequence: &mut DaemonSequence, parent: Option<&DaemonSequence>) {
        let Some(method) = self.here(sequence.method()) else { return };
        let of_parent = parent.and_then(|parent| Some((self.here(parent.method())?, parent.digests()?)));
        let digests = match of_parent {
            Some((other, digests)) if other.shares_digests(method) => digests.clone(),
            _ => {
                self.seeds += 1;
                let Some(method) = self.here(sequence.method()) else { return };
                method.digests(self.seeds)
            }
        };
        sequence.set_digests(digests);
    }

    /// Brings a sequence's digests up to its first `tokens` rows.
    pub(super) fn digest(&self, sequence: &mut DaemonSequence, tokens: usize) -> Result<(), DaemonError> {
        let Some(method) = self.here(sequence.method()) else { return Ok(()) };
        let Some(mut digests) = sequence.take_digests() else { return Ok(()) };
        let (inner, heads) = (sequence.inner(), self.shape.kv_heads);
        let selected: Vec<bool> = (0..self.shape.layers).map(|layer| self.speculates(layer)).collect();
        let built = digests.heads_mut().par_iter_mut().enumerate().try_for_each(|(at, head)| {
            let (layer, kv_head) = (at / heads, at % heads);
            if selected[layer] { method.digest(inner, (layer, kv_head), head, tokens) } else { Ok(()) }
        });
        sequence.set_digests(digests);
        Ok(built?)
    }

    /// Chooses rows of a layer for the members that select here, by the query that the layer before predicts, `[batch][Hq][d]`.
    pub(super) fn choose_here(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        queries: &[f32],
    ) -> Result<(), DaemonError> {
        self.chosen[layer].clear();
        let pass = Pass { selects: true, ..self.pass(layer, true) };
        let (d, group, kv_heads) = (self.shape.head_dim, self.shape.group(), self.shape.kv_heads);
        let shared: Vec<&DaemonSequence> = batch.iter().map(|sequence| &**sequence).collect();
        let heads: Vec<Head<'_>> = self
            .heads_here(&shared, positions, queries)
            .into_iter()
            .filter(|head| head.method.needs().hint == HintSource::Ahead)
            .collect();
        let spare = &self.spare;
        let choose = |head: &Head<'_>| {
            let since = Instant::now();
            // The layer's own row is not there yet.
            let [before, behind] = pass.local(head.tokens - 1);
            let mut local = (vec![0.0; group * d], vec![0.0; group]);
            let rows = [before, behind.start..(head.tokens - 1).max(behind.start)];
            let floors = head.method.needs().floors.then(|| {
                pass.attend_own(
                    head.sequence,
                    head.kv_head,
                    rows,
                    head.queries(&pass),
                    (&mut local.0, &mut local.1),
                );
                &local.1[..]
            });
            spare.with(|answer| {
                head.choose(&pass, head.query, floors, false, answer)?;
                let note = answer.note(head.method, head.kv_head).to_vec();
                Ok((head.member, head.kv_head, answer.selection.clone(), note, since.elapsed()))
            })
        };
        let most = heads.iter().map(|head| head.tokens).max().unwrap_or(0);
        let chosen: Vec<_> = if most < PARALLEL_TOKENS {
            heads.iter().map(choose).collect::<Result<_, DaemonError>>()?
        } else {
            heads.par_iter().map(choose).collect::<Result<_, DaemonError>>()?
        };
        for of_member in chosen.chunks(kv_heads) {
            let member = of_member[0].0;
            let mut selections = Vec::with_capacity(kv_heads);
            for (_, kv_head, selection, note, time) in of_member {
                self.keep_note(&mut *batch[member], layer, *kv_head, note);
                self.stats.select += *time;
                selections.push(selection.clone());
            }
            self.steer(&mut *batch[member], layer, positions[member] + 1, &selections);
            self.chosen[layer].push(Chosen { member, selections });
        }
        Ok(())
    }

    fn keep_note(&self, sequence: &mut DaemonSequence, layer: usize, kv_head: usize, note: &[u8]) {
        if let (Some(method), Some(digests)) = (self.here(sequence.method()), sequence.digests_mut()) {
            method.keep_note(digests, layer, kv_head, note);
        }
    }

    fn steer(&self, sequence: &mut DaemonSequence, layer: usize, tokens: usize, selections: &[Selection]) {
        if let (Some(method), Some(digests)) = (self.here(sequence.method()), sequence.digests_mut()) {
            let mut all = Selection::new();
            for selection in selections {
                selection
                    .head(0)
                    .iter()
                    .for_each(|range| all.push(range.first as usize, range.end() as usize));
                all.finish_head();
            }
            method.steer(digests, layer, tokens, &all);
        }
    }

    /// The KV heads of the members that select here, member by member.
    fn heads_here<'a>(
        &'a self,
        batch: &[&'a DaemonSequence],
        positions: &[usize],
        queries: &'a [f32],
    ) -> Vec<Head<'a>> {
        let width = self.shape.query_heads * self.shape.head_dim;
        let mut heads = Vec::new();
        for (member, (&sequence, position)) in batch.iter().zip(positions).enumerate() {
            let (Some(method), Some(digests)) = (self.here(sequence.method()), sequence.digests()) else {
                continue;
            };
            let query = &queries[member * width..(member + 1) * width];
            let tokens = position + 1;
            heads.extend((0..self.shape.kv_heads).map(|kv_head| Head {
                member,
                kv_head,
                sequence,
                digests,
                method,
                tokens,
                query,
            }));
        }
        heads
    }

    /// Attention of the members that select here, in a layer that is selected for: `queries` and `out` are `[batch][Hq][d]`. Which members
    /// those were.
    pub(super) fn attend_here(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<Vec<usize>, DaemonError> {
        let chosen = std::mem::take(&mut self.chosen[layer]);
        let pass = Pass { selects: true, ..self.pass(layer, true) };
        let (kv_heads, query_heads, d) = (self.shape.kv_heads, self.shape.query_heads, self.shape.head_dim);
        let values = self.shape.group() * d;
        let shared: Vec<&DaemonSequence> = batch.iter().map(|sequence| &**sequence).collect();
        let chosen_for = |member: usize| chosen.iter().find(|chosen| chosen.member == member);
        // A layer that nothing predicted attends to everything, with the others.
        let heads: Vec<Head<'_>> = self
            .heads_here(&shared, positions, queries)
            .into_iter()
            .filter(|head| head.method.needs().hint != HintSource::Ahead || chosen_for(head.member).is_some())
            .collect();
        if heads.is_empty() {
            return Ok(Vec::new());
        }
        let mut outs: Vec<Option<&mut [f32]>> = out.chunks_exact_mut(values).map(Some).collect();
        let tasks: Vec<(&Head<'_>, &mut [f32])> = heads
            .iter()
            .filter_map(|head| Some((head, outs[head.member * kv_heads + head.kv_head].take()?)))
            .collect();
        let spare = &self.spare;
        let one = |(head, out): (&Head<'_>, &mut [f32])| {
            let ahead = chosen_for(head.member).map(|chosen| &chosen.selections[head.kv_head]);
            let lse = &mut vec![0.0; query_heads / kv_heads];
            spare.with(|answer| head.attend(&pass, ahead, answer, (out, lse)))
        };
        let most = heads.iter().map(|head| head.tokens).max().unwrap_or(0);
        let done: Vec<Done> = if most < PARALLEL_TOKENS {
            tasks.into_iter().map(one).collect::<Result<_, _>>()?
        } else {
            tasks.into_par_iter().map(one).collect::<Result<_, _>>()?
        };
        let mut members = Vec::new();
        for of_member in done.chunks(kv_heads) {
            let member = of_member[0].member;
            members.push(member);
            let sequence = &mut *batch[member];
            let selections: Vec<Selection> = of_member.iter().map(|done| done.selection.clone()).collect();
            let current = self.needs_of(sequence).hint != HintSource::Ahead;
            if current {
                of_member.iter().for_each(|done| self.keep_note(sequence, layer, done.kv_head, &done.note));
                self.steer(sequence, layer, positions[member] + 1, &selections);
            }
            let rows: usize = selections.iter().map(Selection::total_rows).sum();
            let certificates: Vec<_> =
                of_member.iter().flat_map(|done| done.certificates.iter().copied()).collect();
            certificates.iter().flatten().for_each(|certificate| self.stats.certified.add(certificate));
            let exact = Exact {
                rows: of_member.iter().map(|done| done.exact.rows).sum(),
                lse: of_member.iter().flat_map(|done| done.exact.lse.iter().copied()).collect(),
            };
            self.stats.rows_cpu += u64::from(exact.rows);
            let time = of_member.iter().map(|done| done.selecting).sum();
            self.stats.selected_here((rows, exact.rows as usize), time);
            if self.measure {
                let width = query_heads * d;
                let own = member * width..(member + 1) * width;
                let attended = Attended {
                    queries: &queries[own.clone()],
                    out: &out[own],
                    certificates: &certificates,
                    exact: &[exact],
                };
                let members = (&[&*sequence][..], &positions[member..=member]);
                let measured =
                    self.pass(layer, true).measure(&selections[..], members.0, members.1, attended);
                self.stats.measured += measured;
            }
        }
        self.model.has_selected(members.len() as u64);
        Ok(members)
    }
}
