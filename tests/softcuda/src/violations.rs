//! What a real driver would not forgive is put down here, one line each, and said on standard error.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

/// The list of a machine's violations.
#[derive(Debug)]
pub(crate) struct Violations {
    file: Option<File>,
    process: String,
}

impl Violations {
    /// Appends to the list in the machine's folder, if it has one.
    pub(crate) fn open(folder: Option<&Path>) -> Self {
        let file = folder.and_then(|folder| {
            OpenOptions::new().create(true).append(true).open(folder.join("violations")).ok()
        });
        let name = std::env::current_exe().ok();
        let name = name
            .as_deref()
            .and_then(Path::file_name)
            .map_or("?".into(), |name| name.to_string_lossy().into_owned());
        Self { file, process: format!("{name}[{}]", std::process::id()) }
    }

    /// Puts one down.
    pub(crate) fn add(&self, call: &str, what: &str) {
        let line = format!("{}: {call}: {what}\n", self.process);
        crate::say(&format!("violation: {line}"));
        if let Some(mut file) = self.file.as_ref() {
            // One write of a file opened for appending is one line, whoever else writes.
            let _ = file.write_all(line.as_bytes());
        }
    }
}
