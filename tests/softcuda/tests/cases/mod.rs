//! What every kernel must do, on whatever runs it: each case takes a [`Device`] and compares with the CPU's kernels.

pub(crate) mod attention;
pub(crate) mod codes;
pub(crate) mod copies;
pub(crate) mod graph;
pub(crate) mod selection;

use bytemuck::Pod;
use kvoyant_kernels::cuda::Launch;
use kvoyant_kernels::{Dtype, Kernels};

/// Memory that kernels can reach, and a way to run them.
pub(crate) trait Device {
    /// Device memory with this content, at a multiple of 16; kept as long as the device.
    fn upload(&mut self, bytes: &[u8]) -> u64;
    /// Host memory with this content that the device can read and write.
    fn upload_mapped(&mut self, bytes: &[u8]) -> u64;
    /// Reads memory that was uploaded.
    fn download(&mut self, address: u64, bytes: &mut [u8]);
    /// Writes memory that was uploaded.
    fn write(&mut self, address: u64, bytes: &[u8]);
    /// Runs a kernel and waits for its end.
    fn launch(&mut self, source: &str, entry: &str, params: &impl Pod, launch: Launch);

    /// As [`Device::launch`], and where the device has graphs, from one that is captured the first time that a kernel is launched with
    /// these parameters and replayed from then on.
    fn replay(&mut self, source: &str, entry: &str, params: &impl Pod, launch: Launch) {
        self.launch(source, entry, params, launch);
    }

    /// [`Device::upload`] of values.
    fn put<T: Pod>(&mut self, values: &[T]) -> u64 {
        self.upload(bytemuck::cast_slice(values))
    }

    /// [`Device::download`] of values.
    fn get<T: Pod>(&mut self, address: u64, n: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); n];
        self.download(address, bytemuck::cast_slice_mut(&mut values));
        values
    }
}

/// Values as they are stored.
pub(crate) fn stored(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.bytes()];
    Kernels::best().from_f32(dtype, values, &mut bytes);
    bytes
}

/// Sums in another order, and with fused products on some devices: equal up to 5·10⁻⁵, relative beyond 1.
pub(crate) fn assert_close(what: &str, got: &[f32], wanted: &[f32]) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    for (i, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let near = got == wanted || (got - wanted).abs() <= 5e-5 * wanted.abs().max(1.0);
        assert!(near, "{what}[{i}]: {got} instead of {wanted}");
    }
}

/// Numbers that look random and are the same each time.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// splitmix64.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Around 0, of variance 1.
    pub(crate) fn normal(&mut self, n: usize) -> Vec<f32> {
        let mut uniform = || (self.bits() >> 40) as f32 / (1 << 24) as f32;
        (0..n).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
    }
}
