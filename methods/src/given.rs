//! `given`: the engine selects.
//!
//! Models with native sparse attention (an indexer, block-sparse heads) know which rows they want. The request carries the tokens of each
//! KV head; the daemon does residency, delta and transfer. Every asked candidate is in the answer, once, in rising order; sinks and window
//! are attended always and are left out.

use crate::artifact::Artifacts;
use crate::context::SelectContext;
use crate::error::MethodError;
use crate::method::Method;
use crate::needs::{HintSource, Needs};
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};
use crate::store::Store;

/// The method's name.
pub const NAME: &str = "given";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "the rows that the engine names",
    parse: |options| {
        options.finish(&[])?;
        Ok(Box::new(GivenSpec))
    },
};

/// It has no options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GivenSpec;

impl Spec for GivenSpec {
    fn name(&self) -> &'static str {
        NAME
    }

    fn hint(&self) -> HintSource {
        HintSource::Ids
    }

    fn build(&self, shape: &Shape, _artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(Given::new(shape)))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}

/// Selects what it is told to.
#[derive(Debug)]
pub struct Given {
    shape: Shape,
    spec: MethodSpec,
}

impl Given {
    /// For a model of that shape.
    #[must_use]
    pub fn new(shape: &Shape) -> Self {
        Self { shape: *shape, spec: MethodSpec::new(GivenSpec) }
    }
}

impl Method for Given {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs { hint: HintSource::Ids, ..Needs::default() }
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        _store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        let candidates = self.shape.candidates(context.tokens);
        let ids = &mut scratch.ids;
        for head in context.heads.clone() {
            ids.clear();
            ids.extend(context.given(head).iter().filter(|id| candidates.contains(&(**id as usize))));
            ids.sort_unstable();
            ids.dedup();
            ids.iter().for_each(|id| out.push(*id as usize, *id as usize + 1));
            out.finish_head();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::shape::tests::small;
    use crate::store::NoStore;

    proptest! {
        #[test]
        fn exactly_the_asked_candidates_are_selected_each_once(
            tokens in 1_usize..300,
            asked in prop::collection::vec(prop::collection::vec(0_u32..300, 0..60), 2),
        ) {
            let shape = small();
            let asked: Vec<Vec<u32>> =
                asked.into_iter().map(|ids| ids.into_iter().filter(|id| (*id as usize) < tokens).collect()).collect();
            let ids: Vec<u32> =
                asked.iter().flat_map(|ids| std::iter::once(ids.len() as u32).chain(ids.iter().copied())).collect();
            let context = SelectContext { ids: &ids, ..SelectContext::new(&shape, 0, tokens, &[]) };
            let mut out = Selection::new();
            Given::new(&shape).select(&context, &mut NoStore, &mut Scratch::new(), &mut out);
            let candidates = shape.candidates(tokens);
            for (head, asked) in asked.iter().enumerate() {
                let expected: BTreeSet<u32> =
                    asked.iter().copied().filter(|id| candidates.contains(&(*id as usize))).collect();
                prop_assert_eq!(out.tokens(head).collect::<Vec<_>>(), expected.into_iter().collect::<Vec<_>>());
            }
        }
    }
}
