//! A registered model: sequences, batches, speculations.

use std::sync::Arc;

use kvoyant_protocol::control::{Mode, ModelSpec, ToClient, ToDaemon};
use kvoyant_protocol::wire::{BatchEntry, Stat};

use crate::connection::Control;
use crate::error::Error;
use crate::memory::{Geometry, Memory};
use crate::ready::Pending;
use crate::rings::Rings;
use crate::sequence::Sequence;

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) control: Control,
    pub(crate) rings: Rings,
    pub(crate) memory: Memory,
    pub(crate) geometry: Geometry,
    pub(crate) spec: ModelSpec,
    pub(crate) device: String,
    pub(crate) mode: Mode,
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
    /// Position of the token that is being computed: `position` rows precede it.
    pub position: usize,
    /// The predicted query of the layer after RoPE, `[query heads][head dim]` f32; empty for methods without one.
    pub hint: &'a [f32],
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

    /// Rows of a page.
    #[must_use]
    pub fn page_rows(&self) -> usize {
        self.inner.geometry.pages.page_rows
    }

    /// A counter of this session, as the daemon publishes it.
    #[must_use]
    pub fn stat(&self, stat: Stat) -> u64 {
        self.inner.rings.stat(stat)
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
        let method = u16::try_from(method).map_err(|_| Error::Size {
            what: "a method's index",
            found: method,
            wanted: u16::MAX.into(),
        })?;
        let message = ToDaemon::Open { method, tokens: narrow("tokens", tokens)? };
        match self.inner.control.request(&message, &self.inner.memory)? {
            ToClient::Opened { sequence, table, room } => {
                Sequence::new(Arc::clone(&self.inner), sequence, table, room, 0)
            }
            other => Err(Error::Broken(format!("{other:?} came instead of a sequence"))),
        }
    }

    /// Gives sequences room for so many tokens each, in one call; all of them or none.
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
            match self.inner.control.request(&message, &self.inner.memory)? {
                ToClient::Reserved { tables } if tables.len() == part.len() => {
                    for ((sequence, _), (table, room)) in part.iter().zip(tables) {
                        sequence.moved(table, room)?;
                    }
                }
                other => return Err(Error::Broken(format!("{other:?} came instead of room"))),
            }
        }
        Ok(())
    }

    /// Says that the next rows of every layer have been written: so many tokens of each sequence.
    pub fn append(&self, sequences: &[(&Sequence, usize)]) -> Result<(), Error> {
        for (sequence, count) in sequences {
            sequence.check_room(*count)?;
        }
        let entries = sequences
            .iter()
            .map(|(sequence, count)| {
                let position = sequence.advance(*count)? as u32;
                Ok(BatchEntry { sequence: sequence.id(), position, value: *count as u32 })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        self.inner.rings.append(&self.inner.control, None, &entries)
    }

    /// Sends the statistics of a prompt's queries for one layer, `[KV heads][head dim]`; methods say what they
    /// want there.
    pub fn observe(&self, sequence: &Sequence, layer: usize, sums: &[f32]) -> Result<(), Error> {
        let wanted = self.inner.geometry.kv_heads * self.inner.geometry.head_dim;
        if sums.len() != wanted {
            return Err(Error::Size { what: "statistics of a layer (values)", found: sums.len(), wanted });
        }
        let entry = BatchEntry { sequence: sequence.id(), position: 0, value: 0 };
        self.inner.rings.observe(&self.inner.control, self.layer(layer)?, entry, sums)
    }

    /// Asks for the rows of a layer for a whole batch. Members join and leave from one call to the next.
    ///
    /// # Errors
    /// [`Error::TooManyInFlight`] if as many answers as the ring has slots are held or under way.
    pub fn speculate(&self, layer: usize, members: &[Member<'_>]) -> Result<Pending, Error> {
        let wanted = self.inner.geometry.query_heads * self.inner.geometry.head_dim;
        if let Some(member) = members.iter().find(|m| !m.hint.is_empty() && m.hint.len() != wanted) {
            return Err(Error::Size { what: "a hint (values)", found: member.hint.len(), wanted });
        }
        let entries = members.iter().map(|member| {
            let entry =
                BatchEntry { sequence: member.sequence.id(), position: member.position as u32, value: 0 };
            (entry, member.hint)
        });
        let layer = self.layer(layer)?;
        let ticket = self.inner.rings.speculate(&self.inner.control, layer, entries, 0)?;
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
        // All device memory is closed before the daemon hears of it, so that it need not wait for this process to end.
        if self.memory.close_device() {
            self.control.say(&ToDaemon::Goodbye);
        }
    }
}

/// A number as it goes over the wire.
pub(crate) fn narrow(what: &'static str, value: usize) -> Result<u32, Error> {
    u32::try_from(value).map_err(|_| Error::Size { what, found: value, wanted: u32::MAX as usize })
}
