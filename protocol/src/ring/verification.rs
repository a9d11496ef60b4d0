//! Every state of a ring of four, every move in it, and every lie, as a bounded model checker would go through them.
//!
//! A ring's state is a handful of running indices, and nothing in it depends on more than their differences and on
//! their low bits. So all states that can be reached from an empty ring are walked through, breadth first, on the
//! real code and on real shared memory, from starts that let indices wrap at 2³² and change sign at 2³¹.

use std::collections::{HashMap, HashSet, VecDeque};

use super::*;
use crate::layout::Limits;
use crate::memory::Memfd;

const SLOTS: u32 = 4;

/// Where an empty ring starts: at nothing, before the sign changes, and before the wrap, in each phase of the slots.
const STARTS: [u32; 7] =
    [0, i32::MAX as u32 - 5, u32::MAX - 6, u32::MAX - 5, u32::MAX - 4, u32::MAX - 3, u32::MAX];

/// How many descriptors are pushed from each start: three times round the ring.
const PUSHES: u32 = 3 * SLOTS;

/// Both memfds of a session, whose client's requests are looked at.
struct Bench {
    layout: Layout,
    c2d: SharedMapping,
    d2c: SharedMapping,
}

impl Bench {
    fn new() -> Self {
        let limits = Limits { ring_slots: SLOTS, hint_bytes: 64, table_bytes: 4096, ..Limits::default() };
        let layout = Layout::new(limits).unwrap();
        let map = |bytes| Memfd::create("verification", bytes).unwrap().map(false).unwrap();
        Self { layout, c2d: map(layout.c2d_bytes), d2c: map(layout.d2c_bytes) }
    }

    fn producer(&self, tail: u32, published: u32, head_seen: u32) -> Producer {
        Producer { kind: Kind::Request, layout: self.layout, tail, published, head_seen }
    }

    fn consumer(&self, head: u32, tail_seen: u32) -> Consumer {
        Consumer { kind: Kind::Request, layout: self.layout, head, tail_seen }
    }
}

/// All that the two ends and their memory know, and what lies in the slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct State {
    tail: u32,
    published: u32,
    head_seen: u32,
    head: u32,
    tail_seen: u32,
    shared_tail: u32,
    shared_head: u32,
    slots: [u32; SLOTS as usize],
}

impl State {
    fn empty(start: u32) -> Self {
        Self {
            tail: start,
            published: start,
            head_seen: start,
            head: start,
            tail_seen: start,
            shared_tail: start,
            shared_head: start,
            slots: [0; SLOTS as usize],
        }
    }

    /// What the arithmetic can tell states apart by: differences, and the phase of the slots.
    fn class(&self) -> [u32; 5] {
        let behind = |index: u32| self.tail.wrapping_sub(index);
        [
            self.tail % SLOTS,
            behind(self.published),
            behind(self.head_seen),
            behind(self.head),
            behind(self.tail_seen),
        ]
    }

    fn load(self, bench: &Bench) -> (Producer, Consumer) {
        bench.c2d.store_u32(c2d::REQUEST_TAIL, self.shared_tail);
        bench.d2c.store_u32(d2c::REQUEST_HEAD, self.shared_head);
        for (slot, value) in (0..).zip(self.slots) {
            bench.c2d.write(bench.layout.descriptor(slot), &value.to_le_bytes()).unwrap();
        }
        (bench.producer(self.tail, self.published, self.head_seen), bench.consumer(self.head, self.tail_seen))
    }

    fn store(bench: &Bench, producer: &Producer, consumer: &Consumer) -> Self {
        let mut slots = [0; SLOTS as usize];
        for (slot, value) in (0..).zip(&mut slots) {
            let mut bytes = [0; 4];
            bench.c2d.read(bench.layout.descriptor(slot), &mut bytes).unwrap();
            *value = u32::from_le_bytes(bytes);
        }
        Self {
            tail: producer.tail,
            published: producer.published,
            head_seen: producer.head_seen,
            head: consumer.head,
            tail_seen: consumer.tail_seen,
            shared_tail: bench.c2d.load_u32(c2d::REQUEST_TAIL),
            shared_head: bench.d2c.load_u32(d2c::REQUEST_HEAD),
            slots,
        }
    }
}

/// What either end can do next.
#[derive(Debug, Clone, Copy)]
enum Move {
    Room,
    Stage,
    Publish,
    Available,
    Pop,
}

const MOVES: [Move; 5] = [Move::Room, Move::Stage, Move::Publish, Move::Available, Move::Pop];

fn stamped(index: u32) -> Descriptor {
    let mut descriptor = [0; DESCRIPTOR_BYTES];
    descriptor[..4].copy_from_slice(&index.to_le_bytes());
    descriptor
}

/// Does one move and checks what it gives; `None` where the end may not make it.
fn step(bench: &Bench, state: State, what: Move, start: u32) -> Option<State> {
    let (mut producer, mut consumer) = state.load(bench);
    match what {
        Move::Room => {
            let room = producer.room(&bench.d2c).expect("an honest reader");
            assert_eq!(room, SLOTS - state.tail.wrapping_sub(state.head), "{state:?}");
        }
        // Only into room that it has seen.
        Move::Stage => {
            let pushed = state.tail.wrapping_sub(start);
            if pushed == PUSHES || state.tail.wrapping_sub(state.head_seen) >= SLOTS {
                return None;
            }
            producer.stage(&bench.c2d, &stamped(state.tail));
        }
        Move::Publish => producer.publish(&bench.c2d, &bench.d2c),
        Move::Available => {
            let waiting = consumer.available(&bench.c2d).expect("an honest writer");
            assert_eq!(waiting, state.published.wrapping_sub(state.head), "{state:?}");
        }
        // Only what it has seen. The oldest comes first, whole, and not twice.
        Move::Pop => {
            if state.tail_seen == state.head {
                return None;
            }
            assert_eq!(consumer.peek(&bench.c2d), stamped(state.head), "{state:?}");
            consumer.advance(&bench.d2c);
        }
    }
    Some(State::store(bench, &producer, &consumer))
}

#[test]
fn every_interleaving_of_two_honest_ends_is_a_queue_in_every_state_of_a_ring_of_four() {
    let bench = Bench::new();
    for start in STARTS {
        let first = State::empty(start);
        let (mut seen, mut next) = (HashSet::from([first]), VecDeque::from([first]));
        while let Some(state) = next.pop_front() {
            for what in MOVES {
                let after = step(&bench, state, what, start);
                next.extend(after.filter(|after| seen.insert(*after)));
            }
        }
        // Cursors in the order that makes a ring: head_seen, head, tail_seen, published, tail, all within four slots.
        // As many classes as there are such tuples, in each phase: the walk has left out none.
        let classes: HashSet<_> = seen.iter().map(State::class).collect();
        let ordered = |published: u32, head_seen: u32, head: u32, tail_seen: u32| {
            published <= tail_seen && tail_seen <= head && head <= head_seen
        };
        let mut wanted = 0;
        for index in 0..(SLOTS + 1).pow(4) {
            let digit = |place: u32| index / (SLOTS + 1).pow(place) % (SLOTS + 1);
            wanted += usize::from(ordered(digit(0), digit(1), digit(2), digit(3)));
        }
        assert_eq!(classes.len(), wanted * SLOTS as usize, "from {start:#x}, {} states", seen.len());
    }
}

/// Indices that a liar publishes, as seen from one of ours: all that are near, and all near a power of two away.
fn lies(ours: u32) -> impl Iterator<Item = u32> {
    let near = (0..64u32).flat_map(|distance| [distance, distance.wrapping_neg()]);
    let far =
        (6..32).flat_map(|bit| (0..16u32).map(move |more| (1u32 << bit).wrapping_add(more).wrapping_sub(8)));
    near.chain(far).map(move |distance| ours.wrapping_add(distance))
}

/// Whether `index` lies between the two, going forward from the first.
fn between(index: u32, first: u32, last: u32) -> bool {
    index.wrapping_sub(first) <= last.wrapping_sub(first)
}

#[test]
fn a_consumer_takes_exactly_the_indices_that_an_honest_producer_could_publish() {
    let bench = Bench::new();
    for start in STARTS {
        // What a consumer knows: its head, and how far the producer said it had come.
        for seen in 0..=SLOTS {
            let tail_seen = start.wrapping_add(seen);
            for lie in lies(start) {
                let mut consumer = bench.consumer(start, tail_seen);
                bench.c2d.store_u32(c2d::REQUEST_TAIL, lie);
                let honest = between(lie, tail_seen, start.wrapping_add(SLOTS));
                let found = consumer.available(&bench.c2d);
                assert_eq!(found.is_ok(), honest, "{lie:#x} at {start:#x}, {seen} seen: {found:?}");
                match found {
                    Ok(waiting) => assert_eq!((waiting, consumer.tail_seen), (lie.wrapping_sub(start), lie)),
                    Err(RingError::IndexJumped { index, ours, slots }) => {
                        assert_eq!((index, ours, slots), (lie, start, SLOTS));
                        assert_eq!(consumer.tail_seen, tail_seen, "a lie is not remembered");
                    }
                }
                assert_eq!(consumer.head, start);
            }
        }
    }
}

#[test]
fn a_producer_takes_exactly_the_indices_that_an_honest_consumer_could_publish() {
    let bench = Bench::new();
    for start in STARTS {
        for used in 0..=SLOTS {
            let head_seen = start.wrapping_sub(used);
            for lie in lies(start) {
                let mut producer = bench.producer(start, start, head_seen);
                bench.d2c.store_u32(d2c::REQUEST_HEAD, lie);
                let honest = between(lie, head_seen, start);
                let found = producer.room(&bench.d2c);
                assert_eq!(found.is_ok(), honest, "{lie:#x} at {start:#x}, {used} used: {found:?}");
                match found {
                    Ok(room) => {
                        assert_eq!((room, producer.head_seen), (SLOTS - start.wrapping_sub(lie), lie));
                    }
                    Err(_) => assert_eq!(producer.head_seen, head_seen, "a lie is not remembered"),
                }
                assert_eq!((producer.tail, producer.published), (start, start));
            }
        }
    }
}

/// A liar may change its index between any two looks, any number of times, and mix lies with truths.
#[test]
fn no_series_of_lies_brings_either_end_outside_its_ring() {
    let bench = Bench::new();
    for start in STARTS {
        // The consumer: (head, tail_seen), with every lie in every state that lies can lead to.
        let mut depth = HashMap::from([((start, start), 0)]);
        let mut next = VecDeque::from([(start, start)]);
        while let Some((head, tail_seen)) = next.pop_front() {
            assert!(tail_seen.wrapping_sub(head) <= SLOTS, "{head:#x} {tail_seen:#x}");
            let steps = depth[&(head, tail_seen)];
            if steps == PUSHES {
                continue;
            }
            let mut reached = Vec::new();
            for lie in lies(head) {
                let mut consumer = bench.consumer(head, tail_seen);
                bench.c2d.store_u32(c2d::REQUEST_TAIL, lie);
                let waiting = consumer.available(&bench.c2d).unwrap_or(0);
                assert!(waiting <= SLOTS);
                reached.push((consumer.head, consumer.tail_seen));
                for _ in 0..waiting {
                    let _ = consumer.peek(&bench.c2d);
                    consumer.advance(&bench.d2c);
                    reached.push((consumer.head, consumer.tail_seen));
                }
            }
            for state in reached {
                depth.entry(state).or_insert_with(|| {
                    next.push_back(state);
                    steps + 1
                });
            }
        }
        // The producer: (tail, head_seen), which fills whatever room it is told to have.
        let mut depth = HashMap::from([((start, start), 0)]);
        let mut next = VecDeque::from([(start, start)]);
        while let Some((tail, head_seen)) = next.pop_front() {
            assert!(tail.wrapping_sub(head_seen) <= SLOTS, "{tail:#x} {head_seen:#x}");
            let steps = depth[&(tail, head_seen)];
            if steps == PUSHES {
                continue;
            }
            let mut reached = Vec::new();
            for lie in lies(tail) {
                let mut producer = bench.producer(tail, tail, head_seen);
                bench.d2c.store_u32(d2c::REQUEST_HEAD, lie);
                let room = producer.room(&bench.d2c).unwrap_or(0);
                assert!(room <= SLOTS);
                reached.push((producer.tail, producer.head_seen));
                for _ in 0..room {
                    producer.stage(&bench.c2d, &stamped(producer.tail));
                    reached.push((producer.tail, producer.head_seen));
                }
            }
            for state in reached {
                depth.entry(state).or_insert_with(|| {
                    next.push_back(state);
                    steps + 1
                });
            }
        }
    }
}
