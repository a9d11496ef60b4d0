//! Each kernel on each path that this processor has.

mod attention;
mod bounds;
mod codes;
mod common;
mod hash;
mod layouts;
mod must_hold;
mod packed;
mod paths_agree;
