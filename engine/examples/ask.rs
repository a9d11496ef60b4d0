//! Asks a model a question, about a text if one is given, with plain attention.
//!
//! `cargo run --release -p kvoyant-engine --example ask -- MODEL QUESTION [TEXT_FILE]`

use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;

use kvoyant_engine::{
    Decoder, DecoderOptions, DenseKv, Dtype, GenerateOptions, KvShape, LoadOptions, Message, Model,
    PrefillOptions, Prompt, Sampler, generate,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(question)) = (arguments.next(), arguments.next()) else {
        return Err("usage: ask MODEL QUESTION [TEXT_FILE]".into());
    };
    let question = match arguments.next() {
        Some(file) => format!("{}\n\n{question}", std::fs::read_to_string(file)?),
        None => question,
    };
    let model = Model::load(Path::new(&model), &LoadOptions::default())?;
    let template = model.chat_template().ok_or("the model has no chat template")?;
    let prompt = model.tokenizer().encode(&template.render(&[Message::user(question)], true)?, false)?;

    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut kv = DenseKv::new(KvShape::new(model.config(), Dtype::F16));
    let mut sequence = kv.sequence();
    let mut progress = |done, total| {
        eprint!("\r{done} of {total} tokens read");
        ControlFlow::Continue(())
    };
    let options = PrefillOptions { progress: Some(&mut progress), ..PrefillOptions::default() };
    let logits = decoder.prefill(&mut kv, &mut sequence, &prompt, options)?;
    eprintln!();
    let options = GenerateOptions { max_tokens: 64, ..GenerateOptions::default() };
    let answer = generate(
        &mut decoder,
        &mut kv,
        &mut sequence,
        Prompt { tokens: &prompt, logits },
        &mut Sampler::greedy(),
        options,
        &mut |text, _| {
            print!("{text}");
            match std::io::stdout().flush() {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        },
    )?;
    println!();
    eprintln!("{} tokens, {:?}, {:?} in steps", answer.tokens.len(), answer.stop, answer.timing.total);
    Ok(())
}
