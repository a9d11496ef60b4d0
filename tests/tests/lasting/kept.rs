//! Sessions that would outlast their daemon, in what they are served: requests in their order, and waits with an end.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvoyant_client::{Error, Hint, Member};
use kvoyant_tests::supervisor::Supervisor;
use kvoyant_tests::{PATIENCE, fake};
use nix::sys::signal::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

#[test]
fn what_was_appended_is_there_for_a_control_message_however_far_behind_its_lane_is_with_its_journal() {
    // Answers are always on their way, so that nothing can be covered, and the lane rests until they have come.
    let daemon = Supervisor::start(DAEMON, &["--shape-latency-us", "3000"]);
    let model = fake::connect_at(&daemon.socket(), &["given"]);
    let busy = model.open(0, 4000).unwrap();
    fake::fill(&model, &busy, 1, 4000).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut pending, mut first) = (VecDeque::new(), 0);
            while !done.load(Ordering::Relaxed) {
                // Other rows each time, none of which is there.
                first = (first + 61) % 3800;
                let ids: Vec<u32> = (0..fake::KV_HEADS as u32)
                    .flat_map(|_| std::iter::once(20).chain((0..20).map(|i| 10 + first + i)))
                    .collect();
                let member = Member { sequence: &busy, position: busy.tokens(), hint: Hint::Ids(&ids) };
                pending.push_back(model.speculate(1, &[member]).unwrap());
                if pending.len() > 4 {
                    let ready = pending.pop_front().unwrap().wait(PATIENCE).unwrap();
                    fake::check(&ready, 0, 1, 1).unwrap();
                }
            }
        });
        let _ends = Ends(&done);
        for seed in 2..60 {
            let parent = model.open(0, 300).unwrap();
            let appends = 110 + seed * 13 % 100;
            // Each a request: so many that some are behind what may be uncovered.
            for tokens in 1..=appends {
                fake::fill(&model, &parent, seed, tokens).unwrap();
            }
            let child = parent.fork(None).unwrap();
            assert_eq!(child.tokens(), appends);
            model.reserve(&[(&child, 300)]).unwrap();
            fake::fill(&model, &child, seed, 300).unwrap();
            fake::check_rows(&model, &child, 0..300, seed);
            parent.truncate(30).unwrap();
            model.reserve(&[(&parent, 50)]).unwrap();
            fake::fill(&model, &parent, seed, 50).unwrap();
            parent.close().unwrap();
        }
    });
}

/// Ends the other thread, also where this one fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_wait_ends_in_time_while_there_is_no_daemon_and_loses_nobody_their_session() {
    let mut daemon = Supervisor::start(DAEMON, &[]);
    let model = fake::connect_at(&daemon.socket(), &["random:budget=50%"]);
    let (sequence, spare) = (model.open(0, 200).unwrap(), model.open(0, 10).unwrap());
    fake::fill(&model, &sequence, 1, 200).unwrap();
    fake::check(&fake::ask(&model, &sequence, 1), 0, 1, 1).unwrap();
    let _ = daemon.end(Signal::SIGKILL);
    let member = Member { sequence: &sequence, position: sequence.tokens(), hint: Hint::None };
    let pending = model.speculate(1, &[member]).unwrap();
    let since = Instant::now();
    let waited = pending.wait(Duration::from_millis(50));
    assert!(matches!(waited, Err(Error::Deadline { .. })), "{waited:?}");
    // What is dropped is told within a second, or not at all.
    drop(spare);
    assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    daemon.again();
    fake::check(&fake::ask(&model, &sequence, 1), 0, 1, 1).unwrap();
}
