//! What every store must do, as one suite that each of them runs.

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use super::*;

/// How a test reaches behind a store, to damage what it keeps.
pub(super) trait Raw {
    /// Names of everything that the store keeps, in any form.
    fn parts(&self) -> Vec<String>;
    /// What is there.
    fn get(&self, part: &str) -> Vec<u8>;
    /// Puts something else there.
    fn put(&self, part: &str, bytes: &[u8]);
    /// Takes it away.
    fn delete(&self, part: &str);
}

pub(crate) fn id(text: &str) -> ImageId {
    text.parse().unwrap()
}

/// Three layers of two KV heads; pages of 64 bytes.
pub(super) fn model() -> ModelKey {
    ModelKey {
        fingerprint: "00112233".into(),
        adapter: String::new(),
        layers: 3,
        kv_heads: 2,
        head_dim: 4,
        latent_values: 0,
        dtype: 1,
        page_rows: 4,
        row_bytes: 16,
    }
}

/// What is written for an image of this seed, with checksums as a writer fills them in.
pub(super) fn manifest(seed: u64, present: impl FnMut(usize, usize) -> bool) -> Manifest {
    let mut pages = PageTable::new(vec![3, 3, 4, 4, 3, 3], present);
    pages.set_crcs((0..pages.present()).map(|index| crc32c::crc32c(&page(seed, index))).collect());
    Manifest {
        kind: ImageKind::Sequence,
        model: model(),
        uid: 1000,
        created_unix: 1_700_000_000 + seed,
        method: "kvoyant:recall=0.99".into(),
        seed,
        lens: vec![12, 13, 12],
        tokens: 12,
        pages,
        blobs: blobs(seed)
            .into_iter()
            .map(|(name, bytes)| BlobEntry {
                name: name.into(),
                bytes: bytes.len() as u64,
                crc32c: crc32c::crc32c(&bytes),
            })
            .collect(),
        label: format!("seed {seed}"),
    }
}

fn there(head: usize, page: usize) -> bool {
    (head, page) != (2, 1)
}

fn page(seed: u64, index: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed * 1000 + index as u64);
    (0..64).map(|_| random.u8(..)).collect()
}

fn blobs(seed: u64) -> Vec<(&'static str, Vec<u8>)> {
    let mut random = fastrand::Rng::with_seed(seed);
    vec![
        ("digests/0", (0..700).map(|_| random.u8(..)).collect()),
        ("marks", Vec::new()),
        ("tokens", (0..48).map(|_| random.u8(..)).collect()),
    ]
}

/// Writes everything but the manifest.
pub(super) fn fill(writer: &mut dyn ImageWriter, seed: u64) -> Result<(), StoreError> {
    for index in 0..manifest(seed, there).pages.present() {
        writer.page(&page(seed, index))?;
    }
    blobs(seed).iter().try_for_each(|(name, bytes)| writer.blob(name, bytes))
}

/// What its writer is given: neither checksums nor blobs.
pub(super) fn bare(seed: u64) -> Manifest {
    let mut bare = manifest(seed, there);
    bare.pages.set_crcs(Vec::new());
    bare.blobs.clear();
    bare
}

/// Writes the image of a seed.
pub(crate) fn write(
    store: &dyn ImageStore,
    name: &str,
    seed: u64,
    overwrite: bool,
) -> Result<ImageSummary, StoreError> {
    let mut writer = store.create(&id(name), overwrite)?;
    fill(&mut *writer, seed)?;
    writer.commit(bare(seed))
}

/// Reads everything of an image; which seed it has.
pub(super) fn read(store: &dyn ImageStore, name: &str) -> Result<u64, StoreError> {
    let mut reader = store.open(&id(name))?;
    let seed = reader.manifest().seed;
    assert_eq!(*reader.manifest(), manifest(seed, there), "a manifest that nobody wrote");
    let mut bytes = vec![1; 64];
    for index in 0..reader.manifest().pages.present() {
        if let Err(error) = reader.page(index, &mut bytes) {
            assert!(bytes.iter().all(|byte| *byte == 0), "bytes of a damaged page are handed on");
            return Err(error);
        }
        assert_eq!(bytes, page(seed, index), "wrong bytes in page {index}");
    }
    for (name, wanted) in blobs(seed) {
        assert_eq!(reader.blob(name)?, wanted, "wrong bytes in blob {name}");
    }
    Ok(seed)
}

/// The whole suite, on an empty store.
pub(super) fn suite(store: &dyn ImageStore, raw: &dyn Raw) {
    let before = raw.parts();
    an_image_comes_back(store);
    what_is_missing_is_said(store);
    a_writer_that_is_dropped_leaves_nothing(store, raw);
    what_does_not_go_together_is_not_committed(store, raw);
    the_last_of_several_writers_wins(store);
    a_reader_of_what_is_replaced_gets_the_old_image_or_an_error(store);
    damage_is_found(store, raw);
    what_is_damaged_is_listed_and_can_be_removed(store, raw);
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(raw.parts(), before, "something is left of images that were removed");
}

fn an_image_comes_back(store: &dyn ImageStore) {
    let summary = write(store, "a", 1, false).unwrap();
    assert_eq!(read(store, "a").unwrap(), 1);
    let facts = ImageFacts::from(&manifest(1, there));
    assert_eq!(summary.content, Ok(facts));
    assert_eq!(store.list().unwrap(), [summary]);
    // Pages in any order, and more than once.
    let mut reader = store.open(&id("a")).unwrap();
    for index in [18, 0, 5, 5, 18] {
        let mut bytes = vec![0; 64];
        reader.page(index, &mut bytes).unwrap();
        assert_eq!(bytes, page(1, index));
    }

    assert!(matches!(write(store, "a", 2, false), Err(StoreError::Exists { .. })));
    assert_eq!(read(store, "a").unwrap(), 1);
    let late = write(store, "b", 2, false).unwrap();
    let mut writer = store.create(&id("c"), false).unwrap();
    fill(&mut *writer, 3).unwrap();
    write(store, "c", 4, false).unwrap();
    let error = writer.commit(bare(3)).unwrap_err();
    assert!(matches!(error, StoreError::Exists { .. }), "{error}");
    assert_eq!(read(store, "c").unwrap(), 4);

    let new = write(store, "a", 5, true).unwrap();
    assert_eq!(read(store, "a").unwrap(), 5);
    store.remove(&id("c")).unwrap();
    assert_eq!(store.list().unwrap(), [new, late]);
    store.remove(&id("a")).unwrap();
    store.remove(&id("b")).unwrap();
    assert_eq!(store.list().unwrap(), []);
}

fn what_is_missing_is_said(store: &dyn ImageStore) {
    assert!(matches!(store.open(&id("none")).err(), Some(StoreError::NotFound { .. })));
    assert!(matches!(store.remove(&id("none")), Err(StoreError::NotFound { .. })));
    write(store, "a", 1, false).unwrap();
    let mut reader = store.open(&id("a")).unwrap();
    assert!(matches!(reader.page(19, &mut [0; 64]), Err(StoreError::NoSuchPage { pages: 19, .. })));
    assert!(matches!(reader.page(0, &mut [0; 63]), Err(StoreError::NoSuchPage { page_bytes: 64, .. })));
    assert!(matches!(reader.blob("none"), Err(StoreError::NoSuchBlob { .. })));
    let manifest = reader.manifest();
    manifest.expect(&id("a"), ImageKind::Sequence, &model()).unwrap();
    let error = manifest.expect(&id("a"), ImageKind::Prefix, &model()).unwrap_err();
    assert_eq!(error.to_string(), "image a is a sequence and a prefix was wanted");
    let other = ModelKey { dtype: 2, ..model() };
    let error = manifest.expect(&id("a"), ImageKind::Sequence, &other).unwrap_err();
    assert!(error.to_string().contains("storage format: 1 in the image, 2 in the session"), "{error}");
    store.remove(&id("a")).unwrap();
}

fn a_writer_that_is_dropped_leaves_nothing(store: &dyn ImageStore, raw: &dyn Raw) {
    let before = raw.parts();
    let mut writer = store.create(&id("a"), false).unwrap();
    fill(&mut *writer, 1).unwrap();
    assert!(matches!(store.open(&id("a")).err(), Some(StoreError::NotFound { .. })));
    assert_eq!(store.list().unwrap(), []);
    drop(writer);
    assert_eq!(raw.parts(), before);
}

fn what_does_not_go_together_is_not_committed(store: &dyn ImageStore, raw: &dyn Raw) {
    let before = raw.parts();
    let refused = |write: &dyn Fn(Box<dyn ImageWriter>) -> Result<(), StoreError>, says: &str| {
        let error = write(store.create(&id("a"), false).unwrap()).unwrap_err();
        assert!(matches!(error, StoreError::Draft { .. }) && error.to_string().contains(says), "{error}");
        assert_eq!(raw.parts(), before);
    };
    refused(&|writer| writer.commit(bare(1)).map(|_| ()), "0 pages were written and its table has 19");
    refused(&|mut writer| writer.page(&[0; 64]).and_then(|()| writer.page(&[0; 32])), "of 32 bytes after");
    refused(&|mut writer| writer.blob("a", &[]).and_then(|()| writer.blob("a", &[])), "two blobs");
    refused(
        &|mut writer| {
            fill(&mut *writer, 1)?;
            let mut other = bare(1);
            other.model.page_rows = 8;
            writer.commit(other).map(|_| ())
        },
        "pages of 64 bytes for 8 rows",
    );
    refused(
        &|mut writer| {
            fill(&mut *writer, 1)?;
            writer.commit(Manifest { lens: vec![12], ..bare(1) }).map(|_| ())
        },
        "1 lengths for 3 layers",
    );
}

fn the_last_of_several_writers_wins(store: &dyn ImageStore) {
    std::thread::scope(|scope| {
        for seed in 1..=4 {
            scope.spawn(move || {
                for _ in 0..3 {
                    write(store, "a", seed, true).unwrap();
                }
            });
        }
    });
    assert!((1..=4).contains(&read(store, "a").unwrap()));
    assert_eq!(store.list().unwrap().len(), 1);
    store.remove(&id("a")).unwrap();
}

fn a_reader_of_what_is_replaced_gets_the_old_image_or_an_error(store: &dyn ImageStore) {
    write(store, "a", 1, false).unwrap();
    let mut reader = store.open(&id("a")).unwrap();
    write(store, "a", 2, true).unwrap();
    for index in 0..19 {
        let mut bytes = vec![1; 64];
        match reader.page(index, &mut bytes) {
            Ok(()) => assert_eq!(bytes, page(1, index)),
            Err(error) => assert!(matches!(error, StoreError::Replaced { .. }), "{error}"),
        }
    }
    assert_eq!(read(store, "a").unwrap(), 2);
    let mut reader = store.open(&id("a")).unwrap();
    store.remove(&id("a")).unwrap();
    match reader.blob("tokens") {
        Ok(bytes) => assert_eq!(bytes, blobs(2)[2].1),
        Err(error) => assert!(matches!(error, StoreError::Replaced { .. }), "{error}"),
    }
}

/// The parts of an image that has something in them.
fn full_parts(raw: &dyn Raw) -> Vec<(String, Vec<u8>)> {
    let parts = raw.parts().into_iter().map(|part| (part.clone(), raw.get(&part)));
    parts.filter(|(_, bytes)| !bytes.is_empty()).collect()
}

fn damage_is_found(store: &dyn ImageStore, raw: &dyn Raw) {
    write(store, "a", 1, false).unwrap();
    let parts = full_parts(raw);
    assert!(parts.len() >= 3, "{parts:?}");
    let damaged = || match read(store, "a") {
        Err(StoreError::Damaged { .. }) => Ok(()),
        other => Err(TestCaseError::fail(format!("{other:?}"))),
    };
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::default()));
    let spot = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1u8..=255);
    runner
        .run(&spot, |(part, at, flip)| {
            let (part, whole) = part.get(&parts);
            let mut bytes = whole.clone();
            bytes[at.index(whole.len())] ^= flip;
            raw.put(part, &bytes);
            damaged()?;
            // Cut there, and with one byte too many.
            raw.put(part, &whole[..at.index(whole.len())]);
            damaged()?;
            raw.put(part, &[whole.as_slice(), &[flip]].concat());
            damaged()?;
            raw.put(part, whole);
            Ok(())
        })
        .unwrap();
    for (part, whole) in &parts {
        raw.delete(part);
        match read(store, "a") {
            Err(StoreError::Damaged { .. }) => {}
            // Remotely, what has no manifest is no image yet.
            Err(StoreError::NotFound { .. }) if part.ends_with("manifest") => {}
            other => panic!("{part} is missing: {other:?}"),
        }
        raw.put(part, whole);
    }
    assert_eq!(read(store, "a").unwrap(), 1);
    store.remove(&id("a")).unwrap();
}

fn what_is_damaged_is_listed_and_can_be_removed(store: &dyn ImageStore, raw: &dyn Raw) {
    let before = raw.parts();
    write(store, "a", 1, false).unwrap();
    let manifest = raw.parts().into_iter().find(|part| part.ends_with("manifest")).unwrap();
    let mut bytes = raw.get(&manifest);
    bytes[30] ^= 1;
    raw.put(&manifest, &bytes);
    let list = store.list().unwrap();
    assert_eq!(list.len(), 1);
    assert!(matches!(list[0].content, Err(Damage::Seal { .. })), "{list:?}");
    // It can be replaced, too.
    write(store, "a", 2, true).unwrap();
    assert_eq!(read(store, "a").unwrap(), 2);
    raw.put(&manifest, &[]);
    let list = store.list().unwrap();
    assert!(matches!(list[0].content, Err(Damage::Length { .. })), "{list:?}");
    store.remove(&id("a")).unwrap();
    assert_eq!(raw.parts(), before);
}
