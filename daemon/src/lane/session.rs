//! A session as its lane sees it: two rings, a model, and answers on their way.
//!
//! Whatever a client does wrong here ends this session, with a reason, and no other.

mod flights;
mod held;
mod hints;
pub(super) mod limits;
mod release;
mod reports;
mod seen;
mod told;
mod totals;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvoyant_protocol::layout::{Layout, d2c};
use kvoyant_protocol::memory::SharedMapping;
use kvoyant_protocol::ring::{Consumer, Producer};
use kvoyant_protocol::wire::{
    BatchEntry, Completion, Operation, Request, STATS, Served, Speculate, Stat, Status, WORK_MAX,
};

use crate::device::{AnswerWords, BACKGROUND, Device, Publication, Report};
use crate::lane::background::Background;
use crate::lane::error::SessionError;
use crate::lane::keeping::{Keeping, Progress};
use crate::lane::link::Link;
use crate::lane::mailbox::Report as GraphReport;
use crate::lane::model::ModelState;
use crate::lane::select::{Answer, Turn};
use crate::lane::session::flights::{Flight, Flights};
use crate::lane::session::held::Held;
use crate::lane::session::hints::HintArea;
use crate::lane::session::limits::charge;
use crate::lane::session::totals::Totals;
use crate::lane::spill::SpillState;
use crate::quota::Account;
use crate::status::SessionStatus;

/// How long a session may keep its lane before another one gets its turn; one request may take longer.
pub(super) const TURN_MAX: Duration = Duration::from_millis(1);

/// See the module.
#[derive(Debug)]
pub struct LaneSession {
    /// Number of the session.
    pub id: u64,
    /// What others may see of it.
    pub status: Arc<SessionStatus>,
    layout: Layout,
    c2d: SharedMapping,
    pub(super) d2c: Arc<SharedMapping>,
    requests: Consumer,
    completions: Producer,
    /// Whose answers these are.
    pub(super) served: Served,
    /// The registered model.
    pub model: Option<Box<ModelState>>,
    pub(super) last_ticket: u64,
    posted: u64,
    pub(super) released_through: u64,
    /// As far as the client's stream says that it has let go.
    stream_released: u64,
    /// As far as the client has let go in either way; it may be ahead of what has been posted.
    asked_release: u64,
    /// Whether answers are made known to the client's streams, which may be ahead of its CPU and of the lane.
    streams: bool,
    flights: Flights,
    held: Vec<Held>,
    /// Whether the next request waits for pages from disk.
    pub waits_for_pages: bool,
    /// The request that waited, and whether a page has come since.
    waited_for: Option<u32>,
    pub(super) page_news: bool,
    in_transfer: usize,
    link: Link,
    pub(super) stats: [u64; STATS],
    /// Requests of the ring that have been done since the session began.
    pub(super) requests_done: u64,
    /// What it leaves to the next daemon, if it is to.
    pub(super) keeping: Option<Box<Keeping>>,
    batch: Vec<BatchEntry>,
    answer: Answer,
    background: Background,
    backgrounds: u64,
    report: GraphReport,
    spare_copies: Vec<Vec<kvoyant_kernels::CopyRun>>,
    /// Whether a request waits for its doorbell, or an answer for room in the ring, so that the lane must poll.
    pub armed: bool,
    pub(super) dirty: bool,
    totals: Totals,
    seen: Option<(u32, Instant)>,
    /// When its ring was last looked at.
    looked: Instant,
    /// Up to where requests come before a control request that waits for them.
    draining: Option<u32>,
}

/// What a session needs from its lane to work.
#[derive(Debug, Clone, Copy)]
pub struct Tools<'a> {
    /// Where copies go.
    pub device: &'a dyn Device,
    /// Where their ends are reported.
    pub report: &'a Arc<Report>,
    /// When the lane last had nothing to do.
    pub idle: Instant,
}

impl LaneSession {
    /// A session over two mapped and sealed memfds.
    #[must_use]
    pub fn new(
        id: u64,
        status: Arc<SessionStatus>,
        layout: Layout,
        c2d: SharedMapping,
        d2c: Arc<SharedMapping>,
        served: Served,
        account: Arc<Account>,
    ) -> Self {
        Self {
            id,
            status,
            layout,
            c2d,
            d2c,
            requests: Consumer::requests(layout),
            completions: Producer::completions(layout),
            served,
            model: None,
            last_ticket: 0,
            posted: 0,
            released_through: 0,
            stream_released: 0,
            asked_release: 0,
            streams: false,
            flights: Flights::new(account, layout.limits.ring_slots as usize),
            held: Vec::new(),
            waits_for_pages: false,
            waited_for: None,
            page_news: false,
            in_transfer: 0,
            link: Link::default(),
            stats: [0; STATS],
            requests_done: 0,
            keeping: None,
            batch: Vec::new(),
            answer: Answer::default(),
            background: Background::default(),
            backgrounds: 0,
            report: GraphReport::default(),
            spare_copies: Vec::new(),
            armed: false,
            dirty: true,
            totals: Totals::default(),
            seen: None,
            looked: Instant::now(),
            draining: None,
        }
    }

    /// Goes on as far as it had come with another daemon.
    #[must_use]
    pub(crate) fn going_on(mut self, progress: &Progress, model: Box<ModelState>) -> Self {
        self.requests_done = progress.requests;
        (self.last_ticket, self.posted) = (progress.tickets, progress.tickets);
        self.released_through = progress.released_through;
        self.asked_release = progress.released_through;
        for (stat, value) in progress.stats.iter().take(STATS).enumerate() {
            self.stats[stat] = *value;
            self.d2c.store_u64(d2c::STATS + stat * 8, *value);
            self.status.stats[stat].store(*value, Ordering::Relaxed);
        }
        self.d2c.store_u64(d2c::TIMELINE, progress.tickets << 8);
        self.status.seen.has_layers(model.shape.layers);
        self.model = Some(model);
        self
    }

    /// The word to sleep on, and the value that means "nothing new".
    pub fn word(&self) -> (kvoyant_protocol::futex::Word<'_>, u32) {
        self.requests.word(&self.c2d)
    }

    /// Says to the client whether its lane sleeps.
    pub fn say_sleeping(&self, sleeping: bool) {
        self.requests.say_sleeping(&self.d2c, sleeping);
    }

    /// Last ticket whose answer is not read any more.
    #[must_use]
    pub fn released_through(&self) -> u64 {
        self.released_through
    }

    /// Whether copies are on their way, or pages from or to disk or an image. The session's memory must stay until they are not.
    #[must_use]
    pub fn in_transfer(&self) -> bool {
        let on_their_way = |model: &ModelState| {
            model.lease.is_out() || model.spill.as_ref().is_some_and(SpillState::is_busy)
        };
        self.in_transfer > 0 || self.model.as_deref().is_some_and(on_their_way)
    }

    /// Whether answers have been planned and not been posted.
    #[must_use]
    pub(super) fn has_answers_under_way(&self) -> bool {
        !self.flights.list.is_empty() || !self.held.is_empty()
    }

    /// Handles up to `most` requests; true if there was one.
    pub fn poll(&mut self, tools: Tools<'_>, most: u32) -> Result<bool, SessionError> {
        let handled = self.handle_requests(tools, most);
        if let Some(model) = self.model.as_mut().filter(|model| model.spill.is_some()) {
            if !self.waits_for_pages {
                model.after_request();
            }
            model.keep_within();
            // What has been planned is done, whatever came after it: the session's end waits for its end.
            model.submit_pages();
        }
        handled
    }

    fn handle_requests(&mut self, tools: Tools<'_>, most: u32) -> Result<bool, SessionError> {
        (self.armed, self.waits_for_pages) = (false, false);
        self.streams = tools.device.publishes();
        self.post_ready()?;
        if self.streams {
            self.release_by_stream()?;
        }
        let since = Instant::now();
        if !self.work_off(since)? {
            return Ok(true);
        }
        if self.must_rest() {
            return Ok(false);
        }
        // What has come may have been the last answer that a seal waited for: before there are others under way.
        self.cover_if_due(false);
        // Whatever is new has come since: while others had their turns, or what was before it.
        let looked = std::mem::replace(&mut self.looked, Instant::now()).max(tools.idle);
        let available = self.requests.available(&self.c2d)?;
        let mut handled = 0;
        while handled < available.min(most) {
            if handled > 0 && since.elapsed() > TURN_MAX {
                break;
            }
            let index = self.requests.index();
            let arrived = match self.seen {
                Some((seen, at)) if seen == index => at,
                _ => looked,
            };
            let descriptor = self.requests.peek(&self.c2d);
            let request = Request::parse(&descriptor, &self.layout.limits)?;
            if let Operation::Speculate(speculate) = request.operation
                && speculate.doorbell
                && self.c2d.load_u32(self.layout.doorbell(index)) != speculate.ticket as u32
            {
                self.seen = Some((index, arrived));
                self.armed = true;
                break;
            }
            if self.streams {
                // What the request lets go of may be what it waits for.
                self.release(request.release_through)?;
            }
            if self.streams && self.must_catch_up(&request) {
                self.seen = Some((index, arrived));
                self.armed = true;
                break;
            }
            if self.must_wait_for_pages(&request, index)? {
                self.seen = Some((index, arrived));
                self.waits_for_pages = true;
                break;
            }
            self.handle(&request, index, arrived, tools)?;
            self.requests.advance(&self.d2c);
            self.requests_done += 1;
            handled += 1;
            if !self.work_off(since)? {
                return Ok(true);
            }
        }
        // What comes from here on has waited for none of these.
        if handled > 0 && self.requests.available(&self.c2d)? == 0 {
            self.looked = Instant::now();
        }
        let prepared = self.prepare(tools, since);
        Ok(self.reports(tools, most)? | (handled > 0) | prepared)
    }

    /// Handles requests that are there, doorbells aside, up to so many: what a control request says comes after all of them. False if some
    /// are left, for which this is to be called again.
    pub fn drain(&mut self, tools: Tools<'_>, most: u32) -> Result<bool, SessionError> {
        let first = self.requests.index();
        let available = self.requests.available(&self.c2d)?;
        // What comes while this goes on comes after the control request.
        let end = self.draining.take().unwrap_or(first.wrapping_add(available));
        let waiting = end.wrapping_sub(first).min(available);
        if waiting > 0 {
            self.poll(tools, waiting.min(most))?;
            let handled = self.requests.index().wrapping_sub(first);
            // What has to wait for its doorbell comes later; what was not looked at, because answers are on their way first, does not.
            if handled < waiting && (handled > 0 || self.must_rest()) {
                self.draining = Some(end);
                return Ok(false);
            }
        } else {
            self.work_off(Instant::now())?;
        }
        if self.is_behind() {
            self.draining = Some(end);
            return Ok(false);
        }
        self.reports(tools, u32::MAX)?;
        Ok(true)
    }

    fn handle(
        &mut self,
        request: &Request,
        index: u32,
        arrived: Instant,
        tools: Tools<'_>,
    ) -> Result<(), SessionError> {
        self.release(request.release_through)?;
        match request.operation {
            Operation::Release => Ok(()),
            Operation::Speculate(speculate) => self.speculate(&speculate, index, arrived, tools),
            operation => {
                self.was_told();
                match operation {
                    Operation::Append(append) => self.append(&append, index),
                    Operation::Observe(observe) => self.observe(&observe, index),
                    Operation::Feedback(feedback) => self.feedback(&feedback, index),
                    Operation::Mark { payload_bytes } => self.mark(payload_bytes, index),
                    Operation::Release | Operation::Speculate(_) => Ok(()),
                }
            }
        }
    }

    fn read_batch(&mut self, index: u32, members: u32) -> Result<(), SessionError> {
        self.batch.clear();
        self.batch.resize(members as usize, bytemuck::Zeroable::zeroed());
        let bytes = bytemuck::cast_slice_mut(&mut self.batch);
        Ok(self.c2d.read(self.layout.batch(index), bytes)?)
    }

    fn speculate(
        &mut self,
        request: &Speculate,
        index: u32,
        arrived: Instant,
        tools: Tools<'_>,
    ) -> Result<(), SessionError> {
        let began = Instant::now();
        let (ticket, slots) = (request.ticket, u64::from(self.layout.limits.ring_slots));
        if ticket != self.last_ticket + 1 || ticket - self.released_through > slots {
            return Err(SessionError::Ticket {
                ticket,
                released: self.released_through,
                last: self.last_ticket,
                released_before: self.released_through,
            });
        }
        self.last_ticket = ticket;
        self.read_batch(index, request.batch)?;
        let model = self.model.as_mut().ok_or(SessionError::NoModel)?;
        let layer = usize::from(request.layer);
        if !(model.speculates(layer) || request.fetch && layer < model.shape.layers) {
            return Err(SessionError::Layer {
                layer: request.layer,
                verb: if request.fetch { "fetched" } else { "speculated" },
                layers: model.shape.layers,
            });
        }
        self.answer.clear();
        self.answer.rows_per_extent = model.rows_per_extent();
        (self.answer.key, self.answer.deadline_ns) = (ticket, request.deadline_ns);
        // Whether anything is begun or not: a page that is being read for one is waited for by the next.
        self.backgrounds += 1;
        self.background.clear(self.backgrounds, model.rows_per_extent());
        let (attends, estimates) = (model.attends || request.rest, model.estimating);
        let mut work = 0_usize;
        // Beyond the quota nothing is done, and that is the answer.
        let allowed = self.flights.begin();
        let mut status = if allowed { Status::Ready } else { Status::OverQuota };
        let area = HintArea::of(request, &self.c2d, self.layout.hints(index));
        let row_bytes = model.arena.geometry().row_bytes as u64;
        let room = self.link.bytes_until(request.deadline_ns).map(|bytes| bytes / row_bytes);
        for entry in self.batch.iter().filter(|_| allowed) {
            let tokens = entry.position as usize + 1;
            if request.fetch {
                let pages = model.pages_of(entry.sequence, layer, entry.position as usize);
                work = work.saturating_add(pages.saturating_mul(model.shape.page_rows));
                if work > WORK_MAX {
                    return Err(SessionError::Work { products: work });
                }
                match model.fetch(layer, entry, ticket, &mut self.answer) {
                    Ok(()) if self.answer.table_bytes() <= self.layout.limits.table_bytes as usize => {
                        continue;
                    }
                    Ok(()) => status = Status::TableFull,
                    Err(failed) => status = failed,
                }
                break;
            }
            let by_query = request.rest || model.selects_by_query(entry.sequence);
            work = work.saturating_add(charge(&model.shape, tokens, area.queries, by_query)?);
            if work > WORK_MAX {
                return Err(SessionError::Work { products: work });
            }
            let turn = Turn { ticket, released_through: self.released_through, room };
            let most = self.layout.limits.table_bytes as usize;
            if attends && !model.begin_partial(&mut self.answer, most) {
                status = Status::TableFull;
                break;
            }
            if estimates && !model.begin_rest(&mut self.answer, most) {
                status = Status::TableFull;
                break;
            }
            let answered = match area.read(entry, layer, model)? {
                Ok(()) if request.rest => model.rest_of_last(layer, entry, &mut self.answer),
                Ok(()) => {
                    let (answer, background) = (&mut self.answer, &mut self.background);
                    model.speculate(layer, entry, area.queries, turn, answer, background)
                }
                Err(bad) => Err(bad),
            };
            if let Err(failed) = answered {
                status = failed;
                break;
            }
            if self.answer.table_bytes() > self.layout.limits.table_bytes as usize {
                status = Status::TableFull;
                break;
            }
        }
        let table_bytes = if status == Status::Ready { self.write_table(ticket)? } else { 0 };
        let planned = Instant::now();
        let nanos = |from: Instant, to: Instant| (to - from).as_nanos().min(u128::from(u32::MAX)) as u32;
        let completion = Completion {
            status,
            layer: request.layer,
            batch: request.batch,
            ticket,
            bytes_moved: self.answer.bytes,
            rows_selected: self.answer.rows,
            rows_hit: self.answer.hits,
            rows_in_place: self.answer.in_place,
            rows_resident: self.answer.resident,
            queue_ns: nanos(arrived, began),
            select_ns: nanos(began, planned),
            transfer_ns: 0,
            table_bytes,
            partials: status == Status::Ready && self.answer.cpu_rows > 0,
            rest: status == Status::Ready && self.answer.has_rest,
            boot_id: self.served.boot_id,
            generation: self.served.generation,
        };
        // Rows that were given slots must be copied there even if this answer failed: the slots count as resident.
        let publish = tools
            .device
            .publishes()
            .then(|| AnswerWords { word: completion.timeline(), table_bytes: completion.table_bytes });
        let copies = publish.is_some() || !self.answer.copies.is_empty();
        let reads = !self.answer.reads.is_empty();
        let after = std::mem::take(&mut self.answer.after);
        self.flights.list.push_back(Flight {
            completion,
            planned,
            sent: planned,
            waiting: copies || reads,
            after,
            charged: allowed,
            deadline_ns: request.deadline_ns,
        });
        self.count(Stat::CpuRows, u64::from(self.answer.cpu_rows));
        self.count(Stat::LateRows, self.answer.late);
        if self.answer.late > 0 {
            self.status.seen.left_late();
        }
        self.count_rest();
        let transfer =
            if copies { self.new_transfer(ticket, publish.map(Publication::Answer), tools) } else { None };
        match transfer {
            transfer if reads => {
                let members = self.batch.iter().map(|entry| (entry.sequence, layer)).collect();
                self.hold(ticket, transfer, members);
            }
            Some(transfer) => self.submit(transfer, tools),
            None => {}
        }
        self.bring_ahead(tools);
        self.post_ready()?;
        self.check(request, status);
        Ok(())
    }

    /// Counts what the answer estimates, and what it may have missed.
    fn count_rest(&mut self) {
        if !self.answer.has_rest {
            return;
        }
        self.count(Stat::EstimatedRows, self.answer.estimated_rows);
        let missed = std::mem::take(&mut self.answer.missed);
        self.count(Stat::CertifiedHeads, missed.len() as u64);
        missed.iter().for_each(|stat| self.count(*stat, 1));
        self.answer.missed = missed;
    }

    /// Brings what was planned to be there ahead of any request.
    fn bring_ahead(&mut self, tools: Tools<'_>) {
        let Some(model) = &mut self.model else { return };
        if self.background.layers.is_empty() {
            return;
        }
        let layers = self.background.layers.clone();
        model.background_begins(&mut self.background);
        let (rows, bytes) = (self.background.rows, self.background.answer.bytes);
        self.count(Stat::PrefetchedRows, rows);
        self.count(Stat::PrefetchBytes, bytes);
        std::mem::swap(&mut self.answer, &mut self.background.answer);
        let key = BACKGROUND | self.backgrounds;
        match self.new_transfer(key, None, tools) {
            transfer if !self.answer.reads.is_empty() => self.hold(key, transfer, layers),
            Some(transfer) => self.submit(transfer, tools),
            None => {}
        }
        std::mem::swap(&mut self.answer, &mut self.background.answer);
    }

    /// Prepares layers whose answers are not read any more for their next step, for what is left of this turn; true if
    /// there were any.
    fn prepare(&mut self, tools: Tools<'_>, since: Instant) -> bool {
        let mut any = false;
        while since.elapsed() <= TURN_MAX {
            let Some(model) = &mut self.model else { break };
            self.backgrounds += 1;
            self.background.clear(self.backgrounds, model.rows_per_extent());
            if !model.prefetch_next(self.released_through, &mut self.background) {
                break;
            }
            any = true;
            self.bring_ahead(tools);
        }
        any
    }

    fn write_table(&mut self, ticket: u64) -> Result<u32, SessionError> {
        let at = self.layout.table(ticket);
        let heads: &[u8] = bytemuck::cast_slice(&self.answer.heads);
        self.d2c.write(at, heads)?;
        let runs: &[u8] = bytemuck::cast_slice(&self.answer.runs);
        self.d2c.write(at + heads.len(), runs)?;
        if self.answer.cpu_rows > 0 {
            let partials = bytemuck::cast_slice(&self.answer.partials);
            self.d2c.write(at + heads.len() + runs.len(), partials)?;
        }
        if self.answer.has_rest {
            let rests: &[u8] = bytemuck::cast_slice(&self.answer.rests);
            self.d2c.write(at + self.answer.table_bytes() - rests.len(), rests)?;
        }
        Ok(self.answer.table_bytes() as u32)
    }

    fn count(&mut self, stat: Stat, by: u64) {
        self.show(stat, self.stats[stat as usize] + by);
    }

    fn show(&mut self, stat: Stat, value: u64) {
        self.stats[stat as usize] = value;
        self.d2c.store_u64(d2c::STATS + stat as usize * 8, value);
        self.status.stats[stat as usize].store(value, Ordering::Relaxed);
    }
}
