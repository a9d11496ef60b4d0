//! `window`: nothing but sinks and the recent window, the baseline that a selection has to beat.

use crate::method::{DigestSource, Method, Needs, SelectContext};
use crate::registry::MethodSpec;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;

/// The method's name.
pub const NAME: &str = "window";

/// Selects no row.
#[derive(Debug)]
pub struct Window {
    kv_heads: usize,
    spec: MethodSpec,
}

impl Window {
    /// For a model of that shape.
    #[must_use]
    pub fn new(shape: &Shape) -> Self {
        Self { kv_heads: shape.kv_heads, spec: MethodSpec::Window }
    }
}

impl Method for Window {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn select(
        &self,
        _context: &SelectContext<'_>,
        _digests: &dyn DigestSource,
        _scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        for _ in 0..self.kv_heads {
            out.finish_head();
        }
    }
}
