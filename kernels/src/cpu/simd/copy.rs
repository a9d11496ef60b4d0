//! Copies of many runs.

use super::Simd;
use crate::run::CopyRun;

/// From so many bytes in all, destinations are written around the cache: more than a core's share of it, so that what is copied would
/// push out what the core needs next, and itself.
const STREAM_FROM: usize = 8 << 20;
/// Runs up to this size are copied line by line here, longer ones by `memcpy`.
const SMALL: usize = 2048;
/// How many runs ahead, and how much of each, is prefetched. Further into a run the processor's own prefetcher has caught on.
const AHEAD: (usize, usize) = (8, 512);
const LINE: usize = 64;

/// # Safety
/// As [`Kernels::copy_runs`](crate::Kernels::copy_runs).
#[inline(always)]
pub(super) unsafe fn copy_runs<S: Simd>(s: S, runs: &[CopyRun]) {
    let stream = runs.iter().map(|run| run.bytes).sum::<usize>() >= STREAM_FROM;
    for (i, run) in runs.iter().enumerate() {
        if let Some(next) = runs.get(i + AHEAD.0) {
            for at in (0..next.bytes.min(AHEAD.1)).step_by(LINE) {
                super::prefetch::<true>(next.src.wrapping_add(at));
            }
        }
        // SAFETY: the caller promises readable sources and writable destinations that do not overlap.
        unsafe {
            if stream {
                streaming(s, run);
            } else if run.bytes >= LINE && run.bytes <= SMALL {
                let last = run.bytes - LINE;
                for at in (0..last).step_by(LINE) {
                    s.copy_line(run.src.add(at), run.dst.add(at));
                }
                // The last line may cover bytes of the one before once more.
                s.copy_line(run.src.add(last), run.dst.add(last));
            } else {
                std::ptr::copy_nonoverlapping(run.src, run.dst, run.bytes);
            }
        }
    }
    if stream {
        super::fence();
    }
}

/// Whole aligned lines around the cache, what is before and after them by `memcpy`.
///
/// # Safety
/// As [`copy_runs`], of this run.
#[inline(always)]
unsafe fn streaming<S: Simd>(s: S, run: &CopyRun) {
    let head = run.dst.align_offset(LINE).min(run.bytes);
    let lines = (run.bytes - head) / LINE;
    let tail = head + lines * LINE;
    // SAFETY: head, lines and tail are the run, cut in three.
    unsafe {
        std::ptr::copy_nonoverlapping(run.src, run.dst, head);
        for at in (head..tail).step_by(LINE) {
            s.stream_line(run.src.add(at), run.dst.add(at));
        }
        std::ptr::copy_nonoverlapping(run.src.add(tail), run.dst.add(tail), run.bytes - tail);
    }
}
