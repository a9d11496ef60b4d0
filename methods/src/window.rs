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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::NoDigests;
    use crate::shape::tests::small;

    #[test]
    fn nothing_is_selected_for_any_head() {
        let mut out = Selection::new();
        let context = SelectContext { layer: 0, tokens: 1000, hint: &[], sequence_seed: 0, step: 0 };
        Window::new(&small()).select(&context, &NoDigests, &mut Scratch::new(), &mut out);
        assert_eq!((out.heads(), out.total_rows()), (2, 0));
    }
}
