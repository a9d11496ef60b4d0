//! What is said on standard error beside a result.

use std::io::Write;

/// Says a line. Where nobody takes it (a pipe that is closed, a disk that is full), what it belongs to goes on all the same.
pub(crate) fn say(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
