//! Selection methods: which rows of the KV cache the next layer's attention will need.
//!
//! A method sees *digests* (what it keeps per page), a *query hint* (the predicted query of the layer) and
//! answers with a [`Selection`]: per KV head, sorted ranges of tokens. It never touches transport: no I/O,
//! no threads, and no allocation in [`Method::select`] and [`Method::on_append`] once buffers have grown.
//!
//! | method | module | digest | source |
//! |---|---|---|---|
//! | `full` | [`full`] | none | FlexGen, ICML'23 |
//! | `window` | [`window`] | none | baseline: sinks and recent window only |
//! | `random` | [`random`] | none | baseline: random rows |
//! | `quest` | [`quest`] | per-channel bounds of pages | Quest, ICML'24 |
//! | `freekv` | [`freekv`] | per-channel bounds of pages | FreeKV, ICLR'26 |
//! | `shadowkv` | [`shadowkv`] | mean keys of chunks | ShadowKV, ICML'25 |
//! | `hata` | [`hata`] | binary codes of keys, and norms | HATA, ACL'25 |
//! | `clo` | [`clo`] | as `hata`; memory of a label and its rows | CLO/LiteCache, arXiv 2511.14510 |
//! | `given` | [`given`] | none | models with native sparse attention |
//! | `oracle` | [`oracle`] | none | baseline: the true best rows |
//! | `infinigen` | [`infinigen`] | partial keys in a skewed basis | InfiniGen, OSDI'24 |
//! | `scout` | [`scout`] | per-channel bounds of blocks | ScoutAttention, DAC'26 |
//! | `resv` | [`resv`] | mean keys of clusters | V-Rex, HPCA'26 |
//! | `louver` | [`louver`] | boxes and balls of groups of rows | Louver, arXiv 2605.06763 |
//! | `mix` | [`mix`] | its parts' | methods per layer and KV head |
//! | `attention-predictor` | [`attention_predictor`] | the last attention rows of blocks | AttentionPredictor, NeurIPS'25 |
//! | `dynsplit` | [`dynsplit`] | per-channel bounds of blocks of any length | after DynSplit-KV, arXiv 2602.03184 |
//! | `kvoyant` | [`kvoyant`] | keys in codes, means of values, and bounds of both | ours, the default |
//! | `hetero` | [`hetero`] | none | HeteroCache, ACL'26 |
//!
//! Notation throughout: `n` tokens of the sequence with the current one, `S` sinks, `W` recent window, `P`
//! rows of a page, `d` head dimension, `g` query heads of a KV head. Candidates of a selection are the
//! tokens in `[S, n − W)`; sinks and window are attended always and count in no budget.
//!
//! [`registry`] is the one place that knows every method; to add one is to write its module and name it
//! there.
#![forbid(unsafe_code)]

pub mod artifact;
pub mod attention_predictor;
mod bounds;
pub mod budget;
pub mod clo;
pub mod context;
pub mod dynsplit;
pub mod error;
pub mod freekv;
pub mod full;
pub mod given;
pub mod hata;
pub mod hetero;
pub mod hint;
pub mod infinigen;
pub mod kvoyant;
pub mod louver;
pub mod method;
pub mod mix;
pub mod needs;
pub mod options;
pub mod oracle;
mod pages;
pub mod quest;
pub mod random;
pub mod registry;
pub mod replay;
pub mod rest;
pub mod resv;
pub mod scout;
pub mod scratch;
pub mod selection;
pub mod shadowkv;
pub mod shape;
pub mod spec;
pub mod store;
#[cfg(test)]
mod testing;
pub mod window;
mod words;

pub use kvoyant_kernels::Dtype;

pub use artifact::{Artifact, ArtifactKind, Artifacts, Tensor, TensorArtifact};
pub use budget::{Budget, Share};
pub use context::{InTime, SelectContext};
pub use error::{BudgetError, MethodError, SpecError};
pub use method::{Append, DigestKey, FeedbackRow, HintNorm, Method, Truncated};
pub use needs::{CpuAttention, Feedback, HintSource, Needs, RowPart, mark};
pub use registry::build;
pub use replay::Replay;
pub use rest::{Certificate, Rest, RestSums};
pub use scratch::Scratch;
pub use selection::{Selection, TokenRange};
pub use shape::{Fingerprint, Shape};
pub use spec::{MethodSpec, Spec};
pub use store::{NoRows, NoStore, RowSource, Store};
