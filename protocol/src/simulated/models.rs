//! What loom tries in every order: two ends of a ring, sleepers and bells, and hand-offs that must be found out.

use std::time::Duration;

use loom::sync::{Arc, Mutex};
use loom::thread;

use super::*;
use crate::futex::Bell;
use crate::layout::{Limits, d2c};
use crate::ring::{Consumer, Descriptor, Producer};

/// How often the scheduler may take a thread's turn away where it could go on. Every order of two threads that loses a
/// wake-up is found with two; one more is there for the third thread.
const PREEMPTIONS: usize = 3;

const FOREVER: Duration = Duration::MAX;

fn model(run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(run);
}

/// Both memfds of a session with a ring of two.
struct Session {
    layout: Layout,
    c2d: SharedMapping,
    d2c: SharedMapping,
}

impl Session {
    fn new() -> Arc<Self> {
        let layout = Layout::new(Limits { ring_slots: 2, ..Limits::default() }).unwrap();
        Arc::new(Self { layout, c2d: SharedMapping::new(&layout), d2c: SharedMapping::new(&layout) })
    }

    fn requests(&self) -> (Producer, Consumer) {
        (Producer::requests(self.layout), Consumer::requests(self.layout))
    }

    /// As a client pushes a request.
    fn push(&self, producer: &mut Producer, value: u8) {
        while producer.room(&self.d2c).unwrap() == 0 {
            thread::yield_now();
        }
        producer.stage(&self.c2d, &descriptor(value));
        producer.publish(&self.c2d, &self.d2c);
    }

    /// As a lane with one session takes what is there, and else sleeps on the ring alone.
    fn pop(&self, consumer: &mut Consumer) -> u8 {
        while consumer.available(&self.c2d).unwrap() == 0 {
            consumer.sleep(&self.d2c, &self.c2d, FOREVER);
        }
        let descriptor = consumer.peek(&self.c2d);
        consumer.advance(&self.d2c);
        assert_eq!(descriptor, self::descriptor(descriptor[0]), "a descriptor comes whole");
        descriptor[0]
    }
}

fn descriptor(value: u8) -> Descriptor {
    [value; DESCRIPTOR_BYTES]
}

#[test]
fn every_descriptor_arrives_once_in_order_round_the_ring_and_wakes_who_sleeps() {
    model(|| {
        let session = Session::new();
        let (mut producer, mut consumer) = session.requests();
        let client = thread::spawn({
            let session = Arc::clone(&session);
            move || {
                for value in 1..=3 {
                    session.push(&mut producer, value);
                }
            }
        });
        for value in 1..=3 {
            assert_eq!(session.pop(&mut consumer), value);
        }
        client.join().unwrap();
    });
}

#[test]
fn what_is_published_at_once_is_seen_at_once() {
    model(|| {
        let session = Session::new();
        let (mut producer, mut consumer) = session.requests();
        let client = thread::spawn({
            let session = Arc::clone(&session);
            move || {
                producer.stage(&session.c2d, &descriptor(1));
                producer.stage(&session.c2d, &descriptor(2));
                producer.publish(&session.c2d, &session.d2c);
            }
        });
        while consumer.available(&session.c2d).unwrap() == 0 {
            consumer.sleep(&session.d2c, &session.c2d, FOREVER);
        }
        assert_eq!(consumer.available(&session.c2d), Ok(2));
        assert_eq!([session.pop(&mut consumer), session.pop(&mut consumer)], [1, 2]);
        client.join().unwrap();
    });
}

/// The order of `Lane::sleep` in the daemon: say so on the bell and on the ring, look at both, sleep on both.
fn lane_sleeps(session: &Session, consumer: &Consumer, bell: &Bell, rung: u32) {
    bell.say_sleeping(true);
    consumer.say_sleeping(&session.d2c, true);
    publish_before_looking();
    let (word, seen) = consumer.word(&session.c2d);
    if bell.seen() == rung && word.load() == seen {
        wait_any((bell, rung), &[(word, seen)]);
    }
    consumer.say_sleeping(&session.d2c, false);
    bell.say_sleeping(false);
}

#[test]
fn a_lane_that_sleeps_on_a_ring_and_a_bell_misses_neither() {
    model(|| {
        let session = Session::new();
        let bell = Arc::new(Bell::default());
        let (mut producer, mut consumer) = session.requests();
        let client = thread::spawn({
            let session = Arc::clone(&session);
            move || session.push(&mut producer, 1)
        });
        let control = thread::spawn({
            let bell = Arc::clone(&bell);
            move || bell.ring()
        });
        let (mut taken, mut told) = (false, false);
        while !(taken && told) {
            let rung = bell.seen();
            told |= rung != 0;
            if consumer.available(&session.c2d).unwrap() > 0 {
                assert_eq!(session.pop(&mut consumer), 1);
                taken = true;
            } else if !(taken && told) {
                lane_sleeps(&session, &consumer, &bell, rung);
            }
        }
        client.join().unwrap();
        control.join().unwrap();
    });
}

#[test]
fn a_bell_that_two_ring_wakes_its_sleeper_until_it_has_heard_both() {
    model(|| {
        let bell = Arc::new(Bell::default());
        let ringers: Vec<_> = (0..2)
            .map(|_| {
                let bell = Arc::clone(&bell);
                thread::spawn(move || bell.ring())
            })
            .collect();
        while bell.seen() != 2 {
            bell.say_sleeping(true);
            let rung = bell.seen();
            if rung != 2 {
                wait_any((&bell, rung), &[]);
            }
            bell.say_sleeping(false);
        }
        for ringer in ringers {
            ringer.join().unwrap();
        }
    });
}

/// As `Rings` in the client: threads share a consumer, put aside what is another's, and count who sleeps.
struct Waiters {
    session: Arc<Session>,
    receive: Mutex<(Consumer, Vec<u8>)>,
    sleepers: Mutex<u32>,
}

impl Waiters {
    fn say_sleeping(&self, sleeping: bool) {
        let mut sleepers = self.sleepers.lock().unwrap();
        *sleepers = if sleeping { *sleepers + 1 } else { *sleepers - 1 };
        Consumer::completions(self.session.layout).say_sleeping(&self.session.c2d, *sleepers > 0);
    }

    fn wait(&self, ticket: u8) {
        loop {
            let (word, seen) = {
                let mut receive = self.receive.lock().unwrap();
                let (consumer, done) = &mut *receive;
                for _ in 0..consumer.available(&self.session.d2c).unwrap() {
                    done.push(consumer.peek(&self.session.d2c)[0]);
                    consumer.advance(&self.session.c2d);
                }
                if done.contains(&ticket) {
                    return;
                }
                consumer.word(&self.session.d2c)
            };
            self.say_sleeping(true);
            if word.load() == seen {
                word.wait(seen, FOREVER);
            }
            self.say_sleeping(false);
        }
    }
}

#[test]
fn two_threads_that_wait_for_answers_of_one_ring_both_get_theirs() {
    let mut builder = loom::model::Builder::new();
    // Three threads with two locks: one preemption less, or it takes minutes.
    builder.preemption_bound = Some(PREEMPTIONS - 1);
    builder.check(|| {
        let session = Session::new();
        let waiters = Arc::new(Waiters {
            session: Arc::clone(&session),
            receive: Mutex::new((Consumer::completions(session.layout), Vec::new())),
            sleepers: Mutex::new(0),
        });
        let second = thread::spawn({
            let waiters = Arc::clone(&waiters);
            move || waiters.wait(2)
        });
        let lane = thread::spawn(move || {
            let mut producer = Producer::completions(session.layout);
            for ticket in [1, 2] {
                producer.stage(&session.d2c, &descriptor(ticket));
                producer.publish(&session.d2c, &session.c2d);
            }
        });
        waiters.wait(1);
        second.join().unwrap();
        lane.join().unwrap();
    });
}

/// What a hand-off does wrong, on purpose.
#[derive(Clone, Copy, PartialEq)]
enum Mistake {
    /// The producer looks for sleepers without a fence: it may do so before others see what it published.
    NoFence,
    /// The consumer sleeps without having looked again, on whatever value the word has by then.
    NoSecondLook,
    /// The producer looks for sleepers first and publishes then.
    LooksFirst,
}

fn broken_hand_off(mistake: Mistake) {
    model(move || {
        let session = Session::new();
        let tail = c2d::REQUEST_TAIL;
        let client = thread::spawn({
            let session = Arc::clone(&session);
            move || {
                let sleeps = || session.d2c.load_u32(d2c::SLEEPING) != 0;
                let before = sleeps();
                session.c2d.store_u32(tail, 1);
                if mistake == Mistake::NoSecondLook {
                    publish_before_looking();
                }
                let wakes = if mistake == Mistake::LooksFirst { before } else { sleeps() };
                if wakes {
                    Word { memory: &session.c2d, offset: tail }.wake();
                }
            }
        });
        let word = Word { memory: &session.c2d, offset: tail };
        if word.load() == 0 {
            session.d2c.store_u32(d2c::SLEEPING, 1);
            publish_before_looking();
            let seen = if mistake == Mistake::NoSecondLook { word.load() } else { 0 };
            word.wait(seen, FOREVER);
        }
        client.join().unwrap();
    });
}

// Canaries: if one of these goes through, the models show nothing. scripts/loom demands that each fails, by a deadlock.

#[test]
fn canary_no_fence() {
    broken_hand_off(Mistake::NoFence);
}

#[test]
fn canary_no_second_look() {
    broken_hand_off(Mistake::NoSecondLook);
}

#[test]
fn canary_looks_first() {
    broken_hand_off(Mistake::LooksFirst);
}

/// A slot that is written again before it has been read out: loom's cells say so.
#[test]
fn canary_no_room() {
    model(|| {
        let session = Session::new();
        let (mut producer, mut consumer) = session.requests();
        let client = thread::spawn({
            let session = Arc::clone(&session);
            move || {
                for value in 1..=3 {
                    producer.stage(&session.c2d, &descriptor(value));
                    producer.publish(&session.c2d, &session.d2c);
                }
            }
        });
        if consumer.available(&session.c2d).is_ok_and(|waiting| waiting > 0) {
            let _ = session.pop(&mut consumer);
        }
        client.join().unwrap();
    });
}
