//! Faults on request: a file in the machine's folder says what goes wrong, and may change at any time.
//!
//! One fault a line: a name and `key=value` pairs. Names: `oom` (allocations fail), `register-fails`, `ecc` and
//! `device-lost` (every call fails from then on), `launch-failure` (the next kernel does), `slow-copies us=N`,
//! `hang-copies` (until the line is gone), `fail call=NAME code=N` (a call by name, or without one whatever is called, but for [`LOOKS`]). What has
//! struck last is named in the file `struck`. Keys of all: `after=N` (the
//! first N times pass), `count=N` (strikes N times only), `process=TEXT` (only programs whose file name holds it).

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::ffi::Code;

/// Calls of which there are as many as time passes: queries, and what comes with each.
const LOOKS: [&str; 3] = ["cuEventQuery", "cuStreamQuery", "cuCtxGetCurrent"];

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    name: String,
    call: Option<String>,
    code: Option<u32>,
    us: u64,
    after: u64,
    count: Option<u64>,
}

impl Rule {
    /// Reads a line; `None` if it is empty, a comment, or for another program.
    fn parse(line: &str, program: &str) -> Option<Self> {
        let mut words = line.split('#').next()?.split_whitespace();
        let mut rule =
            Self { name: words.next()?.to_owned(), call: None, code: None, us: 0, after: 0, count: None };
        for word in words {
            match word.split_once('=')? {
                ("call", name) => rule.call = Some(name.to_owned()),
                ("code", code) => rule.code = Some(code.parse().ok()?),
                ("us", us) => rule.us = us.parse().ok()?,
                ("after", after) => rule.after = after.parse().ok()?,
                ("count", count) => rule.count = Some(count.parse().ok()?),
                ("process", text) if !program.contains(text) => return None,
                _ => {}
            }
        }
        Some(rule)
    }

    /// Counts one occasion; whether the fault strikes.
    fn strikes(&mut self) -> bool {
        if self.after > 0 {
            self.after -= 1;
            return false;
        }
        match &mut self.count {
            None => true,
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
        }
    }
}

/// When and how a file was last changed.
type Stamp = (u64, i64, i64, u64);

/// The faults asked for.
#[derive(Debug)]
pub(crate) struct Faults {
    path: Option<PathBuf>,
    program: String,
    state: Mutex<(Option<Stamp>, Vec<Rule>)>,
}

impl Faults {
    /// Faults of the machine in a folder; a machine without one has none.
    pub(crate) fn new(folder: Option<&std::path::Path>) -> Self {
        let program = std::env::current_exe().ok().and_then(|path| path.file_name().map(ToOwned::to_owned));
        Self {
            path: folder.map(|folder| folder.join("faults")),
            program: program.map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            state: Mutex::new((None, Vec::new())),
        }
    }

    /// Goes through the rules as they are in the file now.
    fn with<R>(&self, work: impl FnOnce(&mut [Rule]) -> Option<R>) -> Option<R> {
        let path = self.path.as_ref()?;
        let stamp = std::fs::metadata(path)
            .ok()
            .map(|meta| (meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.size()));
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0 != stamp {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            *state = (stamp, text.lines().filter_map(|line| Rule::parse(line, &self.program)).collect());
        }
        work(&mut state.1)
    }

    /// Whether a fault of this name strikes now; its code if it names one.
    pub(crate) fn strikes(&self, name: &str) -> Option<Option<Code>> {
        self.with(|rules| {
            let rule = rules.iter_mut().find(|rule| rule.name == name)?;
            let struck = rule.strikes().then_some(rule.code.map(Code))?;
            self.tell(name);
            Some(struck)
        })
    }

    /// What a call of this name fails with, if it was asked to.
    pub(crate) fn call_fails(&self, call: &str) -> Option<Code> {
        self.with(|rules| {
            let means = |rule: &Rule| rule.call.as_ref().map_or(!LOOKS.contains(&call), |name| name == call);
            let mut meant = rules.iter_mut().filter(|rule| rule.name == "fail" && means(rule));
            let rule = meant.find_map(|rule| rule.strikes().then_some(rule))?;
            let code = Code(rule.code.unwrap_or(Code::INVALID_VALUE.0));
            self.tell(call);
            Some(code)
        })
    }

    /// Leaves the name of what has struck in the machine's folder.
    fn tell(&self, name: &str) {
        if let Some(path) = &self.path {
            let _ = std::fs::write(path.with_file_name("struck"), name);
        }
    }

    /// How much longer a copy takes, in microseconds.
    pub(crate) fn slow_copies_us(&self) -> u64 {
        self.with(|rules| rules.iter().find(|rule| rule.name == "slow-copies").map(|rule| rule.us))
            .unwrap_or(0)
    }

    /// Whether copies hang.
    pub(crate) fn copies_hang(&self) -> bool {
        self.with(|rules| rules.iter().any(|rule| rule.name == "hang-copies").then_some(())).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::Rule;

    #[test]
    fn a_rule_lets_the_first_pass_and_strikes_as_often_as_it_says() {
        let mut rule = Rule::parse("oom after=2 count=1  # a comment", "daemon").expect("a rule");
        let strikes: Vec<bool> = (0..5).map(|_| rule.strikes()).collect();
        assert_eq!(strikes, [false, false, true, false, false]);
    }

    #[test]
    fn a_rule_for_another_program_is_none_of_ours() {
        assert_eq!(Rule::parse("ecc process=client", "kvoyantd"), None);
        assert!(Rule::parse("ecc process=kvoyantd", "kvoyantd-under-test").is_some());
        assert_eq!(Rule::parse("   # nothing", "kvoyantd"), None);
    }
}
