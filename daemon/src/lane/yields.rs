//! Host memory that a session has and does not use, given back when somebody else has less than their share, or an operator wants it.
//!
//! A session's extents stay with it, free pages or not, for as long as nobody else needs them: what has been made and mapped once is there at once.

use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::control::Failure;
use kvoyant_protocol::quota::Quota;
use kvoyant_protocol::wire::SequenceId;

use crate::lane::model::ModelState;
use crate::lane::session::LaneSession;
use crate::lane::spill::Evicted;
use crate::tiers::pool::Supply;

impl ModelState {
    /// Gives back extents in which no page is in use, up to so many. Nothing is being copied, and no page is on its way from or to disk.
    fn give_up_free(&mut self, most: usize) -> Supply {
        // Its client learns of extents in their order, and of each.
        let given = self.arena.give_up_free(self.announced_extents(), most);
        for extent in given.extents() {
            self.memory.forget(extent.memory());
            if let Some(state) = &mut self.spill {
                state.forget(extent.memory());
            }
        }
        given
    }
}

impl LaneSession {
    /// Has pages of a sequence, or of all, leave from a frame on; in the end gives back extents in which nothing is.
    ///
    /// # Errors
    /// A sequence that is not open.
    pub(super) fn evict(&mut self, only: Option<SequenceId>, from: usize) -> Result<Evicted, Failure> {
        let idle = !self.has_answers_under_way();
        let Some(model) = self.model.as_mut() else { return Ok(Evicted::default()) };
        if let Some(id) = only {
            model.sequence(id)?;
        }
        let mut evicted = model.evict(only, from);
        model.submit_pages();
        let on_device = model.slab.as_ref().is_some_and(|slab| slab.slab.0.is_on_device());
        if evicted.next.is_none() && idle && !self.in_transfer() && self.may_yield() && !on_device {
            evicted.extents = self.give_back(usize::MAX) as u64;
        }
        self.refresh_status();
        Ok(evicted)
    }

    /// Gives back extents in which nothing is, up to so many. How many.
    fn give_back(&mut self, most: usize) -> usize {
        let Some(model) = &mut self.model else { return 0 };
        let given = model.give_up_free(most);
        // Nobody else has them before it is known that this session has them no more.
        self.cover();
        given.extents().len()
    }

    /// Gives back extents in which nothing is, if its user has more than their share and it is not `to` who asks. How many.
    pub(super) fn yield_extents(&mut self, to: u32) -> usize {
        let idle = !self.has_answers_under_way() && !self.in_transfer() && self.may_yield();
        let Some(model) = self.model.as_mut().filter(|_| idle) else { return 0 };
        let purse = model.arena.purse();
        let (account, total) = (purse.account(), purse.all().total_bytes());
        // Whatever a GPU may read is registered with its driver, and its clients may have it registered as well.
        let on_device = model.slab.as_ref().is_some_and(|slab| slab.slab.0.is_on_device());
        let beyond = account.held(Quota::Host).saturating_sub(account.share(total)) / EXTENT_BYTES as u64;
        if account.uid() == to || on_device || beyond == 0 {
            return 0;
        }
        let given = self.give_back(beyond as usize);
        self.refresh_status();
        given
    }
}
