//! What a client tells its lane and waits for no answer: rows appended, statistics, attention rows, marks.

use std::time::Instant;

use kvoyant_methods::mark;
use kvoyant_protocol::wire::{Append, FEEDBACK_MAX, FeedbackRows, Observe, Stat};

use super::{LaneSession, TURN_MAX};
use crate::lane::error::SessionError;

impl LaneSession {
    /// Digests what has fallen behind, for what is left of this turn; true if nothing is left of it.
    pub(super) fn work_off(&mut self, since: Instant) -> Result<bool, SessionError> {
        let Some(model) = &mut self.model else { return Ok(true) };
        Ok(model.work_off(|| since.elapsed() > TURN_MAX)?)
    }

    /// Whether rows wait to be digested, before which nothing else is done.
    pub(in crate::lane) fn is_behind(&self) -> bool {
        self.model.as_ref().is_some_and(|model| !model.behind.is_empty())
    }

    pub(super) fn append(&mut self, request: &Append, index: u32) -> Result<(), SessionError> {
        self.read_batch(index, request.batch)?;
        let batch = std::mem::take(&mut self.batch);
        let model = self.model.as_mut().ok_or(SessionError::NoModel)?;
        let layers = match request.layer {
            None => 0..model.shape.layers,
            Some(layer) if usize::from(layer) < model.shape.layers => {
                usize::from(layer)..usize::from(layer) + 1
            }
            Some(layer) => {
                return Err(SessionError::Layer { layer, verb: "appended to", layers: model.shape.layers });
            }
        };
        let mut rows = 0;
        for entry in &batch {
            let (id, position, count) = (entry.sequence, entry.position, entry.value);
            if model.leaves_out(id) {
                continue;
            }
            for layer in layers.clone() {
                let sequence = model.sequence_mut(id).map_err(SessionError::Sequence)?;
                if sequence.stays {
                    return Err(SessionError::Stays { sequence: id });
                }
                let (len, room) = (sequence.lens[layer], sequence.room);
                let end = position.checked_add(count);
                if position != len || end.is_none_or(|end| end as usize > room) {
                    return Err(SessionError::Append { sequence: id, layer, position, count, len, room });
                }
                sequence.lens[layer] = len + count;
                model.falls_behind(id, layer);
            }
            rows += u64::from(count) * (layers.len() * model.shape.kv_heads) as u64;
            if request.layer.is_none() {
                model.record(id);
            }
        }
        if let Some(state) = &mut model.spill {
            state.changed();
        }
        self.batch = batch;
        self.dirty = true;
        self.count(Stat::RowsAppended, rows);
        Ok(())
    }

    pub(super) fn observe(&mut self, request: &Observe, index: u32) -> Result<(), SessionError> {
        self.read_batch(index, 1)?;
        let model = self.model.as_mut().ok_or(SessionError::NoModel)?;
        let layer = usize::from(request.layer);
        if layer >= model.shape.layers {
            let layers = model.shape.layers;
            return Err(SessionError::Layer { layer: request.layer, verb: "observed", layers });
        }
        let values = model.shape.kv_heads * model.shape.head_dim;
        let bytes = request.payload_bytes as usize;
        if bytes != values * 4 {
            return Err(SessionError::Payload { offset: 0, bytes, wanted: values * 4, have: bytes });
        }
        let mut sums = vec![0.0f32; values];
        self.c2d.read(self.layout.hints(index), bytemuck::cast_slice_mut(&mut sums))?;
        let id = self.batch[0].sequence;
        if model.leaves_out(id) {
            return Ok(());
        }
        model.sequence(id).map_err(SessionError::Sequence)?;
        Ok(model.observe(id, layer, &sums)?)
    }

    /// Takes in attention rows.
    pub(super) fn feedback(&mut self, request: &FeedbackRows, index: u32) -> Result<(), SessionError> {
        self.read_batch(index, 1)?;
        let model = self.model.as_mut().ok_or(SessionError::NoModel)?;
        let layer = usize::from(request.layer);
        if !model.speculates(layer) {
            let layers = model.shape.layers;
            return Err(SessionError::Layer { layer: request.layer, verb: "selected from", layers });
        }
        let (id, tokens) = (self.batch[0].sequence, self.batch[0].position as usize);
        if model.leaves_out(id) {
            return Ok(());
        }
        let sequence = model.sequence(id).map_err(SessionError::Sequence)?;
        let room = sequence.room.max(sequence.lens[layer] as usize);
        let Some(wanted) = model.methods[sequence.method].needs().feedback else {
            return Err(SessionError::NoFeedback { sequence: id });
        };
        if !(1..=room).contains(&tokens) {
            return Err(SessionError::Tokens { sequence: id, end: tokens, room });
        }
        let values = model.shape.kv_heads * tokens.div_ceil(wanted.block.max(1));
        if values > FEEDBACK_MAX {
            return Err(SessionError::Feedback { weights: values });
        }
        let bytes = request.payload_bytes as usize;
        if bytes != values * 4 {
            return Err(SessionError::Payload { offset: 0, bytes, wanted: values * 4, have: bytes });
        }
        // Copied before it is checked: the client may write on.
        let mut rows = std::mem::take(&mut model.buffers.hint);
        rows.clear();
        rows.resize(values, 0.0);
        self.c2d.read(self.layout.hints(index), bytemuck::cast_slice_mut(&mut rows))?;
        if let Some(weight) = rows.iter().find(|weight| !(0.0..=1.0).contains(*weight)) {
            return Err(SessionError::Weight { sequence: id, weight: *weight });
        }
        model.feedback(id, layer, tokens, &rows, request.full);
        model.buffers.hint = rows;
        Ok(())
    }

    /// Keeps marks of tokens to come.
    pub(super) fn mark(&mut self, bytes: u32, index: u32) -> Result<(), SessionError> {
        self.read_batch(index, 1)?;
        let model = self.model.as_mut().ok_or(SessionError::NoModel)?;
        let entry = self.batch[0];
        let (first, count) = (entry.position as usize, entry.value as usize);
        if model.leaves_out(entry.sequence) {
            return Ok(());
        }
        let sequence = model.sequence(entry.sequence).map_err(SessionError::Sequence)?;
        let room = sequence.room;
        if first < sequence.tokens() || first + count > room {
            return Err(SessionError::Tokens { sequence: entry.sequence, end: first + count, room });
        }
        if bytes as usize != count {
            let (bytes, wanted) = (bytes as usize, count);
            return Err(SessionError::Payload { offset: 0, bytes, wanted, have: bytes });
        }
        let mut marks = std::mem::take(&mut model.buffers.marks);
        marks.clear();
        marks.resize(count, 0);
        self.c2d.read(self.layout.hints(index), &mut marks)?;
        if let Some(mark) = marks.iter().find(|value| **value > mark::LINE) {
            return Err(SessionError::Mark { sequence: entry.sequence, mark: *mark });
        }
        model.mark(entry.sequence, first, &marks)?;
        model.buffers.marks = marks;
        Ok(())
    }
}
