//! Which words come most often: RULER's common and frequent words, called out one by one. The answer is begun as the text has it,
//! so that a model that cannot count can go on with what it has heard most.

use kvoyant_kernels::SplitMix64;

use super::context::Plant;
use super::{Answer, Question, Task};

/// Words that are asked for.
const ASKED: usize = 3;

/// How often each of those comes in the task of common words, and each of the others.
const OFTEN: usize = 8;
const SELDOM: usize = 1;
const OTHERS: usize = 8;

/// How often the most frequent made-up word comes; the i-th comes `1/i²` as often, at least once.
const MOST: usize = 20;
const MADE_UP: usize = 7;

/// Four words with what stands between them.
const ANSWER_TOKENS: usize = 32;

/// Words that no chronicle has.
const WORDS: &[&str] = &[
    "walrus",
    "pineapple",
    "zebra",
    "trumpet",
    "volcano",
    "cactus",
    "penguin",
    "saxophone",
    "avocado",
    "giraffe",
    "helicopter",
    "kangaroo",
    "lobster",
    "mango",
];

/// Three words often, others seldom.
pub(super) fn common(rng: &mut SplitMix64) -> Vec<Plant> {
    let mut words: Vec<String> = WORDS.iter().map(|word| (*word).to_owned()).collect();
    rng.shuffle(&mut words);
    let counts = (0..ASKED + OTHERS).map(|at| if at < ASKED { OFTEN } else { SELDOM });
    called(Task::Common, "The crier called", words.into_iter().zip(counts))
}

/// Made-up words with counts that fall as 1/i².
pub(super) fn frequent(rng: &mut SplitMix64) -> Vec<Plant> {
    let mut words: Vec<String> = Vec::new();
    while words.len() < MADE_UP {
        let word = made_up(rng);
        if !words.contains(&word) {
            words.push(word);
        }
    }
    let counts = (1..=MADE_UP).map(|i| (MOST / (i * i)).max(1));
    called(Task::Frequent, "The drum beat", words.into_iter().zip(counts))
}

fn called(task: Task, caller: &str, words: impl Iterator<Item = (String, usize)>) -> Vec<Plant> {
    let words: Vec<(String, usize)> = words.collect();
    let question = Question {
        task,
        ask: format!(
            "\"{caller}\" stands many times in the text, each time with a word. Which {ASKED} words come most often?"
        ),
        begin: format!("{caller}:"),
        answer: Answer::Words(words.iter().take(ASKED).map(|(word, _)| word.clone()).collect()),
        one_line: false,
        most_tokens: ANSWER_TOKENS,
    };
    let mut plants: Vec<Plant> = words
        .iter()
        .flat_map(|(word, count)| std::iter::repeat_n(Plant::plain(format!("{caller}: {word}. ")), *count))
        .collect();
    if let Some(first) = plants.first_mut() {
        first.question = Some(question);
    }
    plants
}

/// Three syllables.
fn made_up(rng: &mut SplitMix64) -> String {
    const FIRST: &[u8] = b"bdfgklmnprstvz";
    const SECOND: &[u8] = b"aeiou";
    (0..3)
        .flat_map(|_| [FIRST[rng.below(FIRST.len())], SECOND[rng.below(SECOND.len())]])
        .map(char::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(plants: &[Plant], question: &Question) -> (Vec<usize>, Vec<usize>) {
        let Answer::Words(asked) = &question.answer else { panic!("words are asked for") };
        let of =
            |word: &str| plants.iter().filter(|plant| super::super::has_word(&plant.sentence, word)).count();
        let mut others: Vec<usize> = plants
            .iter()
            .filter(|plant| !asked.iter().any(|word| super::super::has_word(&plant.sentence, word)))
            .map(|plant| plants.iter().filter(|other| other.sentence == plant.sentence).count())
            .collect();
        others.sort_unstable();
        (asked.iter().map(|word| of(word)).collect(), others)
    }

    #[test]
    fn the_words_asked_for_come_more_often_than_any_other() {
        for seed in 0..10 {
            for plants in [common(&mut SplitMix64::new(seed)), frequent(&mut SplitMix64::new(seed))] {
                let question = plants[0].question.clone().unwrap();
                let (asked, others) = counts(&plants, &question);
                assert_eq!(asked.len(), ASKED);
                assert!(asked.iter().min() > others.last(), "{asked:?} {others:?}");
                assert!(plants.iter().filter(|plant| plant.question.is_some()).count() == 1);
            }
        }
    }

    #[test]
    fn frequent_words_fall_as_the_square() {
        let plants = frequent(&mut SplitMix64::new(1));
        let (asked, _) = counts(&plants, &plants[0].question.clone().unwrap());
        assert_eq!(asked, [20, 5, 2]);
    }
}
