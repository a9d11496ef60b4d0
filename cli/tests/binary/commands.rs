//! Every command of `kvoyant` with right and with wrong input. Which commands there are says `kvoyant man`, which writes a page for each of clap's
//! tree; which options, their help. A command that is not in the table below fails the test, and so does an option that no line of it uses.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::common::{kvoyant, run};
use kvoyant_client::{Model, Sequence};
use kvoyant_tests::softcuda::Machine;
use kvoyant_tests::{Daemon, fake};
use serde_json::Value;

use crate::table::{Case, Command, commands};

const KVOYANT: &str = env!("CARGO_BIN_EXE_kvoyant");

/// A daemon, a session on it, and a home with files that commands read.
struct Stand {
    home: tempfile::TempDir,
    daemon: Daemon,
    model: Model,
    sequence: Option<Sequence>,
    machine: Machine,
    /// SmolLM2, where somebody has fetched it.
    cached: Option<PathBuf>,
}

impl Stand {
    fn start() -> Self {
        let home = tempfile::tempdir().unwrap();
        let below = |name: &str| home.path().join(name).display().to_string();
        for folder in ["spill", "disk"] {
            std::fs::create_dir(home.path().join(folder)).unwrap();
        }
        std::fs::write(home.path().join("text"), "The keeper wrote down each ship that passed. ".repeat(40))
            .unwrap();
        std::fs::write(home.path().join("letter.gguf"), "Dear reader").unwrap();
        std::fs::write(home.path().join("bad.toml"), "areena = \"1GiB\"\n").unwrap();
        let (spill, store) = (below("spill"), below("images"));
        let flags = [["--spill", &spill], ["--spill-bytes", "64MiB"], ["--store", &store]];
        let daemon = Daemon::serve(KVOYANT, flags.as_flattened());
        let model = fake::connect(&daemon, &["full"]);
        let cached = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cached = cached.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        let cached = cached.map(|cache| cache.join("kvoyant/models")).filter(|models| models.is_dir());
        let mut stand = Self { home, daemon, model, sequence: None, machine: Machine::new(), cached };
        stand.open();
        stand
    }

    fn open(&mut self) {
        let sequence = self.model.open(0, 200).unwrap();
        fake::fill(&self.model, &sequence, 1, 200).unwrap();
        self.sequence = Some(sequence);
    }

    fn put(&self, text: &str) -> String {
        let sequence = self.sequence.as_ref().unwrap().id().to_string();
        let path = |path: &Path| path.display().to_string();
        text.replace("{home}", &path(self.home.path()))
            .replace("{admin}", &path(&self.daemon.admin()))
            .replace("{socket}", &path(&self.daemon.socket()))
            .replace("{seq}", &sequence)
            .replace("{uid}", &nix::unistd::geteuid().to_string())
    }

    /// Exit code, standard output and error.
    fn runs(&self, path: &[&str], case: &Case) -> (Option<i32>, String, String) {
        let mut command = kvoyant(self.home.path());
        // Nothing that a command is not told is had from the machine's own configuration.
        command.env("KVOYANT_STATE", self.home.path().join("state"));
        if case.gpu {
            self.machine.env(&mut command);
        }
        command.args(path).args(case.arguments.iter().map(|text| self.put(text)));
        run(&mut command)
    }

    fn does(&mut self, command: &Command, case: &Case) {
        if case.model && self.cached.is_none() {
            eprintln!("SKIPPED: {:?}, for the demo's model has not been fetched here", command.path);
            return;
        }
        if case.model {
            let models = self.home.path().join("cache/kvoyant/models");
            std::fs::create_dir_all(models.parent().unwrap()).unwrap();
            if !models.exists() {
                std::os::unix::fs::symlink(self.cached.as_ref().unwrap(), &models).unwrap();
            }
        }
        let what = format!("{:?} {:?}", command.path, case.arguments);
        let (code, out, err) = self.runs(command.path, case);
        assert_eq!(code, Some(case.code), "{what}: {out} {err}");
        let says = self.put(case.says);
        if case.code == 0 {
            assert!(
                out.contains(&says) || err.contains(&says),
                "{what}: {says:?} is in neither\n{out}\n{err}"
            );
            if case.arguments.contains(&"--json") {
                let value: Value =
                    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{what}: {error}: {out}"));
                assert!(value.is_object() || value.is_array(), "{what}: {out}");
            }
        } else {
            assert!(err.contains(&says), "{what}: {says:?} is not in {err}");
            if !case.reports {
                assert_eq!(out, "", "{what}");
                let said =
                    ["error: ", "kvoyantd: "].iter().map(|word| err.matches(word).count()).sum::<usize>();
                assert_eq!(said, 1, "{what} is one sentence: {err}");
            }
        }
        // What was suspended is closed.
        if case.code == 0 && command.path == ["sequences", "suspend"] {
            self.open();
        }
    }
}

/// The commands of clap's tree, by the pages that are written for them.
fn tree() -> BTreeSet<Vec<String>> {
    let home = tempfile::tempdir().unwrap();
    let (code, out, err) = run(kvoyant(home.path()).arg("man").arg(home.path().join("man1")));
    assert_eq!(code, Some(0), "{err}");
    // Names have dashes too: a page is of the longest name whose parts are commands one below the other.
    let pages: BTreeSet<String> = out
        .lines()
        .filter_map(|page| {
            page.rsplit('/').next()?.strip_prefix("kvoyant-")?.strip_suffix(".1").map(str::to_owned)
        })
        .collect();
    let parents: Vec<&String> = pages.iter().collect();
    pages
        .iter()
        .map(|page| {
            let parent = parents.iter().find(|parent| page.starts_with(&format!("{parent}-")));
            // `calibrate-model` is no command below `calibrate`.
            let below = parent.filter(|parent| has_command(home.path(), parent, &page[parent.len() + 1..]));
            match below {
                Some(parent) => vec![(*parent).clone(), page[parent.len() + 1..].to_owned()],
                None => vec![page.clone()],
            }
        })
        .collect()
}

fn has_command(home: &Path, parent: &str, name: &str) -> bool {
    let (_, help, _) = run(kvoyant(home).args([parent, "--help"]));
    let commands =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    commands.filter_map(|line| line.split_whitespace().next()).any(|known| known == name)
}

fn help(path: &[&str]) -> String {
    let home = tempfile::tempdir().unwrap();
    let (code, help, err) = run(kvoyant(home.path()).args(path).arg("--help"));
    assert_eq!(code, Some(0), "{path:?}: {err}");
    assert!(help.contains("Usage: kvoyant"), "{path:?}: {help}");
    help
}

/// Long options in a help.
fn options(help: &str) -> BTreeSet<String> {
    let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    let words =
        lines.flat_map(|line| line.split([' ', ',', '=', '[', '<']).filter(|word| word.starts_with("--")));
    words.map(str::to_owned).filter(|word| !["--help", "--version", "--"].contains(&word.as_str())).collect()
}

#[test]
fn the_table_has_every_command_and_every_option_and_no_others() {
    let known: BTreeSet<Vec<String>> =
        commands().map(|command| command.path.iter().map(|part| (*part).to_owned()).collect()).collect();
    assert_eq!(known.len(), commands().count(), "none comes twice");
    assert_eq!(tree(), known);
    let mut unused = BTreeMap::new();
    for command in commands() {
        let told = options(&help(command.path));
        assert!(
            !command.wrong.is_empty() && (!command.right.is_empty() || command.path == ["bench"]),
            "{:?}",
            command.path
        );
        // A daemon's flags are its keys, which tests/tests/operating/operations.rs and the daemon's own tests go through.
        if command.path == ["serve"] {
            continue;
        }
        let used: BTreeSet<&str> = command
            .right
            .iter()
            .chain(command.wrong)
            .flat_map(|case| case.arguments.iter().filter_map(|word| word.split('=').next()))
            .collect();
        let left: Vec<String> = told.into_iter().filter(|option| !used.contains(option.as_str())).collect();
        if !left.is_empty() {
            unused.insert(format!("{:?}", command.path), left);
        }
    }
    assert_eq!(unused, BTreeMap::new(), "options that no line uses");
}

#[test]
fn what_no_command_takes_is_refused_by_every_one_with_where_help_is() {
    let home = tempfile::tempdir().unwrap();
    for command in commands() {
        for wrong in ["--no-such-option", "--admin=", "-Z"] {
            let (code, out, err) = run(kvoyant(home.path()).args(command.path).arg(wrong));
            // An empty path is one that no daemon listens at, for those that have the option.
            let takes = wrong == "--admin=" && options(&help(command.path)).contains("--admin");
            assert!(
                matches!(code, Some(1 | 2)) && out.is_empty(),
                "{:?} {wrong}: {code:?} {out}",
                command.path
            );
            assert!(takes || code == Some(2) && err.contains("--help"), "{:?} {wrong}: {err}", command.path);
        }
    }
    let (code, out, err) = run(&mut kvoyant(home.path()));
    assert!(code == Some(2) && out.is_empty() && err.contains("Commands:"), "{err}");
    let (code, _, err) = run(kvoyant(home.path()).arg("statsu"));
    assert!(code == Some(2) && err.contains("status"), "the nearest name is named: {err}");
}

fn drive(which: impl Fn(&Command) -> bool) {
    let mut stand = Stand::start();
    let mut driven = 0;
    for command in commands().filter(|command| which(command)) {
        for case in command.wrong {
            assert_ne!(case.code, 0, "{:?}", case.arguments);
            stand.does(command, case);
        }
        for case in command.right {
            assert_eq!(case.code, 0, "{:?}", case.arguments);
            stand.does(command, case);
        }
        let json = options(&help(command.path)).contains("--json");
        let printed = command.right.iter().any(|case| case.arguments.contains(&"--json"));
        assert_eq!(
            json, printed,
            "{:?} says that it has --json, and no line looks at it, or the other way round",
            command.path
        );
        driven += 1;
    }
    assert!(driven > 0);
    stand.machine.assert_clean();
}

#[test]
fn what_operators_use_does_what_it_says_and_refuses_wrong_input() {
    drive(|command| !command.slow);
}

/// What measures, from the traces that are captured first: in a test of its own, beside the others'.
fn measures(command: &Command) -> bool {
    matches!(command.path[0], "bench" | "capture")
}

#[test]
fn what_runs_a_model_does_what_it_says_and_refuses_wrong_input() {
    drive(|command| command.slow && !measures(command));
}

#[test]
fn what_measures_does_what_it_says_and_refuses_wrong_input() {
    drive(|command| command.slow && measures(command));
}
