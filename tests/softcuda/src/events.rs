//! Events: the point of a stream that others wait for, in this process or in another.
//!
//! An event counts its recordings. A wait is for the recording that was the last one when the wait was asked for.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::contexts::current;
use crate::driver::{Driver, call, new_handle};
use crate::ffi::{Code, Out, Outcome};
use crate::ipc::Handle;
use crate::os::{self, PAGE, Protection, now_ns};
use crate::streams;
use crate::work::{Work, poll};

/// `CU_EVENT_BLOCKING_SYNC`, `CU_EVENT_DISABLE_TIMING`, `CU_EVENT_INTERPROCESS`.
const BLOCKING_SYNC: u32 = 1;
const DISABLE_TIMING: u32 = 2;
const INTERPROCESS: u32 = 4;

/// Flag of a record or a wait that stays in a captured graph.
const EXTERNAL: u32 = 1;

/// Recordings of one event that may be under way at once.
const KEPT: usize = 64;

/// An event's state; that of an interprocess event lies in a page that all who have opened it map.
#[repr(C)]
#[derive(Debug)]
struct Words {
    recorded: AtomicU64,
    destroyed: AtomicU64,
    /// The last recording that is complete, by recording modulo [`KEPT`], and when it was.
    done: [AtomicU64; KEPT],
    done_ns: [AtomicU64; KEPT],
}
const _: () = assert!(size_of::<Words>() <= PAGE as usize);

#[derive(Debug)]
enum Place {
    Own(Box<Words>),
    Shared { file: File, base: u64, opened: bool },
}

/// An event.
#[derive(Debug)]
pub(crate) struct Event {
    device: u32,
    flags: u32,
    place: Place,
    /// The stream in whose capture it was last recorded.
    captured: Mutex<Option<u64>>,
}

impl Event {
    fn shared(device: u32, flags: u32, file: File, opened: bool) -> Outcome<Self> {
        let base = os::map(&file, PAGE, Protection::ReadWrite).map_err(|_| Code::MAP_FAILED)?;
        Ok(Self { device, flags, place: Place::Shared { file, base, opened }, captured: Mutex::new(None) })
    }

    fn words(&self) -> &Words {
        match &self.place {
            Place::Own(words) => words,
            // SAFETY: the page is mapped as long as this event lives, is large enough, and holds nothing but atomics.
            Place::Shared { base, .. } => unsafe { &*(*base as *const Words) },
        }
    }

    pub(crate) fn device(&self) -> u32 {
        self.device
    }

    /// Begins a recording and returns its number.
    pub(crate) fn begin(&self) -> u64 {
        self.words().recorded.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// The number of the last recording that was begun; 0 before the first.
    pub(crate) fn last(&self) -> u64 {
        self.words().recorded.load(Ordering::SeqCst)
    }

    /// Completes a recording.
    pub(crate) fn complete(&self, recording: u64) {
        let words = self.words();
        words.done_ns[recording as usize % KEPT].store(now_ns(), Ordering::SeqCst);
        words.done[recording as usize % KEPT].fetch_max(recording, Ordering::SeqCst);
    }

    /// Whether a recording is complete; what was never recorded is.
    pub(crate) fn is_done(&self, recording: u64) -> bool {
        recording == 0 || self.words().done[recording as usize % KEPT].load(Ordering::SeqCst) >= recording
    }

    /// An opened event is good only while its maker keeps it.
    fn check_maker(&self, driver: &Driver, call: &str) {
        if self.words().destroyed.load(Ordering::SeqCst) != 0 {
            driver.violations.add(call, "the event was destroyed by the process that made it");
        }
    }

    fn captured(&self) -> Option<u64> {
        *self.captured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_captured(&self, stream: Option<u64>) {
        *self.captured.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Place::Shared { base, .. } = &self.place {
            os::unmap(*base, PAGE);
        }
    }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuEventCreate(event: Out<u64>, flags: u32) -> u32 {
    call("cuEventCreate", |driver| {
        let device = current(driver)?;
        let untimed = flags & DISABLE_TIMING != 0;
        let known = flags & !(BLOCKING_SYNC | DISABLE_TIMING | INTERPROCESS) == 0;
        if !known || event.is_null() || (flags & INTERPROCESS != 0 && !untimed) {
            return Err(Code::INVALID_VALUE);
        }
        let handle = new_handle();
        let made = if flags & INTERPROCESS != 0 {
            if !driver.options.has("ipc_events") {
                return Err(Code::NOT_SUPPORTED);
            }
            let file = os::memory_file("softcuda-event", PAGE).map_err(|_| Code::OPERATING_SYSTEM)?;
            Event::shared(device, flags, file, false)?
        } else {
            let words = Words {
                recorded: AtomicU64::new(0),
                destroyed: AtomicU64::new(0),
                done: [const { AtomicU64::new(0) }; KEPT],
                done_ns: [const { AtomicU64::new(0) }; KEPT],
            };
            Event { device, flags, place: Place::Own(Box::new(words)), captured: Mutex::new(None) }
        };
        driver.events.insert(handle, made);
        event.set(handle)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuEventDestroy_v2(event: u64) -> u32 {
    call("cuEventDestroy_v2", |driver| {
        let event = driver.events.take(driver, "cuEventDestroy_v2", event)?;
        if matches!(event.place, Place::Shared { opened: false, .. }) {
            event.words().destroyed.store(1, Ordering::SeqCst);
        }
        Ok(())
    })
}

fn record(name: &'static str, event: u64, stream: u64, flags: u32) -> u32 {
    call(name, |driver| {
        let found = driver.events.get(driver, name, event)?;
        let on = streams::of(driver, name, stream)?;
        found.check_maker(driver, name);
        if found.device != on.device() {
            return Err(Code::INVALID_HANDLE);
        }
        if flags & EXTERNAL == 0 && on.capture().is_active() {
            found.set_captured(Some(stream));
            return Ok(());
        }
        found.set_captured(None);
        on.submit(driver, name, &Work::Record { event: found, recording: None })
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuEventRecord(event: u64, stream: u64) -> u32 {
    record("cuEventRecord", event, stream, 0)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuEventRecordWithFlags(event: u64, stream: u64, flags: u32) -> u32 {
    record("cuEventRecordWithFlags", event, stream, flags)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamWaitEvent(stream: u64, event: u64, flags: u32) -> u32 {
    call("cuStreamWaitEvent", |driver| {
        let found = driver.events.get(driver, "cuStreamWaitEvent", event)?;
        let on = streams::of(driver, "cuStreamWaitEvent", stream)?;
        found.check_maker(driver, "cuStreamWaitEvent");
        let capturing = on.capture().is_active();
        match (capturing, found.captured()) {
            // Within one captured stream the order is there already.
            (true, Some(owner)) if owner == stream => Ok(()),
            // Only what happens in the capture can be waited for in it, unless the wait is to stay in the graph.
            (true, None) if flags & EXTERNAL == 0 => {
                on.capture().invalidate();
                Err(Code::STREAM_CAPTURE_ISOLATION)
            }
            // Joining a second stream into a capture is not a thing this driver does.
            (_, Some(_)) => Err(Code::STREAM_CAPTURE_UNSUPPORTED),
            _ => on.submit(driver, "cuStreamWaitEvent", &Work::Wait { event: found, recording: None }),
        }
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuEventQuery(event: u64) -> u32 {
    call("cuEventQuery", |driver| {
        let event = driver.events.get(driver, "cuEventQuery", event)?;
        event.check_maker(driver, "cuEventQuery");
        if event.captured().is_some() {
            return Err(Code::CAPTURED_EVENT);
        }
        if event.is_done(event.last()) { Ok(()) } else { Err(Code::NOT_READY) }
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuEventSynchronize(event: u64) -> u32 {
    call("cuEventSynchronize", |driver| {
        let event = driver.events.get(driver, "cuEventSynchronize", event)?;
        event.check_maker(driver, "cuEventSynchronize");
        if event.captured().is_some() {
            return Err(Code::CAPTURED_EVENT);
        }
        let recording = event.last();
        poll(driver, || event.is_done(recording));
        driver.failed().map_or(Ok(()), Err)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuEventElapsedTime(milliseconds: Out<f32>, start: u64, end: u64) -> u32 {
    call("cuEventElapsedTime", |driver| {
        let when = |event: u64| {
            let event = driver.events.get(driver, "cuEventElapsedTime", event)?;
            let last = event.last();
            if event.flags & DISABLE_TIMING != 0 || last == 0 {
                return Err(Code::INVALID_HANDLE);
            }
            if !event.is_done(last) {
                return Err(Code::NOT_READY);
            }
            Ok(event.words().done_ns[last as usize % KEPT].load(Ordering::SeqCst))
        };
        let (start, end) = (when(start)?, when(end)?);
        milliseconds.set((end as f64 - start as f64) as f32 / 1e6)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuIpcGetEventHandle(handle: Out<Handle>, event: u64) -> u32 {
    call("cuIpcGetEventHandle", |driver| {
        let event = driver.events.get(driver, "cuIpcGetEventHandle", event)?;
        match &event.place {
            Place::Shared { file, opened: false, .. } => {
                handle.set(Handle::of_event(driver, file, event.device)?)
            }
            _ => Err(Code::INVALID_HANDLE),
        }
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuIpcOpenEventHandle(event: Out<u64>, handle: Handle) -> u32 {
    call("cuIpcOpenEventHandle", |driver| {
        let device = current(driver)?;
        if !driver.options.has("ipc_events") {
            return Err(Code::NOT_SUPPORTED);
        }
        let file = handle.open_event(driver, "cuIpcOpenEventHandle")?;
        let made = new_handle();
        driver.events.insert(made, Event::shared(device, DISABLE_TIMING | INTERPROCESS, file, true)?);
        event.set(made)
    })
}
