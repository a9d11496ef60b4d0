//! A session's registered model and all memory that belongs to it.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvoyant_kernels::quantise::Format;
use kvoyant_kernels::{Dtype, RowLayout};
use kvoyant_methods::{
    Artifacts, Fingerprint, Method, MethodSpec, Rest, RowPart, Scratch, Selection, Shape, TokenRange,
};
use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::control::{Failure, MemoryKind, Mode, ModelSpec, ToClient};
use kvoyant_protocol::graph::GraphLayout;
use kvoyant_protocol::memory::MemoryError;
use kvoyant_protocol::wire::SequenceId;

use crate::device::rows::RowScratch;
use crate::device::{Device, SessionMemory, Slab, SlabRequest};
use crate::journal::FrameLog;
use crate::lane::ages::Ages;
use crate::lane::background::Flying;
use crate::lane::digests::{Behind, DigestPool};
use crate::lane::graph::GraphState;
use crate::lane::images::{Lease, Taken};
use crate::lane::keeping::Touched;
use crate::lane::kept::Keepers;
use crate::lane::sequences::SequenceSlot;
use crate::lane::spill::{SpillState, SpillTo};
use crate::tiers::arena::{PageGeometry, SessionArena};
use crate::tiers::heap::{Heap, Region};
use crate::tiers::pool::Supply;
use crate::tiers::residency::{PlaceScratch, Placed, SlabPages};

/// Rows of a page unless the session asks for something else: at head dimension 128 in f16, a page is 16 KiB.
pub const PAGE_ROWS: u32 = 32;

/// Pages must be whole 4 KiB blocks, so that one page is one direct read.
const BLOCK: usize = 4096;

/// Bytes of a file of page tables or digests.
pub(crate) const HEAP_FILE_BYTES: usize = 8 << 20;

/// Shorter rows cost more in bookkeeping than they hold.
const ROW_BYTES_MIN: usize = 16;

/// Most methods that a session may register.
pub(crate) const METHODS_MAX: usize = 64;

/// Most bytes of a model's texts.
const TEXT_MAX: usize = 1024;

/// Most KV heads of a model, all layers together.
const HEADS_MAX: usize = 1 << 14;

/// Bytes of a sequence's record in the directory.
pub(crate) const RECORD_BYTES: usize = 64;

/// New memory of a session that its client has not got yet.
#[derive(Debug)]
pub struct Announcement {
    /// The message that goes with the descriptors.
    pub message: ToClient,
    /// One per extent or table file.
    pub fds: Vec<OwnedFd>,
}

/// Pages that nobody owns any more, and that somebody may still read or write.
#[derive(Debug)]
pub struct Limbo {
    /// Answers up to this ticket may name them.
    pub ticket: u64,
    /// A background transfer that brings rows there.
    pub background: Option<u64>,
    /// The pages.
    pub pages: Vec<u32>,
}

/// A slab and who owns its pages.
#[derive(Debug)]
pub struct SlabState {
    /// Memory of the slab.
    pub slab: Slab,
    /// Free pages.
    pub pages: SlabPages,
    /// Pages that will be free.
    pub limbo: Vec<Limbo>,
}

/// Buffers that are kept from one request to the next, so that the hot path allocates nothing once they have grown.
#[derive(Debug, Default)]
pub struct Buffers {
    pub(crate) selection: Selection,
    pub(crate) scratch: Scratch,
    pub(crate) hint: Vec<f32>,
    pub(crate) floors: Vec<f32>,
    pub(crate) rest: Rest,
    pub(crate) named: Selection,
    pub(crate) resident: Selection,
    pub(crate) room: Option<usize>,
    pub(crate) ids: Vec<u32>,
    pub(crate) digest: Vec<u8>,
    pub(crate) marks: Vec<u8>,
    pub(crate) rows: Vec<u8>,
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
    pub(crate) state: Vec<u8>,
    pub(crate) placed: Vec<Placed>,
    pub(crate) place: PlaceScratch,
    pub(crate) pages: RowScratch,
    pub(crate) partial: Vec<f32>,
    pub(crate) missing: Vec<TokenRange>,
}

/// How much is kept where, and how often answers are compared.
#[derive(Debug, Clone)]
pub struct Placement {
    /// How many times as many rows as are selected a head keeps on the device.
    pub keep: f64,
    /// The part of a sequence's rows that a head may keep there besides, within `[0, 1]`.
    pub device_share: f64,
    /// Where pages go that leave host memory; `None`: they stay.
    pub spill: Option<SpillTo>,
    /// One answer in so many is compared with exact attention; 0: none.
    pub check_every: u64,
}

/// See the module.
#[derive(Debug)]
pub struct ModelState {
    /// What the client registered.
    pub spec: ModelSpec,
    /// Shape as methods see it.
    pub shape: Shape,
    /// What a row is made of.
    pub layout: RowLayout,
    /// Methods by index.
    pub methods: Vec<Box<dyn Method>>,
    /// Pages of rows.
    pub arena: SessionArena,
    /// Page tables: the client reads them.
    pub tables: Heap,
    /// Digests, method state, counters, the sequence directory: nobody else sees them.
    pub meta: Heap,
    /// `sequences_max` records of 64 bytes: what is open, and where its tables lie.
    pub directory: Region,
    /// Digest blocks, one pool for each kind of digest.
    pub pools: Vec<DigestPool>,
    /// Under which names they are shown.
    pub(crate) keepers: Keepers,
    /// Places for sequences.
    pub sequences: Vec<SequenceSlot>,
    /// Which of them are taken.
    pub open: Vec<u32>,
    /// Which of them have changed since they were last kept.
    pub(crate) touched: Touched,
    /// Sequences and layers with rows that are not digested yet, in the order in which they came.
    pub(crate) behind: Behind,
    /// The device's slab; `None` in place.
    pub slab: Option<SlabState>,
    /// Layers with slots of the slab by age; `None` until there are too few.
    pub(crate) ages: Option<Ages>,
    /// Graph mode, if the session wants it.
    pub graph: Option<GraphState>,
    /// Where pages may go that leave host memory.
    pub(crate) spill: Option<SpillState>,
    /// Others of it are with whoever reads or fills pages beside the lane.
    pub(crate) lease: Lease,
    /// What stands beside the journal of a session that outlasts its daemon.
    pub(crate) frame_log: Option<FrameLog>,
    /// What transfers hold on to.
    pub memory: Arc<SessionMemory>,
    /// How many times as many rows as are selected a head keeps on the device.
    pub keep: f64,
    /// The part of a sequence's rows that a head may keep there, selected ones aside.
    pub device_share: f64,
    /// Whether answers may have partial attentions of the CPU.
    pub attends: bool,
    /// Whether answers may estimate the rows that they leave out.
    pub estimating: bool,
    /// Layers of sequences that wait to be prepared for their next step, once their answer is not read any more.
    pub(crate) planned: VecDeque<(SequenceId, usize)>,
    /// Whether some of them are of sequences that have just been closed.
    pub(crate) forgets_plans: bool,
    /// Background transfers under way.
    pub(crate) flying: Vec<Flying>,
    /// See [`Buffers`].
    pub buffers: Buffers,
    /// Which layers rows are selected in.
    speculated: Vec<bool>,
    /// Sequences that an operator has suspended, or is about to.
    pub(crate) taken: Vec<Taken>,
    pub(crate) seeds: u64,
    /// One answer in so many is compared with exact attention; 0: none.
    pub(crate) check_every: u64,
    announced_extents: usize,
    announced_tables: usize,
}

impl ModelState {
    /// Checks a specification, builds its methods and makes its memory.
    pub fn new(
        spec: ModelSpec,
        artifacts: &Artifacts,
        sequences_max: u32,
        extents: Supply,
        device: &dyn Device,
        slab: SlabRequest,
        Placement { keep, device_share, spill, check_every }: Placement,
    ) -> Result<Self, Failure> {
        let (shape, layout) = shape_of(&spec)?;
        let row_bytes = row_bytes_of(layout)?;
        let geometry = PageGeometry { page_rows: shape.page_rows, row_bytes };
        if !(1..=METHODS_MAX).contains(&spec.methods.len()) {
            let count = spec.methods.len();
            return Err(Failure::BadMethod(format!(
                "{count} methods were registered; a model needs at least one method and at most {METHODS_MAX}"
            )));
        }
        let mut speculated: Vec<bool> = (0..shape.layers).map(|layer| layer >= shape.dense_layers).collect();
        for layer in &spec.sliding_layers {
            match speculated.get_mut(*layer as usize) {
                Some(speculated) => *speculated = false,
                None => {
                    return Err(Failure::BadModel(format!(
                        "sliding layer {layer} is not one of {}",
                        shape.layers
                    )));
                }
            }
        }
        let methods = spec
            .methods
            .iter()
            .map(|text| {
                let method: MethodSpec = text.parse().map_err(|error| format!("{error}"))?;
                kvoyant_methods::build(&method, &shape, artifacts).map_err(|error| format!("{error}"))
            })
            .collect::<Result<Vec<_>, String>>()
            .map_err(Failure::BadMethod)?;
        check_served(&methods, layout, device)?;
        let graph = match spec.graph {
            None => None,
            Some(_) if !device.has_records() => {
                let device = device.name();
                return Err(Failure::Device(format!(
                    "graph mode needs a GPU, and this daemon's device is {device}"
                )));
            }
            Some(graph) => Some(
                GraphLayout::new(graph, spec.layers, spec.kv_heads)
                    .map_err(|error| Failure::BadModel(error.to_string()))?,
            ),
        };
        let records = graph.map_or(0, |layout| layout.records_bytes());
        let memory = Arc::new(SessionMemory::of(extents.purse().account().uid()));
        let slab = match device.mode() {
            Mode::InPlace => None,
            Mode::Slab | Mode::Device => {
                // Slots have 32 bits.
                let addressable = u32::MAX as usize / shape.page_rows;
                let pages = (slab.bytes / geometry.page_bytes()).clamp(1, addressable);
                let slab =
                    device.slab(SlabRequest { bytes: pages * geometry.page_bytes(), records, ..slab })?;
                memory.keep(Arc::clone(&slab.0) as _);
                Some(SlabState { slab, pages: SlabPages::new(pages, shape.page_rows), limbo: Vec::new() })
            }
        };
        let estimating = methods.iter().any(|method| method.needs().rest);
        let attends = slab.is_some() && methods.iter().any(|method| method.needs().cpu_attention.is_some());
        let purse = extents.purse().clone();
        let graph = graph.map(GraphState::new).transpose()?;
        let account = Arc::clone(purse.account());
        let file = HEAP_FILE_BYTES as u64;
        if purse.free_table_bytes() < file {
            return Err(purse.refuse_tables(file).map_or(
                Failure::TablesFull { wanted_bytes: file, free_bytes: purse.free_table_bytes() },
                Failure::Quota,
            ));
        }
        let mut meta = Heap::new("kvoyant-meta", purse.clone(), HEAP_FILE_BYTES);
        let directory = meta.allocate(sequences_max as usize * RECORD_BYTES)?;
        let mut sequences = Vec::new();
        sequences.resize_with(sequences_max as usize, SequenceSlot::default);
        Ok(Self {
            spec,
            shape,
            layout,
            keepers: Keepers::of(&methods),
            methods,
            arena: SessionArena::new(extents, geometry),
            tables: Heap::new("kvoyant-tables", purse, HEAP_FILE_BYTES),
            meta,
            directory,
            pools: Vec::new(),
            sequences,
            open: Vec::new(),
            touched: Touched::default(),
            behind: Behind::default(),
            slab,
            ages: None,
            graph,
            spill: spill.map(|to| SpillState::new(to, geometry.page_bytes(), &account)),
            lease: Lease::default(),
            frame_log: None,
            memory,
            keep,
            device_share,
            attends,
            estimating,
            planned: VecDeque::new(),
            forgets_plans: false,
            flying: Vec::new(),
            buffers: Buffers::default(),
            speculated,
            taken: Vec::new(),
            seeds: 0,
            check_every,
            announced_extents: 0,
            announced_tables: 0,
        })
    }

    /// Whether rows of this layer are selected. Dense and sliding-window layers are kept, and read by the client
    /// itself.
    #[must_use]
    pub fn speculates(&self, layer: usize) -> bool {
        self.speculated.get(layer).is_some_and(|speculated| *speculated)
    }

    /// Rows of an extent.
    #[must_use]
    pub fn rows_per_extent(&self) -> u32 {
        let geometry = self.arena.geometry();
        (geometry.pages_per_extent() * geometry.page_rows) as u32
    }

    /// Extents that the client has got.
    pub(crate) fn announced_extents(&self) -> usize {
        self.announced_extents
    }

    /// The client has so many extents, and no tables. False if it cannot have so many.
    pub fn has_announced(&mut self, extents: usize) -> bool {
        (self.announced_extents, self.announced_tables) = (extents, 0);
        extents <= self.arena.extents()
    }

    /// Memory that the client has not got yet, in messages of as many descriptors as fit.
    pub fn announce(&mut self) -> Result<Vec<Announcement>, MemoryError> {
        const AT_ONCE: usize = kvoyant_protocol::packet::FDS_MAX;
        let mut list = Vec::new();
        while self.announced_extents < self.arena.extents() {
            let first = self.announced_extents;
            let end = self.arena.extents().min(first + AT_ONCE);
            let own = self.arena.is_own(first);
            let end = (first..end).find(|extent| self.arena.is_own(*extent) != own).unwrap_or(end);
            let kind = if own { MemoryKind::Extents } else { MemoryKind::Shared };
            let fds = (first..end).map(|extent| self.arena.extent_fd(extent)).collect::<Result<_, _>>()?;
            let message = ToClient::Memory { kind, first: first as u32, bytes: EXTENT_BYTES as u64 };
            list.push(Announcement { message, fds });
            (first..end).for_each(|extent| self.memory.keep(Arc::clone(self.arena.memory(extent)) as _));
            self.announced_extents = end;
        }
        while self.announced_tables < self.tables.files() {
            // Files may differ in length, so each goes alone.
            let first = self.announced_tables;
            let bytes = self.tables.file_len(first) as u64;
            let message = ToClient::Memory { kind: MemoryKind::Tables, first: first as u32, bytes };
            list.push(Announcement { message, fds: vec![self.tables.file_fd(first)?] });
            self.announced_tables = first + 1;
        }
        Ok(list)
    }
}

/// Bytes of a row, if there are such rows.
fn row_bytes_of(layout: RowLayout) -> Result<usize, Failure> {
    layout.row_bytes().ok_or_else(|| {
        Failure::BadModel(format!(
            "there are no rows {layout}: a latent's value is a part of it, and quantised parts need a length that fits \
             their format"
        ))
    })
}

/// Whether the device can serve these methods and rows.
fn check_served(methods: &[Box<dyn Method>], layout: RowLayout, device: &dyn Device) -> Result<(), Failure> {
    let on_gpu = device.mode() == Mode::Device;
    let plain = matches!(layout, RowLayout::KeyValue { format: Format::Plain(_), .. });
    if on_gpu && !plain {
        let name = device.name();
        return Err(Failure::Device(format!(
            "{name} attends over rows of K and V in f32, f16 or bf16, and these are {layout}; register such rows, or \
             serve this model by a daemon with --device host"
        )));
    }
    for method in methods {
        let (needs, spec) = (method.needs(), method.spec());
        if needs.cpu_attention.is_some() && on_gpu {
            let name = device.name();
            return Err(Failure::Device(format!(
                "{spec} attends rows on the CPU, and answers of {name} do not carry that yet; choose another method, or \
                 serve this model by a daemon with --device host"
            )));
        }
        let latent = matches!(layout, RowLayout::Latent { .. });
        if latent && (needs.cpu_attention.is_some() || needs.part == RowPart::Values) {
            return Err(Failure::BadMethod(format!(
                "{spec} needs rows of a key and a value of their own, and these are {layout}"
            )));
        }
        if needs.cpu_attention.is_some() && !needs.hint.is_query() {
            return Err(Failure::BadMethod(format!("{spec} attends on the CPU without a query")));
        }
    }
    Ok(())
}

/// The shape that a specification describes, if it is one that can be served.
pub fn shape_of(spec: &ModelSpec) -> Result<(Shape, RowLayout), Failure> {
    let bad = |reason: String| Failure::BadModel(reason);
    let format = Format::from_code(spec.dtype)
        .ok_or_else(|| bad(format!("storage format {} is not known", spec.dtype)))?;
    let within = |name: &str, value: u32, min: u32, max: u32| {
        if (min..=max).contains(&value) {
            Ok(value as usize)
        } else {
            Err(bad(format!("{name} = {value} is outside {min}..={max}")))
        }
    };
    let head_dim = within("head_dim", spec.head_dim, 1, 1024)?;
    let layout = match spec.latent_values {
        0 => RowLayout::KeyValue { d: head_dim, format },
        _ if spec.kv_heads != 1 => {
            return Err(bad(format!(
                "latent rows serve all query heads, so there is 1 KV head, not {}",
                spec.kv_heads
            )));
        }
        values => RowLayout::Latent { dim: head_dim, value: values as usize, format },
    };
    let row_bytes = row_bytes_of(layout)?;
    if row_bytes < ROW_BYTES_MIN {
        return Err(bad(format!("rows of {row_bytes} bytes are shorter than {ROW_BYTES_MIN}")));
    }
    let page_rows = match spec.page_rows {
        // The smallest multiple of the default whose pages are whole blocks.
        0 => (1..=BLOCK as u32)
            .map(|factor| (factor * PAGE_ROWS) as usize)
            .find(|rows| (rows * row_bytes).is_multiple_of(BLOCK))
            .unwrap_or(PAGE_ROWS as usize),
        rows => within("page_rows", rows, 1, 4096)?,
    };
    if !(page_rows * row_bytes).is_multiple_of(BLOCK) {
        return Err(bad(format!(
            "pages of {page_rows} rows of {row_bytes} bytes are no multiple of {BLOCK} bytes"
        )));
    }
    let fingerprint: Fingerprint = spec.fingerprint.parse().map_err(|error| bad(format!("{error}")))?;
    let shape = Shape {
        layers: within("layers", spec.layers, 1, 1024)?,
        query_heads: within("query_heads", spec.query_heads, 1, 1024)?,
        kv_heads: within("kv_heads", spec.kv_heads, 1, 1024)?,
        head_dim,
        value_dim: layout.value_values(),
        page_rows,
        sinks: within("sinks", spec.sinks, 0, 1 << 20)?,
        window: within("window", spec.window, 1, 1 << 20)?,
        dense_layers: within("dense_layers", spec.dense_layers, 0, 1024)?,
        // Keys that methods keep are not stored more finely than this.
        dtype: match format {
            Format::Plain(dtype) => dtype,
            _ => Dtype::F16,
        },
        fingerprint,
    };
    for (name, text) in [("adapter", &spec.adapter), ("rope", &spec.rope)] {
        if text.len() > TEXT_MAX {
            return Err(bad(format!("{name} has {} bytes, more than {TEXT_MAX}", text.len())));
        }
    }
    if shape.layers * shape.kv_heads > HEADS_MAX {
        let heads = shape.layers * shape.kv_heads;
        return Err(bad(format!("{heads} KV heads in all layers are more than {HEADS_MAX}")));
    }
    shape.check().map_err(|error| bad(error.to_string()))?;
    Ok((shape, layout))
}
