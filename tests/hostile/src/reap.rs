//! Clients that are killed in the middle of their work, and how long it takes until a daemon has everything of theirs back.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvoyant_client::{Client, Error, Hint, Member, Model, Options, Sequence};
use kvoyant_kernels::SplitMix64;
use kvoyant_tests::{PATIENCE, fake};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

use crate::Setup;
use crate::accounts::settle;
use crate::neighbour::{Checks, Manners, Neighbour};
use crate::runner::{self, Scene};

/// Longest that a victim works before it is killed.
const WORK_MAX: Duration = Duration::from_millis(40);

/// Most tokens of a victim's sequence.
const TOKENS_MAX: usize = 1500;

/// How a client died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Death {
    /// With its process, its socket went.
    Alone,
    /// A child of its has the socket open, and goes on.
    ChildLeft,
    /// Pages of its were on their way to disk, or from there.
    Spilling,
}

impl Death {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Alone, Self::ChildLeft, Self::Spilling];
}

/// One client that was killed.
#[derive(Debug, Clone, Serialize)]
pub struct Killed {
    /// How.
    pub death: Death,
    /// How long it had worked, in ms.
    pub worked_ms: f64,
    /// Sequences, pages and bytes of extents that it had in the daemon's last account of it.
    pub held_bytes: u64,
    /// From the signal until the process had ended, in ms.
    pub died_ms: f64,
    /// From then until everything was back, in ms; what was not, where it was not.
    pub back_ms: Result<f64, String>,
}

/// Kills so many clients at moments that this seed names, and tells of each.
///
/// # Panics
/// If there is no daemon to begin with.
pub fn run(options: &runner::Options, kills: usize, seed: u64, mut tell: impl FnMut(&Killed)) -> Vec<Killed> {
    let mut random = SplitMix64::new(seed);
    let mut killed = Vec::new();
    // Half of them die alone; the rest is shared by the other two.
    for (death, share) in [
        (Death::Alone, kills - kills / 4 - kills / 4),
        (Death::ChildLeft, kills / 4),
        (Death::Spilling, kills / 4),
    ] {
        if share == 0 {
            continue;
        }
        let setup = if death == Death::Spilling { Setup::Spill } else { Setup::Plain };
        // Its accounts stand still while it works, so that those of victims can be told from them.
        let scene = Scene::new(setup, options, Manners::Steady);
        let load = Neighbour::start(&scene.daemon.socket(), Checks::Truly, Manners::Steady);
        load.wait_for(20);
        let Some(baseline) = scene.accounts() else { panic!("the daemon gives no status") };
        for _ in 0..share {
            let work = WORK_MAX.mul_f64(random.unit());
            let one = kill_one(&options.program, &scene, death, work, random.bits(), &baseline);
            tell(&one);
            killed.push(one);
        }
        if let Some(harm) = scene.neighbour.harm().or(load.harm()) {
            let back_ms = Err(format!("a neighbour was harmed: {harm}"));
            killed.push(Killed { death, worked_ms: 0.0, held_bytes: 0, died_ms: 0.0, back_ms });
        }
    }
    killed
}

fn kill_one(
    program: &Path,
    scene: &Scene,
    death: Death,
    work: Duration,
    seed: u64,
    baseline: &crate::accounts::Accounts,
) -> Killed {
    let mut command = Command::new(program);
    command.arg("victim").arg(scene.daemon.socket()).arg(seed.to_string());
    if death == Death::ChildLeft {
        command.arg("--leave-child");
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut victim = command.spawn().expect("a victim");
    let child = first_line(&mut victim);
    std::thread::sleep(work);
    let held = scene.accounts().map_or(0, |now| now.arena_bytes.saturating_sub(baseline.arena_bytes));
    let began = Instant::now();
    let _ = victim.kill();
    let _ = victim.wait();
    let dead = Instant::now();
    let back = settle(|| scene.accounts(), baseline, PATIENCE).map(|_| dead.elapsed().as_secs_f64() * 1e3);
    let died_ms = (dead - began).as_secs_f64() * 1e3;
    if let Some(child) = child {
        let _ = kill(child, Signal::SIGKILL);
    }
    Killed { death, worked_ms: work.as_secs_f64() * 1e3, held_bytes: held, died_ms, back_ms: back }
}

/// The first line of a victim says that it works, and names its child if it has one.
fn first_line(victim: &mut Child) -> Option<Pid> {
    let mut line = String::new();
    if let Some(stdout) = &mut victim.stdout {
        let _ = BufReader::new(stdout).read_line(&mut line);
    }
    line.trim().strip_prefix("child ")?.parse().ok().map(Pid::from_raw)
}

/// Works until it is killed. Everything that a client can have is opened, filled, shared, cut and closed, in an order that the seed
/// names.
///
/// # Errors
/// The client's own.
pub fn victim(socket: &Path, seed: u64, leave_child: bool) -> Result<(), Error> {
    let child = leave_child.then(|| leave(socket));
    match &child {
        Some((child, _)) => println!("child {}", child.id()),
        None => println!("works"),
    }
    let model = Client::connect(socket, Options { name: "victim".into(), ..Options::default() })?
        .register(fake::spec(&["random:budget=50%", "full"]), &[])?;
    let mut random = SplitMix64::new(seed);
    let mut open: Vec<Sequence> = Vec::new();
    loop {
        step(&model, &mut open, &mut random)?;
    }
}

/// A session of its own whose socket a child holds open, with something in it.
fn leave(socket: &Path) -> (Child, kvoyant_tests::raw::Raw) {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    let mut raw = kvoyant_tests::raw::Raw::connect(socket, fake::spec(&["full"]));
    let sequence = raw.open(1000);
    raw.push(&crate::stage::append(), &[crate::stage::entry(sequence, 0, 1000)]);
    fcntl(&raw, FcntlArg::F_SETFD(FdFlag::empty())).expect("a socket that children get");
    let child = Command::new("sleep").arg("30").stdout(Stdio::null()).spawn().expect("a child");
    (child, raw)
}

fn step(model: &Model, open: &mut Vec<Sequence>, random: &mut SplitMix64) -> Result<(), Error> {
    let any = |open: &[Sequence], random: &mut SplitMix64| random.below(open.len().max(1));
    match random.below(8) {
        0 | 1 => {
            let tokens = 1 + random.below(TOKENS_MAX);
            let sequence = model.open(random.below(2), tokens)?;
            fake::fill(model, &sequence, 1, tokens)?;
            open.push(sequence);
        }
        2 if !open.is_empty() => {
            let fork = open[any(open, random)].fork(None)?;
            open.push(fork);
        }
        3 if !open.is_empty() => {
            let sequence = &open[any(open, random)];
            sequence.truncate(random.below(sequence.tokens().max(1)))?;
        }
        4 if open.len() > 3 => {
            let sequence = open.swap_remove(any(open, random));
            sequence.close()?;
        }
        _ if !open.is_empty() => {
            let sequence = &open[any(open, random)];
            let member = Member { sequence, position: sequence.tokens(), hint: Hint::None };
            // Half of the answers nobody waits for.
            let pending = model.speculate(1, &[member])?;
            if random.below(2) == 0 {
                let _ = pending.wait(PATIENCE);
            }
        }
        _ => {}
    }
    Ok(())
}

/// Times of those whose everything came back, sorted, in ms.
#[must_use]
pub fn times(killed: &[Killed]) -> Vec<f64> {
    let mut times: Vec<f64> = killed.iter().filter_map(|one| one.back_ms.as_ref().ok()).copied().collect();
    times.sort_by(f64::total_cmp);
    times
}

/// The table.
#[must_use]
pub fn report(killed: &[Killed]) -> String {
    let mut text = format!(
        "{:<12} {:>6} {:>10} {:>8} {:>8} {:>8} {:>8}",
        "death", "kills", "dying p99", "p50 ms", "p99 ms", "max ms", "lost"
    );
    let line = |name: &str, killed: &[Killed]| {
        let times = times(killed);
        let at = |times: &[f64], share: f64| {
            let index = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len().max(1)) - 1;
            times.get(index).map_or_else(|| "-".into(), |ms| format!("{ms:.1}"))
        };
        let mut dying: Vec<f64> = killed.iter().map(|one| one.died_ms).collect();
        dying.sort_by(f64::total_cmp);
        let lost = killed.len() - times.len();
        let [p50, p99, max] = [0.5, 0.99, 1.0].map(|share| at(&times, share));
        let dying = at(&dying, 0.99);
        format!("\n{name:<12} {:>6} {dying:>10} {p50:>8} {p99:>8} {max:>8} {lost:>8}", killed.len())
    };
    for death in Death::ALL {
        let of: Vec<_> = killed.iter().filter(|one| one.death == death).cloned().collect();
        if !of.is_empty() {
            text.push_str(&line(&format!("{death:?}").to_lowercase(), &of));
        }
    }
    text.push_str(&line("all", killed));
    for one in killed {
        if let Err(lost) = &one.back_ms {
            text.push_str(&format!("\n{:?} after {:.1} ms: {lost}", one.death, one.worked_ms));
        }
    }
    text
}
