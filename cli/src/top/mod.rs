//! `kvoyant top`: what a running daemon does at this moment, what limits it, and what to turn.
//!
//! Every interval it takes the status from the daemon's [stats page](kvoyant_daemon::stats_page), in which the daemon has no part, and
//! shows the differences; where there is no such page, or it may not be read, it asks the admin socket. What has been asked for is
//! drawn once, as text, with `--once` or where standard output is no terminal.
//!
//! | room | what lives there |
//! |---|---|
//! | `rates` | two statuses become rates |
//! | `limits` | what limits, and the knob |
//! | `view` | the screen |

mod limits;
mod rates;
#[cfg(test)]
mod tests;
mod view;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvoyant_daemon::admin::{AdminError, fetch_status};
use kvoyant_daemon::stats_page;
use kvoyant_daemon::status::StatusReport;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use thiserror::Error;

use self::rates::{History, Rates};
use crate::args::TopArgs;
use crate::operate::{admin_socket, listened_at};

/// A page is written twice a second: differences over less than this are asked for.
const PAGE_INTERVAL: Duration = Duration::from_secs(1);

/// Columns of a screen that is printed instead of drawn.
const PRINTED_COLUMNS: u16 = 100;

/// How often it is looked whether a signal came.
const LOOK_FOR_SIGNALS: Duration = Duration::from_millis(100);

/// Why it ended.
#[derive(Debug, Error)]
pub(crate) enum TopError {
    /// The daemon cannot be asked.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The terminal failed.
    #[error("the terminal failed: {0}; `kvoyant top --once` needs none")]
    Terminal(#[from] io::Error),
}

/// Shows the daemon until somebody presses `q`; what is to be printed instead, where that was asked for or there is no terminal.
///
/// # Errors
/// If the daemon cannot be asked at the start, or the terminal fails.
pub(crate) fn run(args: &TopArgs) -> Result<String, TopError> {
    let path = admin_socket(args.admin.as_ref())?;
    let interval = Duration::from_secs_f64(args.interval);
    if args.json || args.once || !io::stdout().is_terminal() {
        return once(&path, interval, args.json);
    }
    let mut watch = Watch::begin(path, interval)?;
    let told = Arc::new(AtomicUsize::new(0));
    for signal in [SIGTERM, SIGHUP, SIGINT] {
        signal_hook::flag::register_usize(signal, Arc::clone(&told), signal as usize)?;
    }
    let mut terminal = ratatui::try_init()?;
    let watched = watch.until_told(&mut terminal, interval, &told);
    let restored = ratatui::try_restore();
    // It shows the cursor again.
    drop(terminal);
    if let signal @ 1.. = told.load(Ordering::Relaxed) {
        // The terminal is as it was: now the signal does what it would have done.
        signal_hook::low_level::emulate_default_handler(signal as i32)?;
    }
    restored?;
    watched.map(|()| String::new())
}

/// One interval, as text or JSON.
fn once(path: &Path, interval: Duration, json: bool) -> Result<String, TopError> {
    let mut watch = Watch::begin(path.to_path_buf(), interval)?;
    std::thread::sleep(interval);
    // A page outlasts a daemon that was killed, for seconds.
    listened_at(path)?;
    watch.look();
    if let Some(error) = watch.error.take() {
        return Err(error.into());
    }
    if json {
        let value = serde_json::json!({
            "read_from": watch.source,
            "rates": watch.rates,
            "limit": limits::of(&watch.status, &watch.rates),
            "status": watch.status,
        });
        return Ok(format!("{value:#}\n"));
    }
    Ok(printed(&watch.shown()))
}

/// A screen as text: as many lines as there is something in.
fn printed(shown: &view::Shown<'_>) -> String {
    let Ok(mut terminal) = Terminal::new(TestBackend::new(PRINTED_COLUMNS, view::printed_lines(shown)));
    let Ok(frame) = terminal.draw(|frame| view::print(frame, shown));
    let (width, cells) = (usize::from(frame.area.width), frame.buffer.content());
    let lines = cells.chunks(width).map(|line| {
        let text: String = line.iter().map(ratatui::buffer::Cell::symbol).collect();
        text.trim_end().to_owned() + "\n"
    });
    lines.collect()
}

/// Where a status was had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Source {
    /// Shared memory that the daemon writes to anyway.
    StatsPage,
    /// The daemon was asked.
    AdminSocket,
}

/// The status: from the page, if there is one that is current and differences are long enough for it.
fn status(path: &Path, interval: Duration) -> Result<(StatusReport, Source), AdminError> {
    match stats_page::read(path) {
        Ok(status) if interval >= PAGE_INTERVAL => Ok((status, Source::StatsPage)),
        _ => fetch_status(path).map(|status| (status, Source::AdminSocket)),
    }
}

/// What is known, and for how long.
struct Watch {
    path: PathBuf,
    interval: Duration,
    source: Source,
    status: StatusReport,
    rates: Rates,
    history: History,
    /// Why the last look failed.
    error: Option<AdminError>,
}

impl Watch {
    fn begin(path: PathBuf, interval: Duration) -> Result<Self, AdminError> {
        let (status, source) = status(&path, interval)?;
        let (rates, history) = (Rates::default(), History::default());
        Ok(Self { path, interval, source, status, rates, history, error: None })
    }

    /// Asks again. A daemon that does not answer may come back: what was known stays, with the reason.
    fn look(&mut self) {
        match status(&self.path, self.interval) {
            Ok((status, source)) => {
                // By the daemon's own clock: a page is up to half a second old.
                let between = (status.uptime_s - self.status.uptime_s).max(0.0);
                self.rates = Rates::between(&self.status, &status, Duration::from_secs_f64(between));
                self.history.add(&self.rates);
                (self.status, self.source, self.error) = (status, source, None);
            }
            Err(error) => self.error = Some(error),
        }
    }

    fn shown(&self) -> view::Shown<'_> {
        view::Shown {
            status: &self.status,
            rates: &self.rates,
            history: &self.history,
            limit: limits::of(&self.status, &self.rates),
            error: self.error.as_ref().map(ToString::to_string),
        }
    }

    fn until_told(
        &mut self,
        terminal: &mut ratatui::DefaultTerminal,
        interval: Duration,
        signal: &AtomicUsize,
    ) -> Result<(), TopError> {
        loop {
            terminal.draw(|frame| view::draw(frame, &self.shown()))?;
            let next = Instant::now() + interval;
            while let Some(left) = next.checked_duration_since(Instant::now()) {
                if signal.load(Ordering::Relaxed) != 0 {
                    return Ok(());
                }
                if !event::poll(left.min(LOOK_FOR_SIGNALS))? {
                    continue;
                }
                match event::read()? {
                    Event::Key(key) if key.kind == KeyEventKind::Press => {
                        let control = key.modifiers.contains(KeyModifiers::CONTROL);
                        match key.code {
                            KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                            KeyCode::Char('c') if control => return Ok(()),
                            _ => {}
                        }
                    }
                    Event::Resize(..) => break,
                    _ => {}
                }
            }
            self.look();
        }
    }
}
