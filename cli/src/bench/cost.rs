//! What a method cost, in a row: the one place where live runs and replays are put at the same accounting.

use kvoyant_eval::model::{self as modelled, Seen};
use kvoyant_eval::row::Row;
use kvoyant_methods::HintSource;

/// What a method was seen to cost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cost {
    /// Which query it wants.
    pub(super) hint: HintSource,
    /// Bytes of the rows that it selects from, of one sequence, all layers; 0 where it selects nothing.
    pub(super) kv_bytes: f64,
    /// Layers that they are of.
    pub(super) layers: usize,
    /// See [`Row::bytes_per_token`].
    pub(super) bytes_per_token: f64,
    /// See [`Row::bytes_per_token_steady`].
    pub(super) bytes_per_token_steady: f64,
    /// See [`Row::feedback_bytes_per_token`].
    pub(super) feedback_bytes_per_token: f64,
    /// Of the bytes, what was brought ahead of its step, or recalled behind its back.
    pub(super) ahead_bytes_per_token: f64,
    /// Rows selected, as a share of those selected from.
    pub(super) selected_share: f64,
    /// Rows that the CPU attended, likewise.
    pub(super) cpu_share: f64,
    /// Rows resident, likewise.
    pub(super) resident_share: f64,
    /// Whether these are all attended, not only those selected.
    pub(super) attends_resident: bool,
    /// Bytes of digests, states and memories.
    pub(super) digest_bytes: f64,
    /// Microseconds to select for one layer.
    pub(super) select_us: Option<f64>,
    /// Share of the selected rows that were resident.
    pub(super) hit_rate: Option<f64>,
}

impl Cost {
    /// A row with these costs and nothing else.
    pub(super) fn row(&self) -> Row {
        let share = |bytes: f64| if self.kv_bytes > 0.0 { bytes / self.kv_bytes } else { 0.0 };
        let layer_bytes = self.kv_bytes / self.layers.max(1) as f64;
        let resident = if self.attends_resident { self.resident_share } else { 0.0 };
        let seen = Seen {
            hint: self.hint,
            moved_share: share(self.bytes_per_token),
            // No step waits for what an attention row for the method needs: it comes after the step.
            ahead_share: share(self.ahead_bytes_per_token + self.feedback_bytes_per_token),
            attended_share: (self.selected_share - self.cpu_share).max(resident),
            cpu_share: self.cpu_share,
            select_s_per_byte: match self.select_us {
                Some(us) if layer_bytes > 0.0 => us * 1e-6 / layer_bytes,
                _ => 0.0,
            },
        };
        Row {
            hint: hint_name(self.hint).into(),
            selected_share: self.selected_share,
            bytes_per_token: self.bytes_per_token,
            bytes_per_token_steady: self.bytes_per_token_steady,
            feedback_bytes_per_token: self.feedback_bytes_per_token,
            resident_bytes: self.resident_share * self.kv_bytes,
            resident_share: self.resident_share,
            digest_bytes: self.digest_bytes,
            digest_share: share(self.digest_bytes),
            select_us: self.select_us,
            hit_rate: self.hit_rate,
            modelled: if self.layers > 0 { modelled::all(&seen) } else { Vec::new() },
            ..Row::default()
        }
    }
}

/// The query that a method selects by, in a word.
fn hint_name(hint: HintSource) -> &'static str {
    match hint {
        HintSource::None => "none",
        HintSource::Ahead => "ahead",
        HintSource::Previous => "previous",
        HintSource::Current => "current",
        HintSource::Ids => "ids",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost() -> Cost {
        Cost {
            hint: HintSource::Current,
            kv_bytes: 1e6,
            layers: 4,
            bytes_per_token: 1e5,
            bytes_per_token_steady: 5e4,
            feedback_bytes_per_token: 0.0,
            ahead_bytes_per_token: 0.0,
            selected_share: 0.1,
            cpu_share: 0.0,
            resident_share: 0.2,
            attends_resident: false,
            digest_bytes: 2e5,
            select_us: Some(10.0),
            hit_rate: Some(0.5),
        }
    }

    #[test]
    fn shares_are_of_the_rows_selected_from_and_nothing_to_select_from_is_no_division() {
        let row = cost().row();
        assert_eq!((row.digest_share, row.resident_bytes, row.hint.as_str()), (0.2, 2e5, "current"));
        let dense = Cost { kv_bytes: 0.0, layers: 0, select_us: None, ..cost() }.row();
        assert_eq!((dense.digest_share, dense.resident_bytes), (0.0, 0.0));
        assert!(dense.modelled.is_empty());
    }

    #[test]
    fn resident_rows_that_are_attended_take_time() {
        let ms = |row: &Row| row.modelled.iter().map(|step| step.ms_per_token).sum::<f64>();
        let all = Cost { attends_resident: true, ..cost() }.row();
        let selected = Cost { selected_share: 0.2, ..cost() }.row();
        assert!(ms(&all) > ms(&cost().row()));
        assert_eq!(ms(&all), ms(&selected));
    }

    #[test]
    fn what_comes_after_the_step_has_a_step_to_arrive() {
        let late = |row: &Row| row.modelled.iter().map(|step| step.ms_per_token).sum::<f64>();
        let behind = Cost { feedback_bytes_per_token: 1e5, ..cost() }.row();
        assert!(late(&behind) < late(&cost().row()));
    }
}
