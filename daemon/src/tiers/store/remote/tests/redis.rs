use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::tiers::store::conformance::{fill, suite};
use crate::tiers::store::connect;

/// A real server on a port of its own; it dies with the value.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Starts a server that keeps everything in this folder; `None` if there is no server to start.
    fn start(folder: &Path) -> Option<Self> {
        // Somebody else may take the port before the server does: then it ends, and another is tried.
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            match Self::start_at(folder, port) {
                Ok(Some(server)) => return Some(server),
                Ok(None) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    println!("SKIPPED: redis-server is not installed (apt-get install redis-server)");
                    return None;
                }
                Err(error) => panic!("redis-server: {error}"),
            }
        }
        panic!("redis-server does not start");
    }

    fn start_at(folder: &Path, port: u16) -> std::io::Result<Option<Self>> {
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""])
            .args(["--appendonly", "yes", "--appendfsync", "always", "--requirepass", "hunter2"])
            .arg("--dir")
            .arg(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let mut server = Self { child, port };
        for _ in 0..1000 {
            if server.child.try_wait()?.is_some() {
                return Ok(None);
            }
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return Ok(Some(server));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(None)
    }

    fn url(&self, rest: &str) -> String {
        format!("redis://:hunter2@127.0.0.1:{}/{rest}", self.port)
    }

    fn store(&self, prefix: &str, options: RemoteOptions) -> RemoteImages {
        let client = ::redis::Client::open(self.url("0")).unwrap();
        RemoteImages::redis("redis", client, prefix, options).unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_redis_server_does_what_every_store_does() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = Server::start(folder.path()) else { return };
    // Signs that mean something in patterns, and a neighbour whose prefix they would match.
    let (store, neighbour) = (server.store("a[b]*?", options()), server.store("ab", options()));
    write(&neighbour, "n", 9, false).unwrap();
    suite(&store, &store);
    leftovers_are_swept(&store);
    assert_eq!(read(&neighbour, "n").unwrap(), 9);
}

#[test]
fn an_address_with_a_password_and_a_database_leads_to_images() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = Server::start(folder.path()) else { return };
    let store = connect(&server.url("3?prefix=here"), options()).unwrap();
    write(&*store, "a", 1, false).unwrap();
    assert_eq!(read(&*store, "a").unwrap(), 1);
    let other = connect(&server.url("2?prefix=here"), options()).unwrap();
    assert_eq!(other.list().unwrap(), []);
    let wrong = format!("redis://:hunter3@127.0.0.1:{}/0", server.port);
    let error = connect(&wrong, options()).unwrap().list().unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    assert!(!error.to_string().contains("hunter"), "{error}");
}

#[test]
fn a_server_that_dies_in_the_middle_of_an_upload_shows_nothing_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut server) = Server::start(folder.path()) else { return };
    let options = RemoteOptions { rest: Duration::from_millis(50), ..options() };
    let store = server.store("images", options);
    write(&store, "a", 1, false).unwrap();
    for name in ["a", "b"] {
        let mut writer = store.create(&id(name), true).unwrap();
        for index in 0..10 {
            writer.page(&[index; 64]).unwrap();
        }
        let sent = store.parts().len();
        server.kill();
        let began = std::time::Instant::now();
        let error = fill(&mut *writer, 2).unwrap_err();
        assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        drop(writer);
        // It comes back with everything that it had; what was sent is there, and no image.
        server = Server::start_at(folder.path(), server.port).unwrap().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(store.parts().len(), sent, "the test's server keeps what it has");
        assert_eq!(store.list().unwrap().len(), 1);
        assert_eq!(read(&store, "a").unwrap(), 1);
    }
    // Another process, later.
    assert_eq!(store.sweep(Duration::ZERO).unwrap(), 0, "they are young");
    write(&store, "b", 3, false).unwrap();
    assert_eq!(read(&store, "b").unwrap(), 3);
    store.remove(&id("a")).unwrap();
    store.remove(&id("b")).unwrap();
    assert_eq!(store.parts(), [""; 0]);
}

#[test]
fn a_redis_server_that_never_answers_costs_a_bounded_time() {
    let (_listener, port) = mute();
    let store = connect(&format!("redis://127.0.0.1:{port}/0"), impatient()).unwrap();
    gives_up_in_time(&*store);
}

#[test]
fn nobody_at_the_address_is_an_error_too() {
    let port = {
        let (_listener, port) = mute();
        port
    };
    gives_up_in_time(&*connect(&format!("redis://127.0.0.1:{port}/0"), impatient()).unwrap());
}
