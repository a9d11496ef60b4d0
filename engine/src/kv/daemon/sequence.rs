//! One sequence in the daemon.

use std::ops::Range;
use std::sync::Arc;

use kvoyant_client::local::LocalDigests;
use kvoyant_client::{Error, SelectedBy, Sequence};

use super::own::Own;
use super::rebuilt::Rebuilt;
use super::still::HeldBack;

/// The newest queries of a prompt, per layer.
#[derive(Debug, Clone, Default)]
pub(super) struct Tail {
    /// `[rows][Hq][d]`.
    pub(super) queries: Vec<f32>,
    /// Position behind the last of them.
    pub(super) end: usize,
}

/// One sequence's cache, kept by [`DaemonKv`](super::DaemonKv). Dropping it closes it.
#[derive(Debug)]
pub struct DaemonSequence {
    inner: Sequence,
    method: usize,
    tokens: usize,
    /// Statistics of the prompt's queries so far, `[layers][Hkv][d]`; gone once they have been sent.
    sums: Option<Vec<f32>>,
    /// Up to which token each layer's keys and queries are in there.
    summed: Vec<[usize; 2]>,
    /// Queries of the prompt's last tokens, by layer, where a method of the session learns from their attention.
    tails: Arc<Vec<Tail>>,
    /// Attention rows of prompt tokens before this position have been sent to this sequence's method.
    reported: usize,
    /// The true query of the newest token, by layer, `[Hq][d]`; empty where no method of the session wants it.
    last: Vec<Vec<f32>>,
    /// What keys of the prompt are rebuilt from; empty where no method of the session does.
    rebuilt: Rebuilt,
    /// Decode steps so far.
    steps: usize,
    /// What its method keeps, where this process selects.
    digests: Option<LocalDigests>,
    /// What it has without the daemon, once that is lost.
    own: Option<Own>,
    /// The rows of each layer's last answer, by KV head, where they may stand in for one that is late.
    named: Vec<Vec<Vec<Range<usize>>>>,
    /// What a lane that stands still has yet to be told.
    held_back: HeldBack,
}

/// What statistics of a prompt are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Summed {
    Keys,
    Queries,
}

impl DaemonSequence {
    pub(super) fn new(inner: Sequence, method: usize, layers: usize) -> Self {
        Self {
            inner,
            method,
            tokens: 0,
            sums: Some(Vec::new()),
            summed: vec![[0; 2]; layers],
            tails: Arc::new(vec![Tail::default(); layers]),
            reported: 0,
            last: vec![Vec::new(); layers],
            rebuilt: Rebuilt::default(),
            steps: 0,
            digests: None,
            own: None,
            named: vec![Vec::new(); layers],
            held_back: HeldBack::default(),
        }
    }

    /// As an image has it: all its tokens are committed, and statistics of its prompt have been sent.
    pub(super) fn resumed(inner: Sequence, method: usize, layers: usize) -> Self {
        let tokens = inner.tokens();
        Self { tokens, sums: None, reported: tokens, ..Self::new(inner, method, layers) }
    }

    /// Tokens that are committed.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Index of its method.
    #[must_use]
    pub fn method(&self) -> usize {
        self.method
    }

    pub(super) fn inner(&self) -> &Sequence {
        &self.inner
    }

    pub(super) fn into_inner(self) -> Sequence {
        self.inner
    }

    pub(super) fn set_tokens(&mut self, tokens: usize) {
        self.tokens = tokens;
    }

    /// Statistics of `values` values to add to, until they have been sent.
    pub(super) fn sums_mut(&mut self, values: usize) -> Option<&mut [f32]> {
        let sums = self.sums.as_mut()?;
        sums.resize(values, 0.0);
        Some(sums)
    }

    /// How many of these tokens are in a layer's statistics already: a chunk that failed half way is read once more. From here on all are.
    pub(super) fn sums_up(&mut self, layer: usize, of: Summed, tokens: &Range<usize>) -> usize {
        let end = &mut self.summed[layer][of as usize];
        let there = end.saturating_sub(tokens.start).min(tokens.len());
        *end = tokens.end.max(*end);
        there
    }

    /// Drops statistics that have not been sent, for others.
    pub(super) fn forget_statistics(&mut self) {
        if let Some(sums) = &mut self.sums {
            sums.clear();
            self.summed.fill([0; 2]);
        }
    }

    /// The statistics, once; `None` where there is nothing (more) to send.
    pub(super) fn take_sums(&mut self) -> Option<Vec<f32>> {
        if self.sums.as_ref().is_none_or(Vec::is_empty) {
            return None;
        }
        self.sums.take()
    }

    /// Whether something of its prompt has yet to be told.
    pub(super) fn has_prompt_to_finish(&self) -> bool {
        let told = |tail: &Tail| tail.end <= self.reported;
        self.sums.as_ref().is_some_and(|sums| !sums.is_empty()) || !self.tails.iter().all(told)
    }

    /// Keeps the last `most` queries of a prompt, `[T][width]` from position `start` on.
    pub(super) fn keep_queries(
        &mut self,
        layer: usize,
        start: usize,
        queries: &[f32],
        width: usize,
        most: usize,
    ) {
        let tail = &mut Arc::make_mut(&mut self.tails)[layer];
        if tail.end != start {
            // What is kept belongs to tokens that are not the ones before these.
            tail.queries.clear();
        }
        tail.end = start + queries.len() / width;
        let kept = &queries[queries.len() - queries.len().min(most * width)..];
        let over = (tail.queries.len() + kept.len()).saturating_sub(most * width);
        tail.queries.drain(..over.min(tail.queries.len()));
        tail.queries.extend_from_slice(kept);
    }

    /// The queries of the prompt's last tokens, by layer; and from which position on they have not been reported, which
    /// now they are.
    pub(super) fn take_tails(&mut self) -> (Arc<Vec<Tail>>, usize) {
        let from = self.reported;
        self.reported = self.tails.iter().map(|tail| tail.end).max().unwrap_or(0).max(from);
        (Arc::clone(&self.tails), from)
    }

    /// The true query of the newest token.
    pub(super) fn last(&self, layer: usize) -> &[f32] {
        &self.last[layer]
    }

    pub(super) fn set_last(&mut self, layer: usize, query: &[f32]) {
        let last = &mut self.last[layer];
        last.clear();
        last.extend_from_slice(query);
    }

    pub(super) fn rebuilt(&self) -> &Rebuilt {
        &self.rebuilt
    }

    pub(super) fn set_rebuilt(&mut self, rebuilt: Rebuilt) {
        self.rebuilt = rebuilt;
    }

    /// Decode steps so far.
    pub(super) fn steps(&self) -> usize {
        self.steps
    }

    pub(super) fn stepped(&mut self) {
        self.steps += 1;
    }

    /// Bytes of what its method keeps in this process; those shared with forks count for each.
    #[must_use]
    pub fn digest_bytes(&self) -> usize {
        self.digests.as_ref().map_or(0, LocalDigests::bytes)
    }

    pub(super) fn digests(&self) -> Option<&LocalDigests> {
        self.digests.as_ref()
    }

    pub(super) fn digests_mut(&mut self) -> Option<&mut LocalDigests> {
        self.digests.as_mut()
    }

    /// The rows of a layer's last answer, by KV head; none where nothing is known of it.
    pub(super) fn named(&self, layer: usize) -> &[Vec<Range<usize>>] {
        &self.named[layer]
    }

    pub(super) fn set_named(&mut self, layer: usize, named: Vec<Vec<Range<usize>>>) {
        self.named[layer] = named;
    }

    pub(super) fn held_back(&self) -> &HeldBack {
        &self.held_back
    }

    pub(super) fn own(&self) -> Option<&Own> {
        self.own.as_ref()
    }

    pub(super) fn set_own(&mut self, own: Own) {
        self.own = Some(own);
    }

    /// Writes rows of one head where the daemon is lost.
    pub(super) fn write_own(
        &mut self,
        head: (usize, usize, usize),
        position: usize,
        rows: &[u8],
        row_bytes: usize,
    ) -> Result<(), Error> {
        match &mut self.own {
            Some(own) => own.write(&self.inner, head, position, rows, row_bytes),
            None => Ok(()),
        }
    }

    /// Drops rows where the daemon is lost.
    pub(super) fn truncate_own(&mut self, tokens: usize, row_bytes: usize) {
        self.tokens = self.tokens.min(tokens);
        if let Some(own) = &mut self.own {
            own.truncate(self.tokens, row_bytes);
        }
    }

    pub(super) fn take_digests(&mut self) -> Option<LocalDigests> {
        self.digests.take()
    }

    pub(super) fn set_digests(&mut self, digests: LocalDigests) {
        self.digests = Some(digests);
    }

    pub(super) fn fork(&self, method: Option<usize>, by: SelectedBy) -> Result<Self, Error> {
        let inner = self.inner.fork_selected_by(method, by)?;
        let method = method.unwrap_or(self.method);
        Ok(Self {
            inner,
            method,
            tokens: self.tokens,
            // What the parent has sent, the fork has too; else both still collect.
            sums: self.sums.clone(),
            summed: self.summed.clone(),
            tails: Arc::clone(&self.tails),
            // Another method has learnt nothing yet.
            reported: if method == self.method { self.reported } else { 0 },
            last: self.last.clone(),
            rebuilt: self.rebuilt.clone(),
            steps: self.steps,
            digests: None,
            own: None,
            named: self.named.clone(),
            held_back: HeldBack::default(),
        })
    }

    pub(super) fn truncate(&mut self, tokens: usize) -> Result<(), Error> {
        self.inner.truncate(tokens)?;
        self.tokens = self.tokens.min(tokens);
        if self.tails.iter().any(|tail| tail.end > tokens) {
            let layers = self.tails.len();
            self.tails = Arc::new(vec![Tail::default(); layers]);
        }
        self.reported = self.reported.min(tokens);
        self.rebuilt.tokens = self.rebuilt.tokens.min(tokens);
        self.named.iter_mut().for_each(Vec::clear);
        // Of a token that may be gone.
        self.last.iter_mut().for_each(Vec::clear);
        if let Some(digests) = &mut self.digests {
            digests.truncate(tokens);
        }
        Ok(())
    }
}
