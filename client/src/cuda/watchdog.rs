//! Lets streams go that wait for a daemon that has died.
//!
//! A stream that waits for a timeline word waits for ever if nobody writes it. So a thread sleeps on the control
//! socket, and when the daemon hangs up it moves the words past every ticket that can be under way. It does so again
//! and again for a while, because what a dying daemon had queued may still move them back. The slots' status words stay
//! as they are: an attention kernel sees that its answer never came, and reads none of it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use kvoyant_cuda::{CudaError, PinnedBuffer, Priority, Stream};
use kvoyant_protocol::device::{TIMELINE, TIMELINE_32};
use kvoyant_protocol::layout::{Layout, d2c};
use kvoyant_protocol::memory::SharedMapping;
use kvoyant_protocol::wire::Status;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::Error;

/// A 64-bit timeline word that lies behind every ticket.
const PAST_ALL: u64 = 1 << 62 | Status::Failed as u64;

/// How often the words are moved again after the daemon has hung up, and how many milliseconds lie between.
const REPEATS: u32 = 100;
const REPEAT_EVERY_MS: u16 = 20;

/// See the module.
#[derive(Debug)]
pub(super) struct Watchdog {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// What lets streams go.
#[derive(Debug)]
pub(super) struct Release {
    pub(super) stream: Stream,
    pub(super) words: PinnedBuffer,
    /// Address of the board.
    pub(super) board: u64,
    pub(super) layout: Layout,
    pub(super) d2c: Arc<SharedMapping>,
}

impl Release {
    /// Moves the timeline words past every ticket under way.
    fn all(&self) -> Result<(), CudaError> {
        // No more tickets than ring slots lie between what was planned and the last one asked for.
        let planned = self.d2c.load_u64(d2c::PLANNED);
        let low = planned.wrapping_add(2 * u64::from(self.layout.limits.ring_slots)) as u32;
        let words = self.words.as_ptr();
        // SAFETY: two aligned words of a pinned buffer that this thread alone writes.
        unsafe {
            words.cast::<u64>().write_volatile(PAST_ALL);
            words.add(8).cast::<u32>().write_volatile(low);
        }
        // SAFETY: from the pinned buffer into the board, which the session closes only after this thread has ended.
        unsafe { self.stream.copy_h2d(self.board + TIMELINE as u64, words, 8) }?;
        // SAFETY: as above.
        unsafe { self.stream.copy_h2d(self.board + TIMELINE_32 as u64, words.wrapping_add(8), 4) }?;
        self.stream.synchronize()
    }

    /// Keeps the words there while anything of the daemon's may be under way, and once more when told to stop.
    fn until(&self, stopped: &EventFd) -> Result<(), CudaError> {
        let mut left = REPEATS;
        loop {
            self.all()?;
            let pause = if left == 0 { PollTimeout::NONE } else { PollTimeout::from(REPEAT_EVERY_MS) };
            match poll(&mut [PollFd::new(stopped.as_fd(), PollFlags::POLLIN)], pause) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => left = left.saturating_sub(1),
                _ => return self.all(),
            }
        }
    }
}

impl Watchdog {
    /// Watches the control socket's other end.
    pub(super) fn start(release: Release, socket: OwnedFd) -> Result<Self, Error> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(std::io::Error::from)?);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("kvoyant-watchdog".into()).spawn(move || {
            let mut fds = [
                // A hang-up is told unasked.
                PollFd::new(socket.as_fd(), PollFlags::empty()),
                PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
            ];
            while poll(&mut fds, PollTimeout::NONE) == Err(nix::errno::Errno::EINTR) {}
            // Whether the daemon has died or the session ends here: nobody will write the words any more.
            if let Err(error) = release.until(&stopped) {
                tracing::warn!("streams that wait for the daemon may not have been let go: {error}");
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The stream and the words that [`Release`] needs.
pub(super) fn release(
    context: &kvoyant_cuda::Context,
    board: u64,
    layout: Layout,
    d2c: Arc<SharedMapping>,
) -> Result<Release, CudaError> {
    Ok(Release { stream: context.stream(Priority::High)?, words: context.pinned(16)?, board, layout, d2c })
}
