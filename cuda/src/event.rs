//! Events: marks in a stream that others wait for, in this process or in another.

use std::ffi::{c_char, c_uint};
use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys;

use crate::calls::{Handle, cu};
use crate::context::Context;
use crate::error::{CudaError, ready, released};
use crate::ipc::IPC_HANDLE_BYTES;
use crate::stream::Stream;

/// What an event is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// Order within this process.
    Local,
    /// Order across processes; [`Event::ipc_handle`] gives the handle. Resolves only where both share a `/dev/shm`.
    Interprocess,
    /// Measuring with [`Event::elapsed_ms`].
    Timed,
}

/// A mark in a stream.
#[derive(Clone)]
pub struct Event(Arc<Inner>);

struct Inner {
    context: Context,
    raw: Handle<sys::CUevent_st>,
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event").field("raw", &self.0.raw.0).field("context", &self.0.context).finish()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: created or opened once and destroyed once; an imported event is destroyed by the same call.
        let result = self
            .context
            .enter_to_release()
            .and_then(|_entered| unsafe { cu!(self.context.calls(), cuEventDestroy_v2(self.raw.0)) });
        released(result);
    }
}

impl Context {
    /// A new event.
    pub fn event(&self, kind: EventKind) -> Result<Event, CudaError> {
        use sys::CUevent_flags_enum as F;
        let flags = match kind {
            EventKind::Local => F::CU_EVENT_DISABLE_TIMING as c_uint,
            EventKind::Interprocess => {
                F::CU_EVENT_DISABLE_TIMING as c_uint | F::CU_EVENT_INTERPROCESS as c_uint
            }
            EventKind::Timed => F::CU_EVENT_DEFAULT as c_uint,
        };
        let _entered = self.enter()?;
        let mut raw: sys::CUevent = std::ptr::null_mut();
        // SAFETY: `raw` is ours to be written; `Inner::drop` destroys it.
        unsafe { cu!(self.calls(), cuEventCreate(&raw mut raw, flags)) }?;
        Ok(Event(Arc::new(Inner { context: self.clone(), raw: Handle(raw) })))
    }

    /// Opens another process's event. The exporter must keep its own alive as long as this one.
    pub fn open_event(&self, handle: &[u8; IPC_HANDLE_BYTES]) -> Result<Event, CudaError> {
        let _entered = self.enter()?;
        let handle = sys::CUipcEventHandle { reserved: handle.map(|byte| byte as c_char) };
        let mut raw: sys::CUevent = std::ptr::null_mut();
        // SAFETY: the handle is plain bytes that the driver checks; `raw` is ours to be written.
        unsafe { cu!(self.calls(), cuIpcOpenEventHandle(&raw mut raw, handle)) }?;
        Ok(Event(Arc::new(Inner { context: self.clone(), raw: Handle(raw) })))
    }
}

impl Event {
    pub(crate) fn handle(&self) -> sys::CUevent {
        self.0.raw.0
    }

    /// Marks the point that `stream` has been queued up to.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        let (calls, _entered) = stream.enter()?;
        // SAFETY: both handles live as long as their owners.
        unsafe { cu!(calls, cuEventRecord(self.handle(), stream.handle())) }
    }

    /// Whether the point recorded last has been passed; true for an event that was never recorded.
    pub fn query(&self) -> Result<bool, CudaError> {
        let _entered = self.0.context.enter()?;
        // SAFETY: the event lives as long as `self`.
        ready(unsafe { cu!(self.0.context.calls(), cuEventQuery(self.handle())) })
    }

    /// Waits until the point recorded last has been passed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let _entered = self.0.context.enter()?;
        // SAFETY: as above.
        unsafe { cu!(self.0.context.calls(), cuEventSynchronize(self.handle())) }
    }

    /// The handle by which another process opens it; only for [`EventKind::Interprocess`].
    pub fn ipc_handle(&self) -> Result<[u8; IPC_HANDLE_BYTES], CudaError> {
        let _entered = self.0.context.enter()?;
        let mut handle = sys::CUipcEventHandle { reserved: [0; IPC_HANDLE_BYTES] };
        // SAFETY: `handle` is ours to be written.
        unsafe { cu!(self.0.context.calls(), cuIpcGetEventHandle(&raw mut handle, self.handle())) }?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    /// Milliseconds from `earlier` to this, both [`EventKind::Timed`] and both passed.
    pub fn elapsed_ms(&self, earlier: &Event) -> Result<f32, CudaError> {
        let _entered = self.0.context.enter()?;
        let mut milliseconds = 0.0;
        // SAFETY: `milliseconds` is ours to be written, and both events live.
        unsafe {
            cu!(
                self.0.context.calls(),
                cuEventElapsedTime(&raw mut milliseconds, earlier.handle(), self.handle())
            )
        }?;
        Ok(milliseconds)
    }
}
