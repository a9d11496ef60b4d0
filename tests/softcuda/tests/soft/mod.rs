//! Softcuda as a process sees it: loaded from its library, called by name, in child processes of the test on one machine.

#![allow(dead_code, reason = "every test program uses its own part of it")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use libloading::Library;

/// What a child is to do in its test.
const ROLE: &str = "SOFTCUDA_TEST_ROLE";

/// The role of this process; `None` in the test itself.
pub(crate) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

fn command(test: &str, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(ROLE, role);
    command
}

/// A machine's folder.
pub(crate) struct Machine {
    folder: tempfile::TempDir,
    env: Vec<(&'static str, String)>,
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), env: Vec::new() }
    }

    pub(crate) fn with(mut self, name: &'static str, value: &str) -> Self {
        self.env.push((name, value.to_owned()));
        self
    }

    /// Runs a test again in a role on this machine; it must end well.
    pub(crate) fn run(&self, test: &str, role: &str) {
        let mut command = command(test, role);
        command
            .env("SOFTCUDA_DIR", self.folder.path())
            .envs(self.env.iter().map(|(name, value)| (name, value)));
        let output = command.output().unwrap();
        let words =
            [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        assert!(output.status.success() && words.contains("1 passed"), "{test} as {role}:\n{words}");
    }

    pub(crate) fn violations(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("violations")).unwrap_or_default()
    }
}

/// Asks for faults on the machine of this process.
pub(crate) fn set_faults(faults: &str) {
    let folder = std::path::PathBuf::from(std::env::var_os("SOFTCUDA_DIR").unwrap());
    std::fs::write(folder.join("faults.new"), faults).unwrap();
    std::fs::rename(folder.join("faults.new"), folder.join("faults")).unwrap();
}

/// Another process of this test on this machine, spoken to by lines.
pub(crate) struct Peer {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Peer {
    pub(crate) fn start(test: &str, role: &str) -> Self {
        let mut child = command(test, role).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, to, from }
    }

    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.to, "{line}").unwrap();
    }

    /// The next line that the peer said with [`tell`].
    pub(crate) fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.from.read_line(&mut line).unwrap() > 0, "the peer has ended");
            if let Some((_, told)) = line.split_once(">>> ") {
                return told.trim_end().to_owned();
            }
        }
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn end(mut self) {
        drop(self.to);
        assert!(self.child.wait().unwrap().success());
    }
}

/// Says a line to the process that started this one.
pub(crate) fn tell(line: &str) {
    println!(">>> {line}");
}

/// A line of the process that started this one; empty when it wants no more.
pub(crate) fn heard() -> String {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

/// Bytes of a handle between processes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Handle(pub(crate) [u64; 8]);

impl Handle {
    pub(crate) fn to_line(self) -> String {
        self.0.map(|word| word.to_string()).join(" ")
    }

    pub(crate) fn of_line(line: &str) -> Self {
        let words: Vec<u64> = line.split(' ').map(|word| word.parse().unwrap()).collect();
        Self(words.try_into().unwrap())
    }
}

/// The loaded driver.
pub(crate) struct Soft(Library);

/// Every call takes words here: what a call does not take it does not look at.
type Call = unsafe extern "C" fn(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64) -> u32;

impl Soft {
    /// Loads the driver that lies beside this test.
    pub(crate) fn load() -> Self {
        let path = std::env::current_exe().unwrap().with_file_name("libsoftcuda.so");
        // SAFETY: the library's initialisers are Rust's own.
        Self(unsafe { Library::new(path) }.unwrap())
    }

    /// Loads it, initialises it and makes the first device's context current.
    pub(crate) fn start() -> Self {
        let soft = Self::load();
        soft.ok("cuInit", &[0]);
        let context = soft.gives("cuDevicePrimaryCtxRetain", &[0]);
        soft.ok("cuCtxSetCurrent", &[context]);
        soft
    }

    /// Calls by name; returns the driver's code.
    pub(crate) fn call(&self, name: &str, given: &[u64]) -> u32 {
        let mut a = [0; 11];
        a[..given.len()].copy_from_slice(given);
        // SAFETY: integers and pointers are words to C; the tests give addresses of live values.
        unsafe {
            let function = self.0.get::<Call>(name).unwrap();
            function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10])
        }
    }

    pub(crate) fn ok(&self, name: &str, given: &[u64]) {
        assert_eq!(self.call(name, given), 0, "{name}");
    }

    /// Calls what gives a word through its first parameter.
    pub(crate) fn gives(&self, name: &str, rest: &[u64]) -> u64 {
        let mut word = 0_u64;
        let given: Vec<u64> = std::iter::once(&raw mut word as u64).chain(rest.iter().copied()).collect();
        self.ok(name, &given);
        word
    }

    pub(crate) fn alloc(&self, bytes: u64) -> u64 {
        self.gives("cuMemAlloc_v2", &[bytes])
    }

    pub(crate) fn pinned(&self, bytes: u64) -> u64 {
        self.gives("cuMemHostAlloc", &[bytes, 3])
    }

    pub(crate) fn stream(&self) -> u64 {
        self.gives("cuStreamCreateWithPriority", &[1, 0])
    }

    pub(crate) fn free_bytes(&self) -> u64 {
        let (mut free, mut total) = (0_u64, 0_u64);
        self.ok("cuMemGetInfo_v2", &[&raw mut free as u64, &raw mut total as u64]);
        free
    }

    pub(crate) fn handle(&self, name: &str, of: u64) -> Handle {
        let mut handle = Handle([0; 8]);
        self.ok(name, &[&raw mut handle as u64, of]);
        handle
    }

    /// Opens a handle of memory; the driver's code and the address.
    pub(crate) fn open(&self, handle: Handle) -> (u32, u64) {
        let mut pointer = 0_u64;
        // SAFETY: the signature is the driver's, and the address is of a live value.
        let code = unsafe {
            type Open = unsafe extern "C" fn(*mut u64, Handle, u32) -> u32;
            self.0.get::<Open>("cuIpcOpenMemHandle_v2").unwrap()(&raw mut pointer, handle, 1)
        };
        (code, pointer)
    }

    /// Opens a handle of an event.
    pub(crate) fn open_event(&self, handle: Handle) -> u64 {
        let mut event = 0_u64;
        // SAFETY: as in `open`.
        let code = unsafe {
            type Open = unsafe extern "C" fn(*mut u64, Handle) -> u32;
            self.0.get::<Open>("cuIpcOpenEventHandle").unwrap()(&raw mut event, handle)
        };
        assert_eq!(code, 0, "cuIpcOpenEventHandle");
        event
    }

    /// Reads a word of a device's memory, by a copy that waits.
    pub(crate) fn read(&self, at: u64) -> u64 {
        let mut word = 0_u64;
        self.ok("cuMemcpyDtoH_v2", &[&raw mut word as u64, at, 8]);
        word
    }

    /// Writes a word of a device's memory, by a copy that waits.
    pub(crate) fn write(&self, at: u64, word: u64) {
        self.ok("cuMemcpyHtoD_v2", &[at, &raw const word as u64, 8]);
    }
}

/// Writes a word of host memory that a stream may be waiting for.
pub(crate) fn poke(at: u64, word: u64) {
    // SAFETY: the tests give addresses of pinned memory in use, aligned to a word.
    unsafe { std::sync::atomic::AtomicU64::from_ptr(at as *mut u64) }
        .store(word, std::sync::atomic::Ordering::SeqCst);
}
