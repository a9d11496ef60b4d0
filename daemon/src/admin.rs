//! The admin socket: HTTP over a Unix socket, JSON answers.
//!
//! `GET /v1/status` gives a [`StatusReport`].

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};

use crate::status::{Registry, StatusReport};

/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// How long `fetch_status` waits for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Largest answer that `fetch_status` reads, in bytes.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Serves the admin socket until the task is dropped.
pub async fn serve(listener: UnixListener, registry: Arc<Registry>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let registry = Arc::clone(&registry);
                tokio::task::spawn_local(async move {
                    let service = hyper::service::service_fn(|request| {
                        let answer = answer(&request, &registry);
                        async { Ok::<_, Infallible>(answer) }
                    });
                    let served = hyper::server::conn::http1::Builder::new()
                        .timer(TokioTimer::new())
                        .header_read_timeout(HEAD_TIMEOUT)
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                    if let Err(error) = served {
                        tracing::debug!("admin connection: {error}");
                    }
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept an admin connection: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

fn answer(request: &Request<Incoming>, registry: &Registry) -> Response<Full<Bytes>> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/v1/status") => match serde_json::to_vec(&registry.report()) {
            Ok(body) => (StatusCode::OK, body),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into_bytes()),
        },
        (_, "/v1/status") => (StatusCode::METHOD_NOT_ALLOWED, b"{\"error\":\"only GET\"}".to_vec()),
        _ => (StatusCode::NOT_FOUND, b"{\"error\":\"no such resource; try /v1/status\"}".to_vec()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
    response
}

/// Why a daemon's status could not be had.
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
    #[error("the daemon at {} gave no status: {reason}", path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What happened.
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
pub fn fetch_status(path: &Path) -> Result<StatusReport, AdminError> {
    let failed = |reason: String| AdminError::Answer { path: path.to_path_buf(), reason };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| failed(error.to_string()))?;
    runtime.block_on(async {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| AdminError::Connect { path: path.to_path_buf(), source })?;
        let exchange = async {
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
                .await
                .map_err(|e| e.to_string())?;
            let request = Request::get("/v1/status")
                .header(hyper::header::HOST, "localhost")
                .body(Empty::<Bytes>::new())
                .map_err(|error| error.to_string())?;
            let answer = async {
                let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
                let status = response.status();
                let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
                    .collect()
                    .await
                    .map_err(|error| error.to_string())?
                    .to_bytes();
                if status != StatusCode::OK {
                    return Err(format!("HTTP status {status}"));
                }
                serde_json::from_slice(&body).map_err(|error| error.to_string())
            };
            tokio::select! {
                answer = answer => answer,
                ended = connection => match ended {
                    Ok(()) => Err("the connection was closed".to_string()),
                    Err(error) => Err(error.to_string()),
                },
            }
        };
        match tokio::time::timeout(ANSWER_TIMEOUT, exchange).await {
            Ok(result) => result.map_err(failed),
            Err(_) => Err(failed(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))),
        }
    })
}
