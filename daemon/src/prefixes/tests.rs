use std::path::Path;
use std::time::{Duration, Instant};

use super::*;

/// Three heads of pages of four rows of 16 bytes.
fn key() -> PrefixKey {
    let model = ModelKey {
        fingerprint: "00112233".into(),
        adapter: String::new(),
        layers: 3,
        kv_heads: 1,
        head_dim: 4,
        latent_values: 0,
        dtype: 1,
        page_rows: 4,
        row_bytes: 16,
    };
    PrefixKey { model, rope: "none".into() }
}

fn start(folder: &Path, remote: &str) -> Arc<Prefixes> {
    let since = Instant::now();
    let keeper = loop {
        match Keeper::start(folder, remote) {
            // A thread that has just written may still have the one before.
            Err(StoreError::Locked { .. }) if since.elapsed() < Duration::from_secs(60) => {
                std::thread::sleep(Duration::from_millis(2));
            }
            started => break started.unwrap(),
        }
    };
    start_on(2, Some(Arc::new(keeper)))
}

fn start_on(extents: u64, keeper: Option<Arc<Keeper>>) -> Arc<Prefixes> {
    let budget = Arc::new(ArenaBudget::new(4 * EXTENT_BYTES as u64));
    Prefixes::start(budget, extents * EXTENT_BYTES as u64, keeper).unwrap()
}

fn text(blocks: usize) -> Vec<u32> {
    (0..4 * blocks as u32).collect()
}

/// What a block's page of a head holds.
fn page(block: usize, head: usize) -> Vec<u8> {
    vec![1 + (16 * head + block) as u8; 64]
}

fn publish(prefixes: &Arc<Prefixes>, scope: Scope, blocks: usize) -> usize {
    let draft = prefixes.draft(&key(), scope, &text(blocks)).unwrap();
    for block in draft.known()..draft.blocks() {
        (0..3).for_each(|head| draft.page(block, head).unwrap().write(&page(block, head)).unwrap());
    }
    prefixes.publish(draft, 1000).unwrap().1
}

fn images(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut names: Vec<String> = names.filter_map(|name| name.into_string().ok()).collect();
    names.retain(|name| name.starts_with("prefix."));
    names.sort();
    names
}

/// Until all that is to be written has been, and copied.
fn written(prefixes: &Prefixes) {
    let keeper = prefixes.keeper.as_ref().unwrap();
    until("images are written", || {
        prefixes.waiting.load(Ordering::Relaxed) == 0 && keeper.report().waiting == 0
    });
}

fn until(what: &str, done: impl Fn() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < Duration::from_secs(60), "not yet: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn evict(prefixes: &Prefixes, tier: Tier, bytes: u64) {
    let gone = prefixes.index().evict(tier, bytes);
    prefixes.give_back(gone);
}

/// How many blocks of a text can be attached to; they hold what was published.
fn attached(prefixes: &Arc<Prefixes>, uid: u32, blocks: usize) -> usize {
    let Some(found) = prefixes.attach(&key(), uid, &text(blocks)).unwrap() else { return 0 };
    let mut bytes = vec![0; 64];
    for (block, pages) in found.blocks().iter().enumerate() {
        for (head, found) in pages.pages().iter().enumerate() {
            found.read(&mut bytes).unwrap();
            assert_eq!(bytes, page(block, head), "block {block} of head {head}");
        }
    }
    found.blocks().len()
}

#[test]
fn an_image_of_few_blocks_does_not_take_the_place_of_one_of_more() {
    let folder = tempfile::tempdir().unwrap();
    let prefixes = start(folder.path(), "");
    assert_eq!(publish(&prefixes, Scope::Shared, 3), 0);
    written(&prefixes);
    // The last block goes from both tiers, for leaves go first.
    evict(&prefixes, Tier::Host, 1);
    evict(&prefixes, Tier::Stored, 1);
    assert_eq!(publish(&prefixes, Scope::Shared, 3), 2);
    written(&prefixes);
    evict(&prefixes, Tier::Host, u64::MAX);
    assert_eq!(attached(&prefixes, 7, 3), 3);
}

#[test]
fn images_of_which_nobody_would_know_are_erased() {
    let folder = tempfile::tempdir().unwrap();
    let prefixes = start(folder.path(), "");
    let turn = prefixes.keeping.lock().unwrap();
    publish(&prefixes, Scope::Shared, 2);
    // It has gone before its image is written.
    evict(&prefixes, Tier::Host, u64::MAX);
    drop(turn);
    written(&prefixes);
    assert_eq!(images(folder.path()), [""; 0]);
    // One that a start finds and has no use for.
    publish(&prefixes, Scope::Shared, 2);
    written(&prefixes);
    let [image] = &images(folder.path())[..] else { panic!("one image") };
    let copy = image.replace(".0", ".00");
    std::fs::create_dir(folder.path().join(&copy)).unwrap();
    for file in std::fs::read_dir(folder.path().join(image)).unwrap().flatten() {
        std::fs::copy(file.path(), folder.path().join(&copy).join(file.file_name())).unwrap();
    }
    drop(prefixes);
    let prefixes = start(folder.path(), "");
    until("the start has looked at both", || images(folder.path()).len() == 1);
    until("what was published is known", || attached(&prefixes, 7, 2) == 2);
}

#[test]
fn nothing_goes_for_what_would_not_find_room_all_the_same() {
    let prefixes = start_on(1, None);
    publish(&prefixes, Scope::Uid(7), 3);
    // A session has the extent mapped, and is attached to nothing.
    let mapped = {
        let found = prefixes.attach(&key(), 7, &text(1)).unwrap().unwrap();
        Arc::clone(found.blocks()[0].pages()[0].extent())
    };
    let refused = || prefixes.draft(&key(), Scope::Uid(8), &text(2));
    assert!(matches!(refused(), Err(PrefixFailure::Full { .. })));
    assert_eq!(attached(&prefixes, 7, 3), 3, "what the other has published is there");
    drop(mapped);
    refused().unwrap();
    assert_eq!(attached(&prefixes, 7, 3), 0, "its extent was the only one");
}

#[test]
fn what_nobody_uses_gives_way_in_an_extent_that_stays() {
    let key = PrefixKey { model: ModelKey { row_bytes: 2 << 20, ..key().model }, ..key() };
    let prefixes = start_on(2, None);
    let publish = |uid: u32, tokens: &[u32]| {
        let draft = prefixes.draft(&key, Scope::Uid(uid), tokens)?;
        prefixes.publish(draft, uid)
    };
    // Six pages of eight in one extent; three in another, which stays.
    publish(7, &text(2)).unwrap();
    publish(8, &text(1)).unwrap();
    let used = prefixes.attach(&key, 8, &text(1)).unwrap().unwrap();
    publish(7, &[100, 101, 102, 103]).unwrap();
    drop(used);
}

#[test]
fn whoever_lets_go_of_a_prefix_waits_for_nobody() {
    let prefixes = start_on(1, None);
    publish(&prefixes, Scope::Shared, 3);
    let found = prefixes.attach(&key(), 7, &text(3)).unwrap().unwrap();
    let index = prefixes.index();
    drop(found);
    drop(index);
    // It is known by whoever looks next.
    evict(&prefixes, Tier::Host, u64::MAX);
    assert_eq!(attached(&prefixes, 7, 3), 0);
}

#[test]
fn what_is_a_users_own_stays_here_and_other_daemons_images_are_left_to_them() {
    let (here, there, remote) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let url = format!("file://{}", remote.path().display());
    let prefixes = start(here.path(), &url);
    publish(&prefixes, Scope::Uid(7), 2);
    publish(&prefixes, Scope::Shared, 2);
    written(&prefixes);
    assert_eq!((images(here.path()).len(), images(remote.path()).len()), (2, 1));
    let other = start(there.path(), &url);
    until("what is for everybody is known there", || attached(&other, 7, 2) == 2);
    // It was brought near as a whole, and goes from there alone.
    assert_eq!(images(there.path()).len(), 1);
    evict(&other, Tier::Stored, u64::MAX);
    assert_eq!((images(there.path()).len(), images(remote.path()).len()), (0, 1));
    evict(&other, Tier::Host, u64::MAX);
    // One of the same blocks that this one makes does not take its place, and does not take it away.
    publish(&other, Scope::Shared, 2);
    written(&other);
    evict(&other, Tier::Stored, u64::MAX);
    assert_eq!((images(there.path()).len(), images(remote.path()).len()), (0, 1));
    // Whoever made it takes it back.
    evict(&prefixes, Tier::Stored, u64::MAX);
    assert_eq!((images(here.path()).len(), images(remote.path()).len()), (0, 0));
}
