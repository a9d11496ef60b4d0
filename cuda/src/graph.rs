//! Capture and replay: what was queued on a stream, recorded once and launched as a whole.

use std::ffi::c_uint;
use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys;

use crate::calls::{Handle, cu};
use crate::context::Context;
use crate::error::{CudaError, released};
use crate::stream::Stream;

/// What a capture recorded.
pub struct Graph {
    context: Context,
    raw: Handle<sys::CUgraph_st>,
}

/// A graph made ready to run.
#[derive(Clone)]
pub struct ExecGraph(Arc<ExecInner>);

struct ExecInner {
    context: Context,
    raw: Handle<sys::CUgraphExec_st>,
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("raw", &self.raw.0).finish_non_exhaustive()
    }
}

impl fmt::Debug for ExecGraph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecGraph").field("raw", &self.0.raw.0).finish_non_exhaustive()
    }
}

impl Stream {
    /// Begins to record instead of to run. Other threads may go on using the device as they like; this thread must
    /// end the capture, and until then call nothing that a graph cannot hold (allocation, synchronisation).
    pub fn begin_capture(&self) -> Result<(), CudaError> {
        let _gate = self.gate();
        let (calls, _entered) = self.enter()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as c_uint;
        // SAFETY: the stream lives as long as `self`.
        unsafe { cu!(calls, cuStreamBeginCapture_v2(self.handle(), mode)) }
    }

    /// Ends the capture. A capture that was spoilt gives the error that spoilt it, and the stream is usable again.
    pub fn end_capture(&self) -> Result<Graph, CudaError> {
        let (calls, _entered) = self.enter()?;
        let mut raw: sys::CUgraph = std::ptr::null_mut();
        // SAFETY: `raw` is ours to be written.
        let result = unsafe { cu!(calls, cuStreamEndCapture(self.handle(), &raw mut raw)) };
        let graph = (!raw.is_null()).then(|| Graph { context: self.context().clone(), raw: Handle(raw) });
        result?;
        graph.ok_or_else(|| CudaError::new("cuStreamEndCapture", 901))
    }

    /// Records what `work` queues. The capture is ended whatever `work` answers, and also if it panics.
    pub fn capture<E: From<CudaError>>(&self, work: impl FnOnce(&Self) -> Result<(), E>) -> Result<Graph, E> {
        /// Ends the capture when a panic unwinds through it.
        struct Ending<'a>(Option<&'a Stream>);
        impl Drop for Ending<'_> {
            fn drop(&mut self) {
                if let Some(stream) = self.0 {
                    // The panic or the error that came first is what is told; a spoilt capture ends in one too.
                    let ended = stream.end_capture();
                    tracing::debug!(ended = ended.is_ok(), "a capture was given up");
                }
            }
        }

        self.begin_capture()?;
        let mut ending = Ending(Some(self));
        work(self)?;
        ending.0 = None;
        Ok(self.end_capture()?)
    }

    /// Whether a capture is going on (or spoilt, and not ended yet).
    pub fn is_capturing(&self) -> Result<bool, CudaError> {
        let (calls, _entered) = self.enter()?;
        let mut status: c_uint = 0;
        // SAFETY: `status` is ours to be written.
        unsafe { cu!(calls, cuStreamIsCapturing(self.handle(), &raw mut status)) }?;
        Ok(status != sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_NONE as c_uint)
    }
}

impl Graph {
    /// Makes it ready to run, as often as wanted. What it was captured with must live as long as it runs: modules,
    /// buffers, registered memory.
    pub fn instantiate(&self) -> Result<ExecGraph, CudaError> {
        let _entered = self.context.enter()?;
        let mut raw: sys::CUgraphExec = std::ptr::null_mut();
        // SAFETY: `raw` is ours to be written; `ExecInner::drop` destroys it.
        unsafe { cu!(self.context.calls(), cuGraphInstantiateWithFlags(&raw mut raw, self.raw.0, 0)) }?;
        Ok(ExecGraph(Arc::new(ExecInner { context: self.context.clone(), raw: Handle(raw) })))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: captured once and destroyed once; what was instantiated from it lives on by itself.
        let result = self
            .context
            .enter_to_release()
            .and_then(|_entered| unsafe { cu!(self.context.calls(), cuGraphDestroy(self.raw.0)) });
        released(result);
    }
}

impl ExecGraph {
    /// Queues one run of it on `stream`.
    ///
    /// # Safety
    /// What the graph was captured with still lives, and holds until the run is done.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        let (calls, _entered) = stream.enter()?;
        // SAFETY: both handles live; the caller vouches for what the nodes use.
        unsafe { cu!(calls, cuGraphLaunch(self.0.raw.0, stream.handle())) }
    }
}

impl Drop for ExecInner {
    fn drop(&mut self) {
        // SAFETY: instantiated once and destroyed once; the driver finishes a run that is going on.
        let result = self
            .context
            .enter_to_release()
            .and_then(|_entered| unsafe { cu!(self.context.calls(), cuGraphExecDestroy(self.raw.0)) });
        released(result);
    }
}
