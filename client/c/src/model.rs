//! Sessions with their models.

use std::ffi::{CString, c_char};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvoyant_client::{Client, Limits, Mode, Model, ModelSpec, Options, RowLayout, Sequence, Stat};

use crate::handles::{self, Object};
use crate::raw::{self, Out};
use crate::status::{Wrong, call};
use crate::types::{
    KVOYANT_ABI, kvoyant_mode, kvoyant_model, kvoyant_model_info, kvoyant_options, kvoyant_spec,
    kvoyant_status,
};

/// A model, and what is said of it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) model: Model,
    number: u64,
    protocol: (u32, u16),
    device: CString,
}

impl Session {
    pub(crate) fn kv_heads(&self) -> usize {
        self.model.spec().kv_heads as usize
    }

    pub(crate) fn query_heads(&self) -> usize {
        self.model.spec().query_heads as usize
    }

    /// Bytes of a row. Its layout was accepted when the model was registered.
    pub(crate) fn row_bytes(&self) -> usize {
        self.model.layout().row_bytes().unwrap_or(0)
    }

    /// Whether runs have addresses of a GPU.
    pub(crate) fn on_device(&self) -> bool {
        self.model.mode() == Mode::Device
    }

    /// Checks the index of a layer.
    pub(crate) fn layer(&self, layer: u32) -> Result<usize, Wrong> {
        let layers = self.model.spec().layers;
        if layer < layers {
            return Ok(layer as usize);
        }
        Err(Wrong::argument(format!("layer {layer} of a model of {layers}")))
    }

    /// Checks the index of a KV head.
    pub(crate) fn kv_head(&self, kv_head: u32) -> Result<usize, Wrong> {
        if (kv_head as usize) < self.kv_heads() {
            return Ok(kv_head as usize);
        }
        Err(Wrong::argument(format!("KV head {kv_head} of a model of {}", self.kv_heads())))
    }

    /// Checks the index of a method.
    pub(crate) fn method(&self, method: u32) -> Result<usize, Wrong> {
        let methods = self.model.spec().methods.len();
        if (method as usize) < methods {
            return Ok(method as usize);
        }
        Err(Wrong::argument(format!("method {method} of a model that registered {methods}")))
    }
}

fn options(options: &kvoyant_options) -> Result<Options, Wrong> {
    let mut wanted = Options::default();
    // SAFETY: the contract of kvoyant_connect.
    if let Some(name) = unsafe { raw::text(options.name, "options.name") }? {
        wanted.name = name.to_owned();
    }
    let limits = &mut wanted.limits;
    let Limits { ring_slots, batch_max, hint_bytes, table_bytes, sequences_max } = limits;
    for (limit, asked) in [
        (ring_slots, options.ring_slots),
        (batch_max, options.batch_max),
        (hint_bytes, options.hint_bytes),
        (table_bytes, options.table_bytes),
        (sequences_max, options.sequences_max),
    ] {
        if asked != 0 {
            *limit = asked;
        }
    }
    for (time, asked) in [
        (&mut wanted.spin, Duration::from_micros(options.spin_us)),
        (&mut wanted.ticket_timeout, Duration::from_millis(options.ticket_timeout_ms)),
        (&mut wanted.control_timeout, Duration::from_millis(options.control_timeout_ms)),
    ] {
        if !asked.is_zero() {
            *time = asked;
        }
    }
    Ok(wanted)
}

/// # Safety
/// The contract of `kvoyant_connect`.
unsafe fn texts(list: *const *const c_char, count: usize, what: &str) -> Result<Vec<String>, Wrong> {
    // SAFETY: the caller's contract.
    let list = unsafe { raw::slice(list, count, what) }?;
    let text = |(at, text): (usize, &*const c_char)| {
        let what = format!("{what}[{at}]");
        // SAFETY: the caller's contract.
        let text = unsafe { raw::text(*text, &what) }?;
        text.map(str::to_owned).ok_or_else(|| Wrong::argument(format!("{what} is null")))
    };
    list.iter().enumerate().map(text).collect()
}

/// # Safety
/// The contract of `kvoyant_connect`.
unsafe fn spec(spec: &kvoyant_spec) -> Result<(ModelSpec, Vec<Vec<u8>>), Wrong> {
    let text = |pointer, what| {
        // SAFETY: the caller's contract.
        let text = unsafe { raw::text(pointer, what) }?;
        Ok::<_, Wrong>(text.unwrap_or_default().to_owned())
    };
    let dtype = u8::try_from(spec.dtype).ok().filter(|_| spec.dtype <= 6);
    let dtype = dtype.ok_or_else(|| {
        Wrong::new(kvoyant_status::Dtype, format!("spec.dtype is {}", raw::dtype_name(spec.dtype)))
    })?;
    // SAFETY: the caller's contract, for all three.
    let (sliding_layers, methods, artifacts) = unsafe {
        (
            raw::slice(spec.sliding_layers, spec.sliding_layers_count, "spec.sliding_layers")?.to_vec(),
            texts(spec.methods, spec.methods_count, "spec.methods")?,
            raw::slice(spec.artifacts, spec.artifacts_count, "spec.artifacts")?,
        )
    };
    let artifacts = artifacts.iter().map(|artifact| {
        // SAFETY: the caller's contract.
        let bytes: &[u8] = unsafe { raw::slice(artifact.data.cast(), artifact.bytes, "an artifact") }?;
        Ok(bytes.to_vec())
    });
    let artifacts = artifacts.collect::<Result<Vec<_>, Wrong>>()?;
    let model = ModelSpec {
        name: text(spec.name, "spec.name")?,
        fingerprint: text(spec.fingerprint, "spec.fingerprint")?,
        adapter: text(spec.adapter, "spec.adapter")?,
        rope: text(spec.rope, "spec.rope")?,
        layers: spec.layers,
        query_heads: spec.query_heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        latent_values: spec.latent_values,
        dtype,
        page_rows: spec.page_rows,
        sinks: spec.sinks,
        window: spec.window,
        dense_layers: spec.dense_layers,
        sliding_layers,
        methods,
        slab_bytes: spec.slab_bytes,
        graph: None,
        artifacts: Vec::new(),
    };
    Ok((model, artifacts))
}

/// Connects to a daemon and registers a model: one session. Several threads may use it at once.
///
/// `socket` is the daemon's control socket, such as `/run/kvoyant/kvoyantd.sock`; `options` may be null. `model` is all zero unless this
/// succeeds. What is pointed to is copied.
///
/// Errors: `CONNECT`, `VERSION`, `NOT_ALLOWED`; `REFUSED` with what does not fit of the model or its methods.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_connect(
    socket: *const c_char,
    options: *const kvoyant_options,
    spec: *const kvoyant_spec,
    model: *mut kvoyant_model,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header.
        let out = unsafe { Out::cleared(model, "model") }?;
        // SAFETY: the contract of the header.
        let socket = unsafe { raw::text(socket, "socket") }?;
        let socket =
            socket.ok_or_else(|| Wrong::argument("socket is null: the daemon's control socket is needed"))?;
        let options = if options.is_null() {
            Options::default()
        } else {
            // SAFETY: the contract of the header.
            self::options(&unsafe { raw::read(options) }?)?
        };
        // SAFETY: the contract of the header.
        let (spec, artifacts) = unsafe { self::spec(&raw::read(spec)?) }?;
        handles::watch_forks()?;
        let client = Client::connect(Path::new(socket), options)?;
        let (number, protocol) = (client.session(), client.protocol());
        let model = client.register(spec, &artifacts)?;
        let device = CString::new(model.device().replace('\0', " ")).unwrap_or_default();
        let id = handles::add(Object::Model(Arc::new(Session { model, number, protocol, device })))?;
        out.set(kvoyant_model { id });
        Ok(())
    })
}

/// What was registered, and by whom it is served. Set `info->size` before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_model_describe(
    model: kvoyant_model,
    info: *mut kvoyant_model_info,
) -> kvoyant_status {
    call(|| {
        let session = handles::get::<Session>(model.id)?;
        let (spec, layout) = (session.model.spec(), session.model.layout());
        let value_offset = match layout {
            RowLayout::KeyValue { .. } => session.row_bytes() / 2,
            RowLayout::Latent { .. } => 0,
        };
        let mode = match session.model.mode() {
            Mode::InPlace => kvoyant_mode::InPlace,
            Mode::Slab => kvoyant_mode::Slab,
            Mode::Device => kvoyant_mode::Device,
        };
        let described = kvoyant_model_info {
            size: 0,
            session: session.number,
            device: session.device.as_ptr(),
            mode: mode as u32,
            dtype: spec.dtype.into(),
            layers: spec.layers,
            query_heads: spec.query_heads,
            kv_heads: spec.kv_heads,
            key_values: layout.key_values() as u32,
            value_values: layout.value_values() as u32,
            page_rows: session.model.page_rows() as u32,
            row_bytes: session.row_bytes() as u64,
            value_offset: value_offset as u64,
            spills: session.model.spills().into(),
            scarce: session.model.is_scarce().into(),
            protocol: session.protocol.0,
            protocol_minor: session.protocol.1.into(),
        };
        // SAFETY: the contract of the header.
        unsafe { raw::fill(info, described) }
    })
}

/// A counter of the session, as the daemon publishes it: a `kvoyant_counter`. Costs a read of shared memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_model_counter(
    model: kvoyant_model,
    counter: u32,
    value: *mut u64,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header.
        let out = unsafe { Out::new(value, "value") }?;
        let session = handles::get::<Session>(model.id)?;
        let stat = COUNTERS.get(counter as usize).ok_or_else(|| {
            Wrong::argument(format!("counter {counter} is not known; there are 0 to {}", COUNTERS.len() - 1))
        })?;
        out.set(session.model.stat(*stat));
        Ok(())
    })
}

/// Counters of a session, since it began.
#[repr(u32)]
#[allow(non_camel_case_types, reason = "named as in C")]
#[derive(Debug, Clone, Copy)]
pub enum kvoyant_counter {
    /// Requests for rows that were answered.
    Speculations = 0,
    /// Rows selected.
    RowsSelected = 1,
    /// Of these, found on the device.
    RowsHit = 2,
    /// Of these, read in place.
    RowsInPlace = 3,
    /// Bytes copied.
    BytesMoved = 4,
    /// Time in selection and planning, ns.
    SelectNs = 5,
    /// Time from plan to the last byte, ns.
    TransferNs = 6,
    /// Rows appended, all layers and heads together.
    RowsAppended = 7,
    /// Rows attended by the daemon's CPU.
    CpuRows = 8,
    /// Rows brought to the device ahead of any request.
    PrefetchedRows = 9,
    /// Bytes copied for them.
    PrefetchBytes = 10,
    /// Rows that answers left out and estimated, all query heads together.
    EstimatedRows = 11,
    /// Rows left out because they would have come after their deadline.
    LateRows = 12,
    /// Pages written to disk.
    PagesWritten = 13,
    /// Pages read back from disk.
    PagesRead = 14,
    /// Pages that could not be read back whole.
    PagesLost = 15,
    /// Time that answers waited for pages from disk, ns.
    PageWaitNs = 16,
    /// Pages on disk alone, now.
    PagesSpilled = 17,
}

/// In the order of [`kvoyant_counter`].
const COUNTERS: [Stat; 18] = [
    Stat::Speculations,
    Stat::RowsSelected,
    Stat::RowsHit,
    Stat::RowsInPlace,
    Stat::BytesMoved,
    Stat::SelectNs,
    Stat::TransferNs,
    Stat::RowsAppended,
    Stat::CpuRows,
    Stat::PrefetchedRows,
    Stat::PrefetchBytes,
    Stat::EstimatedRows,
    Stat::LateRows,
    Stat::PagesWritten,
    Stat::PagesRead,
    Stat::PagesLost,
    Stat::PageWaitNs,
    Stat::PagesSpilled,
];

/// Ends the session. Its sequences are closed, its requests given up and its answers released: their handles are stale, and what they
/// pointed to is gone. What a call that is under way in another thread opens stays open: let there be none.
#[unsafe(no_mangle)]
pub extern "C" fn kvoyant_model_close(model: kvoyant_model) -> kvoyant_status {
    call(|| {
        let session = handles::take::<Session>(model.id)?;
        let objects = handles::take_all_of(model.id);
        let sequences: Vec<Sequence> = objects
            .iter()
            .filter_map(|object| match object {
                Object::Sequence(kept) => kept.take_if_idle(),
                _ => None,
            })
            .collect();
        Ok(session.model.close(sequences)?)
    })
}

/// Version of this library, such as `0.1.0`. Never null.
#[unsafe(no_mangle)]
pub extern "C" fn kvoyant_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The `KVOYANT_ABI` that this library was built with.
#[unsafe(no_mangle)]
pub extern "C" fn kvoyant_abi() -> u32 {
    KVOYANT_ABI
}
