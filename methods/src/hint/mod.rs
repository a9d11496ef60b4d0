//! The learned hint: what a layer ahead changes of the query that is predicted from its input, as a linear map.
//!
//! InfiniGen's hint for layer i is `RoPE(W_Q·norm_i(x_{i−1}))`, with `x_{i−1}` the input of layer i−1's attention: it leaves out
//! what layer i−1 adds. A part of that is a linear function of the same input, so that
//! `RoPE((W_Q + R_i)·norm_i(x_{i−1}))` is nearer to the true query. `R_i` is a ridge regression of the hint's error before RoPE,
//! `q_i − W_Q·norm_i(x_{i−1})`, on `norm_i(x_{i−1})` over a calibration text ([`HintBuilder`]). Folded into one matrix it costs
//! nothing at run time. It is the engine that makes hints: the daemon never sees this artifact.

mod artifact;
mod builder;

pub use artifact::HintArtifact;
pub use builder::{HintBuilder, RIDGE};
