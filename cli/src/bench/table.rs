//! The comparison's table, at most 150 columns wide: one block for each source and length.

use std::fmt::Write;

use kvoyant_eval::model::LLAMA_3_8B;
use kvoyant_eval::row::{Row, Skipped};

/// What is modelled in the table's last columns: Llama-3-8B at 128K tokens over a link of 25 GB/s.
const MODELLED_TOKENS: usize = 128 << 10;
const MODELLED_LINK: f64 = 25.0;

const TITLE_WIDTH: usize = 27;

struct Column {
    head: [&'static str; 2],
    width: usize,
    cell: fn(&Row) -> Option<String>,
}

const COLUMNS: &[Column] = &[
    Column { head: ["", "hint"], width: 5, cell: |row| hint(&row.hint).map(str::to_owned) },
    Column { head: ["score", "tasks"], width: 5, cell: |row| row.accuracy.map(percent) },
    Column { head: ["of", "dense"], width: 5, cell: |row| row.accuracy_to_dense.map(percent) },
    Column { head: ["", "same"], width: 5, cell: |row| row.tokens_equal_dense.map(percent) },
    Column {
        head: ["KL", "nats"],
        width: 7,
        cell: |row| row.kl_to_dense.map(|kl| format!("{:.4}", kl.max(0.0))),
    },
    Column {
        head: ["KL against", "infinigen"],
        width: 13,
        cell: |row| {
            let interval = row.intervals.get("kl_minus_infinigen")?;
            Some(format!("{:+.3}…{:+.3}", interval.low, interval.high))
        },
    },
    Column { head: ["mass", "covered"], width: 7, cell: |row| row.attention_mass.map(fine_percent) },
    Column { head: ["top-k", "found"], width: 6, cell: |row| row.top_k_recall.map(percent) },
    Column {
        head: ["output", "error"],
        width: 7,
        cell: |row| row.output_error.map(|error| format!("{error:.3}")),
    },
    Column { head: ["missed", "at most"], width: 7, cell: |row| row.certified_missed_mass.map(fine_percent) },
    Column { head: ["MB per", "token"], width: 7, cell: |row| Some(megabytes(row.bytes_per_token)) },
    Column { head: ["KV", "ready"], width: 5, cell: |row| Some(percent(row.resident_share)) },
    Column { head: ["digest", "of KV"], width: 7, cell: |row| Some(fine_percent(row.digest_share)) },
    Column { head: ["select", "µs"], width: 7, cell: |row| row.select_us.map(|us| format!("{us:.0}")) },
    Column { head: ["8B 128K", "ms"], width: 7, cell: |row| modelled(row).map(|(ms, _)| format!("{ms:.1}")) },
    Column { head: ["", "stall"], width: 5, cell: |row| modelled(row).map(|(_, stall)| percent(stall)) },
];

/// The query that the method selects by, in the word of the table.
fn hint(name: &str) -> Option<&str> {
    match name {
        "previous" => Some("prev"),
        "current" => Some("now"),
        "none" | "" => None,
        other => Some(other),
    }
}

fn modelled(row: &Row) -> Option<(f64, f64)> {
    let step = row.modelled(LLAMA_3_8B.name, MODELLED_TOKENS, MODELLED_LINK)?;
    Some((step.ms_per_token, step.stall_share))
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

fn fine_percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn megabytes(bytes: f64) -> String {
    if bytes < 1e6 { format!("{:.3}", bytes / 1e6) } else { format!("{:.1}", bytes / 1e6) }
}

/// The whole table.
pub(super) fn render(rows: &[Row], skipped: &[Skipped]) -> String {
    let mut out = String::new();
    let mut place = None;
    for row in rows {
        let here = (row.source.as_str(), row.length);
        if place != Some(here) {
            if place.is_some() {
                out.push('\n');
            }
            place = Some(here);
            heading(&mut out, row);
        }
        let cells =
            COLUMNS.iter().map(|column| ((column.cell)(row).unwrap_or_else(|| "–".into()), column.width));
        line(&mut out, &row.title(), cells);
    }
    if rows.iter().any(|row| row.certified_missed_mass.is_some()) {
        out.push_str(
            "\nmissed at most: what certificates bound of each layer's attention, for its own queries, keys and values; it says nothing \
             about the text.\n",
        );
    }
    if rows.iter().any(|row| !row.modelled.is_empty()) {
        out.push_str(
            "\n8B 128K: a modelled step of Llama-3-8B at 128K tokens over a link of 25 GB/s (a roofline, not a measurement).\n",
        );
    }
    for Skipped { spec, format, source, reason } in skipped {
        let place = if source.is_empty() { String::new() } else { format!(" on {source}") };
        let _ = writeln!(out, "\nNo row of {spec} ({format}){place}: {reason}.");
    }
    out
}

fn heading(out: &mut String, row: &Row) {
    let _ = writeln!(out, "{}, {} tokens", row.source, row.length);
    for at in 0..2 {
        let title = if at == 1 { "method" } else { "" };
        line(out, title, COLUMNS.iter().map(|column| (column.head[at].to_owned(), column.width)));
    }
    let width = TITLE_WIDTH + COLUMNS.iter().map(|column| column.width + 1).sum::<usize>();
    let _ = writeln!(out, "{}", "─".repeat(width));
}

fn line(out: &mut String, title: &str, cells: impl Iterator<Item = (String, usize)>) {
    let mut text: String = title.chars().take(TITLE_WIDTH).collect();
    text.push_str(&" ".repeat(TITLE_WIDTH - text.chars().count()));
    for (cell, width) in cells {
        let fill = width.saturating_sub(cell.chars().count());
        let _ = write!(text, " {}{cell}", " ".repeat(fill));
    }
    let _ = writeln!(out, "{}", text.trim_end());
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvoyant_eval::model::{Seen, all};
    use kvoyant_eval::statistics::Interval;
    use kvoyant_methods::HintSource;

    fn widest() -> Row {
        let seen = Seen {
            hint: HintSource::Current,
            moved_share: 1.0,
            ahead_share: 0.0,
            attended_share: 1.0,
            cpu_share: 0.0,
            select_s_per_byte: 1e-10,
        };
        Row {
            method: "attention-predictor".into(),
            hint: "ahead".into(),
            spec: "attention-predictor:budget=12.5%".into(),
            source: "model".into(),
            length: 4096,
            budget: Some(0.125),
            accuracy: Some(1.0),
            accuracy_to_dense: Some(1.25),
            tokens_equal_dense: Some(1.0),
            kl_to_dense: Some(10.1234),
            attention_mass: Some(1.0),
            top_k_recall: Some(1.0),
            output_error: Some(1.234),
            bytes_per_token: 1234.5e6,
            resident_share: 1.0,
            digest_share: 1.0,
            select_us: Some(123_456.0),
            modelled: all(&seen),
            intervals: [("kl_minus_infinigen".to_owned(), Interval { mean: 0.0, low: -1.234, high: 1.234 })]
                .into(),
            ..Row::default()
        }
    }

    #[test]
    fn the_widest_values_fit_into_150_columns_and_keep_apart() {
        let text = render(&[widest(), Row { source: "trace:x".into(), ..Row::default() }], &[]);
        for line in text.lines() {
            assert!(line.chars().count() <= 150, "{}: {line}", line.chars().count());
        }
        assert!(text.contains("attention-predictor 12.5 %"));
        assert!(text.contains("–"), "what is not known is a dash");
    }

    #[test]
    fn what_has_no_row_is_named_with_its_reason() {
        let skipped = Skipped {
            spec: "full".into(),
            format: "int4-g64".into(),
            source: "model".into(),
            reason: "heads of 16 values".into(),
        };
        let text = render(&[widest()], &[skipped]);
        assert!(text.ends_with("\nNo row of full (int4-g64) on model: heads of 16 values.\n"), "{text}");
    }

    #[test]
    fn each_source_and_length_has_a_heading_of_its_own() {
        let other = Row { length: 2048, ..widest() };
        let text = render(&[widest(), widest(), other], &[]);
        assert_eq!(text.matches("method ").count(), 2, "{text}");
    }
}
