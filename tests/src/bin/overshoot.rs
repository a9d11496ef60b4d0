//! How much later than its deadline a client hears that its daemon stands still, and how soon that it is dead: `scripts/overshoot`.
//!
//! `overshoot DAEMON SAMPLES` prints a table; times are in microseconds beyond the deadline, and for a killed daemon since the kill.

use std::time::{Duration, Instant};

use kvoyant_client::{Client, Error, Hint, Member, Model, Options};
use kvoyant_tests::{Daemon, PATIENCE, fake};
use nix::sys::signal::{Signal, kill};

type Failure = Box<dyn std::error::Error>;

fn connect(daemon: &Daemon, deadline: Duration) -> Result<Model, Error> {
    let options = Options { control_timeout: deadline, ..Options::default() };
    Client::connect(&daemon.socket(), options)?.register(fake::spec(&["full"]), &[])
}

/// What is waited for while the daemon stands still.
#[derive(Debug, Clone, Copy)]
enum Wait {
    /// A layer's answer, by the ring.
    Answer,
    /// The answer to a control message.
    Control,
}

/// How long a wait took, of a session that has a sequence.
fn stopped(daemon: &Daemon, wait: Wait, deadline: Duration) -> Result<Duration, Failure> {
    let model = connect(daemon, PATIENCE)?;
    let sequence = model.open(0, 100)?;
    fake::fill(&model, &sequence, 1, 100)?;
    drop(fake::ask(&model, &sequence, 1));
    // A control message has the session's deadline.
    let hasty = connect(daemon, deadline.max(Duration::from_secs(1)));
    let hasty = if matches!(wait, Wait::Control) { Some(hasty?) } else { None };
    daemon.stop();
    let (since, error) = match (wait, hasty) {
        (Wait::Control, Some(model)) => {
            let since = Instant::now();
            (since, model.open(0, 1).map(drop))
        }
        _ => {
            let member = Member { sequence: &sequence, position: 100, hint: Hint::None };
            let pending = model.speculate(1, &[member])?;
            let since = Instant::now();
            (since, pending.wait(deadline).map(drop))
        }
    };
    let took = since.elapsed();
    kill(daemon.pid(), Signal::SIGCONT)?;
    match error {
        Err(Error::Deadline { .. }) => Ok(took),
        other => Err(format!("{other:?} instead of the deadline").into()),
    }
}

/// How long after the kill of its daemon a client that waits hears of it.
fn killed(binary: &str) -> Result<Duration, Failure> {
    let daemon = Daemon::start(binary, &["--log", "error", "--shape-latency-us", "60000000"]);
    let model = connect(&daemon, PATIENCE)?;
    let sequence = model.open(0, 100)?;
    fake::fill(&model, &sequence, 1, 100)?;
    let member = Member { sequence: &sequence, position: 100, hint: Hint::None };
    let pending = model.speculate(1, &[member])?;
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let error = pending.wait(PATIENCE).map(drop);
            (Instant::now(), error)
        });
        // So that it sleeps by then.
        std::thread::sleep(Duration::from_millis(20));
        let since = Instant::now();
        daemon.end(Signal::SIGKILL);
        match waiter.join() {
            Ok((heard, Err(Error::DaemonGone))) => Ok(heard - since),
            other => Err(format!("{other:?} instead of its end").into()),
        }
    })
}

fn row(name: &str, deadline: &str, mut micros: Vec<f64>) {
    micros.sort_by(f64::total_cmp);
    let at = |share: f64| micros[((micros.len() - 1) as f64 * share).round() as usize];
    let (n, median, p99, most) = (micros.len(), at(0.5), at(0.99), at(1.0));
    println!("| {name} | {deadline} | {n} | {median:.0} | {p99:.0} | {most:.0} |");
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, binary, samples] = arguments.as_slice() else {
        return Err("usage: overshoot DAEMON SAMPLES".into());
    };
    let samples: usize = samples.parse()?;
    println!("| the daemon | deadline | samples | median µs | p99 µs | most µs |");
    println!("|---|---|---|---|---|---|");
    // Nobody reads what it says meanwhile, and a full pipe would hold it up.
    let daemon = Daemon::start(binary, &["--log", "error"]);
    for (wait, name, deadlines) in [
        (Wait::Answer, "stopped, an answer", &[1, 10, 100][..]),
        (Wait::Control, "stopped, a control message", &[1000]),
    ] {
        for deadline in deadlines.iter().map(|ms| Duration::from_millis(*ms)) {
            let samples = if deadline >= Duration::from_secs(1) { samples.div_ceil(8) } else { samples };
            let took = (0..samples).map(|_| stopped(&daemon, wait, deadline));
            let beyond = took.map(|took| Ok((took? - deadline).as_secs_f64() * 1e6));
            row(name, &format!("{deadline:?}"), beyond.collect::<Result<_, Failure>>()?);
        }
    }
    let took = (0..samples.div_ceil(4)).map(|_| Ok(killed(binary)?.as_secs_f64() * 1e6));
    row("killed, an answer", "–", took.collect::<Result<_, Failure>>()?);
    Ok(())
}
