//! Times by buckets: one thread writes, anybody reads.

use std::sync::atomic::{AtomicU64, Ordering, fence};

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
    /// Adds one, and tells its bucket. Only one thread may: no locked instruction is used.
    pub fn add(&self, ns: u64) -> usize {
        let raise = |cell: &AtomicU64, by: u64| {
            cell.store(cell.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
        };
        let bucket = BUCKETS_US.partition_point(|end| *end < ns.div_ceil(1000));
        raise(&self.buckets[bucket], 1);
        raise(&self.sum_ns, ns);
        bucket
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
        self.in_fewer(&BUCKETS_US)
    }

    /// The same in fewer buckets, which end where some of [`BUCKETS_US`] do, in µs.
    #[must_use]
    pub fn in_fewer(&self, ends_us: &[u64]) -> Vec<(f64, u64)> {
        let ends = ends_us.iter().map(|us| *us as f64 / 1e6).chain([f64::INFINITY]);
        let mut fewer: Vec<_> = ends.map(|end| (end, 0)).collect();
        let all = BUCKETS_US.into_iter().chain([u64::MAX]);
        for (end, count) in all.zip(self.buckets) {
            fewer[ends_us.partition_point(|us| *us < end)].1 += count;
        }
        fewer
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

/// One request, as an example of those that took as long: what to look for in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Example {
    /// Its session.
    pub session: u64,
    /// Its ticket there.
    pub ticket: u64,
    /// The layer that it was for.
    pub layer: u32,
    /// How long it took, in ns.
    pub ns: u64,
}

/// Where the latest request of a bucket is remembered.
#[derive(Debug, Default)]
struct Latest {
    /// The ticket and one more: 0 while there is none, or while the others are written.
    ticket: AtomicU64,
    layer: AtomicU64,
    ns: AtomicU64,
}

impl Latest {
    fn is(&self, ticket: u64, layer: u32, ns: u64) {
        self.ticket.store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        self.layer.store(layer.into(), Ordering::Relaxed);
        self.ns.store(ns, Ordering::Relaxed);
        self.ticket.store(ticket.wrapping_add(1), Ordering::Release);
    }

    /// Nothing while it is written: tickets only go up, so that the same one twice has one request's figures between.
    fn get(&self, session: u64) -> Option<Example> {
        let ticket = self.ticket.load(Ordering::Acquire);
        let [layer, ns] = [&self.layer, &self.ns].map(|cell| cell.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let whole = ticket != 0 && self.ticket.load(Ordering::Relaxed) == ticket;
        whole.then(|| Example { session, ticket: ticket - 1, layer: layer as u32, ns })
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
    /// The latest request in each bucket of the last.
    latest: [Latest; BUCKETS],
}

/// Names of the stages, in the order of [`Times::counts`].
pub const STAGES: [&str; 4] = ["queue", "select", "transfer", WHOLE];

/// All stages together: that which has examples.
pub const WHOLE: &str = "whole";

impl Times {
    /// Adds the request of a ticket, for a layer, with its times in the queue, selected and transferred, in ns.
    pub fn add(&self, ticket: u64, layer: u32, stages: [u32; 3]) {
        let [queue, select, transfer] = stages.map(u64::from);
        self.queue.add(queue);
        self.select.add(select);
        self.transfer.add(transfer);
        let whole = queue + select + transfer;
        let bucket = self.whole.add(whole);
        self.latest[bucket].is(ticket, layer, whole);
    }

    /// What there is, by stage.
    #[must_use]
    pub fn counts(&self) -> [Counts; 4] {
        [&self.queue, &self.select, &self.transfer, &self.whole].map(Histogram::counts)
    }

    /// The latest request in each bucket of the whole, of a session that has this number.
    #[must_use]
    pub fn examples(&self, session: u64) -> [Option<Example>; BUCKETS] {
        std::array::from_fn(|bucket| self.latest[bucket].get(session))
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
    fn fewer_buckets_have_the_same_times_in_them() {
        let histogram = Histogram::default();
        for us in [0, 50, 51, 250, 251, 1000, 2_000_000] {
            histogram.add(us * 1000);
        }
        let counts = histogram.counts();
        assert_eq!(counts.in_fewer(&[50, 250]), [(5e-5, 2), (2.5e-4, 2), (f64::INFINITY, 3)]);
        assert_eq!(counts.in_fewer(&[1_000_000]), [(1.0, 6), (f64::INFINITY, 1)]);
        assert_eq!(counts.in_seconds().iter().map(|(_, n)| n).sum::<u64>(), 7);
    }

    #[test]
    fn each_bucket_has_its_latest_request_as_an_example() {
        let times = Times::default();
        assert_eq!(times.examples(1), [None; BUCKETS]);
        times.add(0, 7, [1000, 0, 0]);
        times.add(1, 8, [1000, 1000, 2000]);
        times.add(2, 9, [0, 0, 30_000]);
        let examples = times.examples(5);
        assert_eq!(examples[0], Some(Example { session: 5, ticket: 1, layer: 8, ns: 4000 }));
        assert_eq!(examples[3], Some(Example { session: 5, ticket: 2, layer: 9, ns: 30_000 }));
        assert_eq!(examples.iter().flatten().count(), 2);
    }

    #[test]
    fn an_example_that_is_read_while_it_is_written_is_of_one_request() {
        let times = Times::default();
        let mut seen = 0;
        std::thread::scope(|scope| {
            let writer =
                scope.spawn(|| (0..200_000).for_each(|n| times.add(n, n as u32, [n as u32 % 5000, 0, 0])));
            while !writer.is_finished() {
                if let Some(example) = times.examples(0)[0] {
                    assert_eq!(
                        (u64::from(example.layer), example.ns),
                        (example.ticket, example.ticket % 5000)
                    );
                    seen += 1;
                }
            }
        });
        assert!(seen > 0 || times.examples(0)[0].is_some());
    }

    #[test]
    fn the_whole_is_the_sum_of_its_stages() {
        let times = Times::default();
        times.add(0, 0, [1000, 2000, 3000]);
        times.add(1, 0, [0, u32::MAX, u32::MAX]);
        let [queue, select, transfer, whole] = times.counts();
        assert_eq!(whole.sum_ns, queue.sum_ns + select.sum_ns + transfer.sum_ns);
        assert_eq!(whole.count(), 2);
        let mut both = whole;
        both.add(&queue);
        assert_eq!((both.count(), both.sum_ns), (4, whole.sum_ns + queue.sum_ns));
    }
}
