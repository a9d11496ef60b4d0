//! Attention over answers where they lie: the kernel runs in the engine's context, on a stream of the engine's.

use std::path::PathBuf;
use std::sync::Arc;

use kvoyant_cuda::{Function, KernelCache, Stream};
use kvoyant_kernels::cuda::launch;
use kvoyant_kernels::cuda::params::AttendParams;

use super::session::DeviceSession;
use super::stream::TableRef;
use crate::error::Error;
use crate::model::{Inner, Model};

/// The paged attention kernel, loaded for one session.
#[derive(Debug)]
pub struct AttendKernel {
    inner: Arc<Inner>,
    function: Function,
    tile_rows: u32,
}

/// One launch: the members of a batch in one layer. All addresses are the device's.
///
/// With `splits` above 1 each head's rows are shared out, and every part has an output and a log-sum-exp of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attend {
    /// Members of the batch.
    pub members: u32,
    /// f32 `[members][query heads][head dim]`, after RoPE.
    pub queries: u64,
    /// The rows that the daemon answered with; `None` attends over local runs alone.
    pub answer: Option<TableRef>,
    /// Runs as `kvoyant_kernels::cuda::params::RowRun`: rows in the session's extents, see
    /// [`Sequence::local_device_runs`](crate::Sequence::local_device_runs).
    pub local_runs: u64,
    /// u32 `[members][KV heads]` and one more: the first local run of each head, and the end. 0: there are none.
    pub local_offsets: u64,
    /// Gets f32 `[splits][members][query heads][head dim]`.
    pub out: u64,
    /// Gets f32 `[splits][members][query heads]`.
    pub lse: u64,
    /// A u32 that gets `FAILED_STATUS` and `FAILED_RANGE` of `kvoyant_kernels::cuda::params`, and is never cleared.
    pub failed: u64,
    /// From 1: [`AttendKernel::splits`].
    pub splits: u32,
}

impl AttendKernel {
    /// Loads the kernel into the session's context, compiled if the cache has it not.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if the daemon's device is no GPU, [`Error::Kernel`] if there is neither a compiler nor a
    /// compiled kernel that fits, [`Error::Size`] if the model's heads are larger than the kernel's.
    pub fn load(model: &Model, cache: &KernelCache) -> Result<Self, Error> {
        let inner = Arc::clone(model.inner());
        let geometry = inner.geometry;
        let group = geometry.query_heads / geometry.kv_heads;
        let tile_rows = launch::tile_rows(geometry.dtype(), geometry.head_dim as u32, group as u32).ok_or(
            Error::Size {
                what: "a head (values)",
                found: geometry.head_dim,
                wanted: launch::HEAD_DIM_MAX as usize,
            },
        )?;
        let Some(source) = kvoyant_kernels::cuda::source("attend") else {
            unreachable!("attend is among the sources")
        };
        let function = cache.module(session(&inner)?.context(), source)?.function("attend")?;
        Ok(Self { inner, function, tile_rows })
    }

    /// The session's device memory.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if there is none.
    pub fn session(&self) -> Result<&Arc<DeviceSession>, Error> {
        session(&self.inner)
    }

    /// Into how many parts the rows of each head are best split, when they are about `rows`.
    #[must_use]
    pub fn splits(&self, members: usize, rows: usize) -> u32 {
        let heads = (members * self.inner.geometry.kv_heads) as u32;
        let processors = session(&self.inner).map_or(1, |session| {
            let abilities = session.context().info().abilities;
            abilities.multiprocessors
        });
        launch::splits(heads, rows as u32, processors)
    }

    /// Launches it; scores are scaled by `1/√d`.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// The addresses in `attend` lead to memory of the shapes that it says, which stays until the stream is done.
    /// Local runs lie in the session's extents. An answer was waited for on this stream
    /// ([`StreamPending::wait_on_stream`](super::StreamPending::wait_on_stream)) or by the calling thread, and is not
    /// released before the stream is done. `stream` is of the session's context.
    pub unsafe fn launch(&self, stream: &Stream, attend: &Attend) -> Result<(), Error> {
        let (session, geometry) = (session(&self.inner)?, self.inner.geometry);
        let layout = self.inner.rings.layout();
        let (row_bytes, pages) = (geometry.row_bytes(), geometry.pages);
        let mut params = AttendParams {
            queries: attend.queries,
            out: attend.out,
            lse: attend.lse,
            local_runs: attend.local_runs,
            local_offsets: attend.local_offsets,
            failed: attend.failed,
            dtype: geometry.dtype().code().into(),
            d: geometry.head_dim as u32,
            group: (geometry.query_heads / geometry.kv_heads) as u32,
            kv_heads: geometry.kv_heads as u32,
            members: attend.members,
            row_bytes: row_bytes as u32,
            tile_rows: self.tile_rows,
            splits: attend.splits.max(1),
            scale: 1.0 / (geometry.head_dim as f32).sqrt(),
            ..AttendParams::default()
        };
        if let Some(answer) = attend.answer {
            let heads = attend.members as usize * geometry.kv_heads;
            params.table = answer.table;
            params.table_runs = layout.table_runs(heads) as u32;
            params.status = answer.status;
            params.expected = answer.expected;
            params.slab = answer.slab;
            params.slab_rows = (session.slab_bytes() / row_bytes as u64) as u32;
            params.extents = answer.extents;
            params.extent_count = session.extent_count() as u32;
            params.rows_per_extent = (pages.pages_per_extent() * pages.page_rows) as u32;
        }
        let shape = params.launch();
        // SAFETY: the caller vouches for the addresses it gave. The answer's lie in the board and the slab, which the
        // session keeps open; the kernel checks its status word and every run against the sizes given here.
        unsafe { stream.launch(&self.function, shape.grid, shape.block, shape.shared_bytes, &params) }?;
        Ok(())
    }
}

fn session(inner: &Inner) -> Result<&Arc<DeviceSession>, Error> {
    inner.memory.device().ok_or_else(|| super::stream::no_gpu(&inner.device))
}

/// Where a user's compiled kernels are kept: `$XDG_STATE_HOME/kvoyant/kernels`, or the same under `~/.local/state`.
#[must_use]
pub fn kernel_folder() -> PathBuf {
    // The XDG specification: a relative path there is to be ignored.
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .unwrap_or_else(std::env::temp_dir)
        .join("kvoyant/kernels")
}
