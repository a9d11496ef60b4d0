//! What a method asks of the engine and the daemon. They provide just that, and nothing for methods that ask for
//! nothing.

use crate::artifact::ArtifactKind;

/// Which query a selection is made by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum HintSource {
    /// None: the method needs no query.
    #[default]
    None,
    /// Layer i's query as predicted from layer i−1's input (InfiniGen): known one layer ahead.
    Ahead,
    /// The true query of this layer one step ago: known one step ahead.
    Previous,
    /// The true query of this layer and step: known when the layer is about to attend, so that nothing hides the
    /// selection.
    Current,
    /// None either: the engine names the rows itself ([`crate::SelectContext::ids`]).
    Ids,
}

impl HintSource {
    /// Words of the option `hint` of methods that let the user choose.
    pub(crate) const QUERIES: &'static [(&'static str, Self)] =
        &[("ahead", Self::Ahead), ("previous", Self::Previous), ("current", Self::Current)];

    /// Whether a query `[Hq][d]` comes with each request.
    #[must_use]
    pub fn is_query(self) -> bool {
        matches!(self, Self::Ahead | Self::Previous | Self::Current)
    }
}

/// Attention rows that a method learns from: after every step, and for the last tokens of a prompt, the engine sends for
/// every KV head the softmaxed attention over the tokens, the largest of the group's query heads, max-pooled in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feedback {
    /// Tokens of a block, from the sequence's first token on.
    pub block: usize,
    /// How many of a prompt's last tokens are reported when the prompt is complete.
    pub prompt_rows: usize,
    /// Every so many steps the row is of full attention, over all tokens and not only over those attended; 0: never.
    pub calibrate_every: usize,
}

/// Selected rows that are not on the device are attended by the daemon's CPU instead of being moved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CpuAttention {
    /// The share of a selection above which they are fetched after all, for the steps to come.
    pub recall_above: f32,
    /// They are also fetched every so many steps; 0: never for that reason.
    pub recall_every: u64,
}

/// Which part of a row has to be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RowPart {
    /// K and V.
    #[default]
    Whole,
    /// V alone: the engine rebuilds K itself.
    Values,
}

/// What a method wants from the engine and the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Needs {
    /// Which query comes with each request.
    pub hint: HintSource,
    /// Prefill statistics, once per layer and KV head, before keys are digested ([`crate::Method::observe`]).
    pub observe: bool,
    /// A calibrated artifact when it is built.
    pub artifact: Option<ArtifactKind>,
    /// Digest blocks and [`crate::Method::on_append`].
    pub digest: bool,
    /// Memory per layer and KV head that selections may change ([`crate::Method::memory_bytes`]).
    pub memory: bool,
    /// Its memory is a pool that drops rows for good ([`crate::Method::on_admit`], [`crate::Method::on_selected`]).
    pub drops_rows: bool,
    /// Values beside the keys in [`crate::Append`].
    pub values: bool,
    /// Rows come to [`crate::Method::on_append`] in whole groups of so many of a page's, once those are full; 0: as they are appended. It divides
    /// a page's rows.
    pub sealed_rows: usize,
    /// What the query gives to rows that are attended in any case ([`crate::SelectContext::floors`]).
    pub floors: bool,
    /// [`crate::Method::rest`] by the true query of each decode step, with or after the selection.
    pub rest: bool,
    /// All rows of a selected layer that are resident are attended, not only those selected.
    pub attend_resident: bool,
    /// Selections leave out rows that would come too late ([`crate::SelectContext::in_time`]).
    pub leaves_late: bool,
    /// Selections look at which rows are resident ([`crate::SelectContext::in_time`]), whether time is limited or not.
    pub sees_resident: bool,
    /// Keys of the rows themselves while it selects ([`crate::RowSource`]).
    pub rows: bool,
    /// Which rows of a KV head are selected depends on the others of its layer: it cannot be asked for one head after the other.
    pub heads_together: bool,
    /// Attention rows ([`crate::Method::on_feedback`]).
    pub feedback: Option<Feedback>,
    /// Marks of the tokens' text ([`crate::Append::marks`]).
    pub marks: bool,
    /// [`crate::Method::prefetch`] after each answer.
    pub prefetch: bool,
    /// Rows that are not resident are attended on the CPU.
    pub cpu_attention: Option<CpuAttention>,
    /// What is moved of a selected row.
    pub part: RowPart,
}

impl Needs {
    /// Of the first `tokens` rows of a sequence, how many can have been digested.
    #[must_use]
    pub fn digestible(&self, tokens: usize) -> usize {
        match self.sealed_rows {
            0 => tokens,
            rows => tokens / rows * rows,
        }
    }
}

/// Marks of a token's text, for methods that cut at boundaries of meaning. A mark says how strong the boundary *after*
/// the token is.
pub mod mark {
    /// No boundary.
    pub const NONE: u8 = 0;
    /// Between words.
    pub const WORD: u8 = 1;
    /// After a comma, a colon, a semicolon or a bracket.
    pub const CLAUSE: u8 = 2;
    /// After a sentence.
    pub const SENTENCE: u8 = 3;
    /// After a line or a paragraph.
    pub const LINE: u8 = 4;
}
