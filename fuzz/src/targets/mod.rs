//! One module for each kind of bytes.

pub mod admin;
pub mod areas;
pub mod artifacts;
pub mod canary;
pub mod config;
pub mod control;
pub mod descriptors;
pub mod images;
pub mod journal;
pub mod models;
pub mod prefixes;
pub mod requests;
pub mod tables;
