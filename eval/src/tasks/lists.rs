//! Answers that need many places of the text: chains of variables, everything of a kind, and records.

use kvoyant_kernels::SplitMix64;

use super::context::Plant;
use super::needle::digits;
use super::{Answer, Question, Task};

/// Variables of the chain that is asked for, and of the one that distracts.
const CHAIN: usize = 4;

/// Things that are stored.
const STORED: usize = 6;

/// Deliveries; the first one is given as an example.
const DELIVERIES: usize = 5;

const VARIABLE_TOKENS: usize = 32;
/// A line of about twelve tokens for each.
const LIST_TOKENS: usize = 72;
const RECORD_TOKENS: usize = 60;

/// Names of variables.
const NAMES: &[&str] = &[
    "ALPHA", "BRAVO", "DELTA", "ECHO", "HOTEL", "INDIA", "KILO", "LIMA", "OSCAR", "TANGO", "VICTOR", "ZULU",
];

/// Things that no chronicle stores.
const THINGS: &[&str] = &[
    "the globe",
    "the sextant",
    "the typewriter",
    "the chandelier",
    "the harpsichord",
    "the telescope",
    "the carpet",
    "the samovar",
    "the gramophone",
];

/// Balloons, and what they carry: neither is in the chronicle.
const BALLOONS: &[&str] = &["Aurora", "Boreas", "Cygnus", "Draco", "Electra", "Fornax", "Gemini"];
const LOADS: &[&str] = &["cocoa", "silk", "ivory", "pepper", "indigo", "jade", "vanilla"];

/// Where a variable's value comes from: RULER's variable tracking, from its end. The answer is begun with the last variable, and the
/// score is the share of the names and the number on the way back.
pub(super) fn variables(rng: &mut SplitMix64) -> Vec<Plant> {
    let mut names = NAMES.to_vec();
    rng.shuffle(&mut names);
    let (asked, rest) = names.split_at(CHAIN);
    let (value, other) = (digits(5, rng), digits(5, rng));
    let last = asked[CHAIN - 1];
    let way = asked[..CHAIN - 1].iter().rev().map(|name| (*name).to_owned());
    let question = Question {
        task: Task::Variables,
        ask: format!("Which variables, and which number, does the variable {last} get its value from?"),
        begin: format!("VAR {last} ="),
        answer: Answer::Words(way.chain([value.clone()]).collect()),
        one_line: false,
        most_tokens: VARIABLE_TOKENS,
    };
    let mut plants = chain(asked, &value);
    plants.extend(chain(&rest[..CHAIN], &other));
    for (at, plant) in plants.iter_mut().enumerate() {
        plant.chain = Some(at % CHAIN);
    }
    plants[0].question = Some(question);
    plants
}

/// `VAR A = 12345`, `VAR B = A`, …
fn chain(names: &[&str], value: &str) -> Vec<Plant> {
    names
        .iter()
        .enumerate()
        .map(|(at, name)| {
            let from = if at == 0 { value } else { names[at - 1] };
            Plant::plain(format!("VAR {name} = {from}. "))
        })
        .collect()
}

/// Everything that is stored in one place. The answer is begun with the first thing; a line like the text's leads to the next.
pub(super) fn stored(rng: &mut SplitMix64) -> Vec<Plant> {
    let mut things = THINGS.to_vec();
    rng.shuffle(&mut things);
    let all: Vec<(&str, String)> =
        things.into_iter().take(STORED).map(|thing| (thing, digits(4, rng))).collect();
    let line = |thing: &str| format!("Stored in the cellar: {thing}, number");
    let question = Question {
        task: Task::List,
        ask: "List all that is stored in the cellar with its number, one line each.".into(),
        begin: line(all[0].0),
        answer: Answer::Words(all.iter().map(|(_, number)| number.clone()).collect()),
        one_line: false,
        most_tokens: LIST_TOKENS,
    };
    let mut plants: Vec<Plant> =
        all.iter().map(|(thing, number)| Plant::plain(format!("{} {number}.\n", line(thing)))).collect();
    plants[0].question = Some(question);
    plants
}

/// What was delivered, one record a line. The first record is given, and the second begun.
pub(super) fn deliveries(rng: &mut SplitMix64) -> Vec<Plant> {
    let (mut balloons, mut loads) = (BALLOONS.to_vec(), LOADS.to_vec());
    rng.shuffle(&mut balloons);
    rng.shuffle(&mut loads);
    let all: Vec<(&str, String, &str)> = balloons
        .into_iter()
        .zip(loads)
        .take(DELIVERIES)
        .map(|(balloon, load)| (balloon, digits(3, rng), load))
        .collect();
    let record = |(balloon, amount, load): &(&str, String, &str)| {
        format!("Balloon {balloon}: {amount} crates, {load}.\n")
    };
    let question = Question {
        task: Task::Records,
        ask: "List what each balloon brought, one line each.".into(),
        begin: format!("{}Balloon {}:", record(&all[0]), all[1].0),
        answer: Answer::Records(
            all[1..]
                .iter()
                .map(|(balloon, amount, load)| {
                    ((*balloon).to_owned(), vec![amount.clone(), (*load).to_owned()])
                })
                .collect(),
        ),
        one_line: false,
        most_tokens: RECORD_TOKENS,
    };
    let mut plants: Vec<Plant> = all.iter().map(|each| Plant::plain(record(each))).collect();
    plants[0].question = Some(question);
    plants
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_leads_back_from_the_last_variable_to_the_value() {
        let plants = variables(&mut SplitMix64::new(3));
        let question = plants[0].question.clone().unwrap();
        let Answer::Words(asked) = &question.answer else { panic!("names are asked for") };
        assert_eq!(asked.len(), CHAIN);
        assert!(plants[CHAIN - 1].sentence.starts_with(&format!("{} {}", question.begin, asked[0])));
        for pair in asked.windows(2) {
            let step = format!("VAR {} = {}. ", pair[0], pair[1]);
            assert!(plants.iter().any(|plant| plant.sentence == step), "{step}");
        }
        assert_eq!(plants.len(), 2 * CHAIN);
        assert_eq!(question.score(&format!(" {}", asked.join(", "))), 1.0);
        assert_eq!(question.score(&format!(" {}.", asked[0])), 0.4);
        let everything = NAMES.join(", ");
        assert_eq!(question.score(&format!(" {everything}.")), 0.4);
    }

    #[test]
    fn the_whole_list_scores_one_and_half_of_it_two_thirds() {
        let plants = stored(&mut SplitMix64::new(3));
        let question = plants[0].question.clone().unwrap();
        let text: Vec<&str> = plants.iter().map(|plant| plant.sentence.as_str()).collect();
        let said = text.concat();
        assert_eq!(question.score(&said), 1.0);
        assert_eq!(question.score(&text[..3].concat()), 2.0 / 3.0);
        assert!(said.starts_with(&question.begin));
    }

    #[test]
    fn a_list_of_all_deliveries_scores_one_and_wrong_amounts_a_half() {
        let plants = deliveries(&mut SplitMix64::new(8));
        let question = plants[0].question.clone().unwrap();
        let Answer::Records(records) = &question.answer else { panic!("records are asked for") };
        assert_eq!(records.len(), DELIVERIES - 1);
        let line =
            |key: &str, fields: &[String]| format!("Balloon {key}: {} crates, {}.\n", fields[0], fields[1]);
        let whole: String = records.iter().map(|(key, fields)| line(key, fields)).collect();
        let begun = format!("Balloon {}:", records[0].0);
        assert_eq!(question.score(whole.strip_prefix(&begun).unwrap()), 1.0);
        let swapped: String =
            records.iter().map(|(key, fields)| line(key, &["0".into(), fields[1].clone()])).collect();
        assert_eq!(question.score(swapped.strip_prefix(&begun).unwrap()), 0.5);
    }
}
