//! What registering host memory costs, and how long a driver call of another process waits meanwhile.

use std::time::Instant;

use crate::agent::{Agent, Reply, Task, unexpected};
use crate::pages::Pages;
use crate::run::{Figures, Stop};

use super::Setup;

const GIB: usize = 1 << 30;

/// No more is registered than this share of the memory that can be had.
const SHARE: usize = 4;

pub(crate) fn run(setup: &Setup, figures: &Figures) -> Result<(), Stop> {
    let context = setup.context()?;
    let most = if setup.software { GIB / 16 } else { GIB };
    let bytes = room().map_or(most, |room| (room / SHARE).min(most)) / (2 << 20) * (2 << 20);
    if bytes == 0 {
        return Err(Stop::Skipped("there is no host memory to try it with".into()));
    }
    let per_gib = |seconds: f64| seconds * GIB as f64 / bytes as f64;
    let mut quiet: f64 = 0.0;
    for _ in 0..200 {
        quiet = quiet.max(call(&context)?);
    }
    figures.add("longest of 200 driver calls, nobody registers", quiet, "ms");
    for pages in Pages::ALL {
        let agent = Agent::start(setup.ordinal)?;
        agent.tell(&Task::Pin { bytes, pages }, None)?;
        let waiting = std::thread::scope(|scope| -> Result<_, Stop> {
            let answer = scope.spawn(|| agent.answer());
            let mut longest: f64 = 0.0;
            while !answer.is_finished() {
                longest = longest.max(call(&context)?);
            }
            let answer = answer.join().map_err(|_| Stop::Failed("a thread panicked".into()))?;
            Ok((answer, longest))
        })?;
        let name = |what: &str| format!("{}: {what}", pages.name());
        match waiting {
            (Ok((Reply::Pinned(took), _)), longest) => {
                figures.add(name("touch"), per_gib(took.touch_s), "s/GiB");
                figures.add(name("register"), per_gib(took.register_s), "s/GiB");
                figures.add(name("unregister"), per_gib(took.unregister_s), "s/GiB");
                figures.add(name("longest driver call of another process meanwhile"), longest, "ms");
            }
            // Few machines have huge pages set aside: that is no reason to stop.
            (Err(Stop::Skipped(_)), _) if pages != Pages::Small => {}
            (Err(stop), _) => return Err(stop),
            (Ok((other, _)), _) => return Err(unexpected(&other)),
        }
    }
    Ok(())
}

/// Milliseconds of an allocation and its release, which take the driver's locks.
fn call(context: &kvoyant_cuda::Context) -> Result<f64, Stop> {
    let since = Instant::now();
    drop(context.alloc(2 << 20)?);
    Ok(since.elapsed().as_secs_f64() * 1e3)
}

/// Bytes of memory that can be had.
fn room() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<usize>().ok()?.checked_mul(1024)
}
