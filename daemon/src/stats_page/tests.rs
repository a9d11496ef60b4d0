use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::control::Mode;

use super::*;
use crate::device::host::{HostDevice, Shape};
use crate::status::Registry;
use crate::tiers::budget::ArenaBudget;
use crate::tiers::pool::{ExtentPool, PoolSettings};

/// A folder with an admin socket of ours, and the page that belongs to it.
fn page() -> (tempfile::TempDir, PathBuf, StatsPage) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("admin.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let page = StatsPage::create(&socket, 7, false).unwrap();
    (folder, socket, page)
}

fn registry() -> Registry {
    let budget = Arc::new(ArenaBudget::new(EXTENT_BYTES as u64));
    let pool = Arc::new(ExtentPool::start(budget, PoolSettings::unpinned()).unwrap());
    let device = Arc::new(HostDevice::new(Mode::InPlace, 1, Shape::default()).unwrap());
    Registry::new(pool, device, "in-place".into(), 1, 7)
}

fn body(registry: &Registry) -> Vec<u8> {
    serde_json::to_vec(&registry.report()).unwrap()
}

fn file(socket: &Path) -> std::fs::File {
    std::fs::OpenOptions::new().read(true).write(true).open(file_of(socket)).unwrap()
}

#[test]
fn what_is_written_is_what_is_read_and_the_name_goes_with_the_page() {
    let (_folder, socket, mut page) = page();
    assert!(matches!(read(&socket), Err(PageError::Torn)), "nothing was written yet");
    let registry = registry();
    for _ in 0..3 {
        page.put(&body(&registry)).unwrap();
    }
    let status = read(&socket).unwrap();
    assert_eq!((status.boot_id.as_str(), status.mode.as_str()), ("0000000000000007", "in-place"));
    assert!(!page.is_gone());
    drop(page);
    assert!(matches!(read(&socket), Err(PageError::None(_))));
}

#[test]
fn a_slot_that_is_damaged_or_half_written_gives_way_to_the_one_before() {
    let (_folder, socket, mut page) = page();
    page.put(&body(&registry())).unwrap();
    page.put(b"{\"the newer one\": true}").unwrap();
    assert!(matches!(read(&socket), Err(PageError::Status(_))), "the newest one counts");
    // The second write went to the first slot.
    for at in [HEAD_BYTES as u64 + 3, 0, 12, 41] {
        let mut byte = [0];
        file(&socket).read_exact_at(&mut byte, at).unwrap();
        file(&socket).write_all_at(&[byte[0] ^ 0x40], at).unwrap();
        assert_eq!(read(&socket).unwrap().boot_id, "0000000000000007", "byte {at}");
        file(&socket).write_all_at(&byte, at).unwrap();
    }
    file(&socket).write_all_at(&u32::MAX.to_le_bytes(), 12).unwrap();
    assert!(read(&socket).is_ok(), "a length beyond the slot is none");
    file(&socket).set_len(17).unwrap();
    assert!(matches!(read(&socket), Err(PageError::Torn)), "a page that was cut short has no slot");
}

#[test]
fn a_page_that_nobody_writes_any_more_is_old() {
    let (_folder, socket, mut page) = page();
    let body = body(&registry());
    page.put(&body).unwrap();
    let written = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() - 60;
    let head = Head { bytes: body.len() as u32, number: 9, written, boot_id: 7 };
    file(&socket).write_all_at(&head.encode(&body), SLOT_BYTES).unwrap();
    assert!(matches!(read(&socket), Err(PageError::Old { age: 60..=70 })));
}

#[test]
fn a_status_that_does_not_fit_leaves_the_last_one() {
    let (_folder, socket, mut page) = page();
    page.put(&body(&registry())).unwrap();
    let error = page.put(&vec![b' '; SLOT_BYTES as usize]).unwrap_err();
    assert!(error.to_string().contains("does not fit"), "{error}");
    assert!(read(&socket).is_ok());
}

#[test]
fn a_dead_daemons_page_is_replaced_and_a_lost_name_is_noticed() {
    let (_folder, socket, mut page) = page();
    page.put(b"{}").unwrap();
    let mut next = StatsPage::create(&socket, 8, true).unwrap();
    assert!(page.is_gone());
    next.put(&body(&registry())).unwrap();
    assert!(read(&socket).is_ok());
    let mode = file(&socket).metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640, "the folder's group may read it");
}

#[test]
fn pages_of_dead_daemons_are_swept_and_those_of_live_ones_stay() {
    let (_folder, socket, mut live) = page();
    live.put(b"{}").unwrap();
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    file(&socket).set_modified(long_ago).unwrap();
    // Names of no socket, so that no other test has them.
    let pid = std::process::id();
    let [left, young] = [1, 2].map(|number| Path::new(FOLDER).join(format!("{PREFIX}{number:08x}{pid:08x}")));
    for path in [&left, &young] {
        std::fs::write(path, "").unwrap();
    }
    std::fs::File::options().write(true).open(&left).unwrap().set_modified(long_ago).unwrap();
    sweep();
    assert!(!left.exists());
    assert!(young.exists(), "it may be about to be locked");
    assert!(!live.is_gone(), "it is locked");
    std::fs::remove_file(young).unwrap();
}

#[test]
fn somebody_elses_page_is_not_believed() {
    let (_folder, socket, mut page) = page();
    page.put(&body(&registry())).unwrap();
    if let Err(error) = std::os::unix::fs::chown(file_of(&socket), Some(65_534), None) {
        println!("SKIPPED: only root can give a file away: {error}");
        return;
    }
    assert!(matches!(read(&socket), Err(PageError::Foreign { owner: 65_534, .. })));
}

#[test]
fn names_follow_from_the_socket_however_it_is_written() {
    let here = std::env::current_dir().unwrap();
    assert_eq!(name_of(Path::new("admin.sock")), name_of(&here.join("admin.sock")));
    assert_ne!(name_of(Path::new("/a/admin.sock")), name_of(Path::new("/b/admin.sock")));
}

#[tokio::test]
async fn a_page_that_is_gone_or_is_for_other_people_than_before_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("admin.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let registry = Arc::new(registry());
    let make = {
        let (socket, access) = (socket.clone(), registry.access());
        move || StatsPage::create(&socket, 7, access.is_open())
    };
    let mode = || std::fs::metadata(file_of(&socket)).map_or(0, |found| found.mode() & 0o777);
    let becomes = async |wanted: u32| {
        let since = std::time::Instant::now();
        while mode() != wanted || read(&socket).is_err() {
            assert!(since.elapsed().as_secs() < 30, "mode {:o}", mode());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    let looks = async {
        becomes(0o640).await;
        let before = file(&socket);
        registry.access().set(&[crate::quota::User(7)], &[]);
        becomes(0o600).await;
        assert_eq!(before.metadata().unwrap().nlink(), 0, "whoever has it open hears nothing more");
        registry.access().set(&[], &[]);
        becomes(0o640).await;
        std::fs::remove_file(file_of(&socket)).unwrap();
        becomes(0o640).await;
        // The one before took its name with it, and not the new one's.
        tokio::time::sleep(std::time::Duration::from_millis(600)).await;
        becomes(0o640).await;
    };
    tokio::select! {
        () = keep(make(), make, Arc::clone(&registry)) => panic!("it ends with its task"),
        () = looks => {}
    }
}
