//! The daemon and its clients on a GPU: every way to share its memory and to signal, and what can go wrong with it.
//!
//! The GPU is softcuda; each test runs in a child process whose driver it is.
#![allow(unsafe_code)]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use kvoyant_client::{Client, Error, Failure, Hint, Model, Options, Sequence};
use kvoyant_tests::softcuda::{Machine, is_child, on_softcuda};
use kvoyant_tests::this_test;
use kvoyant_tests::{Daemon, PATIENCE, fake, wait_until, words};
use nix::sys::signal::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const CLIENT: &str = env!("CARGO_BIN_EXE_client-under-test");

/// A daemon on the GPU, with small slabs.
pub(crate) fn start(flags: &[&str]) -> Daemon {
    let state = std::env::temp_dir().join(format!("kvoyant-state-{}", std::process::id()));
    let state = state.display().to_string();
    let mut all = vec!["--device", "cuda:0", "--pin", "true", "--slab", "8MiB", "--state", &state];
    all.extend(flags);
    Daemon::start(DAEMON, &all)
}

/// Has things go wrong on this child's machine from now on.
pub(crate) fn set_faults(faults: &str) {
    let folder = std::env::var_os("SOFTCUDA_DIR").expect("a child on softcuda");
    let folder = std::path::Path::new(&folder);
    std::fs::write(folder.join("faults.new"), faults).unwrap();
    std::fs::rename(folder.join("faults.new"), folder.join("faults")).unwrap();
}

pub(crate) fn filled(model: &Model, seed: usize) -> Sequence {
    let sequence = model.open(0, 400).unwrap();
    fake::fill(model, &sequence, seed, 300).unwrap();
    sequence
}

pub(crate) fn gpu(daemon: &Daemon) -> kvoyant_daemon::status::DeviceReport {
    daemon.status().gpu.expect("a GPU")
}

#[test]
fn rows_are_right_in_every_way_of_export_and_signal() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    for export in ["descriptor", "handle"] {
        for signal in ["timeline64", "timeline32", "events"] {
            let daemon = start(&["--export", export, "--signal", signal]);
            let model = fake::connect(&daemon, &["random:budget=50%"]);
            let device = model.device_session().expect("device memory");
            assert_eq!(device.slab_is_read_only(), export == "descriptor");
            let sequence = filled(&model, 7);
            let first = fake::ask(&model, &sequence, 1);
            assert!(fake::check(&first, 0, 7, 1).unwrap() > 0);
            assert!(first.completion().bytes_moved > 0);
            let mut runs = Vec::new();
            assert!(matches!(first.runs(0, 0, &mut runs), Err(Error::OnDevice { .. })));
            drop(first);
            let again = fake::ask(&model, &sequence, 1);
            assert!(again.completion().rows_hit > 0, "what is resident is not copied again");
            fake::check(&again, 0, 7, 1).unwrap();
            let report = gpu(&daemon);
            assert_eq!((report.export.as_str(), report.signal.as_str()), (export, signal));
            assert!(report.transfers.iter().sum::<u64>() >= 1);
            assert!(report.used_bytes > 0);
            drop((again, sequence, model));
            wait_until("the session's device memory coming back", || gpu(&daemon).used_bytes == 0);
            let (status, words) = daemon.end(Signal::SIGTERM);
            assert!(status.success(), "{words}");
        }
    }
}

/// Makes a stream ask `count` times and returns what its status words said, without waiting in between.
fn ask_by_stream(model: &Model, sequence: &Sequence, count: usize) -> Vec<(u64, u64)> {
    let device = model.device_session().unwrap();
    let context = device.context();
    let stream = context.stream(kvoyant_cuda::Priority::Normal).unwrap();
    let hints = context.alloc(fake::QUERY_HEADS * fake::HEAD_DIM * 4).unwrap();
    // SAFETY: all of an allocation of ours.
    unsafe { stream.fill(hints.ptr(), 0, hints.len()) }.unwrap();
    let back = context.pinned(count * 8).unwrap();
    let mut expected = Vec::new();
    for index in 0..count {
        let member = kvoyant_client::cuda::StreamMember { sequence, position: 300 };
        // SAFETY: the hints stay until the stream is done, which is of the session's context.
        let pending = unsafe { model.submit_on_stream(1, &[member], hints.ptr(), &stream) }.unwrap();
        pending.wait_on_stream(&stream, PATIENCE).unwrap();
        let table = pending.table();
        // SAFETY: a word of the board into the pinned buffer, which outlives the stream's work.
        unsafe { stream.copy_d2h(back.as_ptr().wrapping_add(index * 8), table.status, 8) }.unwrap();
        expected.push(table.expected);
        pending.release_on_stream(&stream).unwrap();
    }
    stream.synchronize().unwrap();
    let found = (0..count).map(|index| {
        // SAFETY: the stream is done with the buffer.
        unsafe { back.as_ptr().cast::<u64>().add(index).read_volatile() }
    });
    found.zip(expected).collect()
}

#[test]
fn a_stream_asks_waits_and_releases_while_the_cpu_goes_on() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    for signal in ["timeline64", "timeline32", "events"] {
        let daemon = start(&["--signal", signal]);
        let model = fake::connect(&daemon, &["quest:budget=50%"]);
        let sequence = filled(&model, 3);
        // Many more than there are slots: every slot is used, released by the stream and used again.
        for (found, expected) in ask_by_stream(&model, &sequence, 100) {
            assert_eq!(found, expected, "{signal}");
        }
        // The CPU's way goes on from where the stream left off.
        let member = kvoyant_client::Member {
            sequence: &sequence,
            position: 300,
            hint: Hint::Query(&[0.5; fake::QUERY_HEADS * fake::HEAD_DIM]),
        };
        let ready = model.speculate(2, &[member]).unwrap().wait(PATIENCE).unwrap();
        fake::check(&ready, 0, 3, 2).unwrap();
    }
}

#[test]
fn a_stream_releases_out_of_order_what_the_cpu_still_holds() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start(&[]);
    let model = fake::connect(&daemon, &["quest:budget=50%"]);
    let sequence = filled(&model, 3);
    let hint = [1.0; fake::QUERY_HEADS * fake::HEAD_DIM];
    let member = kvoyant_client::Member { sequence: &sequence, position: 300, hint: Hint::Query(&hint) };
    let held = model.speculate(1, &[member]).unwrap().wait(PATIENCE).unwrap();
    let words = ask_by_stream(&model, &sequence, 5);
    assert!(words.iter().all(|(found, expected)| found == expected));
    fake::check(&held, 0, 3, 1).expect("the rows of an answer that is held stay");
    drop(held);
    let words = ask_by_stream(&model, &sequence, 40);
    assert!(words.iter().all(|(found, expected)| found == expected));
}

#[test]
fn a_stream_that_waits_for_a_daemon_that_dies_is_let_go_and_told() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    for signal in ["timeline64", "timeline32"] {
        let daemon = start(&["--signal", signal]);
        let model = fake::connect(&daemon, &["quest:budget=50%"]);
        let sequence = filled(&model, 3);
        daemon.stop();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            daemon.end(Signal::SIGKILL)
        });
        for (found, expected) in ask_by_stream(&model, &sequence, 2) {
            assert_ne!(found, expected, "an answer that never came must not look as if it had");
        }
        killer.join().unwrap();
        let mut rows = vec![0; 2 * fake::HEAD_DIM * 4];
        sequence.read_rows(1, 0, 5..6, &mut rows).expect("the session's own rows stay readable");
        let own: Vec<u8> = fake::row(3, 1, 0, 5).into_iter().flat_map(f32::to_le_bytes).collect();
        assert_eq!(rows, own);
    }
}

#[test]
fn no_stream_is_made_to_wait_for_the_event_of_a_daemon_that_died() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start(&["--signal", "events"]);
    let model = fake::connect(&daemon, &["random:budget=50%"]);
    let sequence = filled(&model, 3);
    daemon.stop();
    let member = kvoyant_client::Member { sequence: &sequence, position: 300, hint: Hint::None };
    let pending = model.speculate(1, &[member]).unwrap().on_stream().unwrap();
    let stream = model.device_session().unwrap().context().stream(kvoyant_cuda::Priority::Normal).unwrap();
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        daemon.end(Signal::SIGKILL)
    });
    let waited = pending.wait_on_stream(&stream, PATIENCE);
    assert!(matches!(waited, Err(Error::DaemonGone)), "{waited:?}");
    stream.synchronize().unwrap();
    killer.join().unwrap();
}

#[test]
fn a_stream_that_is_being_captured_is_refused() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start(&[]);
    let model = fake::connect(&daemon, &["quest:budget=50%"]);
    let sequence = filled(&model, 3);
    let context = model.device_session().unwrap().context();
    let stream = context.stream(kvoyant_cuda::Priority::Normal).unwrap();
    let hints = context.alloc(fake::QUERY_HEADS * fake::HEAD_DIM * 4).unwrap();
    let hint = [1.0; fake::QUERY_HEADS * fake::HEAD_DIM];
    let member = kvoyant_client::Member { sequence: &sequence, position: 300, hint: Hint::Query(&hint) };
    let pending = model.speculate(1, &[member]).unwrap().on_stream().unwrap();
    stream.begin_capture().unwrap();
    let member = kvoyant_client::cuda::StreamMember { sequence: &sequence, position: 300 };
    // SAFETY: the hints outlive the stream's work, which is of the session's context.
    let submitted = unsafe { model.submit_on_stream(1, &[member], hints.ptr(), &stream) };
    assert!(matches!(submitted, Err(Error::Capturing)), "{submitted:?}");
    let waited = pending.wait_on_stream(&stream, PATIENCE);
    assert!(matches!(waited, Err(Error::Capturing)), "{waited:?}");
    let released = pending.release_on_stream(&stream);
    assert!(matches!(released, Err(Error::Capturing)), "{released:?}");
    stream.end_capture().expect("nothing that was refused has spoilt the capture");
    // The session goes on, and the slot of the answer that was given up comes round again.
    let words = ask_by_stream(&model, &sequence, 100);
    assert!(words.iter().all(|(found, expected)| found == expected));
}

#[test]
fn a_client_loads_the_driver_only_for_a_daemon_with_a_gpu() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let loaded = || std::fs::read_to_string("/proc/self/maps").unwrap().contains("libsoftcuda");
    let host = Daemon::start(DAEMON, &["--device", "host"]);
    let model = fake::connect(&host, &["random:budget=50%"]);
    fake::check(&fake::ask(&model, &filled(&model, 6), 1), 0, 6, 1).unwrap();
    assert!(!loaded());
    let daemon = start(&[]);
    let model = fake::connect(&daemon, &["random:budget=50%"]);
    fake::check(&fake::ask(&model, &filled(&model, 6), 1), 0, 6, 1).unwrap();
    assert!(loaded());
}

#[test]
fn rows_and_methods_that_a_gpu_cannot_serve_are_refused_with_what_to_do() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start(&[]);
    let int8 = kvoyant_client::Format::Int8.code();
    for (spec, what) in [
        (kvoyant_client::ModelSpec { dtype: int8, ..fake::spec(&["full"]) }, "int8"),
        (fake::spec(&["scout"]), "scout"),
    ] {
        match Client::connect(&daemon.socket(), Options::default()).unwrap().register(spec, &[]) {
            Err(Error::Failed(Failure::Device(why))) => {
                assert!(why.contains(what) && why.contains("--device host"), "{why}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn rows_brought_ahead_of_a_step_on_a_gpu_are_there_before_an_answer_names_them() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start(&[]);
    let model = fake::connect(&daemon, &["freekv:budget=20%,tau=-1"]);
    let sequence = filled(&model, 4);
    for step in 0..12 {
        let hint: Vec<f32> = (0..fake::QUERY_HEADS * fake::HEAD_DIM)
            .map(|at| ((at * 7 + step * 13) % 11) as f32 * 1e-6 - 5e-6)
            .collect();
        let member = kvoyant_client::Member { sequence: &sequence, position: 300, hint: Hint::Query(&hint) };
        let ready = model.speculate(1, &[member]).unwrap().wait(PATIENCE).unwrap();
        assert!(fake::check(&ready, 0, 4, 1).unwrap() > 0);
        drop(ready);
        // The next request says that the answer is not read any more.
        drop(fake::ask_with(&model, &sequence, 2, Hint::Query(&hint)));
    }
    wait_until("rows ahead of a step", || model.stat(kvoyant_protocol::wire::Stat::PrefetchedRows) > 0);
}

#[test]
fn a_device_without_room_refuses_one_session_and_serves_the_others() {
    let machine = Machine::new().with("SOFTCUDA_MEMORY", "256MiB");
    if !on_softcuda(this_test!(), &machine) {
        return;
    }
    let daemon = start(&["--device-memory", "96MiB"]);
    let connect = |slab_bytes| {
        let client = Client::connect(&daemon.socket(), Options::default()).unwrap();
        client.register(kvoyant_client::ModelSpec { slab_bytes, ..fake::spec(&["random:budget=50%"]) }, &[])
    };
    let first = connect(16 << 20).unwrap();
    let sequence = filled(&first, 1);
    let used = gpu(&daemon).used_bytes;
    match connect(90 << 20) {
        Err(Error::Failed(Failure::DeviceFull { set_aside_bytes, needed_bytes, .. })) => {
            assert_eq!(set_aside_bytes, 96 << 20);
            assert!(needed_bytes >= 90 << 20);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(gpu(&daemon).used_bytes, used, "a refusal takes nothing");
    // Now the card itself has no room, whatever was set aside.
    set_faults("oom process=kvoyantd");
    let refused = connect(16 << 20);
    assert!(matches!(refused, Err(Error::Failed(Failure::DeviceFull { .. }))), "{refused:?}");
    fake::check(&fake::ask(&first, &sequence, 1), 0, 1, 1).unwrap();
    set_faults("");
    let second = connect(16 << 20).unwrap();
    let other = filled(&second, 2);
    fake::check(&fake::ask(&second, &other, 1), 0, 2, 1).unwrap();
    fake::check(&fake::ask(&first, &sequence, 2), 0, 1, 2).unwrap();
}

#[test]
fn memory_of_an_engine_killed_in_the_middle_of_a_copy_comes_back() {
    let machine = Machine::new().with("SOFTCUDA_LATE_MS", "200");
    if !on_softcuda(this_test!(), &machine) {
        return;
    }
    for export in ["handle", "descriptor"] {
        let daemon = start(&["--export", export]);
        let neighbour = fake::connect(&daemon, &["random:budget=50%"]);
        let sequence = filled(&neighbour, 9);
        let before = gpu(&daemon);
        // Copies are so slow that the client dies with some of them under way.
        set_faults("slow-copies us=30000 process=kvoyantd");
        let mut child = Command::new(CLIENT)
            .arg(daemon.socket())
            .args(["work", "60"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_until("the client's first answers", || {
            let moved =
                |s: &kvoyant_daemon::status::SessionReport| s.pid == child.id() as i32 && s.speculations > 0;
            daemon.status().sessions.iter().any(moved)
        });
        child.kill().unwrap();
        child.wait().unwrap();
        set_faults("");
        wait_until("its device memory coming back", || {
            let now = gpu(&daemon);
            now.used_bytes == before.used_bytes && now.quarantined_bytes == 0
        });
        fake::check(&fake::ask(&neighbour, &sequence, 1), 0, 9, 1).unwrap();
        assert_eq!(gpu(&daemon).lost, None, "{}", words(&mut child));
    }
}

#[test]
fn a_lost_device_is_told_to_sessions_and_ends_the_daemon_for_its_supervisor() {
    for fault in ["device-lost", "ecc", "fail call=cuMemcpyHtoDAsync_v2 code=700"] {
        if !is_child() {
            let ended = kvoyant_tests::softcuda::in_child(
                this_test!(),
                &Machine::new(),
                &[("KVOYANT_TEST_FAULT", fault)],
            );
            assert!(ended.status.success(), "{fault}: {}", ended.words);
            continue;
        }
        let fault = std::env::var("KVOYANT_TEST_FAULT").unwrap();
        let daemon = start(&[]);
        let model = fake::connect(&daemon, &["random:budget=50%"]);
        let sequence = filled(&model, 4);
        fake::check(&fake::ask(&model, &sequence, 1), 0, 4, 1).unwrap();
        set_faults(&format!("{fault} process=kvoyantd"));
        let member = kvoyant_client::Member { sequence: &sequence, position: 300, hint: Hint::None };
        // It may be this answer or the session that fails first; but something says so, in time.
        let told = std::iter::repeat_with(|| model.speculate(2, &[member]).and_then(|p| p.wait(PATIENCE)))
            .find_map(Result::err)
            .unwrap();
        let told = match told {
            Error::NotReady { .. } => {
                let again = std::iter::repeat_with(|| model.open(0, 10)).find_map(Result::err);
                again.unwrap()
            }
            other => other,
        };
        assert!(matches!(told, Error::Failed(Failure::DeviceLost(_)) | Error::DaemonGone), "{told}");
        let mut rows = vec![0; 2 * fake::HEAD_DIM * 4];
        sequence.read_rows(0, 1, 299..300, &mut rows).expect("host copies are safe");
        let (status, words) = daemon.wait();
        assert_eq!(status.code(), Some(75), "{words}");
        assert!(words.contains("the device is lost"), "{words}");
        return;
    }
}

/// What a daemon says that cannot start on a machine.
fn refusal(machine: Option<&Machine>, flags: &[&str]) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Daemon::command(DAEMON, folder.path(), flags);
    if let Some(machine) = machine {
        machine.env(&mut command);
    }
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_device_that_cannot_be_used_is_refused_in_one_sentence() {
    let old = Machine::new().with("SOFTCUDA_DRIVER_VERSION", "11080");
    let empty = Machine::new().with("SOFTCUDA_DEVICES", "0");
    let exclusive = Machine::new().with("SOFTCUDA_EXCLUSIVE", "1");
    let unregistered = Machine::new().with("SOFTCUDA_NO", "host_register");
    let islands = Machine::new().with("SOFTCUDA_NO", "posix_fd,ipc,ipc_events");
    let cases: [(Option<&Machine>, &str, &str); 7] = [
        (None, "cuda:0", "libcuda"),
        (Some(&old), "cuda:0", "11.8"),
        (Some(&empty), "cuda:0", "no"),
        (Some(&exclusive), "cuda:0", "exclusive"),
        (Some(&unregistered), "cuda:0", "registered host memory"),
        (Some(&islands), "cuda:0", "export memory"),
        (Some(&islands), "cuda:3", "no cuda:3"),
    ];
    for (machine, device, word) in cases {
        let (code, words) = refusal(machine, &["--device", device]);
        let last = words.lines().last().unwrap_or_default();
        assert_eq!(code, Some(69), "{words}");
        assert!(
            last.starts_with("kvoyantd: cannot use the device") && last.contains(word),
            "{word}: {words}"
        );
    }
}

#[test]
fn host_memory_that_cannot_be_registered_is_refused_with_the_limits_that_there_are() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start(&["--pin-ahead", "0"]);
    let model = fake::connect(&daemon, &["random:budget=50%"]);
    set_faults("register-fails process=kvoyantd");
    let refused = model.open(0, 100).unwrap_err();
    assert!(
        matches!(&refused, Error::Failed(Failure::NotReady(reason)) if reason.contains("memlock limit is")),
        "{refused}"
    );
    set_faults("");
    let sequence = filled(&model, 4);
    fake::check(&fake::ask(&model, &sequence, 1), 0, 4, 1).unwrap();
}

#[test]
fn a_slice_of_a_card_serves_like_a_card() {
    if !on_softcuda(this_test!(), &Machine::new().with("SOFTCUDA_MIG", "1")) {
        return;
    }
    let daemon = start(&[]);
    let model = fake::connect(&daemon, &["random:budget=50%"]);
    let sequence = filled(&model, 5);
    fake::check(&fake::ask(&model, &sequence, 1), 0, 5, 1).unwrap();
    assert!(gpu(&daemon).model.contains("MIG"));
}

#[test]
fn a_client_without_a_driver_is_told_why_it_cannot_use_a_gpu() {
    let machine = Machine::new();
    let folder = tempfile::tempdir().unwrap();
    let mut command = Daemon::command(DAEMON, folder.path(), &["--device", "cuda:0"]);
    let mut daemon = machine.env(&mut command).spawn().unwrap();
    let socket = folder.path().join("kvoyantd.sock");
    wait_until("the daemon's socket", || socket.exists());
    let refused = Client::connect(&socket, Options::default());
    assert!(
        matches!(&refused, Err(Error::Failed(Failure::Device(reason))) if reason.contains("no CUDA driver")),
        "{refused:?}"
    );
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    machine.assert_clean();
}

#[test]
fn an_engine_in_another_process_reads_right_rows() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let daemon = start(&["--export", "handle"]);
    let mut children: Vec<_> = (0..2)
        .map(|_| {
            Command::new(CLIENT)
                .arg(daemon.socket())
                .args(["work", "1"])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in &mut children {
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let status = child.wait().unwrap();
        assert!(status.success(), "{}", words(child));
        assert!(line.trim().parse::<u64>().unwrap() > 0);
    }
    wait_until("all device memory coming back", || gpu(&daemon).used_bytes == 0);
}
