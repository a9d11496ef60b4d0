//! A row of the comparison: one method with one budget, on one source and length.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::model::Modelled;
use crate::statistics::Interval;

/// One method with one budget on one source. What a source cannot tell is `null`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Row {
    /// The method's name.
    pub method: String,
    /// The method with its options, as a user would write it.
    pub spec: String,
    /// The storage format of rows, as `f16` or `int4-g64`.
    pub row_format: String,
    /// `model`, `trace:<file>` or `generated:<kind>`.
    pub source: String,
    /// The query that it selects by: `ahead`, `previous`, `current`, `ids` or `none`.
    pub hint: String,
    /// Tokens of the context.
    pub length: usize,
    /// The budget as a share of the context (0–1), where there is one.
    pub budget: Option<f64>,
    /// Scores of the tasks (0–1), by name.
    pub tasks: BTreeMap<String, f64>,
    /// Mean score over all questions (0–1).
    pub accuracy: Option<f64>,
    /// The same as a share of dense's, over the tasks that dense can do at all.
    pub accuracy_to_dense: Option<f64>,
    /// Share of the continuations' positions at which the most probable next token is dense's (0–1).
    pub tokens_equal_dense: Option<f64>,
    /// Mean of KL(dense ‖ row) over those positions, in nats.
    pub kl_to_dense: Option<f64>,
    /// Perplexity of the continuations' true tokens.
    pub perplexity: Option<f64>,
    /// Share of dense's attention probability on the rows attended (0–1): recall of attention mass.
    pub attention_mass: Option<f64>,
    /// Share of dense's attention probability that was missed: the mean over layers, heads and steps.
    pub missed_mass: Option<f64>,
    /// Share of the true best rows, as many as the budget has, that were selected.
    pub top_k_recall: Option<f64>,
    /// `‖o − o*‖ / ‖o*‖` of attention outputs, mean.
    pub output_error: Option<f64>,
    /// The most attention that answers can have missed by their certificates (0–1): the mean over layers, heads and steps, of each layer's
    /// own queries, keys and values. Nothing is said about the text.
    pub certified_missed_mass: Option<f64>,
    /// What certificates allow over what was missed, the median of query heads: 1 is exact.
    pub certificate_ratio: Option<f64>,
    /// Certificates that the truth was outside of: none, or something is wrong.
    pub certificate_violations: Option<f64>,
    /// Rows selected per KV head, as a share of the context.
    pub selected_share: f64,
    /// Bytes moved a step over the bytes of all KV held (0–1).
    pub kv_moved_share: f64,
    /// Bytes moved for each token decoded, all layers, from each sequence's first step on: rows copied, partial attentions that
    /// came instead of rows, and `feedback_bytes_per_token`. In the first step nothing is resident, so that short runs weigh it
    /// more. What is read where it lies in host memory counts nowhere: digests, rows that a method or the CPU looks at there, and
    /// the scores by which an engine names rows itself.
    pub bytes_per_token: f64,
    /// The same without the sequences' first steps.
    pub bytes_per_token_steady: f64,
    /// Of `bytes_per_token`, the keys that attention rows over all tokens needed beyond the rows attended, for methods that learn
    /// from such rows. Rows over what was attended anyway cost nothing here.
    pub feedback_bytes_per_token: f64,
    /// Bytes of rows resident per sequence, besides sinks, window and dense layers.
    pub resident_bytes: f64,
    /// Share of the rows that are selected from that are resident (0–1).
    pub resident_share: f64,
    /// Bytes of digests, states and memories per sequence.
    pub digest_bytes: f64,
    /// The same over the bytes of the rows.
    pub digest_share: f64,
    /// Microseconds to select for one layer of one sequence. What is prepared for the step after (`prefetch`) is left out: the daemon
    /// does it between requests, when no step waits.
    pub select_us: Option<f64>,
    /// Share of the rows selected that were resident already (0–1).
    pub hit_rate: Option<f64>,
    /// Milliseconds of decoding for each token on this machine.
    pub ms_per_token: Option<f64>,
    /// Share of the decoding time spent waiting for rows on this machine (0–1).
    pub stall_share: Option<f64>,
    /// Steps of large models on a GPU, by the roofline of [`crate::model`].
    pub modelled: Vec<Modelled>,
    /// 95 % intervals: of `kl_to_dense` and `attention_mass`, and of paired differences `…_minus_dense`, `…_minus_infinigen`.
    pub intervals: BTreeMap<String, Interval>,
}

impl Row {
    /// How it is called in tables and plots.
    #[must_use]
    pub fn title(&self) -> String {
        let plain = self.row_format.is_empty() || self.row_format == "f16" || self.row_format == "f32";
        let format = if plain { String::new() } else { format!(" {}", self.row_format) };
        match self.budget {
            Some(budget) => format!("{}{format} {} %", self.method, (budget * 1000.0).round() / 10.0),
            None => {
                let options =
                    self.spec.split_once(':').map_or(String::new(), |(_, options)| format!(" {options}"));
                format!("{}{format}{options}", self.method)
            }
        }
    }

    /// The modelled step of that model, context and link.
    #[must_use]
    pub fn modelled(&self, model: &str, tokens: usize, link_gbps: f64) -> Option<&Modelled> {
        self.modelled
            .iter()
            .find(|step| step.model == model && step.tokens == tokens && step.link_gbps == link_gbps)
    }
}

/// A method, or a format of its rows, that has no row, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The method with its options.
    pub spec: String,
    /// The storage format of rows.
    pub format: String,
    /// Where it has none: `model`, `trace:<file>`, `generated:<kind>`, or empty for everywhere.
    pub source: String,
    /// Why not.
    pub reason: String,
}

/// The rows as CSV (RFC 4180): a column for each number, each task, each interval's ends and each modelled step that any row has.
#[must_use]
pub fn csv(rows: &[Row]) -> String {
    let names = |of: &dyn Fn(&Row) -> Vec<String>| {
        let mut all: Vec<String> = rows.iter().flat_map(of).collect();
        all.sort_unstable();
        all.dedup();
        all
    };
    let tasks = names(&|row| row.tasks.keys().cloned().collect());
    let intervals = names(&|row| row.intervals.keys().cloned().collect());
    let steps = names(&|row| row.modelled.iter().map(step_name).collect());
    let mut head: Vec<String> = FIXED.iter().map(|(name, _)| (*name).to_owned()).collect();
    head.extend(tasks.iter().map(|name| format!("task {name}")));
    head.extend(intervals.iter().flat_map(|name| [format!("{name} low"), format!("{name} high")]));
    head.extend(steps.iter().flat_map(|name| [format!("ms {name}"), format!("stall {name}")]));
    let mut out = String::new();
    line(&mut out, head.iter().map(String::as_str));
    for row in rows {
        let mut cells: Vec<String> = FIXED.iter().map(|(_, cell)| cell(row)).collect();
        cells.extend(tasks.iter().map(|name| number(row.tasks.get(name).copied())));
        for name in &intervals {
            let interval = row.intervals.get(name);
            cells.extend([number(interval.map(|i| i.low)), number(interval.map(|i| i.high))]);
        }
        for name in &steps {
            let step = row.modelled.iter().find(|step| step_name(step) == *name);
            cells.extend([number(step.map(|s| s.ms_per_token)), number(step.map(|s| s.stall_share))]);
        }
        line(&mut out, cells.iter().map(String::as_str));
    }
    out
}

type Cell = fn(&Row) -> String;

const FIXED: &[(&str, Cell)] = &[
    ("method", |row| row.method.clone()),
    ("spec", |row| row.spec.clone()),
    ("row_format", |row| row.row_format.clone()),
    ("source", |row| row.source.clone()),
    ("hint", |row| row.hint.clone()),
    ("length", |row| row.length.to_string()),
    ("budget", |row| number(row.budget)),
    ("accuracy", |row| number(row.accuracy)),
    ("accuracy_to_dense", |row| number(row.accuracy_to_dense)),
    ("tokens_equal_dense", |row| number(row.tokens_equal_dense)),
    ("kl_to_dense", |row| number(row.kl_to_dense)),
    ("perplexity", |row| number(row.perplexity)),
    ("attention_mass", |row| number(row.attention_mass)),
    ("missed_mass", |row| number(row.missed_mass)),
    ("top_k_recall", |row| number(row.top_k_recall)),
    ("output_error", |row| number(row.output_error)),
    ("certified_missed_mass", |row| number(row.certified_missed_mass)),
    ("certificate_ratio", |row| number(row.certificate_ratio)),
    ("certificate_violations", |row| number(row.certificate_violations)),
    ("selected_share", |row| number(Some(row.selected_share))),
    ("kv_moved_share", |row| number(Some(row.kv_moved_share))),
    ("bytes_per_token", |row| number(Some(row.bytes_per_token))),
    ("bytes_per_token_steady", |row| number(Some(row.bytes_per_token_steady))),
    ("feedback_bytes_per_token", |row| number(Some(row.feedback_bytes_per_token))),
    ("resident_bytes", |row| number(Some(row.resident_bytes))),
    ("resident_share", |row| number(Some(row.resident_share))),
    ("digest_bytes", |row| number(Some(row.digest_bytes))),
    ("digest_share", |row| number(Some(row.digest_share))),
    ("select_us", |row| number(row.select_us)),
    ("hit_rate", |row| number(row.hit_rate)),
    ("ms_per_token", |row| number(row.ms_per_token)),
    ("stall_share", |row| number(row.stall_share)),
];

fn step_name(step: &Modelled) -> String {
    format!("{} {}K {} GB/s", step.model, step.tokens >> 10, step.link_gbps)
}

fn number(value: Option<f64>) -> String {
    value.map_or(String::new(), |value| value.to_string())
}

fn line<'a>(out: &mut String, cells: impl Iterator<Item = &'a str>) {
    for (at, cell) in cells.enumerate() {
        let comma = if at == 0 { "" } else { "," };
        if cell.contains([',', '"', '\n', '\r']) {
            let _ = write!(out, "{comma}\"{}\"", cell.replace('"', "\"\""));
        } else {
            let _ = write!(out, "{comma}{cell}");
        }
    }
    out.push_str("\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        Row {
            method: "quest".into(),
            spec: "quest:budget=6%,page=32".into(),
            row_format: "f16".into(),
            source: "model".into(),
            length: 2048,
            budget: Some(0.06),
            kl_to_dense: Some(0.25),
            tasks: [("single".to_owned(), 0.5)].into(),
            intervals: [("kl_to_dense".to_owned(), Interval { mean: 0.25, low: 0.2, high: 0.3 })].into(),
            ..Row::default()
        }
    }

    #[test]
    fn csv_quotes_what_it_must_and_every_line_has_every_column() {
        let other = Row { tasks: BTreeMap::new(), budget: None, spec: "full".into(), ..row() };
        let text = csv(&[row(), other]);
        assert!(text.contains("\"quest:budget=6%,page=32\""));
        let lines: Vec<&str> = text.trim_end().split("\r\n").collect();
        assert_eq!(lines.len(), 3);
        let columns = lines[0].split(',').count();
        assert_eq!(lines[2].split(',').count(), columns);
        assert_eq!(lines[1].split(',').count(), columns + 1, "one comma is inside quotes");
        assert!(lines[0].ends_with("task single,kl_to_dense low,kl_to_dense high"));
    }

    #[test]
    fn a_row_reads_back_from_its_json_and_has_the_published_names() {
        let text = serde_json::to_string(&row()).unwrap();
        assert_eq!(serde_json::from_str::<Row>(&text).unwrap(), row());
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        for name in
            ["method", "source", "length", "budget", "kl_to_dense", "bytes_per_token", "tasks", "hit_rate"]
        {
            assert!(value.get(name).is_some(), "{name}");
        }
    }

    #[test]
    fn titles_name_method_format_and_budget() {
        assert_eq!(row().title(), "quest 6 %");
        let full = Row { method: "full".into(), spec: "full".into(), budget: None, ..row() };
        assert_eq!(full.title(), "full");
        assert_eq!(Row { row_format: "int4-g64".into(), ..full.clone() }.title(), "full int4-g64");
        assert_eq!(
            Row { method: "infinigen".into(), spec: "infinigen:alpha=5".into(), ..full }.title(),
            "infinigen alpha=5"
        );
    }
}
