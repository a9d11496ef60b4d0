//! Modules and kernels: an image is known by the marker of the source that it was made from, and runs as the same
//! source compiled for this processor.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;

use kvoyant_kernels::cuda::{MARKER, SOURCES, Source};

use crate::contexts::current;
use crate::driver::{Driver, call, new_handle};
use crate::ffi::{Code, In, Out, Outcome};
use crate::streams;
use crate::work::Work;

/// Images made by this driver's compiler begin with this, the length of the whole as eight bytes, and a zero.
pub(crate) const IMAGE_MAGIC: &[u8; 8] = b"SOFTCUBN";

/// Bytes before the marker in such an image.
const IMAGE_HEAD: usize = 16;

/// Longest image that is looked through.
const IMAGE_MAX: usize = 64 << 20;

/// What the guard returns for a memory access that leads nowhere.
const FAULT: c_int = 1000;

#[repr(C)]
struct Entry {
    source: *const c_char,
    name: *const c_char,
    params_bytes: usize,
}

unsafe extern "C" {
    fn kv_shim_entries(count: *mut usize) -> *const Entry;
    fn kv_guard_run(
        index: usize,
        params: *const c_void,
        grid: *const u32,
        block: *const u32,
        shared_bytes: usize,
        address: *mut u64,
    ) -> c_int;
}

/// A loaded image.
#[derive(Debug)]
pub(crate) struct Module {
    source: &'static Source,
}

/// A kernel of a loaded image.
#[derive(Debug)]
pub(crate) struct Function {
    module: u64,
    name: String,
    index: usize,
    params_bytes: usize,
}

/// A kernel and all that it is to run with.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    name: String,
    index: usize,
    params: Vec<u64>,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: usize,
}

impl Launch {
    /// Runs it to its end; a kernel that fails ends the context.
    pub(crate) fn run(&self, driver: &Driver) {
        if let Some(code) = driver.faults.strikes("launch-failure") {
            driver.fail(code.unwrap_or(Code::LAUNCH_FAILED));
            return;
        }
        let (params, grid, block) = (self.params.as_ptr().cast(), self.grid.as_ptr(), self.block.as_ptr());
        let mut address = 0;
        // SAFETY: the parameters are as many bytes as the kernel takes and live on; an access that leads nowhere is
        // caught, and what the addresses in them point to is the launcher's word, as on a card.
        let result =
            unsafe { kv_guard_run(self.index, params, grid, block, self.shared_bytes, &raw mut address) };
        let (what, code) = match result {
            0 => return,
            FAULT => (format!("touched {address:#x}, where nothing is"), Code::ILLEGAL_ADDRESS),
            code => (format!("failed with the shim's code {code}"), Code::LAUNCH_FAILED),
        };
        driver.violations.add("cuLaunchKernel", &format!("kernel {} {what}", self.name));
        driver.fail(code);
    }
}

/// An image for a known source, as this driver's compiler makes it.
pub(crate) fn image_of(source: &Source) -> Vec<u8> {
    let marker = format!("{MARKER}{}", source.hash());
    let mut image = IMAGE_MAGIC.to_vec();
    image.extend_from_slice(&((IMAGE_HEAD + marker.len() + 1) as u64).to_le_bytes());
    image.extend_from_slice(marker.as_bytes());
    image.push(0);
    image
}

/// The source whose marker is in a text or an image.
pub(crate) fn source_in(bytes: &[u8]) -> Option<&'static Source> {
    let marker = MARKER.as_bytes();
    let found = bytes.windows(marker.len() + 64).filter(|window| window.starts_with(marker));
    let hashes: Vec<&[u8]> = found.map(|window| &window[marker.len()..]).collect();
    SOURCES.iter().find(|source| hashes.contains(&source.hash().as_bytes()))
}

/// The bytes of an image, whose length stands in its own head: this compiler's, or an ELF file's.
fn image_bytes(image: In<u8>) -> Outcome<&'static [u8]> {
    if image.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: every image that a driver takes is longer than its head of 64 bytes, but for this compiler's, whose
    // marker alone is longer.
    let head = unsafe { image.bytes(64) };
    let word = |at: usize| head[at..at + 8].try_into().map_or(0, u64::from_le_bytes) as usize;
    let half = |at: usize| usize::from(u16::from_le_bytes([head[at], head[at + 1]]));
    let bytes = if head.starts_with(IMAGE_MAGIC) {
        word(8)
    } else if head.starts_with(b"\x7fELF") {
        // The section table is the last thing in a cubin.
        word(40).saturating_add(half(58) * half(60))
    } else {
        return Err(Code::INVALID_IMAGE);
    };
    if !(IMAGE_HEAD..=IMAGE_MAX).contains(&bytes) {
        return Err(Code::INVALID_IMAGE);
    }
    // SAFETY: an image has the length that its head says, and is used during the call only.
    Ok(unsafe { image.bytes(bytes) })
}

fn load(name: &'static str, module: Out<u64>, image: In<u8>) -> u32 {
    call(name, |driver| {
        current(driver)?;
        let source = source_in(image_bytes(image)?).ok_or(Code::NO_BINARY_FOR_GPU)?;
        let handle = new_handle();
        driver.modules.insert(handle, Module { source });
        module.set(handle)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuModuleLoadData(module: Out<u64>, image: In<u8>) -> u32 {
    load("cuModuleLoadData", module, image)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuModuleLoadDataEx(
    module: Out<u64>,
    image: In<u8>,
    _count: u32,
    _options: In<u32>,
    _values: In<u64>,
) -> u32 {
    load("cuModuleLoadDataEx", module, image)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuModuleUnload(module: u64) -> u32 {
    call("cuModuleUnload", |driver| {
        driver.modules.take(driver, "cuModuleUnload", module)?;
        for (handle, function) in driver.functions.all() {
            if function.module == module {
                driver.functions.take(driver, "cuModuleUnload", handle)?;
            }
        }
        Ok(())
    })
}

/// Where the kernel of a source stands among those that were compiled, and the bytes of its parameter.
fn find_entry(source: &str, name: &str) -> Option<(usize, usize)> {
    let mut count = 0;
    // SAFETY: the shim gives an array of as many entries as it counts, which live for ever and whose names end in zeros.
    let entries = unsafe {
        let first = kv_shim_entries(&raw mut count);
        std::slice::from_raw_parts(first, count)
    };
    let is = |text: *const c_char, wanted: &str| {
        // SAFETY: as above.
        let text = unsafe { CStr::from_ptr(text) };
        text.to_bytes() == wanted.as_bytes()
    };
    entries.iter().enumerate().find_map(|(index, entry)| {
        (is(entry.source, source) && is(entry.name, name)).then_some((index, entry.params_bytes))
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuModuleGetFunction(function: Out<u64>, module: u64, name: In<c_char>) -> u32 {
    call("cuModuleGetFunction", |driver| {
        let loaded = driver.modules.get(driver, "cuModuleGetFunction", module)?;
        let name = name.text()?;
        if !loaded.source.entries().contains(&name) {
            return Err(Code::NOT_FOUND);
        }
        let (index, params_bytes) = find_entry(loaded.source.name(), name).ok_or(Code::NOT_FOUND)?;
        let handle = new_handle();
        driver.functions.insert(handle, Function { module, name: name.to_owned(), index, params_bytes });
        function.set(handle)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuModuleGetGlobal_v2(
    _to: Out<u64>,
    _bytes: Out<usize>,
    module: u64,
    _: In<c_char>,
) -> u32 {
    call("cuModuleGetGlobal_v2", |driver| {
        // Kernels here have no globals but the marker, which nobody reads.
        driver.modules.get(driver, "cuModuleGetGlobal_v2", module)?;
        Err(Code::NOT_FOUND)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuFuncGetAttribute(value: Out<i32>, attribute: u32, function: u64) -> u32 {
    call("cuFuncGetAttribute", |driver| {
        driver.functions.get(driver, "cuFuncGetAttribute", function)?;
        value.set(match attribute {
            0 => 1024,     // MAX_THREADS_PER_BLOCK
            1..=3 => 0,    // SHARED_SIZE_BYTES, CONST_SIZE_BYTES, LOCAL_SIZE_BYTES
            4 => 32,       // NUM_REGS
            5 | 6 => 90,   // PTX_VERSION, BINARY_VERSION
            8 => 48 << 10, // MAX_DYNAMIC_SHARED_SIZE_BYTES
            7 | 9..=15 => 0,
            _ => return Err(Code::INVALID_VALUE),
        })
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuFuncSetAttribute(function: u64, attribute: u32, value: i32) -> u32 {
    call("cuFuncSetAttribute", |driver| {
        driver.functions.get(driver, "cuFuncSetAttribute", function)?;
        match attribute {
            8 if (0..=227 << 10).contains(&value) => Ok(()),
            9 if (-1..=100).contains(&value) => Ok(()),
            _ => Err(Code::INVALID_VALUE),
        }
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: Out<i32>,
    function: u64,
    threads: i32,
    _shared_bytes: usize,
) -> u32 {
    call("cuOccupancyMaxActiveBlocksPerMultiprocessor", |driver| {
        driver.functions.get(driver, "cuOccupancyMaxActiveBlocksPerMultiprocessor", function)?;
        if threads <= 0 {
            return Err(Code::INVALID_VALUE);
        }
        blocks.set((2048 / threads).min(32))
    })
}

/// Copies the one structure that kernels here take, out of the launcher's list of parameters.
fn parameters(params: In<In<u8>>, bytes: usize) -> Outcome<Vec<u64>> {
    let first = params.get()?;
    if first.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    let mut words = vec![0_u64; bytes.div_ceil(8)];
    // SAFETY: the launcher gives a parameter of the kernel's size; the words have room for it.
    unsafe {
        let from = first.bytes(bytes);
        words.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(from.as_ptr(), bytes);
    }
    Ok(words)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuLaunchKernel(
    function: u64,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    shared_bytes: u32,
    stream: u64,
    params: In<In<u8>>,
    extra: In<u64>,
) -> u32 {
    call("cuLaunchKernel", |driver| {
        let function = driver.functions.get(driver, "cuLaunchKernel", function)?;
        let stream = streams::of(driver, "cuLaunchKernel", stream)?;
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let threads: u64 = block.iter().map(|side| u64::from(*side)).product();
        let legal = grid_y <= 65_535 && grid_z <= 65_535 && block_z <= 64 && (1..=1024).contains(&threads);
        if !legal || grid.contains(&0) || shared_bytes > 227 << 10 || !extra.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let params = parameters(params, function.params_bytes)?;
        let (name, index) = (function.name.clone(), function.index);
        let launch = Launch { name, index, params, grid, block, shared_bytes: shared_bytes as usize };
        stream.submit(driver, "cuLaunchKernel", &Work::Kernel(Arc::new(launch)))
    })
}
