//! The texts that tasks hide things in, and that are continued: a chronicle from a seeded grammar, our own documents, the user's file.
//!
//! The grammar is a plain context-free one, and the generator never changes its stream: what a seed
//! writes stays the same, so numbers of two versions can be compared.

mod grammar;

use kvoyant_kernels::SplitMix64;

use self::grammar::{OPENINGS, SENTENCES, expand};

/// One of `items`, which must not be empty.
pub(crate) fn pick<T: Copy>(rng: &mut SplitMix64, items: &[T]) -> T {
    items[rng.below(items.len())]
}

/// Counts the tokens of a text.
pub trait CountTokens {
    /// How many tokens `text` has, without any that a tokenizer adds around it.
    fn count(&self, text: &str) -> usize;
}

impl<F: Fn(&str) -> usize> CountTokens for F {
    fn count(&self, text: &str) -> usize {
        self(text)
    }
}

/// Sentences of a harbour town's chronicle, day after day, without end.
#[derive(Clone, Debug)]
pub struct Chronicle {
    rng: SplitMix64,
    day: usize,
    left_in_day: usize,
    last: usize,
}

impl Chronicle {
    /// The chronicle that `seed` writes.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { rng: SplitMix64::new(seed), day: 0, left_in_day: 0, last: usize::MAX }
    }

    /// The next sentence, ended by a space, or by an empty line where a day is over.
    pub fn sentence(&mut self) -> String {
        let mut out = if self.left_in_day == 0 {
            self.left_in_day = 3 + self.rng.below(4);
            self.day += 1 + self.rng.below(3);
            let opening = pick(&mut self.rng, OPENINGS);
            expand(opening, &mut self.rng, self.day)
        } else {
            // The same template twice in a row reads like a stutter.
            let mut at = self.rng.below(SENTENCES.len());
            if at == self.last {
                at = (at + 1) % SENTENCES.len();
            }
            self.last = at;
            expand(SENTENCES[at], &mut self.rng, self.day)
        };
        self.left_in_day -= 1;
        out.push_str(if self.left_in_day == 0 { "\n\n" } else { " " });
        out
    }
}

/// No piece is longer than this, in characters: needles go between pieces.
const PIECE_CHARS: usize = 600;

/// Cuts a text into pieces of one sentence or line each, losing nothing: they join to the same text.
#[must_use]
pub fn pieces(text: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut piece = String::new();
    let mut length = 0;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        piece.push(c);
        length += 1;
        let sentence = c == ' ' && piece.trim_end_matches(' ').ends_with(['.', '!', '?']);
        let blank_follows = matches!(chars.peek(), Some(' ' | '\n'));
        let line = c == '\n' && chars.peek() != Some(&'\n');
        if line || (sentence && !blank_follows) || length >= PIECE_CHARS {
            all.push(std::mem::take(&mut piece));
            length = 0;
        }
    }
    if !piece.is_empty() {
        all.push(piece);
    }
    all
}

/// Filler for a context: the chronicle, or the user's text over and over.
#[derive(Debug)]
pub enum Filler {
    /// The grammar's.
    Chronicle(Chronicle),
    /// A text's pieces, and which one is next.
    Text(Vec<String>, usize),
}

impl Filler {
    /// The user's text, or the chronicle that `seed` writes.
    #[must_use]
    pub fn new(text: Option<&str>, seed: u64) -> Self {
        match text.map(pieces) {
            Some(pieces) if !pieces.is_empty() => Self::Text(pieces, 0),
            _ => Self::Chronicle(Chronicle::new(seed)),
        }
    }

    fn next(&mut self) -> String {
        match self {
            Self::Chronicle(chronicle) => chronicle.sentence(),
            Self::Text(pieces, at) => {
                let piece = pieces[*at].clone();
                *at = (*at + 1) % pieces.len();
                piece
            }
        }
    }

    /// Pieces whose sum is as near below `tokens` as whole pieces allow.
    pub fn take(&mut self, tokens: usize, count: &dyn CountTokens) -> Vec<String> {
        let mut all = Vec::new();
        let mut sum = 0;
        loop {
            let next = self.next();
            sum += count.count(&next);
            if sum > tokens {
                return all;
            }
            all.push(next);
        }
    }
}

/// The licence and our own documents, in one text: what the demo continues word by word. The licence comes first,
/// because it never changes, and numbers at the default length should not either.
#[must_use]
pub fn documents() -> String {
    [include_str!("../../../LICENSE-APACHE"), include_str!("../../../README.md")].join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> usize {
        text.split_whitespace().count()
    }

    #[test]
    fn the_same_seed_writes_the_same_chronicle_and_another_seed_another() {
        let write = |seed| Filler::new(None, seed).take(2000, &words).concat();
        assert_eq!(write(7), write(7));
        assert_ne!(write(7), write(8));
    }

    #[test]
    fn a_chronicle_has_the_wanted_length_to_a_sentence() {
        for tokens in [100, 500, 2000] {
            let text = Filler::new(None, 3).take(tokens, &words).concat();
            let got = words(&text);
            assert!(got <= tokens && got + 60 > tokens, "{got} words for {tokens}");
        }
    }

    #[test]
    fn no_symbol_of_the_grammar_is_left_unexpanded() {
        let text = Filler::new(None, 11).take(30_000, &words).concat();
        assert!(!text.contains(['<', '>']), "an unexpanded symbol is left");
        assert!(!text.contains("  "), "two spaces in a row");
    }

    #[test]
    fn a_chronicle_is_varied() {
        let all = Filler::new(None, 5).take(2000, &words);
        let distinct: std::collections::BTreeSet<&str> = all.iter().map(|s| s.trim()).collect();
        assert!(
            distinct.len() * 10 >= all.len() * 9,
            "{} of {} sentences are distinct",
            distinct.len(),
            all.len()
        );
    }

    #[test]
    fn pieces_join_to_the_text_they_came_from() {
        let long = "word ".repeat(1000);
        for text in ["", "One. Two! Three?\nFour", "no end", "é. ü? \n\n3.14 stays whole. End.\n", &long] {
            assert_eq!(pieces(text).concat(), text);
        }
        assert!(pieces(&long).len() > 5);
        assert_eq!(pieces("One. Two! Three").len(), 3);
        assert_eq!(pieces("3.14 is one").len(), 1);
    }

    #[test]
    fn a_users_text_is_used_from_its_beginning_and_again_when_it_ends() {
        let mut filler = Filler::new(Some("One two. Three four. "), 0);
        assert_eq!(filler.take(6, &words).concat(), "One two. Three four. One two. ");
    }
}
