//! Rotary position embedding in the rotate-half convention: value `j` pairs with `j + d/2`.

use kvoyant_kernels::Kernels;

use crate::config::{ModelConfig, RopeScaling};

/// Rotary frequencies of a model.
#[derive(Debug, Clone)]
pub struct Rope {
    /// Radians per position, `[d / 2]`.
    inverse_frequencies: Vec<f32>,
}

impl Rope {
    /// Its frequencies in a word: the same word, the same rotation.
    #[must_use]
    pub fn name(&self) -> String {
        // FNV-1a over their bits.
        let hash = self.inverse_frequencies.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, frequency| {
            (hash ^ u64::from(frequency.to_bits())).wrapping_mul(0x0100_0000_01b3)
        });
        format!("{}-{hash:016x}", 2 * self.inverse_frequencies.len())
    }

    /// Frequencies of a configuration.
    pub fn new(config: &ModelConfig) -> Self {
        let half = config.head_dim / 2;
        let base: Vec<f32> = (0..half)
            .map(|j| 1.0 / config.rope_theta.powf(2.0 * j as f32 / config.head_dim as f32))
            .collect();
        let inverse_frequencies = match &config.rope_scaling {
            RopeScaling::None => base,
            RopeScaling::Linear { factor } => base.iter().map(|f| f / factor).collect(),
            RopeScaling::Factors(factors) => base.iter().zip(factors).map(|(f, by)| f / by).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context_tokens } => {
                let context = *original_context_tokens as f32;
                base.iter()
                    .map(|&f| llama3_frequency(f, *factor, *low_freq_factor, *high_freq_factor, context))
                    .collect()
            }
        };
        Self { inverse_frequencies }
    }

    /// Radians per position, `[d / 2]`.
    pub fn inverse_frequencies(&self) -> &[f32] {
        &self.inverse_frequencies
    }

    /// Cosines and sines of positions: each `[positions][d / 2]`.
    pub fn table(&self, positions: impl IntoIterator<Item = usize>) -> RopeTable {
        let mut table = RopeTable { half: self.inverse_frequencies.len(), cos: Vec::new(), sin: Vec::new() };
        for position in positions {
            // The angle is rounded to f32 before the cosine, as in the models' training code.
            let angles = self.inverse_frequencies.iter().map(|f| position as f32 * f);
            for angle in angles {
                table.cos.push(angle.cos());
                table.sin.push(angle.sin());
            }
        }
        table
    }
}

/// Frequency of Llama 3.1's scaling: by wavelength divided, kept, or between
/// (`rope_type: llama3` of the Llama 3.1 release).
fn llama3_frequency(f: f32, factor: f32, low: f32, high: f32, context: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / f;
    if wavelength < context / high {
        f
    } else if wavelength > context / low {
        f / factor
    } else {
        let smooth = (context / wavelength - low) / (high - low);
        (1.0 - smooth) * f / factor + smooth * f
    }
}

/// Cosines and sines of some positions.
#[derive(Debug, Clone)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// The rotations back.
    #[must_use]
    pub fn inverse(mut self) -> Self {
        self.sin.iter_mut().for_each(|sin| *sin = -*sin);
        self
    }

    /// Rotates every head of token `index` of the table's positions: `heads` is `[heads][d]`.
    pub fn rotate(&self, index: usize, heads: &mut [f32]) {
        let range = index * self.half..(index + 1) * self.half;
        Kernels::best().rope_halves(heads, 2 * self.half, &self.cos[range.clone()], &self.sin[range]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::tiny_config;

    #[test]
    fn llama3_scaling_keeps_short_waves_divides_long_ones_and_ramps_between() {
        let mut config = tiny_config();
        config.head_dim = 128;
        config.rope_theta = 500_000.0;
        let plain = Rope::new(&config);
        config.rope_scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context_tokens: 8192,
        };
        let scaled = Rope::new(&config);
        let (mut kept, mut divided, mut between) = (0, 0, 0);
        for (f, g) in plain.inverse_frequencies().iter().zip(scaled.inverse_frequencies()) {
            let wavelength = 2.0 * std::f64::consts::PI / f64::from(*f);
            let ratio = f64::from(f / g);
            if wavelength < 2048.0 {
                assert_eq!(f, g);
                kept += 1;
            } else if wavelength > 8192.0 {
                assert!((ratio - 8.0).abs() < 1e-4);
                divided += 1;
            } else {
                assert!(ratio > 1.0 && ratio < 8.0, "{ratio}");
                between += 1;
            }
        }
        assert!(kept > 0 && divided > 0 && between > 0);
    }

    #[test]
    fn the_inverse_turns_back() {
        let config = tiny_config();
        let rope = Rope::new(&config);
        let q: Vec<f32> = (0..config.head_dim).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut turned = q.clone();
        rope.table([1234]).rotate(0, &mut turned);
        assert!(turned.iter().zip(&q).any(|(a, b)| (a - b).abs() > 0.1));
        rope.table([1234]).inverse().rotate(0, &mut turned);
        assert!(turned.iter().zip(&q).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn a_rotation_keeps_the_length_and_depends_on_the_distance_only() {
        let config = tiny_config();
        let rope = Rope::new(&config);
        let q: Vec<f32> = (0..config.head_dim).map(|i| (i as f32 * 0.7).sin()).collect();
        let k: Vec<f32> = (0..config.head_dim).map(|i| (i as f32 * 1.3).cos()).collect();
        let dot = |m: usize, n: usize| -> f32 {
            let table = rope.table([m, n]);
            let (mut a, mut b) = (q.clone(), k.clone());
            table.rotate(0, &mut a);
            table.rotate(1, &mut b);
            a.iter().zip(&b).map(|(x, y)| x * y).sum()
        };
        assert!((dot(17, 5) - dot(112, 100)).abs() < 1e-4);
        assert!((dot(17, 5) - dot(17, 6)).abs() > 1e-3);
    }
}
