//! Wrong arguments and missing files: one sentence on stderr, nothing on stdout, a non-zero exit.

use std::path::Path;

use crate::common::{everything_below, kvoyant, run};

/// Runs it, checks what every refusal has in common, and returns what was said.
fn refused(home: &Path, arguments: &[&str]) -> String {
    let (code, out, err) = run(kvoyant(home).args(arguments));
    assert!(matches!(code, Some(1 | 2)), "{arguments:?}: {code:?}, {err}");
    assert_eq!(out, "", "{arguments:?}");
    assert_eq!(err.matches("error: ").count(), 1, "{arguments:?}: {err}");
    let sockets: Vec<String> =
        everything_below(home).into_iter().filter(|path| path.starts_with("kvoyant-")).collect();
    assert_eq!(sockets, Vec::<String>::new(), "{arguments:?} left something behind");
    err
}

#[test]
fn budgets_of_nothing_and_of_more_than_all_are_refused_as_written() {
    let home = tempfile::tempdir().unwrap();
    for budget in ["0", "0%", "101%", "1.5", "-3%", "six"] {
        let budget_argument = format!("--budget={budget}");
        let said = refused(home.path(), &["run", "--model", "tiny", "--prompt", "x", &budget_argument]);
        assert!(said.contains(budget), "{said}");
    }
}

#[test]
fn an_unknown_method_is_refused_and_the_known_ones_are_named() {
    let home = tempfile::tempdir().unwrap();
    let said = refused(home.path(), &["run", "--model", "tiny", "--prompt", "x", "--method", "fortune"]);
    assert!(said.contains("fortune") && said.contains("infinigen") && said.contains("quest"), "{said}");
}

#[test]
fn what_a_benchmark_cannot_measure_is_refused_before_a_model_is_read() {
    let home = tempfile::tempdir().unwrap();
    for (arguments, why) in [
        (&["bench", "methods", "--methods", "quest,fortune"][..], "unknown method `fortune`"),
        (&["bench", "methods", "--method", "qest:page=16"], "did you mean `quest`?"),
        (&["bench", "methods", "--lengths", "0"], "a whole number above 0"),
        (&["bench", "decode", "--lengths", "2048,0"], "a whole number above 0"),
        (&["bench", "decode", "--attention", "fortune"], "unknown method `fortune`"),
    ] {
        let said = refused(home.path(), arguments);
        assert!(said.contains(why), "{arguments:?}: {said}");
    }
}

#[test]
fn a_budget_for_a_method_that_has_none_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let arguments = ["run", "--model", "tiny", "--prompt", "x", "--method", "full", "--budget", "6%"];
    let said = refused(home.path(), &arguments);
    assert!(said.contains("full") && said.contains("budget"), "{said}");
}

#[test]
fn a_model_that_is_not_there_is_named() {
    let home = tempfile::tempdir().unwrap();
    for command in [&["run", "--prompt", "x"][..], &["demo"][..]] {
        let arguments: Vec<&str> =
            command.iter().copied().chain(["--model", "/no/such/model.gguf"]).collect();
        let said = refused(home.path(), &arguments);
        assert!(said.contains("/no/such/model.gguf"), "{said}");
    }
}

#[test]
fn a_file_that_is_no_model_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("letter.gguf");
    std::fs::write(&file, "Dear reader").unwrap();
    let said = refused(home.path(), &["run", "--prompt", "x", "--model", file.to_str().unwrap()]);
    assert!(said.contains("letter.gguf"), "{said}");
}

#[test]
fn a_prompt_file_that_is_not_there_and_an_empty_prompt_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let said = refused(home.path(), &["run", "--model", "tiny", "--file", "/no/such/prompt"]);
    assert!(said.contains("/no/such/prompt"), "{said}");
    let said = refused(home.path(), &["run", "--model", "tiny", "--prompt", " "]);
    assert!(said.contains("empty"), "{said}");
}

#[test]
fn a_prompt_that_does_not_fit_the_model_is_refused_with_both_numbers() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("prompt");
    std::fs::write(&file, "many words ".repeat(20_000)).unwrap();
    let said = refused(home.path(), &["run", "--model", "tiny", "--file", file.to_str().unwrap()]);
    assert!(said.contains("tokens") && said.contains("context"), "{said}");
}

#[test]
fn a_context_that_the_model_does_not_have_is_refused_with_the_possible_ones() {
    let home = tempfile::tempdir().unwrap();
    let said = refused(home.path(), &["demo", "--model", "tiny", "--context", "10000000"]);
    assert!(said.contains("10000000") && said.contains("512"), "{said}");
}

#[test]
fn a_text_that_is_missing_or_too_short_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let said = refused(home.path(), &["demo", "--model", "tiny", "--text", "/no/such/text"]);
    assert!(said.contains("/no/such/text"), "{said}");
    let file = home.path().join("text");
    std::fs::write(&file, "short").unwrap();
    let said = refused(home.path(), &["demo", "--model", "tiny", "--text", file.to_str().unwrap()]);
    assert!(said.contains("tokens"), "{said}");
}

#[test]
fn a_socket_that_is_not_there_is_named() {
    let home = tempfile::tempdir().unwrap();
    let socket = home.path().join("none.sock");
    let socket = socket.to_str().unwrap();
    let said = refused(home.path(), &["run", "--model", "tiny", "--prompt", "x", "--socket", socket]);
    assert!(said.contains("none.sock"), "{said}");
    let said = refused(home.path(), &["status", "--admin", socket]);
    assert!(said.contains("none.sock"), "{said}");
}

#[test]
fn a_calibration_of_no_gpu_or_of_one_that_is_not_there_is_refused_in_a_sentence() {
    let home = tempfile::tempdir().unwrap();
    let said = refused(home.path(), &["calibrate", "--device", "host"]);
    assert!(said.contains("cuda:0"), "{said}");
    for device in ["tpu", "cuda:x", "cuda:-1"] {
        let said = refused(home.path(), &["calibrate", "--device", device]);
        assert!(said.contains(device) && said.contains("cuda:0"), "{said}");
    }
    // With or without a driver, no machine has as many.
    let said = refused(home.path(), &["calibrate", "--quick", "--device", "cuda:4096"]);
    assert!(said.contains("calibrated"), "{said}");
    assert_eq!(everything_below(home.path()), Vec::<String>::new(), "nothing was stored");
}
