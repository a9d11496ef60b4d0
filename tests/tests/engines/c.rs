//! The C library from C and C++ programs, compiled with the compilers at hand against what `scripts/install-c` installs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use kvoyant_client::{Client, Dtype, Hint, Member, Model, ModelSpec, Options, Sequence};
use kvoyant_tests::later::Later;
use kvoyant_tests::{Daemon, PATIENCE};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/c");
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// What a command says, if it ends well.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The folder that the library is installed in, once for all tests.
fn prefix() -> &'static Path {
    static PREFIX: OnceLock<PathBuf> = OnceLock::new();
    PREFIX.get_or_init(|| {
        // Named, so that the library is built and lies beside this program.
        assert_eq!(kvoyant::KVOYANT_ABI, 0);
        let program = std::env::current_exe().expect("this program's path");
        let folder = program.parent().expect("a folder");
        // One for each set of features that was ever built; this program's is not older than any other of the same sources.
        let built = std::fs::read_dir(folder).expect("a folder").flatten().filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libkvoyant-") && name.ends_with(".a")
        });
        let built = built.max_by_key(|entry| entry.metadata().and_then(|file| file.modified()).ok());
        let built = built.unwrap_or_else(|| panic!("libkvoyant is not beside {}", program.display()));
        let prefix = Path::new(env!("CARGO_TARGET_TMPDIR")).join("c");
        let script = Path::new(ROOT).join("scripts/install-c");
        run(Command::new(script).arg(&prefix).arg("--from").arg(built.path()).env_remove("DESTDIR"));
        prefix
    })
}

/// Compiles a program against the installed library, and returns its path.
fn compile(compiler: &str, standard: &str, source: &str, library: &[&str]) -> PathBuf {
    let prefix = prefix();
    let name = Path::new(source).file_name().expect("a file").to_string_lossy();
    let program = prefix.join(format!("{name}-{}", library.len()));
    let lib = prefix.join("lib");
    let mut command = Command::new(compiler);
    command.args([
        standard,
        "-O1",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pedantic",
        "-pthread",
    ]);
    command.arg("-I").arg(prefix.join("include")).arg("-o").arg(&program);
    command.arg(Path::new(SOURCES).join(source)).arg("-L").arg(&lib);
    command.arg(format!("-Wl,-rpath,{}", lib.display())).args(library);
    run(&mut command);
    program
}

const SHARED: &[&str] = &["-lkvoyant"];
const STATIC: &[&str] = &["-l:libkvoyant.a", "-lm", "-ldl", "-lgcc_s"];

/// The twin of `tests/c/toy.h`.
mod toy {
    pub(crate) const LAYERS: usize = 3;
    pub(crate) const QUERY_HEADS: usize = 4;
    pub(crate) const KV_HEADS: usize = 2;
    pub(crate) const HEAD_DIM: usize = 32;
    pub(crate) const SINKS: usize = 4;
    pub(crate) const WINDOW: usize = 16;
    pub(crate) const PROMPT: usize = 300;
    pub(crate) const STEPS: usize = 24;
    pub(crate) const ROOM: usize = 512;

    fn mix(mut x: u32) -> u32 {
        x ^= x >> 16;
        x = x.wrapping_mul(2_246_822_519);
        x ^= x >> 13;
        x = x.wrapping_mul(3_266_489_917);
        x ^ (x >> 16)
    }

    /// Keys (0), values (1) or queries (2) of a token in a layer.
    pub(crate) fn values(count: usize, token: u32, layer: usize, kind: u32) -> Vec<f32> {
        let base = token.wrapping_mul(8191).wrapping_add(layer as u32 * 131).wrapping_add(kind * 17);
        let value = |at| ((mix(base.wrapping_add(mix(at))) & 0xffff).cast_signed() - 32768) as f32 / 32768.0;
        (0..count as u32).map(value).collect()
    }

    pub(crate) fn prompt_token(seed: u32, at: usize) -> u32 {
        mix((seed * 7919).wrapping_add(at as u32)) % 32000
    }
}

fn spec() -> ModelSpec {
    ModelSpec {
        name: "toy".into(),
        fingerprint: "0123456789abcdef0123456789abcdef".into(),
        adapter: String::new(),
        rope: String::new(),
        layers: toy::LAYERS as u32,
        query_heads: toy::QUERY_HEADS as u32,
        kv_heads: toy::KV_HEADS as u32,
        head_dim: toy::HEAD_DIM as u32,
        latent_values: 0,
        dtype: Dtype::F32.code(),
        page_rows: 0,
        sinks: toy::SINKS as u32,
        window: toy::WINDOW as u32,
        dense_layers: 1,
        sliding_layers: Vec::new(),
        methods: vec!["quest:budget=25%".into(), "full".into()],
        slab_bytes: 0,
        graph: None,
        artifacts: Vec::new(),
    }
}

fn write(sequence: &Sequence, layer: usize, position: usize, token: u32) {
    let [keys, values] = [0, 1].map(|kind| toy::values(toy::KV_HEADS * toy::HEAD_DIM, token, layer, kind));
    sequence.write(layer, position, &keys, &values).unwrap();
}

/// One query head's output, in the order of tokens.
fn attend(query: &[f32], rows: &[f32]) -> Vec<f32> {
    let (mut weights, mut out) = (0.0_f32, vec![0.0_f32; toy::HEAD_DIM]);
    for row in rows.chunks_exact(2 * toy::HEAD_DIM) {
        let mut score = 0.0_f32;
        for (query, key) in query.iter().zip(row) {
            score += query * key;
        }
        let weight = 0.01 + score * score;
        weights += weight;
        for (out, value) in out.iter_mut().zip(&row[toy::HEAD_DIM..]) {
            *out += weight * value;
        }
    }
    out.iter().map(|out| out / weights).collect()
}

/// The tokens of one sequence, decoded through the Rust client.
fn decode(model: &Model, seed: u32) -> Vec<u32> {
    let sequence = model.open(0, toy::ROOM).unwrap();
    for layer in 0..toy::LAYERS {
        for at in 0..toy::PROMPT {
            write(&sequence, layer, at, toy::prompt_token(seed, at));
        }
    }
    model.append(&[(&sequence, toy::PROMPT)]).unwrap();
    let mut token = toy::prompt_token(seed, toy::PROMPT);
    (toy::PROMPT..toy::PROMPT + toy::STEPS)
        .map(|position| {
            let mut hash = 2_166_136_261_u32;
            for layer in 0..toy::LAYERS {
                let queries = toy::values(toy::QUERY_HEADS * toy::HEAD_DIM, token, layer, 2);
                write(&sequence, layer, position, token);
                let hint = Hint::Query(&queries);
                let ready = (layer > 0).then(|| {
                    let member = Member { sequence: &sequence, position, hint };
                    model.speculate(layer, &[member]).unwrap().wait(PATIENCE).unwrap()
                });
                for (head, query) in queries.chunks_exact(toy::HEAD_DIM).enumerate() {
                    let kv_head = head / (toy::QUERY_HEADS / toy::KV_HEADS);
                    let mut rows = Vec::new();
                    let local = |tokens: std::ops::Range<usize>, rows: &mut Vec<u8>| {
                        let at = rows.len();
                        rows.resize(at + tokens.len() * 2 * toy::HEAD_DIM * 4, 0);
                        sequence.read_rows(layer, kv_head, tokens, &mut rows[at..]).unwrap();
                    };
                    match &ready {
                        None => local(0..position + 1, &mut rows),
                        Some(ready) => {
                            local(0..toy::SINKS, &mut rows);
                            ready.copy_rows(0, kv_head, &mut rows).unwrap();
                            local(position + 1 - toy::WINDOW..position + 1, &mut rows);
                        }
                    }
                    let rows: Vec<f32> = rows
                        .chunks_exact(4)
                        .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
                        .collect();
                    for out in attend(query, &rows) {
                        hash = (hash ^ out.to_bits()).wrapping_mul(16_777_619);
                    }
                }
            }
            model.append(&[(&sequence, 1)]).unwrap();
            token = hash % 32000;
            token
        })
        .collect()
}

/// What the Rust client gives, as the programs print it.
fn expected(daemon: &Daemon) -> String {
    let model = Client::connect(&daemon.socket(), Options::default()).unwrap().register(spec(), &[]).unwrap();
    let line = |seed| decode(&model, seed).iter().map(u32::to_string).collect::<Vec<_>>().join(" ") + "\n";
    line(0) + &line(1)
}

#[test]
fn rust_c_and_cpp_give_the_same_tokens_on_the_same_input() {
    let store = tempfile::tempdir().unwrap();
    let store = store.path().display().to_string();
    let c = [compile("cc", "-std=c11", "decode.c", SHARED), compile("cc", "-std=c11", "decode.c", STATIC)];
    let cpp = compile("c++", "-std=c++17", "decode.cpp", SHARED);
    for flags in [&["--in-place", "true"][..], &[]] {
        let daemon = Daemon::start(DAEMON, &[flags, &["--store", &store]].concat());
        let wanted = expected(&daemon);
        assert_eq!(wanted.lines().count(), 2);
        for program in &c {
            assert_eq!(run(Command::new(program).arg(daemon.socket()).arg("images")), wanted, "C, {flags:?}");
        }
        assert_eq!(run(Command::new(&cpp).arg(daemon.socket())), wanted, "C++, {flags:?}");
        // A daemon of the next minor serves programs of this one.
        let later = Later::before(&daemon);
        assert_eq!(run(Command::new(&c[0]).arg(later.socket())), wanted, "C and a later minor, {flags:?}");
    }
}

#[test]
fn wrong_use_is_an_error_that_names_the_mistake_and_never_a_crash() {
    let daemon = Daemon::start(DAEMON, &[]);
    let program = compile("cc", "-std=c11", "misuse.c", SHARED);
    let said = run(Command::new(program).arg(daemon.socket()).arg(daemon.pid().to_string()));
    let said: HashMap<&str, &str> = said.lines().filter_map(|line| line.split_once('|')).collect();
    for (what, words) in [
        ("close twice", "HANDLE|the sequence (handle 0x… was closed or released before"),
        ("wait twice", "HANDLE|the request under way"),
        ("read after release", "HANDLE|the answer"),
        ("never opened", "HANDLE|the sequence is all zero: it was never opened, or what opened it failed"),
        ("made up", "is no handle that this library gave out"),
        ("a model for a sequence", "the handle is of a model, and that of a sequence is needed"),
        ("a sequence of a closed model", "by itself or with its model"),
        ("keys too narrow", "SHAPE|keys: the shape is [2, 31], where [2, 32] is needed"),
        ("values flat", "SHAPE|values: the shape is [64], where [2, 32] is needed"),
        ("nine dimensions", "SHAPE|keys: there are 9 dimensions, where an array has 0 to 4"),
        ("more than memory", "does not fit into memory"),
        ("keys of bytes", "DTYPE|keys: the dtype is INT8, where F32, F16 or BF16 is needed"),
        ("keys null", "keys: there is no array, where one is needed"),
        ("data null", "keys: a null pointer"),
        ("data askew", "is not aligned to 4 bytes"),
        ("no such layer", "layer 3 of a model of 3"),
        ("no room", "NO_ROOM|position 100001 is beyond the 320 tokens"),
        ("rows of another type", "DTYPE|rows: the dtype is F16, where F32 is needed"),
        ("rows too wide", "SHAPE|rows: the shape is [1, 65], where [1, 64] is needed"),
        ("too little room", "SHAPE|rows (bytes) has 256 where 512 are needed"),
        (
            "query too narrow",
            "SHAPE|members[0].query: the shape is [2, 32], where [4, 32] or [1, 4, 32] is needed",
        ),
        ("query of halves", "DTYPE|members[0].query: the dtype is F16, where F32 is needed"),
        ("a dense layer", "ARGUMENT|layer 0 is attended whole"),
        ("a member without a query", "ARGUMENT|member 1 has none of what method 0 selects by: a query"),
        ("no query at all", "ARGUMENT|member 0 has none"),
        ("a rest without a query", "ARGUMENT|member 0 has none"),
        ("attention for who learns from none", "ARGUMENT|method 0 learns from no attention rows"),
        ("attention of a dense layer", "ARGUMENT|layer 0 is attended whole"),
        ("no such mark", "SHAPE|a mark has 200 where 4 are needed"),
        ("a mark too late", "SHAPE|the first token that is marked has 0 where 300 are needed"),
        ("append twice at once", "sequence 1 of the call came before"),
        ("another model's sequence", "sequence 0 of the call belongs to another model"),
        ("nowhere to put it", "sequence: a null pointer"),
        ("no socket", "socket is null"),
        ("size not set", "kvoyant_options.size is 3: set it to sizeof(kvoyant_options)"),
        ("a newer header", "the program was built with a newer header"),
        ("nobody there", "is kvoyantd running"),
        ("an unknown method", "clairvoyance"),
        ("an unknown dtype", "spec.dtype is 77"),
        ("two threads, one truncates", "CONCURRENT|the sequence is being changed by another thread"),
        ("two threads, both change", "CONCURRENT|the sequence is being used by another thread"),
        ("two threads, one closes", "CONCURRENT|"),
        (
            "a parent's model in a child",
            "FORKED|the model belongs to the parent of this process: after fork(2)",
        ),
        ("a parent's sequence in a child", "FORKED|"),
    ] {
        let found = said.get(what).unwrap_or_else(|| panic!("{what} was not tried: {said:?}"));
        let named = words.split('…').all(|words| found.contains(words));
        assert!(named, "{what}: {found}, where {words} was expected");
    }
}

#[test]
fn the_shared_library_has_a_name_and_symbols_of_its_interface_and_no_others() {
    let library = prefix().join("lib/libkvoyant.so");
    let symbols =
        run(Command::new("nm").args(["-D", "--defined-only", "--with-symbol-versions"]).arg(&library));
    let mut symbols: Vec<_> = symbols.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    symbols.retain(|symbol| *symbol != "KVOYANT_0");
    symbols.sort_unstable();
    let list = Path::new(ROOT).join("client/c/abi/kvoyant-0.txt");
    let interface = std::fs::read_to_string(list).unwrap();
    let mut functions: Vec<_> = interface
        .lines()
        .filter_map(|line| line.split_once(": ").filter(|(_, item)| item.contains('(')).map(|(name, _)| name))
        .map(|name| format!("{name}@@KVOYANT_0"))
        .collect();
    functions.sort_unstable();
    assert_eq!(symbols, functions);
    let dynamic = run(Command::new("readelf").arg("-d").arg(&library));
    assert!(dynamic.contains("[libkvoyant.so.0]"), "{dynamic}");
    let config = std::fs::read_to_string(prefix().join("lib/pkgconfig/kvoyant.pc")).unwrap();
    assert!(
        config.contains(&format!("Version: {}\n", env!("CARGO_PKG_VERSION"))) && !config.contains('@'),
        "{config}"
    );
}

#[test]
fn the_tutorial_builds_and_runs_as_it_stands_in_its_page() {
    let page = std::fs::read_to_string(Path::new(ROOT).join("docs/c.md")).unwrap();
    let (_, rest) = page.split_once("```c\n").expect("a program in docs/c.md");
    let (program, _) = rest.split_once("\n```").expect("its end");
    let source = prefix().join("tutorial.c");
    std::fs::write(&source, program).unwrap();
    let program = compile("cc", "-std=c11", &source.display().to_string(), SHARED);
    let daemon = Daemon::start(DAEMON, &[]);
    let said = run(Command::new(program).arg(daemon.socket()));
    assert!(
        said.contains("KV head 0: ") && said.contains("KV head 1: ") && said.contains("of 1000 rows"),
        "{said}"
    );
}
