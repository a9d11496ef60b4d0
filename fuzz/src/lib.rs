//! What reads bytes of peers, files and users, as functions of bytes.
//!
//! `fuzz_targets/` gives each of them to libFuzzer (`scripts/fuzz`); `tests/replay.rs` gives each its seeds and a fixed
//! series of mutations of them, in every `cargo test`. A target fails by a panic, in whatever thread.

pub mod input;
pub mod mutate;
pub mod service;
pub mod targets;

use std::path::{Path, PathBuf};

/// A function of bytes, and bytes to begin with.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: of its module, of its libFuzzer program, of its folder of seeds.
    pub name: &'static str,
    /// Takes any bytes, and panics where something is wrong.
    pub run: fn(&[u8]),
    /// Good inputs, written to `seeds/` by the program `write-seeds`.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// How many mutated inputs an ordinary test runs: a second or two.
    pub replays: u64,
}

macro_rules! target {
    ($name:ident, $replays:expr) => {
        Target {
            name: stringify!($name),
            run: targets::$name::run,
            seeds: targets::$name::seeds,
            replays: $replays,
        }
    };
}

/// All targets but the [canary](targets::canary).
pub const TARGETS: &[Target] = &[
    target!(admin, 1_000),
    target!(areas, 300),
    target!(artifacts, 20_000),
    target!(config, 3_000),
    target!(control, 100_000),
    target!(descriptors, 100_000),
    target!(images, 3_000),
    target!(journal, 10_000),
    target!(models, 3_000),
    target!(prefixes, 10_000),
    target!(requests, 100),
    target!(tables, 20_000),
];

/// The one that must fail.
pub const CANARY: Target = target!(canary, 200_000);

/// Where a target's seeds are.
#[must_use]
pub fn seeds_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(name)
}
