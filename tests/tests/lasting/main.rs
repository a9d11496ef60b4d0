//! What outlasts memory, a session or a daemon: pages on disk, images, prefixes, sessions over a restart.

mod images;
mod kept;
mod prefixes;
mod restart;
mod restart_shared;
mod restart_spill;
mod spill;
mod spill_engine;
