//! What lies at which address of this process: device memory, mapped memory of others, pinned host memory.
//!
//! Every call that takes an address looks it up here. What was freed is remembered a while, so that a later use can be
//! told from a stray pointer.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::driver::Driver;
use crate::ffi::{Code, Outcome};
use crate::machine::Role;
use crate::os;

/// How many freed ranges are remembered; their addresses are not used again while they are.
const REMEMBERED: usize = 4096;

/// What a range of addresses is.
#[derive(Debug)]
pub(crate) enum Kind {
    /// Memory of `cuMemAlloc`.
    Device { file: File, id: u64 },
    /// Another process's allocation, opened by its handle.
    Imported { id: u64, opened: AtomicU32 },
    /// Physical memory mapped at reserved addresses; access 0 is none, 1 reading, 3 reading and writing.
    Mapped { physical: Arc<crate::vmm::Physical>, access: AtomicU32 },
    /// Memory of `cuMemHostAlloc`.
    Pinned { flags: u32 },
    /// Memory of the caller's own, registered.
    Registered { flags: u32 },
}

impl Kind {
    /// Whether the memory is a device's.
    pub(crate) fn is_device(&self) -> bool {
        !matches!(self, Self::Pinned { .. } | Self::Registered { .. })
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Device { .. } => "device memory",
            Self::Imported { .. } => "memory opened from a handle",
            Self::Mapped { .. } => "mapped physical memory",
            Self::Pinned { .. } => "pinned host memory",
            Self::Registered { .. } => "registered host memory",
        }
    }
}

/// A range of addresses that the driver knows.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) base: u64,
    pub(crate) bytes: u64,
    pub(crate) device: u32,
    pub(crate) kind: Kind,
    /// Operations on streams that have still to use it.
    uses: AtomicUsize,
}

impl Region {
    pub(crate) fn new(base: u64, bytes: u64, device: u32, kind: Kind) -> Self {
        Self { base, bytes, device, kind, uses: AtomicUsize::new(0) }
    }

    /// Whether the device may read it, or write it.
    fn allows(&self, writes: bool) -> bool {
        match &self.kind {
            Kind::Mapped { access, .. } => access.load(Ordering::SeqCst) >= if writes { 3 } else { 1 },
            Kind::Registered { flags } => !writes || flags & crate::memory::READ_ONLY == 0,
            _ => true,
        }
    }

    /// Whether an operation has still to use it.
    pub(crate) fn is_busy(&self) -> bool {
        self.uses.load(Ordering::SeqCst) > 0
    }
}

/// Keeps a region marked as in use.
#[derive(Debug)]
pub(crate) struct Use(Arc<Region>);

impl Use {
    pub(crate) fn of(region: &Arc<Region>) -> Self {
        region.uses.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(region))
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.0.uses.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Debug, Default)]
struct Ranges {
    live: BTreeMap<u64, Arc<Region>>,
    freed: BTreeMap<u64, (u64, &'static str)>,
    /// Freed ranges in order; those whose addresses are the driver's own are given back when forgotten.
    order: VecDeque<(u64, u64, bool)>,
}

/// The addresses of this process.
#[derive(Debug, Default)]
pub(crate) struct Space {
    ranges: Mutex<Ranges>,
    reserved: Mutex<BTreeMap<u64, u64>>,
}

impl Space {
    fn lock(&self) -> MutexGuard<'_, Ranges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a region in.
    pub(crate) fn insert(&self, region: Region) {
        let mut ranges = self.lock();
        ranges
            .freed
            .retain(|base, (bytes, _)| base + *bytes <= region.base || *base >= region.base + region.bytes);
        ranges.live.insert(region.base, Arc::new(region));
    }

    /// The region that an address lies in.
    pub(crate) fn at(&self, address: u64) -> Option<Arc<Region>> {
        let ranges = self.lock();
        let (_, region) = ranges.live.range(..=address).next_back()?;
        (address < region.base + region.bytes).then(|| Arc::clone(region))
    }

    /// Whether a range touches a region.
    pub(crate) fn overlaps(&self, base: u64, bytes: u64) -> bool {
        let ranges = self.lock();
        ranges
            .live
            .range(..base + bytes)
            .next_back()
            .is_some_and(|(_, region)| region.base + region.bytes > base)
    }

    /// The region that begins at an address and is wanted; no other is.
    pub(crate) fn based_at(&self, base: u64, wanted: impl FnOnce(&Kind) -> bool) -> Option<Arc<Region>> {
        self.lock().live.get(&base).filter(|region| wanted(&region.kind)).cloned()
    }

    /// The region that an allocation of another process is open at.
    pub(crate) fn imported(&self, wanted: u64) -> Option<Arc<Region>> {
        let ranges = self.lock();
        let found = |region: &&Arc<Region>| matches!(region.kind, Kind::Imported { id, .. } if id == wanted);
        ranges.live.values().find(found).cloned()
    }

    /// Addresses that are reserved for mappings, with their bytes.
    pub(crate) fn reservations(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every region that wholly lies in a range.
    pub(crate) fn within(&self, base: u64, bytes: u64) -> Vec<Arc<Region>> {
        let ranges = self.lock();
        let inside = ranges.live.range(base..base + bytes).map(|(_, region)| region);
        inside.filter(|region| region.base + region.bytes <= base + bytes).cloned().collect()
    }

    /// Forgets a region; with `own`, its addresses are the driver's and are kept free of anything else for a while.
    pub(crate) fn remove(&self, region: &Region, own: bool) {
        let mut ranges = self.lock();
        ranges.live.remove(&region.base);
        if own {
            os::retire(region.base, region.bytes);
        }
        ranges.freed.insert(region.base, (region.bytes, region.kind.name()));
        ranges.order.push_back((region.base, region.bytes, own));
        if ranges.order.len() > REMEMBERED
            && let Some((base, bytes, own)) = ranges.order.pop_front()
        {
            ranges.freed.remove(&base);
            if own {
                os::unmap(base, bytes);
            }
        }
    }

    /// What is known of a range that is not in use.
    fn story(&self, address: u64) -> String {
        let ranges = self.lock();
        match ranges.freed.range(..=address).next_back() {
            Some((base, (bytes, what))) if address < base + bytes => {
                format!("use after free: {address:#x} is in {what} at {base:#x} that was freed")
            }
            _ => format!("{address:#x} is no address that the driver knows"),
        }
    }

    /// Checks a range that a device is to read or write, and keeps it in use.
    pub(crate) fn device_range(
        &self,
        driver: &Driver,
        call: &str,
        at: u64,
        bytes: u64,
        writes: bool,
    ) -> Outcome<Use> {
        match self.at(at) {
            Some(region) => fits(driver, call, &region, at, bytes, writes),
            None => {
                driver.violations.add(call, &self.story(at));
                Err(Code::INVALID_VALUE)
            }
        }
    }

    /// Checks a range of host memory that a copy is to read or write; `None` is pageable memory, which only a copy that
    /// waits may use.
    pub(crate) fn host_range(
        &self,
        driver: &Driver,
        call: &str,
        at: u64,
        bytes: u64,
        (writes, waits): (bool, bool),
    ) -> Outcome<Option<Use>> {
        if at == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let Some(region) = self.at(at) else {
            if !waits {
                let story = self.story(at);
                let story = if story.starts_with("use after free") {
                    story
                } else {
                    format!("{at:#x} is not pinned")
                };
                driver
                    .violations
                    .add(call, &format!("asynchronous copy of unregistered host memory: {story}"));
            }
            return Ok(None);
        };
        if region.kind.is_device() {
            driver.violations.add(call, &format!("{at:#x} is {}, not host memory", region.kind.name()));
            return Err(Code::INVALID_VALUE);
        }
        fits(driver, call, &region, at, bytes, writes).map(Some)
    }

    /// Frees all that lives in a device's context.
    pub(crate) fn clear(&self, driver: &Driver, device: u32) {
        let all: Vec<Arc<Region>> =
            self.lock().live.values().filter(|region| region.device == device).cloned().collect();
        for region in all {
            match &region.kind {
                Kind::Device { id, .. } => {
                    crate::ipc::check_importers(driver, "end of a context", *id);
                    driver.machine.release(Role::Owner, *id);
                }
                Kind::Imported { id, .. } => driver.machine.release(Role::Importer, *id),
                Kind::Mapped { .. } | Kind::Pinned { .. } | Kind::Registered { .. } => {}
            }
            self.remove(&region, !matches!(region.kind, Kind::Registered { .. }));
        }
    }
}

fn fits(
    driver: &Driver,
    call: &str,
    region: &Arc<Region>,
    at: u64,
    bytes: u64,
    writes: bool,
) -> Outcome<Use> {
    let (end, past) = (region.base + region.bytes, at.checked_add(bytes));
    if past.is_none_or(|past| past > end) {
        driver.violations.add(
            call,
            &format!("{bytes} bytes from {at:#x} go past {} that ends at {end:#x}", region.kind.name()),
        );
        return Err(Code::INVALID_VALUE);
    }
    if !region.allows(writes) {
        let what = if writes { "written, but may only be read" } else { "used without a right to it" };
        driver.violations.add(call, &format!("{} at {at:#x} is {what}", region.kind.name()));
        return Err(Code::INVALID_VALUE);
    }
    Ok(Use::of(region))
}
