//! Answers: waited for, read, released.

use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvoyant_kernels::{Dtype, Kernels, RestSums, Run};
use kvoyant_protocol::memory::SharedMapping;
use kvoyant_protocol::wire::{
    BlockRun, Completion, HeadEntry, PartialLayout, RestEntry, RestLayout, Status, Told,
};

use crate::cuda::StreamPending;
use crate::error::Error;
use crate::fallback::{Fallback, InTime};
use crate::model::Inner;
use crate::rings::{Behind, Maps, Table};

/// A speculation under way. Dropping it gives it up.
#[derive(Debug)]
pub struct Pending {
    inner: Arc<Inner>,
    ticket: u64,
    taken: bool,
    asked: Instant,
    fallback: Fallback,
    late_after: Duration,
}

impl Pending {
    pub(crate) fn new(inner: Arc<Inner>, ticket: u64) -> Self {
        let (fallback, late_after) = inner.late;
        Self { inner, ticket, taken: false, asked: Instant::now(), fallback, late_after }
    }

    /// Has another fallback stand in for this answer than the session's.
    #[must_use]
    pub fn with_fallback(mut self, fallback: Fallback, late_after: Duration) -> Self {
        (self.fallback, self.late_after) = (fallback, late_after);
        self
    }

    /// Its ticket.
    #[must_use]
    pub fn ticket(&self) -> u64 {
        self.ticket
    }

    /// Waits for the answer, polling a little and then sleeping.
    ///
    /// # Errors
    /// [`Error::Deadline`] if it does not come in time, [`Error::DaemonGone`] if it never will,
    /// [`Error::NotReady`] with the daemon's reason.
    pub fn wait(self, deadline: Duration) -> Result<Ready, Error> {
        let inner = Arc::clone(&self.inner);
        let answered = self.answered(deadline);
        if let Err(Error::Deadline { .. }) = answered {
            inner.rings.says(Told::GaveUp, 1);
        }
        answered
    }

    fn answered(mut self, deadline: Duration) -> Result<Ready, Error> {
        let since = Instant::now();
        let answered = self.inner.rings.wait(&self.inner.control, self.ticket, deadline);
        self.inner.rings.says(Told::WaitedNs, since.elapsed().as_nanos().min(u128::from(u64::MAX)) as u64);
        let (completion, of) = answered?;
        self.taken = true;
        // From here on, dropping releases.
        let release = Release { inner: Arc::clone(&self.inner), ticket: self.ticket };
        let answer = Answer::of(&self.inner, completion, &of)?;
        Ok(Ready { answer, release, slab: of.slab.clone() })
    }

    /// Waits for the answer as long as its fallback allows: with [`Fallback::Wait`] for `deadline`, which is an error then; else until it is
    /// late, which is none, and the answer is given up.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn or_late(self, deadline: Duration) -> Result<InTime<Ready>, Error> {
        if self.fallback == Fallback::Wait {
            return self.wait(deadline).map(InTime::Answered);
        }
        let left = self.late_after.saturating_sub(self.asked.elapsed());
        let (inner, fallback) = (Arc::clone(&self.inner), self.fallback);
        match self.answered(left.min(deadline)) {
            Ok(ready) => Ok(InTime::Answered(ready)),
            Err(Error::Deadline { waited, .. }) => {
                let told = if fallback == Fallback::Partial { Told::Partial } else { Told::ResidentOnly };
                inner.rings.says(told, 1);
                Ok(InTime::Late { waited })
            }
            Err(error) => Err(error),
        }
    }

    /// Leaves the waiting to a stream: the same answer as [`Model::submit_on_stream`](crate::Model::submit_on_stream)
    /// gives, asked for with hints that lie on the host, or without any.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if the daemon's device is no GPU.
    pub fn on_stream(mut self) -> Result<StreamPending, Error> {
        let pending = StreamPending::of_ticket(&self.inner, self.ticket)?;
        self.taken = true;
        Ok(pending)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.taken {
            self.inner.rings.abandon(self.ticket);
        }
    }
}

/// Rows of one head that follow one another, in memory and in the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowRun {
    /// Position of the first row's token.
    pub token: usize,
    /// How many rows.
    pub rows: usize,
    /// Whether they lie in the device's slab; else in the session's extents.
    pub in_slab: bool,
}

/// What an answer is made of: for each member and KV head, the rows to attend to.
#[derive(Debug, Clone)]
pub struct Answer {
    completion: Completion,
    kv_heads: usize,
    heads: Vec<HeadEntry>,
    runs: Vec<BlockRun>,
    partial_layout: PartialLayout,
    partials: Vec<u32>,
    rest_layout: RestLayout,
    rests: Vec<u32>,
}

/// What an answer's method knows of the rows that it left out for one member of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RestOf<'a> {
    entries: &'a [RestEntry],
    /// f16.
    means: &'a [u8],
    layout: RestLayout,
}

impl<'a> RestOf<'a> {
    /// Of each query head: what bounds are made of, and with what weight its mean is to be merged.
    pub fn sums(&self) -> impl Iterator<Item = RestSums> + 'a {
        self.entries.iter().map(|entry| RestSums {
            max: entry.max,
            weight: entry.weight,
            upper: entry.upper,
            lower: entry.lower,
            scatter: entry.scatter,
            spread: entry.spread,
            rows: entry.rows,
        })
    }

    /// The estimated mean value of what a query head left out, `[values of a row]`.
    ///
    /// # Panics
    /// If there is no such head, or `mean` has another length.
    pub fn mean(&self, query_head: usize, mean: &mut [f32]) {
        let stride = 4 * self.layout.mean_words();
        let bytes = &self.means[query_head * stride..][..2 * self.layout.values];
        Kernels::best().to_f32(Dtype::F16, bytes, mean);
    }
}

/// What the daemon's CPU has attended for one member of a batch: the softmax over those rows alone. To be merged with the
/// attention over the answer's runs, in which they are not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Partial<'a> {
    /// Weighted values, `[query heads][values of a row]`.
    pub out: &'a [f32],
    /// Logarithm of the sum of the exponentials of the scaled scores, per query head; `−∞` where no row was attended.
    pub lse: &'a [f32],
    /// Rows, all KV heads together.
    pub rows: u32,
}

impl Answer {
    /// Copies the block table of an answer out, and checks that its runs lie in the session's memory.
    pub(crate) fn of(inner: &Inner, completion: Completion, of: &Maps) -> Result<Self, Error> {
        if completion.status != Status::Ready {
            return Err(Error::NotReady { layer: completion.layer, status: completion.status });
        }
        let kv_heads = inner.geometry.kv_heads;
        let partial_layout =
            PartialLayout { query_heads: inner.geometry.query_heads, values: inner.geometry.values() };
        let rest_layout =
            RestLayout { query_heads: partial_layout.query_heads, values: partial_layout.values };
        let behind = Behind { partial: partial_layout, rest: rest_layout };
        let Table { heads, runs, partials, rests } = of.table(&completion, kv_heads, behind)?;
        for run in &runs {
            inner
                .memory
                .address(run.row, run.rows(), run.in_slab(), of.slab.as_deref())
                .map_err(|error| Error::Broken(format!("a run of an answer lies nowhere: {error}")))?;
        }
        Ok(Self { completion, kv_heads, heads, runs, partial_layout, partials, rest_layout, rests })
    }

    /// What the daemon said of it: rows, hits, bytes, times.
    #[must_use]
    pub fn completion(&self) -> &Completion {
        &self.completion
    }

    /// Members of the batch.
    #[must_use]
    pub fn members(&self) -> usize {
        self.completion.batch as usize
    }

    fn entry(&self, member: usize, kv_head: usize) -> &HeadEntry {
        &self.heads[member * self.kv_heads + kv_head]
    }

    fn blocks(&self, member: usize, kv_head: usize) -> &[BlockRun] {
        let entry = self.entry(member, kv_head);
        &self.runs[entry.first_run as usize..(entry.first_run + entry.runs) as usize]
    }

    /// Rows of one member's head.
    #[must_use]
    pub fn rows(&self, member: usize, kv_head: usize) -> usize {
        self.entry(member, kv_head).rows as usize
    }

    /// Rows that the head keeps on the device in this layer, selected or not.
    #[must_use]
    pub fn resident(&self, member: usize, kv_head: usize) -> usize {
        self.entry(member, kv_head).resident as usize
    }

    /// What the daemon's CPU attended for a member, if anything. Those rows are not in its runs.
    #[must_use]
    pub fn partial(&self, member: usize) -> Option<Partial<'_>> {
        let words = self.partials.chunks_exact(self.partial_layout.words()).nth(member)?;
        let (rows, rest) = words.split_first().filter(|(rows, _)| **rows > 0)?;
        let (lse, out) = rest.split_at(self.partial_layout.query_heads);
        Some(Partial { out: bytemuck::cast_slice(out), lse: bytemuck::cast_slice(lse), rows: *rows })
    }

    /// What the daemon knows of the rows that were left out for a member, if its method estimates them.
    #[must_use]
    pub fn rest(&self, member: usize) -> Option<RestOf<'_>> {
        let words = self.rests.chunks_exact(self.rest_layout.words()).nth(member)?;
        let (entries, means) = words.split_at(self.rest_layout.query_heads * size_of::<RestEntry>() / 4);
        let (entries, means) = (bytemuck::cast_slice(entries), bytemuck::cast_slice(means));
        Some(RestOf { entries, means, layout: self.rest_layout })
    }

    /// Which tokens they are, in rising order.
    pub fn tokens(&self, member: usize, kv_head: usize) -> impl Iterator<Item = RowRun> + '_ {
        self.blocks(member, kv_head).iter().map(|run| RowRun {
            token: run.token as usize,
            rows: run.rows() as usize,
            in_slab: run.in_slab(),
        })
    }
}

/// Lets go of an answer when it is dropped.
#[derive(Debug)]
struct Release {
    inner: Arc<Inner>,
    ticket: u64,
}

impl Drop for Release {
    fn drop(&mut self) {
        self.inner.rings.release(self.ticket);
    }
}

/// An answer that has come, with its rows. Dropping it releases its slots.
#[derive(Debug)]
pub struct Ready {
    answer: Answer,
    release: Release,
    /// Of the daemon that gave the answer, whichever serves the session now.
    slab: Option<Arc<SharedMapping>>,
}

impl Deref for Ready {
    type Target = Answer;

    fn deref(&self) -> &Answer {
        &self.answer
    }
}

impl Ready {
    /// Adds the runs of rows of one member's head, in token order, for an attention kernel. They are readable for
    /// as long as this answer lives.
    ///
    /// # Errors
    /// [`Error::OnDevice`] if any of them lie in a device's memory.
    pub fn runs(&self, member: usize, kv_head: usize, runs: &mut Vec<Run>) -> Result<(), Error> {
        if self.release.inner.memory.device().is_some()
            && self.blocks(member, kv_head).iter().any(BlockRun::in_slab)
        {
            return Err(Error::OnDevice { device: self.release.inner.device.clone() });
        }
        runs.extend(self.blocks(member, kv_head).iter().filter_map(|run| {
            let memory = &self.release.inner.memory;
            let address = memory.address(run.row, run.rows(), run.in_slab(), self.slab.as_deref()).ok()?;
            Some(Run { rows_ptr: address, rows: run.rows() as usize })
        }));
        Ok(())
    }

    /// The same as addresses and row counts for a kernel on the session's device: rows in the slab there, and rows in
    /// extents that the device reads over its link.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if the daemon's device is no GPU.
    pub fn device_runs(
        &self,
        member: usize,
        kv_head: usize,
        runs: &mut Vec<(u64, u32)>,
    ) -> Result<(), Error> {
        for run in self.blocks(member, kv_head) {
            runs.push((
                self.release.inner.memory.device_address(run.row, run.rows(), run.in_slab())?,
                run.rows(),
            ));
        }
        Ok(())
    }
}

impl Ready {
    /// Copies one member's rows of a head out, in token order and in the storage type: `[rows][2 · head dim]`, K
    /// then V. For whoever would rather not take addresses.
    ///
    /// # Errors
    /// A run outside the session's memory.
    pub fn copy_rows(&self, member: usize, kv_head: usize, rows: &mut Vec<u8>) -> Result<(), Error> {
        let row_bytes = self.release.inner.geometry.row_bytes();
        for run in self.blocks(member, kv_head) {
            let at = rows.len();
            rows.resize(at + run.rows() as usize * row_bytes, 0);
            let slab = self.slab.as_deref();
            self.release.inner.memory.read_run(run.row, run.in_slab(), slab, &mut rows[at..])?;
        }
        Ok(())
    }
}
