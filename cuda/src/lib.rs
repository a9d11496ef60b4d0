//! Checked wrappers over the CUDA driver: the only place of the workspace that calls it.
//!
//! The driver is probed before it is touched ([`driver`]), so that one binary starts with or without one and says why.
//! Every wrapper makes its context current for the length of the call and puts the thread's own back; a thread that
//! works for one device calls [`Context::bind`] once and pays nothing for it. Handles are shared inside and released
//! when the last clone goes; a release that fails is logged and never panics. Device pointers are plain `u64`.
//!
//! Functions are resolved here, with the types of cudarc's bindings but not through its lazy loader: that panics on a
//! missing symbol and gives back an `enum` that cannot hold the codes of a newer driver.

mod batch;
mod cache;
mod calls;
mod context;
mod device;
mod error;
mod event;
mod graph;
mod ipc;
mod memops;
mod memory;
mod module;
mod nvrtc;
mod probe;
mod stream;
mod vmm;

pub use batch::{BatchCopies, HostToDevice, MAX_BATCH};
pub use cache::{KernelCache, KernelError};
pub use context::Context;
pub use device::{Abilities, ComputeMode, DeviceInfo};
pub use error::{CudaError, ErrorKind};
pub use event::{Event, EventKind};
pub use graph::{ExecGraph, Graph};
pub use ipc::{IPC_HANDLE_BYTES, ImportedBuffer};
pub use memory::{ALLOCATION_UNIT, DeviceBuffer, PinnedBuffer, Registration};
pub use module::{Function, Module};
pub use nvrtc::{CompileError, Compiler, NvrtcUnavailable};
pub use probe::{Driver, NEEDED_VERSION, Unavailable, driver};
pub use stream::{Priority, Stream};
pub use vmm::{Access, SharedBuffer};
