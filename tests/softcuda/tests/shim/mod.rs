//! Calls the compiled kernels straight, without a driver.

use std::ffi::{CStr, c_char, c_void};

use bytemuck::Pod;
use kvoyant_kernels::Dtype;
use kvoyant_kernels::cuda::Launch;
use softcuda as _;

#[repr(C)]
struct Entry {
    source: *const c_char,
    name: *const c_char,
    params_bytes: usize,
}

unsafe extern "C" {
    fn kv_shim_entries(count: *mut usize) -> *const Entry;
    fn kv_shim_run(
        index: usize,
        params: *const c_void,
        grid: *const u32,
        block: *const u32,
        shared: usize,
    ) -> i32;
}

/// Source, name and bytes of parameters of every kernel.
pub(crate) fn entries() -> Vec<(String, String, usize)> {
    let mut count = 0;
    // SAFETY: the shim gives an array of `count` entries that live for ever, with names that end in a zero.
    unsafe {
        let first = kv_shim_entries(&raw mut count);
        let text = |text| CStr::from_ptr(text).to_str().unwrap().to_owned();
        std::slice::from_raw_parts(first, count)
            .iter()
            .map(|entry| (text(entry.source), text(entry.name), entry.params_bytes))
            .collect()
    }
}

/// Runs a kernel to its end; gives the shim's code.
pub(crate) fn run(source: &str, name: &str, params: &impl Pod, launch: Launch) -> i32 {
    let entries = entries();
    let index = entries.iter().position(|entry| entry.0 == source && entry.1 == name).unwrap();
    assert_eq!(entries[index].2, size_of_val(params), "parameters of {name}");
    let (grid, block) = (<[u32; 3]>::from(launch.grid), <[u32; 3]>::from(launch.block));
    let params = std::ptr::from_ref(params).cast();
    // SAFETY: the parameters are of the kernel's type; the tests give addresses of memory that lives as long as the call.
    unsafe { kv_shim_run(index, params, grid.as_ptr(), block.as_ptr(), launch.shared_bytes as usize) }
}

/// Runs a kernel that must succeed.
pub(crate) fn launch(source: &str, name: &str, params: &impl Pod, launch: Launch) {
    assert_eq!(run(source, name, params, launch), 0, "{name} on {launch:?}");
}

/// The address of a slice, as a kernel takes it.
pub(crate) fn address<T>(slice: &[T]) -> u64 {
    slice.as_ptr() as u64
}

/// Values as they are stored.
pub(crate) fn stored(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.bytes()];
    kvoyant_kernels::Kernels::best().from_f32(dtype, values, &mut bytes);
    bytes
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
