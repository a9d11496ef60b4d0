//! Every quick attack, with its verdict; and canaries, which must not be taken for anything but what they are.

use std::path::PathBuf;
use std::time::Duration;

use kvoyant_hostile::neighbour::Checks;
use kvoyant_hostile::runner::{Options, Result, run};
use kvoyant_hostile::{Verdict, attacks, report};

fn options() -> Options {
    Options::quick(PathBuf::from(env!("CARGO_BIN_EXE_kvoyant-hostile")))
}

#[test]
fn every_attack_ends_as_it_has_to_and_the_neighbour_beside_it_is_unharmed() {
    let quick: Vec<_> = attacks::table().into_iter().filter(|attack| !attack.slow).collect();
    let results = run(&quick, &options(), |result| println!("{}", report::line(result)));
    let failed: Vec<_> = results.iter().filter(|result| !result.holds()).map(report::line).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    assert_eq!(results.len(), quick.len());
}

#[test]
fn there_are_at_least_60_attacks_with_names_of_their_own() {
    let table = attacks::table();
    assert!(table.len() >= 60, "{}", table.len());
    let mut names: Vec<_> = table.iter().chain(&attacks::canaries()).map(|attack| attack.name).collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all);
}

#[test]
fn canaries_are_reported_as_what_they_are() {
    let patience = Some(Duration::from_secs(2));
    let results = run(&attacks::canaries(), &Options { patience, ..options() }, |_| {});
    let of = |name: &str| -> &Result {
        results.iter().find(|result| result.name == name).unwrap_or_else(|| panic!("no {name}"))
    };
    let verdict = |name: &str| (of(name).verdict, of(name).harm.is_some());
    assert_eq!(verdict("canary-silent-daemon"), (Verdict::Wedged, false));
    assert_eq!(verdict("canary-wordless-daemon"), (Verdict::Fail, false));
    assert_eq!(verdict("canary-no-attack"), (Verdict::Pass, false));
    assert_eq!(verdict("canary-kills-the-daemon"), (Verdict::Fail, true));
    assert_eq!(verdict("canary-keeps-a-session"), (Verdict::Fail, false));
    assert!(of("canary-keeps-a-session").said.contains("not everything came back"));
    assert!(results.iter().all(|result| !result.holds()), "none of them holds");
}

#[test]
fn a_neighbour_whose_rows_are_wrong_is_reported_as_harmed() {
    let one: Vec<_> = attacks::table().into_iter().take(1).collect();
    let results = run(&one, &Options { checks: Checks::Wrongly, ..options() }, |_| {});
    let harm = results[0].harm.as_ref().expect("harm");
    assert!(harm.contains("a wrong answer"), "{harm}");
    assert!(!results[0].holds());
}
