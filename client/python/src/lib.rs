//! Kvoyant from Python: the client library as the module `kvoyant._kvoyant`, around which the package `kvoyant` is.
//!
//! | room | what lives there |
//! |---|---|
//! | [`connect`], [`model`], [`sequence`], [`request`], [`answer`], [`rows`] | what Python sees |
//! | [`session`] | what all of these belong to |
//! | [`owned`] | what only the process that made it may let go of |
//! | [`array`], [`dlpack`] | arrays from and to Python |
//! | [`attend`] | attention over answers, as the reference engine computes it |
//! | [`errors`] | sentences, and the classes that they are raised as |
//!
//! Wrong use is an error with a sentence, never a crash: objects that were closed, of a parent process, used by two threads, arrays of another
//! shape, type or layout. Memory that a view shows stays what it is for as long as the view lives ([`rows`]).
#![allow(clippy::needless_pass_by_value, reason = "what Python passes is extracted into values")]

mod answer;
mod array;
mod attend;
mod connect;
mod dlpack;
mod errors;
mod model;
mod owned;
mod request;
mod rows;
mod sequence;
mod session;

use pyo3::prelude::*;

/// The module.
#[pymodule]
fn _kvoyant(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<model::PyModel>()?;
    module.add_class::<sequence::PySequence>()?;
    module.add_class::<request::PyPending>()?;
    module.add_class::<answer::PyReady>()?;
    module.add_class::<rows::Rows>()?;
    module.add_function(wrap_pyfunction!(connect::connect, module)?)
}
