//! `SOCK_SEQPACKET` sockets: whole messages, with file descriptors beside them.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, listen,
    sendmsg, socket,
};

use crate::faults::{self, Point};

/// Largest message, in bytes. What is larger travels in a memfd.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Most file descriptors beside one message.
pub const FDS_MAX: usize = 32;

/// Most that the kernel passes beside one message (`SCM_MAX_FD`). With room for all of them, whatever a peer sends is
/// received whole and can be closed.
const KERNEL_FDS_MAX: usize = 253;

/// A message and what came with it.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes. Empty: the peer has closed.
    pub bytes: Vec<u8>,
    /// File descriptors, in the order in which they were sent.
    pub fds: Vec<OwnedFd>,
}

fn seqpacket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Connects to a listening socket, and gives sends and receives up that take longer than `timeout`, connecting included: that is an error
/// of kind `WouldBlock`, after which the socket can be used as before. (A peer that stands still fills its queues, and who waits for room
/// there waits as long as it stands.)
pub fn connect_within(path: &Path, timeout: Duration) -> io::Result<OwnedFd> {
    let socket = seqpacket()?;
    give_up_after(socket.as_fd(), timeout)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

/// Gives sends and receives of a socket up that take longer.
pub fn give_up_after(socket: BorrowedFd<'_>, timeout: Duration) -> io::Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    use nix::sys::time::{TimeVal, TimeValLike};
    // Zero would mean for ever.
    let micros = timeout.as_micros().clamp(1, i64::MAX as u128) as i64;
    let timeout = TimeVal::microseconds(micros);
    setsockopt(&socket, sockopt::SendTimeout, &timeout)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
    Ok(())
}

/// Connects to a listening socket.
pub fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket()?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

/// Longest path that can be listened at, in bytes.
pub const PATH_BYTES_MAX: usize = 107 - NOT_YET.len();

/// What a socket's name ends in until it listens.
const NOT_YET: &str = ".new";

/// Binds and listens, with these permissions. The socket appears under its name only once it accepts connections, so
/// whoever sees it can connect.
pub fn listen_at(path: &Path, mode: u32) -> io::Result<OwnedFd> {
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(NOT_YET);
    let hidden = Path::new(&hidden);
    match std::fs::remove_file(hidden) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = seqpacket()?;
    bind(socket.as_raw_fd(), &UnixAddr::new(hidden)?)?;
    let shown = std::fs::set_permissions(hidden, std::fs::Permissions::from_mode(mode))
        .and_then(|()| Ok(listen(&socket, Backlog::new(64)?)?))
        .and_then(|()| std::fs::rename(hidden, path));
    if shown.is_err() {
        let _ = std::fs::remove_file(hidden);
    }
    shown.map(|()| socket)
}

/// Who is at the other end, as the kernel says: process id and user id.
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<(i32, u32)> {
    let credentials = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials)?;
    Ok((credentials.pid(), credentials.uid()))
}

/// The groups of who is at the other end, as the kernel says: the effective one, and the supplementary ones.
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    // Linux 4.13; libc has it for some targets only.
    const SO_PEERGROUPS: libc::c_int = 59;
    let credentials = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials)?;
    let mut groups = vec![0_u32; 64];
    loop {
        let mut length = size_of_val(groups.as_slice()) as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes, ids of 32 bits, to `groups`, and says in `length` how many it has.
        let got = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = length as usize / size_of::<u32>();
        if got == 0 {
            groups.truncate(count);
            groups.push(credentials.gid());
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // A group list that is longer says how long it is.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

/// Has peers send no descriptors over this socket, or those that are accepted from it: what the kernel drops, it closes in the thread that
/// reads, however long that takes. False where the kernel cannot be told (before 6.16).
pub fn refuse_descriptors(socket: BorrowedFd<'_>) -> io::Result<bool> {
    // Linux 6.16; libc headers do not know it.
    const SO_PASSRIGHTS: libc::c_int = 83;
    let pass: libc::c_int = 0;
    // SAFETY: the kernel reads one int from `pass`.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const pass).cast(),
            size_of_val(&pass) as libc::socklen_t,
        )
    };
    match io::Error::last_os_error() {
        _ if set == 0 => Ok(true),
        error if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(false),
        error => Err(error),
    }
}

/// The process that connected, as a descriptor that becomes readable when it ends. Unlike its id, it never comes to
/// mean another process.
///
/// # Errors
/// `ESRCH` if it has ended and been waited for already. Kernels before 6.5 are asked by id: there it may be another process that got the
/// id of one that ended between connecting and this call.
pub fn peer_process(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // Linux 6.5; older kernels and libc headers do not know it.
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut fd: RawFd = -1;
    let mut length = size_of::<RawFd>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, a descriptor, to `fd`.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut length,
        )
    };
    if got != 0 {
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {}
            // Kernels before 6.16 have no descriptor of what is not there.
            error if error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            error => return Err(error),
        }
        let pid = peer(socket)?.0;
        // SAFETY: a system call on plain numbers.
        fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as RawFd;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the kernel has just installed this descriptor for us; nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    Ok(fd)
}

/// Whether the peer has closed its end and everything that it sent has been received; an error of kind `WouldBlock`
/// says that it has not. Nothing is received.
pub fn hung_up(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut byte = [0];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    Ok(nix::sys::socket::recv(socket.as_raw_fd(), &mut byte, flags)? == 0)
}

/// Sends one message.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if bytes.len() > MESSAGE_BYTES_MAX || fds.len() > FDS_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {} bytes and {} descriptors is too large", bytes.len(), fds.len()),
        ));
    }
    faults::check(Point::Send)?;
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let sent = sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::WriteZero, format!("sent {sent} of {} bytes", bytes.len())))
    }
}

/// Receives one message. A message or a list of descriptors that does not fit is an error, and no descriptor
/// of it stays open.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<Packet> {
    let Received { packet, whole } = receive_any(socket)?;
    whole.map(|()| packet)
}

/// Whatever a peer has sent.
#[derive(Debug)]
pub struct Received {
    /// As much of it as there is. All descriptors that came are here, so that whoever received them says where they are closed.
    pub packet: Packet,
    /// Whether the message fits, with its descriptors; an error that says what did not: `InvalidData` if it is too large, `Other` if it is
    /// this process that has no room for its descriptors.
    pub whole: io::Result<()>,
}

/// Receives one message, and leaves it to the caller to close what came with one that does not fit.
pub fn receive_any(socket: BorrowedFd<'_>) -> io::Result<Received> {
    faults::check(Point::Receive)?;
    let mut bytes = vec![0; MESSAGE_BYTES_MAX];
    let mut control = Control([0; CONTROL_WORDS]);
    let mut slice = IoSliceMut::new(&mut bytes);
    // SAFETY: a header of zeros is a header of nothing.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = (&raw mut slice).cast();
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the header names one slice, which has the layout of an `iovec`, and a control buffer, both as long as it says; both outlive
    // the call.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    if length < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just filled the control buffer of this header.
    let fds = unsafe { descriptors(&header) };
    let flags = header.msg_flags;
    let too_large = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
    let whole = if flags & libc::MSG_TRUNC != 0 || fds.len() > FDS_MAX {
        too_large(format!("a message is larger than {MESSAGE_BYTES_MAX} bytes or {FDS_MAX} descriptors"))
    } else if flags & libc::MSG_CTRUNC != 0 {
        Err(io::Error::other(format!(
            "only {} of the descriptors beside a message could be opened: this process has no room for more (ulimit -n)",
            fds.len()
        )))
    } else {
        Ok(())
    };
    bytes.truncate(length as usize);
    Ok(Received { packet: Packet { bytes, fds }, whole })
}

/// Words of room for as many descriptors as the kernel passes, and their header.
const CONTROL_WORDS: usize = KERNEL_FDS_MAX.div_ceil(2) + 4;

/// A control buffer, aligned as its headers are.
#[repr(C)]
struct Control([u64; CONTROL_WORDS]);

/// The descriptors in a header's control buffer, those of a list that was cut too.
///
/// # Safety
/// The kernel has filled the buffer, and nobody has taken these descriptors yet.
unsafe fn descriptors(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the header's control buffer is as long as the header says, by the caller's promise.
    let mut item = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !item.is_null() {
        // SAFETY: `item` is a header within the buffer.
        let (level, kind, length) = unsafe { ((*item).cmsg_level, (*item).cmsg_type, (*item).cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: plain arithmetic.
            let before = unsafe { libc::CMSG_LEN(0) } as usize;
            // SAFETY: within the buffer, as `item` is.
            let data = unsafe { libc::CMSG_DATA(item) }.cast::<RawFd>();
            #[allow(clippy::unnecessary_cast, reason = "it has 32 bits with musl")]
            let length = length as usize;
            for at in 0..length.saturating_sub(before) / size_of::<RawFd>() {
                // SAFETY: the kernel wrote so many descriptors behind this header, installed them for us, and nobody else owns them.
                fds.push(unsafe { OwnedFd::from_raw_fd(data.add(at).read_unaligned()) });
            }
        }
        // SAFETY: as for the first.
        item = unsafe { libc::CMSG_NXTHDR(header, item) };
    }
    fds
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        nix::sys::socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .unwrap()
    }

    #[test]
    fn a_message_arrives_whole_with_its_descriptors() {
        let (a, b) = pair();
        let file = crate::memory::Memfd::create("test", 4096).unwrap();
        send(a.as_fd(), b"hello", &[file.as_fd(), file.as_fd()]).unwrap();
        send(a.as_fd(), b"again", &[]).unwrap();
        let packet = receive(b.as_fd()).unwrap();
        assert_eq!((packet.bytes.as_slice(), packet.fds.len()), (b"hello".as_slice(), 2));
        assert_eq!(receive(b.as_fd()).unwrap().bytes, b"again");
        drop(a);
        assert!(receive(b.as_fd()).unwrap().bytes.is_empty(), "a closed peer reads as an empty message");
    }

    #[test]
    fn a_peers_groups_are_those_that_the_kernel_knows() {
        let (a, _b) = pair();
        let groups = peer_groups(a.as_fd()).unwrap();
        assert!(groups.contains(&nix::unistd::getegid().as_raw()));
        for group in nix::unistd::getgroups().unwrap() {
            assert!(groups.contains(&group.as_raw()), "{group}");
        }
    }

    #[test]
    fn a_peers_process_becomes_readable_when_it_ends() {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let path = std::env::temp_dir().join(format!("kvoyant-peer-{}.sock", std::process::id()));
        let listening = listen_at(&path, 0o600).unwrap();
        // A process of its own that connects and waits: bash can open no such socket, python can.
        let program = format!(
            "import socket,sys\ns=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET)\ns.connect({path:?})\nsys.stdin.read()"
        );
        let Ok(mut child) = std::process::Command::new("python3")
            .args(["-c", &program])
            .stdin(std::process::Stdio::piped())
            .spawn()
        else {
            panic!("the tests need python3");
        };
        let accepted = nix::sys::socket::accept(listening.as_raw_fd()).unwrap();
        // SAFETY: just accepted.
        let accepted = unsafe { OwnedFd::from_raw_fd(accepted) };
        let process = peer_process(accepted.as_fd()).unwrap();
        let ended =
            |timeout| poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], timeout).unwrap() == 1;
        assert!(!ended(PollTimeout::ZERO));
        drop(child.stdin.take());
        assert!(ended(PollTimeout::from(10_000u16)));
        child.wait().unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn no_descriptor_of_a_message_with_too_many_stays_open() {
        let (a, b) = pair();
        let file = crate::memory::Memfd::create("test", 4096).unwrap();
        let raw = vec![file.as_fd().as_raw_fd(); 40];
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = open();
        for _ in 0..20 {
            sendmsg::<UnixAddr>(
                a.as_raw_fd(),
                &[IoSlice::new(b"x")],
                &[ControlMessage::ScmRights(&raw)],
                MsgFlags::empty(),
                None,
            )
            .unwrap();
            assert_eq!(receive(b.as_fd()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        // Other tests open and close a few meanwhile; a leak would be hundreds.
        assert!(open() < before + 200);
    }

    #[test]
    fn what_a_full_table_of_descriptors_cut_is_an_error_and_does_not_stay_open() {
        // In a process of its own, whose table is small.
        const CHILD: &str = "KVOYANT_TEST_FULL_TABLE";
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        if std::env::var_os(CHILD).is_none() {
            let name =
                "packet::tests::what_a_full_table_of_descriptors_cut_is_an_error_and_does_not_stay_open";
            let status = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", name, "--test-threads=1"])
                .env(CHILD, "1")
                .status();
            assert!(status.unwrap().success());
            return;
        }
        let (a, b) = pair();
        let file = crate::memory::Memfd::create("test", 4096).unwrap();
        let before = open();
        // One of them is the list's own.
        let limit = before as u64 - 1 + 5;
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, limit, limit).unwrap();
        for _ in 0..20 {
            send(a.as_fd(), b"x", &[file.as_fd(); 10]).unwrap();
            let error = receive(b.as_fd()).unwrap_err();
            assert!(error.to_string().contains("ulimit"), "{error}");
            assert_eq!(open(), before);
        }
        let Received { packet, whole } = {
            send(a.as_fd(), b"x", &[file.as_fd(); 10]).unwrap();
            receive_any(b.as_fd()).unwrap()
        };
        assert!(whole.is_err() && (1..10).contains(&packet.fds.len()), "{packet:?}");
    }

    #[test]
    fn a_socket_that_can_be_seen_can_be_connected_to() {
        let path = std::env::temp_dir().join(format!("kvoyant-packet-{}.sock", std::process::id()));
        let _listening = listen_at(&path, 0o600).unwrap();
        assert!(connect_to(&path).is_ok());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!path.with_extension("sock.new").exists());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn who_stands_still_holds_up_neither_connecting_nor_sending_beyond_the_timeout() {
        let path = std::env::temp_dir().join(format!("kvoyant-still-{}.sock", std::process::id()));
        let _listening = listen_at(&path, 0o600).unwrap();
        let connect = || connect_within(&path, Duration::from_millis(5));
        let first = connect().unwrap();
        // Nobody accepts, so that both queues fill.
        let mut waiting = Vec::new();
        let error = loop {
            match connect() {
                Ok(socket) => waiting.push(socket),
                Err(error) => break error,
            }
            assert!(waiting.len() < 10_000);
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let message = vec![0; MESSAGE_BYTES_MAX];
        let error = (0..10_000).find_map(|_| send(first.as_fd(), &message, &[]).err()).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(receive(first.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_message_that_is_too_large_is_refused_by_the_sender() {
        let (a, _b) = pair();
        let error = send(a.as_fd(), &vec![0; MESSAGE_BYTES_MAX + 1], &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
