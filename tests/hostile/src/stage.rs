//! What an attacker has to work with.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use kvoyant_protocol::control::{ControlError, Failure, ToClient, ToDaemon, decode, encode};
use kvoyant_protocol::packet;
use kvoyant_protocol::wire::{Append, BatchEntry, Operation, Request, SequenceId};
use kvoyant_tests::fake;
use kvoyant_tests::raw::Raw;
pub use kvoyant_tests::raw::{request, speculate};

use crate::Outcome;

/// An attacker's view of the daemon.
#[derive(Debug)]
pub struct Stage {
    /// The control socket.
    pub socket: PathBuf,
    /// The admin socket.
    pub admin: PathBuf,
    /// The daemon's process.
    pub daemon: i32,
    /// Whether there is time for all of it; else a part that shows the same has to do.
    pub long: bool,
}

/// Tokens that an attacker's first sequence has room for.
pub const ROOM: u32 = 100;

impl Stage {
    /// A session by hand, with the fake model and one empty sequence.
    #[must_use]
    pub fn session(&self) -> (Raw, SequenceId) {
        self.session_of(&["full"])
    }

    /// The same, with these methods.
    #[must_use]
    pub fn session_of(&self, methods: &[&str]) -> (Raw, SequenceId) {
        let mut raw = Raw::connect(&self.socket, fake::spec(methods));
        let sequence = raw.open(ROOM);
        (raw, sequence)
    }

    /// As much as there is time for.
    #[must_use]
    pub fn many(&self, quick: usize, long: usize) -> usize {
        if self.long { long } else { quick }
    }

    /// A session that tells a lie, and has to be ended for it in words that say so.
    #[must_use]
    pub fn lie(&self, reason: &str, lie: impl FnOnce(&mut Raw, SequenceId)) -> Outcome {
        self.lie_with(&["full"], reason, lie)
    }

    /// The same, with these methods.
    #[must_use]
    pub fn lie_with(
        &self,
        methods: &[&str],
        reason: &str,
        lie: impl FnOnce(&mut Raw, SequenceId),
    ) -> Outcome {
        let (mut raw, sequence) = self.session_of(methods);
        lie(&mut raw, sequence);
        ended(&mut raw, reason)
    }

    /// The first packet of a connection that is to be refused in such words.
    #[must_use]
    pub fn first_words(&self, bytes: &[u8], reason: &str) -> Outcome {
        let socket = Raw::socket(&self.socket);
        packet::send(socket.as_fd(), bytes, &[]).expect("a packet");
        ended_socket(&socket, reason)
    }

    /// Asks for what is to be refused in such words, in a session that goes on.
    #[must_use]
    pub fn ask(&self, asks: &[(ToDaemon, &str)]) -> Outcome {
        let (mut raw, _) = self.session();
        let mut said = String::new();
        for (message, reason) in asks {
            let outcome = refused(raw.call(message), reason);
            if outcome.verdict != crate::Verdict::Reject {
                return Outcome::fail(format!("{message:?}: {}", outcome.said));
            }
            said = outcome.said;
        }
        goes_on(&mut raw).map_or_else(Outcome::fail, |()| Outcome::reject(said))
    }
}

/// The end of a session: a typed reason that says so, then the connection's end.
#[must_use]
pub fn ended(raw: &mut Raw, reason: &str) -> Outcome {
    match raw.hear() {
        Ok(ToClient::Failed(Failure::Protocol(said))) if said.contains(reason) => match raw.hear() {
            Err(ControlError::NotKvoyant) => Outcome::reject(said),
            other => Outcome::fail(format!("after {said:?} the session goes on: {other:?}")),
        },
        other => Outcome::fail(format!("{other:?} came instead of an end for {reason:?}")),
    }
}

/// The same, of a connection that never became a session.
#[must_use]
pub fn ended_socket(socket: &OwnedFd, reason: &str) -> Outcome {
    let heard = packet::receive(socket.as_fd()).map_err(|error| error.to_string());
    let answer = heard.and_then(|packet| {
        decode::<ToClient>(&packet.bytes).map_err(|error| format!("{error} ({} bytes)", packet.bytes.len()))
    });
    let said = match answer {
        Ok(ToClient::Failed(failure)) if failure.to_string().contains(reason) => failure.to_string(),
        other => return Outcome::fail(format!("{other:?} came instead of an end for {reason:?}")),
    };
    match packet::receive(socket.as_fd()) {
        Ok(packet) if !packet.bytes.is_empty() => {
            Outcome::fail(format!("after {said:?} the connection goes on"))
        }
        _ => Outcome::reject(said),
    }
}

/// A typed refusal that says so.
#[must_use]
pub fn refused(answer: Result<ToClient, ControlError>, reason: &str) -> Outcome {
    match answer {
        Ok(ToClient::Failed(failure)) if failure.to_string().contains(reason) => {
            Outcome::reject(failure.to_string())
        }
        other => Outcome::fail(format!("{other:?} came instead of a refusal for {reason:?}")),
    }
}

/// Whether a session still does what it is asked.
///
/// # Errors
/// What came instead.
pub fn goes_on(raw: &mut Raw) -> Result<(), String> {
    let by = kvoyant_protocol::control::SelectedBy::Lane;
    match raw.call(&ToDaemon::Open { method: 0, tokens: 1, by }) {
        Ok(ToClient::Opened { sequence, .. }) => {
            match raw.call(&ToDaemon::Close { sequences: vec![sequence] }) {
                Ok(ToClient::Done) => Ok(()),
                other => Err(format!("a sequence could not be closed: {other:?}")),
            }
        }
        other => Err(format!("the session does not go on: {other:?}")),
    }
}

/// A message with a body that is not what it says to be.
#[must_use]
pub fn with_body(body: &[u8]) -> Vec<u8> {
    let mut bytes = encode(&ToDaemon::Mapped);
    bytes.truncate(12);
    bytes.extend_from_slice(body);
    bytes
}

/// Rows of all layers.
#[must_use]
pub fn append() -> Request {
    request(Operation::Append(Append { layer: None, batch: 1 }))
}

/// A batch's member.
#[must_use]
pub fn entry(sequence: SequenceId, position: u32, value: u32) -> BatchEntry {
    BatchEntry { sequence, position, value }
}
