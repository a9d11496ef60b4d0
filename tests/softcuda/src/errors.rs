//! Names and texts of result codes.

use std::ffi::{CStr, c_char};

use crate::ffi::{Code, Out, status};

include!(concat!(env!("OUT_DIR"), "/errors.rs"));

fn find(code: u32) -> Result<(&'static CStr, &'static CStr), Code> {
    let found = ERRORS.iter().find(|(known, _, _)| *known == code);
    found.map(|(_, name, text)| (*name, *text)).ok_or(Code::INVALID_VALUE)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuGetErrorName(code: u32, name: Out<*const c_char>) -> u32 {
    status(find(code).and_then(|(found, _)| name.set(found.as_ptr())))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuGetErrorString(code: u32, text: Out<*const c_char>) -> u32 {
    status(find(code).and_then(|(_, found)| text.set(found.as_ptr())))
}
