//! What registering host memory costs, by the pages that it is made of.

use std::ptr::NonNull;
use std::time::Instant;

use kvoyant_cuda::Context;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use serde::{Deserialize, Serialize};

use crate::run::Stop;

/// Pages of host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Pages {
    /// Of 4 KiB.
    Small,
    /// Ordinary ones with the advice to make them huge.
    Advised,
    /// Huge ones that were set aside.
    Huge,
}

impl Pages {
    pub(crate) const ALL: [Self; 3] = [Self::Small, Self::Advised, Self::Huge];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Small => "4 KiB pages",
            Self::Advised => "transparent huge pages",
            Self::Huge => "hugetlb pages of 2 MiB",
        }
    }
}

/// Seconds of each part.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Pinning {
    pub(crate) touch_s: f64,
    pub(crate) register_s: f64,
    pub(crate) unregister_s: f64,
}

/// A mapping of this process alone.
struct Mapped {
    address: NonNull<std::ffi::c_void>,
    bytes: usize,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped once by `map`, and what was registered of it is not any more.
        let _ = unsafe { munmap(self.address, self.bytes) };
    }
}

fn map(bytes: usize, pages: Pages) -> Result<Mapped, Stop> {
    let length = bytes.try_into().map_err(|_| Stop::Failed("nothing to map".into()))?;
    let mut flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    if pages == Pages::Huge {
        flags |= MapFlags::MAP_HUGETLB;
        flags.remove(MapFlags::MAP_NORESERVE);
    }
    // SAFETY: a new anonymous mapping, wherever the kernel has room.
    let address =
        unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) };
    let address = address
        .map_err(|error| Stop::Skipped(format!("no {} of {} to be had: {error}", bytes, pages.name())))?;
    let mapped = Mapped { address, bytes };
    let advice = match pages {
        Pages::Small => Some(MmapAdvise::MADV_NOHUGEPAGE),
        Pages::Advised => Some(MmapAdvise::MADV_HUGEPAGE),
        Pages::Huge => None,
    };
    if let Some(advice) = advice {
        // SAFETY: the whole of our own mapping.
        unsafe { madvise(address, bytes, advice) }
            .map_err(|error| Stop::Skipped(format!("the kernel takes no advice about pages: {error}")))?;
    }
    Ok(mapped)
}

/// Maps, touches, registers and unregisters so many bytes.
pub(crate) fn pin(context: &Context, bytes: usize, pages: Pages) -> Result<Pinning, Stop> {
    let mapped = map(bytes, pages)?;
    let base = mapped.address.as_ptr().cast::<u8>();
    let since = Instant::now();
    for offset in (0..bytes).step_by(4096) {
        // SAFETY: within our own mapping.
        unsafe { base.add(offset).write_volatile(1) };
    }
    let touch_s = since.elapsed().as_secs_f64();
    let since = Instant::now();
    // SAFETY: the mapping is new, so that nobody has registered it, and is unmapped after the registration.
    let registration = unsafe { context.register(base, bytes, false) }?;
    let register_s = since.elapsed().as_secs_f64();
    let since = Instant::now();
    drop(registration);
    let unregister_s = since.elapsed().as_secs_f64();
    drop(mapped);
    Ok(Pinning { touch_s, register_s, unregister_s })
}
