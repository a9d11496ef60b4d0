//! A real model over long texts, with every method asked the same.
//!
//! | room | job |
//! |---|---|
//! | [`plan`] | what is asked, as tokens |
//! | [`prepare`] | reading it once |
//! | [`decode`], [`measure`], [`compare`] | one method: answers and continuations |

pub(crate) mod compare;
pub(crate) mod decode;
pub(crate) mod measure;
pub(crate) mod plan;
pub(crate) mod prepare;
