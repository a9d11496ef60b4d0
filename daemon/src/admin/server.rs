//! Connections of the admin socket.

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};

use super::caller::Caller;
use super::routes::Routes;
use crate::control::Plane;

/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves the admin socket until the task is dropped.
pub async fn serve(listener: UnixListener, plane: Arc<Plane>) {
    let routes = Rc::new(Routes::new(plane));
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::task::spawn_local(connection(stream, Rc::clone(&routes)))),
            Err(error) => {
                tracing::warn!("cannot accept an admin connection: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, routes: Rc<Routes>) {
    // Who connected, and not who may have got the socket since.
    let uid = stream.peer_cred().map_or(u32::MAX, |peer| peer.uid());
    let caller = Caller { uid, daemon: nix::unistd::geteuid().as_raw() };
    let service = hyper::service::service_fn(|request| {
        let routes = Rc::clone(&routes);
        async move { Ok::<_, Infallible>(routes.answer(request, caller).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!("admin connection: {error}");
    }
}
