//! Whether a client is still there: its socket tells, and so does its process, whose children may hold the socket open.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use kvoyant_protocol::packet;
use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Ended, Session, Socket};
use crate::device::Importer;

/// How often a process is looked at that cannot be waited for.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The process that connected, if the system can watch it.
pub(super) fn process(socket: &Socket) -> Result<Option<OwnedFd>, Ended> {
    match packet::peer_process(socket.0.as_fd()) {
        Ok(process) => Ok(Some(process)),
        // It has gone already, and what holds its socket now is not who connected.
        Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => Err(Ended::HungUp),
        Err(error) => {
            tracing::warn!(
                "cannot watch a client's process, whose session ends with its socket alone: {error}"
            );
            Ok(None)
        }
    }
}

/// Serves a session for as long as its process lives and its lane can go on with it. Neither waits for a client that does not read
/// what it is sent.
pub(super) async fn while_there(
    session: &Session,
    served: impl Future<Output = Result<(), Ended>>,
) -> Result<(), Ended> {
    tokio::select! {
        // What it said last comes before its end.
        biased;
        result = served => result,
        () = ended(&session.importer) => Err(Ended::HungUp),
        over = session.ending.ended() => Err(over.into()),
    }
}

/// Waits until the client's process has ended.
async fn ended(importer: &Importer) {
    let Some(process) = &importer.process else { return std::future::pending().await };
    if let Err(error) = readable(importer, process).await {
        tracing::warn!("a client's process is looked at every {LOOK_EVERY:?} instead of waited for: {error}");
        while !importer.has_ended() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

#[allow(
    deprecated,
    reason = "what a `BorrowedFd` borrows stays open and the same, which is what the unsafe way asks for"
)]
async fn readable(importer: &Importer, process: &OwnedFd) -> io::Result<()> {
    let watched = AsyncFd::with_interest(process.as_fd(), Interest::READABLE)?;
    loop {
        let mut ready = watched.readable().await?;
        if importer.has_ended() {
            return Ok(());
        }
        ready.clear_ready();
    }
}
