//! The host as a device: the embedded default.
//!
//! *In place*, answers point into the session's own extents and nothing is copied: how an engine on a CPU gets its
//! speed. In *slab* mode, rows are copied into a slab by copy threads, as a GPU's copy engines would, optionally
//! shaped to a bandwidth and a latency: how transfers, overlap and stalls are studied without a GPU.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, unbounded};
use crossbeam::queue::SegQueue;
use kvoyant_kernels::Kernels;
use kvoyant_protocol::control::{Failure, Mode, features};
use kvoyant_protocol::device::SlabRef;
use kvoyant_protocol::faults::{self, Point};
use kvoyant_protocol::memory::{Memfd, MemoryError, Seals, SharedMapping};
use kvoyant_protocol::quota::Quota;

use super::fair::Fair;
use super::{Device, Slab, SlabError, SlabMemory, SlabRequest, Transfer};
use crate::quota::Charge;

/// Beyond what any transfer waits for: a year.
const FAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// A simulated link: transfers share its bandwidth one after the other, and each arrives a latency later.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Shape {
    /// Bandwidth in 10⁹ bytes a second; `None`: as fast as memory is.
    pub gbps: Option<f64>,
    /// Latency of a transfer.
    pub latency: Duration,
}

impl Shape {
    /// When a transfer of `bytes` that starts at `now` has arrived, and from when the link is free again.
    fn schedule(&self, now: Instant, free_at: Instant, bytes: u64) -> (Instant, Instant) {
        let seconds = |gbps: f64| Duration::try_from_secs_f64(bytes as f64 / (gbps * 1e9)).unwrap_or(FAR);
        let later = |from: Instant, by: Duration| from.checked_add(by.min(FAR)).unwrap_or(from);
        let free = later(now.max(free_at), self.gbps.map_or(Duration::ZERO, seconds));
        (later(free, self.latency), free)
    }
}

/// See the module.
#[derive(Debug)]
pub struct HostDevice {
    mode: Mode,
    waiting: Arc<Waiting>,
    /// One token for each transfer that waits.
    tokens: Option<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl HostDevice {
    /// A host device. In slab mode it starts `copy_threads` threads.
    pub fn new(mode: Mode, copy_threads: usize, shape: Shape) -> std::io::Result<Self> {
        if mode == Mode::InPlace {
            return Ok(Self { mode, waiting: Arc::default(), tokens: None, threads: Vec::new() });
        }
        // There are never more than all rings together have slots.
        let (tokens, waits) = unbounded();
        let waiting = Arc::new(Waiting::default());
        let link = Arc::new(Mutex::new(Instant::now()));
        let threads = (0..copy_threads.max(1))
            .map(|index| {
                let (waits, waiting, link) = (waits.clone(), Arc::clone(&waiting), Arc::clone(&link));
                let work = move || copy_loop(&waits, &waiting, &link, shape);
                crate::threads::start(format!("copy-{index}"), work)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { mode, waiting, tokens: Some(tokens), threads })
    }
}

/// Transfers that lanes have handed in, which the copy threads take in turns: first of all users, then of their sessions.
#[derive(Debug, Default)]
struct Waiting {
    /// Where lanes put them, without waiting for anybody.
    inbox: SegQueue<Transfer>,
    sorted: Mutex<Fair<Transfer>>,
    /// Whether the simulated link is cut short: nobody waits for it any more.
    hurried: Mutex<bool>,
    hurry: Condvar,
}

impl Waiting {
    fn next(&self) -> Option<Transfer> {
        let mut sorted = self.sorted.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(transfer) = self.inbox.pop() {
            sorted.push(transfer.memory.uid(), transfer.session, transfer);
        }
        sorted.pop()
    }

    /// Waits until then, or until nobody may wait any more.
    fn wait_until(&self, arrives: Instant) {
        let ahead = arrives.saturating_duration_since(Instant::now());
        if ahead.is_zero() {
            return;
        }
        let hurried = self.hurried.lock().unwrap_or_else(PoisonError::into_inner);
        // Whether it is hurried or the time has come, the transfer goes on.
        let _ = self.hurry.wait_timeout_while(hurried, ahead, |hurried| !*hurried);
    }

    fn hurry(&self) {
        *self.hurried.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.hurry.notify_all();
    }
}

fn copy_loop(waits: &Receiver<()>, waiting: &Waiting, link: &Mutex<Instant>, shape: Shape) {
    let _bomb = crate::lane::Bomb;
    let kernels = Kernels::best();
    while let Ok(()) = waits.recv() {
        // Each token came after its transfer.
        let Some(transfer) = waiting.next() else { continue };
        let start = Instant::now();
        let arrives = {
            let mut free_at = link.lock().unwrap_or_else(PoisonError::into_inner);
            let (arrives, free) = shape.schedule(start, *free_at, transfer.bytes);
            *free_at = free;
            arrives
        };
        let failed = faults::fires(Point::Copy);
        if faults::fires(Point::Hang) {
            std::mem::forget(transfer);
            continue;
        }
        // SAFETY: the lane made every run from offsets that it checked against mappings which `transfer.memory`
        // keeps alive. Sources are extents, which only the session's client writes; destinations are slab slots
        // that no other transfer and no answer uses until this one is reported. A client that writes to a source
        // meanwhile gets torn rows in its own slab and nothing else.
        unsafe {
            if !failed {
                kernels.copy_runs(&transfer.copies);
            }
            if faults::fires(Point::WrongByte)
                && let Some(run) = transfer.copies.first()
            {
                run.dst.write_volatile(!run.dst.read_volatile());
            }
        }
        waiting.wait_until(arrives);
        transfer.end(failed);
    }
}

/// A slab in host memory: a memfd that the client maps for reading.
#[derive(Debug)]
struct HostSlab {
    file: Memfd,
    memory: SharedMapping,
    _charge: Charge,
}

impl SlabMemory for HostSlab {
    fn bytes(&self) -> usize {
        self.file.len()
    }

    fn base(&self) -> *mut u8 {
        self.memory.address(0, 0).unwrap_or(std::ptr::null_mut())
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(offset, bytes)
    }

    fn export(&self) -> Result<(SlabRef, Vec<OwnedFd>), SlabError> {
        Ok((SlabRef::Host { bytes: self.file.len() as u64 }, vec![self.file.try_clone()?]))
    }
}

impl Device for HostDevice {
    fn name(&self) -> &str {
        "host"
    }

    fn mode(&self) -> Mode {
        self.mode
    }

    fn features(&self) -> u64 {
        match self.mode {
            Mode::InPlace => features::IN_PLACE,
            _ => features::SLAB,
        }
    }

    fn slab(&self, request: SlabRequest) -> Result<Slab, SlabError> {
        let charge = request.account.charge(Quota::Device, request.bytes as u64);
        let charge = charge.map_err(|over| SlabError::Refused(Failure::Quota(over)))?;
        let file = Memfd::create("kvoyant-slab", request.bytes)?;
        let memory = file.map(false)?;
        file.seal(Seals::frozen_for_readers())?;
        Ok(Slab(Arc::new(HostSlab { file, memory, _charge: charge })))
    }

    fn submit(&self, transfer: Transfer) -> Result<(), Transfer> {
        let Some(tokens) = &self.tokens else { return Err(transfer) };
        self.waiting.inbox.push(transfer);
        // Copy threads end only once the last token is taken, and this one is dropped.
        let _ = tokens.send(());
        Ok(())
    }

    fn hurry(&self) {
        self.waiting.hurry();
    }
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        self.waiting.hurry();
        self.tokens = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a copy thread panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Importer, Report, SessionMemory};
    use kvoyant_kernels::CopyRun;
    use kvoyant_protocol::futex::Bell;
    use kvoyant_protocol::layout::{Layout, Limits};
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_shaped_link_serves_one_transfer_after_the_other_and_adds_its_latency_once_each() {
        let shape = Shape { gbps: Some(1.0), latency: Duration::from_micros(10) };
        let now = Instant::now();
        let (first, free) = shape.schedule(now, now, 1_000_000);
        assert_eq!(first - now, Duration::from_micros(1010));
        let (second, _) = shape.schedule(now, free, 1_000_000);
        assert_eq!(second - now, Duration::from_micros(2010));
    }

    #[test]
    fn a_link_too_slow_for_any_clock_is_late_and_no_panic() {
        let now = Instant::now();
        for (gbps, latency) in [(1e-300, Duration::MAX), (f64::MIN_POSITIVE, Duration::ZERO)] {
            let (arrives, _) = Shape { gbps: Some(gbps), latency }.schedule(now, now, u64::MAX);
            assert!(arrives - now >= FAR);
        }
    }

    #[test]
    fn who_waits_for_the_link_is_let_go_when_it_is_cut_short() {
        let waiting = Arc::new(Waiting::default());
        let waiter = {
            let waiting = Arc::clone(&waiting);
            std::thread::spawn(move || waiting.wait_until(Instant::now() + FAR))
        };
        waiting.hurry();
        waiter.join().unwrap();
    }

    #[test]
    fn copies_arrive_whole_and_are_reported_once() {
        let device = HostDevice::new(Mode::Slab, 2, Shape::default()).unwrap();
        let d2c = Arc::new(Memfd::create("test", 4096).unwrap().map(false).unwrap());
        let importer = Arc::new(Importer { process: None, closed: AtomicBool::new(true) });
        let layout = Layout::new(Limits::default()).unwrap();
        let account = crate::quota::Ledger::default().account(1);
        let slab = device
            .slab(SlabRequest {
                session: 1,
                bytes: 1 << 20,
                records: 0,
                layout,
                d2c,
                features: features::SLAB,
                importer,
                account: Arc::clone(&account),
            })
            .unwrap();
        assert_eq!(account.held(Quota::Device), 1 << 20);
        let (SlabRef::Host { bytes }, fds) = slab.0.export().unwrap() else { panic!("not in host memory") };
        let seals = Seals::frozen_for_readers();
        let file = Memfd::from_peer(fds.into_iter().next().unwrap(), bytes as usize, seals).unwrap();
        let source = Arc::new(Memfd::create("test", 1 << 20).unwrap().map(false).unwrap());
        let data: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8).collect();
        source.write(0, &data).unwrap();
        let memory = Arc::new(SessionMemory::default());
        memory.keep(Arc::clone(&source) as _);
        let report = Arc::new(Report::new(Arc::new(Bell::default())));
        for ticket in 0..16 {
            let offset = ticket as usize * 65536;
            let copies = vec![CopyRun {
                src: source.address(offset, 65536).unwrap(),
                dst: slab.address((1 << 20) - 65536 - offset, 65536).unwrap(),
                bytes: 65536,
            }];
            let (memory, report) = (Arc::clone(&memory), Arc::clone(&report));
            let publish = None;
            device
                .submit(Transfer { session: 1, ticket, copies, bytes: 65536, memory, publish, report })
                .unwrap();
        }
        let mut tickets = Vec::new();
        while tickets.len() < 16 {
            match report.pop() {
                Some(done) => tickets.push(done.ticket),
                None => std::thread::yield_now(),
            }
        }
        tickets.sort_unstable();
        assert_eq!(tickets, (0..16).collect::<Vec<_>>());
        let mut back = vec![0; 1 << 20];
        file.map_read_only().unwrap().read(0, &mut back).unwrap();
        for block in 0..16 {
            assert_eq!(back[(15 - block) * 65536..][..65536], data[block * 65536..][..65536]);
        }
        assert!(file.map(false).is_err(), "a client may only read a slab");
    }
}
