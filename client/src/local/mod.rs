//! Selection in this process: for sequences whose rows it reads in place, without asking the daemon.
//!
//! In place nothing is moved, so a lane has one thing to do for a decode step: to scan digests. Where no core is spare for that, and where the
//! layer's true query is what rows are selected by, the engine would only wait. It can scan them itself then, with all its threads, KV head
//! by KV head: the same method over the same digests, which are built here from the session's own rows as pages fill, and belong
//! to this process. The daemon keeps the rows alone ([`SelectedBy::Client`](crate::SelectedBy)).
//!
//! | | |
//! |---|---|
//! | [`LocalMethod`] | a method, and what it is built for |
//! | [`LocalDigests`] | what it keeps of one sequence; clones share what neither of them has changed |
//! | [`Setting`] | who is to select, by what it costs |

mod cost;
mod digests;

pub use cost::{Setting, Work};
pub use digests::{HeadDigests, LocalDigests};

use kvoyant_kernels::RowLayout;
use kvoyant_methods::scratch::Join;
use kvoyant_methods::{
    HintSource, Method, Needs, NoRows, Rest, RowPart, Scratch, SelectContext, Selection, Shape,
};

use crate::Error;
use crate::Status;
use crate::sequence::Sequence;
use digests::View;

/// A method that selects in this process.
#[derive(Debug)]
pub struct LocalMethod {
    method: Box<dyn Method>,
    needs: Needs,
    shape: Shape,
    layout: RowLayout,
}

/// One request for one KV head.
#[derive(Debug, Clone, Copy)]
pub struct HeadRequest<'a> {
    /// The layer.
    pub layer: usize,
    /// The KV head.
    pub kv_head: usize,
    /// Tokens of the sequence, the one that is being computed among them.
    pub tokens: usize,
    /// The query of all heads of the layer after RoPE, `[Hq][d]`, all finite; empty where the method needs none.
    pub query: &'a [f32],
    /// What each query head gives to rows that are attended in any case, `[Hq]`, of which those of this KV head are looked at; or empty.
    pub floors: &'a [f32],
}

/// What a request for one KV head gives. Its buffers are reused.
#[derive(Debug, Default)]
pub struct HeadAnswer {
    /// The rows selected, of this head alone.
    pub selection: Selection,
    /// The estimate of all others, where the method makes one.
    pub rest: Rest,
    /// What the selection left for [`LocalMethod::steer`], of all heads of the layer.
    notes: Vec<u8>,
    sequence: Vec<u8>,
    scratch: Scratch,
}

impl LocalMethod {
    /// Whether a method's needs can be met here: digests of its own rows, and queries, one KV head after the other.
    #[must_use]
    pub fn suits(needs: &Needs) -> bool {
        let learns = needs.observe || needs.feedback.is_some() || needs.marks;
        let remembers = needs.memory || needs.drops_rows || needs.prefetch;
        let moves = needs.part != RowPart::Whole || needs.cpu_attention.is_some();
        let others = needs.rows || needs.heads_together || needs.hint == HintSource::Ids;
        !(learns || remembers || moves || others)
    }

    /// For sequences of a model of that shape and layout; `None` where the method [does not suit](Self::suits).
    #[must_use]
    pub fn new(method: Box<dyn Method>, shape: Shape, layout: RowLayout) -> Option<Self> {
        let needs = method.needs();
        Self::suits(&needs).then_some(Self { method, needs, shape, layout })
    }

    /// What the method needs.
    #[must_use]
    pub fn needs(&self) -> &Needs {
        &self.needs
    }

    /// Whether both keep the same digests.
    #[must_use]
    pub fn shares_digests(&self, other: &Self) -> bool {
        self.method.digest_key() == other.method.digest_key()
            && self.method.sequence_bytes() == other.method.sequence_bytes()
            && self.method.note_bytes() == other.method.note_bytes()
    }

    /// Bytes of digests that a token of one KV head takes.
    #[must_use]
    pub fn digest_bytes_per_row(&self) -> f64 {
        self.method.digest_bytes() as f64 / self.shape.page_rows as f64
    }

    /// Of an empty sequence. Forks of a sequence keep its seed, for methods that draw.
    #[must_use]
    pub fn digests(&self, seed: u64) -> LocalDigests {
        LocalDigests::new(&*self.method, &self.shape, seed)
    }

    /// Brings the digests of one KV head up to the sequence's first `tokens` rows, which have been written. Heads may be brought up side by
    /// side ([`LocalDigests::heads_mut`]).
    ///
    /// # Errors
    /// [`Error::NoRoom`] where the sequence has no such rows.
    pub fn digest(
        &self,
        sequence: &Sequence,
        (layer, kv_head): (usize, usize),
        head: &mut HeadDigests,
        tokens: usize,
    ) -> Result<(), Error> {
        head.build(&*self.method, (&self.shape, self.layout), sequence, (layer, kv_head), tokens)
    }

    /// Chooses rows of one KV head, and estimates the others where the method does and `whole` is set. The same rows that a lane would choose.
    ///
    /// # Errors
    /// [`Error::NotReady`] with [`Status::BadHint`], as a lane would have it, where a value of the query or a floor is no number.
    pub fn select(
        &self,
        digests: &LocalDigests,
        request: HeadRequest<'_>,
        whole: bool,
        answer: &mut HeadAnswer,
    ) -> Result<(), Error> {
        self.check(&request)?;
        let HeadAnswer { selection, rest, notes, sequence, scratch } = answer;
        selection.clear();
        rest.clear(0);
        let context = self.context(digests, request);
        let mut view = View::of_copy(digests, request.layer, (sequence, notes));
        if whole {
            self.method.select_with_rest(&context, &mut view, scratch, selection, rest);
        } else {
            self.method.select(&context, &mut view, scratch, selection);
        }
        Ok(())
    }

    /// Estimates what `attended` leaves out, by the true query. It has one head: the request's.
    ///
    /// # Errors
    /// As for [`Self::select`].
    pub fn rest(
        &self,
        digests: &LocalDigests,
        request: HeadRequest<'_>,
        attended: &Selection,
        answer: &mut HeadAnswer,
    ) -> Result<(), Error> {
        self.check(&request)?;
        let HeadAnswer { rest, notes, sequence, scratch, .. } = answer;
        let context = self.context(digests, request);
        let mut view = View::of_copy(digests, request.layer, (sequence, notes));
        self.method.rest(&context, attended, &mut view, scratch, rest);
        Ok(())
    }

    /// Keeps what a selection for a KV head left for [`Self::steer`].
    pub fn keep_note(&self, digests: &mut LocalDigests, layer: usize, kv_head: usize, note: &[u8]) {
        digests.note_mut(layer, kv_head).copy_from_slice(note);
    }

    /// Takes note of the rows that were selected in a layer, all KV heads together: after the last of them.
    pub fn steer(&self, digests: &mut LocalDigests, layer: usize, tokens: usize, selected: &Selection) {
        let context = SelectContext {
            sequence_seed: digests.seed(),
            ..SelectContext::new(&self.shape, layer, tokens, &[])
        };
        self.method.steer(&context, selected, &mut View::of(digests, layer));
    }

    /// What a lane checks of a hint: sizes, and that values are numbers.
    fn check(&self, request: &HeadRequest<'_>) -> Result<(), Error> {
        let Shape { query_heads, head_dim: d, .. } = self.shape;
        let group = self.shape.group();
        let wanted = if self.needs.hint == HintSource::None { request.query.len() } else { query_heads * d };
        for (what, found, wanted) in [
            ("a hint (values)", request.query.len(), wanted),
            (
                "floors of a hint",
                request.floors.len(),
                if request.floors.is_empty() { 0 } else { query_heads },
            ),
        ] {
            if found != wanted {
                return Err(Error::Size { what, found, wanted });
            }
        }
        let own = |values: &[f32], each: usize, holds: fn(&f32) -> bool| {
            let first = request.kv_head * group * each;
            values.get(first..first + group * each).is_none_or(|values| values.iter().all(holds))
        };
        let finite = own(request.query, d, |value| value.is_finite());
        if finite && own(request.floors, 1, |floor| !floor.is_nan() && *floor < f32::INFINITY) {
            return Ok(());
        }
        Err(Error::NotReady { layer: request.layer as u16, status: Status::BadHint })
    }

    fn context<'a>(&self, digests: &LocalDigests, request: HeadRequest<'a>) -> SelectContext<'a> {
        SelectContext {
            layer: request.layer,
            heads: request.kv_head..request.kv_head + 1,
            tokens: request.tokens,
            queries: 1,
            hint: request.query,
            floors: request.floors,
            ids: &[],
            sequence_seed: digests.seed(),
            step: request.tokens as u64,
            rows: &NoRows,
            in_time: None,
        }
    }
}

impl HeadAnswer {
    /// Nothing yet; `join` shares long scans with a thread that has nothing else to do.
    #[must_use]
    pub fn with_help(join: Join) -> Self {
        Self { scratch: Scratch::with_help(join), ..Self::default() }
    }

    /// Takes a selection that was made before.
    pub fn set(&mut self, selection: &Selection) {
        self.selection.clone_from(selection);
        self.rest.clear(0);
    }

    /// What the last selection left, of its own KV head, to be [kept](LocalMethod::keep_note).
    #[must_use]
    pub fn note(&self, method: &LocalMethod, kv_head: usize) -> &[u8] {
        let bytes = method.method.note_bytes();
        self.notes.get(kv_head * bytes..(kv_head + 1) * bytes).unwrap_or(&[])
    }
}
