//! What each request of the admin socket does.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response, StatusCode};
use kvoyant_protocol::control::Failure;
use kvoyant_protocol::wire::SequenceId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex, Semaphore, oneshot};

use super::api::{self, Action, For, Found};
use super::caller::Caller;
use super::dashboard;
use super::messages::{
    BringOrder, Done, ErrorBody, Health, ImageReport, SequenceReport, SequencesReport, SuspendOrder,
};
use super::refusal::Refusal;
use super::token::Token;
use super::{LANES_TIMEOUT, REMOTE_LIST_TIMEOUT, WORK_TIMEOUT};
use crate::control::{LABEL_MAX, OrderError, Plane, image_id};
use crate::keeper::{Keeper, merge};
use crate::metrics::Format;
use crate::tiers::store::StoreError;

/// Most bytes of a request's body.
const BODY_MAX: usize = 64 << 10;

/// How long a body may take to come.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// Images that may be brought or erased at a time.
const WORK_MAX: usize = 4;

/// How long lanes count as alive once they were asked and have answered: whoever asks for the health again and again costs each of them a
/// command in this time, and no more.
const ALIVE_FOR: Duration = Duration::from_millis(200);

/// What lanes have said of whether they live.
#[derive(Debug, Default)]
struct Signs {
    /// When they were asked last.
    asked: Option<Instant>,
    /// Lanes that have not been heard since. They stay here when nobody waits any more, so that no second question comes behind the first.
    missing: Vec<oneshot::Receiver<()>>,
}

impl Signs {
    /// Waits until every lane has answered what was asked shortly before this moment, or later.
    async fn wait(&mut self, plane: &Plane, moment: Instant) {
        loop {
            while let Some(answer) = self.missing.last_mut() {
                // A lane that does not answer has ended, and so does the daemon.
                let _ = answer.await;
                self.missing.pop();
            }
            if self.asked.is_some_and(|asked| moment.saturating_duration_since(asked) < ALIVE_FOR) {
                return;
            }
            (self.asked, self.missing) = (Some(Instant::now()), plane.ping());
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Routes {
    pub(super) plane: Arc<Plane>,
    /// One look at the lanes at a time; who waits for it has its answer, too.
    signs: Mutex<Signs>,
    /// One list at a time: it costs lanes a moment, and the remote store more.
    listing: Arc<Semaphore>,
    /// Images that are worked on beside the control thread.
    works: Arc<Semaphore>,
    /// What stands for the daemon's user over TCP.
    token: Option<Token>,
}

/// Whether anybody may ask this over TCP.
fn is_for_machines(method: &str, path: &str) -> bool {
    matches!(api::find(method, path), Found::Route(route, _) if route.whom == For::Machine)
}

impl Routes {
    pub(super) fn new(plane: Arc<Plane>) -> Self {
        let (listing, works) = (Arc::new(Semaphore::new(1)), Arc::new(Semaphore::new(WORK_MAX)));
        Self { plane, signs: Mutex::default(), listing, works, token: None }
    }

    /// The same, over TCP, where whoever sends this token is the daemon's user.
    pub(super) fn with_token(self, token: Option<Token>) -> Self {
        Self { token, ..self }
    }

    /// Whether the allow-lists let a caller in.
    pub(super) fn admits(&self, socket: BorrowedFd<'_>, uid: u32) -> bool {
        self.plane.access().admits(socket, uid)
    }

    /// Does what is asked, or says why not.
    pub(super) async fn answer(&self, request: Request<Incoming>, caller: Caller) -> Response<Full<Bytes>> {
        let refused = |refusal: &Refusal| {
            tracing::debug!("admin request of user {}: {refusal}", caller.uid);
            response(refusal.status(), &ErrorBody { error: refusal.to_string() })
        };
        self.route(request, caller).await.unwrap_or_else(|refusal| refused(&refusal))
    }

    async fn route(
        &self,
        request: Request<Incoming>,
        caller: Caller,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        let caller = caller.with_token(self.token.as_ref().is_some_and(|token| token.is_in(&request)));
        if !caller.admitted {
            return Err(Refusal::NotAllowed(Failure::NotAllowed { uid: caller.uid }));
        }
        let path = request.uri().path().to_owned();
        let stranger = caller.remote && !caller.operates();
        let (route, names) = match api::find(request.method().as_str(), &path) {
            Found::Route(route, names) => (route, names),
            Found::Nothing if stranger => return Err(Refusal::Remote { path }),
            Found::Otherwise(known)
                if stranger && !known.iter().any(|known| is_for_machines(known, &path)) =>
            {
                return Err(Refusal::Remote { path });
            }
            Found::Otherwise(known) => return Err(Refusal::Method { known: known.join(", "), path }),
            Found::Nothing => return Err(Refusal::NoResource { path }),
        };
        if stranger && route.whom != For::Machine {
            return Err(Refusal::Remote { path });
        }
        if route.whom == For::Operator && !caller.operates() {
            return Err(Refusal::Operators { caller: caller.uid });
        }
        match route.action {
            Action::Metrics => self.metrics(&request),
            Action::Health => Ok(response(StatusCode::OK, &self.health().await?)),
            Action::Ready => {
                let health = self.health().await?;
                let status = if health.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                Ok(response(status, &health))
            }
            Action::Dashboard => Ok(dashboard::page()),
            Action::OpenApi => Ok(response(StatusCode::OK, &api::document())),
            Action::Status => Ok(response(StatusCode::OK, &self.plane.registry().report())),
            Action::Sessions => Ok(response(StatusCode::OK, &self.plane.registry().report().sessions)),
            Action::Devices => Ok(response(StatusCode::OK, &self.devices())),
            Action::Tiers => Ok(response(StatusCode::OK, &self.tiers())),
            Action::Lanes => Ok(response(StatusCode::OK, &self.lanes())),
            Action::Methods => Ok(response(StatusCode::OK, &self.methods())),
            Action::Sequences => Ok(response(StatusCode::OK, &self.list(caller).await?)),
            Action::Suspend => {
                Ok(response(StatusCode::OK, &self.suspend(body(request).await?, caller).await?))
            }
            Action::Bring => Ok(response(StatusCode::OK, &self.bring(body(request).await?, caller).await?)),
            Action::Remove => {
                let [uid, name] = names[..] else { return Err(Refusal::NoResource { path }) };
                let uid = uid.parse().map_err(|_| Refusal::User { text: uid.to_owned() })?;
                Ok(response(StatusCode::OK, &self.remove(uid, name, caller).await?))
            }
            Action::Config => Ok(response(StatusCode::OK, &self.config())),
            Action::SetConfig => {
                Ok(response(StatusCode::OK, &self.set_config(body(request).await?, caller).await?))
            }
            Action::Reload => {
                no_body(request).await?;
                Ok(response(StatusCode::OK, &self.reload(caller).await?))
            }
            Action::Log => Ok(response(StatusCode::OK, &self.log())),
            Action::SetLog => {
                Ok(response(StatusCode::OK, &self.set_log(body(request).await?, caller).await?))
            }
            Action::Draining => Ok(response(StatusCode::OK, &self.draining())),
            Action::Drain | Action::Undrain => {
                no_body(request).await?;
                Ok(response(StatusCode::OK, &self.drain(route.action == Action::Drain, caller)))
            }
            Action::Evict => Ok(response(StatusCode::OK, &self.evict(body(request).await?, caller).await?)),
        }
    }

    fn metrics<T>(&self, request: &Request<T>) -> Result<Response<Full<Bytes>>, Refusal> {
        let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok());
        let format = Format::accepted(accept.unwrap_or_default());
        let text = self.plane.registry().snapshot().text(format);
        let text = text.map_err(|error| Refusal::Internal(error.to_string()))?;
        let mut response = Response::new(Full::new(Bytes::from(text)));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
        Ok(response)
    }

    /// Whether lanes answer, and what keeps new sessions out or slows them down.
    async fn health(&self) -> Result<Health, Refusal> {
        let came = Instant::now();
        let alive = async { self.signs.lock().await.wait(&self.plane, came).await };
        let alive = tokio::time::timeout(LANES_TIMEOUT, alive).await;
        alive.map_err(|_| Refusal::Lanes { within: LANES_TIMEOUT })?;
        Ok(Health::of(&self.plane.registry().report()))
    }

    async fn list(&self, caller: Caller) -> Result<SequencesReport, Refusal> {
        let within = LANES_TIMEOUT + REMOTE_LIST_TIMEOUT;
        let turn = tokio::time::timeout(within, Arc::clone(&self.listing).acquire_owned()).await;
        let turn = turn.map_err(|_| Refusal::Lanes { within })?;
        let open = tokio::time::timeout(LANES_TIMEOUT, self.plane.open_sequences()).await;
        let open = open.map_err(|_| Refusal::Lanes { within: LANES_TIMEOUT })?;
        let sequences = open.into_iter().filter_map(|open| {
            let session = self.plane.registry().session(open.session)?;
            caller.may(session.uid).then(|| SequenceReport::new(open, &session))
        });
        let sequences = sequences.collect();
        let Some(keeper) = self.plane.keeper() else {
            let images = Vec::new();
            return Ok(SequencesReport { sequences, images, keeps_images: false, remote_error: None });
        };
        let folder = Arc::clone(&keeper);
        let here = beside(move || folder.list_here()).await?;
        // A list that nobody waits for any more keeps its turn until it has ended.
        let remotely = beside(move || {
            let list = keeper.list_remotely();
            drop(turn);
            list
        });
        let (remotely, remote_error) = match tokio::time::timeout(REMOTE_LIST_TIMEOUT, remotely).await {
            Ok(Ok(list)) => (list, None),
            Ok(Err(error)) => (Vec::new(), Some(error.to_string())),
            Err(_) => {
                let seconds = REMOTE_LIST_TIMEOUT.as_secs();
                (Vec::new(), Some(format!("the remote store gave no list within {seconds} s")))
            }
        };
        let images =
            merge(here, remotely).into_iter().map(|(summary, kept)| ImageReport::new(&summary, kept));
        let visible = |image: &ImageReport| image.uid.map_or(caller.operates(), |uid| caller.may(uid));
        let mut images: Vec<_> = images.filter(visible).collect();
        images.sort_by(|a, b| (a.uid, &a.name).cmp(&(b.uid, &b.name)));
        Ok(SequencesReport { sequences, images, keeps_images: true, remote_error })
    }

    async fn suspend(&self, order: SuspendOrder, caller: Caller) -> Result<Done, Refusal> {
        let SuspendOrder { session, sequence, image, overwrite, label } = order;
        let handle = handle(&sequence).ok_or(Refusal::Handle { text: sequence })?;
        if label.len() > LABEL_MAX {
            return Err(Refusal::Label { bytes: label.len(), max: LABEL_MAX });
        }
        let owner = self.plane.registry().session(session).ok_or(OrderError::NoSession { session })?.uid;
        allow(caller, owner)?;
        let id = image_id(owner, &image).map_err(Refusal::Name)?;
        let keeper = self.keeper()?;
        if !overwrite && beside(move || Ok(keeper.has_here(&id))).await? {
            return Err(Refusal::Exists { image });
        }
        tracing::info!(session, sequence = %handle, image, "user {} suspends a sequence", caller.uid);
        let suspended = self.plane.order_suspension(session, handle, image.clone(), overwrite, label);
        let suspended = tokio::time::timeout(WORK_TIMEOUT, suspended).await;
        suspended.map_err(|_| Refusal::StillAtIt { after: WORK_TIMEOUT })??;
        Ok(Done { image, uid: owner })
    }

    async fn bring(&self, order: BringOrder, caller: Caller) -> Result<ImageReport, Refusal> {
        let BringOrder { image, uid } = order;
        let owner = uid.unwrap_or(caller.own());
        allow(caller, owner)?;
        let id = image_id(owner, &image).map_err(Refusal::Name)?;
        let (summary, kept) = self
            .work(move |keeper| {
                let summary = keeper.bring(&id)?;
                Ok::<_, StoreError>((summary, keeper.where_is(&id)))
            })
            .await??;
        Ok(ImageReport::new(&summary, kept))
    }

    async fn remove(&self, owner: u32, name: &str, caller: Caller) -> Result<Done, Refusal> {
        allow(caller, owner)?;
        let id = image_id(owner, name).map_err(Refusal::Name)?;
        let removed = self.work(move |keeper| {
            let removed = keeper.remove(&id).map_err(|error| match error {
                StoreError::Unreachable { .. } | StoreError::Refused { .. } if !keeper.has_here(&id) => {
                    Refusal::HalfRemoved(error)
                }
                error => error.into(),
            });
            if matches!(removed, Ok(_) | Err(Refusal::HalfRemoved(_))) {
                tracing::info!("user {} has erased the image {id}", caller.uid);
            }
            removed
        });
        removed.await??;
        Ok(Done { image: name.to_owned(), uid: owner })
    }

    fn keeper(&self) -> Result<Arc<Keeper>, Refusal> {
        self.plane.keeper().ok_or(Refusal::NoStore)
    }

    /// Works on images beside the control thread, a few at a time.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Keeper) -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        let keeper = self.keeper()?;
        let turn = Arc::clone(&self.works).try_acquire_owned();
        let turn = turn.map_err(|_| Refusal::Busy { max: WORK_MAX })?;
        let worked = tokio::task::spawn_blocking(move || {
            let done = work(&keeper);
            drop(turn);
            done
        });
        let worked = tokio::time::timeout(WORK_TIMEOUT, worked).await;
        let worked = worked.map_err(|_| Refusal::StillAtIt { after: WORK_TIMEOUT })?;
        worked.map_err(|error| Refusal::Internal(error.to_string()))
    }
}

pub(super) fn allow(caller: Caller, owner: u32) -> Result<(), Refusal> {
    if caller.may(owner) { Ok(()) } else { Err(Refusal::Foreign { caller: caller.uid }) }
}

/// Runs what may block beside the control thread.
async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Refusal> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| Refusal::Internal(error.to_string()))??)
}

/// Slot and generation, with a dot between them.
pub(super) fn handle(text: &str) -> Option<SequenceId> {
    let (slot, generation) = text.split_once('.')?;
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?;
    Some(SequenceId { slot: number(slot)?, generation: number(generation)? })
}

async fn body<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T, Refusal> {
    let body = bytes(request).await?;
    // Else the fields' values in their order would be taken for an object.
    if body.trim_ascii_start().starts_with(b"[") {
        return Err(Refusal::Body("a list was sent where an object is wanted".into()));
    }
    serde_json::from_slice(&body).map_err(|error| Refusal::Body(error.to_string()))
}

/// Nothing, or an object with nothing in it: whoever sends more takes the resource for another one.
async fn no_body(request: Request<Incoming>) -> Result<(), Refusal> {
    let body = bytes(request).await?;
    if body.trim_ascii().is_empty() || body.trim_ascii() == b"{}" {
        return Ok(());
    }
    Err(Refusal::Bodied { bytes: body.len() })
}

async fn bytes(request: Request<Incoming>) -> Result<Bytes, Refusal> {
    let body = Limited::new(request.into_body(), BODY_MAX).collect();
    let body = tokio::time::timeout(BODY_TIMEOUT, body).await;
    let body = body.map_err(|_| Refusal::TooSlow { within: BODY_TIMEOUT })?.map_err(|error| {
        if error.is::<LengthLimitError>() {
            Refusal::TooLong { max: BODY_MAX }
        } else {
            Refusal::Body(error.to_string())
        }
    })?;
    Ok(body.to_bytes())
}

fn response(status: StatusCode, body: &impl Serialize) -> Response<Full<Bytes>> {
    let (status, body) = match serde_json::to_vec(body) {
        Ok(body) => (status, body),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("{{\"error\":\"{error:?}\"}}").into_bytes())
        }
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_two_numbers_with_a_dot_between_them() {
        assert_eq!(handle("3.12"), Some(SequenceId { slot: 3, generation: 12 }));
        for bad in ["", "3", "3.", ".1", "+3.1", "3.1.2", "a.b", "4294967296.0", "-1.0", " 3.1"] {
            assert_eq!(handle(bad), None, "{bad}");
        }
    }
}
