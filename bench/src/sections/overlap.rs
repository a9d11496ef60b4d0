//! A kernel that the device's memory binds runs in one process; another copies, or gathers, meanwhile. What that costs
//! the kernel, and what the other gets.

use std::os::fd::AsFd;
use std::time::Duration;

use kvoyant_daemon::device::cuda::engines::EngineKind;
use kvoyant_protocol::memory::{Memfd, Seals};

use crate::agent::{Agent, Reply, Task, unexpected};
use crate::burn::Burn;
use crate::mover::{Mover, SOURCE_BYTES};
use crate::report::Target;
use crate::run::{Figures, Stop};

use super::Setup;
use super::engines::size;

/// How long the kernel runs for one figure.
const TIME: Duration = Duration::from_millis(1500);

/// How much longer the other side goes on, so that the kernel never runs alone.
const LONGER: Duration = Duration::from_millis(300);

/// Sizes of copies.
const COPIES: [usize; 4] = [64 << 10, 256 << 10, 1 << 20, 4 << 20];

/// The share of the kernel's speed that copies may cost.
const MOST_PERCENT: f64 = 5.0;

pub(crate) fn run(setup: &Setup, figures: &Figures) -> Result<(), Stop> {
    if setup.software {
        return Err(Stop::Skipped(
            "softcuda runs no kernel but the project's, and time there means nothing".into(),
        ));
    }
    let context = setup.context()?;
    // Made here once, so that what is missing is said before anything is measured.
    let bytes_per_pass = Burn::new(&context)?.bytes_per_pass();
    let mps = kvoyant_daemon::device::cuda::mps_runs();
    let suffix = if mps { ", under MPS" } else { "" };
    let agent = Agent::start(setup.ordinal)?;
    let mut mover = Mover::new(&context, SOURCE_BYTES)?;
    burn(&agent, None)?;
    let alone = burn(&agent, None)?.0;
    figures.add(format!("kernel alone{suffix}"), bytes_per_pass as f64 / alone / 1e3, "GB/s");
    let slower = |us: f64| (us / alone - 1.0) * 100.0;
    for bytes in COPIES {
        let copies = format!("copies of {}", size(bytes));
        figures.add(format!("{copies} alone{suffix}"), mover.copy_for(bytes, TIME / 3)?, "GB/s");
        agent.tell(&task(None), None)?;
        let gbps = mover.copy_for(bytes, TIME + LONGER)?;
        let (us, _) = burned(agent.answer()?.0)?;
        figures.add(format!("{copies} beside the kernel{suffix}"), gbps, "GB/s");
        let name = format!("kernel beside {copies} of another process{suffix}, slower by");
        figures.aim(name, slower(us), "%", Target::AtMost(MOST_PERCENT));
    }
    if !mover.has(EngineKind::Zerocopy) {
        return Err(Stop::Skipped("no gather kernel; copies were measured".into()));
    }
    let gathered = |mover: &mut Mover, time: Duration| -> Result<f64, Stop> {
        let (since, mut bytes) = (std::time::Instant::now(), 0);
        while since.elapsed() < time {
            bytes += mover.gather_some()?;
        }
        Ok(bytes as f64 / since.elapsed().as_secs_f64() / 1e9)
    };
    figures.add(format!("gathering alone{suffix}"), gathered(&mut mover, TIME / 3)?, "GB/s");
    agent.tell(&task(None), None)?;
    let gbps = gathered(&mut mover, TIME + LONGER)?;
    let (us, _) = burned(agent.answer()?.0)?;
    figures.add(format!("gathering in another process beside the kernel{suffix}"), gbps, "GB/s");
    figures.add(format!("kernel beside gathering of another process{suffix}, slower by"), slower(us), "%");
    drop(mover);

    let memory = Memfd::create("kvoyant-gpu-check", SOURCE_BYTES)?;
    memory.seal(Seals::size_only())?;
    let (us, gbps) = burn(&agent, Some(&memory))?;
    figures.add(format!("gathering in the kernel's own process, from shared memory{suffix}"), gbps, "GB/s");
    figures.add(format!("kernel beside gathering of its own process{suffix}, slower by"), slower(us), "%");
    Ok(())
}

fn task(gather: Option<usize>) -> Task {
    Task::Burn { ms: TIME.as_millis() as u64, gather }
}

/// Microseconds of a pass, and what was gathered meanwhile in GB/s.
fn burn(agent: &Agent, gather: Option<&Memfd>) -> Result<(f64, f64), Stop> {
    let fd = gather.map(Memfd::try_clone).transpose()?;
    burned(agent.ask(&task(gather.map(Memfd::len)), fd.as_ref().map(AsFd::as_fd))?)
}

fn burned(reply: Reply) -> Result<(f64, f64), Stop> {
    match reply {
        Reply::Burned { us_per_pass, gathered_gbps, .. } => Ok((us_per_pass, gathered_gbps)),
        other => Err(unexpected(&other)),
    }
}
