//! One sequence in the daemon.

use kvoyant_client::{Error, Sequence};

/// One sequence's cache, kept by [`DaemonKv`](super::DaemonKv). Dropping it closes it.
#[derive(Debug)]
pub struct DaemonSequence {
    inner: Sequence,
    method: usize,
    tokens: usize,
    /// Statistics of the prompt's queries so far, `[layers][Hkv][d]`; gone once they have been sent.
    sums: Option<Vec<f32>>,
}

impl DaemonSequence {
    pub(super) fn new(inner: Sequence, method: usize) -> Self {
        Self { inner, method, tokens: 0, sums: Some(Vec::new()) }
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

    /// The statistics, once; `None` where there is nothing (more) to send.
    pub(super) fn take_sums(&mut self) -> Option<Vec<f32>> {
        if self.sums.as_ref().is_none_or(Vec::is_empty) {
            return None;
        }
        self.sums.take()
    }

    pub(super) fn fork(&self, method: Option<usize>) -> Result<Self, Error> {
        let inner = self.inner.fork(method)?;
        // What the parent has sent, the fork has too; else both still collect.
        Ok(Self {
            inner,
            method: method.unwrap_or(self.method),
            tokens: self.tokens,
            sums: self.sums.clone(),
        })
    }

    pub(super) fn truncate(&mut self, tokens: usize) -> Result<(), Error> {
        self.inner.truncate(tokens)?;
        self.tokens = self.tokens.min(tokens);
        Ok(())
    }
}
