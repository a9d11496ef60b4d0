//! How much memory this process may have: its control groups, and the machine.
//!
//! A memory limit is not an error that comes back: whoever touches a page beyond it is killed. So the arena is held
//! against the limits before anything is made, and the pool looks again before each extent.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Of what may be had, the share that an arena may take, in percent; the rest is for tables, digests, rings and the
/// programs beside.
const SHARE_PERCENT: u64 = 95;

/// A limit from here on is none (version 1 says "no limit" with a number near 2^63).
const NO_LIMIT: u64 = 1 << 60;

/// The tightest limit, and what it leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// Which limit it is, as a sentence names it.
    pub limit: String,
    /// Its value in bytes.
    pub limit_bytes: u64,
    /// Bytes that may still be had; what the kernel would drop by itself counts as free.
    pub free_bytes: u64,
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is {}, and {} of it can be had",
            self.limit,
            gib(self.limit_bytes),
            gib(self.free_bytes)
        )
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

/// An arena that would not fit.
#[derive(Debug, Error)]
#[error(
    "an arena of {} does not fit: {room}, of which {SHARE_PERCENT} % may be taken; lower the arena size (--arena) to \
     {} or less, or raise the limit", gib(*arena_bytes), gib(*most_bytes)
)]
pub struct TooLarge {
    /// Bytes of the arena.
    pub arena_bytes: u64,
    /// Bytes that it could have.
    pub most_bytes: u64,
    /// The limit that it meets.
    pub room: Room,
}

/// Where limits are read.
#[derive(Debug, Clone)]
pub struct Limits {
    proc: PathBuf,
    cgroup: PathBuf,
}

impl Default for Limits {
    fn default() -> Self {
        Self::at(Path::new("/proc"), Path::new("/sys/fs/cgroup"))
    }
}

impl Limits {
    /// Reads them from these folders instead of `/proc` and `/sys/fs/cgroup`.
    #[must_use]
    pub fn at(proc: &Path, cgroup: &Path) -> Self {
        Self { proc: proc.to_path_buf(), cgroup: cgroup.to_path_buf() }
    }

    /// The limit that leaves least; `None` if none can be read.
    #[must_use]
    pub fn room(&self) -> Option<Room> {
        let groups = fs::read_to_string(self.proc.join("self/cgroup")).unwrap_or_default();
        let mut rooms: Vec<Room> = self.machine().into_iter().collect();
        for line in groups.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
            if controllers.is_empty() {
                rooms.extend(climb(&self.cgroup, path).flat_map(|folder| version_2(&folder)));
            } else if controllers.split(',').any(|controller| controller == "memory") {
                rooms
                    .extend(climb(&self.cgroup.join("memory"), path).filter_map(|folder| version_1(&folder)));
            }
        }
        rooms.into_iter().min_by_key(|room| room.free_bytes)
    }

    fn machine(&self) -> Option<Room> {
        let text = fs::read_to_string(self.proc.join("meminfo")).ok()?;
        let kib = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line?.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
        };
        let (limit_bytes, free_bytes) = (kib("MemTotal")?, kib("MemAvailable")?);
        Some(Room { limit: "the machine's memory (MemAvailable)".into(), limit_bytes, free_bytes })
    }

    /// Whether an arena fits, of which `elsewhere_bytes` lie in memory that no limit counts (huge pages that are set
    /// aside). Where no limit can be read, everything fits.
    pub fn check(&self, arena_bytes: u64, elsewhere_bytes: u64) -> Result<(), TooLarge> {
        let Some(room) = self.room() else { return Ok(()) };
        let most = room.free_bytes / 100 * SHARE_PERCENT;
        if arena_bytes.saturating_sub(elsewhere_bytes) <= most {
            return Ok(());
        }
        Err(TooLarge { arena_bytes, most_bytes: most + elsewhere_bytes, room })
    }
}

/// A group's folder and those above it, up to the mount's. A group outside this namespace (`/../x`) has no folder
/// here, and neither has one that is mounted as the root: then the mount's own is the one that counts.
fn climb(mount: &Path, group: &str) -> impl Iterator<Item = PathBuf> {
    let inside: PathBuf = Path::new(group)
        .components()
        .filter_map(|part| match part {
            std::path::Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let folders: Vec<_> = inside.ancestors().map(|above| mount.join(above)).collect();
    folders.into_iter()
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Bytes of the page cache that a group could drop at once.
fn droppable(folder: &Path, prefix: &str) -> u64 {
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let value = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        matches!(name.strip_prefix(prefix)?, "active_file" | "inactive_file")
            .then(|| value.trim().parse().ok())?
    };
    stat.lines().filter_map(value).fold(0, u64::saturating_add)
}

fn version_2(folder: &Path) -> Vec<Room> {
    let used = number(&folder.join("memory.current")).unwrap_or(0).saturating_sub(droppable(folder, ""));
    // Beyond `high` a process is not killed but slowed down until it might as well be.
    let limits = ["memory.max", "memory.high"].map(|name| folder.join(name));
    let room = |path: PathBuf| Some(room_under(&path, number(&path)?, used));
    limits.into_iter().filter_map(room).collect()
}

fn version_1(folder: &Path) -> Option<Room> {
    let path = folder.join("memory.limit_in_bytes");
    let limit = number(&path).filter(|limit| *limit < NO_LIMIT)?;
    let used = number(&folder.join("memory.usage_in_bytes"))
        .unwrap_or(0)
        .saturating_sub(droppable(folder, "total_"));
    Some(room_under(&path, limit, used))
}

fn room_under(path: &Path, limit_bytes: u64, used: u64) -> Room {
    Room { limit: path.display().to_string(), limit_bytes, free_bytes: limit_bytes.saturating_sub(used) }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new(files: &[(&str, &str)]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            for (path, text) in files {
                let path = folder.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Self(folder)
        }

        fn limits(&self) -> Limits {
            Limits::at(&self.0.path().join("proc"), &self.0.path().join("cgroup"))
        }
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n");

    #[test]
    fn the_tightest_limit_on_the_way_up_counts_and_is_named() {
        let machine = Machine::new(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/user.slice/kvoyant.service\n"),
            ("cgroup/user.slice/kvoyant.service/memory.max", "max\n"),
            ("cgroup/user.slice/kvoyant.service/memory.high", "max\n"),
            ("cgroup/user.slice/memory.max", "4294967296\n"),
            ("cgroup/user.slice/memory.current", "1610612736\n"),
            ("cgroup/user.slice/memory.stat", "anon 5\nactive_file 1\ninactive_file 536870911\nshmem 9\n"),
        ]);
        let room = machine.limits().room().unwrap();
        assert!(room.limit.ends_with("user.slice/memory.max"), "{room}");
        assert_eq!((room.limit_bytes, room.free_bytes), (4 << 30, 3 << 30), "the page cache can be dropped");
        machine.limits().check(2 << 30, 0).unwrap();
        let error = machine.limits().check(3 << 30, 0).unwrap_err().to_string();
        for part in ["an arena of 3.00 GiB", "memory.max is 4.00 GiB", "3.00 GiB of it", "--arena"] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
        machine.limits().check(3 << 30, 1 << 30).unwrap();
    }

    #[test]
    fn version_1_groups_count_too_unless_they_have_no_limit() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n"),
            ("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("cgroup/memory/docker/abc/memory.limit_in_bytes", "1073741824\n"),
            ("cgroup/memory/docker/abc/memory.usage_in_bytes", "1073741824\n"),
            ("cgroup/memory/docker/abc/memory.stat", "inactive_file 1\ntotal_inactive_file 536870912\n"),
        ];
        let room = Machine::new(&files).limits().room().unwrap();
        assert_eq!((room.limit_bytes, room.free_bytes), (1 << 30, 512 << 20));
        let room = Machine::new(&files[..3]).limits().room().unwrap();
        assert_eq!((room.limit_bytes, room.free_bytes), (16 << 30, 8 << 30), "the machine is what is left");
    }

    #[test]
    fn a_group_outside_the_namespace_and_files_that_make_no_sense_are_passed_over() {
        let machine = Machine::new(&[
            ("proc/self/cgroup", "0::/../../elsewhere\nnonsense\n7\n"),
            ("cgroup/memory.max", "2147483648\n"),
            ("cgroup/memory.current", "not a number\n"),
            ("cgroup/elsewhere/memory.max", "-5\n"),
        ]);
        assert_eq!(machine.limits().room().unwrap().free_bytes, 2 << 30);
        let nothing = Machine::new(&[]);
        assert_eq!(nothing.limits().room(), None);
        nothing.limits().check(u64::MAX, 0).unwrap();
    }
}
