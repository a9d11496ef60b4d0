//! Asking the daemon: who is asked when, and by what.

use std::fmt;
use std::time::Instant;

use kvoyant_client::cuda::{StreamMember, StreamPending};
use kvoyant_client::{Hint, InTime, Member, Pending};
use kvoyant_methods::HintSource;

use super::attention::{Pass, Rows, scores_of};
use super::{DaemonError, DaemonKv, DaemonSequence};

/// One request for rows that the engine names itself.
#[derive(Clone, Copy)]
pub struct IdsRequest<'a> {
    /// The layer.
    pub layer: usize,
    /// Index of the sequence in the step's batch.
    pub member: usize,
    /// Position of the token that is being computed: tokens below it can be named.
    pub position: usize,
    /// The layer's true query, `[Hq][d]`.
    pub query: &'a [f32],
    /// Scores `q·k/√d` of a KV head's queries against every token up to the position, its own with them, `[g][position + 1]`: for engines
    /// that choose by their own keys.
    pub scores: &'a dyn Fn(usize) -> Vec<f32>,
    kv_heads: usize,
}

impl IdsRequest<'_> {
    /// The layer's KV heads.
    pub fn heads(&self) -> std::ops::Range<usize> {
        0..self.kv_heads
    }
}

impl fmt::Debug for IdsRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdsRequest")
            .field("layer", &self.layer)
            .field("member", &self.member)
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

type Name = dyn FnMut(&IdsRequest<'_>) -> Vec<Vec<u32>> + Send;

/// Who names rows.
pub(super) struct Provider(Box<Name>);

impl Provider {
    pub(super) fn new(name: impl FnMut(&IdsRequest<'_>) -> Vec<Vec<u32>> + Send + 'static) -> Self {
        Self(Box::new(name))
    }
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Provider")
    }
}

/// An answer under way, and whose it is.
#[derive(Debug)]
pub(super) struct Asked {
    /// Indices into the step's batch, rising.
    pub(super) members: Vec<usize>,
    pub(super) answer: Waiting,
    /// Attention over the rows that are attended in any case, where it had to be known before asking.
    pub(super) local: Option<Partial>,
}

/// Attention of members over a part of their rows.
#[derive(Debug)]
pub(super) struct Partial {
    /// `[members][Hq][d]`.
    pub(super) out: Vec<f32>,
    /// `[members][Hq]`.
    pub(super) lse: Vec<f32>,
}

/// Who waits for an answer.
#[derive(Debug)]
pub(super) enum Waiting {
    /// This process, which reads it.
    Host(Pending),
    /// A stream.
    Stream(StreamPending),
    /// Nobody: there was no ticket to ask with, because so many answers are late.
    Nobody,
}

/// When the daemon is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    /// While the layer before runs.
    Ahead,
    /// When the layer is about to attend.
    Current,
}

impl Moment {
    fn of(source: HintSource) -> Self {
        match source {
            HintSource::None | HintSource::Ahead | HintSource::Previous => Self::Ahead,
            HintSource::Current | HintSource::Ids => Self::Current,
        }
    }
}

/// Whether rows are selected by a query of the step.
fn is_by_query(source: HintSource) -> bool {
    matches!(source, HintSource::Ahead | HintSource::Current)
}

impl DaemonKv {
    /// Asks for a layer for the members whose moment it is. `queries`, `[batch][Hq][d]`, are those of the moment; empty:
    /// there are none, and members that want them are left out.
    pub(super) fn ask(
        &mut self,
        moment: Moment,
        layer: usize,
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
    ) -> Result<(), DaemonError> {
        let members = self.whose_moment(moment, batch, !queries.is_empty());
        if members.is_empty() {
            return Ok(());
        }
        if self.unasked || self.stands_still()? {
            self.pending[layer].push(Asked { members, answer: Waiting::Nobody, local: None });
            return Ok(());
        }
        self.tell_all(batch)?;
        let by_query = |i: &usize| is_by_query(self.needs_of(batch[*i]).hint);
        // A stream brings queries that the step has just computed; everything else goes as it is.
        let (streamed, told): (Vec<usize>, Vec<usize>) =
            members.into_iter().partition(|i| self.device.is_some() && by_query(i));
        let (floored, plain): (Vec<usize>, Vec<usize>) =
            told.into_iter().partition(|i| self.needs_of(batch[*i]).floors && by_query(i));
        if !streamed.is_empty() {
            let pending = self.ask_on_stream(layer, &streamed, batch, positions, queries);
            let answer = self.unless_all_late(pending)?.map_or(Waiting::Nobody, Waiting::Stream);
            self.pending[layer].push(Asked { members: streamed, answer, local: None });
        }
        for (told, floored) in [(floored, true), (plain, false)] {
            if told.is_empty() {
                continue;
            }
            let local = floored.then(|| self.attend_anyway(moment, layer, &told, batch, positions, queries));
            let floors = local.as_ref().map_or(&[][..], |local| &local.lse);
            let pending = self.ask_from_here(layer, &told, batch, positions, (queries, floors));
            let answer = match (self.unless_all_late(pending)?, &self.device) {
                (None, _) => Waiting::Nobody,
                (Some(pending), Some(_)) => Waiting::Stream(pending.on_stream()?),
                (Some(pending), None) => Waiting::Host(pending),
            };
            // What a predicted query gives is no part of the answer.
            let local = local.filter(|_| moment == Moment::Current);
            self.asked[layer] = (moment == Moment::Ahead).then(Instant::now);
            self.pending[layer].push(Asked { members: told, answer, local });
        }
        Ok(())
    }

    /// Members that are asked for at a moment, by index; `queries`: whether theirs are known.
    fn whose_moment(&self, moment: Moment, batch: &[&DaemonSequence], queries: bool) -> Vec<usize> {
        let its = |i: &usize| {
            let source = self.needs_of(batch[*i]).hint;
            Moment::of(source) == moment && (queries || !is_by_query(source))
        };
        (0..batch.len()).filter(|i| batch[*i].digests().is_none()).filter(its).collect()
    }

    /// Attention of the asked members over sinks and window, by the queries of the moment. Ahead of the layer its own row is not there yet.
    fn attend_anyway(
        &self,
        moment: Moment,
        layer: usize,
        asked: &[usize],
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
    ) -> Partial {
        let width = self.shape.query_heads * self.shape.head_dim;
        let part: Vec<&DaemonSequence> = asked.iter().map(|i| batch[*i]).collect();
        let at: Vec<usize> = asked.iter().map(|i| positions[*i]).collect();
        let own: Vec<f32> =
            asked.iter().flat_map(|i| &queries[i * width..(i + 1) * width]).copied().collect();
        let mut local =
            Partial { out: vec![0.0; own.len()], lse: vec![0.0; asked.len() * self.shape.query_heads] };
        let pass = self.pass(layer, true);
        let rows = if moment == Moment::Current { Rows::Local } else { Rows::LocalBefore };
        pass.attend_part(rows, None, &part, &at, &own, (&mut local.out, &mut local.lse));
        local
    }

    fn ask_on_stream(
        &mut self,
        layer: usize,
        asked: &[usize],
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
    ) -> Result<StreamPending, DaemonError> {
        let width = self.shape.query_heads * self.shape.head_dim;
        let members: Vec<_> = asked
            .iter()
            .map(|&i| StreamMember { sequence: batch[i].inner(), position: positions[i] })
            .collect();
        let deadline = self.options.deadline;
        let Some(device) = &mut self.device else { unreachable!("streams are those of a device") };
        if asked.len() == batch.len() {
            return device.speculate(&self.model, layer, &members, queries, deadline);
        }
        let hints: Vec<f32> =
            asked.iter().flat_map(|i| &queries[i * width..(i + 1) * width]).copied().collect();
        device.speculate(&self.model, layer, &members, &hints, deadline)
    }

    fn ask_from_here(
        &mut self,
        layer: usize,
        asked: &[usize],
        batch: &[&DaemonSequence],
        positions: &[usize],
        (queries, floors): (&[f32], &[f32]),
    ) -> Result<Pending, DaemonError> {
        let heads = self.shape.query_heads;
        let width = heads * self.shape.head_dim;
        let named: Vec<_> = asked
            .iter()
            .filter(|i| self.needs_of(batch[**i]).hint == HintSource::Ids)
            .map(|&i| (batch[i], positions[i]))
            .collect();
        // Who names rows may look at all of them.
        let lease = if named.is_empty() { None } else { self.lease(layer, &named)? };
        let given = self.given(layer, asked, batch, positions, queries)?;
        drop(lease);
        // A sequence without a past has nothing to choose from either.
        let nothing = vec![0.0; width];
        let members: Vec<_> = asked
            .iter()
            .zip(&given)
            .enumerate()
            .map(|(at, (&i, ids))| {
                let hint = match self.needs_of(batch[i]).hint {
                    HintSource::None => Hint::None,
                    HintSource::Ahead | HintSource::Current if !floors.is_empty() => Hint::Beside {
                        query: &queries[i * width..(i + 1) * width],
                        floors: &floors[at * heads..(at + 1) * heads],
                    },
                    HintSource::Ahead | HintSource::Current => {
                        Hint::Query(&queries[i * width..(i + 1) * width])
                    }
                    HintSource::Previous if batch[i].last(layer).is_empty() => Hint::Query(&nothing),
                    HintSource::Previous => Hint::Query(batch[i].last(layer)),
                    HintSource::Ids => Hint::Ids(ids),
                };
                Member { sequence: batch[i].inner(), position: positions[i], hint }
            })
            .collect();
        let within =
            self.hidden[layer].filter(|_| asked.iter().any(|i| self.needs_of(batch[*i]).leaves_late));
        Ok(match within {
            Some(within) => self.model.speculate_within(layer, &members, within)?,
            None => self.model.speculate(layer, &members)?,
        })
    }

    /// What the engine names, in the form of the wire; empty for members that name nothing.
    fn given(
        &mut self,
        layer: usize,
        asked: &[usize],
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
    ) -> Result<Vec<Vec<u32>>, DaemonError> {
        let width = self.shape.query_heads * self.shape.head_dim;
        let mut all = Vec::with_capacity(asked.len());
        for &i in asked {
            let mut words = Vec::new();
            if self.needs_of(batch[i]).hint == HintSource::Ids {
                let Some(Provider(name)) = &mut self.ids else {
                    let method = Box::new(self.options.methods[batch[i].method()].clone());
                    return Err(DaemonError::NoIds { method });
                };
                let query = &queries[i * width..(i + 1) * width];
                let group = self.shape.group() * self.shape.head_dim;
                let (shape, sinks, window) = (&self.shape, self.options.sinks, self.options.window);
                let pass = Pass { shape, sinks, window, layer, selects: true };
                let all = 0..positions[i] + 1;
                let scores = |head: usize| {
                    let queries = &query[head * group..(head + 1) * group];
                    scores_of(&pass, batch[i], head, queries, std::slice::from_ref(&all))
                };
                let request = IdsRequest {
                    layer,
                    member: i,
                    position: positions[i],
                    query,
                    scores: &scores,
                    kv_heads: shape.kv_heads,
                };
                let mut named = name(&request);
                named.resize(self.shape.kv_heads, Vec::new());
                for ids in named {
                    words.push(ids.len() as u32);
                    words.extend(ids);
                }
            }
            all.push(words);
        }
        Ok(all)
    }

    /// Waits for an answer on the host, and counts it; none if it is late.
    pub(super) fn wait(&mut self, pending: Pending) -> Result<Option<kvoyant_client::Ready>, DaemonError> {
        let since = Instant::now();
        match pending.or_late(self.options.deadline)? {
            InTime::Answered(ready) => {
                self.silent = None;
                self.stats.answered(since.elapsed(), ready.completion(), &mut self.generation);
                Ok(Some(ready))
            }
            InTime::Late { waited } => {
                self.suspect()?;
                self.late(waited).map(|()| None)
            }
        }
    }
}
