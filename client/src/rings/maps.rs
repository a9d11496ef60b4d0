//! The memory of one daemon's rings, and what lies in it.

use std::sync::Arc;

use kvoyant_protocol::layout::{Layout, d2c};
use kvoyant_protocol::memory::SharedMapping;
use kvoyant_protocol::wire::{BlockRun, Completion, HeadEntry, PartialLayout, RestLayout, Served};

use crate::error::Error;

/// A block table, copied out.
#[derive(Debug)]
pub(crate) struct Table {
    /// `[member][KV head]`.
    pub(crate) heads: Vec<HeadEntry>,
    /// Runs of all heads.
    pub(crate) runs: Vec<BlockRun>,
    /// Words of the partial attentions, if there are any.
    pub(crate) partials: Vec<u32>,
    /// Words of the estimates of rows left out, if there are any.
    pub(crate) rests: Vec<u32>,
}

/// What lies behind the runs of a block table, where it is there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Behind {
    /// Each member's partial attention.
    pub(crate) partial: PartialLayout,
    /// Each member's estimate of what was left out.
    pub(crate) rest: RestLayout,
}

/// What one daemon has given: rings, and the slab that its answers name. Another daemon that goes on with the session gives others, and
/// what was answered before stays in these.
#[derive(Debug)]
pub(crate) struct Maps {
    pub(super) layout: Layout,
    pub(super) c2d: Arc<SharedMapping>,
    pub(super) d2c: Arc<SharedMapping>,
    /// Who answers in them.
    pub(super) served: Served,
    /// In host memory, if there is one.
    pub(crate) slab: Option<Arc<SharedMapping>>,
}

impl Maps {
    /// What a daemon has sent.
    pub(crate) fn new(layout: Layout, c2d: SharedMapping, d2c: SharedMapping, boot_id: u64) -> Self {
        // Written before it came, and 0 by a daemon that does not count.
        let served = Served { boot_id, generation: d2c.load_u64(d2c::GENERATION) as u32 };
        Self { layout, c2d: Arc::new(c2d), d2c: Arc::new(d2c), served, slab: None }
    }

    /// The same, with the slab that its answers name.
    pub(crate) fn with_slab(self, slab: Option<Arc<SharedMapping>>) -> Self {
        Self { slab, ..self }
    }

    /// Copies an answer's block table out, and checks that every head's runs lie inside it.
    pub(crate) fn table(
        &self,
        completion: &Completion,
        kv_heads: usize,
        Behind { partial, rest }: Behind,
    ) -> Result<Table, Error> {
        let count = completion.batch as usize * kv_heads;
        let bytes = completion.table_bytes as usize;
        let head_bytes = count * size_of::<HeadEntry>();
        let partial_words = if completion.partials { completion.batch as usize * partial.words() } else { 0 };
        let rest_words = if completion.rest { completion.batch as usize * rest.words() } else { 0 };
        let run_bytes = bytes
            .checked_sub(head_bytes)
            .and_then(|left| left.checked_sub(partial_words * 4))
            .and_then(|left| left.checked_sub(rest_words * 4))
            .filter(|left| left.is_multiple_of(size_of::<BlockRun>()));
        let Some(run_bytes) = run_bytes else {
            return Err(Error::Broken(format!("a block table of {bytes} bytes for {count} heads")));
        };
        let at = self.layout.table(completion.ticket);
        let mut heads = vec![<HeadEntry as bytemuck::Zeroable>::zeroed(); count];
        let mut runs = vec![<BlockRun as bytemuck::Zeroable>::zeroed(); run_bytes / size_of::<BlockRun>()];
        self.d2c.read(at, bytemuck::cast_slice_mut(&mut heads))?;
        let mut partials = vec![0; partial_words];
        self.d2c.read(at + head_bytes, bytemuck::cast_slice_mut(&mut runs))?;
        let behind = at + head_bytes + run_bytes;
        self.d2c.read(behind, bytemuck::cast_slice_mut(&mut partials))?;
        let mut rests = vec![0; rest_words];
        self.d2c.read(behind + partial_words * 4, bytemuck::cast_slice_mut(&mut rests))?;
        let inside = |head: &HeadEntry| {
            head.first_run.checked_add(head.runs).is_some_and(|end| end as usize <= runs.len())
        };
        if !heads.iter().all(inside) {
            return Err(Error::Broken("a head's runs lie outside their block table".into()));
        }
        Ok(Table { heads, runs, partials, rests })
    }
}
