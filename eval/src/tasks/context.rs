//! A long text with what the tasks planted in it.

use kvoyant_kernels::SplitMix64;

use super::{Question, Task, lists, needle, words};
use crate::texts::{CountTokens, Filler};

/// What is said to the model before the text.
pub const INTRODUCTION: &str =
    "Read this text. Some numbers are hidden in it. Remember them, I will ask for them.\n\n";

/// A long text with its questions.
#[derive(Clone, Debug)]
pub struct Context {
    /// Filler and what was planted.
    pub text: String,
    /// About what was planted, in no order.
    pub questions: Vec<Question>,
    /// What was planted: each sentence, and where it stands as a share of the text's pieces (0–1).
    pub planted: Vec<(String, f64)>,
}

/// A sentence to be planted.
#[derive(Clone, Debug)]
pub(super) struct Plant {
    /// With its end.
    pub(super) sentence: String,
    /// The question that comes with it, if it is the first of its question's.
    pub(super) question: Option<Question>,
    /// Sentences with the same number stand in the text in the order in which they were made.
    pub(super) chain: Option<usize>,
}

impl Plant {
    /// A sentence with its question.
    pub(super) fn asked(sentence: String, question: Question) -> Self {
        Self { sentence, question: Some(question), chain: None }
    }

    /// A sentence alone.
    pub(super) fn plain(sentence: String) -> Self {
        Self { sentence, question: None, chain: None }
    }
}

/// A context of at most `tokens` tokens with questions of these tasks: [`super::QUESTIONS_PER_TASK`] of those with one fact each, one
/// of the others.
pub fn context(
    tasks: &[Task],
    tokens: usize,
    filler: &mut Filler,
    rng: &mut SplitMix64,
    count: &dyn CountTokens,
) -> Context {
    // First what is asked, then the numbers: a seed of the demo asks the same as ever.
    let drafts: Vec<Draft> = tasks.iter().flat_map(|task| drafted(*task, rng)).collect();
    let mut plants: Vec<Plant> = drafts.into_iter().map(|draft| draft.finish(rng)).collect();
    let needed: usize = plants.iter().map(|plant| count.count(&plant.sentence)).sum();
    let mut pieces = filler.take(tokens.saturating_sub(needed), count);
    let between = pieces.len();
    rng.shuffle(&mut plants);
    in_order(&mut plants);
    let depths = depths(plants.len(), rng);
    // From the back, so that earlier positions stay right.
    for (plant, depth) in plants.iter().zip(&depths).rev() {
        pieces.insert((depth * between as f64) as usize, plant.sentence.clone());
    }
    Context {
        text: pieces.concat(),
        planted: plants.iter().map(|plant| plant.sentence.clone()).zip(depths).collect(),
        questions: plants.into_iter().filter_map(|plant| plant.question).collect(),
    }
}

fn drafted(task: Task, rng: &mut SplitMix64) -> Vec<Draft> {
    let ready = |plants: Vec<Plant>| plants.into_iter().map(Draft::Ready).collect();
    match task {
        Task::Single => needle::singles(rng).into_iter().map(Draft::Number).collect(),
        Task::Multi => needle::keys(rng).into_iter().map(Draft::Number).collect(),
        Task::Question => ready(needle::people(rng)),
        Task::Variables => ready(lists::variables(rng)),
        Task::Common => ready(words::common(rng)),
        Task::Frequent => ready(words::frequent(rng)),
        Task::List => ready(lists::stored(rng)),
        Task::Records => ready(lists::deliveries(rng)),
    }
}

/// A sentence to be planted, whose number may not have been drawn yet.
enum Draft {
    Number(needle::Fact),
    Ready(Plant),
}

impl Draft {
    fn finish(self, rng: &mut SplitMix64) -> Plant {
        match self {
            Self::Number(fact) => fact.planted(rng),
            Self::Ready(plant) => plant,
        }
    }
}

/// Puts the sentences of each chain in their order, in the places that they hold together.
fn in_order(plants: &mut [Plant]) {
    let chained = |plants: &[Plant]| -> Vec<usize> {
        (0..plants.len()).filter(|at| plants[*at].chain.is_some()).collect()
    };
    let places = chained(plants);
    let mut sorted: Vec<Plant> = places.iter().map(|at| plants[*at].clone()).collect();
    sorted.sort_by_key(|plant| plant.chain);
    for (at, plant) in places.into_iter().zip(sorted) {
        plants[at] = plant;
    }
}

/// One depth in each of `n` equal parts of the text's middle, rising: drawn, but never all in one place. Never at the very ends:
/// there the sinks and the window would hold what was planted.
fn depths(n: usize, rng: &mut SplitMix64) -> Vec<f64> {
    const FIRST: f64 = 0.04;
    const LAST: f64 = 0.92;
    (0..n).map(|i| FIRST + (LAST - FIRST) * (i as f64 + rng.unit()) / n as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Answer, QUESTIONS_PER_TASK};
    use super::*;

    fn words(text: &str) -> usize {
        text.split_whitespace().count()
    }

    fn made(tasks: &[Task], seed: u64) -> Context {
        context(tasks, 1500, &mut Filler::new(None, seed), &mut SplitMix64::new(seed), &words)
    }

    #[test]
    fn a_context_has_the_wanted_length_and_all_its_tasks() {
        for tasks in [&Task::FACTS[..], &Task::WORDS[..], &Task::ALL[..]] {
            let context = made(tasks, 1);
            assert!(words(&context.text) <= 1500 && words(&context.text) > 1440, "{}", words(&context.text));
            for task in tasks {
                let n = context.questions.iter().filter(|q| q.task == *task).count();
                let several = [Task::Single, Task::Multi, Task::Question].contains(task);
                assert_eq!(n, if several { QUESTIONS_PER_TASK } else { 1 });
            }
        }
    }

    #[test]
    fn every_sentence_stands_near_its_drawn_depth_and_off_the_ends() {
        for seed in 0..20 {
            let context = made(&Task::FACTS, seed);
            for (sentence, depth) in &context.planted {
                assert_eq!(context.text.matches(sentence).count(), 1, "{sentence}");
                let at = context.text.find(sentence).unwrap() as f64 / context.text.len() as f64;
                assert!((at - depth).abs() < 0.06, "{at} for {depth}");
                assert!((0.02..0.96).contains(&at));
            }
        }
    }

    #[test]
    fn the_same_seed_asks_the_same_and_another_seed_something_else() {
        let (one, two) = (made(&Task::ALL, 4), made(&Task::ALL, 4));
        assert_eq!((&one.text, &one.questions), (&two.text, &two.questions));
        assert_ne!(one.questions, made(&Task::ALL, 5).questions);
    }

    #[test]
    fn no_answer_is_given_away_by_its_question() {
        for seed in 0..20 {
            for question in made(&Task::ALL, seed).questions {
                assert!(question.score("") < 1e-9, "{question:?}");
                assert!(!question.is_over(""), "{question:?}");
            }
        }
    }

    #[test]
    fn what_the_answers_name_stands_in_the_text() {
        for seed in 0..20 {
            let context = made(&Task::ALL, seed);
            for question in &context.questions {
                let words = match &question.answer {
                    Answer::Word(word) => vec![word.clone()],
                    Answer::Words(words) => words.clone(),
                    Answer::Records(records) => {
                        records.iter().flat_map(|(_, fields)| fields.clone()).collect()
                    }
                };
                for word in words {
                    assert!(super::super::has_word(&context.text, &word), "{word} of {question:?}");
                }
            }
        }
    }
}
