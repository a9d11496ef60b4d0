//! Device memory, pinned memory and registered memory, each released with its owner.

use std::ffi::{c_char, c_uint, c_void};
use std::ptr::NonNull;

use cudarc::driver::sys;

use crate::calls::{Handle, cu};
use crate::context::Context;
use crate::error::{CudaError, released};
use crate::ipc::IPC_HANDLE_BYTES;

/// Device allocations are whole multiples of this, bytes: the driver cuts smaller ones from a common block, and a
/// handle to one would open the whole block, other tenants' bytes included.
pub const ALLOCATION_UNIT: usize = 2 << 20;

/// `bytes` rounded up to whole `unit`s, if that can be counted.
pub(crate) fn round_up(call: &'static str, bytes: usize, unit: usize) -> Result<usize, CudaError> {
    if bytes == 0 {
        return Err(CudaError::invalid(call));
    }
    bytes.checked_next_multiple_of(unit).ok_or_else(|| CudaError::new(call, 2))
}

/// Device memory of our own that other processes may open by handle.
#[derive(Debug)]
pub struct DeviceBuffer {
    context: Context,
    ptr: u64,
    len: usize,
}

impl Context {
    /// Allocates device memory, rounded up to [`ALLOCATION_UNIT`]. What it holds at first is unspecified.
    pub fn alloc(&self, bytes: usize) -> Result<DeviceBuffer, CudaError> {
        let len = round_up("cuMemAlloc_v2", bytes, ALLOCATION_UNIT)?;
        let _entered = self.enter()?;
        let mut ptr = 0;
        // SAFETY: `ptr` is ours to be written; `DeviceBuffer::drop` frees it.
        unsafe { cu!(self.calls(), cuMemAlloc_v2(&raw mut ptr, len)) }?;
        Ok(DeviceBuffer { context: self.clone(), ptr, len })
    }

    /// Allocates pinned host memory, mapped for every device. What it holds at first is unspecified.
    pub fn pinned(&self, bytes: usize) -> Result<PinnedBuffer, CudaError> {
        if bytes == 0 {
            return Err(CudaError::invalid("cuMemHostAlloc"));
        }
        let _entered = self.enter()?;
        let mut raw: *mut c_void = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: `raw` is ours to be written; `PinnedBuffer::drop` frees it.
        unsafe { cu!(self.calls(), cuMemHostAlloc(&raw mut raw, bytes, flags)) }?;
        let host = NonNull::new(raw.cast::<u8>()).ok_or_else(|| CudaError::invalid("cuMemHostAlloc"))?;
        let mut buffer =
            PinnedBuffer { context: self.clone(), host: Handle(host.as_ptr()), device: 0, len: bytes };
        buffer.device = device_pointer(self, raw)?;
        Ok(buffer)
    }

    /// Pins memory that is mapped already and maps it for every device; `read_only` for memory that this process may
    /// only read (see [`crate::Abilities::read_only_host_register`]).
    ///
    /// # Safety
    /// The range is mapped in this process, is not registered already, and stays mapped until the answer is dropped.
    pub unsafe fn register(
        &self,
        host: *mut u8,
        bytes: usize,
        read_only: bool,
    ) -> Result<Registration, CudaError> {
        if bytes == 0 || host.is_null() {
            return Err(CudaError::invalid("cuMemHostRegister_v2"));
        }
        let mut flags: c_uint = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        if read_only {
            flags |= sys::CU_MEMHOSTREGISTER_READ_ONLY;
        }
        let _entered = self.enter()?;
        // SAFETY: the caller vouches for the range; `Registration::drop` unpins it.
        unsafe { cu!(self.calls(), cuMemHostRegister_v2(host.cast(), bytes, flags)) }?;
        let mut registration =
            Registration { context: self.clone(), host: Handle(host), device: 0, len: bytes };
        registration.device = device_pointer(self, host.cast())?;
        Ok(registration)
    }
}

/// Where a device sees pinned host memory. The context is current.
fn device_pointer(context: &Context, host: *mut c_void) -> Result<u64, CudaError> {
    let mut device = 0;
    // SAFETY: `device` is ours to be written, and `host` was pinned and mapped just before.
    unsafe { cu!(context.calls(), cuMemHostGetDevicePointer_v2(&raw mut device, host, 0)) }?;
    Ok(device)
}

impl DeviceBuffer {
    /// Its address on the device.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Its length in bytes, a multiple of [`ALLOCATION_UNIT`].
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty allocation is refused.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The handle by which another process opens the whole of it ([`Context::open_ipc`]). It must not be freed before
    /// every importer has closed it.
    pub fn ipc_handle(&self) -> Result<[u8; IPC_HANDLE_BYTES], CudaError> {
        let _entered = self.context.enter()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0 as c_char; IPC_HANDLE_BYTES] };
        // SAFETY: `handle` is ours to be written, and `ptr` is the base of a live allocation.
        unsafe { cu!(self.context.calls(), cuIpcGetMemHandle(&raw mut handle, self.ptr)) }?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated once and freed once; who queued work on it waits for that first, as its contracts say.
        let result = self
            .context
            .enter_to_release()
            .and_then(|_entered| unsafe { cu!(self.context.calls(), cuMemFree_v2(self.ptr)) });
        released(result);
    }
}

/// Host memory that the driver allocated and pinned.
pub struct PinnedBuffer {
    context: Context,
    host: Handle<u8>,
    device: u64,
    len: usize,
}

impl PinnedBuffer {
    /// Its address on the host. Devices may write to it at any time, so no reference into it is handed out.
    pub fn as_ptr(&self) -> *mut u8 {
        self.host.0
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty allocation is refused.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its address for kernels and stream memory operations.
    pub fn device_ptr(&self) -> u64 {
        self.device
    }
}

impl std::fmt::Debug for PinnedBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PinnedBuffer")
            .field("host", &self.host.0)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated once by `cuMemHostAlloc` and freed once.
        let result = self
            .context
            .enter_to_release()
            .and_then(|_entered| unsafe { cu!(self.context.calls(), cuMemFreeHost(self.host.0.cast())) });
        released(result);
    }
}

/// Host memory of somebody else's that is pinned as long as this lives.
pub struct Registration {
    context: Context,
    host: Handle<u8>,
    device: u64,
    len: usize,
}

impl Registration {
    /// Its address for kernels and stream memory operations.
    pub fn device_ptr(&self) -> u64 {
        self.device
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty range is refused.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registration")
            .field("host", &self.host.0)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let unregister = || {
            // SAFETY: registered once, while the caller still keeps it mapped, and not tried again once it has been unregistered.
            self.context.enter_to_release().and_then(|_entered| unsafe {
                cu!(self.context.calls(), cuMemHostUnregister(self.host.0.cast()))
            })
        };
        // What stays registered keeps whatever is mapped at its addresses next from being pinned: a driver that failed is asked once more.
        released(match unregister() {
            Err(error) if !error.is_sticky() && !error.is_shutdown() => unregister(),
            done => done,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn allocations_are_whole_units_and_never_empty() {
        assert_eq!(round_up("t", 1, ALLOCATION_UNIT), Ok(ALLOCATION_UNIT));
        assert_eq!(round_up("t", ALLOCATION_UNIT, ALLOCATION_UNIT), Ok(ALLOCATION_UNIT));
        assert_eq!(round_up("t", ALLOCATION_UNIT + 1, ALLOCATION_UNIT), Ok(2 * ALLOCATION_UNIT));
        assert_eq!(round_up("t", 0, ALLOCATION_UNIT).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(round_up("t", usize::MAX, ALLOCATION_UNIT).unwrap_err().kind(), ErrorKind::OutOfMemory);
    }
}
