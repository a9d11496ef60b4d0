//! io_uring: one ring for one device, driven by its I/O thread only.
//!
//! The file is registered, and so are extents as far as the memlock limit goes. The thread sleeps in the ring for
//! completions and for new jobs alike: a read of an eventfd is kept in it. Neither queue can overflow, since what is in
//! flight is counted and both are larger.
//!
//! Memory belongs to the operation, the operation to the ring's table, and it leaves the table by its completion only.
//! A completion names its place in the table and a generation, never an address.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use io_uring::types::{Fd, Fixed};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};
use kvoyant_protocol::memory::{Memfd, SharedMapping};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::engine::{Engine, Setup, Wake};
use super::operation::{Completed, Kind, Operation};
use super::raw::{Vectors, range_mode};

/// What the ring must be able to do.
const NEEDED: [u8; 7] = [
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Fallocate::CODE,
];

/// Extents that can be registered: a tebibyte of them, which is the kernel's limit too.
const BUFFERS: u32 = 1 << 14;

/// The kernel's thread sleeps after so long without submissions.
const SQ_POLL_IDLE_MS: u32 = 50;

/// Bytes that are read to see whether a device can be polled.
const TRIAL_BYTES: usize = 4096;

/// The completion of the eventfd's read; no place in the table has this number.
const WOKEN: u64 = u64::MAX;

/// An operation in flight, and what the kernel reads of it.
#[derive(Debug, Default)]
struct Place {
    /// Completions of earlier operations do not match.
    generation: u32,
    operation: Option<Operation>,
    vectors: Vectors,
}

/// An eventfd.
#[derive(Debug)]
struct Waker(EventFd);

impl Wake for Waker {
    fn wake(&self) {
        // It can only fail when it has been rung 2⁶⁴ times without being heard.
        let _ = self.0.write(1);
    }
}

/// See the module.
pub(super) struct Uring {
    ring: IoUring,
    /// What the ring's registered file is.
    _file: Arc<File>,
    places: Vec<Place>,
    vacant: Vec<u32>,
    /// Registered memory by address of its mapping, which it keeps.
    buffers: HashMap<*const SharedMapping, (u16, Arc<SharedMapping>)>,
    free_buffers: Vec<u16>,
    waker: Arc<Waker>,
    /// Where the kernel puts what the eventfd says; its own allocation, since it is written while we are anywhere.
    woken: Box<u64>,
    listening: bool,
    in_flight: u32,
    io_poll: bool,
    /// Ended without the kernel.
    refused: Vec<Completed>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { in_flight, buffers, io_poll, .. } = self;
        f.debug_struct("Uring")
            .field("in_flight", in_flight)
            .field("buffers", &buffers.len())
            .field("io_poll", io_poll)
            .finish_non_exhaustive()
    }
}

impl Uring {
    /// Makes the ring. It is bound to the thread that does so. Where a device has no queues to poll, it is one with
    /// interrupts.
    pub(super) fn new(setup: &Setup) -> io::Result<Self> {
        let mut made = Self::bare(setup)?;
        if setup.io_poll
            && let Err(error) = made.try_polling()
        {
            tracing::warn!("completions cannot be polled for ({error}); they come by interrupts");
            return Self::bare(&Setup { io_poll: false, ..setup.clone() });
        }
        Ok(made)
    }

    /// Reads the area's first block by polling.
    fn try_polling(&mut self) -> io::Result<()> {
        let memory = Memfd::create("kvoyant-poll", TRIAL_BYTES).and_then(|file| file.map(true));
        let memory = memory.map_err(io::Error::other)?;
        let into = memory.address(0, TRIAL_BYTES).map_err(io::Error::other)?;
        let entry = opcode::Read::new(Fixed(0), into, TRIAL_BYTES as u32).build();
        if !self.submit(&entry) {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    // The kernel may still write there, so nobody gets this memory any more.
                    std::mem::forget(memory);
                    return Err(error);
                }
                _ => {}
            }
            if let Some(completion) = self.ring.completion().next() {
                let result = completion.result();
                return if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) };
            }
        }
    }

    fn bare(setup: &Setup) -> io::Result<Self> {
        // One for the eventfd, one to spare.
        let entries = (setup.capacity + 2).next_power_of_two();
        let mut ring = build(setup, entries)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if let Some(missing) = NEEDED.into_iter().find(|code| !probe.is_supported(*code)) {
            let what = format!("this kernel's io_uring lacks operation {missing}");
            return Err(io::Error::new(io::ErrorKind::Unsupported, what));
        }
        ring.submitter().register_files(&[setup.file.as_raw_fd()])?;
        // Without it every call looks the ring up, which costs a little.
        let _ = ring.submitter().register_ring_fd();
        let sparse = |count: &u32| ring.submitter().register_buffers_sparse(*count).is_ok();
        let buffers = [BUFFERS, BUFFERS / 16].into_iter().find(sparse).unwrap_or(0);
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(io::Error::from)?;
        let places = setup.capacity;
        debug_assert!(ring.completion().capacity() > places as usize);
        Ok(Self {
            ring,
            _file: Arc::clone(&setup.file),
            places: (0..places).map(|_| Place::default()).collect(),
            vacant: (0..places).rev().collect(),
            buffers: HashMap::new(),
            free_buffers: (0..buffers as u16).rev().collect(),
            waker: Arc::new(Waker(wake)),
            woken: Box::new(0),
            listening: false,
            in_flight: 0,
            io_poll: setup.io_poll,
            refused: Vec::new(),
        })
    }

    /// The submission that moves an operation's rest.
    fn entry(&mut self, place: u32) -> squeue::Entry {
        let Place { operation, vectors, .. } = &mut self.places[place as usize];
        let Some(operation) = operation else { return opcode::Nop::new().build() };
        let (position, write) = (operation.position(), operation.kind == Kind::Write);
        if !matches!(operation.kind, Kind::Read | Kind::Write) {
            return opcode::Fallocate::new(Fixed(0), operation.bytes as u64)
                .offset(position)
                .mode(range_mode(operation.kind).bits())
                .build();
        }
        operation.vectors(vectors);
        let [vector] = vectors.as_slice() else {
            let (first, count) = (vectors.as_slice().as_ptr(), vectors.as_slice().len() as u32);
            return if write {
                opcode::Writev::new(Fixed(0), first, count).offset(position).build()
            } else {
                opcode::Readv::new(Fixed(0), first, count).offset(position).build()
            };
        };
        let (base, bytes) = (vector.iov_base.cast::<u8>(), vector.iov_len as u32);
        let frame = operation.frames().next();
        let buffer = frame.and_then(|frame| self.buffers.get(&Arc::as_ptr(frame.memory)));
        match (buffer, write) {
            (Some((index, _)), true) => {
                opcode::WriteFixed::new(Fixed(0), base, bytes, *index).offset(position).build()
            }
            (Some((index, _)), false) => {
                opcode::ReadFixed::new(Fixed(0), base, bytes, *index).offset(position).build()
            }
            (None, true) => opcode::Write::new(Fixed(0), base, bytes).offset(position).build(),
            (None, false) => opcode::Read::new(Fixed(0), base, bytes).offset(position).build(),
        }
    }

    fn submit(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: what the entry points to lives until its completion is taken: frames in mappings that the operation in
        // the table keeps, vectors in the same place of the table (neither leaves it before, and `places` never grows),
        // `woken`, or the memory of `try_polling`, which waits for it. `Drop` waits for all others.
        if unsafe { self.ring.submission().push(entry) }.is_ok() {
            return true;
        }
        // A submitting kernel thread may lag behind what it has completed.
        let room = self.ring.submit().and_then(|_| self.ring.submitter().squeue_wait());
        // SAFETY: as above.
        room.is_ok() && unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    /// Keeps a read of the eventfd in the ring.
    fn listen(&mut self) {
        if self.listening || self.io_poll {
            return;
        }
        let into = (&raw mut *self.woken).cast::<u8>();
        let entry = opcode::Read::new(Fd(self.waker.0.as_fd().as_raw_fd()), into, 8).build();
        self.listening = self.submit(&entry.user_data(WOKEN));
    }

    fn enter(&mut self, block: bool) {
        let polls = self.io_poll && self.in_flight == 0;
        if block && polls {
            // Such a ring takes no eventfd; nothing is in flight that could end meanwhile.
            let mut fds = [PollFd::new(self.waker.0.as_fd(), PollFlags::POLLIN)];
            if matches!(poll(&mut fds, PollTimeout::NONE), Ok(1..)) {
                let _ = self.waker.0.read();
            }
            return;
        }
        match self.ring.submit_and_wait(usize::from(block && !polls)) {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                // A signal; or completions must be taken first, which comes next.
                Some(libc::EINTR | libc::EBUSY) => {}
                // The kernel is short of memory: what was pushed stays pushed.
                _ => {
                    tracing::warn!("io_uring does not take submissions ({error}); it is tried again");
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            },
        }
    }

    fn reap(&mut self, ended: &mut Vec<Completed>) {
        let Self { ring, places, vacant, in_flight, listening, .. } = self;
        for completion in ring.completion() {
            if completion.user_data() == WOKEN {
                *listening = false;
                continue;
            }
            let (index, generation) = split(&completion);
            let place = places.get_mut(index as usize).filter(|place| place.generation == generation);
            let Some(operation) = place.and_then(|place| {
                place.generation = place.generation.wrapping_add(1);
                place.operation.take()
            }) else {
                tracing::error!(
                    "io_uring has completed an operation that is not in flight, which is a defect"
                );
                continue;
            };
            vacant.push(index);
            *in_flight -= 1;
            ended.push(Completed { operation, result: completion.result() });
        }
    }
}

fn split(completion: &cqueue::Entry) -> (u32, u32) {
    (completion.user_data() as u32, (completion.user_data() >> 32) as u32)
}

/// The leanest ring that this kernel makes.
fn build(setup: &Setup, entries: u32) -> io::Result<IoUring> {
    let base = || {
        let mut builder = IoUring::builder();
        builder.dontfork();
        if setup.io_poll {
            builder.setup_iopoll();
        }
        builder
    };
    if setup.sq_poll {
        return base().setup_sqpoll(SQ_POLL_IDLE_MS).build(entries);
    }
    // Since Linux 6.1: completions are worked off when we ask for them, not in the middle of anything.
    let deferred = base().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().build(entries);
    match deferred {
        // Since 5.19: at least no interrupts between processors for them.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let cooperative = base().setup_coop_taskrun().setup_taskrun_flag().build(entries);
            cooperative.or_else(|_| base().build(entries))
        }
        made => made,
    }
}

impl Engine for Uring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.waker) as Arc<dyn Wake>
    }

    fn push(&mut self, operation: Operation) {
        let erases = !matches!(operation.kind, Kind::Read | Kind::Write);
        let place = if self.io_poll && erases { None } else { self.vacant.pop() };
        let Some(place) = place else {
            // A polled ring cannot change ranges.
            let file = &self._file;
            let completed = if erases {
                Completed::by_hand(operation, file, &mut Vectors::default())
            } else {
                Completed { operation, result: -libc::EAGAIN }
            };
            self.refused.push(completed);
            return;
        };
        self.places[place as usize].operation = Some(operation);
        let generation = self.places[place as usize].generation;
        let entry = self.entry(place).user_data(u64::from(generation) << 32 | u64::from(place));
        if self.submit(&entry) {
            self.in_flight += 1;
        } else if let Some(operation) = self.places[place as usize].operation.take() {
            self.vacant.push(place);
            self.refused.push(Completed { operation, result: -libc::EAGAIN });
        }
    }

    fn wait(&mut self, ended: &mut Vec<Completed>, block: bool) {
        self.listen();
        ended.append(&mut self.refused);
        self.enter(block && ended.is_empty());
        self.reap(ended);
    }

    fn register(&mut self, memory: &Arc<SharedMapping>) -> io::Result<()> {
        if self.buffers.contains_key(&Arc::as_ptr(memory)) {
            return Ok(());
        }
        let full = || io::Error::other("there is no room for more registered buffers");
        let index = self.free_buffers.pop().ok_or_else(full)?;
        let address = memory.address(0, memory.len()).map_err(io::Error::other);
        let registered = address.and_then(|address| {
            let buffer = libc::iovec { iov_base: address.cast(), iov_len: memory.len() };
            // SAFETY: the vector is exactly a live mapping, which `buffers` keeps until it is unregistered or the ring
            // is gone.
            unsafe { self.ring.submitter().register_buffers_update(u32::from(index), &[buffer], None) }
        });
        match registered {
            Ok(()) => {
                self.buffers.insert(Arc::as_ptr(memory), (index, Arc::clone(memory)));
                Ok(())
            }
            Err(error) => {
                self.free_buffers.push(index);
                Err(error)
            }
        }
    }

    fn forget(&mut self, memory: &Arc<SharedMapping>) {
        let Some((index, memory)) = self.buffers.remove(&Arc::as_ptr(memory)) else { return };
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: a vector of nothing empties the place.
        let emptied =
            unsafe { self.ring.submitter().register_buffers_update(u32::from(index), &[nothing], None) };
        match emptied {
            Ok(()) => self.free_buffers.push(index),
            Err(error) => {
                // The kernel has its pages until the ring is gone, so nobody else may have the place.
                tracing::warn!("a registered buffer cannot be taken back: {error}");
                drop(memory);
            }
        }
    }

    fn registered(&self) -> usize {
        self.buffers.len()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel may write to what is in flight until it has completed; so nothing is freed before.
        if self.listening {
            self.waker.wake();
        }
        let mut ended = Vec::new();
        while self.in_flight > 0 || self.listening {
            self.enter(true);
            self.reap(&mut ended);
        }
        // The kernel takes a ring apart some time after it was closed; the area and its lock are to be free now. What
        // fails here comes then.
        let _ = self.ring.submitter().unregister_files();
        let _ = self.ring.submitter().unregister_buffers();
    }
}
