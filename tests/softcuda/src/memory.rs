//! Device memory, pinned host memory, and what is known of a pointer.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::contexts::{current, handle_of};
use crate::driver::call;
use crate::ffi::{Code, In, Out};
use crate::machine::Role;
use crate::options::GRANULE;
use crate::os::{self, PAGE, Protection};
use crate::space::{Kind, Region};
use crate::work::poll;

/// `CU_MEMHOSTREGISTER_READ_ONLY`.
pub(crate) const READ_ONLY: u32 = 8;

/// What new memory begins with, so that nobody takes it for zeros.
pub(crate) static JUNK: [u8; 1 << 20] = [0xc5; 1 << 20];

/// New memory in a file, mapped where the kernel likes.
fn made(name: &str, bytes: u64) -> io::Result<(File, u64)> {
    let file = os::memory_file(name, bytes)?;
    file.write_all_at(&JUNK[..JUNK.len().min(bytes as usize)], 0)?;
    let base = os::map(&file, bytes, Protection::ReadWrite)?;
    Ok((file, base))
}

pub(crate) fn out_of_memory(error: &io::Error) -> Code {
    crate::say(&format!("host memory for a device could not be had: {error}\n"));
    Code::OUT_OF_MEMORY
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) -> u32 {
    call("cuMemGetInfo_v2", |driver| {
        let device = current(driver)?;
        let used = driver.machine.used(device);
        free.set(driver.options.memory.saturating_sub(used) as usize)?;
        total.set(driver.options.memory as usize)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemAlloc_v2(pointer: Out<u64>, bytes: usize) -> u32 {
    call("cuMemAlloc_v2", |driver| {
        let device = current(driver)?;
        driver.forbid_in_captures()?;
        if bytes == 0 || pointer.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        if let Some(code) = driver.faults.strikes("oom") {
            return Err(code.unwrap_or(Code::OUT_OF_MEMORY));
        }
        let whole = (bytes as u64).checked_next_multiple_of(PAGE).ok_or(Code::OUT_OF_MEMORY)?;
        let taken = (bytes as u64).checked_next_multiple_of(GRANULE).ok_or(Code::OUT_OF_MEMORY)?;
        let id = driver.machine.new_id();
        driver.machine.hold(Role::Owner, device, id, taken).map_err(|_| Code::OUT_OF_MEMORY)?;
        let (file, base) = made("softcuda-alloc", whole).map_err(|error| {
            driver.machine.release(Role::Owner, id);
            out_of_memory(&error)
        })?;
        driver.space.insert(Region::new(base, bytes as u64, device, Kind::Device { file, id }));
        pointer.set(base)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemFree_v2(pointer: u64) -> u32 {
    call("cuMemFree_v2", |driver| {
        if pointer == 0 {
            return Ok(());
        }
        let Some(region) = driver.space.based_at(pointer, |kind| matches!(kind, Kind::Device { .. })) else {
            driver
                .violations
                .add("cuMemFree_v2", &format!("{pointer:#x} is not the base of an allocation in use"));
            return Err(Code::INVALID_VALUE);
        };
        driver.drain_for(&region)?;
        if let Kind::Device { id, .. } = &region.kind {
            crate::ipc::check_importers(driver, "cuMemFree_v2", *id);
            driver.machine.release(Role::Owner, *id);
        }
        driver.space.remove(&region, true);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemHostAlloc(pointer: Out<u64>, bytes: usize, flags: u32) -> u32 {
    call("cuMemHostAlloc", |driver| {
        let device = current(driver)?;
        driver.forbid_in_captures()?;
        if bytes == 0 || pointer.is_null() || flags & !7 != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let whole = (bytes as u64).checked_next_multiple_of(PAGE).ok_or(Code::OUT_OF_MEMORY)?;
        let (_, base) = made("softcuda-pinned", whole).map_err(|error| out_of_memory(&error))?;
        driver.space.insert(Region::new(base, bytes as u64, device, Kind::Pinned { flags }));
        pointer.set(base)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemFreeHost(pointer: u64) -> u32 {
    call("cuMemFreeHost", |driver| {
        let Some(region) = driver.space.based_at(pointer, |kind| matches!(kind, Kind::Pinned { .. })) else {
            driver
                .violations
                .add("cuMemFreeHost", &format!("{pointer:#x} is not the base of pinned memory in use"));
            return Err(Code::INVALID_VALUE);
        };
        driver.drain_for(&region)?;
        driver.space.remove(&region, true);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemHostGetDevicePointer_v2(
    device_pointer: Out<u64>,
    pointer: u64,
    flags: u32,
) -> u32 {
    call("cuMemHostGetDevicePointer_v2", |driver| {
        current(driver)?;
        let region = driver.space.at(pointer).ok_or(Code::INVALID_VALUE)?;
        // A range must have been made with DEVICEMAP; with unified addresses pinned memory is mapped all the same.
        let mapped = match region.kind {
            Kind::Pinned { flags } => driver.options.has("unified") || flags & 2 != 0,
            Kind::Registered { flags } => flags & 2 != 0,
            _ => false,
        };
        if flags != 0 || !mapped {
            return Err(Code::INVALID_VALUE);
        }
        device_pointer.set(pointer)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemHostGetFlags(flags: Out<u32>, pointer: u64) -> u32 {
    call("cuMemHostGetFlags", |driver| match driver.space.at(pointer).as_deref() {
        Some(Region { kind: Kind::Pinned { flags: made } | Kind::Registered { flags: made }, .. }) => {
            flags.set(*made)
        }
        _ => Err(Code::INVALID_VALUE),
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemHostRegister_v2(pointer: u64, bytes: usize, flags: u32) -> u32 {
    call("cuMemHostRegister_v2", |driver| {
        let device = current(driver)?;
        driver.forbid_in_captures()?;
        let bytes = bytes as u64;
        if pointer == 0 || bytes == 0 || flags & !0xf != 0 || pointer.checked_add(bytes).is_none() {
            return Err(Code::INVALID_VALUE);
        }
        let able = driver.options.has("host_register")
            && (flags & READ_ONLY == 0 || driver.options.has("read_only_register"));
        if !able {
            return Err(Code::NOT_SUPPORTED);
        }
        if let Some(code) = driver.faults.strikes("register-fails") {
            return Err(code.unwrap_or(Code::OUT_OF_MEMORY));
        }
        if driver.space.overlaps(pointer, bytes) {
            return Err(Code::HOST_MEMORY_ALREADY_REGISTERED);
        }
        let (mapped, writable) = os::mapped_and_writable(pointer, bytes);
        if !mapped || (!writable && flags & READ_ONLY == 0) {
            return Err(Code::INVALID_VALUE);
        }
        driver.space.insert(Region::new(pointer, bytes, device, Kind::Registered { flags }));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemHostUnregister(pointer: u64) -> u32 {
    call("cuMemHostUnregister", |driver| {
        let Some(region) = driver.space.based_at(pointer, |kind| matches!(kind, Kind::Registered { .. }))
        else {
            driver
                .violations
                .add("cuMemHostUnregister", &format!("{pointer:#x} is not the base of registered memory"));
            return Err(Code::HOST_MEMORY_NOT_REGISTERED);
        };
        if region.is_busy() {
            driver.violations.add(
                "cuMemHostUnregister",
                &format!("{pointer:#x} is unregistered with operations on it in flight"),
            );
        }
        // Only those: a stream that waits for something else need not end for this.
        poll(driver, || !region.is_busy());
        if !os::mapped_and_writable(region.base, region.bytes).0 {
            driver
                .violations
                .add("cuMemHostUnregister", &format!("{pointer:#x} was unmapped while it was registered"));
        }
        driver.space.remove(&region, false);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemGetAddressRange_v2(base: Out<u64>, bytes: Out<usize>, pointer: u64) -> u32 {
    call("cuMemGetAddressRange_v2", |driver| {
        let region =
            driver.space.at(pointer).filter(|region| region.kind.is_device()).ok_or(Code::NOT_FOUND)?;
        base.offer(region.base);
        bytes.offer(region.bytes as usize);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuPointerGetAttribute(data: Out<c_void>, attribute: u32, pointer: u64) -> u32 {
    call("cuPointerGetAttribute", |driver| {
        let region = driver.space.at(pointer).ok_or(Code::INVALID_VALUE)?;
        let device = region.kind.is_device();
        match attribute {
            1 => data.cast().set(handle_of(region.device)),       // CONTEXT
            2 => data.cast().set(if device { 2_u32 } else { 1 }), // MEMORY_TYPE: device or host
            3 => data.cast().set(pointer),                        // DEVICE_POINTER
            4 if !device => data.cast().set(pointer),             // HOST_POINTER
            8 => data.cast().set(0_u8),                           // IS_MANAGED
            9 => data.cast().set(region.device as i32),           // DEVICE_ORDINAL
            // IS_LEGACY_CUDA_IPC_CAPABLE
            10 => data
                .cast()
                .set(u8::from(matches!(region.kind, Kind::Device { .. }) && driver.options.has("ipc"))),
            11 => data.cast().set(region.base), // RANGE_START_ADDR
            12 => data.cast().set(region.bytes as usize), // RANGE_SIZE
            13 => data.cast().set(1_u8),        // MAPPED
            _ => Err(Code::INVALID_VALUE),
        }
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuPointerGetAttributes(
    count: u32,
    attributes: In<u32>,
    data: In<Out<c_void>>,
    at: u64,
) -> u32 {
    call("cuPointerGetAttributes", |_| {
        for index in 0..count as usize {
            // An attribute that a pointer lacks leaves its place as it is, as the driver documents.
            let _ = cuPointerGetAttribute(data.at(index)?, attributes.at(index)?, at);
        }
        Ok(())
    })
}
