//! A sequence: rows are written straight into its pages, and can be read there whatever the daemon does.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvoyant_kernels::{RowLayout, Run};
use kvoyant_protocol::control::{NO_PAGE, PageWord, SelectedBy, TableRef, ToClient, ToDaemon};
use kvoyant_protocol::memory::SharedMapping;
use kvoyant_protocol::wire::SequenceId;

use crate::error::Error;
use crate::memory::Geometry;
use crate::model::{IMAGE_TIMEOUT, Inner};

/// How long dropping a sequence waits for a daemon that does not answer.
const DROP_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct State {
    table: TableRef,
    map: Arc<SharedMapping>,
    /// Which daemon's that is, by [`Memory::daemons`](crate::memory::Memory::daemons).
    daemon: u64,
    room: usize,
    tokens: usize,
}

/// An open sequence. Dropping it closes it.
#[derive(Debug)]
pub struct Sequence {
    inner: Arc<Inner>,
    id: SequenceId,
    by: SelectedBy,
    /// Its method, among those registered, if that is known here.
    method: Option<usize>,
    state: Mutex<State>,
    /// Set once rows were left out that are not gone for good.
    missed: AtomicBool,
    open: bool,
}

/// A sequence whose table may move meanwhile.
pub(crate) struct Moving<'a> {
    inner: &'a Inner,
    state: MutexGuard<'a, State>,
}

impl Moving<'_> {
    /// It has moved.
    pub(crate) fn moved(&mut self, table: TableRef, room: u32) -> Result<(), Error> {
        let (daemon, map) = (self.inner.memory.daemons(), self.inner.memory.table(table.file)?);
        check_table(self.inner, &table, &map)?;
        let state = &mut *self.state;
        (state.table, state.map, state.daemon, state.room) = (table, map, daemon, room as usize);
        Ok(())
    }
}

impl Sequence {
    pub(crate) fn new(
        inner: Arc<Inner>,
        (id, by, method): (SequenceId, SelectedBy, Option<usize>),
        table: TableRef,
        room: u32,
        tokens: usize,
    ) -> Result<Self, Error> {
        let (daemon, map) = (inner.memory.daemons(), inner.memory.table(table.file)?);
        check_table(&inner, &table, &map)?;
        let state = Mutex::new(State { table, map, daemon, room: room as usize, tokens });
        Ok(Self { inner, id, by, method, state, missed: AtomicBool::new(false), open: true })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let daemon = self.inner.memory.daemons();
        if state.daemon != daemon
            && let Ok(map) = self.inner.memory.table(state.table.file)
            && check_table(&self.inner, &state.table, &map).is_ok()
        {
            // Another daemon has made it anew, in the same place.
            (state.map, state.daemon) = (map, daemon);
        }
        state
    }

    /// Its handle, as the daemon names it.
    #[must_use]
    pub fn id(&self) -> SequenceId {
        self.id
    }

    /// Who selects its rows.
    #[must_use]
    pub fn selected_by(&self) -> SelectedBy {
        self.by
    }

    /// Its method, among those registered.
    pub(crate) fn method(&self) -> Option<usize> {
        self.method
    }

    /// Tokens appended so far.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.state().tokens
    }

    /// Tokens that it has room for.
    #[must_use]
    pub fn room(&self) -> usize {
        self.state().room
    }

    /// Has whoever reads or writes its rows wait, for its table may move.
    pub(crate) fn moving(&self) -> Moving<'_> {
        Moving { inner: &self.inner, state: self.state() }
    }

    /// Counts appended tokens; returns the position of the first of them.
    pub(crate) fn advance(&self, count: usize) -> Result<usize, Error> {
        let mut state = self.state();
        let position = state.tokens;
        if position + count > state.room {
            return Err(Error::NoRoom { position: position + count, room: state.room });
        }
        state.tokens += count;
        Ok(position)
    }

    /// Takes back what [`Sequence::advance`] counted and the daemon was not told of.
    pub(crate) fn retreat(&self, count: usize) {
        let mut state = self.state();
        state.tokens = state.tokens.saturating_sub(count);
    }

    /// What the page table says of a token.
    fn word(&self, state: &State, layer: usize, kv_head: usize, token: usize) -> PageWord {
        let geometry = &self.inner.geometry;
        let capacity = state.table.capacity as usize;
        let page = token / geometry.pages.page_rows;
        if page >= capacity || layer >= geometry.layers || kv_head >= geometry.kv_heads {
            return PageWord::None;
        }
        let word = (layer * geometry.kv_heads + kv_head) * capacity + page;
        PageWord::of(state.map.load_u32(state.table.offset as usize + word * 4))
    }

    /// Row locator of a token, if its page is there.
    fn locate(&self, state: &State, layer: usize, kv_head: usize, token: usize) -> Result<u32, Error> {
        let page_rows = self.inner.geometry.pages.page_rows;
        match self.word(state, layer, kv_head, token) {
            PageWord::Page(page) => {
                Ok(page.wrapping_mul(page_rows as u32).wrapping_add((token % page_rows) as u32))
            }
            PageWord::None => Err(Error::NoRoom { position: token, room: state.room }),
            PageWord::Spilled => Err(Error::Spilled { layer, token }),
            PageWord::Lost => Err(Error::Lost { token }),
        }
    }

    /// The first token of which some layer's rows are lost.
    #[must_use]
    pub fn first_lost(&self) -> Option<usize> {
        if !self.inner.spills {
            // Rows are lost on disks alone.
            return None;
        }
        let state = self.state();
        let Geometry { layers, kv_heads, pages, .. } = self.inner.geometry;
        let each = (0..layers).flat_map(|layer| (0..kv_heads).map(move |head| (layer, head)));
        let lost = |token: &usize| {
            each.clone().any(|(layer, head)| self.word(&state, layer, head, *token) == PageWord::Lost)
        };
        (0..state.tokens).step_by(pages.page_rows).find(lost)
    }

    /// Whether rows were left out, since this was last asked, that are not gone for good: they lie on disk and were not
    /// [fetched](crate::Model::fetch), or are lost. What was attended without them is not what was asked for.
    pub fn take_missed(&self) -> bool {
        self.missed.swap(false, Ordering::Relaxed)
    }

    /// Copies the page table out, `[layer][KV head][capacity]`, with [`NO_PAGE`] where it ends earlier.
    pub(crate) fn copy_pages(&self, capacity: usize, into: &mut [u32]) {
        let state = self.state();
        let have = state.table.capacity as usize;
        for (head, pages) in into.chunks_exact_mut(capacity).enumerate() {
            for (page, word) in pages.iter_mut().enumerate() {
                let at = state.table.offset as usize + (head * have + page) * 4;
                *word = if page < have { state.map.load_u32(at) } else { NO_PAGE };
            }
        }
    }

    /// Writes rows of one layer and KV head, in the model's format ([`Model::layout`](crate::Model::layout)), from a
    /// position on. They count once they are appended.
    ///
    /// # Errors
    /// [`Error::NoRoom`] if the positions are beyond what was reserved.
    pub fn write_rows(
        &self,
        layer: usize,
        kv_head: usize,
        position: usize,
        rows: &[u8],
    ) -> Result<(), Error> {
        let row_bytes = self.inner.geometry.row_bytes();
        if !rows.len().is_multiple_of(row_bytes) {
            return Err(Error::Size { what: "rows (bytes)", found: rows.len(), wanted: row_bytes });
        }
        let state = self.state();
        let (count, page_rows) = (rows.len() / row_bytes, self.inner.geometry.pages.page_rows);
        if position < state.tokens || position + count > state.room {
            return Err(Error::NoRoom { position: position + count, room: state.room });
        }
        let mut at = 0;
        while at < count {
            let token = position + at;
            let part = (count - at).min(page_rows - token % page_rows);
            let row = self.locate(&state, layer, kv_head, token)?;
            self.inner.memory.write(row, &rows[at * row_bytes..(at + part) * row_bytes])?;
            at += part;
        }
        Ok(())
    }

    /// Writes one token's K and V of one layer, `[KV heads][head dim]` f32 each, in the model's format. A latent's value is
    /// a part of its key, so that `values` is empty.
    pub fn write(&self, layer: usize, position: usize, keys: &[f32], values: &[f32]) -> Result<(), Error> {
        let geometry = self.inner.geometry;
        let (heads, d, layout) = (geometry.kv_heads, geometry.head_dim, geometry.layout);
        let width = match layout {
            RowLayout::KeyValue { d, .. } => d,
            RowLayout::Latent { .. } => 0,
        };
        for (what, found, wanted) in
            [("keys (values)", keys.len(), heads * d), ("values", values.len(), heads * width)]
        {
            if found != wanted {
                return Err(Error::Size { what, found, wanted });
            }
        }
        let mut row = vec![0; geometry.row_bytes()];
        for (kv_head, key) in keys.chunks_exact(d).enumerate() {
            layout.encode(key, &values[kv_head * width..][..width], &mut row);
            self.write_rows(layer, kv_head, position, &row)?;
        }
        Ok(())
    }

    /// Reads keys `[tokens][head dim]` and values `[tokens][values of a row]` of one layer and KV head out of the session's
    /// own extents, as the model's format has kept them.
    ///
    /// # Errors
    /// [`Error::NoRoom`] where the sequence has no page; [`Error::Spilled`] and [`Error::Lost`] where it is not in host memory.
    pub fn read(
        &self,
        layer: usize,
        kv_head: usize,
        tokens: Range<usize>,
        keys: &mut [f32],
        values: &mut [f32],
    ) -> Result<(), Error> {
        let geometry = self.inner.geometry;
        let (count, layout) = (tokens.len(), geometry.layout);
        for (what, found, wanted) in [
            ("keys (values)", keys.len(), count * layout.key_values()),
            ("values", values.len(), count * layout.value_values()),
        ] {
            if found != wanted {
                return Err(Error::Size { what, found, wanted });
            }
        }
        let mut rows = vec![0; count * geometry.row_bytes()];
        self.read_rows(layer, kv_head, tokens, &mut rows)?;
        layout.decode_keys(&rows, keys);
        layout.decode_values(&rows, values);
        Ok(())
    }

    /// Runs of rows in the session's own extents: what this process can always read itself. Tokens that the daemon
    /// no longer keeps (a method's pool may drop some) are left out. So are those on disk, of which [`Sequence::take_missed`] tells.
    ///
    /// The runs are valid until the sequence is truncated, closed or written to there.
    pub fn local_runs(&self, layer: usize, kv_head: usize, tokens: Range<usize>, runs: &mut Vec<Run>) {
        self.local_runs_of(layer, kv_head, std::iter::once(tokens), runs);
    }

    /// The same of many ranges, which costs less than asking for each.
    pub fn local_runs_of(
        &self,
        layer: usize,
        kv_head: usize,
        ranges: impl IntoIterator<Item = Range<usize>>,
        runs: &mut Vec<Run>,
    ) {
        let row_bytes = self.inner.geometry.row_bytes();
        // In this order everywhere: forks add memory while they hold the state.
        let state = self.state();
        let addresses = self.inner.memory.addresses();
        // What is there already may be of another head.
        let first = runs.len();
        self.each_part(&state, layer, kv_head, ranges, |row, count| {
            let Ok(address) = addresses.of(row, count) else { return };
            match runs[first..].last_mut() {
                Some(last) if last.rows_ptr.wrapping_add(last.rows * row_bytes) == address => {
                    last.rows += count as usize;
                }
                _ => runs.push(Run { rows_ptr: address, rows: count as usize }),
            }
        });
    }

    /// The same for kernels on the session's device, as addresses and row counts: they read these rows over the
    /// device's link.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if the daemon's device is no GPU.
    pub fn local_device_runs(
        &self,
        layer: usize,
        kv_head: usize,
        tokens: Range<usize>,
        runs: &mut Vec<(u64, u32)>,
    ) -> Result<(), Error> {
        let row_bytes = self.inner.geometry.row_bytes() as u64;
        // What is there already belongs to another head.
        let first = runs.len();
        let mut failed = Ok(());
        self.each_part(&self.state(), layer, kv_head, [tokens], |row, count| {
            match self.inner.memory.device_address(row, count, false) {
                Err(error) => failed = Err(error),
                Ok(address) => match runs[first..].last_mut() {
                    Some((last, rows)) if *last + u64::from(*rows) * row_bytes == address => *rows += count,
                    _ => runs.push((address, count)),
                },
            }
        });
        failed
    }

    /// Calls `take` with the locator of the first row and the number of rows of each page's part of these tokens.
    fn each_part(
        &self,
        state: &State,
        layer: usize,
        kv_head: usize,
        ranges: impl IntoIterator<Item = Range<usize>>,
        mut take: impl FnMut(u32, u32),
    ) {
        let page_rows = self.inner.geometry.pages.page_rows;
        for tokens in ranges {
            let mut token = tokens.start;
            while token < tokens.end {
                let count = (tokens.end - token).min(page_rows - token % page_rows);
                match self.locate(state, layer, kv_head, token) {
                    Ok(row) => take(row, count as u32),
                    Err(Error::NoRoom { .. }) => {}
                    Err(_) => self.missed.store(true, Ordering::Relaxed),
                }
                token += count;
            }
        }
    }

    /// Copies rows of the session's own extents out, in the storage type: `[tokens][2 · head dim]`, K then V.
    ///
    /// # Errors
    /// [`Error::NoRoom`] where the sequence has no page; [`Error::Spilled`] and [`Error::Lost`] where it is not in host memory.
    pub fn read_rows(
        &self,
        layer: usize,
        kv_head: usize,
        tokens: Range<usize>,
        rows: &mut [u8],
    ) -> Result<(), Error> {
        let state = self.state();
        let (page_rows, row_bytes) = (self.inner.geometry.pages.page_rows, self.inner.geometry.row_bytes());
        if rows.len() != tokens.len() * row_bytes {
            return Err(Error::Size {
                what: "rows (bytes)",
                found: rows.len(),
                wanted: tokens.len() * row_bytes,
            });
        }
        let mut at = 0;
        while at < tokens.len() {
            let token = tokens.start + at;
            let part = (tokens.len() - at).min(page_rows - token % page_rows);
            let row = self.locate(&state, layer, kv_head, token)?;
            self.inner.memory.read(row, &mut rows[at * row_bytes..(at + part) * row_bytes])?;
            // A page that left meanwhile may have made room for another one.
            if self.locate(&state, layer, kv_head, token)? != row {
                return Err(Error::Spilled { layer, token });
            }
            at += part;
        }
        Ok(())
    }

    /// Opens a copy of this sequence, perhaps with another method. Pages are shared until one of the two writes,
    /// so both must reserve before they do.
    pub fn fork(&self, method: Option<usize>) -> Result<Self, Error> {
        self.fork_selected_by(method, self.by)
    }

    /// The same, and who selects the copy's rows.
    ///
    /// # Errors
    /// [`Failure::BadMethod`](crate::Failure::BadMethod) where the method cannot do without the lane.
    pub fn fork_selected_by(&self, method: Option<usize>, by: SelectedBy) -> Result<Self, Error> {
        let narrow = |method| {
            u16::try_from(method).map_err(|_| Error::Size {
                what: "a method's index",
                found: method,
                wanted: usize::from(u16::MAX),
            })
        };
        let method = method.map(narrow).transpose()?;
        let message = ToDaemon::Fork { parent: self.id, method, by };
        match self.inner.control.request_holding(&message, &self.inner.memory, || self.state())? {
            (mut state, ToClient::Opened { sequence, table, room }) => {
                state.room = state.tokens;
                let tokens = state.tokens;
                drop(state);
                let method = method.map_or(self.method, |method| Some(usize::from(method)));
                Self::new(Arc::clone(&self.inner), (sequence, by, method), table, room, tokens)
            }
            (_, other) => Err(Error::Broken(format!("{other:?} came instead of a fork"))),
        }
    }

    /// Drops every row from this token on.
    pub fn truncate(&self, tokens: usize) -> Result<(), Error> {
        let message =
            ToDaemon::Truncate { sequence: self.id, tokens: crate::model::narrow("tokens", tokens)? };
        match self.inner.control.request_holding(&message, &self.inner.memory, || self.state())? {
            (mut state, ToClient::Done) => {
                state.tokens = state.tokens.min(tokens);
                state.room = state.tokens;
                Ok(())
            }
            (_, other) => Err(Error::Broken(format!("{other:?} came instead of an end"))),
        }
    }

    /// Writes it to an image that outlives the daemon, and closes it: see [`Model::resume`](crate::Model::resume). `label` helps to tell
    /// it from others in lists. If that fails, the sequence is still open, and comes back with the error.
    ///
    /// # Errors
    /// [`Failure::Image`](crate::Failure::Image) if the daemon keeps no images, has one of that name (unless `overwrite`), or cannot write it.
    #[allow(clippy::result_large_err, reason = "what could not be suspended goes back to its owner")]
    pub fn suspend(mut self, image: &str, overwrite: bool, label: &str) -> Result<(), (Self, Error)> {
        let message = ToDaemon::Suspend {
            sequence: self.id,
            image: image.to_owned(),
            overwrite,
            label: label.to_owned(),
        };
        let asked = self.inner.control.request_within(&message, &self.inner.memory, IMAGE_TIMEOUT);
        match asked {
            Ok(ToClient::Done) => {
                self.open = false;
                Ok(())
            }
            Ok(other) => Err((self, Error::Broken(format!("{other:?} came instead of an end")))),
            Err(error) => Err((self, error)),
        }
    }

    /// Closes it and says whether that went well.
    pub fn close(mut self) -> Result<(), Error> {
        self.close_now(None)
    }

    pub(crate) fn leave_open(mut self) -> SequenceId {
        self.open = false;
        self.id
    }

    fn close_now(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        if !std::mem::replace(&mut self.open, false) {
            return Ok(());
        }
        let message = ToDaemon::Close { sequences: vec![self.id] };
        let answer = match timeout {
            None => self.inner.control.request(&message, &self.inner.memory),
            Some(timeout) => self.inner.control.request_within(&message, &self.inner.memory, timeout),
        };
        match answer? {
            ToClient::Done => Ok(()),
            other => Err(Error::Broken(format!("{other:?} came instead of an end"))),
        }
    }
}

fn check_table(inner: &Inner, table: &TableRef, map: &SharedMapping) -> Result<(), Error> {
    let heads = inner.geometry.layers * inner.geometry.kv_heads;
    let bytes = heads * table.capacity as usize * 4;
    if table.offset.is_multiple_of(4) {
        map.address(table.offset as usize, bytes)?;
        return Ok(());
    }
    Err(Error::Broken(format!("a page table at odd offset {}", table.offset)))
}

impl Drop for Sequence {
    fn drop(&mut self) {
        // In a forked child it is the parent's.
        if self.inner.process != std::process::id() {
            return;
        }
        // A daemon that is gone has closed it already, and there is nobody to tell.
        let _ = self.close_now(Some(DROP_TIMEOUT));
    }
}
