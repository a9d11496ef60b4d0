//! Whether a read-only mapping is one: a write must fail in the process that tries it, and nowhere else.

use kvoyant_daemon::device::cuda::trial::PATTERN;

use crate::agent::{Agent, Reply, Task, Way, unexpected};
use crate::run::{Figures, Stop};

use super::Setup;

const BYTES: usize = 4 << 20;

pub(crate) fn run(setup: &Setup, figures: &Figures) -> Result<(), Stop> {
    if setup.software {
        return Err(Stop::Skipped(
            "softcuda counts such a write as a violation, and its own tests try it".into(),
        ));
    }
    if kvoyant_daemon::device::cuda::mps_runs() {
        return Err(Stop::Skipped("under MPS the fault could end other processes".into()));
    }
    let context = setup.context()?;
    let offer = Way::Descriptor.offer(&context, BYTES)?;
    let agent = Agent::start(setup.ordinal)?;
    let Reply::Trespassed(said) = agent.ask_with(&offer, Task::Trespass)? else {
        return Err(unexpected(&Reply::Here));
    };
    let intact = super::death::holds(&context, &offer, PATTERN)?;
    figures.add("the writer was told of it", f64::from(u8::from(said.is_some())), "yes = 1");
    figures.add("the memory is as it was", f64::from(u8::from(intact)), "yes = 1");
    if !intact {
        return Err(Stop::Failed("a client can write to what it has mapped read-only".into()));
    }
    context
        .synchronize()
        .map_err(|error| Stop::Failed(format!("the fault reached the exporter too: {error}")))?;
    Ok(())
}
