//! Asking a daemon over its admin socket. Everything here blocks, within bounds.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;

use super::messages::{BringOrder, Done, ErrorBody, ImageReport, SequencesReport, SuspendOrder};
use super::reports::{Changed, ConfigPatch, ConfigReport, DrainReport, EvictOrder, EvictReport, LogReport};
use super::{LANES_TIMEOUT, REMOTE_LIST_TIMEOUT, WORK_TIMEOUT};
use crate::control::image_id;
use crate::status::StatusReport;

/// How long an answer may take beyond what the daemon waits for itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a change of the configuration may take: names of users may have to be looked up elsewhere.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Largest answer that is read, in bytes.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why something could not be had of a daemon.
#[derive(Debug, Error)]
pub enum AdminError {
    /// Nobody listens, or we may not connect.
    #[error("cannot connect to {}: {source}; {}", path.display(), advice(source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The daemon did not answer as it should.
    #[error("the daemon at {} did not answer as it should: {reason}", path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
    /// The daemon answered that it does not do it, or we know that it would.
    #[error("{reason}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Why, and what to do.
        reason: String,
    },
}

fn advice(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => "join the group of the socket, or run as its user",
        _ => "is kvoyantd running? Name its socket with --admin",
    }
}

/// Asks a daemon for its status. Blocks for a few seconds at most.
///
/// # Errors
/// See [`AdminError`].
pub fn fetch_status(path: &Path) -> Result<StatusReport, AdminError> {
    ask(path, Method::GET, "/v1/status", None::<&()>, ANSWER_TIMEOUT)
}

/// Asks for open sequences and images. Blocks for less than a minute.
///
/// # Errors
/// See [`AdminError`].
pub fn fetch_sequences(path: &Path) -> Result<SequencesReport, AdminError> {
    // Somebody else's list may be waited for first.
    let patience = 2 * (LANES_TIMEOUT + REMOTE_LIST_TIMEOUT) + ANSWER_TIMEOUT;
    ask(path, Method::GET, "/v1/sequences", None::<&()>, patience)
}

/// Has an open sequence suspended. Blocks as long as that takes.
///
/// # Errors
/// See [`AdminError`].
pub fn suspend_sequence(path: &Path, order: &SuspendOrder) -> Result<Done, AdminError> {
    ask(path, Method::POST, "/v1/sequences/suspend", Some(order), WORK_TIMEOUT + ANSWER_TIMEOUT)
}

/// Has an image copied from the remote store, if it is only there, and compared with its checksums. Blocks as long as that takes.
///
/// # Errors
/// See [`AdminError`].
pub fn bring_image(path: &Path, order: &BringOrder) -> Result<ImageReport, AdminError> {
    ask(path, Method::POST, "/v1/images/bring", Some(order), WORK_TIMEOUT + ANSWER_TIMEOUT)
}

/// Has an image erased wherever it is. Blocks as long as that takes.
///
/// # Errors
/// See [`AdminError`].
pub fn remove_image(path: &Path, uid: u32, image: &str) -> Result<Done, AdminError> {
    // What is no name could be another address.
    image_id(uid, image)
        .map_err(|failure| AdminError::Refused { status: 400, reason: failure.to_string() })?;
    let resource = format!("/v1/images/{uid}/{image}");
    ask(path, Method::DELETE, &resource, None::<&()>, WORK_TIMEOUT + ANSWER_TIMEOUT)
}

/// Asks for the configuration, and where its values came from.
///
/// # Errors
/// See [`AdminError`].
pub fn fetch_config(path: &Path) -> Result<ConfigReport, AdminError> {
    ask(path, Method::GET, "/v1/config", None::<&()>, ANSWER_TIMEOUT)
}

/// Sets keys of the configuration until the daemon reloads or restarts.
///
/// # Errors
/// See [`AdminError`].
pub fn set_config(path: &Path, patch: &ConfigPatch) -> Result<Changed, AdminError> {
    ask(path, Method::PATCH, "/v1/config", Some(patch), CHANGE_TIMEOUT)
}

/// Has the configuration read again.
///
/// # Errors
/// See [`AdminError`].
pub fn reload_config(path: &Path) -> Result<Changed, AdminError> {
    ask(path, Method::POST, "/v1/config/reload", None::<&()>, CHANGE_TIMEOUT)
}

/// Asks what is logged.
///
/// # Errors
/// See [`AdminError`].
pub fn fetch_log(path: &Path) -> Result<LogReport, AdminError> {
    ask(path, Method::GET, "/v1/log", None::<&()>, ANSWER_TIMEOUT)
}

/// Has something else logged from now on.
///
/// # Errors
/// See [`AdminError`].
pub fn set_log(path: &Path, filter: &str) -> Result<LogReport, AdminError> {
    let wanted = LogReport { filter: filter.to_owned(), dropped_lines: 0 };
    ask(path, Method::PUT, "/v1/log", Some(&wanted), CHANGE_TIMEOUT)
}

/// Asks whether no new sessions are taken.
///
/// # Errors
/// See [`AdminError`].
pub fn fetch_draining(path: &Path) -> Result<DrainReport, AdminError> {
    ask(path, Method::GET, "/v1/drain", None::<&()>, ANSWER_TIMEOUT)
}

/// Has no new sessions taken, or takes that back.
///
/// # Errors
/// See [`AdminError`].
pub fn drain(path: &Path, draining: bool) -> Result<DrainReport, AdminError> {
    let method = if draining { Method::POST } else { Method::DELETE };
    ask(path, method, "/v1/drain", None::<&()>, ANSWER_TIMEOUT)
}

/// Has pages leave for the disk, and unused extents go back. Blocks as long as that takes.
///
/// # Errors
/// See [`AdminError`].
pub fn evict(path: &Path, order: &EvictOrder) -> Result<EvictReport, AdminError> {
    ask(path, Method::POST, "/v1/evict", Some(order), WORK_TIMEOUT + ANSWER_TIMEOUT)
}

/// Whether a daemon at this socket answers, and its lanes do.
pub(crate) async fn answers(path: &Path) -> Result<(), String> {
    let request = Request::builder().uri("/health").header(HOST, "localhost").body(Full::default());
    let request = request.map_err(|error| error.to_string())?;
    let stream = UnixStream::connect(path).await.map_err(|error| error.to_string())?;
    let answer = tokio::time::timeout(LANES_TIMEOUT + ANSWER_TIMEOUT, exchange(stream, request)).await;
    match answer.map_err(|_| "no answer".to_owned())?? {
        (StatusCode::OK, _) => Ok(()),
        (status, body) => Err(format!("{status}: {}", String::from_utf8_lossy(&body))),
    }
}

fn ask<T: DeserializeOwned>(
    path: &Path,
    method: Method,
    resource: &str,
    body: Option<&impl Serialize>,
    patience: Duration,
) -> Result<T, AdminError> {
    let failed = |reason: String| AdminError::Answer { path: path.to_path_buf(), reason };
    let body = body.map(serde_json::to_vec).transpose().map_err(|error| failed(error.to_string()))?;
    let request = Request::builder()
        .method(method)
        .uri(resource)
        .header(HOST, "localhost")
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body.unwrap_or_default())))
        .map_err(|error| failed(error.to_string()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| failed(error.to_string()))?;
    let (status, answer) = runtime.block_on(async {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| AdminError::Connect { path: path.to_path_buf(), source })?;
        match tokio::time::timeout(patience, exchange(stream, request)).await {
            Ok(result) => result.map_err(failed),
            Err(_) => Err(failed(format!("no answer within {} s", patience.as_secs()))),
        }
    })?;
    if status == StatusCode::OK {
        return serde_json::from_slice(&answer).map_err(|error| failed(error.to_string()));
    }
    match serde_json::from_slice(&answer) {
        Ok(ErrorBody { error }) => Err(AdminError::Refused { status: status.as_u16(), reason: error }),
        Err(_) => Err(failed(format!("HTTP status {status}"))),
    }
}

async fn exchange(stream: UnixStream, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| error.to_string())?;
        Ok((status, body.to_bytes()))
    };
    tokio::select! {
        answer = answer => answer,
        ended = connection => match ended {
            Ok(()) => Err("the connection was closed".to_string()),
            Err(error) => Err(error.to_string()),
        },
    }
}
