//! Copies that fail or never end, a driver that does not come back, and memory that nobody opens.

use std::time::Duration;

use kvoyant_client::{Client, Error, Failure, Hint, Options};
use kvoyant_tests::softcuda::{Machine, on_softcuda};
use kvoyant_tests::{PATIENCE, fake, this_test, wait_until};

use crate::service::{filled, gpu, set_faults, start};

#[test]
fn a_copy_that_failed_ends_its_session_and_is_never_a_hit() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start(&[]);
    let neighbour = fake::connect(&daemon, &["random:budget=50%"]);
    let others = filled(&neighbour, 8);
    let model = fake::connect(&daemon, &["random:budget=50%"]);
    let sequence = filled(&model, 4);
    set_faults("fail call=cuMemcpyHtoDAsync_v2 code=1 count=1 process=kvoyantd");
    let member = kvoyant_client::Member { sequence: &sequence, position: 300, hint: Hint::None };
    let asked = [(); 3].map(|()| model.speculate(1, &[member]));
    for pending in asked {
        let answer = pending.and_then(|pending| pending.wait(PATIENCE));
        assert!(answer.is_err(), "rows that were never copied came back as ready");
    }
    set_faults("");
    let told = std::iter::repeat_with(|| model.open(0, 10)).find_map(Result::err).unwrap();
    assert!(
        matches!(&told, Error::Failed(Failure::Protocol(reason)) if reason.contains("could not copy"))
            || matches!(told, Error::DaemonGone),
        "{told}"
    );
    fake::check(&fake::ask(&neighbour, &others, 1), 0, 8, 1).unwrap();
    assert_eq!(gpu(&daemon).lost, None);
}

#[test]
fn copies_that_never_end_are_a_lost_device_and_the_daemon_ends_all_the_same() {
    if !on_softcuda(this_test!(), &Machine::new().with("KVOYANT_TEST_STUCK_SECONDS", "2")) {
        return;
    }
    let daemon = start(&[]);
    let model = fake::connect(&daemon, &["random:budget=50%"]);
    let sequence = filled(&model, 4);
    set_faults("hang-copies process=kvoyantd");
    let member = kvoyant_client::Member { sequence: &sequence, position: 300, hint: Hint::None };
    assert!(model.speculate(1, &[member]).unwrap().wait(Duration::from_secs(40)).is_err());
    let (status, words) = daemon.wait();
    assert_eq!(status.code(), Some(75), "{words}");
}

#[test]
fn a_driver_that_does_not_come_back_is_a_lost_device_too() {
    if !on_softcuda(this_test!(), &Machine::new().with("KVOYANT_TEST_STUCK_SECONDS", "2")) {
        return;
    }
    // With copies that hang, a driver frees no pinned memory: what another session leaves is where the wait is.
    let daemon = start(&[]);
    let model = fake::connect(&daemon, &["random:budget=50%"]);
    let sequence = filled(&model, 4);
    let leaves = fake::connect(&daemon, &["random:budget=50%"]);
    set_faults("hang-copies process=kvoyantd");
    let member = kvoyant_client::Member { sequence: &sequence, position: 300, hint: Hint::None };
    let pending = model.speculate(1, &[member]).unwrap();
    drop(leaves);
    assert!(pending.wait(Duration::from_secs(40)).is_err());
    let (status, words) = daemon.wait();
    assert_eq!(status.code(), Some(75), "{words}");
    // And it waits for a buffer that the device has yet to read, where more answers than there are buffers go through them.
    set_faults("");
    let daemon = start(&["--pin", "false"]);
    let model = fake::connect(&daemon, &["random:budget=50%"]);
    let sequence = filled(&model, 4);
    set_faults("hang-copies process=kvoyantd");
    let member = kvoyant_client::Member { sequence: &sequence, position: 300, hint: Hint::None };
    let asked = [(); 6].map(|()| model.speculate(1, &[member]).unwrap());
    for pending in asked {
        assert!(pending.wait(Duration::from_secs(40)).is_err());
    }
    let (status, words) = daemon.wait();
    assert_eq!(status.code(), Some(75), "{words}");
}

#[test]
fn memory_that_nobody_has_opened_counts_no_longer_than_its_registration() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    for export in ["descriptor", "handle"] {
        let daemon = start(&["--device-memory", "96MiB", "--export", export]);
        let connect = || Client::connect(&daemon.socket(), Options::default()).unwrap();
        let process = std::env::current_exe().unwrap();
        let process = process.file_name().unwrap().to_str().unwrap();
        // This process's own device cannot take part: what the daemon made for it is nobody's.
        set_faults(&format!("register-fails process={process}"));
        for _ in 0..20 {
            assert!(connect().register(fake::spec(&["full"]), &[]).is_err());
        }
        set_faults("");
        wait_until("the memory is free again", || gpu(&daemon).used_bytes == 0);
        let model = fake::connect(&daemon, &["random:budget=50%"]);
        fake::check(&fake::ask(&model, &filled(&model, 4), 1), 0, 4, 1).unwrap();
    }
    // A registration that fails in the daemon has told nobody of its memory.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("kvoyantd.toml");
    std::fs::write(&file, "[quotas]\ntables = \"1MiB\"\n").unwrap();
    let daemon = start(&["--device-memory", "96MiB", "--config", file.to_str().unwrap()]);
    for _ in 0..20 {
        let client = Client::connect(&daemon.socket(), Options::default()).unwrap();
        let refused = client.register(fake::spec(&["full"]), &[]).unwrap_err();
        assert!(matches!(refused, Error::Failed(Failure::Quota(_))), "{refused}");
    }
    wait_until("the memory is free again", || gpu(&daemon).used_bytes == 0);
}
