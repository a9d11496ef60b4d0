//! The control socket: one request at a time, and what becomes of it when another daemon goes on with the session.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use kvoyant_protocol::control::{ToClient, ToDaemon, decode, encode};
use kvoyant_protocol::memory::Memfd;
use kvoyant_protocol::packet;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::again::Again;
use crate::error::Error;
use crate::memory::Memory;
use crate::turn::{Turn, Turns};

/// A message and what came with it.
pub(crate) struct Received {
    pub(crate) message: ToClient,
    pub(crate) fds: Vec<OwnedFd>,
}

/// The socket of one daemon.
#[derive(Debug)]
pub(crate) struct Line {
    /// Its sends and receives are given up after a while by the kernel itself.
    socket: OwnedFd,
    /// For looking at the socket without waiting for its turn.
    watch: OwnedFd,
    /// Set when an answer did not come as it should: the next one on the socket might be its, so there is no next.
    broken: AtomicBool,
}

impl Line {
    pub(crate) fn new(socket: OwnedFd) -> Result<Self, Error> {
        let watch = socket.try_clone()?;
        Ok(Self { socket, watch, broken: AtomicBool::new(false) })
    }

    /// How long the kernel tries to send and to receive from now on.
    pub(crate) fn give_up_after(&self, timeout: Duration) -> Result<(), Error> {
        Ok(packet::give_up_after(self.socket.as_fd(), timeout)?)
    }

    /// Whether the daemon has hung up.
    pub(crate) fn hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.watch.as_fd(), PollFlags::POLLIN)];
        let polled = poll(&mut fds, PollTimeout::ZERO);
        let events = fds[0].revents().unwrap_or(PollFlags::empty());
        matches!(polled, Ok(1)) && events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)
    }

    pub(crate) fn send(&self, message: &ToDaemon, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(Error::DaemonGone);
        }
        let since = Instant::now();
        packet::send(self.socket.as_fd(), &encode(message), fds).map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => Error::DaemonGone,
            std::io::ErrorKind::WouldBlock => Error::Deadline { ticket: 0, waited: since.elapsed() },
            _ => Error::Io(error),
        })
    }

    pub(crate) fn receive(&self, timeout: Duration) -> Result<Received, Error> {
        let since = Instant::now();
        let socket = self.socket.as_fd();
        let mut fds = [PollFd::new(socket, PollFlags::POLLIN)];
        loop {
            let waited = since.elapsed();
            let left = timeout.saturating_sub(waited);
            // In whole milliseconds, the last of which counts.
            let pause = PollTimeout::try_from(left.as_nanos().div_ceil(1_000_000) as i128);
            match poll(&mut fds, pause.unwrap_or(PollTimeout::MAX)) {
                Ok(0) if left.is_zero() => return Err(Error::Deadline { ticket: 0, waited }),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => break,
                Err(errno) => return Err(Error::Io(errno.into())),
            }
        }
        let packet = packet::receive(socket).map_err(|error| match error.kind() {
            std::io::ErrorKind::ConnectionReset => Error::DaemonGone,
            std::io::ErrorKind::WouldBlock => Error::Deadline { ticket: 0, waited: since.elapsed() },
            _ => Error::Io(error),
        })?;
        if packet.bytes.is_empty() {
            return Err(Error::DaemonGone);
        }
        match decode(&packet.bytes)? {
            ToClient::Failed(failure) => Err(Error::Failed(failure)),
            message => Ok(Received { message, fds: packet.fds }),
        }
    }

    /// Marks the connection as unusable after anything but an answer.
    fn settle<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if !matches!(result, Ok(_) | Err(Error::Failed(_))) {
            self.broken.store(true, Ordering::Relaxed);
        }
        result
    }

    fn last_words(&self) -> Option<Error> {
        match self.receive(Duration::ZERO) {
            Err(error @ Error::Failed(_)) => Some(error),
            _ => None,
        }
    }

    /// Sends a request, takes in new memory, and returns the answer.
    fn ask(
        &self,
        message: &ToDaemon,
        memory: &Memory,
        fds: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<ToClient, Error> {
        // If the daemon has said why it ends the session, that is what the caller should hear.
        if let Err(error) = self.send(message, fds) {
            return Err(self.last_words().unwrap_or(error));
        }
        loop {
            // Of all that comes together, however much memory is announced before the answer.
            let left = until.saturating_duration_since(Instant::now());
            let Received { message, fds } = self.settle(self.receive(left))?;
            match message {
                ToClient::Memory { kind, first, bytes } => {
                    self.settle(memory.add(kind, first, bytes, fds))?;
                }
                answer => return Ok(answer),
            }
        }
    }
}

/// The control socket: one request at a time.
#[derive(Debug)]
pub(crate) struct Control {
    /// The newest daemon's.
    line: RwLock<Arc<Line>>,
    turns: Turns,
    timeout: Duration,
    /// How the session goes on with another daemon, if it can.
    again: OnceLock<Again>,
}

impl Control {
    pub(crate) fn new(line: Line, timeout: Duration) -> Self {
        Self { line: RwLock::new(Arc::new(line)), turns: Turns::default(), timeout, again: OnceLock::new() }
    }

    pub(crate) fn line(&self) -> Arc<Line> {
        Arc::clone(&self.line.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Another daemon is at the other end from now on.
    pub(crate) fn set_line(&self, line: Line) {
        *self.line.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(line);
    }

    /// The session goes on with another daemon in this way.
    pub(crate) fn set_again(&self, again: Again) {
        let _ = self.again.set(again);
    }

    /// A descriptor of the socket, to see whether it is hung up.
    pub(crate) fn watch(&self) -> Result<OwnedFd, Error> {
        Ok(self.line().watch.try_clone()?)
    }

    /// How long control messages, and requests that find the ring full, may take.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Waits for this thread's turn at the socket.
    fn turn(&self, timeout: Duration) -> Result<Turn<'_>, Error> {
        self.turns.take(timeout).ok_or(Error::Deadline { ticket: 0, waited: timeout })
    }

    pub(crate) fn call(&self, message: &ToDaemon, fds: &[BorrowedFd<'_>]) -> Result<Received, Error> {
        let _turn = self.turn(self.timeout)?;
        let line = self.line();
        // If the daemon has said why it ends the session, that is what the caller should hear.
        if let Err(error) = line.send(message, fds) {
            return Err(line.last_words().unwrap_or(error));
        }
        line.settle(line.receive(self.timeout))
    }

    /// Sends what is not answered. A daemon that has gone need not hear it.
    pub(crate) fn say(&self, message: &ToDaemon) {
        let Ok(_turn) = self.turn(self.timeout) else { return };
        let _ = self.line().send(message, &[]);
    }

    /// Sends a request, takes in new memory, and returns the answer.
    pub(crate) fn request(&self, message: &ToDaemon, memory: &Memory) -> Result<ToClient, Error> {
        self.request_within(message, memory, self.timeout)
    }

    /// As [`Control::request`], with a deadline of its own.
    pub(crate) fn request_within(
        &self,
        message: &ToDaemon,
        memory: &Memory,
        timeout: Duration,
    ) -> Result<ToClient, Error> {
        self.request_with(message, memory, None, timeout)
    }

    /// As [`Control::request`], with something held that others wait for: from the moment on at which it is this thread's turn, and not while
    /// another one's request takes as long as a disk does.
    pub(crate) fn request_holding<T>(
        &self,
        message: &ToDaemon,
        memory: &Memory,
        hold: impl FnOnce() -> T,
    ) -> Result<(T, ToClient), Error> {
        let until = Instant::now() + self.timeout;
        let _turn = self.turn(self.timeout)?;
        let held = hold();
        Ok((held, self.request_in_turn(message, memory, None, until)?))
    }

    /// The same with a file beside the message.
    pub(crate) fn request_with(
        &self,
        message: &ToDaemon,
        memory: &Memory,
        file: Option<&Memfd>,
        timeout: Duration,
    ) -> Result<ToClient, Error> {
        let until = Instant::now() + timeout;
        let _turn = self.turn(timeout)?;
        self.request_in_turn(message, memory, file, until)
    }

    fn request_in_turn(
        &self,
        message: &ToDaemon,
        memory: &Memory,
        file: Option<&Memfd>,
        until: Instant,
    ) -> Result<ToClient, Error> {
        let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        let Some(again) = self.again.get() else { return self.line().ask(message, memory, &fds, until) };
        // Whichever daemon does it: this is the number of the message.
        let number = again.controls() + 1;
        let answer = loop {
            let line = self.line();
            match line.ask(message, memory, &fds, until) {
                Err(Error::DaemonGone) => {
                    again.go_on(self, &line, until)?;
                    if let Some(answer) = again.answered(number) {
                        break answer;
                    }
                }
                answer => break answer,
            }
        };
        if matches!(answer, Ok(_) | Err(Error::Failed(_))) {
            again.done(number);
        }
        answer
    }

    /// Whether the daemon has hung up, and no other one goes on with the session by then; if it said why, that.
    pub(crate) fn gone(&self, until: Instant) -> Option<Error> {
        let line = self.line();
        if !line.hung_up() {
            return None;
        }
        let last_words = {
            let _turn = self.turns.take(Duration::ZERO)?;
            line.last_words()
        };
        match (last_words, self.again.get()) {
            (Some(said), _) => Some(said),
            (None, None) => Some(Error::DaemonGone),
            (None, Some(again)) => again.go_on(self, &line, until).err(),
        }
    }
}
