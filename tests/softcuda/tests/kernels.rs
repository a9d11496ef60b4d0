//! The kernels of `kernels/cuda`, compiled for this processor and called without a driver, against the CPU's.

mod cases;

use std::ffi::{CStr, c_char, c_void};

use bytemuck::Pod;
use cases::Device;
use kvoyant_kernels::cuda::params::MergeParams;
use kvoyant_kernels::cuda::{Launch, SOURCES};
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
fn entries() -> Vec<(String, String, usize)> {
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
fn run(source: &str, name: &str, params: &impl Pod, launch: Launch) -> i32 {
    let entries = entries();
    let index = entries.iter().position(|entry| entry.0 == source && entry.1 == name).unwrap();
    assert_eq!(entries[index].2, size_of_val(params), "parameters of {name}");
    let (grid, block) = (<[u32; 3]>::from(launch.grid), <[u32; 3]>::from(launch.block));
    let params = std::ptr::from_ref(params).cast();
    // SAFETY: the parameters are of the kernel's type; the cases give addresses of memory that lives as long as the call.
    unsafe { kv_shim_run(index, params, grid.as_ptr(), block.as_ptr(), launch.shared_bytes as usize) }
}

/// This process, as a device: 16-byte vectors of memory at fixed places.
#[derive(Default)]
struct Shim {
    memory: Vec<Box<[u128]>>,
}

impl Device for Shim {
    fn upload(&mut self, bytes: &[u8]) -> u64 {
        let mut memory = vec![0_u128; bytes.len().div_ceil(16).max(1)].into_boxed_slice();
        bytemuck::cast_slice_mut(&mut memory)[..bytes.len()].copy_from_slice(bytes);
        let address = memory.as_mut_ptr() as u64;
        self.memory.push(memory);
        address
    }

    fn upload_mapped(&mut self, bytes: &[u8]) -> u64 {
        self.upload(bytes)
    }

    fn download(&mut self, address: u64, bytes: &mut [u8]) {
        // SAFETY: cases give addresses and lengths of what they uploaded, which is kept.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), bytes.len()) };
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        // SAFETY: as in `download`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
    }

    fn launch(&mut self, source: &str, entry: &str, params: &impl Pod, launch: Launch) {
        assert_eq!(run(source, entry, params, launch), 0, "{entry} on {launch:?}");
    }
}

/// One test for each case.
macro_rules! on_the_shim {
    ($($module:ident :: $case:ident),* $(,)?) => {
        $(#[test] fn $case() { cases::$module::$case(&mut Shim::default()); })*
    };
}

on_the_shim! {
    copies::runs_of_every_length_and_alignment_are_gathered_byte_for_byte,
    copies::quantised_rows_are_read_as_the_cpu_reads_them,
    attention::paged_attention_is_that_of_the_cpu_for_every_storage_type_dimension_and_group,
    attention::a_table_whose_status_is_another_is_not_read,
    attention::runs_that_lead_outside_are_left_out_and_told,
    attention::splits_of_one_head_merge_to_the_whole,
    selection::scores_bounds_and_distances_are_those_of_the_cpu,
    selection::the_best_scores_are_chosen_exactly_as_on_the_cpu,
    codes::scores_and_margins_of_codes_are_those_of_the_cpu_to_the_last_bit,
    codes::what_codes_leave_out_is_summed_as_on_the_cpu,
    graph::a_captured_kernel_follows_residency_and_position_from_replay_to_replay,
    graph::reports_go_round_a_mailbox_and_say_which_they_are,
}

#[test]
fn every_kernel_of_every_source_is_there() {
    let entries = entries();
    let wanted =
        SOURCES.iter().flat_map(|source| source.entries().iter().map(|entry| (source.name(), *entry)));
    let wanted: Vec<_> = wanted.collect();
    assert_eq!(entries.len(), wanted.len());
    for (source, entry) in wanted {
        assert!(entries.iter().any(|known| known.0 == source && known.1 == entry), "{entry} of {source}");
    }
}

#[test]
fn launches_that_no_device_would_take_are_refused() {
    let params = MergeParams::default();
    let launch = Launch { grid: (1, 1, 1), block: (128, 1, 1), shared_bytes: 0 };
    let code = |launch| run("merge", "lse_merge", &params, launch);
    for block in [(0, 1, 1), (1025, 1, 1), (32, 33, 1), (1, 1, 65)] {
        assert_eq!(code(Launch { block, ..launch }), 2);
    }
    assert_eq!(code(Launch { grid: (1, 0, 1), ..launch }), 2);
    assert_eq!(code(Launch { shared_bytes: 1 << 20, ..launch }), 2);
    // SAFETY: the shim looks at the index first.
    let unknown = unsafe { kv_shim_run(99, std::ptr::null(), [1; 3].as_ptr(), [1; 3].as_ptr(), 0) };
    assert_eq!(unknown, 1);
}
