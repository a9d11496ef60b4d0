//! Memory of another process, mapped here: by classic handle, or by file descriptor ([`crate::Access`]).

use std::ffi::c_char;

use cudarc::driver::sys;

use crate::calls::cu;
use crate::context::Context;
use crate::error::{CudaError, released};
use crate::vmm::Mapping;

/// The length of a classic IPC handle, for memory and for events.
pub const IPC_HANDLE_BYTES: usize = 64;

/// Device memory of another process.
#[derive(Debug)]
pub struct ImportedBuffer {
    context: Context,
    ptr: u64,
    len: usize,
    by: By,
}

/// How the memory came, and so how it goes.
#[derive(Debug)]
pub(crate) enum By {
    Handle,
    Descriptor { mapping: Mapping, read_only: bool },
}

impl Context {
    /// Opens another process's allocation of `bytes` by its classic handle.
    ///
    /// The handle opens the exporter's whole allocation and always for writing. `bytes` is what the exporter says of its
    /// length; more than the driver knows of is refused. A handle of this process itself is refused by the driver, and
    /// so is one of a process that another container shows under the same process id.
    pub fn open_ipc(
        &self,
        handle: &[u8; IPC_HANDLE_BYTES],
        bytes: usize,
    ) -> Result<ImportedBuffer, CudaError> {
        if bytes == 0 {
            return Err(CudaError::invalid("Context::open_ipc"));
        }
        let _entered = self.enter()?;
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as c_char) };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut ptr = 0;
        // SAFETY: the handle is plain bytes that the driver checks; `ptr` is ours to be written.
        unsafe { cu!(self.calls(), cuIpcOpenMemHandle_v2(&raw mut ptr, handle, flags)) }?;
        let import = ImportedBuffer { context: self.clone(), ptr, len: bytes, by: By::Handle };
        let (mut base, mut whole) = (0, 0usize);
        // SAFETY: both are ours to be written, and the memory was opened just now.
        let known = unsafe { cu!(self.calls(), cuMemGetAddressRange_v2(&raw mut base, &raw mut whole, ptr)) };
        // The exporter is another process: what it says is checked where the driver can tell.
        let end = ptr.checked_add(bytes as u64);
        if known.is_ok() && end.is_none_or(|end| end > base.saturating_add(whole as u64)) {
            return Err(CudaError::invalid("Context::open_ipc"));
        }
        Ok(import)
    }

    pub(crate) fn imported(&self, mapping: Mapping, read_only: bool) -> ImportedBuffer {
        let (ptr, len) = (mapping.ptr(), mapping.len());
        ImportedBuffer { context: self.clone(), ptr, len, by: By::Descriptor { mapping, read_only } }
    }
}

impl ImportedBuffer {
    /// Where it begins in this process: the base of the exporter's allocation.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Its length in bytes: as was asked for with a handle, as it is mapped for a descriptor.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty import is refused.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the driver keeps this process from writing to it. Classic handles never do.
    pub fn read_only(&self) -> bool {
        matches!(self.by, By::Descriptor { read_only: true, .. })
    }
}

impl Drop for ImportedBuffer {
    fn drop(&mut self) {
        match &self.by {
            By::Handle => {
                // SAFETY: opened once by `cuIpcOpenMemHandle` and closed once.
                let result = self
                    .context
                    .enter_to_release()
                    .and_then(|_entered| unsafe { cu!(self.context.calls(), cuIpcCloseMemHandle(self.ptr)) });
                released(result);
            }
            By::Descriptor { mapping, .. } => mapping.release(&self.context),
        }
    }
}
