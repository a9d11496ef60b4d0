//! The reference engine: logits, files, texts, hints.

mod agreement;
mod bad_input;
mod candle;
mod capture;
mod common;
mod files;
mod hints;
mod recall;
mod text;
