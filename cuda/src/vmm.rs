//! Device memory by file descriptor: made with `cuMemCreate`, exported, and mapped with the access that was asked for.
//!
//! A descriptor is a capability: it needs no shared process ids and no shared `/dev/shm`, and a mapping may be
//! read-only.

use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use cudarc::driver::sys;

use crate::calls::cu;
use crate::context::Context;
use crate::error::{CudaError, released};
use crate::ipc::ImportedBuffer;
use crate::memory::{ALLOCATION_UNIT, round_up};

/// The handle type of file descriptors; the bindings have it as a set of flags.
const POSIX_FD: c_uint = 1;

/// What a mapping of shared memory may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reading only, where the driver enforces it.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// A range of device addresses with memory behind it. Released by hand, because that needs the context.
#[derive(Debug)]
pub(crate) struct Mapping {
    ptr: u64,
    len: usize,
}

impl Mapping {
    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Reserves addresses and maps `len` bytes of `memory` there, without access yet. The context is current.
    fn new(
        context: &Context,
        memory: sys::CUmemGenericAllocationHandle,
        len: usize,
    ) -> Result<Self, CudaError> {
        let mut ptr = 0;
        // SAFETY: `ptr` is ours to be written; `len` is a multiple of the granularity.
        unsafe { cu!(context.calls(), cuMemAddressReserve(&raw mut ptr, len, 0, 0, 0)) }?;
        // SAFETY: the range was reserved just now and nothing is mapped in it.
        let mapped = unsafe { cu!(context.calls(), cuMemMap(ptr, len, 0, memory, 0)) };
        if mapped.is_err() {
            // SAFETY: reserved above, and nothing is mapped in it.
            released(unsafe { cu!(context.calls(), cuMemAddressFree(ptr, len)) });
        }
        mapped.map(|()| Self { ptr, len })
    }

    /// Lets the context's device use the range. The context is current.
    fn allow(&self, context: &Context, access: Access) -> Result<(), CudaError> {
        let description = sys::CUmemAccessDesc {
            location: location(context),
            flags: match access {
                Access::Read => sys::CUmemAccess_flags_enum::CU_MEM_ACCESS_FLAGS_PROT_READ,
                Access::ReadWrite => sys::CUmemAccess_flags_enum::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
            },
        };
        // SAFETY: the range is mapped as a whole, and one description is given.
        unsafe { cu!(context.calls(), cuMemSetAccess(self.ptr, self.len, &raw const description, 1)) }
    }

    /// As [`Self::allow`], but writable where the driver has no read-only mappings. Answers whether it is read-only.
    fn allow_or_widen(&self, context: &Context, access: Access) -> Result<bool, CudaError> {
        match self.allow(context, access) {
            Err(error) if access == Access::Read && !error.is_sticky() => {
                tracing::warn!(%error, "the driver maps shared memory writable only");
                self.allow(context, Access::ReadWrite).map(|()| false)
            }
            result => result.map(|()| access == Access::Read),
        }
    }

    /// Takes the memory and the addresses away again; what is queued on them must be done.
    pub(crate) fn release(&self, context: &Context) {
        let result = context.enter_to_release().and_then(|_entered| {
            // SAFETY: mapped once in `new`, released once by the owner's drop.
            unsafe { cu!(context.calls(), cuMemUnmap(self.ptr, self.len)) }?;
            // SAFETY: reserved once in `new`, and nothing is mapped in it any more.
            unsafe { cu!(context.calls(), cuMemAddressFree(self.ptr, self.len)) }
        });
        released(result);
    }
}

fn location(context: &Context) -> sys::CUmemLocation {
    sys::CUmemLocation {
        type_: sys::CUmemLocationType_enum::CU_MEM_LOCATION_TYPE_DEVICE,
        id: context.info().ordinal.cast_signed(),
    }
}

fn properties(context: &Context) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType_enum::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType_enum::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        location: location(context),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

/// The unit in which the driver maps memory of these properties; at least [`ALLOCATION_UNIT`]. The context is current.
fn granularity(context: &Context, properties: &sys::CUmemAllocationProp) -> Result<usize, CudaError> {
    let option = sys::CUmemAllocationGranularity_flags_enum::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED as c_uint;
    let mut bytes = 0usize;
    // SAFETY: `bytes` is ours to be written, and the properties are read only.
    unsafe { cu!(context.calls(), cuMemGetAllocationGranularity(&raw mut bytes, properties, option)) }?;
    Ok(bytes.max(ALLOCATION_UNIT))
}

/// Device memory of our own that other processes may map by file descriptor.
#[derive(Debug)]
pub struct SharedBuffer {
    context: Context,
    memory: sys::CUmemGenericAllocationHandle,
    mapping: Mapping,
}

impl Context {
    /// Allocates device memory that can be exported as a file descriptor, rounded up to the driver's granularity.
    /// What it holds at first is unspecified.
    pub fn alloc_shareable(&self, bytes: usize) -> Result<SharedBuffer, CudaError> {
        let _entered = self.enter()?;
        let properties = properties(self);
        let len = round_up("cuMemCreate", bytes, granularity(self, &properties)?)?;
        let mut memory = 0;
        // SAFETY: `memory` is ours to be written, and the properties are read only.
        unsafe { cu!(self.calls(), cuMemCreate(&raw mut memory, len, &raw const properties, 0)) }?;
        let mapping = Mapping::new(self, memory, len).inspect_err(|_| {
            // SAFETY: created above and not kept.
            released(unsafe { cu!(self.calls(), cuMemRelease(memory)) });
        })?;
        let buffer = SharedBuffer { context: self.clone(), memory, mapping };
        buffer.mapping.allow(self, Access::ReadWrite)?;
        Ok(buffer)
    }

    /// Maps another process's memory from the descriptor it exported; `bytes` is the exporter's length, and a wrong
    /// one is refused by the driver. The descriptor may be closed afterwards.
    ///
    /// Where the driver refuses a read-only mapping it is made writable; [`ImportedBuffer::read_only`] says which.
    pub fn import_fd(
        &self,
        fd: impl AsFd,
        bytes: usize,
        access: Access,
    ) -> Result<ImportedBuffer, CudaError> {
        let _entered = self.enter()?;
        let len = round_up("cuMemImportFromShareableHandle", bytes, granularity(self, &properties(self))?)?;
        // The interface takes the number of the descriptor in the place of a pointer.
        let number: *mut c_void = std::ptr::without_provenance_mut(fd.as_fd().as_raw_fd() as usize);
        let mut memory = 0;
        // SAFETY: `memory` is ours to be written; the driver checks that the descriptor is one of its own.
        unsafe { cu!(self.calls(), cuMemImportFromShareableHandle(&raw mut memory, number, POSIX_FD)) }?;
        let mapping = Mapping::new(self, memory, len);
        // SAFETY: imported above; a mapping keeps the memory by itself.
        released(unsafe { cu!(self.calls(), cuMemRelease(memory)) });
        let mapping = mapping?;
        let read_only = mapping.allow_or_widen(self, access).inspect_err(|_| mapping.release(self))?;
        Ok(self.imported(mapping, read_only))
    }
}

impl SharedBuffer {
    /// Its address on the device.
    pub fn ptr(&self) -> u64 {
        self.mapping.ptr
    }

    /// Its length in bytes, a multiple of the driver's granularity: what an importer must be told.
    pub fn len(&self) -> usize {
        self.mapping.len
    }

    /// Never: an empty allocation is refused.
    pub fn is_empty(&self) -> bool {
        self.mapping.len == 0
    }

    /// A new descriptor for it, closed on exec. The memory lives until the last mapping and descriptor are gone.
    pub fn export_fd(&self) -> Result<OwnedFd, CudaError> {
        let _entered = self.context.enter()?;
        let mut fd: c_int = -1;
        // SAFETY: for this handle type the driver writes one int.
        unsafe {
            cu!(
                self.context.calls(),
                cuMemExportToShareableHandle((&raw mut fd).cast(), self.memory, POSIX_FD, 0)
            )
        }?;
        if fd < 0 {
            return Err(CudaError::bad_handle("cuMemExportToShareableHandle"));
        }
        // SAFETY: the driver made this descriptor for us, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: only a flag of our own descriptor is set; a failure leaves it open to children, as the driver made it.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
        Ok(fd)
    }
}

impl Drop for SharedBuffer {
    fn drop(&mut self) {
        self.mapping.release(&self.context);
        // SAFETY: created once and released once; importers keep the memory by themselves.
        let result = self
            .context
            .enter_to_release()
            .and_then(|_entered| unsafe { cu!(self.context.calls(), cuMemRelease(self.memory)) });
        released(result);
    }
}
