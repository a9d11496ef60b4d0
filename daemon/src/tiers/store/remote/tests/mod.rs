mod objects;
mod redis;

use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};

use super::bucket::{Answer, Fault};
use super::*;
use crate::tiers::store::Unanswered;
use crate::tiers::store::conformance::{Raw, id, read, write};

/// Small chunks, so that a small image has several, and short times.
fn options() -> RemoteOptions {
    RemoteOptions {
        connect: Duration::from_millis(500),
        operation: Duration::from_secs(5),
        pause: Duration::from_millis(5),
        chunk_bytes: 300,
        ..RemoteOptions::default()
    }
}

/// Times for servers that never answer.
fn impatient() -> RemoteOptions {
    RemoteOptions { operation: Duration::from_millis(200), rest: Duration::from_millis(400), ..options() }
}

impl Raw for RemoteImages {
    fn parts(&self) -> Vec<String> {
        let mut parts = self.shared.line.list("").unwrap();
        parts.sort_unstable();
        parts
    }

    fn get(&self, part: &str) -> Vec<u8> {
        match self.shared.line.get(part, 1 << 20).unwrap() {
            Found::Bytes(bytes) => bytes,
            found => panic!("{part}: {found:?}"),
        }
    }

    fn put(&self, part: &str, bytes: &[u8]) {
        self.shared.line.put(part, bytes).unwrap();
    }

    fn delete(&self, part: &str) {
        self.shared.line.delete(&[part.to_owned()]).unwrap();
    }
}

/// What an upload that died has left, begun so many seconds ago.
fn leave(store: &RemoteImages, name: &str, seconds_ago: u64) {
    let upload = new_upload(unix_now() - seconds_ago);
    store.put(&upload::pages_key(&id(name), &upload, 0), &[7; 64]);
    store.put(&upload::blob_key(&id(name), &upload, 0, 0), &[7; 64]);
}

/// What every remote store must do about uploads that died.
fn leftovers_are_swept(store: &RemoteImages) {
    write(store, "a", 1, false).unwrap();
    let whole = store.parts();
    // Beside an image, and where there is none.
    leave(store, "a", 8000);
    leave(store, "b", 8000);
    leave(store, "b", 100);
    assert_eq!(store.list().unwrap().len(), 1, "half an upload is seen");
    assert!(matches!(store.open(&id("b")).err(), Some(StoreError::NotFound { .. })));
    assert_eq!(store.sweep(Duration::from_secs(9000)).unwrap(), 0);
    // A young one may still be committed, whatever was asked for.
    assert_eq!(store.sweep(Duration::ZERO).unwrap(), 2);
    assert_eq!(store.parts().len(), whole.len() + 2);
    assert_eq!(read(store, "a").unwrap(), 1);
    // Where a manifest is damaged, any upload may be the image's.
    leave(store, "a", 8000);
    let (manifest, mut bytes) = ("a/manifest", store.get("a/manifest"));
    bytes[40] ^= 1;
    store.put(manifest, &bytes);
    assert_eq!(store.sweep(Duration::ZERO).unwrap(), 0);
    store.remove(&id("a")).unwrap();
    assert!(store.remove(&id("b")).is_err(), "there was no image");
    assert_eq!(store.parts(), [""; 0]);
}

/// A bucket in which nothing works but what a test wants.
#[derive(Debug)]
struct Broken {
    /// Operations that were asked for.
    asked: Arc<AtomicU32>,
    /// Operations that succeed, by number.
    succeeds: fn(u32) -> bool,
}

impl Broken {
    fn answer<T: Send + 'static>(&self, answer: T) -> Answer<'_, T> {
        let good = (self.succeeds)(self.asked.fetch_add(1, Ordering::Relaxed) + 1);
        Box::pin(async move { if good { Ok(answer) } else { Err(Fault::Broken("the wire is cut".into())) } })
    }
}

impl Bucket for Broken {
    fn put<'a>(&'a self, _: &'a str, _: &'a [u8]) -> Answer<'a, ()> {
        self.answer(())
    }

    fn put_new<'a>(&'a self, _: &'a str, _: &'a [u8]) -> Answer<'a, bool> {
        self.answer(true)
    }

    fn get<'a>(&'a self, _: &'a str, _: usize) -> Answer<'a, Found> {
        self.answer(Found::Missing)
    }

    fn delete<'a>(&'a self, _: &'a [String]) -> Answer<'a, ()> {
        self.answer(())
    }

    fn list<'a>(&'a self, _: &'a str) -> Answer<'a, Vec<String>> {
        self.answer(Vec::new())
    }

    fn ids(&self) -> Answer<'_, Vec<String>> {
        self.answer(Vec::new())
    }
}

fn broken(succeeds: fn(u32) -> bool) -> (RemoteImages, Arc<AtomicU32>) {
    let asked = Arc::<AtomicU32>::default();
    let bucket = Broken { asked: Arc::clone(&asked), succeeds };
    (RemoteImages::new("broken".into(), Box::new(bucket), impatient()).unwrap(), asked)
}

#[test]
fn a_wire_that_breaks_twice_is_tried_a_third_time() {
    let (store, asked) = broken(|number| number == 3);
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(asked.load(Ordering::Relaxed), 3);
}

#[test]
fn a_server_that_fails_is_left_alone_and_asked_once_after_its_rest() {
    let (store, asked) = broken(|number| number > 4);
    let source = |error| match error {
        StoreError::Unreachable { source, .. } => source,
        error => panic!("{error}"),
    };
    let error = source(store.list().unwrap_err());
    assert_eq!(error, Unanswered::Broken("the wire is cut".into()));
    assert!(matches!(source(store.list().unwrap_err()), Unanswered::LeftAlone { failures: 3, .. }));
    assert_eq!(asked.load(Ordering::Relaxed), 3, "it was asked while it rests");
    std::thread::sleep(impatient().rest);
    assert!(matches!(source(store.list().unwrap_err()), Unanswered::Broken(_)));
    assert_eq!(asked.load(Ordering::Relaxed), 4, "one failure after a rest is enough");
    std::thread::sleep(impatient().rest);
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn an_upload_that_takes_too_long_is_not_committed() {
    let options = RemoteOptions { upload: Duration::ZERO, ..options() };
    let memory = Arc::new(object_store::memory::InMemory::new());
    let store = RemoteImages::objects("memory", memory, "", options).unwrap();
    let error = write(&store, "a", 1, false).unwrap_err();
    assert!(matches!(error, StoreError::TooSlow { .. }), "{error}");
    assert_eq!(store.parts(), [""; 0]);
}

/// A server that takes connections and says nothing, as long as the listener lives.
fn mute() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Bounded whatever the server does: tries, times and pauses, and much room for a busy machine.
fn gives_up_in_time(store: &dyn ImageStore) {
    let began = std::time::Instant::now();
    match store.open(&id("a")).err() {
        Some(StoreError::Unreachable { .. }) => {}
        other => panic!("{other:?}"),
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    match store.create(&id("a"), true).err() {
        Some(StoreError::Unreachable { source: Unanswered::LeftAlone { .. }, .. }) => {}
        other => panic!("it is asked again at once: {other:?}"),
    }
}

#[test]
fn keys_that_a_record_may_not_name_are_damage() {
    assert_eq!(begun("0000000010-0123456789abcdef"), Some(16));
    for upload in ["", "../x", "0000000010", "10-0123456789abcdef", "+000000010-0123456789abcdef"] {
        assert_eq!(begun(upload), None, "{upload}");
    }
    let manifest = crate::tiers::store::conformance::manifest(1, |_, _| true);
    let decode = |upload: &str, chunk_bytes| {
        let record = Record { upload: upload.into(), chunk_bytes, manifest: manifest.clone() };
        Record::decode(&crate::tiers::store::seal::seal(MAGIC, &record).unwrap(), "m")
    };
    decode("0000000010-0123456789abcdef", 300).unwrap();
    assert!(matches!(decode("../x", 300), Err(Damage::Content { .. })));
    assert!(matches!(decode("0000000010-0123456789abcdef", 0), Err(Damage::Content { .. })));
    assert!(matches!(decode("0000000010-0123456789abcdef", u32::MAX), Err(Damage::Content { .. })));
}
