//! What bindings for other languages hand out: callers there may call from any thread, and close what another thread is using.

use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

/// A value that many threads may use at once, or one alone. Nobody waits for it: two threads that meet where one wants it for itself
/// have a defect, and one of them is told.
#[derive(Debug)]
pub struct HandedOut<T>(RwLock<Option<T>>);

/// Why a value is not to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotThere {
    /// Another thread has it for itself.
    Changed,
    /// Other threads use it, and the caller wants it for itself.
    Used,
    /// It was taken.
    Closed,
}

/// A value that stays there meanwhile.
#[derive(Debug)]
pub struct Shared<'a, T>(RwLockReadGuard<'a, Option<T>>);

/// A value that nobody else uses meanwhile.
#[derive(Debug)]
pub struct Alone<'a, T>(RwLockWriteGuard<'a, Option<T>>);

const THERE: &str = "looked at when it was locked";

impl<T> HandedOut<T> {
    /// Hands it out.
    #[must_use]
    pub fn new(value: T) -> Self {
        Self(RwLock::new(Some(value)))
    }

    /// For calls that leave it as it is.
    ///
    /// # Errors
    /// Where another thread has it for itself, or took it.
    pub fn shared(&self) -> Result<Shared<'_, T>, NotThere> {
        let guard = match self.0.try_read() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(NotThere::Changed),
        };
        if guard.is_some() { Ok(Shared(guard)) } else { Err(NotThere::Closed) }
    }

    /// For calls that change it.
    ///
    /// # Errors
    /// Where another thread is inside a call on it, or took it.
    pub fn alone(&self) -> Result<Alone<'_, T>, NotThere> {
        let guard = match self.0.try_write() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(NotThere::Used),
        };
        if guard.is_some() { Ok(Alone(guard)) } else { Err(NotThere::Closed) }
    }
}

impl<T> Shared<'_, T> {
    /// The value.
    #[must_use]
    pub fn get(&self) -> &T {
        self.0.as_ref().expect(THERE)
    }
}

impl<T> Alone<'_, T> {
    /// The value.
    #[must_use]
    pub fn get(&self) -> &T {
        self.0.as_ref().expect(THERE)
    }

    /// Takes it: for all who come after, it is closed.
    #[must_use]
    pub fn take(mut self) -> T {
        self.0.take().expect(THERE)
    }

    /// Does what consumes it, and keeps it if that fails.
    ///
    /// # Errors
    /// What `with` failed with; the value is there as before.
    pub fn consume<E>(mut self, with: impl FnOnce(T) -> Result<(), Box<(T, E)>>) -> Result<(), E> {
        with(self.0.take().expect(THERE)).map_err(|back| {
            let (value, error) = *back;
            *self.0 = Some(value);
            error
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_share_or_one_has_it_alone_and_nobody_waits() {
        let value = HandedOut::new(7);
        let (one, two) = (value.shared().unwrap(), value.shared().unwrap());
        assert_eq!((*one.get(), *two.get()), (7, 7));
        assert_eq!(value.alone().err(), Some(NotThere::Used));
        drop((one, two));
        let alone = value.alone().unwrap();
        assert_eq!(value.shared().err(), Some(NotThere::Changed));
        assert_eq!(alone.take(), 7);
        assert_eq!(value.shared().err(), Some(NotThere::Closed));
        assert_eq!(value.alone().err(), Some(NotThere::Closed));
    }

    #[test]
    fn what_fails_to_consume_it_leaves_it_there() {
        let value = HandedOut::new(String::from("rows"));
        let failed = value.alone().unwrap().consume(|text| Err(Box::new((text, "no room"))));
        assert_eq!(failed, Err("no room"));
        assert_eq!(value.shared().unwrap().get(), "rows");
        value.alone().unwrap().consume(|_| Ok::<_, Box<(String, ())>>(())).unwrap();
        assert_eq!(value.shared().err(), Some(NotThere::Closed));
    }

    #[test]
    fn a_thread_that_panicked_inside_a_call_leaves_it_usable() {
        let value = HandedOut::new(1);
        let panicked = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let _inside = value.alone().unwrap();
                    panic!("inside a call");
                })
                .join()
        });
        assert!(panicked.is_err());
        assert_eq!(*value.shared().unwrap().get(), 1);
    }
}
