//! Several users, one daemon: who may connect, who may have how much, and that nobody sees or starves anybody else.

use std::os::unix::fs::PermissionsExt;

use kvoyant_daemon::status::StatusReport;
use kvoyant_protocol::quota::Quota;
use kvoyant_tests::Daemon;
use kvoyant_tests::person::{Person, can_be_others};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const PERSON: &str = env!("CARGO_BIN_EXE_person-under-test");

/// Users and groups that nobody has.
const ANNA: u32 = 61_001;
const BEN: u32 = 61_002;
const GUESTS: u32 = 61_100;

/// A daemon that every user can reach.
fn open_to_all(flags: &[&str]) -> Daemon {
    let daemon = Daemon::start(DAEMON, flags);
    let allow = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    allow(daemon.folder(), 0o755);
    allow(&daemon.socket(), 0o666);
    allow(&daemon.admin(), 0o666);
    daemon
}

fn person(daemon: &Daemon, uid: u32) -> Person {
    Person::new(PERSON, &daemon.socket(), uid, uid, &[])
}

#[test]
fn only_users_and_groups_in_the_allow_lists_get_a_session_and_others_hear_why_not() {
    let own = nix::unistd::geteuid().as_raw();
    let daemon = open_to_all(&["--allow-users", "61001", "--allow-groups", "61100"]);
    // The daemon's own user could do anything anyway.
    person(&daemon, own).must("connect");
    if !can_be_others() {
        return;
    }
    person(&daemon, ANNA).must("connect");
    let refused = person(&daemon, BEN).does("connect").unwrap_err();
    assert!(refused.contains("user 61002 may not connect"), "{refused}");
    // By their group, and by one more of theirs.
    Person::new(PERSON, &daemon.socket(), BEN, GUESTS, &[]).must("connect");
    Person::new(PERSON, &daemon.socket(), BEN, BEN, &[5, GUESTS]).must("connect");
    let status = daemon.wait_for("no session", |status| status.sessions.is_empty());
    assert_eq!((status.access.refused, status.access.allow_users.as_slice()), (1, [ANNA].as_slice()));
    assert_eq!(status.access.allow_groups, [GUESTS]);
    let uids: Vec<_> = status.users.iter().map(|user| user.uid).collect();
    assert_eq!(uids, [own, ANNA, BEN]);
    assert!(status.users.iter().all(|user| user.held(Quota::Sessions) == 0));
}

/// A daemon with this in its configuration file, and flags.
fn with_file(text: &str, flags: &[&str]) -> (tempfile::TempDir, Daemon) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("kvoyantd.toml");
    std::fs::write(&file, text).unwrap();
    let daemon = open_to_all(&[&["--config", file.to_str().unwrap()], flags].concat());
    (folder, daemon)
}

/// The user who has a test's larger quotas, and another one if there can be one.
fn users() -> (u32, Option<u32>) {
    if can_be_others() { (ANNA, Some(BEN)) } else { (nix::unistd::geteuid().as_raw(), None) }
}

fn held(daemon: &Daemon, uid: u32, quota: Quota) -> u64 {
    daemon.status().users.iter().find(|user| user.uid == uid).map_or(0, |user| user.held(quota))
}

/// Nobody has anything.
fn is_empty(status: &StatusReport) -> bool {
    status.sessions.is_empty()
        && status.arena.used_bytes == 0
        && status.users.iter().all(|user| user.uses.values().all(|used| used.held == 0))
}

/// Tokens of the fake model for which an extent has room.
const EXTENT_TOKENS: usize = 40_000;

fn room(person: &mut Person) -> Result<String, String> {
    person.does(&format!("room {EXTENT_TOKENS}"))
}

#[test]
fn a_user_over_quota_hears_which_what_they_hold_and_what_would_help_and_others_go_on() {
    let (anna, ben) = users();
    let text = format!(
        "[quotas]\nhost = \"64MiB\"\nsequences = 2\nsessions = 1\n[quotas.user.{anna}]\nhost = \"192MiB\"\nsequences = 5\nsessions = 2\n"
    );
    let (_folder, daemon) = with_file(&text, &[]);
    let mut rich = person(&daemon, anna);
    rich.must("connect");
    for _ in 0..3 {
        room(&mut rich).unwrap();
    }
    let said = room(&mut rich).unwrap_err();
    for part in [
        &format!("user {anna} may have 192.0 MiB of host memory"),
        "`host`",
        "has 192.0 MiB",
        "64.0 MiB more",
        "closing",
    ] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
    // What a sequence gives back in the session is there for the next one, and forks share pages.
    rich.must("close");
    room(&mut rich).unwrap();
    rich.must("fork");
    rich.must("fork");
    let said = rich.does("fork").unwrap_err();
    assert!(said.contains("5 sequences (the daemon's quota `sequences`), has 5"), "{said}");
    // All sessions of the user together.
    rich.must("connect");
    let said = rich.does("room 10").unwrap_err();
    assert!(said.contains("`sequences`"), "{said}");
    let said = rich.does("connect").unwrap_err();
    assert!(
        said.contains("2 sessions (the daemon's quota `sessions`), has 2 and asked for 1 more; end one"),
        "{said}"
    );
    assert_eq!(held(&daemon, anna, Quota::Host), 192 << 20);
    if let Some(ben) = ben {
        let mut poor = person(&daemon, ben);
        poor.must("connect");
        poor.must("open 300");
        assert!(poor.must("ask").parse::<usize>().unwrap() > 0);
        assert!(poor.does("connect").unwrap_err().contains("1 sessions"));
        let said = poor.does("reserve 80000").unwrap_err();
        assert!(said.contains("64.0 MiB of host memory"), "{said}");
        poor.must("ask");
        let status = daemon.status();
        let user = status.users.iter().find(|user| user.uid == ben).unwrap();
        let host = user.uses[&Quota::Host];
        assert_eq!((host.held, host.limit, host.refused), (64 << 20, Some(64 << 20), 1));
    }
    drop(rich);
    daemon.wait_for("an empty daemon", is_empty);
}

#[test]
fn device_memory_rings_tables_and_requests_under_way_have_quotas_too() {
    let (user, _) = users();
    for (quota, limit, order, said) in [
        ("device", "\"100MiB\"", "connect", "of device memory"),
        ("rings", "\"64KiB\"", "connect", "of rings"),
        ("tables", "\"1MiB\"", "connect", "of tables and digests"),
        ("tables", "\"16MiB\"", "open 300", "of tables and digests"),
        ("in_flight", "0", "ask", "quota in_flight"),
    ] {
        let (_folder, daemon) = with_file(&format!("[quotas]\n{quota} = {limit}\n"), &[]);
        let mut person = person(&daemon, user);
        let mut heard = Err(String::new());
        for step in ["connect", "open 300", "ask"] {
            heard = person.does(step);
            if step == order {
                break;
            }
            assert!(heard.is_ok(), "{quota}: {step}: {heard:?}");
        }
        let heard = heard.expect_err(quota);
        assert!(heard.contains(said), "{quota}: {heard}");
        drop(person);
        let status = daemon.wait_for("an empty daemon", is_empty);
        let refused: u64 =
            status.users.iter().flat_map(|user| user.uses.values()).map(|used| used.refused).sum();
        assert_eq!(refused, 1, "{quota}");
    }
    // One at a time is what this client asks for anyway.
    let (_folder, daemon) = with_file("[quotas]\nin_flight = 1\n", &[]);
    let mut person = person(&daemon, user);
    person.must("connect");
    person.must("open 300");
    (0..5).for_each(|_| drop(person.must("ask")));
}

#[test]
fn pages_stay_in_memory_where_a_user_may_have_no_more_of_the_disk() {
    let (user, _) = users();
    let disk = tempfile::tempdir().unwrap();
    let flags = ["--spill", disk.path().to_str().unwrap(), "--spill-bytes", "128MiB", "--host-percent", "10"];
    let (_folder, daemon) = with_file("[quotas]\nspill = \"16MiB\"\n", &flags);
    let mut person = person(&daemon, user);
    person.must("connect");
    person.must("open 20000");
    let status = daemon.wait_for("a quota that is reached", |status| {
        status.users.iter().any(|user| user.uses[&Quota::Spill].refused > 0)
    });
    let spill = status.users.iter().find(|known| known.uid == user).unwrap().uses[&Quota::Spill];
    assert_eq!((spill.held, spill.limit), (16 << 20, Some(16 << 20)));
    assert!(person.must("ask").parse::<usize>().unwrap() > 0);
    person.dies();
    daemon.wait_for("an empty daemon", is_empty);
}

#[test]
fn whoever_dies_leaves_nothing_on_their_account_and_nothing_of_others_goes() {
    let (anna, ben) = users();
    let daemon = open_to_all(&[]);
    let mut stays = person(&daemon, ben.unwrap_or(anna));
    stays.must("connect");
    stays.must("open 300");
    let before = daemon.wait_for("a sequence", |status| status.totals.tokens == 300);
    for _ in 0..3 {
        let mut dies = person(&daemon, anna);
        for order in ["connect", "open 400", "fork", "reserve 500", "ask", "connect", "open 100", "fork"] {
            dies.must(order);
        }
        assert!(held(&daemon, anna, Quota::Sequences) >= 4);
        dies.dies();
        let after = daemon.wait_for("one session", |status| {
            status.totals == before.totals
                && status.arena.used_bytes == before.arena.used_bytes
                && status.users.iter().all(|user| {
                    let was = before.users.iter().find(|known| known.uid == user.uid);
                    user.uses.iter().all(|(quota, used)| used.held == was.map_or(0, |was| was.held(*quota)))
                })
        });
        assert_eq!(after.sessions.len(), 1);
    }
    assert!(stays.must("ask").parse::<usize>().unwrap() > 0);
}

#[test]
fn a_mapping_that_a_user_keeps_shows_nothing_of_anybody_and_is_nobody_elses() {
    let (anna, ben) = users();
    // Extents are kept for their user, and there are few.
    let daemon = open_to_all(&["--arena", "192MiB", "--pin-ahead", "all"]);
    let mut first = person(&daemon, anna);
    assert_eq!(first.must("draw anna"), "1 extents, 0 strange bytes");
    // The next ones find zeros, also where an extent was the same user's before.
    let mut again = person(&daemon, anna);
    assert_eq!(again.must("draw XYZ"), "1 extents, 0 strange bytes");
    if let Some(ben) = ben {
        let mut other = person(&daemon, ben);
        for extents in 1..=4 {
            assert_eq!(other.must("draw BEN"), format!("{extents} extents, 0 strange bytes"));
            first.must("scribble anna");
            // What the former owner sees is what that user wrote, or nothing, and what they write nobody else sees.
            let seen = first.must("look annaXYZ");
            assert_eq!(seen, "1 extents, 0 strange bytes");
            assert_eq!(again.must("look annaXYZ"), seen);
            assert_eq!(other.must("look BEN"), format!("{extents} extents, 0 strange bytes"));
        }
    }
}

#[test]
fn what_is_kept_for_newcomers_is_there_for_them_and_for_nobody_who_has_more_than_their_share() {
    let (anna, ben) = users();
    let daemon = open_to_all(&["--arena", "256MiB", "--newcomers-percent", "25"]);
    let mut first = person(&daemon, anna);
    first.must("connect");
    (0..3).for_each(|_| drop(room(&mut first).unwrap()));
    let said = room(&mut first).unwrap_err();
    assert!(said.contains("while what is left is kept for users who have less than their share"), "{said}");
    let Some(ben) = ben else { return };
    let mut newcomer = person(&daemon, ben);
    newcomer.must("connect");
    room(&mut newcomer).unwrap();
    assert!(room(&mut newcomer).unwrap_err().contains("the arena is full"));
    assert_eq!((held(&daemon, anna, Quota::Host), held(&daemon, ben, Quota::Host)), (192 << 20, 64 << 20));
}

#[test]
fn extents_in_which_nothing_is_go_from_users_with_more_than_their_share_to_those_with_less() {
    let (anna, ben) = users();
    let daemon = open_to_all(&["--arena", "256MiB", "--newcomers-percent", "0"]);
    let mut first = person(&daemon, anna);
    first.must("connect");
    first.must("open 300");
    (0..3).for_each(|_| drop(room(&mut first).unwrap()));
    first.must("room 30000");
    assert_eq!(held(&daemon, anna, Quota::Host), 256 << 20);
    (0..4).for_each(|_| drop(first.must("close")));
    assert_eq!(held(&daemon, anna, Quota::Host), 256 << 20, "they stay while nobody needs them");
    if let Some(ben) = ben {
        let mut other = person(&daemon, ben);
        other.must("connect");
        other.must("open 300");
        (0..2).for_each(|_| drop(room(&mut other).unwrap()));
        assert_eq!(
            (held(&daemon, anna, Quota::Host), held(&daemon, ben, Quota::Host)),
            (128 << 20, 128 << 20)
        );
        // Half is everybody's share: no more is taken from the first one.
        assert!(room(&mut other).unwrap_err().contains("the arena is full"));
        (0..2).for_each(|_| drop(other.must("back")));
        assert!(other.must("ask").parse::<usize>().unwrap() > 0);
        drop(other);
        daemon.wait_for("one session", |status| status.sessions.len() == 1);
    }
    // What the first one has is where it was, and they get more again.
    assert!(first.must("ask").parse::<usize>().unwrap() > 0);
    (0..3).for_each(|_| drop(room(&mut first).unwrap()));
    first.must("open 500");
    assert!(first.must("ask").parse::<usize>().unwrap() > 0);
}
