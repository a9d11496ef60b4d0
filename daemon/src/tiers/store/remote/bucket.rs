//! What a remote store has to be able to do: put, get, delete and list values by key.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

/// What comes of an operation, sooner or later. Whoever asks gives it a time.
pub(super) type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Fault>> + Send + 'a>>;

/// Why an operation was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// Another try may succeed.
    Broken(String),
    /// None will.
    Refused(String),
}

/// What is under a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing.
    Missing,
    /// More bytes than were asked for; so many.
    TooLong(u64),
    /// All of it.
    Bytes(Vec<u8>),
}

/// Values by key, somewhere else. Keys are `<id>/…`, below whatever the store's own prefix is.
pub(super) trait Bucket: Send + Sync + fmt::Debug {
    /// Puts a value, whatever was there.
    fn put<'a>(&'a self, key: &'a str, value: &'a [u8]) -> Answer<'a, ()>;

    /// Puts a value if there is none; whether there was none.
    fn put_new<'a>(&'a self, key: &'a str, value: &'a [u8]) -> Answer<'a, bool>;

    /// Gets a value of at most so many bytes.
    fn get<'a>(&'a self, key: &'a str, max_bytes: usize) -> Answer<'a, Found>;

    /// Deletes values; those that are not there are no error.
    fn delete<'a>(&'a self, keys: &'a [String]) -> Answer<'a, ()>;

    /// Keys that begin with this folder, which is empty or ends with a slash.
    fn list<'a>(&'a self, folder: &'a str) -> Answer<'a, Vec<String>>;

    /// First parts of the keys: what may be images.
    fn ids(&self) -> Answer<'_, Vec<String>>;

    /// Forgets a connection that did not answer in time: its answer could come to another question.
    fn reset(&self) {}
}
