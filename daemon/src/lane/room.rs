//! Whether there is room for what a request needs: pages for rows, and beside them page tables, digests, memories, marks.

use kvoyant_protocol::control::{Failure, PageWord, SelectedBy, ToDaemon};
use kvoyant_protocol::quota::{OverQuota, Quota};
use kvoyant_protocol::wire::SequenceId;

use crate::lane::digests::DigestSet;
use crate::lane::model::{HEAP_FILE_BYTES, ModelState};
use crate::lane::sequences::{LayerSlots, RESERVE_MAX, Sequence, check_tokens};
use crate::lane::spill::SLOT_ENTRY;
use crate::quota::Charge;
use crate::tiers::purse::Beside;

/// Most sequences that a full arena's answer names. A list that is too long for a message would help nobody either.
const CLOSING_MAX: usize = 256;

/// Sequences that are compared for it, and entries of page tables that are looked at: a millisecond or two.
const COMPARED_MAX: usize = 1 << 12;
const LOOKS_MAX: usize = 1 << 20;

/// What a sequence counts for with its user, for as long as it is open.
#[derive(Debug)]
pub struct Charges {
    _sequence: Charge,
    _memory: Beside,
}

impl ModelState {
    /// Extents that must be added before a request can be met; 0 if it can be met at once, or never.
    pub(crate) fn missing_extents(&self, message: &ToDaemon) -> usize {
        self.pages_for(message).map_or(0, |pages| self.arena.missing_extents(pages))
    }

    /// Free pages that a request needs.
    pub(super) fn pages_for(&self, message: &ToDaemon) -> Result<usize, Failure> {
        match message {
            ToDaemon::Open { method, tokens, by } => self.pages_to_open(*method, *tokens, *by),
            ToDaemon::Reserve { sequences } => self.pages_to_reserve(sequences),
            _ => Ok(0),
        }
    }

    fn pages_to_open(&self, method: u16, tokens: u32, by: SelectedBy) -> Result<usize, Failure> {
        let method = self.method_index(method)?;
        self.free_slot()?;
        if self.arena.purse().account().room(Quota::Sequences) == 0 {
            return Err(Failure::Quota(self.arena.purse().account().over_quota(Quota::Sequences, 1)));
        }
        let pages = (check_tokens(tokens)? as usize).div_ceil(self.shape.page_rows);
        self.check_tables(self.tables_of(self.digested_here(method, by), pages))?;
        Ok(pages * self.heads())
    }

    /// Free pages that a reservation needs.
    pub(super) fn pages_to_reserve(&self, list: &[(SequenceId, u32)]) -> Result<usize, Failure> {
        let rows = self.shape.page_rows;
        let kept = 0..self.heads();
        let mut needed = 0;
        let mut named: Vec<_> = list.iter().map(|(id, _)| *id).collect();
        named.sort_unstable();
        if list.len() > RESERVE_MAX || named.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Failure::BadModel(format!(
                "a reservation names {} sequences, of which there may be {RESERVE_MAX}, each once",
                list.len()
            )));
        }
        for (id, tokens) in list {
            let tokens = check_tokens(*tokens)? as usize;
            let sequence = self.sequence(*id)?;
            needed += tokens.div_ceil(rows).saturating_sub(sequence.pages) * kept.len();
            let first = sequence.tokens() / rows;
            for head in kept.clone() {
                needed += (first..sequence.pages)
                    .map(|page| self.page_word(sequence.table, head * sequence.capacity + page))
                    .filter(|word| match word {
                        PageWord::None => true,
                        PageWord::Page(page) => self.arena.is_shared(*page),
                        PageWord::Spilled | PageWord::Lost => false,
                    })
                    .count();
            }
        }
        if needed <= self.arena.obtainable_pages() {
            let mut wanted = 0_u64;
            for (id, tokens) in list {
                let methods = self.sequence(*id)?.digests.iter().map(DigestSet::method);
                wanted = wanted.saturating_add(self.tables_of(methods, (*tokens as usize).div_ceil(rows)));
            }
            self.check_tables(wanted)?;
        }
        Ok(needed)
    }

    /// What to tell a client when `needed` pages cannot be had: sequences that, closed, would free what is missing.
    /// Those that ask are not among them.
    pub(super) fn backpressure(&self, needed: usize, missing: usize, asking: &[SequenceId]) -> Failure {
        let closing = self.would_free(missing, asking).unwrap_or_default();
        if let Some(over) = self.refused_by(needed) {
            return Failure::Quota(OverQuota { closing, ..over });
        }
        let page_bytes = self.arena.geometry().page_bytes() as u64;
        Failure::Backpressure {
            needed_bytes: (needed as u64).saturating_mul(page_bytes),
            free_bytes: ((needed - missing) as u64).saturating_mul(page_bytes),
            arena_bytes: self.arena.budget().total_bytes(),
            closing,
        }
    }

    /// Sequences that, closed, would free so many pages, the largest first; `None` if there are none, or they are too many, or to find them would
    /// take too long.
    fn would_free(&self, missing: usize, asking: &[SequenceId]) -> Option<Vec<SequenceId>> {
        if missing > self.arena.used_pages() {
            return None;
        }
        let others = self.open_handles().take(COMPARED_MAX).filter(|id| asking.binary_search(id).is_err());
        let mut owners: Vec<_> = others.map(|id| (self.sequence(id).map_or(0, |of| of.pages), id)).collect();
        owners.sort_unstable_by(|a, b| b.cmp(a));
        let (mut freed, mut closing, mut looks) = (0, Vec::new(), LOOKS_MAX);
        for (pages, id) in owners {
            let sequence = self.sequence(id).ok()?;
            looks = looks.checked_sub(self.heads() * pages)?;
            let words = self.tables.get(sequence.table).chunks_exact((sequence.capacity * 4).max(4));
            let words = words.flat_map(|head| head.as_chunks::<4>().0.iter().take(pages));
            let alone = |page: &u32| !self.arena.is_shared(*page);
            let own =
                words.filter_map(|word| PageWord::of(u32::from_le_bytes(*word)).page()).filter(alone).count();
            freed += own;
            closing.extend((own > 0).then_some(id));
            if freed >= missing {
                return (closing.len() <= CLOSING_MAX).then_some(closing);
            }
        }
        None
    }

    /// The quota, or the share, that keeps `pages` free pages from the session's user; none if host memory is just full.
    pub(super) fn refused_by(&self, pages: usize) -> Option<OverQuota> {
        let host = self.arena.purse().refuse_host(self.arena.bytes_for(pages));
        // Where pages could leave, it is the disk that has no room for them.
        host.or_else(|| self.spill.as_ref()?.refused())
    }

    /// Bytes that a sequence's table of `pages` pages, its marks and statistics, and its digests for each of these methods
    /// may take.
    pub(super) fn tables_of(&self, methods: impl IntoIterator<Item = usize>, pages: usize) -> u64 {
        let capacity = pages.next_power_of_two().max(8);
        let kept = |method: usize| {
            let method = &self.methods[method];
            let per_page = 4 + method.digest_bytes() + 4;
            let memory = method.memory_bytes(capacity * self.shape.page_rows);
            (per_page * capacity + method.head_state_bytes()).saturating_add(memory) as u64
        };
        let kept = methods.into_iter().map(kept).fold(0, u64::saturating_add);
        let slots = if self.spill.is_some() { SLOT_ENTRY * capacity } else { 0 };
        let per_head = kept.saturating_add((4 * capacity + slots + self.shape.head_dim * 4) as u64);
        let marks = (capacity * self.shape.page_rows) as u64;
        per_head.saturating_mul(self.heads() as u64).saturating_add(marks)
    }

    /// One sequence more, of its user's, with what a lane keeps of each of its layers.
    pub(super) fn charge_sequence(&self) -> Result<Charges, Failure> {
        let layer = size_of::<LayerSlots>() + size_of::<u32>() + size_of::<bool>();
        let bytes = (size_of::<Sequence>() + self.shape.layers * layer) as u64;
        self.check_tables(bytes)?;
        let purse = self.arena.purse();
        let sequence = purse.account().charge(Quota::Sequences, 1).map_err(Failure::Quota)?;
        Ok(Charges { _sequence: sequence, _memory: purse.beside(bytes)? })
    }

    /// Whether a sequence may be forked to a method.
    pub(crate) fn check_fork(
        &self,
        parent: SequenceId,
        method: usize,
        by: SelectedBy,
    ) -> Result<(), Failure> {
        self.check_selector(method, by)?;
        let from = self.sequence(parent)?.method;
        if from != method && (self.drops_rows(from) || self.drops_rows(method)) {
            return Err(Failure::BadMethod(format!(
                "sequence {parent} cannot be forked from {} to {}: a method with a pool drops rows, so it neither takes \
                 over a sequence nor hands one on; open one with it",
                self.methods[from].spec(),
                self.methods[method].spec()
            )));
        }
        Ok(())
    }

    /// Whether the daemon's memory for tables and digests would hold so many bytes more. What follows relies on it: an
    /// allocation that fails half way ends the session.
    pub(super) fn check_tables(&self, wanted: u64) -> Result<(), Failure> {
        // Either new files can be had, or what is wanted fits into free spans of those that are there.
        let purse = self.arena.purse();
        let spare = 2 * HEAP_FILE_BYTES as u64;
        let new = purse.free_table_bytes().saturating_sub(spare);
        let free = new.max(self.tables.longest_span().min(self.meta.longest_span()));
        if wanted <= free {
            return Ok(());
        }
        let full = Failure::TablesFull { wanted_bytes: wanted, free_bytes: free };
        Err(purse.refuse_tables(wanted.saturating_add(spare)).map_or(full, Failure::Quota))
    }
}
