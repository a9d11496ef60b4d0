//! Memory files and mappings.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// Size of a page of this system.
pub(crate) const PAGE: u64 = 4096;

/// Milliseconds of a clock that all processes of a machine share.
pub(crate) fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// This process.
pub(crate) fn pid() -> u32 {
    std::process::id()
}

/// The kernel's flag of a process that is on its way out: set before its descriptors are closed.
const EXITING: u64 = 4;

/// When a process started, in ticks since boot: with its number it names a process for good. `None` if it has ended, or
/// has begun to: whoever sees its socket closed must find it gone.
pub(crate) fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = &stat[stat.rfind(')')? + 2..];
    let mut fields = after_name.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    if fields.nth(5)?.parse::<u64>().ok()? & EXITING != 0 {
        return None;
    }
    fields.nth(12)?.parse().ok()
}

/// A file in memory of this many bytes.
pub(crate) fn memory_file(name: &str, bytes: u64) -> io::Result<File> {
    let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
    // SAFETY: the name ends in a zero.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    Ok(file)
}

/// What a mapping may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    None,
    Read,
    ReadWrite,
}

impl Protection {
    fn bits(self) -> i32 {
        match self {
            Self::None => libc::PROT_NONE,
            Self::Read => libc::PROT_READ,
            Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

fn mapped(address: *mut libc::c_void) -> io::Result<u64> {
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address as u64) }
}

/// Reserves addresses that nothing is behind, aligned to `alignment` (a power of two).
pub(crate) fn reserve(bytes: u64, alignment: u64) -> io::Result<u64> {
    let alignment = alignment.max(PAGE);
    let whole = bytes + alignment;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new private mapping where the kernel chooses touches nobody's memory.
    let start =
        mapped(unsafe { libc::mmap(std::ptr::null_mut(), whole as usize, libc::PROT_NONE, flags, -1, 0) })?;
    let base = start.next_multiple_of(alignment);
    let (before, after) = (base - start, start + whole - (base + bytes));
    // SAFETY: both pieces belong to the mapping just made, and lie outside what is kept.
    unsafe {
        if before > 0 {
            libc::munmap(start as *mut _, before as usize);
        }
        if after > 0 {
            libc::munmap((base + bytes) as *mut _, after as usize);
        }
    }
    Ok(base)
}

/// Maps a file over addresses that this driver has reserved.
pub(crate) fn map_over(
    base: u64,
    bytes: u64,
    file: &File,
    offset: u64,
    protection: Protection,
) -> io::Result<()> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    // SAFETY: the addresses are a reservation of this driver's own, so nothing else is replaced.
    let address = unsafe {
        libc::mmap(base as *mut _, bytes as usize, protection.bits(), flags, file.as_raw_fd(), offset as i64)
    };
    mapped(address).map(|_| ())
}

/// Maps a file where the kernel likes, aligned to the granularity of devices.
pub(crate) fn map(file: &File, bytes: u64, protection: Protection) -> io::Result<u64> {
    let base = reserve(bytes, crate::options::GRANULE)?;
    if let Err(error) = map_over(base, bytes, file, 0, protection) {
        unmap(base, bytes);
        return Err(error);
    }
    Ok(base)
}

/// Changes what a mapping of this driver may be used for.
pub(crate) fn protect(base: u64, bytes: u64, protection: Protection) -> io::Result<()> {
    // SAFETY: the addresses are a mapping of this driver's own.
    if unsafe { libc::mprotect(base as *mut _, bytes as usize, protection.bits()) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Takes what is behind addresses away and keeps them reserved: whoever still uses them gets a fault.
pub(crate) fn retire(base: u64, bytes: u64) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the addresses are a mapping of this driver's own.
    unsafe { libc::mmap(base as *mut _, bytes as usize, libc::PROT_NONE, flags, -1, 0) };
}

/// Gives addresses of this driver's own back to the system.
pub(crate) fn unmap(base: u64, bytes: u64) {
    // SAFETY: the addresses are a mapping of this driver's own that nothing refers to any more.
    unsafe { libc::munmap(base as *mut _, bytes as usize) };
}

/// Whether each page of a range is mapped, and all of it writable, as the kernel's list says.
pub(crate) fn mapped_and_writable(base: u64, bytes: u64) -> (bool, bool) {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return (false, false) };
    let (mut reached, end, mut writable) = (base, base.saturating_add(bytes), true);
    for line in maps.lines() {
        let mut fields = line.split(' ');
        let Some((from, to)) = fields.next().and_then(|range| range.split_once('-')) else { continue };
        let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16)) else {
            continue;
        };
        let rights = fields.next().unwrap_or("");
        if to <= reached || from > reached {
            continue;
        }
        if !rights.starts_with('r') {
            return (false, false);
        }
        writable &= rights.as_bytes().get(1) == Some(&b'w');
        reached = to;
        if reached >= end {
            return (true, writable);
        }
    }
    (false, false)
}
