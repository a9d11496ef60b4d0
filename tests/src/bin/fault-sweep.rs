//! Has calls of a daemon fail in turn, and prints what came of it: `scripts/faults`.
//!
//! `fault-sweep DAEMON [POINT [N]]`: every call of every kind, of one, or one call alone. `fault-sweep DAEMON driver [N]`, in a process whose
//! CUDA driver is softcuda: every call of the driver that a daemon on a GPU makes.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use kvoyant_protocol::faults::Point;
use kvoyant_tests::PATIENCE;
use kvoyant_tests::faults::{CLIENT_FAILED, CODES, Found, LOOKS, Seen, Sweep, act_as_client};

/// Of these there are as many calls as time passes, so that a sweep of them has no end of its own.
const BY_TIME: [Point; 3] = [Point::FutexWait, Point::FutexWaitMany, Point::FutexWake];
/// How many of them a sweep tries.
const BY_TIME_MOST: u64 = 60;

/// How many calls of the driver a sweep tries; a run makes fewer, unless it waits for something.
const DRIVER_MOST: u64 = 2000;
/// From call to call at which the device is lost: there are as many moments as queries, and those that follow one another are alike.
const LOST_EVERY: u64 = 7;

/// Calls that clients make too.
const OF_CLIENTS: [Point; 8] = [
    Point::Memfd,
    Point::MemfdSize,
    Point::Seal,
    Point::Map,
    Point::FutexWait,
    Point::FutexWake,
    Point::Send,
    Point::Receive,
];

/// Is a client with a fault.
fn client(socket: &Path) -> ExitCode {
    match act_as_client(socket, PATIENCE) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(error)) => {
            eprintln!("{error}");
            ExitCode::from(CLIENT_FAILED as u8)
        }
        Err(found) => {
            eprintln!("{found:?}");
            ExitCode::FAILURE
        }
    }
}

/// What one series of faults came to.
#[derive(Default)]
struct Tally {
    failed: u64,
    errors: u64,
    refused: u64,
    defects: u64,
}

impl Tally {
    /// Counts one; false if the fault did not happen any more.
    fn add(&mut self, what: &str, nth: u64, found: Result<Seen, Found>, tells: bool) -> bool {
        match found {
            Ok(seen) if !seen.hit => return false,
            Ok(seen) => {
                self.refused += u64::from(seen.refused);
                self.errors += u64::from(seen.error.is_some() && !seen.refused);
                if let (Some(error), true) = (seen.error, tells) {
                    println!("{error}");
                }
            }
            Err(found) => {
                println!("{what}:{nth}: {found:?}");
                self.defects += 1;
            }
        }
        self.failed += 1;
        true
    }
}

/// Has every call of the driver fail in turn, with each code, and the device be lost at moments of a run.
fn driver(daemon: &str, one: Option<u64>) -> ExitCode {
    let sweep = match Sweep::on_gpu(daemon, PATIENCE) {
        Ok(sweep) => sweep,
        Err(found) => {
            eprintln!("without a fault (on a GPU): {found:?}");
            return ExitCode::FAILURE;
        }
    };
    println!("| what fails | how often | clients saw an error | starts refused | s |");
    println!("|---|---|---|---|---|");
    let mut defects = 0;
    let mut series =
        |what: String, numbers: &mut dyn Iterator<Item = u64>, run: &dyn Fn(u64) -> Result<Seen, Found>| {
            let (since, mut tally) = (Instant::now(), Tally::default());
            for nth in numbers {
                if !tally.add(&what, nth, run(nth), one.is_some()) {
                    break;
                }
            }
            let Tally { failed, errors, refused, .. } = tally;
            println!("| {what} | {failed} | {errors} | {refused} | {} |", since.elapsed().as_secs());
            defects += tally.defects;
        };
    let all = one.unwrap_or(1)..=one.unwrap_or(DRIVER_MOST);
    for code in CODES {
        let run = |nth| sweep.run_driver(None, nth, code);
        series(format!("any call, {code}"), &mut all.clone(), &run);
        for look in LOOKS {
            let run = |nth| sweep.run_driver(Some(look), nth, code);
            series(format!("{look}, {code}"), &mut all.clone().take(BY_TIME_MOST as usize), &run);
        }
    }
    series("the device".into(), &mut all.step_by(LOST_EVERY as usize), &|nth| sweep.run_lost(nth));
    println!("{defects} defects");
    if defects == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let (Some(daemon), only) = (arguments.get(1), arguments.get(2)) else {
        eprintln!("usage: fault-sweep DAEMON [POINT [N]]");
        return ExitCode::FAILURE;
    };
    if daemon == "client" {
        return client(Path::new(only.map_or("", String::as_str)));
    }
    let one: Option<u64> = arguments.get(3).and_then(|nth| nth.parse().ok());
    if only.is_some_and(|only| only == "driver") {
        return driver(daemon, one);
    }
    let all =
        Point::ALL.into_iter().chain(if only.is_some() { Point::CANARIES.to_vec() } else { Vec::new() });
    let points: Vec<Point> = all.filter(|point| only.is_none_or(|only| only == point.name())).collect();
    if points.is_empty() {
        eprintln!("there are no calls of that kind; there are: {}", Point::ALL.map(Point::name).join(", "));
        return ExitCode::FAILURE;
    }
    let mut defects = Vec::new();
    println!("| call | failed in turn | clients saw an error | starts refused | s |");
    println!("|---|---|---|---|---|");
    for (flags, name) in
        [(&[][..], "slab"), (&["--in-place", "true", "--pin", "true"][..], "in place, pinned")]
    {
        let sweep = match Sweep::new(daemon, PATIENCE, flags) {
            Ok(sweep) => sweep,
            Err(found) => {
                eprintln!("without a fault ({name}): {found:?}");
                return ExitCode::FAILURE;
            }
        };
        for point in &points {
            let (since, mut failed, mut errors, mut refused) = (Instant::now(), 0, 0, 0);
            let last = if BY_TIME.contains(point) { BY_TIME_MOST } else { u64::MAX };
            for nth in one.unwrap_or(1)..=one.unwrap_or(last) {
                match sweep.run(*point, nth) {
                    Ok(seen) if !seen.hit => break,
                    Ok(seen) => {
                        refused += u64::from(seen.refused);
                        errors += u64::from(seen.error.is_some() && !seen.refused);
                        if let (Some(error), Some(_)) = (seen.error, one) {
                            println!("{error}");
                        }
                    }
                    Err(found) => {
                        println!("{}:{nth} ({name}): {found:?}", point.name());
                        defects.push(());
                    }
                }
                failed += 1;
            }
            let seconds = since.elapsed().as_secs();
            println!("| {} ({name}) | {failed} | {errors} | {refused} | {seconds} |", point.name());
        }
        let served = sweep.serve().map(|served| (served, std::env::current_exe()));
        let Ok((mut served, Ok(program))) = served else {
            eprintln!("no daemon for clients with faults ({name})");
            return ExitCode::FAILURE;
        };
        for point in points.iter().filter(|point| OF_CLIENTS.contains(point)) {
            let (since, mut failed, mut errors) = (Instant::now(), 0, 0);
            let last = if BY_TIME.contains(point) { BY_TIME_MOST } else { u64::MAX };
            for nth in one.unwrap_or(1)..=one.unwrap_or(last) {
                match sweep.run_client(&mut served, &program, *point, nth) {
                    Ok(seen) if !seen.hit => break,
                    Ok(seen) => errors += u64::from(seen.error.is_some()),
                    Err(found) => {
                        println!("{}:{nth} (of a client, {name}): {found:?}", point.name());
                        defects.push(());
                    }
                }
                failed += 1;
            }
            let seconds = since.elapsed().as_secs();
            println!("| {} (of a client, {name}) | {failed} | {errors} | – | {seconds} |", point.name());
        }
    }
    println!("{} defects", defects.len());
    if defects.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
