//! What the control plane asks of a session: done at once, or once pages have come or gone.

use std::time::Instant;

use kvoyant_protocol::control::{Failure, ToClient, ToDaemon};
use kvoyant_protocol::wire::SequenceId;

use super::{Outcome, Reply};
use crate::lane::close::Closing;
use crate::lane::error::SessionError;
use crate::lane::images::{Drawing, ImageOutcome, ImageRequest};
use crate::lane::model::ModelState;
use crate::lane::session::{LaneSession, TURN_MAX};
use crate::lane::spill::Before;

/// What the control plane asks of a lane.
#[derive(Debug)]
pub enum Asked {
    /// What a client's control message asks.
    Message(ToDaemon),
    /// Something for an image.
    Image(ImageRequest),
    /// The rest of what has been begun, before which nothing else is done for its session. Only the lane itself asks.
    Begun(Begun),
}

/// What takes more than one turn.
#[derive(Debug)]
pub enum Begun {
    /// Sequences are being closed.
    Closing(Closing),
    /// One is being described.
    Drawing(Drawing),
}

impl LaneSession {
    pub(super) fn asked(&mut self, asked: Asked) -> Result<Outcome, SessionError> {
        match asked {
            Asked::Message(message) => self.control(message),
            Asked::Begun(begun) => self.go_on_with(begun),
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
                let whole = match &request {
                    ImageRequest::Describe { sequence, digests: true } => Some(*sequence),
                    _ => None,
                };
                let outcome = model.image(request);
                model.submit_pages();
                match (whole, outcome) {
                    (Some(sequence), ImageOutcome::Portrait(portrait)) => {
                        self.go_on_with(Begun::Drawing(Drawing::of(sequence, portrait)))
                    }
                    // Something was half done, as where a message failed in this way.
                    (_, ImageOutcome::Failed(Failure::Internal(reason))) => {
                        Err(SessionError::HalfWay(reason))
                    }
                    (_, outcome) => Ok(Outcome::Image(outcome)),
                }
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
        if let ToDaemon::Close { sequences } = message {
            return self.go_on_with(Begun::Closing(Closing::of(sequences)));
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
            other => Err(Failure::BadModel(format!("{other:?} is not a request about sequences"))),
        };
        model.settle(released);
        let answered = model.answered(result)?;
        if let Outcome::Answered(Reply { message: ToClient::Opened { sequence, .. }, .. }) = &answered {
            self.has_opened(*sequence);
        }
        Ok(answered)
    }

    /// Goes on for a turn: a message names thousands of sequences, or one of millions of pages.
    fn go_on_with(&mut self, mut begun: Begun) -> Result<Outcome, SessionError> {
        let (since, released) = (Instant::now(), self.released_through());
        let enough = || since.elapsed() > TURN_MAX;
        let Some(model) = &mut self.model else { return Err(SessionError::NoModel) };
        let done = match &mut begun {
            Begun::Closing(closing) => {
                let done = model.close_some(closing, enough);
                model.settle(released);
                done
            }
            Begun::Drawing(drawing) => model.draw_some(drawing, enough),
        };
        match begun {
            begun if !done => Ok(Outcome::GoesOn(Asked::Begun(begun))),
            Begun::Closing(closing) => model.answered(closing.result().map(|()| ToClient::Done)),
            Begun::Drawing(drawing) => Ok(Outcome::Image(drawing.done())),
        }
    }
}

impl ModelState {
    fn answered(&mut self, result: Result<ToClient, Failure>) -> Result<Outcome, SessionError> {
        let message = match result {
            Err(Failure::Internal(reason)) => return Err(SessionError::HalfWay(reason)),
            result => result.unwrap_or_else(ToClient::Failed),
        };
        Ok(Outcome::Answered(Reply { announcements: self.announce()?, message, fds: Vec::new() }))
    }

    fn opened(&self, sequence: SequenceId) -> Result<ToClient, Failure> {
        let (table, room) = self.table_of(sequence)?;
        Ok(ToClient::Opened { sequence, table, room })
    }
}
