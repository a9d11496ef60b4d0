//! Times by buckets: one thread writes, anybody reads.

use std::sync::atomic::{AtomicU64, Ordering};

/// Ends of the buckets, in microseconds; one more is for what took longer.
pub const BUCKETS_US: [u64; 16] =
    [5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000];

/// How many buckets there are.
pub const BUCKETS: usize = BUCKETS_US.len() + 1;

/// Times of one kind.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

impl Histogram {
    /// Adds one. Only one thread may: no locked instruction is used.
    pub fn add(&self, ns: u64) {
        let raise = |cell: &AtomicU64, by: u64| {
            cell.store(cell.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
        };
        let bucket = BUCKETS_US.partition_point(|end| *end < ns.div_ceil(1000));
        raise(&self.buckets[bucket], 1);
        raise(&self.sum_ns, ns);
    }

    /// What there is.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            buckets: std::array::from_fn(|bucket| self.buckets[bucket].load(Ordering::Relaxed)),
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
        }
    }
}

/// What a [`Histogram`] held at some moment, or several together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// How many ended in each bucket, and not in those before it.
    pub buckets: [u64; BUCKETS],
    /// All times together, in ns.
    pub sum_ns: u64,
}

impl Counts {
    /// Adds others.
    pub fn add(&mut self, other: &Self) {
        for (mine, more) in self.buckets.iter_mut().zip(other.buckets) {
            *mine += more;
        }
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Ends of buckets in seconds, each with its count; the last end is infinite.
    #[must_use]
    pub fn in_seconds(&self) -> Vec<(f64, u64)> {
        let ends = BUCKETS_US.iter().map(|us| *us as f64 / 1e6).chain([f64::INFINITY]);
        ends.zip(self.buckets).collect()
    }

    /// The end of the bucket, in µs, within which the quickest `percent` percent ended; `None` before the first one, and
    /// [`u64::MAX`] beyond the last end.
    #[must_use]
    pub fn within_us(&self, percent: u64) -> Option<u64> {
        let wanted = (self.count() * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|count| {
            seen += count;
            seen >= wanted
        })?;
        Some(BUCKETS_US.get(bucket).copied().unwrap_or(u64::MAX))
    }
}

/// The stages of a request, from its arrival to its completion in the ring.
#[derive(Debug, Default)]
pub struct Times {
    /// From its arrival until the lane took it.
    pub queue: Histogram,
    /// Selection and planning.
    pub select: Histogram,
    /// From the plan to the last byte.
    pub transfer: Histogram,
    /// All of it.
    pub whole: Histogram,
}

/// Names of the stages, in the order of [`Times::counts`].
pub const STAGES: [&str; 4] = ["queue", "select", "transfer", "whole"];

impl Times {
    /// Adds a request, times in ns.
    pub fn add(&self, queue: u32, select: u32, transfer: u32) {
        let [queue, select, transfer] = [queue, select, transfer].map(u64::from);
        self.queue.add(queue);
        self.select.add(select);
        self.transfer.add(transfer);
        self.whole.add(queue + select + transfer);
    }

    /// What there is, by stage.
    #[must_use]
    pub fn counts(&self) -> [Counts; 4] {
        [&self.queue, &self.select, &self.transfer, &self.whole].map(Histogram::counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_in_the_first_bucket_that_it_fits_into() {
        let histogram = Histogram::default();
        for ns in [0, 5000, 5001, 10_000, 999_999_999, 1_000_000_001, u64::from(u32::MAX)] {
            histogram.add(ns);
        }
        let counts = histogram.counts();
        assert_eq!((counts.buckets[0], counts.buckets[1]), (2, 2));
        assert_eq!((counts.buckets[15], counts.buckets[16]), (1, 2));
        assert_eq!(counts.count(), 7);
        assert_eq!(counts.sum_ns, 5000 + 5001 + 10_000 + 999_999_999 + 1_000_000_001 + u64::from(u32::MAX));
    }

    #[test]
    fn the_share_that_is_asked_for_ends_within_a_bucket() {
        let histogram = Histogram::default();
        assert_eq!(histogram.counts().within_us(50), None);
        for _ in 0..98 {
            histogram.add(20_000);
        }
        histogram.add(3_000_000);
        histogram.add(5_000_000_000);
        let counts = histogram.counts();
        assert_eq!(counts.within_us(50), Some(25));
        assert_eq!(counts.within_us(99), Some(5000));
        assert_eq!(counts.within_us(100), Some(u64::MAX));
        assert_eq!(counts.in_seconds()[0], (5e-6, 0));
        assert_eq!(counts.in_seconds().last(), Some(&(f64::INFINITY, 1)));
    }

    #[test]
    fn the_whole_is_the_sum_of_its_stages() {
        let times = Times::default();
        times.add(1000, 2000, 3000);
        times.add(0, u32::MAX, u32::MAX);
        let [queue, select, transfer, whole] = times.counts();
        assert_eq!(whole.sum_ns, queue.sum_ns + select.sum_ns + transfer.sum_ns);
        assert_eq!(whole.count(), 2);
        let mut both = whole;
        both.add(&queue);
        assert_eq!((both.count(), both.sum_ns), (4, whole.sum_ns + queue.sum_ns));
    }
}
