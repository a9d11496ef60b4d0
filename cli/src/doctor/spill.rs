//! The places for pages that leave host memory: a small area of the doctor's own is opened in each, as the daemon would, and removed.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use kvoyant_daemon::config::Config;
use kvoyant_daemon::tiers::nvme::{CHUNK_BYTES, EngineChoice, Spill, SpillSettings};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::statvfs::statvfs;

use super::check::{Level, Report};
use super::gpu::gib;
use super::host::may_lock;

/// What a file in a folder is called where the daemon lays its area.
const AREA: &str = "kvoyant-spill-0";

/// All checks of this room; none where pages do not leave host memory.
pub(crate) fn examine(report: &mut Report, config: &Config) {
    let Some(settings) = config.spill() else { return };
    let mut engines = Vec::new();
    for path in &settings.paths {
        engines.extend(place(report, path, &settings));
    }
    room(report, &settings);
    engine(report, &engines, settings.engine);
    fixed_buffers(report, config);
}

/// The folder whose file system a place is on, and the area's own path.
fn folder_of(path: &Path) -> (PathBuf, PathBuf) {
    if path.is_dir() {
        return (path.to_path_buf(), path.join(AREA));
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    (parent.unwrap_or(Path::new(".")).to_path_buf(), path.to_path_buf())
}

/// Opens a small area beside the one that is to be; the engine that drives it.
fn place(report: &mut Report, path: &Path, settings: &SpillSettings) -> Option<String> {
    if fs::metadata(path).is_ok_and(|there| there.file_type().is_block_device()) {
        block_device(report, path);
        return None;
    }
    let (folder, _) = folder_of(path);
    let scratch = folder.join(format!(".kvoyant-doctor-{}", std::process::id()));
    let tried = Spill::start(&SpillSettings {
        paths: vec![scratch.clone()],
        bytes: CHUNK_BYTES,
        engine: EngineChoice::Auto,
        ..settings.clone()
    });
    let spill = match tried {
        Ok(spill) => spill,
        Err(error) => {
            let found = format!("{}: {error}", path.display());
            let fix = format!(
                "install -d -m 700 {0}, and give it to the daemon's user: chown kvoyant {0}; in the unit: ReadWritePaths={0}",
                folder.display()
            );
            report.add("spill", Level::Fail, found, Some(fix));
            return None;
        }
    };
    let device = spill.report().into_iter().next();
    drop(spill);
    let device = device?;
    if device.direct {
        report.pass("spill", format!("{}: can be written, and takes direct I/O", path.display()));
    } else {
        report.warn(
            "spill",
            format!(
                "{}: takes no direct I/O: pages go through the page cache, which costs copies and memory",
                path.display()
            ),
            "name a folder on ext4, xfs or a block device with `spill`, not on tmpfs or an overlay",
        );
    }
    Some(device.engine)
}

fn block_device(report: &mut Report, path: &Path) {
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => report.pass("spill", format!("{}: a block device that can be written", path.display())),
        Err(error) => report.add(
            "spill",
            Level::Fail,
            format!("{}: {error}", path.display()),
            Some(format!(
                "chown kvoyant {0}; in the unit: PrivateDevices=no and DeviceAllow={0} rw",
                path.display()
            )),
        ),
    }
}

/// Whether the file systems have what is to be set aside, all places together.
fn room(report: &mut Report, settings: &SpillSettings) {
    let mut systems: Vec<(u64, PathBuf, u64, u64)> = Vec::new();
    for path in &settings.paths {
        let (folder, area) = folder_of(path);
        let (Ok(there), Ok(system)) = (fs::metadata(&folder), statvfs(&folder)) else { continue };
        if fs::metadata(path).is_ok_and(|there| there.file_type().is_block_device()) {
            continue;
        }
        // What a daemon that runs has set aside already counts as free.
        let ours = fs::metadata(&area).map_or(0, |area| area.blocks() * 512);
        match systems.iter_mut().find(|(device, ..)| *device == there.dev()) {
            Some((_, _, wanted, free)) => (*wanted, *free) = (*wanted + settings.bytes, *free + ours),
            None => {
                let free = system.blocks_available() * system.fragment_size() + ours;
                systems.push((there.dev(), folder, settings.bytes, free));
            }
        }
    }
    for (_, folder, wanted, free) in systems {
        let found =
            format!("{}: {} are to be set aside, and {} are free", folder.display(), gib(wanted), gib(free));
        if free > wanted {
            report.pass("spill-room", found);
        } else {
            let fix = format!("make room there, or set spill_bytes to less than {}", gib(free));
            report.add("spill-room", Level::Fail, found, Some(fix));
        }
    }
}

/// Who moves pages.
fn engine(report: &mut Report, engines: &[String], choice: EngineChoice) {
    let Some(engine) = engines.first() else { return };
    let fix = "sysctl kernel.io_uring_disabled=0, and allow io_uring_setup, io_uring_enter and io_uring_register in the container's \
               seccomp profile";
    match (engine.as_str(), choice) {
        (_, EngineChoice::Psync) => report.pass("io-uring", "not needed: spill_engine = psync"),
        ("io_uring", _) => report.pass("io-uring", "can be used"),
        (other, EngineChoice::Auto) => report.warn(
            "io-uring",
            format!("cannot be used: pages are moved by {other}, at several times the cost"),
            fix,
        ),
        (_, EngineChoice::Uring) => report.add(
            "io-uring",
            Level::Fail,
            "cannot be used, and spill_engine = uring asks for it".into(),
            Some(format!("{fix}; or spill_engine = auto")),
        ),
    }
}

/// Whether the arena may be registered as fixed buffers.
fn fixed_buffers(report: &mut Report, config: &Config) {
    let arena = config.arena.as_u64();
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if limit == RLIM_INFINITY || limit >= arena || may_lock(&status) {
        report.pass("spill-buffers", "the whole arena may be registered with io_uring");
    } else {
        report.warn(
            "spill-buffers",
            format!(
                "{} may be registered with io_uring, and the arena is {}: pages beyond cost more",
                gib(limit),
                gib(arena)
            ),
            "LimitMEMLOCK=infinity in the unit, `ulimit -l unlimited` in a shell, or --cap-add IPC_LOCK for a container",
        );
    }
}
