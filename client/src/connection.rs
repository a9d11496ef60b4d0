//! Connecting, the handshake, and control messages.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use kvoyant_kernels::RowLayout;
use kvoyant_kernels::quantise::Format;
use kvoyant_protocol::control::{Failure, ModelSpec, ToClient, ToDaemon, agreed, features};
use kvoyant_protocol::device::SlabRef;
use kvoyant_protocol::graph::GraphLayout;
use kvoyant_protocol::layout::{Layout, Limits, PageGeometry};
use kvoyant_protocol::memory::{Memfd, Seals};
use kvoyant_protocol::packet;
use kvoyant_protocol::{EXTENT_BYTES, MINOR, VERSION};

use crate::again::{Again, Ticket, rings_of};
use crate::control::{Control, Line, Received};
use crate::cuda::{self, DeviceSession};
use crate::error::Error;
use crate::fallback::Fallback;
use crate::memory::{Geometry, Memory, Slab};
use crate::model::Model;
use crate::rings::Rings;
use crate::usage::Usage;

/// How a client connects.
#[derive(Debug, Clone)]
pub struct Options {
    /// A name for the daemon's logs and `kvoyant status`.
    pub name: String,
    /// Sizes of rings and tables.
    pub limits: Limits,
    /// How long a wait polls before it sleeps. Polling costs the core; a wake-up costs microseconds on bare metal
    /// and tens of them in a virtual machine.
    pub spin: Duration,
    /// How long a speculation waits for earlier answers to be dropped when all tickets are in use.
    pub ticket_timeout: Duration,
    /// How long to wait for the answer to a control message.
    pub control_timeout: Duration,
    /// What stands in for an answer that is late ([`Pending::or_late`](crate::Pending::or_late)).
    pub fallback: Fallback,
    /// How long after it was asked for an answer is late, where the fallback is not to wait for it.
    pub late_after: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            name: std::env::args().next().unwrap_or_default().rsplit('/').next().unwrap_or_default().into(),
            limits: Limits::default(),
            spin: Duration::from_micros(if cores >= 8 { 200 } else { 10 }),
            ticket_timeout: Duration::from_secs(1),
            control_timeout: Duration::from_secs(30),
            fallback: Fallback::Wait,
            late_after: Duration::from_millis(100),
        }
    }
}

/// A connection to the daemon, without a model yet.
#[derive(Debug)]
pub struct Client {
    control: Control,
    rings: Rings,
    session: u64,
    /// How it goes on with another daemon, if it can.
    kept: Option<Ticket>,
    late: (Fallback, Duration),
    minor: u16,
}

impl Client {
    /// Connects and goes through the handshake.
    ///
    /// The CUDA driver is loaded only if the daemon's device is a GPU, for that is slow, and a process that has a driver
    /// cannot use it after a fork: a daemon that refuses a client without one ([`Failure::Device`]) is asked once more,
    /// with what the driver can do.
    ///
    /// # Errors
    /// [`Error::Connect`] if nobody listens there or we may not; [`Error::Control`] if the daemon is of another
    /// version (it says both); [`Error::Failed`] if it has no room for another session, or a GPU that this process has
    /// no driver for.
    pub fn connect(path: &Path, options: Options) -> Result<Self, Error> {
        let always = features::COMMON | features::KEPT | features::GENERATION;
        let refused = match Self::connect_as(path, options.clone(), always) {
            Err(Error::Failed(failure @ Failure::Device(_))) => failure,
            other => return other,
        };
        match cuda::features() {
            0 => Err(Error::Failed(refused)),
            driver => Self::connect_as(path, options, always | driver),
        }
    }

    /// Connects as a client with these features.
    fn connect_as(path: &Path, options: Options, features: u64) -> Result<Self, Error> {
        let layout = Layout::new(options.limits)?;
        let socket = packet::connect_within(path, options.control_timeout)
            .map_err(|source| Error::Connect { path: path.to_path_buf(), source })?;
        let control = Control::new(Line::new(socket)?, options.control_timeout);
        let hello = ToDaemon::Hello { features, name: options.name, limits: options.limits, minor: MINOR };
        let Received { message, fds } = control.call(&hello, &[])?;
        let ToClient::Welcome { features: common, session, boot_id, limits, minor } = message else {
            return Err(Error::Broken(format!("{message:?} came instead of a welcome")));
        };
        if limits != options.limits {
            return Err(Error::Broken(format!("the daemon changed the limits to {limits:?}")));
        }
        let [c2d, d2c] = <[OwnedFd; 2]>::try_from(fds)
            .map_err(|fds| Error::Broken(format!("a welcome came with {} descriptors", fds.len())))?;
        let maps = rings_of(layout, (c2d, d2c), boot_id)?;
        match control.call(&ToDaemon::Mapped, &[])?.message {
            ToClient::Sealed => {}
            other => return Err(Error::Broken(format!("{other:?} came instead of the seal"))),
        }
        let rings = Rings::new(maps, (options.spin, options.ticket_timeout));
        let mut kept = None;
        if common & features::KEPT != 0 {
            let ToClient::Kept { token, seconds } = control.call(&ToDaemon::Keep, &[])?.message else {
                return Err(Error::Broken("no token came for a session that is kept".into()));
            };
            let patience = Duration::from_secs(u64::from(seconds));
            kept = Some(Ticket { path: path.to_path_buf(), session, token, patience });
            rings.copy_requests();
        }
        Ok(Self {
            control,
            rings,
            kept,
            session,
            late: (options.fallback, options.late_after),
            minor: agreed(minor),
        })
    }

    /// Version of the protocol that this session speaks, and its minor: the smaller one of both sides.
    #[must_use]
    pub fn protocol(&self) -> (u32, u16) {
        (VERSION, self.minor)
    }

    /// Number of the session, as in `kvoyant status`.
    #[must_use]
    pub fn session(&self) -> u64 {
        self.session
    }

    /// Registers the session's model. `artifacts` are what its methods were calibrated to, as safetensors: at most one of
    /// each kind.
    ///
    /// # Errors
    /// [`Error::Failed`] with [`Failure::BadModel`] or [`Failure::BadMethod`] that say what does not fit.
    pub fn register(self, spec: ModelSpec, artifacts: &[Vec<u8>]) -> Result<Model, Error> {
        let format = Format::from_code(spec.dtype).ok_or_else(|| {
            Error::Failed(Failure::BadModel(format!("storage format {} is not known", spec.dtype)))
        })?;
        let d = spec.head_dim as usize;
        let layout = match spec.latent_values as usize {
            0 => RowLayout::KeyValue { d, format },
            value => RowLayout::Latent { dim: d, value, format },
        };
        let row_bytes = layout
            .row_bytes()
            .ok_or_else(|| Error::Failed(Failure::BadModel(format!("there are no rows {layout}"))))?;
        let mut spec = spec;
        let graph =
            spec.graph.map(|graph| GraphLayout::new(graph, spec.layers, spec.kv_heads)).transpose()?;
        spec.artifacts = artifacts.iter().map(|bytes| bytes.len() as u64).collect();
        let files = artifacts.iter().map(|bytes| artifact_file(bytes)).collect::<Result<Vec<_>, _>>()?;
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let Received { message, fds } = self.control.call(&ToDaemon::Register(spec.clone()), &fds)?;
        let ToClient::Registered { device, mode, page_rows, slab, spills, scarce } = message else {
            return Err(Error::Broken(format!("{message:?} came instead of a registration")));
        };
        let slab = match slab {
            SlabRef::None => Slab::None,
            SlabRef::Host { bytes } => {
                let fd = fds.into_iter().next();
                let fd = fd.ok_or_else(|| Error::Broken("no slab came with the registration".into()))?;
                let file = Memfd::from_peer(fd, bytes as usize, Seals::frozen_for_readers())?;
                let slab = Arc::new(file.map_read_only()?);
                self.rings.set_slab(Some(Arc::clone(&slab)));
                Slab::Host(RwLock::new(slab))
            }
            SlabRef::Device(export) => {
                let watch = self.control.watch()?;
                let (c2d, d2c) = self.rings.mappings();
                let layouts = (self.rings.layout(), graph);
                match DeviceSession::open(&export, fds, layouts, (&c2d, &d2c), watch) {
                    Ok(session) => Slab::Device(session),
                    Err(error) => {
                        // Nothing of it is open any more, and the daemon need not wait for this process to end.
                        self.control.say(&ToDaemon::Goodbye);
                        return Err(error);
                    }
                }
            }
        };
        let geometry = Geometry {
            layers: spec.layers as usize,
            query_heads: spec.query_heads as usize,
            kv_heads: spec.kv_heads as usize,
            head_dim: d,
            layout,
            pages: PageGeometry { page_rows: page_rows as usize, row_bytes },
        };
        if !(1..=EXTENT_BYTES).contains(&geometry.pages.page_bytes()) {
            return Err(Error::Broken(format!("the daemon gave pages of {page_rows} rows")));
        }
        let memory = Memory::new(geometry, slab);
        let usage = Usage::of(&spec, format, page_rows as usize, artifacts);
        let inner = Arc::new(crate::model::Inner {
            control: self.control,
            rings: self.rings,
            late: self.late,
            process: std::process::id(),
            memory,
            geometry,
            usage,
            spec,
            device,
            mode,
            spills,
            scarce,
        });
        if let Some(ticket) = self.kept {
            inner.control.set_again(Again::new(ticket, Arc::downgrade(&inner)));
        }
        Ok(Model::new(inner))
    }
}

fn artifact_file(bytes: &[u8]) -> Result<Memfd, Error> {
    let file = Memfd::create("kvoyant-artifact", bytes.len())?;
    file.map(false)?.write(0, bytes)?;
    file.seal(Seals::fixed_size())?;
    Ok(file)
}
