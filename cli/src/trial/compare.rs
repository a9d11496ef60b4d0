//! Comparing next-token distributions: agreement, divergence, perplexity.

/// A next-token distribution, as natural logarithms.
#[derive(Clone, Debug)]
pub(crate) struct LogProbs(Vec<f32>);

impl LogProbs {
    /// The log-softmax of one position's logits, summed in f64.
    pub(crate) fn of(logits: &[f32]) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
        let norm = f64::from(max) + sum.ln();
        Self(logits.iter().map(|&x| (f64::from(x) - norm) as f32).collect())
    }

    /// The most probable token; the first of equals.
    pub(crate) fn best(&self) -> usize {
        let mut best = 0;
        for (token, &p) in self.0.iter().enumerate() {
            if p > self.0[best] {
                best = token;
            }
        }
        best
    }

    /// The log probability of `token`, in nats.
    pub(crate) fn at(&self, token: u32) -> f64 {
        f64::from(self.0[token as usize])
    }

    /// KL(self ‖ other) in nats.
    pub(crate) fn kl(&self, other: &Self) -> f64 {
        self.0
            .iter()
            .zip(&other.0)
            .map(|(&p, &q)| (f64::from(p), f64::from(q)))
            .filter(|(p, _)| p.is_finite())
            .map(|(p, q)| p.exp() * (p - q))
            .sum()
    }
}

/// What was seen at the positions of a teacher-forced continuation.
#[derive(Clone, Debug, Default)]
pub(crate) struct Agreement {
    equal: Vec<f64>,
    kl: Vec<f64>,
    log_probability: f64,
}

impl Agreement {
    /// Adds a position at which `truth` came next.
    pub(crate) fn add(&mut self, dense: &LogProbs, row: &LogProbs, truth: u32) {
        self.equal.push(f64::from(u8::from(dense.best() == row.best())));
        self.kl.push(dense.kl(row));
        self.log_probability += row.at(truth);
    }

    /// Share of positions with the same most probable token.
    pub(crate) fn equal(&self) -> f64 {
        mean(&self.equal)
    }

    /// Mean KL, in nats.
    pub(crate) fn kl(&self) -> f64 {
        mean(&self.kl)
    }

    /// KL at each position, in nats.
    pub(crate) fn kls(&self) -> &[f64] {
        &self.kl
    }

    /// Perplexity of the true tokens.
    pub(crate) fn perplexity(&self) -> f64 {
        (-self.log_probability / self.kl.len().max(1) as f64).exp()
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_has_no_divergence_from_itself() {
        let p = LogProbs::of(&[1.0, 2.0, -30.0, 100.0]);
        assert_eq!(p.kl(&p), 0.0);
        let total: f64 = (0..4).map(|t| p.at(t).exp()).sum();
        assert!((total - 1.0).abs() < 1e-6);
    }

    #[test]
    fn divergence_and_perplexity_are_the_textbooks() {
        // p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 − ½ ln 3.
        let p = LogProbs::of(&[0.0, 0.0]);
        let q = LogProbs::of(&[0.0, 3.0_f32.ln()]);
        assert!((p.kl(&q) - (2.0_f64.ln() - 0.5 * 3.0_f64.ln())).abs() < 1e-6);
        let mut seen = Agreement::default();
        seen.add(&p, &q, 0);
        seen.add(&p, &q, 0);
        assert!((seen.perplexity() - 4.0).abs() < 1e-5);
        assert_eq!(seen.equal(), 0.0);
    }

    #[test]
    fn the_first_of_equal_tokens_is_the_best() {
        assert_eq!(LogProbs::of(&[1.0, 3.0, 3.0]).best(), 1);
    }
}
