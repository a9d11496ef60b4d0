//! Sequences that an operator suspends while their client lives, and does not know of it.
//!
//! From the moment a sequence is taken, what its client still tells the lane about it is left out: the image is of that moment. Once
//! it is retired, the client's next question about it is answered with "no such sequence", and nothing else of the session ends.
//! What the client reads and writes by itself stays in place until it closes the sequence, so that a client which has not noticed
//! yet reaches no other sequence's rows.

use kvoyant_protocol::control::{Failure, SelectedBy};
use kvoyant_protocol::wire::SequenceId;

use crate::lane::close::Remains;
use crate::lane::keeping::TakenRecord;
use crate::lane::model::ModelState;

/// A sequence that was taken.
#[derive(Debug)]
pub(crate) struct Taken {
    sequence: SequenceId,
    /// Whether something was left out since.
    missed: bool,
    /// What stays of it, once it is retired.
    remains: Option<Remains>,
}

impl ModelState {
    fn taken_mut(&mut self, id: SequenceId) -> Option<&mut Taken> {
        self.taken.iter_mut().find(|taken| taken.sequence == id)
    }

    /// From now on what is told about an open sequence is left out.
    pub(super) fn take(&mut self, id: SequenceId) -> Result<(), Failure> {
        if self.sequence(id)?.by == SelectedBy::Client {
            return Err(Failure::BadMethod(format!(
                "the client of sequence {id} selects its rows itself, and would not notice: have the engine suspend it"
            )));
        }
        if self.taken_mut(id).is_none() {
            self.taken.push(Taken { sequence: id, missed: false, remains: None });
        }
        Ok(())
    }

    /// Whether what was just told is about a sequence that was taken, and has to be left out.
    pub(crate) fn leaves_out(&mut self, id: SequenceId) -> bool {
        self.taken_mut(id).is_some_and(|taken| {
            taken.missed = true;
            true
        })
    }

    /// Whether a sequence that is being suspended has missed something already: for its client it is closed.
    pub(crate) fn is_gone(&self, id: SequenceId) -> bool {
        self.taken.iter().any(|taken| taken.sequence == id && taken.missed)
    }

    /// Gives a sequence back to its client; true if that can go on with it, for nothing was left out.
    pub(super) fn give_back(&mut self, id: SequenceId) -> bool {
        let missed = self.taken_mut(id).is_some_and(|taken| taken.missed);
        if !missed {
            self.taken.retain(|taken| taken.sequence != id);
        }
        !missed
    }

    /// Those that their clients cannot go on with, for the session's journal.
    pub(crate) fn taken_for_good(&self) -> Vec<TakenRecord> {
        let for_good = self.taken.iter().filter(|taken| taken.missed || taken.remains.is_some());
        let record = |taken: &Taken| {
            let (table, read) = taken.remains.as_ref().map(Remains::left).unzip();
            TakenRecord { sequence: taken.sequence, table, read: read.unwrap_or_default() }
        };
        for_good.map(record).collect()
    }

    /// Takes over what another daemon's operator had taken. One that was not closed yet is closed now: nobody else will.
    pub(crate) fn takes_again(&mut self, record: &TakenRecord) {
        let remains = record.table.map(|table| Remains::of(table, record.read.clone()));
        let open = remains.is_none();
        self.taken.push(Taken { sequence: record.sequence, missed: true, remains });
        if open && self.retire_taken(record.sequence).is_err() {
            self.taken.pop();
        }
    }

    /// Closes a sequence that was taken.
    pub(super) fn retire_taken(&mut self, id: SequenceId) -> Result<(), Failure> {
        let remains = self.retire(id)?;
        if let Some(taken) = self.taken_mut(id) {
            taken.remains = Some(remains);
            return Ok(());
        }
        self.end(remains);
        Ok(())
    }

    /// Some time has passed: nobody reads any more what a client was told of before its sequence was retired.
    pub(super) fn forget_taken(&mut self, id: SequenceId) {
        // It is put back, for the client has not closed it.
        if let Some(mut remains) = self.taken_mut(id).and_then(|taken| taken.remains.take()) {
            self.forget_read(&mut remains);
            if let Some(taken) = self.taken_mut(id) {
                taken.remains = Some(remains);
            }
        }
    }

    /// The client closes a sequence that was retired; false if it was not.
    pub(crate) fn bury(&mut self, id: SequenceId) -> bool {
        let Some(remains) = self.taken_mut(id).and_then(|taken| taken.remains.take()) else { return false };
        self.taken.retain(|taken| taken.sequence != id);
        self.end(remains);
        true
    }
}
