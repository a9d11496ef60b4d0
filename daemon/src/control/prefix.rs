//! Publishing and attaching: rows of a sequence's first tokens are copied to where other sequences can begin with them.

use std::os::fd::OwnedFd;

use kvoyant_protocol::control::{Failure, Mode, SelectedBy, ToClient, ToDaemon};
use kvoyant_protocol::memory::{Memfd, Seals};
use kvoyant_protocol::wire::SequenceId;

use super::images::{Stop, image, open, told};
use super::workers::blocking;
use super::{Plane, Session, Socket};
use crate::lane::images::{Attach, ImageOutcome, ImageRequest, Lent};
use crate::prefixes::{Draft, PrefixFailure, TOKENS_MAX};
use crate::tiers::pool::NOBODY;
use crate::tiers::prefix::{PrefixKey, Scope};

fn failed(error: &PrefixFailure) -> Failure {
    Failure::NotReady(error.to_string())
}

/// Tokens that a client has written into a memfd. It is read out, and never mapped: whoever has it can still punch holes into it.
async fn tokens_of(uid: u32, count: u32, fds: Vec<OwnedFd>) -> Result<Vec<u32>, Stop> {
    let bad = |reason: String| Failure::BadModel(format!("tokens: {reason}"));
    if count > TOKENS_MAX {
        return Err(bad(format!("{count} are more than {TOKENS_MAX}")).into());
    }
    if count == 0 {
        return Ok(Vec::new());
    }
    let [fd] =
        <[OwnedFd; 1]>::try_from(fds).map_err(|fds| bad(format!("they came in {} memfds", fds.len())))?;
    blocking(uid, move || {
        let bytes = Memfd::from_peer(fd, count as usize * 4, Seals::fixed_size())
            .and_then(|file| file.read_out())
            .map_err(|error| bad(error.to_string()))?;
        Ok(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
    })
    .await
}

fn key_of(session: &Session) -> Result<PrefixKey, Failure> {
    let registered = session.registered.get();
    let registered =
        registered.ok_or_else(|| Failure::BadModel("a model must be registered first".into()))?;
    Ok(PrefixKey { model: registered.key.clone(), rope: registered.rope.clone() })
}

pub(super) struct Publish {
    pub(super) sequence: SequenceId,
    pub(super) tokens: u32,
    pub(super) shared: bool,
    pub(super) fds: Vec<OwnedFd>,
}

/// Publishes the full pages of a sequence's first tokens.
pub(super) async fn publish(plane: &Plane, session: &Session, asked: Publish) -> Result<ToClient, Stop> {
    if plane.device.mode() == Mode::Device {
        // Its copies come from extents that its driver knows.
        let device = plane.device.name();
        return Err(Failure::Device(format!("{device} does not serve published prefixes yet")).into());
    }
    let sequence = asked.sequence;
    let published = copy(plane, session, asked).await;
    let released = image(plane, session, ImageRequest::Release(sequence)).await;
    match (published, released) {
        (Ok(message), Ok(_)) => Ok(message),
        (Err(stop), _) | (_, Err(stop)) => Err(stop),
    }
}

async fn copy(plane: &Plane, session: &Session, asked: Publish) -> Result<ToClient, Stop> {
    let Publish { sequence, tokens, shared, fds } = asked;
    let key = key_of(session)?;
    let uid = session.status.uid;
    let scope = if shared { Scope::Shared } else { Scope::Uid(uid) };
    if shared && !plane.may_publish_for_all(uid) {
        let reason = format!(
            "user {uid} may not publish for every user: rows are what their publisher says, so the daemon's `publishers` lists \
             whom all others trust; publish for your own sessions"
        );
        return Err(Failure::Device(reason).into());
    }
    if !shared && NOBODY.contains(&uid) {
        return Err(Failure::Device(format!("users shown under one id ({uid}) share nothing")).into());
    }
    let mut tokens = tokens_of(uid, tokens, fds).await?;
    let ImageOutcome::Portrait(portrait) =
        image(plane, session, ImageRequest::Describe { sequence, digests: false }).await?
    else {
        return Err(Failure::Internal("no portrait came".into()).into());
    };
    // Rows that a method's pool has dropped cannot be had again.
    let all: usize = portrait.pages.counts().iter().map(|count| *count as usize).sum();
    let gaps = portrait.pages.present() != all;
    if gaps {
        let method = portrait.method;
        let reason =
            format!("{method} has dropped rows of it, and others would miss them: publish before it decodes");
        return Err(Failure::BadMethod(reason).into());
    }
    let have = portrait.lens.iter().copied().min().unwrap_or(0) as usize;
    tokens.truncate(have);
    let rows = key.model.page_rows as usize;
    let prefixes = plane.prefixes();
    let draft = {
        let (prefixes, key) = (prefixes.clone(), key.clone());
        blocking(uid, move || prefixes.draft(&key, scope, &tokens).map_err(|error| failed(&error))).await?
    };
    let mut draft = draft;
    let page_bytes = key.model.page_bytes().unwrap_or(0);
    for layer in 0..key.model.layers as usize {
        if draft.known() == draft.blocks() {
            break;
        }
        let pages = draft.known()..draft.blocks();
        let request = ImageRequest::Lend { sequence, layers: layer..layer + 1, pages };
        let ImageOutcome::Lent(lent) = image(plane, session, request).await? else { continue };
        draft = blocking(uid, move || copy_pages(draft, &lent, page_bytes)).await?;
    }
    let (blocks, known) =
        blocking(uid, move || prefixes.publish(draft, uid).map_err(|error| failed(&error))).await?;
    Ok(ToClient::Published { tokens: (blocks * rows) as u32, known: (known * rows) as u32 })
}

fn copy_pages(draft: Draft, lent: &[Lent], page_bytes: usize) -> Result<Draft, Failure> {
    let mut bytes = vec![0; page_bytes];
    for from in lent {
        let Some(to) = draft.page(from.page, from.head) else {
            return Err(Failure::Internal(format!("page {} of head {} has no place", from.page, from.head)));
        };
        from.memory.read(from.offset, &mut bytes)?;
        to.write(&bytes)?;
    }
    Ok(draft)
}

pub(super) struct ToAttach {
    pub(super) method: u16,
    pub(super) by: SelectedBy,
    pub(super) tokens: u32,
    pub(super) fds: Vec<OwnedFd>,
}

/// Opens a sequence that begins with the longest published prefix; an empty one if there is none.
pub(super) async fn attach(
    plane: &Plane,
    socket: &Socket,
    session: &Session,
    asked: ToAttach,
) -> Result<ToClient, Stop> {
    let ToAttach { method, by, tokens, fds } = asked;
    let key = key_of(session)?;
    let uid = session.status.uid;
    let tokens = tokens_of(uid, tokens, fds).await?;
    if plane.device.mode() == Mode::Device {
        let (sequence, table, room) = open(plane, socket, session, method, by).await?;
        return Ok(ToClient::Resumed { sequence, table, room, tokens: 0, method });
    }
    let prefixes = plane.prefixes();
    let found =
        blocking(uid, move || prefixes.attach(&key, uid, &tokens).map_err(|error| failed(&error))).await;
    let prefix = match found {
        Ok(prefix) => prefix,
        // Nothing is lost but time.
        Err(Stop::Failed(failure)) => {
            tracing::warn!(session = session.status.id, "nothing is attached to: {failure}");
            None
        }
        Err(stop) => return Err(stop),
    };
    let (sequence, table, room) = open(plane, socket, session, method, by).await?;
    let Some(prefix) = prefix else {
        return Ok(ToClient::Resumed { sequence, table, room, tokens: 0, method });
    };
    let result = hold(plane, socket, session, sequence, prefix).await;
    match result {
        Ok((table, room, tokens)) => Ok(ToClient::Resumed { sequence, table, room, tokens, method }),
        Err(stop) => {
            let _ = told(plane, socket, session, ToDaemon::Close { sequences: vec![sequence] }).await;
            Err(stop)
        }
    }
}

async fn hold(
    plane: &Plane,
    socket: &Socket,
    session: &Session,
    sequence: SequenceId,
    prefix: std::sync::Arc<crate::prefixes::Attachment>,
) -> Result<(kvoyant_protocol::control::TableRef, u32, u32), Stop> {
    let rows = session.registered.get().map_or(0, |registered| registered.key.page_rows);
    let tokens = prefix.blocks().len() as u32 * rows;
    image(plane, session, ImageRequest::Attach(Box::new(Attach { sequence, prefix }))).await?;
    // No room is added: it only tells where the table is now, and of the memory.
    match told(plane, socket, session, ToDaemon::Reserve { sequences: vec![(sequence, tokens)] }).await? {
        ToClient::Reserved { tables } => match tables.first() {
            Some((table, room)) => Ok((*table, *room, tokens)),
            None => Err(Failure::Internal("no room came".into()).into()),
        },
        ToClient::Failed(failure) => Err(failure.into()),
        other => Err(Failure::Internal(format!("{other:?} came instead of room")).into()),
    }
}
