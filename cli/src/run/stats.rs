//! `--stats`: where each token's time went, on stderr.

use std::io::Write;
use std::time::{Duration, Instant};

use kvoyant_engine::{Generated, Paged, StepStats, StepTiming, StopReason};
use kvoyant_methods::MethodSpec;

/// The times of one answer.
#[derive(Debug)]
pub(crate) struct Times {
    begun: Instant,
    prompt_tokens: usize,
    prefill: Duration,
    /// One for each decode step.
    steps: Vec<StepTiming>,
}

impl Times {
    /// From now on, for a prompt of that many tokens.
    pub(crate) fn new(prompt_tokens: usize) -> Self {
        Self { begun: Instant::now(), prompt_tokens, prefill: Duration::ZERO, steps: Vec::new() }
    }

    /// The prompt is read.
    pub(crate) fn read(&mut self) {
        self.prefill = self.begun.elapsed();
    }

    /// A token came; the first is the prefill's and has no step.
    pub(crate) fn token(&mut self, timing: StepTiming) {
        if timing != StepTiming::default() && self.steps.last() != Some(&timing) {
            self.steps.push(timing);
        }
    }
}

/// The answer for programs, with the times in seconds.
pub(crate) fn json(made: &Generated, times: &Times) -> serde_json::Value {
    let stop = match made.stop {
        StopReason::End => "end",
        StopReason::MaxTokens => "max_tokens",
        StopReason::ContextFull => "context_full",
        StopReason::Interrupted => "interrupted",
    };
    serde_json::json!({
        "answer": made.text,
        "stop": stop,
        "prompt_tokens": times.prompt_tokens,
        "tokens": made.tokens.len(),
        "prompt_s": times.prefill.as_secs_f64(),
        "decode_s": made.timing.total.as_secs_f64(),
        "attention_s": made.timing.attend.as_secs_f64(),
    })
}

/// Prints the times, and what the daemon did where there was one: its method, counters, and the bytes of a token's KV.
pub(crate) fn print(times: &Times, daemon: Option<(&MethodSpec, StepStats, usize)>) {
    let mut stderr = std::io::stderr().lock();
    for line in lines(times, daemon) {
        // Nobody reads it, so nobody misses it.
        let _ = writeln!(stderr, "{line}");
    }
}

fn lines(times: &Times, daemon: Option<(&MethodSpec, StepStats, usize)>) -> Vec<String> {
    let prefill = times.prefill.as_secs_f64();
    let speed = times.prompt_tokens as f64 / prefill.max(f64::MIN_POSITIVE);
    let mut all =
        vec![format!("prompt: {} tokens in {prefill:.2} s ({speed:.0} tokens/s)", times.prompt_tokens)];
    if times.steps.is_empty() {
        return all;
    }
    all.push(format!(
        "{:>5} {:>9} {:>9} {:>9} {:>9} {:>9}   (ms)",
        "token", "total", "linear", "hint", "append", "attention"
    ));
    all.extend(times.steps.iter().enumerate().map(|(i, step)| row(&(i + 2).to_string(), step, 1.0)));
    let mut sum = StepTiming::default();
    times.steps.iter().for_each(|step| sum += *step);
    let n = times.steps.len() as f64;
    all.push(row("mean", &sum, n));
    if let Some((method, stats, token_bytes)) = daemon {
        let held = stats.context_tokens as f64 * token_bytes as f64;
        let hits = stats
            .hit_rate()
            .map_or_else(|| "nothing selected".to_owned(), |hits| format!("{:.0} % hits", hits * 100.0));
        all.push(format!(
            "{method}: of attention {:.2} ms a token waiting for rows; {:.2} MB a token moved ({:.1} % of the KV), {hits}; \
             {} {:.2} ms selecting, {:.2} ms transferring",
            millis(stats.wait) / n,
            stats.bytes_moved as f64 / 1e6 / n,
            stats.bytes_moved as f64 / held.max(1.0) * 100.0,
            if stats.selected_here > 0 { "this process's threads, together" } else { "the daemon" },
            millis(stats.select) / n,
            millis(stats.transfer) / n,
        ));
        if let Some(missed) = stats.certified.mean() {
            all.push(format!(
                "certified: a query head missed at most {:.2} % of its attention in the mean, {:.2} % at worst (of each layer's own queries, \
                 keys and values; nothing is said about the text); at most 0.01, 0.1, 0.3, 1, 3, 10, 30 %, and more: {}",
                missed * 100.0,
                stats.certified.worst * 100.0,
                stats.certified.missed.map(|count| format!("{:.0} %", count as f64 / stats.certified.heads as f64 * 100.0)).join(", "),
            ));
        }
        if stats.rows_cpu > 0 || !stats.feedback.is_zero() {
            all.push(format!(
                "{:.0} rows a token attended by the daemon's CPU; {:.2} ms a token on attention rows that the method learns from",
                stats.rows_cpu as f64 / n,
                millis(stats.feedback) / n,
            ));
        }
    }
    all
}

fn row(name: &str, step: &StepTiming, n: f64) -> String {
    let [total, linear, hint, append, attend] =
        [step.total, step.linear, step.hint, step.append, step.attend].map(|time| millis(time) / n);
    format!("{name:>5} {total:>9.2} {linear:>9.2} {hint:>9.2} {append:>9.2} {attend:>9.2}")
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Where pages were that could leave host memory.
pub(super) fn print_paged(paged: &Paged) {
    crate::say::say(format_args!(
        "host memory held at most {:.1} % of the KV ({:.1} of {:.1} MB); {:.1} MB went to disk and {:.1} MB came back, {} pages were lost",
        100.0 * paged.peak_bytes as f64 / paged.most_bytes.max(1) as f64,
        paged.peak_bytes as f64 / 1e6,
        paged.most_bytes as f64 / 1e6,
        paged.written_bytes as f64 / 1e6,
        paged.read_bytes as f64 / 1e6,
        paged.lost_pages,
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_a_line_and_the_mean_follows() {
        let mut times = Times::new(10);
        times.read();
        times.token(StepTiming::default());
        for ms in [10, 20] {
            let total = Duration::from_millis(ms);
            times.token(StepTiming { total, linear: total, ..StepTiming::default() });
        }
        let all = lines(&times, None);
        assert_eq!(all.len(), 5, "{all:#?}");
        assert!(all[4].contains("mean") && all[4].contains("15.00"), "{}", all[4]);
    }
}
