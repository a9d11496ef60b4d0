//! What the environment asks of this driver: how large, how fast, how able the machine is.

use std::path::PathBuf;

/// A device's granularity of physical memory, as of every current card.
pub(crate) const GRANULE: u64 = 2 << 20;

/// What a context costs in device memory, where the environment does not say.
const CONTEXT_BYTES: u64 = 16 << 20;

/// Switches and sizes, read once at `cuInit`.
#[derive(Debug)]
pub(crate) struct Options {
    /// Folder of the machine's state; `None` is a machine of this process alone.
    pub(crate) folder: Option<PathBuf>,
    /// Number of devices.
    pub(crate) devices: u32,
    /// Memory of each device in bytes.
    pub(crate) memory: u64,
    /// What each process's context takes of it.
    pub(crate) context_bytes: u64,
    /// How late the memory of an ended process comes back, in milliseconds.
    pub(crate) late_ms: u64,
    /// Whether one process alone may have a context.
    pub(crate) exclusive: bool,
    /// Whether the device is a slice of a card.
    pub(crate) mig: bool,
    /// What `cuDriverGetVersion` says.
    pub(crate) version: i32,
    /// Abilities that are missing.
    missing: Vec<String>,
    /// Speed of the link per direction in bytes a second, if it is shaped.
    pub(crate) bytes_per_second: Option<f64>,
    /// Latency of a copy in microseconds.
    pub(crate) latency_us: u64,
}

/// A number from the environment; one that cannot be read counts as absent.
fn number<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.trim().parse().ok()
}

/// A size such as `512MiB`, `2GiB` or plain bytes.
fn size(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let factor = match text[digits..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    text[..digits].parse::<u64>().ok()?.checked_mul(factor)
}

impl Options {
    /// As the environment says.
    pub(crate) fn from_environment() -> Self {
        let flag = |name: &str| std::env::var(name).is_ok_and(|value| value == "1");
        Self {
            folder: std::env::var_os("SOFTCUDA_DIR").filter(|folder| !folder.is_empty()).map(PathBuf::from),
            devices: number("SOFTCUDA_DEVICES").unwrap_or(1).min(16),
            memory: size("SOFTCUDA_MEMORY").unwrap_or(2 << 30),
            context_bytes: size("SOFTCUDA_CONTEXT").unwrap_or(CONTEXT_BYTES),
            late_ms: number("SOFTCUDA_LATE_MS").unwrap_or(50),
            exclusive: flag("SOFTCUDA_EXCLUSIVE"),
            mig: flag("SOFTCUDA_MIG"),
            version: number("SOFTCUDA_DRIVER_VERSION").unwrap_or(12080),
            missing: std::env::var("SOFTCUDA_NO").map_or_else(
                |_| Vec::new(),
                |list| {
                    list.split(',')
                        .map(|name| name.trim().to_owned())
                        .filter(|name| !name.is_empty())
                        .collect()
                },
            ),
            bytes_per_second: number::<f64>("SOFTCUDA_GBPS")
                .filter(|speed| *speed > 0.0)
                .map(|speed| speed * 1e9),
            latency_us: number("SOFTCUDA_LATENCY_US").unwrap_or(0),
        }
    }

    /// Whether the machine has an ability that `SOFTCUDA_NO` can take away: `memops`, `memops64`, `posix_fd`, `vmm`,
    /// `ipc`, `ipc_events`, `host_register`, `read_only_register`, `batch`, `priorities`, `unified`.
    pub(crate) fn has(&self, ability: &str) -> bool {
        !self.missing.iter().any(|missing| missing == ability)
    }
}
