//! The session's device memory, opened.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use kvoyant_cuda::{
    Access, Context, CudaError, Event, ImportedBuffer, PinnedBuffer, Priority, Registration, Stream,
};
use kvoyant_protocol::device::{DeviceExport, Export, Signal};
use kvoyant_protocol::graph::GraphLayout;
use kvoyant_protocol::layout::Layout;
use kvoyant_protocol::memory::{MemoryError, SharedMapping};

use super::graph::GraphMemory;
use super::watchdog::{self, Watchdog};
use crate::error::Error;

/// Extents that a session may have on a device: 1 TiB.
pub(super) const EXTENTS_MAX: usize = 16 << 10;

/// Bytes that are read back from the slab at once.
const READ_BYTES: usize = 1 << 20;

/// How streams are signalled, with what that needs here.
#[derive(Debug)]
pub(super) enum Signalled {
    Timeline64,
    Timeline32,
    /// One event for each ring slot.
    Events(Vec<Event>),
}

/// Extents as the device sees them.
#[derive(Debug)]
struct Extents {
    /// Keeps each one registered; dropped before its mapping.
    registrations: RwLock<Vec<(Registration, Arc<SharedMapping>)>>,
    /// Address of each one on the device, for kernels.
    addresses: PinnedBuffer,
}

/// See the module.
#[derive(Debug)]
pub struct DeviceSession {
    watchdog: Mutex<Option<Watchdog>>,
    extents: Extents,
    pub(super) signalled: Signalled,
    /// The client → daemon memory, registered: hints go there, doorbells and releases too.
    pub(super) c2d: Registration,
    pub(super) board: ImportedBuffer,
    /// In graph mode only.
    pub(super) graph: Option<GraphMemory>,
    slab: ImportedBuffer,
    /// What reads the slab back for the host, once it is asked to.
    reader: Mutex<Option<(Stream, PinnedBuffer)>>,
    slab_offset: u64,
    slab_bytes: u64,
    pub(super) layout: Layout,
    context: Context,
    /// Kept mapped while registered.
    pub(super) c2d_mapping: Arc<SharedMapping>,
}

impl DeviceSession {
    /// Opens what the daemon has exported. `fds` are the descriptors that came along.
    pub(crate) fn open(
        export: &DeviceExport,
        fds: Vec<OwnedFd>,
        (layout, graph): (Layout, Option<GraphLayout>),
        (c2d, d2c): (&Arc<SharedMapping>, &Arc<SharedMapping>),
        watch: OwnedFd,
    ) -> Result<Arc<Self>, Error> {
        let driver = kvoyant_cuda::driver().map_err(|error| Error::NoDevice(error.to_string()))?;
        let info = driver.device_by_uuid(export.device)?.ok_or_else(|| {
            Error::NoDevice(
                "the daemon's GPU is not visible to this process; look at CUDA_VISIBLE_DEVICES".into(),
            )
        })?;
        let context = driver.context(info.ordinal)?;
        let mut fds = fds.into_iter();
        let mut import = |export: &Export, access| -> Result<ImportedBuffer, Error> {
            let bytes = usize::try_from(export.bytes())
                .map_err(|_| Error::Broken("an allocation of the daemon's is larger than memory".into()))?;
            Ok(match export {
                Export::Handle { handle, .. } => context.open_ipc(&(*handle).into(), bytes)?,
                Export::Descriptor { .. } => {
                    let fd = fds
                        .next()
                        .ok_or_else(|| Error::Broken("a descriptor of device memory did not come".into()))?;
                    context.import_fd(fd, bytes, access)?
                }
            })
        };
        let slab = import(&export.slab, Access::Read)?;
        let board = import(&export.board, Access::ReadWrite)?;
        let records = export.records.as_ref().map(|records| import(records, Access::Read)).transpose()?;
        let graph = match (graph, records, fds.next()) {
            (None, ..) => None,
            (Some(layout), Some(records), Some(mailbox)) => {
                Some(GraphMemory::open(&context, layout, records, mailbox)?)
            }
            _ => {
                return Err(Error::Broken(
                    "records and a mailbox did not come, as graph mode needs them".into(),
                ));
            }
        };
        let inside =
            |offset: u64, bytes: u64, whole: u64| offset.checked_add(bytes).is_some_and(|end| end <= whole);
        if !inside(export.slab_offset, export.slab_bytes, export.slab.bytes())
            || !inside(0, layout.board_bytes() as u64, export.board.bytes())
        {
            return Err(Error::Broken(format!(
                "the slab or the board lies outside its allocation: {export:?}"
            )));
        }
        let signalled = match &export.signal {
            Signal::Timeline64 => Signalled::Timeline64,
            Signal::Timeline32 => Signalled::Timeline32,
            Signal::Events(handles) if handles.len() == layout.limits.ring_slots as usize => {
                let events = handles.iter().map(|handle| context.open_event(&(*handle).into()));
                Signalled::Events(events.collect::<Result<_, CudaError>>()?)
            }
            Signal::Events(handles) => {
                return Err(Error::Broken(format!(
                    "{} events came for {} slots",
                    handles.len(),
                    layout.limits.ring_slots
                )));
            }
        };
        let address = c2d.address(0, 0)?;
        // SAFETY: the mapping is registered once in this process and is kept, mapped, in `c2d_mapping`, which is dropped
        // after the registration.
        let registered = unsafe { context.register(address, c2d.len(), false) }?;
        let addresses = context.pinned(EXTENTS_MAX * 8)?;
        // SAFETY: the whole of pinned memory that nobody else knows of yet. A kernel takes 0 for an extent that is not mapped.
        unsafe { addresses.as_ptr().write_bytes(0, addresses.len()) };
        let release = watchdog::release(&context, board.ptr(), layout, Arc::clone(d2c))?;
        let watchdog = Watchdog::start(release, watch)?;
        Ok(Arc::new(Self {
            watchdog: Mutex::new(Some(watchdog)),
            extents: Extents { registrations: RwLock::default(), addresses },
            signalled,
            c2d: registered,
            board,
            graph,
            slab,
            reader: Mutex::new(None),
            slab_offset: export.slab_offset,
            slab_bytes: export.slab_bytes,
            layout,
            context,
            c2d_mapping: Arc::clone(c2d),
        }))
    }

    /// The context that everything was opened in: this process's primary context of the daemon's GPU.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Whether the driver itself keeps this process from writing to the slab.
    #[must_use]
    pub fn slab_is_read_only(&self) -> bool {
        self.slab.read_only()
    }

    /// Address of the slab's first row.
    #[must_use]
    pub fn slab_address(&self) -> u64 {
        self.slab.ptr() + self.slab_offset
    }

    /// Bytes of the slab.
    #[must_use]
    pub fn slab_bytes(&self) -> u64 {
        self.slab_bytes
    }

    /// Rows of the slab.
    pub(super) fn slab_rows(&self, row_bytes: usize) -> u32 {
        u32::try_from(self.slab_bytes as usize / row_bytes.max(1)).unwrap_or(u32::MAX)
    }

    /// Address of a range of the slab.
    pub(crate) fn slab_range(&self, offset: usize, bytes: usize) -> Result<u64, MemoryError> {
        let len = self.slab_bytes as usize;
        match offset.checked_add(bytes) {
            Some(end) if end <= len => Ok(self.slab_address() + offset as u64),
            _ => Err(MemoryError::OutOfBounds { offset, bytes, len }),
        }
    }

    /// Address, as kernels see it, of an array with the address of each of the session's extents, 64 bits each.
    #[must_use]
    pub fn extent_addresses(&self) -> u64 {
        self.extents.addresses.device_ptr()
    }

    /// How many extents there are by now.
    pub(crate) fn extent_count(&self) -> usize {
        self.extents.registrations.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Address of a range of an extent, as kernels see it.
    pub(crate) fn extent_range(
        &self,
        extent: usize,
        offset: usize,
        bytes: usize,
    ) -> Result<u64, MemoryError> {
        let extents = self.extents.registrations.read().unwrap_or_else(PoisonError::into_inner);
        let len = extents.get(extent).map_or(0, |(registration, _)| registration.len());
        match (extents.get(extent), offset.checked_add(bytes)) {
            (Some((registration, _)), Some(end)) if end <= len => {
                Ok(registration.device_ptr() + offset as u64)
            }
            _ => Err(MemoryError::OutOfBounds { offset, bytes, len }),
        }
    }

    /// Makes an extent readable for kernels: sinks, the window, dense layers and what the slab had no room for are read
    /// there.
    pub(crate) fn add_extent(&self, memory: &Arc<SharedMapping>) -> Result<(), Error> {
        let mut extents = self.extents.registrations.write().unwrap_or_else(PoisonError::into_inner);
        let index = extents.len();
        if index >= EXTENTS_MAX {
            return Err(Error::Size {
                what: "a session's extents on a device",
                found: index + 1,
                wanted: EXTENTS_MAX,
            });
        }
        let address = memory.address(0, 0)?;
        // SAFETY: the mapping is registered once in this process, and kept beside its registration, which goes first.
        let registration = unsafe { self.context.register(address, memory.len(), false) }?;
        let word = self.extents.addresses.as_ptr().wrapping_add(index * 8).cast::<u64>();
        // SAFETY: within the pinned array, aligned; kernels read a word only once an answer or a page table names its
        // extent, which comes after this.
        unsafe { word.write_volatile(registration.device_ptr()) };
        extents.push((registration, Arc::clone(memory)));
        Ok(())
    }

    /// Lets every stream go that waits for an answer, as if the daemon had died. For whoever gives the session up while
    /// the daemon stands still: a stream that waits for it would hold up the freeing of any memory.
    pub fn let_streams_go(&self) {
        // A watchdog that ends does so.
        *self.watchdog.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Copies device memory of the slab to the host. For whoever has no kernel: it waits for the device.
    pub(crate) fn read_slab(&self, offset: usize, bytes: &mut [u8]) -> Result<(), Error> {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let (stream, staging) = match &mut *reader {
            Some(reader) => reader,
            none => none.insert((self.context.stream(Priority::Normal)?, self.context.pinned(READ_BYTES)?)),
        };
        for (index, part) in bytes.chunks_mut(READ_BYTES).enumerate() {
            let from = self.slab_range(offset + index * READ_BYTES, part.len())?;
            // SAFETY: a range of the slab into a pinned buffer of that size, which lives until the stream is done.
            unsafe { stream.copy_d2h(staging.as_ptr(), from, part.len()) }?;
            stream.synchronize()?;
            // SAFETY: the buffer was filled above, and whoever holds the lock has it alone.
            unsafe { std::ptr::copy_nonoverlapping(staging.as_ptr(), part.as_mut_ptr(), part.len()) };
        }
        Ok(())
    }
}

impl Drop for DeviceSession {
    fn drop(&mut self) {
        // Before the board that the watchdog writes to.
        self.let_streams_go();
        // Streams may still be waiting for words, or reading rows.
        if let Err(error) = self.context.synchronize() {
            tracing::warn!("the device did not come to rest before its memory was closed: {error}");
        }
    }
}
