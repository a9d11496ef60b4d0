//! How lines are written for the journal.

use std::fmt;
use std::os::fd::BorrowedFd;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{Format, FormatEvent, FormatFields, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, format};
use tracing_subscriber::registry::LookupSpan;

/// Text with the syslog's priority before it, so that `journalctl -p warning` finds what it looks for, and without a time.
#[derive(Debug)]
pub(super) struct Journal(Format<Full, ()>);

impl Default for Journal {
    fn default() -> Self {
        Self(format().without_time().with_ansi(false))
    }
}

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "<{}>", priority(*event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}

/// As syslog numbers them.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

/// Whether the journal reads at this descriptor: systemd says in the environment which file that is.
pub(super) fn to_journal(stderr: BorrowedFd<'_>) -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(file) = nix::sys::stat::fstat(stderr) else { return false };
    stream == format!("{}:{}", file.st_dev, file.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_have_the_priorities_of_syslog() {
        let all = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];
        assert_eq!(all.map(priority), [3, 4, 6, 7, 7]);
    }
}
