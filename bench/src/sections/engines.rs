//! Each transfer engine: byte for byte, and its rate by run length as a share of the link's peak.

use kvoyant_daemon::device::cuda::engines::EngineKind;

use crate::mover::{Mover, SOURCE_BYTES};
use crate::report::Target;
use crate::run::{Figures, Stop};

use super::Setup;

/// Run lengths: short rows, rows and pages of usual models, and what coalescing makes of them.
const RUN_BYTES: [usize; 8] = [256, 512, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];

/// Bytes of a request, and runs at most.
const REQUEST: (usize, usize) = (16 << 20, 4096);

/// The page of the design, and as many as a request has at least.
const PAGE: (usize, usize) = (16 << 10, 256);

pub(crate) fn run(setup: &Setup, figures: &Figures) -> Result<(), Stop> {
    let context = setup.context()?;
    let mut mover = Mover::new(&context, SOURCE_BYTES)?;
    let kinds: Vec<EngineKind> = EngineKind::ALL.into_iter().filter(|kind| mover.has(*kind)).collect();
    for &kind in &kinds {
        for (count, bytes) in [(1, 1), (3, 100), (1000, 256), (777, 513), (256, 16 << 10), (9, 1 << 20)] {
            mover.check(kind, count, bytes)?;
        }
    }
    let samples = setup.samples();
    let (h2d, d2h) = mover.peak(samples)?;
    figures.add("peak, host to device", h2d, "GB/s");
    figures.add("peak, device to host", d2h, "GB/s");
    let mut best_page: f64 = 0.0;
    for &kind in &kinds {
        for bytes in RUN_BYTES {
            let count = (REQUEST.0 / bytes).min(REQUEST.1);
            let gbps = (count * bytes) as f64 / mover.time(kind, count, bytes, samples)? / 1e3;
            let share = gbps / h2d * 100.0;
            figures.add(format!("{kind}, {count} runs of {}", size(bytes)), gbps, "GB/s");
            let name = format!("{kind}, {count} runs of {}, of the peak", size(bytes));
            match (kind, bytes) {
                (EngineKind::Dma, 0x4_0000..) => figures.aim(name, share, "%", Target::AtLeast(90.0)),
                (EngineKind::Zerocopy, 512) => figures.aim(name, share, "%", Target::AtLeast(80.0)),
                _ => figures.add(name, share, "%"),
            }
        }
        let (bytes, count) = PAGE;
        best_page = best_page.max((count * bytes) as f64 / mover.time(kind, count, bytes, samples)? / 1e3);
    }
    let name = "best engine, 256 pages of 16 KiB, of the peak";
    figures.aim(name, best_page / h2d * 100.0, "%", Target::AtLeast(80.0));
    if !kinds.contains(&EngineKind::Zerocopy) {
        return Err(Stop::Skipped(
            "zerocopy has no kernel here (no NVRTC?); the other two engines passed".into(),
        ));
    }
    Ok(())
}

/// A length as people write it.
pub(super) fn size(bytes: usize) -> String {
    match bytes {
        b if b >= 1 << 20 => format!("{} MiB", b >> 20),
        b if b >= 1 << 10 => format!("{} KiB", b >> 10),
        b => format!("{b} B"),
    }
}
