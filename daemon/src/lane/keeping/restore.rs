//! The model of a session whose daemon has ended, from what that left. Nothing of it is believed before it is checked.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvoyant_protocol::control::{Failure, PageWord};
use kvoyant_protocol::memory::MemoryError;
use kvoyant_protocol::wire::SequenceId;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::records::{About, Held, HeldExtent, LayerRecord, Progress, SequenceRecord, SetRecord, SlotRecord};
use crate::journal::{Found, FrameLog, TakenFrames};
use crate::lane::digests::{DigestPool, DigestSet};
use crate::lane::model::{HEAP_FILE_BYTES, Limbo, ModelState, RECORD_BYTES};
use crate::lane::place::moved_part;
use crate::lane::sequences::{LayerSlots, Sequence, SequenceSlot, TOKENS_MAX};
use crate::lane::spill::SLOT_ENTRY;
use crate::tiers::arena::{LeftExtent, SessionArena};
use crate::tiers::blocks::Blocks;
use crate::tiers::heap::{Heap, Region, RestoreError};
use crate::tiers::pool::Supply;
use crate::tiers::residency::SlotSet;
use crate::tiers::shared::SharedExtent;

/// Why a session cannot go on.
#[derive(Debug, Error)]
pub enum Unfit {
    /// A record that does not parse.
    #[error("its journal's record of {0} is malformed")]
    Malformed(&'static str),
    /// Something that cannot be.
    #[error("what its journal says of {0} cannot be")]
    Impossible(&'static str),
    /// Tables or digests.
    #[error("its tables or digests cannot be had again: {0}")]
    Heap(#[from] RestoreError),
    /// Rows cannot be copied to its slab.
    #[error("its slab cannot be filled: {0}")]
    Memory(#[from] MemoryError),
    /// It could not be served even if it were new.
    #[error("{0}")]
    Refused(#[from] Failure),
}

/// What of a session lies on disk.
const ON_DISK: &str = "its pages on disk";

/// What a daemon has left of a session.
#[derive(Debug)]
pub struct Left {
    /// What it is.
    pub about: About,
    /// How far it has come.
    pub progress: Progress,
    /// Its memory.
    pub held: Held,
    /// The answer to the last control message that was done.
    pub answer: Vec<u8>,
    sequences: BTreeMap<u32, SlotRecord>,
    heaps: [Vec<Vec<u8>>; 2],
}

fn decoded<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, Unfit> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        _ => Err(Unfit::Malformed(what)),
    }
}

fn ensure(so: bool, what: &'static str) -> Result<(), Unfit> {
    if so { Ok(()) } else { Err(Unfit::Impossible(what)) }
}

impl Left {
    /// Reads a journal's records.
    ///
    /// # Errors
    /// A record that does not parse, or is another session's.
    pub fn of(found: Found) -> Result<Self, Unfit> {
        let about: About = decoded("the session", &found.record)?;
        ensure(about.session == found.session, "the session")?;
        let sequences =
            found.sequences.iter().map(|(slot, bytes)| Ok((*slot, decoded("a sequence", bytes)?)));
        Ok(Self {
            about,
            progress: decoded("its progress", &found.state)?,
            held: decoded("its memory", &found.memory)?,
            answer: found.answer,
            sequences: sequences.collect::<Result<_, Unfit>>()?,
            heaps: found.heaps,
        })
    }

    fn heap(
        &self,
        (which, name): (usize, &'static str),
        supply: &Supply,
        lens: &[u64],
        regions: Vec<Region>,
    ) -> Result<Heap, Unfit> {
        let contents = &self.heaps[which];
        ensure(contents.len() <= lens.len(), "its files")?;
        let empty = Vec::new();
        let files: Vec<(usize, &[u8])> = lens
            .iter()
            .enumerate()
            .map(|(file, len)| {
                let bytes = contents.get(file).unwrap_or(&empty);
                let len = usize::try_from(*len).ok().filter(|len| bytes.len() <= *len && *len > 0);
                Ok((len.ok_or(Unfit::Impossible("its files"))?, bytes.as_slice()))
            })
            .collect::<Result<_, Unfit>>()?;
        Ok(Heap::restore(name, supply.purse().clone(), HEAP_FILE_BYTES, &files, regions)?)
    }

    fn open(&self) -> impl Iterator<Item = (u32, &SlotRecord, &SequenceRecord)> {
        self.sequences.iter().filter_map(|(slot, record)| Some((*slot, record, record.open.as_ref()?)))
    }

    /// Fills a model that has just been made with what was left; `extents` are the session's own of [`Held::extents`], in their order, `shared`
    /// those of prefixes, and `log` says which frames were taken since the journal was sealed.
    ///
    /// # Errors
    /// Whatever does not fit together.
    pub fn fill(
        &self,
        model: &mut ModelState,
        extents: Supply,
        shared: Vec<Arc<SharedExtent>>,
        (log, taken): (FrameLog, TakenFrames),
    ) -> Result<(), Unfit> {
        let max = model.sequences.len();
        for (slot, _, sequence) in self.open() {
            ensure((slot as usize) < max, "a sequence's slot")?;
            model.check_sequence(sequence)?;
        }
        ensure(self.sequences.keys().all(|slot| (*slot as usize) < max), "a sequence's slot")?;
        ensure(self.held.directory.len == max * RECORD_BYTES, "the directory")?;
        // What the model began with makes room first.
        model.tables = Heap::new("kvoyant-tables", extents.purse().clone(), HEAP_FILE_BYTES);
        model.meta = Heap::new("kvoyant-meta", extents.purse().clone(), HEAP_FILE_BYTES);
        let remains = self.progress.taken.iter().filter_map(|taken| taken.table);
        let tables = self.open().map(|(_, _, sequence)| sequence.table).chain(remains).collect();
        model.tables = self.heap((0, "kvoyant-tables"), &extents, &self.held.tables, tables)?;
        let pools = self.held.pools.iter().flat_map(|pool| &pool.regions).copied();
        let own = self.open().flat_map(|(_, _, sequence)| sequence.regions());
        let meta = std::iter::once(self.held.directory).chain(pools).chain(own).collect();
        model.meta = self.heap((1, "kvoyant-meta"), &extents, &self.held.meta, meta)?;
        model.directory = self.held.directory;
        let its =
            |(_, _, sequence): (u32, &SlotRecord, &SequenceRecord)| Some((sequence.table, sequence.slots?));
        let tables: Vec<_> = self.open().filter_map(its).collect();
        ensure(model.spill.is_none() || model.claim_pages(&tables, &self.held.chunks, &taken), ON_DISK)?;
        let (arena, wary) = self.arena(model, extents, shared, &taken)?;
        model.arena = arena;
        model.pools = self.pools(model)?;
        for (slot, record) in &self.sequences {
            let open = record.open.as_ref().map(|sequence| model.revive(sequence)).transpose()?;
            model.sequences[*slot as usize] = SequenceSlot { generation: record.generation, sequence: open };
            let id = SequenceId { slot: *slot, generation: record.generation };
            (0..model.shape.layers).for_each(|layer| model.falls_behind(id, layer));
        }
        let mut open: Vec<u32> = self.open().map(|(slot, _, _)| slot).collect();
        model.open.clone_from(&self.progress.open);
        let mut sorted = model.open.clone();
        open.sort_unstable();
        sorted.sort_unstable();
        ensure(open == sorted, "which sequences are open")?;
        model.pages_go_on(log, taken.ticket, wary);
        model.pages_released(self.progress.released_through);
        self.slab(model)?;
        model.seeds = self.progress.seeds;
        for (id, layer) in &self.progress.planned {
            ensure((*layer as usize) < model.shape.layers, "a layer")?;
            model.planned.push_back((*id, *layer as usize));
        }
        self.progress.taken.iter().for_each(|taken| model.takes_again(taken));
        for sequence in &self.progress.unsettled {
            // Its client has not heard of it, and asks for another one.
            model.close(*sequence).map_err(|_| Unfit::Impossible("which sequences are open"))?;
        }
        for extent in
            (0..model.arena.extents()).filter(|extent| model.arena.is_there(*extent)).collect::<Vec<_>>()
        {
            model.memory.keep(Arc::clone(model.arena.memory(extent)) as _);
        }
        Ok(())
    }

    /// Fills the slab with the rows that it had.
    fn slab(&self, model: &mut ModelState) -> Result<(), Unfit> {
        let what = "its slab";
        let Some(record) = &self.held.slab else {
            return ensure(model.slab.is_none() && self.progress.limbo.is_empty(), what);
        };
        let slab = model.slab.as_mut().ok_or(Unfit::Impossible(what))?;
        ensure(slab.pages.total() == record.pages as usize, what)?;
        for (ticket, count) in &self.progress.limbo {
            let pages: Vec<u32> = (0..*count).map_while(|_| slab.pages.take()).collect();
            ensure(pages.len() == *count as usize, what)?;
            slab.limbo.push(Limbo { ticket: *ticket, background: None, pages });
        }
        (model.keep, model.device_share) = (record.keep, record.device_share);
        ensure(record.keep.is_finite() && record.device_share.is_finite(), what)?;
        for (slot, _, sequence) in self.open() {
            for layer in sequence.layers.iter().filter(|layer| !layer.heads.is_empty()) {
                model.fill_layer(slot as usize, layer)?;
            }
        }
        Ok(())
    }

    /// The arena, and those of its frames that nobody may have yet.
    fn arena(
        &self,
        model: &ModelState,
        extents: Supply,
        shared: Vec<Arc<SharedExtent>>,
        taken: &TakenFrames,
    ) -> Result<(SessionArena, Vec<u32>), Unfit> {
        let what = "its extents";
        let (mut own, mut shared) = (0.., shared.into_iter());
        let place = |extent: &Option<HeldExtent>| match extent {
            None => Some(LeftExtent::Gone),
            Some(HeldExtent::Own(_)) => own.next().map(LeftExtent::Own),
            Some(HeldExtent::Shared(_)) => shared.next().map(LeftExtent::Shared),
        };
        let places: Option<Vec<_>> = self.held.extents.iter().map(place).collect();
        let places = places.ok_or(Unfit::Impossible(what))?;
        let heads = model.heads();
        let mut owners = Vec::new();
        for (_, _, sequence) in self.open() {
            let (capacity, pages) = (sequence.capacity as usize, sequence.pages as usize);
            for head in 0..heads {
                for page in 0..capacity {
                    let word = PageWord::of(model.tables.word(sequence.table, head * capacity + page));
                    match word {
                        PageWord::None => {}
                        PageWord::Page(id) if page < pages => owners.push(id),
                        PageWord::Spilled | PageWord::Lost if page < pages && sequence.slots.is_some() => {
                            ensure(model.spill.is_some(), ON_DISK)?;
                        }
                        _ => return Err(Unfit::Impossible("a page table")),
                    }
                }
            }
        }
        let geometry = model.arena.geometry();
        let per_extent = geometry.pages_per_extent();
        for left in &self.progress.taken {
            let Some(table) = left.table else { continue };
            let words = (0..table.len / 4).map(|word| PageWord::of(model.tables.word(table, word)));
            for word in words {
                match word {
                    PageWord::None => {}
                    PageWord::Page(page) => owners.push(page),
                    _ => return Err(Unfit::Impossible("a page table")),
                }
            }
            owners.extend(&left.read);
        }
        let may_be_had =
            |frame: u32| matches!(places.get(frame as usize / per_extent), Some(LeftExtent::Own(_)));
        let all = places.len() * per_extent;
        let wary = match model.spill {
            Some(_) => ModelState::wary_frames(taken, &owners, all, may_be_had),
            None => Vec::new(),
        };
        owners.extend(&wary);
        let arena = SessionArena::restore(extents, geometry, places, owners);
        Ok((arena.ok_or(Unfit::Impossible("its pages"))?, wary))
    }

    fn pools(&self, model: &ModelState) -> Result<Vec<DigestPool>, Unfit> {
        let mut pools = Vec::with_capacity(self.held.pools.len());
        for record in &self.held.pools {
            let method = model.methods.get(record.method as usize).ok_or(Unfit::Impossible("a method"))?;
            let key = method.digest_key().ok_or(Unfit::Impossible("its digests"))?;
            let mut owners = Vec::new();
            for set in self.open().flat_map(|(_, _, sequence)| &sequence.digests) {
                if model.methods[set.method as usize].digest_key() == Some(key) {
                    let words = (0..set.table.len / 4).map(|word| model.meta.word(set.table, word));
                    owners.extend(words.filter(|block| *block != DigestSet::NO_BLOCK));
                }
            }
            let blocks = Blocks::restore(method.digest_bytes(), record.regions.clone(), owners);
            pools.push(DigestPool { key, blocks: blocks.ok_or(Unfit::Impossible("its digests"))? });
        }
        for set in self.open().flat_map(|(_, _, sequence)| &sequence.digests) {
            let key = model.methods[set.method as usize].digest_key();
            let bare =
                (0..set.table.len / 4).all(|word| model.meta.word(set.table, word) == DigestSet::NO_BLOCK);
            ensure(bare || pools.iter().any(|pool| Some(pool.key) == key), "its digests")?;
        }
        Ok(pools)
    }
}

impl ModelState {
    /// Whether a sequence's sizes are those that it would have here.
    fn check_sequence(&self, record: &SequenceRecord) -> Result<(), Unfit> {
        let shape = &self.shape;
        let (layers, heads) = (shape.layers, shape.layers * shape.kv_heads);
        let (capacity, rows) = (record.capacity as usize, shape.page_rows);
        let is = |region: Option<Region>, len: usize| region.is_none_or(|region| region.len == len);
        let tokens = capacity.checked_mul(rows).ok_or(Unfit::Impossible("a sequence's size"))?;
        ensure((record.method as usize) < self.methods.len(), "a method")?;
        // Tables grow to powers of two.
        ensure(tokens <= 2 * TOKENS_MAX as usize, "a sequence's size")?;
        ensure(heads.checked_mul(capacity * 4) == Some(record.table.len), "a page table's size")?;
        ensure(record.pages as usize <= capacity, "a sequence's pages")?;
        ensure(record.room as usize <= tokens, "a sequence's room")?;
        ensure(record.lens.len() == layers && record.observed.len() == layers, "a sequence's layers")?;
        ensure(
            record.lens.iter().all(|len| *len as usize <= record.pages as usize * rows),
            "a sequence's rows",
        )?;
        // Where there was no disk, there may be one now, or the other way round.
        ensure(is(record.slots, heads * capacity * SLOT_ENTRY), ON_DISK)?;
        ensure(is(record.observation, heads * shape.head_dim * 4), "statistics of a prompt")?;
        ensure(is(record.marks, tokens), "marks")?;
        record.digests.iter().try_for_each(|set| self.check_set(set, record))?;
        let layer_fits = |layer: &super::records::LayerRecord| {
            (layer.layer as usize) < layers
                && (layer.named.is_empty() || layer.named.len() == shape.kv_heads)
                && (layer.heads.is_empty() || layer.heads.len() == shape.kv_heads && self.slab.is_some())
        };
        ensure(record.layers.iter().all(layer_fits), "a layer")
    }

    fn check_set(&self, set: &SetRecord, record: &SequenceRecord) -> Result<(), Unfit> {
        let what = "its digests";
        let (layers, heads) = (self.shape.layers, self.shape.layers * self.shape.kv_heads);
        let capacity = record.capacity as usize;
        let method = self.methods.get(set.method as usize).ok_or(Unfit::Impossible("a method"))?;
        let needs = method.needs();
        ensure(method.digest_key().is_some(), what)?;
        ensure(set.table.len == heads * capacity * 4, what)?;
        ensure(set.state.len == heads * method.head_state_bytes(), what)?;
        let kept = method.sequence_bytes() + heads * method.note_bytes();
        let of = |there: bool, len: usize| there.then_some(len);
        let memory = heads * method.memory_bytes(capacity * self.shape.page_rows);
        ensure(set.memory.map(|region| region.len) == of(needs.memory, memory), what)?;
        ensure(set.dead.map(|region| region.len) == of(needs.drops_rows, heads * capacity * 4), what)?;
        ensure(set.sequence.map(|region| region.len) == of(kept > 0, kept), what)?;
        ensure(set.built.len() == layers && set.ready.len() == layers, what)?;
        ensure(set.built.iter().zip(&record.lens).all(|(built, len)| built <= len), what)
    }

    /// Gives a layer's heads the rows in the slab that they had.
    fn fill_layer(&mut self, slot: usize, record: &LayerRecord) -> Result<(), Unfit> {
        let what = "its slab";
        let (layer, geometry) = (record.layer as usize, self.arena.geometry());
        let Some(sequence) = self.sequences[slot].sequence.as_mut() else { return Ok(()) };
        let Some(slab) = &mut self.slab else { return Err(Unfit::Impossible(what)) };
        let part = moved_part(self.methods[sequence.method].needs().part, geometry.row_bytes);
        let mut bytes = vec![0; part.len()];
        let (mut rows, mut on_disk, mut lost) = (Vec::new(), None, false);
        ensure(sequence.residency[layer].heads.is_empty(), what)?;
        for (kv_head, residents) in record.heads.iter().enumerate() {
            let set = SlotSet::restore(residents, sequence.lens[layer], &mut slab.pages);
            let set = set.ok_or(Unfit::Impossible(what))?;
            let base = (layer * self.shape.kv_heads + kv_head) * sequence.capacity;
            for entry in set.entries() {
                let page = entry.token as usize / geometry.page_rows;
                // Rows whose page a pool has given up are named by no answer.
                let word = PageWord::of(self.tables.word(sequence.table, base + page));
                let row = entry.token as usize % geometry.page_rows;
                match (word, sequence.slots) {
                    (PageWord::Page(page), _) => {
                        let (extent, offset) = geometry.locate(page * geometry.page_rows as u32 + row as u32);
                        self.arena.memory(extent).read(offset + part.start, &mut bytes)?;
                    }
                    (PageWord::Spilled, Some(slots)) => {
                        if on_disk.replace(base + page) != Some(base + page) {
                            let spill = self.spill.as_ref().ok_or(Unfit::Impossible(what))?;
                            if let Err(error) = spill.read_now(&self.meta, (slots, base + page), &mut rows) {
                                tracing::warn!("rows of layer {layer} are not in the slab any more: {error}");
                                lost = true;
                                break;
                            }
                        }
                        let at = row * geometry.row_bytes;
                        bytes.copy_from_slice(&rows[at..at + geometry.row_bytes][part.clone()]);
                    }
                    // In the slab it still was what it had been. Here it is nothing.
                    (PageWord::Lost, _) => {
                        lost = true;
                        break;
                    }
                    _ => continue,
                }
                slab.slab.0.write(entry.slot as usize * geometry.row_bytes + part.start, &bytes)?;
            }
            sequence.residency[layer].heads.push(set);
        }
        if lost {
            // The layer begins without any, as it does when a page is found to be lost.
            let heads = std::mem::take(&mut sequence.residency[layer].heads);
            for mut head in heads {
                slab.pages.give_back(head.clear());
            }
        }
        Ok(())
    }

    /// A sequence that was checked.
    fn revive(&mut self, record: &SequenceRecord) -> Result<Sequence, Unfit> {
        let charge = self.charge_sequence()?;
        let slots = self.slot_table_for(record.slots, record.capacity as usize)?;
        let mut residency = Vec::new();
        residency.resize_with(self.shape.layers, LayerSlots::default);
        for layer in &record.layers {
            let slots = &mut residency[layer.layer as usize];
            slots.named = layer.selection().ok_or(Unfit::Impossible("an answer"))?;
            slots.prefetch = layer.prefetch.map(|(ticket, tokens)| (ticket, tokens as usize));
            slots.last_ticket = layer.last_ticket;
        }
        let set = |set: &SetRecord| {
            let key = self.methods[set.method as usize].digest_key();
            Some(DigestSet {
                key: key?,
                method: set.method as usize,
                table: set.table,
                state: set.state,
                memory: set.memory,
                sequence: set.sequence,
                dead: set.dead,
                built: set.built.clone(),
                ready: set.ready.clone(),
            })
        };
        Ok(Sequence {
            method: record.method as usize,
            by: record.by,
            seed: record.seed,
            table: record.table,
            capacity: record.capacity as usize,
            slots,
            stays: false,
            pages: record.pages as usize,
            room: record.room as usize,
            lens: record.lens.clone(),
            observation: record.observation,
            observed: record.observed.clone(),
            marks: record.marks,
            digests: record.digests.iter().filter_map(set).collect(),
            prefix: None,
            residency,
            graph: None,
            _charge: charge,
        })
    }
}
