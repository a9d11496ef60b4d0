//! `kvoyant-hostile run`: every attack on a real daemon, and a table of what came of them. The other commands are its own.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use kvoyant_hostile::runner::{Options, run};
use kvoyant_hostile::stage::Stage;
use kvoyant_hostile::{Outcome, attacks, reap, report};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

/// Attacks on a Kvoyant daemon, with a neighbour beside them
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Do,
}

#[derive(Debug, Subcommand)]
enum Do {
    /// Run attacks and print what came of them; fails unless every one ended as it has to
    Run {
        /// Only attacks with this in their name
        #[arg(long, value_name = "NAME")]
        only: Vec<String>,
        /// Name them instead
        #[arg(long)]
        list: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Leave out what takes seconds, and do less of what can be done in parts
        #[arg(long)]
        quick: bool,
        /// The daemon's binary; without it, this program itself is the daemon
        #[arg(long, value_name = "FILE")]
        daemon: Option<PathBuf>,
        /// Run the canaries instead, which have to be reported as what they are
        #[arg(long)]
        canaries: bool,
    },
    /// Kill clients at random moments, and print how long it takes until everything of theirs is back
    Reap {
        /// How many
        #[arg(default_value_t = 1000)]
        kills: usize,
        /// What moments
        #[arg(long, default_value_t = 8)]
        seed: u64,
        /// The daemon's binary; without it, this program itself is the daemon
        #[arg(long, value_name = "FILE")]
        daemon: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Be a client that works until it is killed
    #[command(hide = true)]
    Victim {
        socket: PathBuf,
        seed: u64,
        #[arg(long)]
        leave_child: bool,
    },
    /// Be a daemon
    #[command(hide = true)]
    Serve {
        #[arg(long)]
        die_with_parent: u32,
        #[command(flatten)]
        daemon: Box<kvoyant_daemon::Args>,
    },
    /// Open a session and stay until the daemon goes
    #[command(hide = true)]
    Hold { socket: PathBuf },
    /// Be an attacker
    #[command(hide = true)]
    Attack {
        name: String,
        #[command(flatten)]
        at: At,
    },
    /// Be a part of an attack
    #[command(hide = true)]
    Role {
        name: String,
        #[command(flatten)]
        at: At,
    },
    /// Talk on the socket that standard input is
    #[command(hide = true)]
    Talk,
}

/// Where a daemon is.
#[derive(Debug, Args)]
struct At {
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    admin: PathBuf,
    #[arg(long)]
    daemon_pid: i32,
    #[arg(long)]
    long: bool,
}

impl At {
    fn stage(self) -> Stage {
        Stage { socket: self.socket, admin: self.admin, daemon: self.daemon_pid, long: self.long }
    }
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Do::Run { only, list, json, quick, daemon, canaries } => {
            let named = |name: &str| only.is_empty() || only.iter().any(|part| name.contains(part));
            let table = if canaries { attacks::canaries() } else { attacks::table() };
            let attacks: Vec<_> =
                table.into_iter().filter(|attack| named(attack.name) && !(quick && attack.slow)).collect();
            if list {
                for attack in &attacks {
                    println!("{:<34} {:<7} {}", attack.name, attack.expected.to_string(), attack.does);
                }
                println!("{} attacks", attacks.len());
                return ExitCode::SUCCESS;
            }
            let Some(program) = this_program() else { return ExitCode::FAILURE };
            let options = Options { daemon, long: !quick, ..Options::quick(program) };
            if !json {
                println!("{}", report::head());
            }
            let results = run(&attacks, &options, |result| {
                if !json {
                    println!("{}", report::line(result));
                }
            });
            if json {
                match serde_json::to_string_pretty(&results) {
                    Ok(text) => println!("{text}"),
                    Err(error) => eprintln!("kvoyant-hostile: {error}"),
                }
            } else {
                println!("{}", report::sum(&results));
            }
            let held = !results.is_empty() && results.iter().all(kvoyant_hostile::runner::Result::holds);
            if held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Do::Reap { kills, seed, daemon, json } => {
            let Some(program) = this_program() else { return ExitCode::FAILURE };
            let options = Options { daemon, ..Options::quick(program) };
            let killed = reap::run(&options, kills, seed, |_| {});
            match json.then(|| serde_json::to_string_pretty(&killed)) {
                Some(Ok(text)) => println!("{text}"),
                Some(Err(error)) => eprintln!("kvoyant-hostile: {error}"),
                None => println!("{}", reap::report(&killed)),
            }
            let back = killed.iter().all(|one| one.back_ms.is_ok());
            if back { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Do::Victim { socket, seed, leave_child } => {
            let _ = set_pdeathsig(Signal::SIGKILL);
            match reap::victim(&socket, seed, leave_child) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("kvoyant-hostile: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        Do::Serve { die_with_parent, daemon } => {
            let _ = set_pdeathsig(Signal::SIGKILL);
            if nix::unistd::getppid().as_raw() != die_with_parent as i32 {
                return ExitCode::FAILURE;
            }
            kvoyant_daemon::main(&daemon)
        }
        Do::Hold { socket } => {
            let mut raw = kvoyant_tests::raw::Raw::connect(&socket, kvoyant_tests::fake::spec(&["full"]));
            while raw.hear().is_ok() {}
            ExitCode::SUCCESS
        }
        Do::Attack { name, at } => {
            let _ = set_pdeathsig(Signal::SIGKILL);
            let every = attacks::table().into_iter().chain(attacks::canaries());
            let outcome = match every.into_iter().find(|attack| attack.name == name) {
                Some(attack) => (attack.run)(&at.stage()),
                None => Outcome::fail(format!("there is no attack {name}")),
            };
            println!("{}", serde_json::to_string(&outcome).unwrap_or_default());
            ExitCode::SUCCESS
        }
        Do::Role { name, at } => {
            let _ = set_pdeathsig(Signal::SIGKILL);
            attacks::play(&at.stage(), &name);
            ExitCode::SUCCESS
        }
        Do::Talk => {
            attacks::talk();
            ExitCode::SUCCESS
        }
    }
}

fn this_program() -> Option<PathBuf> {
    std::env::current_exe()
        .inspect_err(|error| eprintln!("kvoyant-hostile: it cannot find itself: {error}"))
        .ok()
}
