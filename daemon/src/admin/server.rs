//! Connections of the admin socket.

use std::convert::Infallible;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use kvoyant_protocol::packet;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::caller::Caller;
use super::patient::Patient;
use super::routes::Routes;
use super::token::Token;
use crate::control::{Door, Plane};

/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections over TCP at a time, and how long one may last.
const TCP_MAX: usize = 16;
const TCP_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a client may read nothing of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections at a time: of everybody, and of one user, who could else keep all others out.
const CONNECTIONS_MAX: u32 = 128;
const CONNECTIONS_OF_A_USER: u32 = 32;

/// What a connection too many is told.
const TOO_MANY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n\
    {\"error\":\"this user has as many connections as the admin socket keeps; close some, and try again\"}";

/// Serves the admin socket until the task is dropped.
pub async fn serve(listener: UnixListener, plane: Arc<Plane>) {
    let routes = Rc::new(Routes::new(plane));
    let door = Door::new(CONNECTIONS_MAX, CONNECTIONS_OF_A_USER);
    // Those who are accepted have it from the listener.
    if let Err(error) = packet::refuse_descriptors(listener.as_fd()) {
        tracing::warn!("the admin socket cannot be kept free of descriptors: {error}");
    }
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let uid = stream.peer_cred().map_or(u32::MAX, |peer| peer.uid());
                let Some(inside) = door.enter(uid) else {
                    // What does not go at once need not go.
                    let _ = stream.try_write(TOO_MANY);
                    continue;
                };
                let routes = Rc::clone(&routes);
                tokio::task::spawn_local(async move {
                    connection(stream, routes).await;
                    drop(inside);
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept an admin connection: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Serves what whoever is on this machine may read, until the task is dropped: for monitoring that knows no Unix sockets.
pub(crate) async fn serve_tcp(listener: TcpListener, plane: Arc<Plane>, token: Option<Token>) {
    let routes = Rc::new(Routes::new(plane).with_token(token));
    let places = Arc::new(Semaphore::new(TCP_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let routes = Rc::clone(&routes);
                tokio::task::spawn_local(async move {
                    // Whoever holds a connection open holds up others.
                    let _ =
                        tokio::time::timeout(TCP_TIMEOUT, exchange(stream, Caller::remote(), routes)).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a connection of a monitor: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, routes: Rc<Routes>) {
    // Who connected, and not who may have got the socket since.
    let uid = stream.peer_cred().map_or(u32::MAX, |peer| peer.uid());
    let admitted = routes.admits(stream.as_fd(), uid);
    let daemon = nix::unistd::geteuid().as_raw();
    let caller = Caller { uid, daemon, remote: false, admitted, token: false };
    exchange(stream, caller, routes).await;
}

async fn exchange(stream: impl AsyncRead + AsyncWrite + Unpin, caller: Caller, routes: Rc<Routes>) {
    let service = hyper::service::service_fn(|request| {
        let routes = Rc::clone(&routes);
        async move { Ok::<_, Infallible>(routes.answer(request, caller).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(Patient::new(stream, READ_TIMEOUT)), service)
        .await;
    if let Err(error) = served {
        tracing::debug!("admin connection: {error}");
    }
}
