//! `kvoyant run` and `kvoyant demo` on a GPU, which is softcuda's.

use crate::common::{kvoyant, run};
use kvoyant_tests::softcuda::Machine;
use serde_json::Value;

#[test]
fn run_answers_on_a_gpu_what_it_answers_on_the_host() {
    let machine = Machine::new();
    let home = tempfile::tempdir().unwrap();
    let words = "The keeper of the lighthouse wrote down the ships that passed. ".repeat(12);
    let answer = |device: &str| {
        let mut command = kvoyant(home.path());
        machine.env(&mut command).args(["run", "--model", "tiny", "--method", "full", "--max-tokens", "8"]);
        let (code, out, err) = run(command.args(["--prompt", &words, "--device", device]));
        assert_eq!(code, Some(0), "{device}: {err}");
        assert!(!out.trim().is_empty(), "{device}: {err}");
        out
    };
    assert_eq!(answer("cuda:0"), answer("host"));
    machine.assert_clean();
}

#[test]
fn without_a_driver_or_a_compiler_run_says_what_to_do() {
    let machine = Machine::new();
    let home = tempfile::tempdir().unwrap();
    let refused = |compiler: bool, wanted: &[&str]| {
        let mut command = kvoyant(home.path());
        command.args(["run", "--model", "tiny", "--prompt", "a", "--device", "cuda:0"]);
        if compiler {
            // No device is shown, whether there is a driver or not.
            command.env("CUDA_VISIBLE_DEVICES", "");
        } else {
            machine.env(&mut command).env("KVOYANT_NVRTC", "/nowhere/libnvrtc.so");
        }
        let (code, out, err) = run(&mut command);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
        assert!(wanted.iter().all(|part| err.contains(part)), "{err}");
    };
    refused(true, &["cannot use the device"]);
    refused(false, &["pip install nvidia-cuda-nvrtc-cu12", "/nowhere/libnvrtc.so"]);
    machine.assert_clean();
}

/// The demo with every method, in software: `scripts/ci-long` runs `kvoyant demo --device cuda:0`.
#[test]
fn methods_are_measured_on_a_gpu_and_full_is_dense_there() {
    let machine = Machine::new();
    let home = tempfile::tempdir().unwrap();
    let mut command = kvoyant(home.path());
    machine.env(&mut command).args(["bench", "methods", "--live", "--model", "tiny", "--quick", "--json"]);
    command.args(["--methods", "full", "--method", "infinigen:budget=12%", "--lengths", "512"]);
    let (code, out, err) = run(command.args(["--device", "cuda:0"]));
    assert_eq!(code, Some(0), "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    let device = report["machine"]["device"].as_str().unwrap();
    assert!(device.starts_with("cuda:0 (") && device.contains("softcuda"), "{device}");
    let rows = report["rows"].as_array().unwrap();
    let find = |method: &str| rows.iter().rfind(|row| row["method"] == method).unwrap();
    let full = find("full");
    // The device sums in another order: a token may turn where two are as probable.
    assert!(full["tokens_equal_dense"].as_f64().unwrap() > 0.98, "{full}");
    assert!(full["kl_to_dense"].as_f64().unwrap() < 1e-4, "{full}");
    let infinigen = find("infinigen");
    assert!(infinigen["hit_rate"].as_f64().unwrap() > 0.0, "{infinigen}");
    assert!(infinigen["bytes_per_token"].as_f64().unwrap() > 0.0, "{infinigen}");
    machine.assert_clean();
}
