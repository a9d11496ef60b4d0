//! `window`: nothing but sinks and the recent window, the baseline that a selection has to beat.

use crate::artifact::Artifacts;
use crate::context::SelectContext;
use crate::error::MethodError;
use crate::method::Method;
use crate::needs::Needs;
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};
use crate::store::Store;

/// The method's name.
pub const NAME: &str = "window";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "sinks and recent window only",
    parse: |options| {
        options.finish(&[])?;
        Ok(Box::new(WindowSpec))
    },
};

/// It has no options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowSpec;

impl Spec for WindowSpec {
    fn name(&self) -> &'static str {
        NAME
    }

    fn build(&self, shape: &Shape, _artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(Window::new(shape)))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}

/// Selects no row.
#[derive(Debug)]
pub struct Window {
    spec: MethodSpec,
}

impl Window {
    /// For a model of that shape.
    #[must_use]
    pub fn new(_shape: &Shape) -> Self {
        Self { spec: MethodSpec::new(WindowSpec) }
    }
}

impl Method for Window {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        _store: &mut dyn Store,
        _scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        for _ in context.heads.clone() {
            out.finish_head();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::small;
    use crate::store::NoStore;

    #[test]
    fn nothing_is_selected_for_any_head() {
        let mut out = Selection::new();
        let context = SelectContext::new(&small(), 0, 1000, &[]);
        Window::new(&small()).select(&context, &mut NoStore, &mut Scratch::new(), &mut out);
        assert_eq!((out.heads(), out.total_rows()), (2, 0));
    }
}
