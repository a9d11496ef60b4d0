//! Engines with their KV in a daemon: the reference engine, one written with candle, C programs.

mod c;
mod candle;
mod engine;
mod engine_needs;
