//! The grammar of the harbour town's chronicle: `<symbol>` in a template stands for one of the
//! symbol's words, drawn anew each time.

use kvoyant_kernels::SplitMix64;

use super::pick;

/// How a day begins.
pub(super) const OPENINGS: &[&str] = &[
    "On <weekday> the <ordinal> of <month> the wind came from the <direction> and the harbour was <busy>.",
    "<Weekday>, the <ordinal> of <month>, began with <weather> over the <place>.",
    "There was <weather> at dawn on the <ordinal> of <month>, and <few> boats lay at the <place>.",
    "By the <ordinal> of <month> the talk at the <place> was of <topic> and of little else.",
    "In the night before the <ordinal> of <month> a lantern burned late in the house of <person>.",
    "The market of <weekday>, the <ordinal> of <month>, opened under <weather>.",
];

/// What happens in it.
pub(super) const SENTENCES: &[&str] = &[
    "The <ship> came in from <town> with <cargo> and <cargo> in her hold, and <person> signed for both.",
    "<Person> the <trade> sold <cargo> to <person> at a price that <nobody> thought fair.",
    "At the <place> two <traders> argued about <topic> until <person> sent them home.",
    "The <ship> was kept in port because <reason>, so her crew mended nets and told stories of <town>.",
    "<Person> wrote to a cousin in <town> that <opinion>.",
    "Children found <thing> under the stones near the <place> and carried it to <person>.",
    "Because <reason>, the price of <cargo> rose by <few> coins before noon.",
    "The council met in the hall behind the <place> to speak about <topic>, and <person> took the minutes.",
    "<Person> and <person> walked to the <place> after supper and came back <manner>.",
    "An old <trade> from <town> said that <opinion>, but few people listened.",
    "The bell of the <place> rang <few> times, which meant that a ship from <town> was in sight.",
    "Nobody could say who had left <thing> on the steps of the <place>.",
    "<Person> repaired the roof of the <place> with timber from the <ship>, whose captain asked nothing for it.",
    "It took <few> men to unload <cargo> from the <ship>, and the work went on <manner>.",
    "In the evening <person> read aloud from a book about <topic>, and the <traders> stayed to listen.",
    "The <ship> left for <town> on the ebb, and <person> watched from the <place> until the sails were gone.",
    "A <trade> who had lived in <town> for <few> years opened a small shop beside the <place>.",
    "<Person> counted the barrels twice, found <few> too many, and said so <manner>.",
    "Some people believed that <opinion>; others, that it was only <weather>.",
    "The ferry to <town> was late, and those who waited at the <place> shared <cargo> and news.",
    "When the tide turned, <person> rowed out to the <ship> and asked for <cargo>.",
    "Two letters came from <town>: one for <person>, about <topic>, and one that <nobody> would open.",
    "The <traders> of the <place> agreed to mend the sea wall, provided that <person> paid for the stone.",
    "There had been <weather> for <few> days, and the gardens above the <place> suffered for it.",
    "<Person> taught the younger <traders> how to tell good <cargo> from bad by the smell.",
    "A dog that belonged to <person> slept <manner> on the deck of the <ship>.",
    "The lamp at the end of the pier went out, and <person> climbed up with <thing> to see why.",
    "Everyone remembered the year when the <ship> brought <cargo> from <town> although <reason>.",
    "For supper there was bread, <cargo> and a soup that <person> had learned to make in <town>.",
    "<Person> drew a map of the <place> and of the rocks around it, and gave it to the captain of the <ship>.",
    "It was said in the tavern that <opinion>, and that <person> had known it since <month>.",
    "After long talk of <topic>, the <traders> and the <traders> shook hands <manner>.",
    "The doctor visited <person>, who had a cold, and prescribed <cargo> and <few> days in bed.",
    "Where the road from <town> meets the harbour, <person> planted <few> young trees.",
];

/// The words of each symbol.
const WORDS: &[(&str, &[&str])] = &[
    ("weekday", &["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]),
    (
        "month",
        &[
            "January",
            "February",
            "March",
            "April",
            "May",
            "June",
            "July",
            "August",
            "September",
            "October",
            "November",
            "December",
        ],
    ),
    ("direction", &["north", "south", "east", "west", "north-east", "south-west", "open sea"]),
    ("busy", &["crowded", "almost empty", "full of voices", "quiet", "as busy as in the old days"]),
    (
        "weather",
        &[
            "a thin fog",
            "heavy rain",
            "a pale sun",
            "a dry and dusty wind",
            "the first frost",
            "low clouds",
            "a clear sky",
            "a storm that would not break",
            "soft snow",
            "great heat",
        ],
    ),
    (
        "place",
        &[
            "old pier",
            "fish market",
            "customs house",
            "stone bridge",
            "rope works",
            "sail loft",
            "chapel",
            "lower quay",
            "mill",
            "town well",
            "ferry landing",
            "boat yard",
            "salt store",
            "watch tower",
            "school",
        ],
    ),
    ("few", &["two", "three", "four", "five", "six", "seven", "eight", "nine", "a dozen"]),
    (
        "topic",
        &[
            "the new tax on salt",
            "a wedding in the hills",
            "the missing anchor",
            "the repair of the sea wall",
            "herring and where they had gone",
            "a loan that was never paid back",
            "the price of tar",
            "the song that sailors bring home",
            "winter wood",
            "an election that nobody wanted",
            "ghosts on the sandbank",
            "the proper way to splice a rope",
        ],
    ),
    (
        "person",
        &[
            "Marta Holm",
            "Jonas Reed",
            "old Pieter",
            "Agnes Vane",
            "Tomas Quill",
            "the widow Brandt",
            "Elias Stone",
            "Clara Finch",
            "Henrik Dahl",
            "Ruth Amsel",
            "Captain Orme",
            "Lena Marsh",
            "the miller's son",
            "Osric Pell",
            "Ida Kern",
            "Father Bly",
        ],
    ),
    (
        "trade",
        &[
            "cooper",
            "fishmonger",
            "net maker",
            "carpenter",
            "baker",
            "sailmaker",
            "smith",
            "weaver",
            "tailor",
            "pilot",
        ],
    ),
    (
        "traders",
        &[
            "coopers",
            "fishmongers",
            "net makers",
            "carpenters",
            "bakers",
            "sailmakers",
            "smiths",
            "weavers",
            "pilots",
            "apprentices",
        ],
    ),
    (
        "cargo",
        &[
            "salt",
            "dried cod",
            "barrels of tar",
            "blue cloth",
            "oranges",
            "window glass",
            "oak planks",
            "lamp oil",
            "wool",
            "black pepper",
            "iron nails",
            "honey",
            "rye flour",
            "copper wire",
            "smoked eel",
            "paper",
        ],
    ),
    (
        "ship",
        &[
            "Grey Heron",
            "Patience",
            "Northern Star",
            "Good Intent",
            "Swallow",
            "Three Sisters",
            "Morning Tide",
            "Juniper",
            "Old Bess",
            "Albatross",
            "Merry Widow",
            "Lodestone",
        ],
    ),
    (
        "town",
        &[
            "Varnholm",
            "Eastmouth",
            "Lindow",
            "Port Carrick",
            "Saltby",
            "Osterwick",
            "Hallan",
            "Greystead",
            "Merrow",
            "Tarn Bay",
            "Kelding",
            "Whitcombe",
        ],
    ),
    ("nobody", &["nobody", "hardly anyone", "no honest man", "not even her brother", "only the priest"]),
    (
        "reason",
        &[
            "the rudder was cracked",
            "the river was frozen",
            "the pilots would not sail",
            "a letter had not come",
            "the harvest had failed inland",
            "her captain was ill",
            "the wind had been against them",
            "the scales were being tested",
            "the road was under water",
        ],
    ),
    (
        "opinion",
        &[
            "the winter would be long",
            "no good comes of borrowed boats",
            "the fish follow the moon",
            "the harbour was better governed by the tide",
            "a town is only as strong as its bridge",
            "the new lamp shone too far",
            "rope should never be bought in the rain",
            "the young had forgotten how to wait",
            "there was gold in the sandbank after all",
        ],
    ),
    (
        "thing",
        &[
            "a silver button",
            "a broken oar",
            "an empty bottle with a note in it",
            "a wooden horse",
            "a rusted key",
            "a bundle of candles",
            "a sailor's cap",
            "a coil of new rope",
            "a cracked bell",
            "a basket of eggs",
        ],
    ),
    (
        "manner",
        &[
            "in silence",
            "without hurry",
            "as if nothing had happened",
            "with some pride",
            "until dark",
            "in good spirits",
            "slowly",
            "to everyone's surprise",
        ],
    ),
];

/// `template` with every symbol replaced; a capital letter in the symbol makes one in the word.
/// `day` numbers the chronicle's days, so that dates run forward.
pub(super) fn expand(template: &str, rng: &mut SplitMix64, day: usize) -> String {
    let mut out = String::with_capacity(template.len() * 2);
    let mut rest = template;
    while let Some(open) = rest.find('<') {
        let close = open + rest[open..].find('>').expect("the grammar closes its symbols");
        out.push_str(&rest[..open]);
        let symbol = &rest[open + 1..close];
        let word = word(&symbol.to_lowercase(), rng, day);
        if symbol.starts_with(char::is_uppercase) {
            let mut letters = word.chars();
            out.extend(letters.next().into_iter().flat_map(char::to_uppercase));
            out.push_str(letters.as_str());
        } else {
            out.push_str(&word);
        }
        rest = &rest[close + 1..];
    }
    out.push_str(rest);
    out
}

/// Days of the chronicle's month: none has a 29th, so that every date exists.
const DAYS: usize = 28;

fn word(symbol: &str, rng: &mut SplitMix64, day: usize) -> String {
    let of = |name: &str| {
        WORDS.iter().find(|(symbol, _)| *symbol == name).expect("every symbol of the grammar has words").1
    };
    match symbol {
        "ordinal" => ordinal(day % DAYS + 1),
        "month" => {
            let months = of("month");
            months[day / DAYS % months.len()].to_owned()
        }
        other => pick(rng, of(other)).to_owned(),
    }
}

fn ordinal(day: usize) -> String {
    let ending = match (day % 10, day % 100) {
        (1, n) if n != 11 => "st",
        (2, n) if n != 12 => "nd",
        (3, n) if n != 13 => "rd",
        _ => "th",
    };
    format!("{day}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinals_end_as_one_says_them() {
        let said: Vec<String> = [1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 28].into_iter().map(ordinal).collect();
        assert_eq!(
            said,
            ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "23rd", "28th"]
        );
    }

    #[test]
    fn every_symbol_of_every_template_expands() {
        let mut rng = SplitMix64::new(1);
        for template in OPENINGS.iter().chain(SENTENCES) {
            let text = expand(template, &mut rng, 40);
            assert!(!text.contains('<'), "{template}: {text}");
            assert!(text.starts_with(char::is_uppercase), "{template}: {text}");
        }
    }
}
