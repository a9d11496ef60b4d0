//! Buffers that a lane keeps for all its selections.

use crate::selection::Selection;

/// Working memory of [`crate::Method::select`] and [`crate::Method::on_append`]: one per lane, reused.
///
/// Buffers grow to the longest sequence seen and stay; after that a selection allocates nothing.
#[derive(Debug, Clone, Default)]
pub struct Scratch {
    /// Queries of one KV head of a block of tokens.
    pub(crate) block: Vec<f32>,
    /// Queries of a step before, in the layout of a hint.
    pub(crate) last: Vec<f32>,
    /// Queries of one group in the digest's basis.
    pub(crate) rows: Vec<f32>,
    /// A digest of one page in f32, or the chosen columns of a skew matrix.
    pub(crate) matrix: Vec<f32>,
    /// Scores of the query heads of one group, `[g][tokens or pages]`.
    pub(crate) scores: Vec<f32>,
    /// How far scores may be off, `[g][groups of rows]`.
    pub(crate) margins: Vec<f32>,
    /// The largest score of each query.
    pub(crate) maxima: Vec<f32>,
    /// What each query's weights are multiplied by to become shares of the attention of its group.
    pub(crate) factors: Vec<f32>,
    /// Weighted sums of values, `[g][dv]`.
    pub(crate) means: Vec<f32>,
    /// What rows may weigh at most and at least, by their share of the attention.
    pub(crate) bins: Vec<(f64, f64)>,
    /// Scores of the groups of all KV heads, `[Hkv][candidates]`.
    pub(crate) group: Vec<f32>,
    /// Scores of one KV head's pages.
    pub(crate) pages: Vec<f32>,
    /// Per KV head, how many rows its query heads ask for.
    pub(crate) counts: Vec<usize>,
    /// Norms of the queries of one group, rounded up.
    pub(crate) norms: Vec<f64>,
    /// Upper bounds of the scores of a group of rows, one per query.
    pub(crate) bounds: Vec<f64>,
    /// Thresholds, one per query.
    pub(crate) taus: Vec<f32>,
    /// Tokens found.
    pub(crate) hits: Vec<u32>,
    /// Candidates of each cluster.
    pub(crate) sizes: Vec<u32>,
    /// How many of its first candidates each cluster leaves out.
    pub(crate) skips: Vec<u32>,
    /// What a part of a mix chose.
    pub(crate) part: Selection,
    /// Codes of the queries of one group.
    pub(crate) words: Vec<u64>,
    /// Code of one query, in bytes.
    pub(crate) code: Vec<u8>,
    /// Distances of one page's codes from a group's.
    pub(crate) distances: Vec<u32>,
    /// Chosen ids.
    pub(crate) ids: Vec<u32>,
    /// The memory of choosing them.
    pub(crate) top: kvoyant_kernels::TopKScratch,
    /// Scores and margins of the part of a scan that another thread may do.
    pub(crate) other: (Vec<f32>, Vec<f32>),
    /// Who runs two parts of a scan, perhaps side by side.
    pub(crate) join: Option<Join>,
    /// Whether a selection leaves what it saw of each KV head for the rest of it.
    pub(crate) keeps: bool,
    /// That, by KV head.
    pub(crate) kept: Vec<KeptHead>,
}

/// What a selection saw of one KV head.
#[derive(Debug, Clone, Default)]
pub(crate) struct KeptHead {
    /// Whether it is of the selection before.
    pub(crate) fresh: bool,
    pub(crate) scores: Vec<f32>,
    pub(crate) margins: Vec<f32>,
    pub(crate) maxima: Vec<f32>,
    pub(crate) factors: Vec<f32>,
}

/// Runs two parts of a selection, side by side if there is a thread for the second one.
pub type Join = fn(&mut (dyn FnMut() + Send), &mut (dyn FnMut() + Send));

impl Scratch {
    /// Empty buffers; the first selections make them grow.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says whether [`crate::Method::rest`] follows the next selection at once, for the same request: it need not look at digests again then.
    /// What was kept and not asked for is forgotten.
    pub fn keep_for_rest(&mut self, keeps: bool) {
        self.keeps = keeps;
        self.kept.iter_mut().for_each(|kept| kept.fresh = false);
    }

    /// Empty buffers, and somebody to share long scans with. What is selected does not depend on it.
    #[must_use]
    pub fn with_help(join: Join) -> Self {
        Self { join: Some(join), ..Self::default() }
    }
}
