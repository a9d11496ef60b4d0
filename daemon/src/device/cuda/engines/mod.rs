//! Three ways to bring scattered host memory onto a GPU, and the choice between them.
//!
//! | engine | how | needs | best for |
//! |---|---|---|---|
//! | [`Dma`] | one descriptor of the copy engine per run | registered sources | long runs, few runs |
//! | [`Staged`] | the CPU gathers into pinned buffers, the copy engine moves these whole | nothing | short runs to adjacent slots, memory not yet registered |
//! | [`Zerocopy`] | a kernel reads mapped host memory | registered sources, the gather kernel | short runs to scattered slots |
//!
//! All three do their work in the order of the stream that they are given, and return when it is queued; [`Staged`] and
//! [`Zerocopy`] may wait for their own buffers, so engines belong to a device's worker thread and never to a lane.

mod batch;
mod dma;
mod ring;
mod staged;
mod zerocopy;

use std::fmt;

use kvoyant_cuda::{Context, CudaError, Module, Stream};
use kvoyant_kernels::CopyRun;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use batch::{Batch, Batcher, DeviceMap, Shape};
pub use dma::Dma;
pub use staged::Staged;
pub use zerocopy::Zerocopy;

use super::cost::{Table, Usable};

/// A transfer engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// One copy of the copy engine per run.
    Dma,
    /// The CPU gathers into a pinned buffer, the copy engine moves it as a whole.
    Staged,
    /// A kernel reads mapped host memory.
    Zerocopy,
}

impl EngineKind {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 3] = [Self::Dma, Self::Staged, Self::Zerocopy];

    /// Its lower-case name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dma => "dma",
            Self::Staged => "staged",
            Self::Zerocopy => "zerocopy",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A transfer that was not, or not wholly, queued. What was queued of it before the error may still run: wait for the stream
/// before its memory is used for anything else.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EngineError {
    /// The driver refused.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The engine reads registered memory only.
    #[error(
        "the engine {engine} cannot read {bytes} bytes at {address:#x}, which are not registered with the driver"
    )]
    Unregistered {
        /// Which engine.
        engine: EngineKind,
        /// Where the run begins.
        address: usize,
        /// How long it is.
        bytes: usize,
    },
    /// There is no such engine on this machine.
    #[error(
        "the engine {0} is not available: it needs the gather kernel, which could not be built or may not be used"
    )]
    Missing(EngineKind),
}

/// A way to bring scattered host memory onto a GPU.
pub trait TransferEngine: Send + fmt::Debug {
    /// Which one it is.
    fn kind(&self) -> EngineKind;

    /// Queues the copies of a batch on a stream of the engine's context. What is queued on the stream later sees them done.
    ///
    /// # Errors
    /// If the driver refuses, or a source is not registered and the engine needs it to be.
    fn enqueue(&mut self, batch: &Batch<'_>, stream: &Stream) -> Result<(), EngineError>;
}

/// All engines of one context, and what they cost.
#[derive(Debug)]
pub struct Engines {
    dma: Dma,
    staged: Staged,
    zerocopy: Option<Zerocopy>,
    costs: Table,
    batcher: Batcher,
}

impl Engines {
    /// Engines of `context`, with the costs that [`store::costs`](super::store::costs) knows. Without the module of
    /// [`kvoyant_kernels::cuda`]'s source `gather` there is no `zerocopy`: none could be built, or none may be used because its
    /// kernels would take time slices from the clients' ones.
    ///
    /// # Errors
    /// If the pinned buffers cannot be had, or the module has no such kernel.
    pub fn new(context: &Context, gather: Option<&Module>, costs: Table) -> Result<Self, CudaError> {
        Ok(Self {
            dma: Dma::default(),
            staged: Staged::new(context, Staged::BUFFER_BYTES)?,
            zerocopy: gather.map(|module| Zerocopy::new(context, module)).transpose()?,
            costs,
            batcher: Batcher::default(),
        })
    }

    /// The costs that choices are made by.
    #[must_use]
    pub fn costs(&self) -> &Table {
        &self.costs
    }

    /// Whether there is such an engine.
    #[must_use]
    pub fn has(&self, engine: EngineKind) -> bool {
        engine != EngineKind::Zerocopy || self.zerocopy.is_some()
    }

    /// Queues the copies on the engine that brings them the soonest, and says which that was. Nothing to copy is `dma`'s.
    ///
    /// # Safety
    /// As for [`Batcher::batch`], until what is queued on `stream` has run. `stream` is of the engines' context.
    ///
    /// # Errors
    /// If the driver refuses.
    pub unsafe fn enqueue(
        &mut self,
        runs: &[CopyRun],
        map: &DeviceMap,
        stream: &Stream,
    ) -> Result<EngineKind, EngineError> {
        let kernel = self.zerocopy.is_some();
        // SAFETY: the caller promises the same.
        let batch = unsafe { self.batcher.batch(runs, map) };
        let shape = batch.shape();
        let kind = self.costs.pick(shape, Usable { registered: shape.registered, kernel });
        let engine = engine(&mut self.dma, &mut self.staged, self.zerocopy.as_mut(), kind)?;
        engine.enqueue(&batch, stream)?;
        Ok(kind)
    }

    /// Queues the copies on one engine, whatever it costs.
    ///
    /// # Safety
    /// As for [`Engines::enqueue`].
    ///
    /// # Errors
    /// If the driver refuses, there is no such engine, or it needs registered sources and one is not.
    pub unsafe fn enqueue_on(
        &mut self,
        kind: EngineKind,
        runs: &[CopyRun],
        map: &DeviceMap,
        stream: &Stream,
    ) -> Result<(), EngineError> {
        // SAFETY: the caller promises the same.
        let batch = unsafe { self.batcher.batch(runs, map) };
        engine(&mut self.dma, &mut self.staged, self.zerocopy.as_mut(), kind)?.enqueue(&batch, stream)
    }
}

fn engine<'a>(
    dma: &'a mut Dma,
    staged: &'a mut Staged,
    zerocopy: Option<&'a mut Zerocopy>,
    kind: EngineKind,
) -> Result<&'a mut dyn TransferEngine, EngineError> {
    Ok(match kind {
        EngineKind::Dma => dma,
        EngineKind::Staged => staged,
        EngineKind::Zerocopy => zerocopy.ok_or(EngineError::Missing(kind))?,
    })
}
