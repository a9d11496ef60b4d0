//! Who selects, by what it costs a decode step.
//!
//! A lane scans a layer's KV heads one after the other, on one thread. Asked ahead, and with a core to itself, it does so while the engine
//! computes the layer before; else the engine waits for all of it. The engine's own threads scan the heads side by side, and have
//! nothing else to do meanwhile.

use std::time::Duration;

/// Bytes of digests that a core scans in a second, with all that a selection does to them: some GB/s on the processors tried
/// (`cargo bench -p kvoyant-kernels --bench speed`).
const SCAN_BYTES: f64 = 3e9;

/// From a request to the lane and from its answer to the engine: two wake-ups, roughly.
const HANDOVER: Duration = Duration::from_micros(30);

/// Bytes of weights that a core computes with in a second, roughly: it only has to tell milliseconds from microseconds.
const WEIGHT_BYTES: f64 = 10e9;

/// Weights of a decoder layer over the square of its width: four projections of attention, three of a gated network some 2.7 times as
/// wide; at one byte each.
const LAYER_WEIGHTS: f64 = 12.0;

/// A layer's selection, for one sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// KV heads.
    pub kv_heads: usize,
    /// Bytes of digests of one KV head.
    pub digest_bytes: f64,
    /// Width of the model: query heads times their values.
    pub width: usize,
    /// Whether rows are selected a layer ahead.
    pub ahead: bool,
}

/// Where it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// Cores of the machine.
    pub cores: usize,
    /// Threads that the engine computes with.
    pub threads: usize,
}

impl Setting {
    /// By a lane: how much longer a layer takes.
    #[must_use]
    pub fn by_lane(&self, work: &Work) -> Duration {
        let scan = Self::scan(work) * work.kv_heads as u32;
        let hidden = if work.ahead && self.cores > self.threads { self.layer(work) } else { Duration::ZERO };
        scan.saturating_sub(hidden) + HANDOVER
    }

    /// By the engine's own threads.
    #[must_use]
    pub fn by_client(&self, work: &Work) -> Duration {
        Self::scan(work) * work.kv_heads.div_ceil(self.threads.max(1)) as u32
    }

    /// Whether the client's own threads are the better choice.
    #[must_use]
    pub fn prefers_client(&self, work: &Work) -> bool {
        self.by_client(work) < self.by_lane(work)
    }

    fn scan(work: &Work) -> Duration {
        Duration::from_secs_f64(work.digest_bytes / SCAN_BYTES)
    }

    fn layer(&self, work: &Work) -> Duration {
        let bytes = LAYER_WEIGHTS * (work.width as f64).powi(2);
        Duration::from_secs_f64(bytes / WEIGHT_BYTES / self.threads.max(1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CURRENT: Work = Work { kv_heads: 8, digest_bytes: 1e6, width: 4096, ahead: false };
    const AHEAD: Work = Work { ahead: true, ..CURRENT };

    #[test]
    fn nothing_hides_a_selection_by_the_layers_own_query() {
        for threads in 1..8 {
            assert!(Setting { cores: 8, threads }.prefers_client(&CURRENT), "{threads} threads");
        }
    }

    #[test]
    fn a_spare_core_takes_what_can_be_asked_ahead() {
        let work = Work { digest_bytes: 1e5, ..AHEAD };
        assert!(!Setting { cores: 8, threads: 7 }.prefers_client(&work));
        assert!(Setting { cores: 8, threads: 8 }.prefers_client(&work), "no core is spare");
        assert!(
            Setting { cores: 64, threads: 32 }.prefers_client(&AHEAD),
            "one thread against 32, and little to hide behind"
        );
    }

    #[test]
    fn what_is_nothing_to_scan_is_not_worth_a_handover() {
        let work = Work { digest_bytes: 0.0, ..AHEAD };
        assert!(Setting { cores: 8, threads: 4 }.prefers_client(&work));
    }
}
