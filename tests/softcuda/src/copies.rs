//! Copies and fills, those that wait and those on streams, one by one and in batches.

use std::sync::Arc;

use crate::contexts::current;
use crate::driver::{Driver, call};
use crate::ffi::{Code, In, Out, Outcome};
use crate::streams;
use crate::vmm::Location;
use crate::work::{Piece, Work};

/// Batches of more descriptors than this were seen to bring drivers down.
const BATCH_MAX: usize = 16_384;

/// Where the ends of a copy lie.
#[derive(Clone, Copy)]
enum Ends {
    HostToDevice,
    DeviceToHost,
    DeviceToDevice,
    /// As the addresses say.
    Unified,
}

fn piece(driver: &Driver, ends: Ends, to: u64, from: u64, bytes: usize) -> Piece {
    let host = |at: u64| driver.space.at(at).is_none_or(|region| !region.kind.is_device());
    let (to_host, from_host) = match ends {
        Ends::HostToDevice => (false, true),
        Ends::DeviceToHost => (true, false),
        Ends::DeviceToDevice => (false, false),
        Ends::Unified => (host(to), host(from)),
    };
    Piece { to, from, bytes: bytes as u64, to_host, from_host }
}

/// Does something now, after all streams that order themselves with calls that wait.
fn at_once(name: &'static str, work: impl FnOnce(&Driver) -> Work) -> u32 {
    call(name, |driver| {
        let device = current(driver)?;
        driver.forbid_in_captures()?;
        let work = work(driver);
        let uses = work.check(driver, name, true)?;
        streams::drain_blocking(driver, device)?;
        work.run(driver);
        drop(uses);
        driver.failed().map_or(Ok(()), Err)
    })
}

fn on_stream(name: &'static str, stream: u64, work: impl FnOnce(&Driver) -> Work) -> u32 {
    call(name, |driver| streams::of(driver, name, stream)?.submit(driver, name, &work(driver)))
}

fn copy_now(name: &'static str, ends: Ends, to: u64, from: u64, bytes: usize) -> u32 {
    at_once(name, |driver| Work::Copies(Arc::new([piece(driver, ends, to, from, bytes)])))
}

fn copy_on(name: &'static str, ends: Ends, to: u64, from: u64, bytes: usize, stream: u64) -> u32 {
    on_stream(name, stream, |driver| Work::Copies(Arc::new([piece(driver, ends, to, from, bytes)])))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemcpyHtoD_v2(to: u64, from: u64, bytes: usize) -> u32 {
    copy_now("cuMemcpyHtoD_v2", Ends::HostToDevice, to, from, bytes)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemcpyDtoH_v2(to: u64, from: u64, bytes: usize) -> u32 {
    copy_now("cuMemcpyDtoH_v2", Ends::DeviceToHost, to, from, bytes)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) -> u32 {
    copy_now("cuMemcpyDtoD_v2", Ends::DeviceToDevice, to, from, bytes)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemcpy(to: u64, from: u64, bytes: usize) -> u32 {
    copy_now("cuMemcpy", Ends::Unified, to, from, bytes)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) -> u32 {
    copy_on("cuMemcpyHtoDAsync_v2", Ends::HostToDevice, to, from, bytes, stream)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) -> u32 {
    copy_on("cuMemcpyDtoHAsync_v2", Ends::DeviceToHost, to, from, bytes, stream)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) -> u32 {
    copy_on("cuMemcpyDtoDAsync_v2", Ends::DeviceToDevice, to, from, bytes, stream)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: u64) -> u32 {
    copy_on("cuMemcpyAsync", Ends::Unified, to, from, bytes, stream)
}

fn fill(to: u64, pattern: u32, width: u64, count: usize) -> Work {
    Work::Fill { to, pattern, width, count: count as u64 }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemsetD8_v2(to: u64, value: u8, count: usize) -> u32 {
    at_once("cuMemsetD8_v2", |_| fill(to, value.into(), 1, count))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemsetD16_v2(to: u64, value: u16, count: usize) -> u32 {
    at_once("cuMemsetD16_v2", |_| fill(to, value.into(), 2, count))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemsetD32_v2(to: u64, value: u32, count: usize) -> u32 {
    at_once("cuMemsetD32_v2", |_| fill(to, value, 4, count))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: u64) -> u32 {
    on_stream("cuMemsetD8Async", stream, |_| fill(to, value.into(), 1, count))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemsetD16Async(to: u64, value: u16, count: usize, stream: u64) -> u32 {
    on_stream("cuMemsetD16Async", stream, |_| fill(to, value.into(), 2, count))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: u64) -> u32 {
    on_stream("cuMemsetD32Async", stream, |_| fill(to, value, 4, count))
}

/// `CUmemcpyAttributes`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct CopyAttributes {
    pub(crate) source_order: u32,
    pub(crate) source: Location,
    pub(crate) destination: Location,
    pub(crate) flags: u32,
}

/// A batch as both signatures give it.
struct Batch {
    to: In<u64>,
    from: In<u64>,
    bytes: In<usize>,
    count: usize,
    attributes: In<CopyAttributes>,
    first_of: In<usize>,
    attribute_count: usize,
}

impl Batch {
    /// Checks the attributes as the driver documents them, and reads the copies.
    fn work(&self, driver: &Driver, name: &str) -> Outcome<Work> {
        if self.count == 0 || self.attribute_count == 0 || self.attribute_count > self.count {
            return Err(Code::INVALID_VALUE);
        }
        if self.count > BATCH_MAX {
            driver
                .violations
                .add(name, &format!("{} copies in one batch have brought drivers down", self.count));
            driver.fail(Code::LAUNCH_FAILED);
            return Err(Code::LAUNCH_FAILED);
        }
        let mut before = None;
        for index in 0..self.attribute_count {
            let first = self.first_of.at(index)?;
            let order = self.attributes.at(index)?.source_order;
            let in_order = before.map_or(first == 0, |before| first > before) && first < self.count;
            if !in_order || !(1..=3).contains(&order) {
                return Err(Code::INVALID_VALUE);
            }
            before = Some(first);
        }
        let one = |index| {
            Ok(piece(driver, Ends::Unified, self.to.at(index)?, self.from.at(index)?, self.bytes.at(index)?))
        };
        (0..self.count).map(one).collect::<Outcome<Arc<[Piece]>>>().map(Work::Copies)
    }

    fn submit(&self, driver: &'static Driver, name: &str, stream: u64) -> Outcome {
        if !driver.options.has("batch") {
            return Err(Code::NOT_SUPPORTED);
        }
        if stream <= 1 {
            driver.violations.add(name, "the null stream was used");
            return Err(Code::INVALID_VALUE);
        }
        let work = self.work(driver, name)?;
        streams::of(driver, name, stream)?.submit(driver, name, &work)
    }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemcpyBatchAsync(
    to: In<u64>,
    from: In<u64>,
    bytes: In<usize>,
    count: usize,
    attributes: In<CopyAttributes>,
    first_of: In<usize>,
    attribute_count: usize,
    failed: Out<usize>,
    stream: u64,
) -> u32 {
    call("cuMemcpyBatchAsync", |driver| {
        failed.offer(usize::MAX);
        let batch = Batch { to, from, bytes, count, attributes, first_of, attribute_count };
        batch.submit(driver, "cuMemcpyBatchAsync", stream)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuMemcpyBatchAsync_v2(
    to: In<u64>,
    from: In<u64>,
    bytes: In<usize>,
    count: usize,
    attributes: In<CopyAttributes>,
    first_of: In<usize>,
    attribute_count: usize,
    stream: u64,
) -> u32 {
    call("cuMemcpyBatchAsync_v2", |driver| {
        let batch = Batch { to, from, bytes, count, attributes, first_of, attribute_count };
        batch.submit(driver, "cuMemcpyBatchAsync_v2", stream)
    })
}
