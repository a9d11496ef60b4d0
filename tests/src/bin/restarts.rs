//! How long engines pause while their daemon is killed and started again, and what it costs a step that it could be: `scripts/restart`.
//!
//! `restarts DAEMON SAMPLES` prints two tables.

use std::path::Path;
use std::time::{Duration, Instant};

use kvoyant_engine::{
    DaemonKv, DaemonOptions, DaemonSequence, Decoder, DecoderOptions, Dtype, KvShape, PrefillOptions,
    Selects, argmax, synthetic,
};
use kvoyant_tests::supervisor::Supervisor;
use kvoyant_tests::{Daemon, PATIENCE};
use nix::sys::signal::Signal;

type Failure = Box<dyn std::error::Error>;

/// Tokens of a prompt, and steps of which the middle one counts.
const PROMPT: u32 = 2000;
const STEPS: usize = 200;

struct Engine {
    kv: DaemonKv,
    decoder: Decoder,
    sequence: DaemonSequence,
    logits: Vec<f32>,
}

impl Engine {
    fn start(socket: &Path, method: &str) -> Result<Self, Failure> {
        let model = synthetic::tiny(7);
        let shape = KvShape::new(model.config(), Dtype::F16);
        let prompt: Vec<u32> = (0..PROMPT).map(|i| (i * 31 + 3) % model.config().vocabulary as u32).collect();
        let options = DaemonOptions {
            methods: vec![method.parse()?],
            dense_layers: 1,
            selects: Selects::Lane,
            deadline: PATIENCE,
            ..DaemonOptions::default()
        };
        let mut kv = DaemonKv::connect(socket, shape, options)?;
        let mut decoder = Decoder::new(model, DecoderOptions::default());
        let mut sequence = kv.sequence(0)?;
        let logits = decoder.prefill(&mut kv, &mut sequence, &prompt, PrefillOptions::default())?;
        Ok(Self { kv, decoder, sequence, logits })
    }

    fn step(&mut self) -> Result<Duration, Failure> {
        let token = argmax(&self.logits);
        let since = Instant::now();
        self.logits = self.decoder.step(&mut self.kv, &mut [&mut self.sequence], &[token])?.logits;
        match self.kv.alone() {
            Some(why) => Err(format!("the engine went on alone: {why}").into()),
            None => Ok(since.elapsed()),
        }
    }
}

/// The value at a part of the sorted ones.
fn at(times: &mut [Duration], part: f64) -> f64 {
    times.sort_unstable();
    let index = ((times.len() - 1) as f64 * part).round() as usize;
    times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e3)
}

/// Most rows on disk, in a folder that is put in the place of FOLDER.
const SPILL: [&str; 6] = ["--spill", "FOLDER", "--spill-bytes", "256MiB", "--host-percent", "10"];

fn in_folder(flags: &[&str], folder: &Path) -> Vec<String> {
    let folder = folder.display().to_string();
    flags.iter().map(|flag| if *flag == "FOLDER" { folder.clone() } else { (*flag).to_owned() }).collect()
}

/// Steps during which the daemon is killed: from the next one's first socket to the end of the step, which waits for an answer.
fn pauses(
    binary: &str,
    flags: &[&str],
    samples: usize,
    how: Option<Signal>,
) -> Result<Vec<Duration>, Failure> {
    let folder = tempfile::tempdir()?;
    let flags = in_folder(flags, folder.path());
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mut daemon = Supervisor::start(binary, &flags);
    let mut engine = Engine::start(&daemon.socket(), "quest")?;
    let mut times = Vec::with_capacity(samples);
    for _ in 0..samples {
        engine.step()?;
        match how {
            Some(signal) => daemon.restart(signal),
            None => daemon.takeover(),
        }
        times.push(engine.step()?);
    }
    Ok(times)
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, binary, samples] = arguments.as_slice() else {
        return Err("usage: restarts DAEMON SAMPLES".into());
    };
    let samples = samples.parse()?;
    println!(
        "\n| the next daemon is there; an engine of one sequence, {PROMPT} tokens, goes on after | median, ms | p99, ms | most, ms |"
    );
    println!("|---|--:|--:|--:|");
    let in_place = ["--in-place", "true"];
    let (on_disk, in_both) = ([&in_place[..], &SPILL].concat(), [&["--slab", "16MiB"][..], &SPILL].concat());
    for (mode, flags) in [
        ("in place", &in_place[..]),
        ("slab", &["--slab", "16MiB"]),
        ("in place, nine tenths on disk", &on_disk),
        ("slab, nine tenths on disk", &in_both),
    ] {
        let ways =
            [("kill -9", Some(Signal::SIGKILL)), ("SIGTERM", Some(Signal::SIGTERM)), ("--takeover", None)];
        for (name, how) in ways {
            let mut times = pauses(binary, flags, samples, how)?;
            let (median, p99, most) = (at(&mut times, 0.5), at(&mut times, 0.99), at(&mut times, 1.0));
            println!("| {name}, {mode} | {median:.1} | {p99:.1} | {most:.1} |");
        }
    }
    println!("\n| a step of {STEPS}, {PROMPT} tokens, in place | not kept: median, ms | kept: median, ms |");
    println!("|---|--:|--:|");
    let steps = ["quest", "kvoyant", "resv", "dynsplit"].map(|method| (method, &in_place[..], ""));
    for (method, flags, more) in steps.into_iter().chain([("quest", &on_disk[..], ", nine tenths on disk")]) {
        let mut medians = [f64::INFINITY; 2];
        // Side by side, and the better of three: others use the machine.
        for _ in 0..3 {
            for (kept, median) in medians.iter_mut().enumerate() {
                let keep = ["off", "on"][kept];
                let folder = tempfile::tempdir()?;
                let flags = in_folder(&[flags, &["--keep-sessions", keep]].concat(), folder.path());
                let daemon = Daemon::start(binary, &flags.iter().map(String::as_str).collect::<Vec<_>>());
                let mut engine = Engine::start(&daemon.socket(), method)?;
                let mut times = (0..STEPS).map(|_| engine.step()).collect::<Result<Vec<_>, _>>()?;
                *median = median.min(at(&mut times, 0.5));
            }
        }
        println!("| {method}{more} | {:.2} | {:.2} |", medians[0], medians[1]);
    }
    Ok(())
}
