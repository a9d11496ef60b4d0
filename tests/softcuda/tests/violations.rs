//! Everything that a card would not forgive is noticed, and answered as a driver would.

mod soft;

use soft::{Machine, Soft, poke, role};

/// Runs a body in a child, and holds the violations against what is expected, in order.
fn violations(test: &str, expected: &[&str], body: impl FnOnce(&Soft)) {
    if role().is_some() {
        body(&Soft::start());
        return;
    }
    let machine = Machine::new();
    machine.run(test, "alone");
    let found = machine.violations();
    assert_eq!(found.lines().count(), expected.len(), "{found}");
    for (line, text) in found.lines().zip(expected) {
        assert!(line.contains(text), "{line}\nhas not: {text}");
    }
}

#[test]
fn memory_is_used_only_while_it_is_there_and_within_its_bounds() {
    violations(
        "memory_is_used_only_while_it_is_there_and_within_its_bounds",
        &[
            "cuMemcpyHtoDAsync_v2: 4097 bytes from",
            "cuMemsetD8Async: 2 bytes from",
            "cuStreamWriteValue64_v2: 8 bytes from",
            "cuMemcpyHtoDAsync_v2: 8192 bytes from",
            "cuMemcpyHtoDAsync_v2: use after free",
            "cuMemFree_v2: ",
            "cuMemcpyDtoHAsync_v2: 0x100 is no address",
            "is device memory, not host memory",
            "cuMemFreeHost: ",
        ],
        |soft| {
            let (device, host, stream) = (soft.alloc(4096), soft.pinned(4096), soft.stream());
            assert_eq!(soft.call("cuMemcpyHtoDAsync_v2", &[device, host, 4097, stream]), 1);
            assert_eq!(soft.call("cuMemsetD8Async", &[device + 4095, 0, 2, stream]), 1);
            assert_eq!(soft.call("cuStreamWriteValue64_v2", &[stream, device + 4096 - 8, 0, 0]), 0);
            let odd = soft.alloc(12);
            assert_eq!(soft.call("cuStreamWriteValue64_v2", &[stream, odd + 8, 0, 0]), 1);
            let larger = soft.alloc(8192);
            assert_eq!(soft.call("cuMemcpyHtoDAsync_v2", &[larger, host, 8192, stream]), 1);
            soft.ok("cuMemFree_v2", &[device]);
            assert_eq!(soft.call("cuMemcpyHtoDAsync_v2", &[device, host, 8, stream]), 1);
            assert_eq!(soft.call("cuMemFree_v2", &[device]), 1);
            assert_eq!(soft.call("cuMemcpyDtoHAsync_v2", &[host, 0x100, 8, stream]), 1);
            assert_eq!(soft.call("cuMemcpyHtoDAsync_v2", &[larger, odd, 8, stream]), 1);
            assert_eq!(soft.call("cuMemFreeHost", &[larger]), 1);
            soft.ok("cuStreamSynchronize", &[stream]);
        },
    );
}

#[test]
fn host_memory_of_an_asynchronous_copy_is_pinned_and_stays_so() {
    violations(
        "host_memory_of_an_asynchronous_copy_is_pinned_and_stays_so",
        &[
            "asynchronous copy of unregistered host memory",
            "registered host memory at",
            "cuMemHostUnregister: ",
            "cuMemHostUnregister: ",
        ],
        |soft| {
            let (device, stream, gate) = (soft.alloc(4096), soft.stream(), soft.pinned(4096));
            let mut own = vec![3_u64; 1024];
            let at = (own.as_mut_ptr() as u64).next_multiple_of(4096);
            soft.ok("cuMemcpyHtoDAsync_v2", &[device, at, 64, stream]);
            soft.ok("cuStreamSynchronize", &[stream]);

            soft.ok("cuMemHostRegister_v2", &[at, 4096, 2]);
            assert_eq!(soft.call("cuMemHostRegister_v2", &[at + 8, 8, 2]), 712);
            soft.ok("cuMemcpyHtoDAsync_v2", &[device, at, 4096, stream]);
            soft.ok("cuStreamSynchronize", &[stream]);
            assert_eq!(soft.gives("cuMemHostGetDevicePointer_v2", &[at + 64, 0]), at + 64);
            soft.ok("cuMemHostUnregister", &[at]);

            // Registered for reading, it is not written.
            soft.ok("cuMemHostRegister_v2", &[at, 4096, 2 | 8]);
            assert_eq!(soft.call("cuMemcpyDtoHAsync_v2", &[at, device, 8, stream]), 1);
            poke(gate, 0);
            soft.ok("cuStreamWaitValue64_v2", &[stream, gate, 1, 0]);
            soft.ok("cuMemcpyHtoDAsync_v2", &[device, at, 8, stream]);
            let opener = std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(20));
                poke(gate, 1);
            });
            soft.ok("cuMemHostUnregister", &[at]);
            opener.join().unwrap();
            assert_eq!(soft.call("cuMemHostUnregister", &[at]), 713);
            drop(own);
        },
    );
}

#[test]
fn streams_and_events_are_used_only_while_they_are_there() {
    violations(
        "streams_and_events_are_used_only_while_they_are_there",
        &[
            "cuEventRecord: event",
            "was destroyed",
            "cuStreamSynchronize: stream",
            "cuStreamQuery: stream 0x1234 was never made",
            "cuMemsetD8Async: the null stream was used",
        ],
        |soft| {
            let (stream, event) = (soft.stream(), soft.gives("cuEventCreate", &[2]));
            soft.ok("cuEventRecord", &[event, stream]);
            soft.ok("cuEventDestroy_v2", &[event]);
            assert_eq!(soft.call("cuEventRecord", &[event, stream]), 400);
            assert_eq!(soft.call("cuEventDestroy_v2", &[event]), 400);
            soft.ok("cuStreamDestroy_v2", &[stream]);
            assert_eq!(soft.call("cuStreamSynchronize", &[stream]), 400);
            assert_eq!(soft.call("cuStreamQuery", &[0x1234]), 400);
            let device = soft.alloc(4096);
            soft.ok("cuMemsetD8Async", &[device, 1, 16, 0]);
        },
    );
}

#[test]
fn a_handle_of_an_odd_size_exposes_its_neighbours() {
    violations("a_handle_of_an_odd_size_exposes_its_neighbours", &["exposes its neighbours"], |soft| {
        soft.handle("cuIpcGetMemHandle", soft.alloc(4096));
    });
}

/// `CUmemAllocationProp`: pinned, file descriptors, the first device.
const PROPERTIES: [u64; 4] = [1 | 1 << 32, 1, 0, 0];

#[test]
fn memory_that_was_imported_for_reading_is_not_written() {
    violations(
        "memory_that_was_imported_for_reading_is_not_written",
        &["mapped physical memory at", "is written, but may only be read", "still has memory mapped"],
        |soft| {
            let bytes = 4 << 20;
            assert_eq!(
                soft.gives("cuMemGetAllocationGranularity", &[PROPERTIES.as_ptr() as u64, 0]),
                2 << 20
            );
            let made = soft.gives("cuMemCreate", &[bytes, PROPERTIES.as_ptr() as u64, 0]);
            let fd = soft.gives("cuMemExportToShareableHandle", &[made, 1, 0]);
            let imported = soft.gives("cuMemImportFromShareableHandle", &[fd, 1]);
            let map = |handle: u64, access: u64| {
                let at = soft.gives("cuMemAddressReserve", &[bytes, 0, 0, 0]);
                soft.ok("cuMemMap", &[at, bytes, 0, handle, 0]);
                let describes: [u32; 3] = [1, 0, access as u32];
                soft.ok("cuMemSetAccess", &[at, bytes, describes.as_ptr() as u64, 1]);
                soft.ok("cuMemRelease", &[handle]);
                at
            };
            let (whole, readable) = (map(made, 3), map(imported, 1));
            soft.write(whole + 4096, 77);
            assert_eq!(soft.read(readable + 4096), 77);
            let word = 1_u64;
            assert_eq!(soft.call("cuMemcpyHtoD_v2", &[readable, &raw const word as u64, 8]), 1);
            let stream = soft.stream();
            assert_eq!(soft.call("cuStreamWriteValue64_v2", &[stream, readable, 0, 0]), 1);
            assert_eq!(soft.call("cuMemAddressFree", &[readable, bytes]), 1);

            let taken = soft.free_bytes();
            for at in [readable, whole] {
                soft.ok("cuMemUnmap", &[at, bytes]);
                soft.ok("cuMemAddressFree", &[at, bytes]);
            }
            assert_eq!(soft.free_bytes() - taken, bytes);
        },
    );
}

extern "C" fn calls_the_driver(data: *mut std::ffi::c_void) {
    // SAFETY: the test gives the address of its own driver, which outlives the stream's work.
    let soft = unsafe { &*data.cast::<Soft>() };
    assert_eq!(soft.call("cuCtxSynchronize", &[]), 800);
}

#[test]
fn a_host_function_makes_no_calls() {
    violations(
        "a_host_function_makes_no_calls",
        &["cuCtxSynchronize: called from a host function"],
        |soft| {
            let stream = soft.stream();
            let function = calls_the_driver as extern "C" fn(*mut std::ffi::c_void);
            soft.ok("cuLaunchHostFunc", &[stream, function as usize as u64, std::ptr::from_ref(soft) as u64]);
            soft.ok("cuStreamSynchronize", &[stream]);
        },
    );
}
