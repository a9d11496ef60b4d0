//! Trials of what a daemon and a client on a GPU do with one another: one process offers memory or an event, another
//! takes it. For `kvoyant doctor`, so that it says what this machine does and not what its driver claims.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use kvoyant_cuda::{
    Access, Context, CudaError, DeviceBuffer, Event, EventKind, ImportedBuffer, PinnedBuffer, Priority,
    SharedBuffer, Stream,
};
use kvoyant_protocol::memory::{Memfd, MemoryError};
use thiserror::Error;

/// What offered memory is full of.
pub const PATTERN: u8 = 0xa7;

/// A trial that could not be made.
#[derive(Debug, Error)]
pub enum TrialError {
    /// The driver refused.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// There is no host memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// What this process was given is not what it was told.
    #[error("what came is not what was offered: {0}")]
    Offer(&'static str),
}

/// Device memory of this process that is full of [`PATTERN`], for another to open.
#[derive(Debug)]
pub enum Offer {
    /// To be opened by descriptor.
    Descriptor(SharedBuffer),
    /// To be opened by handle.
    Handle(DeviceBuffer),
}

impl Offer {
    /// Memory to be opened by descriptor.
    ///
    /// # Errors
    /// If the driver cannot.
    pub fn by_descriptor(context: &Context, bytes: usize) -> Result<Self, CudaError> {
        let buffer = context.alloc_shareable(bytes)?;
        fill(context, buffer.ptr(), buffer.len())?;
        Ok(Self::Descriptor(buffer))
    }

    /// Memory to be opened by handle.
    ///
    /// # Errors
    /// If the driver cannot.
    pub fn by_handle(context: &Context, bytes: usize) -> Result<Self, CudaError> {
        let buffer = context.alloc(bytes)?;
        fill(context, buffer.ptr(), buffer.len())?;
        Ok(Self::Handle(buffer))
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Descriptor(buffer) => buffer.len(),
            Self::Handle(buffer) => buffer.len(),
        }
    }

    /// The descriptor by which another process opens it; none if it goes by handle.
    ///
    /// # Errors
    /// If the driver cannot export it.
    pub fn descriptor(&self) -> Result<Option<OwnedFd>, CudaError> {
        match self {
            Self::Descriptor(buffer) => buffer.export_fd().map(Some),
            Self::Handle(_) => Ok(None),
        }
    }

    /// The handle by which another process opens it; none if it goes by descriptor.
    ///
    /// # Errors
    /// If the driver cannot export it.
    pub fn handle(&self) -> Result<Option<[u8; 64]>, CudaError> {
        match self {
            Self::Handle(buffer) => buffer.ipc_handle().map(Some),
            Self::Descriptor(_) => Ok(None),
        }
    }
}

fn fill(context: &Context, address: u64, bytes: usize) -> Result<(), CudaError> {
    let stream = context.stream(Priority::Normal)?;
    // SAFETY: the whole of an allocation that nobody else knows of yet; waited for below.
    unsafe { stream.fill(address, PATTERN, bytes) }?;
    stream.synchronize()
}

/// What the taker found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Taken {
    /// How long the opening took.
    pub opened_in: Duration,
    /// Whether the driver gave a read-only mapping.
    pub read_only: bool,
    /// Whether every byte is [`PATTERN`].
    pub exact: bool,
}

/// Opens memory that another process offers by descriptor, for reading, and reads all of it.
///
/// # Errors
/// If the driver refuses.
pub fn take_descriptor(context: &Context, fd: impl AsFd, bytes: usize) -> Result<Taken, TrialError> {
    let since = Instant::now();
    let memory = context.import_fd(fd, bytes, Access::Read)?;
    look(context, &memory, bytes, since.elapsed())
}

/// Opens memory that another process offers by handle, and reads all of it.
///
/// # Errors
/// If the driver refuses.
pub fn take_handle(context: &Context, handle: &[u8; 64], bytes: usize) -> Result<Taken, TrialError> {
    let since = Instant::now();
    let memory = context.open_ipc(handle, bytes)?;
    look(context, &memory, bytes, since.elapsed())
}

fn look(
    context: &Context,
    memory: &ImportedBuffer,
    bytes: usize,
    opened_in: Duration,
) -> Result<Taken, TrialError> {
    if memory.len() < bytes {
        return Err(TrialError::Offer("the memory is shorter than was said"));
    }
    let exact = read(context, memory.ptr(), bytes)?.iter().all(|byte| *byte == PATTERN);
    Ok(Taken { opened_in, read_only: memory.read_only(), exact })
}

/// Reads device memory through the copy engine.
fn read(context: &Context, address: u64, bytes: usize) -> Result<Vec<u8>, CudaError> {
    let stream = context.stream(Priority::Normal)?;
    let pinned = context.pinned(bytes)?;
    // SAFETY: `bytes` of open memory into a pinned buffer of that size, which lives until the stream is done.
    unsafe { stream.copy_d2h(pinned.as_ptr(), address, bytes) }?;
    stream.synchronize()?;
    let mut found = vec![0; bytes];
    // SAFETY: the buffer was filled above, and nobody else has it.
    unsafe { std::ptr::copy_nonoverlapping(pinned.as_ptr(), found.as_mut_ptr(), bytes) };
    Ok(found)
}

/// An event of this process that has happened, for another to open.
#[derive(Debug)]
pub struct EventOffer {
    event: Event,
    _stream: Stream,
}

impl EventOffer {
    /// Makes and records it.
    ///
    /// # Errors
    /// If the driver cannot.
    pub fn new(context: &Context) -> Result<Self, CudaError> {
        let stream = context.stream(Priority::Normal)?;
        let event = context.event(EventKind::Interprocess)?;
        event.record(&stream)?;
        stream.synchronize()?;
        Ok(Self { event, _stream: stream })
    }

    /// What another process opens it by.
    ///
    /// # Errors
    /// If the driver cannot.
    pub fn handle(&self) -> Result<[u8; 64], CudaError> {
        self.event.ipc_handle()
    }
}

/// Opens another process's event and has a stream wait for it.
///
/// # Errors
/// If the driver refuses.
pub fn take_event(context: &Context, handle: &[u8; 64]) -> Result<Duration, TrialError> {
    let since = Instant::now();
    let event = context.open_event(handle)?;
    let opened_in = since.elapsed();
    let stream = context.stream(Priority::Normal)?;
    stream.wait_event(&event)?;
    stream.synchronize()?;
    Ok(opened_in)
}

/// Writes a word in stream order and waits for it in another stream, with words of this width.
///
/// # Errors
/// If the driver refuses.
pub fn stream_words(context: &Context, bits: u32) -> Result<(), TrialError> {
    let word: PinnedBuffer = context.pinned(64)?;
    // SAFETY: the first word of a pinned buffer that nobody else has yet.
    unsafe { word.as_ptr().cast::<u64>().write_volatile(0) };
    let (writer, waiter) = (context.stream(Priority::Normal)?, context.stream(Priority::Normal)?);
    let at = word.device_ptr();
    // SAFETY: an aligned word of the pinned buffer, which lives until both streams are done.
    unsafe {
        if bits == 64 {
            writer.write_value64(at, 7)?;
            waiter.wait_value64(at, 7)?;
        } else {
            writer.write_value32(at, 7)?;
            waiter.wait_value32(at, 7)?;
        }
    }
    writer.synchronize()?;
    waiter.synchronize()?;
    // SAFETY: as above, and both streams are done.
    let found = unsafe { word.as_ptr().cast::<u32>().read_volatile() };
    if found == 7 { Ok(()) } else { Err(TrialError::Offer("a stream's word never came")) }
}

/// Registers memory as the arena has it, and answers how long that took.
///
/// # Errors
/// If the memory cannot be had, or the driver refuses.
pub fn register(context: &Context, bytes: usize) -> Result<Duration, TrialError> {
    let memory = Memfd::create("kvoyant-trial", bytes)?.map(true)?;
    let host = memory.address(0, bytes)?;
    let since = Instant::now();
    // SAFETY: the mapping is new, so that nobody has registered it, and outlives the registration.
    let registration = unsafe { context.register(host, bytes, false) }?;
    let took = since.elapsed();
    drop(registration);
    Ok(took)
}
