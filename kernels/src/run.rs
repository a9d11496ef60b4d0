//! What kernels over scattered memory take: runs of rows, runs of bytes, and memory that is kept between calls.

/// `rows` consecutive rows in memory, each `[k(d) | v(d)]` in the storage type of the call, `2 * d * bytes` apart, at any alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first byte of the first row.
    pub rows_ptr: *const u8,
    /// How many rows follow one another.
    pub rows: usize,
}

impl Run {
    /// A run of `rows` rows that starts at `rows_ptr`.
    #[must_use]
    pub const fn new(rows_ptr: *const u8, rows: usize) -> Self {
        Self { rows_ptr, rows }
    }
}

// SAFETY: a run is an address and a number; to read through it is `unsafe` in the kernels, whose callers promise that the memory is
// readable from the thread that reads.
unsafe impl Send for Run {}
// SAFETY: as for Send; a shared run gives nothing that a copy of it does not.
unsafe impl Sync for Run {}

/// `bytes` bytes to be copied from `src` to `dst`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyRun {
    /// Where the bytes are.
    pub src: *const u8,
    /// Where they go.
    pub dst: *mut u8,
    /// How many.
    pub bytes: usize,
}

// SAFETY: two addresses and a number; to copy is `unsafe` in the kernels, whose callers promise that both ranges may be used from the
// thread that copies.
unsafe impl Send for CopyRun {}
// SAFETY: as for Send; a shared copy run gives nothing that a copy of it does not.
unsafe impl Sync for CopyRun {}

/// Memory that [`Kernels::attend`](crate::Kernels::attend) keeps between calls: the weights of some dozen rows per query, on the
/// scalar path of all; and as many rows, where they have to be dequantised first.
#[derive(Clone, Debug, Default)]
pub struct AttendScratch {
    values: Vec<f32>,
    pub(crate) rows: Vec<f32>,
}

impl AttendScratch {
    /// Room for `n` values, of whatever content, from the beginning of a cache line on.
    pub(crate) fn room(&mut self, n: usize) -> &mut [f32] {
        const LINE: usize = 64;
        let most = n + LINE / size_of::<f32>();
        if self.values.len() < most {
            self.values.resize(most, 0.0);
        }
        // Where the address is not known, as in an interpreter, the beginning will do.
        let skew = self.values.as_ptr().align_offset(LINE);
        let skew = if skew > most - n { 0 } else { skew };
        &mut self.values[skew..][..n]
    }
}

/// Memory that [`Kernels::top_k`](crate::Kernels::top_k) keeps between calls: about 12 bytes per score.
#[derive(Clone, Debug, Default)]
pub struct TopKScratch {
    pub(crate) pairs: Vec<u64>,
    #[cfg(target_arch = "x86_64")]
    pub(crate) keys: Vec<i32>,
    #[cfg(target_arch = "x86_64")]
    pub(crate) candidates: Vec<i32>,
    #[cfg(target_arch = "x86_64")]
    pub(crate) ids: Vec<i32>,
}
