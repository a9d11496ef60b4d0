//! How a model wants a conversation written: the Jinja template of its files.

use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;

use crate::error::{LoadError, TextError};

/// Instructions that rendering a conversation may take: templates come with models, and one need never end.
const FUEL: u64 = 10_000_000;

/// The template's name inside the environment.
const TEMPLATE: &str = "chat";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A user's turn.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".to_owned(), content: content.into() }
    }

    /// A system prompt.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".to_owned(), content: content.into() }
    }

    /// The model's turn.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: "assistant".to_owned(), content: content.into() }
    }
}

/// A parsed chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    begin_token: String,
    end_token: String,
}

impl ChatTemplate {
    /// Parses a template as Hugging Face's tokenizers do: blocks trimmed, Python's string methods, `raise_exception`.
    ///
    /// # Errors
    /// [`LoadError::ChatTemplate`] when it does not parse.
    pub fn new(source: &str, begin_token: &str, end_token: &str) -> Result<Self, LoadError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned(TEMPLATE, source.to_owned())
            .map_err(|error| LoadError::ChatTemplate { reason: error.to_string() })?;
        Ok(Self {
            environment,
            source: source.to_owned(),
            begin_token: begin_token.to_owned(),
            end_token: end_token.to_owned(),
        })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The conversation as the model wants to read it; with `add_generation_prompt` the model's turn is begun. Encode the result
    /// without adding special tokens: they are in it.
    ///
    /// # Errors
    /// [`TextError::Template`] when the template refuses the conversation.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TextError> {
        let failed = |error: minijinja::Error| {
            TextError::Template(error.detail().map_or_else(|| error.to_string(), str::to_owned))
        };
        let template = self.environment.get_template(TEMPLATE).map_err(failed)?;
        template
            .render(context! {
                messages => messages,
                add_generation_prompt => add_generation_prompt,
                bos_token => self.begin_token,
                eos_token => self.end_token,
            })
            .map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}\n  {{ '<|im_start|>' + message['role'] + '\\n' + message.content.strip() + '<|im_end|>\\n' }}\n{% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    #[test]
    fn a_conversation_is_written_as_the_template_says() {
        let template = ChatTemplate::new(CHATML, "<s>", "</s>").unwrap();
        let text = template.render(&[Message::user("  Hello ")], true).unwrap();
        assert!(text.contains("<|im_start|>user\nHello<|im_end|>\n"), "{text:?}");
        assert!(text.ends_with("<|im_start|>assistant\n"));
        assert!(!template.render(&[Message::user("Hello")], false).unwrap().contains("assistant"));
    }

    #[test]
    fn begin_and_end_tokens_are_known_to_the_template() {
        let template =
            ChatTemplate::new("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>", "</s>")
                .unwrap();
        assert_eq!(template.render(&[Message::system("x")], true).unwrap(), "<s>x</s>");
    }

    #[test]
    fn a_template_that_raises_says_why() {
        let source = "{{ raise_exception('Conversation roles must alternate') }}";
        let template = ChatTemplate::new(source, "", "").unwrap();
        let error = template.render(&[], true).unwrap_err();
        assert!(error.to_string().contains("Conversation roles must alternate"), "{error}");
    }

    #[test]
    fn a_template_that_does_not_parse_is_a_typed_error() {
        let error = ChatTemplate::new("{% for %}", "", "").unwrap_err();
        assert!(matches!(error, LoadError::ChatTemplate { .. }));
    }

    #[test]
    fn a_template_that_does_not_end_is_an_error() {
        let nested = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(nested, "<s>", "</s>").unwrap();
        assert!(template.render(&[Message::user("Hello")], true).is_err());
        let long: Vec<Message> = (0..2_000).map(|_| Message::user("Hello")).collect();
        assert!(ChatTemplate::new(CHATML, "<s>", "</s>").unwrap().render(&long, true).is_ok());
    }
}
