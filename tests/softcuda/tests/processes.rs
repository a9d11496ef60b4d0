//! What processes of one machine have to do with each other.

mod soft;

use soft::{Handle, Machine, Peer, Soft, heard, poke, role, tell};

const SLAB: u64 = 2 << 20;

/// What the driver counts for each context.
const CONTEXT: u64 = 16 << 20;

/// The importer of all tests here: opens what it is told, and answers.
fn serve() {
    let soft = Soft::start();
    let mut pointer = 0;
    tell("ready");
    loop {
        let line = heard();
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("open", handle) => {
                let (code, at) = soft.open(Handle::of_line(handle));
                pointer = if code == 0 { at } else { pointer };
                tell(&format!("{code} {at}"));
            }
            ("read", offset) => tell(&soft.read(pointer + offset.parse::<u64>().unwrap()).to_string()),
            ("write", word) => {
                soft.write(pointer, word.parse().unwrap());
                tell("written");
            }
            ("wait", handle) => {
                let event = soft.open_event(Handle::of_line(handle));
                tell(&soft.call("cuEventQuery", &[event]).to_string());
                soft.ok("cuEventSynchronize", &[event]);
                tell(&soft.read(pointer).to_string());
            }
            ("query", handle) => {
                let event = soft.open_event(Handle::of_line(handle));
                tell("opened");
                heard();
                tell(&soft.call("cuEventQuery", &[event]).to_string());
            }
            ("close", _) => tell(&soft.call("cuIpcCloseMemHandle", &[pointer]).to_string()),
            ("free", _) => tell(&soft.free_bytes().to_string()),
            ("slab", _) => tell(&soft.handle("cuIpcGetMemHandle", soft.alloc(SLAB)).to_line()),
            _ => return,
        }
    }
}

/// Runs a test's body in a child; its peers run [`serve`].
fn on(machine: &Machine, test: &str, body: impl FnOnce(&Soft, Peer)) -> bool {
    match role().as_deref() {
        None => {
            machine.run(test, "exporter");
            true
        }
        Some("exporter") => {
            let (soft, mut peer) = (Soft::start(), Peer::start(test, "importer"));
            assert_eq!(peer.hear(), "ready");
            body(&soft, peer);
            false
        }
        Some(_) => {
            serve();
            false
        }
    }
}

fn ask(peer: &mut Peer, line: &str) -> String {
    peer.say(line);
    peer.hear()
}

#[test]
fn a_handle_opens_in_another_process_and_only_there() {
    let machine = Machine::new();
    let ran = on(&machine, "a_handle_opens_in_another_process_and_only_there", |soft, mut peer| {
        let slab = soft.alloc(SLAB);
        soft.write(slab, 7);
        let handle = soft.handle("cuIpcGetMemHandle", slab);
        assert_eq!(soft.open(handle).0, 201);
        let mut inner = Handle([0; 8]);
        assert_eq!(soft.call("cuIpcGetMemHandle", &[&raw mut inner as u64, slab + 256]), 1);

        let opened = ask(&mut peer, &format!("open {}", handle.to_line()));
        assert!(opened.starts_with("0 "), "{opened}");
        assert_eq!(ask(&mut peer, "read 0"), "7");
        ask(&mut peer, "write 8");
        assert_eq!(soft.read(slab), 8);
        // Once more is the same mapping, which goes with the second closing.
        assert_eq!(ask(&mut peer, &format!("open {}", handle.to_line())), opened);
        assert_eq!(ask(&mut peer, "close"), "0");
        assert_eq!(ask(&mut peer, "read 0"), "8");
        assert_eq!(ask(&mut peer, "close"), "0");
        soft.ok("cuMemFree_v2", &[slab]);
        peer.end();
    });
    if ran {
        assert_eq!(machine.violations(), "");
    }
}

#[test]
fn freeing_what_another_process_has_open_is_a_violation_and_so_is_its_handle_afterwards() {
    let machine = Machine::new();
    let test = "freeing_what_another_process_has_open_is_a_violation_and_so_is_its_handle_afterwards";
    let ran = on(&machine, test, |soft, mut peer| {
        let (open, freed) = (soft.alloc(SLAB), soft.alloc(SLAB));
        let handles = [open, freed].map(|slab| soft.handle("cuIpcGetMemHandle", slab).to_line());
        assert!(ask(&mut peer, &format!("open {}", handles[0])).starts_with("0 "));
        soft.ok("cuMemFree_v2", &[freed]);
        assert!(ask(&mut peer, &format!("open {}", handles[1])).starts_with("400 "));
        soft.ok("cuMemFree_v2", &[open]);
        peer.kill();
    });
    if ran {
        let violations = machine.violations();
        assert_eq!(violations.lines().count(), 2, "{violations}");
        assert!(violations.contains("cuIpcOpenMemHandle_v2: the handle is of"), "{violations}");
        assert!(violations.contains("cuMemFree_v2: freed an allocation that processes ["), "{violations}");
    }
}

#[test]
fn memory_that_is_open_outlives_the_process_that_made_it_and_is_counted() {
    let machine = Machine::new().with("SOFTCUDA_LATE_MS", "20").with("SOFTCUDA_MEMORY", "64MiB");
    let test = "memory_that_is_open_outlives_the_process_that_made_it_and_is_counted";
    let ran = on(&machine, test, |soft, mut peer| {
        let before = soft.free_bytes();
        let handle = ask(&mut peer, "slab");
        assert_eq!(before - soft.free_bytes(), SLAB);
        let (code, pointer) = soft.open(Handle::of_line(&handle));
        assert_eq!(code, 0);
        soft.write(pointer, 9);
        peer.kill();
        assert_eq!(soft.read(pointer), 9);
        // Nobody had asked yet when it was killed, so at first all is still taken.
        assert_eq!(before - soft.free_bytes(), SLAB);
        // Then its context comes back, and not what is open here.
        while soft.free_bytes() != before + CONTEXT - SLAB {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        assert_eq!(soft.open(Handle::of_line(&handle)), (0, pointer));
        soft.ok("cuIpcCloseMemHandle", &[pointer]);
        soft.ok("cuIpcCloseMemHandle", &[pointer]);
        assert_eq!(soft.free_bytes(), before + CONTEXT);
        assert_eq!(soft.open(Handle::of_line(&handle)).0, 400);
    });
    if ran {
        assert_eq!(machine.violations(), "");
    }
}

#[test]
fn an_event_of_another_process_is_waited_for() {
    let machine = Machine::new();
    let ran = on(&machine, "an_event_of_another_process_is_waited_for", |soft, mut peer| {
        let (slab, gate, stream) = (soft.alloc(SLAB), soft.pinned(4096), soft.stream());
        let event = soft.gives("cuEventCreate", &[6]);
        poke(gate, 0);
        poke(gate + 8, 42);
        soft.write(slab, 0);
        soft.ok("cuStreamWaitValue64_v2", &[stream, gate, 1, 0]);
        soft.ok("cuMemcpyHtoDAsync_v2", &[slab, gate + 8, 8, stream]);
        soft.ok("cuEventRecord", &[event, stream]);
        ask(&mut peer, &format!("open {}", soft.handle("cuIpcGetMemHandle", slab).to_line()));
        peer.say(&format!("wait {}", soft.handle("cuIpcGetEventHandle", event).to_line()));
        assert_eq!(peer.hear(), "600");
        poke(gate, 1);
        assert_eq!(peer.hear(), "42");
        ask(&mut peer, "close");

        peer.say(&format!("query {}", soft.handle("cuIpcGetEventHandle", event).to_line()));
        peer.hear();
        soft.ok("cuEventDestroy_v2", &[event]);
        peer.say("now");
        peer.hear();
        peer.end();
    });
    if ran {
        let violations = machine.violations();
        assert_eq!(violations.lines().count(), 1, "{violations}");
        assert!(violations.contains("cuEventQuery: the event was destroyed by the process"), "{violations}");
    }
}

#[test]
fn an_exclusive_device_has_one_process_at_a_time() {
    let machine = Machine::new().with("SOFTCUDA_EXCLUSIVE", "1").with("SOFTCUDA_LATE_MS", "0");
    let test = "an_exclusive_device_has_one_process_at_a_time";
    match role().as_deref() {
        None => {
            machine.run(test, "first");
            assert_eq!(machine.violations(), "");
        }
        Some("first") => {
            let soft = Soft::start();
            assert_eq!(soft.gives("cuDeviceGetAttribute", &[20, 0]), 3);
            let mut second = Peer::start(test, "second");
            assert_eq!(second.hear(), "46");
            soft.ok("cuDevicePrimaryCtxRelease_v2", &[0]);
            second.say("again");
            assert_eq!(second.hear(), "0");
            second.end();
        }
        Some(_) => {
            let soft = Soft::load();
            soft.ok("cuInit", &[0]);
            for _ in 0..2 {
                let mut context = 0_u64;
                tell(&soft.call("cuDevicePrimaryCtxRetain", &[&raw mut context as u64, 0]).to_string());
                heard();
            }
        }
    }
}
