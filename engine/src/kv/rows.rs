//! The rows of one (layer, KV head): shared, immutable segments and a tail of one's own.

use std::ops::Range;
use std::sync::Arc;

/// Rows in token order. Forks share the segments; only the tail grows.
#[derive(Debug, Clone, Default)]
pub struct HeadRows {
    /// Each with how many of its bytes count.
    segments: Vec<(Arc<Vec<u8>>, usize)>,
    tail: Vec<u8>,
}

impl HeadRows {
    /// Bytes of all rows.
    pub fn bytes(&self) -> usize {
        self.shared_bytes() + self.tail.len()
    }

    fn shared_bytes(&self) -> usize {
        self.segments.iter().map(|(_, used)| used).sum()
    }

    /// Adds room for `bytes` bytes at the end and returns it.
    pub(super) fn grow(&mut self, bytes: usize) -> &mut [u8] {
        let old = self.tail.len();
        self.tail.resize(old + bytes, 0);
        &mut self.tail[old..]
    }

    /// Drops what lies at and after `bytes`. What others share is not touched.
    pub(super) fn truncate(&mut self, bytes: usize) {
        let mut left = bytes;
        for index in 0..self.segments.len() {
            let used = &mut self.segments[index].1;
            *used = left.min(*used);
            left -= *used;
        }
        self.segments.retain(|(_, used)| *used > 0);
        self.tail.truncate(left);
    }

    /// A second owner of the same rows.
    pub(super) fn fork(&mut self) -> Self {
        if !self.tail.is_empty() {
            let used = self.tail.len();
            self.segments.push((Arc::new(std::mem::take(&mut self.tail)), used));
        }
        self.clone()
    }

    /// The stretches of memory that hold the bytes `range`, in order. Stretches are whole rows if the range is.
    pub fn stretches(&self, range: Range<usize>) -> Vec<&[u8]> {
        let mut stretches = Vec::with_capacity(self.segments.len() + 1);
        let mut first = 0;
        let shared = self.segments.iter().map(|(data, used)| &data[..*used]);
        for part in shared.chain([self.tail.as_slice()]) {
            let from = range.start.max(first);
            let to = range.end.min(first + part.len());
            if from < to {
                stretches.push(&part[from - first..to - first]);
            }
            first += part.len();
        }
        stretches
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn contents(rows: &HeadRows, range: Range<usize>) -> Vec<u8> {
        rows.stretches(range).concat()
    }

    proptest! {
        #[test]
        fn forks_and_truncations_never_change_what_others_see(
            steps in prop::collection::vec((0usize..4, 0usize..4, any::<u8>()), 1..40)
        ) {
            let mut real = vec![HeadRows::default()];
            let mut model: Vec<Vec<u8>> = vec![Vec::new()];
            for (who, what, value) in steps {
                let who = who % real.len();
                match what {
                    0 | 1 => {
                        real[who].grow(usize::from(value % 5)).fill(value);
                        let new_length = model[who].len() + usize::from(value % 5);
                        model[who].resize(new_length, value);
                    }
                    2 => {
                        let keep = model[who].len() * usize::from(value) / 256;
                        real[who].truncate(keep);
                        model[who].truncate(keep);
                    }
                    _ => {
                        let copy = real[who].fork();
                        real.push(copy);
                        model.push(model[who].clone());
                    }
                }
                for (real, model) in real.iter().zip(&model) {
                    prop_assert_eq!(real.bytes(), model.len());
                    prop_assert_eq!(&contents(real, 0..model.len()), model);
                    let (a, b) = (model.len() / 3, model.len() / 2);
                    prop_assert_eq!(&contents(real, a..b), &model[a..b]);
                }
            }
        }
    }
}
