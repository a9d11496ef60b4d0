//! Attention of new tokens as the reference engine computes it: over sinks, what the daemon answers with, and the window, with what the answer
//! estimates of the rest.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use kvoyant_client::{Hint, Member, Mode, Model, Ready, RowLayout, Sequence};
use kvoyant_kernels::{AttendScratch, Certificate, Kernels, Run};
use kvoyant_methods::{HintSource, Needs, RowPart};
use pyo3::prelude::*;
use rayon::prelude::*;

use crate::array;
use crate::errors::{Result, Wrong};
use crate::request::positions;
use crate::sequence::Kept;
use crate::session::Session;

/// Rows below which heads are attended one after the other: waking another thread costs more than it saves.
const PARALLEL_ROWS: usize = 1024;

thread_local! {
    static SCRATCH: RefCell<AttendScratch> = RefCell::default();
}

/// How far attention reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// As the model was registered: to what the method selects, or in dense and sliding layers to everything.
    Model,
    /// To the last so many tokens, the current one included, and all of them.
    Last(usize),
}

impl Reach {
    pub(crate) fn of(tokens: Option<usize>) -> Result<Self> {
        match tokens {
            None => Ok(Self::Model),
            Some(0) => Err(Wrong::argument("reach is 0 tokens: at least the current one is attended to")),
            Some(tokens) => Ok(Self::Last(tokens)),
        }
    }
}

/// A call.
#[derive(Debug)]
pub(crate) struct Attending<'a> {
    pub(crate) session: &'a Arc<Session>,
    pub(crate) layer: usize,
    pub(crate) members: &'a [&'a Arc<Kept>],
    pub(crate) positions: Option<Vec<usize>>,
    /// `[members][Hq][key_values]`.
    pub(crate) queries: &'a [f32],
    pub(crate) reach: Reach,
    pub(crate) timeout: Duration,
}

/// What it came to.
#[derive(Debug)]
pub(crate) struct Attended {
    /// `[members][Hq][value_values]`.
    out: Vec<f32>,
    /// `[members][Hq]`.
    lse: Vec<f32>,
    /// `[members][Hq]`, where anything is known.
    certificates: Vec<Option<Certificate>>,
}

impl Attended {
    /// `kvoyant.Attended`; of several members with a first dimension of them.
    pub(crate) fn into_python<'py>(
        self,
        py: Python<'py>,
        session: &Session,
        members: Option<usize>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let shape: Vec<usize> = members.into_iter().chain([session.query_heads()]).collect();
        let wide: Vec<usize> = shape.iter().copied().chain([session.layout.value_values()]).collect();
        let known = self.certificates.iter().any(Option::is_some);
        let of = |value: fn(&Certificate) -> f32| {
            let values: Vec<f32> =
                self.certificates.iter().map(|known| known.as_ref().map_or(f32::NAN, value)).collect();
            known.then(|| array::floats(py, &shape, &values)).transpose()
        };
        let (missed, error) = (of(|known| known.missed_mass)?, of(|known| known.error)?);
        let (out, lse) = (array::floats(py, &wide, &self.out)?, array::floats(py, &shape, &self.lse)?);
        py.import("kvoyant")?.getattr("Attended")?.call1((out, lse, missed, error))
    }
}

impl Attending<'_> {
    /// Attends, while other Python threads run.
    pub(crate) fn attend(self, py: Python<'_>) -> PyResult<Attended> {
        let session = self.session;
        let model = session.model()?;
        if session.mode == Mode::Device {
            return Err(Wrong::unsupported(format!(
                "attention is computed here for rows in host memory, and those of this session lie on {}: attend there, over rows()",
                session.device
            ))
            .into());
        }
        let open = self.members.iter().map(|kept| kept.shared()).collect::<Result<Vec<_>>>()?;
        let positions = positions(&open, self.positions)?;
        for (open, position) in open.iter().zip(&positions) {
            let room = open.get().room();
            if *position >= room {
                return Err(Wrong::from(kvoyant_client::Error::NoRoom { position: *position, room }).into());
            }
        }
        let sequences: Vec<&Sequence> = open.iter().map(|open| &**open.get()).collect();
        let needs: Vec<Needs> = self.members.iter().map(|kept| session.needs[kept.method]).collect();
        let (layer, reach, timeout, queries) = (self.layer, self.reach, self.timeout, self.queries.to_vec());
        let pass = Pass { session, model: &model, layer, sequences, needs, positions, queries, timeout };
        Ok(py.detach(|| pass.attend(reach))?)
    }
}

/// One layer of one call, without Python.
struct Pass<'a> {
    session: &'a Session,
    model: &'a Model,
    layer: usize,
    sequences: Vec<&'a Sequence>,
    needs: Vec<Needs>,
    positions: Vec<usize>,
    queries: Vec<f32>,
    timeout: Duration,
}

/// Attention of some members: `[members][Hq][value_values]` and `[members][Hq]`.
struct Part {
    out: Vec<f32>,
    lse: Vec<f32>,
}

impl Pass<'_> {
    fn attend(&self, reach: Reach) -> Result<Attended> {
        let heads = self.session.query_heads();
        let width = heads * self.session.layout.value_values();
        let everyone: Vec<usize> = (0..self.sequences.len()).collect();
        let mut all = Attended {
            out: vec![0.0; everyone.len() * width],
            lse: vec![0.0; everyone.len() * heads],
            certificates: vec![None; everyone.len() * heads],
        };
        let mut done = |members: &[usize], part: &Part, certificates: &[Option<Certificate>]| {
            for (at, &i) in members.iter().enumerate() {
                all.out[i * width..][..width].copy_from_slice(&part.out[at * width..][..width]);
                all.lse[i * heads..][..heads].copy_from_slice(&part.lse[at * heads..][..heads]);
                if let Some(known) = certificates.get(at * heads..(at + 1) * heads) {
                    all.certificates[i * heads..][..heads].copy_from_slice(known);
                }
            }
        };
        if reach != Reach::Model || !self.session.selects(self.layer) {
            let part = self.attend_densely(&everyone, reach)?;
            done(&everyone, &part, &[]);
        } else {
            let (floored, plain): (Vec<usize>, Vec<usize>) =
                everyone.into_iter().partition(|i| self.needs[*i].floors && self.needs[*i].hint.is_query());
            for (members, floored) in [(floored, true), (plain, false)] {
                if !members.is_empty() {
                    let (part, certificates) = self.attend_selected(&members, floored)?;
                    done(&members, &part, &certificates);
                }
            }
        }
        // Of all of them, so that none is told at its next call.
        let missed: Vec<_> = self.sequences.iter().filter(|sequence| sequence.take_missed()).collect();
        if let Some(first) = missed.first() {
            return Err(match first.first_lost() {
                Some(token) => kvoyant_client::Error::Lost { token },
                None => kvoyant_client::Error::Spilled { layer: self.layer, token: 0 },
            }
            .into());
        }
        Ok(all)
    }

    fn query(&self, member: usize) -> &[f32] {
        let width = self.queries.len() / self.sequences.len().max(1);
        &self.queries[member * width..][..width]
    }

    /// First token of the window, sinks left out.
    fn window_start(&self, position: usize) -> usize {
        let (sinks, window) = (self.session.spec.sinks as usize, self.session.spec.window as usize);
        (position + 1).saturating_sub(window).max(sinks.min(position + 1))
    }

    /// Sinks and window, which are attended in any case.
    fn local(&self, position: usize) -> [Range<usize>; 2] {
        let (sinks, end) = (self.session.spec.sinks as usize, position + 1);
        [0..sinks.min(end), self.window_start(position)..end]
    }

    fn local_runs(&self, member: usize, head: usize, tokens: Range<usize>, runs: &mut Vec<Run>) {
        self.sequences[member].local_runs(self.layer, head, tokens, runs);
    }

    /// Attention of members over the rows that `runs` gives for each of them (its place in `members` first) and each KV head.
    fn attend_rows(
        &self,
        members: &[usize],
        runs: impl Fn(usize, usize, usize) -> Result<Vec<Run>>,
    ) -> Result<Part> {
        let (layout, kv_heads) = (self.session.layout, self.session.kv_heads());
        let group = self.session.query_heads() / kv_heads;
        let (k, v) = (group * layout.key_values(), group * layout.value_values());
        let mut tasks = Vec::with_capacity(members.len() * kv_heads);
        for (at, &member) in members.iter().enumerate() {
            for head in 0..kv_heads {
                tasks.push((&self.query(member)[head * k..][..k], runs(at, member, head)?));
            }
        }
        let mut part = Part { out: vec![0.0; tasks.len() * v], lse: vec![0.0; tasks.len() * group] };
        let rows: usize = tasks.iter().flat_map(|(_, runs)| runs).map(|run| run.rows).sum();
        let into = part.out.chunks_exact_mut(v).zip(part.lse.chunks_exact_mut(group));
        if rows < PARALLEL_ROWS {
            for ((queries, runs), into) in tasks.iter().zip(into) {
                attend_one(layout, queries, runs, into);
            }
        } else {
            let into: Vec<_> = into.collect();
            self.session.pool()?.install(|| {
                tasks
                    .par_iter()
                    .zip(into)
                    .for_each(|((queries, runs), into)| attend_one(layout, queries, runs, into));
            });
        }
        Ok(part)
    }

    fn attend_densely(&self, members: &[usize], reach: Reach) -> Result<Part> {
        // Pages may be on disk: they stay in memory until this is dropped.
        let _lease = if self.session.spills {
            let whole: Vec<_> = self.sequences.iter().copied().zip(self.positions.iter().copied()).collect();
            Some(self.model.fetch(self.layer, &whole)?.wait(self.timeout)?)
        } else {
            None
        };
        self.attend_rows(members, |_, member, head| {
            let end = self.positions[member] + 1;
            let first = match reach {
                Reach::Model => 0,
                Reach::Last(tokens) => end.saturating_sub(tokens),
            };
            let mut runs = Vec::new();
            self.local_runs(member, head, first..end, &mut runs);
            Ok(runs)
        })
    }

    /// Asks for rows by the true query, and attends to them.
    fn attend_selected(&self, members: &[usize], floored: bool) -> Result<(Part, Vec<Option<Certificate>>)> {
        self.check_needs(members)?;
        let heads = self.session.query_heads();
        // What the true query gives to sinks and window is wanted before rows are chosen by it.
        let local = floored.then(|| {
            self.attend_rows(members, |_, member, head| {
                let [before, behind] = self.local(self.positions[member]);
                let mut runs = Vec::new();
                self.local_runs(member, head, before, &mut runs);
                self.local_runs(member, head, behind, &mut runs);
                Ok(runs)
            })
        });
        let local = local.transpose()?;
        let asked: Vec<Member<'_>> = members
            .iter()
            .enumerate()
            .map(|(at, &i)| {
                let hint = match &local {
                    _ if self.needs[i].hint == HintSource::None => Hint::None,
                    Some(local) => {
                        Hint::Beside { query: self.query(i), floors: &local.lse[at * heads..][..heads] }
                    }
                    None => Hint::Query(self.query(i)),
                };
                Member { sequence: self.sequences[i], position: self.positions[i], hint }
            })
            .collect();
        let ready = self.model.speculate(self.layer, &asked)?.wait(self.timeout)?;
        let kernels = Kernels::best();
        let mut part = self.attend_rows(members, |at, member, head| {
            let mut runs = Vec::new();
            let [before, behind] = self.local(self.positions[member]);
            if local.is_none() {
                self.local_runs(member, head, before, &mut runs);
            }
            ready.runs(at, head, &mut runs)?;
            if local.is_none() {
                self.local_runs(member, head, behind, &mut runs);
            }
            Ok(runs)
        })?;
        if let Some(local) = &local {
            kernels.merge(&mut part.out, &mut part.lse, &local.out, &local.lse);
        }
        self.merge_partials(&ready, &mut part, None);
        let certificates = self.add_rest(members, &ready, &mut part)?;
        Ok((part, certificates))
    }

    /// Refuses methods that want more of an engine than queries.
    fn check_needs(&self, members: &[usize]) -> Result<()> {
        for &i in members {
            let needs = &self.needs[i];
            let why = if needs.hint == HintSource::Ids {
                "takes the rows that the engine names: ask with speculate(ids=…)"
            } else if needs.part != RowPart::Whole {
                "has the engine rebuild keys: use keys=moved, or the reference engine"
            } else {
                continue;
            };
            let method = self.session.spec.methods.iter().zip(&self.session.needs);
            let name =
                method.into_iter().find(|(_, other)| *other == needs).map_or("", |(name, _)| name.as_str());
            return Err(Wrong::unsupported(format!("method `{name}` {why}")));
        }
        Ok(())
    }

    /// Merges what the daemon's CPU has attended: for all members, or for the answer's members at these places of the part.
    fn merge_partials(&self, ready: &Ready, part: &mut Part, places: Option<&[usize]>) {
        let heads = self.session.query_heads();
        let width = heads * self.session.layout.value_values();
        for member in 0..ready.members() {
            let at = places.map_or(member, |places| places[member]);
            if let Some(partial) = ready.partial(member) {
                let (out, lse) = (&mut part.out[at * width..][..width], &mut part.lse[at * heads..][..heads]);
                Kernels::best().merge(out, lse, partial.out, partial.lse);
            }
        }
    }

    /// Merges what is estimated of the rows left out. Members whose methods choose ahead are asked for again, by what was attended.
    fn add_rest(
        &self,
        members: &[usize],
        ready: &Ready,
        part: &mut Part,
    ) -> Result<Vec<Option<Certificate>>> {
        let heads = self.session.query_heads();
        let d = self.session.layout.value_values();
        let mut certificates = vec![None; members.len() * heads];
        let later = |i: usize| self.needs[i].rest && self.needs[i].hint != HintSource::Current;
        let places: Vec<usize> = (0..members.len()).filter(|at| later(members[*at])).collect();
        let again = if places.is_empty() {
            None
        } else {
            let asked: Vec<Member<'_>> = places
                .iter()
                .map(|&at| {
                    let (query, floors) = (self.query(members[at]), &part.lse[at * heads..][..heads]);
                    let hint = Hint::Beside { query, floors };
                    Member {
                        sequence: self.sequences[members[at]],
                        position: self.positions[members[at]],
                        hint,
                    }
                })
                .collect();
            Some(self.model.rest(self.layer, &asked)?.wait(self.timeout)?)
        };
        if let Some(again) = &again {
            self.merge_partials(again, part, Some(&places));
        }
        let mut mean = vec![0.0; d];
        for at in 0..members.len() {
            let rest = match (places.iter().position(|place| *place == at), &again) {
                (Some(member), Some(again)) => again.rest(member),
                _ => ready.rest(at),
            };
            let Some(rest) = rest else { continue };
            for (h, sums) in rest.sums().enumerate().take(heads) {
                let at = at * heads + h;
                let (out, lse) = (&mut part.out[at * d..][..d], &mut part.lse[at..=at]);
                let attended = lse[0];
                rest.mean(h, &mut mean);
                Kernels::best().merge(out, lse, &mean, &[sums.lse()]);
                if sums.rows == 0 || sums.is_certified() {
                    certificates[at] = Some(sums.certify(attended, out));
                }
            }
        }
        Ok(certificates)
    }
}

fn attend_one(layout: RowLayout, queries: &[f32], runs: &[Run], into: (&mut [f32], &mut [f32])) {
    SCRATCH.with_borrow_mut(|scratch| {
        // SAFETY: the runs lie in mappings that the sequences and the answer of the call keep alive, and were checked to lie there. Extents are
        // written by this session alone, and rows that are appended, or of the token that attends, are not written again; slab slots of
        // an answer are left alone until it is dropped.
        unsafe { Kernels::best().attend_in_pieces(layout, queries, runs, scratch, into) };
    });
}
