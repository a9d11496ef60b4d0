//! What a stream does: each operation, how it is checked when it is asked for, and how it is done when its turn comes.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use crate::driver::{Driver, as_host_function};
use crate::events::Event;
use crate::ffi::{Code, Outcome};
use crate::links::Way;
use crate::modules::Launch;
use crate::space::Use;

/// One copy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) to: u64,
    pub(crate) from: u64,
    pub(crate) bytes: u64,
    /// Whether each end was asked for as host memory.
    pub(crate) to_host: bool,
    pub(crate) from_host: bool,
}

impl Piece {
    fn way(&self) -> Way {
        match (self.to_host, self.from_host) {
            (false, true) => Way::HostToDevice,
            (true, false) => Way::DeviceToHost,
            _ => Way::Within,
        }
    }
}

/// A function of the caller's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostFunction {
    pub(crate) function: extern "C" fn(*mut c_void),
    pub(crate) data: usize,
}

/// How a waiting stream compares: the low bits of the flags of `cuStreamWaitValue`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compare {
    /// Not behind, cyclically.
    NotBehind,
    Equal,
    AnyBit,
    NotAllBits,
}

/// One operation of a stream.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    Copies(Arc<[Piece]>),
    /// `count` times a pattern of 1, 2 or 4 bytes.
    Fill {
        to: u64,
        pattern: u32,
        width: u64,
        count: u64,
    },
    Write {
        to: u64,
        value: u64,
        wide: bool,
    },
    Await {
        at: u64,
        value: u64,
        wide: bool,
        compare: Compare,
    },
    Host(HostFunction),
    Kernel(Arc<Launch>),
    /// Completes a recording of an event; without a number, the one that comes when the operation is enqueued.
    Record {
        event: Arc<Event>,
        recording: Option<u64>,
    },
    /// Waits for a recording of an event; without a number, the last one when the operation is enqueued.
    Wait {
        event: Arc<Event>,
        recording: Option<u64>,
    },
}

impl Work {
    /// Checks all that the operation will touch, and keeps it in use. `waits` is for calls that return when it is done.
    pub(crate) fn check(&self, driver: &Driver, call: &str, waits: bool) -> Outcome<Vec<Use>> {
        match self {
            Self::Copies(pieces) => {
                let mut uses = Vec::with_capacity(2 * pieces.len());
                for piece in pieces.iter().filter(|piece| piece.bytes > 0) {
                    check_end(driver, call, (piece.to, piece.bytes, piece.to_host), true, waits, &mut uses)?;
                    check_end(
                        driver,
                        call,
                        (piece.from, piece.bytes, piece.from_host),
                        false,
                        waits,
                        &mut uses,
                    )?;
                }
                Ok(uses)
            }
            Self::Fill { to, width, count, .. } => {
                let bytes = width.checked_mul(*count).ok_or(Code::INVALID_VALUE)?;
                if to % width != 0 {
                    return Err(Code::INVALID_VALUE);
                }
                if bytes == 0 {
                    return Ok(Vec::new());
                }
                Ok(vec![driver.space.device_range(driver, call, *to, bytes, true)?])
            }
            Self::Write { to: at, wide, .. } | Self::Await { at, wide, .. } => {
                let bytes = if *wide { 8 } else { 4 };
                if at % bytes != 0 {
                    return Err(Code::INVALID_VALUE);
                }
                let writes = matches!(self, Self::Write { .. });
                Ok(vec![driver.space.device_range(driver, call, *at, bytes, writes)?])
            }
            Self::Host(_) | Self::Kernel(_) | Self::Record { .. } | Self::Wait { .. } => Ok(Vec::new()),
        }
    }

    /// The operation as it stands in the queue: with the recordings that count at this moment.
    pub(crate) fn enqueued(&self) -> Self {
        match self {
            Self::Record { event, recording: None } => {
                Self::Record { event: Arc::clone(event), recording: Some(event.begin()) }
            }
            Self::Wait { event, recording: None } => {
                Self::Wait { event: Arc::clone(event), recording: Some(event.last()) }
            }
            other => other.clone(),
        }
    }

    /// Does it, on the thread of a stream or of a caller who waits.
    pub(crate) fn run(&self, driver: &Driver) {
        match self {
            Self::Copies(pieces) => run_copies(driver, pieces),
            Self::Fill { to, pattern, width, count } => fill(*to, *pattern, *width, *count),
            Self::Write { to, value, wide } => write(*to, *value, *wide),
            Self::Await { at, value, wide, compare } => {
                poll(driver, || holds(*at, *value, *wide, *compare));
            }
            Self::Host(HostFunction { function, data }) => {
                as_host_function(|| function(*data as *mut c_void));
            }
            Self::Kernel(launch) => launch.run(driver),
            Self::Record { event, recording } => event.complete(recording.unwrap_or(0)),
            Self::Wait { event, recording } => {
                let recording = recording.unwrap_or(0);
                poll(driver, || event.is_done(recording));
            }
        }
    }
}

fn check_end(
    driver: &Driver,
    call: &str,
    (at, bytes, host): (u64, u64, bool),
    writes: bool,
    waits: bool,
    uses: &mut Vec<Use>,
) -> Outcome {
    if host {
        uses.extend(driver.space.host_range(driver, call, at, bytes, (writes, waits))?);
    } else {
        uses.push(driver.space.device_range(driver, call, at, bytes, writes)?);
    }
    Ok(())
}

/// Copies all pieces; those that lie in a row and go one way pass the link together.
fn run_copies(driver: &Driver, pieces: &[Piece]) {
    for pieces in pieces.chunk_by(|one, next| one.way() == next.way()) {
        let Some(first) = pieces.first() else { continue };
        driver.links.pass(driver, first.way(), pieces.iter().map(|piece| piece.bytes).sum());
        if driver.failed().is_some() {
            return;
        }
        for piece in pieces {
            // SAFETY: both ranges were checked when the copy was asked for and are kept in use since; pageable memory
            // is the caller's word.
            unsafe { std::ptr::copy(piece.from as *const u8, piece.to as *mut u8, piece.bytes as usize) };
        }
    }
    fence(Ordering::SeqCst);
}

fn fill(to: u64, pattern: u32, width: u64, count: u64) {
    // SAFETY: the range was checked for `width * count` bytes and for its alignment, and is kept in use since.
    unsafe {
        match width {
            1 => std::ptr::write_bytes(to as *mut u8, pattern as u8, count as usize),
            2 => std::slice::from_raw_parts_mut(to as *mut u16, count as usize).fill(pattern as u16),
            _ => std::slice::from_raw_parts_mut(to as *mut u32, count as usize).fill(pattern),
        }
    }
    fence(Ordering::SeqCst);
}

fn write(to: u64, value: u64, wide: bool) {
    // SAFETY: the word was checked, is aligned, and is kept in use since; words that streams write are only ever
    // read and written whole.
    unsafe {
        if wide {
            AtomicU64::from_ptr(to as *mut u64).store(value, Ordering::SeqCst);
        } else {
            AtomicU32::from_ptr(to as *mut u32).store(value as u32, Ordering::SeqCst);
        }
    }
}

/// Whether a word is as a waiting stream wants it.
fn holds(at: u64, value: u64, wide: bool, compare: Compare) -> bool {
    // SAFETY: as in `write`; the word may lie in memory that this process can only read, which a load allows.
    let found = unsafe {
        if wide {
            (*(at as *const AtomicU64)).load(Ordering::Acquire)
        } else {
            u64::from((*(at as *const AtomicU32)).load(Ordering::Acquire))
        }
    };
    let all = if wide { u64::MAX } else { u64::from(u32::MAX) };
    match compare {
        Compare::NotBehind if wide => found.wrapping_sub(value) as i64 >= 0,
        Compare::NotBehind => (found as u32).wrapping_sub(value as u32) as i32 >= 0,
        Compare::Equal => found == value & all,
        Compare::AnyBit => found & value != 0,
        Compare::NotAllBits => !(found | value) & all != 0,
    }
}

/// Waits until something is so, or until the context has failed.
pub(crate) fn poll(driver: &Driver, so: impl Fn() -> bool) {
    for round in 0_u32.. {
        if so() || driver.failed().is_some() {
            return;
        }
        if round < 100 {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(100));
            if round % 100 == 0 {
                driver.strike();
            }
        }
    }
}
