//! Needles in a haystack: facts planted in a long text, and questions about them.
//!
//! *single*: facts of which the text holds one of each kind. *multi*: several keys with a code each,
//! planted apart from each other; a question asks for one of them, so the others distract.

use kvoyant_engine::SplitMix64;

use crate::texts::{CountTokens, Filler};

/// What a question tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Task {
    /// The only fact of its kind.
    Single,
    /// One of several keys.
    Multi,
}

impl Task {
    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::Single, Self::Multi];

    /// The name in table and JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Multi => "multi",
        }
    }
}

/// A fact, the question about it, and where it stands in its context.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    /// Which task it belongs to.
    pub(crate) task: Task,
    /// What is asked.
    pub(crate) ask: String,
    /// How the answer begins; the model goes on from here.
    pub(crate) begin: String,
    /// What must come next.
    pub(crate) answer: String,
    /// The sentence in the text.
    pub(crate) needle: String,
    /// Where the sentence stands, as a share of the text's pieces (0–1).
    pub(crate) depth: f64,
}

/// A long text with its questions.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// Filler and needles.
    pub(crate) text: String,
    /// About the needles, in no order.
    pub(crate) questions: Vec<Question>,
}

/// Questions of each task in one context.
pub(crate) const QUESTIONS_PER_TASK: usize = 3;

/// What is said to the model before the text.
pub(crate) const INTRODUCTION: &str =
    "Read this text. Some numbers are hidden in it. Remember them, I will ask for them.\n\n";

/// Kinds of single facts: where the number belongs, and how many digits it has.
const SINGLES: &[(&str, usize)] = &[
    ("secret number of the lighthouse", 7),
    ("telephone number of the observatory", 7),
    ("inventory number of the golden clock", 7),
    ("registration number of the airship", 7),
    ("catalogue number of the blue comet", 7),
    ("serial number of the steam engine", 7),
];

/// Keys that no chronicle mentions.
const KEYS: &[&str] =
    &["Lisbon", "Cairo", "Tokyo", "Oslo", "Lima", "Delhi", "Rome", "Havana", "Quito", "Berlin"];

/// Digits of a key's code.
const CODE_DIGITS: usize = 4;

/// A context of at most `tokens` tokens.
pub(crate) fn context(
    tokens: usize,
    filler: &mut Filler,
    rng: &mut SplitMix64,
    count: &dyn CountTokens,
) -> Context {
    let mut questions = facts(rng);
    let needles: usize = questions.iter().map(|q| count.count(&q.needle)).sum();
    let mut pieces = filler.take(tokens.saturating_sub(needles), count);
    // Between pieces, never at the very ends: there the sinks and the window would hold the needle.
    let between = pieces.len();
    rng.shuffle(&mut questions);
    let depths = depths(questions.len(), rng);
    for (question, depth) in questions.iter_mut().zip(&depths) {
        question.depth = *depth;
    }
    // From the back, so that earlier positions stay right.
    for question in questions.iter().rev() {
        let at = (question.depth * between as f64) as usize;
        pieces.insert(at, question.needle.clone());
    }
    Context { text: pieces.concat(), questions }
}

/// One depth in each of `n` equal parts of the text's middle, rising: drawn, but never all in one place.
fn depths(n: usize, rng: &mut SplitMix64) -> Vec<f64> {
    const FIRST: f64 = 0.04;
    const LAST: f64 = 0.92;
    (0..n).map(|i| FIRST + (LAST - FIRST) * (i as f64 + rng.unit()) / n as f64).collect()
}

fn facts(rng: &mut SplitMix64) -> Vec<Question> {
    let mut singles = SINGLES.to_vec();
    rng.shuffle(&mut singles);
    let mut keys = KEYS.to_vec();
    rng.shuffle(&mut keys);
    let mut all = Vec::new();
    for (what, n) in singles.into_iter().take(QUESTIONS_PER_TASK) {
        all.push(question(
            Task::Single,
            format!("What is the {what}?"),
            format!("The {what} is"),
            " ",
            n,
            rng,
        ));
    }
    for key in keys.into_iter().take(QUESTIONS_PER_TASK) {
        let ask = format!("What is the number of the ticket to {key}?");
        // The key once more, right before its code: without it the model takes the last code it saw.
        let begin = format!("The ticket to {key} has the number {key}-");
        all.push(question(Task::Multi, ask, begin, "", CODE_DIGITS, rng));
    }
    all
}

/// A question whose needle is its begun answer and a number of `n` digits, with `space` between them.
fn question(task: Task, ask: String, begin: String, space: &str, n: usize, rng: &mut SplitMix64) -> Question {
    let answer = digits(n, rng);
    let needle = format!("{begin}{space}{answer}. ");
    Question { task, ask, begin, answer, needle, depth: 0.0 }
}

/// A number of `n` digits without a leading zero.
fn digits(n: usize, rng: &mut SplitMix64) -> String {
    (0..n).map(|i| char::from(b'0' + if i == 0 { 1 + rng.below(9) } else { rng.below(10) } as u8)).collect()
}

/// Whether `said` gives `answer`: as a whole word, wherever in it.
pub(crate) fn is_right(said: &str, answer: &str) -> bool {
    let word = |c: char| c.is_alphanumeric();
    said.match_indices(answer)
        .any(|(at, found)| !said[..at].ends_with(word) && !said[at + found.len()..].starts_with(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> usize {
        text.split_whitespace().count()
    }

    fn made(seed: u64) -> Context {
        context(1500, &mut Filler::new(None, seed), &mut SplitMix64::new(seed), &words)
    }

    #[test]
    fn a_context_has_the_wanted_length_and_both_tasks() {
        let context = made(1);
        assert!(words(&context.text) <= 1500 && words(&context.text) > 1440);
        for task in Task::ALL {
            let n = context.questions.iter().filter(|q| q.task == task).count();
            assert_eq!(n, QUESTIONS_PER_TASK);
        }
    }

    #[test]
    fn every_needle_stands_once_near_its_drawn_depth_and_off_the_ends() {
        for seed in 0..20 {
            let context = made(seed);
            for question in &context.questions {
                assert_eq!(context.text.matches(&question.needle).count(), 1);
                let at = context.text.find(&question.needle).unwrap() as f64 / context.text.len() as f64;
                assert!((at - question.depth).abs() < 0.05, "{at} for {}", question.depth);
                assert!((0.02..0.96).contains(&at));
            }
        }
    }

    #[test]
    fn the_same_seed_asks_the_same_and_answers_differ_within_a_context() {
        let (one, two) = (made(4), made(4));
        assert_eq!(one.text, two.text);
        let mut answers: Vec<_> = one.questions.iter().map(|q| &q.answer).collect();
        answers.sort_unstable();
        answers.dedup();
        assert_eq!(answers.len(), one.questions.len());
    }

    #[test]
    fn an_answer_is_right_only_as_a_whole_word() {
        assert!(is_right(" 4821.", "4821"));
        assert!(is_right("It is 4821", "4821"));
        assert!(!is_right("48217", "4821"));
        assert!(!is_right("a4821", "4821"));
        assert!(!is_right("4812", "4821"));
        assert!(is_right("14821 4821", "4821"));
    }
}
