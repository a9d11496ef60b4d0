//! Host memory that the device can read: extents, registered with the driver.

use std::sync::{Arc, PoisonError, RwLock};

use kvoyant_cuda::{Context, Registration};
use kvoyant_protocol::memory::SharedMapping;

use super::Shared;
use super::engines::DeviceMap;
use crate::tiers::pin::{Pin, PinError, PinGuard, limits_in_words};

/// What is registered, shared between whoever registers and the worker that copies.
#[derive(Debug, Default)]
pub(super) struct Registered(RwLock<DeviceMap>);

impl Registered {
    /// The map as it is now. Extents that a transfer needs stay in it until the transfer has ended.
    pub(super) fn read(&self) -> std::sync::RwLockReadGuard<'_, DeviceMap> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, DeviceMap> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A mapping that is registered as long as this lives.
#[derive(Debug)]
pub(super) struct Pinned {
    registration: Option<Registration>,
    memory: Arc<SharedMapping>,
    known: Arc<Registered>,
}

impl Pinned {
    /// Registers a whole mapping.
    pub(super) fn new(
        context: &Context,
        known: &Arc<Registered>,
        memory: &Arc<SharedMapping>,
    ) -> Result<Self, kvoyant_cuda::CudaError> {
        let host = memory.address(0, 0).unwrap_or(std::ptr::null_mut());
        // SAFETY: the mapping is registered nowhere else in this process and is kept, mapped, by `memory` until after
        // the registration has been dropped.
        let registration = unsafe { context.register(host, memory.len(), false) }?;
        known.write().insert(host, memory.len(), registration.device_ptr());
        Ok(Self { registration: Some(registration), memory: Arc::clone(memory), known: Arc::clone(known) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let host = self.memory.address(0, 0).unwrap_or(std::ptr::null_mut());
        self.known.write().remove(host);
        self.registration = None;
    }
}

/// Pins extents by registering them with the driver, for every device and mapped for kernels.
#[derive(Debug)]
pub(super) struct CudaPin {
    pub(super) shared: Arc<Shared>,
}

impl Pin for CudaPin {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn pin(&self, memory: &Arc<SharedMapping>) -> Result<Box<dyn PinGuard>, PinError> {
        match Pinned::new(&self.shared.context, &self.shared.registered, memory) {
            Ok(pinned) => Ok(Box::new(pinned)),
            Err(error) => {
                if error.is_sticky() {
                    self.shared.lose(&error);
                }
                Err(PinError::Registration { reason: format!("{error}; {}", limits_in_words()) })
            }
        }
    }
}
