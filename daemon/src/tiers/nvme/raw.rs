//! Everything that follows the address of a frame, except for io_uring: vectored I/O by plain system calls, and
//! checksums of memory that a peer may write to while we read it.
//!
//! As in [`kvoyant_protocol::memory`], no reference to such memory ever exists: the checksum loads it word by word with
//! volatile accesses.

use std::fs::File;
use std::os::fd::AsRawFd;

use kvoyant_protocol::memory::{MemoryError, SharedMapping};
use nix::fcntl::{FallocateFlags, fallocate};

use super::operation::Kind;

/// The most vectors that one system call takes.
const VECTORS_MAX: usize = 1024;

/// Frames as the system wants them.
#[derive(Debug, Default)]
pub(super) struct Vectors(Vec<libc::iovec>);

// SAFETY: these are addresses and lengths, which nobody follows but the system calls that the owner makes while it
// keeps what they point to.
unsafe impl Send for Vectors {}

impl Vectors {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn push(&mut self, address: *mut u8, bytes: usize) {
        self.0.push(libc::iovec { iov_base: address.cast(), iov_len: bytes });
    }

    pub(super) fn as_slice(&self) -> &[libc::iovec] {
        &self.0[..self.0.len().min(VECTORS_MAX)]
    }
}

/// preadv or pwritev: bytes that were moved, or the negated error number. `vectors` are those of an operation that the
/// caller keeps meanwhile.
pub(super) fn transfer(file: &File, write: bool, vectors: &Vectors, position: u64) -> i32 {
    let Ok(position) = libc::off_t::try_from(position) else { return -libc::EFBIG };
    let vectors = vectors.as_slice();
    let count = vectors.len() as libc::c_int;
    // SAFETY: each vector lies in a mapping that the operation they were made from keeps (`Operation::vectors` has
    // checked it), and that operation outlives this call. The kernel copies, as it does for any peer's writes.
    let moved = unsafe {
        if write {
            libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), count, position)
        } else {
            libc::preadv(file.as_raw_fd(), vectors.as_ptr(), count, position)
        }
    };
    if moved < 0 { -errno() } else { moved as i32 }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// The mode of fallocate that does this.
pub(super) fn range_mode(kind: Kind) -> FallocateFlags {
    match kind {
        Kind::Zero => FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
        Kind::Punch => FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
        Kind::Allocate | Kind::Read | Kind::Write => FallocateFlags::empty(),
    }
}

/// Zeroes, punches or allocates a range: its bytes, or the negated error number.
pub(super) fn change_range(file: &File, kind: Kind, offset: u64, bytes: usize) -> i32 {
    match fallocate(file, range_mode(kind), offset as libc::off_t, bytes as libc::off_t) {
        Ok(()) => 0,
        Err(errno) => -(errno as i32),
    }
}

/// CRC-32C of a frame.
pub(super) fn checksum(memory: &SharedMapping, offset: usize, bytes: usize) -> Result<u32, MemoryError> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") && offset.is_multiple_of(8) {
        let address = memory.address(offset, bytes)?.cast_const();
        // SAFETY: `address` is readable for `bytes` bytes, as the mapping has just checked, and the processor has the
        // instruction.
        return Ok(unsafe { sse42::checksum(address, bytes) });
    }
    checksum_of_copy(memory, offset, bytes)
}

/// The specification: through a copy.
fn checksum_of_copy(memory: &SharedMapping, offset: usize, bytes: usize) -> Result<u32, MemoryError> {
    let mut buffer = [0; 4096];
    let (mut sum, mut done) = (0, 0);
    while done < bytes {
        let piece = &mut buffer[..(bytes - done).min(4096)];
        memory.read(offset + done, piece)?;
        sum = crc32c::crc32c_append(sum, piece);
        done += piece.len();
    }
    Ok(sum)
}

#[cfg(target_arch = "x86_64")]
mod sse42 {
    //! Four runs of the crc32 instruction at a time, which hide its latency of three cycles. A run's result is carried
    //! over the next run by tables. What was read from disk lies in no near cache, and the processor's own prefetching ends
    //! at each 4096 bytes, so the next ones are asked for here.

    use std::arch::x86_64::{_MM_HINT_T0, _mm_crc32_u64, _mm_prefetch};
    use std::sync::LazyLock;

    /// Bytes of a run.
    const RUN: usize = 1024;
    const RUNS: usize = 4;
    /// Bytes of a cache line.
    const LINE: usize = 64;

    /// What a checksum becomes over `RUN` zeros, by each of its bytes.
    static CARRY: LazyLock<[[u32; 256]; 4]> = LazyLock::new(|| {
        std::array::from_fn(|byte| {
            std::array::from_fn(|value| crc32c::crc32c_combine((value as u32) << (8 * byte), 0, RUN))
        })
    });

    fn carry(tables: &[[u32; 256]; 4], sum: u32) -> u32 {
        let bytes = sum.to_le_bytes();
        tables.iter().zip(bytes).fold(0, |carried, (table, byte)| carried ^ table[usize::from(byte)])
    }

    /// # Safety
    /// `from` must be readable for `bytes` bytes and a multiple of eight, and the processor must have SSE 4.2.
    #[target_feature(enable = "sse4.2")]
    pub(super) unsafe fn checksum(from: *const u8, bytes: usize) -> u32 {
        let word = |at: usize| -> u64 {
            debug_assert!(at + 8 <= bytes);
            // SAFETY: the loops below stay within `bytes`, and every `at` is a multiple of eight.
            unsafe { from.add(at).cast::<u64>().read_volatile() }
        };
        let tables = &*CARRY;
        let mut sum = u64::from(!0u32);
        let mut at = 0;
        while at + RUN * RUNS <= bytes {
            let (mut a, mut b, mut c, mut d) = (sum, 0, 0, 0);
            for line in (at..at + RUN).step_by(LINE) {
                for run in 0..RUNS {
                    // A prefetch is a hint: it may point anywhere, beyond the end too.
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line + (RUNS + run) * RUN).cast());
                }
                for step in (line..line + LINE).step_by(8) {
                    a = _mm_crc32_u64(a, word(step));
                    b = _mm_crc32_u64(b, word(step + RUN));
                    c = _mm_crc32_u64(c, word(step + 2 * RUN));
                    d = _mm_crc32_u64(d, word(step + 3 * RUN));
                }
            }
            let mut joined = a as u32;
            for next in [b, c, d] {
                joined = carry(tables, joined) ^ next as u32;
            }
            sum = u64::from(joined);
            at += RUN * RUNS;
        }
        while at + 8 <= bytes {
            sum = _mm_crc32_u64(sum, word(at));
            at += 8;
        }
        let mut sum = sum as u32;
        while at < bytes {
            // SAFETY: at < bytes.
            let byte = unsafe { from.add(at).read_volatile() };
            sum = std::arch::x86_64::_mm_crc32_u8(sum, byte);
            at += 1;
        }
        !sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvoyant_protocol::memory::Memfd;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_fast_checksum_is_that_of_a_copy(
            seed in any::<u64>(), offset in 0usize..3, bytes in 0usize..20_000,
        ) {
            let memory = Memfd::create("test", 1 << 16).unwrap().map(false).unwrap();
            let mut state = seed | 1;
            let noise: Vec<u8> = (0..1 << 16).map(|_| { state ^= state << 13; state ^= state >> 7; state ^= state << 17; state as u8 }).collect();
            memory.write(0, &noise).unwrap();
            let offset = offset * 4096;
            let fast = checksum(&memory, offset, bytes).unwrap();
            prop_assert_eq!(fast, checksum_of_copy(&memory, offset, bytes).unwrap());
            prop_assert_eq!(fast, crc32c::crc32c(&noise[offset..offset + bytes]));
        }
    }

    #[test]
    fn a_checksum_outside_its_mapping_is_an_error() {
        let memory = Memfd::create("test", 4096).unwrap().map(false).unwrap();
        assert!(checksum(&memory, 4096, 8).is_err());
    }
}
