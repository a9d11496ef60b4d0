//! The service manager's store of descriptors, by its protocol of datagrams (`sd_notify`): what lies there is given to every later start.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

/// How long a manager may take to make room for another message. A lane waits for it, once for every 64 MiB of a session.
const PATIENCE: Duration = Duration::from_millis(500);

/// See the module.
#[derive(Debug)]
pub(crate) struct Supervisor {
    socket: UnixDatagram,
    /// Set once it did not listen: nobody waits for it again until it does.
    deaf: AtomicBool,
}

impl Supervisor {
    /// The one that started this process; none if there is none.
    ///
    /// # Errors
    /// An address that cannot be used.
    pub(crate) fn find() -> io::Result<Option<Self>> {
        std::env::var_os("NOTIFY_SOCKET").map(|path| Self::at(&path)).transpose()
    }

    fn at(path: &OsStr) -> io::Result<Self> {
        let address = match path.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(path)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket, deaf: AtomicBool::new(false) })
    }

    /// Whether it says that it stores descriptors, and how many of them, as managers do since systemd 254.
    pub(crate) fn stores() -> bool {
        let most = std::env::var("FDSTORE").ok().and_then(|text| text.parse::<u64>().ok());
        std::env::var_os("NOTIFY_SOCKET").is_some() && most.is_some_and(|most| most > 0)
    }

    /// Has a descriptor stored. The message is on its way once this returns, and arrives whatever becomes of this process.
    pub(crate) fn store(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        // A memory file has nothing to be polled for.
        let message = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
        self.send(message.as_bytes(), &[fd.as_raw_fd()])
    }

    fn send(&self, message: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let deaf = self.deaf.load(Ordering::Relaxed);
        let flags = if deaf { MsgFlags::MSG_DONTWAIT } else { MsgFlags::empty() };
        let parts = [IoSlice::new(message)];
        let sent = sendmsg::<UnixAddr>(
            self.socket.as_raw_fd(),
            &parts,
            control,
            flags | MsgFlags::MSG_NOSIGNAL,
            None,
        );
        self.deaf.store(sent == Err(Errno::EAGAIN), Ordering::Relaxed);
        sent?;
        Ok(())
    }

    /// Has a descriptor removed.
    pub(crate) fn remove(&self, name: &str) {
        if let Err(error) = self.send(format!("FDSTOREREMOVE=1\nFDNAME={name}").as_bytes(), &[]) {
            tracing::warn!("the service manager keeps `{name}`, which is not needed any more: {error}");
        }
    }
}
