//! The compiler of kernels at run time: it knows the project's own sources by their markers, and no other.

use std::collections::HashMap;
use std::ffi::{CStr, c_char};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::driver::new_handle;
use crate::ffi::{In, Out};
use crate::modules::{image_of, source_in};

/// `nvrtcResult`.
const SUCCESS: u32 = 0;
const INVALID_INPUT: u32 = 3;
const INVALID_PROGRAM: u32 = 4;
const INVALID_OPTION: u32 = 5;
const COMPILATION: u32 = 6;

#[derive(Debug, Default)]
struct Program {
    name: String,
    text: String,
    log: String,
    image: Option<Vec<u8>>,
}

fn programs() -> MutexGuard<'static, HashMap<u64, Program>> {
    static PROGRAMS: OnceLock<Mutex<HashMap<u64, Program>>> = OnceLock::new();
    PROGRAMS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

fn with(program: u64, work: impl FnOnce(&mut Program) -> u32) -> u32 {
    programs().get_mut(&program).map_or(INVALID_PROGRAM, work)
}

/// The number of a result of the driver's border, as this library's.
fn given(outcome: crate::ffi::Outcome) -> u32 {
    if outcome.is_ok() { SUCCESS } else { INVALID_INPUT }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn nvrtcVersion(major: Out<i32>, minor: Out<i32>) -> u32 {
    given(major.set(12).and_then(|()| minor.set(8)))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn nvrtcCreateProgram(
    program: Out<u64>,
    text: In<c_char>,
    name: In<c_char>,
    headers: i32,
    _texts: In<u64>,
    _names: In<u64>,
) -> u32 {
    let Ok(text) = text.text() else { return INVALID_INPUT };
    if headers != 0 {
        return INVALID_INPUT;
    }
    let name = name.text().unwrap_or("default_program").to_owned();
    let handle = new_handle();
    programs().insert(handle, Program { name, text: text.to_owned(), ..Program::default() });
    given(program.set(handle))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn nvrtcCompileProgram(program: u64, count: i32, options: In<In<c_char>>) -> u32 {
    with(program, |program| {
        for index in 0..usize::try_from(count).unwrap_or(0) {
            let option = options.at(index).and_then(In::text);
            if !option.is_ok_and(|option| option.starts_with('-')) {
                return INVALID_OPTION;
            }
        }
        // The whole text counts: a changed source under an old marker is another source.
        let known =
            source_in(program.text.as_bytes()).filter(|source| program.text.starts_with(&source.text()));
        program.image = known.map(image_of);
        if program.image.is_some() {
            program.log.clear();
            return SUCCESS;
        }
        program.log = format!("{}: error: softcuda compiles the project's own sources only\n", program.name);
        COMPILATION
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn nvrtcGetCUBINSize(program: u64, bytes: Out<usize>) -> u32 {
    with(program, |program| given(bytes.set(program.image.as_ref().map_or(0, Vec::len))))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn nvrtcGetCUBIN(program: u64, to: Out<c_char>) -> u32 {
    with(program, |program| {
        program.image.as_ref().map_or(INVALID_PROGRAM, |image| given(to.set_bytes(image)))
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn nvrtcGetProgramLogSize(program: u64, bytes: Out<usize>) -> u32 {
    with(program, |program| given(bytes.set(program.log.len() + 1)))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn nvrtcGetProgramLog(program: u64, to: Out<c_char>) -> u32 {
    with(program, |program| given(to.set_text(&program.log, program.log.len() + 1)))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn nvrtcDestroyProgram(program: Out<u64>) -> u32 {
    let Ok(handle) = program.get() else { return INVALID_PROGRAM };
    if programs().remove(&handle).is_none() {
        return INVALID_PROGRAM;
    }
    given(program.set(0))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn nvrtcGetErrorString(result: u32) -> *const c_char {
    let text: &CStr = match result {
        SUCCESS => c"NVRTC_SUCCESS",
        INVALID_INPUT => c"NVRTC_ERROR_INVALID_INPUT",
        INVALID_PROGRAM => c"NVRTC_ERROR_INVALID_PROGRAM",
        INVALID_OPTION => c"NVRTC_ERROR_INVALID_OPTION",
        COMPILATION => c"NVRTC_ERROR_COMPILATION",
        _ => c"NVRTC_ERROR unknown",
    };
    text.as_ptr()
}

/// Architectures that it "compiles" for.
const ARCHITECTURES: [i32; 5] = [75, 80, 86, 90, 100];

#[unsafe(no_mangle)]
pub(crate) extern "C" fn nvrtcGetNumSupportedArchs(count: Out<i32>) -> u32 {
    given(count.set(ARCHITECTURES.len() as i32))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn nvrtcGetSupportedArchs(to: Out<[i32; ARCHITECTURES.len()]>) -> u32 {
    given(to.set(ARCHITECTURES))
}
