//! From a card's ordinal to its calibration: what `kvoyant calibrate` does.

use std::path::Path;

use kvoyant_cuda::{CudaError, KernelCache, KernelError, Unavailable};
use kvoyant_kernels::cuda::source;
use thiserror::Error;

use super::kernel_folder;
use super::measure::{Effort, measure};
use super::rig::RigError;
use super::store::{Calibration, Identity};

/// A calibration, and what was not measured.
#[derive(Debug)]
pub struct Calibrated {
    /// What was found; not stored yet.
    pub calibration: Calibration,
    /// Why `zerocopy` is not in it.
    pub without_kernel: Option<KernelError>,
}

/// Why there is no calibration.
#[derive(Debug, Error)]
pub enum CalibrateError {
    /// No driver to work with.
    #[error("no GPU can be calibrated: {0}")]
    Unavailable(#[from] Unavailable),
    /// The device cannot be used.
    #[error("cuda:{ordinal} cannot be calibrated: {error}")]
    Device {
        /// Which one.
        ordinal: u32,
        /// Why not.
        error: CudaError,
    },
    /// It could not be measured.
    #[error("the transfer engines cannot be measured: {0}")]
    Measure(#[from] RigError),
}

/// Measures the engines on the card of this ordinal. Compiled kernels are kept below the folder `state`.
///
/// # Errors
/// If there is no driver or no such card, or a transfer fails. That the gather kernel cannot be had is no error.
pub fn calibrate(ordinal: u32, state: &Path, effort: &Effort) -> Result<Calibrated, CalibrateError> {
    let driver = kvoyant_cuda::driver()?;
    let context = driver.context(ordinal).map_err(|error| CalibrateError::Device { ordinal, error })?;
    let cache = KernelCache::new(kernel_folder(state));
    let built = source("gather").map(|source| cache.module(&context, source)).transpose();
    let (gather, without_kernel) = match built {
        Ok(module) => (module, None),
        Err(error) => (None, Some(error)),
    };
    let costs = measure(&context, gather.as_ref(), effort)?;
    let of = Identity::new(context.info(), driver.version());
    let quick = *effort == Effort::quick();
    Ok(Calibrated { calibration: Calibration::now(of, quick, costs), without_kernel })
}
