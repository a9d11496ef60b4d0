//! What a method keeps of a sequence, as bytes that outlive the daemon.

use kvoyant_protocol::control::{Failure, SelectedBy};
use kvoyant_protocol::wire::SequenceId;
use serde::{Deserialize, Serialize};

use super::{ImageOutcome, Portrait};
use crate::lane::digests::{DigestPool, DigestSet};
use crate::lane::model::ModelState;

/// One method's digests of one sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestImage {
    /// The method's specification.
    pub method: String,
    /// Pages that each head's tables could hold.
    pub capacity: u32,
    /// Rows digested, per layer.
    pub built: Vec<u32>,
    /// Whether a layer's digests can be built.
    pub ready: Vec<bool>,
    /// Head states, `[layer][KV head]`.
    pub state: Vec<u8>,
    /// Memories, `[layer][KV head]`.
    pub memory: Option<Vec<u8>>,
    /// What is kept for all layers together, and notes.
    pub sequence: Option<Vec<u8>>,
    /// Rows of each page that a pool has dropped, `[layer][KV head][capacity]`.
    pub dead: Option<Vec<u8>>,
    /// Which pages have a block, by index in the table `[layer][KV head][capacity]`.
    pub pages: Vec<u32>,
    /// Their blocks, in that order.
    pub blocks: Vec<u8>,
}

/// Entries of a table between two looks at the clock.
const ENTRIES: usize = 1 << 8;

/// A portrait whose blocks are being added: there may be gigabytes of them.
#[derive(Debug)]
pub struct Drawing {
    sequence: SequenceId,
    portrait: Box<Portrait>,
    /// Entry of the digests' table that it has come to.
    entry: usize,
}

impl Drawing {
    pub(in crate::lane) fn of(sequence: SequenceId, portrait: Box<Portrait>) -> Self {
        Self { sequence, portrait, entry: 0 }
    }

    pub(in crate::lane) fn done(self) -> ImageOutcome {
        ImageOutcome::Portrait(self.portrait)
    }
}

impl ModelState {
    /// What the sequence's own method keeps.
    fn kept_of(&self, id: SequenceId) -> Option<(&DigestSet, &DigestPool)> {
        let sequence = self.sequence(id).ok()?;
        let key = self.methods[sequence.method].digest_key()?;
        let set = sequence.digests.iter().find(|set| set.serves(key, sequence.method))?;
        Some((set, self.pools.iter().find(|pool| pool.key() == key)?))
    }

    /// What the sequence's own method keeps, without its blocks.
    pub(super) fn digest_images(&self, id: SequenceId) -> Result<Vec<DigestImage>, Failure> {
        let sequence = self.sequence(id)?;
        let Some((set, _)) = self.kept_of(id) else { return Ok(Vec::new()) };
        let bytes = |region| self.meta.get(region).to_vec();
        Ok(vec![DigestImage {
            method: self.methods[sequence.method].spec().to_string(),
            capacity: sequence.capacity as u32,
            built: set.built.clone(),
            ready: set.ready.clone(),
            state: bytes(set.state),
            memory: set.memory.map(bytes),
            sequence: set.sequence.map(bytes),
            dead: set.dead.map(bytes),
            pages: Vec::new(),
            blocks: Vec::new(),
        }])
    }

    /// Adds blocks until all are there, which it says, or `enough` says so.
    pub(crate) fn draw_some(&self, drawing: &mut Drawing, enough: impl Fn() -> bool) -> bool {
        let Some(image) = drawing.portrait.digests.first_mut() else { return true };
        let Some((set, pool)) = self.kept_of(drawing.sequence) else { return true };
        let entries = set.table.len / 4;
        while drawing.entry < entries {
            let block = self.meta.word(set.table, drawing.entry);
            if block != DigestSet::NO_BLOCK {
                image.pages.push(drawing.entry as u32);
                image.blocks.extend_from_slice(pool.blocks.get(&self.meta, block));
            }
            drawing.entry += 1;
            if drawing.entry.is_multiple_of(ENTRIES) && enough() {
                break;
            }
        }
        drawing.entry >= entries
    }

    /// Whether an image has a block for every page that it says is digested, and says so of no rows that there are not.
    fn covers(&self, image: &DigestImage, lens: &[u32]) -> bool {
        let (rows, heads, capacity) = (self.shape.page_rows, self.shape.kv_heads, image.capacity as usize);
        let mut pages = image.pages.iter().copied().peekable();
        image.built.iter().enumerate().all(|(layer, built)| {
            let wanted = (*built as usize).div_ceil(rows);
            let fits = lens.get(layer).is_some_and(|len| built <= len) && wanted <= capacity;
            fits && (layer * heads..(layer + 1) * heads).all(|head| {
                (0..wanted).all(|page| {
                    let index = (head * capacity + page) as u32;
                    while pages.next_if(|known| *known < index).is_some() {}
                    pages.next_if_eq(&index).is_some()
                })
            })
        })
    }

    /// Takes over what a method kept, where it is the same method; false where there is nothing to be taken over, so that it is
    /// made anew from rows.
    pub(super) fn adopt_digests(
        &mut self,
        id: SequenceId,
        lens: &[u32],
        images: &[DigestImage],
    ) -> Result<bool, Failure> {
        let method = self.sequence(id)?.method;
        let spec = self.methods[method].spec().to_string();
        let drops = self.methods[method].needs().drops_rows;
        if self.sequence(id)?.by == SelectedBy::Client && !drops {
            // Its client keeps digests of its own.
            return Ok(false);
        }
        let Some(image) = images.iter().find(|image| image.method == spec) else {
            if drops {
                return Err(Failure::BadMethod(format!(
                    "{spec} has a pool that drops rows, and the image was made by another method: resume with that one"
                )));
            }
            return Ok(false);
        };
        let damaged =
            |what: &str| Failure::NotReady(format!("the image's digests do not fit {spec}: {what}"));
        let (layers, heads) = (self.shape.layers, self.heads());
        let capacity = image.capacity as usize;
        if capacity > crate::lane::sequences::TOKENS_MAX as usize / self.shape.page_rows {
            return Err(damaged("more pages than a sequence may have"));
        }
        self.check_tables(self.tables_of([method], capacity))?;
        self.grow_table(id, capacity)?;
        let Some(key) = self.methods[method].digest_key() else { return Ok(true) };
        let now = self.sequence(id)?.capacity;
        let Some(at) = self.sequence(id)?.digests.iter().position(|set| set.serves(key, method)) else {
            return Err(damaged("there are none"));
        };
        let set = self.sequence(id)?.digests[at].clone();
        let Some(block_bytes) =
            self.pools.iter().find(|pool| pool.key() == key).map(|pool| pool.blocks.block_bytes())
        else {
            return Err(damaged("there are none"));
        };
        let fits = image.built.len() == layers
            && image.ready.len() == layers
            && image.state.len() == set.state.len
            && image.sequence.as_ref().map(Vec::len) == set.sequence.map(|region| region.len)
            && image.memory.is_some() == set.memory.is_some()
            && image.dead.as_ref().map(Vec::len) == set.dead.map(|_| heads * capacity * 4)
            && image.blocks.len() == image.pages.len() * block_bytes
            && image.pages.iter().all(|index| (*index as usize) < heads * capacity)
            && image.pages.windows(2).all(|pair| pair[0] < pair[1])
            && self.covers(image, lens);
        if !fits {
            return Err(damaged("their sizes are others"));
        }
        // What lies in states, memories and blocks the methods expect to be anything; what the lane reads itself is checked here.
        let (needs, rows) = (self.methods[method].needs(), self.shape.page_rows as u32);
        if image.built.iter().any(|built| needs.digestible(*built as usize) != *built as usize) {
            return Err(damaged("they end within a group of rows"));
        }
        let gone = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes) <= rows;
        if image.dead.as_ref().is_some_and(|dead| !dead.as_chunks().0.iter().all(gone)) {
            return Err(damaged("more rows of a page were dropped than it has"));
        }
        self.meta.get_mut(set.state).copy_from_slice(&image.state);
        if let (Some(region), Some(bytes)) = (set.sequence, &image.sequence) {
            self.meta.get_mut(region).copy_from_slice(bytes);
        }
        if let (Some(region), Some(bytes)) = (set.memory, &image.memory) {
            let (from, to) = (bytes.len() / heads, region.len / heads);
            if from != self.methods[method].memory_bytes(capacity * self.shape.page_rows) {
                return Err(damaged("their memories have another size"));
            }
            for head in 0..heads {
                let into = self.meta.get_mut(crate::lane::digests::part(region, head, to));
                self.methods[method].grow_memory(&bytes[head * from..][..from], into);
            }
        }
        if let (Some(region), Some(bytes)) = (set.dead, &image.dead) {
            for head in 0..heads {
                let into = self.meta.get_mut(crate::lane::digests::part(region, head, now * 4));
                into[..capacity * 4].copy_from_slice(&bytes[head * capacity * 4..][..capacity * 4]);
            }
        }
        for (index, bytes) in image.pages.iter().zip(image.blocks.chunks_exact(block_bytes.max(1))) {
            let (head, page) = (*index as usize / capacity, *index as usize % capacity);
            let Some(pool) = self.pools.iter_mut().find(|pool| pool.key() == key) else { break };
            let block = pool.blocks.take(&mut self.meta)?;
            pool.blocks.get_mut(&mut self.meta, block).copy_from_slice(bytes);
            self.meta.set_word(set.table, head * now + page, block);
        }
        if let Ok(sequence) = self.sequence_mut(id) {
            let set = &mut sequence.digests[at];
            set.built.clone_from(&image.built);
            set.ready.clone_from(&image.ready);
        }
        Ok(true)
    }
}
