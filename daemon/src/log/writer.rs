//! Lines go to standard error through a queue and a thread of its own: a pipe that nobody reads holds up that thread and nobody else. What
//! finds no room in the queue is dropped and counted.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

/// Lines that may wait: a few MiB, and more than any start writes.
const LINES_MAX: usize = 8192;

/// What the thread gets.
enum Order {
    Line(Vec<u8>),
    /// Say when all before it is written.
    Flush(Sender<()>),
}

/// Without a thread (none could be started) lines are written by whoever has them.
static QUEUE: OnceLock<Option<Sender<Order>>> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Lines that were dropped since the start, because nobody read what was written before them.
pub(crate) fn dropped_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Starts the thread. Whatever it needs is there from the daemon's start on, and no part of what a client costs.
pub(super) fn open() {
    QUEUE.get_or_init(queue);
}

/// A line that is being written. It goes to the queue when it is whole.
#[derive(Debug, Default)]
pub(super) struct Line(Vec<u8>);

/// A new line.
pub(super) fn start() -> Line {
    Line::default()
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let line = std::mem::take(&mut self.0);
        match QUEUE.get_or_init(queue) {
            Some(queue) => offer(queue, line, &DROPPED),
            None => drop(io::stderr().write_all(&line)),
        }
    }
}

fn offer(queue: &Sender<Order>, line: Vec<u8>, dropped: &AtomicU64) {
    if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = queue.try_send(Order::Line(line)) {
        dropped.fetch_add(1, Ordering::Relaxed);
    }
}

fn queue() -> Option<Sender<Order>> {
    let (queue, lines) = bounded(LINES_MAX);
    // A descriptor of its own: whoever waits in the standard library's writer holds its lock.
    let to = File::from(io::stderr().as_fd().try_clone_to_owned().ok()?);
    let thread = std::thread::Builder::new().name("log".into());
    // It ends with the process: nobody ever closes the queue.
    let started = thread.spawn(move || write(&lines, to, &DROPPED));
    started.ok().map(|_| queue)
}

/// Writes lines until the queue is closed, and says how many are missing once there is somebody who reads again.
fn write(orders: &Receiver<Order>, mut to: impl Write, dropped: &AtomicU64) {
    let mut told = 0;
    for order in orders {
        match order {
            // A reader that has gone is no reason to end: the daemon serves all the same.
            Order::Line(line) => drop(to.write_all(&line)),
            Order::Flush(done) => drop(done.send(())),
        }
        let missing = dropped.load(Ordering::Relaxed);
        if missing > told {
            told = missing;
            let _ = writeln!(
                to,
                "kvoyantd: nobody read the log for a while: {missing} lines were dropped since the start"
            );
        }
    }
}

/// Writes a line for people, which no filter keeps back, behind what has been logged.
pub(crate) fn say(line: &str) {
    start().0.extend_from_slice(format!("{line}\n").as_bytes());
}

/// Waits until what has been logged so far is written, or until nobody can be expected to read it any more.
pub(crate) fn flush(within: Duration) {
    let Some(Some(queue)) = QUEUE.get() else { return };
    let (done, written) = bounded(1);
    if queue.send_timeout(Order::Flush(done), within).is_ok() {
        let _ = written.recv_timeout(within);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn what_finds_no_room_is_dropped_and_counted_and_told_once_somebody_reads() {
        let (queue, orders) = bounded(4);
        let dropped = std::sync::Arc::new(AtomicU64::new(0));
        for number in 0..10 {
            offer(&queue, format!("line {number}\n").into_bytes(), &dropped);
        }
        assert_eq!(dropped.load(Ordering::Relaxed), 6);
        let (mut reader, pipe) = io::pipe().unwrap();
        let thread = {
            let dropped = std::sync::Arc::clone(&dropped);
            std::thread::spawn(move || write(&orders, pipe, &dropped))
        };
        drop(queue);
        thread.join().unwrap();
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines.len(), 5, "{said}");
        assert_eq!(lines.iter().filter(|line| line.starts_with("line ")).count(), 4);
        assert!(lines[1].contains("6 lines were dropped"), "{said}");
    }
}
