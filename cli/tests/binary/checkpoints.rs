//! `run` on checkpoint folders of every family, in one file and in several.

use std::path::Path;

use crate::common::{kvoyant, run};
use kvoyant_engine::synthetic::{Checkpoint, FolderOptions, tiny_config};
use kvoyant_engine::{Architecture, Dtype, ModelConfig};

fn answer(home: &Path, model: &Path, arguments: &[&str]) -> String {
    let prompt = "The harbour was quiet. ".repeat(20);
    let mut command = kvoyant(home);
    command.args(["run", "--raw", "--max-tokens", "16", "--prompt"]).arg(prompt).arg("--model").arg(model);
    let (code, out, err) = run(command.args(arguments));
    assert_eq!(code, Some(0), "{}: {arguments:?}: {err}", model.display());
    out
}

#[test]
fn run_answers_alike_with_and_without_the_daemon_on_llama_mistral_and_qwen2_folders() {
    let llama = tiny_config();
    let mistral = ModelConfig {
        architecture: Architecture::Mistral,
        sliding_window: vec![Some(48); llama.layers],
        ..tiny_config()
    };
    let qwen2 = ModelConfig {
        architecture: Architecture::Qwen2,
        qkv_bias: true,
        rope_theta: 1_000_000.0,
        ..tiny_config()
    };
    let home = tempfile::tempdir().unwrap();
    for (name, config, shards) in [("llama", llama, 3), ("mistral", mistral, 1), ("qwen2", qwen2, 2)] {
        let folder = home.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let options = FolderOptions { shards, dtype: Dtype::F32 };
        Checkpoint::random(config, 11).write_folder(&folder, options).unwrap();
        let dense = answer(home.path(), &folder, &["--attention", "dense"]);
        assert!(!dense.trim().is_empty(), "{name} said nothing");
        assert_eq!(answer(home.path(), &folder, &["--method", "full"]), dense, "{name}");
        let quest = answer(home.path(), &folder, &["--method", "quest", "--budget", "100%"]);
        assert_eq!(quest, dense, "{name}");
    }
}
