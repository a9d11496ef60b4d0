//! What a lane does for images of sequences: it lends pages to who writes or fills them, and describes, or takes over, what is kept
//! beside them.
//!
//! The control plane asks, one thing at a time; files and sockets are never touched here. A sequence that is being written or filled
//! *stays*: nothing is appended to it. Pages that are lent keep their places until something else is asked.

mod attach;
mod digests;
mod taken;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use kvoyant_methods::mark;
use kvoyant_protocol::control::{Failure, PageWord};
use kvoyant_protocol::memory::SharedMapping;
use kvoyant_protocol::wire::{SequenceId, Status};

pub use attach::Attach;
pub use digests::{DigestImage, Drawing};
pub(crate) use taken::Taken;

use crate::lane::model::ModelState;
use crate::lane::spill::Before;
use crate::tiers::store::{ModelKey, PageTable};

/// What the control plane asks for an image.
#[derive(Debug)]
pub enum ImageRequest {
    /// Everything of a sequence but its pages, or what its method keeps aside; nothing is appended to it from here on.
    Describe {
        /// Which sequence.
        sequence: SequenceId,
        /// Whether what its method keeps is wanted.
        digests: bool,
    },
    /// The places of those pages of some layers that are there, in table order. They are what they are until the next request.
    Lend {
        /// Of which sequence.
        sequence: SequenceId,
        /// Which layers.
        layers: Range<usize>,
        /// Which pages of each head.
        pages: Range<usize>,
    },
    /// Takes over what was kept beside the pages. The sequence is new, and stays from here on.
    Adopt(Box<Adopt>),
    /// Pages that were lent have been filled.
    Fill(Box<Fill>),
    /// An empty sequence begins with a published prefix.
    Attach(Box<Attach>),
    /// It need not stay any more.
    Release(SequenceId),
    /// An operator suspends it: what its client still tells about it is left out from here on.
    Take(SequenceId),
    /// That came to nothing. Answered by whether its client can go on with it; if not, it is to be closed.
    GiveBack(SequenceId),
    /// It is closed, under its client's hands.
    Retire(SequenceId),
    /// A moment has passed since: what its client was reading then is not read any more.
    Forget(SequenceId),
}

/// Held by whoever reads or writes a session's pages on another thread: as long as one is there, the session is not taken apart, and its
/// extents are nobody else's. The session may have ended meanwhile.
#[derive(Debug, Clone, Default)]
pub struct Lease(Arc<()>);

impl Lease {
    /// Whether there are others.
    #[must_use]
    pub(crate) fn is_out(&self) -> bool {
        let out = Arc::strong_count(&self.0) > 1;
        // What whoever held the last one did to the pages was done before.
        fence(Ordering::Acquire);
        out
    }
}

/// The place of a page, which stays while this is there.
#[derive(Debug, Clone)]
pub struct Lent {
    /// Head among all layers' heads.
    pub head: usize,
    /// Index of the page in it.
    pub page: usize,
    /// The extent's memory.
    pub memory: Arc<SharedMapping>,
    /// Where in it, in bytes.
    pub offset: usize,
    /// Keeps the extent the session's.
    pub lease: Lease,
}

/// A sequence without its pages.
#[derive(Debug)]
pub struct Portrait {
    /// The model.
    pub model: ModelKey,
    /// Its method's specification.
    pub method: String,
    /// Its seed.
    pub seed: u64,
    /// Rows of each layer.
    pub lens: Vec<u32>,
    /// Which pages there are.
    pub pages: PageTable,
    /// Statistics of the prompt's queries, `[layer][KV head][head dim]`, and of which layers they have come.
    pub observation: Option<(Vec<f32>, Vec<bool>)>,
    /// Marks of its tokens' text.
    pub marks: Option<Vec<u8>>,
    /// What its method keeps.
    pub digests: Vec<DigestImage>,
}

/// What a new sequence takes over.
#[derive(Debug)]
pub struct Adopt {
    /// Which sequence.
    pub sequence: SequenceId,
    /// Its seed.
    pub seed: u64,
    /// Rows of each layer that are to come.
    pub lens: Vec<u32>,
    /// As in [`Portrait::observation`].
    pub observation: Option<(Vec<f32>, Vec<bool>)>,
    /// What its method keeps, if it is to be taken over as it is; else it is made from rows as they come.
    pub digests: Vec<DigestImage>,
}

/// Rows that have come.
#[derive(Debug)]
pub struct Fill {
    /// Which sequence.
    pub sequence: SequenceId,
    /// Rows of each layer, now.
    pub lens: Vec<u32>,
    /// Pages below them that the image does not have, by head and index.
    pub absent: Vec<(usize, usize)>,
    /// Marks of the tokens from this one on.
    pub marks: Option<(usize, Vec<u8>)>,
}

/// What comes of it.
#[derive(Debug)]
pub enum ImageOutcome {
    /// See [`ImageRequest::Describe`].
    Portrait(Box<Portrait>),
    /// See [`ImageRequest::Lend`].
    Lent(Vec<Lent>),
    /// Whether what the method keeps was taken over.
    Adopted(bool),
    /// See [`ImageRequest::GiveBack`].
    GivenBack(bool),
    /// It is done.
    Done,
    /// It cannot be.
    Failed(Failure),
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / 4];
    bytemuck::cast_slice_mut::<f32, u8>(&mut values).copy_from_slice(&bytes[..bytes.len() / 4 * 4]);
    values
}

impl ModelState {
    /// What has to be the same where an image of a sequence is read.
    #[must_use]
    pub fn model_key(&self) -> ModelKey {
        ModelKey {
            fingerprint: self.spec.fingerprint.clone(),
            adapter: self.spec.adapter.clone(),
            layers: self.spec.layers,
            kv_heads: self.spec.kv_heads,
            head_dim: self.spec.head_dim,
            latent_values: self.spec.latent_values,
            dtype: self.spec.dtype,
            page_rows: self.shape.page_rows as u32,
            row_bytes: self.arena.geometry().row_bytes as u32,
        }
    }

    /// Has pages brought back that are to be lent.
    pub(crate) fn before_image(&mut self, request: &ImageRequest) -> Before {
        let ImageRequest::Lend { sequence, layers, pages } = request else {
            if let Some(state) = &mut self.spill {
                state.keep(None);
            }
            return Before::Ready;
        };
        if let Some(state) = &mut self.spill {
            state.keep(Some((*sequence, layers.clone())));
        }
        let mut before = Before::Ready;
        for layer in layers.clone() {
            if self.bring_layer(*sequence, layer, pages.clone()) == Ok(Before::Later) {
                before = Before::Later;
            }
        }
        before
    }

    /// Does what is asked; of a portrait's digests the blocks are drawn afterwards (`draw_some`).
    pub fn image(&mut self, request: ImageRequest) -> ImageOutcome {
        let result = match request {
            ImageRequest::Describe { sequence, digests } => {
                self.describe(sequence, digests).map(|portrait| ImageOutcome::Portrait(Box::new(portrait)))
            }
            ImageRequest::Lend { sequence, layers, pages } => {
                self.lend(sequence, layers, pages).map(ImageOutcome::Lent)
            }
            ImageRequest::Adopt(adopt) => self.adopt(&adopt).map(ImageOutcome::Adopted),
            ImageRequest::Fill(fill) => self.fill(&fill).map(|()| ImageOutcome::Done),
            ImageRequest::Attach(attach) => self.attach(&attach).map(|()| ImageOutcome::Done),
            ImageRequest::Release(id) => self.sequence_mut(id).map(|sequence| {
                sequence.stays = false;
                ImageOutcome::Done
            }),
            ImageRequest::Take(id) => self.take(id).map(|()| ImageOutcome::Done),
            ImageRequest::GiveBack(id) => Ok(ImageOutcome::GivenBack(self.give_back(id))),
            ImageRequest::Retire(id) => self.retire_taken(id).map(|()| ImageOutcome::Done),
            ImageRequest::Forget(id) => {
                self.forget_taken(id);
                Ok(ImageOutcome::Done)
            }
        };
        result.unwrap_or_else(ImageOutcome::Failed)
    }

    fn describe(&mut self, id: SequenceId, digests: bool) -> Result<Portrait, Failure> {
        let (rows, heads) = (self.shape.page_rows, self.shape.kv_heads);
        let sequence = self.sequence(id)?;
        if sequence.graph.is_some() {
            let reason = "it is written to by kernels that nobody waits for".into();
            return Err(Failure::Graph { sequence: id, reason });
        }
        let pages = |head: usize| (sequence.lens[head / heads] as usize).div_ceil(rows);
        let word = |head: usize, page: usize| self.page_word(sequence.table, head * sequence.capacity + page);
        let counts: Vec<u32> = (0..self.heads()).map(|head| pages(head) as u32).collect();
        let lost = (0..self.heads())
            .flat_map(|head| (0..pages(head)).map(move |page| (head, page)))
            .filter(|(head, page)| word(*head, *page) == PageWord::Lost)
            .map(|(_, page)| page)
            .min();
        if let Some(page) = lost {
            return Err(Failure::RowsLost { sequence: id, token: (page * rows) as u32 });
        }
        let table = PageTable::new(counts, |head, page| word(head, page) != PageWord::None);
        let tokens = sequence.lens.iter().copied().max().unwrap_or(0) as usize;
        let observation =
            sequence.observation.map(|region| (floats(self.meta.get(region)), sequence.observed.clone()));
        let marks = sequence.marks.map(|region| {
            let marks = self.meta.get(region);
            marks[..tokens.min(marks.len())].to_vec()
        });
        let portrait = Portrait {
            model: self.model_key(),
            method: self.methods[sequence.method].spec().to_string(),
            seed: sequence.seed,
            lens: sequence.lens.clone(),
            pages: table,
            observation,
            marks,
            digests: if digests { self.digest_images(id)? } else { Vec::new() },
        };
        self.sequence_mut(id)?.stays = true;
        Ok(portrait)
    }

    fn lend(
        &mut self,
        id: SequenceId,
        layers: Range<usize>,
        pages: Range<usize>,
    ) -> Result<Vec<Lent>, Failure> {
        let geometry = self.arena.geometry();
        let sequence = self.sequence(id)?;
        if !sequence.stays {
            return Err(Failure::Internal(format!("pages of sequence {id} were asked for, which may move")));
        }
        let mut lent = Vec::new();
        for head in layers.start * self.shape.kv_heads..layers.end * self.shape.kv_heads {
            for page in pages.start..pages.end.min(sequence.pages) {
                match self.page_word(sequence.table, head * sequence.capacity + page) {
                    PageWord::Page(word) => {
                        let (extent, offset) = geometry.locate(word * geometry.page_rows as u32);
                        let memory = Arc::clone(self.arena.memory(extent));
                        lent.push(Lent { head, page, memory, offset, lease: self.lease.clone() });
                    }
                    PageWord::None => {}
                    PageWord::Spilled => return Err(Failure::NotReady(Status::HostFull.to_string())),
                    PageWord::Lost => {
                        let token = (page * geometry.page_rows) as u32;
                        return Err(Failure::RowsLost { sequence: id, token });
                    }
                }
            }
        }
        Ok(lent)
    }

    fn adopt(&mut self, adopt: &Adopt) -> Result<bool, Failure> {
        let id = adopt.sequence;
        let sequence = self.sequence_mut(id)?;
        sequence.seed = adopt.seed;
        sequence.stays = true;
        if let Some((sums, observed)) = &adopt.observation {
            let per_layer = self.shape.kv_heads * self.shape.head_dim;
            if sums.len() != per_layer * self.shape.layers || observed.len() != self.shape.layers {
                return Err(Failure::NotReady("the image's statistics are of another shape".into()));
            }
            for (layer, sums) in sums.chunks_exact(per_layer).enumerate() {
                if observed[layer] {
                    self.observe(id, layer, sums)?;
                }
            }
        }
        self.adopt_digests(id, &adopt.lens, &adopt.digests)
    }

    fn fill(&mut self, fill: &Fill) -> Result<(), Failure> {
        let id = fill.sequence;
        let sequence = self.sequence(id)?;
        let (table, slots, capacity) = (sequence.table, sequence.slots, sequence.capacity);
        let fits = fill.lens.len() == self.shape.layers
            && fill.lens.iter().all(|len| *len as usize <= sequence.room)
            && fill.absent.iter().all(|(head, page)| *head < self.heads() && *page < sequence.pages);
        if !fits {
            return Err(Failure::Internal(format!("sequence {id} was filled beyond its room")));
        }
        if let Some((_, marks)) = &fill.marks
            && let Some(wrong) = marks.iter().find(|value| **value > mark::LINE)
        {
            let most = mark::LINE;
            return Err(Failure::NotReady(format!(
                "a mark of the image is {wrong}, and the largest is {most}"
            )));
        }
        for (head, page) in &fill.absent {
            self.drop_page(table, slots, head * capacity + page);
        }
        if let Some((first, marks)) = &fill.marks {
            self.mark(id, *first, marks)?;
        }
        self.sequence_mut(id)?.lens.clone_from(&fill.lens);
        (0..self.shape.layers).for_each(|layer| self.falls_behind(id, layer));
        self.record(id);
        Ok(())
    }
}
