//! Sequences of which a tenth is in host memory: what is selected, fetched, forked and cut is what was written, through a real daemon.

use kvoyant_client::{Error, Hint, Member, Sequence, Status};
use kvoyant_protocol::wire::Stat;
use kvoyant_tests::fake::{CHUNK, fill_as_prompt as fill};
use kvoyant_tests::noisy::{QUERY, append_noise, ask, noise, noisy, some_ids, tokens_of};
use kvoyant_tests::{Daemon, PATIENCE, fake};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
/// Pages of 32 rows: 94 of each head.
const TOKENS: usize = 3000;

/// A daemon that keeps a tenth of each session in host memory.
struct Spilling {
    daemon: Daemon,
    folder: tempfile::TempDir,
}

impl Spilling {
    fn start(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display().to_string();
        let mut all = vec!["--spill", &path, "--spill-bytes", "256MiB", "--host-percent", "10"];
        all.extend(flags);
        Self { daemon: Daemon::start(DAEMON, &all), folder }
    }
}

#[test]
fn rows_are_what_was_written_wherever_their_pages_have_been() {
    for flags in [&["--in-place", "true"][..], &[], &["--slab", "1MiB", "--copy-threads", "2"]] {
        let spilling = Spilling::start(flags);
        let model = fake::connect(&spilling.daemon, &["given"]);
        assert!(model.spills());
        let sequence = model.open(0, 0).unwrap();
        fill(&model, &sequence, 3, TOKENS);
        for step in 0..60 {
            let layer = 1 + step % (fake::LAYERS - 1);
            let ids = some_ids(step, 1 + step % 40, TOKENS);
            let ready = fake::ask_with(&model, &sequence, layer, Hint::Ids(&ids));
            let rows = fake::check(&ready, 0, 3, layer).unwrap();
            assert_eq!(rows, ids.len() - fake::KV_HEADS, "{flags:?}: all that were named");
        }
        let status = spilling.daemon.status();
        let session = &status.sessions[0];
        let pages = TOKENS.div_ceil(32) * fake::LAYERS * fake::KV_HEADS;
        assert!(session.spilled_pages as usize > pages / 2, "{session:?}");
        assert!((session.pages + session.spilled_pages) as usize >= pages, "{session:?}");
        assert!((session.pages_peak as usize) < pages / 2, "{flags:?}: {session:?}");
        assert!(model.stat(Stat::PagesRead) > 0 && model.stat(Stat::PagesLost) == 0);
    }
}

#[test]
fn a_layer_that_was_fetched_can_be_read_and_one_that_was_not_says_so() {
    let spilling = Spilling::start(&["--in-place", "true"]);
    let model = fake::connect(&spilling.daemon, &["full"]);
    let sequence = model.open(0, 0).unwrap();
    fill(&model, &sequence, 5, TOKENS);
    let mut rows = vec![0; 2 * fake::HEAD_DIM * 4 * TOKENS];
    let unread = sequence.read_rows(0, 0, 0..TOKENS, &mut rows);
    assert!(matches!(unread, Err(Error::Spilled { layer: 0, .. })), "{unread:?}");
    for layer in 0..fake::LAYERS {
        let lease = model.fetch(layer, &[(&sequence, TOKENS)]).unwrap().wait(PATIENCE).unwrap();
        for head in 0..fake::KV_HEADS {
            sequence.read_rows(layer, head, 0..TOKENS, &mut rows).unwrap();
            for (token, row) in rows.chunks_exact(2 * fake::HEAD_DIM * 4).enumerate() {
                let wanted: Vec<u8> =
                    fake::row(5, layer, head, token).into_iter().flat_map(f32::to_le_bytes).collect();
                assert_eq!(row, wanted, "layer {layer} head {head} token {token}");
            }
        }
        drop(lease);
    }
    assert!(!sequence.take_missed());
    assert!(model.fetch(fake::LAYERS, &[(&sequence, 5)]).is_err());
    // Sinks and window are there in any case.
    sequence.read_rows(2, 1, TOKENS - fake::WINDOW..TOKENS, &mut rows[..fake::WINDOW * 256]).unwrap();
    sequence.read_rows(2, 1, 0..fake::SINKS, &mut rows[..fake::SINKS * 256]).unwrap();
}

#[test]
fn forks_share_what_is_on_disk_and_a_cut_sequence_writes_anew_without_its_relatives_seeing_it() {
    let spilling = Spilling::start(&[]);
    let model = fake::connect(&spilling.daemon, &["given"]);
    let parent = model.open(0, 0).unwrap();
    fill(&model, &parent, 1, TOKENS);
    let child = parent.fork(None).unwrap();
    let other = parent.fork(None).unwrap();
    child.truncate(1501).unwrap();
    fill(&model, &parent, 1, TOKENS + 200);
    let write = |sequence: &Sequence, seed: usize, to: usize| {
        while sequence.tokens() < to {
            let end = (sequence.tokens() + CHUNK).min(to);
            model.reserve(&[(sequence, end)]).unwrap();
            fake::fill(&model, sequence, seed, end).unwrap();
        }
    };
    write(&child, 8, TOKENS);
    for step in 0..30 {
        let layer = 1 + step % (fake::LAYERS - 1);
        let ids = some_ids(step, 20, 1501);
        for sequence in [&parent, &child, &other] {
            let ready = fake::ask_with(&model, sequence, layer, Hint::Ids(&ids));
            fake::check(&ready, 0, 1, layer).unwrap();
        }
        let late: Vec<u32> = [1502, 1531, 1600, 2000 + step as u32].into();
        let ids: Vec<u32> =
            (0..fake::KV_HEADS).flat_map(|_| [4].into_iter().chain(late.iter().copied())).collect();
        for (sequence, seed) in [(&parent, 1), (&child, 8), (&other, 1)] {
            let ready = fake::ask_with(&model, sequence, layer, Hint::Ids(&ids));
            fake::check(&ready, 0, seed, layer).unwrap();
        }
    }
    drop((child, other));
    let ready = fake::ask_with(&model, &parent, 1, Hint::Ids(&some_ids(99, 30, TOKENS)));
    fake::check(&ready, 0, 1, 1).unwrap();
    drop((ready, parent));
    let status = spilling.daemon.wait_for("all pages to go", |status| status.sessions[0].pages == 0);
    assert_eq!(status.sessions[0].spilled_pages, 0, "{status:?}");
}

#[test]
fn every_method_selects_what_it_selects_where_everything_is_in_memory() {
    let methods = [
        "full",
        "infinigen:budget=5%,skew=off",
        "quest:budget=5%,hint=current",
        "kvoyant:budget=5%",
        "kvoyant:budget=5%,hint=ahead",
        "oracle:budget=5%",
        "louver",
        "resv",
        "scout:budget=5%",
        "freekv:budget=5%",
        "shadowkv:budget=5%,keys=moved",
        "dynsplit:budget=5%",
        "random:budget=5%",
        "infinigen:budget=5%,skew=off,pool=50%",
    ];
    for (at, in_place) in ["true", "false"].into_iter().enumerate() {
        let flags = ["--in-place", in_place];
        let (spilling, plain) = (Spilling::start(&flags), Daemon::start(DAEMON, &flags));
        for (nth, method) in methods.into_iter().enumerate() {
            // The first two in both ways, and each of the others in one of them.
            if nth > 1 && nth % 2 != at && !kvoyant_tests::thorough() {
                continue;
            }
            let answers = |daemon: &Daemon| -> Result<Vec<Vec<usize>>, Error> {
                let model = fake::connect(daemon, &[method]);
                let sequence = noisy(&model, 1200);
                if method.starts_with("infinigen") {
                    for layer in 1..fake::LAYERS {
                        model.observe(&sequence, layer, &noise(fake::KV_HEADS * fake::HEAD_DIM, layer))?;
                    }
                }
                let mut all = Vec::new();
                for step in 0..6 {
                    for layer in 1..fake::LAYERS {
                        let query = noise(QUERY, step * 10 + layer);
                        let member =
                            Member { sequence: &sequence, position: 1200, hint: Hint::Query(&query) };
                        let none = Member { hint: Hint::None, ..member };
                        let by_query = method != "full";
                        let member = if by_query { member } else { none };
                        let ready = model.speculate(layer, &[member])?.wait(PATIENCE)?;
                        if method.starts_with("scout") {
                            // Which rows its lane attends itself depends on what has come to the slab by then.
                            all.push(vec![ready.completion().rows_selected as usize]);
                        } else {
                            all.extend((0..fake::KV_HEADS).map(|head| tokens_of(&ready, head)));
                        }
                    }
                }
                Ok(all)
            };
            let (spilled, kept) = (answers(&spilling.daemon), answers(&plain));
            for daemon in [&spilling.daemon, &plain] {
                daemon.wait_for("the session to end", |status| status.sessions.is_empty());
            }
            match (spilled, kept) {
                (Ok(spilled), Ok(kept)) => assert_eq!(spilled, kept, "{method}, in place: {in_place}"),
                (spilled, kept) => panic!("{method}: {:?} and {:?}", spilled.err(), kept.err()),
            }
        }
    }
}

#[test]
fn an_arena_that_is_full_makes_room_on_disk_and_says_so_once_that_is_full_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display().to_string();
    let daemon = Daemon::start(
        DAEMON,
        &["--arena", "64MiB", "--spill", &path, "--spill-bytes", "256MiB", "--in-place", "true"],
    );
    let model = fake::connect(&daemon, &["given"]);
    // Each has 46 MiB.
    let sequences: Vec<Sequence> = (0..5).map(|_| model.open(0, 0).unwrap()).collect();
    let tokens = 30_000;
    for (seed, sequence) in sequences.iter().enumerate() {
        while sequence.tokens() < tokens {
            let end = (sequence.tokens() + 1000).min(tokens);
            model.reserve(&[(sequence, end)]).unwrap();
            fake::fill(&model, sequence, seed, end).unwrap();
        }
    }
    for step in 0..40 {
        let (layer, seed) = (1 + step % (fake::LAYERS - 1), step % sequences.len());
        let ready = fake::ask_with(&model, &sequences[seed], layer, Hint::Ids(&some_ids(step, 50, tokens)));
        fake::check(&ready, 0, seed, layer).unwrap();
    }
    let more = model.open(0, 0).unwrap();
    let mut refused = None;
    while refused.is_none() && more.tokens() < 200_000 {
        let end = more.tokens() + 1000;
        match model.reserve(&[(&more, end)]) {
            Ok(()) => fake::fill(&model, &more, 9, end).unwrap(),
            Err(error) => refused = Some(error.to_string()),
        }
    }
    let refused = refused.expect("five times 46 MiB and more do not fit into 64 and 256");
    assert!(refused.contains("the arena is full"), "{refused}");
    let ready = fake::ask_with(&model, &sequences[0], 1, Hint::Ids(&some_ids(77, 50, tokens)));
    fake::check(&ready, 0, 0, 1).unwrap();
}

/// Writes noise over all pages that are on disk.
fn spoil(spilling: &Spilling) {
    let file = spilling.folder.path().join("kvoyant-spill-0");
    let len = std::fs::metadata(&file).unwrap().len();
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    let noise: Vec<u8> = (0..1 << 20).map(|i| (i * 31 % 251) as u8).collect();
    // The first block says whose it is.
    let mut at = 1 << 20;
    while at < len {
        let bytes = &noise[..(len - at).min(1 << 20) as usize];
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).unwrap();
        at += bytes.len() as u64;
    }
}

#[test]
fn pages_that_the_disk_has_lost_are_named_and_nothing_else_ends() {
    for flags in [&["--in-place", "true"][..], &[]] {
        let spilling = Spilling::start(flags);
        let model = fake::connect(&spilling.daemon, &["given"]);
        let sequence = model.open(0, 0).unwrap();
        fill(&model, &sequence, 3, TOKENS);
        let kept = sequence.fork(None).unwrap();
        spoil(&spilling);
        let member = |sequence, ids| Member { sequence, position: TOKENS, hint: Hint::Ids(ids) };
        let ids = some_ids(1, 40, TOKENS);
        let answered = model.speculate(1, &[member(&sequence, &ids)]).unwrap().wait(PATIENCE);
        assert!(
            matches!(answered, Err(Error::NotReady { status: Status::RowsLost, .. })),
            "{flags:?}: {answered:?}"
        );
        let fetched = model.fetch(0, &[(&sequence, TOKENS)]).unwrap().wait(PATIENCE);
        assert!(fetched.is_err(), "a layer that is lost cannot be fetched");
        let lost = sequence.first_lost().expect("the table says which");
        assert!(lost < TOKENS && lost.is_multiple_of(32));
        assert_eq!(kept.first_lost(), Some(lost), "a fork has lost what it shares");
        let mut rows = vec![0; 256];
        let read = sequence.read_rows(0, 0, lost..lost + 1, &mut rows);
        assert!(read.is_err(), "{read:?}");
        // Another sequence of the session sees nothing.
        let other = model.open(0, 0).unwrap();
        fill(&model, &other, 6, 200);
        fake::check(&fake::ask_with(&model, &other, 1, Hint::Ids(&some_ids(2, 20, 200))), 0, 6, 1).unwrap();
        // What was lost is dropped and written again.
        sequence.truncate(0).unwrap();
        fill(&model, &sequence, 9, TOKENS);
        let ready = fake::ask_with(&model, &sequence, 1, Hint::Ids(&ids));
        fake::check(&ready, 0, 9, 1).unwrap();
        assert!(model.stat(Stat::PagesLost) > 0);
    }
}

#[test]
fn what_a_selection_that_failed_has_left_is_in_nobody_elses_estimate() {
    let spilling = Spilling::start(&[]);
    let model = fake::connect(&spilling.daemon, &["kvoyant:budget=50%,scope=head"]);
    let (short, long) = (noisy(&model, 400), model.open(0, 0).unwrap());
    for tokens in (300..=3000).step_by(300) {
        append_noise(&model, &long, tokens);
    }
    spoil(&spilling);
    let query = noise(QUERY, 5);
    for _ in 0..2 {
        let answered = ask(&model, &short, 1, Hint::Query(&query));
        assert!(matches!(answered, Err(Error::NotReady { status: Status::RowsLost, .. })), "{answered:?}");
    }
    let member = Member { sequence: &long, position: long.tokens(), hint: Hint::Query(&query) };
    let rest = model.rest(1, &[member]).unwrap().wait(PATIENCE);
    assert!(matches!(rest, Ok(_) | Err(Error::NotReady { .. })), "{rest:?}");
    assert_eq!(spilling.daemon.status().sessions.len(), 1, "the daemon is there, and so is the session");
}

#[test]
fn a_page_that_was_cut_while_it_was_shared_is_written_anew_before_it_leaves() {
    let spilling = Spilling::start(&["--in-place", "true"]);
    let model = fake::connect(&spilling.daemon, &["given"]);
    let first = model.open(0, 0).unwrap();
    fill(&model, &first, 1, TOKENS);
    // Its pages are on disk, and in memory too once they were fetched.
    let lease = model.fetch(1, &[(&first, TOKENS)]).unwrap().wait(PATIENCE).unwrap();
    let second = first.fork(None).unwrap();
    second.truncate(1510).unwrap();
    drop(lease);
    drop(first);
    let mut tokens = 1510;
    while tokens < TOKENS {
        tokens = (tokens + CHUNK).min(TOKENS);
        model.reserve(&[(&second, tokens)]).unwrap();
        fake::fill(&model, &second, 8, tokens).unwrap();
    }
    let other = model.open(0, 0).unwrap();
    fill(&model, &other, 3, TOKENS);
    for (seed, from, to) in [(1, fake::SINKS, 1510), (8, 1510, TOKENS - fake::WINDOW)] {
        for layer in 1..fake::LAYERS {
            let ids: Vec<u32> = (from as u32..to as u32).collect();
            let ids: Vec<u32> =
                (0..fake::KV_HEADS).flat_map(|_| [ids.len() as u32].into_iter().chain(ids.clone())).collect();
            let ready = fake::ask_with(&model, &second, layer, Hint::Ids(&ids));
            fake::check(&ready, 0, seed, layer).unwrap();
        }
    }
    assert_eq!(second.first_lost(), None);
}
