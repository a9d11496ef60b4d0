//! Rows as a selection has them, by each engine: short, scattered, a few hundred to a few thousand.

use kvoyant_daemon::device::cuda::engines::EngineKind;

use crate::mover::{Mover, SOURCE_BYTES};
use crate::run::{Figures, Stop};

use super::Setup;

pub(crate) fn run(setup: &Setup, figures: &Figures) -> Result<(), Stop> {
    let context = setup.context()?;
    let mut mover = Mover::new(&context, SOURCE_BYTES)?;
    for bytes in [256, 512, 1024] {
        for count in [256, 512, 1024, 2048] {
            for kind in EngineKind::ALL.into_iter().filter(|kind| mover.has(*kind)).collect::<Vec<_>>() {
                mover.check(kind, count, bytes)?;
                let us = mover.time(kind, count, bytes, setup.samples())?;
                figures.add(format!("{kind}, {count} rows of {bytes} B"), us, "µs");
            }
        }
    }
    if !mover.has(EngineKind::Zerocopy) {
        return Err(Stop::Skipped(
            "zerocopy has no kernel here (no NVRTC?); the other two engines passed".into(),
        ));
    }
    Ok(())
}
