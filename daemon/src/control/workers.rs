//! Threads beside the control thread, for images and prefixes: so many in all, and so many of them for one user.
//!
//! What their files and stores hold of memory has a bound with them, however many sessions ask; and who waits for a slow store leaves threads to
//! the others.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use kvoyant_protocol::control::Failure;
use tokio::sync::Semaphore;

use super::beside;
use super::images::Stop;

/// How many may be at work at once.
const AT_ONCE: usize = 16;
/// How many of them for one user.
const FOR_A_USER: usize = AT_ONCE / 2;

static ALL: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(AT_ONCE)));
static USERS: LazyLock<Mutex<HashMap<u32, Weak<Semaphore>>>> = LazyLock::new(Mutex::default);

fn of_user(uid: u32) -> Arc<Semaphore> {
    let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(turns) = users.get(&uid).and_then(Weak::upgrade) {
        return turns;
    }
    // Whoever has nothing at work is forgotten.
    users.retain(|_, turns| turns.strong_count() > 0);
    let turns = Arc::new(Semaphore::new(FOR_A_USER));
    users.insert(uid, Arc::downgrade(&turns));
    turns
}

/// Runs what may block, for a user, beside the control thread.
pub(super) async fn blocking<T: Send + 'static>(
    uid: u32,
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Stop> {
    // Nobody closes them.
    let own = of_user(uid).acquire_owned().await.ok();
    let turn = Arc::clone(&ALL).acquire_owned().await.ok();
    let work = move || {
        // They are over with the work, also where nobody waits for that any more.
        let _turns = (own, turn);
        work()
    };
    Ok(beside(move || Ok(work())).await??)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn one_user_who_waits_for_a_slow_store_leaves_threads_to_others() {
        const SLOW: u32 = 4_000_001;
        let (go, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let slow: Vec<_> = (0..FOR_A_USER + 1)
            .map(|_| {
                let gate = Arc::clone(&gate);
                // Until the other end is dropped.
                let work = move || Ok(gate.lock().unwrap_or_else(PoisonError::into_inner).recv().is_err());
                tokio::spawn(blocking(SLOW, work))
            })
            .collect();
        while of_user(SLOW).available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(blocking(SLOW + 1, || Ok(7)).await.unwrap(), 7);
        let third = tokio::time::timeout(Duration::from_millis(50), blocking(SLOW, || Ok(7)));
        assert!(third.await.is_err(), "they have all their threads already");
        drop(go);
        for work in slow {
            assert!(work.await.unwrap().unwrap());
        }
        assert_eq!(blocking(SLOW, || Ok(7)).await.unwrap(), 7);
    }
}
