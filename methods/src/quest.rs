//! `quest`: pages by the upper bound of their scores (Tang et al., Quest, ICML'24).
//!
//! *Digest.* Per page and channel the smallest and the largest key value, in the storage type of the rows.
//! *Score.* `ub = Σ_j max(q_j·min_j, q_j·max_j)/√d ≥ max_{t ∈ page} q·k_t/√d` for every query, for keys as they
//! are stored. *Selection.* Quest leaves GQA open; here a page's score is the mean over the group's query
//! heads of the bounds' softmax over the pages, and the `⌊B/page⌋` best pages of each KV head are taken.
//!
//! Quest's pages (16 rows in the paper) may be smaller than the pages of the arena: a digest block holds
//! `[P/page][2][d]` values.

use kvoyant_kernels::Kernels;

use crate::budget::Budget;
use crate::error::{MethodError, SpecError};
use crate::method::{Append, DigestKey, DigestSource, HintNorm, Method, Needs, SelectContext};
use crate::options::{OptionWriter, Options};
use crate::pages;
use crate::registry::MethodSpec;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;

/// The method's name.
pub const NAME: &str = "quest";

/// The page size of the paper.
const PAGE: usize = 16;

/// What a user chooses: `quest:budget=6%,page=16,hint_norm=own`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuestSpec {
    /// Rows per KV head.
    pub budget: Budget,
    /// Rows of a page, a divisor of the arena's.
    pub page: usize,
    /// How the engine makes the hint.
    pub hint_norm: HintNorm,
}

impl QuestSpec {
    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let spec = Self {
            budget: options.take_budget("budget")?.unwrap_or(crate::registry::default_budget()),
            page: options
                .take_value("page", "give rows of a page, at least 1", |rows| *rows > 0)?
                .unwrap_or(PAGE),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        options.finish(&["budget", "page", "hint_norm"])?;
        Ok(spec)
    }

    pub(crate) fn write(&self, writer: &mut OptionWriter) {
        writer.option("budget", self.budget);
        writer.option_unless("page", &self.page, &PAGE);
        writer.word_unless("hint_norm", HintNorm::WORDS, self.hint_norm, HintNorm::default());
    }
}

/// Selects the pages whose bounds are highest.
#[derive(Debug)]
pub struct Quest {
    shape: Shape,
    quest: QuestSpec,
    spec: MethodSpec,
    kernels: Kernels,
}

impl Quest {
    /// For a model of that shape.
    ///
    /// # Errors
    /// [`MethodError::Unsuitable`] where `page` does not divide the arena's page.
    pub fn new(quest: QuestSpec, shape: &Shape) -> Result<Self, MethodError> {
        if quest.page == 0 || !shape.page_rows.is_multiple_of(quest.page) {
            return Err(MethodError::Unsuitable {
                method: NAME,
                reason: format!(
                    "its pages of {} rows do not divide the arena's of {}; set `page` to a divisor",
                    quest.page, shape.page_rows
                ),
            });
        }
        Ok(Self { shape: *shape, quest, spec: MethodSpec::Quest(quest), kernels: Kernels::best() })
    }

    /// Bytes of one page's `[2][d]`.
    fn page_bytes(&self) -> usize {
        2 * self.shape.head_dim * self.shape.dtype.bytes()
    }
}

impl Method for Quest {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs { hint: true, digest: true, ..Needs::default() }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        let parameters = [self.quest.page as u64, u64::from(self.shape.dtype.code()), 0, 0];
        Some(DigestKey { method: NAME, parameters })
    }

    fn digest_bytes(&self) -> usize {
        self.shape.page_rows / self.quest.page * self.page_bytes()
    }

    fn on_append(&self, append: &Append<'_>, digest: &mut [u8], scratch: &mut Scratch) {
        let Scratch { rows, matrix: minmax, bytes, .. } = scratch;
        let (d, dtype) = (self.shape.head_dim, self.shape.dtype);
        // The bound has to hold for keys as attention will read them, after rounding to the storage type.
        bytes.resize(append.keys.len() * dtype.bytes(), 0);
        self.kernels.from_f32(dtype, append.keys, bytes);
        rows.resize(append.keys.len(), 0.0);
        self.kernels.to_f32(dtype, bytes, rows);
        minmax.resize(2 * d, 0.0);

        let mut row = append.first_row;
        let end = row + rows.len() / d;
        let mut rest = rows.as_slice();
        while row < end {
            let page = row / self.quest.page;
            let count = ((page + 1) * self.quest.page).min(end) - row;
            let (keys, later) = rest.split_at(count * d);
            let block = &mut digest[page * self.page_bytes()..][..self.page_bytes()];
            if row.is_multiple_of(self.quest.page) {
                minmax[..d].fill(f32::INFINITY);
                minmax[d..].fill(f32::NEG_INFINITY);
            } else {
                self.kernels.to_f32(dtype, block, minmax);
            }
            self.kernels.min_max_update(keys, d, minmax);
            self.kernels.from_f32(dtype, minmax, block);
            row += count;
            rest = later;
        }
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        digests: &dyn DigestSource,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        let Scratch { matrix: minmax, scores, group, pages: bounds, ids, top, .. } = scratch;
        let (d, g, size) = (self.shape.head_dim, self.shape.group(), self.quest.page);
        let candidates = self.shape.candidates(context.tokens);
        let covering = pages::covering(&candidates, size);
        let count = covering.len();
        let wanted = match count {
            0 => 0,
            _ => pages::affordable(self.quest.budget.rows_of(context.tokens), size, &candidates),
        };
        minmax.resize(2 * d, 0.0);
        bounds.resize(g, 0.0);
        scores.resize(g * count, 0.0);
        for head in 0..self.shape.kv_heads {
            // Nothing to choose where everything is wanted.
            if wanted == count {
                out.push(candidates.start, candidates.end);
                out.finish_head();
                continue;
            }
            let queries = &context.hint[head * g * d..(head + 1) * g * d];
            for (at, page) in covering.clone().enumerate() {
                let row = page * size;
                let block = &digests.page(head, row / self.shape.page_rows)
                    [row % self.shape.page_rows / size * self.page_bytes()..][..self.page_bytes()];
                self.kernels.to_f32(self.shape.dtype, block, minmax);
                self.kernels.page_bounds(queries, g, minmax, bounds);
                bounds.iter().enumerate().for_each(|(query, bound)| scores[query * count + at] = *bound);
            }
            group.clear();
            group.resize(count, 0.0);
            for bounds in scores.chunks_exact(count) {
                self.kernels.softmax_add(bounds, 1.0 / (d as f32).sqrt(), group);
            }
            pages::push_best(self.kernels, group, wanted, size, &candidates, top, ids, |first, end| {
                out.push(first, end);
            });
            out.finish_head();
        }
    }
}
