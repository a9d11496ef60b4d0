//! Which weights a model has, as far as queries and keys go: what a calibration artifact belongs to.

use kvoyant_engine::Model;
use kvoyant_methods::Fingerprint;
use sha2::{Digest, Sha256};

/// The first 128 bits of a SHA-256 over the shape, the rotary base, all attention norms, and the query and key
/// projections of the first, middle and last layer. Those three are enough to tell fine-tunes apart, and a large
/// model's other layers are gigabytes that need not be read again.
pub(crate) fn of(model: &Model) -> Fingerprint {
    let config = model.config();
    let mut hash = Sha256::new();
    for number in [config.layers, config.query_heads, config.kv_heads, config.head_dim, config.hidden_size] {
        hash.update((number as u64).to_le_bytes());
    }
    hash.update(f64::from(config.rope_theta).to_le_bytes());
    let mut floats = |values: &[f32]| {
        for value in values {
            hash.update(value.to_le_bytes());
        }
    };
    for layer in 0..config.layers {
        floats(model.attention_norm(layer));
    }
    for layer in [0, config.layers / 2, config.layers - 1] {
        for projection in [model.query_projection(layer), model.key_projection(layer)] {
            floats(&projection.weight());
            floats(projection.bias().unwrap_or_default());
        }
    }
    let sum = hash.finalize();
    let mut first = [0; 16];
    first.copy_from_slice(&sum[..16]);
    Fingerprint(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvoyant_engine::synthetic;

    #[test]
    fn the_same_weights_have_one_fingerprint_and_others_another() {
        assert_eq!(of(&synthetic::tiny(1)), of(&synthetic::tiny(1)));
        assert_ne!(of(&synthetic::tiny(1)), of(&synthetic::tiny(2)));
    }
}
