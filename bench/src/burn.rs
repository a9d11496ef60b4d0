//! A kernel that is bound by the device's memory, as decoding is: what copies of another process may slow down.

use std::time::{Duration, Instant};

use bytemuck::{Pod, Zeroable};
use kvoyant_cuda::{Compiler, Context, DeviceBuffer, Function, Priority, Stream};

use crate::run::Stop;

/// Adds one to every word of one array and writes it to another.
const TEXT: &str = r#"
struct Params { unsigned long long from; unsigned long long to; unsigned long long count; };
extern "C" __global__ void burn(const Params p) {
    const uint4* from = reinterpret_cast<const uint4*>(p.from);
    uint4* to = reinterpret_cast<uint4*>(p.to);
    const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += step) {
        uint4 v = from[i];
        v.x += 1; v.y += 1; v.z += 1; v.w += 1;
        to[i] = v;
    }
}
"#;

/// Bytes of each array, at most: no cache holds both.
const BYTES: usize = 512 << 20;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    from: u64,
    to: u64,
    count: u64,
}

/// The kernel and what it works on.
#[derive(Debug)]
pub(crate) struct Burn {
    function: Function,
    stream: Stream,
    from: DeviceBuffer,
    to: DeviceBuffer,
    blocks: u32,
}

impl Burn {
    pub(crate) fn new(context: &Context) -> Result<Self, Stop> {
        let missing =
            |reason: String| Stop::Skipped(format!("the memory-bound kernel cannot be made: {reason}"));
        let compiler = Compiler::find().map_err(|error| missing(error.to_string()))?;
        let image = compiler
            .compile(TEXT, "burn", context.info().compute)
            .map_err(|error| missing(error.to_string().lines().next().unwrap_or_default().to_owned()))?;
        let function = context.load_module(&image)?.function("burn")?;
        let (free, _) = context.memory()?;
        let bytes = BYTES.min((free / 8) as usize);
        let stream = context.stream(Priority::Normal)?;
        let (from, to) = (context.alloc(bytes)?, context.alloc(bytes)?);
        // SAFETY: the whole of a buffer of ours.
        unsafe { stream.fill(from.ptr(), 1, from.len()) }?;
        stream.synchronize()?;
        let blocks = context.info().abilities.multiprocessors.max(1) * 8;
        Ok(Self { function, stream, from, to, blocks })
    }

    /// Bytes that a pass reads and writes.
    pub(crate) fn bytes_per_pass(&self) -> usize {
        self.from.len() + self.to.len()
    }

    /// Runs it again and again for so long; how often, and how long each pass took in microseconds.
    pub(crate) fn run(&self, time: Duration) -> Result<(u64, f64), Stop> {
        /// Passes that are queued before the first of them is waited for.
        const AHEAD: u64 = 16;
        let count = (self.from.len() / 16) as u64;
        let params = Params { from: self.from.ptr(), to: self.to.ptr(), count };
        let since = Instant::now();
        let mut passes = 0;
        while since.elapsed() < time {
            for _ in 0..AHEAD {
                // SAFETY: the kernel's own parameters; both arrays have `count` words and outlive the stream's work.
                unsafe { self.stream.launch(&self.function, (self.blocks, 1, 1), (256, 1, 1), 0, &params) }?;
            }
            self.stream.synchronize()?;
            passes += AHEAD;
        }
        Ok((passes, since.elapsed().as_secs_f64() * 1e6 / passes as f64))
    }
}
