//! One attack after the other, each in a process of its own, and what became of whom.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvoyant_tests::Daemon;
use nix::unistd::Pid;
use serde::Serialize;
use tempfile::TempDir;

use crate::accounts::{Accounts, settle};
use crate::neighbour::{Checks, Latency, Manners, Neighbour};
use crate::{Attack, Outcome, Setup, Verdict};

/// How long an attacker of each kind may take before it counts as wedged.
const PATIENCE_QUICK: Duration = Duration::from_secs(20);
const PATIENCE_LONG: Duration = Duration::from_secs(180);

/// How long a daemon may take to have everything back.
const SETTLE: Duration = Duration::from_secs(10);

/// How attacks are run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The program of this crate, which is daemon, attacker and stand-in.
    pub program: PathBuf,
    /// Another daemon to attack, if not this program's own.
    pub daemon: Option<PathBuf>,
    /// All of every attack, and times worth reporting.
    pub long: bool,
    /// How long an attacker may take, if not as long as usual.
    pub patience: Option<Duration>,
    /// What the neighbour checks rows against.
    pub checks: Checks,
}

impl Options {
    /// Quick runs of this program.
    #[must_use]
    pub fn quick(program: PathBuf) -> Self {
        Self { program, daemon: None, long: false, patience: None, checks: Checks::Truly }
    }

    /// Answers of the neighbour before and after each attack.
    fn answers(&self) -> usize {
        if self.long { 200 } else { 8 }
    }
}

/// What came of one attack.
#[derive(Debug, Clone, Serialize)]
pub struct Result {
    /// Which.
    pub name: &'static str,
    /// What it does.
    pub does: &'static str,
    /// What was to come of it.
    pub expected: Verdict,
    /// What came of it.
    pub verdict: Verdict,
    /// How that was said.
    pub said: String,
    /// What befell the neighbour.
    pub harm: Option<String>,
    /// Its latency before.
    pub before: Option<Latency>,
    /// Its latency from the attack's beginning on.
    pub during: Option<Latency>,
    /// How long it took from the attacker's end until everything was back, in ms.
    pub back_ms: Option<f64>,
    /// How long the attacker took, in ms.
    pub took_ms: f64,
}

impl Result {
    /// Whether all is as it has to be.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.verdict == self.expected && self.harm.is_none()
    }
}

/// A daemon under attack, and who lives beside the attackers.
#[derive(Debug)]
pub(crate) struct Scene {
    pub(crate) neighbour: Neighbour,
    /// What is held while the neighbour rests.
    baseline: Accounts,
    pub(crate) daemon: Daemon,
    _folders: Vec<TempDir>,
}

impl Scene {
    pub(crate) fn new(setup: Setup, options: &Options, manners: Manners) -> Self {
        let mut folders = Vec::new();
        let mut folder = || {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let path = folder.path().display().to_string();
            folders.push(folder);
            path
        };
        let mut flags: Vec<String> =
            ["--lanes", "1", "--slab", "1MiB", "--max-sessions", "48", "--log", "warn"]
                .map(String::from)
                .into();
        match setup {
            Setup::Plain => {}
            Setup::Store => flags.extend(["--store".into(), folder()]),
            Setup::Spill => {
                let place = folder();
                let more = ["--spill", &place, "--spill-bytes", "64MiB", "--host-percent", "10"];
                flags.extend(more.map(String::from));
            }
        }
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let daemon = match &options.daemon {
            Some(binary) => Daemon::start(&binary.display().to_string(), &flags),
            None => Daemon::serve(&options.program.display().to_string(), &flags),
        };
        let neighbour = Neighbour::start(&daemon.socket(), options.checks, manners);
        // Its own extents, and whatever else is made at the first use.
        neighbour.wait_for(40);
        let baseline = neighbour.resting(|| {
            let _ = kvoyant_daemon::admin::fetch_status(&daemon.admin());
            std::thread::sleep(Duration::from_millis(20));
            Accounts::take(&daemon.status(), daemon.pid()).expect("the accounts of a daemon that lives")
        });
        Self { neighbour, baseline, daemon, _folders: folders }
    }

    /// What the daemon holds now; `None` if it gives no answer.
    pub(crate) fn accounts(&self) -> Option<Accounts> {
        let status = kvoyant_daemon::admin::fetch_status(&self.daemon.admin()).ok()?;
        Accounts::take(&status, self.daemon.pid())
    }

    fn run(&self, attack: &Attack, options: &Options) -> Result {
        let _ = self.neighbour.latency();
        self.neighbour.wait_for(options.answers());
        let before = self.neighbour.latency();
        let began = Instant::now();
        let (socket, admin) = (self.daemon.socket(), self.daemon.admin());
        let mut outcome = attacker(attack, options, &socket, &admin, self.daemon.pid());
        let ended = Instant::now();
        self.neighbour.wait_for(options.answers());
        let during = self.neighbour.latency();
        let held = self.neighbour.resting(|| {
            settle(|| self.accounts(), &self.baseline, options.patience.unwrap_or(SETTLE))
                .map(|_| ended.elapsed())
        });
        if let Err(held) = &held {
            // The attacker's own words matter less than what it left behind.
            outcome = Outcome::fail(format!("not everything came back: {held}"));
        }
        Result {
            name: attack.name,
            does: attack.does,
            expected: attack.expected,
            verdict: outcome.verdict,
            said: outcome.said,
            harm: self.neighbour.harm(),
            before,
            during,
            back_ms: held.ok().map(|time| time.as_secs_f64() * 1e3),
            took_ms: (ended - began).as_secs_f64() * 1e3,
        }
    }
}

/// Runs attacks in the order of their setups, and tells of each. A daemon that did not hold is replaced by a new one.
pub fn run(attacks: &[Attack], options: &Options, mut tell: impl FnMut(&Result)) -> Vec<Result> {
    let mut scenes: BTreeMap<Setup, Scene> = BTreeMap::new();
    let mut order: Vec<&Attack> = attacks.iter().collect();
    order.sort_by_key(|attack| attack.setup);
    order
        .into_iter()
        .map(|attack| {
            // One daemon at a time: they would take each other's cores.
            scenes.retain(|setup, _| *setup == attack.setup);
            let scene = scenes
                .entry(attack.setup)
                .or_insert_with(|| Scene::new(attack.setup, options, Manners::Lively));
            let result = scene.run(attack, options);
            if !result.holds() {
                scenes.clear();
            }
            tell(&result);
            result
        })
        .collect()
}

/// Runs an attacker's process to its end, or to the end of patience.
fn attacker(attack: &Attack, options: &Options, socket: &Path, admin: &Path, daemon: Pid) -> Outcome {
    let mut command = Command::new(&options.program);
    command.args(["attack", attack.name, "--daemon-pid", &daemon.to_string()]);
    command.arg("--socket").arg(socket).arg("--admin").arg(admin);
    if options.long {
        command.arg("--long");
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Outcome::fail(format!("the attacker did not start: {error}")),
    };
    let usual = if options.long { PATIENCE_LONG } else { PATIENCE_QUICK };
    let patience = options.patience.unwrap_or(usual);
    let since = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(_)) => return last_words(&mut child),
            Ok(None) if since.elapsed() < patience => std::thread::sleep(Duration::from_millis(1)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = format!("no end within {patience:?}");
                return Outcome { verdict: Verdict::Wedged, said };
            }
            Err(error) => return Outcome::fail(format!("the attacker cannot be waited for: {error}")),
        }
    }
}

/// What an attacker wrote before it ended: its outcome, or how it failed.
fn last_words(child: &mut Child) -> Outcome {
    let mut said = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        let _ = stdout.read_to_string(&mut said);
    }
    said.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_else(|| {
        Outcome::fail(format!("the attacker failed: {}", kvoyant_tests::words(child).trim()))
    })
}
