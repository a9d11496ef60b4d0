//! Threads that share a session: each waits for what it asks itself, and not for what others ask.

use std::time::{Duration, Instant};

use kvoyant_client::{Client, Error, Options};
use kvoyant_tests::{Daemon, fake};
use nix::sys::signal::{Signal, kill};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

#[test]
fn who_waits_for_their_turn_at_the_daemon_holds_up_nobody_who_reads_the_same_sequence() {
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    let client = Client::connect(&daemon.socket(), Options::default()).unwrap();
    let model = client.register(fake::spec(&["full"]), &[]).unwrap();
    let (sequence, other) = (model.open(0, 300).unwrap(), model.open(0, 10).unwrap());
    fake::fill(&model, &sequence, 3, 200).unwrap();
    let (mut keys, mut values) = (vec![0.0; fake::HEAD_DIM], vec![0.0; fake::HEAD_DIM]);
    daemon.stop();
    std::thread::scope(|scope| {
        // Its request takes as long as the daemon stands still, as a suspension does as long as its disk.
        scope.spawn(|| other.truncate(0).unwrap());
        std::thread::sleep(Duration::from_millis(100));
        // These wait for their turn behind it.
        scope.spawn(|| drop(sequence.fork(None).unwrap()));
        scope.spawn(|| model.reserve(&[(&sequence, 600)]).unwrap());
        scope.spawn(|| sequence.truncate(200).unwrap());
        std::thread::sleep(Duration::from_millis(100));
        let (told, heard) = std::sync::mpsc::channel();
        let reader = scope.spawn({
            let (sequence, keys, values) = (&sequence, &mut keys, &mut values);
            move || {
                sequence.read(1, 0, 100..101, keys, values)?;
                let _ = told.send(sequence.tokens());
                Ok::<_, Error>(())
            }
        });
        let since = Instant::now();
        let read = heard.recv_timeout(Duration::from_secs(5));
        kill(daemon.pid(), Signal::SIGCONT).unwrap();
        reader.join().unwrap().unwrap();
        assert_eq!(read, Ok(200), "the reader waited {:?} for the others", since.elapsed());
    });
}
