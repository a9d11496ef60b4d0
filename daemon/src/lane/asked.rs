//! What the control plane asks of a session: done at once, or once pages have come or gone.

use kvoyant_protocol::control::{Failure, ToClient, ToDaemon};
use kvoyant_protocol::wire::SequenceId;

use super::{Asked, Outcome, Reply};
use crate::lane::error::SessionError;
use crate::lane::images::ImageOutcome;
use crate::lane::model::ModelState;
use crate::lane::session::LaneSession;
use crate::lane::spill::Before;

impl LaneSession {
    pub(super) fn asked(&mut self, asked: Asked) -> Result<Outcome, SessionError> {
        match asked {
            Asked::Message(message) => self.control(message),
            Asked::Image(request) => {
                let Some(model) = &mut self.model else {
                    let failure = Failure::BadModel("a model must be registered first".into());
                    return Ok(Outcome::Image(ImageOutcome::Failed(failure)));
                };
                let before = model.before_image(&request);
                if before != Before::Ready || self.waits_for_pages {
                    model.submit_pages();
                    return Ok(Outcome::Later(Asked::Image(request)));
                }
                let outcome = model.image(request);
                model.submit_pages();
                Ok(Outcome::Image(outcome))
            }
        }
    }

    /// Does what a control message asks. An error ends the session: something failed half way, or memory of its own
    /// could not be handed over.
    fn control(&mut self, message: ToDaemon) -> Result<Outcome, SessionError> {
        let released = self.released_through();
        let Some(model) = &mut self.model else {
            let failure = Failure::BadModel("a model must be registered first".into());
            return Ok(Outcome::Answered(Reply::plain(ToClient::Failed(failure))));
        };
        let before = model.before_control(&message);
        model.submit_pages();
        if before != Before::Ready || self.waits_for_pages {
            return Ok(Outcome::Later(Asked::Message(message)));
        }
        let Some(model) = &mut self.model else { return Ok(Outcome::Later(Asked::Message(message))) };
        let extents = model.missing_extents(&message);
        if extents > 0 {
            return Ok(Outcome::Needs { extents, message });
        }
        let result = match &message {
            ToDaemon::Open { method, tokens, by } => {
                model.open(*method, *tokens, *by).and_then(|id| model.opened(id))
            }
            ToDaemon::Fork { parent, method, by } => {
                model.fork(*parent, *method, *by).and_then(|id| model.opened(id))
            }
            ToDaemon::Reserve { sequences } => model.reserve(sequences).and_then(|()| {
                let tables = sequences.iter().map(|(id, _)| model.table_of(*id)).collect::<Result<_, _>>()?;
                Ok(ToClient::Reserved { tables })
            }),
            ToDaemon::Truncate { sequence, tokens } => {
                model.truncate(*sequence, *tokens, released).map(|()| ToClient::Done)
            }
            ToDaemon::Graph { sequence, slot } => {
                model.serve_graph(*sequence, *slot).map(|()| ToClient::Done)
            }
            ToDaemon::Close { sequences } => {
                // One bad handle must not keep the others open.
                let closed = sequences.iter().map(|id| model.close(*id));
                closed.fold(Ok(()), Result::and).map(|()| ToClient::Done)
            }
            other => Err(Failure::BadModel(format!("{other:?} is not a request about sequences"))),
        };
        model.settle(released);
        let message = match result {
            Err(Failure::Internal(reason)) => return Err(SessionError::HalfWay(reason)),
            result => result.unwrap_or_else(ToClient::Failed),
        };
        let reply = Reply { announcements: model.announce()?, message, fds: Vec::new() };
        if let ToClient::Opened { sequence, .. } = &reply.message {
            self.has_opened(*sequence);
        }
        Ok(Outcome::Answered(reply))
    }
}

impl ModelState {
    fn opened(&self, sequence: SequenceId) -> Result<ToClient, Failure> {
        let (table, room) = self.table_of(sequence)?;
        Ok(ToClient::Opened { sequence, table, room })
    }
}
