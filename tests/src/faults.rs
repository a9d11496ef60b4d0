//! A daemon, or a client, whose n-th call of a kind fails, its workload, and what must hold all the same: no wrong byte, hang or leak, no end but a typed one.
//!
//! The fault happens once. What it hits may fail, with an error that says so; after that everything must work, and everything that the
//! failed work had must be back: as after the same work without a fault.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kvoyant_client::{Client, Error, Hint, Member, Model, Options, SelectedBy, Sequence};
use kvoyant_protocol::faults::Point;
use nix::sys::signal::{Signal, kill};

use crate::{Daemon, fake, words};
use census::{Census, PROCESS};
use subject::Subject;

mod census;
mod subject;

/// Tokens of the workload's sequence: a dozen pages of each head, most of which leave host memory.
const TOKENS: usize = 400;
/// Tokens that are written at once.
const CHUNK: usize = 100;
/// What a driver's calls fail with once: there is no memory, and something that nobody knows.
pub const CODES: [u32; 2] = [2, 999];
/// Calls of the driver of which there are as many as time passes.
pub const LOOKS: [&str; 2] = ["cuEventQuery", "cuCtxGetCurrent"];
/// Calls that release something.
const RELEASES: [&str; 9] = [
    "cuMemUnmap",
    "cuMemRelease",
    "cuMemAddressFree",
    "cuMemFree_v2",
    "cuMemFreeHost",
    "cuMemHostUnregister",
    "cuEventDestroy_v2",
    "cuStreamDestroy_v2",
    "cuIpcCloseMemHandle",
];
/// What softcuda's descriptors and mappings are called.
const DRIVERS: &str = "softcuda-";
/// How often the workload is run until a fault has to have happened.
const ROUNDS: usize = 4;
/// How long a daemon whose device is lost may take to say so and to end.
const LOSES_WITHIN: Duration = Duration::from_secs(10);
/// Where the fork is cut.
const CUT: usize = 133;

/// What a sweep finds: each is a defect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Rows that are not what was written.
    Wrong(String),
    /// Something that did not come to its end.
    Hang(String),
    /// Something that is there and should not be.
    Leak(String),
    /// The daemon ended, panicked, or goes on refusing.
    Broken(String),
}

/// What a run without a defect saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Whether the call was made at all: if not, there are no more of its kind.
    pub hit: bool,
    /// What the workload, or the daemon's start, failed with.
    pub error: Option<String>,
    /// Whether the daemon did not start.
    pub refused: bool,
}

/// A sweep of one daemon binary.
#[derive(Debug)]
pub struct Sweep {
    binary: String,
    patience: Duration,
    flags: Vec<String>,
    expected: Census,
    /// The folder of softcuda's machine, where the daemon's device is on one.
    machine: Option<PathBuf>,
}

/// What fails.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The n-th call of a kind.
    Call(Point, u64),
    /// The n-th call of the CUDA driver, of this name or of any but [`LOOKS`], with this code.
    Driver(Option<&'static str>, u64, u32),
    /// The n-th call of the CUDA driver, and every one after it: the device is lost.
    Lost(u64),
}

/// A daemon that clients with faults are tried on.
#[derive(Debug)]
pub struct Served(Subject);

/// What a client process ends with whose workload failed with an error that says so.
pub const CLIENT_FAILED: i32 = 2;

/// Runs the workload once, in a process of its own, and says on stderr what failed: what [`Sweep::run_client`] starts.
///
/// # Errors
/// A defect: a wrong row, a hang, or memory of the session that stays when all of it is dropped.
pub fn act_as_client(socket: &Path, patience: Duration) -> Result<Option<String>, Found> {
    let sweep = Sweep {
        binary: String::new(),
        patience,
        flags: Vec::new(),
        expected: Census::default(),
        machine: None,
    };
    let error = match sweep.workload(socket, 0) {
        Ok(()) => None,
        Err(Trouble::Failed(error)) => Some(error.to_string()),
        Err(Trouble::Found(found)) => return Err(found),
    };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mapped = maps.lines().filter(|line| line.contains("/memfd:kvoyant")).count();
    let descriptors = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let links = descriptors.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let open = links.filter(|to| to.to_string_lossy().contains("memfd:kvoyant")).count();
    if mapped + open > 0 {
        return Err(Found::Leak(format!("{mapped} mappings and {open} descriptors of the session")));
    }
    Ok(error)
}

/// Why a workload did not come to its end.
enum Trouble {
    Failed(Error),
    Found(Found),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        match error {
            Error::Deadline { .. } => Self::Found(Found::Hang(error.to_string())),
            error => Self::Failed(error),
        }
    }
}

impl Sweep {
    /// Of this daemon; nothing may take longer than `patience`. The first run is without a fault, and all others are compared with it.
    ///
    /// # Errors
    /// What is wrong without any fault.
    pub fn new(binary: &str, patience: Duration, flags: &[&str]) -> Result<Self, Found> {
        Self::made(binary, patience, flags, None)
    }

    /// Of this daemon on a GPU, in a process whose driver is softcuda.
    ///
    /// # Errors
    /// What is wrong without any fault.
    ///
    /// # Panics
    /// If this process has another driver.
    pub fn on_gpu(binary: &str, patience: Duration) -> Result<Self, Found> {
        let machine = std::env::var_os("SOFTCUDA_DIR").map(PathBuf::from).expect("softcuda's machine");
        let state = machine.join("state").display().to_string();
        let flags = ["--device", "cuda:0", "--pin", "true", "--slab", "8MiB", "--state", &state];
        Self::made(binary, patience, &flags, Some(machine))
    }

    fn made(
        binary: &str,
        patience: Duration,
        flags: &[&str],
        machine: Option<PathBuf>,
    ) -> Result<Self, Found> {
        let flags = flags.iter().map(ToString::to_string).collect();
        let mut sweep =
            Self { binary: binary.to_owned(), patience, flags, expected: Census::default(), machine };
        let mut subject = sweep.start(None)?.map_err(Found::Broken)?;
        for round in 0..2 {
            match sweep.workload(&subject.socket(), round) {
                Ok(()) => {}
                Err(Trouble::Failed(error)) => return Err(Found::Broken(error.to_string())),
                Err(Trouble::Found(found)) => return Err(found),
            }
        }
        let since = Instant::now();
        // What is on its way back is on its way back for a while.
        let mut last = Census::default();
        loop {
            let census = sweep.census(&mut subject)?;
            let still = census == last && census.0.get("sessions") == Some(&0);
            last = census;
            if still || since.elapsed() > sweep.patience {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        sweep.expected = last;
        Ok(sweep)
    }

    /// Has the n-th call of a kind fail, and says what came of it.
    ///
    /// # Errors
    /// A defect.
    pub fn run(&self, point: Point, nth: u64) -> Result<Seen, Found> {
        self.fail(Fault::Call(point, nth))
    }

    /// Has the n-th call of the CUDA driver fail with a code, and says what came of it: the n-th of that name, or of any but [`LOOKS`]. A daemon
    /// that takes its device for lost then ends, in words and with the exit status that has it started again.
    ///
    /// # Errors
    /// A defect.
    pub fn run_driver(&self, call: Option<&'static str>, nth: u64, code: u32) -> Result<Seen, Found> {
        self.fail(Fault::Driver(call, nth, code))
    }

    /// Has the device be lost at the n-th call of the driver. The daemon has to end for that, in words and with the exit status that has it
    /// started again, and its clients have to hear of it.
    ///
    /// # Errors
    /// A defect.
    pub fn run_lost(&self, nth: u64) -> Result<Seen, Found> {
        let mut subject = match self.start(Some(Fault::Lost(nth)))? {
            Ok(subject) => subject,
            Err(said) if said.contains("device") => {
                return Ok(Seen { hit: true, error: Some(said), refused: true });
            }
            Err(said) => return Err(Found::Broken(format!("it says no word of its device: {said}"))),
        };
        let struck = self.seen(&subject);
        for round in 0..2 * ROUNDS {
            if round >= ROUNDS && !struck.exists() {
                break;
            }
            let told = match self.workload(&subject.socket(), round) {
                Ok(()) => continue,
                Err(Trouble::Found(found)) => return Err(found),
                Err(Trouble::Failed(error)) => error.to_string(),
            };
            if self.ends_lost(&mut subject)? {
                return Ok(Seen { hit: true, error: Some(told), refused: false });
            }
            // Another session has to make a daemon see it that has not used its device since, be it after all of them.
        }
        if struck.exists() {
            return Err(Found::Broken("the device is lost, and the daemon goes on".into()));
        }
        self.end(subject)?;
        Ok(Seen { hit: false, error: None, refused: false })
    }

    fn fail(&self, fault: Fault) -> Result<Seen, Found> {
        let mut subject = match self.start(Some(fault))? {
            Ok(subject) => subject,
            // A daemon that cannot start says why, and has served nobody.
            Err(said) => return Ok(Seen { hit: true, error: Some(said), refused: true }),
        };
        let error = match self.workload(&subject.socket(), 0) {
            Ok(()) => None,
            Err(Trouble::Failed(error)) => Some(error.to_string()),
            Err(Trouble::Found(found)) => return Err(found),
        };
        if let Some(text) = &error
            && self.lost(&mut subject, text)?
        {
            return Ok(Seen { hit: true, error, refused: false });
        }
        if let Some(end) = subject.ended()? {
            return Err(Found::Broken(format!("the daemon ended in the middle of its work: {end}")));
        }
        let hit = self.seen(&subject).exists();
        match self.workload(&subject.socket(), 1) {
            Ok(()) => {}
            Err(Trouble::Failed(again)) if self.lost(&mut subject, &again.to_string())? => {
                return Ok(Seen { hit: true, error: Some(again.to_string()), refused: false });
            }
            Err(Trouble::Failed(again)) if self.seen(&subject).exists() && !hit => {
                // It came as late as that.
                match self.workload(&subject.socket(), 2) {
                    Ok(()) => {}
                    Err(Trouble::Failed(error)) if self.lost(&mut subject, &error.to_string())? => {
                        return Ok(Seen { hit: true, error: Some(again.to_string()), refused: false });
                    }
                    Err(Trouble::Failed(error)) => {
                        return Err(Found::Broken(format!("{again}, and then {error}")));
                    }
                    Err(Trouble::Found(found)) => return Err(found),
                }
            }
            Err(Trouble::Failed(again)) => {
                return Err(Found::Broken(format!("after {error:?}, the next try fails too: {again}")));
            }
            Err(Trouble::Found(found)) => return Err(found),
        }
        self.compare(&mut subject)?;
        let seen = self.seen(&subject);
        let hit = seen.exists();
        self.end(subject)?;
        // What fails at the very end counts too.
        Ok(Seen { hit: hit || self.machine.is_some() && seen.exists(), error, refused: false })
    }

    /// The file that is there once the fault has happened.
    fn seen(&self, subject: &Subject) -> PathBuf {
        match &self.machine {
            Some(machine) => machine.join("struck"),
            None => subject.folder.path().join("seen"),
        }
    }

    /// Whether a daemon on a GPU has taken its device for lost, as a client was told so, and has ended in good order.
    fn lost(&self, subject: &mut Subject, told: &str) -> Result<bool, Found> {
        if self.machine.is_none() || !(told.contains("lost") || told.contains("gone")) {
            return Ok(false);
        }
        self.ends_lost(subject)
    }

    /// Whether it ends now as a daemon that has lost its device.
    fn ends_lost(&self, subject: &mut Subject) -> Result<bool, Found> {
        let since = Instant::now();
        while since.elapsed() < LOSES_WITHIN {
            if let Some(end) = subject.ended()? {
                if end.starts_with("exit status: 75") && end.contains("the device is lost") {
                    return Ok(true);
                }
                return Err(Found::Broken(format!("the daemon ended in other words: {end}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(false)
    }

    /// A daemon without a fault, for clients that have one.
    ///
    /// # Errors
    /// One that does not start.
    pub fn serve(&self) -> Result<Served, Found> {
        Ok(Served(self.start(None)?.map_err(Found::Broken)?))
    }

    /// Has the n-th call of a kind fail in a client of a daemon: the workload, in a process of its own, which `program` makes of itself
    /// with the arguments `client SOCKET` ([`act_as_client`]).
    ///
    /// # Errors
    /// A defect of the client's, or of the daemon's after it.
    pub fn run_client(
        &self,
        served: &mut Served,
        program: &Path,
        point: Point,
        nth: u64,
    ) -> Result<Seen, Found> {
        let subject = &mut served.0;
        let seen = subject.folder.path().join("seen");
        let _ = std::fs::remove_file(&seen);
        let mut command = Command::new(program);
        command.arg("client").arg(subject.socket()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.env("KVOYANT_FAULTS", format!("{}:{nth}", point.name())).env("KVOYANT_FAULTS_SEEN", &seen);
        let mut client = command.spawn().map_err(|error| Found::Broken(error.to_string()))?;
        let since = Instant::now();
        let status = loop {
            match client.try_wait() {
                Ok(Some(status)) => break status,
                _ if since.elapsed() > 2 * self.patience => {
                    let _ = client.kill();
                    let _ = client.wait();
                    return Err(Found::Hang("the client does not end".into()));
                }
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let said = words(&mut client);
        let error = match status.code() {
            Some(0) => None,
            Some(CLIENT_FAILED) => Some(said),
            _ => return Err(Found::Broken(format!("the client ended with {status}: {said}"))),
        };
        if let Some(end) = subject.ended()? {
            return Err(Found::Broken(format!("a client's fault ended the daemon: {end}")));
        }
        self.compare(subject)?;
        Ok(Seen { hit: seen.exists(), error, refused: false })
    }

    /// Starts a daemon; its last words where it ends at once.
    fn start(&self, fault: Option<Fault>) -> Result<Result<Subject, String>, Found> {
        let folder = tempfile::tempdir().map_err(|error| Found::Broken(error.to_string()))?;
        let path = |name: &str| folder.path().join(name).display().to_string();
        let (spill, store) = (path("spill"), path("images"));
        let made = std::fs::create_dir(&spill);
        made.map_err(|error| Found::Broken(error.to_string()))?;
        let own = ["--spill", &spill, "--spill-bytes", "64MiB", "--host-percent", "20", "--store", &store];
        // On a GPU nothing leaves host memory.
        let own = if self.machine.is_some() { &own[6..] } else { &own[..] };
        // Nobody reads what it says meanwhile: a panic is told in any case.
        let more = ["--log", "error", "--arena", "256MiB", "--lanes", "1", "--copy-threads", "1"];
        let flags: Vec<&str> =
            own.iter().copied().chain(more).chain(self.flags.iter().map(String::as_str)).collect();
        let mut command = Daemon::command(&self.binary, folder.path(), &flags);
        match fault {
            Some(Fault::Call(point, nth)) => {
                command.env("KVOYANT_FAULTS", format!("{}:{nth}", point.name()));
                command.env("KVOYANT_FAULTS_SEEN", folder.path().join("seen"));
            }
            Some(Fault::Driver(call, nth, code)) => {
                let call = call.map_or_else(String::new, |name| format!("call={name} "));
                let rule = format!("fail {call}after={} count=1 code={code}", nth.saturating_sub(1));
                self.arm(&rule).map_err(|error| Found::Broken(error.to_string()))?;
            }
            Some(Fault::Lost(nth)) => {
                let rule = format!("device-lost after={} count=1", nth.saturating_sub(1));
                self.arm(&rule).map_err(|error| Found::Broken(error.to_string()))?;
            }
            None => self.arm("").map_err(|error| Found::Broken(error.to_string()))?,
        }
        let child = command.spawn().map_err(|error| Found::Broken(error.to_string()))?;
        let mut subject = Subject { child, folder };
        let since = Instant::now();
        while !subject.socket().exists() {
            if let Some(said) = subject.ended()? {
                return Ok(Err(said));
            }
            if since.elapsed() > self.patience {
                return Err(Found::Hang("the daemon neither starts nor ends".into()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Ok(subject))
    }

    /// Has softcuda do this to the daemon from now on, and nothing else; nothing at all if it is empty.
    fn arm(&self, rule: &str) -> std::io::Result<()> {
        let Some(machine) = &self.machine else { return Ok(()) };
        let program = Path::new(&self.binary).file_name().unwrap_or_default().to_string_lossy();
        let _ = std::fs::remove_file(machine.join("struck"));
        let rule = if rule.is_empty() { String::new() } else { format!("{rule} process={program}\n") };
        std::fs::write(machine.join("faults.new"), rule)?;
        std::fs::rename(machine.join("faults.new"), machine.join("faults"))
    }

    /// Tells it to end, and looks at how it does.
    fn end(&self, mut subject: Subject) -> Result<(), Found> {
        let _ = kill(subject.pid(), Signal::SIGTERM);
        let since = Instant::now();
        loop {
            match subject.ended()? {
                Some(end) if end.starts_with("exit status: 0") => return Ok(()),
                Some(end) => return Err(Found::Broken(format!("told to end, the daemon ends with {end}"))),
                None if since.elapsed() > self.patience => {
                    return Err(Found::Hang("the daemon was told to end and does not".into()));
                }
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    fn census(&self, subject: &mut Subject) -> Result<Census, Found> {
        let admin = subject.folder.path().join("admin.sock");
        match kvoyant_daemon::admin::fetch_status(&admin) {
            Ok(status) => Ok(Census::of(subject.pid(), &status)),
            Err(error) => match subject.ended()? {
                Some(end) => Err(Found::Broken(end)),
                None => Err(Found::Hang(format!("no status: {error}"))),
            },
        }
    }

    /// Waits until there is no more than without a fault.
    fn compare(&self, subject: &mut Subject) -> Result<(), Found> {
        let since = Instant::now();
        loop {
            let mut census = self.census(subject)?;
            if let Some(machine) = &self.machine {
                // A client that could not say that it closed device memory has it set aside until its process ends, which this one does not.
                census.forget(PROCESS);
                let struck = std::fs::read_to_string(machine.join("struck")).unwrap_or_default();
                if RELEASES.contains(&struck.as_str()) {
                    // What a driver refuses to release, once or for good, is its own until the process ends.
                    census.forget_all(DRIVERS);
                }
            }
            let beyond = census.beyond(&self.expected);
            if beyond.is_empty() {
                return Ok(());
            }
            if since.elapsed() > self.patience {
                return Err(Found::Leak(beyond.join(", ")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn wait(&self, pending: kvoyant_client::Pending) -> Result<kvoyant_client::Ready, Error> {
        pending.wait(self.patience)
    }

    /// A little of everything that the daemon does.
    fn workload(&self, socket: &Path, round: usize) -> Result<(), Trouble> {
        let options = Options { control_timeout: self.patience, ..Options::default() };
        let client = Client::connect(socket, options)?;
        let model = client.register(fake::spec(&["full", "given"]), &[])?;
        let first = model.open(0, 0)?;
        self.write(&model, &first, 1, TOKENS)?;
        let second = first.fork(Some(1))?;
        second.truncate(CUT)?;
        self.write(&model, &second, 2, TOKENS)?;
        for layer in 1..fake::LAYERS {
            self.ask(&model, &first, layer, Hint::None, |token| (token < TOKENS).then_some(1))?;
            let ids: Vec<u32> = (0..fake::KV_HEADS).flat_map(|_| [4, 10, 99, 140, 300]).collect();
            let of = |token| Some(if token < CUT { 1 } else { 2 });
            self.ask(&model, &second, layer, Hint::Ids(&ids), of)?;
        }
        // Host memory's alone.
        if self.machine.is_none() {
            let tokens: Vec<u32> = (0..TOKENS as u32).collect();
            model.publish(&first, &tokens, false)?;
            let attached = model.attach(0, &tokens, SelectedBy::Lane)?;
            self.read(&model, &attached, attached.tokens(), |_| 1)?;
            attached.close()?;
        }
        let image = format!("image-{round}");
        second.suspend(&image, true, "a sweep's").map_err(|(_, error)| error)?;
        let (resumed, _) = model.resume(&image, None, SelectedBy::Lane)?;
        self.read(&model, &resumed, TOKENS, |token| if token < CUT { 1 } else { 2 })?;
        resumed.close()?;
        first.close()?;
        Ok(())
    }

    fn write(&self, model: &Model, sequence: &Sequence, seed: usize, tokens: usize) -> Result<(), Trouble> {
        while sequence.tokens() < tokens {
            let end = (sequence.tokens() + CHUNK).min(tokens);
            model.reserve(&[(sequence, end)])?;
            fake::fill(model, sequence, seed, end)?;
        }
        Ok(())
    }

    /// Asks, and compares each row with what was written.
    fn ask(
        &self,
        model: &Model,
        sequence: &Sequence,
        layer: usize,
        hint: Hint<'_>,
        seed_of: impl Fn(usize) -> Option<usize>,
    ) -> Result<(), Trouble> {
        let member = Member { sequence, position: sequence.tokens(), hint };
        let ready = self.wait(model.speculate(layer, &[member])?)?;
        for head in 0..fake::KV_HEADS {
            let mut bytes = Vec::new();
            ready.copy_rows(0, head, &mut bytes)?;
            let tokens = ready.tokens(0, head).flat_map(|run| run.token..run.token + run.rows);
            let tokens: Vec<usize> = tokens.collect();
            for (token, found) in tokens.iter().zip(bytes.chunks_exact(2 * fake::HEAD_DIM * 4)) {
                let seed = seed_of(*token).ok_or_else(|| wrong(layer, head, *token))?;
                same(found, seed, layer, head, *token)?;
            }
            if tokens.is_empty() || bytes.len() != tokens.len() * 2 * fake::HEAD_DIM * 4 {
                return Err(wrong(layer, head, 0));
            }
        }
        Ok(())
    }

    /// Reads everything, and compares.
    fn read(
        &self,
        model: &Model,
        sequence: &Sequence,
        tokens: usize,
        seed_of: impl Fn(usize) -> usize,
    ) -> Result<(), Trouble> {
        let mut rows = vec![0; 2 * fake::HEAD_DIM * 4 * tokens];
        for layer in 0..fake::LAYERS {
            let lease = self.wait(model.fetch(layer, &[(sequence, tokens)])?)?;
            for head in 0..fake::KV_HEADS {
                sequence.read_rows(layer, head, 0..tokens, &mut rows)?;
                for (token, found) in rows.chunks_exact(2 * fake::HEAD_DIM * 4).enumerate() {
                    same(found, seed_of(token), layer, head, token)?;
                }
            }
            drop(lease);
        }
        Ok(())
    }
}

fn wrong(layer: usize, head: usize, token: usize) -> Trouble {
    Trouble::Found(Found::Wrong(format!("layer {layer} head {head} token {token}")))
}

fn same(found: &[u8], seed: usize, layer: usize, head: usize, token: usize) -> Result<(), Trouble> {
    let wanted: Vec<u8> =
        fake::row(seed, layer, head, token).into_iter().flat_map(f32::to_le_bytes).collect();
    if found == wanted { Ok(()) } else { Err(wrong(layer, head, token)) }
}
