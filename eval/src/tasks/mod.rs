//! Questions about long texts, after RULER (Hsieh et al., COLM'24, arXiv 2404.06654), and two that need much of the text at once
//! (arXiv 2604.08426: single needles hide what offloading loses).
//!
//! | task | kind | the answer is right by |
//! |---|---|---|
//! | `single` | the only number of its kind | the number |
//! | `multi` | one of several keys with a code each | the code |
//! | `question` | a fact about a person, told in passing | the name |
//! | `variables` | where a variable has its value from, through others | F1 over names and number on the way |
//! | `common` | the three words that were called many times | F1 over the words |
//! | `frequent` | the same, of made-up words whose counts fall as 1/i² | F1 over the words |
//! | `list` | everything of a kind that the text names | F1 over the numbers |
//! | `records` | the text's deliveries, one record a line | F1 over the fields |
//!
//! F1 is the harmonic mean of precision and recall: who names everything that could be meant is not right.
//!
//! Small models answer begun answers far better than open questions: so every answer is begun for the model, and what counts is
//! what it goes on with. What dense attention cannot do says nothing about a method: compare with dense.

mod context;
mod lists;
mod needle;
mod words;

use std::collections::BTreeSet;

pub use context::{Context, INTRODUCTION, context};
pub use needle::QUESTIONS_PER_TASK;

/// What a question tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Task {
    /// The only fact of its kind.
    Single,
    /// One of several keys.
    Multi,
    /// A fact about a person.
    Question,
    /// Chains of variables.
    Variables,
    /// Words that come equally often, among others that come seldom.
    Common,
    /// Words whose counts fall steeply.
    Frequent,
    /// Everything of a kind.
    List,
    /// Sentences as a table.
    Records,
}

impl Task {
    /// Every task.
    pub const ALL: [Self; 8] = [
        Self::Single,
        Self::Multi,
        Self::Question,
        Self::Variables,
        Self::Common,
        Self::Frequent,
        Self::List,
        Self::Records,
    ];

    /// Those about facts that stand apart from one another in a text. Words that come again and again would lead a small model away
    /// from them, so [`Self::WORDS`] have texts of their own.
    pub const FACTS: [Self; 6] =
        [Self::Single, Self::Multi, Self::Question, Self::Variables, Self::List, Self::Records];

    /// Those about which words come often.
    pub const WORDS: [Self; 2] = [Self::Common, Self::Frequent];

    /// The name in tables and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Multi => "multi",
            Self::Question => "question",
            Self::Variables => "variables",
            Self::Common => "common",
            Self::Frequent => "frequent",
            Self::List => "list",
            Self::Records => "records",
        }
    }
}

/// What a right answer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// This word or number, wherever in it.
    Word(String),
    /// All of these words and no other of their kind, in any order: the score is F1.
    Words(Vec<String>),
    /// Lines that begin with a key, cells being parted by `|`, a colon or a comma: the score is F1 over the fields, which are right in their key's line.
    Records(Vec<(String, Vec<String>)>),
}

/// A question about a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Which task it belongs to.
    pub task: Task,
    /// What is asked.
    pub ask: String,
    /// How the answer begins; the model goes on from here.
    pub begin: String,
    /// What must come next.
    pub answer: Answer,
    /// Whether the answer is over with its first sentence or line.
    pub one_line: bool,
    /// The most tokens that an answer may take.
    pub most_tokens: usize,
}

impl Question {
    /// How right `said` is, what the model went on with after [`Self::begin`]: 0 to 1.
    #[must_use]
    pub fn score(&self, said: &str) -> f64 {
        match &self.answer {
            Answer::Word(word) => f64::from(u8::from(has_word(said, word))),
            Answer::Words(words) => {
                let found = found(said, words);
                let of_question = format!("{} {}", self.ask, self.begin);
                // What comes behind the line that was asked for is not the answer's.
                let line = said.trim_start();
                let line =
                    if self.one_line { line.split(['.', '\n']).next().unwrap_or_default() } else { line };
                let kind = Kind::of(words);
                let wrong: BTreeSet<&str> = line
                    .split(|c: char| !c.is_alphanumeric())
                    .filter(|word| kind.has(word) && !words.iter().any(|right| right == word))
                    .filter(|word| !has_word(&of_question, word))
                    .collect();
                f1(found, found + wrong.len(), words.len())
            }
            Answer::Records(records) => {
                let text = self.table(said);
                let all: usize = records.iter().map(|(_, fields)| fields.len()).sum();
                let lines: BTreeSet<&str> = text.lines().map(str::trim).collect();
                let cells =
                    |line: &&str| line.split(['|', ':', ',']).filter(|cell| !cell.trim().is_empty()).count();
                let named: usize = lines.iter().map(|line| cells(line).saturating_sub(1)).sum();
                let right = right_fields(&text, records);
                f1(right, named.max(right), all)
            }
        }
    }

    /// The answer with the line under way, which was begun for the model, with the first key in it.
    fn table(&self, said: &str) -> String {
        format!("{}{said}", self.begin.rsplit('\n').next().unwrap_or_default())
    }

    /// Whether all that was asked for has been said, whatever else was.
    fn is_complete(&self, said: &str) -> bool {
        match &self.answer {
            Answer::Word(word) => has_word(said, word),
            Answer::Words(words) => found(said, words) == words.len(),
            Answer::Records(records) => {
                let all: usize = records.iter().map(|(_, fields)| fields.len()).sum();
                right_fields(&self.table(said), records) == all
            }
        }
    }

    /// Whether an answer has come to its end: with what was asked for, a sentence or a line, or with everything.
    #[must_use]
    pub fn is_over(&self, said: &str) -> bool {
        if self.one_line {
            return said.trim_start().contains(['.', '\n']);
        }
        said.contains("\n\n") || self.is_complete(said)
    }
}

/// What tells items of an answer from the words around them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Digits.
    Numbers,
    /// Capitals.
    Names,
    /// Any words but those that join others.
    Words,
}

impl Kind {
    fn of(words: &[String]) -> Self {
        [Self::Numbers, Self::Names]
            .into_iter()
            .find(|kind| words.iter().all(|word| kind.has(word)))
            .unwrap_or(Self::Words)
    }

    fn has(self, word: &str) -> bool {
        const JOINING: &[&str] = &["a", "an", "and", "are", "is", "or", "the", "then", "was", "were"];
        match self {
            Self::Numbers => !word.is_empty() && word.chars().all(|c| c.is_ascii_digit()),
            Self::Names => word.len() > 1 && word.chars().all(|c| c.is_ascii_uppercase()),
            Self::Words => {
                !word.is_empty() && !JOINING.iter().any(|joining| joining.eq_ignore_ascii_case(word))
            }
        }
    }
}

/// How many of `words` were said, each counted once.
fn found(said: &str, words: &[String]) -> usize {
    words.iter().filter(|word| has_word(said, word)).collect::<BTreeSet<_>>().len()
}

/// Fields that stand in the first line with their key.
fn right_fields(text: &str, records: &[(String, Vec<String>)]) -> usize {
    let line_of = |key: &str| text.lines().find(|line| has_word(line, key));
    let right = |(key, fields): &(String, Vec<String>)| {
        line_of(key).map_or(0, |line| fields.iter().filter(|field| has_word(line, field)).count())
    };
    records.iter().map(right).sum()
}

/// The harmonic mean of `right / named` and `right / all`; 0 of nothing.
fn f1(right: usize, named: usize, all: usize) -> f64 {
    2.0 * right as f64 / (named + all).max(1) as f64
}

/// Whether `said` has `word` as a whole word, wherever in it.
#[must_use]
pub fn has_word(said: &str, word: &str) -> bool {
    let letter = |c: char| c.is_alphanumeric();
    !word.is_empty()
        && said
            .match_indices(word)
            .any(|(at, found)| !said[..at].ends_with(letter) && !said[at + found.len()..].starts_with(letter))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(answer: Answer, begin: &str) -> Question {
        Question {
            task: Task::List,
            ask: String::new(),
            begin: begin.into(),
            answer,
            one_line: false,
            most_tokens: 40,
        }
    }

    #[test]
    fn an_answer_is_right_only_as_a_whole_word() {
        assert!(has_word(" 4821.", "4821"));
        assert!(has_word("It is 4821", "4821"));
        assert!(!has_word("48217", "4821"));
        assert!(!has_word("a4821", "4821"));
        assert!(!has_word("4812", "4821"));
        assert!(has_word("14821 4821", "4821"));
        assert!(!has_word("anything", ""));
    }

    #[test]
    fn a_list_scores_precision_and_recall_and_naming_twice_counts_once() {
        let list = asked(Answer::Words(["one", "two", "three", "four"].map(String::from).into()), "");
        assert_eq!(list.score("one, two and one"), 2.0 / 3.0);
        assert_eq!(list.score("The four, three, two and one"), 1.0);
        assert_eq!(list.score(""), 0.0);
        assert!(list.is_over("four three two one"));
        assert!(!list.is_over("four three two"));
        assert!(list.is_over("zero four three two one"), "all of it is there, whatever else is");
    }

    #[test]
    fn an_answer_that_names_everything_is_worse_than_one_that_names_what_was_asked_for() {
        let of = |words: &[&str]| asked(Answer::Words(words.iter().map(|word| (*word).into()).collect()), "");
        let words = of(&["walrus", "zebra"]);
        assert_eq!(words.score("walrus, zebra, mango, cactus, lobster and penguin"), 0.5);
        let numbers = of(&["4821", "1177"]);
        assert_eq!(numbers.score("the globe, number 4821.\nthe carpet, number 1177."), 1.0);
        assert_eq!(numbers.score("4821, 1177, 1234, 5678, 9012, 3456"), 0.5);
        let names = Question { one_line: true, ..of(&["ALPHA", "BRAVO"]) };
        assert_eq!(names.score(" ALPHA and BRAVO, I think."), 1.0);
        assert_eq!(names.score(" ALPHA, BRAVO, DELTA, ECHO, HOTEL, INDIA."), 0.5);
        assert_eq!(names.score(" ALPHA, BRAVO.\nVAR DELTA"), 1.0, "what follows the line is not asked for");
        let told = Question { ask: "Which of DELTA and ECHO are there?".into(), ..names };
        assert_eq!(told.score(" ALPHA, BRAVO, DELTA"), 1.0, "the question's own words name nothing");
    }

    #[test]
    fn a_table_with_rows_that_nothing_brought_is_not_all_right() {
        let records = vec![("Aurora".to_owned(), vec!["340".to_owned(), "salt".to_owned()])];
        let question = asked(Answer::Records(records), "ship | barrels | cargo\nAurora |");
        assert_eq!(question.score(" 340 | salt\n"), 1.0);
        assert_eq!(question.score(" 340 | salt\nCygnus | 99 | tar\nDraco | 98 | tea\n"), 0.5);
        assert_eq!(question.score(" 340 | 17 | salt | tar\n"), 2.0 / 3.0);
        assert!(question.is_over(" 340 | 17 | salt\n"));
    }

    #[test]
    fn records_score_fields_in_the_line_of_their_key_alone() {
        let records = [("Aurora", ["340", "salt"]), ("Boreas", ["17", "tar"])];
        let records = records.map(|(key, fields)| (key.to_owned(), fields.map(String::from).into())).into();
        let question = asked(Answer::Records(records), "ship | barrels | cargo\nAurora |");
        assert_eq!(question.score(" 340 | salt\nBoreas | 17 | tar\n"), 1.0);
        assert_eq!(question.score(" 17 | salt\nBoreas | 340 | tar\n"), 0.5);
        assert_eq!(question.score(" 340 | salt\n"), 2.0 / 3.0);
        assert_eq!(question.score("\nnothing"), 0.0);
    }

    #[test]
    fn an_answer_of_one_line_is_over_with_its_sentence_or_line_but_not_before_it_began() {
        let line = Question { one_line: true, ..asked(Answer::Word("48".into()), "") };
        assert!(!line.is_over(" 4821"));
        assert!(line.is_over(" 4821."));
        assert!(!line.is_over("\n48"));
        assert!(line.is_over("\n48\n"));
    }

    #[test]
    fn every_task_has_a_name_of_its_own_and_is_of_one_kind() {
        let names: BTreeSet<_> = Task::ALL.iter().map(|task| task.name()).collect();
        assert_eq!(names.len(), Task::ALL.len());
        assert_eq!(Task::FACTS.len() + Task::WORDS.len(), Task::ALL.len());
    }
}
