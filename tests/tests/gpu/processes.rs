//! The CUDA wrappers on softcuda, between processes: memory by handle and by descriptor, events, and who may open what.
//!
//! A test starts itself as the other process, whose part is in [`PART`]; what it says goes over its standard streams.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};

use kvoyant_cuda::{
    Access, Context, DeviceBuffer, EventKind, IPC_HANDLE_BYTES, ImportedBuffer, Priority, Stream, driver,
};
use kvoyant_tests::softcuda::{Machine, on_softcuda};
use kvoyant_tests::this_test;

/// What the other process is to know: words with spaces between.
const PART: &str = "KVOYANT_OTHER_PART";
/// Begins a line that the other process says to its starter.
const SAYS: &str = "says: ";

const BYTES: usize = 70_000;

fn context() -> Context {
    driver().expect("softcuda is a driver").context(0).expect("it has a device")
}

/// Starts this test again as the other process.
fn start_other(test: &str, part: &str, stdin: Stdio) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(PART, part);
    command.stdin(stdin).stdout(Stdio::piped()).spawn().unwrap()
}

/// The next line that the other process says; none when it ends.
fn hear(from: &mut impl BufRead) -> Option<String> {
    from.lines()
        .map_while(Result::ok)
        .find_map(|line| line.split_once(SAYS).map(|(_, words)| words.to_owned()))
}

/// In the other process: the words of its part.
fn part() -> Option<Vec<String>> {
    Some(std::env::var(PART).ok()?.split(' ').map(str::to_owned).collect())
}

/// In the other process: says a line. The harness may have left its own line open before.
fn say(words: &str) {
    println!("\n{SAYS}{words}");
    std::io::stdout().flush().unwrap();
}

/// In the other process: waits for a line.
fn wait_for_line() {
    let mut line = String::new();
    assert_ne!(std::io::stdin().read_line(&mut line).unwrap(), 0, "the starter is still there");
}

fn hex(handle: &[u8; IPC_HANDLE_BYTES]) -> String {
    handle.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn handle(hex: &str) -> [u8; IPC_HANDLE_BYTES] {
    assert_eq!(hex.len(), 2 * IPC_HANDLE_BYTES);
    std::array::from_fn(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap())
}

/// Whether `len` bytes at `ptr` are all `value` once the stream has come so far.
fn is_filled(stream: &Stream, ptr: u64, len: usize, value: u8) -> bool {
    let host = stream.context().pinned(len).unwrap();
    // SAFETY: the tests' ranges are valid, and the copy is waited for before the bytes are read.
    unsafe {
        stream.copy_d2h(host.as_ptr(), ptr, len).unwrap();
        stream.synchronize().unwrap();
        (0..len).all(|at| host.as_ptr().add(at).read_volatile() == value)
    }
}

fn filled(stream: &Stream, value: u8) -> DeviceBuffer {
    let buffer = stream.context().alloc(BYTES).unwrap();
    // SAFETY: within the buffer, and waited for.
    unsafe { stream.fill(buffer.ptr(), value, BYTES) }.unwrap();
    stream.synchronize().unwrap();
    buffer
}

#[test]
fn memory_is_read_and_written_by_handle_both_ways() {
    if let Some(words) = part() {
        let context = context();
        let stream = context.stream(Priority::Normal).unwrap();
        let theirs = context.open_ipc(&handle(&words[0]), BYTES).unwrap();
        assert!(!theirs.read_only(), "a handle always opens for writing");
        assert!(is_filled(&stream, theirs.ptr(), BYTES, 11));
        // SAFETY: within the other process's buffer, which it keeps until this process has ended.
        unsafe { stream.fill(theirs.ptr(), 12, BYTES) }.unwrap();
        let ours = filled(&stream, 13);
        say(&hex(&ours.ipc_handle().unwrap()));
        wait_for_line();
        return;
    }
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let context = context();
    let stream = context.stream(Priority::Normal).unwrap();
    let ours = filled(&stream, 11);
    let own = ours.ipc_handle().unwrap();
    let refused = context.open_ipc(&own, BYTES).unwrap_err();
    assert!(!refused.is_sticky() && refused.advice().contains("its own handle"), "{refused}");

    let mut other = start_other(this_test!(), &hex(&own), Stdio::piped());
    let mut stdout = BufReader::new(other.stdout.take().unwrap());
    let theirs = hear(&mut stdout).expect("the other process exports too");
    assert!(is_filled(&stream, ours.ptr(), BYTES, 12), "it wrote here");
    let too_long = context.open_ipc(&handle(&theirs), 1 << 30).unwrap_err();
    assert!(!too_long.is_sticky(), "{too_long}");
    let import: ImportedBuffer = context.open_ipc(&handle(&theirs), BYTES).unwrap();
    assert_eq!(import.len(), BYTES);
    assert!(is_filled(&stream, import.ptr(), BYTES, 13));
    drop(import);
    other.stdin.take().unwrap().write_all(b"done\n").unwrap();
    assert_eq!(hear(&mut stdout), None);
    assert!(other.wait().unwrap().success());
}

#[test]
fn memory_is_mapped_from_a_descriptor_for_reading_or_for_writing() {
    if let Some(words) = part() {
        let context = context();
        let stream = context.stream(Priority::Normal).unwrap();
        let (bytes, access) = (words[0].parse().unwrap(), words[1].as_str());
        let access = if access == "read" { Access::Read } else { Access::ReadWrite };
        // The descriptor came as standard input.
        let memory = context.import_fd(std::io::stdin().as_fd(), bytes, access).unwrap();
        assert_eq!((memory.len(), memory.read_only()), (bytes, access == Access::Read));
        assert!(is_filled(&stream, memory.ptr(), bytes, 21));
        if access == Access::ReadWrite {
            // SAFETY: within the mapping, and waited for.
            unsafe { stream.fill(memory.ptr(), 22, bytes) }.unwrap();
            stream.synchronize().unwrap();
        }
        say("seen");
        return;
    }
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let context = context();
    let stream = context.stream(Priority::Normal).unwrap();
    let ours = context.alloc_shareable(BYTES).unwrap();
    for (access, after) in [("read", 21), ("write", 22)] {
        // SAFETY: within the buffer, and waited for.
        unsafe { stream.fill(ours.ptr(), 21, ours.len()) }.unwrap();
        stream.synchronize().unwrap();
        let fd = ours.export_fd().unwrap();
        let mut other = start_other(this_test!(), &format!("{} {access}", ours.len()), fd.into());
        let mut stdout = BufReader::new(other.stdout.take().unwrap());
        assert_eq!(hear(&mut stdout).as_deref(), Some("seen"), "{access}");
        assert!(other.wait().unwrap().success());
        assert!(is_filled(&stream, ours.ptr(), ours.len(), after), "{access}");
    }
}

#[test]
fn a_descriptor_that_is_no_memory_is_refused() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let context = context();
    let file = tempfile::tempfile().unwrap();
    let refused = context.import_fd(&file, BYTES, Access::Read).unwrap_err();
    assert!(!refused.is_sticky(), "{refused}");
    let ours = context.alloc_shareable(BYTES).unwrap();
    let longer = context.import_fd(ours.export_fd().unwrap(), 4 * ours.len(), Access::Read).unwrap_err();
    assert!(!longer.is_sticky(), "{longer}");
    let stream = context.stream(Priority::Normal).unwrap();
    // SAFETY: within the buffer.
    unsafe { stream.fill(ours.ptr(), 1, BYTES) }.unwrap();
    assert!(is_filled(&stream, ours.ptr(), BYTES, 1), "the refusals did no harm");
}

#[test]
fn memory_outlives_its_exporter_in_whoever_mapped_it_by_descriptor() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let context = context();
    let stream = context.stream(Priority::Normal).unwrap();
    let ours = context.alloc_shareable(BYTES).unwrap();
    // SAFETY: within the buffer, and waited for.
    unsafe { stream.fill(ours.ptr(), 31, BYTES) }.unwrap();
    stream.synchronize().unwrap();
    let import = context.import_fd(ours.export_fd().unwrap(), ours.len(), Access::Read).unwrap();
    drop(ours);
    assert!(is_filled(&stream, import.ptr(), BYTES, 31));
}

#[test]
fn a_stream_waits_for_an_event_of_another_process() {
    if let Some(words) = part() {
        let context = context();
        let stream = context.stream(Priority::Normal).unwrap();
        let memory = context.open_ipc(&handle(&words[0]), BYTES).unwrap();
        let event = context.open_event(&handle(&words[1])).unwrap();
        assert!(!event.query().unwrap(), "the other process's stream stands still");
        stream.wait_event(&event).unwrap();
        say("waiting");
        assert!(is_filled(&stream, memory.ptr(), BYTES, 41), "the copy waited for the event");
        assert!(event.query().unwrap());
        say("seen");
        return;
    }
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let context = context();
    let stream = context.stream(Priority::Normal).unwrap();
    let memory = filled(&stream, 40);
    let word = context.pinned(64).unwrap();
    let event = context.event(EventKind::Interprocess).unwrap();
    // SAFETY: the word and the buffer outlive the stream's work, which is waited for.
    unsafe {
        word.as_ptr().write_bytes(0, 64);
        stream.wait_value64(word.device_ptr(), 1).unwrap();
        stream.fill(memory.ptr(), 41, BYTES).unwrap();
    }
    event.record(&stream).unwrap();
    assert!(context.event(EventKind::Local).unwrap().ipc_handle().is_err(), "a local event has no handle");

    let part = format!("{} {}", hex(&memory.ipc_handle().unwrap()), hex(&event.ipc_handle().unwrap()));
    let mut other = start_other(this_test!(), &part, Stdio::null());
    let mut stdout = BufReader::new(other.stdout.take().unwrap());
    assert_eq!(hear(&mut stdout).as_deref(), Some("waiting"));
    // SAFETY: within the pinned word, aligned; the stream polls it.
    unsafe { word.as_ptr().cast::<u64>().write_volatile(1) };
    assert_eq!(hear(&mut stdout).as_deref(), Some("seen"));
    assert!(other.wait().unwrap().success());
    stream.synchronize().unwrap();
}

#[test]
fn a_card_in_exclusive_mode_refuses_the_second_process() {
    if part().is_some() {
        let driver = driver().unwrap();
        let refused = driver.context(0).unwrap_err();
        assert_eq!(refused.kind(), kvoyant_cuda::ErrorKind::Exclusive, "{refused}");
        assert!(!refused.is_sticky());
        say("refused");
        return;
    }
    if !on_softcuda(this_test!(), &Machine::new().with("SOFTCUDA_EXCLUSIVE", "1")) {
        return;
    }
    let _context = context();
    let mut other = start_other(this_test!(), "second", Stdio::null());
    let mut stdout = BufReader::new(other.stdout.take().unwrap());
    assert_eq!(hear(&mut stdout).as_deref(), Some("refused"));
    assert!(other.wait().unwrap().success());
}
