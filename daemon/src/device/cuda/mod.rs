//! What a GPU needs: the ways bytes get there, and what each of them costs.

pub mod cost;
pub mod engines;
pub mod measure;
pub mod store;
