//! What is seen of a session beside its counters: what its client says of itself, how its answers stand to their deadlines, what comparisons with
//! exact attention find, and what was refused. One thread writes, anybody reads.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kvoyant_protocol::wire::{TOLD, Told};

use super::histogram::{Counts, Histogram};

/// Ends of the buckets that are shown of times before and after a deadline, in microseconds: few, for there are as many of them as layers.
pub const DEADLINE_US: [u64; 5] = [50, 250, 1000, 5000, 25_000];

/// Layers that are told apart; what lies behind counts for the last of them.
pub const LAYERS_MAX: usize = 256;

/// Ends of the buckets of shares of the attention that was covered.
pub const COVERED: [f64; 6] = [0.5, 0.7, 0.8, 0.9, 0.95, 0.99];

/// Adds to a cell that one thread alone writes: no locked instruction is used.
fn raise(cell: &AtomicU64, by: u64) {
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

fn read<const N: usize>(cells: &[AtomicU64; N]) -> [u64; N] {
    std::array::from_fn(|at| cells[at].load(Ordering::Relaxed))
}

fn add<const N: usize>(mine: &mut [u64; N], more: &[u64; N]) {
    mine.iter_mut().zip(more).for_each(|(mine, more)| *mine = mine.wrapping_add(*more));
}

/// A layer's answers that had a deadline: by how much before it they were there, and by how much after it.
#[derive(Debug, Default)]
struct Layer {
    before: Histogram,
    after: Histogram,
}

/// The same at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Slack {
    /// Answers that were there in time, by how much was left.
    pub before: Counts,
    /// Answers that came late, by how much.
    pub after: Counts,
}

/// Whose query an answer was compared by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Query {
    /// The layer's own, as attention has it.
    True,
    /// The one that the selection was made by, ahead of the layer.
    Predicted,
}

/// Both, with what metrics call them.
pub const QUERIES: [(Query, &str); 2] = [(Query::True, "true"), (Query::Predicted, "predicted")];

/// What one comparison found, of one KV head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Check {
    /// Rows that the answer named.
    pub selected: u64,
    /// The fewest rows that have nine tenths of the attention.
    pub needed: u64,
    /// Rows that are both.
    pub both: u64,
    /// The share of the attention that the named rows have.
    pub covered: f64,
}

/// Comparisons by one kind of query.
#[derive(Debug, Default)]
struct Checks {
    rows: [AtomicU64; 3],
    covered: [AtomicU64; COVERED.len() + 1],
    covered_millionths: AtomicU64,
}

/// The same at some moment, or of several sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Checked {
    /// Rows that were selected, needed, and both.
    pub rows: [u64; 3],
    /// Comparisons by the share of the attention that was covered, in [`COVERED`] and more.
    pub covered: [u64; COVERED.len() + 1],
    /// The sum of these shares, in millionths.
    pub covered_millionths: u64,
}

impl Checked {
    fn of(checks: &Checks) -> Self {
        Self {
            rows: read(&checks.rows),
            covered: read(&checks.covered),
            covered_millionths: checks.covered_millionths.load(Ordering::Relaxed),
        }
    }

    fn add(&mut self, other: &Self) {
        add(&mut self.rows, &other.rows);
        add(&mut self.covered, &other.covered);
        self.covered_millionths = self.covered_millionths.wrapping_add(other.covered_millionths);
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.covered.iter().sum()
    }
}

/// Why a descriptor was refused, which ended its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// Ring indices that cannot be.
    Ring,
    /// Bytes that are no descriptor.
    Format,
    /// One that does not follow those before it.
    Order,
    /// One about what there is not, or whose payload does not fit.
    Contents,
    /// More work than one may ask for.
    Work,
}

/// All of them, with what metrics call them.
pub const REJECTIONS: [(Rejection, &str); 5] = [
    (Rejection::Ring, "ring"),
    (Rejection::Format, "format"),
    (Rejection::Order, "order"),
    (Rejection::Contents, "contents"),
    (Rejection::Work, "work"),
];

/// See the module.
#[derive(Debug)]
pub struct Seen {
    began: Instant,
    told: [AtomicU64; TOLD],
    layers: OnceLock<Box<[Layer]>>,
    left_late: AtomicU64,
    checks: [Checks; QUERIES.len()],
    rejected: [AtomicU64; REJECTIONS.len()],
}

impl Default for Seen {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            told: Default::default(),
            layers: OnceLock::new(),
            left_late: AtomicU64::new(0),
            checks: Default::default(),
            rejected: Default::default(),
        }
    }
}

impl Seen {
    /// The session has a model of so many layers.
    pub fn has_layers(&self, layers: usize) {
        let made = || (0..layers.clamp(1, LAYERS_MAX)).map(|_| Layer::default()).collect();
        self.layers.get_or_init(made);
    }

    /// What the client says of itself. It is nobody's word but its own: it counts only upwards, and no further than can be, given how many
    /// answers it has asked for, how many rows it has appended (at least one for each layer that it selects for), and how many answers it can
    /// wait for at a time.
    pub fn is_told(&self, words: [u64; TOLD], (answers, rows): (u64, u64), at_once: u32) {
        let age = self.began.elapsed().as_nanos().min(u128::from(u64::MAX)) as u64;
        for (at, (cell, word)) in self.told.iter().zip(words).enumerate() {
            let most = match at {
                at if at == Told::WaitedNs as usize => age.saturating_mul(u64::from(at_once)),
                at if at == Told::SelectedHere as usize => rows,
                _ => answers,
            };
            let value = cell.load(Ordering::Relaxed).max(word.min(most));
            cell.store(value, Ordering::Relaxed);
        }
    }

    /// An answer of a layer was there so long before its deadline, or after it, in ns.
    pub fn answered(&self, layer: usize, deadline_ns: u64, now_ns: u64) {
        let Some(layers) = self.layers.get() else { return };
        let layer = &layers[layer.min(layers.len() - 1)];
        match deadline_ns.checked_sub(now_ns) {
            Some(left) => layer.before.add(left),
            None => layer.after.add(now_ns - deadline_ns),
        };
    }

    /// An answer left rows out so as to be in time.
    pub fn left_late(&self) {
        raise(&self.left_late, 1);
    }

    /// An answer was compared.
    pub fn checked(&self, query: Query, check: Check) {
        let checks = &self.checks[query as usize];
        for (cell, rows) in checks.rows.iter().zip([check.selected, check.needed, check.both]) {
            raise(cell, rows);
        }
        let covered = check.covered.clamp(0.0, 1.0);
        raise(&checks.covered[COVERED.partition_point(|end| *end < covered)], 1);
        raise(&checks.covered_millionths, (covered * 1e6) as u64);
    }

    /// A descriptor was refused.
    pub fn rejected(&self, why: Rejection) {
        raise(&self.rejected[why as usize], 1);
    }
}

/// What [`Seen`] held at some moment, or of several sessions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sights {
    /// How long sessions have been open, in ns.
    pub open_ns: u64,
    /// What clients say of themselves, in the order of [`Told`](kvoyant_protocol::wire::Told).
    pub told: [u64; TOLD],
    /// Answers by their deadlines, by layer.
    pub slack: Vec<Slack>,
    /// Answers that left rows out so as to be in time.
    pub left_late: u64,
    /// Comparisons, in the order of [`QUERIES`].
    pub checks: [Checked; QUERIES.len()],
    /// Descriptors that were refused, in the order of [`REJECTIONS`].
    pub rejected: [u64; REJECTIONS.len()],
}

impl Sights {
    /// Of one session.
    #[must_use]
    pub fn of(seen: &Seen) -> Self {
        let slack = |layer: &Layer| Slack { before: layer.before.counts(), after: layer.after.counts() };
        Self {
            open_ns: seen.began.elapsed().as_nanos().min(u128::from(u64::MAX)) as u64,
            told: read(&seen.told),
            slack: seen.layers.get().into_iter().flatten().map(slack).collect(),
            left_late: seen.left_late.load(Ordering::Relaxed),
            checks: std::array::from_fn(|query| Checked::of(&seen.checks[query])),
            rejected: read(&seen.rejected),
        }
    }

    /// Adds others'.
    pub fn add(&mut self, other: &Self) {
        self.open_ns = self.open_ns.wrapping_add(other.open_ns);
        add(&mut self.told, &other.told);
        if self.slack.len() < other.slack.len() {
            self.slack.resize(other.slack.len(), Slack::default());
        }
        for (mine, more) in self.slack.iter_mut().zip(&other.slack) {
            mine.before.add(&more.before);
            mine.after.add(&more.after);
        }
        self.left_late = self.left_late.wrapping_add(other.left_late);
        self.checks.iter_mut().zip(&other.checks).for_each(|(mine, more)| mine.add(more));
        add(&mut self.rejected, &other.rejected);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_says_of_itself_never_goes_back_and_never_beyond_what_can_be() {
        let seen = Seen::default();
        std::thread::sleep(std::time::Duration::from_millis(2));
        seen.is_told([1000, 3, 2, 1, 30], (10, 40), 4);
        assert_eq!(Sights::of(&seen).told, [1000, 3, 2, 1, 30]);
        seen.is_told([500, 2, 4, 1, 29], (10, 40), 4);
        assert_eq!(Sights::of(&seen).told, [1000, 3, 4, 1, 30], "only upwards");
        seen.is_told([u64::MAX; TOLD], (10, 40), 4);
        let sights = Sights::of(&seen);
        assert!(sights.told[0] <= 4 * sights.open_ns, "{sights:?}");
        assert_eq!(sights.told[1..], [10, 10, 10, 40]);
    }

    #[test]
    fn answers_lie_before_or_after_their_deadline_in_the_bucket_of_their_layer() {
        let seen = Seen::default();
        seen.answered(0, 5, 6);
        seen.has_layers(2);
        seen.answered(0, 1_000_000, 970_000);
        seen.answered(0, 1_000_000, 1_000_000);
        seen.answered(1, 1_000_000, 9_000_000_000);
        // Of a layer that there is not.
        seen.answered(7, 1_000_000, 1_000_001);
        let slack = Sights::of(&seen).slack;
        assert_eq!(slack.len(), 2, "the first came before there were layers");
        assert_eq!(
            (slack[0].before.in_fewer(&DEADLINE_US)[0], slack[0].before.sum_ns, slack[0].after.count()),
            ((5e-5, 2), 30_000, 0)
        );
        let after = slack[1].after.in_fewer(&DEADLINE_US);
        assert_eq!((after[0], after[5]), ((5e-5, 1), (f64::INFINITY, 1)));
        assert_eq!((slack[1].after.count(), slack[1].before.count()), (2, 0));
    }

    #[test]
    fn sessions_add_up() {
        let seen = Seen::default();
        seen.has_layers(1);
        seen.answered(0, 2_000_000, 1_000_000);
        seen.left_late();
        seen.rejected(Rejection::Work);
        seen.checked(Query::Predicted, Check { selected: 10, needed: 4, both: 3, covered: 0.85 });
        seen.checked(Query::Predicted, Check { selected: 10, needed: 5, both: 5, covered: 1.0 });
        let one = Sights::of(&seen);
        let mut all = Sights::default();
        all.add(&one);
        all.add(&one);
        assert_eq!((all.left_late, all.rejected[Rejection::Work as usize]), (2, 2));
        assert_eq!(all.slack[0].before.count(), 2);
        let [exact, ahead] = all.checks;
        assert_eq!((exact.count(), ahead.count(), ahead.rows), (0, 4, [40, 18, 16]));
        assert_eq!((ahead.covered[3], ahead.covered[6], ahead.covered_millionths), (2, 2, 3_700_000));
    }
}
