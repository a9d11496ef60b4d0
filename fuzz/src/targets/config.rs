//! Configuration files of the daemon.

use std::cell::RefCell;
use std::io::{Seek, Write};

use kvoyant_daemon::config::{Config, Flags};
use tempfile::NamedTempFile;

/// Any text is a configuration or a sentence that says what is wrong, and what is accepted can be used and printed.
///
/// # Panics
/// If it is not so.
pub fn run(bytes: &[u8]) {
    thread_local!(static FILE: RefCell<NamedTempFile> = RefCell::new(NamedTempFile::new().expect("a file")));
    FILE.with_borrow_mut(|file| {
        file.as_file_mut().set_len(0).expect("an empty file");
        file.rewind().expect("its beginning");
        file.write_all(bytes).expect("a file");
        match Config::load(Some(file.path()), Flags::default()) {
            Ok(config) => used(&config),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
}

/// What a start does with it before anything is opened.
fn used(config: &Config) {
    config.check().expect("what was loaded has been checked");
    let printed = serde_json::to_string(config).expect("a configuration can be printed");
    serde_json::from_str::<Config>(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"));
    let arena = config.arena.as_u64();
    assert!(config.pin_ahead.bytes(arena, arena / 2) <= arena);
    assert!((0.0..=50.0).contains(&config.newcomers_percent.percent(&config.socket)));
    let _ = (config.cuda(0), config.spill(), config.shape(), config.access(), config.quotas.of(1000));
    config.monitor_address().expect("a checked address");
}

/// What the packages install, and one with everything that has a form of its own.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let texts = [
        "arena = \"1GiB\"\nlanes = 2\nlane_cpus = [0, 1]\nlog = \"debug\"\n",
        "pin_ahead = 4096\nhuge_pages = \"off\"\nmonitor = \"127.0.0.1:9464\"\nkeep = 2.5\n",
        "spill = [\"/a\", \"/b\"]\nspill_bytes = \"1.5 TB\"\nspill_engine = \"psync\"\nhost_percent = 12.5\n",
        "device = \"cuda:3\"\nexport = \"handle\"\nsignal = \"timeline32\"\nzerocopy = \"off\"\nslab = \"64MiB\"\n",
        "allow_users = [\"root\", 1001]\nallow_groups = [7]\npublishers = [0]\nnewcomers_percent = \"auto\"\n",
        "[quotas]\nhost = \"1GiB\"\nin_flight = 3\n[quotas.user.root]\nhost = \"none\"\n[quotas.user.1000]\ndevice = 0\n",
        "socket = \"/x/y.sock\"\nstore = \"/s\"\nremote = \"s3://bucket/prefix\"\nin_place = true\nshape_gbps = 1e3\n",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}
