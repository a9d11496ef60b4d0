//! Device memory of sessions: what they may have together, how it is allocated, and how it goes to a client.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvoyant_cuda::{Context, CudaError, DeviceBuffer, ErrorKind, SharedBuffer};
use kvoyant_protocol::control::{Failure, features};
use kvoyant_protocol::device::Export;
use kvoyant_protocol::quota::Quota;

use crate::device::SlabError;
use crate::quota::{self, Account};

/// How long an allocation is tried again: the memory of a killed process comes back only once its driver state has
/// been torn down, which takes a moment.
const RETRY_FOR: Duration = Duration::from_secs(2);

/// First pause between tries; it doubles.
const RETRY_FIRST: Duration = Duration::from_millis(5);

/// What sessions may have on a device.
#[derive(Debug)]
pub(super) struct Budget {
    pub(super) set_aside: u64,
    used: AtomicU64,
    quarantined: AtomicU64,
}

impl Budget {
    pub(super) fn new(set_aside: u64) -> Arc<Self> {
        Arc::new(Self { set_aside, used: AtomicU64::new(0), quarantined: AtomicU64::new(0) })
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn quarantined(&self) -> u64 {
        self.quarantined.load(Ordering::Relaxed)
    }

    /// Takes so much, if so much stays free.
    fn take(self: &Arc<Self>, bytes: u64, leave: u64, user: &Arc<quota::Charge>) -> Option<Charge> {
        let room = |after: &u64| after.saturating_add(leave) <= self.set_aside;
        let fits = |used: u64| used.checked_add(bytes).filter(room);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        Some(Charge { budget: Arc::clone(self), bytes, quarantined: false, _user: Arc::clone(user) })
    }

    /// Why a user cannot have so much, once it is not charged to them any more.
    fn refuse(&self, needed_bytes: u64, account: &Account, user: Arc<quota::Charge>) -> SlabError {
        drop(user);
        if needed_bytes <= self.set_aside.saturating_sub(self.used()) {
            let over = account.over_share(Quota::Device, needed_bytes, self.set_aside);
            return SlabError::Refused(Failure::Quota(over));
        }
        account.wants(Quota::Device, needed_bytes, self.set_aside);
        self.full(needed_bytes)
    }

    fn full(&self, needed_bytes: u64) -> SlabError {
        SlabError::Refused(Failure::DeviceFull {
            needed_bytes,
            free_bytes: self.set_aside.saturating_sub(self.used()),
            set_aside_bytes: self.set_aside,
            quarantined_bytes: self.quarantined(),
        })
    }
}

/// A session's part of the budget, given back when dropped.
#[derive(Debug)]
pub(super) struct Charge {
    budget: Arc<Budget>,
    bytes: u64,
    quarantined: bool,
    /// The user has so much more, until it is freed.
    _user: Arc<quota::Charge>,
}

impl Charge {
    /// Its memory is not used any more, and cannot be freed yet.
    pub(super) fn quarantine(&mut self) {
        if !std::mem::replace(&mut self.quarantined, true) {
            self.budget.quarantined.fetch_add(self.bytes, Ordering::Relaxed);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
        if self.quarantined {
            self.budget.quarantined.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

/// How memory goes to a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// A file descriptor: a capability, refcounted by the driver, mapped read-only where it can enforce that.
    Descriptor,
    /// A classic handle: whoever holds its bytes can open the memory.
    Handle,
}

impl Way {
    /// The better one of those that client and daemon both can.
    pub(super) fn choose(common: u64) -> Option<Self> {
        if common & features::CUDA_DESCRIPTORS != 0 {
            Some(Self::Descriptor)
        } else if common & features::CUDA_HANDLES != 0 {
            Some(Self::Handle)
        } else {
            None
        }
    }
}

/// One allocation of a session.
#[derive(Debug)]
pub(super) enum Allocation {
    Handle(DeviceBuffer),
    Descriptor(SharedBuffer),
}

impl Allocation {
    fn new(context: &Context, way: Way, bytes: usize) -> Result<Self, CudaError> {
        Ok(match way {
            Way::Handle => Self::Handle(context.alloc(bytes)?),
            Way::Descriptor => Self::Descriptor(context.alloc_shareable(bytes)?),
        })
    }

    pub(super) fn ptr(&self) -> u64 {
        match self {
            Self::Handle(buffer) => buffer.ptr(),
            Self::Descriptor(buffer) => buffer.ptr(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Handle(buffer) => buffer.len(),
            Self::Descriptor(buffer) => buffer.len(),
        }
    }

    /// Whether freeing it while an importer has it open is undefined.
    pub(super) fn needs_quarantine(&self) -> bool {
        matches!(self, Self::Handle(_))
    }

    pub(super) fn export(&self) -> Result<(Export, Option<OwnedFd>), CudaError> {
        let bytes = self.bytes() as u64;
        Ok(match self {
            Self::Handle(buffer) => (Export::Handle { handle: buffer.ipc_handle()?.into(), bytes }, None),
            Self::Descriptor(buffer) => (Export::Descriptor { bytes }, Some(buffer.export_fd()?)),
        })
    }
}

/// Allocates a session's memory, one piece for each size, within the budget and with patience for the memory of the recently dead. `failed`
/// makes an answer of a driver's error.
pub(super) fn allocate(
    context: &Context,
    budget: &Arc<Budget>,
    way: Way,
    sizes: &[usize],
    account: &Arc<Account>,
    failed: &dyn Fn(CudaError) -> SlabError,
) -> Result<(Vec<Allocation>, Charge), SlabError> {
    // The driver gives whole units; so that the budget means what the device loses, it counts them too.
    let rounded = |bytes: usize| bytes.checked_next_multiple_of(kvoyant_cuda::ALLOCATION_UNIT);
    let needed = sizes
        .iter()
        .try_fold(0u64, |sum, bytes| sum.checked_add(rounded(*bytes)? as u64))
        .ok_or_else(|| budget.full(u64::MAX))?;
    let user = account.charge(Quota::Device, needed);
    let user = Arc::new(user.map_err(|over| SlabError::Refused(Failure::Quota(over)))?);
    let since = Instant::now();
    let mut pause = RETRY_FIRST;
    loop {
        let leave = account.leaves(Quota::Device, budget.set_aside, account.held(Quota::Device));
        let tried = match budget.take(needed, leave, &user) {
            // What is in quarantine may come free any moment.
            None if budget.quarantined() == 0 => return Err(budget.refuse(needed, account, user)),
            None => None,
            Some(charge) => {
                let all = sizes.iter().map(|bytes| Allocation::new(context, way, *bytes));
                match all.collect::<Result<_, _>>() {
                    Ok(all) => {
                        account.served(Quota::Device);
                        return Ok((all, charge));
                    }
                    Err(error) if error.kind() == ErrorKind::OutOfMemory => Some(error),
                    Err(error) => return Err(failed(error)),
                }
            }
        };
        if since.elapsed() >= RETRY_FOR {
            if let Some(error) = tried {
                tracing::warn!(
                    "no {needed} bytes of device memory within the set-aside {}: {error}",
                    budget.set_aside
                );
                // The card itself has no room, whatever users have of it.
                drop(user);
                return Err(budget.full(needed));
            }
            return Err(budget.refuse(needed, account, user));
        }
        std::thread::sleep(pause);
        pause *= 2;
    }
}

/// A driver's refusal, as the session hears it.
pub(super) fn refused(error: &CudaError) -> SlabError {
    SlabError::Refused(Failure::Device(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_never_gives_more_than_was_set_aside_and_gets_everything_back() {
        let budget = Budget::new(10);
        let account = quota::Ledger::default().account(1);
        let user = Arc::new(account.charge(Quota::Device, 10).unwrap());
        let mut first = budget.take(6, 0, &user).unwrap();
        assert!(budget.take(5, 0, &user).is_none());
        assert!(budget.take(u64::MAX, 0, &user).is_none());
        assert!(budget.take(3, 2, &user).is_none(), "something is to stay free");
        let second = budget.take(4, 0, &user).unwrap();
        drop(user);
        first.quarantine();
        first.quarantine();
        assert_eq!((budget.used(), budget.quarantined()), (10, 6));
        drop(first);
        assert_eq!(account.held(Quota::Device), 10);
        drop(second);
        assert_eq!(account.held(Quota::Device), 0);
        assert_eq!((budget.used(), budget.quarantined()), (0, 0));
    }

    #[test]
    fn a_descriptor_is_preferred_to_a_handle() {
        assert_eq!(Way::choose(features::CUDA), Some(Way::Descriptor));
        assert_eq!(Way::choose(features::CUDA_HANDLES), Some(Way::Handle));
        assert_eq!(Way::choose(features::COMMON), None);
    }
}
