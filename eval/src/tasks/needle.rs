//! Needles in a haystack: facts planted in a long text, and questions about them.
//!
//! *single*: facts of which the text holds one of each kind. *multi*: several keys with a code each,
//! planted apart from each other; a question asks for one of them, so the others distract. *question*: where people come from,
//! told in passing.

use kvoyant_kernels::SplitMix64;

use super::context::Plant;
use super::{Answer, Question, Task};

/// Questions of each of these tasks in one context.
pub const QUESTIONS_PER_TASK: usize = 3;

/// Seven digits and a few words around them.
const ANSWER_TOKENS: usize = 12;

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

/// People that no chronicle mentions, and what they do.
const PEOPLE: &[(&str, &str)] = &[
    ("Doctor Amundsen", "a surgeon"),
    ("Professor Okafor", "an astronomer"),
    ("Captain Yamamoto", "a diver"),
    ("Madame Leclerc", "a violinist"),
    ("Inspector Novak", "a detective"),
    ("Señor Vargas", "a painter"),
];

/// Countries that no chronicle mentions.
const COUNTRIES: &[&str] =
    &["Iceland", "Brazil", "Kenya", "Mongolia", "Portugal", "Canada", "Vietnam", "Greece"];

/// A fact whose number is still to be drawn: the begun answer, and so many digits behind `space`.
pub(super) struct Fact {
    task: Task,
    ask: String,
    begin: String,
    space: &'static str,
    digits: usize,
}

impl Fact {
    /// With a number.
    pub(super) fn planted(self, rng: &mut SplitMix64) -> Plant {
        let Self { task, ask, begin, space, digits: n } = self;
        let answer = digits(n, rng);
        let sentence = format!("{begin}{space}{answer}. ");
        Plant::asked(sentence, line(task, ask, begin, answer))
    }
}

/// Numbers, one of a kind.
pub(super) fn singles(rng: &mut SplitMix64) -> Vec<Fact> {
    let mut kinds = SINGLES.to_vec();
    rng.shuffle(&mut kinds);
    let of_kind = |(what, digits): (&str, usize)| Fact {
        task: Task::Single,
        ask: format!("What is the {what}?"),
        begin: format!("The {what} is"),
        space: " ",
        digits,
    };
    kinds.into_iter().take(QUESTIONS_PER_TASK).map(of_kind).collect()
}

/// Keys with codes.
pub(super) fn keys(rng: &mut SplitMix64) -> Vec<Fact> {
    let mut keys = KEYS.to_vec();
    rng.shuffle(&mut keys);
    let of_key = |key: &str| Fact {
        task: Task::Multi,
        ask: format!("What is the number of the ticket to {key}?"),
        // The key once more, right before its code: without it the model takes the last code it saw.
        begin: format!("The ticket to {key} has the number {key}-"),
        space: "",
        digits: CODE_DIGITS,
    };
    keys.into_iter().take(QUESTIONS_PER_TASK).map(of_key).collect()
}

/// People and where they were born.
pub(super) fn people(rng: &mut SplitMix64) -> Vec<Plant> {
    let mut people = PEOPLE.to_vec();
    rng.shuffle(&mut people);
    let mut countries = COUNTRIES.to_vec();
    rng.shuffle(&mut countries);
    people
        .into_iter()
        .zip(countries)
        .take(QUESTIONS_PER_TASK)
        .map(|((who, trade), country)| {
            let ask = format!("In which country was {who} born?");
            let begin = format!("{who} was born in");
            let question = line(Task::Question, ask, begin, country.to_owned());
            let sentence = format!("{who} was born in {country} and worked as {trade}. ");
            Plant::asked(sentence, question)
        })
        .collect()
}

fn line(task: Task, ask: String, begin: String, answer: String) -> Question {
    Question { task, ask, begin, answer: Answer::Word(answer), one_line: true, most_tokens: ANSWER_TOKENS }
}

/// A number of `n` digits without a leading zero.
pub(super) fn digits(n: usize, rng: &mut SplitMix64) -> String {
    (0..n).map(|i| char::from(b'0' + if i == 0 { 1 + rng.below(9) } else { rng.below(10) } as u8)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_differ_within_a_context_and_are_right_when_said_as_planted() {
        for seed in 0..20 {
            let mut rng = SplitMix64::new(seed);
            let facts: Vec<Fact> = singles(&mut rng).into_iter().chain(keys(&mut rng)).collect();
            let mut all: Vec<Plant> = facts.into_iter().map(|fact| fact.planted(&mut rng)).collect();
            all.extend(people(&mut rng));
            let mut answers: Vec<_> =
                all.iter().map(|plant| format!("{:?}", plant.question.as_ref().unwrap().answer)).collect();
            answers.sort_unstable();
            answers.dedup();
            assert_eq!(answers.len(), 3 * QUESTIONS_PER_TASK);
            for plant in &all {
                assert_eq!(plant.question.as_ref().unwrap().score(&plant.sentence), 1.0, "{plant:?}");
            }
        }
    }
}
