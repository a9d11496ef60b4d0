//! What a session's journal has in its records.

use kvoyant_methods::Selection;
use kvoyant_protocol::control::{ModelSpec, SelectedBy};
use kvoyant_protocol::layout::Limits;
use kvoyant_protocol::wire::SequenceId;
use serde::{Deserialize, Serialize};

use crate::keep::Piece;
use crate::lane::digests::DigestSet;
use crate::lane::sequences::{LayerSlots, Sequence};
use crate::tiers::heap::Region;
use crate::tiers::nvme::LeftChunk;
use crate::tiers::residency::{Residents, SlotSet};

/// What never changes while the session lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Number of the session.
    pub session: u64,
    /// Its user.
    pub uid: u32,
    /// Name that its client gave.
    pub client: String,
    /// Proves that a claim is its client's.
    pub token: [u64; 2],
    /// Sizes of its rings.
    pub limits: Limits,
    /// Abilities of client and daemon.
    pub features: u64,
    /// The model.
    pub spec: ModelSpec,
    /// Numbers of the files of its artifacts.
    pub artifacts: Vec<u64>,
}

/// How far it has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Requests of the ring that have been done.
    pub requests: u64,
    /// Daemons that had served it before the one that wrote this.
    pub generation: u32,
    /// Control messages that have been done.
    pub controls: u64,
    /// The last ticket; all up to it have been answered.
    pub tickets: u64,
    /// Answers up to this ticket are not read any more.
    pub released_through: u64,
    /// The session's counters.
    pub stats: Vec<u64>,
    /// Seeds given to sequences, but for those of a control message that is not done yet.
    pub seeds: u64,
    /// Sequences that such a message has opened.
    pub unsettled: Vec<SequenceId>,
    /// Layers that wait to be prepared for their next step.
    pub planned: Vec<(SequenceId, u32)>,
    /// Slots of open sequences, in the order in which they were opened.
    pub open: Vec<u32>,
    /// Pages of the slab that will be free: so many, once answers up to this ticket are not read any more.
    pub limbo: Vec<(u64, u32)>,
    /// Sequences that an operator has taken, and whose clients have told something about them since.
    pub taken: Vec<TakenRecord>,
}

/// Digest blocks of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolRecord {
    /// A method that reads this kind.
    pub method: u32,
    /// Where they lie.
    pub regions: Vec<Region>,
}

/// An extent, by the number of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HeldExtent {
    /// The session's own.
    Own(u64),
    /// One of published prefixes.
    Shared(u64),
}

impl HeldExtent {
    /// What it is among the files that are held for it.
    #[must_use]
    pub fn piece(self) -> Piece {
        match self {
            Self::Own(number) => Piece::Extent(number),
            Self::Shared(number) => Piece::Shared(number),
        }
    }
}

/// A sequence that an operator has taken out of its client's hands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenRecord {
    /// Which one it was.
    pub sequence: SequenceId,
    /// The page table of what its client may still read and write, once it is closed.
    pub table: Option<Region>,
    /// Pages that are in the table no more, and may still be read.
    pub read: Vec<u32>,
}

/// Which memory it has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Held {
    /// Its extents' files, in the order in which they came; `None` for one that was given back.
    pub extents: Vec<Option<HeldExtent>>,
    /// Lengths of the files of page tables.
    pub tables: Vec<u64>,
    /// Lengths of the files of digests and all else.
    pub meta: Vec<u64>,
    /// The directory of sequences.
    pub directory: Region,
    /// Digest blocks.
    pub pools: Vec<PoolRecord>,
    /// Its slab, if it has one.
    pub slab: Option<SlabRecord>,
    /// Chunks of the disk, in the order in which slots are numbered; `None` for numbers without one.
    pub chunks: Vec<Option<LeftChunk>>,
}

/// A slab of host memory, whose contents are copies of what lies in extents.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SlabRecord {
    /// Its pages.
    pub pages: u32,
    /// How many times as many rows as are selected a head keeps there.
    pub keep: f64,
    /// The part of a sequence's rows that a head may keep there besides.
    pub device_share: f64,
}

/// A slot for a sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRecord {
    /// How often it was used before.
    pub generation: u32,
    /// What is there.
    pub open: Option<SequenceRecord>,
}

/// As [`Sequence`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceRecord {
    /// Index of its method.
    pub method: u32,
    /// Who selects its rows.
    pub by: SelectedBy,
    /// For methods that draw.
    pub seed: u64,
    /// Its page table.
    pub table: Region,
    /// Where its pages lie on disk, if they may.
    pub slots: Option<Region>,
    /// Pages that each head's part of the table can hold.
    pub capacity: u32,
    /// Pages that each head has.
    pub pages: u32,
    /// Tokens up to which rows may be written.
    pub room: u32,
    /// Rows appended, per layer.
    pub lens: Vec<u32>,
    /// Statistics of the prompt's queries.
    pub observation: Option<Region>,
    /// Of which layers they have come.
    pub observed: Vec<bool>,
    /// Marks of the tokens' text.
    pub marks: Option<Region>,
    /// What methods keep.
    pub digests: Vec<SetRecord>,
    /// Of layers that have something beside their rows.
    pub layers: Vec<LayerRecord>,
}

/// As [`DigestSet`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetRecord {
    /// Index of its method.
    pub method: u32,
    /// Its page table.
    pub table: Region,
    /// Head states.
    pub state: Region,
    /// Memories.
    pub memory: Option<Region>,
    /// What is kept for all layers together.
    pub sequence: Option<Region>,
    /// Rows of each page that a pool has dropped.
    pub dead: Option<Region>,
    /// Rows digested, per layer.
    pub built: Vec<u32>,
    /// Whether a layer's digests can be built.
    pub ready: Vec<bool>,
}

/// What is remembered of a layer's answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Which layer.
    pub layer: u32,
    /// Ranges of each KV head, first token and count.
    pub named: Vec<Vec<(u32, u32)>>,
    /// The answer after which the next step is to be prepared, and its tokens.
    pub prefetch: Option<(u64, u64)>,
    /// The last answer that named rows, where there is a slab.
    pub last_ticket: u64,
    /// What each KV head has in the slab; empty: nothing was asked for yet, or there is none.
    pub heads: Vec<Residents>,
}

impl LayerRecord {
    fn of((layer, slots): (usize, &LayerSlots)) -> Option<Self> {
        let named: Vec<Vec<_>> = (0..slots.named.heads())
            .map(|head| slots.named.head(head).iter().map(|range| (range.first, range.count)).collect())
            .collect();
        let prefetch = slots.prefetch.map(|(ticket, tokens)| (ticket, tokens as u64));
        let heads: Vec<_> = slots.heads.iter().map(SlotSet::residents).collect();
        let last_ticket = if heads.is_empty() { 0 } else { slots.last_ticket };
        let anything = prefetch.is_some() || !named.is_empty() || !heads.is_empty();
        anything.then_some(Self { layer: layer as u32, named, prefetch, last_ticket, heads })
    }

    /// The rows that the last answer named; `None` if they are no selection.
    pub(super) fn selection(&self) -> Option<Selection> {
        let mut selection = Selection::new();
        for head in &self.named {
            let mut last = 0;
            for (first, count) in head {
                let end = first.checked_add(*count)?;
                if *first < last || *count == 0 {
                    return None;
                }
                selection.push(*first as usize, end as usize);
                last = end;
            }
            selection.finish_head();
        }
        Some(selection)
    }
}

impl SetRecord {
    fn of(set: &DigestSet) -> Self {
        Self {
            method: set.method as u32,
            table: set.table,
            state: set.state,
            memory: set.memory,
            sequence: set.sequence,
            dead: set.dead,
            built: set.built.clone(),
            ready: set.ready.clone(),
        }
    }
}

impl SequenceRecord {
    pub(super) fn of(sequence: &Sequence) -> Self {
        Self {
            method: sequence.method as u32,
            by: sequence.by,
            seed: sequence.seed,
            table: sequence.table,
            slots: sequence.slots,
            capacity: sequence.capacity as u32,
            pages: sequence.pages as u32,
            room: sequence.room as u32,
            lens: sequence.lens.clone(),
            observation: sequence.observation,
            observed: sequence.observed.clone(),
            marks: sequence.marks,
            digests: sequence.digests.iter().map(SetRecord::of).collect(),
            layers: sequence.residency.iter().enumerate().filter_map(LayerRecord::of).collect(),
        }
    }

    /// All its regions but the page table.
    pub(super) fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        let sets = self.digests.iter().flat_map(|set| {
            [Some(set.table), Some(set.state), set.memory, set.sequence, set.dead].into_iter().flatten()
        });
        [self.observation, self.marks, self.slots].into_iter().flatten().chain(sets)
    }
}
