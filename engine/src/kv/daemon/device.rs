//! Attention on the session's GPU.
//!
//! Linear layers stay on the CPU. So a layer's queries go to the device in one copy, with the runs of its local rows
//! (sinks, window, and in dense layers everything, which the device reads in the session's extents); the stream waits
//! for the daemon's answer, the client library's kernel attends over both, and one copy brings the output back. Every
//! wait on the CPU has a deadline: a stream whose daemon stands still is left alone until it goes on.
//!
//! The one place here that hands memory to a driver.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use kvoyant_client::cuda::{
    Attend, AttendKernel, Context, DeviceBuffer, KernelCache, PinnedBuffer, Priority, Stream, StreamMember,
    StreamPending, kernel_folder,
};
use kvoyant_client::{Answer, Completion, Error, Model, Status};
use kvoyant_kernels::Kernels;
use kvoyant_kernels::cuda::params::{FAILED_STATUS, RowRun};

use super::DaemonError;
use super::attention::Pass;
use super::sequence::DaemonSequence;

/// How long the thread sleeps between looks at a stream that has lost its daemon.
const LOOK_EVERY: Duration = Duration::from_micros(50);
/// How long a stream is given to end before its session is given up.
const PARTING: Duration = Duration::from_millis(100);
/// Bytes before the output: the word that says what failed, and room that keeps what follows aligned.
const FAILED_BYTES: usize = 16;

/// Device memory and pinned memory of one size, for copies between the two.
#[derive(Debug)]
struct Staged {
    host: PinnedBuffer,
    device: DeviceBuffer,
}

impl Staged {
    fn new(context: &Context, bytes: usize) -> Result<Self, Error> {
        let device = context.alloc(bytes)?;
        Ok(Self { host: context.pinned(device.len())?, device })
    }

    /// Makes room. What it held is lost, and nothing may be under way with it.
    fn reserve(&mut self, context: &Context, bytes: usize) -> Result<bool, Error> {
        let short = bytes > self.host.len();
        if short {
            *self = Self::new(context, bytes.next_power_of_two())?;
        }
        Ok(short)
    }

    /// Writes values into the pinned memory at a byte offset; nothing may be under way there.
    fn put<T: bytemuck::Pod>(&self, at: usize, values: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert!(at + bytes.len() <= self.host.len(), "staged memory was made large enough");
        // SAFETY: inside the buffer, which nobody else has and no copy uses now.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.host.as_ptr().add(at), bytes.len()) };
    }

    /// Reads values out of the pinned memory, once the copy that brought them is done.
    fn get<T: bytemuck::Pod>(&self, at: usize, values: &mut [T]) {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        assert!(at + bytes.len() <= self.host.len(), "staged memory was made large enough");
        // SAFETY: as in `put`.
        unsafe { std::ptr::copy_nonoverlapping(self.host.as_ptr().add(at), bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Queues the copy of the first bytes to the device.
    fn upload(&self, stream: &Stream, bytes: usize) -> Result<(), Error> {
        assert!(bytes <= self.host.len(), "staged memory was made large enough");
        // SAFETY: both buffers are this large, and live and stay as they are until the stream is done: see
        // `DeviceAttention::settle`.
        Ok(unsafe { stream.copy_h2d(self.device.ptr(), self.host.as_ptr(), bytes) }?)
    }

    /// Queues the copy of the first bytes from the device.
    fn download(&self, stream: &Stream, bytes: usize) -> Result<(), Error> {
        assert!(bytes <= self.host.len(), "staged memory was made large enough");
        // SAFETY: as in `upload`.
        Ok(unsafe { stream.copy_d2h(self.host.as_ptr(), self.device.ptr(), bytes) }?)
    }
}

/// What one layer of one step attends with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layer<'a> {
    pub(super) pass: Pass<'a>,
    pub(super) batch: &'a [&'a DaemonSequence],
    pub(super) positions: &'a [usize],
    /// `[batch][Hq][d]`.
    pub(super) queries: &'a [f32],
}

/// What the daemon said of a layer.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) completion: Completion,
    /// How long the CPU waited for it.
    pub(super) waited: Duration,
    /// Which rows it was, if that was wanted.
    pub(super) answer: Option<Answer>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct DeviceAttention {
    stream: Stream,
    context: Context,
    /// Queries, then the first local run of each head, then the local runs.
    input: Staged,
    /// What failed, then outputs, then their log-sum-exps.
    output: Staged,
    hints: Staged,
    /// Whether the stream may still use any of these.
    hinting: bool,
    attending: bool,
    offsets: Vec<u32>,
    runs: Vec<RowRun>,
    found: Vec<(u64, u32)>,
    part: Vec<f32>,
    /// Last: it keeps the session.
    kernel: AttendKernel,
}

impl DeviceAttention {
    /// A stream and memory in the context of the session's GPU.
    pub(super) fn new(model: &Model) -> Result<Self, DaemonError> {
        let kernel =
            AttendKernel::load(model, &KernelCache::new(kernel_folder())).map_err(|error| match error {
                Error::Kernel(error) => DaemonError::Kernel { device: model.device().to_owned(), error },
                other => other.into(),
            })?;
        let context = kernel.session()?.context().clone();
        let make = || -> Result<_, Error> {
            let stream = context.stream(Priority::Normal)?;
            let staged = || Staged::new(&context, 1);
            Ok((stream, staged()?, staged()?, staged()?))
        };
        let (stream, input, output, hints) = make()?;
        let mut made = Self {
            stream,
            context,
            input,
            output,
            hints,
            hinting: false,
            attending: false,
            offsets: Vec::new(),
            runs: Vec::new(),
            found: Vec::new(),
            part: Vec::new(),
            kernel,
        };
        made.clear_failed()?;
        Ok(made)
    }

    /// What failed is never cleared by the kernel.
    fn clear_failed(&mut self) -> Result<(), Error> {
        // SAFETY: the beginning of the output's device memory, which lives until the stream is done.
        unsafe { self.stream.fill(self.output.device.ptr(), 0, FAILED_BYTES) }?;
        self.stream.synchronize()?;
        Ok(())
    }

    /// Waits until nothing is under way: only after a step that failed is there anything.
    fn settle(&mut self, deadline: Duration) -> Result<(), DaemonError> {
        let since = Instant::now();
        while !self.stream.query().map_err(Error::from)? {
            let waited = since.elapsed();
            if waited >= deadline {
                return Err(DaemonError::Stuck { waited });
            }
            std::thread::sleep(LOOK_EVERY);
        }
        (self.hinting, self.attending) = (false, false);
        // A kernel that found no answer has said so, to a step that had given up.
        Ok(self.clear_failed()?)
    }

    /// Asks for a layer by hints that the stream brings, `[batch][Hq][d]`.
    pub(super) fn speculate(
        &mut self,
        model: &Model,
        layer: usize,
        members: &[StreamMember<'_>],
        hints: &[f32],
        deadline: Duration,
    ) -> Result<StreamPending, DaemonError> {
        if self.hinting || self.attending {
            self.settle(deadline)?;
        }
        let bytes = size_of_val(hints);
        self.hints.reserve(&self.context, bytes)?;
        self.hints.put(0, hints);
        self.hinting = true;
        self.hints.upload(&self.stream, bytes)?;
        // SAFETY: the hints lie there as soon as the stream has done the copy above, and stay until it is done; the
        // stream is of the session's context.
        Ok(unsafe { model.submit_on_stream(layer, members, self.hints.device.ptr(), &self.stream) }?)
    }

    /// Attends in one launch for the whole batch; `out` is `[batch][Hq][d]`, `lse` is `[batch][Hq]`. `wanted` asks for the
    /// rows of the answer too.
    pub(super) fn attend(
        &mut self,
        layer: Layer<'_>,
        asked: Option<StreamPending>,
        deadline: Duration,
        wanted: bool,
        (out, lse): (&mut [f32], &mut [f32]),
    ) -> Result<Option<Answered>, DaemonError> {
        if self.attending {
            self.settle(deadline)?;
        }
        let (members, values) = (layer.batch.len(), layer.queries.len());
        let shape = layer.pass.shape;
        let heads = members * shape.query_heads;
        let longest = layer.positions.iter().map(|position| position + 1).max().unwrap_or(1);
        let splits = self.kernel.splits(members, longest) as usize;
        self.find_local(&layer)?;

        let (offsets_at, runs_at, input_bytes) = {
            let offsets_at = values * 4;
            let runs_at = (offsets_at + self.offsets.len() * 4).next_multiple_of(size_of::<RowRun>());
            (offsets_at, runs_at, runs_at + self.runs.len() * size_of::<RowRun>())
        };
        let lse_at = FAILED_BYTES + splits * values * 4;
        let output_bytes = lse_at + splits * heads * 4;
        self.input.reserve(&self.context, input_bytes)?;
        if self.output.reserve(&self.context, output_bytes)? {
            self.clear_failed()?;
        }
        self.input.put(0, layer.queries);
        self.input.put(offsets_at, &self.offsets);
        self.input.put(runs_at, &self.runs);

        self.attending = true;
        self.input.upload(&self.stream, input_bytes)?;
        if let Some(asked) = &asked {
            asked.wait_on_stream(&self.stream, deadline)?;
        }
        let (input, output) = (self.input.device.ptr(), self.output.device.ptr());
        let attend = Attend {
            members: members as u32,
            queries: input,
            answer: asked.as_ref().map(StreamPending::table),
            local_runs: input + runs_at as u64,
            local_offsets: input + offsets_at as u64,
            out: output + FAILED_BYTES as u64,
            lse: output + lse_at as u64,
            failed: output,
            splits: splits as u32,
        };
        // SAFETY: input and output have the shapes that are said, and live until the stream is done; local runs were
        // found in the session's extents, where no row of a step is written while its layer attends; the answer was
        // waited for on the stream, and is released behind the kernel.
        unsafe { self.kernel.launch(&self.stream, &attend) }?;
        self.output.download(&self.stream, output_bytes)?;
        let answered = match asked {
            None => None,
            Some(asked) => Some(self.answered(asked, deadline, wanted)?),
        };
        self.stream.synchronize().map_err(Error::from)?;
        (self.hinting, self.attending) = (false, false);

        self.check(layer.pass.layer, answered.as_ref())?;
        self.output.get(FAILED_BYTES, out);
        self.merge(splits, lse_at, (out, lse));
        Ok(answered)
    }

    /// Finds the rows that are read in the session's extents.
    fn find_local(&mut self, layer: &Layer<'_>) -> Result<(), Error> {
        self.offsets.clear();
        self.runs.clear();
        for (sequence, position) in layer.batch.iter().zip(layer.positions) {
            for head in 0..layer.pass.shape.kv_heads {
                self.offsets.push(self.runs.len() as u32);
                self.found.clear();
                for tokens in layer.pass.local(*position) {
                    sequence.inner().local_device_runs(layer.pass.layer, head, tokens, &mut self.found)?;
                }
                let found = self.found.iter();
                self.runs.extend(found.map(|(address, rows)| RowRun {
                    address: *address,
                    rows: *rows,
                    pad: 0,
                }));
            }
        }
        self.offsets.push(self.runs.len() as u32);
        Ok(())
    }

    /// Waits on the CPU for what the stream waits for too, with a deadline, and lets go of it behind the kernel.
    fn answered(
        &self,
        asked: StreamPending,
        deadline: Duration,
        wanted: bool,
    ) -> Result<Answered, DaemonError> {
        let since = Instant::now();
        let completion = asked.completion(deadline)?;
        let waited = since.elapsed();
        if completion.status != Status::Ready {
            return Err(Error::NotReady { layer: completion.layer, status: completion.status }.into());
        }
        let answer = if wanted { Some(asked.answer(deadline)?) } else { None };
        asked.release_on_stream(&self.stream)?;
        Ok(Answered { completion, waited, answer })
    }

    /// Whether the kernel could read everything.
    fn check(&mut self, layer: usize, answered: Option<&Answered>) -> Result<(), DaemonError> {
        let mut failed = [0u32];
        self.output.get(0, &mut failed);
        let [failed] = failed;
        if failed == 0 {
            return Ok(());
        }
        self.clear_failed()?;
        let ticket = answered.map_or(0, |answered| answered.completion.ticket);
        let why = if failed & FAILED_STATUS != 0 {
            "its status word says that it is not there"
        } else {
            "it leads outside the slab and the extents"
        };
        Err(DaemonError::Table { layer, ticket, why })
    }

    /// Puts the parts of every head together, the first of which lies in `out`.
    fn merge(&mut self, splits: usize, lse_at: usize, (out, lse): (&mut [f32], &mut [f32])) {
        let heads = lse.len();
        self.output.get(lse_at, lse);
        self.part.resize(out.len() + heads, 0.0);
        let (part, other) = self.part.split_at_mut(out.len());
        for split in 1..splits {
            self.output.get(FAILED_BYTES + split * size_of_val(part), part);
            self.output.get(lse_at + split * heads * 4, other);
            Kernels::best().merge(out, lse, part, other);
        }
    }
}

impl Drop for DeviceAttention {
    fn drop(&mut self) {
        if (self.hinting || self.attending)
            && self.settle(PARTING).is_err()
            && let Ok(session) = self.kernel.session()
        {
            session.let_streams_go();
        }
    }
}
