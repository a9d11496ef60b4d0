//! What a model registers with.

use std::time::Duration;

use kvoyant_client::{Fallback, Limits};
use kvoyant_kernels::quantise::Format;
use kvoyant_methods::full::FullSpec;
use kvoyant_methods::infinigen::{IndexRule, InfinigenSpec};
use kvoyant_methods::mix::MixSpec;
use kvoyant_methods::{Artifacts, Dtype, Fingerprint, HintSource, MethodSpec, Shape};

use super::super::KvShape;
use super::DaemonError;
use crate::rope::Rope;

/// Queries of a chunk that a sparse prefill sends at most: they stand for all of its tokens.
pub(super) const BLOCK_QUERIES: usize = 64;

/// The smallest block of an attention row that the session's memory is made for.
const SMALLEST_BLOCK: usize = 4;

/// Who selects rows that are read in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Selects {
    /// Whoever costs a step less ([`kvoyant_client::local::Setting`]).
    #[default]
    Auto,
    /// The daemon's lanes.
    Lane,
    /// This process, for methods that it can.
    Client,
}

/// What a model registers with.
#[derive(Debug, Clone)]
pub struct DaemonOptions {
    /// A name for `kvoyant status`.
    pub name: String,
    /// Fingerprint of the weights.
    pub fingerprint: Fingerprint,
    /// Methods that sequences may use, by index.
    pub methods: Vec<MethodSpec>,
    /// What the methods were calibrated to.
    pub artifacts: Artifacts,
    /// How the model rotates keys, for methods that rebuild them.
    pub rope: Option<Rope>,
    /// First tokens that are always attended.
    pub sinks: usize,
    /// Recent tokens that are always attended, the current one included.
    pub window: usize,
    /// Layers `0..dense_layers` attend to everything.
    pub dense_layers: usize,
    /// Longest sequence, in tokens; sizes the answers.
    pub context_tokens: usize,
    /// Most sequences in one step.
    pub batch_max: usize,
    /// How long the daemon may be silent before the engine goes on without it.
    pub deadline: Duration,
    /// What stands in for a layer's answer that is late.
    pub fallback: Fallback,
    /// How long after it was asked for an answer is late, where the fallback is not to wait for it.
    pub late_after: Duration,
    /// Who selects rows, where they are read in place.
    pub selects: Selects,
}

impl Default for DaemonOptions {
    fn default() -> Self {
        Self {
            name: "kvoyant-engine".into(),
            fingerprint: Fingerprint::default(),
            methods: vec![MethodSpec::new(FullSpec)],
            artifacts: Artifacts::none(),
            rope: None,
            sinks: 4,
            window: 64,
            dense_layers: 2,
            context_tokens: 8192,
            batch_max: 32,
            deadline: Duration::from_secs(30),
            fallback: Fallback::Wait,
            late_after: Duration::from_millis(100),
            selects: Selects::Auto,
        }
    }
}

impl DaemonOptions {
    /// The shape that methods and artifacts are made for.
    #[must_use]
    pub fn shape(&self, kv: &KvShape, page_rows: usize) -> Shape {
        Shape {
            layers: kv.layers,
            query_heads: kv.query_heads,
            kv_heads: kv.kv_heads,
            head_dim: kv.head_dim,
            value_dim: kv.head_dim,
            page_rows,
            sinks: self.sinks,
            window: self.window,
            dense_layers: self.dense_layers,
            dtype: match kv.format {
                Format::Plain(dtype) => dtype,
                // What they are read as.
                _ => Dtype::F32,
            },
            fingerprint: self.fingerprint,
        }
    }

    /// Rings for a few answers under way, each with a block table for the worst case: every row in a run of its own, as it may be in a slab
    /// whose slots have changed hands.
    pub(super) fn limits(&self, kv: &KvShape) -> Limits {
        let heads = self.batch_max * kv.kv_heads;
        // What the daemon's CPU attended comes behind the runs.
        let partials = self.batch_max * (1 + kv.query_heads * (1 + kv.head_dim)) * 4;
        // And what answers estimate of the rows left out.
        let rests = self.batch_max * kv.query_heads * (7 + kv.head_dim) * 4;
        let table = heads * (16 + 12 * (self.context_tokens + 2)) + partials + rests;
        // Floors come behind the queries.
        let hints = self.batch_max.max(BLOCK_QUERIES) * kv.query_heads * (kv.head_dim + 1) * 4;
        let feedback = kv.kv_heads * self.context_tokens.div_ceil(SMALLEST_BLOCK) * 4;
        let given = self.methods.iter().any(|method| method.hint() == HintSource::Ids);
        let ids = if given { heads * (1 + self.context_tokens) * 4 } else { 0 };
        Limits {
            ring_slots: 8,
            batch_max: self.batch_max as u32,
            hint_bytes: hints.max(feedback).max(ids).clamp(64, 256 << 20) as u32,
            // A session's answers may take 256 MiB in all; longer contexts with that many members end in a typed error.
            table_bytes: table.clamp(4096, 24 << 20) as u32,
            sequences_max: 4096,
        }
    }
}

/// A method, or those that a mix is of.
fn parts_of(method: &MethodSpec) -> Vec<&MethodSpec> {
    match method.options::<MixSpec>() {
        Some(mix) => mix.parts().iter().map(|part| &part.spec).collect(),
        None => vec![method],
    }
}

/// Which statistics of a prompt are collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Statistics {
    /// In the calibrated basis.
    pub(super) skew: bool,
    /// Of the keys too.
    pub(super) keys: bool,
}

impl Statistics {
    /// What all methods that want any agree on.
    pub(super) fn wanted_by(methods: &[MethodSpec]) -> Result<Option<Self>, DaemonError> {
        let mut found: Option<(Self, &MethodSpec)> = None;
        for method in methods.iter().flat_map(parts_of) {
            let Some(spec) = method.options::<InfinigenSpec>() else { continue };
            let wanted = Self { skew: spec.skew, keys: spec.index == IndexRule::Both };
            match found {
                Some((other, a)) if other != wanted => {
                    return Err(DaemonError::Statistics {
                        a: Box::new(a.clone()),
                        b: Box::new(method.clone()),
                    });
                }
                _ => found = Some((wanted, method)),
            }
        }
        Ok(found.map(|(wanted, _)| wanted))
    }
}
