//! The same once more under MPS, with a server of our own that ends with the measurement.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::report::Section;
use crate::run;
use crate::sections::{Kind, Setup};

const CONTROL: &str = "nvidia-cuda-mps-control";

/// A server that is told to quit when this is dropped.
struct Server(Vec<(&'static str, String)>);

impl Server {
    fn start(folder: &Path) -> Option<Self> {
        let path = |name: &str| -> Option<String> {
            let path = folder.join(name);
            std::fs::create_dir(&path).ok()?;
            Some(path.display().to_string())
        };
        let variables =
            vec![("CUDA_MPS_PIPE_DIRECTORY", path("pipe")?), ("CUDA_MPS_LOG_DIRECTORY", path("log")?)];
        let server = Self(variables);
        let status = server.command().arg("-d").stdin(Stdio::null()).status().ok()?;
        status.success().then_some(server)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(CONTROL);
        command
            .envs(self.0.iter().map(|(name, value)| (name, value)))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Ok(mut child) = self.command().stdin(Stdio::piped()).spawn() else { return };
        if let Some(mut words) = child.stdin.take() {
            let _ = words.write_all(b"quit\n");
        }
        let _ = child.wait();
    }
}

/// The section about overlap under MPS; none where there is no MPS, or where it runs anyway.
pub(crate) fn overlap(setup: &Setup) -> Option<Section> {
    if setup.software || kvoyant_daemon::device::cuda::mps_runs() {
        return None;
    }
    let folder = tempfile::tempdir().ok()?;
    let server = Server::start(folder.path())?;
    let title = format!("{}, under MPS", Kind::Overlap.title());
    let mut section = run::outside(Kind::Overlap, &title, setup, &server.0);
    section.name = format!("{}-mps", section.name);
    Some(section)
}
