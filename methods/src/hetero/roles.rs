//! Roles of KV heads, and how a layer's budget is shared among them.

use crate::artifact::TensorArtifact;
use crate::error::MethodError;
use crate::shape::Shape;

/// What a KV head is to the others of its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Stable: chooses once.
    Anchor = 0,
    /// Chooses as its pivot does.
    Satellite = 1,
    /// Neither stable nor like another.
    Volatile = 2,
    /// Chooses for its satellites too.
    Pivot = 3,
}

impl Role {
    fn of(value: f32) -> Option<Self> {
        [Self::Anchor, Self::Satellite, Self::Volatile, Self::Pivot]
            .into_iter()
            .find(|role| value == f32::from(*role as u8))
    }
}

/// One KV head, as the artifact has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Head {
    pub(super) role: Role,
    /// The head that chooses for it.
    pub(super) pivot: usize,
    pub(super) stability: f32,
    /// Its part of the layer's budget, to those of the others.
    pub(super) weight: f32,
}

/// How parts of the budget follow from roles.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Weights {
    /// Anchors and satellites by `1/(stability + 10⁻⁶)`, the others as much as the most of those.
    #[default]
    Stability,
    /// All alike.
    Equal,
    /// By role: anchor, satellite, volatile, pivot.
    Roles([f32; 4]),
}

/// The least stability that counts: no head gets more than so many times the budget of a wholly stable one.
const LEAST_STABILITY: f32 = 0.125;

impl std::fmt::Display for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stability => f.write_str("stability"),
            Self::Equal => f.write_str("equal"),
            Self::Roles([anchor, satellite, volatile, pivot]) => {
                write!(f, "{anchor}/{satellite}/{volatile}/{pivot}")
            }
        }
    }
}

impl std::str::FromStr for Weights {
    type Err = std::num::ParseFloatError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "stability" => Ok(Self::Stability),
            "equal" => Ok(Self::Equal),
            _ => {
                let numbers = text.split('/').map(str::parse).collect::<Result<Vec<f32>, _>>()?;
                // What is not four numbers is none: its check refuses it.
                Ok(Self::Roles(numbers.try_into().unwrap_or([f32::NAN; 4])))
            }
        }
    }
}

impl Weights {
    /// Whether each role gets something.
    pub(crate) fn is_valid(&self) -> bool {
        match self {
            Self::Roles(weights) => weights.iter().all(|weight| weight.is_finite() && *weight > 0.0),
            _ => true,
        }
    }

    /// Fills in the weights of a layer's heads.
    pub(super) fn fill(self, heads: &mut [Head]) {
        let inverse = |head: &Head| 1.0 / (head.stability.max(LEAST_STABILITY) + 1e-6);
        let most = heads.iter().map(inverse).fold(0.0, f32::max);
        for head in heads {
            head.weight = match self {
                Self::Equal => 1.0,
                Self::Roles(weights) => weights[head.role as usize],
                Self::Stability => match head.role {
                    Role::Anchor | Role::Satellite => inverse(head),
                    Role::Volatile | Role::Pivot => most,
                },
            };
        }
    }
}

/// What each head of each layer gets of a budget by an artifact's roles, `[layers][kv_heads]`: 1 in the mean of a layer.
///
/// # Errors
/// The artifact holds roles that do not fit together.
pub(crate) fn parts(
    artifact: &TensorArtifact,
    shape: &Shape,
    by: Weights,
) -> Result<Vec<Vec<f32>>, MethodError> {
    let mut layers = read(artifact, shape)?;
    let parts = layers.iter_mut().map(|heads| {
        by.fill(heads);
        let mean = heads.iter().map(|head| head.weight).sum::<f32>() / heads.len().max(1) as f32;
        heads.iter().map(|head| head.weight / mean).collect()
    });
    Ok(parts.collect())
}

/// Heads without a profile: each volatile, and for itself.
pub(super) fn none(shape: &Shape) -> Vec<Vec<Head>> {
    let head = |pivot| Head { role: Role::Volatile, pivot, stability: 0.0, weight: 1.0 };
    vec![(0..shape.kv_heads).map(head).collect(); shape.layers]
}

/// The heads of an artifact, `[layers][kv_heads]`.
pub(super) fn read(artifact: &TensorArtifact, shape: &Shape) -> Result<Vec<Vec<Head>>, MethodError> {
    let size = [shape.layers, shape.kv_heads];
    let [role, pivot, stability] = ["role", "pivot", "stability"].map(|name| artifact.tensor(name, &size));
    let (role, pivot, stability) = (role?, pivot?, stability?);
    let mut layers = Vec::new();
    for layer in 0..shape.layers {
        let mut heads = Vec::new();
        for kv_head in 0..shape.kv_heads {
            let at = layer * shape.kv_heads + kv_head;
            let bad = |what: &str, value: f32| MethodError::ArtifactFormat {
                reason: format!(
                    "{what} of layer {layer}, KV head {kv_head} of the roles artifact is {value}"
                ),
            };
            let role = Role::of(role[at]).ok_or_else(|| bad("the role", role[at]))?;
            let chooser = (0..shape.kv_heads).find(|head| *head as f32 == pivot[at]);
            let chooser = chooser.ok_or_else(|| bad("the pivot", pivot[at]))?;
            if (role == Role::Satellite) == (chooser == kv_head) {
                return Err(bad("the pivot does not fit the role: that", pivot[at]));
            }
            if !(0.0..=1.0).contains(&stability[at]) {
                return Err(bad("the stability", stability[at]));
            }
            heads.push(Head { role, pivot: chooser, stability: stability[at], weight: 1.0 });
        }
        let astray =
            heads.iter().any(|head| head.role == Role::Satellite && heads[head.pivot].role != Role::Pivot);
        if astray {
            return Err(MethodError::ArtifactFormat {
                reason: format!(
                    "a satellite of layer {layer} of the roles artifact has a pivot that is none"
                ),
            });
        }
        layers.push(heads);
    }
    Ok(layers)
}

/// Shares `budget` rows per head of a layer by the heads' weights: the sum is `budget · heads`, and no head gets more than `most`, which is at
/// least `budget`, nor less than one row.
pub(super) fn share(budget: usize, most: usize, heads: &[Head], out: &mut Vec<usize>) {
    let budget = budget.min(most);
    out.clear();
    out.resize(heads.len(), usize::from(budget > 0));
    let mut left = budget.saturating_sub(1) * heads.len();
    while left > 0 {
        let open = |(_, rows): &(&Head, &mut usize)| **rows < most;
        let sum: f64 =
            heads.iter().zip(out.iter_mut()).filter(open).map(|(head, _)| f64::from(head.weight)).sum();
        let before = left;
        for (head, rows) in heads.iter().zip(out.iter_mut()).filter(open) {
            let part = (before as f64 * f64::from(head.weight) / sum) as usize;
            let part = part.min(most - *rows).min(left);
            *rows += part;
            left -= part;
        }
        if left == before {
            // Less than a row each: one by one, from the first head that has room.
            for rows in out.iter_mut().filter(|rows| **rows < most) {
                let one = left.min(1);
                *rows += one;
                left -= one;
            }
        }
    }
}
