use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Mutex;

use super::steps::tests_only::{Fate, doom};
use super::*;
use crate::tiers::store::conformance::{Raw, fill, id, read, suite, write};

struct Files(PathBuf);

impl Raw for Files {
    fn parts(&self) -> Vec<String> {
        let mut parts = Vec::new();
        for entry in std::fs::read_dir(&self.0).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                parts.extend(std::fs::read_dir(&path).unwrap().map(|file| file.unwrap().path()));
                parts.push(path);
            }
        }
        parts.retain(|path| path.is_file());
        parts.iter().map(|path| path.strip_prefix(&self.0).unwrap().to_str().unwrap().to_owned()).collect()
    }

    fn get(&self, part: &str) -> Vec<u8> {
        std::fs::read(self.0.join(part)).unwrap()
    }

    fn put(&self, part: &str, bytes: &[u8]) {
        std::fs::write(self.0.join(part), bytes).unwrap();
    }

    fn delete(&self, part: &str) {
        std::fs::remove_file(self.0.join(part)).unwrap();
    }
}

fn names(root: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(root).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_folder_does_what_every_store_does() {
    let root = tempfile::tempdir().unwrap();
    let store = LocalStore::open(root.path()).unwrap();
    suite(&store, &Files(root.path().to_owned()));
}

#[test]
fn nobody_else_can_read_an_image() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path().join("deep").join("store");
    let store = LocalStore::open(&root).unwrap();
    write(&store, "a", 1, false).unwrap();
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&root), 0o700);
    assert_eq!(mode(&root.join("a")), 0o700);
    for file in [MANIFEST, PAGES, BLOBS] {
        assert_eq!(mode(&root.join("a").join(file)), 0o600, "{file}");
    }
}

#[test]
fn a_second_daemon_is_refused_until_the_first_has_gone() {
    let root = tempfile::tempdir().unwrap();
    let store = LocalStore::open(root.path()).unwrap();
    assert!(matches!(LocalStore::open(root.path()), Err(StoreError::Locked { .. })));
    // A writer holds the folder as long as it lives.
    let writer = store.create(&id("a"), false).unwrap();
    drop(store);
    assert!(matches!(LocalStore::open(root.path()), Err(StoreError::Locked { .. })));
    drop(writer);
    // A child of another test has the file open until it has begun its own program.
    let since = std::time::Instant::now();
    while let Err(error) = LocalStore::open(root.path()) {
        assert!(matches!(error, StoreError::Locked { .. }) && since.elapsed().as_secs() < 30, "{error}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn links_are_not_followed_and_what_is_removed_holds_zeros() {
    let (root, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = LocalStore::open(root.path()).unwrap();
    write(&store, "a", 1, false).unwrap();
    let victim = other.path().join("victim");
    std::fs::write(&victim, "kept").unwrap();
    let pages = root.path().join("a").join(PAGES);
    // A descriptor still shows what has become of the contents.
    let open = File::open(&pages).unwrap();
    std::fs::remove_file(root.path().join("a").join(MANIFEST)).unwrap();
    std::os::unix::fs::symlink(&victim, root.path().join("a").join(MANIFEST)).unwrap();
    assert!(matches!(store.open(&id("a")).err(), Some(StoreError::Io { .. })));
    // Neither that nor a file where a folder should be hides the other images, and both can be removed.
    std::fs::write(root.path().join("b"), "stray").unwrap();
    write(&store, "c", 1, false).unwrap();
    let list = store.list().unwrap();
    assert_eq!(list.iter().map(|image| image.content.is_ok()).collect::<Vec<_>>(), [false, false, true]);
    for name in ["a", "b", "c"] {
        store.remove(&id(name)).unwrap();
    }
    assert_eq!(std::fs::read(&victim).unwrap(), b"kept");
    let mut bytes = vec![1; 19 * 64];
    std::os::unix::fs::FileExt::read_exact_at(&open, &mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    assert_eq!(names(root.path()), BTreeSet::from([LOCK.into()]));
}

#[test]
fn a_full_disk_is_named_and_leaves_no_half_image() {
    for overwrite in [false, true] {
        for step in Step::ALL {
            let root = tempfile::tempdir().unwrap();
            let store = LocalStore::open(root.path()).unwrap();
            if overwrite {
                write(&store, "a", 1, false).unwrap();
            }
            doom(Some((step, Fate::NoSpace)));
            let written = write(&store, "a", 2, true);
            doom(None);
            if let Err(error) = &written {
                assert!(matches!(error, StoreError::Full { .. }), "{step:?}: {error}");
            }
            if step <= Step::OldAside && (overwrite || step < Step::OldAside) {
                assert!(written.is_err(), "{step:?}");
                let left: &[&str] = if overwrite { &[LOCK, "a"] } else { &[LOCK] };
                assert_eq!(
                    names(root.path()),
                    left.iter().map(|name| (*name).to_owned()).collect(),
                    "{step:?}"
                );
                assert_eq!(read(&store, "a").ok(), overwrite.then_some(1), "{step:?}");
            } else {
                assert_eq!(read(&store, "a").unwrap(), 2, "{step:?}");
            }
        }
    }
}

const SMALL: &str = "KVOYANT_STORE_TEST_SMALL_DISK";

/// Fills a disk of half a MiB. Only as a child of the test below it does anything.
#[test]
fn child_on_a_small_disk() {
    let Ok(root) = std::env::var(SMALL) else { return };
    let store = LocalStore::open(&root).unwrap();
    write(&store, "a", 1, false).unwrap();
    let mut writer = store.create(&id("a"), true).unwrap();
    let full = loop {
        if let Err(error) = writer.page(&[7; 64 << 10]) {
            break error;
        }
    };
    match full {
        StoreError::Full { path, wanted_bytes, free_bytes } => {
            assert!(path.ends_with(PAGES) && wanted_bytes > free_bytes, "{wanted_bytes} {free_bytes}");
        }
        error => panic!("{error}"),
    }
    drop(writer);
    assert_eq!(read(&store, "a").unwrap(), 1);
    assert_eq!(names(Path::new(&root)), [LOCK, "a"].map(str::to_owned).into());
    write(&store, "a", 2, true).unwrap();
    assert_eq!(read(&store, "a").unwrap(), 2);
    println!("the small disk was full");
}

#[test]
fn a_disk_that_really_is_full_is_named_with_what_is_wanted_and_free() {
    let root = tempfile::tempdir().unwrap();
    let mount = "mount -t tmpfs -o size=512k none \"$1\" || exit 77; shift; exec \"$@\"";
    let test = "tiers::store::local::tests::child_on_a_small_disk";
    let child = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"])
        .arg(root.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(SMALL, root.path())
        .output();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match child {
        Ok(child) if child.status.success() => {
            assert!(said(&child.stdout).contains("the small disk was full"), "{child:?}");
        }
        Ok(child) if child.status.code() != Some(77) && !said(&child.stderr).contains("unshare") => {
            panic!("{}{}", said(&child.stdout), said(&child.stderr));
        }
        _ => println!("SKIPPED: no file system can be mounted in a user namespace here"),
    }
}

/// What a child does before, and while, it is killed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Deed {
    Create,
    Overwrite,
    Remove,
    Recover,
    RecoverReplaced,
}

const DEEDS: [Deed; 5] = [Deed::Create, Deed::Overwrite, Deed::Remove, Deed::Recover, Deed::RecoverReplaced];

const CHILD: &str = "KVOYANT_STORE_TEST_CHILD";

/// Does one deed, dying at one step. Only as a child of the test below it does anything.
#[test]
fn child_that_dies_at_a_step() {
    let Ok(orders) = std::env::var(CHILD) else { return };
    let mut orders = orders.splitn(3, ' ');
    let mut number = || orders.next().unwrap().parse::<usize>().unwrap();
    let (deed, step) = (DEEDS[number()], Step::ALL[number()]);
    let root = PathBuf::from(orders.next().unwrap());
    if let Deed::Recover | Deed::RecoverReplaced = deed {
        doom(Some((step, Fate::Abort)));
        LocalStore::open(&root).unwrap().erase_leftovers();
        return;
    }
    let store = LocalStore::open(&root).unwrap();
    doom(Some((step, Fate::Abort)));
    match deed {
        Deed::Remove => store.remove(&id("a")).unwrap(),
        _ => drop(write(&store, "a", 2, deed == Deed::Overwrite).unwrap()),
    }
}

/// The folder as it is when a deed begins.
fn prepare(root: &Path, deed: Deed) {
    let store = LocalStore::open(root).unwrap();
    match deed {
        Deed::Create => {}
        Deed::Overwrite | Deed::Remove => drop(write(&store, "a", 1, false).unwrap()),
        Deed::Recover | Deed::RecoverReplaced => {
            write(&store, "a", 1, false).unwrap();
            std::fs::rename(root.join("a"), root.join(".a.00000000000000aa.old")).unwrap();
            if deed == Deed::RecoverReplaced {
                write(&store, "a", 2, false).unwrap();
            }
            write(&store, "b", 3, false).unwrap();
            std::fs::rename(root.join("b"), root.join(".b.00000000000000bb.gone")).unwrap();
            let mut writer = store.create(&id("c"), false).unwrap();
            fill(&mut *writer, 4).unwrap();
            // As a crash leaves it: never dropped. Nor is it a leak to whoever looks for those.
            DEAD.lock().unwrap().push(writer);
            drop(store);
        }
    }
}

/// What processes that died were writing.
static DEAD: Mutex<Vec<Box<dyn ImageWriter>>> = Mutex::new(Vec::new());

/// At every step of every deed the process dies; afterwards there is the old image or the new one, whole, and nothing
/// else.
#[test]
fn a_crash_at_any_step_leaves_the_old_image_or_the_new_one() {
    let mut reached = BTreeSet::new();
    for (index, deed) in DEEDS.into_iter().enumerate() {
        for (at, step) in Step::ALL.into_iter().enumerate() {
            let root = tempfile::tempdir().unwrap();
            if let Deed::Recover | Deed::RecoverReplaced = deed {
                // Its forgotten writer would keep the lock: another folder has the same contents.
                let before = tempfile::tempdir().unwrap();
                prepare(before.path(), deed);
                copy(before.path(), root.path());
            } else {
                prepare(root.path(), deed);
            }
            let test = "tiers::store::local::tests::child_that_dies_at_a_step";
            let child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", test, "--nocapture", "--test-threads=1"])
                .env(CHILD, format!("{index} {at} {}", root.path().display()))
                .output()
                .unwrap();
            match child.status.signal() {
                Some(6) => {
                    reached.insert(step);
                }
                None if child.status.success() => {}
                _ => panic!("{deed:?} at {step:?}: {child:?}"),
            }
            let died = child.status.signal().is_some();
            let store = LocalStore::open(root.path()).unwrap();
            store.erase_leftovers();
            let found = read(&store, "a");
            let context = || format!("{deed:?} at {step:?}: {found:?}");
            match (deed, &found) {
                (Deed::Create, Err(StoreError::NotFound { .. })) => {
                    assert!(died && step < Step::NewNamed, "{}", context());
                }
                (Deed::Create | Deed::RecoverReplaced, Ok(2)) | (Deed::Recover, Ok(1)) => {}
                (Deed::Overwrite, Ok(1)) => assert!(died && step <= Step::OldAside, "{}", context()),
                (Deed::Overwrite, Ok(2)) => assert!(!died || step > Step::OldAside, "{}", context()),
                // Nothing of it comes back once it was condemned, which every removal begins with.
                (Deed::Remove, Err(StoreError::NotFound { .. })) => {}
                _ => panic!("{}", context()),
            }
            let left: &[&str] = if found.is_ok() { &[LOCK, "a"] } else { &[LOCK] };
            let left: BTreeSet<_> = left.iter().map(|name| (*name).to_owned()).collect();
            assert_eq!(names(root.path()), left, "{}", context());
            if found.is_ok() {
                assert_eq!(names(&root.path().join("a")).len(), 3, "{}", context());
            }
        }
    }
    assert_eq!(reached, Step::ALL.into_iter().collect(), "some step was never reached");
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            DirBuilder::new().mode(0o700).create(&target).unwrap();
            copy(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}
