//! How fast a model loads, prefills and decodes here.
//!
//! `cargo run --release -p kvoyant-engine --example prefill_speed -- MODEL [TOKENS] [CHUNK]`

use std::path::Path;
use std::time::{Duration, Instant};

use kvoyant_engine::{
    Decoder, DecoderOptions, DenseKv, Dtype, KvShape, LoadOptions, Model, PrefillOptions, StepTiming, argmax,
    synthetic,
};

/// Steps that are timed, after one that warms up.
const STEPS: usize = 16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().unwrap_or_else(|| "tiny".to_owned());
    let tokens: usize = arguments.next().map_or(Ok(2048), |text| text.parse())?;
    let mut options = DecoderOptions::default();
    if let Some(chunk) = arguments.next() {
        options.chunk_tokens = chunk.parse()?;
    }

    let begin = Instant::now();
    let model = match model.as_str() {
        "tiny" => synthetic::tiny(0),
        path => Model::load(Path::new(path), &LoadOptions::default())?,
    };
    println!("load     {:8.2} s   {}", begin.elapsed().as_secs_f64(), model.name());

    let text = "The quick brown fox jumps over the lazy dog, and nobody minds. ".repeat(tokens / 8);
    let mut prompt = model.tokenizer().encode(&text, true)?;
    prompt.truncate(tokens);

    let mut decoder = Decoder::new(model.clone(), options);
    let mut kv = DenseKv::new(KvShape::new(model.config(), Dtype::F16));
    let mut sequence = kv.sequence();
    let begin = Instant::now();
    let logits = decoder.prefill(&mut kv, &mut sequence, &prompt, PrefillOptions::default())?;
    let took = begin.elapsed();
    println!(
        "prefill  {:8.2} s   {:.0} tokens/s ({} tokens, chunks of {})",
        took.as_secs_f64(),
        prompt.len() as f64 / took.as_secs_f64(),
        prompt.len(),
        decoder.options().chunk_tokens,
    );

    for batch in [1, 4, 16] {
        let mut forks: Vec<_> = (0..batch).map(|_| kv.fork(&mut sequence)).collect();
        let mut next = vec![argmax(&logits); batch];
        let mut timing = StepTiming::default();
        for step in 0..=STEPS {
            let mut sequences: Vec<_> = forks.iter_mut().collect();
            let output = decoder.step(&mut kv, &mut sequences, &next)?;
            next = (0..batch).map(|index| argmax(output.of(index, batch))).collect();
            if step > 0 {
                timing += output.timing;
            }
        }
        let ms = |time: Duration| time.as_secs_f64() * 1e3 / STEPS as f64;
        println!(
            "decode   {:8.2} ms a step of batch {batch}: linear {:.2}, attend {:.2}, append {:.2}",
            ms(timing.total),
            ms(timing.linear),
            ms(timing.attend),
            ms(timing.append),
        );
    }
    Ok(())
}
