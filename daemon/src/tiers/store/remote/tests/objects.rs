use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use url::Url;

use super::super::connect::s3;
use super::*;
use crate::tiers::store::conformance::suite;

#[test]
fn objects_in_memory_do_what_every_store_does() {
    for prefix in ["", "deep/prefix"] {
        let store = RemoteImages::objects("memory", Arc::new(InMemory::new()), prefix, options()).unwrap();
        suite(&store, &store);
        leftovers_are_swept(&store);
    }
}

#[test]
fn objects_in_a_folder_do_what_every_store_does() {
    let folder = tempfile::tempdir().unwrap();
    let files = LocalFileSystem::new_with_prefix(folder.path()).unwrap().with_automatic_cleanup(true);
    let store = RemoteImages::objects("folder", Arc::new(files), "images", options()).unwrap();
    suite(&store, &store);
    leftovers_are_swept(&store);
}

#[test]
fn two_stores_of_one_bucket_do_not_see_each_other() {
    let memory = Arc::new(InMemory::new());
    let store = |prefix| RemoteImages::objects("memory", memory.clone(), prefix, options()).unwrap();
    let (a, b) = (store("a"), store("a-b"));
    write(&a, "x", 1, false).unwrap();
    write(&b, "y", 2, false).unwrap();
    assert_eq!(read(&a, "x").unwrap(), 1);
    assert_eq!((a.list().unwrap().len(), b.list().unwrap().len()), (1, 1));
    a.remove(&id("x")).unwrap();
    assert_eq!(read(&b, "y").unwrap(), 2);
}

#[test]
fn an_object_server_that_never_answers_costs_a_bounded_time() {
    let (_listener, port) = mute();
    let builder = AmazonS3Builder::new()
        .with_endpoint(format!("http://127.0.0.1:{port}"))
        .with_allow_http(true)
        .with_region("here")
        .with_access_key_id("key")
        .with_secret_access_key("hunter2");
    let store = s3(&Url::parse("s3://bucket/prefix").unwrap(), builder, impatient()).unwrap();
    assert!(!format!("{store:?}").contains("hunter2"));
    gives_up_in_time(&store);
}

/// An S3-compatible server, if the environment names one: `KVOYANT_TEST_S3=s3://bucket/prefix`, with the `AWS_*`
/// variables for it. The prefix must be empty, and is again afterwards.
#[test]
fn an_s3_server_does_what_every_store_does() {
    let Ok(url) = std::env::var("KVOYANT_TEST_S3") else {
        println!("SKIPPED: KVOYANT_TEST_S3 names no bucket of an S3-compatible server");
        return;
    };
    let store = s3(&Url::parse(&url).unwrap(), AmazonS3Builder::from_env(), options()).unwrap();
    suite(&store, &store);
    leftovers_are_swept(&store);
}
