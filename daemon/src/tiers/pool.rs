//! The pool: makes extents ahead of time and on demand, in threads of its own, and takes them back.
//!
//! Making an extent takes long (its pages are made, zeroed and pinned), so neither lanes nor the start wait for it.
//! A session asks with [`ExtentPool::prepare`] and gets a [`Supply`], which gives everything back when it is dropped,
//! wherever that happens.
//!
//! Three rules hold. *Nothing is promised twice*: a request claims its bytes of the [`ArenaBudget`] before it waits,
//! and there are never more extents than the budget has, so whoever has a claim is served in the end. *An extent
//! never changes uid*: a former owner's mapping outlives everything that we could do, so for another user it is
//! destroyed and a new one made. *No bytes are handed on*: an extent that comes back is overwritten with zeros before
//! anybody gets it, and stays pinned meanwhile.

mod worker;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvoyant_protocol::EXTENT_BYTES;
use thiserror::Error;
use tokio::sync::oneshot;

use crate::lane::Bomb;
use crate::status::{PoolReport, PoolState};
use crate::tiers::budget::ArenaBudget;
use crate::tiers::cgroup::Limits;
use crate::tiers::extent::{Extent, Recipe};
use crate::tiers::host_memory::{HugePages, node_has_memory, takes_huge_advice};
use crate::tiers::pin::Pin;
use crate::tiers::purse::Purse;

/// How long a session waits for extents. Clients give control requests 30 s.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(25);

/// What is to stay free under a memory limit when an extent is made, beside its own bytes.
const SPARE_BYTES: u64 = 64 << 20;

/// Progress is logged in so many steps.
const STEPS: u64 = 10;

/// Users whose extents are never reused: the kernel shows every user of a namespace that it cannot map as the first,
/// and the second is what we take when it tells us nothing.
pub(crate) const NOBODY: [u32; 2] = [65534, u32::MAX];

/// How a pool is to be.
#[derive(Debug)]
pub struct PoolSettings {
    /// Bytes that are made ready ahead of time.
    pub ahead_bytes: u64,
    /// Threads that make, wipe and destroy extents.
    pub threads: usize,
    /// Threads that only wipe and destroy: what a session that ends leaves is not to wait behind what is made for others, nor all of it
    /// behind each other.
    pub returning: usize,
    /// Of which pages extents are made.
    pub huge_pages: HugePages,
    /// NUMA node of the device, if it has one.
    pub numa_node: Option<u32>,
    /// How extents are pinned, if they are.
    pub pin: Option<Box<dyn Pin>>,
    /// Whether an extent that cannot be pinned is none.
    pub pin_required: bool,
    /// Limits that are looked at before each extent.
    pub limits: Limits,
}

impl PoolSettings {
    /// One thread, nothing ahead of time, nothing pinned, ordinary pages.
    #[must_use]
    pub fn unpinned() -> Self {
        Self {
            ahead_bytes: 0,
            threads: 1,
            returning: 0,
            huge_pages: HugePages::Off,
            numa_node: None,
            pin: None,
            pin_required: false,
            limits: Limits::default(),
        }
    }
}

/// Why there is no supply.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The budget does not have so much, or not for this user.
    #[error("the arena is full")]
    Full,
    /// It could not be made.
    #[error("{0}")]
    Failed(String),
    /// It takes longer than a client waits. What has been made is kept.
    #[error(
        "it takes longer than {} s to make {extents} extents of 64 MiB ready, of which more are every second: ask \
         again, or set pin_ahead", PREPARE_TIMEOUT.as_secs()
    )]
    Slow {
        /// How many were asked for.
        extents: usize,
    },
}

/// Somebody who waits for extents, and has claimed their bytes.
#[derive(Debug)]
struct Waiter {
    uid: u32,
    purse: Purse,
    wanted: usize,
    granted: Vec<Extent>,
    answer: oneshot::Sender<Result<Supply, Refusal>>,
}

impl Waiter {
    fn missing(&self) -> usize {
        self.wanted - self.granted.len()
    }
}

#[derive(Debug, Default)]
struct State {
    /// Extents that exist or are being made. Never more than the budget has.
    made: usize,
    /// Of those, extents that are being made.
    making: usize,
    /// Of those, ones that are pinned.
    pinned: usize,
    /// Of those, ones of huge pages.
    huge: usize,
    /// Nobody ever had these.
    fresh: Vec<Extent>,
    /// Wiped, and kept for the user who had them.
    idle: HashMap<u32, Vec<Extent>>,
    /// As their sessions left them.
    dirty: VecDeque<(u32, Extent)>,
    /// Dirty ones that a thread is wiping.
    wiping: usize,
    /// Ones that a thread is destroying.
    leaving: usize,
    waiting: VecDeque<Waiter>,
    /// Why no more is made ahead, or why extents are not pinned.
    trouble: Option<String>,
    /// Whether nothing more is made ahead.
    ahead_failed: bool,
    /// Tenths of it that have been logged.
    logged: u64,
    stopping: bool,
}

impl State {
    fn make(&mut self, ahead: bool) -> Job {
        self.made += 1;
        self.making += 1;
        Job::Make { ahead }
    }

    fn wipe(&mut self, uid: u32, extent: Extent) -> Job {
        self.wiping += 1;
        Job::Wipe(uid, extent)
    }

    fn destroy(&mut self, extent: Extent) -> Job {
        self.leaving += 1;
        Job::Destroy(extent)
    }
}

/// What a thread is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Duty {
    /// Whatever somebody waits for.
    All,
    /// Extents that come back.
    Returning,
}

/// What a thread is to do next.
#[derive(Debug)]
enum Job {
    Make { ahead: bool },
    Wipe(u32, Extent),
    Destroy(Extent),
}

/// A supply, or a refusal, and whom it is for. Sent once the lock is released: whoever has gone drops it.
type Delivery = (oneshot::Sender<Result<Supply, Refusal>>, Result<Supply, Refusal>);

#[derive(Debug)]
struct Shared {
    budget: Arc<ArenaBudget>,
    settings: PoolSettings,
    recipe: Recipe,
    pinning: AtomicBool,
    /// Extents that are made ahead of time.
    ahead: usize,
    began: Instant,
    state: Mutex<State>,
    changed: Condvar,
}

/// See the module.
#[derive(Debug)]
pub struct ExtentPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl ExtentPool {
    /// Starts its threads, which begin to make extents at once.
    pub fn start(budget: Arc<ArenaBudget>, mut settings: PoolSettings) -> std::io::Result<Self> {
        settings.numa_node = settings.numa_node.filter(|node| {
            let there = node_has_memory(*node);
            if !there {
                tracing::warn!("NUMA node {node} has no memory here; extents lie on any node");
            }
            there
        });
        let capacity = budget.extents();
        let ahead = (settings.ahead_bytes.div_ceil(EXTENT_BYTES as u64) as usize).min(capacity);
        let recipe =
            Recipe { huge: settings.huge_pages, advise: takes_huge_advice(), node: settings.numa_node };
        let (threads, returning) = (settings.threads.max(1), settings.returning);
        let shared = Arc::new(Shared {
            budget,
            pinning: AtomicBool::new(settings.pin.is_some()),
            settings,
            recipe,
            ahead,
            began: Instant::now(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let mut pool = Self { shared: Arc::clone(&shared), threads: Vec::with_capacity(threads + returning) };
        let makers = (0..threads).map(|index| (format!("pool-{index}"), Duty::All));
        let helpers = (0..returning).map(|index| (format!("return-{index}"), Duty::Returning));
        for (name, duty) in makers.chain(helpers) {
            let shared = Arc::clone(&shared);
            let thread = crate::threads::start(name, move || {
                let _bomb = Bomb;
                shared.work(duty);
            })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// The budget that it is bound by.
    #[must_use]
    pub fn budget(&self) -> &Arc<ArenaBudget> {
        &self.shared.budget
    }

    /// An empty supply for a user's session, which others are added to.
    #[must_use]
    pub fn supply(&self, uid: u32) -> Supply {
        let purse = Purse::of(&self.shared.budget, uid);
        Supply { shared: Arc::clone(&self.shared), uid, purse, extents: Vec::new(), unclaimed: false }
    }

    /// Takes extents over that another process made for this user, with what is in them.
    ///
    /// # Errors
    /// [`Refusal::Full`] if the budget, or the user's part of it, does not have so much.
    pub fn adopt(&self, uid: u32, mut extents: Vec<Extent>) -> Result<Supply, Refusal> {
        let purse = Purse::of(&self.shared.budget, uid);
        if !purse.take_extents(extents.len()) {
            return Err(Refusal::Full);
        }
        if let Some(pin) = self.shared.pin() {
            for extent in &mut extents {
                match pin.pin(extent.memory()) {
                    Ok(guard) => extent.keep_pinned(guard),
                    Err(error) => {
                        tracing::warn!("{error}; an extent of a session that is kept stays unpinned");
                    }
                }
            }
        }
        let mut state = self.shared.lock();
        state.made += extents.len();
        state.pinned += extents.iter().filter(|extent| extent.is_pinned()).count();
        state.huge += extents.iter().filter(|extent| extent.is_huge()).count();
        drop(state);
        // There may be more now than there may be.
        self.shared.changed.notify_all();
        Ok(Supply { shared: Arc::clone(&self.shared), uid, purse, extents, unclaimed: true })
    }

    /// The daemon ends: from here on what is given back stays as it is. Clients have it mapped, and go on with the next daemon, or alone.
    pub fn leave(&self) {
        self.shared.lock().stopping = true;
        self.shared.changed.notify_all();
    }

    /// Claims so many extents for a user; the answer comes once all of them are there. Dropping the receiver gives
    /// everything back.
    pub fn request(
        &self,
        uid: u32,
        extents: usize,
    ) -> Result<oneshot::Receiver<Result<Supply, Refusal>>, Refusal> {
        let purse = Purse::of(&self.shared.budget, uid);
        if !purse.take_extents(extents) {
            return Err(Refusal::Full);
        }
        let (answer, receiver) = oneshot::channel();
        let mut state = self.shared.lock();
        state.waiting.push_back(Waiter { uid, purse, wanted: extents, granted: Vec::new(), answer });
        self.shared.deliver(state);
        Ok(receiver)
    }

    /// As [`ExtentPool::request`], waited for.
    pub async fn prepare(&self, uid: u32, extents: usize) -> Result<Supply, Refusal> {
        let receiver = self.request(uid, extents)?;
        match tokio::time::timeout(PREPARE_TIMEOUT, receiver).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Refusal::Failed("the daemon stops".into())),
            Err(_) => Err(Refusal::Slow { extents }),
        }
    }

    /// What it has, at this moment.
    #[must_use]
    pub fn report(&self) -> PoolReport {
        let shared = &self.shared;
        let state = shared.lock();
        let bytes = |extents: usize| (extents * EXTENT_BYTES) as u64;
        let behind = state.made < shared.ahead && !state.ahead_failed;
        let busy = behind || state.making + state.wiping + state.leaving + state.dirty.len() > 0;
        PoolReport {
            made_bytes: bytes(state.made - state.making),
            ready_bytes: bytes(state.fresh.len() + state.idle.values().map(Vec::len).sum::<usize>()),
            pinned_bytes: bytes(state.pinned),
            huge_bytes: bytes(state.huge),
            ahead_bytes: bytes(shared.ahead),
            numa_node: shared.settings.numa_node,
            pin: shared.pin().map_or("none", Pin::name).into(),
            state: match (&state.trouble, busy) {
                (_, true) => PoolState::Filling,
                (None, false) => PoolState::Idle,
                (Some(_), false) => PoolState::Failed,
            },
            trouble: state.trouble.clone(),
        }
    }
}

impl Drop for ExtentPool {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stopping = true;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        drop(waiting);
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // It cannot have panicked: see `Bomb`.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pin(&self) -> Option<&dyn Pin> {
        self.settings.pin.as_deref().filter(|_| self.pinning.load(Ordering::Relaxed))
    }

    /// Hands ready extents to those who wait, and wakes the threads for what is missing.
    fn deliver(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        let deliveries = self.serve(&mut state);
        drop(state);
        self.changed.notify_all();
        for (answer, supply) in deliveries {
            // A supply that nobody takes any more gives itself back.
            let _ = answer.send(supply);
        }
    }

    fn serve(self: &Arc<Self>, state: &mut State) -> Vec<Delivery> {
        let mut deliveries = Vec::new();
        let mut waiting = std::mem::take(&mut state.waiting);
        waiting.retain_mut(|waiter| {
            if waiter.answer.is_closed() {
                waiter.purse.give_extents(waiter.wanted);
                state.dirty.extend(waiter.granted.drain(..).map(|extent| (waiter.uid, extent)));
                return false;
            }
            while waiter.missing() > 0 {
                let own = state.idle.get_mut(&waiter.uid).and_then(Vec::pop);
                let Some(extent) = own.or_else(|| state.fresh.pop()) else { break };
                waiter.granted.push(extent);
            }
            true
        });
        while let Some(at) = waiting.iter().position(|waiter| waiter.missing() == 0) {
            let Some(Waiter { uid, purse, granted, answer, .. }) = waiting.remove(at) else { break };
            deliveries.push((
                answer,
                Ok(Supply { shared: Arc::clone(self), uid, purse, extents: granted, unclaimed: false }),
            ));
        }
        state.waiting = waiting;
        deliveries
    }

    /// Refuses the first who waits.
    fn refuse(&self, state: &mut State, reason: &str) -> Option<Delivery> {
        let Waiter { uid, purse, wanted, granted, answer } = state.waiting.pop_front()?;
        purse.give_extents(wanted);
        state.dirty.extend(granted.into_iter().map(|extent| (uid, extent)));
        Some((answer, Err(Refusal::Failed(reason.to_owned()))))
    }
}

/// Extents of one user's session. Dropping it gives them, and their share of the budget, back.
#[derive(Debug)]
pub struct Supply {
    shared: Arc<Shared>,
    uid: u32,
    purse: Purse,
    extents: Vec<Extent>,
    /// Whether a client that this daemon does not serve may have them mapped: then they are let go of as they are.
    unclaimed: bool,
}

impl Supply {
    /// The extents, in the order in which they came.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// What its user draws on.
    #[must_use]
    pub fn purse(&self) -> &Purse {
        &self.purse
    }

    /// A supply for the same user with nothing in it.
    #[must_use]
    pub fn empty(&self) -> Self {
        let (shared, purse) = (Arc::clone(&self.shared), self.purse.clone());
        Self { shared, uid: self.uid, purse, extents: Vec::new(), unclaimed: false }
    }

    /// Their client is here.
    pub fn claimed(&mut self) {
        self.unclaimed = false;
    }

    /// Lets go of all extents as they are.
    fn leave(&mut self) {
        let extents = std::mem::take(&mut self.extents);
        self.purse.give_extents(extents.len());
        let mut state = self.shared.lock();
        state.made -= extents.len();
        state.pinned -= extents.iter().filter(|extent| extent.is_pinned()).count();
        state.huge -= extents.iter().filter(|extent| extent.is_huge()).count();
        drop(state);
        drop(extents);
        self.shared.changed.notify_all();
    }

    /// Takes an extent out; the last one takes its place.
    #[must_use]
    pub fn part(&mut self, index: usize) -> Self {
        let extents = vec![self.extents.swap_remove(index)];
        Self {
            shared: Arc::clone(&self.shared),
            uid: self.uid,
            purse: self.purse.clone(),
            extents,
            unclaimed: false,
        }
    }

    /// Adds another supply to the end.
    pub fn append(&mut self, mut other: Self) {
        self.extents.append(&mut other.extents);
    }
}

impl Drop for Supply {
    fn drop(&mut self) {
        if self.extents.is_empty() {
            return;
        }
        if self.unclaimed {
            return self.leave();
        }
        let mut state = self.shared.lock();
        self.purse.give_extents(self.extents.len());
        if state.stopping {
            drop(state);
            self.extents.clear();
            return;
        }
        state.dirty.extend(self.extents.drain(..).map(|extent| (self.uid, extent)));
        drop(state);
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests;
