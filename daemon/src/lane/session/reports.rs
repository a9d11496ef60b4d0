//! Reports of graph mode, as a session's lane reads them.

use std::time::Instant;

use kvoyant_protocol::wire::Stat;

use super::{LaneSession, TURN_MAX, Tools};
use crate::device::{Publication, RecordUpdate};
use crate::lane::error::SessionError;
use crate::lane::graph::GraphState;
use crate::lane::mailbox::Report;

impl LaneSession {
    /// Whether reports may come, which wake nobody.
    #[must_use]
    pub fn listens(&self) -> bool {
        self.graph().is_some_and(GraphState::serves)
    }

    fn graph(&self) -> Option<&GraphState> {
        self.model.as_ref()?.graph.as_ref()
    }

    /// Handles up to `most` reports, and no more than the mailbox has room for; true if there was one.
    pub(super) fn reports(&mut self, tools: Tools<'_>, most: u32) -> Result<bool, SessionError> {
        let Some(graph) = self.model.as_mut().and_then(|model| model.graph.take()) else { return Ok(false) };
        let mut graph = graph;
        let mut report = std::mem::take(&mut self.report);
        let result = self.read_reports(&mut graph, &mut report, tools, most);
        self.armed |= graph.serves() && graph.lively();
        self.report = report;
        if let Some(model) = &mut self.model {
            model.graph = Some(graph);
        }
        result
    }

    fn read_reports(
        &mut self,
        graph: &mut GraphState,
        report: &mut Report,
        tools: Tools<'_>,
        most: u32,
    ) -> Result<bool, SessionError> {
        let (mut handled, since) = (0, Instant::now());
        while handled < most.min(graph.mailbox.slots()) {
            // A turn is short, but for what a control message waits for.
            if handled > 0 && most < u32::MAX && since.elapsed() > TURN_MAX {
                break;
            }
            let look = graph.mailbox.take(report)?;
            if look.lost > 0 {
                self.count(Stat::GraphLost, look.lost);
            }
            if !look.found {
                break;
            }
            handled += 1;
            let (hits, misses) = report.found();
            self.count(Stat::GraphReports, 1);
            self.count(Stat::GraphHits, hits);
            self.count(Stat::GraphMisses, misses);
            let released = self.released_through();
            let Some(model) = self.model.as_mut() else { break };
            match model.prefetch(graph, report, released, &mut self.answer)? {
                Some(update) => self.answer_report(update, tools),
                None => self.count(Stat::GraphLost, 1),
            }
        }
        Ok(handled > 0)
    }

    fn answer_report(&mut self, update: Box<RecordUpdate>, tools: Tools<'_>) {
        self.count(Stat::BytesMoved, self.answer.bytes);
        if let Some(transfer) = self.new_transfer(0, Some(Publication::Records(update)), tools) {
            self.submit(transfer, tools);
        }
    }
}
