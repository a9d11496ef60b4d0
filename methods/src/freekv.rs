//! `freekv`: the last step's query selects, so that recall is off the critical path; heads whose query has turned are corrected
//! (FreeKV, ICLR'26, arXiv 2505.13109).
//!
//! *Digest and rank* are Quest's, in pages of 32 rows; a page's rank is the mean over the group's query heads of the bounds' softmax
//! (the paper's best group policy).
//!
//! *Speculative retrieval.* Step `t` attends over the pages that query `q_{t−1}` chooses. They are chosen and fetched once step `t − 1` has
//! been answered ([`Method::prefetch`]). *Correction.* `C = cos(q_t, q_{t−1})`, the mean over the group's query heads; KV heads with
//! `C < τ` choose by `q_t` instead, before they attend. So `τ = 1` chooses what Quest chooses with the true query, and `τ = −1` lags by
//! one step. A first step, a block of queries, and a query without a direction are always corrected.

use kvoyant_kernels::Kernels;

use crate::artifact::Artifacts;
use crate::bounds::PageBounds;
use crate::budget::Budget;
use crate::context::SelectContext;
use crate::error::{MethodError, SpecError};
use crate::method::{Append, DigestKey, Method, Truncated};
use crate::needs::{HintSource, Needs};
use crate::options::{OptionWriter, Options};
use crate::pages;
use crate::registry::{Entry, default_budget};
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};
use crate::store::Store;
use crate::words;

/// The method's name.
pub const NAME: &str = "freekv";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "pages by the last step's query, corrected where the query has turned",
    parse: |options| Ok(Box::new(FreeKvSpec::from_options(options)?)),
};

/// The paper's page.
const PAGE: usize = 32;
/// The threshold for long inputs, as far as it is known.
const TAU: f32 = 0.8;

/// What a user chooses: `freekv:budget=6%,page=32,tau=0.8`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FreeKvSpec {
    /// Rows per KV head.
    pub budget: Budget,
    /// Rows of a page, a divisor of the arena's.
    pub page: usize,
    /// KV heads whose query is less like the last one are corrected.
    pub tau: f32,
}

impl FreeKvSpec {
    fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let spec = Self {
            budget: options.take_budget("budget")?.unwrap_or(default_budget()),
            page: options
                .take_value("page", "give rows of a page, at least 1", |rows| *rows > 0)?
                .unwrap_or(PAGE),
            tau: options
                .take_value("tau", "give a cosine, −1 for never and above 1 for always", |tau: &f32| {
                    tau.is_finite()
                })?
                .unwrap_or(TAU),
        };
        options.finish(&["budget", "page", "tau"])?;
        Ok(spec)
    }
}

impl Spec for FreeKvSpec {
    fn name(&self) -> &'static str {
        NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        writer.option("budget", self.budget);
        writer.option_unless("page", &self.page, &PAGE);
        writer.option_unless("tau", &self.tau, &TAU);
    }

    fn budget(&self) -> Option<Budget> {
        Some(self.budget)
    }

    fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    fn hint(&self) -> HintSource {
        HintSource::Current
    }

    fn build(&self, shape: &Shape, _artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(FreeKv::new(*self, shape)?))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}

/// Selects by the last query, and by the current one where it must.
#[derive(Debug)]
pub struct FreeKv {
    bounds: PageBounds,
    options: FreeKvSpec,
    spec: MethodSpec,
}

/// A KV head's memory: whether there is a last query, the tokens that the stored pages were chosen for (0: none are stored), how
/// many there are; then the last query `[g][d]` f32, and the pages.
const FRONT: usize = 12;

impl FreeKv {
    /// For a model of that shape.
    ///
    /// # Errors
    /// [`MethodError::Unsuitable`] where `page` does not divide the arena's page.
    pub fn new(options: FreeKvSpec, shape: &Shape) -> Result<Self, MethodError> {
        let bounds = PageBounds::new(NAME, options.page, shape)?;
        Ok(Self { bounds, options, spec: MethodSpec::new(options) })
    }

    fn query_bytes(&self) -> usize {
        self.bounds.shape.group() * self.bounds.shape.head_dim * 4
    }

    /// Whether a choice made ahead is the one that would be made when it is needed. Rows that are appended in between change the
    /// bounds of their page, which must then hold no candidate.
    fn keeps(&self) -> bool {
        self.bounds.shape.window > self.options.page + 1
    }

    /// Reads the last query of a KV head into its place in a hint; false where there is none.
    fn last_query(&self, kv_head: usize, memory: &[u8], hint: &mut Vec<f32>) -> bool {
        let shape = &self.bounds.shape;
        let width = shape.group() * shape.head_dim;
        hint.resize(shape.query_heads * shape.head_dim, 0.0);
        let bytes = memory[FRONT..FRONT + self.query_bytes()].as_chunks().0;
        for (value, bytes) in hint[kv_head * width..].iter_mut().zip(bytes) {
            *value = f32::from_le_bytes(*bytes);
        }
        words::get(memory, 0) == 1
    }

    /// Mean over the group of the cosine between two queries `[g][d]`; NaN where one has no direction.
    fn likeness(&self, query: &[f32], last: &[f32]) -> f32 {
        let d = self.bounds.shape.head_dim;
        let dot = |a: &[f32], b: &[f32]| Kernels::best().dot(a, b);
        let pairs = query.chunks_exact(d).zip(last.chunks_exact(d));
        let sum: f32 = pairs.map(|(a, b)| dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt())).sum();
        // Rounding may leave a cosine a hair outside.
        (sum / (query.len() / d) as f32).clamp(-1.0, 1.0)
    }

    /// Fills `scratch.ids` with the pages that the context's query chooses for a KV head, counted from the first that has a candidate.
    fn choose(&self, context: &SelectContext<'_>, store: &dyn Store, head: usize, scratch: &mut Scratch) {
        let candidates = self.bounds.shape.candidates(context.tokens);
        let covering = pages::covering(&candidates, self.options.page);
        let rows = self.options.budget.rows_of(context.tokens);
        let wanted = match covering.len() {
            0 => 0,
            _ => pages::affordable(rows, self.options.page, &candidates),
        };
        self.bounds.rank(context, store, head, covering, scratch);
        let Scratch { group, ids, top, .. } = scratch;
        self.bounds.kernels.top_k(group, wanted, top, ids);
    }

    fn push(&self, context: &SelectContext<'_>, ids: &[u32], out: &mut Selection) {
        let (candidates, size) = (self.bounds.shape.candidates(context.tokens), self.options.page);
        let first = pages::covering(&candidates, size).start;
        for id in ids {
            let page = first + *id as usize;
            out.push((page * size).max(candidates.start), ((page + 1) * size).min(candidates.end));
        }
    }

    /// The stored choice for so many tokens, if there is one. What an image brings may be none: pages must rise, and one that holds no
    /// candidate gives no row.
    fn stored(&self, tokens: usize, memory: &[u8], ids: &mut Vec<u32>) -> bool {
        if !self.keeps() || words::get(memory, 4) as usize != tokens {
            return false;
        }
        let (count, pages) = (words::get(memory, 8) as usize, &memory[FRONT + self.query_bytes()..]);
        ids.clear();
        ids.extend(pages.as_chunks().0.iter().take(count).map(|bytes| u32::from_le_bytes(*bytes)));
        ids.is_sorted_by(|a, b| a < b)
    }
}

impl Method for FreeKv {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs { hint: HintSource::Current, digest: true, memory: true, prefetch: true, ..Needs::default() }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        // Quest's digests, but with a memory of its own beside them.
        Some(DigestKey { method: NAME, ..self.bounds.digest_key() })
    }

    fn digest_bytes(&self) -> usize {
        self.bounds.digest_bytes()
    }

    fn memory_bytes(&self, max_tokens: usize) -> usize {
        FRONT + self.query_bytes() + max_tokens.div_ceil(self.options.page) * 4
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
        out.clear();
        let shape = &self.bounds.shape;
        let width = shape.group() * shape.head_dim;
        let mut last = std::mem::take(&mut scratch.last);
        for head in context.heads.clone() {
            let known = self.last_query(head, store.memory(head), &mut last);
            // Of a block the newest query, which is the one that the next step's is compared with.
            let newest = (context.queries - 1) * shape.kv_heads + head;
            let query = &context.hint[newest * width..(newest + 1) * width];
            let alike = self.likeness(query, &last[head * width..(head + 1) * width]);
            // From 1 on no likeness is enough, not even that of the same direction at another length.
            let tau = self.options.tau;
            let corrected = !known || context.queries > 1 || alike.is_nan() || alike < tau || tau >= 1.0;
            if corrected {
                self.choose(context, &*store, head, scratch);
            } else if !self.stored(context.tokens, store.memory(head), &mut scratch.ids) {
                let context = SelectContext { hint: &last, queries: 1, ..context.clone() };
                self.choose(&context, &*store, head, scratch);
            }
            self.push(context, &scratch.ids, out);
            out.finish_head();

            let memory = store.memory_mut(head);
            words::put(memory, 0, 1);
            words::put(memory, 4, 0);
            for (bytes, value) in memory[FRONT..].chunks_exact_mut(4).zip(query) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }
        scratch.last = last;
    }

    fn prefetch(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) -> bool {
        out.clear();
        let mut last = std::mem::take(&mut scratch.last);
        let mut any = false;
        for head in context.heads.clone() {
            if self.last_query(head, store.memory(head), &mut last) {
                let context = SelectContext { hint: &last, queries: 1, ..context.clone() };
                self.choose(&context, &*store, head, scratch);
                self.push(&context, &scratch.ids, out);
                any = true;
                let (front, ids) = (FRONT + self.query_bytes(), &scratch.ids);
                let memory = store.memory_mut(head);
                // More pages than there is room for cannot be chosen; without room for all none are kept.
                if memory.len() >= front + ids.len() * 4 {
                    words::put(memory, 4, context.tokens as u32);
                    words::put(memory, 8, ids.len() as u32);
                    for (bytes, id) in memory[front..].chunks_exact_mut(4).zip(ids) {
                        bytes.copy_from_slice(&id.to_le_bytes());
                    }
                }
            }
            out.finish_head();
        }
        scratch.last = last;
        any
    }

    fn on_truncate(&self, _tokens: usize, memory: &mut [u8]) -> Truncated {
        // The last query stays what it was; pages chosen for rows that are gone do not.
        words::put(memory, 4, 0);
        Truncated::Kept
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::replay::Replay;
    use crate::shape::tests::small;
    use crate::testing::Rng;

    fn build(text: &str) -> Box<dyn Method> {
        crate::build(&text.parse().unwrap(), &small(), &Artifacts::none()).unwrap()
    }

    /// Runs `steps` queries over a growing sequence and returns each step's selection.
    fn run(
        text: &str,
        keys: &[f32],
        queries: &[Vec<f32>],
        prefetch: impl Fn(usize) -> bool,
    ) -> Vec<Selection> {
        let method = build(text);
        let start = keys.len() / 16 - queries.len();
        let mut replay = Replay::new(&*method, &small(), 0, start);
        let mut scratch = Scratch::new();
        replay.append(&*method, &keys[..start * 16], 50);
        let step = |(at, query): (usize, &Vec<f32>)| {
            // The step's own row comes after its selection, as in a decoder.
            let tokens = replay.tokens() + 1;
            let context = SelectContext::new(&small(), 0, tokens, query);
            let selection = replay.select_with(&*method, &context, &mut scratch);
            replay.append(&*method, &keys[(start + at) * 16..(start + at + 1) * 16], 1);
            if prefetch(at) {
                replay.prefetch(&*method, &mut scratch);
            }
            selection
        };
        queries.iter().enumerate().map(step).collect()
    }

    /// A random walk on the sphere, scaled.
    fn walk(rng: &mut Rng, steps: usize, turn: f32) -> Vec<Vec<f32>> {
        let mut query = rng.normal(32);
        (0..steps)
            .map(|_| {
                query
                    .iter_mut()
                    .zip(rng.normal(32))
                    .for_each(|(q, noise)| *q = *q * (1.0 - turn) + turn * noise);
                query.clone()
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn always_corrected_it_chooses_what_quest_chooses_with_the_true_query(
            seed: u64, turn in 0.0_f32..1.0, prefetch: bool,
        ) {
            let mut rng = Rng::new(seed);
            let (keys, queries) = (rng.normal(200 * 16), walk(&mut rng, 12, turn));
            for tau in ["1", "2"] {
                let free = run(&format!("freekv:budget=24,page=4,tau={tau}"), &keys, &queries, |_| prefetch);
                let quest = run("quest:budget=24,page=4,hint=current", &keys, &queries, |_| false);
                prop_assert_eq!(&free, &quest);
            }
        }

        #[test]
        fn never_corrected_it_lags_by_exactly_one_step(seed: u64, mask: u16) {
            let mut rng = Rng::new(seed);
            let (keys, queries) = (rng.normal(200 * 16), walk(&mut rng, 12, 0.5));
            let free = run("freekv:budget=24,page=4,tau=-1", &keys, &queries, |at| mask >> at & 1 == 1);
            // Quest that is asked with the query of the step before, and at first with the first.
            let mut late = queries.clone();
            late.rotate_right(1);
            late[0].clone_from(&queries[0]);
            let quest = run("quest:budget=24,page=4,hint=current", &keys, &late, |_| false);
            prop_assert_eq!(free, quest);
        }

        #[test]
        fn what_is_chosen_does_not_depend_on_prefetches(
            seed: u64, mask: u16, page in prop::sample::select(vec![4_usize, 8, 16]), tau in -1.0_f32..1.0,
        ) {
            let mut rng = Rng::new(seed);
            let (keys, queries) = (rng.normal(90 * 16), walk(&mut rng, 16, 0.3));
            let text = format!("freekv:budget=40%,page={page},tau={tau}");
            let some = run(&text, &keys, &queries, |at| mask >> at & 1 == 1);
            prop_assert_eq!(some, run(&text, &keys, &queries, |_| false));
        }
    }

    #[test]
    fn a_query_that_stays_is_answered_from_what_was_fetched_and_one_without_direction_is_corrected() {
        let method = build("freekv:budget=24,page=4");
        let mut rng = Rng::new(9);
        let (keys, query) = (rng.normal(200 * 16), rng.normal(32));
        let mut replay = Replay::new(&*method, &small(), 0, 200);
        replay.append(&*method, &keys, 64);
        let mut scratch = Scratch::new();
        assert!(replay.prefetch(&*method, &mut scratch).is_none(), "nothing is known before the first query");
        let first = replay.select(&*method, &query, &mut scratch);
        let ahead = replay.prefetch(&*method, &mut scratch).unwrap();
        let context = SelectContext::new(&small(), 0, 201, &query);
        assert_eq!(replay.select_with(&*method, &context, &mut scratch), ahead);
        let zero = vec![0.0; 32];
        let none = replay.select(&*method, &zero, &mut scratch);
        assert_eq!(none.heads(), 2);
        assert!(none.rows(0) > 0 && first.rows(0) > 0);
    }
}
