//! A user of the daemon in a process of their own, who does what a test tells them.
//!
//! Root can be anybody; anybody else is themselves, and tests say what they had to leave out.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Whether processes here can become other users.
#[must_use]
pub fn can_be_others() -> bool {
    let others = nix::unistd::geteuid().is_root();
    if !others {
        eprintln!("SKIPPED: what needs several users, since only root can be others");
    }
    others
}

/// See the module. Ends, and its client with it, when dropped.
#[derive(Debug)]
pub struct Person {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Person {
    /// Somebody with this user and group, and further groups.
    ///
    /// # Panics
    /// If the program does not start, or cannot become them.
    #[must_use]
    pub fn new(program: &str, socket: &Path, uid: u32, gid: u32, groups: &[u32]) -> Self {
        let groups: Vec<_> = groups.iter().map(ToString::to_string).collect();
        let mut child = Command::new(program)
            .arg(socket)
            .args([uid.to_string(), gid.to_string(), groups.join(",")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let orders = child.stdin.take().expect("its input");
        let answers = BufReader::new(child.stdout.take().expect("its output"));
        let mut person = Self { child, orders, answers };
        assert_eq!(person.hear(), Ok(String::new()), "it becomes user {uid}");
        person
    }

    fn hear(&mut self) -> Result<String, String> {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
            ("ok", said) => Ok(said.into()),
            ("no", said) => Err(said.into()),
            _ => panic!("it answered {line:?}"),
        }
    }

    /// Has them do something.
    ///
    /// # Errors
    /// What the daemon said.
    ///
    /// # Panics
    /// If they are gone.
    pub fn does(&mut self, order: &str) -> Result<String, String> {
        writeln!(self.orders, "{order}").expect("an order");
        self.hear()
    }

    /// As [`Person::does`], of what must be done.
    ///
    /// # Panics
    /// If it is refused.
    pub fn must(&mut self, order: &str) -> String {
        self.does(order).unwrap_or_else(|said| panic!("{order}: {said}"))
    }

    /// Kills them.
    pub fn dies(mut self) {
        let _ = self.child.kill();
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
