//! What engines get: runs resolved to device addresses, in the order of their destinations, coalesced.

use std::collections::BTreeMap;

use kvoyant_kernels::CopyRun;

/// Where registered host memory lies for the device. Under unified addressing the two addresses are often the same, and
/// need not be.
#[derive(Clone, Debug, Default)]
pub struct DeviceMap {
    /// By first host address. The driver registers no page twice, so no two overlap.
    extents: BTreeMap<usize, Extent>,
}

#[derive(Clone, Copy, Debug)]
struct Extent {
    bytes: usize,
    device: u64,
}

impl DeviceMap {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds what one registration covers: `bytes` from `host` on, for the device from `device` on.
    pub fn insert(&mut self, host: *const u8, bytes: usize, device: u64) {
        self.extents.insert(host.addr(), Extent { bytes, device });
    }

    /// Takes the registration out that begins at `host`; says whether there was one.
    pub fn remove(&mut self, host: *const u8) -> bool {
        self.extents.remove(&host.addr()).is_some()
    }

    /// The device's address of `bytes` bytes from `host` on, if one registration covers them all.
    #[must_use]
    pub fn device_address(&self, host: *const u8, bytes: usize) -> Option<u64> {
        self.find(host.addr(), bytes).map(|(first, extent)| extent.device + (host.addr() - first) as u64)
    }

    fn find(&self, host: usize, bytes: usize) -> Option<(usize, Extent)> {
        let (&first, &extent) = self.extents.range(..=host).next_back()?;
        covers(first, extent, host, bytes).then_some((first, extent))
    }
}

fn covers(first: usize, extent: Extent, host: usize, bytes: usize) -> bool {
    host >= first && bytes <= extent.bytes && host - first <= extent.bytes - bytes
}

/// One stretch to copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) src: *const u8,
    /// The same for the device, if the source is registered.
    pub(super) mapped: Option<u64>,
    pub(super) dst: u64,
    pub(super) bytes: usize,
    /// Where the registration of the source begins; 0: none. A copy across two of them is an error to the driver.
    registration: usize,
}

/// What a request costs depends on this alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Runs, after coalescing.
    pub runs: usize,
    /// Bytes of all runs.
    pub bytes: u64,
    /// Ranges of adjacent destinations.
    pub ranges: usize,
    /// Whether every source is registered with the driver.
    pub registered: bool,
}

/// A request, as engines take it.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    pub(super) pieces: &'a [Piece],
    shape: Shape,
}

impl Batch<'_> {
    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }
}

/// Makes batches, in memory that is kept between them.
#[derive(Debug, Default)]
pub struct Batcher {
    pieces: Vec<Piece>,
}

// SAFETY: a batcher's addresses are used through batches only, whose maker promised that they may be used from wherever
// the batch is.
unsafe impl Send for Batcher {}

impl Batcher {
    /// Makes a batch of `runs`, whose destinations are addresses of device memory. Runs that are adjacent in source and
    /// destination become one; empty ones vanish.
    ///
    /// # Safety
    /// From now until everything that engines enqueue for the batch has run:
    /// - each source is readable, and if `map` has it, it stays registered at that device address;
    /// - each destination is memory of the context that the engines are of; destinations that touch one another are of one
    ///   allocation; none overlaps another, and nobody else uses them.
    pub unsafe fn batch(&mut self, runs: &[CopyRun], map: &DeviceMap) -> Batch<'_> {
        self.pieces.clear();
        // Runs of one session lie in few registrations.
        let mut last = (0, Extent { bytes: 0, device: 0 });
        for run in runs.iter().filter(|run| run.bytes > 0) {
            let host = run.src.addr();
            let found = if covers(last.0, last.1, host, run.bytes) {
                Some(last)
            } else {
                map.find(host, run.bytes).inspect(|&found| last = found)
            };
            self.pieces.push(Piece {
                src: run.src,
                mapped: found.map(|(first, extent)| extent.device + (host - first) as u64),
                dst: run.dst.addr() as u64,
                bytes: run.bytes,
                registration: found.map_or(0, |(first, _)| first),
            });
        }
        self.pieces.sort_unstable_by_key(|piece| piece.dst);
        self.pieces.dedup_by(|next, before| {
            let adjacent = before.src.addr() + before.bytes == next.src.addr()
                && before.dst + before.bytes as u64 == next.dst
                && before.registration == next.registration;
            if adjacent {
                before.bytes += next.bytes;
            }
            adjacent
        });
        Batch { pieces: &self.pieces, shape: shape(&self.pieces) }
    }
}

fn shape(pieces: &[Piece]) -> Shape {
    let gaps = pieces.windows(2).filter(|pair| pair[0].dst + pair[0].bytes as u64 != pair[1].dst).count();
    Shape {
        runs: pieces.len(),
        bytes: pieces.iter().map(|piece| piece.bytes as u64).sum(),
        ranges: if pieces.is_empty() { 0 } else { gaps + 1 },
        registered: pieces.iter().all(|piece| piece.mapped.is_some()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Resolved = (usize, Option<u64>, u64, usize);

    fn run(src: usize, dst: usize, bytes: usize) -> CopyRun {
        CopyRun { src: std::ptr::without_provenance(src), dst: std::ptr::without_provenance_mut(dst), bytes }
    }

    /// Source, its device address, destination and bytes of each piece, and the shape of all.
    fn resolved(runs: &[CopyRun], map: &DeviceMap) -> (Vec<Resolved>, Shape) {
        let mut batcher = Batcher::default();
        // SAFETY: no engine ever sees the batch.
        let batch = unsafe { batcher.batch(runs, map) };
        let piece = |piece: &Piece| (piece.src.addr(), piece.mapped, piece.dst, piece.bytes);
        (batch.pieces.iter().map(piece).collect(), *batch.shape())
    }

    fn map() -> DeviceMap {
        let mut map = DeviceMap::new();
        map.insert(std::ptr::without_provenance(0x1000), 0x1000, 0x9_1000);
        map.insert(std::ptr::without_provenance(0x2000), 0x1000, 0x5_2000);
        map
    }

    #[test]
    fn runs_adjacent_on_both_sides_become_one_in_whatever_order_they_come() {
        let runs = [run(0x1020, 0x720, 0x10), run(0x1010, 0x710, 0x10), run(0x1000, 0x700, 0x10)];
        let (pieces, shape) = resolved(&runs, &map());
        assert_eq!(pieces, [(0x1000, Some(0x9_1000), 0x700, 0x30)]);
        assert_eq!(shape, Shape { runs: 1, bytes: 0x30, ranges: 1, registered: true });
    }

    #[test]
    fn runs_adjacent_on_one_side_only_stay_apart() {
        let (pieces, shape) = resolved(&[run(0x1000, 0x700, 16), run(0x1010, 0x800, 16)], &map());
        assert_eq!((pieces.len(), shape.ranges), (2, 2));
        let (pieces, shape) = resolved(&[run(0x1000, 0x700, 16), run(0x1020, 0x710, 16)], &map());
        assert_eq!((pieces.len(), shape.ranges), (2, 1));
    }

    #[test]
    fn runs_of_two_registrations_stay_apart_even_where_these_touch() {
        let (pieces, shape) = resolved(&[run(0x1ff0, 0x700, 16), run(0x2000, 0x710, 16)], &map());
        assert_eq!(pieces, [(0x1ff0, Some(0x9_1ff0), 0x700, 16), (0x2000, Some(0x5_2000), 0x710, 16)]);
        assert!(shape.registered);
    }

    #[test]
    fn a_source_that_no_single_registration_covers_is_unregistered() {
        for (src, bytes) in
            [(0xff0, 32), (0x2ff0, 32), (0x1ff0, 32), (0x3000, 1), (0x1, 1), (0x1000, usize::MAX)]
        {
            let (pieces, shape) = resolved(&[run(src, 0x700, bytes)], &map());
            assert_eq!((pieces[0].1, shape.registered), (None, false), "{src:#x}");
            assert_eq!(map().device_address(std::ptr::without_provenance(src), bytes), None);
        }
        let mut map = map();
        assert!(map.remove(std::ptr::without_provenance(0x1000)));
        assert!(!map.remove(std::ptr::without_provenance(0x1000)));
        assert!(!resolved(&[run(0x1800, 0x700, 16)], &map).1.registered);
        assert!(resolved(&[run(0x2800, 0x700, 16)], &map).1.registered);
    }

    #[test]
    fn empty_runs_and_empty_batches_are_nothing() {
        let (pieces, shape) = resolved(&[run(0x1000, 0x700, 0)], &map());
        assert_eq!((pieces.len(), shape), (0, Shape { runs: 0, bytes: 0, ranges: 0, registered: true }));
    }
}
