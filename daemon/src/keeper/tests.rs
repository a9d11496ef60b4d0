use super::*;
use crate::tiers::store::{ImageFacts, ImageKind};

fn summary(id: &str) -> ImageSummary {
    let content = ImageFacts {
        kind: ImageKind::Sequence,
        tokens: 1,
        created_unix: 1,
        fingerprint: String::new(),
        uid: 0,
        label: String::new(),
    };
    ImageSummary { id: id.parse().unwrap(), bytes: 1, content: Ok(content) }
}

#[test]
fn lists_are_merged_by_name_with_where_each_image_is() {
    let merged = merge(vec![summary("c"), summary("a")], vec![summary("b"), summary("c")]);
    let found: Vec<_> = merged.iter().map(|(image, kept)| (image.id.as_str(), *kept)).collect();
    assert_eq!(found, [("a", Kept::Here), ("b", Kept::Remotely), ("c", Kept::Both)]);
}

#[test]
fn what_a_remote_store_said_last_is_kept_until_it_does_what_it_is_asked() {
    let progress = Progress::default();
    let refused = || StoreError::Refused { name: "s3://bucket".into(), reason: "403".into() };
    assert!(progress.note::<()>(Err(refused())).is_err());
    let missing = StoreError::NotFound { store: "s3://bucket".into(), id: "a".parse().unwrap() };
    assert!(progress.note::<()>(Err(missing)).is_err());
    assert!(progress.lock().error.as_ref().is_some_and(|error| error.contains("403")));
    assert!(progress.note(Ok(())).is_ok());
    assert_eq!(progress.lock().error, None);
}

#[test]
fn a_daemon_that_stops_waits_for_no_work_on_images_and_the_next_one_goes_on_with_it() {
    use crate::tiers::store::conformance::{id, write};
    let (folder, remote) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let url = format!("file://{}", remote.path().display());
    write(&*connect(&url, RemoteOptions::default()).unwrap(), "away", 1, false).unwrap();
    let names = || -> Vec<String> {
        let entries = std::fs::read_dir(folder.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.contains("here")).collect()
    };
    {
        let keeper = Keeper::start(folder.path(), &url).unwrap();
        write(&*keeper.local, "here", 1, false).unwrap();
        keeper.hurry();
        let stopped = |error: StoreError| matches!(error, StoreError::Stopped);
        assert!(stopped(keeper.bring(&id("here")).unwrap_err()), "nothing is compared any more");
        assert!(stopped(keeper.bring(&id("away")).unwrap_err()), "nothing is copied any more");
        assert!(stopped(keeper.open_here(&id("away")).map(drop).unwrap_err()));
        assert!(stopped(keeper.open_to_resume(&id("away")).map(drop).unwrap_err()));
        keeper.remove(&id("here")).unwrap();
        assert!(matches!(keeper.open(&id("here")), Err(StoreError::NotFound { .. })));
        assert_eq!(names().len(), 1, "nothing is overwritten any more");
    }
    let _next = Keeper::start(folder.path(), &url).unwrap();
    let since = Instant::now();
    while !names().is_empty() {
        assert!(since.elapsed().as_secs() < 60, "{:?}", names());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
