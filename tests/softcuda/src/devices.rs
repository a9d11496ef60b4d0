//! Initialisation, versions, devices and what they can do.

use std::ffi::c_char;

use crate::driver::{Driver, call};
use crate::ffi::{Code, In, Out, Outcome, status};
use crate::options::Options;

/// Checks an ordinal.
pub(crate) fn checked(driver: &Driver, device: i32) -> Outcome<u32> {
    u32::try_from(device).ok().filter(|device| *device < driver.options.devices).ok_or(Code::INVALID_DEVICE)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuInit(flags: u32) -> u32 {
    if flags != 0 {
        return Code::INVALID_VALUE.0;
    }
    status(Driver::init().and_then(|driver| {
        let lost = driver.faults.strikes("device-lost").is_some() && driver.failed().is_none();
        if driver.options.devices == 0 || lost { Err(Code::NO_DEVICE) } else { Ok(()) }
    }))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDriverGetVersion(version: Out<i32>) -> u32 {
    let found =
        Driver::get().map_or_else(|_| Options::from_environment().version, |driver| driver.options.version);
    status(version.set(found))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDeviceGetCount(count: Out<i32>) -> u32 {
    call("cuDeviceGetCount", |driver| count.set(driver.options.devices as i32))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDeviceGet(device: Out<i32>, ordinal: i32) -> u32 {
    call("cuDeviceGet", |driver| checked(driver, ordinal).and_then(|found| device.set(found as i32)))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDeviceGetName(name: Out<c_char>, room: i32, device: i32) -> u32 {
    call("cuDeviceGetName", |driver| {
        checked(driver, device)?;
        let slice = if driver.options.mig { " MIG 1g.2gb" } else { "" };
        name.set_text(&format!("softcuda{slice}"), usize::try_from(room).unwrap_or(0))
    })
}

/// The UUID of a device, the same in every process.
fn uuid(device: u32) -> [u8; 16] {
    let mut uuid = *b"softcuda-device-";
    uuid[15] = device as u8;
    uuid
}

fn give_uuid(name: &'static str, to: Out<[u8; 16]>, device: i32) -> u32 {
    call(name, |driver| checked(driver, device).and_then(|device| to.set(uuid(device))))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDeviceGetUuid(to: Out<[u8; 16]>, device: i32) -> u32 {
    give_uuid("cuDeviceGetUuid", to, device)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDeviceGetUuid_v2(to: Out<[u8; 16]>, device: i32) -> u32 {
    give_uuid("cuDeviceGetUuid_v2", to, device)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) -> u32 {
    call("cuDeviceTotalMem_v2", |driver| {
        checked(driver, device)?;
        bytes.set(driver.options.memory as usize)
    })
}

/// A PCI address whose bus is the ordinal and one.
fn pci_bus_id(device: u32) -> String {
    format!("0000:{:02X}:00.0", device + 1)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDeviceGetPCIBusId(name: Out<c_char>, room: i32, device: i32) -> u32 {
    call("cuDeviceGetPCIBusId", |driver| {
        let device = checked(driver, device)?;
        name.set_text(&pci_bus_id(device), usize::try_from(room).unwrap_or(0))
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDeviceGetByPCIBusId(device: Out<i32>, name: In<c_char>) -> u32 {
    call("cuDeviceGetByPCIBusId", |driver| {
        let name = name.text()?;
        let found = (0..driver.options.devices).find(|device| pci_bus_id(*device).eq_ignore_ascii_case(name));
        device.set(found.ok_or(Code::INVALID_DEVICE)? as i32)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDeviceGetAttribute(value: Out<i32>, attribute: u32, device: i32) -> u32 {
    call("cuDeviceGetAttribute", |driver| {
        let device = checked(driver, device)?;
        value.set(attribute_of(&driver.options, device, attribute).ok_or(Code::INVALID_VALUE)?)
    })
}

/// An attribute by its `CUdevice_attribute` number; those that nobody asks for are 0, as abilities a card lacks.
fn attribute_of(options: &Options, device: u32, attribute: u32) -> Option<i32> {
    let able = |name: &str| i32::from(options.has(name));
    let memops64 = i32::from(options.has("memops") && options.has("memops64"));
    let multiprocessors = if options.mig { 16 } else { 114 };
    Some(match attribute {
        0 | 150.. => return None,
        1..=3 => 1024,                          // MAX_THREADS_PER_BLOCK, MAX_BLOCK_DIM_X, _Y
        4 => 64,                                // MAX_BLOCK_DIM_Z
        5 => i32::MAX,                          // MAX_GRID_DIM_X
        6 | 7 => 65_535,                        // MAX_GRID_DIM_Y, _Z
        8 => 48 << 10,                          // MAX_SHARED_MEMORY_PER_BLOCK
        9 => 64 << 10,                          // TOTAL_CONSTANT_MEMORY
        10 => 32,                               // WARP_SIZE
        11 => i32::MAX,                         // MAX_PITCH
        12 | 82 => 65_536,                      // MAX_REGISTERS_PER_BLOCK, _PER_MULTIPROCESSOR
        13 => 1_500_000,                        // CLOCK_RATE in kHz
        15 => 1,                                // GPU_OVERLAP
        16 => multiprocessors,                  // MULTIPROCESSOR_COUNT
        19 => able("host_register"),            // CAN_MAP_HOST_MEMORY
        20 => 3 * i32::from(options.exclusive), // COMPUTE_MODE: 3 is one process alone
        31 | 32 => 1,                           // CONCURRENT_KERNELS, ECC_ENABLED
        33 => device as i32 + 1,                // PCI_BUS_ID
        36 => 2_600_000,                        // MEMORY_CLOCK_RATE in kHz
        37 => 5120,                             // GLOBAL_MEMORY_BUS_WIDTH
        38 => 50 << 20,                         // L2_CACHE_SIZE
        39 => 2048,                             // MAX_THREADS_PER_MULTIPROCESSOR
        40 => 3,                                // ASYNC_ENGINE_COUNT
        41 => able("unified"),                  // UNIFIED_ADDRESSING
        75 => 9,                                // COMPUTE_CAPABILITY_MAJOR
        78 => able("priorities"),               // STREAM_PRIORITIES_SUPPORTED
        81 => 228 << 10,                        // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
        91 => able("host_register"),            // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
        92 => able("memops"),                   // CAN_USE_STREAM_MEM_OPS_V1
        93 | 122 => memops64,                   // CAN_USE_64_BIT_STREAM_MEM_OPS, first and second form
        97 => 227 << 10,                        // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        99 => able("host_register"),            // HOST_REGISTER_SUPPORTED
        102 => able("vmm"),                     // VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        103 => able("posix_fd"),                // HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
        106 => 32,                              // MAX_BLOCKS_PER_MULTIPROCESSOR
        113 => able("read_only_register"),      // READ_ONLY_HOST_REGISTER_SUPPORTED
        123 => able("memops"),                  // CAN_USE_STREAM_WAIT_VALUE_NOR
        125 => able("ipc_events"),              // IPC_EVENT_SUPPORTED
        134 => -1,                              // HOST_NUMA_ID: the system's own tables say it
        _ => 0,
    })
}
