//! A session's two memfds, as they are made.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvoyant_protocol::layout::{Layout, d2c};
use kvoyant_protocol::memory::{Memfd, MemoryError, Seals, SharedMapping};
use kvoyant_protocol::wire::Served;

use super::{Ended, beside};

/// See the module. The daemon never writes what the client writes, and the client gets what the daemon writes already sealed. Neither can be
/// resized from before the client has it: a file cut short under a mapping ends the process.
#[derive(Debug)]
pub(super) struct RingFiles {
    c2d_file: Memfd,
    d2c_file: Memfd,
    /// What the client writes.
    pub(super) c2d: SharedMapping,
    /// What the daemon writes.
    pub(super) d2c: Arc<SharedMapping>,
}

impl RingFiles {
    pub(super) async fn make(layout: Layout, served: Served) -> Result<Self, Ended> {
        let rings = beside(move || {
            let c2d_file = Memfd::create("kvoyant-c2d", layout.c2d_bytes)?;
            let d2c_file = Memfd::create("kvoyant-d2c", layout.d2c_bytes)?;
            let c2d = c2d_file.map_read_only()?;
            let d2c = Arc::new(d2c_file.map(true)?);
            c2d_file.seal(Seals::size_only())?;
            d2c_file.seal(Seals::frozen_for_readers())?;
            Ok(Self { c2d_file, d2c_file, c2d, d2c })
        })
        .await?;
        rings.d2c.store_u64(d2c::BOOT_ID, served.boot_id);
        rings.d2c.store_u64(d2c::GENERATION, served.generation.into());
        Ok(rings)
    }

    /// For the client.
    pub(super) fn fds(&self) -> Result<[OwnedFd; 2], MemoryError> {
        Ok([self.c2d_file.try_clone()?, self.d2c_file.try_clone()?])
    }

    /// The client has mapped them: nobody else can write what it writes.
    pub(super) fn freeze(&self) -> Result<(), MemoryError> {
        self.c2d_file.seal(Seals::frozen_for_readers())
    }
}
