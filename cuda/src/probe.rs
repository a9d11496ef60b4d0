//! Finds the driver, or says in a sentence why there is none, before anything of it is called.

use std::ffi::c_int;
use std::fmt;
use std::sync::OnceLock;

use libloading::Library;

use crate::batch::{BatchCall, BatchCopies};
use crate::calls::{Calls, cu, load_library};
use crate::context::Context;
use crate::device::DeviceInfo;
use crate::error::CudaError;

/// The oldest driver that has every function we call, as the driver counts versions: 1000 × major + 10 × minor.
pub const NEEDED_VERSION: i32 = 12_020;

/// Where the loader is asked for the driver. The soname comes first: a bare `libcuda.so` may be a toolkit's stub.
const LIBRARY_NAMES: [&str; 3] = ["libcuda.so.1", "libcuda.so", "libcuda.so.12"];

/// Why there is no driver to work with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// The loader found no driver library.
    #[error(
        "no CUDA driver on this machine (tried {}): install the NVIDIA driver, give the container the GPU, or have the daemon use --device host",
        tried.join(", ")
    )]
    NoLibrary {
        /// The names that were tried.
        tried: Vec<String>,
    },
    /// The library lacks a function that we call.
    #[error("the CUDA driver (version {}) lacks {name}: update it", Version(*version))]
    MissingSymbol {
        /// The function.
        name: String,
        /// What the driver says its version is; 0 if it does not say.
        version: i32,
    },
    /// The driver is older than [`NEEDED_VERSION`].
    #[error("the CUDA driver is of version {}, and {} is needed: update it", Version(*found), Version(*needed))]
    TooOld {
        /// The driver's version.
        found: i32,
        /// The version needed.
        needed: i32,
    },
    /// The driver did not start.
    #[error("the CUDA driver did not start: {0}")]
    Init(CudaError),
    /// The driver works and sees no device.
    #[error(
        "the CUDA driver sees no device: see nvidia-smi -L and CUDA_VISIBLE_DEVICES, or have the daemon use --device host"
    )]
    NoDevice,
}

/// A version as people write it: 12.2 for 12020.
struct Version(i32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// The driver of this process, initialised.
pub struct Driver {
    pub(crate) calls: Calls,
    version: i32,
    device_count: u32,
    pub(crate) batch: BatchCall,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("version", &self.version)
            .field("devices", &self.device_count)
            .field("batch_copies", &self.batch_copies())
            .finish_non_exhaustive()
    }
}

/// The driver, probed and initialised at the first call; the answer holds for the life of the process.
pub fn driver() -> Result<&'static Driver, Unavailable> {
    static DRIVER: OnceLock<Result<Driver, Unavailable>> = OnceLock::new();
    DRIVER.get_or_init(probe).as_ref().map_err(Clone::clone)
}

/// Loads the driver's library, without calling anything of it.
fn load() -> Result<Library, Unavailable> {
    let mut tried = Vec::new();
    for name in LIBRARY_NAMES {
        // SAFETY: the driver's initialisers are made to be run by whoever loads it.
        match unsafe { load_library(name) } {
            Ok(library) => return Ok(library),
            Err(reason) if reason.is_empty() => tried.push(name.to_owned()),
            Err(reason) => tried.push(format!("{name}: {reason}")),
        }
    }
    Err(Unavailable::NoLibrary { tried })
}

fn probe() -> Result<Driver, Unavailable> {
    let library = load()?;
    let version = version_of(&library)?;
    if version < NEEDED_VERSION {
        return Err(Unavailable::TooOld { found: version, needed: NEEDED_VERSION });
    }
    // SAFETY: a library of this name that answers for its version is a CUDA driver, with the signatures of cuda.h.
    let calls = unsafe { Calls::resolve(library) }
        .map_err(|name| Unavailable::MissingSymbol { name: name.to_owned(), version })?;
    // SAFETY: 0 is the only flag there is.
    unsafe { cu!(&calls, cuInit(0)) }.map_err(|error| match error.kind() {
        crate::ErrorKind::NoDevice => Unavailable::NoDevice,
        _ => Unavailable::Init(error),
    })?;
    let mut count: c_int = 0;
    // SAFETY: `count` is ours to be written.
    unsafe { cu!(&calls, cuDeviceGetCount(&raw mut count)) }.map_err(Unavailable::Init)?;
    let device_count = u32::try_from(count).unwrap_or(0);
    if device_count == 0 {
        return Err(Unavailable::NoDevice);
    }
    let batch = BatchCall::find(&calls, version);
    Ok(Driver { calls, version, device_count, batch })
}

/// What the driver says its version is, before anything else of it is called.
fn version_of(library: &Library) -> Result<i32, Unavailable> {
    const NAME: &str = "cuDriverGetVersion";
    let mut version: c_int = 0;
    // SAFETY: the signature is that of cuda.h, the call needs no initialisation, and `version` is ours to be written.
    let answer = unsafe {
        let call = library
            .get::<unsafe extern "C" fn(*mut c_int) -> c_int>(NAME)
            .map_err(|_| Unavailable::MissingSymbol { name: NAME.to_owned(), version: 0 })?;
        call(&raw mut version)
    };
    match answer {
        0 => Ok(version),
        code => Err(Unavailable::Init(CudaError::new(NAME, code))),
    }
}

impl Driver {
    /// The newest CUDA version that the driver serves: 1000 × major + 10 × minor.
    pub fn version(&self) -> i32 {
        self.version
    }

    /// Every device that this process sees.
    pub fn devices(&self) -> Result<Vec<DeviceInfo>, CudaError> {
        (0..self.device_count).map(|ordinal| self.device(ordinal)).collect()
    }

    /// The device of this ordinal.
    pub fn device(&self, ordinal: u32) -> Result<DeviceInfo, CudaError> {
        DeviceInfo::query(&self.calls, ordinal)
    }

    /// The device of this UUID, if this process sees it: ordinals differ between processes, UUIDs do not.
    pub fn device_by_uuid(&self, uuid: [u8; 16]) -> Result<Option<DeviceInfo>, CudaError> {
        for device in self.devices()? {
            if device.uuid == uuid {
                return Ok(Some(device));
            }
        }
        Ok(None)
    }

    /// Retains the primary context of a device: the one that the CUDA runtime, and so PyTorch, uses in this process.
    pub fn context(&'static self, ordinal: u32) -> Result<Context, CudaError> {
        Context::retain(self, self.device(ordinal)?)
    }

    /// Which batch copy this driver has.
    pub fn batch_copies(&self) -> BatchCopies {
        self.batch.which()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_in_one_sentence_with_what_to_do() {
        let texts = [
            (Unavailable::NoLibrary { tried: vec!["libcuda.so.1".into()] }, "tried libcuda.so.1"),
            (
                Unavailable::MissingSymbol { name: "cuMemMap".into(), version: 12_020 },
                "(version 12.2) lacks cuMemMap",
            ),
            (
                Unavailable::TooOld { found: 11_080, needed: NEEDED_VERSION },
                "of version 11.8, and 12.2 is needed",
            ),
            (Unavailable::Init(CudaError::new("cuInit", 803)), "reload the nvidia modules"),
            (Unavailable::NoDevice, "CUDA_VISIBLE_DEVICES"),
        ];
        for (unavailable, part) in texts {
            let text = unavailable.to_string();
            assert!(text.contains(part), "{text:?} does not say {part:?}");
            assert!(!text.contains('\n'), "{text:?} is one sentence");
        }
    }

    #[test]
    fn a_machine_without_a_driver_is_an_answer_and_not_a_panic() {
        // On a machine that has a driver, its own answer is checked instead.
        match driver() {
            Err(Unavailable::NoLibrary { tried }) => assert_eq!(tried, LIBRARY_NAMES),
            Err(other) => assert!(!other.to_string().is_empty()),
            Ok(driver) => assert!(driver.version() >= NEEDED_VERSION),
        }
        assert_eq!(driver().err(), driver().err(), "the answer is kept");
    }
}
