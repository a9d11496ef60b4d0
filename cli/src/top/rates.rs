//! Two statuses become rates: what was done between them, by second.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use kvoyant_daemon::status::{SessionReport, StatusReport};
use serde::Serialize;

/// How many intervals the sparkline has.
const KEPT: usize = 200;

/// What is done in a second, all sessions together or one alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Work {
    /// Speculations answered.
    pub(super) answers: f64,
    /// Bytes copied to the device, for answers and ahead of them.
    pub(super) moved_bytes: f64,
    /// Selected rows, and those that nothing had to be moved for.
    pub(super) selected_rows: f64,
    /// See `selected_rows`.
    pub(super) found_rows: f64,
    /// Seconds of selecting and planning.
    pub(super) select_s: f64,
    /// Seconds from plan to the last byte.
    pub(super) transfer_s: f64,
    /// Seconds that answers waited for pages from disk.
    pub(super) page_wait_s: f64,
    /// Pages read from disk, and written.
    pub(super) pages_read: f64,
    /// See `pages_read`.
    pub(super) pages_written: f64,
    /// Rows left out because they would have come late.
    pub(super) late_rows: f64,
}

impl Work {
    fn between(before: &SessionReport, after: &SessionReport, seconds: f64) -> Self {
        let rate =
            |value: fn(&SessionReport) -> u64| value(after).saturating_sub(value(before)) as f64 / seconds;
        Self {
            answers: rate(|s| s.speculations),
            moved_bytes: rate(|s| s.bytes_moved + s.prefetch_bytes),
            selected_rows: rate(|s| s.rows_selected + s.graph_hits + s.graph_misses),
            found_rows: rate(|s| s.rows_hit + s.rows_in_place + s.graph_hits),
            select_s: rate(|s| s.select_ns) * 1e-9,
            transfer_s: rate(|s| s.transfer_ns) * 1e-9,
            page_wait_s: rate(|s| s.page_wait_ns) * 1e-9,
            pages_read: rate(|s| s.pages_read),
            pages_written: rate(|s| s.pages_written),
            late_rows: rate(|s| s.late_rows),
        }
    }

    fn add(&mut self, other: &Self) {
        self.answers += other.answers;
        self.moved_bytes += other.moved_bytes;
        self.selected_rows += other.selected_rows;
        self.found_rows += other.found_rows;
        self.select_s += other.select_s;
        self.transfer_s += other.transfer_s;
        self.page_wait_s += other.page_wait_s;
        self.pages_read += other.pages_read;
        self.pages_written += other.pages_written;
        self.late_rows += other.late_rows;
    }

    /// The share of selected rows that nothing had to be moved for; `None` if none were selected.
    pub(super) fn hits(&self) -> Option<f64> {
        (self.selected_rows > 0.0).then(|| self.found_rows / self.selected_rows)
    }

    /// Seconds that an answer took in the mean, without its time in the queue; `None` if there were none.
    pub(super) fn answer_s(&self) -> Option<f64> {
        (self.answers > 0.0).then(|| (self.select_s + self.transfer_s) / self.answers)
    }
}

/// What was done between two looks.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Rates {
    /// All sessions together.
    pub(super) all: Work,
    /// By session.
    pub(super) sessions: BTreeMap<u64, Work>,
}

impl Rates {
    /// Nothing, where the daemon has been started anew meanwhile. What sessions did that are not there any more is not known.
    pub(super) fn between(before: &StatusReport, after: &StatusReport, time: Duration) -> Self {
        let mut rates = Self::default();
        let seconds = time.as_secs_f64();
        if before.boot_id != after.boot_id || seconds <= 0.0 {
            return rates;
        }
        for session in &after.sessions {
            let Some(earlier) = before.sessions.iter().find(|earlier| earlier.id == session.id) else {
                continue;
            };
            let work = Work::between(earlier, session, seconds);
            rates.all.add(&work);
            rates.sessions.insert(session.id, work);
        }
        rates
    }
}

/// The time of an answer, interval by interval, for the sparkline.
#[derive(Debug, Default)]
pub(super) struct History(VecDeque<u64>);

impl History {
    /// One more interval.
    pub(super) fn add(&mut self, rates: &Rates) {
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        let micros = rates.all.answer_s().map_or(0.0, |seconds| seconds * 1e6);
        self.0.push_back(micros as u64);
    }

    /// The last `most` of them, in µs; 0 where there was no answer.
    pub(super) fn last(&self, most: usize) -> Vec<u64> {
        self.0.iter().skip(self.0.len().saturating_sub(most)).copied().collect()
    }
}
