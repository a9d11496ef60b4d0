//! A client's control socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kvoyant_protocol::control::{ToClient, ToDaemon, decode, encode};
use kvoyant_protocol::packet::{self, Packet, Received};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::task::coop::consume_budget;

use super::Ended;
use super::surplus::{close, not_wanted};
use crate::lane::Reply;

/// A control socket.
pub(super) struct Socket(pub(super) UnixStream);

impl Socket {
    /// The next message, and the memfds beside it: it is one that takes some, or there are none.
    pub(super) async fn receive(&self) -> Result<(ToDaemon, Vec<OwnedFd>), Ended> {
        let packet = loop {
            // A socket that is always ready never waits: without this its client would have the thread to itself.
            consume_budget().await;
            self.0.readable().await?;
            match self.0.try_io(Interest::READABLE, || packet::receive_any(self.0.as_fd())) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                packet => break packet,
            }
        };
        let Received { packet: Packet { bytes, fds }, whole } = match packet {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(Ended::HungUp),
            Err(error) => return Err(error.into()),
        };
        let surplus = |fds, reason: String| Err(Ended::Surplus { reason, fds, ours: false });
        if let Err(error) = whole {
            let ours = error.kind() == io::ErrorKind::Other;
            return Err(Ended::Surplus { reason: error.to_string(), fds, ours });
        }
        if bytes.is_empty() && fds.is_empty() {
            return Err(Ended::HungUp);
        }
        let message = match decode(&bytes) {
            Ok(message) => message,
            Err(error) => return surplus(fds, error.to_string()),
        };
        if !fds.is_empty() && !takes_descriptors(&message) {
            return surplus(fds, "descriptors came beside a message that takes none".into());
        }
        if let Some(reason) = not_wanted(&fds) {
            return surplus(fds, format!("{reason} came beside a message"));
        }
        Ok((message, fds))
    }

    pub(super) async fn send(&self, message: &ToClient, fds: &[OwnedFd]) -> Result<(), Ended> {
        self.send_bytes(&encode(message), fds).await
    }

    /// Sends a message that is encoded already.
    pub(super) async fn send_bytes(&self, bytes: &[u8], fds: &[OwnedFd]) -> Result<(), Ended> {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        loop {
            consume_budget().await;
            self.0.writable().await?;
            match self.0.try_io(Interest::WRITABLE, || packet::send(self.0.as_fd(), bytes, &fds)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(Ended::HungUp),
                result => return Ok(result?),
            }
        }
    }

    /// Whether something lies there unread, as far as that can be told from an end.
    pub(super) fn has_unread(&self) -> bool {
        matches!(packet::hung_up(self.0.as_fd()), Ok(false))
    }

    /// Waits until the client has gone. One that sends while it waits for an answer is looked at again afterwards.
    pub(super) async fn hung_up(&self) {
        let peek = || packet::hung_up(self.0.as_fd());
        loop {
            if self.0.readable().await.is_err() {
                return;
            }
            match self.0.try_io(Interest::READABLE, peek) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(false) => return std::future::pending().await,
                Ok(true) | Err(_) => return,
            }
        }
    }

    /// Closes it elsewhere, with all that lies unread in it and these descriptors, and then lets go of what stands for the connection.
    pub(super) fn close(self, mut fds: Vec<OwnedFd>, connection: impl Send + 'static) {
        match self.0.into_std() {
            Ok(socket) => fds.push(socket.into()),
            Err(error) => tracing::warn!("a client's socket was closed by the control thread: {error}"),
        }
        close(fds, connection);
    }

    pub(super) async fn reply(&self, reply: Reply) -> Result<(), Ended> {
        for announcement in &reply.announcements {
            self.send(&announcement.message, &announcement.fds).await?;
        }
        self.send(&reply.message, &reply.fds).await
    }
}

fn takes_descriptors(message: &ToDaemon) -> bool {
    matches!(message, ToDaemon::Register(_) | ToDaemon::Publish { .. } | ToDaemon::Attach { .. })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    #[test]
    fn a_client_that_always_has_a_message_waiting_does_not_have_the_thread_to_itself() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (daemon, client) = std::os::unix::net::UnixStream::pair().unwrap();
        daemon.set_nonblocking(true).unwrap();
        client.set_nonblocking(true).unwrap();
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, async move {
            let socket = Socket(UnixStream::from_std(daemon).unwrap());
            let ran = Rc::new(Cell::new(0_u32));
            let other = Rc::clone(&ran);
            tokio::task::spawn_local(async move {
                loop {
                    other.set(other.get() + 1);
                    tokio::task::yield_now().await;
                }
            });
            let message = encode(&ToDaemon::Goodbye);
            for _ in 0..1_000 {
                // The next message is there before the one before it is received.
                packet::send(client.as_fd(), &message, &[]).unwrap();
                assert_eq!(socket.receive().await.map(|(message, _)| message).unwrap(), ToDaemon::Goodbye);
            }
            assert!(ran.get() > 3, "the other task ran {} times", ran.get());
        });
    }
}
