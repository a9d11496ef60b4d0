//! The two rings from the client's side, shared by all its threads.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvoyant_protocol::futex::spin;
use kvoyant_protocol::layout::{Layout, d2c};
use kvoyant_protocol::memory::SharedMapping;
use kvoyant_protocol::ring::{Consumer, Producer};
use kvoyant_protocol::wire::{
    Append, BatchEntry, BlockRun, Completion, HeadEntry, Observe, Operation, Request, STATS, Speculate, Stat,
};

use crate::connection::Control;
use crate::error::Error;

/// How long a sleep lasts before the daemon is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

#[derive(Debug)]
struct Submit {
    producer: Producer,
    last_ticket: u64,
    released_through: u64,
    /// Released tickets beyond `released_through`.
    released: BTreeSet<u64>,
}

#[derive(Debug)]
struct Receive {
    consumer: Consumer,
    done: HashMap<u64, Completion>,
    /// Tickets that nobody waits for any more.
    abandoned: BTreeSet<u64>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Rings {
    layout: Layout,
    c2d: SharedMapping,
    d2c: SharedMapping,
    boot_id: u64,
    spin: Duration,
    ticket_timeout: Duration,
    submit: Mutex<Submit>,
    receive: Mutex<Receive>,
    sleepers: Mutex<u32>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rings {
    pub(crate) fn new(
        layout: Layout,
        c2d: SharedMapping,
        d2c: SharedMapping,
        boot_id: u64,
        (spin, ticket_timeout): (Duration, Duration),
    ) -> Self {
        Self {
            layout,
            c2d,
            d2c,
            boot_id,
            spin,
            ticket_timeout,
            submit: Mutex::new(Submit {
                producer: Producer::requests(layout),
                last_ticket: 0,
                released_through: 0,
                released: BTreeSet::new(),
            }),
            receive: Mutex::new(Receive {
                consumer: Consumer::completions(layout),
                done: HashMap::new(),
                abandoned: BTreeSet::new(),
            }),
            sleepers: Mutex::new(0),
        }
    }

    /// A counter of the session, as the daemon publishes it.
    pub(crate) fn stat(&self, stat: Stat) -> u64 {
        debug_assert!((stat as usize) < STATS);
        self.d2c.load_u64(d2c::STATS + stat as usize * 8)
    }

    /// Waits until the ring has room for one request.
    fn room<'a>(
        &'a self,
        mut submit: MutexGuard<'a, Submit>,
        control: &Control,
    ) -> Result<MutexGuard<'a, Submit>, Error> {
        let since = Instant::now();
        while submit.producer.room(&self.d2c)? == 0 {
            drop(submit);
            let waited = since.elapsed();
            if waited >= control.timeout() {
                return Err(Error::Deadline { ticket: 0, waited });
            }
            // The lane is behind by a whole ring: that is milliseconds, and sleeping gives it the core.
            std::thread::sleep(Duration::from_micros(50));
            if let Some(error) = control.gone() {
                return Err(error);
            }
            submit = lock(&self.submit);
        }
        Ok(submit)
    }

    fn check_batch(&self, members: usize) -> Result<(), Error> {
        let wanted = self.layout.limits.batch_max as usize;
        if (1..=wanted).contains(&members) {
            return Ok(());
        }
        Err(Error::Size { what: "a batch (members)", found: members, wanted })
    }

    fn push(&self, submit: &mut Submit, operation: Operation) {
        let request = Request { release_through: submit.released_through, operation };
        submit.producer.stage(&self.c2d, &request.encode());
        submit.producer.publish(&self.c2d, &self.d2c);
    }

    /// Pushes a speculation. `hints` has as many values for each member.
    pub(crate) fn speculate<'h>(
        &self,
        control: &Control,
        layer: u16,
        members: impl ExactSizeIterator<Item = (BatchEntry, &'h [f32])>,
        deadline_ns: u64,
    ) -> Result<u64, Error> {
        self.check_batch(members.len())?;
        let limits = self.layout.limits;
        // Tickets are released in order, so one answer that another thread still reads can hold up all later ones.
        let since = Instant::now();
        let mut submit = loop {
            self.collect()?;
            let submit = self.room(lock(&self.submit), control)?;
            if submit.last_ticket - submit.released_through < u64::from(limits.ring_slots) {
                break submit;
            }
            drop(submit);
            if since.elapsed() >= self.ticket_timeout {
                return Err(Error::TooManyInFlight { slots: limits.ring_slots });
            }
            if let Some(error) = control.gone() {
                return Err(error);
            }
            std::thread::sleep(Duration::from_micros(50));
        };
        let index = submit.producer.next_index();
        let batch = members.len() as u32;
        let (at, hints) = (self.layout.batch(index), self.layout.hints(index));
        let mut offset = 0;
        for (member, (mut entry, hint)) in members.enumerate() {
            let bytes: &[u8] = bytemuck::cast_slice(hint);
            if offset + bytes.len() > limits.hint_bytes as usize {
                let found = offset + bytes.len();
                return Err(Error::Size { what: "hints (bytes)", found, wanted: limits.hint_bytes as usize });
            }
            self.c2d.write(hints + offset, bytes)?;
            entry.value = offset as u32;
            self.c2d.write_pod(at + member * size_of::<BatchEntry>(), &entry)?;
            offset += bytes.len();
        }
        let ticket = submit.last_ticket + 1;
        let speculate =
            Speculate { layer, batch, ticket, hint_bytes: offset as u32, deadline_ns, doorbell: false };
        submit.last_ticket = ticket;
        self.push(&mut submit, Operation::Speculate(speculate));
        Ok(ticket)
    }

    /// Pushes an append.
    pub(crate) fn append(
        &self,
        control: &Control,
        layer: Option<u16>,
        entries: &[BatchEntry],
    ) -> Result<(), Error> {
        for part in entries.chunks(self.layout.limits.batch_max as usize) {
            let mut submit = self.room(lock(&self.submit), control)?;
            let index = submit.producer.next_index();
            self.c2d.write(self.layout.batch(index), bytemuck::cast_slice(part))?;
            self.push(&mut submit, Operation::Append(Append { layer, batch: part.len() as u32 }));
        }
        Ok(())
    }

    /// Pushes a prompt's statistics.
    pub(crate) fn observe(
        &self,
        control: &Control,
        layer: u16,
        entry: BatchEntry,
        sums: &[f32],
    ) -> Result<(), Error> {
        let bytes: &[u8] = bytemuck::cast_slice(sums);
        let wanted = self.layout.limits.hint_bytes as usize;
        if bytes.len() > wanted {
            return Err(Error::Size { what: "statistics (bytes)", found: bytes.len(), wanted });
        }
        let mut submit = self.room(lock(&self.submit), control)?;
        let index = submit.producer.next_index();
        self.c2d.write_pod(self.layout.batch(index), &entry)?;
        self.c2d.write(self.layout.hints(index), bytes)?;
        self.push(&mut submit, Operation::Observe(Observe { layer, payload_bytes: bytes.len() as u32 }));
        Ok(())
    }

    /// Says that an answer is not read any more. The daemon hears of it with the next request.
    pub(crate) fn release(&self, ticket: u64) {
        let mut submit = lock(&self.submit);
        submit.released.insert(ticket);
        while submit.released.first() == Some(&(submit.released_through + 1)) {
            submit.released.pop_first();
            submit.released_through += 1;
        }
    }

    /// Nobody will wait for this ticket: it is released as soon as it is answered.
    pub(crate) fn abandon(&self, ticket: u64) {
        let mut receive = lock(&self.receive);
        if receive.done.remove(&ticket).is_some() {
            drop(receive);
            self.release(ticket);
        } else {
            receive.abandoned.insert(ticket);
        }
    }

    /// Takes in what has come.
    pub(crate) fn collect(&self) -> Result<(), Error> {
        self.take(&mut lock(&self.receive))
    }

    fn take(&self, receive: &mut Receive) -> Result<(), Error> {
        while receive.consumer.available(&self.d2c)? > 0 {
            let descriptor = receive.consumer.peek(&self.d2c);
            let completion = Completion::parse(&descriptor, &self.layout.limits, self.boot_id)?;
            receive.consumer.advance(&self.c2d);
            if receive.abandoned.remove(&completion.ticket) {
                self.release(completion.ticket);
            } else {
                receive.done.insert(completion.ticket, completion);
            }
        }
        Ok(())
    }

    /// Waits for an answer.
    pub(crate) fn wait(
        &self,
        control: &Control,
        ticket: u64,
        deadline: Duration,
    ) -> Result<Completion, Error> {
        let start = Instant::now();
        let mut polled = false;
        loop {
            let (word, seen) = {
                let mut receive = lock(&self.receive);
                self.take(&mut receive)?;
                if let Some(completion) = receive.done.remove(&ticket) {
                    return Ok(completion);
                }
                receive.consumer.word(&self.d2c)
            };
            let waited = start.elapsed();
            if waited >= deadline {
                return Err(Error::Deadline { ticket, waited });
            }
            if !std::mem::replace(&mut polled, true) && spin(self.spin.min(deadline), || word.load() != seen)
            {
                continue;
            }
            self.say_sleeping(true);
            if word.load() == seen {
                word.wait(seen, LOOK_EVERY.min(deadline - waited));
            }
            self.say_sleeping(false);
            if word.load() == seen
                && let Some(error) = control.gone()
            {
                return Err(error);
            }
        }
    }

    fn say_sleeping(&self, sleeping: bool) {
        let mut sleepers = lock(&self.sleepers);
        *sleepers = if sleeping { *sleepers + 1 } else { *sleepers - 1 };
        let consumer = Consumer::completions(self.layout);
        consumer.say_sleeping(&self.c2d, *sleepers > 0);
    }

    /// Copies an answer's block table out, and checks that every head's runs lie inside it.
    pub(crate) fn table(
        &self,
        completion: &Completion,
        kv_heads: usize,
    ) -> Result<(Vec<HeadEntry>, Vec<BlockRun>), Error> {
        let count = completion.batch as usize * kv_heads;
        let bytes = completion.table_bytes as usize;
        let head_bytes = count * size_of::<HeadEntry>();
        let run_bytes =
            bytes.checked_sub(head_bytes).filter(|rest| rest.is_multiple_of(size_of::<BlockRun>()));
        let Some(run_bytes) = run_bytes else {
            return Err(Error::Broken(format!("a block table of {bytes} bytes for {count} heads")));
        };
        let at = self.layout.table(completion.ticket);
        let mut heads = vec![<HeadEntry as bytemuck::Zeroable>::zeroed(); count];
        let mut runs = vec![<BlockRun as bytemuck::Zeroable>::zeroed(); run_bytes / size_of::<BlockRun>()];
        self.d2c.read(at, bytemuck::cast_slice_mut(&mut heads))?;
        self.d2c.read(at + head_bytes, bytemuck::cast_slice_mut(&mut runs))?;
        let inside = |head: &HeadEntry| {
            head.first_run.checked_add(head.runs).is_some_and(|end| end as usize <= runs.len())
        };
        if !heads.iter().all(inside) {
            return Err(Error::Broken("a head's runs lie outside their block table".into()));
        }
        Ok((heads, runs))
    }
}
