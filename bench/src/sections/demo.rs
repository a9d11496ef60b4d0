//! The demo on the device: the given model, or the usual one if it can be fetched, or the tiny one.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::run::{Figures, Stop};

use super::Setup;

pub(crate) fn run(setup: &Setup, figures: &Figures) -> Result<(), Stop> {
    let program = setup.program("kvoyant")?;
    let model = match &setup.model {
        Some(model) => model.clone(),
        // A driver in software would be at it for hours.
        None if setup.software => "tiny".into(),
        None => fetched(&program).unwrap_or_else(|| "tiny".into()),
    };
    let tiny = model.as_os_str() == "tiny";
    let mut command = Command::new(program);
    command.args(["demo", "--json", "--device", &format!("cuda:{}", setup.ordinal), "--model"]).arg(&model);
    if tiny {
        command.args(["--context", "512"]);
    }
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        return Err(Stop::Failed(format!("{}: {last}", output.status)));
    }
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    figures.add(
        if tiny { "rows of the table, tiny model" } else { "rows of the table" },
        rows(&report),
        "rows",
    );
    for row in report["rows"].as_array().into_iter().flatten() {
        let method = row["method"].as_str().unwrap_or("a method");
        let budget = match &row["budget"] {
            serde_json::Value::Null => String::new(),
            budget => format!(" {}", budget.as_str().map_or_else(|| budget.to_string(), str::to_owned)),
        };
        if let Some(ms) = row["ms_per_token"].as_f64() {
            figures.add(format!("{method}{budget}, a token"), ms, "ms");
        }
    }
    Ok(())
}

fn rows(report: &serde_json::Value) -> f64 {
    report["rows"].as_array().map_or(0, Vec::len) as f64
}

/// The usual model, if it is here or can be had.
fn fetched(program: &Path) -> Option<PathBuf> {
    let output = Command::new(program).arg("fetch-model").stdin(Stdio::null()).output().ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    (output.status.success() && path.is_file()).then_some(path)
}
