//! Hints that are learnt from a model: calibrating, keeping and using what was learnt.

use std::path::Path;

use crate::common::{everything_below, kvoyant, run};
use kvoyant_methods::hint::HintArtifact;
use kvoyant_methods::{Artifact, ArtifactKind, Dtype, Fingerprint, Shape};

const LEARNED: &str = "infinigen:hint_norm=learned";

fn kind(path: &Path) -> ArtifactKind {
    Artifact::kind_of(&std::fs::read(path).unwrap()).unwrap()
}

fn calibrate(home: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    run(kvoyant(home).args(["calibrate-model", "--model", "tiny"]).args(arguments))
}

fn answer(home: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let prompt = "A prompt that is longer than sinks and window. ".repeat(8);
    run(kvoyant(home)
        .args(["run", "--model", "tiny", "--raw", "--max-tokens", "6", "--prompt", &prompt])
        .args(arguments))
}

#[test]
fn calibrating_makes_all_that_the_method_needs_and_says_where_it_lies() {
    let home = tempfile::tempdir().unwrap();
    let (code, out, err) = calibrate(home.path(), &["--method", LEARNED]);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("calibrating hint: solving for corrections"), "{err}");
    let kinds: Vec<ArtifactKind> = out.lines().map(|path| kind(path.as_ref())).collect();
    assert_eq!(kinds, [ArtifactKind::Skew, ArtifactKind::Hint]);

    let file = home.path().join("one.safetensors");
    let (code, _, err) = calibrate(home.path(), &["--method", LEARNED, "--out", file.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("skew, hint") && err.contains("folder"), "{err}");
    let folder = home.path().join("both");
    std::fs::create_dir(&folder).unwrap();
    let (code, _, err) = calibrate(home.path(), &["--method", LEARNED, "--out", folder.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(kind(&folder.join("hint.safetensors")), ArtifactKind::Hint);
    assert_eq!(kind(&folder.join("skew.safetensors")), ArtifactKind::Skew);
}

#[test]
fn a_run_learns_its_hints_when_they_are_first_needed_and_with_every_row_answers_as_dense_attention_does() {
    let home = tempfile::tempdir().unwrap();
    let (code, dense, err) = answer(home.path(), &["--attention", "dense"]);
    assert_eq!(code, Some(0), "{err}");
    let all = format!("{LEARNED},budget=100%");
    let (code, said, err) = answer(home.path(), &["--method", &all]);
    assert_eq!((code, said), (Some(0), dense), "{err}");
    let kept = everything_below(home.path());
    assert!(kept.iter().any(|path| path.contains("hint/") && path.ends_with(".safetensors")), "{kept:?}");
}

#[test]
fn hints_of_another_model_are_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let shape = Shape {
        layers: 2,
        query_heads: 1,
        kv_heads: 1,
        head_dim: 2,
        value_dim: 2,
        page_rows: 32,
        sinks: 4,
        window: 64,
        dense_layers: 1,
        dtype: Dtype::F16,
        fingerprint: Fingerprint([9; 16]),
    };
    let other = HintArtifact::new(&shape, 3, [[0.5; 6].as_slice()]).unwrap();
    let path = home.path().join("other.safetensors");
    std::fs::write(&path, other.to_bytes().unwrap()).unwrap();
    let (code, _, err) = answer(home.path(), &["--method", LEARNED, "--artifact", path.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("other.safetensors") && err.contains("calibrate again"), "{err}");
}
