//! What a device is and what it can do, asked once.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::path::Path;

use cudarc::driver::sys;

use crate::calls::{Calls, cu};
use crate::error::CudaError;

/// A device as this process sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number in this process; `CUDA_VISIBLE_DEVICES` changes it, so peers name devices by [`Self::uuid`].
    pub ordinal: u32,
    /// Its product name.
    pub name: String,
    /// Its UUID; that of the instance for a MIG slice.
    pub uuid: [u8; 16],
    /// Device memory in all, bytes.
    pub total_bytes: u64,
    /// Compute capability, major and minor.
    pub compute: (u32, u32),
    /// PCI address as sysfs writes it, `0000:3b:00.0`; empty where there is none.
    pub pci_bus_id: String,
    /// The host's NUMA node that it hangs on, where the system knows.
    pub numa_node: Option<u32>,
    /// Who may have contexts on it.
    pub compute_mode: ComputeMode,
    /// Whether it looks like a slice of a card (MIG) rather than a whole one.
    pub mig: bool,
    /// What it can do.
    pub abilities: Abilities,
}

/// Who may have contexts on a device (`nvidia-smi -c`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ComputeMode {
    /// Any number of processes.
    Default,
    /// One process only: the daemon and an engine cannot both have one, except through MPS.
    ExclusiveProcess,
    /// None.
    Prohibited,
    /// A mode that this version does not know.
    Unknown(i32),
}

/// What a device can do, of what we build on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// Streams can write and wait for 32-bit words.
    pub memops_32: bool,
    /// Streams can write and wait for 64-bit words.
    pub memops_64: bool,
    /// Host memory can be registered after it was allocated.
    pub host_register: bool,
    /// Host memory that is mapped read-only can be registered.
    pub read_only_host_register: bool,
    /// A kernel may use the host's own address of registered memory.
    pub host_pointers: bool,
    /// Device memory can be mapped piecewise (`cuMemCreate` and its family).
    pub virtual_memory: bool,
    /// Device memory can be exported as a file descriptor.
    pub posix_fd: bool,
    /// Events and memory can be shared by classic IPC handles.
    pub ipc_events: bool,
    /// Host and device share one address space.
    pub unified_addressing: bool,
    /// The device has the host's memory (Jetson, GB10): nothing is gained by copying.
    pub integrated: bool,
    /// Error correction is on.
    pub ecc: bool,
    /// Engines that copy while kernels run.
    pub copy_engines: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that one block may ask for, bytes.
    pub shared_bytes_per_block: u32,
}

impl DeviceInfo {
    pub(crate) fn query(calls: &Calls, ordinal: u32) -> Result<Self, CudaError> {
        let number = c_int::try_from(ordinal).map_err(|_| CudaError::new("cuDeviceGet", 101))?;
        let mut device: sys::CUdevice = 0;
        // SAFETY: `device` is ours to be written; a wrong ordinal is an error of the driver's.
        unsafe { cu!(calls, cuDeviceGet(&raw mut device, number)) }?;

        let mut total: usize = 0;
        // SAFETY: `total` is ours to be written, and `device` came from the driver.
        unsafe { cu!(calls, cuDeviceTotalMem_v2(&raw mut total, device)) }?;
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: `uuid` is ours to be written.
        unsafe { cu!(calls, cuDeviceGetUuid_v2(&raw mut uuid, device)) }?;
        // SAFETY: the buffer is as long as is said.
        let name = text::<256>(|buffer, len| unsafe { cu!(calls, cuDeviceGetName(buffer, len, device)) })?;
        // SAFETY: the buffer is as long as is said.
        let pci = text::<32>(|buffer, len| unsafe { cu!(calls, cuDeviceGetPCIBusId(buffer, len, device)) });
        // Not every platform has PCI addresses; that is no reason to refuse the device.
        let pci_bus_id = pci.unwrap_or_default().to_lowercase();

        let attributes = Attributes { calls, device };
        use sys::CUdevice_attribute_enum as A;
        let compute = (
            attributes.count(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            attributes.count(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        );
        let compute_mode = match attributes.get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_MODE).unwrap_or(0) {
            0 => ComputeMode::Default,
            2 => ComputeMode::Prohibited,
            3 => ComputeMode::ExclusiveProcess,
            other => ComputeMode::Unknown(other),
        };
        let numa_node = numa_node(Path::new("/sys/bus/pci/devices"), &pci_bus_id)
            .or_else(|| u32::try_from(attributes.get(A::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID)?).ok());
        Ok(Self {
            ordinal,
            mig: name.contains(" MIG "),
            name,
            uuid: uuid.bytes.map(|byte| byte as u8),
            total_bytes: total as u64,
            compute,
            pci_bus_id,
            numa_node,
            compute_mode,
            abilities: attributes.abilities(),
        })
    }

    /// The UUID as `nvidia-smi -L` writes it.
    pub fn uuid_text(&self) -> String {
        let hex: Vec<String> = self.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let kind = if self.mig { "MIG" } else { "GPU" };
        let part = |range: std::ops::Range<usize>| hex[range].concat();
        format!("{kind}-{}-{}-{}-{}-{}", part(0..4), part(4..6), part(6..8), part(8..10), part(10..16))
    }
}

/// The device's attributes. One that the driver does not know counts as absent.
struct Attributes<'a> {
    calls: &'a Calls,
    device: sys::CUdevice,
}

impl Attributes<'_> {
    fn get(&self, attribute: sys::CUdevice_attribute) -> Option<i32> {
        let mut value: c_int = 0;
        // SAFETY: `value` is ours to be written; an unknown attribute is an error of the driver's.
        let answer = unsafe {
            cu!(self.calls, cuDeviceGetAttribute(&raw mut value, attribute as c_uint, self.device))
        };
        answer.ok().map(|()| value)
    }

    fn has(&self, attribute: sys::CUdevice_attribute) -> bool {
        self.get(attribute).is_some_and(|value| value != 0)
    }

    fn count(&self, attribute: sys::CUdevice_attribute) -> u32 {
        self.get(attribute).and_then(|value| u32::try_from(value).ok()).unwrap_or(0)
    }

    fn abilities(&self) -> Abilities {
        use sys::CUdevice_attribute_enum as A;
        let memops_64 = self.has(A::CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS);
        let virtual_memory = self.has(A::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED);
        Abilities {
            // The first attribute speaks of an older call that many drivers have switched off; a device with 64-bit
            // words has 32-bit ones too.
            memops_32: memops_64 || self.has(A::CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_MEM_OPS_V1),
            memops_64,
            host_register: self.has(A::CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED),
            read_only_host_register: self.has(A::CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED),
            host_pointers: self.has(A::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM),
            virtual_memory,
            posix_fd: virtual_memory
                && self.has(A::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED),
            ipc_events: self.has(A::CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED),
            unified_addressing: self.has(A::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING),
            integrated: self.has(A::CU_DEVICE_ATTRIBUTE_INTEGRATED),
            ecc: self.has(A::CU_DEVICE_ATTRIBUTE_ECC_ENABLED),
            copy_engines: self.count(A::CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT),
            multiprocessors: self.count(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            shared_bytes_per_block: self.count(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
        }
    }
}

/// Reads a string that the driver writes into a buffer of `N` bytes.
fn text<const N: usize>(
    write: impl FnOnce(*mut c_char, c_int) -> Result<(), CudaError>,
) -> Result<String, CudaError> {
    let mut buffer = [0u8; N];
    write(buffer.as_mut_ptr().cast(), N as c_int)?;
    // The driver terminates what it writes; a buffer that it filled to the brim is taken whole.
    Ok(CStr::from_bytes_until_nul(&buffer)
        .map_or_else(|_| String::from_utf8_lossy(&buffer), CStr::to_string_lossy)
        .into_owned())
}

/// The NUMA node that sysfs names for a PCI device; it says -1 where it knows none.
fn numa_node(devices: &Path, pci_bus_id: &str) -> Option<u32> {
    // The address comes from the driver and becomes a path: nothing but an address may pass.
    if pci_bus_id.is_empty() || !pci_bus_id.bytes().all(|b| b.is_ascii_hexdigit() || b == b':' || b == b'.') {
        return None;
    }
    std::fs::read_to_string(devices.join(pci_bus_id).join("numa_node")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numa_node_is_what_sysfs_says_and_unknown_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        for (address, text) in [("0000:3b:00.0", "1\n"), ("0000:86:00.0", "-1\n")] {
            std::fs::create_dir(folder.path().join(address)).unwrap();
            std::fs::write(folder.path().join(address).join("numa_node"), text).unwrap();
        }
        assert_eq!(numa_node(folder.path(), "0000:3b:00.0"), Some(1));
        assert_eq!(numa_node(folder.path(), "0000:86:00.0"), None, "-1 means unknown");
        assert_eq!(numa_node(folder.path(), "0000:01:00.0"), None, "no such device");
        assert_eq!(numa_node(folder.path(), "../0000:3b:00.0"), None, "no path");
        assert_eq!(numa_node(folder.path(), ""), None);
    }

    #[test]
    fn a_string_of_the_driver_ends_at_its_nul_or_with_its_buffer() {
        let fill = |bytes: &'static [u8]| {
            // SAFETY: the tests' strings fit the buffer.
            move |buffer: *mut c_char, _| unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.cast(), bytes.len());
                Ok(())
            }
        };
        assert_eq!(text::<8>(fill(b"H200")).unwrap(), "H200");
        assert_eq!(text::<4>(fill(b"H200")).unwrap(), "H200");
    }
}
