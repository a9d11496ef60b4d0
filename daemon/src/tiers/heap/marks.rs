//! Which parts of a heap's files were written.

use std::ops::Range;

/// Bytes that one mark stands for: a cache line pair, about what a digest block has.
const BLOCK: usize = 128;

/// One bit for each block of each file.
#[derive(Debug, Default)]
pub(super) struct Marks {
    files: Vec<Vec<u64>>,
}

impl Marks {
    /// These bytes are about to be written.
    pub(super) fn mark(&mut self, file: usize, bytes: Range<usize>) {
        if bytes.is_empty() {
            return;
        }
        let (first, last) = (bytes.start / BLOCK, (bytes.end - 1) / BLOCK);
        if self.files.len() <= file {
            self.files.resize_with(file + 1, Vec::new);
        }
        let words = &mut self.files[file];
        if words.len() <= last / 64 {
            words.resize(last / 64 + 1, 0);
        }
        let within = words.iter_mut().enumerate().take(last / 64 + 1).skip(first / 64);
        for (at, word) in within {
            let from = first.max(at * 64) - at * 64;
            let to = last.min(at * 64 + 63) - at * 64;
            *word |= (u64::MAX >> (63 - (to - from))) << from;
        }
    }

    /// Calls `take` with every range of marked blocks, in order, and forgets all marks.
    pub(super) fn take(&mut self, mut take: impl FnMut(usize, Range<usize>)) {
        for (file, words) in self.files.iter_mut().enumerate() {
            let mut run: Option<Range<usize>> = None;
            for (at, word) in words.iter_mut().enumerate() {
                let mut left = std::mem::take(word);
                while left != 0 {
                    let from = left.trailing_zeros() as usize;
                    let count = (left >> from).trailing_ones() as usize;
                    let blocks = at * 64 + from..at * 64 + from + count;
                    match &mut run {
                        Some(run) if run.end == blocks.start => run.end = blocks.end,
                        run => {
                            if let Some(run) = run.replace(blocks) {
                                take(file, run.start * BLOCK..run.end * BLOCK);
                            }
                        }
                    }
                    left = if from + count == 64 { 0 } else { left & (u64::MAX << (from + count)) };
                }
            }
            if let Some(run) = run {
                take(file, run.start * BLOCK..run.end * BLOCK);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_written_is_told_once_and_in_order(
            writes in proptest::collection::vec((0usize..3, 0usize..40_000, 1usize..9000), 0..20),
        ) {
            let mut marks = Marks::default();
            for (file, start, len) in &writes {
                marks.mark(*file, *start..start + len);
            }
            let mut told: Vec<(usize, Range<usize>)> = Vec::new();
            marks.take(|file, range| told.push((file, range)));
            for pair in told.windows(2) {
                let ((a, first), (b, second)) = (&pair[0], &pair[1]);
                prop_assert!(a < b || a == b && first.end < second.start, "{told:?}");
            }
            for (file, start, len) in &writes {
                let whole = |(of, range): &(usize, Range<usize>)| {
                    of == file && range.start <= *start && range.end >= start + len
                };
                prop_assert!(told.iter().any(whole));
            }
            let bytes: usize = told.iter().map(|(_, range)| range.len()).sum();
            let most: usize = writes.iter().map(|(_, _, len)| len + 2 * BLOCK).sum();
            prop_assert!(bytes <= most);
            let mut again = 0;
            marks.take(|_, _| again += 1);
            prop_assert_eq!(again, 0);
        }
    }
}
