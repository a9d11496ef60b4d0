//! From the doorbell that a stream rings to the word that it waits for, through a real daemon.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvoyant_client::cuda::StreamMember;
use kvoyant_client::{Client, Dtype, Model, ModelSpec, Options, Sequence};
use kvoyant_cuda::{Context, Priority, Stream};
use kvoyant_protocol::wire::Status;

use crate::report::Target;
use crate::run::{Figures, Stop, quantile};

use super::Setup;

/// Values of a head: a row is 512 bytes in f16, and a page of 32 rows 16 KiB.
const HEAD_DIM: usize = 128;
const PAGE_ROWS: usize = 32;
/// Pages of one answer.
const PAGES: usize = 64;
/// Requests that share a layer.
const REQUESTS: [usize; 3] = [1, 8, 32];
/// The layer that is asked about; the first is dense.
const LAYER: usize = 1;
/// What is to be reached with one request.
const TARGET_US: f64 = 60.0;
const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon that ends with this value.
struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
}

impl Daemon {
    /// This program is the daemon too.
    fn start(ordinal: u32, arena: &str) -> Result<Self, Stop> {
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name).display().to_string();
        let log = std::fs::File::create(folder.path().join("log"))?;
        let child = Command::new(std::env::current_exe()?)
            .arg(crate::DAEMON)
            .args(["--config", "/dev/null", "--arena", arena, "--slab", "512MiB"])
            .args(["--device", &format!("cuda:{ordinal}"), "--keep", "1"])
            .args(["--socket", &path("kvoyantd.sock"), "--admin-socket", &path("admin.sock")])
            .args(["--state", &path("state")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        let mut daemon = Self { child, folder };
        let since = Instant::now();
        while !daemon.socket().exists() {
            if daemon.child.try_wait()?.is_some() || since.elapsed() > PATIENCE {
                let said = std::fs::read_to_string(daemon.folder.path().join("log")).unwrap_or_default();
                let last = said.lines().last().unwrap_or("it said nothing").to_owned();
                return Err(Stop::Failed(format!("the daemon did not start: {last}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(daemon)
    }

    fn socket(&self) -> std::path::PathBuf {
        self.folder.path().join("kvoyantd.sock")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spec() -> ModelSpec {
    ModelSpec {
        name: "gpu-check".into(),
        fingerprint: "0".repeat(32),
        adapter: String::new(),
        rope: String::new(),
        layers: 2,
        query_heads: 1,
        kv_heads: 1,
        head_dim: HEAD_DIM as u32,
        dtype: Dtype::F16.code(),
        page_rows: PAGE_ROWS as u32,
        sinks: 4,
        window: 64,
        dense_layers: 1,
        sliding_layers: Vec::new(),
        methods: vec![format!("quest:budget={},page={PAGE_ROWS}", PAGES * PAGE_ROWS)],
        slab_bytes: 0,
        graph: None,
        latent_values: 0,
        artifacts: Vec::new(),
    }
}

pub(crate) fn run(setup: &Setup, figures: &Figures) -> Result<(), Stop> {
    // Long enough that little of an answer was in the one before; the driver in software gets less to do.
    let (tokens, requests, turns) =
        if setup.software { (4096, &REQUESTS[..2], 8) } else { (32_768, &REQUESTS[..], 300) };
    let daemon = Daemon::start(setup.ordinal, if setup.software { "512MiB" } else { "2GiB" })?;
    let model = Client::connect(&daemon.socket(), Options::default())?.register(spec(), &[])?;
    let device =
        model.device_session().ok_or_else(|| Stop::Failed("the daemon's device is no GPU".into()))?.clone();
    let stream = device.context().stream(Priority::High)?;
    let mut noise = Noise(1);
    let most = requests.iter().copied().max().unwrap_or(1);
    let sequences =
        (0..most).map(|_| filled(&model, tokens, &mut noise)).collect::<Result<Vec<_>, Stop>>()?;
    for &count in requests {
        let members = &sequences[..count];
        let (mut times, moved) = turn(&model, members, device.context(), &stream, &mut noise, turns)?;
        let requests = if count == 1 { "request" } else { "requests" };
        let name = |what: &str| format!("{what}, {count} {requests} a layer");
        let half = quantile(&mut times, 0.5);
        if count == 1 {
            figures.aim(name("p50"), half, "µs", Target::AtMost(TARGET_US));
        } else {
            figures.add(name("p50"), half, "µs");
        }
        figures.add(name("p99"), quantile(&mut times, 0.99), "µs");
        figures.add(name("moved in each answer"), moved / 1024.0, "KiB");
    }
    Ok(())
}

/// A sequence full of rows.
fn filled(model: &Model, tokens: usize, noise: &mut Noise) -> Result<Sequence, Stop> {
    let sequence = model.open(0, tokens)?;
    for layer in 0..2 {
        let rows: Vec<u8> = (0..tokens * 2 * HEAD_DIM).flat_map(|_| noise.half().to_le_bytes()).collect();
        sequence.write_rows(layer, 0, 0, &rows)?;
    }
    model.append(&[(&sequence, tokens)])?;
    Ok(sequence)
}

/// Asks again and again; the microseconds of each answer, and the mean of what was moved for one in bytes.
fn turn(
    model: &Model,
    sequences: &[Sequence],
    context: &Context,
    stream: &Stream,
    noise: &mut Noise,
    turns: usize,
) -> Result<(Vec<f64>, f64), Stop> {
    let bytes = sequences.len() * HEAD_DIM * 4;
    let (hints, staging) = (context.alloc(bytes)?, context.pinned(bytes)?);
    let (mut times, mut moved) = (Vec::new(), 0);
    // The first answers find nothing prepared.
    for index in 0..turns + 2 {
        for value in 0..sequences.len() * HEAD_DIM {
            // SAFETY: within a pinned buffer of as many f32, which no copy reads now.
            unsafe { staging.as_ptr().cast::<f32>().add(value).write(noise.unit()) };
        }
        // SAFETY: both buffers have `bytes`, and the copy is waited for.
        unsafe { stream.copy_h2d(hints.ptr(), staging.as_ptr(), bytes) }?;
        stream.synchronize()?;
        let members: Vec<StreamMember<'_>> =
            sequences.iter().map(|sequence| StreamMember { sequence, position: sequence.tokens() }).collect();
        let since = Instant::now();
        // SAFETY: the hints are device memory of that size in the session's context, as is the stream, and outlive it.
        let pending = unsafe { model.submit_on_stream(LAYER, &members, hints.ptr(), stream) }?;
        pending.wait_on_stream(stream, PATIENCE)?;
        stream.synchronize()?;
        let us = since.elapsed().as_secs_f64() * 1e6;
        let completion = pending.completion(PATIENCE)?;
        if completion.status != Status::Ready || completion.rows_selected == 0 {
            return Err(Stop::Failed(format!("an answer is not as it should be: {completion:?}")));
        }
        pending.release_on_stream(stream)?;
        if index >= 2 {
            times.push(us);
            moved += completion.bytes_moved;
        }
    }
    Ok((times, moved as f64 / turns as f64))
}

/// Numbers without meaning, the same each time.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// From -1 to 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// An f16 whose size is from 1/2 to 1, of either sign, as bits.
    fn half(&mut self) -> u16 {
        let bits = self.next();
        (bits >> 48) as u16 & 0x83ff | 0x3800
    }
}
