//! Sessions that have begun with published prefixes, or of which an operator has suspended a sequence, outlast their daemon.

use std::path::Path;
use std::time::Duration;

use kvoyant_client::{Error, Hint, Member, Model, SelectedBy, Sequence, Status};
use kvoyant_daemon::admin::{SuspendOrder, fetch_sequences, suspend_sequence};
use kvoyant_tests::fake::{check_rows, fill_as_prompt as fill, text};
use kvoyant_tests::supervisor::Supervisor;
use kvoyant_tests::{PATIENCE, fake};
use nix::sys::signal::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

const TOKENS: usize = 1000;

fn attach(model: &Model, tokens: &[u32]) -> Sequence {
    model.attach(0, tokens, SelectedBy::Lane).unwrap()
}

#[test]
fn who_has_begun_with_a_published_prefix_reads_it_after_every_restart() {
    let folder = tempfile::tempdir().unwrap();
    let spill = folder.path().display().to_string();
    let spilling = ["--spill", &spill, "--spill-bytes", "64MiB", "--host-percent", "20"];
    for flags in [&["--in-place", "true"][..], &["--slab", "1MiB"], &spilling] {
        let mut daemon = Supervisor::start(DAEMON, flags);
        let tokens = text(1, TOKENS);
        let publisher = fake::connect_at(&daemon.socket(), &["full"]);
        let published = publisher.open(0, 0).unwrap();
        fill(&publisher, &published, 5, TOKENS);
        assert_eq!(publisher.publish(&published, &tokens, false).unwrap(), 992);
        drop((published, publisher));
        let models = [0, 1].map(|_| fake::connect_at(&daemon.socket(), &["quest:budget=20%"]));
        let sequences: Vec<_> = models.iter().map(|model| attach(model, &tokens)).collect();
        let query = vec![0.5; fake::QUERY_HEADS * fake::HEAD_DIM];
        let ask = |model: &Model, sequence: &Sequence| {
            let ready = fake::ask_with(model, sequence, 1, Hint::Query(&query));
            fake::check(&ready, 0, 5, 1).unwrap()
        };
        let named = ask(&models[0], &sequences[0]);
        assert!(named > 0);
        for turn in 0..3 {
            match turn {
                0 => daemon.restart(Signal::SIGKILL),
                1 => daemon.restart(Signal::SIGTERM),
                _ => daemon.takeover(),
            }
            for (model, sequence) in models.iter().zip(&sequences) {
                check_rows(model, sequence, 0..992, 5);
                assert_eq!(
                    ask(model, sequence),
                    named,
                    "{flags:?}: what is selected depends on the rows alone"
                );
                assert_eq!(model.generation(), turn + 1);
            }
            // Two sessions have the same extent, which counts and is stored once.
            assert_eq!(daemon.kinds()["shared"], 1, "{flags:?}");
        }
        // One goes on by itself, and cuts within the prefix: the other one's stays.
        fill(&models[0], &sequences[0], 6, TOKENS + 200);
        let fork = sequences[0].fork(None).unwrap();
        fork.truncate(500).unwrap();
        fill(&models[0], &fork, 7, 700);
        daemon.restart(Signal::SIGKILL);
        check_rows(&models[0], &sequences[0], 0..992, 5);
        check_rows(&models[0], &sequences[0], 992..TOKENS + 200, 6);
        check_rows(&models[0], &fork, 0..500, 5);
        check_rows(&models[0], &fork, 500..700, 7);
        check_rows(&models[1], &sequences[1], 0..992, 5);
        // A prefix of before is not found again without a store, and can be published anew.
        assert_eq!(attach(&models[1], &tokens).tokens(), 0);
        assert_eq!(models[1].publish(&sequences[1], &tokens, false).unwrap(), 992);
        check_rows(&models[1], &attach(&models[1], &tokens), 0..992, 5);
        drop((fork, sequences, models));
        daemon.wait_for("no session", |status| status.totals.sessions == 0);
        // What nobody reads any more goes with the daemon.
        daemon.restart(Signal::SIGTERM);
        daemon.wait_for("nothing", |status| status.arena.used_bytes == 0);
        assert!(daemon.kinds().is_empty(), "{:?}", daemon.kinds());
    }
}

fn order(session: u64, sequence: &str, image: &str) -> SuspendOrder {
    SuspendOrder {
        session,
        sequence: sequence.into(),
        image: image.into(),
        overwrite: true,
        label: String::new(),
    }
}

/// Whether a sequence is still its client's; if it is, its rows are looked at.
fn is_there(model: &Model, sequence: &Sequence, seed: usize) -> bool {
    let member = Member { sequence, position: sequence.tokens(), hint: Hint::None };
    match model.speculate(1, &[member]).unwrap().wait(PATIENCE) {
        Ok(ready) => {
            fake::check(&ready, 0, seed, 1).unwrap();
            true
        }
        Err(Error::NotReady { status: Status::NoSuchSequence, .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

/// Flags of daemons that keep images, without and with a disk to spill to.
fn ways(store: &Path, spill: &Path) -> [Vec<String>; 2] {
    let (store, spill) = (store.display().to_string(), spill.display().to_string());
    let flags = |flags: &[&str]| flags.iter().map(ToString::to_string).collect();
    [
        flags(&["--store", &store, "--in-place", "true"]),
        flags(&["--store", &store, "--spill", &spill, "--spill-bytes", "64MiB", "--host-percent", "10"]),
    ]
}

fn start(flags: &[String]) -> Supervisor {
    Supervisor::start(DAEMON, &flags.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn a_sequence_that_an_operator_has_suspended_stays_so_and_the_others_go_on() {
    let (store, spill) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for flags in ways(store.path(), spill.path()) {
        let mut daemon = start(&flags);
        let model = fake::connect_at(&daemon.socket(), &["full"]);
        let [taken, kept] = [5, 6].map(|seed| {
            let sequence = model.open(0, 0).unwrap();
            fill(&model, &sequence, seed, TOKENS);
            sequence
        });
        model.reserve(&[(&taken, TOKENS + 300)]).unwrap();
        let session = fetch_sequences(&daemon.admin()).unwrap().sequences[0].session;
        let handle = taken.id().to_string();
        suspend_sequence(&daemon.admin(), &order(session, &handle, "taken")).unwrap();
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            daemon.restart(signal);
            // Its client does not know, and tells of more; then it asks.
            fake::fill(&model, &taken, 77, taken.tokens() + 1).unwrap();
            assert!(!is_there(&model, &taken, 5));
            assert!(is_there(&model, &kept, 6));
            check_rows(&model, &kept, 0..TOKENS, 6);
        }
        let (again, _) = model.resume("taken", None, SelectedBy::Lane).unwrap();
        check_rows(&model, &again, 0..TOKENS, 5);
        // What a client that has not noticed writes reaches nobody else's rows.
        fake::fill(&model, &taken, 77, TOKENS + 290).unwrap();
        let other = model.open(0, 0).unwrap();
        fill(&model, &other, 8, TOKENS);
        fake::fill(&model, &taken, 77, TOKENS + 300).unwrap();
        for (sequence, seed) in [(&again, 5), (&kept, 6), (&other, 8)] {
            check_rows(&model, sequence, 0..TOKENS, seed);
        }
        daemon.restart(Signal::SIGKILL);
        // The second question says that the answers of before are not read any more.
        assert!(is_there(&model, &kept, 6) && is_there(&model, &kept, 6));
        taken.close().unwrap();
        drop((again, kept, other));
        daemon.wait_for("all pages to go", |status| {
            status.sessions[0].pages == 0 && status.sessions[0].spilled_pages == 0
        });
    }
}

#[test]
fn a_daemon_that_dies_while_it_suspends_leaves_the_sequence_or_the_image_and_all_others_as_they_are() {
    let (store, spill) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for flags in ways(store.path(), spill.path()) {
        let mut daemon = start(&flags);
        let model = fake::connect_at(&daemon.socket(), &["full"]);
        let kept = model.open(0, 0).unwrap();
        fill(&model, &kept, 6, TOKENS);
        let mut outcomes = [0, 0];
        for turn in 0..12 {
            let seed = 10 + turn;
            let sequence = model.open(0, 0).unwrap();
            fill(&model, &sequence, seed, TOKENS);
            model.reserve(&[(&sequence, TOKENS + 100)]).unwrap();
            let (admin, handle) = (daemon.admin(), sequence.id().to_string());
            let image = format!("turn-{turn}");
            let its = image.clone();
            let operator = std::thread::spawn(move || {
                let session = fetch_sequences(&admin)?.sequences[0].session;
                suspend_sequence(&admin, &order(session, &handle, &its))
            });
            // Told of while it is being suspended, or before, or after.
            std::thread::sleep(Duration::from_micros(1500 * turn as u64));
            if turn % 2 == 1 {
                fake::fill(&model, &sequence, seed, sequence.tokens() + 1).unwrap();
            }
            std::thread::sleep(Duration::from_micros(700 * turn as u64));
            daemon.restart(Signal::SIGKILL);
            let said = operator.join().unwrap();
            let there = is_there(&model, &sequence, seed);
            outcomes[usize::from(there)] += 1;
            if there {
                check_rows(&model, &sequence, 0..sequence.tokens(), seed);
            }
            if said.is_ok() {
                assert!(!there, "{turn}: it was suspended");
                let (again, _) = model.resume(&image, None, SelectedBy::Lane).unwrap();
                check_rows(&model, &again, 0..TOKENS, seed);
            }
            assert!(is_there(&model, &kept, 6));
            check_rows(&model, &kept, 0..TOKENS, 6);
            sequence.close().unwrap();
        }
        assert!(outcomes[1] > 0, "{outcomes:?}: none was its client's afterwards");
        drop(kept);
        daemon.wait_for("all pages to go", |status| status.sessions[0].pages == 0);
    }
}
