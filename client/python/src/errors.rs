//! Errors on their way to Python: a class of `kvoyant.errors`, and a sentence.

use kvoyant_client::{Error, Kind};
use pyo3::prelude::*;
use pyo3::types::PyType;

/// An error: which class, and what it says.
#[derive(Debug)]
pub(crate) struct Wrong {
    class: &'static str,
    text: String,
}

/// What calls of this crate come to, before Python sees it.
pub(crate) type Result<T> = std::result::Result<T, Wrong>;

impl Wrong {
    fn new(class: &'static str, text: impl Into<String>) -> Self {
        Self { class, text: text.into() }
    }

    /// A value that cannot be.
    pub(crate) fn argument(text: impl Into<String>) -> Self {
        Self::new("ArgumentError", text)
    }

    /// An array of another shape.
    pub(crate) fn shape(text: impl Into<String>) -> Self {
        Self::new("ShapeError", text)
    }

    /// An array of another type.
    pub(crate) fn dtype(text: impl Into<String>) -> Self {
        Self::new("DtypeError", text)
    }

    /// An object that was closed.
    pub(crate) fn closed(what: &str) -> Self {
        Self::new(
            "ClosedError",
            format!(
                "the {what} was closed or released before, by itself or with its model; use one that is open"
            ),
        )
    }

    /// An object of the parent process.
    pub(crate) fn forked(what: &str) -> Self {
        Self::new(
            "ForkedError",
            format!(
                "the {what} belongs to the parent of this process: after fork a child has no session; connect in the child, or connect \
                 after the fork"
            ),
        )
    }

    /// A sequence that another thread is inside of.
    pub(crate) fn concurrent(how: &str) -> Self {
        Self::new(
            "ConcurrentError",
            format!(
                "the sequence is being {how} by another thread: appending, reserving, truncating, forking, suspending and closing a \
                 sequence want it for themselves"
            ),
        )
    }

    /// A sequence whose rows are being looked at.
    pub(crate) fn viewed(views: usize, what: &str) -> Self {
        Self::new(
            "InUseError",
            format!(
                "{views} views of the sequence's rows are alive, and to {what} would change what they show; drop the views (and arrays and \
                 tensors made of them) before"
            ),
        )
    }

    /// Rows or methods that this call cannot serve.
    pub(crate) fn unsupported(text: impl Into<String>) -> Self {
        Self::new("UnsupportedError", text)
    }
}

impl From<Error> for Wrong {
    fn from(error: Error) -> Self {
        let class = match error.kind() {
            Kind::Argument => "ArgumentError",
            Kind::Shape => "ShapeError",
            Kind::Connect => "ConnectError",
            Kind::Version => "VersionError",
            Kind::Refused => "RefusedError",
            Kind::NotAllowed => "NotAllowedError",
            Kind::Backpressure => "BackpressureError",
            Kind::Quota => "QuotaError",
            Kind::Gone => "GoneError",
            Kind::Deadline => "DeadlineError",
            Kind::NotReady => "NotReadyError",
            Kind::Busy => "BusyError",
            Kind::NoRoom => "NoRoomError",
            Kind::Spilled => "SpilledError",
            Kind::Lost => "LostError",
            Kind::Device => "DeviceError",
            Kind::Image => "ImageError",
            Kind::Protocol => "ProtocolError",
            Kind::System => "SystemCallError",
        };
        Self::new(class, error.to_string())
    }
}

impl From<kvoyant_methods::MethodError> for Wrong {
    fn from(error: kvoyant_methods::MethodError) -> Self {
        Self::argument(error.to_string())
    }
}

impl From<Wrong> for PyErr {
    fn from(Wrong { class, text }: Wrong) -> Self {
        Python::attach(|py| {
            let found = py.import("kvoyant.errors").and_then(|module| module.getattr(class));
            match found.and_then(|class| class.cast_into::<PyType>().map_err(Into::into)) {
                Ok(class) => Self::from_type(class, text),
                Err(error) => error,
            }
        })
    }
}
