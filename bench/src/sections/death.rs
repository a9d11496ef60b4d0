//! One side is killed while the other has the memory open: whether the other faults or hangs, and when the memory is
//! free again.

use std::time::{Duration, Instant};

use kvoyant_cuda::{Access, Context, Priority};
use kvoyant_daemon::device::cuda::trial::{Offer, PATTERN};

use crate::agent::{Agent, Reply, Task, Way, open, unexpected};
use crate::run::{Figures, Stop};

use super::Setup;

/// Bytes of the memory in question: much more than [`SLACK`], so that it is missed.
fn size(setup: &Setup) -> usize {
    if setup.software { 128 << 20 } else { 512 << 20 }
}

/// Free memory that may be missing to whatever else runs there.
const SLACK: u64 = 64 << 20;

/// How long memory may stay away.
const LATE: Duration = Duration::from_secs(30);

pub(crate) fn run(setup: &Setup, figures: &Figures) -> Result<(), Stop> {
    let context = setup.context()?;
    for way in Way::BOTH {
        exporter_dies(setup, figures, &context, way)?;
        importer_dies(setup, figures, &context, way)?;
    }
    Ok(())
}

/// The agent offers, we open, it is killed.
fn exporter_dies(setup: &Setup, figures: &Figures, context: &Context, way: Way) -> Result<(), Stop> {
    let (before, _) = context.memory()?;
    let agent = Agent::start(setup.ordinal)?;
    agent.tell(&Task::Offer { way, bytes: size(setup) }, None)?;
    let (Reply::Offered(shared), fd) = agent.answer()? else { return Err(unexpected(&Reply::Here)) };
    let memory = open(context, &shared, fd.as_ref(), Access::Read)?;
    drop(fd);
    agent.kill()?;
    let name = |what: &str| format!("exporter killed, by {}: {what}", way.name());
    let intact = reads(context, memory.ptr(), shared.bytes)
        .map_err(|error| Stop::Failed(name(&format!("the importer cannot read any more: {error}"))))?;
    if !intact {
        return Err(Stop::Failed(name("the importer reads other bytes")));
    }
    figures.add(name("the importer reads on"), 1.0, "yes = 1");
    drop(memory);
    figures.add(name("memory is back after the importer has closed it"), back(context, before)?, "ms");
    Ok(())
}

/// We offer, the agent opens and is killed while copies into the memory are under way.
fn importer_dies(setup: &Setup, figures: &Figures, context: &Context, way: Way) -> Result<(), Stop> {
    let (before, _) = context.memory()?;
    let offer = way.offer(context, size(setup))?;
    let bytes = offer.bytes();
    let agent = Agent::start(setup.ordinal)?;
    match agent.ask_with(&offer, Task::Hold)? {
        Reply::Here => {}
        other => return Err(unexpected(&other)),
    }
    let stream = context.stream(Priority::High)?;
    let pinned = context.pinned(bytes)?;
    // SAFETY: the whole of a pinned buffer that nobody else has.
    unsafe { std::ptr::write_bytes(pinned.as_ptr(), PATTERN, bytes) };
    for _ in 0..4 {
        // SAFETY: both are as long, and live until the stream is done.
        unsafe { stream.copy_h2d(address(&offer), pinned.as_ptr(), bytes) }?;
    }
    let since = Instant::now();
    agent.kill()?;
    figures.add(
        format!("importer killed, by {}: until it was gone", way.name()),
        since.elapsed().as_secs_f64() * 1e3,
        "ms",
    );
    let name = |what: &str| format!("importer killed, by {}: {what}", way.name());
    stream
        .synchronize()
        .map_err(|error| Stop::Failed(name(&format!("the exporter's copies failed: {error}"))))?;
    if !holds(context, &offer, PATTERN)? {
        return Err(Stop::Failed(name("the exporter reads other bytes")));
    }
    figures.add(name("the exporter copies on"), 1.0, "yes = 1");
    drop(offer);
    figures.add(name("memory is back after the exporter has freed it"), back(context, before)?, "ms");
    Ok(())
}

fn address(offer: &Offer) -> u64 {
    match offer {
        Offer::Descriptor(buffer) => buffer.ptr(),
        Offer::Handle(buffer) => buffer.ptr(),
    }
}

/// Whether all of what is offered is one byte.
pub(super) fn holds(context: &Context, offer: &Offer, byte: u8) -> Result<bool, Stop> {
    let found = read(context, address(offer), offer.bytes())?;
    Ok(found.iter().all(|found| *found == byte))
}

fn reads(context: &Context, address: u64, bytes: usize) -> Result<bool, Stop> {
    Ok(read(context, address, bytes)?.iter().all(|byte| *byte == PATTERN))
}

fn read(context: &Context, address: u64, bytes: usize) -> Result<Vec<u8>, Stop> {
    let stream = context.stream(Priority::Normal)?;
    let pinned = context.pinned(bytes)?;
    // SAFETY: open memory of that length, into a pinned buffer that lives until the stream is done.
    unsafe { stream.copy_d2h(pinned.as_ptr(), address, bytes) }?;
    stream.synchronize()?;
    let mut found = vec![0; bytes];
    // SAFETY: the buffer was filled above and nobody else has it.
    unsafe { std::ptr::copy_nonoverlapping(pinned.as_ptr(), found.as_mut_ptr(), bytes) };
    Ok(found)
}

/// Milliseconds until as much is free as before.
fn back(context: &Context, before: u64) -> Result<f64, Stop> {
    let since = Instant::now();
    loop {
        let (free, _) = context.memory()?;
        if free + SLACK >= before {
            return Ok(since.elapsed().as_secs_f64() * 1e3);
        }
        if since.elapsed() > LATE {
            return Err(Stop::Failed(format!(
                "{} MiB of device memory did not come back within {} s",
                (before - free) >> 20,
                LATE.as_secs()
            )));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
