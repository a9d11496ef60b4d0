//! What moves bytes: one small trait, and its twins.
//!
//! | room | how |
//! |---|---|
//! | [`uring`](super::uring) | io_uring with registered file and buffers |
//! | [`psync`](super::psync) | threads with preadv and pwritev, where there is no io_uring |
//! | [`noop`](super::noop) | nothing is moved: what the rest costs |
//! | [`faulty`](super::faulty) | another one, with faults at operations of one's choice |

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::sync::Arc;

use kvoyant_protocol::memory::SharedMapping;

use super::operation::{Completed, Operation};

/// Wakes the thread that waits in [`Engine::wait`].
pub(super) trait Wake: Send + Sync + Debug {
    fn wake(&self);
}

/// Moves bytes for one device. It is made, used and dropped by the device's I/O thread.
pub(super) trait Engine: Debug {
    /// What operators call it.
    fn name(&self) -> &'static str;

    /// How its thread is woken.
    fn waker(&self) -> Arc<dyn Wake>;

    /// Takes an operation, of which there are never more than [`Setup::capacity`].
    fn push(&mut self, operation: Operation);

    /// Starts what was pushed and gives back what has ended, as it ended: fewer bytes than wanted are no error here, and
    /// neither continued nor retried. With `block`, sleeps until something has ended or the waker is used.
    fn wait(&mut self, ended: &mut Vec<Completed>, block: bool);

    /// Registers memory, where that makes sense.
    fn register(&mut self, memory: &Arc<SharedMapping>) -> io::Result<()> {
        let _ = memory;
        Ok(())
    }

    /// Undoes [`Engine::register`].
    fn forget(&mut self, memory: &Arc<SharedMapping>) {
        let _ = memory;
    }

    /// Mappings that are registered.
    fn registered(&self) -> usize {
        0
    }
}

/// What an engine is made of.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    /// The area.
    pub(super) file: Arc<File>,
    /// The most operations at a time.
    pub(super) capacity: u32,
    /// A kernel thread takes submissions.
    pub(super) sq_poll: bool,
    /// Completions are polled for, without interrupts.
    pub(super) io_poll: bool,
}

/// Makes the engine of a device, on its I/O thread.
pub(super) type Make = Arc<dyn Fn(&Setup) -> io::Result<Box<dyn Engine>> + Send + Sync>;
