//! Words that a stream writes, and words that a stream waits for.

use crate::driver::call;
use crate::ffi::Code;
use crate::streams;
use crate::work::{Compare, Work};

/// `CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER`, which this driver may ignore: it only takes order away.
const NO_BARRIER: u32 = 1;

/// `CU_STREAM_WAIT_VALUE_FLUSH`, for writes of other devices.
const FLUSH: u32 = 1 << 30;

fn write(name: &'static str, stream: u64, to: u64, value: u64, flags: u32, wide: bool) -> u32 {
    call(name, |driver| {
        let stream = streams::of(driver, name, stream)?;
        if !driver.options.has("memops") || (wide && !driver.options.has("memops64")) {
            return Err(Code::NOT_SUPPORTED);
        }
        if flags & !NO_BARRIER != 0 {
            return Err(Code::INVALID_VALUE);
        }
        stream.submit(driver, name, &Work::Write { to, value, wide })
    })
}

fn wait(name: &'static str, stream: u64, at: u64, value: u64, flags: u32, wide: bool) -> u32 {
    call(name, |driver| {
        let stream = streams::of(driver, name, stream)?;
        if !driver.options.has("memops") || (wide && !driver.options.has("memops64")) {
            return Err(Code::NOT_SUPPORTED);
        }
        let compare = match flags & !FLUSH {
            0 => Compare::NotBehind,
            1 => Compare::Equal,
            2 => Compare::AnyBit,
            3 => Compare::NotAllBits,
            _ => return Err(Code::INVALID_VALUE),
        };
        stream.submit(driver, name, &Work::Await { at, value, wide, compare })
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamWriteValue32_v2(stream: u64, to: u64, value: u32, flags: u32) -> u32 {
    write("cuStreamWriteValue32_v2", stream, to, value.into(), flags, false)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamWriteValue64_v2(stream: u64, to: u64, value: u64, flags: u32) -> u32 {
    write("cuStreamWriteValue64_v2", stream, to, value, flags, true)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamWaitValue32_v2(stream: u64, at: u64, value: u32, flags: u32) -> u32 {
    wait("cuStreamWaitValue32_v2", stream, at, value.into(), flags, false)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamWaitValue64_v2(stream: u64, at: u64, value: u64, flags: u32) -> u32 {
    wait("cuStreamWaitValue64_v2", stream, at, value, flags, true)
}
