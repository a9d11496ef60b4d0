//! Single-producer single-consumer rings of 64-byte descriptors between two processes.
//!
//! An index runs freely over all 32 bits; the slot is its low bits. Each side keeps its own index in private
//! memory and only *publishes* it: the peer's published index is an input, checked on every use. A peer whose
//! index is more than a ring ahead, or behind what it was, is a liar and gets [`RingError::IndexJumped`].
//!
//! To push one must hold the [`Producer`], to pop the [`Consumer`]; neither can be cloned.

use std::time::Duration;

use thiserror::Error;

use crate::layout::{DESCRIPTOR_BYTES, Layout, c2d, d2c};
// The models of `simulated` run this very code, on memory and a kernel of their own.
#[cfg(loom)]
use crate::simulated::{SharedMapping, Word, publish_before_looking};
#[cfg(not(loom))]
use crate::{
    futex::{Word, publish_before_looking},
    memory::SharedMapping,
};

#[cfg(all(test, not(loom)))]
mod verification;

/// A descriptor as it lies in a ring.
pub type Descriptor = [u8; DESCRIPTOR_BYTES];

/// What can go wrong on a ring.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum RingError {
    /// The peer's index lies outside what its ring allows.
    #[error("the peer's ring index is {index}, which is not within {slots} slots of {ours}")]
    IndexJumped {
        /// The index that it published.
        index: u32,
        /// Our own index.
        ours: u32,
        /// Slots of the ring.
        slots: u32,
    },
}

/// Entries that lie between two running indices, or the lie.
fn distance(ahead: u32, behind: u32, slots: u32, published: u32, ours: u32) -> Result<u32, RingError> {
    let between = ahead.wrapping_sub(behind);
    if between <= slots { Ok(between) } else { Err(RingError::IndexJumped { index: published, ours, slots }) }
}

/// Which of a session's two rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Request,
    Completion,
}

impl Kind {
    /// Offsets of: the producer's index, its reader's "I sleep" word, the consumer's index.
    fn offsets(self) -> (usize, usize, usize) {
        match self {
            Self::Request => (c2d::REQUEST_TAIL, d2c::SLEEPING, d2c::REQUEST_HEAD),
            Self::Completion => (d2c::COMPLETION_TAIL, c2d::SLEEPING, c2d::COMPLETION_HEAD),
        }
    }
}

/// The end that pushes.
#[derive(Debug)]
pub struct Producer {
    kind: Kind,
    layout: Layout,
    tail: u32,
    published: u32,
    head_seen: u32,
}

impl Producer {
    /// The client's end of the request ring.
    #[must_use]
    pub fn requests(layout: Layout) -> Self {
        Self { kind: Kind::Request, layout, tail: 0, published: 0, head_seen: 0 }
    }

    /// The daemon's end of the completion ring.
    #[must_use]
    pub fn completions(layout: Layout) -> Self {
        Self { kind: Kind::Completion, layout, tail: 0, published: 0, head_seen: 0 }
    }

    /// Running index of the next descriptor: where its batch table and hints go.
    #[must_use]
    pub fn next_index(&self) -> u32 {
        self.tail
    }

    /// How many descriptors can be pushed now. `theirs` is the memfd that the consumer writes.
    pub fn room(&mut self, theirs: &SharedMapping) -> Result<u32, RingError> {
        let slots = self.layout.limits.ring_slots;
        let head = theirs.load_u32(self.kind.offsets().2);
        let used = distance(self.tail, head, slots, head, self.tail)?;
        // A head that moved backwards would let us overwrite what it has not read, which harms it alone; but
        // it is a lie all the same.
        distance(head, self.head_seen, slots, head, self.tail)?;
        self.head_seen = head;
        Ok(slots - used)
    }

    /// Writes a descriptor. The caller has made sure that there is [`Producer::room`]. Nobody sees it before
    /// [`Producer::publish`].
    pub fn stage(&mut self, ours: &SharedMapping, descriptor: &Descriptor) {
        let offset = self.layout.descriptor(self.tail);
        ours.write(offset, descriptor)
            .unwrap_or_else(|error| unreachable!("a slot of our own ring: {error}"));
        self.tail = self.tail.wrapping_add(1);
    }

    /// Makes everything staged visible, and wakes the consumer if it sleeps.
    pub fn publish(&mut self, ours: &SharedMapping, theirs: &SharedMapping) {
        if self.published == self.tail {
            return;
        }
        self.published = self.tail;
        let (tail, sleeping, _) = self.kind.offsets();
        // SYNC POINT: pairs with the acquire load of the tail in `Consumer::available`.
        ours.store_u32(tail, self.tail);
        publish_before_looking();
        if theirs.load_u32(sleeping) != 0 {
            Word { memory: ours, offset: tail }.wake();
        }
    }
}

/// The end that pops.
#[derive(Debug)]
pub struct Consumer {
    kind: Kind,
    layout: Layout,
    head: u32,
    tail_seen: u32,
}

impl Consumer {
    /// The daemon's end of the request ring.
    #[must_use]
    pub fn requests(layout: Layout) -> Self {
        Self { kind: Kind::Request, layout, head: 0, tail_seen: 0 }
    }

    /// The client's end of the completion ring.
    #[must_use]
    pub fn completions(layout: Layout) -> Self {
        Self { kind: Kind::Completion, layout, head: 0, tail_seen: 0 }
    }

    /// Running index of the descriptor that [`Consumer::peek`] gives.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.head
    }

    /// How many descriptors wait. `theirs` is the memfd that the producer writes.
    pub fn available(&mut self, theirs: &SharedMapping) -> Result<u32, RingError> {
        let slots = self.layout.limits.ring_slots;
        // SYNC POINT: pairs with the release store of the tail in `Producer::publish`.
        let tail = theirs.load_u32(self.kind.offsets().0);
        let waiting = distance(tail, self.head, slots, tail, self.head)?;
        if tail.wrapping_sub(self.tail_seen) > slots {
            return Err(RingError::IndexJumped { index: tail, ours: self.head, slots });
        }
        self.tail_seen = tail;
        Ok(waiting)
    }

    /// Copies out the next descriptor, once, without consuming it. Call it only when one is available.
    #[must_use]
    pub fn peek(&self, theirs: &SharedMapping) -> Descriptor {
        let mut descriptor = [0; DESCRIPTOR_BYTES];
        theirs
            .read(self.layout.descriptor(self.head), &mut descriptor)
            .unwrap_or_else(|error| unreachable!("a slot of the ring: {error}"));
        descriptor
    }

    /// Consumes the descriptor: its slot, batch table and hints may be written again.
    pub fn advance(&mut self, ours: &SharedMapping) {
        self.head = self.head.wrapping_add(1);
        ours.store_u32(self.kind.offsets().2, self.head);
    }

    /// The word to sleep on, and the value that means "nothing new".
    #[must_use]
    pub fn word<'a>(&self, theirs: &'a SharedMapping) -> (Word<'a>, u32) {
        (Word { memory: theirs, offset: self.kind.offsets().0 }, self.head)
    }

    /// Says in our own memory whether somebody sleeps on this ring. Look again after saying so.
    pub fn say_sleeping(&self, ours: &SharedMapping, sleeping: bool) {
        ours.store_u32(self.kind.offsets().1, u32::from(sleeping));
        if sleeping {
            publish_before_looking();
        }
    }

    /// Sleeps until something is pushed or the timeout passes.
    pub fn sleep(&self, ours: &SharedMapping, theirs: &SharedMapping, timeout: Duration) {
        self.say_sleeping(ours, true);
        let (word, seen) = self.word(theirs);
        if word.load() == seen {
            word.wait(seen, timeout);
        }
        self.say_sleeping(ours, false);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::layout::Limits;
    use crate::memory::Memfd;

    struct Pair {
        layout: Layout,
        c2d: SharedMapping,
        d2c: SharedMapping,
    }

    fn pair(ring_slots: u32) -> Pair {
        let layout =
            Layout::new(Limits { ring_slots, hint_bytes: 64, table_bytes: 4096, ..Limits::default() })
                .unwrap();
        let map = |bytes| Memfd::create("test", bytes).unwrap().map(false).unwrap();
        Pair { layout, c2d: map(layout.c2d_bytes), d2c: map(layout.d2c_bytes) }
    }

    fn descriptor(value: u32) -> Descriptor {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        bytes[..4].copy_from_slice(&value.to_le_bytes());
        bytes[60..].copy_from_slice(&value.wrapping_mul(7).to_le_bytes());
        bytes
    }

    /// Every state of a ring of four, started at every interesting index, wrap-around included: the model is a
    /// queue, and each of the two moves is tried in each state.
    #[test]
    fn a_ring_of_four_is_a_queue_in_every_state_and_across_the_wrap() {
        let shared = pair(4);
        for start in [0u32, 1, 2, 3, u32::MAX - 5, u32::MAX - 1, u32::MAX] {
            for pattern in 0u32..1 << 12 {
                let mut producer = Producer::requests(shared.layout);
                let mut consumer = Consumer::requests(shared.layout);
                (producer.tail, producer.published, producer.head_seen) = (start, start, start);
                (consumer.head, consumer.tail_seen) = (start, start);
                shared.c2d.store_u32(c2d::REQUEST_TAIL, start);
                shared.d2c.store_u32(d2c::REQUEST_HEAD, start);
                let mut model = std::collections::VecDeque::new();
                for step in 0..12 {
                    assert_eq!(producer.room(&shared.d2c).unwrap() as usize, 4 - model.len());
                    assert_eq!(consumer.available(&shared.c2d).unwrap() as usize, model.len());
                    if pattern & (1 << step) == 0 {
                        if model.len() < 4 {
                            producer.stage(&shared.c2d, &descriptor(step));
                            producer.publish(&shared.c2d, &shared.d2c);
                            model.push_back(step);
                        }
                    } else if let Some(expected) = model.pop_front() {
                        assert_eq!(consumer.peek(&shared.c2d), descriptor(expected));
                        consumer.advance(&shared.d2c);
                    }
                }
            }
        }
    }

    #[test]
    fn an_index_that_jumps_or_runs_backwards_is_a_lie() {
        let shared = pair(8);
        let mut consumer = Consumer::requests(shared.layout);
        for lie in [9, 100, u32::MAX, 1 << 31] {
            shared.c2d.store_u32(c2d::REQUEST_TAIL, lie);
            let error = consumer.available(&shared.c2d).unwrap_err();
            assert_eq!(error, RingError::IndexJumped { index: lie, ours: 0, slots: 8 });
        }
        shared.c2d.store_u32(c2d::REQUEST_TAIL, 5);
        assert_eq!(consumer.available(&shared.c2d).unwrap(), 5);
        shared.c2d.store_u32(c2d::REQUEST_TAIL, 3);
        assert!(consumer.available(&shared.c2d).is_err(), "an index that runs backwards");
        let mut producer = Producer::completions(shared.layout);
        shared.c2d.store_u32(c2d::COMPLETION_HEAD, 1);
        assert!(producer.room(&shared.c2d).is_err(), "a reader that has read what was never written");
    }

    #[test]
    fn nothing_staged_is_seen_before_it_is_published() {
        let shared = pair(4);
        let mut producer = Producer::requests(shared.layout);
        let mut consumer = Consumer::requests(shared.layout);
        producer.stage(&shared.c2d, &descriptor(1));
        producer.stage(&shared.c2d, &descriptor(2));
        assert_eq!(consumer.available(&shared.c2d).unwrap(), 0);
        producer.publish(&shared.c2d, &shared.d2c);
        assert_eq!(consumer.available(&shared.c2d).unwrap(), 2);
    }

    #[test]
    fn two_threads_that_sleep_lose_neither_a_descriptor_nor_a_wake_up() {
        const COUNT: u32 = 20_000;
        let shared = pair(8);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut producer = Producer::requests(shared.layout);
                for value in 0..COUNT {
                    while producer.room(&shared.d2c).unwrap() == 0 {
                        std::thread::yield_now();
                    }
                    producer.stage(&shared.c2d, &descriptor(value));
                    producer.publish(&shared.c2d, &shared.d2c);
                }
            });
            let mut consumer = Consumer::requests(shared.layout);
            for value in 0..COUNT {
                while consumer.available(&shared.c2d).unwrap() == 0 {
                    // A lost wake-up would show as a minute's sleep, and the test would not end in time.
                    consumer.sleep(&shared.d2c, &shared.c2d, Duration::from_secs(60));
                }
                assert_eq!(consumer.peek(&shared.c2d), descriptor(value));
                consumer.advance(&shared.d2c);
            }
        });
    }
}
