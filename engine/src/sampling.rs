//! From logits to the next token.

use kvoyant_kernels::SplitMix64;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerOptions {
    /// Divisor of the logits; 0 is greedy.
    pub temperature: f32,
    /// The smallest set of most likely tokens with at least this probability is drawn from (nucleus sampling, Holtzman et al. 2020);
    /// 1 is all.
    pub top_p: f32,
    /// Same seed, same draws.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

/// Chooses tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    random: SplitMix64,
}

impl Sampler {
    /// A sampler with its own stream of random numbers.
    pub fn new(options: SamplerOptions) -> Self {
        Self { options, random: SplitMix64::new(options.seed) }
    }

    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self::new(SamplerOptions::default())
    }

    /// The next token for `logits: [vocabulary]`.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        if self.options.temperature <= 0.0 {
            return argmax(logits);
        }
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut weights: Vec<(u32, f64)> = (0u32..)
            .zip(logits)
            .map(|(token, logit)| (token, f64::from((logit - best) / self.options.temperature).exp()))
            .filter(|(_, weight)| *weight > 0.0)
            .collect();
        if weights.is_empty() {
            // No logit is a number, or one is infinite: there are no odds.
            return argmax(logits);
        }
        weights.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        let wanted = total * f64::from(self.options.top_p.clamp(0.0, 1.0));
        let mut nucleus = 0.0;
        let kept = weights
            .iter()
            .take_while(|(_, weight)| {
                let needed = nucleus < wanted;
                nucleus += if needed { *weight } else { 0.0 };
                needed
            })
            .count()
            .max(1);
        let mut draw = self.random.unit() * nucleus;
        for (token, weight) in &weights[..kept] {
            draw -= weight;
            if draw < 0.0 {
                return *token;
            }
        }
        weights.get(kept - 1).map_or_else(|| argmax(logits), |(token, _)| *token)
    }
}

/// The most likely token; the lowest id among equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// `ln softmax(logits)[token]`, for perplexity.
pub fn log_probability(logits: &[f32], token: u32) -> f64 {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - best).exp()).sum();
    f64::from(logits[token as usize] - best) - sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_largest_and_the_first_of_equals() {
        assert_eq!(Sampler::greedy().sample(&[0.5, 2.0, -1.0, 2.0]), 1);
    }

    #[test]
    fn draws_follow_the_softmax_and_repeat_with_the_seed() {
        let logits = [1.0f32, 0.0, 2.0];
        let options = SamplerOptions { temperature: 1.0, top_p: 1.0, seed: 11 };
        let draw = || {
            let mut sampler = Sampler::new(options);
            (0..20_000).map(|_| sampler.sample(&logits)).collect::<Vec<_>>()
        };
        let draws = draw();
        assert_eq!(draws, draw());
        for token in 0..3 {
            let share = draws.iter().filter(|&&t| t == token).count() as f64 / draws.len() as f64;
            assert!((share - log_probability(&logits, token).exp()).abs() < 0.015, "{token}: {share}");
        }
    }

    #[test]
    fn top_p_draws_from_the_smallest_set_that_covers_it() {
        // Probabilities 0.665, 0.245, 0.090.
        let logits = [2.0f32, 1.0, 0.0];
        let mut sampler = Sampler::new(SamplerOptions { temperature: 1.0, top_p: 0.7, seed: 5 });
        let draws: Vec<u32> = (0..2000).map(|_| sampler.sample(&logits)).collect();
        assert!(draws.contains(&0) && draws.contains(&1) && !draws.contains(&2));
    }

    #[test]
    fn logits_that_are_no_numbers_are_sampled_all_the_same() {
        let mut sampler = Sampler::new(SamplerOptions { temperature: 0.8, top_p: 0.9, seed: 1 });
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(sampler.sample(&[odd; 3]) < 3);
            assert!(sampler.sample(&[0.0, odd, 1.0]) < 3);
        }
    }
}
