//! `kvoyant doctor` on machines of every kind, all of them softcuda's but the one without a driver.

use std::process::Command;

use crate::common::{everything_below, kvoyant, run};
use kvoyant_tests::softcuda::Machine;
use serde_json::Value;

/// What the doctor says of a machine about a device.
struct Findings {
    code: Option<i32>,
    report: Value,
}

impl Findings {
    fn level(&self, name: &str) -> &str {
        self.check(name).map_or("", |check| check["level"].as_str().unwrap())
    }

    fn found(&self, name: &str) -> &str {
        self.check(name).map_or("", |check| check["found"].as_str().unwrap())
    }

    fn fix(&self, name: &str) -> &str {
        self.check(name).and_then(|check| check["fix"].as_str()).unwrap_or("")
    }

    fn check(&self, name: &str) -> Option<&Value> {
        self.report["checks"].as_array().unwrap().iter().find(|check| check["name"] == name)
    }
}

fn examine(machine: Option<&Machine>, device: &[&str]) -> Findings {
    let home = tempfile::tempdir().unwrap();
    let mut command: Command = kvoyant(home.path());
    command.args(["doctor", "--json", "--config", "/dev/null"]).args(device);
    command.arg("--state").arg(home.path().join("state"));
    match machine {
        Some(machine) => _ = machine.env(&mut command),
        // No driver, whatever this machine has.
        None => _ = command.env("CUDA_VISIBLE_DEVICES", ""),
    }
    let (code, out, err) = run(&mut command);
    assert_eq!(err, "", "{out}");
    Findings { code, report: serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}")) }
}

const CUDA: &[&str] = &["--device", "cuda:0"];

#[test]
fn a_gpu_that_can_do_everything_passes_every_check_of_sharing() {
    let machine = Machine::new();
    let findings = examine(Some(&machine), CUDA);
    let passes = [
        "driver",
        "device",
        "compute-mode",
        "device-memory",
        "stream-words",
        "events",
        "export-descriptor",
        "export-handle",
        "read-only",
        "register",
        "nvrtc",
        "state",
        "memfd",
        "futex-waitv",
    ];
    for name in passes {
        assert_eq!(findings.level(name), "pass", "{name}: {:?}", findings.check(name));
    }
    assert_eq!(findings.level("calibration"), "warn");
    assert!(findings.fix("calibration").contains("kvoyant calibrate --device cuda:0"));
    assert_eq!((findings.code, &findings.report["usable"]), (Some(0), &Value::Bool(true)));
    machine.assert_clean();
}

#[test]
fn a_machine_without_a_driver_fails_for_a_gpu_and_serves_as_the_host() {
    if kvoyant_cuda::driver().is_ok() {
        return assert_eq!(examine(None, &["--device", "host"]).code, Some(0));
    }
    let findings = examine(None, CUDA);
    assert_eq!((findings.code, findings.level("driver")), (Some(1), "fail"));
    assert!(findings.found("driver").contains("--device host"), "{}", findings.found("driver"));
    assert_eq!(findings.check("device"), None, "there is none to look at");
    let findings = examine(None, &["--device", "host"]);
    assert_eq!((findings.code, findings.level("driver")), (Some(0), "warn"));
    assert_eq!(findings.level("memfd"), "pass");
}

#[test]
fn an_old_driver_is_named_with_the_version_that_is_needed() {
    let findings = examine(Some(&Machine::new().with("SOFTCUDA_DRIVER_VERSION", "11080")), CUDA);
    assert_eq!((findings.code, findings.level("driver")), (Some(1), "fail"));
    let found = findings.found("driver");
    assert!(found.contains("11.8") && found.contains("12.2"), "{found}");
}

#[test]
fn a_driver_without_devices_and_a_device_that_is_not_there_fail() {
    let findings = examine(Some(&Machine::new().with("SOFTCUDA_DEVICES", "0")), CUDA);
    assert_eq!((findings.code, findings.level("driver")), (Some(1), "fail"));
    assert!(findings.found("driver").contains("CUDA_VISIBLE_DEVICES"));
    let findings = examine(Some(&Machine::new()), &["--device", "cuda:3"]);
    assert_eq!((findings.code, findings.level("devices")), (Some(1), "fail"));
    assert!(findings.found("devices").contains("no cuda:3; the driver shows cuda:0"));
}

#[test]
fn a_card_for_one_process_fails_with_the_command_that_opens_it() {
    let findings = examine(Some(&Machine::new().with("SOFTCUDA_EXCLUSIVE", "1")), CUDA);
    assert_eq!((findings.code, findings.level("compute-mode")), (Some(1), "fail"));
    assert_eq!(findings.fix("compute-mode"), "nvidia-smi -i 0 -c DEFAULT");
}

#[test]
fn a_slice_of_a_card_works_and_says_what_engines_must_be_given() {
    let findings = examine(Some(&Machine::new().with("SOFTCUDA_MIG", "1")), CUDA);
    assert_eq!((findings.code, findings.level("mig")), (Some(0), "warn"));
    assert!(findings.fix("mig").contains("CUDA_VISIBLE_DEVICES=MIG-"), "{}", findings.fix("mig"));
}

#[test]
fn one_way_to_share_and_one_way_to_signal_are_enough_and_none_is_not() {
    let without = |what: &str| examine(Some(&Machine::new().with("SOFTCUDA_NO", what)), CUDA);
    let findings = without("posix_fd");
    assert_eq!((findings.code, findings.level("export-descriptor")), (Some(0), "warn"));
    assert_eq!(findings.level("read-only"), "warn");
    let findings = without("memops64");
    assert_eq!((findings.code, findings.level("stream-words")), (Some(0), "warn"));
    assert!(findings.found("stream-words").contains("32-bit"));
    let findings = without("memops,memops64");
    assert_eq!((findings.code, findings.level("stream-words")), (Some(0), "warn"));
    assert_eq!(findings.level("events"), "pass");
    let findings = without("memops,memops64,ipc_events,ipc");
    assert_eq!((findings.code, findings.level("stream-words")), (Some(1), "fail"));
    let findings = without("posix_fd,ipc_events,ipc");
    assert_eq!((findings.code, findings.level("export-handle")), (Some(1), "fail"));
    let findings = without("host_register");
    assert_eq!((findings.code, findings.level("register")), (Some(1), "fail"));
}

#[test]
fn a_driver_that_refuses_is_quoted_with_what_to_do() {
    let machine = Machine::new();
    machine.set_faults("register-fails");
    let findings = examine(Some(&machine), CUDA);
    assert_eq!((findings.code, findings.level("register")), (Some(1), "fail"));
    assert!(findings.found("register").contains("cuMemHostRegister"), "{}", findings.found("register"));
    assert!(!findings.fix("register").is_empty());
}

#[test]
fn people_get_one_line_for_each_check() {
    let machine = Machine::new();
    let home = tempfile::tempdir().unwrap();
    let mut command = kvoyant(home.path());
    command.args(["doctor", "--config", "/dev/null", "--device", "cuda:0"]);
    let (code, out, _) = run(machine.env(&mut command));
    assert_eq!(code, Some(0), "{out}");
    let checks: Vec<&str> = out.lines().take_while(|line| !line.is_empty()).collect();
    assert!(checks.len() > 15, "{out}");
    assert!(checks.iter().all(|line| line.starts_with("pass  ") || line.starts_with("warn  ")), "{out}");
    assert!(out.contains("\ncuda:0 can be used: 0 failed"), "{out}");
}

/// What the doctor says of a configuration, for the host.
fn examine_disks(configuration: &str) -> Findings {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("kvoyantd.toml");
    std::fs::write(&file, configuration).unwrap();
    let mut command: Command = kvoyant(home.path());
    command.args(["doctor", "--json", "--device", "host", "--config"]).arg(&file);
    let (code, out, err) = run(command.env("CUDA_VISIBLE_DEVICES", ""));
    assert_eq!(err, "", "{out}");
    Findings { code, report: serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}")) }
}

#[test]
fn disks_and_images_are_tried_and_nothing_is_left_there() {
    let place = tempfile::tempdir().unwrap();
    let below = |name: &str| place.path().join(name).display().to_string();
    std::fs::create_dir(below("spill")).unwrap();
    let findings = examine_disks(&format!(
        "spill = [{:?}]\nspill_bytes = \"64MiB\"\nstore = {:?}\nremote = \"memory:\"\n",
        below("spill"),
        below("images"),
    ));
    assert_eq!(findings.code, Some(0), "{:?}", findings.report);
    for name in ["spill-room", "store", "remote"] {
        assert_eq!(findings.level(name), "pass", "{name}: {:?}", findings.check(name));
    }
    assert!(["pass", "warn"].contains(&findings.level("spill")), "{:?}", findings.check("spill"));
    assert!(findings.check("io-uring").is_some() && findings.check("spill-buffers").is_some());
    assert_eq!(everything_below(place.path()), ["spill"]);
    let plain = examine_disks("");
    for name in ["spill", "spill-room", "io-uring", "store", "remote"] {
        assert_eq!(plain.check(name), None, "nothing of the kind is configured");
    }
}

#[test]
fn places_that_cannot_be_used_fail_with_what_mends_them() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().display();
    let findings = examine_disks(&format!(
        "spill = [\"/no/such/folder/spill\", \"{folder}\"]\nspill_bytes = \"1PiB\"\n"
    ));
    assert_eq!((findings.code, findings.level("spill")), (Some(1), "fail"), "{:?}", findings.report);
    assert!(findings.fix("spill").contains("install -d -m 700 /no/such/folder"), "{}", findings.fix("spill"));
    assert_eq!(findings.level("spill-room"), "fail");
    assert!(findings.fix("spill-room").contains("spill_bytes"), "{}", findings.fix("spill-room"));
    // A file where a folder should be, and a server that is not there.
    let file = place.path().join("file");
    std::fs::write(&file, "").unwrap();
    let findings = examine_disks(&format!(
        "store = {:?}\nremote = \"redis://me:hunter2@127.0.0.1:9/0\"\n",
        file.join("images").display().to_string()
    ));
    assert_eq!((findings.code, findings.level("store")), (Some(1), "fail"), "{:?}", findings.report);
    assert!(findings.fix("store").contains("install -d"), "{}", findings.fix("store"));
    assert_eq!(findings.level("remote"), "warn");
    assert!(
        findings.found("remote").contains("127.0.0.1:9") && !findings.found("remote").contains("hunter2")
    );
}
