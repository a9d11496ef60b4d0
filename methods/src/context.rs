//! One request, as a method sees it.

use std::ops::Range;

use crate::selection::Selection;
use crate::shape::Shape;
use crate::store::{NoRows, RowSource};

/// What can be ready by the time it is wanted.
#[derive(Debug, Clone, Copy)]
pub struct InTime<'a> {
    /// Rows that are ready now, of every KV head of the request.
    pub resident: &'a Selection,
    /// The KV head that these begin with.
    pub first_head: usize,
    /// How many more rows of each KV head can be by then; [`usize::MAX`]: any number.
    pub room: usize,
}

/// One request for one sequence and layer.
#[derive(Clone)]
pub struct SelectContext<'a> {
    /// The layer to select for.
    pub layer: usize,
    /// The KV heads to select for, in order; all of them, but where methods are mixed.
    pub heads: Range<usize>,
    /// Tokens of the sequence, the current one among them, `n`. Of a block of queries the current one is the first.
    pub tokens: usize,
    /// Query tokens: 1 in decode, more in a block of a prompt or a stream.
    pub queries: usize,
    /// The query of the layer after RoPE, `[queries][Hq][d]`, f32, not scaled by `1/√d`; empty where the method needs
    /// none. Every value is finite.
    pub hint: &'a [f32],
    /// What each query head gives to rows that are attended in any case, as the log-sum-exp of their scaled scores, `[queries][Hq]`: those of
    /// sinks and window before a selection, of all that has been attended before the rest of one. Empty where it is not known. None is
    /// NaN or `+∞`.
    pub floors: &'a [f32],
    /// What the engine chose, where the method wants that: for every KV head a count, then so many tokens, each below
    /// `tokens`.
    pub ids: &'a [u32],
    /// A number that stays with the sequence (and its forks), for methods that draw.
    pub sequence_seed: u64,
    /// Decode step, or any number that differs from one step to the next.
    pub step: u64,
    /// The rows, where the method needs them.
    pub rows: &'a dyn RowSource,
    /// What can be ready in time, where that is limited and the method [leaves out](crate::Needs::leaves_late) what cannot, or where it
    /// [asks](crate::Needs::sees_resident) what is ready.
    pub in_time: Option<InTime<'a>>,
}

impl<'a> SelectContext<'a> {
    /// A request of one token for all KV heads of a layer, by this query.
    #[must_use]
    pub fn new(shape: &Shape, layer: usize, tokens: usize, hint: &'a [f32]) -> Self {
        Self {
            layer,
            heads: 0..shape.kv_heads,
            tokens,
            queries: 1,
            hint,
            floors: &[],
            ids: &[],
            sequence_seed: 0,
            step: tokens as u64,
            rows: &NoRows,
            in_time: None,
        }
    }

    /// Query vectors of one KV head: `g` for each query token.
    #[must_use]
    pub fn group(&self, shape: &Shape) -> usize {
        self.queries * shape.group()
    }

    /// The queries of one KV head, `[queries · g][d]`, token by token. Of a block they are gathered into `buffer`.
    #[must_use]
    pub fn group_queries<'b>(&self, shape: &Shape, kv_head: usize, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        let width = shape.group() * shape.head_dim;
        let of_token = |token: usize| {
            let at = (token * shape.kv_heads + kv_head) * width;
            &self.hint[at..at + width]
        };
        if self.queries == 1 {
            return of_token(0);
        }
        buffer.clear();
        (0..self.queries).for_each(|token| buffer.extend_from_slice(of_token(token)));
        buffer
    }

    /// The floor of one of the queries of a KV head ([`Self::group_queries`]), if it is known.
    #[must_use]
    pub fn floor(&self, shape: &Shape, kv_head: usize, query: usize) -> Option<f32> {
        let g = shape.group();
        let (token, head) = (query / g, kv_head * g + query % g);
        self.floors.get(token * shape.query_heads + head).copied()
    }

    /// The tokens that the engine chose for one KV head, in its order.
    #[must_use]
    pub fn given(&self, kv_head: usize) -> &'a [u32] {
        let mut rest = self.ids;
        for head in 0.. {
            let Some((count, after)) = rest.split_first() else { break };
            let Some((ids, later)) = after.split_at_checked(*count as usize) else { break };
            if head == kv_head {
                return ids;
            }
            rest = later;
        }
        &[]
    }
}

impl std::fmt::Debug for SelectContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SelectContext")
            .field("layer", &self.layer)
            .field("heads", &self.heads)
            .field("tokens", &self.tokens)
            .field("queries", &self.queries)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::small;

    #[test]
    fn the_queries_of_a_block_are_those_of_its_tokens_one_after_the_other() {
        // Two KV heads of two query heads, d = 8: the value of a query is its index.
        let hint: Vec<f32> = (0..3 * 4 * 8).map(|at| (at / 8) as f32).collect();
        let one = SelectContext::new(&small(), 0, 9, &hint[..4 * 8]);
        let firsts = |queries: &[f32]| queries.chunks(8).map(|q| q[0]).collect::<Vec<_>>();
        assert_eq!(firsts(one.group_queries(&small(), 1, &mut Vec::new())), [2.0, 3.0]);
        let block = SelectContext { queries: 3, hint: &hint, ..one };
        let mut buffer = Vec::new();
        assert_eq!(firsts(block.group_queries(&small(), 0, &mut buffer)), [0.0, 1.0, 4.0, 5.0, 8.0, 9.0]);
        assert_eq!(block.group(&small()), 6);
    }

    #[test]
    fn floors_are_those_of_a_heads_queries_token_by_token() {
        let floors: Vec<f32> = (0..8_u8).map(f32::from).collect();
        let context =
            SelectContext { queries: 2, floors: &floors, ..SelectContext::new(&small(), 0, 9, &[]) };
        let of = |head| (0..4).map(|query| context.floor(&small(), head, query).unwrap()).collect::<Vec<_>>();
        assert_eq!((of(0), of(1)), (vec![0.0, 1.0, 4.0, 5.0], vec![2.0, 3.0, 6.0, 7.0]));
        assert_eq!(SelectContext::new(&small(), 0, 9, &[]).floor(&small(), 0, 0), None);
    }

    #[test]
    fn ids_belong_to_their_head_and_broken_ones_to_none() {
        let context = SelectContext { ids: &[2, 7, 9, 0, 1, 3], ..SelectContext::new(&small(), 0, 20, &[]) };
        assert_eq!((context.given(0), context.given(1), context.given(2)), (&[7, 9][..], &[][..], &[3][..]));
        let short = SelectContext { ids: &[3, 7], ..context };
        assert!(short.given(0).is_empty());
    }
}
