//! Copies of many runs.

use super::{Kernels, dispatch};
use crate::run::CopyRun;

impl Kernels {
    /// Copies every run, of any size and alignment. The SIMD paths prefetch the next sources, and write around the cache once all runs
    /// together are larger than what a cache would keep; every store is visible to other threads in the usual order on return.
    ///
    /// # Safety
    /// Each `src` is readable and each `dst` writable for `bytes` bytes, no other thread of this process writes to a source, nobody touches
    /// a destination meanwhile, and no destination overlaps a source or another destination. What another process writes to a source
    /// meanwhile arrives torn.
    pub unsafe fn copy_runs(self, runs: &[CopyRun]) {
        // Passed on to the caller.
        dispatch!(self, unsafe copy_runs(runs));
    }
}
