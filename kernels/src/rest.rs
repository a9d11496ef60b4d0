//! What is known of the rows that an answer left out: an estimate of what they would have added, and bounds on it.
//!
//! For a query `q` and rows `t` that are not attended, `s_t` is their estimated score and `m_t` a bound of its error, both scaled
//! by `1/√d`. With `w_t = e^{s_t}`, the page's mean value `v̄` and `ν_t = ‖v_t − v̄‖`, the answer `o′` is attention over the rows
//! attended, to which the rest is merged with weights `w_t` and values `v̄`. Then the true answer `o*` obeys
//!
//! `‖o′ − o*‖ ≤ Σ [w_t·(e^{m_t} − 1)·(‖v̄‖ + ‖o′‖) + e^{s_t + m_t}·ν_t] / (A + Σ e^{s_t − m_t})`, `A = Σ_attended e^{s_t}`,
//!
//! since `o* − o′ = Σ_rest [(e^{s*_t} − w_t)·(v̄ − o′) + e^{s*_t}·(v_t − v̄)] / Σ_all e^{s*_t}`: what is attended and the estimate cancel
//! against `o′` itself. And the probability that dense attention gives to the rest is at most `1 / (1 + e^{ln A − U})`,
//! `U = ln Σ e^{s_t + m_t}`.

use crate::cpu::CodeSums;

/// Sums over the rows left out for one query, all relative to `e^max`, rounded so that bounds made from them hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RestSums {
    /// What weights are relative to: near the largest score of all rows that were looked at.
    pub max: f32,
    /// `Σ e^{s − max}`: 0 where nothing is to be merged.
    pub weight: f32,
    /// At least `Σ e^{s + m − max}`; `+∞` where it is not known.
    pub upper: f32,
    /// At most `Σ e^{s − m − max}`.
    pub lower: f32,
    /// At least `Σ e^{s − max}·(e^m − 1)·‖v̄‖`.
    pub scatter: f32,
    /// At least `Σ e^{s + m − max}·ν`.
    pub spread: f32,
    /// Rows left out.
    pub rows: u32,
}

impl Default for RestSums {
    fn default() -> Self {
        Self::NOTHING
    }
}

/// How wrong one query head's answer can be, against dense attention over the same rows of this layer: nothing is said about other
/// layers, or about the text.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Certificate {
    /// At least the attention probability of the rows left out (0–1).
    pub missed_mass: f32,
    /// At least `‖o′ − o*‖`, in units of the values.
    pub error: f32,
}

/// What attention over the attended rows may be off by in f32, in nats of its log-sum-exp: sums of a dozen roundings, of products that
/// may be some times as large as the score.
const ROUNDING: f64 = 1e-5;

/// What sums over codes may be off by, relatively.
const SUMMING: f64 = 2e-5;

/// At least twice the norm of any value, mean or not, that f16 holds: 1,024 numbers at most. What larger ones (of f32 or bf16) add where their
/// weight is rounded to nothing is far below what attention in f32 rounds them by.
const LARGEST_NORM: f64 = 2.0 * 65504.0 * 32.0;

impl RestSums {
    /// At least what a row may weigh whose estimated weight was rounded to 0: less than 3e−38, by the largest margin that is told, e³⁶.
    pub const LEAST_WEIGHT: f32 = 1.3e-22;

    /// Nothing was left out.
    pub const NOTHING: Self = Self {
        max: f32::NEG_INFINITY,
        weight: 0.0,
        upper: 0.0,
        lower: 0.0,
        scatter: 0.0,
        spread: 0.0,
        rows: 0,
    };

    /// From sums over `rows` rows whose weights are relative to `e^max`.
    #[must_use]
    pub fn of_codes(sums: &CodeSums, max: f32, rows: usize) -> Self {
        if rows == 0 {
            return Self::NOTHING;
        }
        let least = rows as f64 * f64::from(Self::LEAST_WEIGHT);
        let above = |value: f64| up((value + least * LARGEST_NORM) * (1.0 + SUMMING));
        Self {
            max,
            weight: sums.weight as f32,
            upper: up((sums.upper + least) * (1.0 + SUMMING)),
            lower: ((sums.lower * (1.0 - SUMMING)) as f32).next_down().max(0.0),
            scatter: above(sums.scatter),
            spread: above(sums.spread),
            rows: rows as u32,
        }
    }

    /// What a log-sum-exp of attention in f32 may be off by, in nats.
    #[must_use]
    pub fn rounding(lse: f32) -> f64 {
        ROUNDING * (1.0 + f64::from(lse.abs()))
    }

    /// The same estimate, of which nothing is said.
    #[must_use]
    pub fn uncertified(self) -> Self {
        if self.rows == 0 {
            return self;
        }
        Self { upper: f32::INFINITY, lower: 0.0, scatter: f32::INFINITY, spread: f32::INFINITY, ..self }
    }

    /// Whether a certificate can be made.
    #[must_use]
    pub fn is_certified(&self) -> bool {
        self.upper.is_finite()
    }

    /// `ln Σ e^s`: what the estimate is merged with.
    #[must_use]
    pub fn lse(&self) -> f32 {
        if self.weight > 0.0 { self.max + self.weight.ln() } else { f32::NEG_INFINITY }
    }

    /// The certificate of an answer: `attended_lse` is the log-sum-exp of all scaled scores that were attended, `answer` `[dv]` what was
    /// made of both. What is not known is `missed_mass` 1 and `error` ∞.
    #[must_use]
    pub fn certify(&self, attended_lse: f32, answer: &[f32]) -> Certificate {
        if self.rows == 0 {
            return Certificate::default();
        }
        let known = |value: f64, worst: f64| if value.is_nan() { worst } else { value };
        let attended = (f64::from(attended_lse) - Self::rounding(attended_lse) - f64::from(self.max)).exp();
        let upper = f64::from(self.upper);
        let missed_mass = known(1.0 / (1.0 + attended / upper), 1.0).clamp(0.0, 1.0);
        let norm = answer.iter().map(|o| f64::from(*o).powi(2)).sum::<f64>().sqrt();
        let drift = (upper - f64::from(self.weight) * (1.0 - SUMMING)).max(0.0);
        let above = f64::from(self.scatter) + drift * norm + f64::from(self.spread);
        let error = known(above / (attended + f64::from(self.lower)), f64::INFINITY);
        // What was left out is never nothing.
        let least = f32::from_bits(1);
        Certificate { missed_mass: up(missed_mass).clamp(least, 1.0), error: up(error).max(least) }
    }
}

/// As f32, not smaller.
fn up(value: f64) -> f32 {
    let rounded = value as f32;
    if f64::from(rounded) < value { rounded.next_up() } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE_ROW: RestSums =
        RestSums { max: 0.0, weight: 1.0, upper: 1.5, lower: 0.5, scatter: 0.0, spread: 0.1, rows: 1 };

    #[test]
    fn nothing_left_out_is_nothing_missed() {
        assert_eq!(RestSums::NOTHING.certify(3.0, &[2.0]), Certificate::default());
        assert_eq!(RestSums::NOTHING.lse(), f32::NEG_INFINITY);
        assert_eq!(RestSums::of_codes(&CodeSums::default(), 1.0, 0), RestSums::NOTHING);
    }

    #[test]
    fn the_missed_mass_is_that_of_the_upper_bounds() {
        let certificate = ONE_ROW.certify(1.5_f32.ln(), &[0.0]);
        assert!((certificate.missed_mass - 0.5).abs() < 1e-3, "{certificate:?}");
        assert!((certificate.error - 0.1 / 2.0).abs() < 1e-3, "{certificate:?}");
        let apart = ONE_ROW.certify(1.5_f32.ln(), &[1.0]);
        assert!((apart.error - 0.6 / 2.0).abs() < 1e-3, "{apart:?}");
    }

    #[test]
    fn what_is_not_known_is_the_worst() {
        let unknown = RestSums { upper: f32::INFINITY, lower: 0.0, ..ONE_ROW };
        for sums in [unknown, ONE_ROW.uncertified()] {
            assert!(!sums.is_certified());
            let certificate = sums.certify(0.0, &[1.0]);
            assert_eq!((certificate.missed_mass, certificate.error), (1.0, f32::INFINITY));
        }
        let nothing_attended = ONE_ROW.certify(f32::NEG_INFINITY, &[1.0]);
        assert_eq!(nothing_attended.missed_mass, 1.0);
        assert_eq!(ONE_ROW.uncertified().lse(), ONE_ROW.lse());
    }

    #[test]
    fn rows_that_weigh_nothing_still_count() {
        let sums = RestSums::of_codes(&CodeSums::default(), 1.0, 10);
        assert!(sums.upper > 0.0 && sums.lse() == f32::NEG_INFINITY, "{sums:?}");
        assert!(sums.certify(1.0, &[1.0]).missed_mass > 0.0);
    }
}
