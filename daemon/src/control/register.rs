//! A session's model: checked, its methods built, its memory made, beside the control thread.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvoyant_methods::Artifacts;
use kvoyant_protocol::control::{Failure, Mode, ModelSpec, ToClient};
use kvoyant_protocol::device::SlabRef;
use kvoyant_protocol::memory::Memfd;

use super::images::Registered as RegisteredModel;
use super::{Ended, Plane, SLAB_MAX, Session, beside, printable};
use crate::artifacts;
use crate::device::SlabRequest;
use crate::keep::{Keep, Piece};
use crate::lane::keeping::{About, Keeping};
use crate::lane::model::{ModelState, Placement, shape_of};

/// A model, what it leaves to the next daemon, what its client hears, and what goes along.
type Registered = (Box<ModelState>, Option<Box<Keeping>>, ToClient, Vec<OwnedFd>);

/// How much of a session lies where.
pub(super) fn placement(plane: &Plane) -> Placement {
    let config = plane.config();
    let config = &config.config;
    Placement {
        keep: config.keep,
        device_share: config.device_percent / 100.0,
        spill: plane.spill(config),
        check_every: u64::from(config.check_every),
    }
}

/// Bytes of the slab of such a model.
fn slab_bytes(plane: &Plane, spec: &ModelSpec) -> u64 {
    let default = plane.config().config.slab.as_u64();
    match (spec.slab_bytes, plane.device.mode()) {
        (0, _) => default,
        // What is set aside on a device bounds all sessions together; on the host only this does.
        (bytes, Mode::Device) => bytes,
        (bytes, _) => bytes.min(default),
    }
}

/// Files that are held for a session whose client may have gone meanwhile: then nobody else lets go of them.
struct Unheard {
    keep: Arc<Keep>,
    session: u64,
    heard: bool,
}

impl Drop for Unheard {
    fn drop(&mut self) {
        if !self.heard {
            self.keep.forget(self.session);
        }
    }
}

/// Begins the journal of a session that is to outlast this daemon.
async fn begin(
    plane: &Plane,
    session: &Session,
    spec: &ModelSpec,
    artifacts: Vec<OwnedFd>,
) -> Result<Option<Box<Keeping>>, Ended> {
    let (Some(kept), Some(token)) = (&plane.kept, session.token) else { return Ok(None) };
    let mut about = About {
        session: session.status.id,
        uid: session.status.uid,
        client: session.status.client.clone(),
        token,
        limits: session.layout.limits,
        features: session.features,
        spec: spec.clone(),
        artifacts: Vec::new(),
    };
    let keep = Arc::clone(&kept.keep);
    let unheard = Unheard { keep: Arc::clone(&keep), session: about.session, heard: false };
    let begun = beside(move || {
        for file in artifacts {
            let number = nix::sys::stat::fstat(&file).map_err(std::io::Error::from)?.st_ino;
            keep.add(about.session, Piece::Artifact(number), file)?;
            about.artifacts.push(number);
        }
        Ok((Keeping::begin(keep, &about), unheard))
    });
    match begun.await {
        Ok((Ok(keeping), mut unheard)) => {
            unheard.heard = true;
            Ok(Some(Box::new(keeping)))
        }
        Ok((Err(error), _)) => Err(cannot_keep(plane, session, &error)),
        Err(error) => Err(cannot_keep(plane, session, &error)),
    }
}

fn cannot_keep(plane: &Plane, session: &Session, error: &dyn std::fmt::Display) -> Ended {
    if let Some(kept) = &plane.kept {
        kept.keep.forget(session.status.id);
    }
    Ended::Refused(Failure::NotReady(format!("the session cannot be kept for the next daemon: {error}")))
}

/// Builds what a client registers.
pub(super) async fn register(
    plane: &Plane,
    session: &Session,
    spec: ModelSpec,
    fds: Vec<OwnedFd>,
) -> Result<Registered, Ended> {
    let spec = ModelSpec { name: printable(&spec.name), ..spec };
    // Before anything is made as large as the client says.
    shape_of(&spec).map_err(Ended::Refused)?;
    let artifacts = artifacts::files(&spec, fds)?;
    if let Ok(mut name) = session.status.model.lock() {
        name.clone_from(&spec.name);
    }
    let (extents, device) = (plane.pool.supply(session.status.uid), Arc::clone(&plane.device));
    let sequences_max = session.sequences_max;
    let (placement, asked) = (placement(plane), slab_bytes(plane, &spec));
    let files: Vec<OwnedFd> = match session.token {
        Some(_) => artifacts.iter().map(Memfd::try_clone).collect::<Result<_, _>>()?,
        None => Vec::new(),
    };
    let slab = SlabRequest {
        session: session.status.id,
        bytes: usize::try_from(asked.min(SLAB_MAX)).unwrap_or(usize::MAX),
        records: 0,
        layout: session.layout,
        d2c: Arc::clone(&session.d2c),
        features: session.features,
        importer: Arc::clone(&session.importer),
        account: Arc::clone(&session.account),
    };
    let (artifacts, spec) = if artifacts.is_empty() {
        (Artifacts::none(), spec)
    } else {
        // Nothing else of a registration takes as much memory: only one at a time does.
        let turn = Arc::clone(&plane.readings).acquire_owned().await;
        beside(move || {
            let artifacts = artifacts::read(artifacts, &spec)?;
            drop(turn);
            Ok((artifacts, spec))
        })
        .await?
    };
    let model = beside(move || {
        ModelState::new(spec, &artifacts, sequences_max, extents, &*device, slab, placement)
            .map_err(Ended::Refused)
    })
    .await?;
    let (slab, mut fds) = match &model.slab {
        None => (SlabRef::None, Vec::new()),
        Some(slab) => slab.slab.0.export().map_err(|error| Ended::Refused(error.into()))?,
    };
    if let Some(graph) = &model.graph {
        fds.push(graph.mailbox.fd()?);
    }
    let keeping = begin(plane, session, &model.spec, files).await?;
    let methods = model.spec.methods.clone();
    let _ = session.registered.set(RegisteredModel {
        key: model.model_key(),
        rope: model.spec.rope.clone(),
        methods,
    });
    let message = ToClient::Registered {
        device: plane.device.name().into(),
        mode: plane.device.mode(),
        page_rows: model.shape.page_rows as u32,
        slab,
        spills: model.spill.is_some(),
        scarce: model.spill.is_some() && plane.config().config.host_percent < 100.0,
    };
    Ok((Box::new(model), keeping, message, fds))
}
