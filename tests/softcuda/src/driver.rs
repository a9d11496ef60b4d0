//! The driver of this process: what `cuInit` makes, and what every call goes through first.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::contexts::Contexts;
use crate::events::Event;
use crate::faults::Faults;
use crate::ffi::{Code, Outcome, status};
use crate::graphs::{ExecGraph, Graph};
use crate::links::Links;
use crate::machine::Machine;
use crate::modules::{Function, Module};
use crate::options::Options;
use crate::space::{Region, Space};
use crate::streams::Stream;
use crate::violations::Violations;
use crate::vmm::Physical;
use crate::work::poll;

/// Objects by their handles. A handle is never used twice.
#[derive(Debug)]
pub(crate) struct Handles<T> {
    what: &'static str,
    live: Mutex<HashMap<u64, Arc<T>>>,
}

/// Handles are numbers of this form, so that a stray pointer is not taken for one.
const HANDLE_BASE: u64 = 0x5c5c_0000_0000;
static NEXT_HANDLE: AtomicU64 = AtomicU64::new(HANDLE_BASE);

/// A handle that was never given out before.
pub(crate) fn new_handle() -> u64 {
    NEXT_HANDLE.fetch_add(16, Ordering::Relaxed) + 16
}

impl<T> Handles<T> {
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, live: Mutex::new(HashMap::new()) }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<T>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps an object under a handle from [`new_handle`].
    pub(crate) fn insert(&self, handle: u64, object: T) -> Arc<T> {
        let object = Arc::new(object);
        self.lock().insert(handle, Arc::clone(&object));
        object
    }

    /// The object; a handle that was destroyed or never given out is a violation.
    pub(crate) fn get(&self, driver: &Driver, call: &str, handle: u64) -> Outcome<Arc<T>> {
        let object = self.lock().get(&handle).cloned();
        object.ok_or_else(|| self.misuse(driver, call, handle))
    }

    /// The object, which the handle no longer stands for.
    pub(crate) fn take(&self, driver: &Driver, call: &str, handle: u64) -> Outcome<Arc<T>> {
        let object = self.lock().remove(&handle);
        object.ok_or_else(|| self.misuse(driver, call, handle))
    }

    /// Every object there is.
    pub(crate) fn all(&self) -> Vec<(u64, Arc<T>)> {
        self.lock().iter().map(|(handle, object)| (*handle, Arc::clone(object))).collect()
    }

    fn misuse(&self, driver: &Driver, call: &str, handle: u64) -> Code {
        let known = handle > HANDLE_BASE
            && handle <= NEXT_HANDLE.load(Ordering::Relaxed)
            && handle.is_multiple_of(16);
        let (what, state) = (self.what, if known { "was destroyed" } else { "was never made" });
        driver.violations.add(call, &format!("{what} {handle:#x} {state}"));
        Code::INVALID_HANDLE
    }
}

/// All that this process knows of the machine.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) options: Options,
    pub(crate) machine: Machine,
    pub(crate) faults: Faults,
    pub(crate) violations: Violations,
    pub(crate) space: Space,
    pub(crate) contexts: Contexts,
    pub(crate) links: Links,
    pub(crate) streams: Handles<Stream>,
    pub(crate) events: Handles<Event>,
    pub(crate) physical: Handles<Physical>,
    pub(crate) modules: Handles<Module>,
    pub(crate) functions: Handles<Function>,
    pub(crate) graphs: Handles<Graph>,
    pub(crate) exec_graphs: Handles<ExecGraph>,
    sticky: AtomicU32,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();

thread_local! {
    static IN_HOST_FUNCTION: Cell<bool> = const { Cell::new(false) };
}

impl Driver {
    /// Makes the driver, once.
    pub(crate) fn init() -> Outcome<&'static Self> {
        if let Some(driver) = DRIVER.get() {
            return Ok(driver);
        }
        let options = Options::from_environment();
        let machine = Machine::open(&options).map_err(|error| {
            crate::say(&format!("the machine in {:?} could not be opened: {error}\n", options.folder));
            Code::OPERATING_SYSTEM
        })?;
        let driver = Self {
            faults: Faults::new(options.folder.as_deref()),
            violations: Violations::open(options.folder.as_deref()),
            space: Space::default(),
            contexts: Contexts::new(options.devices),
            links: Links::default(),
            streams: Handles::new("stream"),
            events: Handles::new("event"),
            physical: Handles::new("physical memory"),
            modules: Handles::new("module"),
            functions: Handles::new("function"),
            graphs: Handles::new("graph"),
            exec_graphs: Handles::new("executable graph"),
            sticky: AtomicU32::new(0),
            machine,
            options,
        };
        Ok(DRIVER.get_or_init(|| driver))
    }

    /// The driver, if it was made.
    pub(crate) fn get() -> Outcome<&'static Self> {
        DRIVER.get().ok_or(Code::NOT_INITIALIZED)
    }

    /// What every call is refused for, whatever it wants.
    fn admit(&self, call: &str) -> Outcome {
        if std::process::id() != self.machine.me().0 {
            self.violations.add(call, "called in a process that was forked after cuInit");
            return Err(Code::NOT_INITIALIZED);
        }
        if IN_HOST_FUNCTION.get() {
            self.violations.add(call, "called from a host function");
            return Err(Code::NOT_PERMITTED);
        }
        self.strike();
        if let Some(code) = self.failed() {
            return Err(code);
        }
        self.faults.call_fails(call).map_or(Ok(()), Err)
    }

    /// Lets the faults that end a context strike.
    pub(crate) fn strike(&self) {
        if let Some(code) = self.faults.strikes("ecc") {
            self.fail(code.unwrap_or(Code::ECC_UNCORRECTABLE));
        }
        if let Some(code) = self.faults.strikes("device-lost") {
            self.fail(code.unwrap_or(Code::LAUNCH_FAILED));
        }
    }

    /// Ends the contexts of this process: every call from now on returns this code.
    pub(crate) fn fail(&self, code: Code) {
        let _ = self.sticky.compare_exchange(0, code.0, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// The code that ended the contexts of this process, if one did.
    pub(crate) fn failed(&self) -> Option<Code> {
        let code = self.sticky.load(Ordering::SeqCst);
        (code != 0).then_some(Code(code))
    }

    /// Waits until all work of a region's device is done, that of destroyed streams on the region too: as a call does
    /// that frees memory.
    pub(crate) fn drain_for(&self, region: &Region) -> Outcome {
        self.drain(region.device)?;
        poll(self, || !region.is_busy());
        self.failed().map_or(Ok(()), Err)
    }

    /// Waits until all work of a device is done.
    pub(crate) fn drain(&self, device: u32) -> Outcome {
        for (_, stream) in self.streams.all() {
            if stream.device() == device {
                stream.drain(self)?;
            }
        }
        Ok(())
    }
}

/// Runs a call of an initialised driver.
pub(crate) fn call(name: &'static str, work: impl FnOnce(&'static Driver) -> Outcome) -> u32 {
    status(Driver::get().and_then(|driver| driver.admit(name).and_then(|()| work(driver))))
}

/// Runs a host function on a stream's thread: calls that it makes to the driver are refused.
pub(crate) fn as_host_function(work: impl FnOnce()) {
    IN_HOST_FUNCTION.set(true);
    work();
    IN_HOST_FUNCTION.set(false);
}
