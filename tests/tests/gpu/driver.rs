//! The CUDA wrappers on softcuda, within one process: what they promise holds, and what a card would not forgive is
//! never done.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;

use kvoyant_cuda::{
    ALLOCATION_UNIT, BatchCopies, ComputeMode, Context, CudaError, ErrorKind, EventKind, HostToDevice,
    KernelCache, KernelError, MAX_BATCH, PinnedBuffer, Priority, Stream, Unavailable, driver,
};
use kvoyant_kernels::cuda::params::{GatherParams, GatherRun};
use kvoyant_kernels::cuda::source;
use kvoyant_tests::softcuda::{Machine, on_softcuda};
use kvoyant_tests::this_test;

fn context() -> Context {
    driver().expect("softcuda is a driver").context(0).expect("it has a device")
}

/// Fills pinned memory, which no device is using, by index.
fn write(buffer: &PinnedBuffer, byte: impl Fn(usize) -> u8) {
    for at in 0..buffer.len() {
        // SAFETY: within the buffer, and nothing is queued on it.
        unsafe { buffer.as_ptr().add(at).write_volatile(byte(at)) };
    }
}

/// What pinned memory holds, now that no device is using it.
fn bytes(buffer: &PinnedBuffer) -> Vec<u8> {
    // SAFETY: within the buffer, and nothing is queued on it.
    (0..buffer.len()).map(|at| unsafe { buffer.as_ptr().add(at).read_volatile() }).collect()
}

/// What device memory holds once `stream` has come so far.
fn read_back(stream: &Stream, ptr: u64, len: usize) -> Vec<u8> {
    let host = stream.context().pinned(len).unwrap();
    // SAFETY: the tests' ranges are valid, and the copy is waited for.
    unsafe { stream.copy_d2h(host.as_ptr(), ptr, len) }.unwrap();
    stream.synchronize().unwrap();
    bytes(&host)
}

#[test]
fn a_device_is_described_and_found_by_its_uuid() {
    let machine = Machine::new().with("SOFTCUDA_DEVICES", "2").with("SOFTCUDA_MEMORY", "512MiB");
    if !on_softcuda(this_test!(), &machine) {
        return;
    }
    let driver = driver().unwrap();
    assert!(driver.version() >= kvoyant_cuda::NEEDED_VERSION);
    let devices = driver.devices().unwrap();
    assert_eq!(devices.len(), 2);
    assert_ne!(devices[0].uuid, devices[1].uuid);
    assert_eq!(driver.device_by_uuid(devices[1].uuid).unwrap().as_ref(), Some(&devices[1]));
    assert_eq!(driver.device_by_uuid([0xEE; 16]).unwrap(), None);
    assert_eq!(driver.device(2).unwrap_err().kind(), ErrorKind::NoDevice);
    let device = &devices[0];
    assert_eq!((device.total_bytes, device.compute_mode), (512 << 20, ComputeMode::Default));
    assert!(!device.name.is_empty() && device.compute.0 >= 8, "{device:?}");
    let abilities = device.abilities;
    assert!(abilities.memops_64 && abilities.memops_32 && abilities.posix_fd && abilities.host_register);

    let context = driver.context(1).unwrap();
    let (free, total) = context.memory().unwrap();
    assert!(free <= total && total == 512 << 20, "{free} of {total}");
}

#[test]
fn a_driver_that_is_too_old_is_named_with_its_version() {
    let machine = Machine::new().with("SOFTCUDA_DRIVER_VERSION", "11080");
    if on_softcuda(this_test!(), &machine) {
        assert_eq!(driver().unwrap_err(), Unavailable::TooOld { found: 11_080, needed: 12_020 });
    }
}

#[test]
fn a_driver_without_a_device_is_told_from_none() {
    let machine = Machine::new().with("SOFTCUDA_DEVICES", "0");
    if on_softcuda(this_test!(), &machine) {
        assert_eq!(driver().unwrap_err(), Unavailable::NoDevice);
    }
}

#[test]
fn bytes_go_to_the_device_and_come_back() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let context = context();
    context.bind().unwrap();
    let stream = context.stream(Priority::High).unwrap();
    let host = context.pinned(10_000).unwrap();
    write(&host, |at| (at % 251) as u8);
    let first = context.alloc(10_000).unwrap();
    let second = context.alloc_shareable(1).unwrap();
    assert_eq!((first.len(), second.len()), (ALLOCATION_UNIT, ALLOCATION_UNIT));
    // SAFETY: all ranges lie within their buffers, which live until the copies are waited for.
    unsafe {
        stream.copy_h2d(first.ptr(), host.as_ptr(), host.len()).unwrap();
        stream.copy_d2d(second.ptr() + 4096, first.ptr(), host.len()).unwrap();
        stream.fill(second.ptr() + 4096, 7, 100).unwrap();
        stream.copy_h2d(second.ptr(), host.as_ptr(), 0).unwrap();
    }
    let back = read_back(&stream, second.ptr() + 4096, host.len());
    assert!(back[..100].iter().all(|byte| *byte == 7));
    assert_eq!(back[100..], bytes(&host)[100..]);
    assert!(stream.query().unwrap());
    context.synchronize().unwrap();
}

#[test]
fn registered_memory_is_copied_from_until_it_is_given_back() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let context = context();
    let stream = context.stream(Priority::Normal).unwrap();
    let mut memory = vec![0u8; 64 << 10];
    let page = memory.as_ptr().align_offset(4096);
    let start = memory[page..].as_mut_ptr();
    let device = context.alloc(8192).unwrap();
    for round in 1..=2u8 {
        // SAFETY: the pages lie within `memory`, which lives longer than the registration.
        let registration = unsafe { context.register(start, 8192, false) }.unwrap();
        assert_eq!(registration.len(), 8192);
        assert_ne!(registration.device_ptr(), 0);
        // SAFETY: as above; nothing else looks at the pages meanwhile.
        let again = unsafe { context.register(start, 8192, false) }.unwrap_err();
        assert_eq!(again.kind(), ErrorKind::Invalid, "{again}");
        // SAFETY: within the pages; the copy is waited for in `read_back`.
        unsafe {
            start.write_bytes(round, 8192);
            stream.copy_h2d(device.ptr(), start, 8192).unwrap();
        }
        assert_eq!(read_back(&stream, device.ptr(), 8192), vec![round; 8192]);
    }
}

#[test]
fn a_device_that_is_full_refuses_one_allocation_and_serves_the_next() {
    let machine = Machine::new().with("SOFTCUDA_MEMORY", "128MiB");
    if !on_softcuda(this_test!(), &machine) {
        return;
    }
    let context = context();
    for error in [context.alloc(1 << 30).unwrap_err(), context.alloc_shareable(1 << 30).unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
        assert!(!error.is_sticky());
        assert!(error.advice().contains("--slab"), "{error}");
    }
    let (before, _) = context.memory().unwrap();
    drop((context.alloc(4 << 20).unwrap(), context.alloc_shareable(4 << 20).unwrap()));
    assert_eq!(context.memory().unwrap().0, before, "both came back");
    assert_eq!(context.alloc(0).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn a_stream_waits_for_what_an_event_marked_in_another() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let context = context();
    let (first, second) = (context.stream(Priority::Low).unwrap(), context.stream(Priority::High).unwrap());
    let event = context.event(EventKind::Local).unwrap();
    assert!(event.query().unwrap(), "an event that was never recorded has passed");

    // The first stream stands still until this thread says so.
    let (go, gate) = mpsc::channel::<()>();
    let order = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&order);
    first
        .host_func(Box::new(move || {
            gate.recv().expect("the test says go");
            seen.store(1, Ordering::SeqCst);
        }))
        .unwrap();
    event.record(&first).unwrap();
    second.wait_event(&event).unwrap();
    let seen = Arc::clone(&order);
    second.host_func(Box::new(move || assert_eq!(seen.swap(2, Ordering::SeqCst), 1))).unwrap();
    assert!(!event.query().unwrap());
    assert!(!first.query().unwrap());
    assert_eq!(order.load(Ordering::SeqCst), 0);
    go.send(()).unwrap();
    event.synchronize().unwrap();
    second.synchronize().unwrap();
    assert_eq!(order.load(Ordering::SeqCst), 2);

    let (start, end) = (context.event(EventKind::Timed).unwrap(), context.event(EventKind::Timed).unwrap());
    start.record(&first).unwrap();
    end.record(&first).unwrap();
    end.synchronize().unwrap();
    assert!(end.elapsed_ms(&start).unwrap() >= 0.0);
}

#[test]
fn a_host_function_that_panics_stops_nobody() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let stream = context().stream(Priority::Normal).unwrap();
    let ran = Arc::new(AtomicBool::new(false));
    stream.host_func(Box::new(|| panic!("on purpose"))).unwrap();
    let after = Arc::clone(&ran);
    stream.host_func(Box::new(move || after.store(true, Ordering::SeqCst))).unwrap();
    stream.synchronize().unwrap();
    assert!(ran.load(Ordering::SeqCst));
}

#[test]
fn words_hold_a_stream_and_are_compared_cyclically() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let context = context();
    let (producer, consumer) =
        (context.stream(Priority::High).unwrap(), context.stream(Priority::High).unwrap());
    let words = context.pinned(4096).unwrap();
    write(&words, |_| 0);
    let board = words.device_ptr();
    // SAFETY: the words lie within the pinned buffer, aligned, and both streams are waited for.
    unsafe {
        consumer.wait_value64(board, 7 << 8).unwrap();
        producer.write_value64(board, 6 << 8).unwrap();
        producer.synchronize().unwrap();
        assert!(!consumer.query().unwrap(), "an earlier ticket is not enough");
        producer.write_value64(board, 8 << 8).unwrap();
        consumer.synchronize().unwrap();

        // Past the end of the range: 5 is 21 later than 0xFFFF_FFF0.
        producer.write_value32(board + 8, 0xFFFF_FFEF).unwrap();
        producer.synchronize().unwrap();
        consumer.wait_value32(board + 8, 0xFFFF_FFF0).unwrap();
        assert!(!consumer.query().unwrap());
        producer.write_value32(board + 8, 5).unwrap();
        consumer.synchronize().unwrap();
    }
    assert_eq!(bytes(&words)[..12], [0, 8, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0]);
}

#[test]
fn a_captured_graph_reads_what_is_there_when_it_is_replayed() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let context = context();
    let stream = context.stream(Priority::Normal).unwrap();
    let host = context.pinned(4096).unwrap();
    let (first, second) = (context.alloc(4096).unwrap(), context.alloc(4096).unwrap());
    write(&host, |_| 1);
    let graph = stream
        .capture(|stream| {
            assert!(stream.is_capturing()?);
            // Two, so that a batch call would be made if it could be captured.
            let copies = [0, 2048].map(|at| HostToDevice {
                dst: first.ptr() + at as u64,
                src: host.as_ptr().wrapping_add(at),
                bytes: 2048,
            });
            // SAFETY: within the buffers, which outlive the graph.
            unsafe {
                stream.copy_batch_h2d(&copies)?;
                stream.copy_d2d(second.ptr(), first.ptr(), 4096)
            }
        })
        .unwrap();
    assert!(!stream.is_capturing().unwrap());
    let exec = graph.instantiate().unwrap();
    drop(graph);
    for value in [2u8, 3] {
        write(&host, |_| value);
        // SAFETY: all that was captured still lives.
        unsafe { exec.launch(&stream) }.unwrap();
        assert_eq!(read_back(&stream, second.ptr(), 4096), vec![value; 4096]);
    }
}

#[test]
fn a_capture_that_fails_ends_and_leaves_the_stream_usable() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let context = context();
    let stream = context.stream(Priority::Normal).unwrap();
    let refused = stream.capture(|stream| stream.host_func(Box::new(|| ()))).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotSupported, "{refused}");
    assert!(!stream.is_capturing().unwrap());

    let own = stream.capture(|_| Err(CudaError::new("the test", 1))).unwrap_err();
    assert_eq!(own.call, "the test");
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        stream.capture(|_| -> Result<(), CudaError> { panic!("on purpose") })
    }));
    assert!(panicked.is_err());
    assert!(!stream.is_capturing().unwrap());

    let device = context.alloc(64).unwrap();
    // SAFETY: within the buffer.
    unsafe { stream.fill(device.ptr(), 9, 64) }.unwrap();
    assert_eq!(read_back(&stream, device.ptr(), 64), vec![9; 64]);
}

#[test]
fn foreign_streams_are_borrowed_and_default_streams_refused() {
    let machine = Machine::new().with("SOFTCUDA_DEVICES", "2");
    if !on_softcuda(this_test!(), &machine) {
        return;
    }
    let driver = driver().unwrap();
    let (context, other) = (driver.context(0).unwrap(), driver.context(1).unwrap());
    let owner = context.stream(Priority::Normal).unwrap();
    // SAFETY: `owner` outlives what is borrowed of it; the default streams are no pointers at all.
    unsafe {
        for default in [0usize, 1, 2] {
            let error = Stream::borrow(&context, std::ptr::without_provenance_mut(default)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        }
        assert_eq!(Stream::borrow(&other, owner.raw()).unwrap_err().kind(), ErrorKind::Invalid);
        let borrowed = Stream::borrow(&context, owner.raw()).unwrap();
        assert_eq!(borrowed.raw(), owner.raw());
        drop(borrowed);
    }
    owner.synchronize().unwrap();
}

/// Copies 5,000 pieces, one of them empty, and checks every byte.
fn copy_many(context: &Context) {
    const PIECES: usize = MAX_BATCH + 904;
    const PIECE: usize = 48;
    let stream = context.stream(Priority::High).unwrap();
    let host = context.pinned(PIECES * PIECE).unwrap();
    write(&host, |at| (at / PIECE % 255) as u8);
    let device = context.alloc(PIECES * PIECE).unwrap();
    // In reverse, so that a wrong order of the arrays shows.
    let copies: Vec<HostToDevice> = (0..PIECES)
        .map(|piece| HostToDevice {
            dst: device.ptr() + ((PIECES - 1 - piece) * PIECE) as u64,
            src: host.as_ptr().wrapping_add(piece * PIECE),
            bytes: if piece == 1000 { 0 } else { PIECE },
        })
        .collect();
    // SAFETY: the pieces lie within their buffers and do not overlap; the copies are waited for.
    unsafe {
        stream.fill(device.ptr(), 255, PIECES * PIECE).unwrap();
        stream.copy_batch_h2d(&copies).unwrap();
    }
    let back = read_back(&stream, device.ptr(), PIECES * PIECE);
    for (place, piece) in back.chunks(PIECE).zip((0..PIECES).rev()) {
        let expected = if piece == 1000 { 255 } else { (piece % 255) as u8 };
        assert!(place.iter().all(|byte| *byte == expected), "piece {piece}");
    }
}

#[test]
fn batches_are_copied_by_the_call_of_twelve_eight() {
    let machine = Machine::new().with("SOFTCUDA_DRIVER_VERSION", "12080");
    if on_softcuda(this_test!(), &machine) {
        assert_eq!(driver().unwrap().batch_copies(), BatchCopies::V12080);
        copy_many(&context());
        assert_eq!(driver().unwrap().batch_copies(), BatchCopies::V12080, "it did not fall back");
    }
}

#[test]
fn batches_are_copied_by_the_call_of_thirteen() {
    let machine = Machine::new().with("SOFTCUDA_DRIVER_VERSION", "13000");
    if on_softcuda(this_test!(), &machine) {
        assert_eq!(driver().unwrap().batch_copies(), BatchCopies::V13000);
        copy_many(&context());
        assert_eq!(driver().unwrap().batch_copies(), BatchCopies::V13000, "it did not fall back");
    }
}

#[test]
fn batches_are_copied_one_by_one_by_an_older_driver() {
    let machine = Machine::new().with("SOFTCUDA_DRIVER_VERSION", "12040");
    if on_softcuda(this_test!(), &machine) {
        assert_eq!(driver().unwrap().batch_copies(), BatchCopies::None);
        copy_many(&context());
    }
}

#[test]
fn a_batch_call_that_fails_is_given_up_for_good() {
    let machine = Machine::new();
    machine.set_faults("fail call=cuMemcpyBatchAsync code=1");
    if on_softcuda(this_test!(), &machine) {
        assert_eq!(driver().unwrap().batch_copies(), BatchCopies::V12080);
        copy_many(&context());
        assert_eq!(driver().unwrap().batch_copies(), BatchCopies::None);
    }
}

#[test]
fn a_lost_device_is_a_sticky_error_and_no_crash() {
    let machine = Machine::new();
    machine.set_faults("ecc after=40");
    if !on_softcuda(this_test!(), &machine) {
        return;
    }
    let context = context();
    let stream = context.stream(Priority::Normal).unwrap();
    let device = context.alloc(64).unwrap();
    let lost = (0..1000)
        // SAFETY: within the buffer.
        .find_map(|_| unsafe { stream.fill(device.ptr(), 1, 64) }.and_then(|()| stream.synchronize()).err())
        .expect("the fault strikes");
    assert!(lost.is_sticky(), "{lost}");
    assert!(lost.advice().contains("Xid"), "{lost}");
    let later = context.alloc(64).unwrap_err();
    assert!(later.is_sticky(), "everything fails from then on: {later}");
}

/// Gathers two runs of host memory with the kernel of that name and checks them.
fn gather(context: &Context, cache: &KernelCache) {
    let module = cache.module(context, source("gather").unwrap()).unwrap();
    let function = module.function("gather_runs").unwrap();
    assert!(function.max_threads_per_block().unwrap() >= 128);
    assert!(module.function("no_such_kernel").is_err());
    let stream = context.stream(Priority::Normal).unwrap();
    let host = context.pinned(4096).unwrap();
    write(&host, |at| (at / 16) as u8);
    let device = context.alloc(4096).unwrap();
    let list = context.pinned(2 * size_of::<GatherRun>()).unwrap();
    let run =
        |from: u64, to: u64| GatherRun { src: host.device_ptr() + from, dst: device.ptr() + to, bytes: 512 };
    let params = GatherParams { runs: list.device_ptr(), count: 2, pad: 0 };
    let shape = params.launch(512);
    // SAFETY: the list holds two runs within buffers that live until the kernel is waited for in `read_back`.
    unsafe {
        list.as_ptr().cast::<[GatherRun; 2]>().write([run(1024, 0), run(0, 512)]);
        stream.launch(&function, shape.grid, shape.block, shape.shared_bytes, &params).unwrap();
    }
    let back = read_back(&stream, device.ptr(), 1024);
    let expected: Vec<u8> = (1024..1536).chain(0..512).map(|at: usize| (at / 16) as u8).collect();
    assert_eq!(back, expected);
}

#[test]
fn a_kernel_is_compiled_once_launched_and_compiled_anew_when_its_file_is_damaged() {
    if !on_softcuda(this_test!(), &Machine::new()) {
        return;
    }
    let context = context();
    let folder = tempfile::tempdir().unwrap();
    gather(&context, &KernelCache::new(folder.path()));
    let files =
        || std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let file = files().pop().expect("it was kept");
    let whole = std::fs::read(&file).unwrap();
    gather(&context, &KernelCache::new(folder.path()));
    assert_eq!(files().len(), 1, "the second time it was found");
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    gather(&context, &KernelCache::new(folder.path()));
    assert_eq!(std::fs::read(&file).unwrap(), whole);
}

#[test]
fn without_a_compiler_kernels_are_refused_with_what_to_install() {
    let machine = Machine::new().with("KVOYANT_NVRTC", "/nowhere/libnvrtc.so.12");
    if !on_softcuda(this_test!(), &machine) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let refused = KernelCache::new(folder.path()).module(&context(), source("gather").unwrap()).unwrap_err();
    assert!(matches!(refused, KernelError::NoCompiler(_)), "{refused}");
    assert!(refused.to_string().contains("KVOYANT_NVRTC"), "{refused}");
}
