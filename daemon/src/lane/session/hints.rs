//! Hints of one request, copied out of the client's memory and then checked: a method sees finite queries and tokens
//! that exist, whatever the client writes meanwhile.

use kvoyant_methods::HintSource;
use kvoyant_protocol::memory::SharedMapping;
use kvoyant_protocol::wire::{BatchEntry, Speculate, Status};

use crate::lane::error::SessionError;
use crate::lane::model::ModelState;

/// Where the hints of a request lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct HintArea<'a> {
    /// The client's memory.
    pub(super) memory: &'a SharedMapping,
    /// Offset of the request's hints there.
    pub(super) at: usize,
    /// Bytes of them.
    pub(super) bytes: usize,
    /// Query tokens of each member.
    pub(super) queries: usize,
    /// Whether floors follow a member's queries.
    pub(super) floors: bool,
    /// Whether the rest of an answer is asked for: by the true query, whatever the method selects by.
    pub(super) rest: bool,
}

impl<'a> HintArea<'a> {
    /// Those of a request, at this offset.
    pub(super) fn of(request: &Speculate, memory: &'a SharedMapping, at: usize) -> Self {
        Self {
            memory,
            at,
            bytes: request.hint_bytes as usize,
            queries: request.queries as usize,
            floors: request.floors,
            rest: request.rest,
        }
    }

    /// Copies a member's hint into the model's buffers. A hint outside the area ends the session; one whose values cannot
    /// be only fails its request.
    pub(super) fn read(
        &self,
        entry: &BatchEntry,
        layer: usize,
        model: &mut ModelState,
    ) -> Result<Result<(), Status>, SessionError> {
        model.buffers.hint.clear();
        model.buffers.ids.clear();
        model.buffers.floors.clear();
        let Ok(sequence) = model.sequence(entry.sequence) else { return Ok(Ok(())) };
        let rows = sequence.lens.get(layer).copied().unwrap_or(0);
        if self.rest {
            return self.queries(entry, model);
        }
        match model.methods[sequence.method].needs().hint {
            HintSource::None => Ok(Ok(())),
            HintSource::Ids => self.ids(entry, rows.min(entry.position.saturating_add(1)), model),
            HintSource::Ahead | HintSource::Previous | HintSource::Current => self.queries(entry, model),
        }
    }

    fn queries(
        &self,
        entry: &BatchEntry,
        model: &mut ModelState,
    ) -> Result<Result<(), Status>, SessionError> {
        let values = self.queries * model.shape.query_heads * model.shape.head_dim;
        let beside = if self.floors { self.queries * model.shape.query_heads } else { 0 };
        let offset = self.offset(entry, (values + beside) * 4)?;
        let (hint, floors) = (&mut model.buffers.hint, &mut model.buffers.floors);
        hint.resize(values, 0.0);
        floors.resize(beside, 0.0);
        self.memory.read(self.at + offset, bytemuck::cast_slice_mut(hint))?;
        self.memory.read(self.at + offset + values * 4, bytemuck::cast_slice_mut(floors))?;
        let finite = hint.iter().all(|value| value.is_finite());
        // Nothing may be attended in any case, but not more than everything.
        let floors = floors.iter().all(|floor| *floor < f32::INFINITY);
        Ok(if finite && floors { Ok(()) } else { Err(Status::BadHint) })
    }

    /// For each KV head a count, then so many tokens, all of them below `rows`.
    fn ids(
        &self,
        entry: &BatchEntry,
        rows: u32,
        model: &mut ModelState,
    ) -> Result<Result<(), Status>, SessionError> {
        let heads = model.shape.kv_heads;
        let offset = self.offset(entry, heads * 4)?;
        let (mut at, mut left) = (self.at + offset, (self.bytes - offset) / 4);
        let ids = &mut model.buffers.ids;
        for head in 0..heads {
            let mut count = 0u32;
            self.memory.read(at, bytemuck::bytes_of_mut(&mut count))?;
            (at, left) = (at + 4, left - 1);
            // The counts of the heads to come must fit too.
            if count > rows || count as usize + (heads - head - 1) > left {
                return Ok(Err(Status::BadHint));
            }
            ids.push(count);
            let first = ids.len();
            ids.resize(first + count as usize, 0);
            self.memory.read(at, bytemuck::cast_slice_mut(&mut ids[first..]))?;
            if ids[first..].iter().any(|token| *token >= rows) {
                return Ok(Err(Status::BadHint));
            }
            (at, left) = (at + count as usize * 4, left - count as usize);
        }
        Ok(Ok(()))
    }

    /// Where a member's hint begins, if so many bytes of it lie in the area.
    fn offset(&self, entry: &BatchEntry, wanted: usize) -> Result<usize, SessionError> {
        let (offset, have) = (entry.value as usize, self.bytes);
        if offset.is_multiple_of(4) && offset.checked_add(wanted).is_some_and(|end| end <= have) {
            return Ok(offset);
        }
        Err(SessionError::Payload { offset, bytes: have, wanted, have })
    }
}
