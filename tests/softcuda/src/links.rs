//! The link between host and devices: one per direction and process, as fast and as late as the environment says.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::driver::Driver;
use crate::os::now_ns;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    HostToDevice,
    DeviceToHost,
    /// Within the device or within the host: no link.
    Within,
}

/// When each direction is free again, in nanoseconds of the machine's clock.
#[derive(Debug, Default)]
pub(crate) struct Links {
    up: Mutex<u64>,
    down: Mutex<u64>,
}

impl Links {
    /// Takes as long as these bytes take on the link, after all that came before them.
    pub(crate) fn pass(&self, driver: &Driver, way: Way, bytes: u64) {
        let slow_us = driver.faults.slow_copies_us();
        if slow_us > 0 {
            std::thread::sleep(Duration::from_micros(slow_us));
        }
        while driver.faults.copies_hang() && driver.failed().is_none() {
            std::thread::sleep(Duration::from_millis(1));
            driver.strike();
        }
        let link = match way {
            Way::HostToDevice => &self.up,
            Way::DeviceToHost => &self.down,
            Way::Within => return,
        };
        let Some(speed) = driver.options.bytes_per_second else {
            if driver.options.latency_us > 0 {
                sleep_until(now_ns() + driver.options.latency_us * 1000);
            }
            return;
        };
        let end = {
            let mut free = link.lock().unwrap_or_else(PoisonError::into_inner);
            *free = now_ns().max(*free) + (bytes as f64 / speed * 1e9) as u64;
            *free
        };
        sleep_until(end + driver.options.latency_us * 1000);
    }
}

/// Sleeps most of the time and yields the rest of it: a sleep alone wakes up too late for copies of microseconds.
fn sleep_until(end: u64) {
    const YIELDED_NS: u64 = 100_000;
    loop {
        let now = now_ns();
        if now >= end {
            return;
        }
        if end - now > YIELDED_NS {
            std::thread::sleep(Duration::from_nanos(end - now - YIELDED_NS));
        } else {
            std::thread::yield_now();
        }
    }
}
