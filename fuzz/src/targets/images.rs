//! Images of sequences and prefixes, as a folder has them.

use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, PoisonError};

use kvoyant_daemon::tiers::store::{
    ImageId, ImageKind, ImageStore, LocalStore, Manifest, ModelKey, PageTable,
};
use tempfile::TempDir;

use crate::input::Input;

/// Bytes of a manifest's record before its body: magic, version and length.
const HEADER: usize = 20;
const SUM: usize = 32;

/// Pages that are larger are not read: nothing is in them.
const PAGE_MAX: usize = 1 << 20;
const PARTS_MAX: usize = 16;

struct Place {
    store: LocalStore,
    folder: PathBuf,
    _root: TempDir,
}

static PLACE: LazyLock<Mutex<Place>> = LazyLock::new(|| {
    let root = tempfile::tempdir().expect("a folder");
    let store = LocalStore::open(root.path()).expect("a store");
    let folder = root.path().join("image");
    std::fs::create_dir(&folder).expect("an image's folder");
    Mutex::new(Place { store, folder, _root: root })
});

/// Any files are an image or an error, with a wrong sum and with a right one; what is read has the checksum that is said.
///
/// # Panics
/// If it is not so.
pub fn run(bytes: &[u8]) {
    let mut input = Input(bytes);
    let sealed = input.u8() & 1 == 1;
    let (manifest, pages) = (usize::from(input.u16()), usize::from(input.u16()));
    let manifest = input.bytes(manifest);
    let manifest = if sealed { seal(manifest) } else { manifest.to_vec() };
    let place = PLACE.lock().unwrap_or_else(PoisonError::into_inner);
    let write = |file: &str, bytes: &[u8]| std::fs::write(place.folder.join(file), bytes).expect("a file");
    write("manifest", &manifest);
    write("pages", input.bytes(pages));
    write("blobs", input.0);
    let listed = place.store.list().expect("a list");
    assert_eq!(listed.len(), 1);
    let id: ImageId = "image".parse().expect("an id");
    let Ok(mut reader) = place.store.open(&id) else { return };
    assert!(listed[0].content.is_ok(), "it can be opened, and its list says {:?}", listed[0].content);
    let manifest = reader.manifest().clone();
    let known: usize = manifest.pages.iter().count();
    assert_eq!(known, manifest.pages.present());
    assert_eq!(manifest.model.mismatch(&manifest.model), None);
    if manifest.page_bytes() <= PAGE_MAX {
        let mut page = vec![1; manifest.page_bytes()];
        for index in 0..known.min(PARTS_MAX) {
            match reader.page(index, &mut page) {
                Ok(()) => assert_eq!(crc32c::crc32c(&page), manifest.pages.crcs()[index]),
                Err(_) => assert!(page.iter().all(|byte| *byte == 0), "a damaged page is handed on"),
            }
        }
        assert!(reader.page(known, &mut page).is_err());
    }
    for blob in manifest.blobs.iter().take(PARTS_MAX) {
        if let Ok(bytes) = reader.blob(&blob.name) {
            assert_eq!((bytes.len() as u64, crc32c::crc32c(&bytes)), (blob.bytes, blob.crc32c));
        }
    }
}

/// A record whose sum is right.
fn seal(body: &[u8]) -> Vec<u8> {
    let mut record = b"KVIMAGE\0".to_vec();
    record.extend_from_slice(&1_u32.to_le_bytes());
    record.extend_from_slice(&(body.len() as u64).to_le_bytes());
    record.extend_from_slice(body);
    let sum = blake3::hash(&record);
    record.extend_from_slice(sum.as_bytes());
    record
}

/// Two images as the store writes them, the first sealed anew when it is read.
///
/// # Panics
/// If the store does not write them.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let root = tempfile::tempdir().expect("a folder");
    let store = LocalStore::open(root.path()).expect("a store");
    let manifest = Manifest {
        kind: ImageKind::Sequence,
        model: ModelKey {
            fingerprint: "00112233".into(),
            adapter: String::new(),
            layers: 2,
            kv_heads: 1,
            head_dim: 4,
            latent_values: 0,
            dtype: 1,
            page_rows: 4,
            row_bytes: 16,
        },
        uid: 1000,
        created_unix: 1_700_000_000,
        method: "quest:budget=6%".into(),
        seed: 7,
        lens: vec![6, 5],
        tokens: 5,
        pages: PageTable::new(vec![2, 2], |head, page| (head, page) != (1, 0)),
        blobs: Vec::new(),
        label: "a label".into(),
    };
    let id: ImageId = "image".parse().expect("an id");
    let mut writer = store.create(&id, false).expect("an image");
    (0..3u8).for_each(|page| writer.page(&[page; 64]).expect("a page"));
    writer.blob("tokens", &[5; 20]).expect("a blob");
    writer.blob("marks", &[]).expect("a blob");
    writer.commit(manifest).expect("an image");
    let read = |file: &str| std::fs::read(root.path().join("image").join(file)).expect("a file");
    let (record, pages, blobs) = (read("manifest"), read("pages"), read("blobs"));
    let input = |flags: u8, manifest: &[u8]| {
        let lengths = [manifest.len() as u16, pages.len() as u16].map(u16::to_le_bytes);
        [&[flags], lengths.as_flattened(), manifest, &pages, &blobs].concat()
    };
    vec![input(1, &record[HEADER..record.len() - SUM]), input(0, &record)]
}
