//! Two or three sentences under the table: what was read, and what the answers cost.

use kvoyant_engine::DaemonKv;
use serde::{Deserialize, Serialize};

use super::report::Row;
use crate::trial::plan::Size;

/// Columns of a line: as wide as the table.
const WIDTH: usize = 110;

/// What the sentences need to know besides the rows.
#[derive(Clone, Debug)]
pub(crate) struct Effort {
    /// Texts that were read.
    pub(crate) texts: usize,
    /// Tokens of each.
    pub(crate) context: usize,
    /// Seconds that reading took.
    pub(crate) prefill_seconds: f64,
    /// Tokens read.
    pub(crate) prefill_tokens: usize,
    /// Questions asked of every row.
    pub(crate) questions: usize,
    /// The weights are random.
    pub(crate) tiny: bool,
    /// The GPU that attention ran on, if it was one.
    pub(crate) device: Option<String>,
    /// What was on disk, if anything could be.
    pub(crate) spilled: Option<Spilled>,
}

/// Where pages were that did not fit into host memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spilled {
    /// Most bytes of KV that were in host memory at a time, over the bytes of all KV once everything was read.
    pub(crate) host_share: f64,
    /// The part that was asked for.
    pub(crate) host_budget: f64,
    /// Bytes written to disk.
    pub(crate) written_bytes: u64,
    /// Bytes read back.
    pub(crate) read_bytes: u64,
    /// Pages that could not be read back whole.
    pub(crate) lost_pages: u64,
}

impl Spilled {
    /// What a session says, if its pages could leave host memory.
    pub(crate) fn of(kv: &DaemonKv, host_budget: Option<f64>) -> Option<Self> {
        let paged = kv.paged()?;
        Some(Self {
            host_share: paged.peak_bytes as f64 / paged.most_bytes.max(1) as f64,
            host_budget: host_budget? / 100.0,
            written_bytes: paged.written_bytes,
            read_bytes: paged.read_bytes,
            lost_pages: paged.lost_pages,
        })
    }
}

/// The sentences, each on lines of its own.
pub(crate) fn lines(rows: &[Row], effort: &Effort) -> String {
    sentences(rows, effort).iter().map(|sentence| wrap(sentence)).collect()
}

/// Lines of at most [`WIDTH`] columns, broken at spaces.
fn wrap(sentence: &str) -> String {
    let mut out = String::new();
    let mut width = 0;
    for word in sentence.split(' ') {
        let length = word.chars().count();
        if width > 0 && width + 1 + length > WIDTH {
            out.push('\n');
            width = 0;
        } else if width > 0 {
            out.push(' ');
            width += 1;
        }
        out.push_str(word);
        width += length;
    }
    out.push('\n');
    out
}

fn sentences(rows: &[Row], effort: &Effort) -> Vec<String> {
    let mut all = Vec::new();
    if effort.tiny {
        all.push(
            "This model's weights are random: its answers and its perplexity mean nothing. Agreement with dense, \
             bytes and times are real."
                .to_owned(),
        );
    }
    all.push(format!(
        "{} texts of {} tokens were read once ({} tokens in {:.0} s); {} questions and {} rows forked that cache \
         instead of reading it again.",
        effort.texts,
        effort.context,
        effort.prefill_tokens,
        effort.prefill_seconds,
        effort.questions,
        rows.len(),
    ));
    if let Some(spilled) = &effort.spilled {
        all.push(format!(
            "At most {:.1} % of the KV was in host memory at a time, for {:.0} % asked for; {:.2} GB went to disk and {:.2} GB came back, \
             {} pages were lost.",
            spilled.host_share * 100.0,
            spilled.host_budget * 100.0,
            spilled.written_bytes as f64 / 1e9,
            spilled.read_bytes as f64 / 1e9,
            spilled.lost_pages,
        ));
    }
    if let Some(device) = &effort.device {
        all.push(format!(
            "Attention ran on {device}, all but dense's; linear layers ran on the CPU, so times are not a GPU's."
        ));
    }
    if rows.iter().any(|row| row.certified_missed_mass.is_some()) {
        all.push(
            "Missed up to: what certificates bound of each layer's attention, for its own queries, keys and values; it \
             says nothing about the text."
                .to_owned(),
        );
    }
    let find = |method: &str| {
        rows.iter()
            .filter(|row| row.method == method)
            .max_by(|a, b| a.budget.partial_cmp(&b.budget).unwrap_or(std::cmp::Ordering::Equal))
    };
    let least = |method: &str| {
        rows.iter()
            .filter(|row| row.method == method)
            .min_by(|a, b| a.budget.partial_cmp(&b.budget).unwrap_or(std::cmp::Ordering::Equal))
    };
    if let (Some(kvoyant), Some(infinigen)) = (least("kvoyant"), find("infinigen"))
        && let (Some(few), Some(many)) = (kvoyant.budget, infinigen.budget)
    {
        all.push(format!(
            "kvoyant attends to all rows that are there, estimates the others, and adds those that its prediction missed: at {:.0} % it is \
             {:.4} nats from dense, infinigen at {:.0} % {:.4}.",
            few * 100.0,
            kvoyant.kl_to_dense,
            many * 100.0,
            infinigen.kl_to_dense,
        ));
    }
    if let (Some(full), Some(infinigen)) = (find("full"), find("infinigen"))
        && let (Some(budget), Some(mass)) = (infinigen.budget, infinigen.attention_mass)
    {
        all.push(format!(
            "Reading {:.0} % of the rows beside sinks and window, infinigen covered {:.0} % of the attention and gave \
             dense's next token in {:.0} % of cases, for {} MB a token where full moved {}.",
            budget * 100.0,
            mass * 100.0,
            infinigen.tokens_equal_dense * 100.0,
            megabytes(infinigen.bytes_per_token),
            megabytes(full.bytes_per_token),
        ));
    }
    if let (Some(dense), Some(random), false) = (find("dense"), find("random"), effort.tiny)
        && let Some(budget) = random.budget
    {
        all.push(format!(
            "As many random rows ({:.0} %) answered {} of the {} questions that dense answered: which rows are read \
             decides, not how many.",
            budget * 100.0,
            right(random, effort.questions),
            right(dense, effort.questions),
        ));
    }
    all
}

/// Questions that a row answered right; both tasks have equally many.
fn right(row: &Row, questions: usize) -> usize {
    let each = questions as f64 / Size::DEMO_TASKS.len() as f64;
    row.tasks.values().map(|accuracy| (accuracy * each).round() as usize).sum()
}

fn megabytes(bytes: f64) -> String {
    format!("{:.1}", bytes / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapped_sentences_keep_their_words_and_fit() {
        let sentence = "word ".repeat(100);
        let wrapped = wrap(sentence.trim());
        assert!(wrapped.lines().all(|line| line.len() <= WIDTH && !line.ends_with(' ')), "{wrapped}");
        assert_eq!(wrapped.split_whitespace().count(), 100);
    }
}
