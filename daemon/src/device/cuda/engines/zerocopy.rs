//! A kernel reads mapped host memory.

use kvoyant_cuda::{Context, CudaError, Function, Module, Stream};
use kvoyant_kernels::cuda::Launch;
use kvoyant_kernels::cuda::params::{GatherParams, GatherRun};

use super::ring::PinnedRing;
use super::{Batch, EngineError, EngineKind, TransferEngine};

/// The kernel.
const ENTRY: &str = "gather_runs";

/// Runs of one launch.
const RUNS: usize = 4096;

/// Lists that may wait for the device.
const LISTS: usize = 4;

/// Reads the sources from the device. Costs no core and no descriptor, and reads short runs at nearly the speed of the link;
/// but a kernel needs multiprocessors, and time slices where other processes' kernels run without MPS.
#[derive(Debug)]
pub struct Zerocopy {
    gather: Function,
    lists: PinnedRing,
}

impl Zerocopy {
    /// An engine with the kernel of the source `gather`.
    ///
    /// # Errors
    /// If the module has no such kernel, or the memory for run lists cannot be had.
    pub fn new(context: &Context, module: &Module) -> Result<Self, CudaError> {
        Ok(Self {
            gather: module.function(ENTRY)?,
            lists: PinnedRing::new(context, LISTS, RUNS * size_of::<GatherRun>())?,
        })
    }
}

impl TransferEngine for Zerocopy {
    fn kind(&self) -> EngineKind {
        EngineKind::Zerocopy
    }

    fn enqueue(&mut self, batch: &Batch<'_>, stream: &Stream) -> Result<(), EngineError> {
        if let Some(piece) = batch.pieces.iter().find(|piece| piece.mapped.is_none()) {
            let (address, bytes) = (piece.src.addr(), piece.bytes);
            return Err(EngineError::Unregistered { engine: self.kind(), address, bytes });
        }
        for pieces in batch.pieces.chunks(RUNS) {
            let list = self.lists.claim()?;
            let entries: *mut GatherRun = list.as_ptr().cast();
            for (at, piece) in pieces.iter().enumerate() {
                let src = piece.mapped.unwrap_or_default();
                let run = GatherRun { src, dst: piece.dst, bytes: piece.bytes as u64 };
                // SAFETY: a list has room for `RUNS` entries and a chunk has no more; pinned memory begins on a page. Being
                // claimed, the list is read by nobody.
                unsafe { entries.add(at).write(run) };
            }
            let count = pieces.len() as u32;
            let params = GatherParams { runs: list.device_ptr(), count, pad: 0 };
            let longest = pieces.iter().map(|piece| piece.bytes as u64).max().unwrap_or(0);
            let Launch { grid, block, shared_bytes } = params.launch(longest);
            // SAFETY: this is the kernel's parameter. Its list is not written before the mark of `pass_on` is passed; whoever
            // made the batch promised that sources, at their registered device addresses, and destinations are valid until
            // this has run.
            let queued = unsafe { stream.launch(&self.gather, grid, block, shared_bytes, &params) };
            // Also behind a failure, for the order of lists.
            let passed_on = self.lists.pass_on(stream);
            queued.and(passed_on)?;
        }
        Ok(())
    }
}
