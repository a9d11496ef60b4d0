//! Methods on the command line.

use kvoyant_daemon::config::keys::nearest;
use kvoyant_methods::{MethodSpec, SpecError, given, registry};

/// What `run` takes: every method's name comes from the registry, so that the help cannot miss one. `given` is for engines that name rows
/// themselves, which `run` does not.
pub(crate) fn help() -> String {
    let names: Vec<&str> = registry::names().filter(|name| *name != given::NAME).collect();
    format!("How rows are selected: {}, each with options as `name:key=value,…`", names.join(", "))
}

/// Reads a method.
///
/// # Errors
/// Why it is none, with the name that may have been meant.
pub(crate) fn parse(text: &str) -> Result<MethodSpec, String> {
    text.parse().map_err(|error| refusal(&error))
}

/// The same, for whoever goes on with the text.
///
/// # Errors
/// As [`parse`].
pub(crate) fn checked(text: &str) -> Result<String, String> {
    parse(text).map(|_| text.to_owned())
}

/// Why a text is no method, with the name that may have been meant.
pub(crate) fn refusal(error: &SpecError) -> String {
    let meant = match error {
        SpecError::UnknownMethod { name, .. } => nearest(name, registry::names()),
        _ => None,
    };
    meant.map_or_else(|| error.to_string(), |meant| format!("{error}; did you mean `{meant}`?"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;
    use clap::CommandFactory;

    #[test]
    fn the_help_of_a_run_names_every_method_that_it_can_use() {
        let mut command = Cli::command();
        let help = command.find_subcommand_mut("run").unwrap().render_long_help().to_string();
        let words: Vec<&str> = help.split([',', ' ', ':', '\n']).collect();
        for name in registry::names() {
            assert_eq!(words.contains(&name), name != given::NAME, "{name}");
        }
    }

    #[test]
    fn a_misspelt_method_is_answered_with_the_nearest_name() {
        for (written, meant) in
            [("kvoyent", "kvoyant"), ("qest:page=16", "quest"), ("infinigem", "infinigen")]
        {
            let said = parse(written).unwrap_err();
            assert!(
                said.contains("choose one of") && said.ends_with(&format!("did you mean `{meant}`?")),
                "{said}"
            );
        }
        assert!(!parse("fortune").unwrap_err().contains("did you mean"));
    }
}
