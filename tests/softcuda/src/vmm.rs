//! Physical memory, reserved addresses and what is mapped where; export as file descriptors.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::contexts::current;
use crate::devices::checked;
use crate::driver::{Driver, call, new_handle};
use crate::ffi::{Code, In, Out, Outcome};
use crate::machine::Role;
use crate::memory::{JUNK, out_of_memory};
use crate::options::GRANULE;
use crate::os::{self, Protection};
use crate::space::{Kind, Region};

/// `CUmemAllocationProp`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Properties {
    pub(crate) kind: u32,
    pub(crate) handle_types: u32,
    pub(crate) location: Location,
    pub(crate) metadata: u64,
    pub(crate) flags: u64,
}

/// `CUmemLocation`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Location {
    pub(crate) kind: u32,
    pub(crate) id: i32,
}

/// `CUmemAccessDesc`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct AccessOf {
    pub(crate) location: Location,
    pub(crate) flags: u32,
}

/// `CU_MEM_ALLOCATION_TYPE_PINNED`, `CU_MEM_LOCATION_TYPE_DEVICE`, `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
const PINNED: u32 = 1;
const DEVICE: u32 = 1;
const POSIX_FD: u32 = 1;

/// Names of the files of physical memory: this, the allocation's number and its device.
const NAME: &str = "softcuda-physical";

/// Physical memory that this process has a handle of.
#[derive(Debug)]
pub(crate) struct Physical {
    file: File,
    bytes: u64,
    device: u32,
    id: u64,
    shareable: bool,
    driver: &'static Driver,
}

impl Drop for Physical {
    fn drop(&mut self) {
        self.driver.machine.release(Role::Handle, self.id);
    }
}

/// The device that properties ask for, if they can be had.
fn device_of(driver: &Driver, properties: &Properties) -> Outcome<u32> {
    if !driver.options.has("vmm") {
        return Err(Code::NOT_SUPPORTED);
    }
    if properties.kind != PINNED
        || properties.location.kind != DEVICE
        || properties.handle_types & !POSIX_FD != 0
    {
        return Err(Code::INVALID_VALUE);
    }
    if properties.handle_types & POSIX_FD != 0 && !driver.options.has("posix_fd") {
        return Err(Code::NOT_SUPPORTED);
    }
    checked(driver, properties.location.id)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemGetAllocationGranularity(
    bytes: Out<usize>,
    properties: In<Properties>,
    _: u32,
) -> u32 {
    call("cuMemGetAllocationGranularity", |driver| {
        device_of(driver, &properties.get()?)?;
        bytes.set(GRANULE as usize)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemCreate(
    handle: Out<u64>,
    bytes: usize,
    properties: In<Properties>,
    flags: u64,
) -> u32 {
    call("cuMemCreate", |driver| {
        let properties = properties.get()?;
        let (device, bytes) = (device_of(driver, &properties)?, bytes as u64);
        if bytes == 0 || !bytes.is_multiple_of(GRANULE) || flags != 0 || handle.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        if let Some(code) = driver.faults.strikes("oom") {
            return Err(code.unwrap_or(Code::OUT_OF_MEMORY));
        }
        let id = driver.machine.new_id();
        driver.machine.hold(Role::Handle, device, id, bytes).map_err(|_| Code::OUT_OF_MEMORY)?;
        let made = os::memory_file(&format!("{NAME}-{id}-{device}"), bytes);
        let made = made.and_then(|file| file.write_all_at(&JUNK, 0).map(|()| file));
        let file = made.map_err(|error| {
            driver.machine.release(Role::Handle, id);
            out_of_memory(&error)
        })?;
        let shareable = properties.handle_types & POSIX_FD != 0;
        let made = new_handle();
        driver.physical.insert(made, Physical { file, bytes, device, id, shareable, driver });
        handle.set(made)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemRelease(handle: u64) -> u32 {
    call("cuMemRelease", |driver| driver.physical.take(driver, "cuMemRelease", handle).map(drop))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemExportToShareableHandle(
    to: Out<i32>,
    handle: u64,
    kind: u32,
    flags: u64,
) -> u32 {
    call("cuMemExportToShareableHandle", |driver| {
        let physical = driver.physical.get(driver, "cuMemExportToShareableHandle", handle)?;
        if kind != POSIX_FD || flags != 0 || !physical.shareable || to.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let copy = physical.file.try_clone().map_err(|_| Code::OPERATING_SYSTEM)?;
        to.set(copy.into_raw_fd())
    })
}

/// Which physical memory a descriptor is, by the name of its file.
fn identify(file: &File) -> Option<(u64, u32)> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    let name = name.to_str()?.strip_prefix("/memfd:")?.strip_prefix(NAME)?.strip_prefix('-')?.to_owned();
    let (id, device) = name.strip_suffix(" (deleted)").unwrap_or(&name).split_once('-')?;
    Some((id.parse().ok()?, device.parse().ok()?))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemImportFromShareableHandle(
    handle: Out<u64>,
    os_handle: usize,
    kind: u32,
) -> u32 {
    call("cuMemImportFromShareableHandle", |driver| {
        if !driver.options.has("vmm") || !driver.options.has("posix_fd") {
            return Err(Code::NOT_SUPPORTED);
        }
        let fd = i32::try_from(os_handle).ok().filter(|_| kind == POSIX_FD).ok_or(Code::INVALID_VALUE)?;
        // SAFETY: an fd of the caller's that is open during this call; one that is not gives an error below.
        let file = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().map(File::from);
        let file = file.map_err(|_| Code::INVALID_VALUE)?;
        let (id, device) = identify(&file).ok_or(Code::INVALID_VALUE)?;
        let bytes = file.metadata().map_err(|_| Code::INVALID_VALUE)?.size();
        driver.machine.hold(Role::Handle, device, id, bytes).map_err(|_| Code::OUT_OF_MEMORY)?;
        let made = new_handle();
        driver.physical.insert(made, Physical { file, bytes, device, id, shareable: true, driver });
        handle.set(made)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemAddressReserve(
    to: Out<u64>,
    bytes: usize,
    alignment: usize,
    _at: u64,
    flags: u64,
) -> u32 {
    call("cuMemAddressReserve", |driver| {
        let bytes = bytes as u64;
        let aligned = alignment == 0 || alignment.is_power_of_two();
        if !driver.options.has("vmm")
            || bytes == 0
            || !bytes.is_multiple_of(GRANULE)
            || !aligned
            || flags != 0
            || to.is_null()
        {
            return Err(Code::INVALID_VALUE);
        }
        let base = os::reserve(bytes, GRANULE.max(alignment as u64)).map_err(|_| Code::OUT_OF_MEMORY)?;
        driver.space.reservations().insert(base, bytes);
        to.set(base)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemAddressFree(at: u64, bytes: usize) -> u32 {
    call("cuMemAddressFree", |driver| {
        let bytes = bytes as u64;
        if driver.space.reservations().get(&at) != Some(&bytes) {
            return Err(Code::INVALID_VALUE);
        }
        if driver.space.overlaps(at, bytes) {
            driver.violations.add("cuMemAddressFree", &format!("{at:#x} still has memory mapped in it"));
            return Err(Code::INVALID_VALUE);
        }
        driver.space.reservations().remove(&at);
        os::unmap(at, bytes);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemMap(at: u64, bytes: usize, offset: usize, handle: u64, flags: u64) -> u32 {
    call("cuMemMap", |driver| {
        let physical = driver.physical.get(driver, "cuMemMap", handle)?;
        let (bytes, offset) = (bytes as u64, offset as u64);
        let reserved = driver.space.reservations().range(..=at).next_back().map(|(base, bytes)| base + bytes);
        let inside = reserved.is_some_and(|end| at.checked_add(bytes).is_some_and(|past| past <= end));
        let fits = offset == 0 && bytes == physical.bytes;
        if !inside || !fits || flags != 0 || !at.is_multiple_of(GRANULE) || driver.space.overlaps(at, bytes) {
            return Err(Code::INVALID_VALUE);
        }
        os::map_over(at, bytes, &physical.file, 0, Protection::None).map_err(|_| Code::MAP_FAILED)?;
        let device = physical.device;
        let kind = Kind::Mapped { physical: Arc::clone(&physical), access: AtomicU32::new(0) };
        driver.space.insert(Region::new(at, bytes, device, kind));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemUnmap(at: u64, bytes: usize) -> u32 {
    call("cuMemUnmap", |driver| {
        let mapped = driver.space.within(at, bytes as u64);
        let whole: u64 = mapped.iter().map(|region| region.bytes).sum();
        if whole != bytes as u64 || !mapped.iter().all(|region| matches!(region.kind, Kind::Mapped { .. })) {
            return Err(Code::INVALID_VALUE);
        }
        for region in mapped {
            if region.is_busy() {
                driver
                    .violations
                    .add("cuMemUnmap", &format!("{at:#x} is unmapped with operations on it in flight"));
            }
            driver.drain_for(&region)?;
            os::retire(region.base, region.bytes);
            driver.space.remove(&region, false);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemSetAccess(at: u64, bytes: usize, access_of: In<AccessOf>, count: usize) -> u32 {
    call("cuMemSetAccess", |driver| {
        current(driver)?;
        let mapped = driver.space.within(at, bytes as u64);
        let whole: u64 = mapped.iter().map(|region| region.bytes).sum();
        if whole != bytes as u64 || count == 0 {
            return Err(Code::INVALID_VALUE);
        }
        for index in 0..count {
            let wanted = access_of.at(index)?;
            checked(driver, wanted.location.id)?;
            let protection = match wanted.flags {
                0 => Protection::None,
                1 => Protection::Read,
                3 => Protection::ReadWrite,
                _ => return Err(Code::INVALID_VALUE),
            };
            for region in &mapped {
                let Kind::Mapped { access, physical } = &region.kind else { return Err(Code::INVALID_VALUE) };
                let right = wanted.location.kind == DEVICE && wanted.location.id == physical.device as i32;
                if !right {
                    return Err(Code::INVALID_VALUE);
                }
                os::protect(region.base, region.bytes, protection).map_err(|_| Code::OPERATING_SYSTEM)?;
                access.store(wanted.flags, Ordering::SeqCst);
            }
        }
        Ok(())
    })
}
