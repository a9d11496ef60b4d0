//! A client without the client library, which says whatever a test wants it to say.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use kvoyant_protocol::MINOR;
use kvoyant_protocol::control::{
    ControlError, MemoryKind, ModelSpec, SelectedBy, ToClient, ToDaemon, decode, encode, features,
};
use kvoyant_protocol::layout::{Layout, Limits};
use kvoyant_protocol::memory::{Memfd, Seals, SharedMapping};
use kvoyant_protocol::packet::{self, Packet};
use kvoyant_protocol::ring::Descriptor;
use kvoyant_protocol::wire::{BatchEntry, Operation, Request, SequenceId, Speculate};

use crate::PATIENCE;

/// A session by hand.
#[derive(Debug)]
pub struct Raw {
    socket: OwnedFd,
    /// Where everything lies.
    pub layout: Layout,
    /// What we write; other threads may, too.
    pub c2d: Arc<SharedMapping>,
    /// The file behind it.
    pub c2d_file: Memfd,
    /// What the daemon writes.
    pub d2c: SharedMapping,
    /// Running index of the next request.
    pub tail: u32,
    /// Memory that the daemon has sent.
    pub memory: Vec<(MemoryKind, OwnedFd)>,
}

impl AsFd for Raw {
    /// Its control socket.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Raw {
    /// A connection that has said nothing yet.
    ///
    /// # Panics
    /// If nobody listens.
    #[must_use]
    pub fn socket(path: &Path) -> OwnedFd {
        packet::connect_to(path).expect("a connection")
    }

    /// Goes through the handshake and registers a model.
    ///
    /// # Panics
    /// If the daemon refuses.
    #[must_use]
    pub fn connect(path: &Path, spec: ModelSpec) -> Self {
        Self::connect_with(path, spec, features::COMMON).0
    }

    /// As [`Raw::connect`], with these abilities; gives the descriptors that came with the registration, too.
    ///
    /// # Panics
    /// If the daemon refuses.
    #[must_use]
    pub fn connect_with(path: &Path, spec: ModelSpec, features: u64) -> (Self, Vec<OwnedFd>) {
        let mut raw = Self::greet(path, features);
        let registered = raw.register(spec, &[]).expect("an answer");
        let message = decode::<ToClient>(&registered.bytes).expect("a message");
        assert!(matches!(message, ToClient::Registered { .. }), "{message:?}");
        (raw, registered.fds)
    }

    /// Goes through the handshake.
    ///
    /// # Panics
    /// If the daemon refuses.
    #[must_use]
    pub fn greet(path: &Path, features: u64) -> Self {
        Self::greet_with(path, features, Limits { ring_slots: 8, ..Limits::default() })
    }

    /// The same, with these limits.
    ///
    /// # Panics
    /// If the daemon refuses.
    #[must_use]
    pub fn greet_with(path: &Path, features: u64, limits: Limits) -> Self {
        let socket = Self::socket(path);
        let hello = ToDaemon::Hello { features, name: "raw".into(), limits, minor: MINOR };
        packet::send(socket.as_fd(), &encode(&hello), &[]).expect("a hello");
        let welcome = packet::receive(socket.as_fd()).expect("a welcome");
        Self::welcomed(socket, welcome.fds, limits)
    }

    /// Goes on from a welcome that came with these descriptors.
    ///
    /// # Panics
    /// If the daemon refuses.
    #[must_use]
    pub fn welcomed(socket: OwnedFd, fds: Vec<OwnedFd>, limits: Limits) -> Self {
        let layout = Layout::new(limits).expect("limits");
        let [c2d, d2c] = <[OwnedFd; 2]>::try_from(fds).expect("two memfds");
        let c2d_file = Memfd::from_peer(c2d, layout.c2d_bytes, Seals::size_only()).expect("c2d");
        let c2d = Arc::new(c2d_file.map(false).expect("a map"));
        let d2c = Memfd::from_peer(d2c, layout.d2c_bytes, Seals::frozen_for_readers()).expect("d2c");
        let d2c = d2c.map_read_only().expect("a map");
        let mut raw = Self { socket, layout, c2d, c2d_file, d2c, tail: 0, memory: Vec::new() };
        assert_eq!(raw.call(&ToDaemon::Mapped).expect("an answer"), ToClient::Sealed);
        raw
    }

    /// Registers a model, with its artifacts, and gives what comes back as it is.
    ///
    /// # Errors
    /// If nothing comes.
    ///
    /// # Panics
    /// If there is no memory for an artifact.
    pub fn register(&mut self, spec: ModelSpec, artifacts: &[Vec<u8>]) -> std::io::Result<Packet> {
        let lengths = artifacts.iter().map(|bytes| bytes.len() as u64).collect();
        let spec = ModelSpec { artifacts: lengths, ..spec };
        let file = |bytes: &Vec<u8>| {
            let file = Memfd::create("artifact", bytes.len()).expect("a memfd");
            file.map(false).expect("a map").write(0, bytes).expect("an artifact");
            file.seal(Seals::fixed_size()).expect("a seal");
            file
        };
        let files: Vec<_> = artifacts.iter().map(file).collect();
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        packet::send(self.socket.as_fd(), &encode(&ToDaemon::Register(spec)), &fds)?;
        packet::receive(self.socket.as_fd())
    }

    /// Sends bytes as they are.
    pub fn say(&mut self, bytes: &[u8]) {
        let _ = packet::send(self.socket.as_fd(), bytes, &[]);
    }

    /// Sends bytes with descriptors beside them.
    pub fn say_with(&mut self, bytes: &[u8], fds: &[OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let _ = packet::send(self.socket.as_fd(), bytes, &fds);
    }

    /// The next message, memory left out. An error if the daemon has closed.
    ///
    /// # Errors
    /// A message that does not parse; [`ControlError::NotKvoyant`] if the connection was closed.
    pub fn hear(&mut self) -> Result<ToClient, ControlError> {
        loop {
            let packet = packet::receive(self.socket.as_fd()).map_err(|_| ControlError::NotKvoyant)?;
            match decode(&packet.bytes)? {
                ToClient::Memory { kind, .. } => {
                    self.memory.extend(packet.fds.into_iter().map(|fd| (kind, fd)));
                }
                message => return Ok(message),
            }
        }
    }

    /// Sends a message and waits for the answer.
    ///
    /// # Errors
    /// As for [`Raw::hear`].
    pub fn call(&mut self, message: &ToDaemon) -> Result<ToClient, ControlError> {
        self.say(&encode(message));
        self.hear()
    }

    /// Opens a sequence.
    ///
    /// # Panics
    /// If the daemon refuses.
    pub fn open(&mut self, tokens: u32) -> SequenceId {
        match self.call(&ToDaemon::Open { method: 0, tokens, by: SelectedBy::Lane }) {
            Ok(ToClient::Opened { sequence, .. }) => sequence,
            other => panic!("{other:?} came instead of a sequence"),
        }
    }

    /// Writes a descriptor and its batch table, and publishes it.
    ///
    /// # Panics
    /// If the ring's own memory is not there.
    pub fn push_raw(&mut self, descriptor: &Descriptor, batch: &[BatchEntry]) {
        for (i, entry) in batch.iter().enumerate() {
            let at = self.layout.batch(self.tail) + i * size_of::<BatchEntry>();
            self.c2d.write_pod(at, entry).expect("a batch table");
        }
        self.c2d.write(self.layout.descriptor(self.tail), descriptor).expect("a slot");
        self.tail = self.tail.wrapping_add(1);
        self.publish(self.tail);
    }

    /// As [`Raw::push_raw`], for a request that can be encoded.
    pub fn push(&mut self, request: &Request, batch: &[BatchEntry]) {
        self.push_raw(&request.encode(), batch);
    }

    /// As [`Raw::push`], with a payload in the request's hint area.
    ///
    /// # Panics
    /// If the ring's own memory is not there.
    pub fn push_with(&mut self, request: &Request, batch: &[BatchEntry], payload: &[u8]) {
        self.c2d.write(self.layout.hints(self.tail), payload).expect("a hint area");
        self.push(request, batch);
    }

    /// Publishes a ring index, and wakes the lane.
    pub fn publish(&mut self, tail: u32) {
        use kvoyant_protocol::{futex, layout};
        self.c2d.store_u32(layout::c2d::REQUEST_TAIL, tail);
        futex::publish_before_looking();
        futex::Word { memory: &self.c2d, offset: layout::c2d::REQUEST_TAIL }.wake();
    }

    /// Waits until the daemon's timeline has come to a ticket.
    ///
    /// # Panics
    /// If it does not.
    pub fn wait_for_ticket(&self, ticket: u64) {
        let since = Instant::now();
        while self.timeline() < ticket {
            assert!(since.elapsed() < PATIENCE, "ticket {ticket} was never answered");
            std::thread::yield_now();
        }
    }

    /// The last ticket that was answered.
    #[must_use]
    pub fn timeline(&self) -> u64 {
        self.d2c.load_u64(kvoyant_protocol::layout::d2c::TIMELINE) >> 8
    }
}

/// A speculation of one layer for one sequence.
#[must_use]
pub fn speculate(ticket: u64) -> Speculate {
    Speculate {
        layer: 1,
        batch: 1,
        ticket,
        hint_bytes: 0,
        queries: 1,
        deadline_ns: 0,
        doorbell: false,
        floors: false,
        rest: false,
        fetch: false,
    }
}

/// A request that releases nothing.
#[must_use]
pub fn request(operation: Operation) -> Request {
    Request { release_through: 0, operation }
}
