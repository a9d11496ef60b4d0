//! Many copies in one call, where the driver has it: `cuMemcpyBatchAsync` came with 12.8 and changed with 13.0.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys;

use crate::calls::{Calls, cu};
use crate::error::{CudaError, check};
use crate::stream::Stream;

/// Copies given to the driver in one call at most: drivers have crashed on tens of thousands.
pub const MAX_BATCH: usize = 4096;

/// Which batch copy the driver has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BatchCopies {
    /// None: copies are given one by one.
    None,
    /// That of CUDA 12.8.
    V12080,
    /// That of CUDA 13.0.
    V13000,
}

/// One copy from the host to the device.
#[derive(Debug, Clone, Copy)]
pub struct HostToDevice {
    /// Where to, on the device.
    pub dst: u64,
    /// Where from, pinned.
    pub src: *const u8,
    /// How much.
    pub bytes: usize,
}

/// `CUmemLocation` of `cuda.h`.
#[repr(C)]
struct Location {
    kind: c_uint,
    id: c_int,
}

/// `CUmemcpyAttributes` of `cuda.h`, which the bindings for 12.2 do not have yet.
#[repr(C)]
struct Attributes {
    source_order: c_uint,
    source_hint: Location,
    destination_hint: Location,
    flags: c_uint,
}

/// Sources are read in stream order, so they must stay as they are until the copies are done.
const SOURCE_ORDER_STREAM: c_uint = 1;

type CallV12080 = unsafe extern "C" fn(
    *mut sys::CUdeviceptr,
    *mut sys::CUdeviceptr,
    *mut usize,
    usize,
    *mut Attributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> c_int;

type CallV13000 = unsafe extern "C" fn(
    *mut sys::CUdeviceptr,
    *mut sys::CUdeviceptr,
    *mut usize,
    usize,
    *mut Attributes,
    *mut usize,
    usize,
    sys::CUstream,
) -> c_int;

#[derive(Clone, Copy)]
enum Call {
    None,
    V12080(CallV12080),
    V13000(CallV13000),
}

/// The driver's batch copy, and whether it has failed before.
pub(crate) struct BatchCall {
    call: Call,
    failed: AtomicBool,
}

impl fmt::Debug for BatchCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BatchCall").field(&self.which()).finish()
    }
}

impl BatchCall {
    /// Asks the driver for its newest batch copy whose signature we know.
    pub(crate) fn find(calls: &Calls, version: i32) -> Self {
        const NAME: &CStr = c"cuMemcpyBatchAsync";
        let lookup = |wanted: i32| {
            let mut function: *mut c_void = std::ptr::null_mut();
            let mut status: c_uint = 1;
            // SAFETY: both are ours to be written; the name is a constant.
            let found = unsafe {
                cu!(calls, cuGetProcAddress_v2(NAME.as_ptr(), &raw mut function, wanted, 0, &raw mut status))
            };
            (version >= wanted && found.is_ok() && status == 0 && !function.is_null()).then_some(function)
        };
        let call = if let Some(function) = lookup(13_000) {
            // SAFETY: asked for at 13.0 the driver answers with the signature of 13.0.
            Call::V13000(unsafe { std::mem::transmute::<*mut c_void, CallV13000>(function) })
        } else if let Some(function) = lookup(12_080) {
            // SAFETY: asked for at 12.8 the driver answers with the signature of 12.8.
            Call::V12080(unsafe { std::mem::transmute::<*mut c_void, CallV12080>(function) })
        } else {
            Call::None
        };
        Self { call, failed: AtomicBool::new(false) }
    }

    pub(crate) fn which(&self) -> BatchCopies {
        if self.failed.load(Ordering::Relaxed) {
            return BatchCopies::None;
        }
        match self.call {
            Call::None => BatchCopies::None,
            Call::V12080(_) => BatchCopies::V12080,
            Call::V13000(_) => BatchCopies::V13000,
        }
    }

    /// Gives one batch to the driver. The context is current.
    ///
    /// # Safety
    /// As [`Stream::copy_batch_h2d`], and no copy is empty.
    unsafe fn submit(
        &self,
        calls: &Calls,
        stream: sys::CUstream,
        copies: &[HostToDevice],
    ) -> Result<(), CudaError> {
        let mut destinations: Vec<sys::CUdeviceptr> = copies.iter().map(|copy| copy.dst).collect();
        let mut sources: Vec<sys::CUdeviceptr> = copies.iter().map(|copy| copy.src.addr() as u64).collect();
        let mut sizes: Vec<usize> = copies.iter().map(|copy| copy.bytes).collect();
        // One set of attributes for all: it applies from the copy of index 0 on.
        let mut attributes = Attributes {
            source_order: SOURCE_ORDER_STREAM,
            source_hint: Location { kind: 0, id: 0 },
            destination_hint: Location { kind: 0, id: 0 },
            flags: 0,
        };
        let mut first = 0usize;
        let mut failed_at = 0usize;
        let (dst, src, len) = (destinations.as_mut_ptr(), sources.as_mut_ptr(), sizes.as_mut_ptr());
        // SAFETY: the three arrays have `copies.len()` entries and the attributes one; the driver reads them before it
        // returns. The caller vouches for the ranges.
        let code = unsafe {
            match self.call {
                Call::None => return Err(CudaError::new("cuMemcpyBatchAsync", 801)),
                Call::V12080(call) => call(
                    dst,
                    src,
                    len,
                    copies.len(),
                    &raw mut attributes,
                    &raw mut first,
                    1,
                    &raw mut failed_at,
                    stream,
                ),
                Call::V13000(call) => {
                    call(dst, src, len, copies.len(), &raw mut attributes, &raw mut first, 1, stream)
                }
            }
        };
        check(calls, "cuMemcpyBatchAsync", code)
    }
}

impl Stream {
    /// Queues many copies from the host to the device: in batches of at most [`MAX_BATCH`] where the driver has a batch
    /// copy, else one by one. Their order among themselves is not defined; what is queued later waits for all.
    ///
    /// A batch call that fails is not used again in this process, and its copies are given one by one.
    ///
    /// # Safety
    /// As [`Self::copy_h2d`] for each, and no two destinations overlap.
    pub unsafe fn copy_batch_h2d(&self, copies: &[HostToDevice]) -> Result<(), CudaError> {
        let batch = &self.context().driver().batch;
        // A graph takes single copies only. One copy is not worth the arrays.
        if copies.len() < 2 || batch.which() == BatchCopies::None || self.is_capturing()? {
            // SAFETY: the caller's contract.
            return unsafe { self.copy_one_by_one(copies) };
        }
        let (calls, _entered) = self.enter()?;
        let empty = copies.iter().any(|copy| copy.bytes == 0);
        let without_empty: Vec<HostToDevice>;
        let copies = if empty {
            // The driver refuses a whole batch for one empty copy.
            without_empty = copies.iter().filter(|copy| copy.bytes != 0).copied().collect();
            &without_empty
        } else {
            copies
        };
        let mut rest = copies;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(MAX_BATCH));
            // SAFETY: the caller's contract, and no copy is empty.
            if let Err(error) = unsafe { batch.submit(calls, self.handle(), now) } {
                if error.is_sticky() {
                    return Err(error);
                }
                if !batch.failed.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "batch copies do not work here; copying one by one from now on");
                }
                // Some of the batch may be queued already: to copy the same bytes again does no harm.
                // SAFETY: the caller's contract.
                return unsafe { self.copy_one_by_one(rest) };
            }
            rest = later;
        }
        Ok(())
    }

    /// # Safety
    /// As [`Self::copy_batch_h2d`].
    unsafe fn copy_one_by_one(&self, copies: &[HostToDevice]) -> Result<(), CudaError> {
        // Entered once for all, so that the copies find the context current.
        let (_calls, _entered) = self.enter()?;
        copies.iter().try_for_each(|copy| {
            // SAFETY: the caller's contract.
            unsafe { self.copy_h2d(copy.dst, copy.src, copy.bytes) }
        })
    }
}
