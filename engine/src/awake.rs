//! Threads that stay awake for the length of a decode step.
//!
//! A step is some two hundred short pieces of work for all threads, one after the other. Between two of them a thread of rayon's has nothing
//! to do for some microseconds, goes to sleep, and is woken for the next one, which takes as long again and is the step's time. So for a
//! step they look for work until it is over.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

/// How long a thread that found no work looks away.
const LOOK_AWAY: usize = 16;

/// After how many looks it lets others have the core: a lane of the daemon may wait for one.
const GIVE_WAY: usize = 8;

thread_local! {
    static AWAKE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on one of rayon's threads, and keeps all others awake meanwhile.
pub(crate) fn awake<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let over = AtomicBool::new(false);
    rayon::scope(|scope| {
        let (own, over) = (rayon::current_thread_index(), &over);
        for _ in 1..rayon::current_num_threads() {
            scope.spawn(move |_| {
                // The thread that waits for the others' part of its work may take this, too: it has something to go back to.
                if rayon::current_thread_index() != own && !AWAKE.replace(true) {
                    look_for_work(over);
                    AWAKE.set(false);
                }
            });
        }
        // Also when `work` panics.
        let _over = Over(over);
        work()
    })
}

fn look_for_work(over: &AtomicBool) {
    let mut looks = 0;
    while !over.load(Ordering::Relaxed) {
        if rayon::yield_now() == Some(rayon::Yield::Executed) {
            looks = 0;
            continue;
        }
        looks += 1;
        if looks % GIVE_WAY == 0 {
            std::thread::yield_now();
        } else {
            (0..LOOK_AWAY).for_each(|_| std::hint::spin_loop());
        }
    }
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn work_is_shared_and_ends_on_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let sum: usize = pool.install(|| {
                (0..200).map(|i| awake(|| (0..64_usize).into_par_iter().map(|j| i * j).sum::<usize>())).sum()
            });
            assert_eq!(sum, 199 * 100 * 63 * 32);
            let panicked = pool.install(|| std::panic::catch_unwind(|| awake(|| panic!("on purpose"))));
            assert!(panicked.is_err());
        }
    }

    #[test]
    fn steps_within_steps_end() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let inner = |i: usize| awake(|| (0..8_usize).into_par_iter().map(|j| i + j).sum::<usize>());
        let sum: usize = pool.install(|| awake(|| (0..16_usize).into_par_iter().map(inner).sum()));
        assert_eq!(sum, 16 * 28 + 8 * 120);
    }
}
