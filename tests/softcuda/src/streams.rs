//! Streams: a thread each that does what it is given in order, while the caller goes on.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::contexts::{current, handle_of};
use crate::driver::{Driver, call, new_handle};
use crate::ffi::{Code, Out, Outcome};
use crate::graphs::Capture;
use crate::space::Use;
use crate::work::{HostFunction, Work};

/// `CU_STREAM_NON_BLOCKING`.
pub(crate) const NON_BLOCKING: u32 = 1;

#[derive(Debug, Default)]
struct Queue {
    pending: VecDeque<(Work, Vec<Use>)>,
    submitted: u64,
    finished: u64,
    closed: bool,
}

/// A stream.
#[derive(Debug)]
pub(crate) struct Stream {
    device: u32,
    flags: u32,
    priority: i32,
    queue: Mutex<Queue>,
    changed: Condvar,
    capture: Mutex<Capture>,
}

impl Stream {
    /// Makes one and starts its thread.
    fn start(
        driver: &'static Driver,
        handle: u64,
        device: u32,
        flags: u32,
        priority: i32,
    ) -> Outcome<Arc<Self>> {
        let stream = driver.streams.insert(
            handle,
            Self {
                device,
                flags,
                priority,
                queue: Mutex::default(),
                changed: Condvar::new(),
                capture: Mutex::default(),
            },
        );
        let worker = Arc::clone(&stream);
        let thread = std::thread::Builder::new().name("softcuda stream".into());
        thread.spawn(move || worker.work(driver)).map_err(|_| Code::OPERATING_SYSTEM)?;
        Ok(stream)
    }

    pub(crate) fn device(&self) -> u32 {
        self.device
    }

    /// The capture's state.
    pub(crate) fn capture(&self) -> MutexGuard<'_, Capture> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it waits for copies of calls that wait.
    pub(crate) fn is_blocking(&self) -> bool {
        self.flags & NON_BLOCKING == 0
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks an operation and puts it at the end, or into the capture that goes on.
    pub(crate) fn submit(&self, driver: &Driver, call: &str, work: &Work) -> Outcome {
        let uses = work.check(driver, call, false)?;
        if self.capture().keep(work)? {
            return Ok(());
        }
        self.enqueue(work, uses);
        Ok(())
    }

    /// Puts a checked operation at the end.
    pub(crate) fn enqueue(&self, work: &Work, uses: Vec<Use>) {
        let mut queue = self.lock();
        queue.pending.push_back((work.enqueued(), uses));
        queue.submitted += 1;
        self.changed.notify_all();
    }

    /// Whether all that was submitted is done.
    fn is_idle(&self) -> bool {
        let queue = self.lock();
        queue.finished == queue.submitted
    }

    /// Waits until all that was submitted up to now is done.
    pub(crate) fn drain(&self, driver: &Driver) -> Outcome {
        let mut queue = self.lock();
        let goal = queue.submitted;
        while queue.finished < goal {
            if let Some(code) = driver.failed() {
                return Err(code);
            }
            let (waited, timeout) = self
                .changed
                .wait_timeout(queue, Duration::from_millis(10))
                .unwrap_or_else(PoisonError::into_inner);
            queue = waited;
            if timeout.timed_out() {
                drop(queue);
                driver.strike();
                queue = self.lock();
            }
        }
        driver.failed().map_or(Ok(()), Err)
    }

    /// Lets the thread end once it has done everything.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn work(&self, driver: &'static Driver) {
        loop {
            let mut queue = self.lock();
            let (work, uses) = loop {
                if let Some(next) = queue.pending.pop_front() {
                    break next;
                }
                if queue.closed {
                    return;
                }
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            };
            drop(queue);
            driver.strike();
            if driver.failed().is_none() {
                work.run(driver);
            }
            drop((work, uses));
            self.lock().finished += 1;
            self.changed.notify_all();
        }
    }
}

/// The stream of a handle. The null stream orders itself with everything, so nobody here may use it.
pub(crate) fn of(driver: &'static Driver, call: &str, handle: u64) -> Outcome<Arc<Stream>> {
    if handle > 2 {
        return driver.streams.get(driver, call, handle);
    }
    driver.violations.add(call, "the null stream was used");
    let device = current(driver)?;
    // Below every handle, and different for each device.
    let handle = 16 + u64::from(device);
    let made = driver.streams.all().into_iter().find(|(known, _)| *known == handle);
    made.map_or_else(|| Stream::start(driver, handle, device, 0, 0), |(_, stream)| Ok(stream))
}

/// Waits for every stream that orders itself with calls that wait.
pub(crate) fn drain_blocking(driver: &Driver, device: u32) -> Outcome {
    for (_, stream) in driver.streams.all() {
        if stream.device == device && stream.is_blocking() {
            stream.drain(driver)?;
        }
    }
    Ok(())
}

fn create(name: &'static str, stream: Out<u64>, flags: u32, priority: i32) -> u32 {
    call(name, |driver| {
        let device = current(driver)?;
        if flags & !NON_BLOCKING != 0 || stream.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let handle = new_handle();
        let greatest = if driver.options.has("priorities") { -5 } else { 0 };
        Stream::start(driver, handle, device, flags, priority.clamp(greatest, 0))?;
        stream.set(handle)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamCreate(stream: Out<u64>, flags: u32) -> u32 {
    create("cuStreamCreate", stream, flags, 0)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamCreateWithPriority(stream: Out<u64>, flags: u32, priority: i32) -> u32 {
    create("cuStreamCreateWithPriority", stream, flags, priority)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamDestroy_v2(stream: u64) -> u32 {
    call("cuStreamDestroy_v2", |driver| {
        if stream <= 2 {
            return Err(Code::INVALID_HANDLE);
        }
        driver.streams.take(driver, "cuStreamDestroy_v2", stream)?.close();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamGetPriority(stream: u64, priority: Out<i32>) -> u32 {
    call("cuStreamGetPriority", |driver| priority.set(of(driver, "cuStreamGetPriority", stream)?.priority))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamGetFlags(stream: u64, flags: Out<u32>) -> u32 {
    call("cuStreamGetFlags", |driver| flags.set(of(driver, "cuStreamGetFlags", stream)?.flags))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamGetCtx(stream: u64, context: Out<u64>) -> u32 {
    call("cuStreamGetCtx", |driver| context.set(handle_of(of(driver, "cuStreamGetCtx", stream)?.device)))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamQuery(stream: u64) -> u32 {
    call("cuStreamQuery", |driver| {
        let stream = of(driver, "cuStreamQuery", stream)?;
        stream.capture().forbid()?;
        if stream.is_idle() { Ok(()) } else { Err(Code::NOT_READY) }
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamSynchronize(stream: u64) -> u32 {
    call("cuStreamSynchronize", |driver| {
        let stream = of(driver, "cuStreamSynchronize", stream)?;
        stream.capture().forbid()?;
        stream.drain(driver)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuLaunchHostFunc(
    stream: u64,
    function: Option<extern "C" fn(*mut c_void)>,
    data: usize,
) -> u32 {
    call("cuLaunchHostFunc", |driver| {
        let stream = of(driver, "cuLaunchHostFunc", stream)?;
        let function = function.ok_or(Code::INVALID_VALUE)?;
        stream.submit(driver, "cuLaunchHostFunc", &Work::Host(HostFunction { function, data }))
    })
}
