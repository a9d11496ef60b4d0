//! `kvoyant serve`: the daemon, in this process.

use std::path::Path;
use std::process::ExitCode;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

use crate::args::ServeArgs;
use crate::private_daemon::LOG_FILE;

/// Runs the daemon until it is told to stop.
///
/// With `--die-with-parent` the kernel sends SIGTERM when the parent is gone, however it went, and the daemon then
/// takes its folder along, which the parent cannot do any more.
pub(crate) fn main(args: &ServeArgs) -> ExitCode {
    if let Some(parent) = args.die_with_parent {
        if let Err(error) = set_pdeathsig(Signal::SIGTERM) {
            crate::say::say(format_args!("error: the daemon cannot be bound to its parent: {error}"));
            return ExitCode::FAILURE;
        }
        // A parent that died before the line above sends nothing any more.
        if i32::try_from(parent).map(Pid::from_raw) != Ok(getppid()) {
            return ExitCode::FAILURE;
        }
    }
    let code = kvoyant_daemon::main(&args.daemon);
    // A daemon that failed leaves its words for the parent. Whether the parent is still there cannot be asked: of a
    // killed process the threads die one after the other, and it counts as there until the last one has.
    if code == ExitCode::SUCCESS
        && args.die_with_parent.is_some()
        && let Some(folder) = args.daemon.flags.socket.as_deref().and_then(Path::parent)
    {
        // Only what the parent put there; a folder that holds anything else stays.
        let _ = std::fs::remove_file(folder.join(LOG_FILE));
        let _ = std::fs::remove_dir(folder);
    }
    code
}
