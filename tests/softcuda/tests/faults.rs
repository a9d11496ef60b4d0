//! Faults strike when they are asked for, and machines are as poor as they are asked to be.

mod soft;

use std::time::Instant;

use soft::{Machine, Soft, poke, role, set_faults};

/// Runs a body in a child on a machine without violations.
fn on(machine: &Machine, test: &str, body: impl FnOnce(&Soft)) {
    if role().is_some() {
        let soft = Soft::load();
        body(&soft);
        return;
    }
    machine.run(test, "alone");
    assert_eq!(machine.violations(), "");
}

fn start() -> Soft {
    Soft::start()
}

#[test]
fn memory_runs_out_when_it_is_gone_and_when_it_is_asked_to() {
    let machine = Machine::new().with("SOFTCUDA_MEMORY", "64MiB").with("SOFTCUDA_CONTEXT", "4MiB");
    on(&machine, "memory_runs_out_when_it_is_gone_and_when_it_is_asked_to", |_| {
        let soft = start();
        assert_eq!(soft.free_bytes(), 60 << 20);
        let slab = soft.alloc(58 << 20);
        let mut more = 0_u64;
        let mut alloc = |bytes: u64| soft.call("cuMemAlloc_v2", &[&raw mut more as u64, bytes]);
        assert_eq!((alloc(4 << 20), alloc(1)), (2, 0));
        soft.ok("cuMemFree_v2", &[slab]);
        set_faults("oom after=1 count=2");
        assert_eq!([alloc(1), alloc(1), alloc(1), alloc(1)], [0, 2, 2, 0]);
        set_faults("fail call=cuMemAlloc_v2 code=999 process=faults\noom process=another");
        assert_eq!(alloc(1), 999);
        set_faults("");
        assert_eq!(alloc(1), 0);
    });
}

#[test]
fn a_lost_device_ends_what_waits_and_every_call() {
    on(&Machine::new(), "a_lost_device_ends_what_waits_and_every_call", |_| {
        let soft = start();
        let (gate, stream) = (soft.pinned(4096), soft.stream());
        poke(gate, 0);
        soft.ok("cuStreamWaitValue64_v2", &[stream, gate, 1, 0]);
        let loser = std::thread::spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            set_faults("ecc");
        });
        assert_eq!(soft.call("cuStreamSynchronize", &[stream]), 214);
        loser.join().unwrap();
        set_faults("");
        assert_eq!(soft.call("cuMemFreeHost", &[gate]), 214);
        assert_eq!(soft.call("cuCtxSynchronize", &[]), 214);
    });
}

#[test]
fn copies_hang_until_they_are_let_go() {
    on(&Machine::new(), "copies_hang_until_they_are_let_go", |_| {
        let soft = start();
        let (device, host, stream) = (soft.alloc(4096), soft.pinned(4096), soft.stream());
        set_faults("hang-copies");
        soft.ok("cuMemcpyHtoDAsync_v2", &[device, host, 4096, stream]);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(soft.call("cuStreamQuery", &[stream]), 600);
        set_faults("");
        soft.ok("cuStreamSynchronize", &[stream]);
    });
}

#[test]
fn a_shaped_link_takes_at_least_its_time() {
    let machine = Machine::new().with("SOFTCUDA_GBPS", "0.1").with("SOFTCUDA_LATENCY_US", "1000");
    on(&machine, "a_shaped_link_takes_at_least_its_time", |_| {
        let soft = start();
        let bytes = 1 << 20;
        let (device, host) = (soft.alloc(2 * bytes), soft.pinned(2 * bytes));
        let streams = [soft.stream(), soft.stream()];
        let since = Instant::now();
        for (index, stream) in streams.iter().enumerate() {
            let at = index as u64 * bytes;
            soft.ok("cuMemcpyHtoDAsync_v2", &[device + at, host + at, bytes, *stream]);
        }
        soft.ok("cuCtxSynchronize", &[]);
        // Two streams share the link: 2 MiB at 100 MB/s, and a latency.
        assert!(since.elapsed().as_secs_f64() >= 2.0 * 1_048_576.0 / 1e8 + 1e-3);
    });
}

#[test]
fn a_machine_can_lack_a_device_or_an_ability() {
    let poor = "memops64,read_only_register,ipc,ipc_events,posix_fd,batch";
    let machine = Machine::new().with("SOFTCUDA_NO", poor).with("SOFTCUDA_DRIVER_VERSION", "11080");
    on(&machine.with("SOFTCUDA_MIG", "1"), "a_machine_can_lack_a_device_or_an_ability", |_| {
        let soft = start();
        assert_eq!(soft.gives("cuDriverGetVersion", &[]), 11080);
        let mut name = [0_u8; 64];
        soft.ok("cuDeviceGetName", &[name.as_mut_ptr() as u64, 64, 0]);
        assert!(String::from_utf8_lossy(&name).contains("MIG 1g"));
        for attribute in [93, 122, 103, 113, 125] {
            assert_eq!(soft.gives("cuDeviceGetAttribute", &[attribute, 0]), 0, "attribute {attribute}");
        }
        let (stream, device) = (soft.stream(), soft.alloc(2 << 20));
        assert_eq!(soft.call("cuStreamWriteValue64_v2", &[stream, device, 1, 0]), 801);
        soft.ok("cuStreamWriteValue32_v2", &[stream, device, 1, 0]);
        let mut handle = [0_u64; 8];
        assert_eq!(soft.call("cuIpcGetMemHandle", &[handle.as_mut_ptr() as u64, device]), 801);
        assert_eq!(soft.call("cuEventCreate", &[handle.as_mut_ptr() as u64, 6]), 801);
        let (mut function, mut why) = (1_u64, 9_u32);
        let name = c"cuMemcpyBatchAsync".as_ptr() as u64;
        let found = [name, &raw mut function as u64, 12080, 0, &raw mut why as u64];
        soft.ok("cuGetProcAddress_v2", &found);
        assert_eq!((function, why), (0, 1));
    });
}

#[test]
fn batches_copy_all_their_pieces_and_are_refused_as_a_whole() {
    on(&Machine::new(), "batches_copy_all_their_pieces_and_are_refused_as_a_whole", |_| {
        let soft = start();
        let (device, host, stream) = (soft.alloc(4096), soft.pinned(4096), soft.stream());
        let to: Vec<u64> = (0..8).map(|index| device + 8 * index).collect();
        let from: Vec<u64> = (0..8).map(|index| host + 512 - 64 * index).collect();
        for (index, at) in from.iter().enumerate() {
            poke(*at, index as u64);
        }
        let bytes = [8_u64; 8];
        let (attributes, first) = ([1_u32, 0, 0, 0, 0, 0], [0_u64]);
        let mut failed = 0_u64;
        let batch = |count: u64, attribute_count: u64, failed: u64| {
            let [to, from] = [&to, &from].map(|list| list.as_ptr() as u64);
            let (attributes, first) = (attributes.as_ptr() as u64, first.as_ptr() as u64);
            let bytes = bytes.as_ptr() as u64;
            let given = [to, from, bytes, count, attributes, first, attribute_count, failed, stream];
            soft.call("cuMemcpyBatchAsync", &given)
        };
        assert_eq!(batch(8, 1, &raw mut failed as u64), 0);
        soft.ok("cuStreamSynchronize", &[stream]);
        for index in 0..8 {
            assert_eq!(soft.read(device + 8 * index), index);
        }
        assert_eq!(batch(0, 1, &raw mut failed as u64), 1);
        assert_eq!(batch(8, 0, &raw mut failed as u64), 1);
    });
}

#[test]
fn a_machine_without_devices_says_so() {
    let machine = Machine::new().with("SOFTCUDA_DEVICES", "0");
    on(&machine, "a_machine_without_devices_says_so", |soft| {
        assert_eq!(soft.call("cuInit", &[0]), 100);
    });
}
