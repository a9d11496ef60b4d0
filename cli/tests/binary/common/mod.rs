//! Running the real binary.

use std::path::Path;
use std::process::{Command, Output};

/// The binary with a home of its own, so that no test sees the user's cache.
pub(crate) fn kvoyant(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvoyant"));
    command.env("HOME", home).env("XDG_CACHE_HOME", home.join("cache")).env("TMPDIR", home);
    command.env("XDG_STATE_HOME", home.join("state"));
    // Tests run side by side: threads of one would only be in the way of another.
    command.env("RAYON_NUM_THREADS", "1");
    command
}

/// Runs it and returns (exit code, stdout, stderr).
pub(crate) fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("its output is UTF-8");
    (status.code(), text(stdout), text(stderr))
}

/// Every file and folder below `folder`, as relative paths.
pub(crate) fn everything_below(folder: &Path) -> Vec<String> {
    let mut all = Vec::new();
    let mut todo = vec![folder.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in std::fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = entry.path();
            all.push(path.strip_prefix(folder).expect("it is below").display().to_string());
            if path.is_dir() {
                todo.push(path);
            }
        }
    }
    all.sort();
    all
}
