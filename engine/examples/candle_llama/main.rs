//! A Llama that is written with candle, with its KV in Kvoyant: its greedy tokens beside those of candle's own model and attention.
//!
//! `cargo run --release -p kvoyant-engine --example candle_llama -- MODEL.gguf SOCKET [METHOD [TEXT_FILE]]`
//!
//! SOCKET is a daemon's; `-` keeps the KV in this process. METHOD is `full` unless said otherwise.

mod model;

use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use kvoyant_engine::candle::KvPass;
use kvoyant_engine::{
    DaemonKv, DaemonOptions, DenseKv, KvBackend, LoadOptions, Model, TextError, Tokenizer, sha256_file,
};
use model::{Llama, most_probable};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Tokens of the answer.
const ANSWER: usize = 48;
const TEXT: &str = "The lighthouse keeper wrote in his book that the storm had come from the north, and that";

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(socket)) = (arguments.next(), arguments.next()) else {
        return Err("usage: candle_llama MODEL.gguf SOCKET|- [METHOD [TEXT_FILE]]".into());
    };
    let method = arguments.next().unwrap_or_else(|| "full".into());
    let text = arguments.next().map_or_else(|| Ok(TEXT.into()), std::fs::read_to_string)?;
    // Its tokenizer is the reference engine's; candle has none for GGUF files.
    let reference = Model::load(Path::new(&path), &LoadOptions::default())?;
    let prompt = reference.tokenizer().encode(&text, true)?;

    let mut file = File::open(&path)?;
    let llama = Llama::load(&gguf_file::Content::read(&mut file)?, &mut file)?;
    let tokens = if socket == "-" {
        let mut kv = DenseKv::new(llama.shape().clone());
        let mut sequence = kv.sequence();
        generate(&llama, &mut kv, &mut sequence, &prompt)?
    } else {
        let options = DaemonOptions {
            name: "candle-llama".into(),
            // Two models must not take one another's rows: 32 hex digits that are the file's own.
            fingerprint: sha256_file(Path::new(&path))?[..32].parse()?,
            methods: vec![method.parse()?],
            context_tokens: prompt.len() + ANSWER,
            batch_max: 1,
            ..DaemonOptions::default()
        };
        let mut kv = DaemonKv::connect(Path::new(&socket), llama.shape().clone(), options)?;
        let mut sequence = kv.sequence(0)?;
        let tokens = generate(&llama, &mut kv, &mut sequence, &prompt)?;
        let stats = kv.take_stats();
        println!("{} rows selected, {} bytes moved", stats.rows_selected, stats.bytes_moved);
        tokens
    };

    let mut file = File::open(&path)?;
    let theirs = candle_alone(
        ModelWeights::from_gguf(gguf_file::Content::read(&mut file)?, &mut file, &Device::Cpu)?,
        &prompt,
    )?;
    show("candle's attention", reference.tokenizer(), &theirs)?;
    show(&format!("Kvoyant's ({method})"), reference.tokenizer(), &tokens)?;
    let same = tokens.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
    println!("the first {same} of {ANSWER} tokens are the same");
    Ok(())
}

fn show(whose: &str, tokenizer: &Tokenizer, tokens: &[u32]) -> std::result::Result<(), TextError> {
    println!("{whose}: {:?}", tokenizer.decode(tokens)?);
    Ok(())
}

/// Greedy tokens, through whatever keeps the KV.
fn generate<B: KvBackend>(
    llama: &Llama,
    kv: &mut B,
    sequence: &mut B::Sequence,
    prompt: &[u32],
) -> Result<Vec<u32>> {
    let input = Tensor::new(prompt, &Device::Cpu)?.unsqueeze(0)?;
    let pass = KvPass::prefill(kv, [&mut *sequence], prompt.len())?;
    let mut token = most_probable(&llama.forward(&input, pass)?)?[0];
    let mut tokens = vec![token];
    while tokens.len() < ANSWER {
        let input = Tensor::new(&[[token]], &Device::Cpu)?;
        let pass = KvPass::step(kv, [&mut *sequence])?;
        token = most_probable(&llama.forward(&input, pass)?)?[0];
        tokens.push(token);
    }
    Ok(tokens)
}

/// Greedy tokens of candle's own model.
fn candle_alone(mut model: ModelWeights, prompt: &[u32]) -> candle_core::Result<Vec<u32>> {
    let input = Tensor::new(prompt, &Device::Cpu)?.unsqueeze(0)?;
    let mut token = most_probable(&model.forward(&input, 0)?)?[0];
    let mut tokens = vec![token];
    while tokens.len() < ANSWER {
        let at = prompt.len() + tokens.len() - 1;
        token = most_probable(&model.forward(&Tensor::new(&[[token]], &Device::Cpu)?, at)?)?[0];
        tokens.push(token);
    }
    Ok(tokens)
}
