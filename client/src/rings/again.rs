//! Going on with another daemon: what the one before may not have done is asked for again, in order.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use kvoyant_protocol::layout::d2c;
use kvoyant_protocol::ring::{Consumer, Producer};
use kvoyant_protocol::wire::{Operation, Request};

use super::{Maps, Receive, Rings, Submit, lock};
use crate::error::Error;

/// A request with its batch table and payload.
#[derive(Debug)]
struct Copied {
    request: Request,
    batch: Vec<u8>,
    payload: Vec<u8>,
}

/// Copies of the last requests.
#[derive(Debug, Default)]
pub(super) struct Uncovered {
    /// Requests since the session began.
    count: u64,
    /// The last of them.
    list: VecDeque<Copied>,
    /// Copies that are not needed any more, for their memory.
    spare: Vec<Copied>,
}

impl Uncovered {
    /// Copies a request whose parts lie in their slot.
    pub(super) fn add(
        &mut self,
        maps: &Maps,
        index: u32,
        request: Request,
        (batch, payload): (usize, usize),
    ) {
        self.forget(maps.d2c.load_u64(d2c::KEPT));
        let empty = || Copied { request, batch: Vec::new(), payload: Vec::new() };
        let mut copied = self.spare.pop().unwrap_or_else(empty);
        copied.request = request;
        copied.batch.resize(batch, 0);
        copied.payload.resize(payload, 0);
        let parts =
            [(maps.layout.batch(index), &mut copied.batch), (maps.layout.hints(index), &mut copied.payload)];
        for (at, bytes) in parts {
            maps.c2d.read(at, bytes).unwrap_or_else(|error| unreachable!("a slot of our own ring: {error}"));
        }
        self.count += 1;
        self.list.push_back(copied);
    }

    /// The first so many requests are done for good.
    fn forget(&mut self, covered: u64) {
        let uncovered = self.count.saturating_sub(covered);
        while self.list.len() as u64 > uncovered {
            self.spare.extend(self.list.pop_front());
        }
    }
}

/// What another daemon knows of the session.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    /// Requests that have been done.
    pub(crate) requests: u64,
    /// The last ticket among them, which has been answered.
    pub(crate) tickets: u64,
}

impl Rings {
    /// Sessions of this daemon outlast it: requests are copied from now on.
    pub(crate) fn copy_requests(&self) {
        lock(&self.submit).uncovered = Some(Uncovered::default());
    }

    /// Answers name this slab.
    pub(crate) fn set_slab(&self, slab: Option<Arc<kvoyant_protocol::memory::SharedMapping>>) {
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        let Maps { layout, c2d, d2c, served, .. } = &**maps;
        let (layout, c2d, d2c, served) = (*layout, Arc::clone(c2d), Arc::clone(d2c), *served);
        *maps = Arc::new(Maps { layout, c2d, d2c, served, slab });
    }

    /// Goes on in the rings of another daemon, which knows of so much. `alive` says for how long it is worth waiting.
    ///
    /// # Errors
    /// The daemon's, or [`Error::DaemonGone`] once it is not.
    pub(crate) fn again(&self, maps: Maps, known: Known, alive: impl Fn() -> bool) -> Result<(), Error> {
        let mut submit = lock(&self.submit);
        let mut receive = lock(&self.receive);
        // Whatever the daemon before has answered counts.
        self.take(&mut receive)?;
        *self.maps.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(maps);
        let maps = self.maps();
        receive.consumer = Consumer::completions(self.layout);
        receive.last_here = known.tickets;
        submit.producer = Producer::requests(self.layout);
        let mut uncovered = submit.uncovered.take().unwrap_or_default();
        uncovered.forget(known.requests);
        let repeated = if uncovered.list.len() as u64 + known.requests == uncovered.count {
            self.repeat(&maps, &uncovered, &mut submit, &mut receive, alive)
        } else {
            let Uncovered { count, list, .. } = &uncovered;
            let (known, copied) = (known.requests, list.len());
            Err(Error::Broken(format!(
                "the daemon has done {known} of {count} requests, of which the last {copied} could be repeated"
            )))
        };
        submit.uncovered = Some(uncovered);
        repeated?;
        // Until the daemon hears what is not read any more, it keeps all that may be.
        submit.follow_streams(&maps.c2d);
        if submit.producer.room(&maps.d2c)? > 0 {
            self.push(&maps, &mut submit, Operation::Release, (0, 0));
        }
        Ok(())
    }

    fn repeat(
        &self,
        maps: &Maps,
        uncovered: &Uncovered,
        submit: &mut Submit,
        receive: &mut Receive,
        alive: impl Fn() -> bool,
    ) -> Result<(), Error> {
        for Copied { request, batch, payload } in &uncovered.list {
            // What it lets go of has to be answered here, too.
            while submit.producer.room(&maps.d2c)? == 0 || receive.last_here < request.release_through {
                if !alive() {
                    return Err(Error::DaemonGone);
                }
                std::thread::sleep(Duration::from_micros(20));
                self.take(receive)?;
            }
            self.take(receive)?;
            let index = submit.producer.next_index();
            maps.c2d.write(self.layout.batch(index), batch)?;
            maps.c2d.write(self.layout.hints(index), payload)?;
            submit.producer.stage(&maps.c2d, &request.encode());
            submit.producer.publish(&maps.c2d, &maps.d2c);
        }
        // What comes next may let go of anything that was ever answered.
        while receive.last_here < receive.last {
            if !alive() {
                return Err(Error::DaemonGone);
            }
            std::thread::sleep(Duration::from_micros(20));
            self.take(receive)?;
        }
        Ok(())
    }
}
