//! Host memory that a session has and does not use, given back when somebody else has less than their share.
//!
//! A session's extents stay with it, free pages or not, for as long as nobody else needs them: what has been made and mapped once is there at once.

use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::quota::Quota;

use crate::lane::model::ModelState;
use crate::lane::session::LaneSession;

impl ModelState {
    /// Gives back extents in which no page is in use, up to so many. Nothing is being copied, and no page is on its way from or to disk.
    fn give_up_free(&mut self, most: usize) -> usize {
        let given = self.arena.give_up_free(most);
        for extent in given.extents() {
            self.memory.forget(extent.memory());
            if let Some(state) = &mut self.spill {
                state.forget(extent.memory());
            }
        }
        given.extents().len()
    }
}

impl LaneSession {
    /// Gives back extents in which nothing is, if its user has more than their share and it is not `to` who asks. How many.
    pub(super) fn yield_extents(&mut self, to: u32) -> usize {
        let idle = !self.has_answers_under_way() && !self.in_transfer();
        let Some(model) = self.model.as_mut().filter(|_| idle) else { return 0 };
        let purse = model.arena.purse();
        let (account, total) = (purse.account(), purse.all().total_bytes());
        // Whatever a GPU may read is registered with its driver, and its clients may have it registered as well.
        let on_device = model.slab.as_ref().is_some_and(|slab| slab.slab.0.is_on_device());
        let beyond = account.held(Quota::Host).saturating_sub(account.share(total)) / EXTENT_BYTES as u64;
        if account.uid() == to || on_device || beyond == 0 {
            return 0;
        }
        let given = model.give_up_free(beyond as usize);
        self.refresh_status();
        given
    }
}
