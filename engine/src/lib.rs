//! A reference decoder for Llama, Mistral and Qwen2 models on the CPU, with a seam where its KV cache lives.
//!
//! | to … | use |
//! |---|---|
//! | load a GGUF file or a Hugging Face folder | [`Model::load`] |
//! | turn text into tokens and back | [`Tokenizer`], [`ChatTemplate`], [`TextStream`] |
//! | run it | [`Decoder::prefill`], [`Decoder::step`] or [`generate()`] |
//! | keep K and V in this process | [`DenseKv`] |
//! | keep K and V in the daemon | [`DaemonKv`] |
//! | keep K and V elsewhere | implement [`KvBackend`] |
//! | keep the KV of a model written with candle | [`candle::KvPass`] |
//! | see queries, keys and values as they come | [`Observed`], [`Capture`] |
//! | make what methods learn from a model offline | [`calibrate`] |
//! | choose tokens | [`Sampler`] |
//! | test without a download | [`synthetic`] |
//!
//! ```
//! use kvoyant_engine::*;
//!
//! let model = synthetic::tiny(7);
//! let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
//! let mut kv = DenseKv::new(KvShape::new(model.config(), Dtype::F16));
//! let mut sequence = kv.sequence();
//! let prompt = model.tokenizer().encode("Hello", true)?;
//! let logits = decoder.prefill(&mut kv, &mut sequence, &prompt, PrefillOptions::default())?;
//! let next = Sampler::greedy().sample(&logits);
//! let step = decoder.step(&mut kv, &mut [&mut sequence], &[next])?;
//! assert_eq!(step.logits.len(), model.config().vocabulary);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(unsafe_code)]

mod awake;
pub mod calibrate;
pub mod candle;
mod capture;
mod chat;
mod config;
mod decoder;
mod error;
mod generate;
mod kv;
mod load;
mod model;
mod rope;
mod sampling;
pub mod synthetic;
mod tokenizer;
mod weights;

pub use capture::{Capture, CaptureOptions};
pub use chat::{ChatTemplate, Message};
pub use config::{Architecture, ModelConfig, RopeScaling};
pub use decoder::{
    Decoder, DecoderOptions, HintNorm, LayerSeen, LearnedHints, Logits, PrefillOptions, StepOutput,
    StepTiming,
};
pub use error::{ForwardError, LoadError, TextError};
pub use generate::{GenerateError, GenerateOptions, Generated, Prompt, StopReason, generate};
pub use kv::{
    Certified, DaemonError, DaemonKv, DaemonOptions, DaemonSequence, DenseKv, DenseSequence, Dtype,
    Fallbacks, Format, FormatError, HeadRows, IdsRequest, KvBackend, KvShape, Measured, Observe, Observed,
    Paged, Selects, StepStats,
};
pub use kvoyant_client::Fallback;
pub use kvoyant_kernels::SplitMix64;
pub use load::{LoadOptions, sha256_file};
pub use model::Model;
pub use rope::{Rope, RopeTable};
pub use sampling::{Sampler, SamplerOptions, argmax, log_probability};
pub use tokenizer::{TextStream, Tokenizer};
pub use weights::{Linear, Precision, WeightsMode};

/// Threads that a pass uses: rayon's, which `RAYON_NUM_THREADS` sets.
#[must_use]
pub fn threads() -> usize {
    rayon::current_num_threads()
}
