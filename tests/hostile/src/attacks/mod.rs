//! The table. Attacks are kept by what they go through: the first packet, the rings, requests, control messages, processes.

mod admin;
mod canaries;
mod control;
mod descriptors;
mod floods;
mod handshake;
mod memory;
mod processes;
mod requests;
mod rings;

pub use processes::{play, talk};

use crate::Attack;

/// All attacks.
#[must_use]
pub fn table() -> Vec<Attack> {
    [
        handshake::table(),
        rings::table(),
        requests::table(),
        memory::table(),
        control::table(),
        descriptors::table(),
        floods::table(),
        admin::table(),
        processes::table(),
    ]
    .concat()
}

/// What must not be taken for an attack that ended as it has to: with them a broken harness shows.
#[must_use]
pub fn canaries() -> Vec<Attack> {
    canaries::table()
}
