//! Every key of the configuration, in one table: what it is, in which unit, when to change it, and whether that takes a restart. The sample
//! file, the page of the manual, what `--check` prints and what a reload may change all come from here.

/// When a change of a key counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reload {
    /// With the next start.
    Restart,
    /// At once.
    Now,
    /// For sessions that register a model from then on.
    NewSessions,
}

impl Reload {
    /// In words, for tables.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Now => "at once",
            Self::NewSessions => "new sessions",
        }
    }
}

/// A key.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Its name in the file; `KVOYANT_<NAME>` in the environment, and with dashes a flag.
    pub name: &'static str,
    /// What its values are.
    pub unit: &'static str,
    /// The default in words, where it depends on the machine or says more than the value.
    pub default: Option<&'static str>,
    /// What to write instead, as TOML has it, where that says more than the default.
    pub example: Option<&'static str>,
    /// What it is.
    pub help: &'static str,
    /// When to change it.
    pub change: &'static str,
    /// When a change counts.
    pub reload: Reload,
}

/// Keys that belong together.
#[derive(Debug, Clone, Copy)]
pub struct Section {
    /// What they are about.
    pub title: &'static str,
    /// The keys.
    pub keys: &'static [Key],
}

use Reload::{NewSessions, Now, Restart};

const fn key(
    name: &'static str,
    unit: &'static str,
    help: &'static str,
    change: &'static str,
    reload: Reload,
) -> Key {
    Key { name, unit, default: None, example: None, help, change, reload }
}

const fn by_default(default: &'static str, example: &'static str, key: Key) -> Key {
    Key { default: Some(default), example: Some(example), ..key }
}

/// All of them. Tables come last, as TOML wants it.
pub const SECTIONS: &[Section] = &[
    Section {
        title: "Sockets",
        keys: &[
            by_default(
                "/run/kvoyant/kvoyantd.sock; not root: $XDG_RUNTIME_DIR/kvoyant/kvoyantd.sock, else in kvoyant-UID in the temporary folder",
                r#""/run/kvoyant/kvoyantd.sock""#,
                key(
                    "socket",
                    "path",
                    "Control socket that clients connect to.",
                    "several daemons on one machine",
                    Restart,
                ),
            ),
            by_default(
                "admin.sock beside `socket`",
                r#""/run/kvoyant/admin.sock""#,
                key(
                    "admin_socket",
                    "path",
                    "Admin socket: status, metrics, and what operators may change.",
                    "operators and clients are to have different folders",
                    Restart,
                ),
            ),
            by_default(
                "none",
                r#""127.0.0.1:9464""#,
                key(
                    "monitor",
                    "address:port",
                    "Loopback address where metrics, health and `/dashboard` are served over TCP to whoever is on this machine.",
                    "Prometheus, which speaks no Unix sockets, is to read metrics; the unit then needs the network (Monitoring in the manual)",
                    Restart,
                ),
            ),
            by_default(
                "none, only metrics, health and the dashboard are had there",
                "\"/etc/kvoyant/token\"",
                key(
                    "monitor_token",
                    "file",
                    "File (mode 0600) with a token: whoever sends it to `monitor` (`Authorization: Bearer …`) sees and does there what the daemon's \
                     user may.",
                    "a tool that speaks no Unix sockets is to have the whole admin interface",
                    Restart,
                ),
            ),
            by_default(
                "none",
                r#""http://127.0.0.1:4318""#,
                key(
                    "otlp",
                    "http:// URL",
                    "OpenTelemetry collector that metrics are sent to every half minute, by OTLP over HTTP with JSON.",
                    "metrics are collected by OpenTelemetry; the unit then needs the network",
                    Restart,
                ),
            ),
            key(
                "stats_page",
                "bool",
                "Whether the status is also in shared memory, written twice a second, where `kvoyant top` reads it without asking the daemon.",
                "nothing of the daemon's may be in /dev/shm",
                Restart,
            ),
        ],
    },
    Section {
        title: "Host memory",
        keys: &[
            key(
                "arena",
                "bytes",
                "Host memory for KV, all sessions together, in extents of 64 MiB.",
                "first of all: as much as the machine can spare",
                Restart,
            ),
            key(
                "pin",
                "bool",
                "Whether to lock the arena into memory as far as the memlock limit allows.",
                "the limit cannot be raised and the warning disturbs",
                Restart,
            ),
            key(
                "pin_ahead",
                "\"auto\", \"all\" or bytes",
                "How much of the arena is made and pinned before anybody asks; auto: what the device asks for.",
                "the first requests of sessions wait for memory",
                Restart,
            ),
            by_default(
                "a quarter of the cores, 1 to 8",
                "4",
                key(
                    "pin_threads",
                    "threads",
                    "Threads that make and pin memory.",
                    "making the arena takes too long, or too many cores",
                    Restart,
                ),
            ),
            key(
                "huge_pages",
                "\"auto\", \"off\" or \"require\"",
                "Whether the arena is made of huge pages of 2 MiB; auto: if any are set aside.",
                "huge pages are set aside for somebody else, or must be used",
                Restart,
            ),
        ],
    },
    Section {
        title: "Device",
        keys: &[
            key(
                "device",
                "\"host\" or \"cuda:N\"",
                "Device that attention runs on.",
                "the node has a GPU; the unit then needs kvoyantd-cuda.conf",
                Restart,
            ),
            by_default(
                "0: four fifths of what is free at the start",
                r#""0B""#,
                key(
                    "device_memory",
                    "bytes",
                    "Device memory of all sessions together, on a GPU.",
                    "engines on the same GPU need more, or less",
                    Restart,
                ),
            ),
            key(
                "export",
                "\"auto\", \"descriptor\" or \"handle\"",
                "How a GPU's memory goes to clients; auto: descriptors where the device has them.",
                "clients cannot open what they get",
                Restart,
            ),
            key(
                "signal",
                "\"auto\", \"timeline64\", \"timeline32\" or \"events\"",
                "What clients' streams wait for on a GPU; auto: the first that the device has.",
                "the driver has a defect in one of them",
                Restart,
            ),
            key(
                "zerocopy",
                "\"auto\", \"on\" or \"off\"",
                "Whether the daemon may run its gather kernel on the GPU; auto: under MPS only.",
                "`kvoyant calibrate` shows that it pays",
                Restart,
            ),
            by_default(
                "$STATE_DIRECTORY, /var/lib/kvoyant for root, else $XDG_STATE_HOME/kvoyant or ~/.local/state/kvoyant",
                r#""/var/lib/kvoyant""#,
                key(
                    "state",
                    "folder",
                    "Folder of what is kept between starts: calibrations, compiled kernels.",
                    "it is to lie elsewhere",
                    Restart,
                ),
            ),
            key(
                "device_percent",
                "percent",
                "How much of a sequence's rows a head may keep on the device, beside those that are selected, which always have room.",
                "slabs hold too few sequences: lower; many selected rows are copied again and again: higher",
                NewSessions,
            ),
            key(
                "keep",
                "factor",
                "How many times as many rows as are selected a head keeps on the device.",
                "few selected rows are there already (hits) and the slab has room",
                NewSessions,
            ),
            key(
                "slab",
                "bytes",
                "Slab of one session, in slab mode, unless its client asks for less; on a GPU, unless it asks for something else.",
                "`kvoyant top` says that the slab limits",
                NewSessions,
            ),
            key(
                "in_place",
                "bool",
                "Whether the host device answers with runs in the session's own memory instead of copying into a slab.",
                "attention runs on this machine's processor",
                Restart,
            ),
            key(
                "copy_threads",
                "threads",
                "Threads that copy into slabs.",
                "transfers take most of the time and cores are idle",
                Restart,
            ),
            by_default(
                "0: as fast as memory",
                "0.0",
                key(
                    "shape_gbps",
                    "GB/s",
                    "Bandwidth of a simulated link, at least 0.001.",
                    "trying what a slower link would do",
                    Restart,
                ),
            ),
            key(
                "shape_latency_us",
                "µs",
                "Latency of a simulated link, at most an hour.",
                "trying what a slower link would do",
                Restart,
            ),
        ],
    },
    Section {
        title: "Pages on disk",
        keys: &[
            by_default(
                "none, all pages stay",
                r#"["/var/lib/kvoyant/spill"]"#,
                key(
                    "spill",
                    "list of paths",
                    "Where pages go that leave host memory, striped: folders (a file is made there), files, or raw block devices, each on a \
                     disk of its own.",
                    "contexts are larger than the arena; outside /var/lib/kvoyant the unit needs ReadWritePaths= or DeviceAllow=",
                    Restart,
                ),
            ),
            key(
                "spill_bytes",
                "bytes",
                "Bytes set aside in each of them, rounded down to 16 MiB; 0: all of a block device.",
                "sessions are told that the arena is full while the disk has room",
                Restart,
            ),
            key(
                "spill_engine",
                "\"auto\", \"uring\" or \"psync\"",
                "How they are read and written: io_uring, or threads; auto: io_uring if the system has it.",
                "io_uring is forbidden and the warning disturbs",
                Restart,
            ),
            key(
                "host_percent",
                "percent",
                "How much of a session's KV may be in host memory at a time where there is `spill`; what needs more at once gets it. At 100 pages \
                 leave when the arena is full.",
                "further sessions are to find room: lower; much is read back: higher",
                NewSessions,
            ),
        ],
    },
    Section {
        title: "Images and prefixes",
        keys: &[
            by_default(
                "none are kept",
                r#""/var/lib/kvoyant/images""#,
                key(
                    "store",
                    "folder",
                    "Folder of images: suspended sequences and published prefixes, which outlive the daemon. One daemon's alone, on a disk that \
                     is as private as the texts in it.",
                    "sequences are to be suspended, or prefixes to be kept",
                    Restart,
                ),
            ),
            by_default(
                "none",
                r#""s3://bucket/prefix""#,
                key(
                    "remote",
                    "URL",
                    "A store behind it, to which images are copied: s3://bucket/prefix (with AWS_* variables), \
                     redis://user:password@host:port/db?prefix=name, file:///folder.",
                    "other machines are to resume them; the unit then needs kvoyantd-remote.conf, whose environment file is the place for \
                     passwords",
                    Restart,
                ),
            ),
            by_default(
                "0: an eighth of the arena",
                r#""0B""#,
                key(
                    "prefixes",
                    "bytes",
                    "Host memory for published prefixes, out of the arena.",
                    "prefixes go before they are used again, or take what sessions need",
                    Restart,
                ),
            ),
            by_default(
                "none",
                "[990]",
                key(
                    "publishers",
                    "list of user ids",
                    "Users whose prefixes may be for everybody, beside root and the daemon's own: their rows are believed.",
                    "a trusted service fills the cache for all",
                    Now,
                ),
            ),
        ],
    },
    Section {
        title: "Lanes",
        keys: &[
            by_default(
                "an eighth of the cores, at least 1",
                "4",
                key(
                    "lanes",
                    "threads",
                    "Threads that select and plan.",
                    "answers queue (`queue` in kvoyant_request_time_seconds)",
                    Restart,
                ),
            ),
            by_default(
                "none, not pinned",
                "[2, 3, 4, 5]",
                key(
                    "lane_cpus",
                    "list of cores",
                    "Cores that lanes are pinned to, one each.",
                    "lanes share cores with engines",
                    Restart,
                ),
            ),
            by_default(
                "200, or 20 on fewer than 8 cores",
                "200",
                key(
                    "spin_us",
                    "µs",
                    "How long an idle lane polls before it sleeps.",
                    "a lane has a core of its own: higher; cores are scarce: lower",
                    Restart,
                ),
            ),
            key(
                "check_every",
                "answers",
                "One answer in so many is compared with exact attention, for metrics; 0: none.",
                "precision and recall are to be known sooner: lower",
                NewSessions,
            ),
        ],
    },
    Section {
        title: "Log",
        keys: &[
            key(
                "log",
                "filter",
                "What is logged, as `tracing` takes it: error, warn, info, debug, or per module: kvoyant_daemon::control=debug.",
                "looking for something",
                Now,
            ),
            key(
                "log_format",
                "\"auto\", \"text\" or \"json\"",
                "How lines are written; auto: text, which in the journal has priorities and leaves out the time.",
                "a collector wants JSON",
                Restart,
            ),
        ],
    },
    Section {
        title: "Restarts",
        keys: &[
            by_default(
                "auto",
                r#""auto""#,
                key(
                    "keep_sessions",
                    "\"auto\", \"on\" or \"off\"",
                    "Whether open sessions outlast the daemon; auto: where the service manager says that it stores descriptors, as systemd does \
                     since 254. Not on a GPU.",
                    "an older systemd stores them, or for `kvoyantd --takeover`: on",
                    Restart,
                ),
            ),
            key(
                "reattach_seconds",
                "s",
                "How long the next daemon waits for a session's client.",
                "engines take longer to find that the daemon is another one",
                Restart,
            ),
        ],
    },
    Section {
        title: "Users",
        keys: &[
            key("max_sessions", "sessions", "Sessions open at once.", "engines are refused for it", Now),
            by_default(
                "none, whoever the sockets' permissions let in",
                r#"["root", 1002]"#,
                key(
                    "allow_users",
                    "list of users",
                    "Users who may connect, by name or number, beside root and the daemon's own.",
                    "not all of the sockets' group are to connect",
                    Now,
                ),
            ),
            by_default(
                "none",
                r#"["root"]"#,
                key(
                    "allow_groups",
                    "list of groups",
                    "Groups whose members may connect, by name or number.",
                    "as `allow_users`",
                    Now,
                ),
            ),
            key(
                "newcomers_percent",
                "percent or \"auto\"",
                "How much of host memory, tables, device memory, disk and sessions users who have more than an equal share of them leave free for \
                 others; auto: 10 where others than the daemon's user may enter the folder of its socket, else 0.",
                "one user is to have everything (0), or newcomers wait (more)",
                Now,
            ),
            by_default(
                "no limits",
                r#"{ host = "64GiB", sessions = 16, user = { root = { host = "none" } } }"#,
                key(
                    "quotas",
                    "table",
                    "What a user may have, all their sessions together: sessions, sequences, in_flight (requests under way); in bytes host, \
                     tables, rings, device, spill. [quotas.user.NAME] is what some have instead. Whoever has more than a new quota keeps it.",
                    "users take from each other",
                    Now,
                ),
            ),
        ],
    },
];

/// All keys, in the order of the table.
pub fn all() -> impl Iterator<Item = &'static Key> {
    SECTIONS.iter().flat_map(|section| section.keys)
}

/// A key, by its name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Key> {
    all().find(|key| key.name == name)
}

/// The name that somebody may have meant who wrote another one.
#[must_use]
pub fn nearest<'a>(written: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let written = written.to_ascii_lowercase().replace('-', "_");
    let distance = |name: &&str| strsim::damerau_levenshtein(&written, name);
    // A third of the letters may be wrong; and what begins alike may be cut short.
    let near = |name: &&str| {
        distance(name) * 3 <= name.len().max(3) || written.len() >= 4 && name.starts_with(&*written)
    };
    known.into_iter().filter(near).min_by_key(distance)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Flags};

    fn names(value: &serde_json::Value) -> Vec<String> {
        value.as_object().unwrap().keys().cloned().collect()
    }

    #[test]
    fn every_key_is_in_the_table_once_and_nothing_else_is() {
        let mut fields = names(&serde_json::to_value(Config::default()).unwrap());
        let mut keys: Vec<_> = all().map(|key| key.name.to_owned()).collect();
        fields.sort();
        keys.sort();
        assert_eq!(keys, fields);
    }

    #[test]
    fn every_key_but_tables_is_a_flag() {
        use clap::Args;
        let command = Flags::augment_args(clap::Command::new("x"));
        let mut flags: Vec<_> =
            command.get_arguments().filter_map(|flag| flag.get_long()).map(str::to_owned).collect();
        let mut keys: Vec<_> =
            all().filter(|key| key.unit != "table").map(|key| key.name.replace('_', "-")).collect();
        flags.sort();
        keys.sort();
        assert_eq!(keys, flags);
    }

    #[test]
    fn what_was_meant_is_found_and_nothing_is_guessed_without_reason() {
        let guess = |written| nearest(written, all().map(|key| key.name));
        for (written, meant) in [
            ("areena", "arena"),
            ("lane", "lanes"),
            ("spill-bytes", "spill_bytes"),
            ("newcomers", "newcomers_percent"),
            ("Pin", "pin"),
        ] {
            assert_eq!(guess(written), Some(meant), "{written}");
        }
        for written in ["", "x", "bandwidth", "zzzz"] {
            assert_eq!(guess(written), None, "{written}");
        }
    }
}
