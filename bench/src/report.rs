//! What was found: figures, outcomes, and the machine that they are of.

use std::fmt::{self, Write};
use std::path::Path;

use kvoyant_cuda::{DeviceInfo, Driver};
use serde::{Deserialize, Serialize};

/// The name of the devices of the driver in software.
const SOFTWARE: &str = "softcuda";

/// How a section ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    /// All that was checked is as it should be.
    Pass,
    /// Something is not.
    Fail(String),
    /// It could not be tried.
    Skipped(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pass => write!(f, "pass"),
            Self::Fail(reason) => write!(f, "FAIL: {reason}"),
            Self::Skipped(reason) => write!(f, "skipped: {reason}"),
        }
    }
}

/// What a figure is to reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

impl Target {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
        }
    }
}

/// One number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// Of what.
    pub(crate) name: String,
    /// How much.
    pub(crate) value: f64,
    /// Of what unit.
    pub(crate) unit: String,
    /// What it is to reach, if that is settled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<Target>,
}

/// One section.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Section {
    /// Its short name.
    pub(crate) name: String,
    /// What it looks at.
    pub(crate) title: String,
    /// How it ended.
    pub(crate) outcome: Outcome,
    /// How long it took.
    pub(crate) seconds: f64,
    /// What it found, also when it did not end well.
    pub(crate) figures: Vec<Figure>,
}

/// The machine.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_bytes: u64,
    pub(crate) kernel: String,
    pub(crate) simd: String,
}

/// The device.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Gpu {
    pub(crate) name: String,
    pub(crate) uuid: String,
    pub(crate) memory_bytes: u64,
    pub(crate) compute: String,
    pub(crate) driver: String,
    pub(crate) pci: String,
    pub(crate) link: String,
    pub(crate) mps: bool,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    /// Version of Kvoyant.
    pub(crate) version: String,
    /// When: UTC.
    pub(crate) date: String,
    /// What its figures are worth, where that is little.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) caveat: Option<String>,
    pub(crate) machine: Machine,
    pub(crate) gpu: Gpu,
    pub(crate) sections: Vec<Section>,
}

/// A field of a file of `/proc`.
fn field(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

impl Machine {
    pub(crate) fn this() -> Self {
        let unknown = || "unknown".to_owned();
        Self {
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(unknown),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: field("/proc/meminfo", "MemTotal")
                .and_then(|kib| kib.split_whitespace().next()?.parse::<u64>().ok())
                .map_or(0, |kib| kib * 1024),
            kernel: nix::sys::utsname::uname()
                .map_or_else(|_| unknown(), |name| name.release().to_string_lossy().into_owned()),
            simd: kvoyant_kernels::Path::best().to_string(),
        }
    }
}

impl Gpu {
    pub(crate) fn of(driver: &Driver, info: &DeviceInfo) -> Self {
        let pci = Path::new("/sys/bus/pci/devices").join(&info.pci_bus_id);
        let read = |name: &str| {
            let text = std::fs::read_to_string(pci.join(name)).unwrap_or_default();
            text.trim().to_owned()
        };
        let link = match (read("current_link_speed"), read("current_link_width")) {
            (speed, width) if speed.is_empty() || width.is_empty() => "unknown".to_owned(),
            (speed, width) => format!("{speed}, {width} lanes"),
        };
        Self {
            name: info.name.clone(),
            uuid: info.uuid_text(),
            memory_bytes: info.total_bytes,
            compute: format!("{}.{}", info.compute.0, info.compute.1),
            driver: kvoyant_daemon::device::cuda::version(driver),
            pci: info.pci_bus_id.clone(),
            link,
            mps: kvoyant_daemon::device::cuda::mps_runs(),
        }
    }

    /// Whether the driver is the one in software.
    pub(crate) fn is_software(&self) -> bool {
        self.name.starts_with(SOFTWARE)
    }
}

impl Report {
    pub(crate) fn new(machine: Machine, gpu: Gpu, date: String) -> Self {
        let caveat = gpu
            .is_software()
            .then(|| "softcuda: a driver in software, figures mean nothing about GPUs".to_owned());
        Self { version: env!("CARGO_PKG_VERSION").into(), date, caveat, machine, gpu, sections: Vec::new() }
    }

    /// Whether no section failed.
    pub(crate) fn passed(&self) -> bool {
        !self.sections.iter().any(|section| matches!(section.outcome, Outcome::Fail(_)))
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let (gpu, machine) = (&self.gpu, &self.machine);
        let mut out = String::new();
        let _ = writeln!(out, "Kvoyant {} on {}", self.version, self.date);
        let _ = writeln!(
            out,
            "GPU      {} ({}), {:.1} GiB, compute {}, CUDA {}, link {}{}",
            gpu.name,
            gpu.uuid,
            gpu.memory_bytes as f64 / (1u64 << 30) as f64,
            gpu.compute,
            gpu.driver,
            gpu.link,
            if gpu.mps { ", MPS runs" } else { "" }
        );
        let _ = writeln!(
            out,
            "machine  {}, {} cores, {:.0} GiB, Linux {}, {}",
            machine.cpu,
            machine.cores,
            machine.memory_bytes as f64 / (1u64 << 30) as f64,
            machine.kernel,
            machine.simd
        );
        if let Some(caveat) = &self.caveat {
            let _ = writeln!(out, "{caveat}");
        }
        for section in &self.sections {
            let _ = writeln!(out, "\n{}: {} ({:.1} s)", section.title, section.outcome, section.seconds);
            for figure in &section.figures {
                let verdict = match figure.target {
                    // A driver in software meets or misses nothing.
                    None => String::new(),
                    Some(_) if self.caveat.is_some() => String::new(),
                    Some(target) => {
                        let (sign, bound) = match target {
                            Target::AtLeast(bound) => ('≥', bound),
                            Target::AtMost(bound) => ('≤', bound),
                        };
                        let met = if target.met(figure.value) { "met" } else { "MISSED" };
                        format!("  {sign} {bound}: {met}")
                    }
                };
                let _ = writeln!(
                    out,
                    "  {:<62} {:>12} {}{verdict}",
                    figure.name,
                    number(figure.value),
                    figure.unit
                );
            }
        }
        out
    }
}

/// Three digits that count; whole numbers as they are.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v.fract() == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(gpu: &str) -> Report {
        let gpu = Gpu {
            name: gpu.into(),
            uuid: "GPU-0".into(),
            memory_bytes: 1 << 30,
            compute: "9.0".into(),
            driver: "12.8".into(),
            pci: String::new(),
            link: "unknown".into(),
            mps: false,
        };
        let mut report = Report::new(Machine::this(), gpu, "2026-11-23T00:00:00Z".into());
        let figure =
            |name: &str, value, target| Figure { name: name.into(), value, unit: "µs".into(), target };
        report.sections.push(Section {
            name: "latency".into(),
            title: "latency".into(),
            outcome: Outcome::Pass,
            seconds: 1.0,
            figures: vec![
                figure("first", 59.0, Some(Target::AtMost(60.0))),
                figure("second", 61.0, Some(Target::AtMost(60.0))),
            ],
        });
        report
    }

    #[test]
    fn a_target_is_said_to_be_met_or_missed() {
        let table = report("H200").table();
        assert!(table.contains("≤ 60: met") && table.contains("≤ 60: MISSED"), "{table}");
        assert!(!table.contains("softcuda"));
    }

    #[test]
    fn a_driver_in_software_meets_no_target_and_is_named() {
        let table = report("softcuda").table();
        assert!(!table.contains("met") && !table.contains("MISSED"), "{table}");
        assert!(table.contains("figures mean nothing about GPUs"), "{table}");
    }

    #[test]
    fn a_report_fails_with_any_of_its_sections() {
        let mut report = report("H200");
        assert!(report.passed());
        report.sections[0].outcome = Outcome::Skipped("no compiler".into());
        assert!(report.passed());
        report.sections[0].outcome = Outcome::Fail("wrong bytes".into());
        assert!(!report.passed());
    }
}
