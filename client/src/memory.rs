//! The session's memory as mapped here: extents to write, page tables and the slab to read.

use std::sync::{Arc, RwLock, RwLockReadGuard};

use kvoyant_kernels::quantise::Format;
use kvoyant_kernels::{Dtype, RowLayout};
use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::control::MemoryKind;
use kvoyant_protocol::layout::PageGeometry;
use kvoyant_protocol::memory::{Memfd, MemoryError, Seals, SharedMapping};

use crate::cuda::DeviceSession;
use crate::error::Error;

/// Sizes of a registered model's rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub layers: usize,
    pub query_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub layout: RowLayout,
    pub pages: PageGeometry,
}

impl Geometry {
    /// Values of a row's value part.
    pub(crate) fn values(&self) -> usize {
        self.layout.value_values()
    }

    /// Storage type of rows on a device, which are of a plain one.
    pub(crate) fn dtype(&self) -> Dtype {
        match self.layout.format() {
            Format::Plain(dtype) => dtype,
            _ => Dtype::F32,
        }
    }

    /// Bytes of a row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.pages.row_bytes
    }
}

/// Where resident rows lie.
#[derive(Debug)]
pub(crate) enum Slab {
    /// In the session's extents only.
    None,
    /// In host memory that this process may read: the newest daemon's.
    Host(RwLock<Arc<SharedMapping>>),
    /// On a device.
    Device(Arc<DeviceSession>),
}

#[derive(Debug, Default)]
struct Maps {
    extents: Vec<Arc<SharedMapping>>,
    tables: Vec<Arc<SharedMapping>>,
    /// How often another daemon has gone on with the session, and has made the tables anew.
    daemons: u64,
}

/// All mappings of a session.
#[derive(Debug)]
pub(crate) struct Memory {
    geometry: Geometry,
    maps: RwLock<Maps>,
    slab: Slab,
}

impl Memory {
    pub(crate) fn new(geometry: Geometry, slab: Slab) -> Self {
        Self { geometry, maps: RwLock::default(), slab }
    }

    /// How many extents there are.
    pub(crate) fn extents(&self) -> usize {
        self.maps().extents.len()
    }

    /// Another daemon goes on with the session: it has made tables and slab anew, and extents stay what they are.
    pub(crate) fn begin_anew(&self, slab: Option<SharedMapping>) {
        if let (Slab::Host(ours), Some(slab)) = (&self.slab, slab) {
            *ours.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Arc::new(slab);
        }
        let mut maps = self.maps.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        maps.tables.clear();
        maps.daemons += 1;
    }

    /// See [`Maps::daemons`].
    pub(crate) fn daemons(&self) -> u64 {
        self.maps().daemons
    }

    /// The slab in host memory, if there is one, as it is now.
    pub(crate) fn host_slab(&self) -> Option<Arc<SharedMapping>> {
        match &self.slab {
            Slab::Host(slab) => {
                Some(Arc::clone(&slab.read().unwrap_or_else(std::sync::PoisonError::into_inner)))
            }
            _ => None,
        }
    }

    /// The session's device memory, if it has any.
    pub(crate) fn device(&self) -> Option<&Arc<DeviceSession>> {
        match &self.slab {
            Slab::Device(session) => Some(session),
            _ => None,
        }
    }

    /// Closes all device memory; false if there is none, or somebody else still has it.
    pub(crate) fn close_device(&mut self) -> bool {
        match std::mem::replace(&mut self.slab, Slab::None) {
            Slab::Device(session) => Arc::into_inner(session).is_some(),
            _ => false,
        }
    }

    fn maps(&self) -> RwLockReadGuard<'_, Maps> {
        self.maps.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Maps new memory.
    pub(crate) fn add(
        &self,
        kind: MemoryKind,
        first: u32,
        bytes: u64,
        fds: Vec<std::os::fd::OwnedFd>,
    ) -> Result<(), Error> {
        let mut maps = self.maps.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let list = match kind {
            MemoryKind::Extents | MemoryKind::Shared => &mut maps.extents,
            MemoryKind::Tables => &mut maps.tables,
        };
        if list.len() != first as usize || fds.is_empty() {
            return Err(Error::Broken(format!("{kind:?} {first} came after {}", list.len())));
        }
        for fd in fds {
            let map = match kind {
                MemoryKind::Extents => Memfd::from_peer(fd, EXTENT_BYTES, Seals::fixed_size())?.map(false)?,
                MemoryKind::Shared => {
                    Memfd::from_peer(fd, EXTENT_BYTES, Seals::frozen_for_readers())?.map_read_only()?
                }
                MemoryKind::Tables => {
                    Memfd::from_peer(fd, bytes as usize, Seals::frozen_for_readers())?.map_read_only()?
                }
            };
            let map = Arc::new(map);
            if let (MemoryKind::Extents, Slab::Device(session)) = (kind, &self.slab) {
                session.add_extent(&map)?;
            }
            list.push(map);
        }
        Ok(())
    }

    /// A file of page tables.
    pub(crate) fn table(&self, file: u32) -> Result<Arc<SharedMapping>, Error> {
        self.maps()
            .tables
            .get(file as usize)
            .cloned()
            .ok_or_else(|| Error::Broken(format!("table file {file} was never sent")))
    }

    /// Writes bytes of whole rows from this row on. They must lie in one page.
    pub(crate) fn write(&self, row: u32, bytes: &[u8]) -> Result<(), Error> {
        let (extent, offset) = self.geometry.pages.locate(row);
        let maps = self.maps();
        let map = maps
            .extents
            .get(extent)
            .ok_or_else(|| Error::Broken(format!("extent {extent} was never sent")))?;
        if !map.is_writable() {
            return Err(Error::Broken(format!("row {row} lies in an extent that is only for reading")));
        }
        Ok(map.write(offset, bytes)?)
    }

    /// Reads bytes of whole rows from this row on. They must lie in one page.
    pub(crate) fn read(&self, row: u32, bytes: &mut [u8]) -> Result<(), Error> {
        let (extent, offset) = self.geometry.pages.locate(row);
        let maps = self.maps();
        let map = maps
            .extents
            .get(extent)
            .ok_or_else(|| Error::Broken(format!("extent {extent} was never sent")))?;
        Ok(map.read(offset, bytes)?)
    }

    /// Reads whole rows from this row on, out of the slab (of an answer, `host`) or of an extent.
    pub(crate) fn read_run(
        &self,
        row: u32,
        in_slab: bool,
        host: Option<&SharedMapping>,
        bytes: &mut [u8],
    ) -> Result<(), Error> {
        if let Some(slab) = host.filter(|_| in_slab) {
            return Ok(slab.read(row as usize * self.geometry.row_bytes(), bytes)?);
        }
        match &self.slab {
            Slab::Device(slab) if in_slab => slab.read_slab(row as usize * self.geometry.row_bytes(), bytes),
            Slab::None | Slab::Host(_) if in_slab => {
                Err(Error::Broken("an answer names a slab that was never sent".into()))
            }
            _ => self.read(row, bytes),
        }
    }

    /// Address of rows, in the slab (of an answer, `host`) or in the extents. That of rows on a device is one that kernels there can follow.
    pub(crate) fn address(
        &self,
        row: u32,
        rows: u32,
        in_slab: bool,
        host: Option<&SharedMapping>,
    ) -> Result<*const u8, MemoryError> {
        let row_bytes = self.geometry.row_bytes();
        let bytes = rows as usize * row_bytes;
        if let Some(slab) = host.filter(|_| in_slab) {
            return slab.address(row as usize * row_bytes, bytes).map(<*mut u8>::cast_const);
        }
        if in_slab {
            return match &self.slab {
                Slab::Device(slab) => {
                    let address = slab.slab_range(row as usize * row_bytes, bytes)?;
                    Ok(std::ptr::without_provenance(address as usize))
                }
                Slab::None | Slab::Host(_) => {
                    Err(MemoryError::OutOfBounds { offset: row as usize * row_bytes, bytes, len: 0 })
                }
            };
        }
        self.addresses().of(row, rows)
    }

    /// Addresses of rows in the extents, many of them.
    pub(crate) fn addresses(&self) -> Addresses<'_> {
        Addresses { geometry: &self.geometry, maps: self.maps() }
    }

    /// Address of rows as kernels on the session's device see them.
    pub(crate) fn device_address(&self, row: u32, rows: u32, in_slab: bool) -> Result<u64, Error> {
        let Slab::Device(session) = &self.slab else {
            return Err(Error::NoDevice("the daemon's device is the host".into()));
        };
        let row_bytes = self.geometry.row_bytes();
        let bytes = rows as usize * row_bytes;
        if in_slab {
            return Ok(session.slab_range(row as usize * row_bytes, bytes)?);
        }
        let (extent, offset) = self.geometry.pages.locate(row);
        Ok(session.extent_range(extent, offset, bytes)?)
    }
}

/// Where rows of extents lie, while no memory is added.
pub(crate) struct Addresses<'a> {
    geometry: &'a Geometry,
    maps: RwLockReadGuard<'a, Maps>,
}

impl Addresses<'_> {
    /// Address of rows, all of one page.
    pub(crate) fn of(&self, row: u32, rows: u32) -> Result<*const u8, MemoryError> {
        let bytes = rows as usize * self.geometry.row_bytes();
        let (extent, offset) = self.geometry.pages.locate(row);
        match self.maps.extents.get(extent) {
            Some(map) => map.address(offset, bytes).map(<*mut u8>::cast_const),
            None => Err(MemoryError::OutOfBounds { offset, bytes, len: 0 }),
        }
    }
}
