//! A server that speaks Redis's protocol.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ErrorKind, RedisError, ServerErrorKind};

use super::bucket::{Answer, Bucket, Fault, Found};

/// Keys that a scan looks at before it says something.
const SCAN_KEYS: usize = 1000;

/// Strings under a prefix.
pub(super) struct Strings {
    client: Client,
    connect: Duration,
    /// Ends with a slash.
    prefix: String,
    connection: Mutex<Option<MultiplexedConnection>>,
}

/// The client would show its password.
impl fmt::Debug for Strings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Strings").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl Strings {
    /// Nothing is connected before it is needed.
    pub(super) fn new(client: Client, prefix: &str, connect: Duration) -> Self {
        let prefix = format!("{}/", prefix.trim_matches('/'));
        Self { client, connect, prefix, connection: Mutex::default() }
    }

    fn slot(&self) -> MutexGuard<'_, Option<MultiplexedConnection>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connection(&self) -> Result<MultiplexedConnection, Fault> {
        if let Some(connection) = self.slot().clone() {
            return Ok(connection);
        }
        // Operations have a time of their own, which holds for the answer too.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connect))
            .set_response_timeout(None);
        let made = self.client.get_multiplexed_async_connection_with_config(&config).await;
        let made = made.map_err(|error| fault(&error))?;
        *self.slot() = Some(made.clone());
        Ok(made)
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Keys of a pattern below the prefix, without it.
    async fn scan(&self, pattern: &str) -> Result<Vec<String>, Fault> {
        let mut connection = self.connection().await?;
        let pattern = format!("{}{pattern}", literal(&self.prefix));
        let (mut keys, mut cursor) = (Vec::new(), 0u64);
        loop {
            let mut command = redis::cmd("SCAN");
            command.arg(cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(SCAN_KEYS);
            let answer = command.query_async::<(u64, Vec<Vec<u8>>)>(&mut connection).await;
            let (next, found) = answer.map_err(|error| fault(&error))?;
            // What is no text is no key of ours.
            let found = found.into_iter().filter_map(|key| String::from_utf8(key).ok());
            keys.extend(found.filter_map(|key| key.strip_prefix(&self.prefix).map(str::to_owned)));
            if next == 0 {
                // A scan may show a key twice.
                keys.sort_unstable();
                keys.dedup();
                return Ok(keys);
            }
            cursor = next;
        }
    }
}

/// A pattern that matches this text and no other.
fn literal(text: &str) -> String {
    text.chars().flat_map(|char| "*?[]^\\".contains(char).then_some('\\').into_iter().chain([char])).collect()
}

fn fault(error: &RedisError) -> Fault {
    let said = error.to_string();
    let passes = matches!(
        error.kind(),
        ErrorKind::Io
            | ErrorKind::Parse
            | ErrorKind::Server(
                ServerErrorKind::BusyLoading
                    | ServerErrorKind::TryAgain
                    | ServerErrorKind::ClusterDown
                    | ServerErrorKind::MasterDown
            )
    );
    if passes || error.is_io_error() || error.is_connection_dropped() {
        return Fault::Broken(said);
    }
    Fault::Refused(said)
}

impl Bucket for Strings {
    fn put<'a>(&'a self, key: &'a str, value: &'a [u8]) -> Answer<'a, ()> {
        Box::pin(async move {
            let mut connection = self.connection().await?;
            let mut command = redis::cmd("SET");
            command.arg(self.key(key)).arg(value);
            command.query_async(&mut connection).await.map_err(|error| fault(&error))
        })
    }

    fn put_new<'a>(&'a self, key: &'a str, value: &'a [u8]) -> Answer<'a, bool> {
        Box::pin(async move {
            let mut connection = self.connection().await?;
            let mut command = redis::cmd("SET");
            command.arg(self.key(key)).arg(value).arg("NX");
            let answer: Option<String> =
                command.query_async(&mut connection).await.map_err(|error| fault(&error))?;
            Ok(answer.is_some())
        })
    }

    fn get<'a>(&'a self, key: &'a str, max_bytes: usize) -> Answer<'a, Found> {
        Box::pin(async move {
            let mut connection = self.connection().await?;
            let key = self.key(key);
            let mut commands = redis::pipe();
            commands.atomic().cmd("EXISTS").arg(&key).cmd("STRLEN").arg(&key);
            // Whatever is there, no more than was asked for comes.
            commands.cmd("GETRANGE").arg(&key).arg(0).arg(max_bytes.saturating_sub(1));
            let answer = commands.query_async::<(u64, u64, Vec<u8>)>(&mut connection).await;
            let (there, bytes, value) = answer.map_err(|error| fault(&error))?;
            Ok(match there {
                0 => Found::Missing,
                _ if bytes > max_bytes as u64 => Found::TooLong(bytes),
                _ => Found::Bytes(value),
            })
        })
    }

    fn delete<'a>(&'a self, keys: &'a [String]) -> Answer<'a, ()> {
        Box::pin(async move {
            let mut connection = self.connection().await?;
            let mut command = redis::cmd("DEL");
            for key in keys {
                command.arg(self.key(key));
            }
            command.query_async::<u64>(&mut connection).await.map_err(|error| fault(&error)).map(|_| ())
        })
    }

    fn list<'a>(&'a self, folder: &'a str) -> Answer<'a, Vec<String>> {
        Box::pin(async move { self.scan(&format!("{}*", literal(folder))).await })
    }

    fn ids(&self) -> Answer<'_, Vec<String>> {
        Box::pin(async move {
            let keys = self.scan("*/manifest").await?;
            Ok(keys.iter().filter_map(|key| key.strip_suffix("/manifest").map(str::to_owned)).collect())
        })
    }

    fn reset(&self) {
        *self.slot() = None;
    }
}
