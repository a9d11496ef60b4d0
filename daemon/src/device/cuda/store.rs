//! Where calibrations are kept: one file per card in the state folder, used for that card and driver only.

use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use kvoyant_cuda::DeviceInfo;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::cost::Table;

/// The version of the file's form.
pub const FORMAT: u32 = 1;

/// No calibration is as long as this.
const BYTES_MAX: u64 = 1 << 20;

/// The card and driver that a calibration is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The card's name.
    pub device: String,
    /// The card's UUID, `GPU-xxxxxxxx-…`.
    pub uuid: String,
    /// The driver's version, as it numbers itself: 12080 for CUDA 12.8.
    pub driver: i32,
}

impl Identity {
    /// Of a card, under a driver of this version.
    #[must_use]
    pub fn new(card: &DeviceInfo, driver: i32) -> Self {
        Self { device: card.name.clone(), uuid: card.uuid_text(), driver }
    }
}

/// What a file holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// [`FORMAT`].
    pub format: u32,
    /// Of which card and driver.
    pub of: Identity,
    /// When it was measured: UTC, as in RFC 3339.
    pub measured_at: String,
    /// Whether it was measured by `--quick`.
    pub quick: bool,
    /// What was found.
    pub costs: Table,
}

/// What every format has.
#[derive(Deserialize)]
struct Head {
    format: u32,
}

impl Calibration {
    /// A calibration measured just now.
    #[must_use]
    pub fn now(of: Identity, quick: bool, costs: Table) -> Self {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { format: FORMAT, of, measured_at: utc(seconds), quick, costs }
    }

    /// The file of a card.
    #[must_use]
    pub fn path(folder: &Path, of: &Identity) -> PathBuf {
        folder.join(format!("transfers-{}.json", of.uuid))
    }

    /// Reads the calibration of a card and driver; `None` if there is none.
    ///
    /// # Errors
    /// If the file cannot be read, is malformed, or is of another format, card or driver.
    pub fn load(folder: &Path, of: &Identity) -> Result<Option<Self>, StoreError> {
        let path = Self::path(folder, of);
        let bytes = match read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::Read { path, error }),
        };
        let malformed = |reason: String| StoreError::Malformed { path: path.clone(), reason };
        // The format first: that of another version need not parse as this one's.
        let Head { format } = serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
        if format != FORMAT {
            return Err(StoreError::Format { path, found: format });
        }
        let found: Self = serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
        if found.of.uuid != of.uuid || found.of.device != of.device {
            let found = format!("{} ({})", found.of.device, found.of.uuid);
            return Err(StoreError::Device { path, found, expected: format!("{} ({})", of.device, of.uuid) });
        }
        if found.of.driver != of.driver {
            return Err(StoreError::Driver { path, found: found.of.driver, expected: of.driver });
        }
        found.costs.check().map_err(|error| malformed(error.to_string()))?;
        Ok(Some(found))
    }

    /// Writes the calibration into a folder, whole or not at all, and returns the file.
    ///
    /// # Errors
    /// If the folder cannot be made or the file not be written.
    pub fn save(&self, folder: &Path) -> Result<PathBuf, StoreError> {
        let path = Self::path(folder, &self.of);
        self.write(folder, &path).map_err(|error| StoreError::Write { path: path.clone(), error })?;
        Ok(path)
    }

    fn write(&self, folder: &Path, path: &Path) -> io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
        let new = path.with_extension(format!("json.{}", std::process::id()));
        let written = (|| {
            let mut file = std::fs::File::create(&new)?;
            serde_json::to_writer_pretty(&mut file, self)?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            std::fs::rename(&new, path)
        })();
        if written.is_err() {
            std::fs::remove_file(&new).ok();
        }
        written
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The costs to go by for a card and driver: those of the calibration in `folder`, else estimated ones. The log says which,
/// and why.
#[must_use]
pub fn costs(folder: &Path, of: &Identity) -> Table {
    match Calibration::load(folder, of) {
        Ok(Some(found)) => {
            tracing::info!(
                device = of.device,
                measured_at = found.measured_at,
                h2d_gbps = found.costs.h2d_gbps,
                "transfer costs were measured on this GPU"
            );
            return found.costs;
        }
        Ok(None) => tracing::info!(
            device = of.device,
            folder = %folder.display(),
            "transfer costs are estimates: this GPU was never calibrated; run `kvoyant calibrate` once"
        ),
        Err(error) => tracing::warn!(device = of.device, "transfer costs are estimates: {error}"),
    }
    Table::estimate()
}

/// Where calibrations are kept unless a folder is named: the service's state folder, or the user's.
#[must_use]
pub fn default_folder() -> PathBuf {
    // systemd separates several folders by colons; the unit names one.
    if let Some(folders) = std::env::var_os("STATE_DIRECTORY").filter(|folders| !folders.is_empty()) {
        return std::env::split_paths(&folders).next().unwrap_or_default();
    }
    if nix::unistd::geteuid().is_root() {
        return "/var/lib/kvoyant".into();
    }
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .unwrap_or_else(std::env::temp_dir)
        .join("kvoyant")
}

/// A calibration that cannot be used, or not be kept.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The file is there and cannot be read.
    #[error("the calibration {} cannot be read: {error}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The file cannot be written.
    #[error("the calibration cannot be kept in {}: {error}; name another folder with --state", .path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The file does not hold what it should.
    #[error("the calibration {} is malformed ({reason}); run `kvoyant calibrate` again", .path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file has the form of another version of Kvoyant.
    #[error("the calibration {} has format {found}, and this version reads {FORMAT}; run `kvoyant calibrate` again", .path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The file is of another card.
    #[error("the calibration {} is of {found}, not of {expected}; run `kvoyant calibrate` again", .path.display())]
    Device {
        /// Which file.
        path: PathBuf,
        /// The card it is of.
        found: String,
        /// The card at hand.
        expected: String,
    },
    /// The file was measured with another driver.
    #[error("the calibration {} was measured with driver {found}, and now driver {expected} runs; run `kvoyant calibrate` again", .path.display())]
    Driver {
        /// Which file.
        path: PathBuf,
        /// The driver it was measured with.
        found: i32,
        /// The driver at hand.
        expected: i32,
    },
}

/// Seconds since 1970 as `YYYY-MM-DDThh:mm:ssZ`.
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March end with the leap day; 400 of them have 146,097 days.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card() -> Identity {
        Identity { device: "Test Card".into(), uuid: "GPU-0123".into(), driver: 12_080 }
    }

    fn change(folder: &Path, change: impl Fn(&mut serde_json::Value)) {
        let path = Calibration::path(folder, &card());
        Calibration::now(card(), false, Table::estimate()).save(folder).unwrap();
        let mut value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        std::fs::write(&path, serde_json::to_vec(&value).unwrap()).unwrap();
    }

    #[test]
    fn what_was_saved_is_loaded_and_nothing_else_is_left_in_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("a/b");
        assert_eq!(Calibration::load(&state, &card()).unwrap(), None);
        let made = Calibration::now(card(), true, Table::estimate());
        let path = made.save(&state).unwrap();
        assert!(path.ends_with("a/b/transfers-GPU-0123.json"));
        assert_eq!(Calibration::load(&state, &card()).unwrap(), Some(made.clone()));
        assert_eq!(costs(&state, &card()), made.costs);
        assert_eq!(std::fs::read_dir(&state).unwrap().count(), 1);
    }

    #[test]
    fn a_calibration_of_another_card_driver_or_format_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        change(folder, |value| value["of"]["device"] = "Other Card".into());
        let error = Calibration::load(folder, &card()).unwrap_err();
        assert!(
            matches!(&error, StoreError::Device { found, .. } if found.contains("Other Card")),
            "{error}"
        );
        change(folder, |value| value["of"]["driver"] = 13_000.into());
        let error = Calibration::load(folder, &card()).unwrap_err();
        assert!(matches!(error, StoreError::Driver { found: 13_000, expected: 12_080, .. }), "{error}");
        change(folder, |value| *value = serde_json::json!({ "format": 7, "what": "nobody knows yet" }));
        let error = Calibration::load(folder, &card()).unwrap_err();
        assert!(matches!(error, StoreError::Format { found: 7, .. }), "{error}");
        assert_eq!(costs(folder, &card()), Table::estimate());
    }

    #[test]
    fn a_malformed_calibration_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let changes: [fn(&mut serde_json::Value); 4] = [
            |value| *value = serde_json::Value::Null,
            |value| value["costs"]["h2d_gbps"] = (-3.0).into(),
            |value| value["costs"]["engines"][0]["rows"] = serde_json::json!([]),
            |value| value["more"] = 1.into(),
        ];
        for one in changes {
            change(folder, one);
            let error = Calibration::load(folder, &card()).unwrap_err();
            assert!(matches!(&error, StoreError::Malformed { reason, .. } if !reason.is_empty()), "{error}");
        }
        std::fs::write(Calibration::path(folder, &card()), vec![b' '; 3 << 20]).unwrap();
        assert!(matches!(Calibration::load(folder, &card()), Err(StoreError::Malformed { .. })));
        let path = Calibration::path(folder, &card());
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(Calibration::load(folder, &card()), Err(StoreError::Read { .. })));
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(utc(1_795_392_000), "2026-11-23T00:00:00Z");
        assert_eq!(utc(4_107_542_399), "2100-02-28T23:59:59Z");
        assert_eq!(utc(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}
