//! What every device needs of the host: memory and the right to keep it, descriptors, huge pages.

use std::fs;
use std::path::Path;
use std::time::Duration;

use kvoyant_daemon::config::Config;
use kvoyant_daemon::server::{check_room, open_files};
use kvoyant_daemon::tiers::cgroup::Limits;
use kvoyant_protocol::futex::{Bell, wait_any};
use kvoyant_protocol::memory::{Memfd, Seals};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::check::{Level, Report};
use super::gpu::gib;

/// `CAP_IPC_LOCK` in `/proc/self/status`.
const CAP_IPC_LOCK: u32 = 14;

/// All checks of this room.
pub(crate) fn examine(report: &mut Report, config: &Config) {
    report.pass(
        "processor",
        kvoyant_kernels::Kernels::from_env()
            .map_or_else(|error| error.to_string(), |kernels| kernels.path().to_string()),
    );
    memory_files(report);
    sleeping(report);
    memory(report, config);
    locked_memory(report, config);
    descriptors(report, config);
    huge_pages(report, config);
}

/// Memory files that can be sealed: what sessions and extents are made of.
fn memory_files(report: &mut Report) {
    let tried = Memfd::create("kvoyant-doctor", 1 << 20)
        .and_then(|file| file.seal(Seals::fixed_size()).and_then(|()| file.map(true)));
    match tried {
        Ok(_) => report.pass("memfd", "memory files can be made, sealed and mapped"),
        Err(error) => report.add(
            "memfd",
            Level::Fail,
            format!("memory files do not work here: {error}"),
            Some("allow memfd_create and its seals in the container's seccomp profile".into()),
        ),
    }
}

/// Sleeping on all rings of a lane at once.
fn sleeping(report: &mut Report) {
    match wait_any((&Bell::default(), 0), &[], Duration::ZERO) {
        Ok(()) => report.pass("futex-waitv", "lanes can sleep on all of their rings"),
        Err(error) => report.warn(
            "futex-waitv",
            format!("lanes cannot sleep on their rings ({error}): they look at them every 0.1 to 1.6 ms, and take processor time for it"),
            "allow futex_waitv in the container's seccomp profile (a newer container runtime does), or run Linux 5.16 or newer",
        ),
    }
}

/// Whether the arena fits into the limits.
fn memory(report: &mut Report, config: &Config) {
    match (check_room(config), Limits::default().room()) {
        (Err(error), _) => report.add("memory", Level::Fail, error.to_string(), None),
        (Ok(()), Some(room)) => report.pass("memory", room.to_string()),
        (Ok(()), None) => report.pass("memory", "no limit can be read"),
    }
}

/// Whether the arena can be locked.
fn locked_memory(report: &mut Report, config: &Config) {
    let arena = config.arena.as_u64();
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if !config.pin {
        report.pass("memlock", "not needed: pin = false");
    } else if limit == RLIM_INFINITY || may_lock(&status) {
        report.pass("memlock", "no limit on locked memory");
    } else if limit >= arena {
        report.pass("memlock", format!("{} may be locked, and the arena is {}", gib(limit), gib(arena)));
    } else {
        report.warn(
            "memlock",
            format!("{} may be locked, and the arena is {}", gib(limit), gib(arena)),
            "LimitMEMLOCK=infinity in the unit, `ulimit -l unlimited` in a shell, or --cap-add IPC_LOCK for a container",
        );
    }
}

/// Whether the effective capabilities have `CAP_IPC_LOCK`.
pub(crate) fn may_lock(status: &str) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    bits >> CAP_IPC_LOCK & 1 == 1
}

fn descriptors(report: &mut Report, config: &Config) {
    // Whether somebody stores descriptors is known only to a daemon that starts.
    let needed = open_files(config, config.keep_sessions != "off");
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    if hard >= needed {
        report.pass("nofile", format!("{needed} descriptors are needed, and {hard} may be had"));
    } else {
        report.warn(
            "nofile",
            format!("{needed} descriptors are needed, and {hard} may be had"),
            format!("LimitNOFILE={} in the unit, or ulimit -n", needed.next_power_of_two()),
        );
    }
}

/// Huge pages of 2 MiB that are set aside, or ordinary ones that become huge.
fn huge_pages(report: &mut Report, config: &Config) {
    let mm = Path::new("/sys/kernel/mm");
    let free = number(&mm.join("hugepages/hugepages-2048kB/free_hugepages")).unwrap_or(0);
    let shmem = fs::read_to_string(mm.join("transparent_hugepage/shmem_enabled")).unwrap_or_default();
    let transparent = chosen(&shmem);
    let arena = config.arena.as_u64();
    let wanted = arena.div_ceil(2 << 20);
    let set_aside = free.saturating_mul(2 << 20);
    match transparent {
        _ if set_aside >= arena => {
            report.pass("huge-pages", format!("{} set aside and free", gib(set_aside)));
        }
        Some(mode @ ("advise" | "always" | "within_size" | "force")) => report.pass(
            "huge-pages",
            format!("{} set aside and free; transparent ones for shared memory: {mode}", gib(set_aside)),
        ),
        _ => report.warn(
            "huge-pages",
            format!(
                "{} set aside and free, and none are made of ordinary pages: pinning takes longer",
                gib(set_aside)
            ),
            format!("sysctl vm.nr_hugepages={wanted}, or echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        ),
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The word in brackets.
fn chosen(choices: &str) -> Option<&str> {
    choices.split_once('[')?.1.split_once(']').map(|(word, _)| word)
}

/// A hint for containers: what a client's container must share with this one.
pub(crate) fn container(report: &mut Report) {
    let marks = ["/.dockerenv", "/run/.containerenv"].iter().any(|mark| Path::new(mark).exists());
    if !marks && std::env::var_os("KUBERNETES_SERVICE_HOST").is_none() {
        return;
    }
    report.warn(
        "container",
        "this is a container: engines in other ones reach the daemon's memory by descriptor alone",
        "share the socket's folder; for classic handles and events share /dev/shm and the IPC and PID namespaces too",
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capability_to_lock_is_read_from_the_effective_set() {
        assert!(may_lock("Name:\tx\nCapInh:\t0000000000000000\nCapEff:\t0000000000004000\n"));
        assert!(!may_lock("CapPrm:\t0000000000004000\nCapEff:\t0000000000003fff\n"));
        assert!(!may_lock(""));
    }

    #[test]
    fn the_kernels_choice_is_the_word_in_brackets() {
        assert_eq!(chosen("always within_size [advise] never deny force\n"), Some("advise"));
        assert_eq!(chosen(""), None);
    }
}
