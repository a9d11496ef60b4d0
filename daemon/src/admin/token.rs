//! What stands for the daemon's user where nobody says who they are.

use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use hyper::Request;
use hyper::header::AUTHORIZATION;
use thiserror::Error;

/// Fewest bytes of a token: as many as nobody guesses.
const BYTES_MIN: usize = 16;

/// A token that cannot be used.
#[derive(Debug, Error)]
pub enum TokenError {
    /// A file that cannot be read.
    #[error("cannot read the token in {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that others may read.
    #[error("others may read the token in {}: chmod 600 it, and write a new one into it", path.display())]
    Open {
        /// Which.
        path: PathBuf,
    },
    /// A file of another user, who knows what is in it.
    #[error("the token in {} belongs to user {owner}: chown it to user {own}, and write a new one into it", path.display())]
    Owner {
        /// Which.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Whose it should be.
        own: u32,
    },
    /// Something that is easily guessed, or cannot be sent.
    #[error(
        "the token in {} must be one line of {BYTES_MIN} or more visible characters: head -c 32 /dev/urandom | base64", path.display()
    )]
    Weak {
        /// Which.
        path: PathBuf,
    },
}

/// A token, which nobody sees.
pub(crate) struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    /// Reads one.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub(crate) fn read(path: &Path) -> Result<Self, TokenError> {
        let fail = |source| TokenError::Read { path: path.to_path_buf(), source };
        let mut file = std::fs::File::open(path).map_err(fail)?;
        // Of what is read, whatever the name comes to stand for.
        let found = file.metadata().map_err(fail)?;
        if found.permissions().mode() & 0o077 != 0 {
            return Err(TokenError::Open { path: path.to_path_buf() });
        }
        let (owner, own) = (found.uid(), nix::unistd::geteuid().as_raw());
        if owner != own && owner != 0 {
            return Err(TokenError::Owner { path: path.to_path_buf(), owner, own });
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(fail)?;
        let token = text.trim_end();
        if token.len() < BYTES_MIN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(TokenError::Weak { path: path.to_path_buf() });
        }
        Ok(Self(token.to_owned()))
    }

    /// Whether a request brings it.
    pub(super) fn is_in<T>(&self, request: &Request<T>) -> bool {
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = header.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        // Hashes take as long to compare wherever they differ, and say nothing of what was hashed.
        blake3::hash(given.as_bytes()) == blake3::hash(self.0.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_one_line_that_nobody_else_can_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let read = |text: &str, mode: u32| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            Token::read(&path)
        };
        let token = read("0123456789abcdef\n", 0o600).unwrap();
        let request = |value: &str| Request::builder().header(AUTHORIZATION, value).body(()).unwrap();
        assert!(token.is_in(&request("Bearer 0123456789abcdef")));
        for wrong in [
            "0123456789abcdef",
            "Bearer 0123456789abcde",
            "Bearer ",
            "bearer 0123456789abcdef",
            "Basic 0123456789abcdef",
        ] {
            assert!(!token.is_in(&request(wrong)), "{wrong}");
        }
        assert!(!token.is_in(&Request::new(())));
        assert!(matches!(read("0123456789abcdef", 0o640), Err(TokenError::Open { .. })));
        for weak in ["short", "", "0123456789 abcdef", "0123456789abcdef\n0"] {
            assert!(matches!(read(weak, 0o600), Err(TokenError::Weak { .. })), "{weak:?}");
        }
        assert!(matches!(Token::read(&folder.path().join("no")), Err(TokenError::Read { .. })));
        assert_eq!(format!("{token:?}"), "Token");
    }
}
