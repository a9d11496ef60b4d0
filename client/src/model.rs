//! A registered model: sequences, batches, speculations.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvoyant_kernels::RowLayout;
use kvoyant_methods::Needs;
use kvoyant_protocol::control::{Mode, ModelSpec, SelectedBy, ToClient, ToDaemon};
use kvoyant_protocol::futex::now_ns;
use kvoyant_protocol::memory::{Memfd, Seals};
use kvoyant_protocol::wire::{BatchEntry, FeedbackRows, Observe, Operation, QUERIES_MAX, Stat, Told};

use crate::control::Control;
use crate::error::Error;
use crate::fallback::{Backlog, Fallback};
use crate::memory::{Geometry, Memory};
use crate::ready::Pending;
use crate::rings::{Ask, Rings};
use crate::sequence::Sequence;
use crate::usage::Usage;

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) control: Control,
    pub(crate) rings: Rings,
    pub(crate) memory: Memory,
    pub(crate) geometry: Geometry,
    pub(crate) usage: Usage,
    pub(crate) spec: ModelSpec,
    pub(crate) device: String,
    pub(crate) mode: Mode,
    pub(crate) spills: bool,
    pub(crate) scarce: bool,
    /// What stands in for late answers, and how long after they were asked for they are late.
    pub(crate) late: (Fallback, Duration),
    /// The process that connected: a child of it that was forked has the same socket, and no say in when the session ends.
    pub(crate) process: u32,
}

/// A model that the daemon serves. Clones share one session.
#[derive(Debug, Clone)]
pub struct Model {
    inner: Arc<Inner>,
}

/// One member of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    /// Its sequence.
    pub sequence: &'a Sequence,
    /// Position of the token that is being computed: `position` rows precede it. Of a block of query tokens, that of
    /// its first one.
    pub position: usize,
    /// What its method selects by.
    pub hint: Hint<'a>,
}

/// What a method selects by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Hint<'a> {
    /// Nothing.
    None,
    /// Queries of the layer after RoPE, `[queries][query heads][head dim]`; all of them finite.
    Query(&'a [f32]),
    /// The same, and what each of them gives to rows that are attended anyway: `floors` is `[queries][query heads]`, the log-sum-exps of their
    /// scaled scores. Either all members of a request have floors or none has.
    Beside {
        /// As [`Hint::Query`].
        query: &'a [f32],
        /// Log-sum-exps; none is NaN or `+∞`.
        floors: &'a [f32],
    },
    /// Tokens that the caller chose: for each KV head how many, then so many.
    Ids(&'a [u32]),
}

impl<'a> Hint<'a> {
    fn bytes(self) -> [&'a [u8]; 2] {
        match self {
            Self::None => [&[], &[]],
            Self::Query(values) => [bytemuck::cast_slice(values), &[]],
            Self::Beside { query, floors } => [bytemuck::cast_slice(query), bytemuck::cast_slice(floors)],
            Self::Ids(words) => [bytemuck::cast_slice(words), &[]],
        }
    }

    /// Values of its queries, if it has any, and of their floors.
    fn values(self) -> Option<(usize, usize)> {
        match self {
            Self::Query(values) => Some((values.len(), 0)),
            Self::Beside { query, floors } => Some((query.len(), floors.len())),
            Self::None | Self::Ids(_) => None,
        }
    }
}

/// How long an image may take to be written or read: as long as its disk.
pub(crate) const IMAGE_TIMEOUT: Duration = Duration::from_secs(600);

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asking {
    /// Rows to attend to.
    Rows,
    /// An estimate of those that were left out.
    Rest,
    /// Pages in host memory.
    Pages,
}

impl Model {
    pub(crate) fn new(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// What was registered.
    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        &self.inner.spec
    }

    /// What a registered method needs of its engine, by its index; None of one that this library does not know.
    #[must_use]
    pub fn needs(&self, method: usize) -> Option<&Needs> {
        self.inner.usage.needs(method)
    }

    /// Name of the daemon's device.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.inner.device
    }

    /// How the device answers.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.inner.mode
    }

    /// Whether the daemon may move pages to disk. Then rows outside sinks and window are only there while an answer names them, or between
    /// [`Model::fetch`] and the end of what it returns.
    #[must_use]
    pub fn spills(&self) -> bool {
        self.inner.spills
    }

    /// Whether only a share of the session's pages may be in host memory: what a prompt's chunk writes in all layers takes a part of that.
    #[must_use]
    pub fn is_scarce(&self) -> bool {
        self.inner.scarce
    }

    /// Rows of a page.
    #[must_use]
    pub fn page_rows(&self) -> usize {
        self.inner.geometry.pages.page_rows
    }

    /// What a row is made of.
    #[must_use]
    pub fn layout(&self) -> RowLayout {
        self.inner.geometry.layout
    }

    /// How many daemons have served this session before the one that serves it now. Answers say it of the one that gave them
    /// ([`Completion::generation`](crate::Completion)).
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.inner.rings.generation()
    }

    /// What this session has asked for, and its lane has not taken yet: an engine that does not want to wait for a daemon that stands still
    /// sees it there. It costs no system call.
    ///
    /// # Errors
    /// [`Error::Broken`] if the daemon's side of the ring cannot be.
    pub fn backlog(&self) -> Result<Backlog, Error> {
        self.inner.rings.backlog()
    }

    /// Whether there is a daemon that serves the session.
    ///
    /// # Errors
    /// [`Error::DaemonGone`], or what the daemon said at its end.
    pub fn check_served(&self) -> Result<(), Error> {
        self.inner.control.gone(Instant::now() + self.inner.control.timeout()).map_or(Ok(()), Err)
    }

    /// A counter of this session, as the daemon publishes it.
    #[must_use]
    pub fn stat(&self, stat: Stat) -> u64 {
        self.inner.rings.stat(stat)
    }

    /// Counts selections that this process made itself, by [`crate::local`], of one sequence and layer each: what the daemon's operator sees of them.
    pub fn has_selected(&self, selections: u64) {
        self.inner.rings.says(Told::SelectedHere, selections);
    }

    pub(crate) fn layer(&self, layer: usize) -> Result<u16, Error> {
        match u16::try_from(layer) {
            Ok(narrowed) if layer < self.inner.geometry.layers => Ok(narrowed),
            _ => {
                Err(Error::Size { what: "a layer's index", found: layer, wanted: self.inner.geometry.layers })
            }
        }
    }

    /// Opens an empty sequence with room for `tokens`. `method` is an index into the registered methods.
    ///
    /// # Errors
    /// [`Failure::Backpressure`](crate::Failure::Backpressure) if the arena is full.
    pub fn open(&self, method: usize, tokens: usize) -> Result<Sequence, Error> {
        self.open_selected_by(method, tokens, SelectedBy::Lane)
    }

    /// The same, and who selects its rows: with [`SelectedBy::Client`] it is not speculated (see [`crate::local`]).
    ///
    /// # Errors
    /// As for [`Self::open`]; [`Failure::BadMethod`](crate::Failure::BadMethod) where the method cannot do without the lane.
    pub fn open_selected_by(&self, method: usize, tokens: usize, by: SelectedBy) -> Result<Sequence, Error> {
        let method = u16::try_from(method).map_err(|_| Error::Size {
            what: "a method's index",
            found: method,
            wanted: u16::MAX.into(),
        })?;
        let message = ToDaemon::Open { method, tokens: narrow("tokens", tokens)?, by };
        match self.inner.control.request(&message, &self.inner.memory)? {
            ToClient::Opened { sequence, table, room } => {
                let method = Some(usize::from(method));
                Sequence::new(Arc::clone(&self.inner), (sequence, by, method), table, room, 0)
            }
            other => Err(Error::Broken(format!("{other:?} came instead of a sequence"))),
        }
    }

    /// Opens a sequence as an image has it, which stays. `method` is an index into the registered methods; without it, the sequence has
    /// that of the image. Says which one it has.
    ///
    /// # Errors
    /// [`Failure::Image`](crate::Failure::Image) if there is no such image, or it is damaged, of another model, or of a method that is not
    /// registered.
    pub fn resume(
        &self,
        image: &str,
        method: Option<usize>,
        by: SelectedBy,
    ) -> Result<(Sequence, usize), Error> {
        let narrow = |method: usize| {
            u16::try_from(method).map_err(|_| Error::Size {
                what: "a method's index",
                found: method,
                wanted: u16::MAX.into(),
            })
        };
        let method = method.map(narrow).transpose()?;
        let message = ToDaemon::Resume { image: image.to_owned(), method, by };
        match self.inner.control.request_within(&message, &self.inner.memory, IMAGE_TIMEOUT)? {
            ToClient::Resumed { sequence, table, room, tokens, method } => {
                let inner = Arc::clone(&self.inner);
                let method = usize::from(method);
                let of = (sequence, by, Some(method));
                let sequence = Sequence::new(inner, of, table, room, tokens as usize)?;
                Ok((sequence, method))
            }
            other => Err(Error::Broken(format!("{other:?} came instead of a sequence"))),
        }
    }

    /// Opens a sequence that begins with the longest published prefix of these tokens; how many tokens that are, [`Sequence::tokens`] says.
    /// At least one token is left over, so that there is something to compute.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn attach(&self, method: usize, tokens: &[u32], by: SelectedBy) -> Result<Sequence, Error> {
        let tokens = &tokens[..tokens.len().saturating_sub(1)];
        let method = u16::try_from(method).map_err(|_| Error::Size {
            what: "a method's index",
            found: method,
            wanted: u16::MAX.into(),
        })?;
        let message = ToDaemon::Attach { method, by, tokens: narrow("tokens", tokens.len())? };
        let file = token_file(tokens)?;
        match self.inner.control.request_with(&message, &self.inner.memory, file.as_ref(), IMAGE_TIMEOUT)? {
            ToClient::Resumed { sequence, table, room, tokens, .. } => {
                let inner = Arc::clone(&self.inner);
                let of = (sequence, by, Some(usize::from(method)));
                Sequence::new(inner, of, table, room, tokens as usize)
            }
            other => Err(Error::Broken(format!("{other:?} came instead of a sequence"))),
        }
    }

    /// Publishes the full pages of a sequence's first tokens, for other sequences of this user, or of every user if `shared`, to
    /// [begin with](Self::attach). `tokens` are those that the sequence was made of. Says how many tokens can be attached to now.
    ///
    /// # Errors
    /// [`Failure::NotReady`](crate::Failure::NotReady) if there is no room for published prefixes.
    pub fn publish(&self, sequence: &Sequence, tokens: &[u32], shared: bool) -> Result<usize, Error> {
        let message =
            ToDaemon::Publish { sequence: sequence.id(), tokens: narrow("tokens", tokens.len())?, shared };
        let file = token_file(tokens)?;
        match self.inner.control.request_with(&message, &self.inner.memory, file.as_ref(), IMAGE_TIMEOUT)? {
            ToClient::Published { tokens, .. } => Ok(tokens as usize),
            other => Err(Error::Broken(format!("{other:?} came instead of a word on a prefix"))),
        }
    }

    /// Gives sequences room for so many tokens each, in one call; all of them or none (of more than 1024, so many at a time).
    ///
    /// # Errors
    /// [`Failure::Backpressure`](crate::Failure::Backpressure) if the arena is full, with what would free enough.
    pub fn reserve(&self, sequences: &[(&Sequence, usize)]) -> Result<(), Error> {
        // So many that a message stays far below its largest size.
        const AT_ONCE: usize = 1024;
        for part in sequences.chunks(AT_ONCE) {
            let list = part
                .iter()
                .map(|(sequence, tokens)| Ok((sequence.id(), narrow("tokens", *tokens)?)))
                .collect::<Result<_, Error>>()?;
            let message = ToDaemon::Reserve { sequences: list };
            // Tables move, and what they leave may be another's at once: nobody looks at them until it is known where they are. In one order,
            // for others hold several, too; a list that names one twice is refused.
            let place = |at: &usize| std::ptr::from_ref(part[*at].0).addr();
            let mut order: Vec<usize> = (0..part.len()).collect();
            order.sort_unstable_by_key(place);
            order.dedup_by_key(|at| place(at));
            let hold = || order.iter().map(|at| (*at, part[*at].0.moving())).collect::<Vec<_>>();
            match self.inner.control.request_holding(&message, &self.inner.memory, hold)? {
                (mut moving, ToClient::Reserved { tables }) if tables.len() == part.len() => {
                    for (at, moving) in &mut moving {
                        let (table, room) = tables[*at];
                        moving.moved(table, room)?;
                    }
                }
                (_, other) => return Err(Error::Broken(format!("{other:?} came instead of room"))),
            }
        }
        Ok(())
    }

    /// Says that the next rows of every layer have been written: so many tokens of each sequence. Sequences are as long as the daemon
    /// has been told: those whose rows it has not been told of are as they were.
    ///
    /// # Errors
    /// [`Error::NoRoom`], in which case nothing was told. [`Error::Deadline`] if the daemon takes nothing out of the ring; of more
    /// sequences than one request may name, the first may have been told of then.
    pub fn append(&self, sequences: &[(&Sequence, usize)]) -> Result<(), Error> {
        let mut entries = Vec::with_capacity(sequences.len());
        for (sequence, count) in sequences {
            match sequence.advance(*count) {
                Ok(position) => entries.push(BatchEntry {
                    sequence: sequence.id(),
                    position: position as u32,
                    value: *count as u32,
                }),
                Err(error) => {
                    sequences[..entries.len()].iter().for_each(|(sequence, count)| sequence.retreat(*count));
                    return Err(error);
                }
            }
        }
        self.inner.rings.append(&self.inner.control, None, &entries).map_err(|(told, error)| {
            sequences[told..].iter().for_each(|(sequence, count)| sequence.retreat(*count));
            error
        })
    }

    /// Sends the statistics of a prompt's queries for one layer, `[KV heads][head dim]`; methods say what they
    /// want there.
    pub fn observe(&self, sequence: &Sequence, layer: usize, sums: &[f32]) -> Result<(), Error> {
        let wanted = self.inner.geometry.kv_heads * self.inner.geometry.head_dim;
        if sums.len() != wanted {
            return Err(Error::Size { what: "statistics of a layer (values)", found: sums.len(), wanted });
        }
        let entry = BatchEntry { sequence: sequence.id(), position: 0, value: 0 };
        let payload: &[u8] = bytemuck::cast_slice(sums);
        let observe = Observe { layer: self.layer(layer)?, payload_bytes: payload.len() as u32 };
        let rings = &self.inner.rings;
        rings.tell(&self.inner.control, Operation::Observe(observe), entry, ("statistics (bytes)", payload))
    }

    /// Sends an attention row of each KV head over the first `tokens` tokens, `[KV heads][blocks]`: the largest weight of
    /// each block of tokens and of the group's query heads, all within `[0, 1]`. `full`: of attention over all tokens,
    /// and not only over those attended.
    ///
    /// # Errors
    /// [`Error::Size`] if the rows are not of so many blocks of each KV head, or are larger than the session's `hint_bytes`;
    /// [`Error::NoFeedback`] of a method that learns from none, [`Error::NotSelected`] of a layer that is attended whole,
    /// [`Error::Weight`] of a weight that is none. Nothing has been told then.
    pub fn feedback(
        &self,
        sequence: &Sequence,
        layer: usize,
        tokens: usize,
        full: bool,
        rows: &[f32],
    ) -> Result<(), Error> {
        let heads = self.inner.geometry.kv_heads;
        if !rows.len().is_multiple_of(heads) {
            return Err(Error::Size { what: "feedback (values)", found: rows.len(), wanted: heads });
        }
        let position = narrow("tokens", tokens)?;
        let narrowed = self.layer(layer)?;
        self.inner.usage.selected(layer)?;
        self.inner.usage.feedback(sequence.method(), tokens, sequence.room().max(sequence.tokens()), rows)?;
        let entry = BatchEntry { sequence: sequence.id(), position, value: 0 };
        let payload: &[u8] = bytemuck::cast_slice(rows);
        let feedback = FeedbackRows { layer: narrowed, payload_bytes: payload.len() as u32, full };
        let rings = &self.inner.rings;
        rings.tell(&self.inner.control, Operation::Feedback(feedback), entry, ("feedback (bytes)", payload))
    }

    /// Marks the text of tokens that have room and have not been appended yet, one byte each from `first_token` on: one of
    /// [`kvoyant_methods::mark`].
    ///
    /// # Errors
    /// [`Error::NoRoom`] if the sequence has no room for them; [`Error::Size`] of tokens that have been appended, and of a mark that is none.
    pub fn mark(&self, sequence: &Sequence, first_token: usize, marks: &[u8]) -> Result<(), Error> {
        // So many that they fit into the smallest hint area.
        const AT_ONCE: usize = 64;
        let room = sequence.room();
        let end = first_token + marks.len();
        if end > room {
            return Err(Error::NoRoom { position: end, room });
        }
        Usage::marks(first_token, sequence.tokens(), marks)?;
        let at_once = (self.inner.rings.layout().limits.hint_bytes as usize).max(AT_ONCE);
        for (part, marks) in marks.chunks(at_once).enumerate() {
            let position = narrow("tokens", first_token + part * at_once)?;
            let entry = BatchEntry { sequence: sequence.id(), position, value: marks.len() as u32 };
            let mark = Operation::Mark { payload_bytes: marks.len() as u32 };
            self.inner.rings.tell(&self.inner.control, mark, entry, ("marks (bytes)", marks))?;
        }
        Ok(())
    }

    /// Asks for the rows of a layer for a whole batch. Members join and leave from one call to the next.
    ///
    /// # Errors
    /// [`Error::TooManyInFlight`] if as many answers as the ring has slots are held or under way. Of what cannot be asked, in which case
    /// nothing was: [`Error::NotSelected`] of a layer that is attended whole, [`Error::Hint`] of a member without what its method selects
    /// by, [`Error::Size`] of queries, named rows and batches of another size.
    pub fn speculate(&self, layer: usize, members: &[Member<'_>]) -> Result<Pending, Error> {
        self.speculate_block(layer, members, 1)
    }

    /// As [`Self::speculate`], and says in how long the rows are wanted: methods that [leave late rows](kvoyant_methods::Needs::leaves_late)
    /// select no more of what is not ready yet than the daemon's link is likely to bring by then.
    ///
    /// # Errors
    /// As for [`Self::speculate`].
    pub fn speculate_within(
        &self,
        layer: usize,
        members: &[Member<'_>],
        within: Duration,
    ) -> Result<Pending, Error> {
        self.ask(layer, members, 1, Asking::Rows, Some(within))
    }

    /// As [`Self::speculate`], for a block of so many query tokens of each member at once: candidates are counted for its
    /// first token, and the block itself and its window are the caller's.
    ///
    /// # Errors
    /// As for [`Self::speculate`].
    pub fn speculate_block(
        &self,
        layer: usize,
        members: &[Member<'_>],
        queries: usize,
    ) -> Result<Pending, Error> {
        self.ask(layer, members, queries, Asking::Rows, None)
    }

    /// Asks for an estimate of the rows that a layer's last answer left out, by its true query: for sequences whose method selects by a query
    /// that is known ahead, and estimates. The answer has no rows to attend to, but may have a [partial attention](crate::Answer::partial)
    /// to be merged first, of rows that the daemon's CPU has just attended.
    ///
    /// # Errors
    /// As for [`Self::speculate`].
    pub fn rest(&self, layer: usize, members: &[Member<'_>]) -> Result<Pending, Error> {
        self.ask(layer, members, 1, Asking::Rest, None)
    }

    /// Has the daemon bring all pages of a layer of these sequences' first tokens back to host memory. They stay there until the answer is
    /// dropped; it names no rows. Only needed where the model [spills](Self::spills), of any layer.
    ///
    /// # Errors
    /// As for [`Self::speculate`].
    pub fn fetch(&self, layer: usize, sequences: &[(&Sequence, usize)]) -> Result<Pending, Error> {
        let members: Vec<_> = sequences
            .iter()
            .map(|(sequence, tokens)| Member { sequence, position: *tokens, hint: Hint::None })
            .collect();
        self.ask(layer, &members, 1, Asking::Pages, None)
    }

    fn ask(
        &self,
        layer: usize,
        members: &[Member<'_>],
        queries: usize,
        asking: Asking,
        within: Option<Duration>,
    ) -> Result<Pending, Error> {
        let heads = queries * self.inner.geometry.query_heads;
        let wanted = heads * self.inner.geometry.head_dim;
        let floors = members.iter().any(|member| matches!(member.hint, Hint::Beside { .. }));
        for (values, beside) in members.iter().filter_map(|member| member.hint.values()) {
            if values != wanted {
                return Err(Error::Size { what: "a hint (values)", found: values, wanted });
            }
            let wanted = if floors { heads } else { 0 };
            if beside != wanted {
                return Err(Error::Size { what: "floors of a hint", found: beside, wanted });
            }
        }
        let queries = match narrow("query tokens", queries)? {
            queries @ 1..=QUERIES_MAX => queries,
            queries => {
                let (found, wanted) = (queries as usize, QUERIES_MAX as usize);
                return Err(Error::Size { what: "a block (query tokens)", found, wanted });
            }
        };
        let entries = members.iter().map(|member| {
            let entry =
                BatchEntry { sequence: member.sequence.id(), position: member.position as u32, value: 0 };
            (entry, member.hint.bytes())
        });
        let narrowed = self.layer(layer)?;
        let (rest, fetch) = (asking == Asking::Rest, asking == Asking::Pages);
        if !fetch {
            let usage = &self.inner.usage;
            usage.selected(layer)?;
            usage.hints(members, rest)?;
            let of = |member: &Member<'_>| (member.sequence.method(), member.position);
            usage.work(&members.iter().map(of).collect::<Vec<_>>(), queries as usize, rest)?;
        }
        let deadline_ns =
            within.map_or(0, |within| now_ns() + within.as_nanos().min(u128::from(u32::MAX)) as u64);
        let ask = Ask { layer: narrowed, queries, floors, rest, fetch, deadline_ns };
        let ticket = self.inner.rings.speculate(&self.inner.control, ask, entries)?;
        Ok(Pending::new(Arc::clone(&self.inner), ticket))
    }

    /// Closes sequences in one call. (Dropping a sequence closes it alone.)
    pub fn close(&self, sequences: Vec<Sequence>) -> Result<(), Error> {
        let list: Vec<_> = sequences.into_iter().map(Sequence::leave_open).collect();
        for part in list.chunks(1024) {
            let message = ToDaemon::Close { sequences: part.to_vec() };
            match self.inner.control.request(&message, &self.inner.memory)? {
                ToClient::Done => {}
                other => return Err(Error::Broken(format!("{other:?} came instead of an end"))),
            }
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // All device memory is closed before the daemon hears of it, so that it need not wait for this process to end. Without any this is
        // what tells a client that leaves from one that dies.
        let closed = self.memory.device().is_none() || self.memory.close_device();
        if closed && self.process == std::process::id() {
            self.control.say(&ToDaemon::Goodbye);
        }
    }
}

/// Tokens in a memfd; there is none of no tokens.
fn token_file(tokens: &[u32]) -> Result<Option<Memfd>, Error> {
    if tokens.is_empty() {
        return Ok(None);
    }
    let bytes: &[u8] = bytemuck::cast_slice(tokens);
    let file = Memfd::create("kvoyant-tokens", bytes.len())?;
    file.map(false)?.write(0, bytes)?;
    file.seal(Seals::fixed_size())?;
    Ok(Some(file))
}

/// A number as it goes over the wire.
pub(crate) fn narrow(what: &'static str, value: usize) -> Result<u32, Error> {
    u32::try_from(value).map_err(|_| Error::Size { what, found: value, wanted: u32::MAX as usize })
}
