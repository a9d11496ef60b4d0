//! The machine that a measurement ran on.

use serde::{Deserialize, Serialize};

/// What a number depends on besides the program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// The processor's own name.
    pub(crate) cpu: String,
    /// Cores that this process may use.
    pub(crate) cores: usize,
    /// Main memory in bytes.
    pub(crate) memory_bytes: u64,
    /// Operating system and its release.
    pub(crate) os: String,
    /// The instruction set that the kernels use.
    pub(crate) kernels: String,
    /// The daemon's device, with a GPU's name.
    pub(crate) device: String,
    /// This program's version.
    pub(crate) version: String,
}

impl Machine {
    /// This machine; what cannot be found out is called `unknown`, or 0.
    pub(crate) fn this(kernels: &str, device: &str) -> Self {
        let field = |file: &str, name: &str| {
            let text = std::fs::read_to_string(file).ok()?;
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let unknown = || "unknown".to_owned();
        Self {
            cpu: field("/proc/cpuinfo", "model name")
                .or_else(|| field("/proc/cpuinfo", "Model"))
                .unwrap_or_else(unknown),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: field("/proc/meminfo", "MemTotal")
                .and_then(|kib| kib.split_whitespace().next()?.parse::<u64>().ok())
                .map_or(0, |kib| kib * 1024),
            os: nix::sys::utsname::uname().map_or_else(
                |_| unknown(),
                |name| format!("{} {}", name.sysname().display(), name.release().display()),
            ),
            kernels: kernels.to_owned(),
            device: device.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_cores_and_memory() {
        let machine = Machine::this("scalar", "host");
        assert!(machine.cores > 0);
        assert!(machine.memory_bytes > 1 << 20);
        assert!(machine.os.starts_with("Linux"), "{}", machine.os);
    }
}
