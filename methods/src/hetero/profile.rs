//! Profiling: which KV heads keep their choice, and which choose alike.
//!
//! From the sets of best rows that each KV head had at every captured step, and at the end of the prompt:
//! overlap `O(a, b) = |a∩b| / min(|a|, |b|)`; a head's *stability* is the median over steps of `O(now, prompt)`; two heads'
//! *similarity* the median over steps of their overlap. Heads of a layer whose similarity reaches a threshold are neighbours. The head with
//! most unassigned neighbours becomes a *pivot* and they its *satellites*, until no head has any. Of the rest, stable ones are
//! *anchors* and the others *volatile*.

use std::collections::BTreeMap;

use crate::artifact::{ArtifactKind, Tensor, TensorArtifact};
use crate::error::MethodError;
use crate::shape::Fingerprint;

use super::roles::Role;

/// How to tell roles apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProfileOptions {
    /// A head at or above it is stable.
    pub stable: f32,
    /// Two heads at or above it choose alike.
    pub similar: f32,
}

impl Default for ProfileOptions {
    fn default() -> Self {
        Self { stable: 0.5, similar: 0.5 }
    }
}

/// What is known of one layer's KV heads.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerProfile {
    /// Role of each head.
    pub roles: Vec<Role>,
    /// Its pivot; itself where it has none.
    pub pivots: Vec<usize>,
    /// Its stability, in `[0, 1]`.
    pub stability: Vec<f32>,
}

/// Collects layer after layer.
#[derive(Debug, Clone, Default)]
pub struct Profile {
    options: ProfileOptions,
    layers: Vec<LayerProfile>,
}

/// `|a∩b| / min(|a|, |b|)` of two sorted sets; 1 where one is empty.
#[must_use]
pub fn overlap(a: &[u32], b: &[u32]) -> f32 {
    let least = a.len().min(b.len());
    if least == 0 {
        return 1.0;
    }
    let (mut i, mut j, mut common) = (0, 0, 0);
    while i < a.len() && j < b.len() {
        common += usize::from(a[i] == b[j]);
        let (x, y) = (a[i], b[j]);
        i += usize::from(x <= y);
        j += usize::from(y <= x);
    }
    common as f32 / least as f32
}

/// The median; of an even number the mean of the two in the middle; 1 of none.
fn median(mut values: Vec<f32>) -> f32 {
    values.sort_unstable_by(f32::total_cmp);
    match values.len() {
        0 => 1.0,
        count => f32::midpoint(values[(count - 1) / 2], values[count / 2]),
    }
}

/// Covers a graph with stars: gives for each node the centre of its star, itself where it is alone or a centre. `near` tells neighbours and is
/// symmetric. Of equal degrees the lowest node is the centre.
#[must_use]
pub fn stars(nodes: usize, near: impl Fn(usize, usize) -> bool) -> Vec<usize> {
    let mut centres: Vec<Option<usize>> = vec![None; nodes];
    loop {
        let open = |node: usize, centres: &[Option<usize>]| {
            (0..nodes)
                .filter(|other| *other != node && centres[*other].is_none() && near(node, *other))
                .count()
        };
        let degrees =
            (0..nodes).filter(|node| centres[*node].is_none()).map(|node| (open(node, &centres), node));
        let best = degrees.max_by_key(|(degree, node)| (*degree, std::cmp::Reverse(*node)));
        let Some((1.., centre)) = best else { break };
        centres[centre] = Some(centre);
        for (other, star) in centres.iter_mut().enumerate() {
            if star.is_none() && near(centre, other) {
                *star = Some(centre);
            }
        }
    }
    centres.into_iter().enumerate().map(|(node, centre)| centre.unwrap_or(node)).collect()
}

impl Profile {
    /// An empty profile.
    #[must_use]
    pub fn new(options: ProfileOptions) -> Self {
        Self { options, layers: Vec::new() }
    }

    /// Takes in the next layer: for each KV head its best rows at the end of the prompt, and for each step those of each KV head. Sets are
    /// sorted.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`] where a step has another number of heads, or the layer another than the one before.
    pub fn layer(
        &mut self,
        prompt: &[Vec<u32>],
        steps: &[Vec<Vec<u32>>],
    ) -> Result<&LayerProfile, MethodError> {
        let heads = prompt.len();
        let bad = |found: usize, wanted: usize| MethodError::ArtifactFormat {
            reason: format!(
                "the profile of layer {} has {found} KV heads where {wanted} are wanted",
                self.layers.len()
            ),
        };
        if let Some(step) = steps.iter().find(|step| step.len() != heads) {
            return Err(bad(step.len(), heads));
        }
        if let Some(before) =
            self.layers.first().map(|layer| layer.roles.len()).filter(|count| *count != heads)
        {
            return Err(bad(heads, before));
        }
        let over_steps =
            |of: &dyn Fn(&[Vec<u32>]) -> f32| median(steps.iter().map(|step| of(step)).collect());
        let stability: Vec<f32> =
            (0..heads).map(|head| over_steps(&|step| overlap(&prompt[head], &step[head]))).collect();
        let mut near = vec![false; heads * heads];
        for a in 0..heads {
            for b in a + 1..heads {
                let alike = over_steps(&|step| overlap(&step[a], &step[b])) >= self.options.similar;
                near[a * heads + b] = alike;
                near[b * heads + a] = alike;
            }
        }
        let pivots = stars(heads, |a, b| near[a * heads + b]);
        let roles = (0..heads).map(|head| match pivots[head] {
            pivot if pivot != head => Role::Satellite,
            _ if pivots.iter().enumerate().any(|(other, pivot)| other != head && *pivot == head) => {
                Role::Pivot
            }
            _ if stability[head] >= self.options.stable => Role::Anchor,
            _ => Role::Volatile,
        });
        self.layers.push(LayerProfile { roles: roles.collect(), pivots, stability });
        Ok(&self.layers[self.layers.len() - 1])
    }

    /// The artifact of all layers.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`] without any layer.
    pub fn finish(&self, model: Fingerprint) -> Result<TensorArtifact, MethodError> {
        let heads = self.layers.first().map_or(0, |layer| layer.roles.len());
        if heads == 0 {
            return Err(MethodError::ArtifactFormat { reason: "the profile has no layer".into() });
        }
        let tensor = |value: &dyn Fn(&LayerProfile, usize) -> f32| Tensor {
            shape: vec![self.layers.len(), heads],
            values: self
                .layers
                .iter()
                .flat_map(|layer| (0..heads).map(move |head| value(layer, head)))
                .collect(),
        };
        let tensors = BTreeMap::from([
            ("role".to_owned(), tensor(&|layer, head| f32::from(layer.roles[head] as u8))),
            ("pivot".to_owned(), tensor(&|layer, head| layer.pivots[head] as f32)),
            ("stability".to_owned(), tensor(&|layer, head| layer.stability[head])),
        ]);
        let settings = BTreeMap::from([
            ("stable".to_owned(), self.options.stable.to_string()),
            ("similar".to_owned(), self.options.similar.to_string()),
        ]);
        TensorArtifact::new(ArtifactKind::Roles, model, tensors, settings)
    }
}
