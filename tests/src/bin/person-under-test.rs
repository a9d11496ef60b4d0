//! A user of the daemon who does what a test says, one order a line, and answers each with `ok …` or `no …`.
//!
//! `person-under-test SOCKET UID GID GROUPS`, then:
//! `connect` another session with the fake model; `hang-up` ends the last one;
//! `open TOKENS` a full sequence in the last session, `room TOKENS` an empty one, `reserve TOKENS` for the last one, `fork` it, `close` it;
//! `ask` for its next token, and check the answer; `back`, the last sequence becomes the first;
//! `status ADMIN-SOCKET` counts sessions; `claim SESSION TOKEN TOKEN` asks for one that a daemon has left;
//! `draw TEXT` over all extents of a session without the client library, whose session then ends while its mappings stay;
//! `scribble TEXT` over them; `look TEXT` counts the bytes there that are neither zero nor `TEXT`'s.

use std::io::{BufRead, Write};
use std::os::fd::AsFd;
use std::path::Path;

use kvoyant_client::{Client, Hint, Member, Model, Options, Sequence};
use kvoyant_daemon::admin::fetch_status;
use kvoyant_protocol::control::{MemoryKind, ToClient, ToDaemon, decode, encode};
use kvoyant_protocol::memory::{Memfd, Seals, SharedMapping};
use kvoyant_protocol::{EXTENT_BYTES, packet};
use kvoyant_tests::raw::Raw;
use kvoyant_tests::{PATIENCE, fake};
use nix::unistd::{Gid, Uid};

type Said = Result<String, Box<dyn std::error::Error>>;

#[derive(Default)]
struct Person {
    /// Sessions, and their sequences; sequences go first.
    sessions: Vec<(Vec<(Sequence, usize)>, Model)>,
    kept: Vec<SharedMapping>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, socket, uid, gid, groups] = arguments.as_slice() else {
        return Err("usage: person-under-test SOCKET UID GID GROUPS".into());
    };
    let (uid, gid) = (Uid::from_raw(uid.parse()?), Gid::from_raw(gid.parse()?));
    if uid != Uid::effective() {
        let groups = groups.split(',').filter(|group| !group.is_empty());
        let groups: Vec<_> =
            groups.map(|group| group.parse().map(Gid::from_raw)).collect::<Result<_, _>>()?;
        nix::unistd::setgroups(&groups)?;
        nix::unistd::setgid(gid)?;
        nix::unistd::setuid(uid)?;
    }
    // A change of user forgets it.
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    say(&Ok(String::new()))?;
    let mut person = Person::default();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (order, rest) = line.split_once(' ').unwrap_or((&line, ""));
        say(&person.does(Path::new(socket), order, rest))?;
    }
    Ok(())
}

/// Claims a session of a daemon that has ended.
fn claim(socket: &Path, rest: &str) -> Said {
    let words = rest.split(' ').map(str::parse).collect::<Result<Vec<u64>, _>>()?;
    let [session, first, second] = words[..] else { return Err("SESSION TOKEN TOKEN".into()) };
    let socket = packet::connect_to(socket)?;
    let claim = ToDaemon::Claim { session, token: [first, second], extents: 0 };
    packet::send(socket.as_fd(), &encode(&claim), &[])?;
    match decode(&packet::receive(socket.as_fd())?.bytes)? {
        ToClient::Failed(failure) => Err(failure.into()),
        answer => Ok(format!("{answer:?}")),
    }
}

fn say(said: &Said) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match said {
        Ok(said) => writeln!(out, "ok {said}")?,
        Err(error) => writeln!(out, "no {error}")?,
    }
    out.flush()
}

impl Person {
    fn does(&mut self, socket: &Path, order: &str, rest: &str) -> Said {
        match order {
            "connect" => {
                let client = Client::connect(socket, Options::default())?;
                let id = client.session();
                let model = client.register(fake::spec(&["random:budget=50%"]), &[])?;
                self.sessions.push((Vec::new(), model));
                return Ok(id.to_string());
            }
            "status" => return Ok(fetch_status(Path::new(rest))?.sessions.len().to_string()),
            "claim" => return claim(socket, rest),
            "draw" => return self.draw(socket, rest),
            "scribble" => return self.scribble(rest),
            "look" => return self.look(rest),
            _ => {}
        }
        let (sequences, model) = self.sessions.last_mut().ok_or("there is no session")?;
        match order {
            "hang-up" => drop(self.sessions.pop()),
            "open" => {
                let (tokens, seed) = (rest.parse()?, sequences.len());
                let sequence = model.open(0, tokens)?;
                fake::fill(model, &sequence, seed, tokens)?;
                sequences.push((sequence, seed));
            }
            "room" => {
                let seed = sequences.len();
                sequences.push((model.open(0, rest.parse()?)?, seed));
            }
            "fork" => {
                let (parent, seed) = sequences.last().ok_or("there is no sequence")?;
                let (child, seed) = (parent.fork(None)?, *seed);
                sequences.push((child, seed));
            }
            "reserve" => {
                let (sequence, _) = sequences.last().ok_or("there is no sequence")?;
                model.reserve(&[(sequence, rest.parse()?)])?;
            }
            "close" => {
                let (sequence, _) = sequences.pop().ok_or("there is no sequence")?;
                model.close(vec![sequence])?;
            }
            "back" => sequences.rotate_right(1),
            "ask" => {
                let (sequence, seed) = sequences.last().ok_or("there is no sequence")?;
                let member = Member { sequence, position: sequence.tokens(), hint: Hint::None };
                let ready = model.speculate(1, &[member])?.wait(PATIENCE)?;
                return Ok(fake::check(&ready, 0, *seed, 1)?.to_string());
            }
            other => return Err(format!("what is {other}?").into()),
        }
        Ok(String::new())
    }

    fn draw(&mut self, socket: &Path, text: &str) -> Said {
        let mut raw = Raw::connect(socket, fake::spec(&["window"]));
        raw.open(20_000);
        for (kind, fd) in raw.memory.drain(..) {
            if kind == MemoryKind::Extents {
                let file = Memfd::from_peer(fd, EXTENT_BYTES, Seals::fixed_size())?;
                self.kept.push(file.map(false)?);
            }
        }
        let strange = self.look(text)?;
        self.scribble(text)?;
        Ok(strange)
    }

    fn scribble(&self, text: &str) -> Said {
        let bytes: Vec<u8> = text.bytes().cycle().take(1 << 20).collect();
        for memory in &self.kept {
            for at in (0..EXTENT_BYTES).step_by(bytes.len()) {
                memory.write(at, &bytes)?;
            }
        }
        Ok(String::new())
    }

    fn look(&self, text: &str) -> Said {
        let mut bytes = vec![0; 1 << 20];
        let mut known = [false; 256];
        known[0] = true;
        text.bytes().for_each(|byte| known[usize::from(byte)] = true);
        let mut strange = 0;
        for memory in &self.kept {
            for at in (0..EXTENT_BYTES).step_by(bytes.len()) {
                memory.read(at, &mut bytes)?;
                strange += bytes.iter().filter(|byte| !known[usize::from(**byte)]).count();
            }
        }
        Ok(format!("{} extents, {strange} strange bytes", self.kept.len()))
    }
}
