//! Control messages: each waits for the requests before it, and for its session's turns.

use tokio::sync::oneshot;

use super::session::Tools;
use super::{Asked, Attached, FAIR_SHARE, ImageRequest, Outcome};

impl Attached {
    /// Has a control message wait for the session's next turn.
    pub(super) fn park(&mut self, asked: Asked, reply: oneshot::Sender<Outcome>, tools: Tools<'_>) {
        if self.parked.is_none() && !matches!(asked, Asked::Begun(_)) {
            (self.parked, self.retries) = (Some((asked, reply)), true);
        } else {
            self.control(asked, reply, tools);
        }
    }

    /// Does what a control message asks once all requests before it are done, and everything is there that it needs.
    pub(super) fn control(&mut self, asked: Asked, reply: oneshot::Sender<Outcome>, tools: Tools<'_>) {
        if self.broken || self.detaching.is_some() {
            return;
        }
        if matches!(asked, Asked::Begun(_)) {
            return self.ask(asked, reply);
        }
        if !self.drained {
            let drained = self.session.drain(tools, FAIR_SHARE);
            match self.check(drained) {
                None => return,
                // The rest has to wait for its turn, as everybody's does.
                Some(false) => {
                    (self.parked, self.retries) = (Some((asked, reply)), true);
                    return;
                }
                Some(true) => self.drained = true,
            }
        }
        if !self.session.begins_control() {
            (self.parked, self.retries) = (Some((asked, reply)), true);
            return;
        }
        self.ask(asked, reply);
    }

    fn ask(&mut self, asked: Asked, reply: oneshot::Sender<Outcome>) {
        self.drained = false;
        let part = matches!(&asked, Asked::Image(ImageRequest::Lend { .. } | ImageRequest::Fill(_)));
        let answer = self.session.asked(asked);
        self.session.refresh_status();
        match self.check(answer) {
            Some(Outcome::Later(asked)) => {
                self.session.puts_control_off();
                (self.parked, self.retries) = (Some((asked, reply)), self.session.is_behind());
            }
            // Only then is it kept, with its answer: what is half done is known to no other daemon.
            Some(Outcome::GoesOn(asked)) => (self.parked, self.retries) = (Some((asked, reply)), true),
            Some(answer) => {
                if part {
                    // Files and stores take their time before the next one, and requests come meanwhile.
                    self.session.puts_control_off();
                }
                drop(reply.send(answer));
            }
            None => {}
        }
    }
}
