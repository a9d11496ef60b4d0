//! The counter pool: a limit on the tokens that a KV head keeps of a sequence (InfiniGen, OSDI'24, section 4.4).
//!
//! Every selection of a token adds 1 to its counter; when a counter saturates, all are halved. Once the pool is
//! full, each new token takes the place of the one with the smallest counter, of equal ones the oldest. Sinks,
//! recent window and the newest token are never victims.
//!
//! The state is a flat slice of bytes that begins as zeros, so that it can live in shared memory by offset:
//!
//! | bytes | what |
//! |---|---|
//! | 0..4 | tokens admitted, `n` (u32, little-endian) |
//! | 4..8 | tokens alive |
//! | 8..12 | no live token below this one, sinks aside, has a counter of 0 |
//! | 12.. | a counter per token; 255: evicted |
//!
//! It may also come from an image that somebody else wrote: there are never more tokens than it has counters, nor more alive than
//! there are tokens.

use crate::budget::Budget;
use crate::error::MethodError;
use crate::selection::TokenRange;
use crate::shape::Shape;

const HEADER: usize = 12;
const TOKENS: usize = 0;
const ALIVE: usize = 4;
const NO_ZERO_BELOW: usize = 8;
/// The counter of a token that is gone.
const EVICTED: u8 = u8::MAX;
/// A counter that gets here halves all.
const SATURATED: u8 = EVICTED - 1;

/// How large a pool is and what it must keep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PoolLimits {
    capacity: Budget,
    sinks: usize,
    window: usize,
}

impl PoolLimits {
    /// A pool that keeps `capacity` of a sequence's tokens, or that many.
    ///
    /// # Errors
    /// [`MethodError::Unsuitable`] where an absolute capacity does not hold sinks, window and one token more.
    pub fn new(capacity: Budget, shape: &Shape) -> Result<Self, MethodError> {
        let limits = Self { capacity, sinks: shape.sinks, window: shape.window };
        match capacity {
            Budget::Rows(rows) if rows.get() < limits.least() => Err(MethodError::Unsuitable {
                method: super::NAME,
                reason: format!(
                    "a pool of {rows} tokens does not hold {} sinks, a window of {} and one token more; set `pool` to {} at least",
                    shape.sinks,
                    shape.window,
                    limits.least()
                ),
            }),
            _ => Ok(limits),
        }
    }

    fn least(&self) -> usize {
        self.sinks + self.window + 1
    }

    /// How many tokens of `tokens` may be alive. A share of a short sequence still holds sinks, window and one
    /// token more.
    #[must_use]
    pub fn capacity(&self, tokens: usize) -> usize {
        self.capacity.rows_of(tokens).max(self.least())
    }
}

/// Bytes of a pool for up to `max_tokens` tokens.
#[must_use]
pub fn pool_bytes(max_tokens: usize) -> usize {
    HEADER + max_tokens
}

/// Whether a token may still be selected. Of no pool (an empty slice) every token may.
#[must_use]
pub fn is_live(pool: &[u8], token: usize) -> bool {
    pool.get(HEADER + token).is_none_or(|counter| *counter != EVICTED)
}

/// A pool's bytes, to be changed.
#[derive(Debug)]
pub struct CounterPool<'a> {
    bytes: &'a mut [u8],
    limits: PoolLimits,
}

impl<'a> CounterPool<'a> {
    /// The pool in `bytes` ([`pool_bytes`]; zeros for a new one).
    ///
    /// # Panics
    /// Where `bytes` has no room for the header.
    #[must_use]
    pub fn new(bytes: &'a mut [u8], limits: PoolLimits) -> Self {
        assert!(bytes.len() >= HEADER, "a pool of {} bytes", bytes.len());
        Self { bytes, limits }
    }

    /// Tokens admitted so far, the evicted ones among them.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.field(TOKENS).min(self.bytes.len() - HEADER)
    }

    /// Tokens alive.
    #[must_use]
    pub fn alive(&self) -> usize {
        self.field(ALIVE).min(self.tokens())
    }

    /// How often a token was selected, halvings aside; `None` where it is evicted or was never admitted.
    #[must_use]
    pub fn count(&self, token: usize) -> Option<u8> {
        self.counters().get(token).copied().filter(|counter| *counter != EVICTED)
    }

    /// The sequence grew to `tokens` tokens; `victim` hears of each token that has to go, in the order in which
    /// one new token after the other displaces them.
    ///
    /// # Panics
    /// Where the bytes hold fewer tokens.
    pub fn admit(&mut self, tokens: usize, victim: &mut dyn FnMut(u32)) {
        assert!(
            HEADER + tokens <= self.bytes.len(),
            "{tokens} tokens in a pool of {} bytes",
            self.bytes.len()
        );
        for newest in self.tokens()..tokens {
            self.bytes[HEADER + newest] = 0;
            self.set_field(TOKENS, newest + 1);
            self.set_field(ALIVE, self.alive() + 1);
            let mut passed = None;
            while self.alive() > self.limits.capacity(newest + 1) {
                let Some(token) = self.smallest(&mut passed) else { break };
                self.bytes[HEADER + token] = EVICTED;
                self.set_field(ALIVE, self.alive() - 1);
                victim(token as u32);
            }
        }
    }

    /// Counts a selection.
    pub fn note_selected(&mut self, selected: &[TokenRange]) {
        let tokens = self.tokens();
        for token in selected.iter().flat_map(|range| range.first as usize..range.end() as usize) {
            if token >= tokens || self.bytes[HEADER + token] == EVICTED {
                continue;
            }
            self.bytes[HEADER + token] += 1;
            if self.bytes[HEADER + token] == SATURATED {
                for counter in &mut self.bytes[HEADER..HEADER + tokens] {
                    if *counter != EVICTED {
                        *counter /= 2;
                    }
                }
                self.set_field(NO_ZERO_BELOW, 0);
            }
        }
    }

    /// The sequence was cut down to `tokens` tokens. Victims stay gone: their rows are overwritten.
    pub fn truncate(&mut self, tokens: usize) {
        let old = self.tokens();
        if tokens >= old {
            return;
        }
        let cut = self.counters()[tokens..].iter().filter(|counter| **counter != EVICTED).count();
        self.set_field(ALIVE, self.alive().saturating_sub(cut));
        self.set_field(TOKENS, tokens);
        self.set_field(NO_ZERO_BELOW, self.field(NO_ZERO_BELOW).min(tokens));
        // What lies behind the last token looks new again.
        self.bytes[HEADER + tokens..HEADER + old].fill(0);
    }

    /// The victim: the smallest counter outside sinks and window, of equal ones the lowest id. `passed` is for the same pool's next
    /// victim: a counter that no candidate is below, and how many candidates before have no such counter any more. Where many have to go
    /// at once, as an image may have it, they are not all looked at again for each.
    fn smallest(&mut self, passed: &mut Option<(u8, usize)>) -> Option<usize> {
        let first = self.limits.sinks;
        let end = self.tokens().saturating_sub(self.limits.window).max(first);
        // Most victims were never selected: what is below the mark need not be looked at again for those.
        let from = self.field(NO_ZERO_BELOW).clamp(first, end);
        if let Some(at) = self.counters()[from..end].iter().position(|counter| *counter == 0) {
            self.set_field(NO_ZERO_BELOW, from + at + 1);
            return Some(from + at);
        }
        self.set_field(NO_ZERO_BELOW, end);
        let candidates = &self.counters()[first..end];
        let next = |least: u8, from: usize| {
            candidates[from..].iter().position(|counter| *counter == least).map(|at| (least, from + at))
        };
        let found = passed
            .and_then(|(least, from)| next(least, from))
            .or_else(|| next(candidates.iter().copied().min().filter(|counter| *counter != EVICTED)?, 0));
        *passed = found.map(|(least, at)| (least, at + 1));
        found.map(|(_, at)| first + at)
    }

    fn counters(&self) -> &[u8] {
        &self.bytes[HEADER..HEADER + self.tokens()]
    }

    fn field(&self, at: usize) -> usize {
        let bytes = &self.bytes[at..at + 4];
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize
    }

    fn set_field(&mut self, at: usize, value: usize) {
        self.bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::small;
    use proptest::prelude::*;

    fn limits(capacity: &str) -> PoolLimits {
        PoolLimits::new(capacity.parse().unwrap(), &small()).unwrap()
    }

    fn range(first: u32, count: u32) -> TokenRange {
        TokenRange { first, count }
    }

    fn admit(pool: &mut CounterPool<'_>, tokens: usize) -> Vec<u32> {
        let mut victims = Vec::new();
        pool.admit(tokens, &mut |victim| victims.push(victim));
        victims
    }

    /// The pool as its rules say it, with none of the shortcuts.
    struct Naive {
        limits: PoolLimits,
        counters: Vec<Option<u32>>,
    }

    impl Naive {
        fn alive(&self) -> usize {
            self.counters.iter().flatten().count()
        }

        fn admit(&mut self, tokens: usize) -> Vec<u32> {
            let mut victims = Vec::new();
            while self.counters.len() < tokens {
                self.counters.push(Some(0));
                let n = self.counters.len();
                while self.alive() > self.limits.capacity(n) {
                    let victim = (4..n.saturating_sub(8))
                        .filter(|token| self.counters[*token].is_some())
                        .min_by_key(|token| (self.counters[*token], *token))
                        .unwrap();
                    self.counters[victim] = None;
                    victims.push(victim as u32);
                }
            }
            victims
        }

        fn select(&mut self, token: usize) {
            if let Some(Some(counter)) = self.counters.get_mut(token) {
                *counter += 1;
                if *counter == 254 {
                    self.counters.iter_mut().flatten().for_each(|counter| *counter /= 2);
                }
            }
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Grow(usize),
        Select(u32, u32, usize),
        Cut(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1_usize..30).prop_map(Step::Grow),
            4 => (0_u32..200, 1_u32..20, 1_usize..90).prop_map(|(first, count, times)| Step::Select(first, count, times)),
            1 => (0_usize..12).prop_map(Step::Cut),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn the_pool_keeps_its_rules_whatever_happens(
            steps in prop::collection::vec(step(), 1..40),
            capacity in prop_oneof![Just("13"), Just("40"), Just("80%"), Just("20%"), Just("100%")],
        ) {
            const MAX: usize = 2000;
            let limits = limits(capacity);
            let mut bytes = vec![0; pool_bytes(MAX)];
            let mut naive = Naive { limits, counters: Vec::new() };
            for step in steps {
                let mut pool = CounterPool::new(&mut bytes, limits);
                let before = pool.tokens();
                match step {
                    Step::Grow(more) => {
                        let dead: Vec<usize> = (0..before).filter(|token| pool.count(*token).is_none()).collect();
                        let victims = admit(&mut pool, before + more);
                        prop_assert_eq!(&victims, &naive.admit(before + more));
                        for (at, victim) in victims.iter().enumerate() {
                            let victim = *victim as usize;
                            prop_assert!(!dead.contains(&victim), "a victim stays gone");
                            prop_assert!(!victims[..at].contains(&(victim as u32)), "victims are distinct");
                            prop_assert!(victim >= 4 && victim < before + more - 8, "sinks, window and newest stay");
                        }
                    }
                    Step::Select(first, count, times) => for _ in 0..times {
                        pool.note_selected(&[range(first, count)]);
                        (first..first + count).for_each(|token| naive.select(token as usize));
                    },
                    Step::Cut(less) => {
                        let to = before.saturating_sub(less);
                        pool.truncate(to);
                        naive.counters.truncate(to);
                    }
                }
                prop_assert_eq!(pool.alive(), naive.alive());
                prop_assert!(pool.alive() <= limits.capacity(pool.tokens()) || matches!(step, Step::Cut(_)));
                for token in 0..pool.tokens() {
                    prop_assert_eq!(pool.count(token).map(u32::from), naive.counters[token]);
                }
            }
        }
    }

    #[test]
    fn counters_are_the_number_of_selections_and_saturation_halves_all() {
        let mut bytes = vec![0; pool_bytes(100)];
        let mut pool = CounterPool::new(&mut bytes, limits("100%"));
        admit(&mut pool, 50);
        for _ in 0..100 {
            pool.note_selected(&[range(5, 1)]);
        }
        for _ in 0..253 {
            pool.note_selected(&[range(7, 2)]);
        }
        assert_eq!((pool.count(5), pool.count(7), pool.count(8)), (Some(100), Some(253), Some(253)));
        pool.note_selected(&[range(7, 1)]);
        assert_eq!((pool.count(5), pool.count(7), pool.count(8)), (Some(50), Some(127), Some(126)));
        assert_eq!(pool.count(50), None);
    }

    #[test]
    fn a_token_whose_counter_is_halved_to_nothing_is_the_next_victim() {
        let mut bytes = vec![0; pool_bytes(100)];
        let mut pool = CounterPool::new(&mut bytes, limits("20"));
        admit(&mut pool, 20);
        pool.note_selected(&[range(4, 6)]);
        assert_eq!(admit(&mut pool, 22), [10, 11]);
        (0..254).for_each(|_| pool.note_selected(&[range(6, 1)]));
        assert_eq!((pool.count(4), pool.count(5)), (Some(0), Some(0)));
        assert_eq!(admit(&mut pool, 24), [4, 5]);
    }

    #[test]
    fn the_least_selected_leaves_first_and_of_equal_ones_the_oldest() {
        let mut bytes = vec![0; pool_bytes(100)];
        let mut pool = CounterPool::new(&mut bytes, limits("20"));
        assert!(admit(&mut pool, 20).is_empty());
        pool.note_selected(&[range(4, 1), range(6, 2)]);
        pool.note_selected(&[range(4, 1), range(6, 1)]);
        // Eligible when the 21st comes: 4..13.
        assert_eq!(admit(&mut pool, 21), [5]);
        assert_eq!(admit(&mut pool, 28), [8, 9, 10, 11, 12, 13, 14]);
        assert_eq!(pool.alive(), 20);
        assert!((15..28).all(|token| pool.count(token) == Some(0)));
        pool.note_selected(&[range(5, 1), range(15, 5)]);
        assert_eq!(pool.count(5), None, "what is gone is not counted");
        assert_eq!(admit(&mut pool, 29), [20], "never selected");
        assert!(!is_live(&bytes, 20) && is_live(&bytes, 21) && is_live(&[], 20));
    }

    #[test]
    fn a_pool_that_holds_no_candidate_is_refused_with_what_it_needs() {
        let message = PoolLimits::new("12".parse().unwrap(), &small()).unwrap_err().to_string();
        assert!(message.contains("12 tokens") && message.contains("13 at least"), "{message}");
    }
}
