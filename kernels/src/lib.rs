//! The arithmetic of Kvoyant: scoring digests, choosing the best rows, attending over scattered rows, copying them.
//!
//! [`cuda`] has the same for a GPU, as sources. On a CPU everything is a method of [`Kernels`], a one-byte handle that remembers which instruction set it may use:
//!
//! ```
//! use kvoyant_kernels::{Kernels, TopKScratch};
//!
//! let kernels = Kernels::best();
//! let mut ids = Vec::new();
//! kernels.top_k(&[0.5, 2.0, -1.0, 2.0], 2, &mut TopKScratch::default(), &mut ids);
//! assert_eq!(ids, [1, 3]);
//! ```
//!
//! Storage may be [`Dtype::F32`], [`Dtype::F16`] or [`Dtype::Bf16`]; all arithmetic is f32. Shapes are written `[rows][columns]`,
//! row-major. Each SIMD kernel has a scalar twin that says what it computes; the twins differ by rounding only, and where a method
//! promises exactness (conversions, counts, [`Kernels::top_k`], copies) not at all. Within one path every result is deterministic.

mod codes;
mod cpu;
pub mod cuda;
mod dtype;
mod layout;
pub mod packed;
pub mod quantise;
mod random;
mod rest;
mod run;

pub use codes::{CodeBits, CodeLayout, NoCodes};
pub use cpu::{
    CodeOut, CodeScan, CodeSums, CodeTaken, CodeTotal, CodeWeighing, CodeWeights, ENV, Kernels, PIECE_ROWS,
    Path, PathError, pieces,
};
pub use dtype::{Dtype, UnknownDtype};
pub use layout::{RowLayout, UnknownLayout};
pub use random::SplitMix64;
pub use rest::{Certificate, RestSums};
pub use run::{AttendScratch, CopyRun, Run, TopKScratch};
