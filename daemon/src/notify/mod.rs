//! What the daemon tells its service manager, and what it gets from it: systemd's protocols, which others speak as well.
//!
//! The manager hears that the daemon is ready, reloads or stops, in one line how it is, and, where a watchdog is asked for, that its
//! threads move ([`Watch`]). One thread says all that, so that a manager who does not listen holds up nobody else. Without a manager
//! (`NOTIFY_SOCKET` is not set) nothing is said and no thread is started.
//!
//! | room | what lives there |
//! |---|---|
//! | `inherited` | sockets that the manager made |
//! | `watch` | whether threads move |

mod inherited;
mod watch;

use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use sd_notify::NotifyState;

pub(crate) use inherited::InheritError;
pub(crate) use inherited::{Inherited, Listener};
pub(crate) use watch::{Pulse, Watch};

/// How often the line about the daemon is looked at where nothing else needs the thread more often.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// How long the end waits for the manager to hear of it.
const LAST_WORD: Duration = Duration::from_millis(500);

/// What is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Ready,
    Reloading,
    Stopping,
}

/// The service manager, for whoever has something to say.
#[derive(Debug)]
pub(crate) struct Manager {
    words: Option<Sender<Word>>,
    thread: Option<JoinHandle<()>>,
    ended: Receiver<()>,
}

/// What the manager hears of.
pub(crate) struct Subject {
    /// One line for people: how the daemon is.
    pub(crate) line: Box<dyn Fn() -> String + Send>,
    /// Threads that have to move.
    pub(crate) watched: Vec<(String, std::sync::Arc<Pulse>)>,
}

/// How often the watchdog wants to hear that the daemon lives, if there is one.
pub(crate) fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled().filter(|period| !period.is_zero())
}

impl Manager {
    /// Starts to talk to the manager, if there is one.
    ///
    /// # Errors
    /// If there is one and the thread cannot be started.
    pub(crate) fn start(subject: Subject) -> io::Result<Self> {
        let (words, inbox) = unbounded();
        let (end, ended) = bounded(0);
        if std::env::var_os("NOTIFY_SOCKET").is_none() {
            return Ok(Self { words: None, thread: None, ended });
        }
        let thread = crate::threads::start("notify", move || {
            // Dropped when the thread ends, which its receiver sees.
            let _end = end;
            talk(&inbox, &subject, watchdog());
        })?;
        Ok(Self { words: Some(words), thread: Some(thread), ended })
    }

    /// Whether there is one that listens.
    pub(crate) fn is_there(&self) -> bool {
        self.words.is_some()
    }

    fn say(&self, word: Word) {
        if let Some(words) = &self.words {
            let _ = words.send(word);
        }
    }

    /// Clients and operators are served from now on, or by new rules.
    pub(crate) fn ready(&self) {
        self.say(Word::Ready);
    }

    /// The configuration is being read again; [`Self::ready`] says when that is done.
    pub(crate) fn reloading(&self) {
        self.say(Word::Reloading);
    }

    /// The daemon ends, in good order.
    pub(crate) fn stopping(&self) {
        self.say(Word::Stopping);
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.words = None;
        // A manager that does not listen is not waited for.
        if let (Err(RecvTimeoutError::Disconnected), Some(thread)) =
            (self.ended.recv_timeout(LAST_WORD), self.thread.take())
        {
            let _ = thread.join();
        }
    }
}

/// Passes words on, and pings for as long as everything moves, until there is nobody who says any.
fn talk(inbox: &Receiver<Word>, subject: &Subject, watchdog: Option<Duration>) {
    let every = watchdog.map_or(LINE_EVERY, |period| period / 4).clamp(Duration::from_millis(1), LINE_EVERY);
    let patience = watchdog.unwrap_or(Duration::MAX) / 2;
    let mut watch = Watch::new(subject.watched.clone(), patience, Instant::now());
    let mut last_line = String::new();
    let mut ready = false;
    let mut next = Instant::now();
    loop {
        match inbox.recv_deadline(next) {
            Ok(word) => {
                ready |= word == Word::Ready;
                match word {
                    Word::Ready => send(&[NotifyState::Ready]),
                    Word::Stopping => send(&[NotifyState::Stopping]),
                    // The manager knows by the time which of its requests this is about.
                    Word::Reloading => match NotifyState::monotonic_usec_now() {
                        Ok(now) => send(&[NotifyState::Reloading, now]),
                        Err(_) => send(&[NotifyState::Reloading]),
                    },
                }
                // The line follows at once: it is about what has just changed.
                next = Instant::now();
            }
            Err(RecvTimeoutError::Timeout) => {
                let line = if ready { (subject.line)() } else { "starting".to_owned() };
                if line != last_line {
                    send(&[NotifyState::Status(&line)]);
                    last_line = line;
                }
                if watchdog.is_some() && watch.all_move(Instant::now()) {
                    send(&[NotifyState::Watchdog]);
                }
                next = Instant::now() + every;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn send(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!("the service manager cannot be told {state:?}: {error}");
    }
}
