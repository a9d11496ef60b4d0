//! Shared memory and a kernel that loom can see into: under `cfg(loom)`, rings and bells run on these.
//!
//! The code of [`crate::ring`] and [`crate::futex::Bell`] is the same; what differs is what is below it. Words are
//! loom's atomics with the orderings of [`crate::memory`]. Slots are cells in which loom finds every access that is
//! not ordered after the one before. A futex is what Linux makes of one: the word is compared and the sleeper put
//! into a queue under one lock, which whoever wakes takes too. No wait ends by itself, so that a wake-up that is
//! lost is a deadlock, which loom reports with the steps that lead there.

#[cfg(test)]
mod models;

use std::sync::Arc as StdArc;
use std::time::Duration;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, fence};
use loom::sync::{Condvar, Mutex};

pub(crate) use loom::sync::atomic::AtomicBool;
pub(crate) use std::sync::atomic::Ordering;

use crate::layout::{DESCRIPTOR_BYTES, Layout, c2d};
use crate::memory::MemoryError;

/// See [`crate::futex::publish_before_looking`].
pub(crate) fn publish_before_looking() {
    fence(Ordering::SeqCst);
}

/// One sleeper of the kernel's queue.
struct Sleeper {
    words: Vec<usize>,
    woken: bool,
}

/// The kernel's queue of sleepers.
struct Kernel {
    sleepers: Mutex<Vec<StdArc<std::sync::Mutex<Sleeper>>>>,
    changed: Condvar,
}

loom::lazy_static! {
    static ref KERNEL: Kernel = Kernel { sleepers: Mutex::new(Vec::new()), changed: Condvar::new() };
}

fn sleeper(of: &StdArc<std::sync::Mutex<Sleeper>>) -> std::sync::MutexGuard<'_, Sleeper> {
    of.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Sleeps until one of the words is woken, unless one of them differs from what was seen already.
fn futex_wait(words: &[(&AtomicU32, u32)]) {
    let mut queue = KERNEL.sleepers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if words.iter().any(|(word, seen)| word.load(Ordering::Acquire) != *seen) {
        return;
    }
    let words = words.iter().map(|(word, _)| std::ptr::from_ref::<AtomicU32>(word) as usize).collect();
    let me = StdArc::new(std::sync::Mutex::new(Sleeper { words, woken: false }));
    queue.push(StdArc::clone(&me));
    while !sleeper(&me).woken {
        queue = KERNEL.changed.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
    }
}

fn futex_wake(word: &AtomicU32, most: usize) {
    let mut queue = KERNEL.sleepers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let address = std::ptr::from_ref(word) as usize;
    let mut woken = 0;
    queue.retain(|one| {
        let mut one = sleeper(one);
        let wakes = woken < most && one.words.contains(&address);
        one.woken |= wakes;
        woken += usize::from(wakes);
        !wakes
    });
    if woken > 0 {
        KERNEL.changed.notify_all();
    }
}

/// One memfd of a session, as both sides map it.
#[derive(Debug)]
pub struct SharedMapping {
    /// The header's words, 128 bytes apart as [`c2d`] and [`crate::layout::d2c`] have them.
    words: [AtomicU32; 3],
    first_slot: usize,
    slots: Vec<UnsafeCell<[u8; DESCRIPTOR_BYTES]>>,
}

// SAFETY: a slot is written and read by whoever the ring's indices give it to. That this is one at a time, each after
// the other, is what the models are there to find out: loom's cells report it where it is not so.
unsafe impl Sync for SharedMapping {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for SharedMapping {}

impl SharedMapping {
    /// Memory whose words are zeros.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        let slots = (0..layout.limits.ring_slots).map(|_| UnsafeCell::new([0; DESCRIPTOR_BYTES]));
        Self { words: Default::default(), first_slot: layout.descriptor(0), slots: slots.collect() }
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        &self.words[offset / c2d::COMPLETION_HEAD]
    }

    fn slot(&self, offset: usize) -> &UnsafeCell<[u8; DESCRIPTOR_BYTES]> {
        &self.slots[(offset - self.first_slot) / DESCRIPTOR_BYTES]
    }

    /// As the real one.
    #[must_use]
    pub fn load_u32(&self, offset: usize) -> u32 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// As the real one.
    pub fn store_u32(&self, offset: usize, value: u32) {
        self.word(offset).store(value, Ordering::Release);
    }

    /// Copies a descriptor out.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), MemoryError> {
        // SAFETY: loom makes sure that nobody writes meanwhile.
        self.slot(offset).with(|slot| into.copy_from_slice(unsafe { &*slot }));
        Ok(())
    }

    /// Copies a descriptor in.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), MemoryError> {
        // SAFETY: loom makes sure that nobody reads or writes meanwhile.
        self.slot(offset).with_mut(|slot| unsafe { (*slot).copy_from_slice(from) });
        Ok(())
    }
}

/// As [`crate::futex::Word`].
#[derive(Debug, Clone, Copy)]
pub struct Word<'a> {
    /// The mapping that holds it.
    pub memory: &'a SharedMapping,
    /// Its offset in bytes.
    pub offset: usize,
}

impl Word<'_> {
    /// Its value.
    #[must_use]
    pub fn load(&self) -> u32 {
        self.memory.load_u32(self.offset)
    }

    /// Sleeps while the word has the value `seen`. No time passes in a model.
    pub fn wait(&self, seen: u32, _: Duration) {
        futex_wait(&[(self.memory.word(self.offset), seen)]);
    }

    /// Wakes everybody who sleeps on the word.
    pub fn wake(&self) {
        futex_wake(self.memory.word(self.offset), usize::MAX);
    }
}

/// The word of a bell.
#[derive(Debug, Default)]
pub(crate) struct OwnWord(AtomicU32);

impl OwnWord {
    pub(crate) fn add_one(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn load(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    pub(crate) fn wake_one(&self) {
        futex_wake(&self.0, 1);
    }
}

/// As `futex::wait_any`.
pub fn wait_any(bell: (&crate::futex::Bell, u32), words: &[(Word<'_>, u32)]) {
    let mut all = vec![(&bell.0.rung.0, bell.1)];
    all.extend(words.iter().map(|(word, seen)| (word.memory.word(word.offset), *seen)));
    futex_wait(&all);
}
