//! Machines whose CUDA driver is softcuda: for processes that a test starts, and for the test itself in a child process.
//!
//! A process has one driver for good, so a test that needs one runs itself again:
//!
//! ```no_run
//! # use kvoyant_tests::softcuda::{Machine, on_softcuda};
//! # use kvoyant_tests::this_test;
//! #[test]
//! fn a_slab_is_read_back() {
//!     if !on_softcuda(this_test!(), &Machine::new()) {
//!         return;
//!     }
//!     // Here `libcuda.so.1` is softcuda.
//! }
//! ```

use std::ffi::OsString;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

/// Marks the child that runs one test; its value is the test's name.
const CHILD: &str = "KVOYANT_SOFTCUDA_CHILD";

/// Names that the library is looked for under.
const NAMES: [&str; 3] = ["libcuda.so.1", "libcuda.so", "libnvrtc.so.12"];

/// A machine with softcuda's devices: a folder to load the driver from, and one with the machine's state.
#[derive(Debug)]
pub struct Machine {
    folder: tempfile::TempDir,
    set: Vec<(String, String)>,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// A machine with one device of 2 GiB.
    ///
    /// # Panics
    /// If the library was not built, or the temporary folder cannot be written.
    #[must_use]
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let libraries = folder.path().join("lib");
        std::fs::create_dir(&libraries).expect("a folder");
        std::fs::create_dir(folder.path().join("machine")).expect("a folder");
        let library = library();
        for name in NAMES {
            symlink(&library, libraries.join(name)).expect("a link");
        }
        Self { folder, set: Vec::new() }
    }

    /// Sets one of softcuda's variables, such as `SOFTCUDA_MEMORY` to `256MiB`.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.set.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The folder that a process loads the driver from: the first entry of its `LD_LIBRARY_PATH`.
    #[must_use]
    pub fn libraries(&self) -> PathBuf {
        self.folder.path().join("lib")
    }

    /// The folder of the machine's state (`SOFTCUDA_DIR`).
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("machine")
    }

    /// Makes a process one of this machine.
    pub fn env<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let mut path = OsString::from(self.libraries());
        if let Some(before) = std::env::var_os("LD_LIBRARY_PATH") {
            path.push(":");
            path.push(before);
        }
        command.env("LD_LIBRARY_PATH", path).env("SOFTCUDA_DIR", self.state());
        command.envs(self.set.iter().map(|(name, value)| (name, value)))
    }

    /// Has things go wrong from now on: one fault a line, as softcuda's `README.md` lists them. Replaces those before;
    /// an empty text ends them.
    ///
    /// # Panics
    /// If the machine's folder cannot be written.
    pub fn set_faults(&self, faults: &str) {
        // Moved into place, so that no process reads half of it.
        let new = self.state().join("faults.new");
        std::fs::write(&new, faults).expect("the faults are written");
        std::fs::rename(new, self.state().join("faults")).expect("the faults are put in place");
    }

    /// What a card would not have forgiven, one line each.
    #[must_use]
    pub fn violations(&self) -> String {
        std::fs::read_to_string(self.state().join("violations")).unwrap_or_default()
    }

    /// Calls of the driver that were made and that softcuda lacks, one a line.
    #[must_use]
    pub fn not_implemented(&self) -> String {
        std::fs::read_to_string(self.state().join("not-implemented")).unwrap_or_default()
    }

    /// # Panics
    /// If there was anything that a card would not have forgiven.
    pub fn assert_clean(&self) {
        let violations = self.violations();
        assert!(violations.is_empty(), "softcuda's violations:\n{violations}");
    }
}

/// The library, beside the program that runs or with its dependencies.
fn library() -> PathBuf {
    let program = std::env::current_exe().expect("this program's path");
    let folder = program.parent().expect("a folder");
    let up = folder.parent().unwrap_or(folder);
    let places = [folder.to_owned(), folder.join("deps"), up.to_owned(), up.join("deps")];
    let found = places.iter().map(|place| place.join("libsoftcuda.so")).find(|path| path.exists());
    found.unwrap_or_else(|| {
        panic!("libsoftcuda.so is not beside {}: build the softcuda crate", program.display())
    })
}

/// The name of the test that this stands in, as its program's `--exact` takes it.
#[macro_export]
macro_rules! this_test {
    () => {{
        fn here() {}
        $crate::softcuda::name_of_test(std::any::type_name_of_val(&here))
    }};
}

/// Of the path of a function within a test (crate, modules, test, what stands in it): modules and test.
#[doc(hidden)]
#[must_use]
pub fn name_of_test(path: &'static str) -> &'static str {
    let path = path.split_once("::").map_or(path, |(_, rest)| rest);
    let end = path.find("::{{closure}}").or_else(|| path.rfind("::")).unwrap_or(path.len());
    &path[..end]
}

/// How a child ended, and all that it said.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it wrote to standard output and error.
    pub words: String,
}

/// Whether this process is a child that [`in_child`] started.
#[must_use]
pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Runs one test of this program ([`this_test`]) again, in a process of its own on a machine, and waits for its end.
///
/// # Panics
/// If it cannot be started.
pub fn in_child(test: &str, machine: &Machine, env: &[(&str, &str)]) -> Ended {
    let program: &Path = &std::env::current_exe().expect("this program's path");
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).stdin(Stdio::null());
    machine.env(&mut command).env(CHILD, test).envs(env.iter().copied());
    let output = command.output().expect("the child starts");
    let words =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(!words.contains("running 0 tests"), "there is no test {test} in {}", program.display());
    Ended { status: output.status, words }
}

/// Has the rest of a test run on a machine: true in the child, which goes on; false in the parent, once the child has
/// ended well and nothing happened that a card would not have forgiven.
///
/// # Panics
/// In the parent, if the child failed or there were violations.
#[must_use]
pub fn on_softcuda(test: &str, machine: &Machine) -> bool {
    if is_child() {
        return true;
    }
    let ended = in_child(test, machine, &[]);
    assert!(ended.status.success(), "{test} failed on softcuda ({}):\n{}", ended.status, ended.words);
    machine.assert_clean();
    false
}
