//! Connecting, and registering a model.

use std::path::PathBuf;

use kvoyant_client::{Client, Format, Limits, Model, ModelSpec, Options};
use kvoyant_methods::{Fingerprint, Needs};
use pyo3::prelude::*;

use crate::errors::{Result, Wrong};
use crate::model::{PyModel, or_default};
use crate::session::Session;

/// What each method needs of an engine.
fn needs(model: &Model) -> Result<Vec<Needs>> {
    let named = |(index, text): (usize, &String)| {
        let unknown =
            || Wrong::argument(format!("method `{text}` is one of a later version than this package"));
        model.needs(index).copied().ok_or_else(unknown)
    };
    model.spec().methods.iter().enumerate().map(named).collect()
}

/// Connects to a daemon and registers a model: one session.
///
/// `socket` is the daemon's control socket, such as "/run/kvoyant/kvoyantd.sock". The model: `layers`, `query_heads`, `kv_heads`, `head_dim`;
/// `latent_values` other than 0 for latent rows (MLA), of whose `head_dim` values the first so many are the value. `dtype` is how rows are stored:
/// "f32", "f16", "bf16", "fp8-e4m3", "int8", "int4-g32" or "int4-g64". `sinks` first and `window` recent tokens are always attended to and never
/// selected; layers before `dense_layers` and those in `sliding_layers` are never asked for. `methods` are selection methods in text form;
/// sequences name them by index. `fingerprint` (32 hexadecimal digits), `adapter` and `rope` tell models apart that must not share prefixes
/// and images. `artifacts` are what methods were calibrated to, as safetensors.
///
/// Sizes of the session: `ring_slots`, answers held or under way at once, a power of two; `batch_max` members of a request; `hint_bytes`
/// of a request's queries; `table_bytes` of an answer; `sequences_max`. Times are in seconds.
///
/// ConnectError, VersionError, NotAllowedError; RefusedError with what does not fit of the model or its methods.
#[pyfunction]
#[pyo3(signature = (
    socket, *, layers, query_heads, kv_heads, head_dim, methods=None, dtype="f16", sinks=4, window=64, dense_layers=2, sliding_layers=None,
    latent_values=0, page_rows=0, name=None, fingerprint=None, adapter="", rope="", slab_bytes=0, artifacts=None, ring_slots=None,
    batch_max=None, hint_bytes=None, table_bytes=None, sequences_max=None, spin=None, ticket_timeout=None, control_timeout=None,
))]
#[allow(clippy::too_many_arguments, reason = "by keyword in Python")]
pub(crate) fn connect(
    py: Python<'_>,
    socket: PathBuf,
    layers: u32,
    query_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    methods: Option<Vec<String>>,
    dtype: &str,
    sinks: u32,
    window: u32,
    dense_layers: u32,
    sliding_layers: Option<Vec<u32>>,
    latent_values: u32,
    page_rows: u32,
    name: Option<String>,
    fingerprint: Option<String>,
    adapter: &str,
    rope: &str,
    slab_bytes: u64,
    artifacts: Option<Vec<Vec<u8>>>,
    ring_slots: Option<u32>,
    batch_max: Option<u32>,
    hint_bytes: Option<u32>,
    table_bytes: Option<u32>,
    sequences_max: Option<u32>,
    spin: Option<f64>,
    ticket_timeout: Option<f64>,
    control_timeout: Option<f64>,
) -> Result<PyModel> {
    let defaults = Options::default();
    let limits = Limits {
        ring_slots: ring_slots.unwrap_or(defaults.limits.ring_slots),
        batch_max: batch_max.unwrap_or(defaults.limits.batch_max),
        hint_bytes: hint_bytes.unwrap_or(defaults.limits.hint_bytes),
        table_bytes: table_bytes.unwrap_or(defaults.limits.table_bytes),
        sequences_max: sequences_max.unwrap_or(defaults.limits.sequences_max),
    };
    let name = name.unwrap_or_else(|| "python".into());
    let options = Options {
        name: name.clone(),
        limits,
        spin: or_default(spin, defaults.spin)?,
        ticket_timeout: or_default(ticket_timeout, defaults.ticket_timeout)?,
        control_timeout: or_default(control_timeout, defaults.control_timeout)?,
        ..defaults
    };
    let format: Format = dtype.parse().map_err(|error| Wrong::dtype(format!("dtype: {error}")))?;
    let artifacts = artifacts.unwrap_or_default();
    let spec = ModelSpec {
        name,
        fingerprint: fingerprint.unwrap_or_else(|| Fingerprint::default().to_string()),
        adapter: adapter.into(),
        rope: rope.into(),
        layers,
        query_heads,
        kv_heads,
        head_dim,
        latent_values,
        dtype: format.code(),
        page_rows,
        sinks,
        window,
        dense_layers,
        sliding_layers: sliding_layers.unwrap_or_default(),
        methods: methods.unwrap_or_else(|| vec!["kvoyant".into()]),
        slab_bytes,
        graph: None,
        artifacts: Vec::new(),
    };
    py.detach(|| {
        let client = Client::connect(&socket, options)?;
        let (number, protocol) = (client.session(), client.protocol());
        let model = client.register(spec, &artifacts)?;
        let needs = needs(&model)?;
        Ok(PyModel::new(Session::new(model, needs, number, protocol)))
    })
}
