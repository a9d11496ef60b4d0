//! Clients that are killed in the middle of their work leave nothing behind.

use std::path::PathBuf;

use kvoyant_hostile::reap::{self, Death};
use kvoyant_hostile::runner::Options;

#[test]
fn of_30_clients_killed_at_random_moments_everything_comes_back_to_the_byte() {
    let options = Options::quick(PathBuf::from(env!("CARGO_BIN_EXE_kvoyant-hostile")));
    let killed = reap::run(&options, 30, 5, |_| {});
    assert!(killed.iter().all(|one| one.back_ms.is_ok()), "{}", reap::report(&killed));
    for death in Death::ALL {
        assert!(killed.iter().any(|one| one.death == death), "{death:?}");
    }
    assert!(killed.iter().any(|one| one.held_bytes > 0), "none of them ever had an extent");
}
