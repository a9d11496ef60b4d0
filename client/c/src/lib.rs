//! Kvoyant from C and C++: the client library behind a header.
//!
//! What a caller sees is `include/kvoyant.h`, which is generated from this crate; `docs/c.md` is its tutorial. Here:
//!
//! | room | what lives there |
//! |---|---|
//! | [`types`] | the structs and codes of the header |
//! | [`handles`] | the table of handles: what is closed stays closed, and a child process is told that it is one |
//! | [`status`] | errors, their codes and their sentences; no panic passes [`status::call`] |
//! | [`raw`] | reading what a caller points to |
//! | [`model`], [`sequence`], [`rows`], [`request`], [`answer`], [`images`] | the functions |
//!
//! A handle that is stale, a pointer that is null, a shape or a type that is wrong are errors with a sentence. What no library can check
//! is what a pointer points to: as the header says, arrays have the lengths that come with them, texts end in a zero, and both stay as they
//! are while a call runs.
#![allow(
    clippy::missing_safety_doc,
    reason = "the contract of all pointers is the one above, and is in the header"
)]

mod answer;
mod handles;
mod images;
mod model;
mod raw;
mod request;
mod rows;
mod sequence;
mod status;
mod types;

pub use answer::*;
pub use images::*;
pub use model::*;
pub use request::*;
pub use rows::*;
pub use sequence::*;
pub use status::{kvoyant_last_error, kvoyant_status_name};
pub use types::*;
