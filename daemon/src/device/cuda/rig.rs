//! The engines with memory of their own: to be measured, and to be checked byte by byte.

use kvoyant_cuda::{
    Context, CudaError, DeviceBuffer, Event, EventKind, Module, PinnedBuffer, Priority, Registration, Stream,
};
use kvoyant_kernels::CopyRun;
use kvoyant_protocol::memory::{Memfd, MemoryError, SharedMapping};
use thiserror::Error;

use super::cost::Table;
use super::engines::{DeviceMap, EngineError, EngineKind, Engines};

/// One run, by offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Where it begins in the source.
    pub source: usize,
    /// Where it goes in the destination.
    pub destination: usize,
    /// How long it is.
    pub bytes: usize,
}

/// A transfer that a rig refused, or that failed.
#[derive(Debug, Error)]
pub enum RigError {
    /// The driver refused.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// An engine could not.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A range outside of the source, or no memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A range outside of the destination, or two that overlap.
    #[error("{bytes} bytes at {offset} of a destination of {of} bytes are outside of it, or another run's")]
    Destination {
        /// Where it begins.
        offset: usize,
        /// How long it is.
        bytes: usize,
        /// Bytes of the destination.
        of: usize,
    },
}

/// Sizes of a rig.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RigSizes {
    /// Host memory to copy from; rounded up to pages.
    pub source_bytes: usize,
    /// Device memory to copy to.
    pub destination_bytes: usize,
    /// Into how many equal parts, of whole pages, the source is registered; 0: not at all.
    pub registrations: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Rig {
    engines: Engines,
    stream: Stream,
    start: Event,
    end: Event,
    destination: DeviceBuffer,
    map: DeviceMap,
    /// Before the mapping that they are of, for the order of dropping.
    _registrations: Vec<Registration>,
    source: SharedMapping,
    /// What is read comes this way: memory that the driver does not know cannot be copied to asynchronously.
    bounce: PinnedBuffer,
    runs: Vec<CopyRun>,
    ranges: Vec<(usize, usize)>,
}

/// Bytes of a page, to which registrations are rounded.
const PAGE: usize = 4096;

/// Bytes that are read at once.
const BOUNCE: usize = 1 << 20;

impl Rig {
    /// A rig on `context`, with `zerocopy` if the module of the source `gather` is given.
    ///
    /// # Errors
    /// If memory, streams or events cannot be had.
    pub fn new(
        context: &Context,
        gather: Option<&Module>,
        costs: Table,
        sizes: RigSizes,
    ) -> Result<Self, RigError> {
        let bytes = sizes.source_bytes.next_multiple_of(PAGE);
        let source = Memfd::create("kvoyant-rig", bytes)?.map(true)?;
        let mut map = DeviceMap::new();
        let mut registrations = Vec::new();
        let part = bytes.div_ceil(sizes.registrations.max(1)).next_multiple_of(PAGE);
        for from in (0..bytes).step_by(part).take(sizes.registrations) {
            let length = part.min(bytes - from);
            let host = source.address(from, length)?;
            // SAFETY: the mapping is new and its parts do not overlap, so that nobody has registered them; a rig drops
            // registrations before it.
            let registration = unsafe { context.register(host, length, false) }?;
            map.insert(host, length, registration.device_ptr());
            registrations.push(registration);
        }
        Ok(Self {
            engines: Engines::new(context, gather, costs)?,
            stream: context.stream(Priority::High)?,
            start: context.event(EventKind::Timed)?,
            end: context.event(EventKind::Timed)?,
            destination: context.alloc(sizes.destination_bytes)?,
            map,
            _registrations: registrations,
            source,
            bounce: context.pinned(BOUNCE)?,
            runs: Vec::new(),
            ranges: Vec::new(),
        })
    }

    /// Its engines.
    #[must_use]
    pub fn engines(&self) -> &Engines {
        &self.engines
    }

    /// Writes into the source.
    ///
    /// # Errors
    /// If the range lies outside of it.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), RigError> {
        Ok(self.source.write(offset, bytes)?)
    }

    /// Fills the destination with one byte.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn fill(&self, byte: u8) -> Result<(), RigError> {
        // SAFETY: the range is the whole of a buffer of ours, which a rig's end waits for.
        unsafe { self.stream.fill(self.destination.ptr(), byte, self.destination.len()) }?;
        Ok(self.stream.synchronize()?)
    }

    /// Reads `bytes` bytes of the destination, after all that was queued.
    ///
    /// # Errors
    /// If the range lies outside of it, or the driver refuses.
    pub fn read(&self, offset: usize, bytes: usize) -> Result<Vec<u8>, RigError> {
        let of = self.destination.len();
        if bytes > of || offset > of - bytes {
            return Err(RigError::Destination { offset, bytes, of });
        }
        let mut into = Vec::with_capacity(bytes);
        while into.len() < bytes {
            let part = (bytes - into.len()).min(self.bounce.len());
            let device = self.destination.ptr() + (offset + into.len()) as u64;
            // SAFETY: the range lies in the destination, as checked, and the buffer is as long and ours alone.
            unsafe { self.stream.copy_d2h(self.bounce.as_ptr(), device, part) }?;
            self.stream.synchronize()?;
            // SAFETY: the copy has written so much of the buffer, and nothing else does until the next round.
            into.extend_from_slice(unsafe { std::slice::from_raw_parts(self.bounce.as_ptr(), part) });
        }
        Ok(into)
    }

    /// Queues copies on an engine, or, without a name, on the one that the costs say; says which it was. Destinations of one call
    /// do not overlap; those of several are written in the order of the calls.
    ///
    /// # Errors
    /// If a range is not as it should be, or the engine cannot.
    pub fn queue(
        &mut self,
        engine: Option<EngineKind>,
        stretches: &[Stretch],
    ) -> Result<EngineKind, RigError> {
        self.resolve(stretches)?;
        Ok(self.enqueue(engine)?)
    }

    /// Waits for all that was queued.
    ///
    /// # Errors
    /// If it failed.
    pub fn finish(&self) -> Result<(), RigError> {
        Ok(self.stream.synchronize()?)
    }

    /// Does the same as [`Rig::queue`] and [`Rig::finish`]; returns the microseconds that it took, from before it was queued until
    /// the last byte had arrived, by the device's clock.
    ///
    /// # Errors
    /// As for both.
    pub fn time(&mut self, engine: EngineKind, stretches: &[Stretch]) -> Result<f64, RigError> {
        self.resolve(stretches)?;
        self.start.record(&self.stream)?;
        let queued = self.enqueue(Some(engine));
        self.stop()?;
        queued?;
        self.microseconds()
    }

    /// Times one copy of as many bytes of pinned memory as fit to the device, or from it.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn time_pinned(&self, pinned: &PinnedBuffer, to_device: bool) -> Result<f64, RigError> {
        let bytes = pinned.len().min(self.destination.len());
        let (host, device) = (pinned.as_ptr(), self.destination.ptr());
        self.start.record(&self.stream)?;
        let queued = if to_device {
            // SAFETY: both ranges are that long, and `stop` waits for the copy.
            unsafe { self.stream.copy_h2d(device, host, bytes) }
        } else {
            // SAFETY: as above; nobody has a reference into pinned memory.
            unsafe { self.stream.copy_d2h(host, device, bytes) }
        };
        self.stop()?;
        queued?;
        self.microseconds()
    }

    /// Ends what is timed and waits for it.
    fn stop(&self) -> Result<(), RigError> {
        self.end.record(&self.stream)?;
        Ok(self.stream.synchronize()?)
    }

    fn microseconds(&self) -> Result<f64, RigError> {
        Ok(f64::from(self.end.elapsed_ms(&self.start)?) * 1e3)
    }

    /// Checks ranges, and makes runs of them.
    fn resolve(&mut self, stretches: &[Stretch]) -> Result<(), RigError> {
        let of = self.destination.len();
        self.runs.clear();
        self.ranges.clear();
        for &Stretch { source, destination, bytes } in stretches {
            if bytes > of || destination > of - bytes {
                return Err(RigError::Destination { offset: destination, bytes, of });
            }
            let src = self.source.address(source, bytes)?;
            let dst = std::ptr::without_provenance_mut(self.destination.ptr() as usize + destination);
            self.runs.push(CopyRun { src, dst, bytes });
            if bytes > 0 {
                self.ranges.push((destination, bytes));
            }
        }
        self.ranges.sort_unstable();
        match self.ranges.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
            Some(pair) => Err(RigError::Destination { offset: pair[1].0, bytes: pair[1].1, of }),
            None => Ok(()),
        }
    }

    fn enqueue(&mut self, engine: Option<EngineKind>) -> Result<EngineKind, EngineError> {
        let (runs, map, stream) = (&self.runs, &self.map, &self.stream);
        match engine {
            // SAFETY: `resolve` checked that sources lie in the mapping and destinations, none of which overlaps another, in the
            // buffer; both are a rig's own, which waits for the stream before it ends.
            None => unsafe { self.engines.enqueue(runs, map, stream) },
            // SAFETY: as above.
            Some(kind) => unsafe { self.engines.enqueue_on(kind, runs, map, stream) }.map(|()| kind),
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Err(error) = self.stream.synchronize() {
            tracing::warn!("a rig ends in the middle of a transfer: {error}");
        }
    }
}
