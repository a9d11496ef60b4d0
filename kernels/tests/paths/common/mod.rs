//! What the tests share: values from a seed, rows in memory, paths to compare.

use kvoyant_kernels::{AttendScratch, Dtype, Kernels, Path, Run};

/// The specification.
pub(crate) fn scalar() -> Kernels {
    Kernels::on(Path::Scalar).expect("the scalar path is everywhere")
}

/// Every path of this machine.
pub(crate) fn paths() -> impl Iterator<Item = Kernels> {
    Path::available().into_iter().map(|path| Kernels::on(path).expect("an available path"))
}

/// Reproducible values (an xorshift generator), uneven in size, of both signs.
pub(crate) struct Draw(u64);

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Within ±`size`, denser near 0.
    pub(crate) fn value(&mut self, size: f32) -> f32 {
        let unit = (self.bits() & 0xff_ffff) as f32 / 8_388_608.0 - 1.0;
        unit * unit.abs() * size
    }

    pub(crate) fn values(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| self.value(size)).collect()
    }
}

/// Values as stored bytes that begin `skew` bytes into the vector.
pub(crate) fn stored(dtype: Dtype, values: &[f32], skew: usize) -> Vec<u8> {
    let mut bytes = vec![0; skew + values.len() * dtype.bytes()];
    scalar().from_f32(dtype, values, &mut bytes[skew..]);
    bytes
}

/// Values after rounding to a storage type.
pub(crate) fn rounded(dtype: Dtype, values: &[f32]) -> Vec<f32> {
    let mut back = vec![0.0; values.len()];
    scalar().to_f32(dtype, &stored(dtype, values, 0), &mut back);
    back
}

/// Cuts `rows` consecutive rows into runs, at places drawn.
pub(crate) fn cut(draw: &mut Draw, bytes: &[u8], rows: usize, row_bytes: usize) -> Vec<Run> {
    assert!(bytes.len() >= rows * row_bytes);
    let mut runs = Vec::new();
    let mut first = 0;
    while first < rows {
        // Empty runs are allowed, too.
        let n = draw.below(7).min(rows - first);
        runs.push(Run::new(bytes[first * row_bytes..].as_ptr(), n));
        first += n;
    }
    runs
}

/// Attention over runs whose rows live as long as the borrow of `bytes`, with `lse`.
pub(crate) fn attend(
    kernels: Kernels,
    dtype: Dtype,
    queries: &[f32],
    d: usize,
    scale: f32,
    runs: &[Run],
) -> (Vec<f32>, Vec<f32>) {
    let group = queries.len() / d;
    let (mut out, mut lse) = (vec![f32::NAN; group * d], vec![f32::NAN; group]);
    let mut scratch = AttendScratch::default();
    // SAFETY: the tests cut runs from vectors that outlive the call.
    unsafe { kernels.attend(dtype, queries, group, d, scale, runs, &mut scratch, &mut out, &mut lse) };
    (out, lse)
}

/// That two vectors differ by no more than `tolerance`, relative to the larger of 1 and the value.
pub(crate) fn close(what: &str, a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let same = a == b || (a - b).abs() <= tolerance * b.abs().max(1.0);
        assert!(same, "{what}: {a} and {b} at {i} differ by more than {tolerance}");
    }
}
