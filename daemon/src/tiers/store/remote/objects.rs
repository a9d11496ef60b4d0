//! A bucket of an object store.

use std::fmt;
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{Error, GetOptions, ObjectStore, PutMode, PutOptions, PutPayload};

use super::bucket::{Answer, Bucket, Fault, Found};

/// Objects under a prefix.
pub(super) struct Objects {
    store: Arc<dyn ObjectStore>,
    /// Without a slash at either end; may be empty.
    prefix: String,
}

/// The store would show its credentials.
impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Objects").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl Objects {
    pub(super) fn new(store: Arc<dyn ObjectStore>, prefix: &str) -> Self {
        Self { store, prefix: prefix.trim_matches('/').to_owned() }
    }

    fn path(&self, key: &str) -> Path {
        Path::from(format!("{}/{key}", self.prefix))
    }

    /// The key of an object below the prefix.
    fn key(&self, path: &Path) -> Option<String> {
        let path = path.as_ref();
        let below = match self.prefix.as_str() {
            "" => Some(path),
            prefix => path.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('/')),
        };
        below.map(str::to_owned)
    }

    async fn put_as(&self, key: &str, value: &[u8], mode: PutMode) -> Result<(), Error> {
        let payload = PutPayload::from(value.to_vec());
        self.store.put_opts(&self.path(key), payload, PutOptions::from(mode)).await.map(|_| ())
    }
}

fn fault(error: &Error) -> Fault {
    let said = error.to_string();
    match error {
        Error::Generic { .. } | Error::JoinError { .. } => Fault::Broken(said),
        _ => Fault::Refused(said),
    }
}

impl Bucket for Objects {
    fn put<'a>(&'a self, key: &'a str, value: &'a [u8]) -> Answer<'a, ()> {
        Box::pin(
            async move { self.put_as(key, value, PutMode::Overwrite).await.map_err(|error| fault(&error)) },
        )
    }

    fn put_new<'a>(&'a self, key: &'a str, value: &'a [u8]) -> Answer<'a, bool> {
        Box::pin(async move {
            match self.put_as(key, value, PutMode::Create).await {
                Ok(()) => Ok(true),
                Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(false),
                Err(error) => Err(fault(&error)),
            }
        })
    }

    fn get<'a>(&'a self, key: &'a str, max_bytes: usize) -> Answer<'a, Found> {
        Box::pin(async move {
            let got = match self.store.get_opts(&self.path(key), GetOptions::default()).await {
                Ok(got) => got,
                Err(Error::NotFound { .. }) => return Ok(Found::Missing),
                Err(error) => return Err(fault(&error)),
            };
            if got.meta.size > max_bytes as u64 {
                return Ok(Found::TooLong(got.meta.size));
            }
            // The body is taken piece by piece: what a server announces is not what it sends.
            let (mut bytes, mut body) = (Vec::new(), got.into_stream());
            while let Some(piece) = body.try_next().await.map_err(|error| fault(&error))? {
                if bytes.len() + piece.len() > max_bytes {
                    return Ok(Found::TooLong((bytes.len() + piece.len()) as u64));
                }
                bytes.extend_from_slice(&piece);
            }
            Ok(Found::Bytes(bytes))
        })
    }

    fn delete<'a>(&'a self, keys: &'a [String]) -> Answer<'a, ()> {
        Box::pin(async move {
            let paths: Vec<_> = keys.iter().map(|key| Ok(self.path(key))).collect();
            let mut deleted = self.store.delete_stream(stream::iter(paths).boxed());
            while let Some(result) = deleted.next().await {
                match result {
                    Ok(_) | Err(Error::NotFound { .. }) => {}
                    Err(error) => return Err(fault(&error)),
                }
            }
            Ok(())
        })
    }

    fn list<'a>(&'a self, folder: &'a str) -> Answer<'a, Vec<String>> {
        Box::pin(async move {
            let objects = self.store.list(Some(&self.path(folder)));
            let keys = objects.map_ok(|object| self.key(&object.location));
            let keys: Vec<_> = keys.try_collect().await.map_err(|error| fault(&error))?;
            Ok(keys.into_iter().flatten().collect())
        })
    }

    fn ids(&self) -> Answer<'_, Vec<String>> {
        Box::pin(async move {
            let folders = self.store.list_with_delimiter(Some(&self.path(""))).await;
            let folders = folders.map_err(|error| fault(&error))?.common_prefixes;
            Ok(folders.iter().filter_map(|folder| self.key(folder)).collect())
        })
    }
}
