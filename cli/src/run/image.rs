//! The image that an answer is to be suspended as: what stands in its way is said before anything is computed.

use std::path::Path;

use kvoyant_daemon::admin::{SequencesReport, fetch_sequences, fetch_status};
use kvoyant_daemon::tiers::store::{IdError, ImageId};

/// Why nothing could be suspended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// A name that is none.
    #[error("--suspend {name:?}: {error}")]
    Name {
        /// What was written.
        name: String,
        /// Why it is none.
        error: IdError,
    },
    /// No folder for images.
    #[error("--suspend: this daemon keeps no images; start it with `store` set to a folder")]
    NoStore,
    /// The name is taken.
    #[error(
        "--suspend {name:?}: there is such an image already; take another name, or replace it with --overwrite"
    )]
    Exists {
        /// Which name.
        name: String,
    },
}

/// Whether an image can be called that.
///
/// # Errors
/// [`ImageError::Name`].
pub(super) fn check_name(name: &str) -> Result<(), ImageError> {
    let id = |text: &str| text.parse::<ImageId>();
    let user = nix::unistd::geteuid();
    // The daemon puts the user before it.
    let checked = id(name).and_then(|_| id(&format!("u{user}.{name}")));
    checked.map(drop).map_err(|error| ImageError::Name { name: name.to_owned(), error })
}

/// Whether the daemon that we are connected to keeps images, and none of that name yet. The admin socket beside its socket is asked; where
/// that cannot be had, or is another daemon's, it is seen when the image is written.
///
/// # Errors
/// What stands in the way.
pub(super) fn check_room(socket: &Path, name: &str, overwrite: bool) -> Result<(), ImageError> {
    let admin = socket.with_file_name("admin.sock");
    let me = nix::unistd::getpid().as_raw();
    let ours =
        fetch_status(&admin).is_ok_and(|status| status.sessions.iter().any(|session| session.pid == me));
    match fetch_sequences(&admin) {
        Ok(report) if ours => room(&report, nix::unistd::geteuid().as_raw(), name, overwrite),
        _ => Ok(()),
    }
}

fn room(report: &SequencesReport, user: u32, name: &str, overwrite: bool) -> Result<(), ImageError> {
    if !report.keeps_images {
        return Err(ImageError::NoStore);
    }
    let taken = report.images.iter().any(|image| image.uid == Some(user) && image.name == name);
    if taken && !overwrite {
        return Err(ImageError::Exists { name: name.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_what_the_store_takes() {
        check_name("chat-7.b_C").unwrap();
        for bad in ["", "../x", ".x", "a b", &"x".repeat(127)] {
            let said = check_name(bad).unwrap_err().to_string();
            assert!(said.contains(&format!("{bad:?}")), "{said}");
        }
    }

    #[test]
    fn a_daemon_without_a_store_has_no_room() {
        let report = SequencesReport {
            sequences: Vec::new(),
            images: Vec::new(),
            keeps_images: false,
            remote_error: None,
        };
        assert!(room(&report, 1, "a", true).unwrap_err().to_string().contains("`store`"));
        room(&SequencesReport { keeps_images: true, ..report }, 1, "a", false).unwrap();
    }
}
