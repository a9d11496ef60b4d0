//! Kernels from source to launch, and streams that capture what they are given.

mod soft;

use kvoyant_kernels::cuda::params::{GatherParams, GatherRun};
use kvoyant_kernels::cuda::{Source, source};
use soft::{Machine, Soft, poke, role, set_faults};

/// Runs a body in a child; there may be no violations but these.
fn alone(test: &str, violations: &str, body: impl FnOnce(&Soft)) {
    if role().is_some() {
        body(&Soft::start());
        return;
    }
    let machine = Machine::new();
    machine.run(test, "alone");
    let found = machine.violations();
    assert!(if violations.is_empty() { found.is_empty() } else { found.contains(violations) }, "{found}");
}

/// Compiles a text: the compiler's code, and the image or the log.
fn compile(soft: &Soft, text: &str) -> (u32, Vec<u8>) {
    let text = std::ffi::CString::new(text).unwrap();
    let program = soft.gives("nvrtcCreateProgram", &[text.as_ptr() as u64, c"a.cu".as_ptr() as u64, 0, 0, 0]);
    let options = [c"--gpu-architecture=sm_90".as_ptr()];
    let code = soft.call("nvrtcCompileProgram", &[program, 1, options.as_ptr() as u64]);
    let what = if code == 0 {
        ["nvrtcGetCUBINSize", "nvrtcGetCUBIN"]
    } else {
        ["nvrtcGetProgramLogSize", "nvrtcGetProgramLog"]
    };
    let mut bytes = 0_u64;
    soft.ok(what[0], &[program, &raw mut bytes as u64]);
    let mut result = vec![0_u8; bytes as usize];
    soft.ok(what[1], &[program, result.as_mut_ptr() as u64]);
    soft.ok("nvrtcDestroyProgram", &[&raw const program as u64]);
    (code, result)
}

/// A kernel of a source.
fn function(soft: &Soft, source: &Source, name: &std::ffi::CStr) -> u64 {
    let (code, image) = compile(soft, &source.compile_text());
    assert_eq!(code, 0);
    let module = soft.gives("cuModuleLoadData", &[image.as_ptr() as u64]);
    soft.gives("cuModuleGetFunction", &[module, name.as_ptr() as u64])
}

/// Puts the gathering of 64 bytes from `from` to `to` on a stream; the run lies at `runs`.
fn gather(soft: &Soft, function: u64, runs: u64, stream: u64) -> u32 {
    let params = GatherParams { runs, count: 1, pad: 0 };
    let shape = params.launch(64);
    let list = [&raw const params as u64];
    let (grid, block) = (<[u32; 3]>::from(shape.grid), <[u32; 3]>::from(shape.block));
    let sides: Vec<u64> = grid.iter().chain(&block).map(|side| u64::from(*side)).collect();
    let mut given = vec![function];
    given.extend(sides);
    given.extend([u64::from(shape.shared_bytes), stream, list.as_ptr() as u64, 0]);
    soft.call("cuLaunchKernel", &given)
}

/// Writes the run of a gathering to a device's memory.
fn put_run(soft: &Soft, at: u64, from: u64, to: u64) {
    let run = GatherRun { src: from, dst: to, bytes: 64 };
    soft.ok("cuMemcpyHtoD_v2", &[at, &raw const run as u64, size_of::<GatherRun>() as u64]);
}

/// Whether a stream captures, as the driver counts.
fn capturing(soft: &Soft, stream: u64) -> u32 {
    let mut status = 9_u32;
    soft.ok("cuStreamIsCapturing", &[stream, &raw mut status as u64]);
    status
}

#[test]
fn a_kernel_is_compiled_loaded_and_run_in_the_order_of_its_stream() {
    alone("a_kernel_is_compiled_loaded_and_run_in_the_order_of_its_stream", "", |soft| {
        let gather_runs = function(soft, source("gather").unwrap(), c"gather_runs");
        let (runs, to, host, stream) = (soft.alloc(4096), soft.alloc(4096), soft.pinned(4096), soft.stream());
        put_run(soft, runs, host + 64, to);
        poke(host, 0);
        poke(host + 64, 1);
        soft.ok("cuStreamWaitValue64_v2", &[stream, host, 1, 0]);
        assert_eq!(gather(soft, gather_runs, runs, stream), 0);
        assert_eq!(soft.call("cuStreamQuery", &[stream]), 600);
        poke(host + 64, 2);
        poke(host, 1);
        soft.ok("cuStreamSynchronize", &[stream]);
        assert_eq!(soft.read(to), 2);
    });
}

#[test]
fn what_the_compiler_and_the_loader_do_not_know_they_refuse() {
    alone("what_the_compiler_and_the_loader_do_not_know_they_refuse", "", |soft| {
        let (code, log) = compile(soft, "__global__ void other() {}");
        assert_eq!(code, 6);
        assert!(String::from_utf8_lossy(&log).contains("the project's own sources only"));
        let known = source("gather").unwrap().compile_text();
        assert_eq!(compile(soft, &known.replacen("__global__", "/**/__global__", 1)).0, 6);

        let mut module = 0_u64;
        let (to, junk) = (&raw mut module as u64, [7_u8; 128]);
        assert_eq!(soft.call("cuModuleLoadData", &[to, junk.as_ptr() as u64]), 200);
        let image = compile(soft, &known).1;
        let mut other = image.clone();
        other[20 + "kvoyant-source:".len()] ^= 1;
        assert_eq!(soft.call("cuModuleLoadData", &[to, other.as_ptr() as u64]), 209);
        soft.ok("cuModuleLoadData", &[to, image.as_ptr() as u64]);
        let mut function = 0_u64;
        let missing = c"no_such_kernel".as_ptr() as u64;
        assert_eq!(soft.call("cuModuleGetFunction", &[&raw mut function as u64, module, missing]), 500);
    });
}

#[test]
fn a_captured_graph_does_its_work_at_each_launch_with_what_lies_there_then() {
    alone("a_captured_graph_does_its_work_at_each_launch_with_what_lies_there_then", "", |soft| {
        let gather_runs = function(soft, source("gather").unwrap(), c"gather_runs");
        let (runs, to, host, stream) = (soft.alloc(4096), soft.alloc(4096), soft.pinned(4096), soft.stream());
        put_run(soft, runs, host + 64, to);
        soft.write(to, 0);
        soft.write(to + 128, 0);
        soft.ok("cuStreamBeginCapture_v2", &[stream, 1]);
        soft.ok("cuMemcpyHtoDAsync_v2", &[to + 128, host + 128, 8, stream]);
        assert_eq!(gather(soft, gather_runs, runs, stream), 0);
        soft.ok("cuStreamWriteValue64_v2", &[stream, host + 256, 5, 0]);
        assert_eq!(capturing(soft, stream), 1);
        let mut graph = 0_u64;
        soft.ok("cuStreamEndCapture", &[stream, &raw mut graph as u64]);
        assert_eq!((soft.read(to), soft.read(to + 128)), (0, 0));

        let exec = soft.gives("cuGraphInstantiateWithFlags", &[graph, 0]);
        soft.ok("cuGraphDestroy", &[graph]);
        for round in 1..4 {
            poke(host + 64, round);
            poke(host + 128, 10 * round);
            poke(host + 256, 0);
            soft.ok("cuGraphLaunch", &[exec, stream]);
            soft.ok("cuStreamWaitValue64_v2", &[stream, host + 256, 5, 1]);
            soft.ok("cuStreamSynchronize", &[stream]);
            assert_eq!((soft.read(to), soft.read(to + 128)), (round, 10 * round));
        }
        soft.ok("cuGraphExecDestroy", &[exec]);
    });
}

#[test]
fn a_call_that_waits_spoils_a_capture() {
    alone("a_call_that_waits_spoils_a_capture", "", |soft| {
        let (device, stream) = (soft.alloc(4096), soft.stream());
        let mut graph = 0_u64;
        soft.ok("cuStreamBeginCapture_v2", &[stream, 1]);
        soft.ok("cuMemsetD8Async", &[device, 1, 8, stream]);
        assert_eq!(soft.call("cuStreamSynchronize", &[stream]), 900);
        assert_eq!(soft.call("cuMemsetD8Async", &[device, 1, 8, stream]), 901);
        assert_eq!(soft.call("cuStreamEndCapture", &[stream, &raw mut graph as u64]), 901);

        soft.ok("cuStreamBeginCapture_v2", &[stream, 1]);
        let mut more = 0_u64;
        assert_eq!(soft.call("cuMemAlloc_v2", &[&raw mut more as u64, 4096]), 900);
        assert_eq!(soft.call("cuStreamEndCapture", &[stream, &raw mut graph as u64]), 901);
        soft.ok("cuMemsetD8Async", &[device, 1, 8, stream]);
        soft.ok("cuStreamSynchronize", &[stream]);
    });
}

#[test]
fn a_graph_is_checked_again_when_it_is_launched() {
    alone("a_graph_is_checked_again_when_it_is_launched", "cuGraphLaunch: use after free", |soft| {
        let (device, stream) = (soft.alloc(4096), soft.stream());
        soft.ok("cuStreamBeginCapture_v2", &[stream, 2]);
        soft.ok("cuMemsetD8Async", &[device, 1, 8, stream]);
        let mut graph = 0_u64;
        soft.ok("cuStreamEndCapture", &[stream, &raw mut graph as u64]);
        let exec = soft.gives("cuGraphInstantiateWithFlags", &[graph, 0]);
        soft.ok("cuGraphDestroy", &[graph]);
        soft.ok("cuGraphLaunch", &[exec, stream]);
        soft.ok("cuMemFree_v2", &[device]);
        assert_eq!(soft.call("cuGraphLaunch", &[exec, stream]), 1);
    });
}

#[test]
fn a_kernel_that_fails_ends_the_context() {
    alone("a_kernel_that_fails_ends_the_context", "", |soft| {
        let gather_runs = function(soft, source("gather").unwrap(), c"gather_runs");
        let (runs, to, stream) = (soft.alloc(4096), soft.alloc(4096), soft.stream());
        put_run(soft, runs, to + 128, to);
        set_faults("launch-failure after=1");
        assert_eq!(gather(soft, gather_runs, runs, stream), 0);
        soft.ok("cuStreamSynchronize", &[stream]);
        assert_eq!(gather(soft, gather_runs, runs, stream), 0);
        assert_eq!(soft.call("cuStreamSynchronize", &[stream]), 719);
        set_faults("");
        assert_eq!(soft.call("cuMemFree_v2", &[to]), 719);
    });
}

#[test]
fn a_kernel_that_reads_where_nothing_is_ends_the_context_and_not_the_process() {
    let test = "a_kernel_that_reads_where_nothing_is_ends_the_context_and_not_the_process";
    alone(test, "cuLaunchKernel: kernel gather_runs touched 0x", |soft| {
        let gather_runs = function(soft, source("gather").unwrap(), c"gather_runs");
        let (runs, to, freed, stream) = (soft.alloc(4096), soft.alloc(4096), soft.alloc(4096), soft.stream());
        put_run(soft, runs, freed, to);
        soft.ok("cuMemFree_v2", &[freed]);
        assert_eq!(gather(soft, gather_runs, runs, stream), 0);
        assert_eq!(soft.call("cuStreamSynchronize", &[stream]), 700);
        assert_eq!(soft.call("cuStreamQuery", &[stream]), 700);
    });
}
