//! One module for each kind of bytes.

pub mod canary;
pub mod control;
pub mod descriptors;
