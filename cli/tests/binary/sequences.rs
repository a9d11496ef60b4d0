//! `kvoyant sequences` and `kvoyant status` against a daemon that holds something.

use std::path::Path;

use crate::common::{kvoyant, run};
use kvoyant_tests::{Daemon, fake, wait_until};
use serde_json::Value;

const KVOYANT: &str = env!("CARGO_BIN_EXE_kvoyant");

/// A daemon with everything that can be set about disks.
struct Holder {
    home: tempfile::TempDir,
    daemon: Daemon,
}

impl Holder {
    fn start() -> Self {
        let home = tempfile::tempdir().unwrap();
        let below = |name: &str| home.path().join(name).display().to_string();
        let (spill, store) = (below("spill"), below("images"));
        std::fs::create_dir(&spill).unwrap();
        let remote = format!("file://{}", below("remote"));
        let flags = [
            ["--spill", &spill],
            ["--spill-bytes", "64MiB"],
            ["--host-percent", "10"],
            ["--store", &store],
            ["--remote", &remote],
        ];
        let daemon = Daemon::serve(KVOYANT, flags.as_flattened());
        Self { home, daemon }
    }

    fn says(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let mut command = kvoyant(self.home.path());
        command.args(arguments).arg("--admin").arg(self.daemon.admin());
        run(&mut command)
    }

    /// What it prints where all goes well.
    fn good(&self, arguments: &[&str]) -> String {
        let (code, out, err) = self.says(arguments);
        assert_eq!((code, err.as_str()), (Some(0), ""), "{arguments:?}: {out}");
        out
    }

    /// Its one sentence where it does not.
    fn bad(&self, arguments: &[&str], code: i32) -> String {
        let (found, out, err) = self.says(arguments);
        assert_eq!((found, out.as_str()), (Some(code), ""), "{arguments:?}: {err}");
        err
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let out = self.good(&[arguments, &["--json"]].concat());
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
    }
}

#[test]
fn what_is_open_is_listed_suspended_made_ready_and_erased() {
    let holder = Holder::start();
    let out = holder.good(&["sequences"]);
    assert!(out.contains("no sequence is open") && out.contains("no image is kept"), "{out}");
    let model = fake::connect(&holder.daemon, &["full"]);
    let sequence = model.open(0, 900).unwrap();
    fake::fill(&model, &sequence, 1, 900).unwrap();
    let handle = sequence.id().to_string();
    let list = holder.json(&["sequences"]);
    let open = &list["sequences"][0];
    assert_eq!((open["session"].as_u64(), open["sequence"].as_str()), (Some(1), Some(handle.as_str())));
    assert_eq!(open["tokens"].as_u64(), Some(900));
    let out = holder.good(&["sequences"]);
    assert!(out.contains(&handle) && out.contains("full") && out.contains("900"), "{out}");
    assert!(out.lines().all(|line| line.chars().count() <= 100), "{out}");

    let out = holder.good(&["sequences", "suspend", "1", &handle, "chat-7", "--label", "a note"]);
    assert!(out.contains("chat-7") && out.contains("resumes it by that name"), "{out}");
    wait_until("the copy", || holder.json(&["sequences"])["images"][0]["kept"] == "both");
    let out = holder.good(&["sequences"]);
    assert!(out.contains("no sequence is open") && out.contains("a note"), "{out}");
    assert!(out.lines().any(|line| line.starts_with("chat-7") && line.ends_with("both")), "{out}");

    let out = holder.good(&["sequences", "resume", "chat-7"]);
    assert!(out.contains("900 tokens") && out.contains("resumes it by that name"), "{out}");
    let uid = nix::unistd::geteuid().to_string();
    let out = holder.good(&["sequences", "rm", "chat-7", "--uid", &uid]);
    assert!(out.contains("erased"), "{out}");
    assert_eq!(holder.json(&["sequences"])["images"].as_array().unwrap().len(), 0);
    drop(sequence);
}

#[test]
fn the_status_shows_disks_images_and_where_pages_are() {
    let holder = Holder::start();
    let model = fake::connect(&holder.daemon, &["full"]);
    let sequence = model.open(0, 0).unwrap();
    while sequence.tokens() < 3000 {
        let end = sequence.tokens() + 100;
        model.reserve(&[(&sequence, end)]).unwrap();
        fake::fill(&model, &sequence, 1, end).unwrap();
    }
    let out = holder.good(&["status"]);
    for part in ["spill      ", "kvoyant-spill-0", "of 64.00 MiB in use", "written", "no failures"] {
        assert!(out.contains(part), "{part} is not in\n{out}");
    }
    for part in ["images     ", "and file://", "nothing waits to be copied", "on disk, ", " read back"] {
        assert!(out.contains(part), "{part} is not in\n{out}");
    }
    let report = holder.json(&["status"]);
    assert!(report["spill"][0]["writes"].as_u64() > Some(0), "{report}");
    assert_eq!(report["store"]["waiting"].as_u64(), Some(0), "{report}");
    assert!(report["sessions"][0]["spilled_pages"].as_u64() > Some(0), "{report}");
}

#[test]
fn wrong_input_is_refused_in_a_sentence_that_says_what_to_do() {
    let holder = Holder::start();
    let said = holder.bad(&["sequences", "suspend", "1", "five", "a"], 2);
    assert!(said.contains("3.0") && said.contains("kvoyant sequences"), "{said}");
    let said = holder.bad(&["sequences", "suspend", "one", "0.0", "a"], 2);
    assert!(said.contains("SESSION"), "{said}");
    let said = holder.bad(&["sequences", "suspend", "7", "0.0", "a"], 1);
    assert!(said.contains("session 7") && said.contains("kvoyant sequences"), "{said}");
    let said = holder.bad(&["sequences", "resume", "nothing"], 1);
    assert!(said.contains("nothing"), "{said}");
    for command in ["resume", "rm"] {
        let said = holder.bad(&["sequences", command, "../up"], 1);
        assert!(said.contains("image") && said.contains("../up"), "{said}");
        let said = holder.bad(&["sequences", command, "a", "--uid", "root"], 2);
        assert!(said.contains("root"), "{said}");
    }
    let said = holder.bad(&["sequences", "rm", "nothing", "--uid", "1000"], 1);
    assert!(said.contains("nothing"), "{said}");
    let said = holder.bad(&["sequences", "erase", "a"], 2);
    assert!(said.contains("erase"), "{said}");
    let none = Path::new("/no/such/admin.sock");
    let (code, _, said) = run(kvoyant(holder.home.path()).arg("sequences").arg("--admin").arg(none));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("/no/such/admin.sock") && said.contains("--admin"), "{said}");
}

#[test]
fn an_answer_that_could_not_be_suspended_is_not_begun() {
    let holder = Holder::start();
    let socket = holder.daemon.socket();
    let run_as = |socket: &Path, more: &[&str]| {
        let mut command = kvoyant(holder.home.path());
        command.args(["run", "--model=tiny", "--raw", "--prompt=once upon", "--max-tokens=2", "--socket"]);
        run(command.arg(socket).args(more))
    };
    let (code, out, err) = run_as(&socket, &["--suspend=talk"]);
    assert!(code == Some(0) && !out.is_empty(), "{err}");
    let (code, out, err) = run_as(&socket, &["--suspend=talk"]);
    assert_eq!((code, out.as_str()), (Some(1), ""), "nothing is answered: {err}");
    assert!(err.contains("\"talk\"") && err.contains("--overwrite"), "{err}");
    for right in [&["--suspend=talk", "--overwrite"][..], &["--suspend=talk", "--resume=talk"]] {
        let (code, _, err) = run_as(&socket, right);
        assert_eq!(code, Some(0), "{err}");
    }
    let plain = Daemon::serve(KVOYANT, &[]);
    let (code, out, err) = run_as(&plain.socket(), &["--suspend=talk"]);
    assert_eq!((code, out.as_str()), (Some(1), ""), "nothing is answered: {err}");
    assert!(err.contains("this daemon keeps no images") && !err.contains("\"\""), "{err}");
    let (code, _, err) = run_as(&plain.socket(), &["--resume=talk"]);
    assert!(code == Some(1) && err.starts_with("error: this daemon keeps no images"), "{err}");
}
