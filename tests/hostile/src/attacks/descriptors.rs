//! Descriptors where none are wanted, too many, and such as hold up who closes them.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use kvoyant_protocol::control::{Failure, ToClient, ToDaemon, encode};
use kvoyant_protocol::layout::Limits;
use kvoyant_protocol::packet;
use kvoyant_tests::fake;
use kvoyant_tests::raw::Raw;

use super::handshake::{all, hello, send_raw};
use crate::stage::{Stage, ended_socket};
use crate::{Attack, Outcome};

/// How long the daemon may take to close what was sent.
const CLOSED_WITHIN: Duration = Duration::from_secs(10);

/// How long others may wait for an answer while it does.
const OTHERS_WAIT: Duration = Duration::from_secs(5);

const NONE_WANTED: &str = "takes none";

pub(super) fn table() -> Vec<Attack> {
    vec![
        Attack::rejected("descriptors-beside-a-hello", "sends 32 descriptors beside its hello", |stage| {
            let socket = Raw::socket(&stage.socket);
            let null = null();
            let fds = [null.as_fd(); packet::FDS_MAX];
            packet::send(socket.as_fd(), &hello(Limits::default()), &fds).expect("a packet");
            ended_socket(&socket, NONE_WANTED)
        }),
        Attack::rejected(
            "descriptors-253",
            "sends as many descriptors as the kernel passes, over and over",
            |stage| {
                let null = null();
                let fds = [null.as_raw_fd(); 253];
                let outcome = all((0..20).map(|_| {
                    let socket = Raw::socket(&stage.socket);
                    send_raw(socket.as_raw_fd(), &hello(Limits::default()), &fds);
                    ended_socket(&socket, "descriptors")
                }));
                closed(stage).map_or_else(Outcome::fail, |()| outcome)
            },
        ),
        Attack::rejected(
            "descriptors-beside-everything",
            "sends 32 descriptors beside messages that take none, and reads no answer",
            |stage| {
                let null = null();
                let sessions: Vec<_> = (0..16)
                    .map(|_| {
                        let mut raw = Raw::connect(&stage.socket, fake::spec(&["full"]));
                        let fds: Vec<_> = (0..32).map(|_| null.try_clone().expect("a descriptor")).collect();
                        raw.say_with(&nothing(), &fds);
                        raw
                    })
                    .collect();
                if let Err(said) = closed(stage) {
                    return Outcome::fail(said);
                }
                let said = sessions.into_iter().map(|mut raw| raw.hear()).collect::<Vec<_>>();
                match said.iter().find(|said| !is_told(said)) {
                    None => Outcome::reject(NONE_WANTED),
                    Some(said) => Outcome::fail(format!("{said:?} came")),
                }
            },
        ),
        Attack::rejected(
            "descriptor-that-lingers",
            "sends sockets that take a minute to be closed, twice each, at each step of the protocol",
            |stage| {
                let mut unread = Vec::new();
                for step in 0..3 {
                    let (lingers, peer) = lingering();
                    unread.push(peer);
                    if step == 0 {
                        // Before anybody knows who it is.
                        let socket = Raw::socket(&stage.socket);
                        for _ in 0..2 {
                            // The second lies unread when the first has ended it all.
                            packet::send(socket.as_fd(), &hello(Limits::default()), &[lingers.as_fd()])
                                .expect("a packet");
                        }
                        drop(lingers);
                    } else {
                        let (mut raw, sequence) = stage.session();
                        let publish = ToDaemon::Publish { sequence, tokens: 1, shared: false };
                        let message = if step == 1 { nothing() } else { encode(&publish) };
                        let twice = [lingers];
                        raw.say_with(&message, &twice);
                        raw.say_with(&message, &twice);
                    }
                    let since = Instant::now();
                    let (mut other, _) = stage.session();
                    other.say(&nothing());
                    let heard = other.hear();
                    if !matches!(heard, Ok(ToClient::Done)) || since.elapsed() > OTHERS_WAIT {
                        return Outcome::fail(format!("{heard:?} came after {:?}", since.elapsed()));
                    }
                }
                Outcome::reject("others went on")
            },
        ),
    ]
}

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").expect("a file").into()
}

/// A message that is answered, and asks for nothing.
fn nothing() -> Vec<u8> {
    encode(&ToDaemon::Close { sequences: Vec::new() })
}

/// Whether this says that no descriptors were wanted.
fn is_told(said: &Result<ToClient, kvoyant_protocol::control::ControlError>) -> bool {
    matches!(said, Ok(ToClient::Failed(Failure::Protocol(said))) if said.contains(NONE_WANTED))
}

/// Waits until the daemon has as few descriptors open as before.
fn closed(stage: &Stage) -> Result<(), String> {
    let held = || std::fs::read_dir(format!("/proc/{}/fd", stage.daemon)).map_or(0, Iterator::count);
    let since = Instant::now();
    while held() >= 300 {
        if since.elapsed() > CLOSED_WITHIN {
            return Err(format!("the daemon has {} descriptors open", held()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A socket with unsent bytes, whose last close waits a minute for the peer that comes with it.
pub(super) fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut socket = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    let (peer, _) = listener.accept().expect("a connection");
    socket.set_nonblocking(true).expect("a socket");
    // Both buffers fill: nobody reads.
    while socket.write(&[0; 1 << 16]).is_ok() {}
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 60 };
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Linger, &linger).expect("a socket");
    (socket.into(), peer)
}
