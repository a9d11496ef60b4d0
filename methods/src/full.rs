//! `full`: every row, the baseline that each paper measures against (FlexGen, ICML'23).

use crate::method::{DigestSource, Method, Needs, SelectContext};
use crate::registry::MethodSpec;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;

/// The method's name.
pub const NAME: &str = "full";

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
        Self { shape: *shape, spec: MethodSpec::Full }
    }
}

impl Method for Full {
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
        context: &SelectContext<'_>,
        _digests: &dyn DigestSource,
        _scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        let candidates = self.shape.candidates(context.tokens);
        for _ in 0..self.shape.kv_heads {
            out.push(candidates.start, candidates.end);
            out.finish_head();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::NoDigests;
    use crate::selection::TokenRange;
    use crate::shape::tests::small;

    #[test]
    fn every_candidate_is_selected_as_one_range() {
        let method = Full::new(&small());
        let mut out = Selection::new();
        for tokens in [0, 12, 13, 100] {
            let context = SelectContext { layer: 0, tokens, hint: &[], sequence_seed: 0, step: 0 };
            method.select(&context, &NoDigests, &mut Scratch::new(), &mut out);
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
