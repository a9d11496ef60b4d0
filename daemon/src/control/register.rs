//! A session's model: checked, its methods built, its memory made, beside the control thread.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvoyant_methods::Artifacts;
use kvoyant_protocol::control::{Mode, ModelSpec, ToClient};
use kvoyant_protocol::device::SlabRef;

use super::images::Registered as RegisteredModel;
use super::{Ended, Plane, SLAB_MAX, Session, beside, printable};
use crate::artifacts;
use crate::device::SlabRequest;
use crate::lane::model::{ModelState, Placement, shape_of};

/// A model, what its client hears, and what goes along.
type Registered = (Box<ModelState>, ToClient, Vec<OwnedFd>);

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
    let config = plane.config();
    let config = &config.config;
    let placement = Placement {
        keep: config.keep,
        device_share: config.device_percent / 100.0,
        spill: plane.spill(config),
    };
    let default = config.slab.as_u64();
    let asked = match (spec.slab_bytes, plane.device.mode()) {
        (0, _) => default,
        // What is set aside on a device bounds all sessions together; on the host only this does.
        (bytes, Mode::Device) => bytes,
        (bytes, _) => bytes.min(default),
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
        scarce: model.spill.is_some() && config.host_percent < 100.0,
    };
    Ok((Box::new(model), message, fds))
}
