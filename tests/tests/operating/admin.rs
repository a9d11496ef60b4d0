//! The admin socket: what it shows of sequences and images, what operators do with them, and whom it refuses.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kvoyant_client::{Error, Hint, Member, Model, SelectedBy, Sequence, Status};
use kvoyant_daemon::admin::{
    AdminError, BringOrder, ImageReport, LanesReport, SequencesReport, SuspendOrder, bring_image,
    fetch_sequences, remove_image, suspend_sequence,
};
use kvoyant_daemon::keeper::Kept;
use kvoyant_tests::{Daemon, PATIENCE, fake, wait_until};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const CLIENT: &str = env!("CARGO_BIN_EXE_client-under-test");
/// Pages of 32 rows: 32 of each head.
const TOKENS: usize = 1000;
/// Somebody who has nothing here.
const STRANGER: u32 = 65_533;

fn start(store: &Path, flags: &[&str]) -> Daemon {
    let store = store.display().to_string();
    let mut all = vec!["--store", &store];
    all.extend(flags);
    Daemon::start(DAEMON, &all)
}

fn me() -> u32 {
    nix::unistd::geteuid().as_raw()
}

fn open(model: &Model, seed: usize) -> Sequence {
    let sequence = model.open(0, 0).unwrap();
    fill(model, &sequence, seed, TOKENS);
    sequence
}

fn fill(model: &Model, sequence: &Sequence, seed: usize, tokens: usize) {
    while sequence.tokens() < tokens {
        let end = (sequence.tokens() + 100).min(tokens);
        model.reserve(&[(sequence, end)]).unwrap();
        fake::fill(model, sequence, seed, end).unwrap();
    }
}

fn order(session: u64, sequence: &str, image: &str) -> SuspendOrder {
    SuspendOrder {
        session,
        sequence: sequence.into(),
        image: image.into(),
        overwrite: false,
        label: "by an operator".into(),
    }
}

/// The HTTP status and the sentence of a refusal.
fn refused<T: std::fmt::Debug>(result: Result<T, AdminError>) -> (u16, String) {
    match result {
        Err(AdminError::Refused { status, reason }) => (status, reason),
        other => panic!("{other:?} is no refusal"),
    }
}

fn list(daemon: &Daemon) -> SequencesReport {
    fetch_sequences(&daemon.admin()).unwrap()
}

fn image(daemon: &Daemon, name: &str) -> Option<ImageReport> {
    list(daemon).images.into_iter().find(|image| image.name == name)
}

/// Checks rows of every layer of a sequence.
fn check(model: &Model, sequence: &Sequence, seed: usize) {
    for layer in 1..fake::LAYERS {
        let member = Member { sequence, position: sequence.tokens(), hint: Hint::None };
        let ready = model.speculate(layer, &[member]).unwrap().wait(PATIENCE).unwrap();
        assert!(fake::check(&ready, 0, seed, layer).unwrap() > 0);
    }
}

/// Speaks HTTP by hand; the status and the answer.
fn raw(daemon: &Daemon, request: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(daemon.admin()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // One that has been refused already may not read to the end.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no answer: {answer:?}")), answer)
}

fn post(daemon: &Daemon, path: &str, body: &str) -> (u16, String) {
    let length = body.len();
    raw(
        daemon,
        &format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        ),
    )
}

#[test]
fn open_sequences_and_images_are_listed_with_where_their_pages_are() {
    let store = tempfile::tempdir().unwrap();
    let spill = tempfile::tempdir().unwrap();
    let spill = spill.path().display().to_string();
    let daemon = start(
        store.path(),
        &["--spill", &spill, "--spill-bytes", "64MiB", "--host-percent", "10", "--lanes", "2"],
    );
    let (one, two) = (fake::connect(&daemon, &["full"]), fake::connect(&daemon, &["quest:budget=5%"]));
    let (a, b, c) = (open(&one, 1), open(&one, 2), open(&two, 3));
    // Lanes count what was appended, and pages leave, a while after the client knows.
    wait_until("rows are counted and pages have left", || {
        let open = list(&daemon).sequences;
        open.iter().all(|open| open.tokens == TOKENS as u64)
            && open.iter().any(|open| open.spilled_pages > Some(0))
            && daemon.status().spill[0].writes > 0
    });
    let report = list(&daemon);
    assert!(report.keeps_images && report.images.is_empty());
    let pages = (TOKENS.div_ceil(32) * fake::LAYERS * fake::KV_HEADS) as u64;
    let found: Vec<_> = report.sequences.iter().map(|open| open.sequence.clone()).collect();
    assert_eq!(found, [a.id().to_string(), b.id().to_string(), c.id().to_string()]);
    for open in &report.sequences {
        assert_eq!((open.uid, open.tokens), (me(), TOKENS as u64), "{open:?}");
        let (here, away) = (open.pages.unwrap(), open.spilled_pages.unwrap());
        assert!(here + away >= pages && here > 0, "{open:?}");
    }
    assert!(report.sequences.iter().any(|open| open.spilled_pages > Some(0)), "{report:?}");
    assert_eq!((report.sequences[0].method.as_str(), report.sequences[0].session), ("full", 1));
    assert!(report.sequences[2].method.starts_with("quest:"), "{report:?}");

    let status = daemon.status();
    assert_eq!(status.spill.len(), 1);
    let device = &status.spill[0];
    assert!(device.path.starts_with(&spill) && device.used_bytes > 0 && device.writes > 0, "{device:?}");
    let kept = status.store.unwrap();
    assert_eq!((kept.folder.as_path(), kept.remote, kept.waiting), (store.path(), None, 0));

    a.suspend("kept", false, "a note").map_err(|(_, error)| error).unwrap();
    let image = image(&daemon, "kept").unwrap();
    assert_eq!((image.uid, image.tokens), (Some(me()), Some(TOKENS as u32)));
    assert_eq!((image.kind.as_deref(), image.label.as_deref()), (Some("sequence"), Some("a note")));
    assert!(image.bytes > pages * 4096 && image.kept == Kept::Here && image.damaged.is_none(), "{image:?}");
    assert_eq!(list(&daemon).sequences.len(), 2);
    drop((b, c));
}

#[test]
fn an_operator_suspends_a_sequence_whose_client_goes_on_and_nothing_else_of_it_ends() {
    let store = tempfile::tempdir().unwrap();
    let spill = tempfile::tempdir().unwrap();
    let spill = spill.path().display().to_string();
    let spilling: &[&str] = &["--spill", &spill, "--spill-bytes", "64MiB", "--host-percent", "10"];
    for (round, flags) in [&["--in-place", "true"][..], &[], spilling].into_iter().enumerate() {
        let daemon = start(store.path(), flags);
        let model = fake::connect(&daemon, &["full"]);
        let (taken, kept) = (open(&model, 5), open(&model, 6));
        // Room that nothing is written to yet.
        model.reserve(&[(&taken, TOKENS + 300)]).unwrap();
        let session = list(&daemon).sequences[0].session;
        let name = format!("taken-{round}");
        let done =
            suspend_sequence(&daemon.admin(), &order(session, &taken.id().to_string(), &name)).unwrap();
        assert_eq!((done.image.as_str(), done.uid), (name.as_str(), me()));
        // Its client does not know, and tells of more; then it asks.
        fake::fill(&model, &taken, 5, TOKENS + 1).unwrap();
        let member = Member { sequence: &taken, position: TOKENS + 1, hint: Hint::None };
        let asked = model.speculate(1, &[member]).unwrap().wait(PATIENCE);
        assert!(
            matches!(asked, Err(Error::NotReady { status: Status::NoSuchSequence, .. })),
            "{flags:?}: {asked:?}"
        );
        let reserved = model.reserve(&[(&taken, TOKENS + 900)]);
        assert!(matches!(reserved, Err(Error::Failed(_))), "{reserved:?}");
        // The other one goes on.
        fill(&model, &kept, 6, TOKENS + 100);
        check(&model, &kept, 6);
        assert_eq!(list(&daemon).sequences.len(), 1);
        let (again, _) = model.resume(&name, None, SelectedBy::Lane).unwrap();
        assert_eq!(again.tokens(), TOKENS);
        check(&model, &again, 5);
        fill(&model, &again, 5, TOKENS + 100);
        // What a client that has not noticed writes reaches nobody else's rows.
        fake::fill(&model, &taken, 77, TOKENS + 290).unwrap();
        let others: Vec<_> = (10..14).map(|seed| (open(&model, seed), seed)).collect();
        fake::fill(&model, &taken, 77, TOKENS + 300).unwrap();
        check(&model, &again, 5);
        check(&model, &kept, 6);
        others.iter().for_each(|(sequence, seed)| check(&model, sequence, *seed));
        drop(others);
        assert_eq!(image(&daemon, &name).unwrap().label.as_deref(), Some("by an operator"));
        // Nothing of it is left once its client has closed it.
        taken.close().unwrap();
        drop((again, kept));
        daemon.wait_for("all pages to go", |status| status.sessions[0].pages == 0);
    }
}

#[test]
fn a_sequence_is_suspended_while_its_client_decodes_and_the_image_is_of_one_moment() {
    let store = tempfile::tempdir().unwrap();
    let daemon = start(store.path(), &["--in-place", "true"]);
    let model = fake::connect(&daemon, &["full"]);
    let sequence = open(&model, 7);
    model.reserve(&[(&sequence, 20_000)]).unwrap();
    let (admin, handle) = (daemon.admin(), sequence.id().to_string());
    let operator = std::thread::spawn(move || suspend_sequence(&admin, &order(1, &handle, "moment")));
    let mut gone = false;
    while !gone && sequence.tokens() < 20_000 {
        fake::fill(&model, &sequence, 7, sequence.tokens() + 1).unwrap();
        let member = Member { sequence: &sequence, position: sequence.tokens(), hint: Hint::None };
        gone = match model.speculate(1, &[member]).unwrap().wait(PATIENCE) {
            Ok(_) => false,
            Err(Error::NotReady { status: Status::NoSuchSequence, .. }) => true,
            Err(error) => panic!("{error}"),
        };
    }
    operator.join().unwrap().unwrap();
    assert!(gone, "its client was never told");
    let (again, _) = model.resume("moment", None, SelectedBy::Lane).unwrap();
    assert!((TOKENS..=sequence.tokens()).contains(&again.tokens()), "{}", again.tokens());
    check(&model, &again, 7);
}

#[test]
fn what_cannot_be_is_refused_with_its_status_and_what_to_do() {
    let store = tempfile::tempdir().unwrap();
    let daemon = start(store.path(), &[]);
    let model = fake::connect(&daemon, &["full"]);
    let sequence = open(&model, 1);
    let (admin, handle) = (daemon.admin(), sequence.id().to_string());
    let suspend = |session, sequence: &str, image: &str| {
        refused(suspend_sequence(&admin, &order(session, sequence, image)))
    };
    let (status, why) = suspend(99, &handle, "one");
    assert!(status == 404 && why.contains("session 99") && why.contains("kvoyant sequences"), "{why}");
    let (status, why) = suspend(1, "900.3", "one");
    assert!(status == 404 && why.contains("900.3"), "{why}");
    for bad in ["", "1", "x.y", "1.2.3"] {
        let (status, why) = suspend(1, bad, "one");
        assert!(status == 400 && why.contains("3.0"), "{why}");
    }
    for bad in ["", ".hidden", "a/b", "ä"] {
        let (status, why) = suspend(1, &handle, bad);
        assert!(status == 400 && why.contains("image"), "{why}");
    }
    let long = SuspendOrder { label: "x".repeat(2000), ..order(1, &handle, "one") };
    assert_eq!(refused(suspend_sequence(&admin, &long)).0, 400);
    model.open(0, 10).unwrap().suspend("taken", false, "").map_err(|(_, error)| error).unwrap();
    let (status, why) = suspend(1, &handle, "taken");
    assert!(status == 409 && why.contains("taken") && why.contains("overwrite"), "{why}");
    let over = SuspendOrder { overwrite: true, ..order(1, &handle, "taken") };
    suspend_sequence(&admin, &over).unwrap();
    assert_eq!(image(&daemon, "taken").unwrap().tokens, Some(TOKENS as u32));

    let bring = |image: &str| refused(bring_image(&admin, &BringOrder { image: image.into(), uid: None }));
    let (status, why) = bring("none");
    assert!(status == 404 && why.contains("none"), "{why}");
    assert_eq!(bring("../up").0, 400);
    assert_eq!(refused(remove_image(&admin, me(), "none")).0, 404);
    assert_eq!(refused(remove_image(&admin, me(), "../none")).0, 400);
    // A byte of a page that somebody has changed.
    let pages = store.path().join(format!("u{}.taken/pages", me()));
    let mut bytes = std::fs::read(&pages).unwrap();
    bytes[20_000] ^= 1;
    std::fs::write(&pages, bytes).unwrap();
    let (status, why) = bring("taken");
    assert!(status == 409 && why.contains("CRC-32C") && why.contains("remove it"), "{why}");
    std::fs::remove_file(&pages).unwrap();
    let damaged = image(&daemon, "taken").unwrap();
    assert!(damaged.damaged.is_some_and(|why| why.contains("pages")));
    remove_image(&admin, me(), "taken").unwrap();

    let none = Daemon::start(DAEMON, &[]);
    let (status, why) = refused(remove_image(&none.admin(), me(), "one"));
    assert!(status == 503 && why.contains("`store`"), "{why}");
    assert!(!list(&none).keeps_images);
}

const HEALTH: &str = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

#[test]
fn however_many_ask_for_the_health_lanes_are_asked_a_few_times_a_second() {
    // Who asks, and how often.
    const ASK: usize = 16;
    const TIMES: usize = 40;
    let daemon = Daemon::start(DAEMON, &["--lanes", "2"]);
    let model = fake::connect(&daemon, &["full"]);
    let sequence = open(&model, 3);
    // The lane without sessions: whatever else it does, it makes ten rounds a second, and some for each command.
    let rounds = || {
        let request = "GET /v1/lanes HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let (_, answer) = raw(&daemon, request);
        let report: LanesReport = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        report.lanes.iter().find(|lane| lane.sessions.is_empty()).unwrap().rounds
    };
    let (before, since) = (rounds(), Instant::now());
    std::thread::scope(|scope| {
        let ask = || (0..TIMES).filter(|_| raw(&daemon, HEALTH).0 == 200).count();
        let asking: Vec<_> = (0..ASK).map(|_| scope.spawn(ask)).collect();
        for _ in 0..10 {
            check(&model, &sequence, 3);
        }
        let answered: usize = asking.into_iter().map(|asks| asks.join().unwrap()).sum();
        assert_eq!(answered, ASK * TIMES);
    });
    let (made, took) = (rounds() - before, since.elapsed());
    assert!((made as f64) < 40.0 + 40.0 * took.as_secs_f64(), "{made} rounds within {took:?}");
}

#[test]
fn a_lane_that_stands_still_is_not_well_whoever_asks_and_an_idle_one_is() {
    let daemon = Daemon::start(DAEMON, &["--lanes", "2"]);
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(raw(&daemon, HEALTH).0, 200);
    }
    let wedged = Daemon::start_failing(DAEMON, "wedge:1", &["--lanes", "2"]);
    let since = Instant::now();
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..8).map(|_| scope.spawn(|| raw(&wedged, HEALTH))).collect();
        for asks in asking {
            let (status, answer) = asks.join().unwrap();
            assert!(status == 503 && answer.contains("lanes did not answer within"), "{answer}");
        }
    });
    // They have waited together, and not one after the other.
    assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
    assert_eq!(raw(&wedged, HEALTH).0, 503, "what nobody waited for any more is not taken for an answer");
}

#[test]
fn what_is_no_request_is_refused_and_the_daemon_goes_on() {
    let store = tempfile::tempdir().unwrap();
    let daemon = start(store.path(), &[]);
    let get =
        |path: &str| raw(&daemon, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
    assert_eq!(get("/v1/status").0, 200);
    assert_eq!(get("/v1/nothing").0, 404);
    assert_eq!(get("/v1/sequences/suspend").0, 405);
    assert_eq!(get("/v1/images/0/name").0, 405);
    for body in
        ["", "{", "[]", "{\"session\":1}", "{\"session\":1,\"sequence\":\"0.0\",\"image\":\"a\",\"b\":1}"]
    {
        let (status, answer) = post(&daemon, "/v1/sequences/suspend", body);
        assert!(status == 400 && answer.contains("{\"error\":"), "{body}: {answer}");
    }
    let (status, answer) = post(&daemon, "/v1/images/bring", &" ".repeat(100_000));
    assert_eq!(status, 413, "{answer}");
    let (status, answer) =
        raw(&daemon, "DELETE /v1/images/root/name HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(status == 400 && answer.contains("root"), "{answer}");
    assert_eq!(get("/v1/sequences").0, 200);
}

#[test]
fn an_image_is_brought_from_a_remote_store_and_erased_in_both_places() {
    let (here, there, remote) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let url = format!("file://{}", remote.path().display());
    let daemon = start(here.path(), &["--remote", &url]);
    let model = fake::connect(&daemon, &["full"]);
    open(&model, 4).suspend("moved", false, "").map_err(|(_, error)| error).unwrap();
    wait_until("the copy", || image(&daemon, "moved").is_some_and(|image| image.kept == Kept::Both));
    let kept = daemon.wait_for("nothing left to copy", |status| {
        status.store.as_ref().is_some_and(|store| store.waiting == 0)
    });
    let kept = kept.store.unwrap();
    assert_eq!((kept.remote, kept.remote_error), (Some(url.clone()), None));

    let other = start(there.path(), &["--remote", &url]);
    assert_eq!(image(&other, "moved").unwrap().kept, Kept::Remotely);
    let order = BringOrder { image: "moved".into(), uid: None };
    let brought = bring_image(&other.admin(), &order).unwrap();
    assert_eq!((brought.kept, brought.tokens), (Kept::Both, Some(TOKENS as u32)));
    let model = fake::connect(&other, &["full"]);
    let (sequence, _) = model.resume("moved", None, SelectedBy::Lane).unwrap();
    check(&model, &sequence, 4);

    remove_image(&other.admin(), me(), "moved").unwrap();
    assert_eq!(image(&other, "moved"), None);
    assert_eq!(image(&daemon, "moved").unwrap().kept, Kept::Here, "another machine's folder is its own");
    assert!(!std::fs::exists(there.path().join(format!("u{}.moved", me()))).unwrap());
    remove_image(&daemon.admin(), me(), "moved").unwrap();
    assert_eq!(refused(remove_image(&daemon.admin(), me(), "moved")).0, 404);
}

#[test]
fn a_remote_store_that_is_dead_is_named_and_what_is_here_is_served() {
    let store = tempfile::tempdir().unwrap();
    // Nobody listens there.
    let daemon = start(store.path(), &["--remote", "redis://me:hunter2@127.0.0.1:9/0"]);
    let model = fake::connect(&daemon, &["full"]);
    open(&model, 4).suspend("kept", false, "").map_err(|(_, error)| error).unwrap();
    let report = list(&daemon);
    assert_eq!(report.images.len(), 1);
    assert!(report.remote_error.as_ref().is_some_and(|error| error.contains("127.0.0.1:9")), "{report:?}");
    let status = daemon.wait_for("an error", |status| {
        status.store.as_ref().is_some_and(|store| store.remote_error.is_some())
    });
    let kept = status.store.unwrap();
    assert_eq!(kept.waiting, 1, "{kept:?}");
    assert!(!format!("{kept:?} {report:?}").contains("hunter2"), "{kept:?}");
    let (status, why) = refused(bring_image(&daemon.admin(), &BringOrder { image: "far".into(), uid: None }));
    assert!(status == 503 && why.contains("cannot be reached"), "{why}");
    let (status, why) = refused(remove_image(&daemon.admin(), me(), "kept"));
    assert!(status == 503 && why.contains("erased on this machine"), "{why}");
    assert!(list(&daemon).images.is_empty());
    let (sequence, _) = {
        let sequence = open(&model, 9);
        sequence.suspend("again", false, "").map_err(|(_, error)| error).unwrap();
        model.resume("again", None, SelectedBy::Lane).unwrap()
    };
    check(&model, &sequence, 9);
}

#[test]
fn a_stranger_sees_nothing_of_others_and_changes_nothing() {
    if me() != 0 {
        // Who may what is a unit test of its own; only root can become somebody else.
        assert!(!nix::unistd::geteuid().is_root());
        return;
    }
    let store = tempfile::tempdir().unwrap();
    let daemon = start(store.path(), &[]);
    let model = fake::connect(&daemon, &["full"]);
    let sequence = open(&model, 4);
    sequence.fork(None).unwrap().suspend("mine", false, "").map_err(|(_, error)| error).unwrap();
    let open_up = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open_up(daemon.folder(), 0o755);
    open_up(&daemon.admin(), 0o666);
    // Folders above the program may be closed to strangers.
    let program = daemon.folder().join("stranger");
    std::fs::copy(CLIENT, &program).unwrap();
    open_up(&program, 0o755);
    let mut stranger = Command::new(&program);
    stranger.arg(daemon.admin()).args(["meddle", "0", "1", &sequence.id().to_string(), "mine"]);
    stranger.uid(STRANGER).gid(STRANGER);
    // A child of another test has the copy open for writing until it has begun its own program.
    let out = loop {
        match stranger.output() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(Duration::from_millis(5));
            }
            out => break out.unwrap(),
        }
    };
    let said = String::from_utf8(out.stdout).unwrap();
    assert_eq!(
        said.lines().collect::<Vec<_>>(),
        [
            "1 sessions, 0 sequences, 0 images",
            "suspend 403",
            "bring 403",
            "bring own 404",
            "rm 403",
            "evict 403",
            "evict all 403",
            "drain 403",
            "undrain 403",
            "set 403",
            "reload 403",
            "log 403",
            "look done",
        ],
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert_eq!((list(&daemon).sequences.len(), list(&daemon).images.len()), (1, 1));
    check(&model, &sequence, 4);
}
