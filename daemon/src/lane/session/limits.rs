//! What one request may ask of its lane: work is bounded before it is begun, and memory before it is taken.

use kvoyant_methods::Shape;
use kvoyant_protocol::wire::{SCORES_MAX, work_of};

use crate::lane::error::SessionError;

/// What a member with so many tokens is charged, for a block of `queries` query tokens.
pub(super) fn charge(
    shape: &Shape,
    tokens: usize,
    queries: usize,
    by_query: bool,
) -> Result<usize, SessionError> {
    // Methods keep a score of each of the group's queries for each candidate of a KV head.
    let scores = queries.saturating_mul(shape.group()).saturating_mul(shape.candidates(tokens).len());
    if by_query && scores > SCORES_MAX {
        return Err(SessionError::Scores { queries, group: shape.group(), tokens });
    }
    Ok(work_of(tokens, queries, shape.query_heads, shape.head_dim))
}

#[cfg(test)]
mod tests {
    use kvoyant_kernels::Dtype;
    use kvoyant_methods::Fingerprint;

    use kvoyant_protocol::wire::WORK_MAX;

    use super::*;

    fn shape(query_heads: usize, head_dim: usize) -> Shape {
        Shape {
            layers: 1,
            query_heads,
            kv_heads: 1,
            head_dim,
            value_dim: head_dim,
            page_rows: 32,
            sinks: 0,
            window: 1,
            dense_layers: 0,
            dtype: Dtype::F16,
            fingerprint: Fingerprint([0; 16]),
        }
    }

    #[test]
    fn query_heads_queries_and_long_heads_are_charged_for() {
        let charged = |heads, d, tokens, queries| charge(&shape(heads, d), tokens, queries, true).unwrap();
        assert_eq!(charged(1, 8, 100, 1), 100);
        assert_eq!(charged(8, 128, 100, 3), 100 * 8 * 2 * 3);
        let most = charge(&shape(1024, 1024), usize::MAX, 1 << 16, false).unwrap();
        assert!(most > WORK_MAX, "{most}");
    }

    #[test]
    fn scores_that_would_take_too_much_memory_are_refused_where_queries_are_scored() {
        let tokens = 1 + SCORES_MAX / 8;
        assert!(charge(&shape(8, 64), tokens, 1, true).is_ok());
        let error = charge(&shape(8, 64), tokens + 1, 1, true).unwrap_err().to_string();
        assert!(error.contains("8 query heads"), "{error}");
        assert!(charge(&shape(8, 64), tokens, 2, true).is_err());
        assert!(charge(&shape(8, 64), tokens, 2, false).is_ok());
    }
}
