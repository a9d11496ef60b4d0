//! What can go wrong, and what to do.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvoyant_protocol::control::{ControlError, Failure};
use kvoyant_protocol::layout::LimitError;
use kvoyant_protocol::memory::MemoryError;
use kvoyant_protocol::ring::RingError;
use kvoyant_protocol::wire::{CompletionError, Status};
use thiserror::Error;

/// What sort of error it is: what programs in other languages, which see no enums, tell errors apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Limits that cannot be.
    Argument,
    /// A batch, hint or row of the wrong size.
    Shape,
    /// Nobody listens at the socket, or it may not be used.
    Connect,
    /// The daemon speaks another version of the protocol.
    Version,
    /// The daemon refused, for a reason that is none of the others.
    Refused,
    /// The daemon does not serve this user.
    NotAllowed,
    /// Memory, tables, sequences or sessions are used up.
    Backpressure,
    /// A quota of this user is reached.
    Quota,
    /// The daemon has gone.
    Gone,
    /// The answer did not come in time.
    Deadline,
    /// The request was answered without rows.
    NotReady,
    /// All tickets are in use.
    Busy,
    /// Positions that the sequence has no room for.
    NoRoom,
    /// Rows that lie on disk.
    Spilled,
    /// Rows that are lost.
    Lost,
    /// A GPU that is missing or failed.
    Device,
    /// An image that cannot be written or read.
    Image,
    /// The daemon broke the protocol.
    Protocol,
    /// The operating system refused something.
    System,
}

/// An error of the client library.
#[derive(Debug, Error)]
pub enum Error {
    /// The daemon's socket cannot be connected to.
    #[error("cannot connect to {}: {source}; {}", path.display(), advice(path, source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The daemon speaks another protocol, or another version of it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The daemon did not do what was asked. The session goes on unless this is [`Failure::Protocol`].
    #[error("{}", refusal(.0))]
    Failed(#[from] Failure),
    /// The daemon has gone. What the session's extents hold can still be read.
    #[error("the daemon has gone")]
    DaemonGone,
    /// The answer did not come in time. It has been given up: go on without it, or ask again. Ticket 0: not a
    /// speculation, but a control message, or a request that found the ring full.
    #[error("the daemon has not answered for {waited:.1?} (ticket {ticket}); is it stopped or overloaded?")]
    Deadline {
        /// The ticket.
        ticket: u64,
        /// How long was waited.
        waited: Duration,
    },
    /// The daemon answered that it could not.
    #[error("layer {layer} was not answered: {status}")]
    NotReady {
        /// The layer.
        layer: u16,
        /// Why.
        status: Status,
    },
    /// All tickets are in use: answers have to be dropped before more can be asked for.
    #[error("{slots} answers are held or under way, which is this session's ring_slots; drop some")]
    TooManyInFlight {
        /// How many there may be.
        slots: u32,
    },
    /// No GPU to speak of, where one is needed.
    #[error("no device: {0}")]
    NoDevice(String),
    /// The CUDA driver refused something.
    #[error("the device failed: {0}")]
    Cuda(#[from] kvoyant_cuda::CudaError),
    /// A stream that is being captured, where only one that runs will do.
    #[error(
        "the stream is being captured, and what is submitted would be replayed with an old ticket; use graph mode (Model::graph)"
    )]
    Capturing,
    /// A kernel that cannot be had.
    #[error(transparent)]
    Kernel(Box<kvoyant_cuda::KernelError>),
    /// Rows that lie on a device, asked for as if they lay here.
    #[error("these rows lie in the memory of {device}: attend there, or copy them out with copy_rows")]
    OnDevice {
        /// The device.
        device: String,
    },
    /// A batch, hint or row of the wrong size.
    #[error("{what} has {found} where {wanted} are needed")]
    Size {
        /// What it is.
        what: &'static str,
        /// Its size.
        found: usize,
        /// Its right size, or the most that is allowed.
        wanted: usize,
    },
    /// A layer whose rows are all attended, asked about as if some were selected.
    #[error(
        "layer {layer} is attended whole (dense_layers, sliding_layers): nothing is selected there, and nothing can be asked"
    )]
    NotSelected {
        /// The layer.
        layer: usize,
    },
    /// A member of a batch without what its method selects by.
    #[error("member {member} has none of what method {method} selects by: {wanted}")]
    Hint {
        /// Its index in the batch.
        member: usize,
        /// Its sequence's method, among those registered.
        method: usize,
        /// What it needs.
        wanted: &'static str,
    },
    /// Attention rows for a method that learns from none.
    #[error("method {method} learns from no attention rows")]
    NoFeedback {
        /// The method, among those registered.
        method: usize,
    },
    /// A weight of attention that is none.
    #[error("a weight of {weight} is not within [0, 1]")]
    Weight {
        /// The weight.
        weight: f32,
    },
    /// Rows at positions that the sequence has no room for.
    #[error("position {position} is beyond the {room} tokens that the sequence has room for; reserve more")]
    NoRoom {
        /// The position.
        position: usize,
        /// The room.
        room: usize,
    },
    /// Rows that lie on disk, read without being [fetched](crate::Model::fetch).
    #[error("the rows of token {token} in layer {layer} lie on disk: fetch the layer before reading it")]
    Spilled {
        /// The layer.
        layer: usize,
        /// The first such token.
        token: usize,
    },
    /// Rows that the daemon could not read back from disk.
    #[error("the rows from token {token} on are lost: truncate the sequence there, and compute them again")]
    Lost {
        /// The first lost token of any layer.
        token: usize,
    },
    /// Limits that cannot be.
    #[error(transparent)]
    Limits(#[from] LimitError),
    /// Shared memory that could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The daemon broke the protocol.
    #[error("the daemon broke the protocol: {0}")]
    Broken(String),
    /// A socket error.
    #[error("socket error: {0}")]
    Io(#[from] std::io::Error),
}

impl Error {
    /// What sort of error it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Connect { .. } => Kind::Connect,
            Self::Control(_) => Kind::Version,
            Self::Failed(failure) => match failure {
                Failure::Backpressure { .. }
                | Failure::TablesFull { .. }
                | Failure::TooManySequences { .. }
                | Failure::TooManySessions { .. }
                | Failure::DeviceFull { .. } => Kind::Backpressure,
                Failure::Quota(_) => Kind::Quota,
                Failure::NotAllowed { .. } => Kind::NotAllowed,
                Failure::Device(_) | Failure::DeviceLost(_) => Kind::Device,
                Failure::Image { .. } => Kind::Image,
                Failure::RowsLost { .. } => Kind::Lost,
                Failure::Protocol(_) => Kind::Protocol,
                _ => Kind::Refused,
            },
            Self::DaemonGone => Kind::Gone,
            Self::Deadline { .. } => Kind::Deadline,
            Self::NotReady { status: Status::RowsLost, .. } => Kind::Lost,
            Self::NotReady { status: Status::OverQuota, .. } => Kind::Quota,
            Self::NotReady { .. } => Kind::NotReady,
            Self::TooManyInFlight { .. } => Kind::Busy,
            Self::NoDevice(_) | Self::Cuda(_) | Self::Capturing | Self::Kernel(_) | Self::OnDevice { .. } => {
                Kind::Device
            }
            Self::Size { .. } => Kind::Shape,
            Self::NoRoom { .. } => Kind::NoRoom,
            Self::Spilled { .. } => Kind::Spilled,
            Self::Lost { .. } => Kind::Lost,
            Self::Limits(_)
            | Self::NotSelected { .. }
            | Self::Hint { .. }
            | Self::NoFeedback { .. }
            | Self::Weight { .. } => Kind::Argument,
            Self::Broken(_) => Kind::Protocol,
            Self::Memory(_) | Self::Io(_) => Kind::System,
        }
    }

    /// Whether the daemon is gone, cannot be believed any more, or has not answered in time: asking it for something else will hardly help.
    /// What the session's extents hold can still be read ([`Sequence::read`](crate::Sequence::read)).
    #[must_use]
    pub fn is_daemon_lost(&self) -> bool {
        match self {
            Self::DaemonGone | Self::Deadline { .. } | Self::Broken(_) | Self::Control(_) | Self::Io(_) => {
                true
            }
            Self::Failed(failure) => matches!(failure, Failure::Protocol(_) | Failure::DeviceLost(_)),
            _ => false,
        }
    }
}

impl From<kvoyant_cuda::KernelError> for Error {
    fn from(error: kvoyant_cuda::KernelError) -> Self {
        Self::Kernel(Box::new(error))
    }
}

impl From<RingError> for Error {
    fn from(error: RingError) -> Self {
        Self::Broken(error.to_string())
    }
}

impl From<CompletionError> for Error {
    fn from(error: CompletionError) -> Self {
        Self::Broken(error.to_string())
    }
}

/// A failure in words: one of no image in particular names none.
fn refusal(failure: &Failure) -> String {
    match failure {
        Failure::Image { image, reason } if image.is_empty() => reason.clone(),
        other => other.to_string(),
    }
}

fn advice(path: &Path, error: &std::io::Error) -> &'static str {
    // Whatever the system says of it, nothing but a socket can be connected to.
    if let Ok(what) = std::fs::metadata(path)
        && !what.file_type().is_socket()
    {
        return if what.is_dir() {
            "this is a folder and no socket; name the socket of kvoyantd's first log line"
        } else {
            "this is a file and no socket; name the socket of kvoyantd's first log line"
        };
    }
    match error.kind() {
        std::io::ErrorKind::NotFound => "is kvoyantd running, and is this its socket?",
        std::io::ErrorKind::ConnectionRefused => "a daemon left this socket behind; start kvoyantd",
        std::io::ErrorKind::PermissionDenied => "join the socket's group, or run as its user",
        std::io::ErrorKind::WouldBlock => "the daemon takes no connections; is it stopped or overloaded?",
        _ if error.raw_os_error() == Some(nix::libc::EPROTOTYPE) => {
            "this is a daemon's admin socket, which `kvoyant status --admin` takes, or another program's; name the socket of kvoyantd's \
             first log line"
        }
        _ => "check the path",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Client, Options};

    fn said(path: &Path) -> String {
        Client::connect(path, Options::default()).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_control_socket_is_called_what_it_is() {
        let folder = std::env::temp_dir().join(format!("kvoyant-client-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        assert!(said(&folder).contains("this is a folder and no socket"), "{}", said(&folder));
        let file = folder.join("file");
        std::fs::write(&file, "").unwrap();
        assert!(said(&file).contains("this is a file and no socket"), "{}", said(&file));
        let admin = folder.join("admin.sock");
        let listener = std::os::unix::net::UnixListener::bind(&admin).unwrap();
        assert!(said(&admin).contains("`kvoyant status --admin` takes"), "{}", said(&admin));
        drop(listener);
        let none = folder.join("none");
        assert!(said(&none).contains("is kvoyantd running"), "{}", said(&none));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_failure_of_no_image_in_particular_names_none() {
        let failed = |image: &str| {
            Error::from(Failure::Image { image: image.into(), reason: "this daemon keeps no images".into() })
        };
        assert_eq!(failed("").to_string(), "this daemon keeps no images");
        assert_eq!(failed("a").to_string(), "image \"a\": this daemon keeps no images");
    }
}
