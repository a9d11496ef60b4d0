//! The daemon as operators and monitoring meet it.

mod admin;
mod dashboard;
mod endpoints;
mod manager;
mod metrics;
mod operations;
mod pool;
mod sights;
