//! Graph mode: attention that is captured once and replayed for every token.
//!
//! An engine that replays CUDA graphs cannot ask anybody between two layers. So it selects rows on its device, and
//! [`GraphSequence::attend`] enqueues kernels that look each of them up in the session's residency records, read what lies
//! in the slab there and the rest over the link from the session's extents, merge that with the engine's own sinks and
//! window, and report what was selected. The daemon brings what was missed into the slab before the next token. Its absence
//! costs speed: what it has not brought is read over the link.
//!
//! ```text
//! once             Model::graph, capture { every layer: …; attend(layer); … }
//! for each token   write rows, append, set_position, replay
//! now and then     reserve: it brings new pages to the captured kernels' page table
//! ```
//!
//! All addresses that a graph holds stay as long as the [`GraphSequence`] does; what changes lies in device memory.

mod kernels;
mod memory;
mod pages;
mod position;

use std::sync::Arc;

use kvoyant_cuda::{DeviceBuffer, Event, EventKind, Stream};
use kvoyant_kernels::cuda::launch::{splits, tile_rows};
use kvoyant_kernels::cuda::params::{MergeParams, ReportParams, ResolveParams};
use kvoyant_protocol::control::{ToClient, ToDaemon};
use kvoyant_protocol::graph::sequence_word;

pub use kernels::GraphKernels;
pub(super) use memory::GraphMemory;

use self::kernels::enqueue;
use self::pages::PageTable;
use self::position::Positions;
use super::session::{DeviceSession, EXTENTS_MAX};
use crate::error::Error;
use crate::model::{Inner, Model};
use crate::sequence::Sequence;

/// How a sequence is served in graph mode.
#[derive(Debug, Clone, Copy)]
pub struct GraphOptions {
    /// Its slot of the records, below the registered number of sequences.
    pub slot: u32,
    /// Most tokens that it will ever have: captured kernels know its page table by one address.
    pub tokens: usize,
    /// Blocks that share a KV head's rows; 0: as many as keep the device busy.
    pub splits: u32,
    /// What scores are multiplied by; usually `1 / sqrt(head dim)`.
    pub scale: f32,
}

/// Rows of the engine's own, on the device: those of one layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OwnRows {
    /// Address of the first row of KV head 0.
    pub address: u64,
    /// Bytes from KV head to KV head.
    pub stride: u64,
}

/// What attention of one layer reads and writes: addresses on the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GraphBuffers {
    /// f32 `[query heads][head dim]`.
    pub queries: u64,
    /// u32 `[KV heads][rows]`, with the registered number of rows: tokens that were selected, each once, in any order. Tokens
    /// among sinks and window are passed over.
    pub ids: u64,
    /// u32 `[KV heads]`: how many of each.
    pub counts: u64,
    /// Gets f32 `[query heads][head dim]`.
    pub out: u64,
    /// Gets f32 `[query heads]`: `ln Σ exp` of the scores.
    pub lse: u64,
    /// Rows of the first tokens: as many as the model has sinks.
    pub sinks: OwnRows,
    /// Rows of the last tokens, the current one with them: a ring, token `t` at row `t % window_rows`.
    pub window: OwnRows,
    /// Rows of the ring, at least as many as the model's window.
    pub window_rows: u32,
}

/// Where things lie in a graph sequence's own device memory.
#[derive(Debug, Clone, Copy)]
struct Places {
    position: u64,
    expected: u64,
    misses: u64,
    failed: u64,
    parts: u64,
    parts_lse: u64,
    pages: u64,
}

/// A sequence that is served in graph mode. Dropping it waits for the device, and closes the sequence.
#[derive(Debug)]
pub struct GraphSequence {
    inner: Arc<Inner>,
    device: Arc<DeviceSession>,
    sequence: Sequence,
    kernels: GraphKernels,
    options: GraphOptions,
    places: Places,
    tile_rows: u32,
    pages: PageTable,
    positions: Positions,
    _memory: DeviceBuffer,
}

impl Model {
    /// Serves a sequence in graph mode from now on. It is closed if that fails.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if the daemon's device is no GPU or the model was registered without graph mode; [`Error::Failed`]
    /// if the slot is taken; [`Error::Size`] if the head dimension is larger than the kernels', or the sequence has more
    /// tokens than it is ever to have; [`Error::Cuda`] without device memory.
    pub fn graph(
        &self,
        sequence: Sequence,
        kernels: &GraphKernels,
        options: GraphOptions,
    ) -> Result<GraphSequence, Error> {
        let inner = Arc::clone(self.inner());
        let device = inner.memory.device().cloned().ok_or_else(|| no_graph(&inner))?;
        let memory = device.graph.as_ref().ok_or_else(|| no_graph(&inner))?;
        let (geometry, layout) = (inner.geometry, memory.layout);
        let (group, head_dim) = (geometry.query_heads / geometry.kv_heads, geometry.head_dim as u32);
        let tile_rows = tile_rows(geometry.dtype(), head_dim, group as u32).ok_or(Error::Size {
            what: "a head's dimension on a GPU",
            found: geometry.head_dim,
            wanted: kvoyant_kernels::cuda::launch::HEAD_DIM_MAX as usize,
        })?;
        if sequence.room() > options.tokens {
            let (found, wanted) = (sequence.room(), options.tokens);
            return Err(Error::Size { what: "room of a sequence in graph mode", found, wanted });
        }
        let mut options = options;
        if options.splits == 0 {
            let multiprocessors = device.context().info().abilities.multiprocessors;
            options.splits = splits(geometry.kv_heads as u32, layout.spec.rows, multiprocessors);
        }
        let heads = geometry.layers * geometry.kv_heads;
        let capacity = options.tokens.div_ceil(geometry.pages.page_rows).max(1);
        let mut bytes = 0u64;
        let mut place = |size: usize| {
            let at = bytes;
            bytes += (size as u64).next_multiple_of(256);
            at
        };
        let parts = if options.splits > 1 { options.splits as usize * geometry.query_heads * 4 } else { 0 };
        let offsets = Places {
            position: place(16),
            expected: place(geometry.layers * 8),
            misses: place(heads * 4),
            failed: place(4),
            parts: place(parts * geometry.head_dim),
            parts_lse: place(parts),
            pages: place(heads * capacity * 4),
        };
        let own = device.context().alloc(bytes as usize)?;
        let at = |offset: u64| own.ptr() + offset;
        let places = Places {
            position: at(offsets.position),
            expected: at(offsets.expected),
            misses: at(offsets.misses),
            failed: at(offsets.failed),
            parts: at(offsets.parts),
            parts_lse: at(offsets.parts_lse),
            pages: at(offsets.pages),
        };
        let stream = device.context().stream(kvoyant_cuda::Priority::Normal)?;
        // SAFETY: the whole of an allocation that nobody else knows of yet.
        unsafe { stream.fill(own.ptr(), 0, own.len()) }?;
        // Until its first report, nothing of a sequence is in the slab: `NO_VERSION` has all bits set.
        // SAFETY: within the allocation, as placed above.
        unsafe { stream.fill(places.expected, 0xff, geometry.layers * 8) }?;
        let pages = PageTable::new(device.context(), places.pages, heads, capacity)?;
        pages.refresh(&sequence, &stream)?;
        let positions = Positions::new(device.context(), places.position)?;
        stream.synchronize()?;
        let message = ToDaemon::Graph { sequence: sequence.id(), slot: options.slot };
        match inner.control.request(&message, &inner.memory)? {
            ToClient::Done => {}
            other => return Err(Error::Broken(format!("{other:?} came instead of graph mode"))),
        }
        let kernels = kernels.clone();
        Ok(GraphSequence {
            inner: Arc::clone(&inner),
            device: Arc::clone(&device),
            sequence,
            kernels,
            options,
            places,
            tile_rows,
            pages,
            positions,
            _memory: own,
        })
    }
}

fn no_graph(inner: &Inner) -> Error {
    Error::NoDevice(format!("the model was registered without graph mode, or {} is no GPU", inner.device))
}

impl GraphSequence {
    /// The sequence: to write rows, to be appended to. Room is had, and rows are dropped, by the methods here.
    #[must_use]
    pub fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// Gives it room for so many tokens, and tells captured kernels where, in stream order.
    ///
    /// # Errors
    /// [`Error::Size`] beyond [`GraphOptions::tokens`]; else as [`Model::reserve`].
    pub fn reserve(&self, tokens: usize, stream: &Stream) -> Result<(), Error> {
        if tokens > self.options.tokens {
            let (found, wanted) = (tokens, self.options.tokens);
            return Err(Error::Size { what: "room of a sequence in graph mode", found, wanted });
        }
        Model::new(Arc::clone(&self.inner)).reserve(&[(&self.sequence, tokens)])?;
        self.pages.refresh(&self.sequence, stream)
    }

    /// Drops every row from this token on. It waits for the stream first.
    ///
    /// # Errors
    /// As [`Sequence::truncate`].
    pub fn truncate(&self, tokens: usize, stream: &Stream) -> Result<(), Error> {
        stream.synchronize()?;
        self.sequence.truncate(tokens)?;
        // Records still name rows that are no more, so none of them holds until the next report.
        let bytes = self.inner.geometry.layers * 8;
        // SAFETY: within this sequence's own memory; `NO_VERSION` has all bits set.
        unsafe { stream.fill(self.places.expected, 0xff, bytes) }?;
        self.pages.refresh(&self.sequence, stream)
    }

    /// Says, in stream order, how many tokens there are with the one that is computed next. Not to be captured: it comes
    /// before each replay.
    ///
    /// # Errors
    /// What the driver says.
    pub fn set_position(&self, tokens: usize, stream: &Stream) -> Result<(), Error> {
        let spec = &self.inner.spec;
        let tokens = crate::model::narrow("tokens", tokens)?;
        self.positions.set(spec.sinks, tokens.saturating_sub(spec.window).max(spec.sinks), tokens, stream)
    }

    /// Enqueues attention of one layer over what was selected and the engine's own rows, and the report of it. To be
    /// captured, or not.
    ///
    /// # Errors
    /// [`Error::Size`] for a layer that rows are not selected in; else what the driver says.
    ///
    /// # Safety
    /// The buffers are of the shapes that [`GraphBuffers`] says, on the device of the stream's context, which is that of
    /// [`Model::device_session`], and stay as long as what is enqueued here may run or be replayed; so does `self`. All work of
    /// a session's graph sequences runs one after the other. Before a layer is attended, the rows of all tokens that `ids` may
    /// name have been written.
    pub unsafe fn attend(&self, layer: usize, buffers: &GraphBuffers, stream: &Stream) -> Result<(), Error> {
        let (spec, geometry) = (&self.inner.spec, &self.inner.geometry);
        let index = u32::try_from(layer).unwrap_or(u32::MAX);
        if !(spec.dense_layers..spec.layers).contains(&index) || spec.sliding_layers.contains(&index) {
            let what = "a layer in which rows are selected";
            return Err(Error::Size { what, found: layer, wanted: geometry.layers });
        }
        let graph = self.device.graph.as_ref().ok_or_else(|| no_graph(&self.inner))?;
        let (layout, places) = (graph.layout, self.places);
        let (kv_heads, query_heads) = (geometry.kv_heads as u32, geometry.query_heads as u32);
        let split = self.options.splits > 1;
        let misses = places.misses + (layer * geometry.kv_heads * 4) as u64;
        let expected = places.expected + (layer * 8) as u64;
        let table = layer * geometry.kv_heads * self.pages.capacity() * 4;
        let resolve = ResolveParams {
            queries: buffers.queries,
            out: if split { places.parts } else { buffers.out },
            lse: if split { places.parts_lse } else { buffers.lse },
            ids: buffers.ids,
            counts: buffers.counts,
            misses,
            position: places.position,
            residency: graph.records(self.options.slot, index),
            expected,
            slab: self.device.slab_address(),
            pages: places.pages + table as u64,
            extents: self.device.extent_addresses(),
            sinks: buffers.sinks.address,
            window: buffers.window.address,
            failed: places.failed,
            residency_stride: layout.record_bytes(),
            sinks_stride: buffers.sinks.stride,
            window_stride: buffers.window.stride,
            dtype: u32::from(geometry.dtype().code()),
            d: geometry.head_dim as u32,
            group: query_heads / kv_heads,
            kv_heads,
            row_bytes: geometry.row_bytes() as u32,
            ids_stride: layout.spec.rows,
            residency_capacity: layout.spec.rows,
            slab_rows: self.device.slab_rows(geometry.row_bytes()),
            page_capacity: self.pages.capacity() as u32,
            page_rows: geometry.pages.page_rows as u32,
            pages_per_extent: geometry.pages.pages_per_extent() as u32,
            extent_count: EXTENTS_MAX as u32,
            window_rows: buffers.window_rows,
            tile_rows: self.tile_rows,
            splits: self.options.splits,
            scale: self.options.scale,
        };
        // SAFETY: the caller vouches for the buffers; all else is this session's and this sequence's memory, of the shapes that
        // the parameters say.
        unsafe { enqueue(stream, &self.kernels.resolve, resolve.launch(), &resolve) }?;
        if split {
            let merge = MergeParams {
                out: buffers.out,
                lse: buffers.lse,
                parts_out: places.parts,
                parts_lse: places.parts_lse,
                parts: self.options.splits,
                heads: query_heads,
                d: geometry.head_dim as u32,
                ..MergeParams::default()
            };
            // SAFETY: as above.
            unsafe { enqueue(stream, &self.kernels.merge, merge.launch(), &merge) }?;
        }
        let report = ReportParams {
            ids: buffers.ids,
            counts: buffers.counts,
            misses,
            position: places.position,
            counter: graph.counter(),
            mailbox: graph.mailbox(),
            sequence: sequence_word(self.sequence.id()),
            slots: layout.spec.reports,
            slot_bytes: layout.report_stride() as u32,
            layer: index,
            heads: kv_heads,
            capacity: layout.spec.rows,
            pad: 0,
        };
        // SAFETY: as above; the mailbox is the session's, and registered.
        unsafe { enqueue(stream, &self.kernels.report, report.launch(), &report) }?;
        // The next attention of this layer uses what answers this report.
        // SAFETY: a word of the session's and one of this sequence's memory.
        Ok(unsafe { stream.copy_d2d(expected, graph.counter(), 8) }?)
    }

    /// Whether a row was ever left out, because no page of this process holds it: then attention was over less than what was
    /// selected. Waits for the stream.
    ///
    /// # Errors
    /// What the driver says.
    pub fn failed(&self, stream: &Stream) -> Result<bool, Error> {
        let word = self.device.context().pinned(4)?;
        // SAFETY: a word of this sequence's memory into a pinned one, which lives until the stream is done.
        unsafe { stream.copy_d2h(word.as_ptr(), self.places.failed, 4) }?;
        stream.synchronize()?;
        // SAFETY: an aligned word of our own, written above.
        Ok(unsafe { word.as_ptr().cast::<u32>().read() } != 0)
    }
}

impl Drop for GraphSequence {
    fn drop(&mut self) {
        // Kernels may still read this memory, and the slots that closing gives to others.
        if let Err(error) = self.device.context().synchronize() {
            tracing::warn!("the device did not come to rest before a sequence was closed: {error}");
        }
    }
}

/// An event that says when pinned memory may be written again.
fn local_event(context: &kvoyant_cuda::Context) -> Result<Event, Error> {
    Ok(context.event(EventKind::Local)?)
}
