//! Comparing selection methods: what they are tried on, and what is measured.
//!
//! | room | job |
//! |---|---|
//! | [`trace`], [`generate`] | attention to replay: from files, or made from a seed with one known property |
//! | [`truth`], [`replay`], [`residency`] | a method over a trace, judged by dense attention |
//! | [`model`] | what a step would take on a GPU, by a roofline |
//! | [`texts`], [`tasks`] | texts, questions about them, and how answers are scored |
//! | [`statistics`] | intervals of means and of paired differences |
//! | [`row`], [`plot`] | what comes out: rows of a table, CSV, pictures |
//!
//! It knows methods and traces, and neither engine nor daemon: a real model is run by the command line, which asks the
//! tasks from here.
#![forbid(unsafe_code)]

pub mod generate;
pub mod model;
pub mod plot;
pub mod replay;
pub mod residency;
pub mod row;
pub mod statistics;
pub mod tasks;
pub mod texts;
pub mod trace;
pub mod truth;
