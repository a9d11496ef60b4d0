//! Primary contexts and which of them is current on a thread.

use std::cell::RefCell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::devices::checked;
use crate::driver::{Driver, call};
use crate::ffi::{Code, Out, Outcome};
use crate::machine::{Refused, Role};

/// Handles of primary contexts: this and 4096 times the ordinal.
const CONTEXT_BASE: u64 = 0x5c7c_0000_0000;

#[derive(Clone, Copy, Debug, Default)]
struct Primary {
    retained: u32,
    /// What the machine counts the context's memory under.
    hold: u64,
}

/// The primary contexts of this process, by device.
#[derive(Debug)]
pub(crate) struct Contexts(Mutex<Vec<Primary>>);

impl Contexts {
    pub(crate) fn new(devices: u32) -> Self {
        Self(Mutex::new(vec![Primary::default(); devices as usize]))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Primary>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device of a context that is alive.
    fn device_of(&self, handle: u64) -> Outcome<u32> {
        let index = handle.wrapping_sub(CONTEXT_BASE);
        let contexts = self.lock();
        match contexts.get((index / 4096) as usize) {
            Some(primary) if index.is_multiple_of(4096) && primary.retained > 0 => Ok((index / 4096) as u32),
            Some(_) if index.is_multiple_of(4096) => Err(Code::CONTEXT_IS_DESTROYED),
            _ => Err(Code::INVALID_CONTEXT),
        }
    }
}

/// The handle of a device's primary context.
pub(crate) fn handle_of(device: u32) -> u64 {
    CONTEXT_BASE + 4096 * u64::from(device)
}

thread_local! {
    static CURRENT: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// The device whose context is current on this thread.
pub(crate) fn current(driver: &Driver) -> Outcome<u32> {
    let handle = CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0));
    if handle == 0 { Err(Code::INVALID_CONTEXT) } else { driver.contexts.device_of(handle) }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDevicePrimaryCtxRetain(context: Out<u64>, device: i32) -> u32 {
    call("cuDevicePrimaryCtxRetain", |driver| {
        let device = checked(driver, device)?;
        let mut contexts = driver.contexts.lock();
        let primary = &mut contexts[device as usize];
        if primary.retained == 0 {
            let held = driver.machine.enter(device, driver.options.context_bytes, driver.options.exclusive);
            primary.hold = held.map_err(|refused| match refused {
                Refused::Memory => Code::OUT_OF_MEMORY,
                Refused::Exclusive => Code::DEVICE_UNAVAILABLE,
            })?;
        }
        primary.retained += 1;
        context.set(handle_of(device))
    })
}

/// Ends a context and all that lives in it.
fn end(driver: &Driver, device: u32) -> Outcome {
    let drained = driver.drain(device);
    for (handle, stream) in driver.streams.all() {
        if stream.device() == device {
            stream.close();
            let _ = driver.streams.take(driver, "end of a context", handle);
        }
    }
    for (handle, event) in driver.events.all() {
        if event.device() == device {
            let _ = driver.events.take(driver, "end of a context", handle);
        }
    }
    driver.space.clear(driver, device);
    let hold = std::mem::take(&mut driver.contexts.lock()[device as usize]).hold;
    driver.machine.release(Role::Context, hold);
    drained
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> u32 {
    call("cuDevicePrimaryCtxRelease_v2", |driver| {
        let device = checked(driver, device)?;
        let last = {
            let mut contexts = driver.contexts.lock();
            let primary = &mut contexts[device as usize];
            match primary.retained {
                0 => return Err(Code::INVALID_CONTEXT),
                1 => true,
                _ => {
                    primary.retained -= 1;
                    false
                }
            }
        };
        if last { end(driver, device) } else { Ok(()) }
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuDevicePrimaryCtxGetState(device: i32, flags: Out<u32>, active: Out<i32>) -> u32 {
    call("cuDevicePrimaryCtxGetState", |driver| {
        let device = checked(driver, device)?;
        let retained = driver.contexts.lock()[device as usize].retained;
        flags.set(0)?;
        active.set(i32::from(retained > 0))
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuCtxSetCurrent(context: u64) -> u32 {
    call("cuCtxSetCurrent", |driver| {
        if context != 0 {
            driver.contexts.device_of(context)?;
        }
        CURRENT.with_borrow_mut(|stack| {
            stack.pop();
            if context != 0 {
                stack.push(context);
            }
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuCtxGetCurrent(context: Out<u64>) -> u32 {
    call("cuCtxGetCurrent", |_| context.set(CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0))))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuCtxPushCurrent_v2(context: u64) -> u32 {
    call("cuCtxPushCurrent_v2", |driver| {
        driver.contexts.device_of(context)?;
        CURRENT.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuCtxPopCurrent_v2(context: Out<u64>) -> u32 {
    call("cuCtxPopCurrent_v2", |_| {
        let popped = CURRENT.with_borrow_mut(Vec::pop).ok_or(Code::INVALID_CONTEXT)?;
        context.offer(popped);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuCtxGetDevice(device: Out<i32>) -> u32 {
    call("cuCtxGetDevice", |driver| device.set(current(driver)? as i32))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuCtxGetFlags(flags: Out<u32>) -> u32 {
    call("cuCtxGetFlags", |driver| current(driver).and_then(|_| flags.set(0)))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuCtxGetApiVersion(_context: u64, version: Out<u32>) -> u32 {
    call("cuCtxGetApiVersion", |_| version.set(3020))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuCtxSynchronize() -> u32 {
    call("cuCtxSynchronize", |driver| driver.drain(current(driver)?))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) -> u32 {
    call("cuCtxGetStreamPriorityRange", |driver| {
        current(driver)?;
        least.offer(0);
        greatest.offer(if driver.options.has("priorities") { -5 } else { 0 });
        Ok(())
    })
}
