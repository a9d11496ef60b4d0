//! The daemon's transfer engines at work: timed, and checked byte for byte.

use std::time::Duration;

use kvoyant_cuda::{Context, DeviceBuffer, Event, EventKind, KernelCache, Priority, Registration, Stream};
use kvoyant_daemon::device::cuda::cost::Table;
use kvoyant_daemon::device::cuda::engines::{DeviceMap, EngineKind, Engines};
use kvoyant_kernels::CopyRun;
use kvoyant_protocol::memory::{Memfd, SharedMapping};

use crate::run::{Stop, median};

/// Bytes of scattered sources: no processor keeps enough of them in its caches.
pub(crate) const SOURCE_BYTES: usize = 256 << 20;

/// No request is larger.
pub(crate) const REQUEST_BYTES_MAX: usize = 64 << 20;

/// An odd number that jumps about.
const STEP: u64 = 0x9e37_79b1;

/// Compiled kernels beside this program, where `scripts/gpu-check build` puts them.
fn kernel_cache() -> KernelCache {
    let program = std::env::current_exe().unwrap_or_default();
    KernelCache::new(program.with_file_name("kernels"))
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Mover {
    engines: Engines,
    stream: Stream,
    start: Event,
    end: Event,
    destination: DeviceBuffer,
    map: DeviceMap,
    /// Dropped before the mapping that it is of.
    _registration: Registration,
    source: SharedMapping,
    context: Context,
    turn: u64,
}

impl Mover {
    /// Over memory of its own, whose bytes say where they lie.
    pub(crate) fn new(context: &Context, bytes: usize) -> Result<Self, Stop> {
        let source = Memfd::create("kvoyant-gpu-check", bytes)?.map(true)?;
        let mut block = vec![0; 1 << 20];
        for at in (0..bytes).step_by(block.len()) {
            for (index, word) in block.chunks_exact_mut(8).enumerate() {
                let value = ((at + index * 8) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                word.copy_from_slice(&value.to_le_bytes());
            }
            source.write(at, &block)?;
        }
        Self::over(context, false, source)
    }

    /// Over memory that is given. `needs_kernel`: without the gather kernel there is nothing to do.
    pub(crate) fn over(context: &Context, needs_kernel: bool, source: SharedMapping) -> Result<Self, Stop> {
        let gather =
            kvoyant_kernels::cuda::source("gather").map(|source| kernel_cache().module(context, source));
        let gather = match gather {
            Some(Ok(module)) => Some(module),
            Some(Err(error)) if needs_kernel => return Err(Stop::Skipped(error.to_string())),
            _ => None,
        };
        let host = source.address(0, source.len())?;
        // SAFETY: the mapping is registered nowhere else in this process, and outlives the registration.
        let registration = unsafe { context.register(host, source.len(), false) }?;
        let mut map = DeviceMap::new();
        map.insert(host, source.len(), registration.device_ptr());
        Ok(Self {
            engines: Engines::new(context, gather.as_ref(), Table::estimate())?,
            stream: context.stream(Priority::High)?,
            start: context.event(EventKind::Timed)?,
            end: context.event(EventKind::Timed)?,
            destination: context.alloc(2 * REQUEST_BYTES_MAX)?,
            map,
            _registration: registration,
            source,
            context: context.clone(),
            turn: 0,
        })
    }

    /// Whether there is such an engine.
    pub(crate) fn has(&self, kind: EngineKind) -> bool {
        self.engines.has(kind)
    }

    /// Scattered runs, others each time, to destinations that are `apart` from one another.
    fn runs(&mut self, count: usize, bytes: usize, apart: usize) -> Result<Vec<CopyRun>, Stop> {
        let places = (self.source.len() / bytes).next_power_of_two() as u64 / 2;
        let runs = (0..count).map(|index| {
            let place = (index as u64 + self.turn).wrapping_mul(STEP) % places.max(1);
            let src = self.source.address(place as usize * bytes, bytes)?;
            let dst = self.destination.ptr() + (index * apart) as u64;
            Ok(CopyRun { src, dst: std::ptr::without_provenance_mut(dst as usize), bytes })
        });
        let runs = runs.collect::<Result<_, Stop>>();
        self.turn += count as u64;
        runs
    }

    /// Queues a request, timed by the device; microseconds from before it was queued until it was done.
    fn request(&mut self, kind: EngineKind, runs: &[CopyRun]) -> Result<f64, Stop> {
        self.start.record(&self.stream)?;
        // SAFETY: sources lie in the registered mapping, destinations do not overlap and lie in the buffer, and both
        // outlive the work, which is waited for.
        let queued = unsafe { self.engines.enqueue_on(kind, runs, &self.map, &self.stream) };
        self.end.record(&self.stream)?;
        self.stream.synchronize()?;
        queued?;
        Ok(f64::from(self.end.elapsed_ms(&self.start)?) * 1e3)
    }

    /// The median time of a request, in microseconds.
    pub(crate) fn time(
        &mut self,
        kind: EngineKind,
        count: usize,
        bytes: usize,
        samples: usize,
    ) -> Result<f64, Stop> {
        let mut times = Vec::new();
        // The first finds caches and tables cold.
        for sample in 0..=samples {
            let runs = self.runs(count, bytes, bytes)?;
            let us = self.request(kind, &runs)?;
            if sample > 0 {
                times.push(us);
            }
        }
        Ok(median(&mut times))
    }

    /// Moves a request and compares every byte, and that nothing between the destinations was touched.
    pub(crate) fn check(&mut self, kind: EngineKind, count: usize, bytes: usize) -> Result<(), Stop> {
        const UNTOUCHED: u8 = 0x5a;
        let apart = bytes + 256;
        // SAFETY: the whole of the buffer.
        unsafe { self.stream.fill(self.destination.ptr(), UNTOUCHED, self.destination.len()) }?;
        let runs = self.runs(count, bytes, apart)?;
        self.request(kind, &runs)?;
        let found = self.read(count * apart)?;
        let mut expected = vec![0; bytes];
        for (index, run) in runs.iter().enumerate() {
            let offset = run.src.addr() - self.source.address(0, 0)?.addr();
            self.source.read(offset, &mut expected)?;
            let at = index * apart;
            if found[at..at + bytes] != expected {
                return Err(Stop::Failed(format!("{kind}: run {index} of {count} × {bytes} bytes is wrong")));
            }
            if found[at + bytes..at + apart].iter().any(|byte| *byte != UNTOUCHED) {
                return Err(Stop::Failed(format!(
                    "{kind}: bytes behind run {index} of {count} × {bytes} were written"
                )));
            }
        }
        Ok(())
    }

    /// The first bytes of the destination.
    fn read(&self, bytes: usize) -> Result<Vec<u8>, Stop> {
        let pinned = self.context.pinned(bytes)?;
        // SAFETY: within the destination, into a pinned buffer of that size that lives until the stream is done.
        unsafe { self.stream.copy_d2h(pinned.as_ptr(), self.destination.ptr(), bytes) }?;
        self.stream.synchronize()?;
        let mut found = vec![0; bytes];
        // SAFETY: the buffer was filled above and nobody else has it.
        unsafe { std::ptr::copy_nonoverlapping(pinned.as_ptr(), found.as_mut_ptr(), bytes) };
        Ok(found)
    }

    /// Gathers 1024 rows of 512 bytes by kernel; how many bytes that were.
    pub(crate) fn gather_some(&mut self) -> Result<usize, Stop> {
        let runs = self.runs(1024, 512, 512)?;
        self.request(EngineKind::Zerocopy, &runs)?;
        Ok(1024 * 512)
    }

    /// Copies blocks of so many bytes by the copy engine for so long; 10⁹ bytes a second.
    pub(crate) fn copy_for(&mut self, bytes: usize, time: Duration) -> Result<f64, Stop> {
        let since = std::time::Instant::now();
        let mut all = 0;
        while since.elapsed() < time {
            let runs = self.runs((8 << 20) / bytes, bytes, bytes)?;
            self.request(EngineKind::Dma, &runs)?;
            all += 8 << 20;
        }
        Ok(f64::from(all) / since.elapsed().as_secs_f64() / 1e9)
    }

    /// Bandwidths of one large copy of pinned memory to the device and back, in 10⁹ bytes a second.
    pub(crate) fn peak(&self, samples: usize) -> Result<(f64, f64), Stop> {
        let bytes = REQUEST_BYTES_MAX;
        let pinned = self.context.pinned(bytes)?;
        let device = self.destination.ptr();
        let gbps = |copy: &dyn Fn() -> Result<(), kvoyant_cuda::CudaError>| -> Result<f64, Stop> {
            let mut times = Vec::new();
            for _ in 0..=samples {
                self.start.record(&self.stream)?;
                copy()?;
                self.end.record(&self.stream)?;
                self.stream.synchronize()?;
                times.push(f64::from(self.end.elapsed_ms(&self.start)?) * 1e3);
            }
            Ok(bytes as f64 / median(&mut times) / 1e3)
        };
        // SAFETY: both buffers are as long and ours alone, and the copy is waited for.
        let h2d = gbps(&|| unsafe { self.stream.copy_h2d(device, pinned.as_ptr(), bytes) })?;
        // SAFETY: as above.
        let d2h = gbps(&|| unsafe { self.stream.copy_d2h(pinned.as_ptr(), device, bytes) })?;
        Ok((h2d, d2h))
    }
}
