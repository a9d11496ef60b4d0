//! Memory that two processes share.
//!
//! A peer can write to such memory at any time, so it is treated as lying outside the language's memory model:
//! no reference or slice into it ever exists, payloads are copied word by word with volatile accesses, and
//! single words are loaded with acquire and stored with release. There is no read-modify-write on a word that a
//! peer can write. This module is the only place that does any of this; everything else works on copies.
//!
//! Files are memfds. [`Memfd::seal`] fixes their size for good, so that no peer can make us fault by truncating
//! one, and can forbid new writable mappings ([`Seals::frozen_for_readers`]), which makes a memfd readable only
//! for whoever receives it afterwards.

pub mod holes;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::{Advice, MmapMut, MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use thiserror::Error;

use crate::faults::{self, Point};

/// What can be wrong with shared memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The operating system refused.
    #[error("cannot {what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// An access outside a mapping.
    #[error("{bytes} bytes at offset {offset} lie outside a mapping of {len} bytes")]
    OutOfBounds {
        /// Offset of the access, in bytes.
        offset: usize,
        /// Length of the access, in bytes.
        bytes: usize,
        /// Length of the mapping, in bytes.
        len: usize,
    },
    /// More memory for tables and digests than the daemon sets aside.
    #[error("tables and digests need {wanted} bytes more and {free} are free for them")]
    Budget {
        /// Bytes that were wanted.
        wanted: u64,
        /// Bytes that are left.
        free: u64,
    },
    /// A file descriptor that is no sealed memfd of the right size.
    #[error(
        "the peer's memfd has seals {found:#x} and {len} bytes where seals {wanted:#x} and {wanted_len} bytes are needed"
    )]
    BadSeals {
        /// Seals it carries, as `F_GET_SEALS` gives them.
        found: i32,
        /// Seals it must carry.
        wanted: i32,
        /// Its length in bytes.
        len: usize,
        /// The length that was agreed on, in bytes.
        wanted_len: usize,
    },
}

/// See [`crate::faults`].
fn fault(point: Point, what: &'static str) -> Result<(), MemoryError> {
    faults::check(point).map_err(|source| MemoryError::Os { what, source })
}

fn os(what: &'static str) -> impl Fn(nix::Error) -> MemoryError {
    move |errno| MemoryError::Os { what, source: errno.into() }
}

/// Which seals a memfd gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seals(SealFlag);

impl Seals {
    /// The size is fixed from now on, and more seals may follow (a ring that its writer has yet to map).
    #[must_use]
    pub fn size_only() -> Self {
        Self(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW)
    }

    /// The size is fixed; both sides may write (arena extents).
    #[must_use]
    pub fn fixed_size() -> Self {
        Self(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL)
    }

    /// The size is fixed and whoever has not yet mapped it for writing never can (rings, tables, slabs). It also
    /// forbids punching holes.
    #[must_use]
    pub fn frozen_for_readers() -> Self {
        Self(Self::fixed_size().0 | SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE))
    }
}

/// An anonymous file in memory.
#[derive(Debug)]
pub struct Memfd {
    fd: OwnedFd,
    len: usize,
}

impl Memfd {
    /// Creates a zeroed memfd of `len` bytes that can be sealed.
    pub fn create(name: &str, len: usize) -> Result<Self, MemoryError> {
        let name = CString::new(name.replace('\0', "")).unwrap_or_default();
        fault(Point::Memfd, "create a memfd")?;
        let fd = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
            .map_err(os("create a memfd"))?;
        fault(Point::MemfdSize, "size a memfd")?;
        nix::unistd::ftruncate(&fd, len as i64).map_err(os("size a memfd"))?;
        Ok(Self { fd, len })
    }

    /// As [`Memfd::create`], of huge pages of 2 MiB: `len` is a multiple of them. They are reserved when it is mapped,
    /// which fails if the system has not so many.
    pub fn create_huge(name: &str, len: usize) -> Result<Self, MemoryError> {
        let name = CString::new(name.replace('\0', "")).unwrap_or_default();
        let flags = MFdFlags::MFD_CLOEXEC
            | MFdFlags::MFD_ALLOW_SEALING
            | MFdFlags::MFD_HUGETLB
            | MFdFlags::MFD_HUGE_2MB;
        let fd = memfd_create(name.as_c_str(), flags).map_err(os("create a memfd of huge pages"))?;
        nix::unistd::ftruncate(&fd, len as i64).map_err(os("size a memfd of huge pages"))?;
        Ok(Self { fd, len })
    }

    /// Takes a memfd from a peer: it must have exactly `len` bytes and at least the given seals.
    pub fn from_peer(fd: OwnedFd, len: usize, seals: Seals) -> Result<Self, MemoryError> {
        let found = fcntl(&fd, FcntlArg::F_GET_SEALS).map_err(os("read the seals of a peer's memfd"))?;
        let stat = nix::sys::stat::fstat(&fd).map_err(os("stat a peer's memfd"))?;
        let actual = usize::try_from(stat.st_size).unwrap_or(0);
        if found & seals.0.bits() != seals.0.bits() || actual != len {
            return Err(MemoryError::BadSeals {
                found,
                wanted: seals.0.bits(),
                len: actual,
                wanted_len: len,
            });
        }
        Ok(Self { fd, len })
    }

    /// Adds seals and checks that they hold.
    pub fn seal(&self, seals: Seals) -> Result<(), MemoryError> {
        fault(Point::Seal, "seal a memfd")?;
        fcntl(&self.fd, FcntlArg::F_ADD_SEALS(seals.0)).map_err(os("seal a memfd"))?;
        let found = fcntl(&self.fd, FcntlArg::F_GET_SEALS).map_err(os("read seals"))?;
        if found & seals.0.bits() == seals.0.bits() {
            Ok(())
        } else {
            Err(MemoryError::BadSeals { found, wanted: seals.0.bits(), len: self.len, wanted_len: self.len })
        }
    }

    /// Copies its bytes out without mapping it: a hole or a missing page of a peer's file is zeros or an error here, and
    /// never a fault.
    pub fn read_out(&self) -> Result<Vec<u8>, MemoryError> {
        use std::os::unix::fs::FileExt;
        let fail = |source| MemoryError::Os { what: "read a peer's memfd", source };
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(self.len).map_err(|error| fail(io::Error::other(error)))?;
        bytes.resize(self.len, 0);
        let file = std::fs::File::from(self.fd.try_clone().map_err(fail)?);
        file.read_exact_at(&mut bytes, 0).map_err(fail)?;
        Ok(bytes)
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Another descriptor for the same file.
    pub fn try_clone(&self) -> Result<OwnedFd, MemoryError> {
        fault(Point::Duplicate, "duplicate a memfd")?;
        self.fd.try_clone().map_err(|source| MemoryError::Os { what: "duplicate a memfd", source })
    }

    /// Maps it for reading and writing; `populate` faults every page in now.
    pub fn map(&self, populate: bool) -> Result<SharedMapping, MemoryError> {
        fault(Point::Map, "map shared memory")?;
        let mut options = MmapOptions::new();
        options.len(self.len);
        if populate {
            options.populate();
        }
        let map = options
            .map_raw(self.fd.as_raw_fd())
            .map_err(|source| MemoryError::Os { what: "map shared memory", source })?;
        Ok(SharedMapping { map, writable: true })
    }

    /// Maps it for reading only.
    pub fn map_read_only(&self) -> Result<SharedMapping, MemoryError> {
        fault(Point::Map, "map shared memory")?;
        let map = MmapOptions::new()
            .len(self.len)
            .map_raw_read_only(self.fd.as_raw_fd())
            .map_err(|source| MemoryError::Os { what: "map shared memory for reading", source })?;
        Ok(SharedMapping { map, writable: false })
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A mapping that a peer may write to at any time.
///
/// Accesses are by offset and checked; words must be aligned to their size.
#[derive(Debug)]
pub struct SharedMapping {
    map: MmapRaw,
    writable: bool,
}

impl SharedMapping {
    /// Whether it can be written to.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.len() == 0
    }

    /// Address of `bytes` bytes at `offset`, for copy engines and attention kernels, which take raw memory.
    pub fn address(&self, offset: usize, bytes: usize) -> Result<*mut u8, MemoryError> {
        let end = offset.checked_add(bytes);
        if end.is_none_or(|end| end > self.map.len()) {
            return Err(MemoryError::OutOfBounds { offset, bytes, len: self.map.len() });
        }
        // SAFETY: offset + bytes <= len was just checked, so the result stays inside this mapping.
        Ok(unsafe { self.map.as_mut_ptr().add(offset) })
    }

    fn word(&self, offset: usize, bytes: usize, write: bool) -> *mut u8 {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.map.len());
        assert!(
            inside && offset.is_multiple_of(bytes) && (self.writable || !write),
            "word of {bytes} bytes at {offset} in a mapping of {} bytes (write: {write})",
            self.map.len()
        );
        // SAFETY: the offset was just checked to lie inside the mapping.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }

    /// Loads a word with acquire ordering. Offsets of words are our own constants: a bad one is a bug and panics.
    #[must_use]
    pub fn load_u32(&self, offset: usize) -> u32 {
        let word = self.word(offset, 4, false).cast::<u32>();
        // SAFETY: `word` is aligned, inside a live mapping, and only ever accessed atomically on both sides.
        unsafe { AtomicU32::from_ptr(word) }.load(Ordering::Acquire)
    }

    /// Stores a word with release ordering.
    pub fn store_u32(&self, offset: usize, value: u32) {
        let word = self.word(offset, 4, true).cast::<u32>();
        // SAFETY: as in `load_u32`; the mapping is writable, which `word` checked.
        unsafe { AtomicU32::from_ptr(word) }.store(value, Ordering::Release);
    }

    /// Loads a 64-bit word with acquire ordering.
    #[must_use]
    pub fn load_u64(&self, offset: usize) -> u64 {
        let word = self.word(offset, 8, false).cast::<u64>();
        // SAFETY: as in `load_u32`, with 8-byte alignment.
        unsafe { AtomicU64::from_ptr(word) }.load(Ordering::Acquire)
    }

    /// Stores a 64-bit word with release ordering.
    pub fn store_u64(&self, offset: usize, value: u64) {
        let word = self.word(offset, 8, true).cast::<u64>();
        // SAFETY: as in `store_u32`, with 8-byte alignment.
        unsafe { AtomicU64::from_ptr(word) }.store(value, Ordering::Release);
    }

    /// The address of a futex word, for the futex system calls only.
    pub(crate) fn futex_word(&self, offset: usize) -> *mut u32 {
        self.word(offset, 4, false).cast::<u32>()
    }

    /// Copies out of shared memory, once, into memory of our own.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.address(offset, into.len())?.cast_const();
        // SAFETY: `address` checked that the whole source range lies inside the mapping.
        unsafe { copy_out(from, into) };
        Ok(())
    }

    /// Copies into shared memory.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), MemoryError> {
        let into = self.address(offset, from.len())?;
        assert!(self.writable, "a write into a mapping that is read-only");
        // SAFETY: `address` checked that the whole destination range lies inside the mapping, which is writable.
        unsafe { copy_in(into, from) };
        Ok(())
    }

    /// Reads one plain value.
    pub fn read_pod<T: bytemuck::Pod>(&self, offset: usize) -> Result<T, MemoryError> {
        let mut value = T::zeroed();
        self.read(offset, bytemuck::bytes_of_mut(&mut value))?;
        Ok(value)
    }

    /// Writes one plain value.
    pub fn write_pod<T: bytemuck::Pod>(&self, offset: usize, value: &T) -> Result<(), MemoryError> {
        self.write(offset, bytemuck::bytes_of(value))
    }

    /// Locks the pages into memory. Fails with the system's word when the memlock limit is too small.
    pub fn lock(&self) -> io::Result<()> {
        faults::check(Point::Lock)?;
        self.map.lock()
    }

    /// Undoes [`SharedMapping::lock`]. Dropping the mapping does so too.
    pub fn unlock(&self) -> io::Result<()> {
        self.map.unlock()
    }

    /// Advises the kernel to back it with transparent huge pages. What it makes of that is its own affair.
    pub fn advise_huge(&self) -> io::Result<()> {
        self.map.advise(Advice::HugePage)
    }

    /// Has all pages made now, for writing. Memory that cannot be had is an error here, where a later access would
    /// end the process.
    pub fn populate(&self) -> Result<(), MemoryError> {
        match self.map.advise(Advice::PopulateWrite) {
            // Kernels before 5.14 do not know the advice.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.zero(),
            result => result.map_err(|source| MemoryError::Os { what: "populate shared memory", source }),
        }
    }

    /// Writes zeros over all of it.
    pub fn zero(&self) -> Result<(), MemoryError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        for offset in (0..self.len()).step_by(ZEROS.len()) {
            self.write(offset, &ZEROS[..ZEROS.len().min(self.len() - offset)])?;
        }
        Ok(())
    }

    /// Has pages that are not there yet made on this NUMA node while it has room, else on others. It holds for every
    /// process that maps the file.
    pub fn prefer_node(&self, node: u32) -> Result<(), MemoryError> {
        /// Words of a mask for 1,024 nodes, as many as the kernel can have.
        const WORDS: usize = 1024 / libc::c_ulong::BITS as usize;
        let mut mask: [libc::c_ulong; WORDS] = [0; WORDS];
        let (word, bit) = (node / libc::c_ulong::BITS, node % libc::c_ulong::BITS);
        let source = match mask.get_mut(word as usize) {
            None => io::Error::from_raw_os_error(libc::EINVAL),
            Some(word) => {
                *word = 1 << bit;
                // SAFETY: the range is exactly this live mapping, and the kernel reads as many bits of the mask as
                // the array has (it takes one less than it is told).
                let done = unsafe {
                    libc::syscall(
                        libc::SYS_mbind,
                        self.map.as_mut_ptr(),
                        self.map.len(),
                        libc::MPOL_PREFERRED,
                        mask.as_ptr(),
                        WORDS * libc::c_ulong::BITS as usize + 1,
                        0,
                    )
                };
                if done == 0 {
                    return Ok(());
                }
                io::Error::last_os_error()
            }
        };
        Err(MemoryError::Os { what: "bind shared memory to a NUMA node", source })
    }
}

/// Copies shared memory into a private buffer, eight bytes at a time where both are aligned alike.
///
/// # Safety
/// `from` must be readable for `into.len()` bytes.
unsafe fn copy_out(from: *const u8, into: &mut [u8]) {
    let (mut done, len) = (0, into.len());
    while done < len && !(from as usize + done).is_multiple_of(8) {
        // SAFETY: done < len, so the byte is inside the caller's range.
        into[done] = unsafe { from.add(done).read_volatile() };
        done += 1;
    }
    while done + 8 <= len {
        // SAFETY: eight bytes from `done` are inside the range, and from + done is 8-aligned here.
        let word = unsafe { from.add(done).cast::<u64>().read_volatile() };
        into[done..done + 8].copy_from_slice(&word.to_ne_bytes());
        done += 8;
    }
    while done < len {
        // SAFETY: done < len.
        into[done] = unsafe { from.add(done).read_volatile() };
        done += 1;
    }
}

/// Copies a private buffer into shared memory.
///
/// # Safety
/// `into` must be writable for `from.len()` bytes.
unsafe fn copy_in(into: *mut u8, from: &[u8]) {
    let (mut done, len) = (0, from.len());
    while done < len && !(into as usize + done).is_multiple_of(8) {
        // SAFETY: done < len, so the byte is inside the caller's range.
        unsafe { into.add(done).write_volatile(from[done]) };
        done += 1;
    }
    while done + 8 <= len {
        let mut word = [0; 8];
        word.copy_from_slice(&from[done..done + 8]);
        // SAFETY: eight bytes from `done` are inside the range, and into + done is 8-aligned here.
        unsafe { into.add(done).cast::<u64>().write_volatile(u64::from_ne_bytes(word)) };
        done += 8;
    }
    while done < len {
        // SAFETY: done < len.
        unsafe { into.add(done).write_volatile(from[done]) };
        done += 1;
    }
}

/// A memfd that only this process writes: page tables, digests, counters.
///
/// It is a file, addressed by offset, so that it can outlive the process that fills it. Others may at most map
/// it for reading: the writable mapping is made first and new ones are then sealed off.
#[derive(Debug)]
pub struct OwnedFile {
    file: Memfd,
    map: MmapMut,
}

impl OwnedFile {
    /// Creates, maps and seals a zeroed file of `len` bytes.
    pub fn create(name: &str, len: usize) -> Result<Self, MemoryError> {
        let file = Memfd::create(name, len)?;
        // SAFETY: the file was created here and its descriptor has not been handed out: it is sealed against
        // resizing and against any further writable mapping before anyone else can see it.
        let map = unsafe { MmapOptions::new().len(len).map_mut(file.fd.as_raw_fd()) }
            .map_err(|source| MemoryError::Os { what: "map a file of our own", source })?;
        file.seal(Seals::frozen_for_readers())?;
        Ok(Self { file, map })
    }

    /// The file, to hand to a reader.
    #[must_use]
    pub fn file(&self) -> &Memfd {
        &self.file
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }

    /// Stores one aligned word with release ordering, so that a reader in another process sees it whole.
    pub fn publish_u32(&mut self, offset: usize, value: u32) {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.map.len(), "word {offset} outside the file");
        let word = self.map.as_mut_ptr().wrapping_add(offset).cast::<u32>();
        // SAFETY: aligned and inside the mapping (asserted); we hold the only writable mapping, exclusively.
        unsafe { AtomicU32::from_ptr(word) }.store(value, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // In builds of scripts/sanitize alone, which must find it.
    #[cfg(canary)]
    #[test]
    fn canary_reads_what_was_freed() {
        let freed = std::hint::black_box(Box::into_raw(Box::new(7_u8)));
        // SAFETY: the first is sound; the second is what AddressSanitizer is to end the process at.
        let read = unsafe { (drop(Box::from_raw(freed)), std::ptr::read_volatile(freed)).1 };
        eprintln!("{read} was read and nobody said a word");
    }

    #[test]
    fn a_sealed_memfd_can_be_neither_resized_nor_mapped_for_writing() {
        let file = Memfd::create("test", 8192).unwrap();
        let ours = file.map(true).unwrap();
        file.seal(Seals::frozen_for_readers()).unwrap();
        assert!(nix::unistd::ftruncate(file.as_fd(), 0).is_err());
        assert!(file.map(false).is_err(), "a new writable mapping must be refused");
        let theirs = file.map_read_only().unwrap();
        ours.store_u32(64, 7);
        assert_eq!(theirs.load_u32(64), 7);
        let punch = nix::fcntl::fallocate(
            file.as_fd(),
            nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
                | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE,
            0,
            4096,
        );
        assert!(punch.is_err(), "punching a hole must be refused");
    }

    #[test]
    fn a_peers_memfd_without_seals_or_of_another_size_is_refused() {
        let unsealed = Memfd::create("test", 4096).unwrap().try_clone().unwrap();
        assert!(matches!(
            Memfd::from_peer(unsealed, 4096, Seals::fixed_size()),
            Err(MemoryError::BadSeals { .. })
        ));
        let short = Memfd::create("test", 4096).unwrap();
        short.seal(Seals::fixed_size()).unwrap();
        let error = Memfd::from_peer(short.try_clone().unwrap(), 8192, Seals::fixed_size()).unwrap_err();
        assert!(error.to_string().contains("4096 bytes where"), "{error}");
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert!(matches!(Memfd::from_peer(pipe, 4096, Seals::fixed_size()), Err(MemoryError::Os { .. })));
    }

    #[test]
    fn an_access_past_the_end_is_an_error_even_when_the_sum_overflows() {
        let map = Memfd::create("test", 4096).unwrap().map(false).unwrap();
        let mut buffer = [0; 16];
        for offset in [4081, 4096, usize::MAX - 3, usize::MAX] {
            assert!(matches!(map.read(offset, &mut buffer), Err(MemoryError::OutOfBounds { .. })));
            assert!(matches!(map.write(offset, &buffer), Err(MemoryError::OutOfBounds { .. })));
        }
    }

    #[test]
    fn memory_is_populated_zeroed_and_bound_to_a_node_that_exists() {
        let map = Memfd::create("test", 3 * 4096 + 5).unwrap().map(false).unwrap();
        map.populate().unwrap();
        map.write(1, &[7; 3 * 4096]).unwrap();
        map.zero().unwrap();
        let mut back = vec![1; map.len()];
        map.read(0, &mut back).unwrap();
        assert!(back.iter().all(|byte| *byte == 0));
        let map = Memfd::create("test", 4096).unwrap().map(false).unwrap();
        match map.prefer_node(0) {
            // A kernel or container without NUMA policies.
            Err(MemoryError::Os { source, .. }) => {
                assert!(matches!(source.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)), "{source}");
            }
            result => result.unwrap(),
        }
        assert!(map.prefer_node(1023).is_err(), "no machine has so many nodes");
        assert!(map.prefer_node(1024).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_at_any_alignment_is_read_back(
            offset in 0usize..64, data in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let map = Memfd::create("test", 4096).unwrap().map(false).unwrap();
            map.write(offset, &data).unwrap();
            let mut back = vec![0; data.len()];
            map.read(offset, &mut back).unwrap();
            prop_assert_eq!(back, data);
        }
    }
}
