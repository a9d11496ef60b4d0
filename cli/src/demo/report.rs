//! What the demo found: the rows of its table, as JSON and as sentences.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::why::Spilled;
use crate::machine::Machine;
use crate::trial::measure::Measured;
use crate::trial::plan::Size;

/// The whole result. Every benchmark keeps this outer shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Where it ran.
    pub(crate) machine: Machine,
    /// One row a method and budget.
    pub(crate) rows: Vec<Row>,
    /// What was on disk, with `--host-budget`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) spilled: Option<Spilled>,
}

/// One method with one budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// `dense|full|kvoyant|infinigen|infinigen-alpha|quest|window|random`.
    pub(crate) method: String,
    /// Share of the rows that a selection may hold (0–1), where the row has a fixed one.
    pub(crate) budget: Option<f64>,
    /// Share of the questions answered right (0–1), by task.
    pub(crate) tasks: BTreeMap<String, f64>,
    /// Share of the continuation's positions at which the most probable next token is dense's (0–1).
    pub(crate) tokens_equal_dense: f64,
    /// Mean of KL(dense ‖ row) over those positions, in nats.
    pub(crate) kl_to_dense: f64,
    /// Perplexity of the continuation's true tokens.
    pub(crate) perplexity: f64,
    /// Share of dense's attention probability that lies on the rows attended (0–1); mean over layers that
    /// select, heads and measured steps; none where it could not be measured.
    pub(crate) attention_mass: Option<f64>,
    /// What certificates bound: the attention probability (0–1) that a query head can have missed of a layer, for its own queries, keys and
    /// values, mean; none where the method certifies nothing. It says nothing about the text.
    pub(crate) certified_missed_mass: Option<f64>,
    /// Bytes moved a step over the bytes of all KV held (0–1).
    pub(crate) kv_moved_share: f64,
    /// Bytes moved for each token decoded.
    pub(crate) bytes_per_token: f64,
    /// Milliseconds of decoding for each token, of all sequences of a batch together.
    pub(crate) ms_per_token: f64,
    /// Share of the rows selected that were resident already (0–1); none where nothing was selected.
    pub(crate) hit_rate: Option<f64>,
    /// Share of the decoding time spent waiting for rows (0–1).
    pub(crate) stall_share: f64,
    /// Share of the KV that lies ready where attention reads it (0–1).
    pub(crate) resident_share: f64,
}

impl Row {
    /// What was measured, as a row.
    pub(crate) fn new(method: &str, budget: Option<f64>, measured: &Measured) -> Self {
        let costs = measured.costs;
        Self {
            method: method.to_owned(),
            budget,
            tasks: Size::DEMO_TASKS
                .iter()
                .map(|task| (task.name().to_owned(), measured.task(*task).unwrap_or(0.0)))
                .collect(),
            tokens_equal_dense: measured.agreement.equal(),
            kl_to_dense: measured.agreement.kl(),
            perplexity: measured.agreement.perplexity(),
            attention_mass: costs.attention_mass,
            certified_missed_mass: costs.certified_missed_mass,
            kv_moved_share: costs.kv_moved_share,
            bytes_per_token: costs.bytes_per_token,
            ms_per_token: measured.clock.ms_per_token(),
            hit_rate: costs.hit_rate,
            stall_share: costs.stall_share,
            resident_share: costs.resident_share,
        }
    }

    /// How the row is called in the table.
    pub(crate) fn title(&self) -> String {
        match (self.method.as_str(), self.budget) {
            ("infinigen-alpha", _) => "infinigen α=5".into(),
            (method, Some(budget)) => format!("{method} {} %", (budget * 1000.0).round() / 10.0),
            (method, None) => method.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        Row {
            method: "infinigen".into(),
            budget: Some(0.12),
            tasks: [("single".to_owned(), 1.0), ("multi".to_owned(), 0.75)].into(),
            tokens_equal_dense: 0.98,
            kl_to_dense: 0.015,
            perplexity: 3.25,
            attention_mass: Some(0.94),
            certified_missed_mass: Some(0.07),
            kv_moved_share: 0.1,
            bytes_per_token: 4.5e6,
            ms_per_token: 12.0,
            hit_rate: None,
            stall_share: 0.05,
            resident_share: 0.25,
        }
    }

    #[test]
    fn the_json_has_the_published_names_and_reads_back() {
        let report = Report { machine: Machine::this("scalar", "host"), rows: vec![row()], spilled: None };
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(value["machine"].is_object());
        let names: Vec<&str> = value["rows"][0].as_object().unwrap().keys().map(String::as_str).collect();
        let mut published = vec![
            "method",
            "budget",
            "tasks",
            "tokens_equal_dense",
            "kl_to_dense",
            "perplexity",
            "attention_mass",
            "certified_missed_mass",
            "kv_moved_share",
            "bytes_per_token",
            "ms_per_token",
            "hit_rate",
            "stall_share",
            "resident_share",
        ];
        published.sort_unstable();
        let mut names = names;
        names.sort_unstable();
        assert_eq!(names, published);
        assert_eq!(value["rows"][0]["hit_rate"], serde_json::Value::Null);
    }

    #[test]
    fn titles_name_method_and_budget() {
        assert_eq!(row().title(), "infinigen 12 %");
        assert_eq!(Row { method: "dense".into(), budget: None, ..row() }.title(), "dense");
        assert_eq!(Row { method: "infinigen-alpha".into(), budget: None, ..row() }.title(), "infinigen α=5");
        assert_eq!(Row { budget: Some(0.025), ..row() }.title(), "infinigen 2.5 %");
    }
}
