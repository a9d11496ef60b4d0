//! The demo's table for a terminal of 110 columns.

use std::fmt::Write;

use console::{Style, measure_text_width};
use kvoyant_eval::tasks::Task;

use super::report::Row;

/// One column: two lines of heading, and what a row shows in it.
struct Column {
    head: [&'static str; 2],
    width: usize,
    cell: fn(&Row, &Row) -> Cell,
}

/// A cell's text and how good it is.
struct Cell {
    text: String,
    tone: Tone,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tone {
    Plain,
    Good,
    Poor,
}

fn plain(text: String) -> Cell {
    Cell { text, tone: Tone::Plain }
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

fn fine_percent(share: f64) -> String {
    if share > 0.0 && share < 0.0995 { format!("{:.1} %", share * 100.0) } else { percent(share) }
}

/// Accuracy, judged by dense's: good if nearly as good, poor if at most half.
fn task(task: Task, row: &Row, dense: &Row) -> Cell {
    let of = |row: &Row| row.tasks.get(task.name()).copied().unwrap_or(0.0);
    let (got, best) = (of(row), of(dense));
    let tone = match () {
        () if best == 0.0 => Tone::Plain,
        () if got >= 0.9 * best => Tone::Good,
        () if got <= 0.5 * best => Tone::Poor,
        () => Tone::Plain,
    };
    Cell { text: percent(got), tone }
}

/// A share, good from `good` on and poor below `poor`.
fn judged(share: f64, good: f64, poor: f64) -> Cell {
    let tone = match () {
        () if share >= good => Tone::Good,
        () if share < poor => Tone::Poor,
        () => Tone::Plain,
    };
    Cell { text: percent(share), tone }
}

/// Groups of columns: a title over each.
const GROUPS: &[(&str, usize)] =
    &[("answers", 2), ("next token, against dense", 3), ("attention", 2), ("what it costs", 6)];

const COLUMNS: &[Column] = &[
    Column { head: ["single", "fact"], width: 6, cell: |row, dense| task(Task::Single, row, dense) },
    Column { head: ["multi", "keys"], width: 5, cell: |row, dense| task(Task::Multi, row, dense) },
    Column { head: ["", "same"], width: 5, cell: |row, _| judged(row.tokens_equal_dense, 0.93, 0.85) },
    Column { head: ["KL", "nats"], width: 6, cell: |row, _| plain(nats(row.kl_to_dense)) },
    Column { head: ["per-", "plexity"], width: 7, cell: |row, _| plain(format!("{:.2}", row.perplexity)) },
    Column {
        head: ["mass", "covered"],
        width: 7,
        cell: |row, _| row.attention_mass.map_or_else(|| plain("–".into()), |mass| judged(mass, 0.9, 0.75)),
    },
    Column {
        head: ["missed", "up to"],
        width: 6,
        cell: |row, _| plain(row.certified_missed_mass.map_or_else(|| "–".into(), fine_percent)),
    },
    Column { head: ["KV", "moved"], width: 6, cell: |row, _| plain(fine_percent(row.kv_moved_share)) },
    Column { head: ["MB per", "token"], width: 6, cell: |row, _| plain(megabytes(row.bytes_per_token)) },
    Column { head: ["ms per", "token"], width: 6, cell: |row, _| plain(format!("{:.1}", row.ms_per_token)) },
    Column {
        head: ["", "hits"],
        width: 5,
        cell: |row, _| plain(row.hit_rate.map_or_else(|| "–".into(), percent)),
    },
    Column { head: ["", "stall"], width: 5, cell: |row, _| plain(fine_percent(row.stall_share)) },
    Column { head: ["KV", "ready"], width: 5, cell: |row, _| plain(percent(row.resident_share)) },
];

/// Columns between two columns, and more between two groups.
const GAP: usize = 1;
const GROUP_GAP: usize = 2;
const TITLE_WIDTH: usize = 14;

fn nats(kl: f64) -> String {
    // Rounding of two equal distributions may fall on either side of 0.
    if kl.abs() < 5e-5 { "0".into() } else { format!("{kl:.3}") }
}

fn megabytes(bytes: f64) -> String {
    let mb = bytes / 1e6;
    match mb {
        0.0 => "0".into(),
        _ if mb < 9.95 => format!("{mb:.2}"),
        _ => format!("{mb:.1}"),
    }
}

/// The table; `colour` only for a terminal.
pub(crate) fn render(rows: &[Row], colour: bool) -> String {
    let style =
        |style: Style| if colour { style.force_styling(true) } else { Style::new().force_styling(false) };
    let (bold, dim) = (style(Style::new().bold()), style(Style::new().dim()));
    let (good, poor) = (style(Style::new().green()), style(Style::new().red()));
    let mut out = String::new();
    let mut titles = " ".repeat(TITLE_WIDTH);
    let mut rule = "─".repeat(TITLE_WIDTH);
    let mut at = 0;
    for (name, n) in GROUPS {
        let width = COLUMNS[at..at + n].iter().map(|c| c.width + GAP).sum::<usize>();
        let _ = write!(titles, "{}{}", " ".repeat(GROUP_GAP), pad(name, width, true));
        let _ = write!(rule, "{}{}", "─".repeat(GROUP_GAP), "─".repeat(width));
        at += n;
    }
    let _ = writeln!(out, "{}", bold.apply_to(titles.trim_end()));
    for line in 0..2 {
        let text = across(
            |column| (column.head[line].to_owned(), Style::new()),
            if line == 1 { "method" } else { "" },
        );
        let _ = writeln!(out, "{}", dim.apply_to(text.trim_end()));
    }
    let _ = writeln!(out, "{}", dim.apply_to(&rule));
    let Some(dense) = rows.first() else { return out };
    for row in rows {
        let text = across(
            |column| {
                let cell = (column.cell)(row, dense);
                let style = match cell.tone {
                    Tone::Plain => Style::new(),
                    Tone::Good => good.clone(),
                    Tone::Poor => poor.clone(),
                };
                (cell.text, style)
            },
            &row.title(),
        );
        let _ = writeln!(out, "{}", text.trim_end());
    }
    let _ = writeln!(out, "{}", dim.apply_to(&rule));
    out
}

/// One line: the title and a cell a column.
fn across(cell: impl Fn(&Column) -> (String, Style), title: &str) -> String {
    let mut line = pad(title, TITLE_WIDTH, true);
    let mut group = 0;
    let mut left = 0;
    for column in COLUMNS {
        if left == 0 {
            left = GROUPS[group].1;
            group += 1;
            line.push_str(&" ".repeat(GROUP_GAP));
        }
        left -= 1;
        let (text, style) = cell(column);
        // Padded before it is styled: escape codes have no width.
        let _ = write!(line, "{}{}", " ".repeat(GAP), style.apply_to(pad(&text, column.width, false)));
    }
    line
}

/// `text` filled up with spaces to `width` columns.
fn pad(text: &str, width: usize, left: bool) -> String {
    let fill = " ".repeat(width.saturating_sub(measure_text_width(text)));
    if left { format!("{text}{fill}") } else { format!("{fill}{text}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(method: &str, accuracy: f64) -> Row {
        Row {
            method: method.into(),
            budget: (method != "dense").then_some(0.12),
            tasks: [("single".to_owned(), accuracy), ("multi".to_owned(), accuracy)].into(),
            tokens_equal_dense: 1.0,
            kl_to_dense: -1e-9,
            perplexity: 1234.56,
            attention_mass: Some(1.0),
            certified_missed_mass: Some(1.0),
            kv_moved_share: 1.0,
            bytes_per_token: 123_456_789.0,
            ms_per_token: 1234.5,
            hit_rate: Some(1.0),
            stall_share: 1.0,
            resident_share: 1.0,
        }
    }

    #[test]
    fn the_widest_values_fit_into_110_columns() {
        let text = render(&[row("dense", 1.0), row("infinigen", 0.0)], false);
        for line in text.lines() {
            assert!(measure_text_width(line) <= 110, "{}: {line}", measure_text_width(line));
        }
    }

    #[test]
    fn every_column_belongs_to_a_group() {
        assert_eq!(GROUPS.iter().map(|(_, n)| n).sum::<usize>(), COLUMNS.len());
    }

    #[test]
    fn without_colour_there_is_no_escape_code_and_with_it_there_is() {
        let rows = [row("dense", 1.0), row("random", 0.2)];
        assert!(!render(&rows, false).contains('\x1b'));
        assert!(render(&rows, true).contains('\x1b'));
        assert_eq!(console::strip_ansi_codes(&render(&rows, true)), render(&rows, false));
    }

    #[test]
    fn a_kl_of_rounding_is_shown_as_nothing() {
        assert_eq!(nats(-1e-9), "0");
        assert_eq!(nats(0.0149), "0.015");
    }
}
