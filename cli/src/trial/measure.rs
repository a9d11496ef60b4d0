//! One method: all questions and continuations through it.

use std::time::Duration;

use kvoyant_engine::{
    DaemonError, DaemonKv, DaemonSequence, Decoder, DenseKv, DenseSequence, ForwardError, KvBackend,
    StepStats,
};
use kvoyant_eval::tasks::{Question, Task};

use super::compare::{Agreement, LogProbs};
use super::decode::{Clock, answers, forced};
use super::plan::{Continued, Plan};
use super::prepare::{Forks, Prepared};

/// Of so many steps of a continuation one is looked at closely; its time does not count.
const MASS_EVERY: usize = 4;

/// What every row is asked and compared with.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    questions: Vec<&'a Question>,
    /// The last token of each question: a row's first step.
    last: Vec<u32>,
    /// What continuations feed, and one token more.
    truths: Vec<&'a [u32]>,
    /// What dense predicts, `[step][continuation]`.
    dense: Vec<Vec<LogProbs>>,
}

/// What one method did.
#[derive(Debug)]
pub(crate) struct Measured {
    /// Each question's task and score (0–1).
    pub(crate) scores: Vec<(Task, f64)>,
    /// The continuations, against dense.
    pub(crate) agreement: Agreement,
    /// Decoding time.
    pub(crate) clock: Clock,
    /// What it cost.
    pub(crate) costs: Costs,
}

impl Measured {
    /// Mean score of a task; none where it was not asked.
    pub(crate) fn task(&self, task: Task) -> Option<f64> {
        let scores = || self.scores.iter().filter(|(of, _)| *of == task).map(|(_, score)| score);
        let count = scores().count();
        (count > 0).then(|| scores().sum::<f64>() / count as f64)
    }
}

impl<'a> Asked<'a> {
    /// All that `plan` asks.
    pub(crate) fn new(plan: &'a Plan) -> Self {
        let all = || plan.contexts.iter().flat_map(|context| &context.questions);
        Self {
            questions: all().map(|(question, _)| question).collect(),
            last: all().map(|(_, tokens)| tokens[tokens.len() - 1]).collect(),
            truths: plan.continued.iter().flat_map(Continued::truths).collect(),
            dense: Vec::new(),
        }
    }

    /// How many questions there are.
    pub(crate) fn questions(&self) -> usize {
        self.questions.len()
    }

    /// Sequences that rows fork.
    pub(crate) fn sequences(&self) -> usize {
        self.questions.len() + self.truths.len()
    }

    /// Sequences of the largest batch.
    pub(crate) fn batch_max(&self) -> usize {
        self.questions.len().max(self.truths.len())
    }

    /// `dense`: plain attention in this process. Its predictions are what others are compared with.
    ///
    /// # Errors
    /// As [`Decoder::step`].
    pub(crate) fn dense_row(
        &mut self,
        decoder: &mut Decoder,
        kv: &mut DenseKv,
        prepared: &mut Prepared<DenseSequence>,
    ) -> Result<Measured, ForwardError<<DenseKv as KvBackend>::Error>> {
        let mut clock = Clock::default();
        let mut questions = forks(kv, &mut prepared.questions)?;
        let said = answers(decoder, kv, &mut questions, &self.questions, &self.last, &mut clock, |_, _| {})?;
        let mut texts = forks(kv, &mut prepared.texts)?;
        let mut agreement = Agreement::default();
        let predicted = &mut self.dense;
        forced(
            decoder,
            kv,
            &mut texts,
            &self.truths,
            &mut clock,
            |_, _| true,
            |_, _, logits| {
                predicted.push(logits.iter().map(|(logits, _)| LogProbs::of(logits)).collect());
                for ((_, truth), dense) in logits.iter().zip(&predicted[predicted.len() - 1]) {
                    agreement.add(dense, dense, *truth);
                }
            },
        )?;
        // Everything lies where attention reads it, and nothing is asked of a daemon.
        let everything = Costs {
            attention_mass: Some(1.0),
            kv_moved_share: 0.0,
            bytes_per_token: 0.0,
            bytes_per_token_steady: 0.0,
            feedback_bytes_per_token: 0.0,
            ahead_bytes_per_token: 0.0,
            hit_rate: None,
            stall_share: 0.0,
            resident_share: 1.0,
            selected_share: 1.0,
            select_us: None,
            cpu_share: 0.0,
            top_k_recall: None,
            output_error: Some(0.0),
            certified_missed_mass: None,
            certificate_ratio: None,
            certificate_violations: None,
        };
        Ok(Measured { scores: self.scores(&said), agreement, clock, costs: everything })
    }

    /// A row through the daemon's method number `method`. With `apart`, what the method keeps of a sequence is not left with those
    /// that were read: memories are one method's each, and those of many would add up.
    ///
    /// # Errors
    /// As [`Decoder::step`], or the daemon's own in forking.
    pub(crate) fn row_of(
        &self,
        decoder: &mut Decoder,
        kv: &mut DaemonKv,
        prepared: &mut Prepared<DaemonSequence>,
        method: usize,
        apart: bool,
    ) -> Result<Measured, ForwardError<DaemonError>> {
        kv.take_stats();
        let before_row = kv.ahead_bytes();
        let mut clock = Clock::default();
        let mut questions = forks_with(kv, &mut prepared.questions, method, apart)?;
        // What the first steps move, when nothing of their sequences is resident, and what has been brought ahead by then.
        let (mut stats, mut first) = (StepStats::default(), Moved::default());
        let said =
            answers(decoder, kv, &mut questions, &self.questions, &self.last, &mut clock, |kv, step| {
                if step == 0 {
                    stats = kv.take_stats();
                    first.add(&stats, kv.ahead_bytes() - before_row);
                }
            })?;
        kv.close(questions)?;
        stats += kv.take_stats();
        let mut waited = stats.wait;

        let mut texts = forks_with(kv, &mut prepared.texts, method, apart)?;
        let before_texts = kv.ahead_bytes();
        let mut agreement = Agreement::default();
        let measured = |step: usize| step.is_multiple_of(MASS_EVERY);
        let before = |kv: &mut DaemonKv, step| {
            kv.measure(measured(step));
            !measured(step)
        };
        forced(decoder, kv, &mut texts, &self.truths, &mut clock, before, |kv, step, logits| {
            let of_step = kv.take_stats();
            stats += of_step;
            if step == 0 {
                first.add(&of_step, kv.ahead_bytes() - before_texts);
            }
            if !measured(step) {
                waited += of_step.wait;
            }
            for ((logits, truth), dense) in logits.iter().zip(&self.dense[step]) {
                agreement.add(dense, &LogProbs::of(logits), *truth);
            }
        })?;
        kv.measure(false);
        kv.close(texts)?;
        // Closing has come after every request, so that what they brought ahead has been counted.
        let ahead = kv.ahead_bytes() - before_row;
        let mut all = Moved::default();
        all.add(&stats, ahead);
        let costs = Costs {
            bytes_per_token_steady: all.since(&first),
            ..Costs::of(kv, &stats, ahead, waited, &clock)
        };
        Ok(Measured { scores: self.scores(&said), agreement, clock, costs })
    }

    fn scores(&self, said: &[String]) -> Vec<(Task, f64)> {
        self.questions
            .iter()
            .zip(said)
            .map(|(question, said)| (question.task, question.score(said)))
            .collect()
    }
}

/// What some steps moved.
#[derive(Clone, Copy, Debug, Default)]
struct Moved {
    bytes: u64,
    tokens: u64,
}

impl Moved {
    fn add(&mut self, stats: &StepStats, ahead: u64) {
        self.bytes += stats.bytes_moved + stats.feedback_bytes + ahead;
        self.tokens += stats.tokens;
    }

    /// Bytes a token since then.
    fn since(&self, before: &Self) -> f64 {
        self.bytes.saturating_sub(before.bytes) as f64 / (self.tokens - before.tokens).max(1) as f64
    }
}

/// The columns that have to do with moving rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Costs {
    /// Share of dense's attention probability on the rows attended (0–1); mean over layers that select, heads, measured steps. None
    /// where it could not be measured: rows that were dropped for good leave no dense attention to compare with.
    pub(crate) attention_mass: Option<f64>,
    /// Bytes moved a step over the bytes of all KV held (0–1).
    pub(crate) kv_moved_share: f64,
    /// Bytes moved for each token decoded, from each sequence's first step on, when nothing is resident yet.
    pub(crate) bytes_per_token: f64,
    /// The same over all steps but the first of questions and continuations.
    pub(crate) bytes_per_token_steady: f64,
    /// Of `bytes_per_token`, keys that full attention rows for the method read beyond the rows attended.
    pub(crate) feedback_bytes_per_token: f64,
    /// Of these, what was brought ahead of the step that selected it, or recalled behind its back.
    pub(crate) ahead_bytes_per_token: f64,
    /// Share of the rows selected that were resident already (0–1); none where nothing was selected.
    pub(crate) hit_rate: Option<f64>,
    /// Share of the decoding time spent waiting for rows (0–1).
    pub(crate) stall_share: f64,
    /// Share of the rows of layers that select that are resident (0–1).
    pub(crate) resident_share: f64,
    /// Share of those rows that was selected (0–1).
    pub(crate) selected_share: f64,
    /// Microseconds to select for one layer of one sequence.
    pub(crate) select_us: Option<f64>,
    /// Share of the rows of layers that select that the CPU attended (0–1).
    pub(crate) cpu_share: f64,
    /// Share of the true top-k that was selected (0–1), where that is known.
    pub(crate) top_k_recall: Option<f64>,
    /// `‖o − o*‖ / ‖o*‖` of attention outputs, mean over the same steps as `attention_mass`.
    pub(crate) output_error: Option<f64>,
    /// Share of the attention that answers may have missed by their certificates (0–1), mean.
    pub(crate) certified_missed_mass: Option<f64>,
    /// That share over the true one, the median of query heads.
    pub(crate) certificate_ratio: Option<f64>,
    /// Certificates that the truth was outside of; none where nothing was certified.
    pub(crate) certificate_violations: Option<f64>,
}

impl Costs {
    fn of(kv: &DaemonKv, stats: &StepStats, ahead: u64, waited: Duration, clock: &Clock) -> Self {
        let shape = kv.shape();
        let selected_layers = (0..shape.layers).filter(|layer| kv.speculates(*layer)).count();
        let held_bytes = stats.context_tokens as f64 * shape.token_bytes() as f64;
        let selected_rows = stats.context_tokens as f64 * (selected_layers * shape.kv_heads) as f64;
        let moved = (stats.bytes_moved + stats.feedback_bytes + ahead) as f64;
        let tokens = stats.tokens.max(1) as f64;
        Self {
            attention_mass: stats.attention_mass(),
            kv_moved_share: moved / held_bytes.max(1.0),
            bytes_per_token: moved / tokens,
            bytes_per_token_steady: moved / tokens,
            feedback_bytes_per_token: stats.feedback_bytes as f64 / tokens,
            ahead_bytes_per_token: ahead as f64 / stats.tokens.max(1) as f64,
            hit_rate: stats.hit_rate(),
            stall_share: waited.as_secs_f64() / clock.timing.total.as_secs_f64().max(f64::MIN_POSITIVE),
            resident_share: stats.rows_resident as f64 / selected_rows.max(1.0),
            selected_share: stats.rows_selected as f64 / selected_rows.max(1.0),
            cpu_share: stats.rows_cpu as f64 / selected_rows.max(1.0),
            top_k_recall: stats.measured.top_k_recall(),
            output_error: stats.measured.output_error(),
            certified_missed_mass: stats.certified.mean(),
            certificate_ratio: stats.measured.ratios.median(),
            certificate_violations: (stats.measured.certified > 0)
                .then_some(stats.measured.violations as f64),
            // An answer is one layer of the whole batch.
            select_us: (stats.tokens > 0 && selected_layers > 0)
                .then(|| stats.select.as_secs_f64() * 1e6 / (stats.tokens as f64 * selected_layers as f64)),
        }
    }
}

fn forks<B: Forks>(kv: &mut B, of: &mut [B::Sequence]) -> Result<Vec<B::Sequence>, B::Error> {
    of.iter_mut().map(|sequence| kv.fork(sequence)).collect()
}

fn forks_with(
    kv: &mut DaemonKv,
    of: &mut [DaemonSequence],
    method: usize,
    apart: bool,
) -> Result<Vec<DaemonSequence>, DaemonError> {
    of.iter_mut()
        .map(|sequence| {
            if !apart || sequence.method() == method {
                return kv.fork(sequence, Some(method));
            }
            let mut between = kv.fork(sequence, None)?;
            let fork = kv.fork(&mut between, Some(method))?;
            kv.close(vec![between])?;
            Ok(fork)
        })
        .collect()
}
