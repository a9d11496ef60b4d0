//! Kvoyant from an inference engine's side: connect, register a model, keep sequences in the daemon, ask for the
//! rows of the next layer while this one runs.
//!
//! ```no_run
//! # fn main() -> Result<(), kvoyant_client::Error> {
//! # let (model_spec, hint, keys, values) = (unimplemented(), vec![0.0f32; 576], vec![0.0f32; 192], vec![0.0f32; 192]);
//! # fn unimplemented() -> kvoyant_client::ModelSpec { panic!() }
//! use std::time::Duration;
//! use kvoyant_client::{Client, Hint, Member, Options};
//!
//! let model = Client::connect("/run/kvoyant/kvoyantd.sock".as_ref(), Options::default())?.register(model_spec, &[])?;
//! let sequence = model.open(0, 2048)?;
//! sequence.write(0, 0, &keys, &values)?;            // one token's K and V of one layer, straight into its pages
//! model.append(&[(&sequence, 1)])?;                 // … of all layers: now they are there
//! let hint = Hint::Query(&hint);
//! let pending = model.speculate(2, &[Member { sequence: &sequence, position: 1, hint }])?;
//! let ready = pending.wait(Duration::from_secs(1))?; // the rows of layer 2 that matter
//! let mut runs = Vec::new();
//! ready.runs(0, 0, &mut runs)?;                     // member 0, KV head 0
//! # Ok(())
//! # }
//! ```
//!
//! Everything can be used from several threads at once. A daemon that dies turns every call into
//! [`Error::DaemonGone`] within its deadline, never into a hang.
#![deny(unsafe_code)]

mod again;
mod connection;
mod control;
pub mod cuda;
mod error;
mod fallback;
pub mod handed_out;
pub mod local;
mod memory;
mod model;
mod ready;
mod rings;
mod sequence;
mod turn;
mod usage;

pub use connection::{Client, Options};
pub use error::{Error, Kind};
pub use fallback::{Backlog, Fallback, InTime, Taken};
pub use kvoyant_kernels::quantise::Format;
pub use kvoyant_kernels::{Dtype, RowLayout, Run};
pub use kvoyant_protocol::control::{Failure, Mode, ModelSpec, SelectedBy};
pub use kvoyant_protocol::graph::GraphSpec;
pub use kvoyant_protocol::layout::Limits;
pub use kvoyant_protocol::wire::{Completion, SCORES_MAX, SequenceId, Stat, Status};
pub use model::{Hint, Member, Model};
pub use ready::{Answer, Partial, Pending, Ready, RestOf, RowRun};
pub use sequence::Sequence;
