//! Memory of one process, opened by another: both ways, byte for byte, and how long the opening takes.

use crate::agent::{Agent, Reply, Task, Way, take, unexpected};
use crate::run::{Figures, Stop, median};

use super::Setup;

/// Allocations; the driver in software gets the smaller ones only.
const SIZES: [usize; 3] = [2 << 20, 64 << 20, 256 << 20];

pub(crate) fn run(setup: &Setup, figures: &Figures) -> Result<(), Stop> {
    let context = setup.context()?;
    let agent = Agent::start(setup.ordinal)?;
    let abilities = context.info().abilities;
    let can = |way: &Way| match way {
        Way::Descriptor => abilities.posix_fd,
        Way::Handle => abilities.ipc_events,
    };
    let all: Vec<Way> = Way::BOTH.into_iter().filter(can).collect();
    if all.is_empty() {
        return Err(Stop::Failed("the device cannot export memory in any way".into()));
    }
    for way in all {
        for &bytes in if setup.software { &SIZES[..2] } else { &SIZES[..] } {
            let (mut theirs, mut ours) = (Vec::new(), Vec::new());
            for _ in 0..setup.samples().min(5) {
                let offer = way.offer(&context, bytes)?;
                match agent.ask_with(&offer, Task::Take)? {
                    Reply::Taken { us, exact: true, .. } => theirs.push(us),
                    Reply::Taken { .. } => {
                        return Err(Stop::Failed(format!(
                            "it read other bytes than we wrote, by {}",
                            way.name()
                        )));
                    }
                    other => return Err(unexpected(&other)),
                }
                drop(offer);
                // An agent of its own for each: it keeps what it offers as long as it lives.
                let other = Agent::start(setup.ordinal)?;
                other.tell(&Task::Offer { way, bytes }, None)?;
                match other.answer()? {
                    (Reply::Offered(shared), fd) => {
                        let taken = take(&context, &shared, fd.as_ref())?;
                        if !taken.exact {
                            return Err(Stop::Failed(format!(
                                "we read other bytes than it wrote, by {}",
                                way.name()
                            )));
                        }
                        ours.push(taken.opened_in.as_secs_f64() * 1e6);
                    }
                    (reply, _) => return Err(unexpected(&reply)),
                }
            }
            let what = format!("open {} MiB by {}", bytes >> 20, way.name());
            figures.add(format!("{what}, daemon to client"), median(&mut theirs), "µs");
            figures.add(format!("{what}, client to daemon"), median(&mut ours), "µs");
        }
    }
    Ok(())
}
