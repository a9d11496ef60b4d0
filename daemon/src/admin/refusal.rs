//! Why a request is not done: one sentence with what to do, and its HTTP status.

use std::time::Duration;

use hyper::StatusCode;
use kvoyant_protocol::control::Failure;
use thiserror::Error;

use crate::control::OrderError;
use crate::settings::SetError;
use crate::tiers::store::StoreError;

/// See the module.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    /// No such resource.
    #[error("there is no {path}; try /v1/status, or /v1/openapi.json for all that there is")]
    NoResource {
        /// What was asked for.
        path: String,
    },
    /// Something that is not for everybody on this machine.
    #[error(
        "{path} is not to be had over TCP without the token (`monitor_token`), for nobody says there who they are: ask the admin socket"
    )]
    Remote {
        /// What was asked for.
        path: String,
    },
    /// A resource that cannot be asked for in this way.
    #[error("only {known} can be sent to {path}")]
    Method {
        /// The resource.
        path: String,
        /// What can.
        known: String,
    },
    /// A body that is too long.
    #[error("a body may have {max} bytes at most")]
    TooLong {
        /// The most.
        max: usize,
    },
    /// A body that did not come.
    #[error("the body did not come whole within {} s", .within.as_secs())]
    TooSlow {
        /// How long was waited.
        within: Duration,
    },
    /// A body that is not what it is to be.
    #[error("the body cannot be read: {0}")]
    Body(String),
    /// A body where none is wanted.
    #[error("a body of {bytes} bytes was sent, and this resource takes none")]
    Bodied {
        /// How long it is.
        bytes: usize,
    },
    /// A handle that is none.
    #[error("{text:?} is no sequence: name its slot and generation, as 3.0; `kvoyant sequences` lists them")]
    Handle {
        /// What came.
        text: String,
    },
    /// A label that is too long.
    #[error("the label has {bytes} bytes and may have {max}")]
    Label {
        /// How many it has.
        bytes: usize,
        /// The most.
        max: usize,
    },
    /// A user's id that is none.
    #[error("{text:?} is no user's id: write /v1/images/1000/name")]
    User {
        /// What came.
        text: String,
    },
    /// A name that no image can have.
    #[error("{0}")]
    Name(Failure),
    /// Somebody whom the daemon does not serve.
    #[error("{0}")]
    NotAllowed(Failure),
    /// Somebody else's.
    #[error(
        "that is another user's, and you are user {caller}: only they, root and the daemon's own user may do it"
    )]
    Foreign {
        /// Who asks.
        caller: u32,
    },
    /// What only operators may do.
    #[error("you are user {caller}, and only root and the daemon's own user may do that")]
    Operators {
        /// Who asks.
        caller: u32,
    },
    /// A setting that is not taken.
    #[error(transparent)]
    Setting(SetError),
    /// No folder for images.
    #[error("this daemon keeps no images; start it with `store` set to a folder")]
    NoStore,
    /// The name is taken.
    #[error("there is an image {image:?} already; take another name, or overwrite it")]
    Exists {
        /// Which name.
        image: String,
    },
    /// A suspension that failed.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// A store that refused.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// Half of it is done.
    #[error(
        "it is erased on this machine, and may still be in the remote store: {0}; do it again once that answers"
    )]
    HalfRemoved(StoreError),
    /// Too many at a time.
    #[error("{max} images are being worked on already; try again later")]
    Busy {
        /// The most.
        max: usize,
    },
    /// Lanes that do not answer.
    #[error("the daemon's lanes did not answer within {} s; try again, and look at its log if that does not help", .within.as_secs())]
    Lanes {
        /// How long was waited.
        within: Duration,
    },
    /// It takes longer than anybody should wait.
    #[error("it is not done after {} s, and goes on; `kvoyant sequences` shows the image once it is", .after.as_secs())]
    StillAtIt {
        /// How long was waited.
        after: Duration,
    },
    /// A defect.
    #[error("the daemon failed: {0}; its log says more")]
    Internal(String),
}

impl Refusal {
    /// The HTTP status that goes with it.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::NoResource { .. } | Self::Order(OrderError::NoSession { .. }) => StatusCode::NOT_FOUND,
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLong { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooSlow { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::Body(_)
            | Self::Bodied { .. }
            | Self::Handle { .. }
            | Self::Label { .. }
            | Self::User { .. }
            | Self::Name(_) => StatusCode::BAD_REQUEST,
            Self::Foreign { .. } | Self::NotAllowed(_) | Self::Remote { .. } | Self::Operators { .. } => {
                StatusCode::FORBIDDEN
            }
            Self::Setting(SetError::Fixed { .. }) => StatusCode::CONFLICT,
            Self::Setting(_) => StatusCode::BAD_REQUEST,
            Self::Exists { .. } => StatusCode::CONFLICT,
            Self::Order(OrderError::Failed(failure)) => of_failure(failure),
            Self::Store(error) => of_store(error),
            Self::NoStore
            | Self::HalfRemoved(_)
            | Self::Busy { .. }
            | Self::Lanes { .. }
            | Self::StillAtIt { .. }
            | Self::Order(OrderError::Busy { .. } | OrderError::Closed { .. }) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

fn of_failure(failure: &Failure) -> StatusCode {
    match failure {
        Failure::NoSuchSequence(_) => StatusCode::NOT_FOUND,
        // What it is does not let it be suspended.
        Failure::Graph { .. } | Failure::RowsLost { .. } | Failure::BadModel(_) | Failure::BadMethod(_) => {
            StatusCode::CONFLICT
        }
        Failure::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

fn of_store(error: &StoreError) -> StatusCode {
    match error {
        StoreError::NotFound { .. } => StatusCode::NOT_FOUND,
        StoreError::Exists { .. }
        | StoreError::Damaged { .. }
        | StoreError::Replaced { .. }
        | StoreError::WrongKind { .. }
        | StoreError::OtherModel { .. } => StatusCode::CONFLICT,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}
