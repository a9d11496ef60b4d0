//! Which chunks of an area are free: one bit each, taken and given back by any thread without a lock.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// See the module.
#[derive(Debug)]
pub(super) struct FreeMap {
    words: Box<[AtomicU64]>,
    chunks: u32,
    free: AtomicU32,
}

impl FreeMap {
    /// All of so many chunks are free.
    pub(super) fn new(chunks: u32) -> Self {
        let words = (0..chunks.div_ceil(64)).map(|word| {
            let bits = (chunks - word * 64).min(64);
            AtomicU64::new(if bits == 64 { u64::MAX } else { (1 << bits) - 1 })
        });
        Self { words: words.collect(), chunks, free: AtomicU32::new(chunks) }
    }

    /// None of so many chunks is free.
    pub(super) fn none(chunks: u32) -> Self {
        let words = (0..chunks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, chunks, free: AtomicU32::new(0) }
    }

    /// How many there are.
    pub(super) fn chunks(&self) -> u32 {
        self.chunks
    }

    /// How many are free.
    pub(super) fn free(&self) -> u32 {
        self.free.load(Ordering::Relaxed)
    }

    /// Takes the first free one.
    pub(super) fn take(&self) -> Option<u32> {
        for (at, word) in self.words.iter().enumerate() {
            let mut bits = word.load(Ordering::Relaxed);
            while bits != 0 {
                let bit = bits.trailing_zeros();
                // What its last owner did is seen by its next.
                let before = word.fetch_and(!(1 << bit), Ordering::Acquire);
                if before & (1 << bit) != 0 {
                    self.free.fetch_sub(1, Ordering::Relaxed);
                    return Some(at as u32 * 64 + bit);
                }
                bits = before & !(1 << bit);
            }
        }
        None
    }

    /// Gives one back.
    pub(super) fn give(&self, chunk: u32) {
        let bit = 1 << (chunk % 64);
        // Counted first: the count never goes below what was taken.
        self.free.fetch_add(1, Ordering::Relaxed);
        let before = self.words[chunk as usize / 64].fetch_or(bit, Ordering::Release);
        debug_assert_eq!(before & bit, 0, "chunk {chunk} was free already");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn threads_that_take_at_once_get_different_chunks_and_all_of_them() {
        let map = FreeMap::new(130);
        let taken: Vec<u32> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| std::iter::from_fn(|| map.take()).collect::<Vec<_>>()))
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(taken.len(), 130);
        assert_eq!(taken.iter().collect::<HashSet<_>>().len(), 130);
        assert_eq!((map.take(), map.free()), (None, 0));
        map.give(129);
        assert_eq!((map.free(), map.take()), (1, Some(129)));
    }
}
