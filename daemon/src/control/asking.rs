//! What a session asks of its lane, and what it waits for meanwhile.

use kvoyant_protocol::control::{Failure, ToClient, ToDaemon, encode};
use tokio::sync::oneshot;

use super::{Ended, Plane, Session, Socket, place};
use crate::lane::{Asked, Command, Outcome, Reply};
use crate::tiers::pool::Refusal;

/// What was asked of a session that is to outlast this daemon has been done. Before its client hears of it, it is kept, with the answer.
pub(super) async fn settle(plane: &Plane, session: &Session, answer: Option<&ToClient>) -> Result<(), Ended> {
    if session.token.is_none() {
        return Ok(());
    }
    let (done, settled) = oneshot::channel();
    let command = Command::Settle(session.status.id, answer.map(encode), done);
    plane.lanes[session.status.lane].send(command);
    let settled = tokio::select! {
        settled = settled => settled,
        over = session.ending.ended() => return Err(over.into()),
    };
    match settled {
        Ok(()) => Ok(()),
        Err(_) => Err(session.ending.ended().await.into()),
    }
}

/// Asks the lane, and waits for what it says.
pub(super) async fn ask_lane(plane: &Plane, session: &Session, asked: Asked) -> Result<Outcome, Ended> {
    let (answer, answered) = oneshot::channel();
    plane.lanes[session.status.lane].send(Command::Control(session.status.id, asked, answer));
    // A session that ends while it is asked drops the question.
    let outcome = tokio::select! {
        outcome = answered => outcome,
        over = session.ending.ended() => return Err(over.into()),
        reason = plane.lost() => return Err(Ended::Refused(Failure::DeviceLost(reason))),
    };
    match outcome {
        Ok(outcome) => Ok(outcome),
        Err(_) => Err(session.ending.ended().await.into()),
    }
}

/// Has the lane do what a message asks. What it lacks is fetched from the pool first, as often as others are quicker.
pub(super) async fn ask(
    plane: &Plane,
    socket: &Socket,
    session: &Session,
    mut message: ToDaemon,
) -> Result<Reply, Ended> {
    let (id, uid) = (session.status.id, session.status.uid);
    let lane = &plane.lanes[session.status.lane];
    let (mut yielded, mut announced) = (false, Vec::new());
    loop {
        let again = (!yielded).then(|| message.clone());
        let extents = match ask_lane(plane, session, Asked::Message(message)).await? {
            Outcome::Answered(reply) => match again {
                Some(again) if place::makes_room(plane, &session.account, &reply.message).await => {
                    // What it was given on the way it hears of all the same.
                    (message, yielded, announced) = (again, true, reply.announcements);
                    continue;
                }
                _ => {
                    announced.extend(reply.announcements);
                    return Ok(Reply { announcements: announced, ..reply });
                }
            },
            Outcome::Needs { extents, message: again } => {
                message = again;
                extents
            }
            // The lane keeps what has to wait, and images are asked for in other words.
            other => return Err(Ended::Protocol(format!("{other:?} came instead of an answer"))),
        };
        // Whatever ends the wait gives back what was claimed.
        let supply = tokio::select! {
            supply = plane.pool.prepare(uid, extents) => supply,
            () = socket.hung_up() => return Err(Ended::HungUp),
            over = session.ending.ended() => return Err(over.into()),
            reason = plane.lost() => return Err(Ended::Refused(Failure::DeviceLost(reason))),
        };
        match supply {
            Ok(supply) => lane.send(Command::Supply(id, supply)),
            // Somebody else was quicker; the lane says what is missing now.
            Err(Refusal::Full) => {}
            Err(refusal) => {
                let failure = Failure::NotReady(refusal.to_string());
                let reply = Reply::plain(ToClient::Failed(failure));
                return Ok(Reply { announcements: announced, ..reply });
            }
        }
    }
}
