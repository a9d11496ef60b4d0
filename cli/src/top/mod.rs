//! `kvoyant top`: what a running daemon does at this moment, what limits it, and what to turn.
//!
//! It asks the admin socket for the status every interval, and shows the differences: the daemon does nothing for it in between. What
//! has been asked for is drawn once, as text, with `--once` or where standard output is no terminal.
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
use std::time::{Duration, Instant};

use kvoyant_daemon::admin::{AdminError, fetch_status};
use kvoyant_daemon::config::Config;
use kvoyant_daemon::status::StatusReport;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use thiserror::Error;

use self::rates::{History, Rates};
use crate::args::TopArgs;

/// Columns and lines of a screen that is printed instead of drawn.
const PRINTED: (u16, u16) = (100, 30);

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
    let path = args.admin.clone().unwrap_or_else(|| Config::default().admin_socket);
    let interval = Duration::from_secs_f64(args.interval);
    if args.json || args.once || !io::stdout().is_terminal() {
        return once(&path, interval, args.json);
    }
    let mut watch = Watch::begin(path)?;
    let mut terminal = ratatui::try_init()?;
    let watched = watch.until_told(&mut terminal, interval);
    ratatui::try_restore()?;
    watched.map(|()| String::new())
}

/// One interval, as text or JSON.
fn once(path: &Path, interval: Duration, json: bool) -> Result<String, TopError> {
    let mut watch = Watch::begin(path.to_path_buf())?;
    std::thread::sleep(interval);
    watch.look();
    if let Some(error) = watch.error.take() {
        return Err(error.into());
    }
    if json {
        let value = serde_json::json!({
            "rates": watch.rates,
            "limit": limits::of(&watch.status, &watch.rates),
            "status": watch.status,
        });
        return Ok(format!("{value:#}\n"));
    }
    let Ok(mut terminal) = Terminal::new(TestBackend::new(PRINTED.0, PRINTED.1));
    let Ok(frame) = terminal.draw(|frame| view::draw(frame, &watch.shown()));
    let (width, cells) = (usize::from(frame.area.width), frame.buffer.content());
    let lines = cells.chunks(width).map(|line| {
        let text: String = line.iter().map(ratatui::buffer::Cell::symbol).collect();
        text.trim_end().to_owned()
    });
    let lines: Vec<_> = lines.collect();
    let used = lines.iter().rposition(|line| !line.is_empty()).map_or(0, |last| last + 1);
    Ok(lines[..used].join("\n") + "\n")
}

/// What is known, and for how long.
struct Watch {
    path: PathBuf,
    status: StatusReport,
    at: Instant,
    rates: Rates,
    history: History,
    /// Why the last look failed.
    error: Option<AdminError>,
}

impl Watch {
    fn begin(path: PathBuf) -> Result<Self, AdminError> {
        let status = fetch_status(&path)?;
        let (at, history) = (Instant::now(), History::default());
        Ok(Self { path, status, at, rates: Rates::default(), history, error: None })
    }

    /// Asks again. A daemon that does not answer may come back: what was known stays, with the reason.
    fn look(&mut self) {
        match fetch_status(&self.path) {
            Ok(status) => {
                let now = Instant::now();
                self.rates = Rates::between(&self.status, &status, now - self.at);
                self.history.add(&self.rates);
                (self.status, self.at, self.error) = (status, now, None);
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
    ) -> Result<(), TopError> {
        loop {
            terminal.draw(|frame| view::draw(frame, &self.shown()))?;
            let next = Instant::now() + interval;
            while let Some(left) = next.checked_duration_since(Instant::now()) {
                if !event::poll(left)? {
                    break;
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
