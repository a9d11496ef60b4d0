//! The network: one for all layers and heads, over images of time × blocks.
//!
//! `y_c = bias + 1/H · Σ_t z_{t,c}`, `z_{t,c} = Σ_o head_o · relu(conv2(relu(conv1(x))))_{o,t,c}`: the mean over time and the 1×1
//! convolution at the end are one sum of scalars, so that one number per block, not 32, is all that has to be kept of the rows.

use std::ops::Range;

use crate::artifact::TensorArtifact;
use crate::error::MethodError;

/// Rows of an image, the oldest first; fewer while there are fewer.
pub const HISTORY: usize = 64;
/// Channels after the first convolution.
pub(super) const MIDDLE: usize = 16;
/// Channels after the second convolution.
pub(super) const WIDE: usize = 32;
/// Weights of a 3×3 window: time, then blocks.
pub(super) const TAPS: usize = 9;

const CONV1: usize = 0;
const BIAS1: usize = CONV1 + TAPS * MIDDLE;
const CONV2: usize = BIAS1 + MIDDLE;
const BIAS2: usize = CONV2 + TAPS * MIDDLE * WIDE;
const HEAD: usize = BIAS2 + WIDE;
const BIAS: usize = HEAD + WIDE;
/// All parameters: 4,833.
pub const PARAMETERS: usize = BIAS + 1;

/// The tensors of an artifact, by name and shape, in the order `[out, in, time, block]`.
pub(super) const TENSORS: [(&str, &[usize]); 6] = [
    ("conv1.weight", &[MIDDLE, 1, 3, 3]),
    ("conv1.bias", &[MIDDLE]),
    ("conv2.weight", &[WIDE, MIDDLE, 3, 3]),
    ("conv2.bias", &[WIDE]),
    ("head.weight", &[WIDE]),
    ("head.bias", &[1]),
];

/// Parameters of the network in one piece: `[9][16]`, 16 biases, `[9][16][32]`, 32 biases, 32 weights of the head and its
/// bias. Output channels come last, so that one input value meets a run of weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Network(Vec<f32>);

impl Network {
    /// From [`PARAMETERS`] values in that order.
    ///
    /// # Panics
    /// With another number of values.
    #[must_use]
    pub fn new(values: Vec<f32>) -> Self {
        assert_eq!(values.len(), PARAMETERS, "a network has {PARAMETERS} parameters");
        Self(values)
    }

    /// From an artifact's tensors.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`]: one of them is missing or of another shape.
    pub fn from_artifact(artifact: &TensorArtifact) -> Result<Self, MethodError> {
        let mut network = Self(vec![0.0; PARAMETERS]);
        for (at, (name, shape)) in TENSORS.into_iter().enumerate() {
            let values = artifact.tensor(name, shape)?;
            for (index, value) in values.iter().enumerate() {
                network.0[Self::place(at, index)] = *value;
            }
        }
        Ok(network)
    }

    /// Where value `index` of tensor `at` of [`TENSORS`] lies in one piece.
    pub(super) fn place(at: usize, index: usize) -> usize {
        let (window, tap) = (index / TAPS, index % TAPS);
        match at {
            0 => CONV1 + tap * MIDDLE + window,
            1 => BIAS1 + index,
            2 => CONV2 + (tap * MIDDLE + window % MIDDLE) * WIDE + window / MIDDLE,
            3 => BIAS2 + index,
            4 => HEAD + index,
            _ => BIAS,
        }
    }

    /// All parameters.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.0
    }

    pub(super) fn values_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }

    pub(super) fn conv1(&self) -> &[[f32; MIDDLE]] {
        self.0[CONV1..BIAS1].as_chunks().0
    }

    pub(super) fn bias1(&self) -> &[f32; MIDDLE] {
        &self.0[BIAS1..CONV2].as_chunks().0[0]
    }

    pub(super) fn conv2(&self) -> &[[f32; WIDE]] {
        self.0[CONV2..BIAS2].as_chunks().0
    }

    pub(super) fn bias2(&self) -> &[f32; WIDE] {
        &self.0[BIAS2..HEAD].as_chunks().0[0]
    }

    pub(super) fn head(&self) -> &[f32; WIDE] {
        &self.0[HEAD..BIAS].as_chunks().0[0]
    }

    /// What is added to the mean over time.
    #[must_use]
    pub fn bias(&self) -> f32 {
        self.0[BIAS]
    }

    /// `relu(conv1)` of one place: `at(dt, dc)` gives the image around it, 0 outside.
    fn middle(&self, mut at: impl FnMut(usize, usize) -> f32) -> [f32; MIDDLE] {
        let mut sums = *self.bias1();
        for (tap, weights) in self.conv1().iter().enumerate() {
            axpy(&mut sums, at(tap / 3, tap % 3), weights);
        }
        sums.map(|sum| sum.max(0.0))
    }

    /// `z` of row `time` for `columns`, one after the other, to `put`. `column(c)` gives a block's values, of which `image.row`
    /// says where the row of a time lies. Blocks outside `image.columns` and rows outside `image.times` are padding.
    pub(super) fn row<const ROWS: usize>(
        &self,
        image: &Image,
        time: u64,
        columns: Range<usize>,
        mut column: impl FnMut(usize, &mut [f32; ROWS]),
        mut put: impl FnMut(usize, f32),
    ) {
        // Of the last three blocks: the values of five rows and, of three rows, what the first convolution makes of them.
        let mut values = [[0.0_f32; 5]; 3];
        let mut middles = [[[0.0_f32; MIDDLE]; 3]; 3];
        let mut buffer = [0.0; ROWS];
        let mut load = |c: Option<usize>, values: &mut [f32; 5]| {
            values.fill(0.0);
            let Some(c) = c.filter(|c| image.columns.contains(c)) else { return };
            column(c, &mut buffer);
            for (back, value) in values.iter_mut().enumerate() {
                let at = (time + back as u64).checked_sub(2).filter(|at| image.times.contains(at));
                *value = at.map_or(0.0, |at| buffer[(at % ROWS as u64) as usize]);
            }
        };
        if columns.is_empty() {
            return;
        }
        let start = columns.start;
        // The output of block c needs the middles of c − 1 to c + 1, and those the values of c − 2 to c + 2.
        load(start.checked_sub(2), &mut values[0]);
        load(start.checked_sub(1), &mut values[1]);
        for step in 0..columns.len() + 2 {
            // The middle of block `start + step − 1` is made here.
            load(Some(start + step), &mut values[(step + 2) % 3]);
            let middle = &mut middles[step % 3];
            let inside = (start + step).checked_sub(1).is_some_and(|c| image.columns.contains(&c));
            for (dt, middle) in middle.iter_mut().enumerate() {
                let there = (time + dt as u64).checked_sub(1).is_some_and(|at| image.times.contains(&at));
                *middle = if inside && there {
                    self.middle(|tap, dc| values[(step + dc) % 3][dt + tap])
                } else {
                    [0.0; MIDDLE]
                };
            }
            if let Some(at) = step.checked_sub(2) {
                let mut sums = *self.bias2();
                for (tap, weights) in self.conv2().chunks_exact(MIDDLE).enumerate() {
                    let middle = &middles[(at + tap % 3) % 3][tap / 3];
                    for (x, weights) in middle.iter().zip(weights) {
                        // Half of them are 0 after the ReLU.
                        if *x != 0.0 {
                            axpy(&mut sums, *x, weights);
                        }
                    }
                }
                let z = sums.iter().zip(self.head()).map(|(sum, head)| sum.max(0.0) * head).sum();
                put(start + at, z);
            }
        }
    }
}

/// What part of a history the network sees.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Image {
    /// Its blocks.
    pub(super) columns: Range<usize>,
    /// Its rows, counted from the first ever.
    pub(super) times: Range<u64>,
}

/// `sums += x · weights`.
pub(super) fn axpy<const N: usize>(sums: &mut [f32; N], x: f32, weights: &[f32; N]) {
    for (sum, weight) in sums.iter_mut().zip(weights) {
        *sum += x * weight;
    }
}
