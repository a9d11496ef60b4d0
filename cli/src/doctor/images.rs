//! Where images are kept: the folder, and the store behind it.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use kvoyant_daemon::config::Config;
use kvoyant_daemon::tiers::store::{ImageStore, RemoteOptions, StoreError, connect};

use super::check::{Level, Report};

/// How long the remote store may take to list what it has.
const PATIENCE: Duration = Duration::from_secs(20);

/// All checks of this room; none where no images are kept.
pub(crate) fn examine(report: &mut Report, config: &Config) {
    if config.store.as_os_str().is_empty() {
        return;
    }
    folder(report, &config.store);
    if !config.remote.is_empty() {
        remote(report, &config.remote);
    }
}

/// Whether images can be written there. The folder is not made: the daemon does that.
fn folder(report: &mut Report, folder: &Path) {
    let mut place = folder.to_path_buf();
    while !place.exists() {
        place = match place.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
    }
    let tried = tempfile::Builder::new().prefix(".kvoyant-doctor-").tempdir_in(&place);
    match tried {
        Ok(_) if place == folder => {
            report.pass("store", format!("{}: can be written", folder.display()));
        }
        Ok(_) => report.pass("store", format!("{}: is not there, and can be made", folder.display())),
        Err(error) => report.add(
            "store",
            Level::Fail,
            format!("{}: {error}", folder.display()),
            Some(format!(
                "install -d -m 700 -o kvoyant -g kvoyant {0}; in the unit: ReadWritePaths={0}",
                folder.display()
            )),
        ),
    }
}

/// Whether the store behind it answers.
fn remote(report: &mut Report, url: &str) {
    let options = RemoteOptions { tries: 1, operation: Duration::from_secs(5), ..RemoteOptions::default() };
    let store = match connect(url, options) {
        Ok(store) => store,
        Err(error) => {
            let fix =
                "set `remote` to s3://bucket/prefix, redis://host:port/db or file:///folder, or leave it out";
            return report.add("remote", Level::Fail, error.to_string(), Some(fix.into()));
        }
    };
    let name = store.name().to_owned();
    match listed(store) {
        Some(Ok(images)) => report.pass("remote", format!("{name} answers, and has {images} images")),
        // The daemon serves without it.
        Some(Err(error @ StoreError::Refused { .. })) => report.warn(
            "remote",
            error.to_string(),
            "check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or user and password in the URL), and the bucket's name",
        ),
        Some(Err(error)) => report.warn("remote", error.to_string(), reach(url)),
        None => report.warn(
            "remote",
            format!("{name} gave no list within {} s", PATIENCE.as_secs()),
            reach(url),
        ),
    }
}

/// How many images there are; `None` if that takes too long.
fn listed(store: Box<dyn ImageStore>) -> Option<Result<usize, StoreError>> {
    let (said, hear) = mpsc::channel();
    std::thread::spawn(move || said.send(store.list().map(|list| list.len())));
    hear.recv_timeout(PATIENCE).ok()
}

fn reach(url: &str) -> &'static str {
    match url.split_once(':').map(|(scheme, _)| scheme) {
        Some("file") => "mount the file system, and let the daemon's user write there",
        Some("s3") => {
            "set AWS_ENDPOINT_URL and AWS_REGION, start the server, and open the network to the unit (systemd/kvoyantd-remote.conf)"
        }
        _ => "start the server, and open the network to the unit (systemd/kvoyantd-remote.conf)",
    }
}
