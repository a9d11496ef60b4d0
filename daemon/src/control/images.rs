//! Suspending and resuming: a sequence goes to an image, layer by layer, and comes back from it, a few pages of each head at a time.
//!
//! The lane lends the pages' places; files are read and written beside the control thread. A sequence that is suspended is closed once
//! its image is kept, and not before; one that cannot be resumed leaves nothing open.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use kvoyant_methods::MethodSpec;
use kvoyant_protocol::control::{Failure, SelectedBy, TableRef, ToClient, ToDaemon};
use kvoyant_protocol::wire::SequenceId;

use super::workers::blocking;
use super::{Ended, Plane, Session, Socket, ask, ask_lane};
use crate::lane::images::{Adopt, DigestImage, Fill, ImageOutcome, ImageRequest, Lent, Portrait};
use crate::lane::{Asked, Outcome};
use crate::tiers::pool::NOBODY;
use crate::tiers::store::{ImageId, ImageKind, ImageReader, ImageWriter, Manifest, PageTable, StoreError};

/// Bytes of pages that are filled at a time.
const FILL_BYTES: usize = 8 << 20;

/// Most bytes of a label.
pub(crate) const LABEL_MAX: usize = 1024;

const OBSERVATION: &str = "observation";
const MARKS: &str = "marks";
const DIGESTS: &str = "digests";

/// How an image of a user's is called in the store: users' names do not meet.
pub(crate) fn image_id(uid: u32, name: &str) -> Result<ImageId, Failure> {
    if NOBODY.contains(&uid) {
        return Err(Failure::Image {
            image: name.into(),
            reason: format!(
                "users that the kernel shows under one id ({uid}) keep no images: nobody could tell them apart"
            ),
        });
    }
    let id = format!("u{uid}.{name}");
    let bad =
        |error: &dyn std::fmt::Display| Failure::Image { image: name.into(), reason: error.to_string() };
    // The prefix makes names that begin with a dot look right.
    if name.is_empty() || name.starts_with('.') {
        return Err(bad(
            &"a name has letters, digits, dots, dashes and underscores, and does not begin with a dot",
        ));
    }
    id.parse().map_err(|error: crate::tiers::store::IdError| bad(&error))
}

fn failed(image: &str) -> impl Fn(StoreError) -> Failure + Send + use<> {
    let image = image.to_owned();
    move |error| Failure::Image { image: image.clone(), reason: error.to_string() }
}

/// Asks the lane for something that an image needs.
pub(super) async fn image(
    plane: &Plane,
    session: &Session,
    request: ImageRequest,
) -> Result<ImageOutcome, Stop> {
    match ask_lane(plane, session, Asked::Image(request)).await? {
        Outcome::Image(ImageOutcome::Failed(failure)) => Err(Stop::Failed(failure)),
        Outcome::Image(outcome) => Ok(outcome),
        other => Err(Stop::Failed(Failure::Internal(format!("{other:?} came instead of an image's part")))),
    }
}

/// Why something was not done to its end.
#[derive(Debug)]
pub(super) enum Stop {
    /// The session goes on.
    Failed(Failure),
    /// It does not.
    Ended(Ended),
}

impl From<Ended> for Stop {
    fn from(ended: Ended) -> Self {
        Self::Ended(ended)
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Does it, or says why not.
pub(super) fn answer(session: &Session, result: Result<ToClient, Stop>) -> Result<ToClient, Ended> {
    match result {
        Ok(message) => Ok(message),
        Err(Stop::Failed(failure)) => {
            session.account.note(&failure);
            Ok(ToClient::Failed(failure))
        }
        Err(Stop::Ended(ended)) => Err(ended),
    }
}

#[derive(Debug)]
pub(super) struct Suspend {
    pub(super) sequence: SequenceId,
    pub(super) image: String,
    pub(super) overwrite: bool,
    pub(super) label: String,
}

/// Writes a sequence to an image and closes it.
pub(super) async fn suspend(
    plane: &Plane,
    socket: &Socket,
    session: &Session,
    asked: Suspend,
) -> Result<ToClient, Stop> {
    let sequence = asked.sequence;
    let written = write(plane, session, asked).await;
    if let Err(Stop::Failed(_)) = written {
        // It goes on as if nothing had been.
        let _ = image(plane, session, ImageRequest::Release(sequence)).await;
    }
    written?;
    told(plane, socket, session, ToDaemon::Close { sequences: vec![sequence] }).await
}

/// Writes a sequence to an image. It stays where it is, and has to be released or closed.
pub(super) async fn write(plane: &Plane, session: &Session, asked: Suspend) -> Result<(), Stop> {
    let Suspend { sequence, image: name, overwrite, label } = asked;
    if label.len() > LABEL_MAX {
        let reason = format!("the label has {} bytes and may have {LABEL_MAX}", label.len());
        return Err(Failure::Image { image: name, reason }.into());
    }
    let keeper = plane.keeper().ok_or_else(no_store)?;
    let id = image_id(session.status.uid, &name)?;
    let fail = failed(&name);
    let ImageOutcome::Portrait(portrait) =
        image(plane, session, ImageRequest::Describe { sequence, digests: true }).await?
    else {
        return Err(Stop::Failed(Failure::Internal("no portrait came".into())));
    };
    let uid = session.status.uid;
    let mut writer = {
        let (keeper, id, fail) = (keeper.clone(), id.clone(), failed(&name));
        blocking(uid, move || keeper.create(&id, overwrite).map(Aside::new).map_err(fail)).await?
    };
    for layer in 0..portrait.model.layers as usize {
        let request = ImageRequest::Lend { sequence, layers: layer..layer + 1, pages: 0..usize::MAX };
        let ImageOutcome::Lent(mut pages) = image(plane, session, request).await? else { continue };
        // Room that was reserved holds nothing yet.
        let counts = portrait.pages.counts();
        pages.retain(|lent| counts.get(lent.head).is_some_and(|count| lent.page < *count as usize));
        let (fail, page_bytes) = (failed(&name), portrait.model.page_bytes().unwrap_or(0));
        writer = blocking(uid, move || write_pages(writer, &pages, page_bytes, &fail)).await?;
    }
    // Once it is there it is copied to the remote store, whatever has become of its client meanwhile.
    blocking(uid, move || {
        commit(writer.take()?, *portrait, uid, label).map_err(fail)?;
        keeper.kept(id, overwrite);
        Ok(())
    })
    .await
}

/// An image that is being written. One that is given up is erased, which takes as long as the disk does: not where it is dropped, which may
/// be on the control thread.
struct Aside(Option<Box<dyn ImageWriter>>);

impl Aside {
    fn new(writer: Box<dyn ImageWriter>) -> Self {
        Self(Some(writer))
    }

    fn take(mut self) -> Result<Box<dyn ImageWriter>, Failure> {
        self.0.take().ok_or_else(|| Failure::Internal("an image was written twice".into()))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let Some(writer) = self.0.take() else { return };
        // One at a time: clients that begin and go make no more work than one disk has.
        static TURN: Mutex<()> = Mutex::new(());
        let erase = move || {
            let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
            drop(writer);
        };
        // Where there is no thread the work is dropped with its writer, here.
        if let Err(error) = crate::threads::start("eraser", erase) {
            tracing::warn!("what was written of an image was erased by the control thread: {error}");
        }
    }
}

fn write_pages(
    mut writer: Aside,
    pages: &[Lent],
    page_bytes: usize,
    fail: &impl Fn(StoreError) -> Failure,
) -> Result<Aside, Failure> {
    let mut bytes = vec![0; page_bytes];
    for page in pages {
        page.memory.read(page.offset, &mut bytes)?;
        if let Some(writer) = &mut writer.0 {
            writer.page(&bytes).map_err(fail)?;
        }
    }
    Ok(writer)
}

fn commit(
    mut writer: Box<dyn ImageWriter>,
    portrait: Portrait,
    uid: u32,
    label: String,
) -> Result<(), StoreError> {
    if let Some(observation) = &portrait.observation {
        writer.blob(OBSERVATION, &encode(observation))?;
    }
    if let Some(marks) = &portrait.marks {
        writer.blob(MARKS, marks)?;
    }
    writer.blob(DIGESTS, &encode(&portrait.digests))?;
    let manifest = Manifest {
        kind: ImageKind::Sequence,
        model: portrait.model,
        uid,
        created_unix: now_unix(),
        method: portrait.method,
        seed: portrait.seed,
        tokens: portrait.lens.iter().copied().min().unwrap_or(0),
        lens: portrait.lens,
        pages: portrait.pages,
        blobs: Vec::new(),
        label,
    };
    writer.commit(manifest).map(drop)
}

/// Plain data as bytes.
fn encode<T: serde::Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).unwrap_or_else(|error| unreachable!("plain data always serialises: {error}"))
}

pub(crate) fn now_unix() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

pub(super) fn no_store() -> Failure {
    Failure::Image {
        image: String::new(),
        reason: "this daemon keeps no images; start it with --store and a folder".into(),
    }
}

pub(super) struct Resume {
    pub(super) image: String,
    pub(super) method: Option<u16>,
    pub(super) by: SelectedBy,
}

/// Opens a sequence as an image has it.
pub(super) async fn resume(
    plane: &Plane,
    socket: &Socket,
    session: &Session,
    asked: Resume,
) -> Result<ToClient, Stop> {
    let keeper = plane.keeper().ok_or_else(no_store)?;
    let uid = session.status.uid;
    let id = image_id(uid, &asked.image)?;
    let Some(registered) = session.registered.get() else {
        return Err(Failure::BadModel("a model must be registered first".into()).into());
    };
    let name = asked.image.clone();
    let (reader, parts) = {
        let (key, fail) = (registered.key.clone(), failed(&name));
        blocking(uid, move || {
            let right = |reader: &dyn ImageReader| {
                let manifest = reader.manifest();
                if manifest.uid != uid {
                    return Err(StoreError::NotFound { store: "this daemon".into(), id: id.clone() });
                }
                manifest.expect(&id, ImageKind::Sequence, &key)
            };
            // Nothing is brought from afar that is not wanted then.
            keeper.open(&id).and_then(|reader| right(&*reader)).map_err(&fail)?;
            let mut reader = keeper.open_to_resume(&id).map_err(&fail)?;
            right(&*reader).map_err(&fail)?;
            let parts = Parts::read(&mut *reader).map_err(&fail)?;
            Ok((reader, parts))
        })
        .await?
    };
    let manifest = reader.manifest().clone();
    let method = match asked.method {
        Some(method) => method,
        None => registered.method(&manifest.method).ok_or_else(|| Failure::Image {
            image: name.clone(),
            reason: format!(
                "it was made by {}, which is none of the session's methods: name one of those, or register it",
                manifest.method
            ),
        })?,
    };
    let (sequence, _, _) = open(plane, socket, session, method, asked.by).await?;
    match fill(plane, socket, session, sequence, reader, parts, &name).await {
        Ok((table, room)) => Ok(ToClient::Resumed { sequence, table, room, tokens: manifest.tokens, method }),
        Err(stop) => {
            let _ = told(plane, socket, session, ToDaemon::Close { sequences: vec![sequence] }).await;
            Err(stop)
        }
    }
}

/// What an image has beside its pages.
struct Parts {
    observation: Option<(Vec<f32>, Vec<bool>)>,
    marks: Option<Vec<u8>>,
    digests: Vec<DigestImage>,
}

impl Parts {
    fn read(reader: &mut dyn ImageReader) -> Result<Self, StoreError> {
        let has = |reader: &dyn ImageReader, name: &str| {
            reader.manifest().blobs.iter().any(|entry| entry.name == name)
        };
        let mut blob = |name: &str| -> Result<Option<Vec<u8>>, StoreError> {
            if has(reader, name) { reader.blob(name).map(Some) } else { Ok(None) }
        };
        // What does not read as what it is to be is as good as not there: it is made anew from rows.
        let observation = blob(OBSERVATION)?.and_then(|bytes| postcard::from_bytes(&bytes).ok());
        let digests = blob(DIGESTS)?.and_then(|bytes| postcard::from_bytes(&bytes).ok()).unwrap_or_default();
        Ok(Self { observation, marks: blob(MARKS)?, digests })
    }
}

/// Opens an empty sequence.
pub(super) async fn open(
    plane: &Plane,
    socket: &Socket,
    session: &Session,
    method: u16,
    by: SelectedBy,
) -> Result<(SequenceId, TableRef, u32), Stop> {
    match told(plane, socket, session, ToDaemon::Open { method, tokens: 0, by }).await? {
        ToClient::Opened { sequence, table, room } => Ok((sequence, table, room)),
        ToClient::Failed(failure) => Err(failure.into()),
        other => Err(Failure::Internal(format!("{other:?} came instead of a sequence")).into()),
    }
}

/// Has the lane do what a message asks, and tells the client of the memory that came of it.
pub(super) async fn told(
    plane: &Plane,
    socket: &Socket,
    session: &Session,
    message: ToDaemon,
) -> Result<ToClient, Stop> {
    let reply = ask(plane, socket, session, message).await?;
    for announcement in &reply.announcements {
        socket.send(&announcement.message, &announcement.fds).await?;
    }
    Ok(reply.message)
}

/// Pages of an image by head and index: where each lies among those that are present.
struct Order {
    /// Index of each head's first page in `places`.
    first: Vec<usize>,
    /// For each page of the table, its number among those that are present.
    places: Vec<Option<usize>>,
}

impl Order {
    fn of(table: &PageTable) -> Self {
        let mut first = Vec::with_capacity(table.counts().len());
        let mut total = 0;
        for count in table.counts() {
            first.push(total);
            total += *count as usize;
        }
        let mut places = vec![None; total];
        for (number, (head, page)) in table.iter().enumerate() {
            places[first[head] + page] = Some(number);
        }
        Self { first, places }
    }

    fn count(&self, head: usize) -> usize {
        self.first.get(head + 1).copied().unwrap_or(self.places.len()) - self.first[head]
    }

    fn place(&self, head: usize, page: usize) -> Option<usize> {
        if page < self.count(head) { self.places[self.first[head] + page] } else { None }
    }
}

async fn fill(
    plane: &Plane,
    socket: &Socket,
    session: &Session,
    sequence: SequenceId,
    mut reader: Box<dyn ImageReader>,
    parts: Parts,
    name: &str,
) -> Result<(TableRef, u32), Stop> {
    let manifest = reader.manifest().clone();
    let (rows, page_bytes) = (manifest.model.page_rows as usize, manifest.page_bytes());
    let heads = manifest.lens.len() * manifest.model.kv_heads as usize;
    let longest = manifest.lens.iter().copied().max().unwrap_or(0);
    let order = Arc::new(Order::of(&manifest.pages));
    let Parts { observation, marks, digests } = parts;
    let lens = manifest.lens.clone();
    let adopt = Adopt { sequence, seed: manifest.seed, lens, observation, digests };
    image(plane, session, ImageRequest::Adopt(Box::new(adopt))).await?;
    let pages = (longest as usize).div_ceil(rows);
    let at_once = (FILL_BYTES / (heads * page_bytes).max(1)).max(1);
    let mut last = None;
    for first in (0..pages.max(1)).step_by(at_once) {
        let end = (first + at_once).min(pages);
        let tokens = ((end * rows) as u32).min(longest);
        match told(plane, socket, session, ToDaemon::Reserve { sequences: vec![(sequence, tokens)] }).await? {
            ToClient::Reserved { tables } => last = tables.first().copied(),
            ToClient::Failed(failure) => return Err(failure.into()),
            other => return Err(Failure::Internal(format!("{other:?} came instead of room")).into()),
        }
        let request = ImageRequest::Lend { sequence, layers: 0..manifest.lens.len(), pages: first..end };
        let ImageOutcome::Lent(lent) = image(plane, session, request).await? else { continue };
        let (order_of, fail) = (Arc::clone(&order), failed(name));
        let (back, absent) = blocking(session.status.uid, move || {
            let absent = read_pages(&mut *reader, &lent, &order_of, page_bytes, &fail)?;
            Ok((reader, absent))
        })
        .await?;
        reader = back;
        let from = (first * rows).min(longest as usize);
        let marks = marks.as_ref().and_then(|marks| marks.get(from..(tokens as usize).min(marks.len())));
        let fill = Fill {
            sequence,
            lens: manifest.lens.iter().map(|len| (*len).min(tokens)).collect(),
            absent,
            marks: marks.filter(|marks| !marks.is_empty()).map(|marks| (from, marks.to_vec())),
        };
        image(plane, session, ImageRequest::Fill(Box::new(fill))).await?;
    }
    image(plane, session, ImageRequest::Release(sequence)).await?;
    last.ok_or_else(|| Failure::Internal("no room came".into()).into())
}

/// Fills pages; which of them the image does not have.
fn read_pages(
    reader: &mut dyn ImageReader,
    lent: &[Lent],
    order: &Order,
    page_bytes: usize,
    fail: &impl Fn(StoreError) -> Failure,
) -> Result<Vec<(usize, usize)>, Failure> {
    let mut bytes = vec![0; page_bytes];
    let mut absent = Vec::new();
    for page in lent {
        match order.place(page.head, page.page) {
            Some(number) => {
                reader.page(number, &mut bytes).map_err(fail)?;
                page.memory.write(page.offset, &bytes)?;
            }
            // Of a layer that has fewer rows than others there is nothing to be absent.
            None if page.page >= order.count(page.head) => {}
            None => absent.push((page.head, page.page)),
        }
    }
    Ok(absent)
}

/// What a session has registered, as images know it.
#[derive(Debug)]
pub(super) struct Registered {
    pub(super) key: crate::tiers::store::ModelKey,
    /// How its keys are rotated.
    pub(super) rope: String,
    /// Specifications of its methods, by index.
    pub(super) methods: Vec<String>,
}

impl Registered {
    fn method(&self, spec: &str) -> Option<u16> {
        let same = |known: &String| {
            let canonical = |text: &str| text.parse::<MethodSpec>().map(|spec| spec.to_string());
            known == spec || canonical(known).ok().is_some_and(|known| canonical(spec).ok() == Some(known))
        };
        self.methods.iter().position(same).map(|index| index as u16)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread::ThreadId;

    use super::*;
    use crate::tiers::store::ImageSummary;

    /// Erasing what it has written takes until somebody says so; then it says where that was.
    struct Slow(Receiver<()>, Sender<ThreadId>);

    impl Drop for Slow {
        fn drop(&mut self) {
            let _ = self.0.recv();
            let _ = self.1.send(std::thread::current().id());
        }
    }

    impl ImageWriter for Slow {
        fn page(&mut self, _: &[u8]) -> Result<(), StoreError> {
            unreachable!("nothing is written")
        }

        fn blob(&mut self, _: &str, _: &[u8]) -> Result<(), StoreError> {
            unreachable!("nothing is written")
        }

        fn commit(self: Box<Self>, _: Manifest) -> Result<ImageSummary, StoreError> {
            unreachable!("it is given up")
        }
    }

    #[test]
    fn who_gives_up_an_image_does_not_wait_until_it_is_erased() {
        let ((go, gate), (tell, told)) = (channel(), channel());
        drop(Aside::new(Box::new(Slow(gate, tell))));
        // Here it would still wait.
        go.send(()).unwrap();
        assert_ne!(told.recv().unwrap(), std::thread::current().id());
    }
}
