//! How far predicted queries are from the true ones, by layer, for each kind of hint.
//!
//! ```sh
//! kvoyant calibrate-model --method infinigen:hint_norm=learned,skew=off --text LEARN.txt --out hint.safetensors
//! cargo run --release -p kvoyant-engine --example hint_error -- MODEL hint.safetensors TEXT...
//! ```
//!
//! `MODEL` must be the model that the artifact was made with: its fingerprint is taken as given. Of each text at most 2,048 tokens
//! are read. Means are over the layers that are speculated; with `--layers` each layer has a line.

use std::sync::Arc;

use kvoyant_engine::calibrate::hint_errors;
use kvoyant_engine::{DaemonOptions, Dtype, HintNorm, KvShape, LearnedHints, LoadOptions, Model};
use kvoyant_methods::Artifact;

/// Tokens of a text.
const TOKENS: usize = 2048;

const KINDS: [&str; 3] = ["own", "previous", "learned"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (flags, names): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
    let [model, artifact, texts @ ..] = &names[..] else {
        return Err("give a model, a hint artifact and texts".into());
    };
    let model = Model::load(model.as_ref(), &LoadOptions::default())?;
    let Artifact::Hint(hint) = Artifact::from_bytes(&std::fs::read(artifact)?)? else {
        return Err(format!("{artifact} is no hint artifact").into());
    };
    let options = DaemonOptions { fingerprint: hint.model(), ..DaemonOptions::default() };
    let shape = options.shape(&KvShape::new(model.config(), Dtype::F16), 32);
    let learned = Arc::new(LearnedHints::new(&model, &shape, &hint)?);
    let kinds = [HintNorm::Own, HintNorm::Previous, HintNorm::Learned(learned)];
    println!("{:40} {:>6} {:>9} {:>9} {:>9}", "text", "tokens", KINDS[0], KINDS[1], KINDS[2]);
    for text in texts {
        let mut tokens = model.tokenizer().encode(&std::fs::read_to_string(text)?, true)?;
        tokens.truncate(TOKENS.min(model.config().context_tokens));
        let errors = hint_errors(&model, &kinds, &tokens, &mut |_, _, _| {})?;
        if flags.iter().any(|flag| flag == "--layers") {
            for error in &errors {
                let [own, previous, learned] = [0, 1, 2].map(|kind| error.relative[kind]);
                println!("{:40} {:>6} {own:9.3} {previous:9.3} {learned:9.3}", "  layer", error.layer);
            }
        }
        let mean = |kind: usize| {
            let speculated = || errors.iter().filter(|error| error.layer >= options.dense_layers);
            speculated().map(|error| error.relative[kind]).sum::<f64>() / speculated().count().max(1) as f64
        };
        let [own, previous, learned] = [0, 1, 2].map(mean);
        println!("{text:40} {:>6} {own:9.3} {previous:9.3} {learned:9.3}", tokens.len());
    }
    Ok(())
}
