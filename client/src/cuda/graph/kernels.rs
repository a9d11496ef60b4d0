//! The kernels of graph mode, loaded.

use bytemuck::Pod;
use kvoyant_cuda::{CudaError, Function, KernelCache, Stream};
use kvoyant_kernels::cuda::{Launch, source};

use crate::cuda::DeviceSession;
use crate::error::Error;

/// Compiled and loaded once for a session's device; clones share them.
#[derive(Debug, Clone)]
pub struct GraphKernels {
    pub(super) resolve: Function,
    pub(super) report: Function,
    pub(super) merge: Function,
}

impl GraphKernels {
    /// Loads them, from the cache or compiled by NVRTC.
    ///
    /// # Errors
    /// [`Error::Kernel`] without NVRTC and without a cached image.
    pub fn load(session: &DeviceSession, cache: &KernelCache) -> Result<Self, Error> {
        let module = |name: &str| {
            let source = source(name).ok_or_else(|| Error::Broken(format!("there is no source {name}")))?;
            Ok::<_, Error>(cache.module(session.context(), source)?)
        };
        let (residency, merge) = (module("residency")?, module("merge")?);
        Ok(Self {
            resolve: residency.function("resolve_attend")?,
            report: residency.function("report")?,
            merge: merge.function("lse_merge")?,
        })
    }
}

/// Enqueues a kernel of the project's.
///
/// # Safety
/// As [`Stream::launch`].
pub(super) unsafe fn enqueue<P: Pod>(
    stream: &Stream,
    function: &Function,
    launch: Launch,
    params: &P,
) -> Result<(), CudaError> {
    // SAFETY: the caller's contract.
    unsafe { stream.launch(function, launch.grid, launch.block, launch.shared_bytes, params) }
}
