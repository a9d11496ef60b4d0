//! `gpu-check` on the driver in software: so that it works on the day when a machine with a GPU is at hand.

use std::process::{Command, Output, Stdio};

use kvoyant_tests::softcuda::Machine;
use serde_json::Value;

/// Runs it, and returns how it ended, its table and its report.
fn check(machine: &Machine, arguments: &[&str]) -> (Option<i32>, String, Value) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("report.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpu-check"));
    // No other program is here: what needs one says so.
    command.arg("--programs").arg(folder.path()).arg("--out").arg(&out).args(arguments);
    let Output { status, stdout, stderr } = machine.env(&mut command).stdin(Stdio::null()).output().unwrap();
    let (table, said) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    let json = std::fs::read(&out).unwrap_or_else(|error| panic!("{error}: {table}\n{said}"));
    (status.code(), table, serde_json::from_slice(&json).unwrap())
}

fn section<'a>(report: &'a Value, name: &str) -> &'a Value {
    let mut sections = report["sections"].as_array().unwrap().iter();
    sections.find(|section| section["name"] == name).unwrap_or_else(|| panic!("no section {name}: {report}"))
}

#[test]
fn every_section_passes_or_says_why_it_was_skipped() {
    let machine = Machine::new();
    let (code, table, report) = check(&machine, &[]);
    assert_eq!(code, Some(0), "{table}");
    for name in ["ipc", "engines", "rows", "latency", "death", "pinning"] {
        assert_eq!(section(&report, name)["outcome"], "pass", "{name}:\n{table}");
        assert!(!section(&report, name)["figures"].as_array().unwrap().is_empty(), "{name}:\n{table}");
    }
    for (name, reason) in [
        ("kernels", "cuda_kernels is not in"),
        ("demo", "kvoyant is not in"),
        ("overlap", "softcuda"),
        ("read-only", "softcuda"),
    ] {
        let outcome = &section(&report, name)["outcome"];
        assert!(outcome["skipped"].as_str().is_some_and(|why| why.contains(reason)), "{name}: {outcome}");
    }
    let caveat = "softcuda: a driver in software, figures mean nothing about GPUs";
    assert_eq!(report["caveat"], caveat);
    assert!(table.contains(caveat) && !table.contains("MISSED"), "{table}");
    for figure in report["sections"].as_array().unwrap().iter().flat_map(|s| s["figures"].as_array().unwrap())
    {
        assert!(figure["value"].is_number() && !figure["unit"].as_str().unwrap().is_empty(), "{figure}");
    }
    machine.assert_clean();
}

#[test]
fn a_driver_that_refuses_fails_the_section_with_its_words() {
    let machine = Machine::new();
    machine.set_faults("register-fails");
    let (code, table, report) = check(&machine, &["--only", "engines"]);
    assert_eq!(code, Some(1), "{table}");
    let reason = section(&report, "engines")["outcome"]["fail"].as_str().unwrap();
    assert!(reason.contains("cuMemHostRegister"), "{reason}");
}

#[test]
fn what_hangs_is_ended_and_keeps_its_figures_and_the_others_go_on() {
    let machine = Machine::new();
    machine.set_faults("hang-copies");
    let (code, table, report) = check(&machine, &["--only", "rows,read-only", "--patience", "3"]);
    assert_eq!(code, Some(1), "{table}");
    let reason = section(&report, "rows")["outcome"]["fail"].as_str().unwrap();
    assert!(reason.contains("did not end within 3 s"), "{reason}");
    assert!(section(&report, "read-only")["outcome"]["skipped"].is_string(), "{table}");
}
