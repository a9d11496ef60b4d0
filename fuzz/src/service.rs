//! A daemon in this process, so that what fails in it is seen here.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvoyant_daemon::config::{Config, PinAhead};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

struct Service {
    folder: TempDir,
    thread: JoinHandle<()>,
}

static SERVICE: OnceLock<Service> = OnceLock::new();

/// Where its sockets are. Starts it where it has not been.
fn folder() -> PathBuf {
    let service = SERVICE.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let config = Config {
            socket: folder.path().join("kvoyantd.sock"),
            admin_socket: folder.path().join("admin.sock"),
            store: folder.path().join("store"),
            arena: bytesize::ByteSize::mib(512),
            pin: false,
            pin_ahead: PinAhead::Bytes(bytesize::ByteSize(0)),
            slab: bytesize::ByteSize::mib(1),
            newcomers_percent: kvoyant_daemon::config::Newcomers::Percent(0.0),
            ..Config::default()
        };
        let thread = std::thread::spawn(move || {
            kvoyant_daemon::server::run(&config).expect("a daemon");
        });
        Service { folder, thread }
    });
    let since = Instant::now();
    while !service.folder.path().join("kvoyantd.sock").exists() {
        assert!(since.elapsed() < PATIENCE && !service.thread.is_finished(), "the daemon does not start");
        std::thread::sleep(Duration::from_millis(2));
    }
    service.folder.path().to_owned()
}

/// Its control socket.
pub(crate) fn socket() -> PathBuf {
    folder().join("kvoyantd.sock")
}

/// Its admin socket.
pub(crate) fn admin() -> PathBuf {
    folder().join("admin.sock")
}

/// Ends it, if it runs: it takes its sockets with it.
///
/// # Panics
/// If it does not end.
pub fn stop() {
    let Some(service) = SERVICE.get() else { return };
    kill(Pid::this(), Signal::SIGTERM).expect("a signal to this process, which the daemon takes");
    let since = Instant::now();
    while !service.thread.is_finished() {
        assert!(since.elapsed() < PATIENCE, "the daemon does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = std::fs::remove_dir_all(service.folder.path());
}
