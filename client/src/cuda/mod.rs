//! A session on a GPU, from the engine's side.
//!
//! The daemon's memory is opened once, when the model is registered: the slab for reading, the board for its words.
//! From then on nothing on a step needs the engine's CPU: [`Model::submit_on_stream`](crate::Model::submit_on_stream)
//! copies a hint off the device and rings the doorbell in stream order, and
//! [`StreamPending::wait_on_stream`] makes a stream wait for the answer's timeline word. Behind that, [`AttendKernel`]
//! attends over the answer and over rows in the session's extents. A `Watchdog` lets streams go when the daemon has died.
//!
//! Streams come in as raw `CUstream` pointers ([`Stream::borrow`]), so those of PyTorch and candle work.
#![allow(unsafe_code)]

mod attend;
mod graph;
mod session;
mod stream;
mod watchdog;

pub use attend::{Attend, AttendKernel, kernel_folder};
pub use graph::{GraphBuffers, GraphKernels, GraphOptions, GraphSequence, OwnRows};
pub use kvoyant_cuda::{
    Context, CudaError, DeviceBuffer, DeviceInfo, KernelCache, KernelError, PinnedBuffer, Priority, Stream,
    Unavailable,
};
pub use session::DeviceSession;
pub use stream::{StreamMember, StreamPending, TableRef};

use kvoyant_protocol::control::features;

/// What this process can do with a GPU's memory, as bits of the handshake; nothing without a driver.
pub(crate) fn features() -> u64 {
    let Ok(driver) = kvoyant_cuda::driver() else { return 0 };
    let Ok(devices) = driver.devices() else { return 0 };
    let any = |can: fn(&kvoyant_cuda::Abilities) -> bool, bit| {
        if devices.iter().any(|device| can(&device.abilities)) { bit } else { 0 }
    };
    any(|abilities| abilities.posix_fd, features::CUDA_DESCRIPTORS)
        | any(|abilities| abilities.ipc_events, features::CUDA_HANDLES)
}
