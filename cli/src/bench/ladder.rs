//! Which methods are compared, and with which budgets.

use kvoyant_methods::{Budget, MethodSpec, SpecError, registry};

/// The specifications to compare: of each method one for every budget, and its own rule where it has one beside a budget.
///
/// `names` are methods with or without options; none at all stands for every method that the registry lists and that stands
/// for itself.
///
/// # Errors
/// A name or an option that is none.
pub(crate) fn rungs(names: &[String], budgets: &[Budget]) -> Result<Vec<MethodSpec>, SpecError> {
    let all: Vec<String> =
        registry::names().filter(|name| !NEEDS_OPTIONS.contains(name)).map(str::to_owned).collect();
    let names = if names.is_empty() { &all } else { names };
    let mut rungs = Vec::new();
    for name in names {
        let plain: MethodSpec = name.parse()?;
        let budgeted: Vec<MethodSpec> =
            budgets.iter().filter_map(|budget| with_budget(name, *budget)).collect();
        // Without a budget the method decides itself how much it needs: that is a row of its own.
        if plain.budget().is_none() || budgeted.is_empty() {
            rungs.push(plain);
        }
        rungs.extend(budgeted);
    }
    Ok(rungs)
}

/// Methods that say nothing without options: which methods to mix is the user's choice.
const NEEDS_OPTIONS: &[&str] = &["mix"];

/// The method with that budget; none where it takes no budget, or has one already.
fn with_budget(name: &str, budget: Budget) -> Option<MethodSpec> {
    let join = if name.contains(':') { ',' } else { ':' };
    if name.split([':', ',']).any(|option| option.trim_start().starts_with("budget=")) {
        return None;
    }
    format!("{name}{join}budget={budget}").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(names: &[&str], budgets: &[&str]) -> Vec<String> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let budgets: Vec<Budget> = budgets.iter().map(|budget| budget.parse().unwrap()).collect();
        rungs(&names, &budgets).unwrap().iter().map(ToString::to_string).collect()
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
    fn an_unknown_method_is_an_error() {
        assert!(rungs(&["nothing".to_owned()], &[]).is_err());
    }
}
