//! Residency records of graph mode as the daemon's stream writes them: rows first, then contents, then versions.

use kvoyant_cuda::{Context, CudaError, HostToDevice, PinnedBuffer, Stream};

use super::memory::Allocation;
use crate::device::RecordUpdate;

/// Bytes of a version.
const VERSION: usize = 8;

/// Smallest staging memory: so that most updates fit into any.
const STAGING_MIN: usize = 64 << 10;

/// A session's records on the device.
#[derive(Debug)]
pub(super) struct Records {
    base: u64,
    bytes: u64,
}

/// Pinned memory that an update is copied from. It stays with the update until the device has done it.
#[derive(Debug)]
pub(super) struct Staging {
    memory: PinnedBuffer,
    copies: Vec<HostToDevice>,
}

// SAFETY: the pointers in `copies` lead into `memory`, which moves with them, and are used during `Records::publish` alone.
unsafe impl Send for Staging {}

impl Staging {
    pub(super) fn new(context: &Context, bytes: usize) -> Result<Self, CudaError> {
        let bytes = bytes.max(STAGING_MIN).next_power_of_two();
        Ok(Self { memory: context.pinned(bytes)?, copies: Vec::new() })
    }

    pub(super) fn bytes(&self) -> usize {
        self.memory.len()
    }
}

impl Records {
    pub(super) fn new(allocation: &Allocation) -> Self {
        Self { base: allocation.ptr(), bytes: allocation.bytes() as u64 }
    }

    /// Bytes of staging memory that an update needs.
    pub(super) fn staging_bytes(update: &RecordUpdate) -> usize {
        update.image.len().next_multiple_of(VERSION) + VERSION
    }

    /// Enqueues an update behind the copies of its rows. No kernel expects the records' old version any more, so it need
    /// not be taken back first.
    pub(super) fn publish(
        &self,
        update: &RecordUpdate,
        staging: &mut Staging,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let heads = u64::from(update.heads);
        let end = update.stride.checked_mul(heads).and_then(|bytes| bytes.checked_add(update.offset));
        let within = end.is_some_and(|end| end <= self.bytes)
            && Self::staging_bytes(update) <= staging.bytes()
            && update.stride >= VERSION as u64;
        if !within {
            return Err(CudaError::new("records", INVALID_VALUE));
        }
        let record = |head: usize| self.base + update.offset + head as u64 * update.stride;
        let (image, memory) = (&update.image, staging.memory.as_ptr());
        if !image.is_empty() {
            // SAFETY: within the pinned memory, as checked above; no copy reads it any more, for staging memory is used again
            // only after its flight has ended.
            unsafe { std::ptr::copy_nonoverlapping(image.as_ptr(), memory, image.len()) };
            staging.copies.clear();
            let mut begin = 0;
            for (head, end) in update.ends.iter().take(update.heads as usize).enumerate() {
                let bytes = end.saturating_sub(begin).min(update.stride as usize);
                if *end <= image.len() {
                    let src = memory.wrapping_add(begin).cast_const();
                    staging.copies.push(HostToDevice { dst: record(head), src, bytes });
                }
                begin = *end;
            }
            // SAFETY: from the staging memory, which its flight keeps, into records of this session, each its own.
            unsafe { stream.copy_batch_h2d(&staging.copies) }?;
        }
        if stream.context().info().abilities.memops_64 {
            // The driver puts a memory barrier before such a write, and a kernel may be looking at the word already.
            for head in 0..update.heads as usize {
                // SAFETY: an aligned word of a record of this session.
                unsafe { stream.write_value64(record(head), update.version) }?;
            }
            return Ok(());
        }
        let version = memory.wrapping_add(image.len().next_multiple_of(VERSION));
        // SAFETY: an aligned word of the staging memory, as above.
        unsafe { version.cast::<u64>().write(update.version) };
        staging.copies.clear();
        let versions = (0..update.heads as usize).map(|head| HostToDevice {
            dst: record(head),
            src: version.cast_const(),
            bytes: VERSION,
        });
        staging.copies.extend(versions);
        // SAFETY: as above; what is queued here waits for the contents.
        unsafe { stream.copy_batch_h2d(&staging.copies) }
    }
}

/// `CUDA_ERROR_INVALID_VALUE`.
const INVALID_VALUE: i32 = 1;
