//! The two rings from the client's side, shared by all its threads.

mod again;
mod maps;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use kvoyant_protocol::futex::spin;
use kvoyant_protocol::layout::{Layout, c2d, d2c};
use kvoyant_protocol::memory::SharedMapping;
use kvoyant_protocol::ring::{Consumer, Producer};
use kvoyant_protocol::wire::{
    Append, BatchEntry, Completion, Operation, Request, STATS, Speculate, Stat, TOLD, Told,
};

pub(crate) use self::again::Known;
use self::again::Uncovered;
pub(crate) use self::maps::Table;
pub(crate) use self::maps::{Behind, Maps};
use crate::control::Control;
use crate::error::Error;
use crate::fallback::{Backlog, Taken};

/// How long a sleep lasts before the daemon is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

#[derive(Debug)]
struct Submit {
    producer: Producer,
    last_ticket: u64,
    released_through: u64,
    /// Released tickets beyond `released_through`.
    released: BTreeSet<u64>,
    /// Everything up to here that is not released yet will be, by a stream, in the order of tickets.
    stream_will_release: u64,
    /// Handle of the stream that has promised so: no other stream keeps that order.
    promised_by: usize,
    late: LateReleases,
    /// Requests that no daemon is known to have done for good, where sessions outlast daemons.
    uncovered: Option<Uncovered>,
}

/// Tickets that streams have released out of order, until somebody takes them in. A driver's callback thread adds to
/// them, so that their lock is held for moments only, and never while the driver is called.
#[derive(Debug, Clone, Default)]
pub(crate) struct LateReleases(Arc<Mutex<Vec<u64>>>);

impl LateReleases {
    /// Says that an answer is not read any more.
    pub(crate) fn add(&self, ticket: u64) {
        lock(&self.0).push(ticket);
    }

    fn take(&self) -> Vec<u64> {
        std::mem::take(&mut *lock(&self.0))
    }
}

/// How a stream lets go of an answer.
#[derive(Debug)]
pub(crate) enum StreamRelease {
    /// By the word that means "up to here".
    Word,
    /// By itself, because something before it is still held or is released by another stream.
    Late(LateReleases),
}

impl Submit {
    /// Takes in what streams have released since.
    fn follow_streams(&mut self, c2d: &SharedMapping) {
        // The word means something only as far as a stream has promised: where none has it stays what it is for ever.
        let promised = self.stream_will_release.saturating_sub(self.released_through);
        let ahead = u64::from(c2d.load_u32(c2d::RELEASED).wrapping_sub(self.released_through as u32));
        if (1..=promised).contains(&ahead) {
            self.released_through += ahead;
        }
        self.released.extend(self.late.take());
        self.settle();
    }

    /// Moves `released_through` over what was released out of order.
    fn settle(&mut self) {
        while let Some(first) =
            self.released.first().copied().filter(|first| *first <= self.released_through + 1)
        {
            self.released.pop_first();
            self.released_through = self.released_through.max(first);
        }
    }

    /// Whether everything before this ticket is released, or will be by this stream.
    fn is_next(&self, ticket: u64, stream: usize) -> bool {
        if self.stream_will_release > self.released_through && self.promised_by != stream {
            return false;
        }
        let mut next = self.released_through.max(self.stream_will_release) + 1;
        while self.released.contains(&next) {
            next += 1;
        }
        ticket == next
    }
}

#[derive(Debug)]
struct Receive {
    consumer: Consumer,
    /// Tickets without an answer: layer and members that were asked for.
    asked: HashMap<u64, (u16, u32)>,
    done: HashMap<u64, Answered>,
    /// The last ticket that was answered, by any daemon.
    last: u64,
    /// The last one that was answered by this daemon.
    last_here: u64,
    /// Tickets that nobody waits for any more.
    abandoned: BTreeSet<u64>,
    /// Tickets that a stream takes care of: their completions only tell what happened.
    streamed: BTreeSet<u64>,
}

impl Receive {
    /// Takes note that a ticket is answered, if by what was asked for.
    fn check(&mut self, completion: &Completion) -> Result<(), Error> {
        let Completion { ticket, layer, batch, .. } = *completion;
        match self.asked.remove(&ticket) {
            Some(asked) if asked == (layer, batch) => Ok(()),
            Some((asked, members)) => Err(Error::Broken(format!(
                "the answer to ticket {ticket} is of layer {layer} and {batch} sequences, where layer {asked} of {members} was asked for"
            ))),
            None => Err(Error::Broken(format!("an answer came to ticket {ticket}, which waits for none"))),
        }
    }
}

/// Where the request of a speculation lies whose hints a stream has yet to bring.
#[derive(Debug)]
pub(crate) struct Slot<'a> {
    /// Offset of the hints in the client → daemon memory.
    pub(crate) hints: usize,
    /// Offset of the doorbell there.
    pub(crate) doorbell: usize,
    /// The ticket, whose low 32 bits ring it.
    pub(crate) ticket: u64,
    c2d: &'a SharedMapping,
}

impl Slot<'_> {
    /// Rings the doorbell at once: the hints will not come. The daemon selects by whatever lies there.
    pub(crate) fn ring_now(&self) {
        self.c2d.store_u32(self.doorbell, self.ticket as u32);
    }
}

/// An answer, and the daemon that gave it.
pub(crate) type Answered = (Completion, Arc<Maps>);

/// What a speculation is besides its members.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ask {
    /// The layer.
    pub(crate) layer: u16,
    /// Query tokens of each member.
    pub(crate) queries: u32,
    /// Whether floors follow each member's queries.
    pub(crate) floors: bool,
    /// Whether only the rest of the last answer is asked for.
    pub(crate) rest: bool,
    /// Whether pages are asked for, and no rows.
    pub(crate) fetch: bool,
    /// When the rows are wanted, on the monotonic clock; 0: whenever they are ready.
    pub(crate) deadline_ns: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Rings {
    layout: Layout,
    /// Changed with both locks held.
    maps: RwLock<Arc<Maps>>,
    spin: Duration,
    ticket_timeout: Duration,
    submit: Mutex<Submit>,
    receive: Mutex<Receive>,
    late: LateReleases,
    sleepers: Mutex<u32>,
    told: [AtomicU64; TOLD],
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rings {
    pub(crate) fn new(maps: Maps, (spin, ticket_timeout): (Duration, Duration)) -> Self {
        let (layout, late) = (maps.layout, LateReleases::default());
        Self {
            layout,
            maps: RwLock::new(Arc::new(maps)),
            spin,
            ticket_timeout,
            submit: Mutex::new(Submit {
                producer: Producer::requests(layout),
                last_ticket: 0,
                released_through: 0,
                released: BTreeSet::new(),
                stream_will_release: 0,
                promised_by: 0,
                late: late.clone(),
                uncovered: None,
            }),
            receive: Mutex::new(Receive {
                consumer: Consumer::completions(layout),
                asked: HashMap::new(),
                done: HashMap::new(),
                last: 0,
                last_here: 0,
                abandoned: BTreeSet::new(),
                streamed: BTreeSet::new(),
            }),
            late,
            sleepers: Mutex::new(0),
            told: Default::default(),
        }
    }

    fn maps(&self) -> Arc<Maps> {
        Arc::clone(&self.maps.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many daemons have served the session before the one that serves it now.
    pub(crate) fn generation(&self) -> u32 {
        self.maps().served.generation
    }

    /// What the lane has not taken yet.
    pub(crate) fn backlog(&self) -> Result<Backlog, Error> {
        let mut submit = lock(&self.submit);
        let maps = self.maps();
        let room = submit.producer.room(&maps.d2c)?;
        let waiting = self.layout.limits.ring_slots - room;
        let head = submit.producer.next_index().wrapping_sub(waiting);
        Ok(Backlog { taken: Taken { boot_id: maps.served.boot_id, head }, waiting, room })
    }

    /// Counts something that the daemon's operator may want to know and only this side does.
    pub(crate) fn says(&self, told: Told, more: u64) {
        let value = self.told[told as usize].fetch_add(more, Ordering::Relaxed).wrapping_add(more);
        self.maps().c2d.store_u64(c2d::TOLD + told as usize * 8, value);
    }

    /// A counter of the session, as the daemon publishes it.
    pub(crate) fn stat(&self, stat: Stat) -> u64 {
        debug_assert!((stat as usize) < STATS);
        self.maps().d2c.load_u64(d2c::STATS + stat as usize * 8)
    }

    /// Waits until the ring has room for one request.
    fn room<'a>(
        &'a self,
        mut submit: MutexGuard<'a, Submit>,
        control: &Control,
    ) -> Result<MutexGuard<'a, Submit>, Error> {
        let since = Instant::now();
        while submit.producer.room(&self.maps().d2c)? == 0 {
            drop(submit);
            let waited = since.elapsed();
            if waited >= control.timeout() {
                return Err(Error::Deadline { ticket: 0, waited });
            }
            // The lane is behind by a whole ring: that is milliseconds, and sleeping gives it the core.
            std::thread::sleep(Duration::from_micros(50));
            if let Some(error) = control.gone(since + control.timeout()) {
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

    /// Pushes a request whose batch table, of so many bytes, and payload lie in its slot.
    fn push(&self, maps: &Maps, submit: &mut Submit, operation: Operation, (batch, payload): (usize, usize)) {
        let request = Request { release_through: submit.released_through, operation };
        if let Some(uncovered) = &mut submit.uncovered {
            uncovered.add(maps, submit.producer.next_index(), request, (batch, payload));
        }
        submit.producer.stage(&maps.c2d, &request.encode());
        submit.producer.publish(&maps.c2d, &maps.d2c);
    }

    /// Sizes of everything.
    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// The client → daemon and the daemon → client memory.
    pub(crate) fn mappings(&self) -> (Arc<SharedMapping>, Arc<SharedMapping>) {
        let maps = self.maps();
        (Arc::clone(&maps.c2d), Arc::clone(&maps.d2c))
    }

    /// Waits until the ring has room for a request and a ticket is free.
    fn ticket_room<'a>(&'a self, control: &Control) -> Result<MutexGuard<'a, Submit>, Error> {
        let slots = self.layout.limits.ring_slots;
        // Tickets are released in order, so one answer that another thread still reads can hold up all later ones.
        let since = Instant::now();
        loop {
            self.collect()?;
            let mut submit = self.room(lock(&self.submit), control)?;
            submit.follow_streams(&self.maps().c2d);
            if submit.last_ticket - submit.released_through < u64::from(slots) {
                return Ok(submit);
            }
            drop(submit);
            if since.elapsed() >= self.ticket_timeout {
                return Err(Error::TooManyInFlight { slots });
            }
            if let Some(error) = control.gone(since + self.ticket_timeout) {
                return Err(error);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn check_hints(&self, found: usize) -> Result<(), Error> {
        let wanted = self.layout.limits.hint_bytes as usize;
        if found > wanted { Err(Error::Size { what: "hints (bytes)", found, wanted }) } else { Ok(()) }
    }

    /// Pushes a speculation of `queries` query tokens for each member, with the bytes of its hint.
    pub(crate) fn speculate<'h>(
        &self,
        control: &Control,
        ask: Ask,
        members: impl ExactSizeIterator<Item = (BatchEntry, [&'h [u8]; 2])>,
    ) -> Result<u64, Error> {
        self.check_batch(members.len())?;
        let mut submit = self.ticket_room(control)?;
        let maps = self.maps();
        let index = submit.producer.next_index();
        let batch = members.len() as u32;
        let (at, hints) = (self.layout.batch(index), self.layout.hints(index));
        let mut offset = 0;
        for (member, (mut entry, parts)) in members.enumerate() {
            entry.value = offset as u32;
            maps.c2d.write_pod(at + member * size_of::<BatchEntry>(), &entry)?;
            for bytes in parts {
                self.check_hints(offset + bytes.len())?;
                maps.c2d.write(hints + offset, bytes)?;
                offset += bytes.len();
            }
        }
        let ticket = submit.last_ticket + 1;
        let hint_bytes = offset as u32;
        let Ask { layer, queries, floors, rest, fetch, deadline_ns } = ask;
        let speculate = Speculate {
            layer,
            batch,
            ticket,
            hint_bytes,
            queries,
            deadline_ns,
            doorbell: false,
            floors,
            rest,
            fetch,
        };
        submit.last_ticket = ticket;
        lock(&self.receive).asked.insert(ticket, (layer, batch));
        let bytes = (batch as usize * size_of::<BatchEntry>(), offset);
        self.push(&maps, &mut submit, Operation::Speculate(speculate), bytes);
        Ok(ticket)
    }

    /// Pushes a speculation whose hints, `hint_bytes` in all, a stream has yet to bring; `bring` makes it do so and
    /// ring the doorbell behind them. Entries say where in the hint area their hints will lie.
    pub(crate) fn speculate_by_doorbell(
        &self,
        control: &Control,
        layer: u16,
        members: impl ExactSizeIterator<Item = BatchEntry>,
        hint_bytes: usize,
        bring: impl FnOnce(&Slot<'_>),
    ) -> Result<u64, Error> {
        self.check_batch(members.len())?;
        self.check_hints(hint_bytes)?;
        let mut submit = self.ticket_room(control)?;
        let maps = self.maps();
        let index = submit.producer.next_index();
        let batch = members.len() as u32;
        let at = self.layout.batch(index);
        for (member, entry) in members.enumerate() {
            maps.c2d.write_pod(at + member * size_of::<BatchEntry>(), &entry)?;
        }
        let ticket = submit.last_ticket + 1;
        let hint_bytes = hint_bytes as u32;
        let speculate = Speculate {
            layer,
            batch,
            ticket,
            hint_bytes,
            queries: 1,
            deadline_ns: 0,
            doorbell: true,
            floors: false,
            rest: false,
            fetch: false,
        };
        submit.last_ticket = ticket;
        lock(&self.receive).asked.insert(ticket, (layer, batch));
        let bytes = (batch as usize * size_of::<BatchEntry>(), 0);
        self.push(&maps, &mut submit, Operation::Speculate(speculate), bytes);
        let (hints, doorbell) = (self.layout.hints(index), self.layout.doorbell(index));
        bring(&Slot { hints, doorbell, ticket, c2d: &maps.c2d });
        Ok(ticket)
    }

    /// The stream with this handle will release this ticket, in the way that is answered.
    pub(crate) fn released_by_stream(&self, ticket: u64, stream: usize) -> StreamRelease {
        let mut receive = lock(&self.receive);
        if receive.done.remove(&ticket).is_none() {
            receive.streamed.insert(ticket);
        }
        drop(receive);
        let mut submit = lock(&self.submit);
        submit.follow_streams(&self.maps().c2d);
        if !submit.is_next(ticket, stream) {
            return StreamRelease::Late(submit.late.clone());
        }
        (submit.stream_will_release, submit.promised_by) = (ticket, stream);
        StreamRelease::Word
    }

    /// Pushes an append. Of a failure, how many entries had been pushed before it.
    pub(crate) fn append(
        &self,
        control: &Control,
        layer: Option<u16>,
        entries: &[BatchEntry],
    ) -> Result<(), (usize, Error)> {
        let at_once = self.layout.limits.batch_max as usize;
        for (done, part) in entries.chunks(at_once).enumerate() {
            self.append_part(control, layer, part).map_err(|error| (done * at_once, error))?;
        }
        Ok(())
    }

    fn append_part(&self, control: &Control, layer: Option<u16>, part: &[BatchEntry]) -> Result<(), Error> {
        let mut submit = self.room(lock(&self.submit), control)?;
        let (maps, index) = (self.maps(), submit.producer.next_index());
        maps.c2d.write(self.layout.batch(index), bytemuck::cast_slice(part))?;
        let append = Operation::Append(Append { layer, batch: part.len() as u32 });
        self.push(&maps, &mut submit, append, (size_of_val(part), 0));
        Ok(())
    }

    /// Pushes a request about one sequence, with its payload in the hint area.
    pub(crate) fn tell(
        &self,
        control: &Control,
        operation: Operation,
        entry: BatchEntry,
        (what, payload): (&'static str, &[u8]),
    ) -> Result<(), Error> {
        let wanted = self.layout.limits.hint_bytes as usize;
        if payload.len() > wanted {
            return Err(Error::Size { what, found: payload.len(), wanted });
        }
        let mut submit = self.room(lock(&self.submit), control)?;
        let (maps, index) = (self.maps(), submit.producer.next_index());
        maps.c2d.write_pod(self.layout.batch(index), &entry)?;
        maps.c2d.write(self.layout.hints(index), payload)?;
        self.push(&maps, &mut submit, operation, (size_of::<BatchEntry>(), payload.len()));
        Ok(())
    }

    /// Says that an answer is not read any more. The daemon hears of it with the next request.
    pub(crate) fn release(&self, ticket: u64) {
        let mut submit = lock(&self.submit);
        submit.released.insert(ticket);
        submit.follow_streams(&self.maps().c2d);
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
        let maps = self.maps();
        while receive.consumer.available(&maps.d2c)? > 0 {
            let descriptor = receive.consumer.peek(&maps.d2c);
            let completion = Completion::parse(&descriptor, &self.layout.limits, maps.served)?;
            receive.consumer.advance(&maps.c2d);
            receive.last_here = completion.ticket;
            // What another daemon had answered already stays as it was.
            if completion.ticket <= receive.last {
                continue;
            }
            receive.last = completion.ticket;
            receive.check(&completion)?;
            if receive.streamed.remove(&completion.ticket) {
                continue;
            }
            if receive.abandoned.remove(&completion.ticket) {
                // Whoever asks next takes that in.
                self.late.add(completion.ticket);
            } else {
                receive.done.insert(completion.ticket, (completion, Arc::clone(&maps)));
            }
        }
        Ok(())
    }

    /// Waits for an answer, and takes it.
    pub(crate) fn wait(&self, control: &Control, ticket: u64, deadline: Duration) -> Result<Answered, Error> {
        self.wait_until(control, ticket, deadline, |done| done.remove(&ticket))
    }

    /// Waits for an answer, and leaves it.
    pub(crate) fn peek(&self, control: &Control, ticket: u64, deadline: Duration) -> Result<Answered, Error> {
        self.wait_until(control, ticket, deadline, |done| done.get(&ticket).cloned())
    }

    fn wait_until(
        &self,
        control: &Control,
        ticket: u64,
        deadline: Duration,
        look: impl Fn(&mut HashMap<u64, Answered>) -> Option<Answered>,
    ) -> Result<Answered, Error> {
        let start = Instant::now();
        let mut polled = false;
        loop {
            let maps;
            let (word, seen) = {
                let mut receive = lock(&self.receive);
                self.take(&mut receive)?;
                if let Some(answered) = look(&mut receive.done) {
                    return Ok(answered);
                }
                maps = self.maps();
                receive.consumer.word(&maps.d2c)
            };
            let waited = start.elapsed();
            if waited >= deadline {
                return Err(Error::Deadline { ticket, waited });
            }
            if !std::mem::replace(&mut polled, true) && spin(self.spin.min(deadline), || word.load() != seen)
            {
                continue;
            }
            self.say_sleeping(&maps, true);
            if word.load() == seen {
                word.wait(seen, LOOK_EVERY.min(deadline - waited));
            }
            self.say_sleeping(&maps, false);
            if word.load() == seen
                && let Some(error) = control.gone(start + deadline)
            {
                return Err(error);
            }
        }
    }

    fn say_sleeping(&self, maps: &Maps, sleeping: bool) {
        let mut sleepers = lock(&self.sleepers);
        *sleepers = if sleeping { *sleepers + 1 } else { *sleepers - 1 };
        let consumer = Consumer::completions(self.layout);
        consumer.say_sleeping(&maps.c2d, *sleepers > 0);
    }
}
