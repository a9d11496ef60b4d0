//! What the pool's threads do: make, wipe and destroy extents, in the order in which somebody waits for that.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use kvoyant_protocol::EXTENT_BYTES;

use super::{Duty, Job, NOBODY, SPARE_BYTES, STEPS, Shared, State, Waiter};
use crate::tiers::extent::Extent;
use crate::tiers::pin::Pin;

impl Shared {
    pub(super) fn work(self: &Arc<Self>, duty: Duty) {
        let mut state = self.lock();
        while !state.stopping {
            let next = match duty {
                Duty::All => self.next(&mut state),
                Duty::Returning => self.returned(&mut state),
            };
            let Some(job) = next else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            match job {
                Job::Make { ahead } => self.make(ahead),
                Job::Wipe(uid, extent) => self.wipe(uid, extent),
                Job::Destroy(extent) => self.destroy(extent),
            }
            state = self.lock();
        }
    }

    /// Whether an extent that comes back is worth its keep: pinning it took long, or it is to be there anyway.
    fn keeps(&self, state: &State, uid: u32, extent: &Extent) -> bool {
        !NOBODY.contains(&uid) && (extent.is_pinned() || state.made <= self.ahead)
    }

    fn next(&self, state: &mut State) -> Option<Job> {
        let missing: usize = state.waiting.iter().map(Waiter::missing).sum();
        if missing > state.making + state.leaving {
            let returning = state.dirty.iter().position(|(uid, extent)| {
                self.keeps(state, *uid, extent) && state.waiting.iter().any(|waiter| waiter.uid == *uid)
            });
            if let Some((uid, extent)) = returning.and_then(|at| state.dirty.remove(at)) {
                return Some(state.wipe(uid, extent));
            }
            if state.made < self.budget.extents() {
                return Some(state.make(false));
            }
            // What is idle now belongs to others than those who wait.
            if let Some(extent) = state.idle.values_mut().find_map(Vec::pop) {
                return Some(state.destroy(extent));
            }
            if let Some((_, extent)) = state.dirty.pop_front() {
                return Some(state.destroy(extent));
            }
        }
        if let Some(job) = self.returned(state) {
            return Some(job);
        }
        // Made for somebody who has gone meanwhile, or ahead of time before others were adopted that leave no room for it. Whoever waits
        // has been given what is ready.
        let beyond = state.made > self.budget.extents();
        let left = || state.fresh.iter().position(|extent| beyond || !extent.is_pinned());
        if state.made > self.ahead
            && let Some(at) = left()
        {
            let extent = state.fresh.swap_remove(at);
            return Some(state.destroy(extent));
        }
        // Those that have been destroyed in the meantime are made again.
        (!state.ahead_failed && state.made < self.ahead).then(|| state.make(true))
    }

    /// What is to be done with the extent that came back first.
    fn returned(&self, state: &mut State) -> Option<Job> {
        let (uid, extent) = state.dirty.pop_front()?;
        let keeps = self.keeps(state, uid, &extent);
        Some(if keeps { state.wipe(uid, extent) } else { state.destroy(extent) })
    }

    fn make(self: &Arc<Self>, ahead: bool) {
        let made = self.make_one(ahead);
        let mut state = self.lock();
        state.making -= 1;
        match made {
            Ok(extent) => {
                state.pinned += usize::from(extent.is_pinned());
                state.huge += usize::from(extent.is_huge());
                state.fresh.push(extent);
                if self.pinning.load(Ordering::Relaxed) == self.settings.pin.is_some() && !state.ahead_failed
                {
                    state.trouble = None;
                }
                let progress = self.progress(&mut state);
                self.deliver(state);
                if let Some(progress) = progress {
                    tracing::info!("{progress}");
                }
            }
            Err(reason) => {
                state.made -= 1;
                state.trouble = Some(reason.clone());
                let ended = ahead && !std::mem::replace(&mut state.ahead_failed, true);
                let refused = if ahead { None } else { self.refuse(&mut state, &reason) };
                self.deliver(state);
                if ended {
                    tracing::warn!("nothing more is made ready ahead of time: {reason}");
                }
                if let Some((answer, refusal)) = refused {
                    let _ = answer.send(refusal);
                }
            }
        }
    }

    fn make_one(&self, ahead: bool) -> Result<Extent, String> {
        let pin = self.pin();
        let populate = ahead || pin.is_some();
        if populate && !self.recipe.finds_huge() {
            self.look_for_room(ahead)?;
        }
        let mut extent = self.recipe.make(populate).map_err(|error| error.to_string())?;
        let Some(pin) = pin else { return Ok(extent) };
        match pin.pin(extent.memory()) {
            Ok(guard) => extent.keep_pinned(guard),
            Err(error) if self.settings.pin_required => return Err(error.to_string()),
            Err(error) => {
                if self.pinning.swap(false, Ordering::Relaxed) {
                    tracing::warn!("{error}; going on unpinned");
                    self.lock().trouble = Some(error.to_string());
                }
            }
        }
        Ok(extent)
    }

    /// A page beyond a memory limit would end the daemon, so that an extent that comes near one is refused.
    fn look_for_room(&self, ahead: bool) -> Result<(), String> {
        let Some(room) = self.settings.limits.room() else { return Ok(()) };
        // Ahead of time, every thread may be at it, and others are to have something too.
        let spare = if ahead {
            (room.limit_bytes / 50).max(SPARE_BYTES * (1 + self.settings.threads as u64))
        } else {
            SPARE_BYTES
        };
        if room.free_bytes >= EXTENT_BYTES as u64 + spare {
            return Ok(());
        }
        Err(format!(
            "{room}, too little for another extent of 64 MiB; lower the arena size or raise the limit"
        ))
    }

    /// What to log when another tenth of what is wanted ahead is there.
    fn progress(&self, state: &mut State) -> Option<String> {
        let made = (state.made - state.making).min(self.ahead);
        let tenths = (made as u64 * STEPS).checked_div(self.ahead as u64)?;
        if tenths <= state.logged {
            return None;
        }
        state.logged = tenths;
        Some(format!(
            "{} of {} MiB of the arena are ready ahead of time ({}, {} MiB in huge pages) after {:.1} s",
            (made * EXTENT_BYTES) >> 20,
            (self.ahead * EXTENT_BYTES) >> 20,
            self.pin().map_or("unpinned", Pin::name),
            (state.huge * EXTENT_BYTES) >> 20,
            self.began.elapsed().as_secs_f64()
        ))
    }

    fn wipe(self: &Arc<Self>, uid: u32, extent: Extent) {
        if let Err(error) = extent.wipe() {
            tracing::warn!("an extent cannot be used again: {error}");
            let mut state = self.lock();
            state.wiping -= 1;
            state.leaving += 1;
            drop(state);
            return self.destroy(extent);
        }
        let mut state = self.lock();
        state.wiping -= 1;
        state.idle.entry(uid).or_default().push(extent);
        self.deliver(state);
    }

    fn destroy(self: &Arc<Self>, extent: Extent) {
        let (pinned, huge) = (extent.is_pinned(), extent.is_huge());
        extent.destroy();
        let mut state = self.lock();
        state.leaving -= 1;
        state.made -= 1;
        state.pinned -= usize::from(pinned);
        state.huge -= usize::from(huge);
        state.idle.retain(|_, extents| !extents.is_empty());
        self.deliver(state);
    }
}
