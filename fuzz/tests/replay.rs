//! Every target on its seeds, and on a fixed series of mutations of them: the same in every run.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use kvoyant_fuzz::mutate::mutated;
use kvoyant_fuzz::{CANARY, TARGETS, Target, seeds_folder};

/// What threads other than this one have said when they panicked: a daemon's lane that dies ends nothing here.
static ELSEWHERE: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn seeds(target: &Target) -> Vec<Vec<u8>> {
    let folder = seeds_folder(target.name);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    let kept = paths.iter().map(|path| std::fs::read(path).unwrap());
    kept.chain((target.seeds)()).collect()
}

/// The first input that fails, and what was said.
fn first_failure(target: &Target) -> Option<(Vec<u8>, String)> {
    let seeds = seeds(target);
    assert!(seeds.len() > (target.seeds)().len(), "{} has no seeds checked in", target.name);
    let mutations = (0..target.replays).map(|number| mutated(&seeds, number));
    for input in seeds.iter().cloned().chain(mutations) {
        let failed = catch_unwind(AssertUnwindSafe(|| (target.run)(&input))).is_err();
        let said = std::mem::take(&mut *ELSEWHERE.lock().unwrap());
        if failed || !said.is_empty() {
            return Some((input, said.join("; ")));
        }
    }
    None
}

#[test]
fn every_target_takes_its_seeds_and_a_series_of_mutations_and_the_canary_is_found() {
    std::panic::set_hook(Box::new(|panic| ELSEWHERE.lock().unwrap().push(panic.to_string())));
    let canary = first_failure(&CANARY);
    let mut failures = Vec::new();
    for target in TARGETS {
        if let Some((input, said)) = first_failure(target) {
            failures.push(format!(
                "{}: {said}\n  input: {:?}",
                target.name,
                input.escape_ascii().to_string()
            ));
        }
    }
    kvoyant_fuzz::service::stop();
    let _ = std::panic::take_hook();
    let (input, said) = canary.expect("the canary is found, or nothing that is not found means anything");
    assert!(input.starts_with(b"KVO") && said.contains("the canary was found"), "{said}");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
