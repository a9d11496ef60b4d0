//! The real `kvoyant`, as users and operators call it.

mod arguments;
mod checkpoints;
mod commands;
mod common;
mod doctor;
mod fetch_model;
mod gpu;
mod learned_hints;
mod operate;
mod sequences;
mod table;
mod tiny_model;
mod top;
