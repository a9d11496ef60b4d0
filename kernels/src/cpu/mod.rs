//! Which instruction set to use, and the kernels' public face.

mod attend;
mod bounds;
mod codes;
mod convert;
mod copy;
mod elementwise;
mod hash;
mod layout;
mod packed;
mod pieces;
mod reduce;
mod scalar;
mod score;
#[cfg(target_arch = "x86_64")]
mod simd;
mod top_k;

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

pub use codes::{CodeOut, CodeScan, CodeSums, CodeTaken, CodeTotal, CodeWeighing, CodeWeights};
pub use pieces::{PIECE_ROWS, pieces};

/// The environment variable that forces a path: `scalar`, `avx2` or `avx512`.
pub const ENV: &str = "KVOYANT_KERNELS";

/// An instruction set that the kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// Plain Rust, the specification; on every processor.
    Scalar,
    /// AVX2 with FMA and F16C: x86-64 since about 2013.
    Avx2,
    /// AVX-512 F, BW, VL and DQ: servers since about 2017.
    Avx512,
}

impl Path {
    /// Every path, slowest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// Whether this processor and operating system can run the path.
    #[must_use]
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("popcnt")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            };
            match self {
                Self::Scalar => true,
                Self::Avx2 => avx2(),
                Self::Avx512 => {
                    avx2()
                        && is_x86_feature_detected!("avx512f")
                        && is_x86_feature_detected!("avx512bw")
                        && is_x86_feature_detected!("avx512vl")
                        && is_x86_feature_detected!("avx512dq")
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Scalar
        }
    }

    /// The paths that this machine can run, slowest first; never empty.
    #[must_use]
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|path| path.is_available()).collect()
    }

    /// The path of [`Kernels::best`]: what `KVOYANT_KERNELS` names, else the fastest available one. A name that is unknown or not
    /// available here is passed over; [`Kernels::from_env`] reports it. Decided once per process.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<Path> = OnceLock::new();
        let fastest = || Self::ALL.into_iter().rev().find(|path| path.is_available()).unwrap_or(Self::Scalar);
        *BEST.get_or_init(|| Self::from_env().ok().flatten().unwrap_or_else(fastest))
    }

    /// The path that `KVOYANT_KERNELS` names, if it is set and not empty.
    fn from_env() -> Result<Option<Self>, PathError> {
        let Some(text) = std::env::var_os(ENV).filter(|text| !text.is_empty()) else { return Ok(None) };
        let path: Self = text.to_string_lossy().parse()?;
        if path.is_available() { Ok(Some(path)) } else { Err(PathError::Unavailable { path }) }
    }

    /// The lower-case name: `scalar`, `avx2` or `avx512`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Path {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = Self::ALL.into_iter().find(|path| path.name().eq_ignore_ascii_case(text));
        named.ok_or_else(|| PathError::Unknown { text: text.to_owned() })
    }
}

/// A path that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// The text names none.
    #[error("'{text}' is no kernel path; use scalar, avx2 or avx512")]
    Unknown {
        /// What was given.
        text: String,
    },
    /// The processor (or its operating system) lacks the instructions.
    #[error(
        "this processor cannot run the {path} kernels; leave KVOYANT_KERNELS unset to take the best that it can"
    )]
    Unavailable {
        /// What was asked for.
        path: Path,
    },
}

/// The kernels on one [`Path`]. Whoever holds one knows that this machine has the path's instructions.
///
/// Methods panic when slices do not fit one another, as said under each; they never allocate, but for scratch that grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernels {
    /// Only ever an available path: the target-feature functions rely on it.
    path: Path,
}

impl Kernels {
    /// The kernels on [`Path::best`].
    #[must_use]
    pub fn best() -> Self {
        Self { path: Path::best() }
    }

    /// The kernels on the path that `KVOYANT_KERNELS` names, or the best ones when it is unset.
    ///
    /// # Errors
    /// The variable names no path, or one that this processor cannot run.
    pub fn from_env() -> Result<Self, PathError> {
        Ok(Path::from_env()?.map_or_else(Self::best, |path| Self { path }))
    }

    /// The kernels on a path of choice.
    ///
    /// # Errors
    /// [`PathError::Unavailable`] when this processor cannot run it.
    pub fn on(path: Path) -> Result<Self, PathError> {
        if path.is_available() { Ok(Self { path }) } else { Err(PathError::Unavailable { path }) }
    }

    /// The path in use.
    #[must_use]
    pub const fn path(&self) -> Path {
        self.path
    }
}

/// Calls a kernel on the handle's path; with `unsafe` before the name, one that asks its caller for more than the path.
macro_rules! dispatch {
    ($kernels:expr, $name:ident ( $($argument:expr),* $(,)? )) => {
        match $kernels.path {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a handle's path is available.
            $crate::cpu::Path::Avx2 => unsafe { $crate::cpu::simd::avx2_path::$name($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::cpu::Path::Avx512 => unsafe { $crate::cpu::simd::avx512_path::$name($($argument),*) },
            _ => $crate::cpu::scalar::$name($($argument),*),
        }
    };
    ($kernels:expr, unsafe $name:ident ( $($argument:expr),* $(,)? )) => {
        // SAFETY: a handle's path is available; what else the kernel asks for is said at the call.
        unsafe {
            match $kernels.path {
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Path::Avx2 => $crate::cpu::simd::avx2_path::$name($($argument),*),
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::Path::Avx512 => $crate::cpu::simd::avx512_path::$name($($argument),*),
                _ => $crate::cpu::scalar::$name($($argument),*),
            }
        }
    };
}
use dispatch;
