//! The line to a remote store: every operation has a time, a few tries, and a server that is dead costs little.

use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};

use super::RemoteOptions;
use super::breaker::Breaker;
use super::bucket::{Answer, Bucket, Fault, Found};
use crate::tiers::store::{StoreError, Unanswered};

/// A list may take so many times as long as another operation: it asks more than once.
const LIST_TIMES: u32 = 6;

/// Keys that are deleted at once.
const DELETE_KEYS: usize = 500;

/// A bucket, asked from threads that may block.
#[derive(Debug)]
pub(super) struct Line {
    name: String,
    bucket: Box<dyn Bucket>,
    options: RemoteOptions,
    breaker: Breaker,
    /// Gone only while this is dropped.
    runtime: Option<Runtime>,
}

impl Line {
    pub(super) fn new(
        name: String,
        bucket: Box<dyn Bucket>,
        options: RemoteOptions,
    ) -> Result<Self, StoreError> {
        let runtime = Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(|source| StoreError::Io {
            doing: "start the runtime of a remote store",
            path: name.clone().into(),
            source,
        })?;
        let breaker = Breaker::new(options.failures, options.rest);
        Ok(Self { name, bucket, options, breaker, runtime: Some(runtime) })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn options(&self) -> &RemoteOptions {
        &self.options
    }

    pub(super) fn put(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.call(self.options.operation, || self.bucket.put(key, value))
    }

    /// Puts a value if there is none; whether it is this one that is there. An answer that is lost on its way makes no
    /// difference.
    pub(super) fn put_new(&self, key: &str, value: &[u8]) -> Result<bool, StoreError> {
        let new = self.call(self.options.operation, || self.bucket.put_new(key, value))?;
        Ok(new || self.get(key, value.len())? == Found::Bytes(value.to_vec()))
    }

    pub(super) fn get(&self, key: &str, max_bytes: usize) -> Result<Found, StoreError> {
        self.call(self.options.operation, || self.bucket.get(key, max_bytes))
    }

    pub(super) fn delete(&self, keys: &[String]) -> Result<(), StoreError> {
        let mut parts = keys.chunks(DELETE_KEYS);
        parts.try_for_each(|keys| self.call(self.options.operation, || self.bucket.delete(keys)))
    }

    pub(super) fn list(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        self.call(self.options.operation * LIST_TIMES, || self.bucket.list(folder))
    }

    pub(super) fn ids(&self) -> Result<Vec<String>, StoreError> {
        self.call(self.options.operation * LIST_TIMES, || self.bucket.ids())
    }

    fn call<'a, T>(&self, limit: Duration, ask: impl Fn() -> Answer<'a, T>) -> Result<T, StoreError> {
        let began = Instant::now();
        let unreachable =
            |source| StoreError::Unreachable { name: self.name.clone(), after: began.elapsed(), source };
        self.breaker.admit(began).map_err(unreachable)?;
        let mut tries = 1;
        loop {
            let source = match self.ask(limit, ask()) {
                Ok(Ok(answer)) => {
                    self.breaker.answered();
                    return Ok(answer);
                }
                Ok(Err(Fault::Refused(reason))) => {
                    self.breaker.answered();
                    return Err(StoreError::Refused { name: self.name.clone(), reason });
                }
                Ok(Err(Fault::Broken(what))) => Unanswered::Broken(what),
                Err(timeout) => timeout,
            };
            self.bucket.reset();
            let left_alone = self.breaker.failed(Instant::now());
            tracing::debug!("{}: try {tries}: {source}", self.name);
            if left_alone || tries >= self.options.tries {
                return Err(unreachable(source));
            }
            std::thread::sleep(self.pause(tries));
            tries += 1;
        }
    }

    fn ask<T>(&self, limit: Duration, answer: Answer<'_, T>) -> Result<Result<T, Fault>, Unanswered> {
        let Some(runtime) = &self.runtime else {
            return Ok(Err(Fault::Refused("it is being closed".into())));
        };
        let answer = runtime.block_on(async { tokio::time::timeout(limit, answer).await });
        answer.map_err(|_| Unanswered::Timeout(limit))
    }

    /// Twice as long after each try, and never the same for all who wait.
    fn pause(&self, tries: u32) -> Duration {
        let pause = self.options.pause * 2u32.saturating_pow(tries - 1);
        pause.mul_f64(0.5 + fastrand::f64())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // What it still does for an operation that was given up may go on without us.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
