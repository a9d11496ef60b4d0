//! The same arithmetic for a GPU: kernel sources, their parameters and launch shapes. Nothing here calls a driver.
//!
//! A [`Source`] is text that NVRTC compiles as it stands; its kernels take one structure of [`params`] by value. The CPU's kernels say
//! what they compute: results differ by rounding only.

pub mod launch;
pub mod params;

pub use launch::Launch;

/// What every source begins with.
const COMMON: &str = include_str!("../../cuda/common.cuh");

/// Stands in a compiled image before the hash of the source that it was made from.
pub const MARKER: &str = "kvoyant-source:";

/// The text of some kernels that belong together.
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    name: &'static str,
    body: &'static str,
    entries: &'static [&'static str],
}

impl Source {
    /// The name: that of the file, without its ending.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The names of its kernels.
    #[must_use]
    pub const fn entries(&self) -> &'static [&'static str] {
        self.entries
    }

    /// The whole text, but for the marker.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{COMMON}{}", self.body)
    }

    /// BLAKE3 of [`Source::text`], 64 hex digits: two sources of one hash are the same source.
    #[must_use]
    pub fn hash(&self) -> String {
        blake3::hash(self.text().as_bytes()).to_hex().to_string()
    }

    /// What is given to the compiler: the text, and a line that puts [`MARKER`] and the hash into the image.
    #[must_use]
    pub fn compile_text(&self) -> String {
        let (text, hash) = (self.text(), self.hash());
        format!("{text}extern \"C\" __device__ const char kvoyant_source_hash[] = \"{MARKER}{hash}\";\n")
    }
}

macro_rules! source {
    ($name:literal, [$($entry:literal),*]) => {
        Source { name: $name, body: include_str!(concat!("../../cuda/", $name, ".cu")), entries: &[$($entry),*] }
    };
}

/// Every source.
pub static SOURCES: &[Source] = &[
    source!("attend", ["attend"]),
    source!("codes", ["code_scores", "code_rest"]),
    source!("dequantise", ["dequantise"]),
    source!("gather", ["gather_runs"]),
    source!("merge", ["lse_merge"]),
    source!("residency", ["resolve_attend", "report"]),
    source!("score", ["partial_scores", "quest_bounds", "hamming"]),
    source!("select", ["top_k"]),
];

/// The source of a name.
#[must_use]
pub fn source(name: &str) -> Option<&'static Source> {
    SOURCES.iter().find(|source| source.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_has_the_kernels_that_it_names_and_a_hash_of_its_own() {
        for source in SOURCES {
            let text = source.text();
            for entry in source.entries() {
                let head = format!("extern \"C\" __global__ void {entry}(const ");
                assert_eq!(text.matches(&head).count(), 1, "{entry} in {}", source.name());
            }
            let kernels = text.matches("extern \"C\" __global__").count();
            assert_eq!(kernels, source.entries().len(), "{}", source.name());
            assert!(!text.contains("\n#include"), "{} needs a header", source.name());
            let hash = source.hash();
            assert_eq!(SOURCES.iter().filter(|other| other.hash() == hash).count(), 1);
            assert!(source.compile_text().contains(&format!("\"{MARKER}{hash}\"")));
        }
        assert_eq!(source("attend").map(Source::name), Some("attend"));
        assert_eq!(source("nothing"), None);
    }
}
