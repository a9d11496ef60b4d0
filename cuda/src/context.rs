//! A device's primary context, and the rule by which threads enter it.

use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys;

use crate::calls::{Calls, Handle, cu};
use crate::device::DeviceInfo;
use crate::error::{CudaError, released};
use crate::probe::Driver;

/// The primary context of a device, shared with whatever else uses the CUDA runtime in this process.
#[derive(Clone)]
pub struct Context(Arc<Inner>);

struct Inner {
    driver: &'static Driver,
    info: DeviceInfo,
    device: sys::CUdevice,
    raw: Handle<sys::CUctx_st>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("ordinal", &self.0.info.ordinal)
            .field("name", &self.0.info.name)
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: retained once in `retain`, released once here; everything made in it holds a clone and is gone.
        released(unsafe { cu!(&self.driver.calls, cuDevicePrimaryCtxRelease_v2(self.device)) });
    }
}

/// Puts back the context that the thread had before.
pub(crate) struct Entered<'a> {
    calls: &'a Calls,
    /// What to put back; `None` if ours was current already.
    before: Option<sys::CUcontext>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // SAFETY: the thread's own context (or none) from before; it outlives a call that borrows its thread.
            released(unsafe { cu!(self.calls, cuCtxSetCurrent(before)) });
        }
    }
}

impl Context {
    pub(crate) fn retain(driver: &'static Driver, info: DeviceInfo) -> Result<Self, CudaError> {
        let mut device: sys::CUdevice = 0;
        // SAFETY: the ordinal was checked when `info` was asked for; `device` is ours to be written.
        unsafe { cu!(&driver.calls, cuDeviceGet(&raw mut device, info.ordinal.cast_signed())) }?;
        let mut raw: sys::CUcontext = std::ptr::null_mut();
        // SAFETY: `raw` is ours to be written; `Inner::drop` gives the reference back.
        unsafe { cu!(&driver.calls, cuDevicePrimaryCtxRetain(&raw mut raw, device)) }?;
        Ok(Self(Arc::new(Inner { driver, info, device, raw: Handle(raw) })))
    }

    /// The device.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// The driver.
    pub fn driver(&self) -> &'static Driver {
        self.0.driver
    }

    pub(crate) fn calls(&self) -> &'static Calls {
        &self.0.driver.calls
    }

    pub(crate) fn raw(&self) -> sys::CUcontext {
        self.0.raw.0
    }

    /// Makes this the calling thread's context for good: for threads that work for one device, so that no call needs
    /// to switch. A thread of somebody else's (an engine's) is never bound; calls switch there and back.
    pub fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained as long as `self` lives; a thread that outlives it gets errors, no more.
        unsafe { cu!(self.calls(), cuCtxSetCurrent(self.raw())) }
    }

    /// Makes this the current context until the answer is dropped.
    pub(crate) fn enter(&self) -> Result<Entered<'static>, CudaError> {
        let calls = self.calls();
        let mut before: sys::CUcontext = std::ptr::null_mut();
        // SAFETY: `before` is ours to be written.
        unsafe { cu!(calls, cuCtxGetCurrent(&raw mut before)) }?;
        if before == self.raw() {
            return Ok(Entered { calls, before: None });
        }
        self.bind()?;
        Ok(Entered { calls, before: Some(before) })
    }

    /// The same for what is to be released: a question that failed once says nothing of what it was asked for, and there is no later try.
    pub(crate) fn enter_to_release(&self) -> Result<Entered<'static>, CudaError> {
        match self.enter() {
            Err(error) if !error.is_sticky() && !error.is_shutdown() => self.enter(),
            entered => entered,
        }
    }

    /// Device memory, bytes: free, and in all.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        let _entered = self.enter()?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: both are ours to be written.
        unsafe { cu!(self.calls(), cuMemGetInfo_v2(&raw mut free, &raw mut total)) }?;
        Ok((free as u64, total as u64))
    }

    /// Waits until everything that was given to this context is done; a sticky error shows here.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let _entered = self.enter()?;
        // SAFETY: no arguments.
        unsafe { cu!(self.calls(), cuCtxSynchronize()) }
    }
}
