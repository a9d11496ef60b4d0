//! Handles of device memory between processes.
//!
//! A handle names the process, the descriptor and the file behind an allocation; the importer opens that through
//! `/proc`, as the driver's own hand-over in the kernel needs the exporter alive too.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::contexts::current;
use crate::driver::{Driver, call};
use crate::ffi::{Code, Out, Outcome};
use crate::machine::Role;
use crate::options::GRANULE;
use crate::os::{self, Protection};
use crate::space::{Kind, Region};

/// What a handle's 64 bytes say.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Handle {
    magic: u32,
    pid: u32,
    started: u64,
    fd: i32,
    device: u32,
    inode: u64,
    id: u64,
    bytes: u64,
    rest: [u64; 2],
}
const _: () = assert!(size_of::<Handle>() == 64);

/// Handles of memory and of events begin with these.
const MEMORY: u32 = 0x5c4d_454d;
const EVENT: u32 = 0x5c45_5654;

/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`, the only flag there is.
const LAZY_PEER_ACCESS: u32 = 1;

impl Handle {
    fn new(driver: &Driver, magic: u32, file: &File, device: u32, id: u64, bytes: u64) -> Outcome<Self> {
        let inode = file.metadata().map_err(|_| Code::OPERATING_SYSTEM)?.ino();
        let (pid, started) = driver.machine.me();
        Ok(Self { magic, pid, started, fd: file.as_raw_fd(), device, inode, id, bytes, rest: [0; 2] })
    }

    /// Handle of an event whose state lies in this file.
    pub(crate) fn of_event(driver: &Driver, file: &File, device: u32) -> Outcome<Self> {
        Self::new(driver, EVENT, file, device, 0, 0)
    }

    /// Opens the file of another process's event.
    pub(crate) fn open_event(self, driver: &Driver, call: &str) -> Outcome<File> {
        if self.magic != EVENT {
            return Err(Code::INVALID_VALUE);
        }
        self.open(driver, call)
    }

    /// Opens the file behind the handle.
    fn open(&self, driver: &Driver, call: &str) -> Outcome<File> {
        if self.pid == driver.machine.me().0 {
            // The driver goes by the number alone, so two first processes of two containers cannot share either.
            return Err(Code::INVALID_CONTEXT);
        }
        if os::started(self.pid) != Some(self.started) {
            return Err(Code::INVALID_HANDLE);
        }
        let path = format!("/proc/{}/fd/{}", self.pid, self.fd);
        let file = OpenOptions::new().read(true).write(true).open(path).ok();
        let file = file.filter(|file| file.metadata().is_ok_and(|meta| meta.ino() == self.inode));
        file.ok_or_else(|| {
            driver
                .violations
                .add(call, &format!("the handle is of something that process {} has freed", self.pid));
            Code::INVALID_HANDLE
        })
    }
}

/// Freeing what others have open is undefined.
pub(crate) fn check_importers(driver: &Driver, call: &str, id: u64) {
    let importers = driver.machine.importers(id);
    if !importers.is_empty() {
        driver.violations.add(call, &format!("freed an allocation that processes {importers:?} have open"));
    }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuIpcGetMemHandle(handle: Out<Handle>, pointer: u64) -> u32 {
    call("cuIpcGetMemHandle", |driver| {
        current(driver)?;
        if !driver.options.has("ipc") {
            return Err(Code::NOT_SUPPORTED);
        }
        let region = driver.space.based_at(pointer, |kind| matches!(kind, Kind::Device { .. }));
        let region = region.ok_or(Code::INVALID_VALUE)?;
        let Kind::Device { file, id } = &region.kind else { return Err(Code::INVALID_VALUE) };
        if !region.bytes.is_multiple_of(GRANULE) {
            let what = format!(
                "a handle of {} bytes, not a multiple of 2 MiB, exposes its neighbours",
                region.bytes
            );
            driver.violations.add("cuIpcGetMemHandle", &what);
        }
        handle.set(Handle::new(driver, MEMORY, file, region.device, *id, region.bytes)?)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuIpcOpenMemHandle_v2(pointer: Out<u64>, handle: Handle, flags: u32) -> u32 {
    call("cuIpcOpenMemHandle_v2", |driver| {
        let device = current(driver)?;
        if !driver.options.has("ipc") {
            return Err(Code::NOT_SUPPORTED);
        }
        if handle.magic != MEMORY || flags != LAZY_PEER_ACCESS || pointer.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        if handle.device != device {
            return Err(Code::PEER_ACCESS_UNSUPPORTED);
        }
        if let Some(region) = driver.space.imported(handle.id)
            && let Kind::Imported { opened, .. } = &region.kind
        {
            opened.fetch_add(1, Ordering::SeqCst);
            return pointer.set(region.base);
        }
        let file = handle.open(driver, "cuIpcOpenMemHandle_v2")?;
        let whole = file.metadata().map_err(|_| Code::MAP_FAILED)?.size();
        if handle.bytes == 0 || handle.bytes > whole {
            return Err(Code::INVALID_VALUE);
        }
        if driver.options.folder.is_some() && !driver.machine.is_owned(handle.id) {
            driver
                .violations
                .add("cuIpcOpenMemHandle_v2", "the handle is of memory that its process has freed");
            return Err(Code::INVALID_HANDLE);
        }
        let held = driver.machine.hold(Role::Importer, device, handle.id, handle.bytes);
        held.map_err(|_| Code::OUT_OF_MEMORY)?;
        let base = os::map(&file, whole, Protection::ReadWrite).map_err(|_| {
            driver.machine.release(Role::Importer, handle.id);
            Code::MAP_FAILED
        })?;
        let kind = Kind::Imported { id: handle.id, opened: AtomicU32::new(1) };
        driver.space.insert(Region::new(base, handle.bytes, device, kind));
        pointer.set(base)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuIpcCloseMemHandle(pointer: u64) -> u32 {
    call("cuIpcCloseMemHandle", |driver| {
        let Some(region) = driver.space.based_at(pointer, |kind| matches!(kind, Kind::Imported { .. }))
        else {
            driver
                .violations
                .add("cuIpcCloseMemHandle", &format!("{pointer:#x} was not opened from a handle"));
            return Err(Code::INVALID_VALUE);
        };
        let Kind::Imported { id, opened } = &region.kind else { return Err(Code::INVALID_VALUE) };
        if opened.fetch_sub(1, Ordering::SeqCst) > 1 {
            return Ok(());
        }
        driver.drain_for(&region)?;
        driver.machine.release(Role::Importer, *id);
        driver.space.remove(&region, true);
        Ok(())
    })
}
