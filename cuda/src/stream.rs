//! Streams: copies, launches and callbacks in order, never on the null stream.

use std::ffi::{c_int, c_uint, c_void};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::Pod;
use cudarc::driver::sys;

use crate::calls::{Calls, Handle, cu};
use crate::context::{Context, Entered};
use crate::error::{CudaError, ready, released};
use crate::event::Event;
use crate::module::Function;

/// How urgent a stream's work is to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Priority {
    /// Before other streams: copies that somebody waits for.
    High,
    /// As other streams.
    Normal,
    /// When nothing else is to be done: prefetch, eviction.
    Low,
}

/// A queue of work that the device does in order.
#[derive(Clone)]
pub struct Stream(Arc<Inner>);

struct Inner {
    context: Context,
    raw: Handle<sys::CUstream_st>,
    /// A borrowed stream is somebody else's to destroy.
    owned: bool,
    /// Held while a capture begins and while a host function is queued: one must not slip into the other.
    gate: Mutex<()>,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("raw", &self.0.raw.0)
            .field("owned", &self.0.owned)
            .field("context", &self.0.context)
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: made by `Context::stream` and destroyed once; the driver finishes what is queued first.
            let result = self
                .context
                .enter_to_release()
                .and_then(|_entered| unsafe { cu!(self.context.calls(), cuStreamDestroy_v2(self.raw.0)) });
            released(result);
        }
    }
}

/// Handles that mean the null stream or a thread's default stream: both synchronise with strangers.
const DEFAULT_STREAMS: [usize; 3] = [0, 1, 2];

const CU_STREAM_NON_BLOCKING: c_uint = 1;

impl Context {
    /// A new stream that does not synchronise with the null stream.
    pub fn stream(&self, priority: Priority) -> Result<Stream, CudaError> {
        let _entered = self.enter()?;
        let (mut least, mut greatest): (c_int, c_int) = (0, 0);
        // SAFETY: both are ours to be written.
        unsafe { cu!(self.calls(), cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest)) }?;
        // Lower numbers are more urgent, and 0 is what a stream has by default.
        let number = match priority {
            Priority::High => greatest,
            Priority::Normal => 0_i32.clamp(greatest.min(least), least.max(greatest)),
            Priority::Low => least,
        };
        let mut raw: sys::CUstream = std::ptr::null_mut();
        // SAFETY: `raw` is ours to be written; `Inner::drop` destroys it.
        unsafe {
            cu!(self.calls(), cuStreamCreateWithPriority(&raw mut raw, CU_STREAM_NON_BLOCKING, number))
        }?;
        Ok(Stream(Arc::new(Inner {
            context: self.clone(),
            raw: Handle(raw),
            owned: true,
            gate: Mutex::new(()),
        })))
    }
}

impl Stream {
    /// Takes a stream of somebody else's: PyTorch's, candle's. It is not destroyed here.
    ///
    /// The null stream and the default streams are refused, and so is a stream of another context.
    ///
    /// # Safety
    /// `raw` is a `CUstream` (or `cudaStream_t`) that lives longer than every clone of the answer, and nobody begins
    /// a capture on it from another thread while [`Stream::host_func`] runs.
    pub unsafe fn borrow(context: &Context, raw: *mut c_void) -> Result<Self, CudaError> {
        if DEFAULT_STREAMS.contains(&raw.addr()) {
            return Err(CudaError::bad_handle("Stream::borrow"));
        }
        let raw: sys::CUstream = raw.cast();
        let _entered = context.enter()?;
        let mut its: sys::CUcontext = std::ptr::null_mut();
        // SAFETY: the caller vouches for the handle; `its` is ours to be written.
        unsafe { cu!(context.calls(), cuStreamGetCtx(raw, &raw mut its)) }?;
        if its != context.raw() {
            return Err(CudaError::new("Stream::borrow", 201));
        }
        Ok(Self(Arc::new(Inner {
            context: context.clone(),
            raw: Handle(raw),
            owned: false,
            gate: Mutex::new(()),
        })))
    }

    /// The driver's handle.
    pub fn raw(&self) -> *mut c_void {
        self.0.raw.0.cast()
    }

    /// The context that it belongs to.
    pub fn context(&self) -> &Context {
        &self.0.context
    }

    pub(crate) fn handle(&self) -> sys::CUstream {
        self.0.raw.0
    }

    /// What every call needs: the functions, with the context made current.
    pub(crate) fn enter(&self) -> Result<(&'static Calls, Entered<'static>), CudaError> {
        Ok((self.0.context.calls(), self.0.context.enter()?))
    }

    pub(crate) fn gate(&self) -> MutexGuard<'_, ()> {
        // Nothing is guarded but an order, so a panic of the holder leaves nothing half done.
        self.0.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether everything that was queued is done.
    pub fn query(&self) -> Result<bool, CudaError> {
        let (calls, _entered) = self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        ready(unsafe { cu!(calls, cuStreamQuery(self.handle())) })
    }

    /// Waits until everything that was queued is done.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let (calls, _entered) = self.enter()?;
        // SAFETY: as above.
        unsafe { cu!(calls, cuStreamSynchronize(self.handle())) }
    }

    /// What is queued from here on waits for what `event` recorded last.
    pub fn wait_event(&self, event: &Event) -> Result<(), CudaError> {
        let (calls, _entered) = self.enter()?;
        // SAFETY: both handles live as long as their owners; the driver keeps what it needs of the event.
        unsafe { cu!(calls, cuStreamWaitEvent(self.handle(), event.handle(), 0)) }
    }

    /// Queues a copy of `bytes` from the host to the device.
    ///
    /// # Safety
    /// Both ranges are valid, and `src` stays as it is until the copy is done. If `src` is not pinned, the call
    /// itself may block.
    pub unsafe fn copy_h2d(&self, dst: u64, src: *const u8, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        let (calls, _entered) = self.enter()?;
        // SAFETY: the caller vouches for the ranges.
        unsafe { cu!(calls, cuMemcpyHtoDAsync_v2(dst, src.cast(), bytes, self.handle())) }
    }

    /// Queues a copy of `bytes` from the device to the host.
    ///
    /// # Safety
    /// Both ranges are valid, and nobody reads or writes `dst` until the copy is done.
    pub unsafe fn copy_d2h(&self, dst: *mut u8, src: u64, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        let (calls, _entered) = self.enter()?;
        // SAFETY: the caller vouches for the ranges.
        unsafe { cu!(calls, cuMemcpyDtoHAsync_v2(dst.cast(), src, bytes, self.handle())) }
    }

    /// Queues a copy of `bytes` within device memory.
    ///
    /// # Safety
    /// Both ranges are valid until the copy is done and do not overlap.
    pub unsafe fn copy_d2d(&self, dst: u64, src: u64, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        let (calls, _entered) = self.enter()?;
        // SAFETY: the caller vouches for the ranges.
        unsafe { cu!(calls, cuMemcpyDtoDAsync_v2(dst, src, bytes, self.handle())) }
    }

    /// Queues the filling of `bytes` of device memory with one byte.
    ///
    /// # Safety
    /// The range is valid until it is done.
    pub unsafe fn fill(&self, dst: u64, byte: u8, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        let (calls, _entered) = self.enter()?;
        // SAFETY: the caller vouches for the range.
        unsafe { cu!(calls, cuMemsetD8Async(dst, byte, bytes, self.handle())) }
    }

    /// Queues a launch of `function` with its one parameter, a struct by value.
    ///
    /// # Safety
    /// `P` is the kernel's parameter type, every pointer in it is valid until the kernel is done, and grid, block and
    /// `shared_bytes` are what the kernel was written for.
    pub unsafe fn launch<P: Pod>(
        &self,
        function: &Function,
        grid: (u32, u32, u32),
        block: (u32, u32, u32),
        shared_bytes: u32,
        params: &P,
    ) -> Result<(), CudaError> {
        let (calls, _entered) = self.enter()?;
        let mut parameters = [std::ptr::from_ref(params).cast::<c_void>().cast_mut()];
        // SAFETY: the driver copies the parameter before it returns and never writes to it; the caller vouches for
        // what it says. The function's module lives as long as `function`.
        unsafe {
            cu!(
                calls,
                cuLaunchKernel(
                    function.handle(),
                    grid.0,
                    grid.1,
                    grid.2,
                    block.0,
                    block.1,
                    block.2,
                    shared_bytes,
                    self.handle(),
                    parameters.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            )
        }
    }

    /// Queues `work` to be run by a thread of the driver's. It must not call CUDA and should be short: everything
    /// behind it waits.
    ///
    /// Refused while the stream is captured, for a graph would run it at every replay. If the device is lost before
    /// its turn comes it is never run.
    pub fn host_func(&self, work: Box<dyn FnOnce() + Send>) -> Result<(), CudaError> {
        let _gate = self.gate();
        if self.is_capturing()? {
            return Err(CudaError::not_in_capture("Stream::host_func"));
        }
        let (calls, _entered) = self.enter()?;
        // A box of a box, because the inner pointer is wide and the driver carries one word.
        let data: *mut Box<dyn FnOnce() + Send> = Box::into_raw(Box::new(work));
        // SAFETY: the driver calls `run_host_func` exactly once with `data`, which is ours until it does.
        let result = unsafe { cu!(calls, cuLaunchHostFunc(self.handle(), Some(run_host_func), data.cast())) };
        if result.is_err() {
            // SAFETY: a refused callback is never run, so the box is still ours alone.
            drop(unsafe { Box::from_raw(data) });
        }
        result
    }
}

/// Runs a queued closure on the driver's thread; a panic stops here, because it must not cross the driver.
unsafe extern "C" fn run_host_func(data: *mut c_void) {
    // SAFETY: `data` came from `Box::into_raw` in `host_func` and arrives once.
    let work = unsafe { Box::from_raw(data.cast::<Box<dyn FnOnce() + Send>>()) };
    if catch_unwind(AssertUnwindSafe(work)).is_err() {
        tracing::error!("a host function queued on a CUDA stream panicked; the stream goes on");
    }
}
