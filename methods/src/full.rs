//! `full`: every row, the baseline that each paper measures against (FlexGen, ICML'23).

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
pub const NAME: &str = "full";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "every row",
    parse: |options| {
        options.finish(&[])?;
        Ok(Box::new(FullSpec))
    },
};

/// It has no options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FullSpec;

impl Spec for FullSpec {
    fn name(&self) -> &'static str {
        NAME
    }

    fn build(&self, shape: &Shape, _artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(Full::new(shape)))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}

/// Selects `[S, n − W)` whole.
#[derive(Debug)]
pub struct Full {
    shape: Shape,
    spec: MethodSpec,
}

impl Full {
    /// For a model of that shape.
    #[must_use]
    pub fn new(shape: &Shape) -> Self {
        Self { shape: *shape, spec: MethodSpec::new(FullSpec) }
    }
}

impl Method for Full {
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
        let candidates = self.shape.candidates(context.tokens);
        for _ in context.heads.clone() {
            out.push(candidates.start, candidates.end);
            out.finish_head();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selection::TokenRange;
    use crate::shape::tests::small;
    use crate::store::NoStore;

    #[test]
    fn every_candidate_is_selected_as_one_range() {
        let method = Full::new(&small());
        let mut out = Selection::new();
        for tokens in [0, 12, 13, 100] {
            let context = SelectContext::new(&small(), 0, tokens, &[]);
            method.select(&context, &mut NoStore, &mut Scratch::new(), &mut out);
            assert_eq!(out.heads(), 2);
            for head in 0..2 {
                match tokens {
                    13 => assert_eq!(out.head(head), [TokenRange { first: 4, count: 1 }]),
                    100 => assert_eq!(out.head(head), [TokenRange { first: 4, count: 88 }]),
                    _ => assert!(out.head(head).is_empty()),
                }
            }
        }
    }
}
