//! A client's control socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kvoyant_protocol::control::{ToClient, ToDaemon, decode, encode};
use kvoyant_protocol::packet::{self, Packet};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::Ended;
use crate::lane::Reply;

/// A control socket.
pub(super) struct Socket(pub(super) UnixStream);

impl Socket {
    pub(super) async fn receive(&self) -> Result<(ToDaemon, Vec<OwnedFd>), Ended> {
        let packet = loop {
            self.0.readable().await?;
            match self.0.try_io(Interest::READABLE, || packet::receive(self.0.as_fd())) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                packet => break packet,
            }
        };
        let Packet { bytes, fds } = match packet {
            Ok(packet) => packet,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(Ended::HungUp),
            Err(error) => return Err(error.into()),
        };
        if bytes.is_empty() {
            return Err(Ended::HungUp);
        }
        let message = decode(&bytes).map_err(|error| Ended::Protocol(error.to_string()))?;
        Ok((message, fds))
    }

    pub(super) async fn send(&self, message: &ToClient, fds: &[OwnedFd]) -> Result<(), Ended> {
        self.send_bytes(&encode(message), fds).await
    }

    /// Sends a message that is encoded already.
    pub(super) async fn send_bytes(&self, bytes: &[u8], fds: &[OwnedFd]) -> Result<(), Ended> {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        loop {
            self.0.writable().await?;
            match self.0.try_io(Interest::WRITABLE, || packet::send(self.0.as_fd(), bytes, &fds)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(Ended::HungUp),
                result => return Ok(result?),
            }
        }
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

    pub(super) async fn reply(&self, reply: Reply) -> Result<(), Ended> {
        for announcement in &reply.announcements {
            self.send(&announcement.message, &announcement.fds).await?;
        }
        self.send(&reply.message, &reply.fds).await
    }
}
