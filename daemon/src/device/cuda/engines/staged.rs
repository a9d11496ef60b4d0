//! The CPU gathers, the copy engine moves the whole.

use kvoyant_cuda::{Context, CudaError, HostToDevice, Stream};
use kvoyant_kernels::{CopyRun, Kernels};

use super::batch::Piece;
use super::ring::PinnedRing;
use super::{Batch, EngineError, EngineKind, TransferEngine};

/// A request is cut into this many parts, so that the first is moved while the second is gathered,
const PARTS: u64 = 4;

/// but not into shorter ones than this: a copy of 256 KiB hides its own launch on any link.
const PART_BYTES_MIN: usize = 256 << 10;

/// Gathers runs in the order of their destinations into one of two pinned buffers and makes one copy per range of adjacent
/// destinations, gathering into one buffer while the other is moved. Sources need not be registered: only the CPU reads
/// them.
#[derive(Debug)]
pub struct Staged {
    buffers: PinnedRing,
    buffer_bytes: usize,
    kernels: Kernels,
    gathers: Vec<CopyRun>,
    copies: Vec<HostToDevice>,
}

// SAFETY: the addresses are those of one call of `enqueue`, which leaves none behind.
unsafe impl Send for Staged {}

impl Staged {
    /// Bytes of each of the two buffers: they stay in a core's second-level cache between gather and copy.
    pub const BUFFER_BYTES: usize = 1 << 20;

    /// An engine with two buffers of `buffer_bytes` (at least one byte) each.
    ///
    /// # Errors
    /// If they cannot be had.
    pub fn new(context: &Context, buffer_bytes: usize) -> Result<Self, CudaError> {
        Ok(Self {
            buffers: PinnedRing::new(context, 2, buffer_bytes)?,
            buffer_bytes,
            kernels: Kernels::best(),
            gathers: Vec::new(),
            copies: Vec::new(),
        })
    }

    /// Bytes of each part of a request.
    fn part_bytes(&self, request: u64) -> usize {
        let part = usize::try_from(request.div_ceil(PARTS)).unwrap_or(usize::MAX);
        part.max(PART_BYTES_MIN).min(self.buffer_bytes)
    }

    /// Plans one gather and its part of a copy. Addresses in the buffer are offsets until [`Staged::flush`] knows which one
    /// it is.
    fn plan(&mut self, piece: &Piece, from: usize, filled: usize, bytes: usize) {
        let offset = std::ptr::without_provenance_mut(filled);
        self.gathers.push(CopyRun { src: piece.src.wrapping_add(from), dst: offset, bytes });
        let dst = piece.dst + from as u64;
        match self.copies.last_mut() {
            Some(last) if last.dst + last.bytes as u64 == dst => last.bytes += bytes,
            _ => self.copies.push(HostToDevice { dst, src: offset, bytes }),
        }
    }

    fn flush(&mut self, stream: &Stream) -> Result<(), CudaError> {
        let buffer = self.buffers.claim()?.as_ptr();
        for gather in &mut self.gathers {
            gather.dst = buffer.wrapping_add(gather.dst.addr());
        }
        for copy in &mut self.copies {
            copy.src = buffer.wrapping_add(copy.src.addr());
        }
        // SAFETY: whoever made the batch promised that its sources are readable. The destinations lie one behind the other in
        // a buffer that is as long as all of them and, being claimed, is used by nobody else. Clients may write to a source
        // meanwhile and get torn rows in their own slab.
        unsafe { self.kernels.copy_runs(&self.gathers) };
        self.gathers.clear();
        // SAFETY: the destinations are valid until this has run, as whoever made the batch promised; the buffer is not
        // written before the mark of `pass_on` is passed.
        let queued = unsafe { stream.copy_batch_h2d(&self.copies) };
        self.copies.clear();
        // Also behind a failure, which may have queued a part.
        let passed_on = self.buffers.pass_on(stream);
        queued.and(passed_on)
    }
}

impl TransferEngine for Staged {
    fn kind(&self) -> EngineKind {
        EngineKind::Staged
    }

    fn enqueue(&mut self, batch: &Batch<'_>, stream: &Stream) -> Result<(), EngineError> {
        // A failure may have left some.
        self.gathers.clear();
        self.copies.clear();
        let part = self.part_bytes(batch.shape().bytes);
        let mut filled = 0;
        for piece in batch.pieces {
            let mut from = 0;
            while from < piece.bytes {
                let bytes = (piece.bytes - from).min(part - filled);
                self.plan(piece, from, filled, bytes);
                from += bytes;
                filled += bytes;
                if filled == part {
                    self.flush(stream)?;
                    filled = 0;
                }
            }
        }
        if filled > 0 {
            self.flush(stream)?;
        }
        Ok(())
    }
}
