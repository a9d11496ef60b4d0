//! Which methods are compared, and with which budgets.

use kvoyant_engine::{Dtype, Format};
use kvoyant_eval::row::Skipped;
use kvoyant_methods::{Budget, HintSource, MethodSpec, SpecError, kvoyant, registry};

/// One row to be made.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rung {
    /// The method.
    pub(crate) spec: MethodSpec,
    /// Rows per KV head: the method's own budget, or how many the engine names for it.
    pub(crate) budget: Option<Budget>,
    /// How rows are stored.
    pub(crate) format: Format,
}

/// How rows are stored but where the format is what is compared.
pub(crate) const PLAIN: Format = Format::Plain(Dtype::F16);

/// FlexGen's compressed rows: `full` is compared with them too.
const COMPRESSED: Format = Format::Int4 { group: 64 };

/// The default method is compared as it moves rows, chosen ahead; as it works in place, by the true query; and so over rows of half the bytes,
/// twice as many of them.
const OURS: [(&str, Format); 3] =
    [("kvoyant:hint=ahead", PLAIN), ("kvoyant", PLAIN), ("kvoyant:multiple=2", Format::Int8)];

/// Methods that say nothing without options: which methods to mix is the user's choice.
const NEEDS_OPTIONS: &[&str] = &["mix"];

/// The rows to make: of each method one for every budget, and its own rule where it has one beside a budget. For a method
/// whose rows the engine names, the budget is how many of the true best it names.
///
/// `names` are methods with or without options; none at all stands for every method of the registry that needs none, and for
/// `full` with compressed rows.
///
/// # Errors
/// A name or an option that is none.
pub(crate) fn rungs(names: &[String], budgets: &[Budget]) -> Result<Vec<Rung>, SpecError> {
    let others = registry::names().filter(|name| !NEEDS_OPTIONS.contains(name) && *name != kvoyant::NAME);
    let all = OURS.into_iter().chain(others.map(|name| (name, PLAIN)));
    let chosen: Vec<(&str, Format)> = if names.is_empty() {
        all.collect()
    } else {
        names.iter().map(|name| (name.as_str(), PLAIN)).collect()
    };
    let mut rungs = Vec::new();
    for (name, format) in chosen {
        let plain: MethodSpec = name.parse()?;
        let rung = |spec: MethodSpec| Rung { format, ..rung(spec) };
        if plain.hint() == HintSource::Ids {
            rungs.extend(budgets.iter().map(|budget| Rung { budget: Some(*budget), ..rung(plain.clone()) }));
            continue;
        }
        let budgeted: Vec<MethodSpec> =
            budgets.iter().filter_map(|budget| with_budget(name, *budget)).collect();
        // Without a budget the method decides itself how much it needs: that is a row of its own.
        if plain.budget().is_none() || budgeted.is_empty() {
            rungs.push(rung(plain));
        }
        rungs.extend(budgeted.into_iter().map(rung));
    }
    if names.is_empty() {
        rungs.insert(0, Rung { format: COMPRESSED, ..rung("full".parse()?) });
    }
    Ok(rungs)
}

/// What `names` stand for and nobody can run as it is.
pub(crate) fn skipped(names: &[String]) -> Vec<Skipped> {
    let left_out = NEEDS_OPTIONS.iter().filter(|_| names.is_empty());
    left_out
        .map(|name| Skipped {
            spec: (*name).to_owned(),
            format: PLAIN.to_string(),
            source: String::new(),
            reason: "it says nothing without options: name the methods that it is of with --method".into(),
        })
        .collect()
}

fn rung(spec: MethodSpec) -> Rung {
    Rung { budget: spec.budget(), spec, format: PLAIN }
}

/// The method with that budget; none where it takes no budget, or has one already.
fn with_budget(name: &str, budget: Budget) -> Option<MethodSpec> {
    let join = if name.contains(':') { ',' } else { ':' };
    // Its budget is one of each query; what it may fetch for a KV head is its cap.
    let cap = if name.starts_with("louver") { format!(",cap={budget}") } else { String::new() };
    if name.split([':', ',']).any(|option| option.trim_start().starts_with("budget=")) {
        return None;
    }
    format!("{name}{join}budget={budget}{cap}").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(names: &[&str], budgets: &[&str]) -> Vec<String> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let budgets: Vec<Budget> = budgets.iter().map(|budget| budget.parse().unwrap()).collect();
        rungs(&names, &budgets).unwrap().iter().map(|rung| rung.spec.to_string()).collect()
    }

    #[test]
    fn a_method_with_a_budget_has_a_row_for_each() {
        let found = texts(&["random"], &["3%", "12%"]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("3%") && found[1].contains("12%"), "{found:?}");
    }

    #[test]
    fn a_method_without_a_budget_has_one_row_and_one_with_a_rule_of_its_own_has_both() {
        assert_eq!(texts(&["full"], &["3%", "6%"]), ["full"]);
        assert_eq!(texts(&["infinigen"], &["3%", "6%"]).len(), 3);
    }

    #[test]
    fn a_budget_that_the_user_gave_is_not_overridden() {
        assert_eq!(texts(&["random:budget=5%"], &["3%", "6%"]).len(), 1);
    }

    #[test]
    fn without_names_every_method_of_the_registry_is_there() {
        let found = texts(&[], &["6%"]);
        for name in registry::names().filter(|name| !NEEDS_OPTIONS.contains(name)) {
            assert!(found.iter().any(|spec| spec.split(':').next() == Some(name)), "{name}");
        }
    }

    #[test]
    fn what_the_engine_names_has_a_row_for_each_budget_and_full_one_with_compressed_rows() {
        let budgets = ["3%", "6%"].map(|budget| budget.parse().unwrap());
        let given = rungs(&["given".to_owned()], &budgets).unwrap();
        assert_eq!(given.iter().map(|rung| rung.budget).collect::<Vec<_>>(), budgets.map(Some));
        let all = rungs(&[], &budgets).unwrap();
        assert!(all.iter().any(|rung| rung.spec.name() == "full" && rung.format == COMPRESSED));
    }

    #[test]
    fn an_unknown_method_is_an_error() {
        assert!(rungs(&["nothing".to_owned()], &[]).is_err());
    }
}
