//! From an address to a store.

use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::{ClientConfigKey, RetryConfig};
use url::Url;

use super::{RemoteImages, RemoteOptions};
use crate::tiers::store::{ImageStore, StoreError};

/// Where images lie in a Redis server if the address does not say.
const REDIS_PREFIX: &str = "kvoyant/images";

/// The store at an address. Nothing is connected before it is needed.
///
/// | address | store |
/// |---|---|
/// | `file:///folder` | a folder that daemons may share, as on a network's file system |
/// | `memory:` | in this process, for trying things out |
/// | `s3://bucket/prefix` | an S3-compatible server; endpoint, region and credentials are the `AWS_*` variables' |
/// | `redis://user:password@host:port/db?prefix=name` | a server that speaks Redis's protocol |
///
/// What of the address appears in names and errors has neither user nor password.
pub fn connect(url: &str, options: RemoteOptions) -> Result<Box<dyn ImageStore>, StoreError> {
    let Ok(parsed) = Url::parse(url) else {
        // What cannot be read may be a secret at any place.
        let scheme = url.split_once(':').map_or("", |(scheme, _)| scheme);
        let scheme = if scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()) { scheme } else { "" };
        return Err(bad(format!("{scheme}:…"), "it cannot be read as an address"));
    };
    let name = shown(&parsed);
    match parsed.scheme() {
        "file" => match parsed.to_file_path() {
            Ok(folder) => Ok(Box::new(folder_of_many(name, &folder, options)?)),
            Err(()) => Err(bad(name, "write file:///folder, with the folder's whole path")),
        },
        "memory" => Ok(Box::new(RemoteImages::objects(name, Arc::new(InMemory::new()), "", options)?)),
        "s3" => Ok(Box::new(s3(&parsed, AmazonS3Builder::from_env(), options)?)),
        "redis" => Ok(Box::new(redis(&parsed, options)?)),
        "rediss" => {
            Err(bad(name, "TLS to Redis is not built in; go through a tunnel, such as stunnel, to redis://"))
        }
        _ => Err(bad(name, "file:///folder, memory:, s3://bucket/prefix and redis://host:port/db are known")),
    }
}

/// Whether an address leads to a store, as far as it says itself. Nothing is made and nothing is connected.
pub fn check_url(url: &str) -> Result<(), StoreError> {
    match Url::parse(url) {
        Ok(parsed) if parsed.scheme() == "file" && parsed.to_file_path().is_ok() => Ok(()),
        _ => connect(url, RemoteOptions::default()).map(drop),
    }
}

/// Images in a folder that several daemons share, as on a network's file system: unlike a [`LocalStore`](super::super::LocalStore), no
/// daemon has it alone.
fn folder_of_many(
    name: String,
    folder: &std::path::Path,
    options: RemoteOptions,
) -> Result<RemoteImages, StoreError> {
    let what = |doing: &'static str| {
        let path = folder.to_path_buf();
        move |source| StoreError::Io { doing, path, source }
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(what("create the folder"))?;
    let files = LocalFileSystem::new_with_prefix(folder)
        .map_err(|error| what("open the folder")(std::io::Error::other(error)))?;
    RemoteImages::objects(name, Arc::new(files.with_automatic_cleanup(true)), "", options)
}

fn bad(url: String, reason: &str) -> StoreError {
    StoreError::BadUrl { url, reason: reason.to_owned() }
}

/// An address without user, password, query and fragment.
fn shown(url: &Url) -> String {
    let Some(host) = url.host_str() else {
        let slashes = if url.scheme() == "file" { "//" } else { "" };
        return format!("{}:{slashes}{}", url.scheme(), plain_path(url));
    };
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{host}{port}{}", url.scheme(), url.path())
}

/// What is no path may hold anything.
fn plain_path(url: &Url) -> &str {
    if url.cannot_be_a_base() { "" } else { url.path() }
}

/// Images in an S3-compatible server that the builder has credentials for.
pub(super) fn s3(
    url: &Url,
    builder: AmazonS3Builder,
    options: RemoteOptions,
) -> Result<RemoteImages, StoreError> {
    let name = shown(url);
    let Some(bucket) = url.host_str().filter(|bucket| !bucket.is_empty()) else {
        return Err(bad(name, "write s3://bucket/prefix"));
    };
    // One provider for the process; whoever was first is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // It is the line that tries again, and knows when to stop. Whatever else the variables say of the client holds.
    let key = |key| AmazonS3ConfigKey::Client(key);
    let time = |time: Duration| format!("{} ms", time.as_millis());
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let store = builder
        .with_bucket_name(bucket)
        .with_config(key(ClientConfigKey::Timeout), time(options.operation))
        .with_config(key(ClientConfigKey::ConnectTimeout), time(options.connect))
        .with_retry(retry)
        .build();
    let store = store.map_err(|error| {
        let set = "set AWS_REGION, AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY";
        bad(name.clone(), &format!("{error}; {set}"))
    })?;
    RemoteImages::objects(name, Arc::new(store), url.path(), options)
}

fn redis(url: &Url, options: RemoteOptions) -> Result<RemoteImages, StoreError> {
    let name = shown(url);
    let mut prefix = REDIS_PREFIX.to_owned();
    for (key, value) in url.query_pairs() {
        if key != "prefix" {
            return Err(bad(name, "after the question mark only prefix=… is known"));
        }
        value.trim_matches('/').clone_into(&mut prefix);
    }
    if prefix.is_empty() {
        return Err(bad(name, "an empty prefix would take all keys of the server for images"));
    }
    let mut plain = url.clone();
    plain.set_query(None);
    // What the library says of an address could hold a part of it.
    let client = ::redis::Client::open(plain.as_str());
    let client =
        client.map_err(|_| bad(name.clone(), "write redis://user:password@host:port/db?prefix=name"))?;
    RemoteImages::redis(name, client, &prefix, options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(url: &str) -> String {
        connect(url, RemoteOptions::default()).unwrap_err().to_string()
    }

    #[test]
    fn an_address_leads_to_its_store() {
        let folder = tempfile::tempdir().unwrap();
        let file = format!("file://{}", folder.path().display());
        let name = |url: &str| connect(url, RemoteOptions::default()).unwrap().name().to_owned();
        assert_eq!(name(&file), file);
        assert_eq!(name("memory:"), "memory:");
        assert_eq!(name("redis://127.0.0.1:1/3"), "redis://127.0.0.1:1/3");
        assert!(error("ftp://host/a").contains("s3://bucket/prefix"));
        assert!(error("rediss://host/0").contains("tunnel"));
        assert!(error("s3:///").contains("write s3://bucket/prefix"), "{}", error("s3:///"));
        assert!(error("redis://host/db").contains("write redis://"));
        assert!(error("redis://host/0?prefix=").contains("empty prefix"));
        assert!(error("redis://host/0?password=a").contains("only prefix="));
        assert!(error("file://elsewhere/folder").contains("whole path"));
    }

    #[test]
    fn no_secret_is_shown() {
        let secret = "hunter2";
        for url in [
            "redis://me:hunter2@127.0.0.1:1/0",
            "redis://:hunter2@127.0.0.1:1/0?prefix=a",
            "redis://me:hunter2@127.0.0.1:1/db",
            "redis://127.0.0.1:1/0?password=hunter2",
            "rediss://me:hunter2@host/0",
            "foo://me:hunter2@host/0",
            "foo:hunter2",
            "redis://me:hunter2@host:port:1/0",
            "hunter2",
            "hunter2@host:1",
        ] {
            match connect(url, RemoteOptions { tries: 1, ..RemoteOptions::default() }) {
                Err(error) => assert!(!format!("{error} {error:?}").contains(secret), "{url}: {error:?}"),
                Ok(store) => {
                    let error = store.list().unwrap_err();
                    let all = format!("{} {store:?} {error} {error:?}", store.name());
                    assert!(!all.contains(secret), "{url}: {all}");
                }
            }
        }
    }
}
