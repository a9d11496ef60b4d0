//! How near the kernels come to what one core can do: `cargo bench -p kvoyant-kernels --bench speed [-- --json] [--mib N] [--rounds N] [--percentile N]`.
//!
//! One run measures everything in turns: what a core reads in order and how many products it sums, and each kernel over the same memory,
//! some milliseconds each, round after round; medians over the rounds. So a machine that is busy with other things slows both sides of
//! a ratio alike. Every kernel walks through one arena that is larger than the caches (256 MiB unless said), a layer at a time, as a
//! step of a model does.

mod limits;
mod report;
mod tasks;

use std::time::{Duration, Instant};

use report::Row;

/// How long a task runs in a round.
const TURN: Duration = Duration::from_millis(4);

/// Something to be timed.
struct Task<'a> {
    name: String,
    /// Goes over the next part of the arena.
    step: Box<dyn FnMut() + 'a>,
    /// Seconds of one step, a median per round.
    seconds: Vec<f64>,
}

impl<'a> Task<'a> {
    fn new(name: impl Into<String>, step: impl FnMut() + 'a) -> Self {
        Self { name: name.into(), step: Box::new(step), seconds: Vec::new() }
    }

    /// One round.
    fn turn(&mut self, percentile: usize) {
        let start = Instant::now();
        let mut times = Vec::new();
        while times.is_empty() || start.elapsed() < TURN {
            let begin = Instant::now();
            (self.step)();
            times.push(begin.elapsed().as_secs_f64());
        }
        self.seconds.push(at(percentile, &mut times));
    }
}

/// The time that so many of a hundred do not reach.
fn at(percentile: usize, times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[(times.len() * percentile / 100).min(times.len() - 1)]
}

fn argument(name: &str, default: usize) -> usize {
    let mut arguments = std::env::args().skip_while(|argument| argument != name).skip(1);
    arguments.next().map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} takes a whole number, not '{text}'"))
    })
}

fn main() {
    let (mib, rounds) = (argument("--mib", 256), argument("--rounds", 25));
    // The median, unless something lower is asked for: what the kernels do while nobody else is about.
    let percentile = argument("--percentile", 50);
    let arena = tasks::Arena::new(mib << 20);
    let mut all = tasks::all(&arena);
    // The first round is for caches and clocks.
    for round in 0..=rounds.max(1) {
        for task in &mut all {
            task.turn(percentile);
            if round == 0 {
                task.seconds.clear();
            }
        }
    }
    let seconds = |name: &str| {
        let task = all.iter().find(|task| task.name == name).expect("a task of that name");
        at(percentile, &mut task.seconds.clone())
    };
    let rows: Vec<Row> = report::rows(&seconds);
    if std::env::args().any(|argument| argument == "--json") {
        report::json(&rows, mib, rounds, percentile);
    } else {
        report::table(&rows, mib, rounds, percentile);
    }
}
