//! Every name of the driver: those that nobody needed yet refuse, and say so; all can be looked up.

use std::ffi::{c_char, c_void};
use std::io::Write;

use crate::driver::{Driver, call};
use crate::ffi::{Code, In, Out};

include!(concat!(env!("OUT_DIR"), "/symbols.rs"));

/// Puts down that a call is wanted that this driver lacks.
fn not_implemented(name: &'static str) -> u32 {
    crate::say(&format!("{name} is not implemented\n"));
    let folder = Driver::get().ok().and_then(|driver| driver.options.folder.as_ref());
    let file = folder.map(|folder| folder.join("not-implemented"));
    if let Some(mut file) =
        file.and_then(|file| std::fs::OpenOptions::new().create(true).append(true).open(file).ok())
    {
        let _ = file.write_all(format!("{name}\n").as_bytes());
    }
    Code::NOT_SUPPORTED.0
}

/// Forms of calls that came with later versions than the rest, and what takes them away.
const LATER: [(&str, i32, &str); 2] =
    [("cuMemcpyBatchAsync", 12080, "batch"), ("cuMemcpyBatchAsync_v2", 13000, "batch")];

/// `CU_GET_PROC_ADDRESS_*`: success, not found, version not sufficient.
const FOUND: u32 = 0;
const NOT_FOUND: u32 = 1;
const VERSION_NOT_SUFFICIENT: u32 = 2;

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuGetProcAddress_v2(
    name: In<c_char>,
    to: Out<*const c_void>,
    version: i32,
    _flags: u64,
    why: Out<u32>,
) -> u32 {
    call("cuGetProcAddress_v2", |driver| {
        let name = name.text()?;
        let limit = version.min(driver.options.version);
        let mut refused = NOT_FOUND;
        // The newest form that both sides know.
        for suffix in ["_v3", "_v2", ""] {
            let full = format!("{name}{suffix}");
            let Some((_, function)) = SYMBOLS.iter().find(|(known, _)| *known == full) else { continue };
            let since = LATER.iter().find(|(later, _, _)| *later == full);
            if since.is_some_and(|(_, _, ability)| !driver.options.has(ability)) {
                continue;
            }
            if since.is_some_and(|(_, since, _)| *since > limit) {
                refused = VERSION_NOT_SUFFICIENT;
                continue;
            }
            why.offer(FOUND);
            return to.set(*function as *const c_void);
        }
        why.offer(refused);
        to.set(std::ptr::null())
    })
}
