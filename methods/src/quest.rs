//! `quest`: pages by the upper bound of their scores (Tang et al., Quest, ICML'24).
//!
//! *Digest.* Per page and channel the smallest and the largest key value, in the storage type of the rows.
//! *Score.* `ub = Σ_j max(q_j·min_j, q_j·max_j)/√d ≥ max_{t ∈ page} q·k_t/√d` for every query, for keys as they
//! are stored. *Selection.* Quest leaves GQA open; here a page's score is the mean over the group's query
//! heads of the bounds' softmax over the pages, and the `⌊B/page⌋` best pages of each KV head are taken.
//!
//! Quest's pages (16 rows in the paper) may be smaller than the pages of the arena: a digest block holds
//! `[P/page][2][d]` values.

use crate::artifact::Artifacts;
pub use crate::bounds::Digest;
use crate::bounds::PageBounds;
use crate::budget::Budget;
use crate::context::SelectContext;
use crate::error::{MethodError, SpecError};
use crate::method::{Append, DigestKey, HintNorm, Method};
use crate::needs::{HintSource, Needs};
use crate::options::{OptionWriter, Options};
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};
use crate::store::Store;

/// The method's name.
pub const NAME: &str = "quest";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "pages by the upper bound of their scores",
    parse: |options| Ok(Box::new(QuestSpec::from_options(options)?)),
};

/// The page size of the paper.
const PAGE: usize = 16;

/// What a user chooses: `quest:budget=6%,page=16,digest=int8,hint=ahead,hint_norm=own`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuestSpec {
    /// Rows per KV head.
    pub budget: Budget,
    /// Rows of a page, a divisor of the arena's.
    pub page: usize,
    /// How bounds are stored.
    pub digest: Digest,
    /// Which query selects.
    pub hint: HintSource,
    /// How the engine makes a hint ahead of its layer.
    pub hint_norm: HintNorm,
}

impl QuestSpec {
    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let spec = Self {
            budget: options.take_budget("budget")?.unwrap_or(crate::registry::default_budget()),
            page: options
                .take_value("page", "give rows of a page, at least 1", |rows| *rows > 0)?
                .unwrap_or(PAGE),
            digest: options.take_word("digest", Digest::WORDS)?.unwrap_or_default(),
            hint: options.take_word("hint", HintSource::QUERIES)?.unwrap_or(HintSource::Ahead),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        options.finish(&["budget", "page", "digest", "hint", "hint_norm"])?;
        Ok(spec)
    }
}

impl Spec for QuestSpec {
    fn name(&self) -> &'static str {
        NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        writer.option("budget", self.budget);
        writer.option_unless("page", &self.page, &PAGE);
        writer.word_unless("digest", Digest::WORDS, self.digest, Digest::default());
        writer.word_unless("hint", HintSource::QUERIES, self.hint, HintSource::Ahead);
        writer.word_unless("hint_norm", HintNorm::WORDS, self.hint_norm, HintNorm::default());
    }

    fn budget(&self) -> Option<Budget> {
        Some(self.budget)
    }

    fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    fn hint(&self) -> HintSource {
        self.hint
    }

    fn hint_norm(&self) -> Option<HintNorm> {
        Some(self.hint_norm)
    }

    fn build(&self, shape: &Shape, _artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(Quest::new(*self, shape)?))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}

/// Selects the pages whose bounds are highest.
#[derive(Debug)]
pub struct Quest {
    bounds: PageBounds,
    quest: QuestSpec,
    spec: MethodSpec,
}

impl Quest {
    /// For a model of that shape.
    ///
    /// # Errors
    /// [`MethodError::Unsuitable`] where `page` does not divide the arena's page.
    pub fn new(quest: QuestSpec, shape: &Shape) -> Result<Self, MethodError> {
        let bounds = PageBounds::new(NAME, quest.page, shape)?.stored(quest.digest);
        Ok(Self { bounds, quest, spec: MethodSpec::new(quest) })
    }
}

impl Method for Quest {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs { hint: self.quest.hint, digest: true, ..Needs::default() }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        Some(self.bounds.digest_key())
    }

    fn digest_bytes(&self) -> usize {
        self.bounds.digest_bytes()
    }

    fn on_append(&self, append: &Append<'_>, digest: &mut [u8], _memory: &mut [u8], scratch: &mut Scratch) {
        self.bounds.append(append, digest, scratch);
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        self.bounds.select(context, self.quest.budget, store, scratch, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::small;
    use crate::testing::{Rng, Store, are_best, mean_softmax};
    use kvoyant_kernels::Dtype;
    use proptest::prelude::*;

    fn spec(budget: usize, page: usize) -> QuestSpec {
        QuestSpec {
            budget: Budget::rows(budget).unwrap(),
            page,
            digest: Digest::Plain,
            hint: HintSource::Ahead,
            hint_norm: HintNorm::Own,
        }
    }

    fn quest(budget: usize, page: usize, shape: &Shape) -> Quest {
        Quest::new(spec(budget, page), shape).unwrap()
    }

    /// Digests `keys` (`[rows][d]`) as one page of the arena, one call per chunk of rows.
    fn digest(method: &Quest, keys: &[f32], chunk: usize) -> Vec<u8> {
        // A page begins as what its last owner left: some other value for every chunk length.
        let mut digest = vec![0x40 + chunk as u8 % 8; method.digest_bytes()];
        let d = method.bounds.shape.head_dim;
        for (at, keys) in keys.chunks(chunk * d).enumerate() {
            let row = at * chunk;
            let append = Append {
                layer: 0,
                kv_head: 0,
                state: &[],
                keys,
                values: &[],
                first_token: row,
                first_row: row,
                marks: &[],
            };
            method.on_append(&append, &mut digest, &mut [], &mut Scratch::new());
        }
        digest
    }

    /// The bound of page `page` of a digest block, unscaled.
    fn bound(method: &Quest, digest: &[u8], page: usize, query: &[f32]) -> f32 {
        let mut minmax = vec![0.0; 2 * method.bounds.shape.head_dim];
        let block = &digest[page * method.bounds.page_bytes()..][..method.bounds.page_bytes()];
        method.bounds.read(block, &mut minmax);
        let mut bound = [0.0];
        method.bounds.kernels.page_bounds(query, 1, &minmax, &mut bound);
        bound[0]
    }

    fn stored(method: &Quest, keys: &[f32]) -> Vec<f32> {
        let mut bytes = vec![0; keys.len() * method.bounds.shape.dtype.bytes()];
        method.bounds.kernels.from_f32(method.bounds.shape.dtype, keys, &mut bytes);
        let mut stored = vec![0.0; keys.len()];
        method.bounds.kernels.to_f32(method.bounds.shape.dtype, &bytes, &mut stored);
        stored
    }

    fn value() -> impl Strategy<Value = f32> {
        prop_oneof![
            4 => -3.0_f32..3.0,
            1 => prop::sample::select(vec![0.0, -0.0, 1e-8, -1e-8, 65504.0, -65504.0, 0.1, 1e-40]),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn the_bound_is_never_below_a_score_of_its_page(
            keys in prop::collection::vec(value(), 32 * 8),
            rows in 1_usize..=32,
            query in prop::collection::vec(value(), 8),
            dtype in prop::sample::select(Dtype::ALL.to_vec()),
        ) {
            let shape = Shape { dtype, ..small() };
            let method = quest(16, 16, &shape);
            let keys = &keys[..rows * 8];
            let block = digest(&method, keys, 32);
            for (row, key) in stored(&method, keys).chunks(8).enumerate() {
                let score = method.bounds.kernels.dot(&query, key);
                let bound = bound(&method, &block, row / 16, &query);
                prop_assert!(bound >= score, "row {row}: bound {bound} below score {score}");
            }
        }

        #[test]
        fn rows_one_by_one_give_the_digest_of_all_at_once(
            keys in prop::collection::vec(value(), 32 * 8),
            rows in 1_usize..=32,
            chunk in 1_usize..=32,
            dtype in prop::sample::select(Dtype::ALL.to_vec()),
        ) {
            let method = quest(16, 8, &Shape { dtype, ..small() });
            let keys = &keys[..rows * 8];
            // As values, since 0 and -0 are one; pages without a row yet hold nothing.
            let [one, all] = [chunk, 32].map(|chunk| {
                let bytes = &digest(&method, keys, chunk)[..rows.div_ceil(8) * method.bounds.page_bytes()];
                let mut values = vec![0.0; bytes.len() / dtype.bytes()];
                method.bounds.kernels.to_f32(dtype, bytes, &mut values);
                values
            });
            prop_assert_eq!(one, all);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn bounds_in_8_bits_are_never_below_the_plain_ones_of_any_page(
            keys in prop::collection::vec(value(), 100 * 16),
            query in prop::collection::vec(-3.0_f32..3.0, 32),
            page in prop::sample::select(vec![4_usize, 16, 32]),
        ) {
            let shape = small();
            let [plain, coarse] = [Digest::Plain, Digest::Int8].map(|digest| {
                let method = Quest::new(QuestSpec { digest, ..spec(page, page) }, &shape).unwrap();
                let mut store = Store::new(&method, &shape, 0, 100);
                store.append(&method, &keys, 100);
                let context = SelectContext::new(&shape, 0, 100, &query);
                let mut scratch = Scratch::new();
                store.with_store(|store| {
                    method.bounds.rank(&context, store, 1, 0..100_usize.div_ceil(page), &mut scratch);
                });
                scratch.scores
            });
            for (plain, coarse) in plain.iter().zip(&coarse) {
                prop_assert!(coarse >= plain, "{coarse} is below {plain}");
            }
        }
    }

    #[test]
    fn a_page_in_8_bits_grows_no_wider_by_rows_within_it() {
        let method = Quest::new(QuestSpec { digest: Digest::Int8, ..spec(32, 32) }, &small()).unwrap();
        let keys = Rng::new(6).normal(8 * 8);
        let eight = digest(&method, &keys, 8);
        // Row by row, so that every row is read and stored on top of the last one's digest.
        let mut grown = eight.clone();
        for (row, key) in (8..32).zip(keys.chunks(8).cycle()) {
            let append = Append {
                layer: 0,
                kv_head: 0,
                state: &[],
                keys: key,
                values: &[],
                first_token: row,
                first_row: row,
                marks: &[],
            };
            method.on_append(&append, &mut grown, &mut [], &mut Scratch::new());
        }
        assert_eq!(grown, eight);
    }

    #[test]
    fn pages_of_one_row_bound_exactly_and_more_rows_never_lower_a_bound() {
        let mut rng = Rng::new(1);
        let (keys, query) = (rng.normal(32 * 8), rng.normal(8));
        let single = quest(1, 1, &small());
        let block = digest(&single, &keys, 32);
        for (row, key) in keys.chunks(8).enumerate() {
            assert_eq!(bound(&single, &block, row, &query), single.bounds.kernels.dot(&query, key));
        }
        let method = quest(1, 32, &small());
        let bounds: Vec<f32> =
            (1..=32).map(|rows| bound(&method, &digest(&method, &keys[..rows * 8], 5), 0, &query)).collect();
        assert!(bounds.windows(2).all(|pair| pair[0] <= pair[1]), "{bounds:?}");
    }

    #[test]
    fn turning_a_channel_of_query_and_keys_around_leaves_the_bound() {
        let mut rng = Rng::new(2);
        let (mut keys, mut query) = (rng.normal(16 * 8), rng.normal(8));
        let method = quest(1, 16, &small());
        let before = bound(&method, &digest(&method, &keys, 16), 0, &query);
        query[3] = -query[3];
        keys.chunks_mut(8).for_each(|key| key[3] = -key[3]);
        assert_eq!(bound(&method, &digest(&method, &keys, 16), 0, &query), before);
    }

    #[test]
    fn the_pages_with_the_highest_mean_softmax_of_bounds_are_taken_and_clipped() {
        let shape = small();
        let mut rng = Rng::new(3);
        for tokens in [40, 77, 200, 333] {
            let (keys, hint) = (rng.normal(tokens * 16), rng.normal(32));
            let method = quest(40, 16, &shape);
            let mut store = Store::new(&method, &shape, 0, tokens);
            store.append(&method, &keys, 50);
            let selection = store.select(&method, &hint, &mut Scratch::new());
            let candidates = shape.candidates(tokens);
            let count = candidates.end.div_ceil(16);
            for head in 0..2 {
                let bounds: Vec<f32> = (0..2)
                    .flat_map(|query| {
                        let query = &hint[(head * 2 + query) * 8..][..8];
                        (0..count)
                            .map(|page| {
                                bound(&method, store.page(head, page / 2), page % 2, query) / 8_f32.sqrt()
                            })
                            .collect::<Vec<_>>()
                    })
                    .collect();
                let mut chosen: Vec<usize> =
                    selection.tokens(head).map(|token| token as usize / 16).collect();
                chosen.dedup();
                assert_eq!(chosen.len(), 2.min(count), "a budget of 40 rows buys two pages of 16");
                assert!(are_best(&mean_softmax(&bounds, count), &chosen));
                let whole = chosen.iter().flat_map(|page| page * 16..(page + 1) * 16);
                let expected: Vec<u32> =
                    whole.filter(|token| candidates.contains(token)).map(|token| token as u32).collect();
                assert_eq!(selection.tokens(head).collect::<Vec<_>>(), expected);
            }
        }
    }

    #[test]
    fn a_budget_of_all_pages_selects_everything_and_a_tiny_one_a_page() {
        let shape = small();
        let tokens = 107;
        let mut rng = Rng::new(4);
        let (keys, hint) = (rng.normal(tokens * 16), rng.normal(32));
        let rows = |budget| {
            let method = quest(budget, 16, &shape);
            let mut store = Store::new(&method, &shape, 0, tokens);
            store.append(&method, &keys, 32);
            store.select(&method, &hint, &mut Scratch::new()).rows(0)
        };
        // Candidates 4..99: 95 rows in 7 pages.
        assert_eq!([rows(112), rows(95)], [95, 95]);
        assert!(rows(94) < 95);
        assert!((3..=16).contains(&rows(1)));
    }

    #[test]
    fn a_page_that_does_not_divide_the_arenas_is_refused_with_both() {
        let message = Quest::new(spec(1, 24), &small()).unwrap_err().to_string();
        assert!(message.contains("24") && message.contains("32"), "{message}");
    }
}
