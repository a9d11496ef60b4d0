//! `kvoyant doctor`: whether this machine can do what the daemon needs, tried and not only asked.
//!
//! Run it as the daemon's user, in the daemon's container. It harms nothing: it maps a few MiB, in processes of its own, and writes as
//! much beside what the daemon has on disk, which it removes.

mod check;
mod gpu;
mod host;
mod images;
mod kernels;
mod peer;
mod spill;

use std::process::ExitCode;

use kvoyant_daemon::config::Config;
use kvoyant_daemon::device::DeviceName;

use crate::args::DoctorArgs;
use check::{Level, Report};
use gpu::Patient;

/// Does it, and says it; fails if the named device cannot be used.
pub(crate) fn main(args: &DoctorArgs) -> ExitCode {
    let (text, usable) = match &args.peer {
        Some(order) => (peer::serve(order), true),
        None => {
            let report = examine(args);
            let text = if args.json {
                serde_json::to_string_pretty(&report).unwrap_or_default() + "\n"
            } else {
                report.words()
            };
            (text, report.usable)
        }
    };
    if let Err(error) = crate::print(&text) {
        crate::say::say(format_args!("error: {error}"));
        return ExitCode::FAILURE;
    }
    if usable { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn examine(args: &DoctorArgs) -> Report {
    let loaded = Config::load(args.config.as_deref(), args.flags());
    let config = loaded.as_ref().map_or_else(|_| Config::default(), Clone::clone);
    let device = args.device.unwrap_or_else(|| config.device_name());
    let mut report = Report::new(device.to_string());
    match loaded {
        Ok(_) => report
            .pass("configuration", format!("device {device}, arena {}", gpu::gib(config.arena.as_u64()))),
        Err(error) => {
            let found = format!("{error}; defaults are looked at instead");
            report.add("configuration", Level::Fail, found, Some("kvoyantd --check".into()));
        }
    }
    host::examine(&mut report, &config);
    spill::examine(&mut report, &config);
    images::examine(&mut report, &config);
    let (ordinal, bad) = match device {
        DeviceName::Cuda(ordinal) => (ordinal, Level::Fail),
        DeviceName::Host => (0, Level::Warn),
    };
    if let Some((driver, info)) = gpu::find(&mut report, ordinal, bad) {
        Patient { driver, info: &info, config: &config, bad }.examine(&mut report);
        host::container(&mut report);
    }
    report
}
