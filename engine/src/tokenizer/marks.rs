//! Where a text may be cut: how strong the boundary after each of its tokens is.

use kvoyant_methods::mark;

use super::Tokenizer;

/// Characters that close what a sentence or clause ended in: the mark before them is theirs.
const CLOSING: &[char] = &['"', '\'', '”', '’', ')', ']', '}', '»'];

impl Tokenizer {
    /// One [`kvoyant_methods::mark`] per token: whether a word, a clause, a sentence or a line ends with it.
    ///
    /// What follows the last token is not known. So a word's end shows there by white space alone, and a full stop counts
    /// as a sentence's end.
    #[must_use]
    pub fn marks(&self, tokens: &[u32]) -> Vec<u8> {
        let pieces: Vec<String> = tokens.iter().map(|token| self.piece(*token)).collect();
        let next = pieces.iter().skip(1).map(Some).chain([None]);
        pieces.iter().zip(next).map(|(piece, next)| mark_of(piece, next.map(String::as_str))).collect()
    }

    /// A token's text with the white space that it begins with, which decoding a single token may drop.
    fn piece(&self, token: u32) -> String {
        // Tokens that are no text, such as those of a chat template, end what stands before them.
        let text = self.inner.decode(&[token], false).unwrap_or_default();
        let raw = self.inner.id_to_token(token).unwrap_or_default();
        let leads = raw.starts_with(['Ġ', '▁', ' ']) && !text.starts_with(char::is_whitespace);
        if leads { format!(" {text}") } else { text }
    }
}

/// The boundary between a piece of text and what follows.
fn mark_of(piece: &str, next: Option<&str>) -> u8 {
    let space_follows = next.is_none_or(|next| next.is_empty() || next.starts_with(char::is_whitespace));
    let visible = piece.trim_end_matches([' ', '\t']);
    let ends_in_space = piece.len() > visible.len();
    if visible.ends_with(['\n', '\r', '\u{2028}', '\u{2029}']) {
        return mark::LINE;
    }
    let closed = space_follows || ends_in_space || next.is_some_and(|next| next.starts_with(CLOSING));
    match visible.trim_end_matches(CLOSING).chars().next_back() {
        Some('。' | '！' | '？') => mark::SENTENCE,
        Some('，' | '、' | '；' | '：') => mark::CLAUSE,
        Some('.' | '!' | '?' | '…') if closed => mark::SENTENCE,
        Some(',' | ';' | ':') if closed => mark::CLAUSE,
        _ if visible.ends_with(CLOSING) && closed && !visible.ends_with(['\'', '’']) => mark::CLAUSE,
        _ if ends_in_space || (next.is_some() && space_follows) => mark::WORD,
        _ => mark::NONE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::tiny;

    #[test]
    fn words_clauses_sentences_and_lines_end_where_a_reader_would_say() {
        for (piece, next, mark) in [
            ("ha", Some("lf"), mark::NONE),
            ("lf", Some(" a"), mark::WORD),
            (" time,", Some(" he"), mark::CLAUSE),
            (" said.", Some(" Then"), mark::SENTENCE),
            ("3.", Some("14"), mark::NONE),
            ("1,", Some("000"), mark::NONE),
            ("!", Some("\""), mark::SENTENCE),
            (".)", Some(" And"), mark::SENTENCE),
            (" (so)", Some(" it"), mark::CLAUSE),
            ("\n", Some("Next"), mark::LINE),
            (".\n\n", Some("Next"), mark::LINE),
            ("。", Some("好"), mark::SENTENCE),
            (".", None, mark::SENTENCE),
            ("word", None, mark::NONE),
            ("", Some("x"), mark::NONE),
        ] {
            assert_eq!(mark_of(piece, next), mark, "{piece:?} before {next:?}");
        }
    }

    #[test]
    fn every_token_of_a_text_has_a_mark() {
        let model = tiny(1);
        let tokens = model.tokenizer().encode("One, two. Three", false).unwrap();
        let marks = model.tokenizer().marks(&tokens);
        // The tiny model's tokens are bytes: a comma and a stop stand alone.
        let strong: Vec<u8> = marks.iter().copied().filter(|mark| *mark >= mark::CLAUSE).collect();
        assert_eq!((marks.len(), &strong[..]), (tokens.len(), &[mark::CLAUSE, mark::SENTENCE][..]));
    }
}
