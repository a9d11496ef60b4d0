//! What graph mode needs of a session: records to read, and the mailbox to report to.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvoyant_cuda::{Context, DeviceBuffer, ImportedBuffer, Registration};
use kvoyant_protocol::graph::GraphLayout;
use kvoyant_protocol::memory::{Memfd, Seals, SharedMapping};

use crate::error::Error;

/// See the module.
#[derive(Debug)]
pub(in crate::cuda) struct GraphMemory {
    pub(super) layout: GraphLayout,
    records: ImportedBuffer,
    /// Number of the last report, in device memory: all of a session's reports count together.
    counter: DeviceBuffer,
    mailbox: Registration,
    /// Kept mapped while registered.
    _mapping: Arc<SharedMapping>,
}

impl GraphMemory {
    pub(in crate::cuda) fn open(
        context: &Context,
        layout: GraphLayout,
        records: ImportedBuffer,
        mailbox: OwnedFd,
    ) -> Result<Self, Error> {
        if (records.len() as u64) < layout.records_bytes() {
            return Err(Error::Broken(format!(
                "the records have {} bytes where {} are needed",
                records.len(),
                layout.records_bytes()
            )));
        }
        let bytes = usize::try_from(layout.mailbox_bytes())
            .map_err(|_| Error::Broken("the mailbox is larger than memory".into()))?;
        let mapping = Arc::new(Memfd::from_peer(mailbox, bytes, Seals::fixed_size())?.map(true)?);
        let address = mapping.address(0, 0)?;
        // SAFETY: the mapping is registered once in this process, and kept in `_mapping`, which is dropped after it.
        let mailbox = unsafe { context.register(address, bytes, false) }?;
        let counter = context.alloc(8)?;
        let stream = context.stream(kvoyant_cuda::Priority::Normal)?;
        // SAFETY: the word of an allocation that nobody else knows of yet.
        unsafe { stream.fill(counter.ptr(), 0, 8) }?;
        stream.synchronize()?;
        Ok(Self { layout, records, counter, mailbox, _mapping: mapping })
    }

    /// Address of the records of a layer in a slot.
    pub(super) fn records(&self, slot: u32, layer: u32) -> u64 {
        self.records.ptr() + self.layout.record(slot, layer)
    }

    pub(super) fn counter(&self) -> u64 {
        self.counter.ptr()
    }

    pub(super) fn mailbox(&self) -> u64 {
        self.mailbox.device_ptr()
    }
}
