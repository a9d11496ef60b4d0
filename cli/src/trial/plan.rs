//! What is asked: contexts with questions, and texts to continue, as tokens.

use std::io;
use std::path::{Path, PathBuf};

use kvoyant_engine::{Message, Model, SplitMix64, TextError};
use kvoyant_eval::tasks::{self, INTRODUCTION, Question, Task};
use kvoyant_eval::texts::{self, Filler};

/// How much is asked.
#[derive(Clone, Debug)]
pub(crate) struct Size {
    /// Tokens of each context and text.
    pub(crate) context: usize,
    /// For each context, the tasks that it has.
    pub(crate) contexts: Vec<&'static [Task]>,
    /// Places, over all texts, from which a text is continued; an even number.
    pub(crate) continuations: usize,
    /// True tokens that each continuation feeds; after each, the next one is predicted and compared.
    pub(crate) steps: usize,
    /// Room for a question and its answer, or for a continuation, behind a context.
    pub(crate) room: usize,
}

impl Size {
    /// The demo's two tasks.
    pub(crate) const DEMO_TASKS: &'static [Task] = &[Task::Single, Task::Multi];

    /// The demo's: three contexts, and twelve continuations of 24 tokens.
    pub(crate) fn demo(context: usize) -> Self {
        Self { context, contexts: vec![Self::DEMO_TASKS; 3], continuations: 12, steps: 24, room: 96 }
    }

    /// Room behind a context that anything may need.
    fn reserve(&self) -> usize {
        self.room.max(self.steps + 1)
    }
}

/// Shorter contexts show nothing: sinks, window and question would be most of them.
const SHORTEST_CONTEXT: usize = 512;

/// More than a sentence of the chronicle has.
const SENTENCE_TOKENS: usize = 80;

/// Stands between the text and the question while the chat template is applied.
const SEAM: &str = "\u{1}";

/// Why there is nothing to ask.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    /// The context is too small or too large for the model.
    #[error(
        "a context of {context} tokens does not go with this model: choose {SHORTEST_CONTEXT} to {longest} tokens"
    )]
    Context {
        /// What was asked for.
        context: usize,
        /// The most that leaves room for questions.
        longest: usize,
    },
    /// The model is too small for any comparison.
    #[error("the model's context of {context} tokens is too short for this comparison, which needs {needed}")]
    Model {
        /// What the model has.
        context: usize,
        /// What is needed.
        needed: usize,
    },
    /// `--text` cannot be read.
    #[error("{} cannot be read: {error}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// `--text` is too short.
    #[error("{} has {tokens} tokens; at least {needed} are needed", .path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// What it has.
        tokens: usize,
        /// What it would need.
        needed: usize,
    },
    /// The tokenizer or the chat template refused.
    #[error(transparent)]
    Text(#[from] TextError),
}

/// A context and its questions, as tokens.
#[derive(Debug)]
pub(crate) struct AskedContext {
    /// Chat template, introduction and text.
    pub(crate) tokens: Vec<u32>,
    /// Each with the tokens from the question to the begun answer.
    pub(crate) questions: Vec<(Question, Vec<u32>)>,
}

/// A text and where it is continued from.
#[derive(Debug)]
pub(crate) struct Continued {
    /// The text, up to the last token that is predicted.
    pub(crate) tokens: Vec<u32>,
    /// How many tokens are read before each continuation, rising by [`Size::steps`].
    pub(crate) starts: Vec<usize>,
    /// True tokens that each feeds.
    steps: usize,
}

impl Continued {
    /// The tokens that a continuation feeds, and one more: the last that it predicts.
    pub(crate) fn truths(&self) -> impl Iterator<Item = &[u32]> {
        self.starts.iter().map(|start| &self.tokens[*start..=start + self.steps])
    }

    /// The first `context` tokens of `tokens` and what follows, continued from `places` places.
    fn new(mut tokens: Vec<u32>, size: &Size, places: usize) -> Self {
        let steps = size.steps;
        tokens.truncate(size.context + steps + 1);
        let last = tokens.len().saturating_sub(steps + 1);
        let starts = (0..places).rev().map(|back| last.saturating_sub(back * steps)).collect();
        Self { tokens, starts, steps }
    }
}

/// Everything that one comparison asks.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Contexts with needles.
    pub(crate) contexts: Vec<AskedContext>,
    /// Texts to continue, all with equally many tokens to come.
    pub(crate) continued: Vec<Continued>,
}

impl Plan {
    /// Makes texts of that size from `seed`, or around the user's text.
    ///
    /// # Errors
    /// If the sizes do not go together, or a text cannot be had.
    pub(crate) fn new(model: &Model, size: &Size, text: Option<&Path>, seed: u64) -> Result<Self, PlanError> {
        let (context, room, reserve) = (size.context, model.config().context_tokens, size.reserve());
        let needed = SHORTEST_CONTEXT + reserve;
        if room < needed {
            return Err(PlanError::Model { context: room, needed });
        }
        let longest = room - reserve;
        if !(SHORTEST_CONTEXT..=longest).contains(&context) {
            return Err(PlanError::Context { context, longest });
        }
        let own = text.map(|path| read(path).map(|text| (path, text))).transpose()?;
        let mut rng = SplitMix64::new(seed);
        let mut filler = Filler::new(own.as_ref().map(|(_, text)| text.as_str()), rng.bits());
        let contexts = size
            .contexts
            .iter()
            .map(|tasks| asked(model, tasks, context, &mut filler, &mut rng))
            .collect::<Result<_, _>>()?;
        let continued = match own {
            Some((path, text)) => {
                vec![Continued::new(users(model, size, path, &text)?, size, size.continuations)]
            }
            None => [
                documents(model, size, &mut Filler::new(None, rng.bits()))?,
                chronicle(model, size, &mut Filler::new(None, rng.bits()))?,
            ]
            .map(|tokens| Continued::new(tokens, size, size.continuations / 2))
            .into(),
        };
        Ok(Self { contexts, continued })
    }

    /// Tokens that are read before anything is decoded.
    pub(crate) fn prefill_tokens(&self) -> usize {
        let contexts = self.contexts.iter().map(|context| {
            context.tokens.len() + context.questions.iter().map(|(_, tokens)| tokens.len()).sum::<usize>()
        });
        contexts.chain(self.continued.iter().filter_map(|text| text.starts.last().copied())).sum()
    }
}

/// Counts tokens; a text that the tokenizer refuses is too long for everything.
fn count(model: &Model) -> impl Fn(&str) -> usize {
    |text: &str| model.tokenizer().encode(text, false).map_or(usize::MAX / 2, |tokens| tokens.len())
}

/// The user's text; what is no UTF-8 in it is replaced.
fn read(path: &Path) -> Result<String, PlanError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) => Err(PlanError::Read { path: path.to_owned(), error }),
    }
}

/// A context and its questions.
fn asked(
    model: &Model,
    tasks: &[Task],
    context: usize,
    filler: &mut Filler,
    rng: &mut SplitMix64,
) -> Result<AskedContext, PlanError> {
    let count = count(model);
    let frame = Frame::of(model)?;
    let around = count(&frame.before) + count(&frame.between);
    let made = tasks::context(tasks, context.saturating_sub(around), filler, rng, &count);
    let tokenizer = model.tokenizer();
    let tokens =
        tokenizer.encode(&format!("{}{}{}", frame.before, made.text, frame.between), frame.add_special)?;
    let questions = made
        .questions
        .into_iter()
        .map(|question| {
            let text = format!("{}{}{}", question.ask, frame.after, question.begin);
            let tokens = tokenizer.encode(&text, false)?;
            Ok((question, tokens))
        })
        .collect::<Result<_, TextError>>()?;
    Ok(AskedContext { tokens, questions })
}

/// What stands around text and question.
struct Frame {
    before: String,
    between: String,
    after: String,
    add_special: bool,
}

impl Frame {
    /// The chat template's, or a plain one where the model has none.
    fn of(model: &Model) -> Result<Self, TextError> {
        if let Some(template) = model.chat_template() {
            let content = format!("{INTRODUCTION}{SEAM}\n\n{SEAM}");
            let text = template.render(&[Message::user(content)], true)?;
            if let [before, between, after] = text.split(SEAM).collect::<Vec<_>>()[..] {
                let [before, between, after] = [before, between, after].map(str::to_owned);
                return Ok(Self { before, between, after, add_special: false });
            }
        }
        Ok(Self {
            before: INTRODUCTION.to_owned(),
            between: "\n\n".to_owned(),
            after: "\n\n".to_owned(),
            add_special: true,
        })
    }
}

/// Our documents; where they are too short, a chronicle stands before them.
fn documents(model: &Model, size: &Size, lead: &mut Filler) -> Result<Vec<u32>, TextError> {
    let needed = size.context + size.steps + 1;
    let text = texts::documents();
    let count = count(model);
    let missing = needed.saturating_sub(count(&text));
    // A sentence more than is missing: the beginning is cut to measure.
    let lead =
        if missing == 0 { String::new() } else { lead.take(missing + SENTENCE_TOKENS, &count).concat() };
    let tokens = model.tokenizer().encode(&(lead + &text), true)?;
    let first = if missing == 0 { 0 } else { tokens.len().saturating_sub(needed) };
    Ok(tokens[first..].to_vec())
}

/// A chronicle.
fn chronicle(model: &Model, size: &Size, filler: &mut Filler) -> Result<Vec<u32>, TextError> {
    let tokens = size.context + size.steps + 1 + SENTENCE_TOKENS;
    let text = filler.take(tokens, &count(model)).concat();
    model.tokenizer().encode(&text, true)
}

/// The beginning of the user's text.
fn users(model: &Model, size: &Size, path: &Path, text: &str) -> Result<Vec<u32>, PlanError> {
    // No token is longer than this; the rest of a huge file need not be read by the tokenizer.
    const LONGEST_TOKEN_CHARS: usize = 128;
    let most = size.context + size.steps + 1;
    let beginning: String = text.chars().take(most * LONGEST_TOKEN_CHARS).collect();
    let tokens = model.tokenizer().encode(&beginning, true)?;
    let needed = SHORTEST_CONTEXT + size.steps + 1;
    if tokens.len() < needed {
        return Err(PlanError::Short { path: path.to_owned(), tokens: tokens.len(), needed });
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvoyant_engine::synthetic;

    #[test]
    fn a_plan_has_at_least_sixteen_questions_and_contexts_of_the_wanted_length() {
        let model = synthetic::tiny(1);
        let plan = Plan::new(&model, &Size::demo(1024), None, 5).unwrap();
        assert!(plan.contexts.iter().map(|context| context.questions.len()).sum::<usize>() >= 16);
        for context in &plan.contexts {
            assert!((800..=1024).contains(&context.tokens.len()), "{}", context.tokens.len());
        }
        for text in &plan.continued {
            assert_eq!(text.starts.last(), Some(&1024));
            for truth in text.truths() {
                assert_eq!(truth.len(), 24 + 1);
            }
        }
        let starts: usize = plan.continued.iter().map(|text| text.starts.len()).sum();
        assert_eq!(starts, 12);
    }

    #[test]
    fn the_same_seed_makes_the_same_plan() {
        let model = synthetic::tiny(1);
        let tokens =
            |seed| Plan::new(&model, &Size::demo(600), None, seed).unwrap().contexts.remove(0).tokens;
        assert_eq!(tokens(5), tokens(5));
        assert_ne!(tokens(5), tokens(6));
    }

    #[test]
    fn a_users_text_is_read_and_continued() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text");
        std::fs::write(&path, "A user's own words. ".repeat(100)).unwrap();
        let model = synthetic::tiny(1);
        let plan = Plan::new(&model, &Size::demo(1024), Some(&path), 5).unwrap();
        let [text] = &plan.continued[..] else { panic!("one text") };
        assert_eq!(text.starts.len(), 12);
        assert!(model.tokenizer().decode(&plan.contexts[0].tokens).unwrap().contains("A user's own words."));
        std::fs::write(&path, "Too short.").unwrap();
        assert!(matches!(Plan::new(&model, &Size::demo(1024), Some(&path), 5), Err(PlanError::Short { .. })));
    }
}
