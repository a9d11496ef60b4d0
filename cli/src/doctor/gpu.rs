//! The driver, the device, and what two processes can do with each other there.

use kvoyant_cuda::{BatchCopies, ComputeMode, Context, DeviceInfo, Driver};
use kvoyant_daemon::config::Config;
use kvoyant_daemon::device::cuda;
use kvoyant_daemon::device::cuda::trial::{EventOffer, Offer};

use super::check::{Level, Report};
use super::peer::{self, Answer, Order, REGISTER_BYTES, Refusal, Task};

/// Bytes that are offered to the other process.
const OFFER_BYTES: usize = 4 << 20;

/// One device under examination.
#[derive(Debug)]
pub(crate) struct Patient<'a> {
    pub(crate) driver: &'static Driver,
    pub(crate) info: &'a DeviceInfo,
    pub(crate) config: &'a Config,
    /// How a failure counts: only the named device's fail.
    pub(crate) bad: Level,
}

/// The driver, and the device of this number; `None` if there is none to look at.
pub(crate) fn find(report: &mut Report, ordinal: u32, bad: Level) -> Option<(&'static Driver, DeviceInfo)> {
    let driver = match kvoyant_cuda::driver() {
        Ok(driver) => driver,
        Err(reason) => {
            report.add("driver", bad, reason.to_string(), None);
            return None;
        }
    };
    let batch = match driver.batch_copies() {
        BatchCopies::None => "no batch copies (they came with 12.8): runs are copied one by one",
        BatchCopies::V12080 | BatchCopies::V13000 => "batch copies",
    };
    report.pass("driver", format!("CUDA {}, {batch}", cuda::version(driver)));
    let devices = match driver.devices() {
        Ok(devices) => devices,
        Err(error) => {
            report.refused("devices", bad, "they cannot be listed", &error);
            return None;
        }
    };
    let names: Vec<String> =
        devices.iter().map(|info| format!("cuda:{} {}", info.ordinal, info.name)).collect();
    let Some(info) = devices.into_iter().find(|info| info.ordinal == ordinal) else {
        let found = format!("there is no cuda:{ordinal}; the driver shows {}", names.join(", "));
        let fix = "name one of these; CUDA_VISIBLE_DEVICES hides others, and nvidia-smi -L lists all";
        report.add("devices", bad, found, Some(fix.into()));
        return None;
    };
    if names.len() > 1 {
        report.pass("devices", names.join(", "));
    }
    Some((driver, info))
}

impl Patient<'_> {
    /// All checks of the device.
    pub(crate) fn examine(&self, report: &mut Report) {
        self.identity(report);
        let reachable = self.compute_mode(report);
        self.numa(report);
        super::kernels::examine(self, report);
        if !reachable {
            return;
        }
        let context = match self.driver.context(self.info.ordinal) {
            Ok(context) => context,
            Err(error) => return report.refused("context", self.bad, "none can be made", &error),
        };
        self.memory(report, &context);
        self.signals(report, &context);
        self.sharing(report, &context);
        self.registration(report);
    }

    fn identity(&self, report: &mut Report) {
        let DeviceInfo { name, total_bytes, compute, pci_bus_id, abilities, .. } = self.info;
        let uuid = self.info.uuid_text();
        let ecc = if abilities.ecc { "ECC on" } else { "no ECC" };
        report.pass(
            "device",
            format!(
                "cuda:{} {name} ({uuid}), {}, sm_{}{}, {pci_bus_id}, {} copy engines, {ecc}",
                self.info.ordinal,
                gib(*total_bytes),
                compute.0,
                compute.1,
                abilities.copy_engines
            ),
        );
        if self.info.mig {
            let fix = format!("give engines the same one: CUDA_VISIBLE_DEVICES={uuid}");
            report.warn("mig", "the device is a slice of a card", fix);
        }
        if abilities.integrated {
            let found = "the device has the host's own memory: copying gains nothing";
            report.warn("integrated", found, "use --device host with in_place");
        }
    }

    /// Whether contexts can be made by several processes.
    fn compute_mode(&self, report: &mut Report) -> bool {
        let default = format!("nvidia-smi -i {} -c DEFAULT", self.info.ordinal);
        match self.info.compute_mode {
            ComputeMode::Default => report.pass("compute-mode", "default: any number of processes"),
            ComputeMode::ExclusiveProcess if cuda::mps_runs() => {
                report.pass("compute-mode", "exclusive-process, and MPS runs: it is the one process");
            }
            ComputeMode::ExclusiveProcess => {
                let found = "exclusive-process: the daemon and an engine cannot both have a context";
                report.add("compute-mode", self.bad, found.into(), Some(default));
                return false;
            }
            ComputeMode::Prohibited => {
                let found = "prohibited: nobody may have a context";
                report.add("compute-mode", self.bad, found.into(), Some(default));
                return false;
            }
            ComputeMode::Unknown(mode) => {
                let found = format!("{mode}, which this version does not know");
                report.warn("compute-mode", found, default);
            }
        }
        true
    }

    fn numa(&self, report: &mut Report) {
        let nodes = std::fs::read_to_string("/sys/devices/system/node/online").unwrap_or_default();
        match self.info.numa_node {
            Some(node) => {
                report.pass("numa", format!("the device is on node {node}: extents are made there"));
            }
            None if nodes.trim().is_empty() || nodes.trim() == "0" => {
                report.pass("numa", "this machine has one node");
            }
            None => report.warn(
                "numa",
                format!("the system does not say which of the nodes {} the device is on", nodes.trim()),
                "pin the daemon to the right one: NUMAPolicy=bind and NUMAMask= in the unit, or numactl",
            ),
        }
    }

    fn memory(&self, report: &mut Report, context: &Context) {
        let (free, total) = match context.memory() {
            Ok(sizes) => sizes,
            Err(error) => return report.refused("device-memory", self.bad, "it cannot be asked for", &error),
        };
        let wanted = self.config.device_memory.as_u64();
        let slab = self.config.slab.as_u64();
        let found = format!("{} of {} free beside this context", gib(free), gib(total));
        if wanted > free {
            let found = format!("{found}, and device_memory is {}", gib(wanted));
            report.warn("device-memory", found, "lower device_memory, or see nvidia-smi for who holds it");
        } else if free < slab {
            let found = format!("{found}, and the slab of one session is {}", gib(slab));
            report.add("device-memory", self.bad, found, Some("lower slab, or see nvidia-smi".into()));
        } else {
            report.pass("device-memory", found);
        }
    }

    /// How streams of other processes learn of answers: by words, or by events.
    fn signals(&self, report: &mut Report, context: &Context) {
        let abilities = self.info.abilities;
        let words = |bits| self.ask(Task::Words { bits }, None);
        let mut works = false;
        if abilities.memops_64 {
            works = self.trial(report, "stream-words", words(64), "64-bit timeline words work");
        } else if abilities.memops_32 {
            match words(32) {
                Ok(_) => {
                    works = true;
                    let found = "32-bit timeline words only, compared cyclically";
                    report.warn("stream-words", found, "nothing to do; a newer driver may have 64-bit ones");
                }
                Err(refusal) => self.refusal(report, "stream-words", "32-bit words do not work", refusal),
            }
        } else {
            let level = if abilities.ipc_events { Level::Warn } else { self.bad };
            let found = "the device has no stream memory operations".to_owned();
            let fix = "update the driver, or load the nvidia module with NVreg_EnableStreamMemOPs=1 if it is an old one";
            report.add("stream-words", level, found, Some(fix.into()));
        }
        if !abilities.ipc_events {
            let found = "the device has no interprocess events";
            let fix = if works { "nothing to do: words are used" } else { "update the driver" };
            return report.warn("events", found, fix);
        }
        let offered = EventOffer::new(context).and_then(|offer| Ok((offer.handle()?, offer)));
        let taken = match offered {
            Ok((handle, _offer)) => self.ask(Task::Event { handle: handle.into() }, None),
            Err(error) => Err(error.into()),
        };
        match taken {
            Ok(answer) => report.pass("events", format!("another process opens ours in {:.0} µs", answer.us)),
            Err(refusal) => {
                let level = if works { Level::Warn } else { self.bad };
                let found = format!("another process cannot open ours: {}", refusal.what);
                report.add("events", level, found, Some(refusal.advice));
            }
        }
    }

    /// Whether another process can open our memory, in both ways.
    fn sharing(&self, report: &mut Report, context: &Context) {
        let (info, config) = (self.info, self.config);
        let by_descriptor = self.descriptor(context, info.abilities.posix_fd);
        let by_handle = self.handle(context, info.abilities.ipc_events);
        // One way is enough, unless the configuration insists on the other.
        let level = |ok: bool, other_ok: bool, name: &str| match (ok, config.export == name) {
            (true, _) => Level::Pass,
            (false, true) => self.bad,
            (false, false) if other_ok && config.export == "auto" => Level::Warn,
            (false, false) if config.export == "auto" => self.bad,
            (false, false) => Level::Warn,
        };
        let (first, second) = (by_descriptor.is_ok(), by_handle.is_ok());
        let read_only = by_descriptor.as_ref().map(|answer| answer.read_only).ok();
        for (name, way, result, level) in [
            ("export-descriptor", "descriptor", by_descriptor, level(first, second, "descriptor")),
            ("export-handle", "classic handle", by_handle, level(second, first, "handle")),
        ] {
            match result {
                Ok(answer) => {
                    report.pass(name, format!("another process opens ours by {way} in {:.0} µs", answer.us));
                }
                Err(Refusal { what, advice }) => {
                    let found = format!("another process cannot open ours by {way}: {what}");
                    report.add(name, level, found, Some(advice));
                }
            }
        }
        match read_only {
            Some(true) => report.pass(
                "read-only",
                "the driver maps slabs read-only for clients; scripts/gpu-check tries whether the card holds to it",
            ),
            Some(false) => report.warn(
                "read-only",
                "the driver maps shared memory writable only: a faulty client can spoil its own slab",
                "update the driver",
            ),
            None => report.warn(
                "read-only",
                "classic handles are always writable: a faulty client can spoil its own slab",
                "see export-descriptor",
            ),
        }
    }

    fn descriptor(&self, context: &Context, able: bool) -> Result<Answer, Refusal> {
        if !able {
            return Err(Refusal::new("the device cannot export descriptors"));
        }
        let offer = Offer::by_descriptor(context, OFFER_BYTES)?;
        exact(self.ask(Task::Descriptor { bytes: offer.bytes() }, offer.descriptor()?)?)
    }

    fn handle(&self, context: &Context, able: bool) -> Result<Answer, Refusal> {
        if !able {
            return Err(Refusal::new("the device has no classic IPC"));
        }
        let offer = Offer::by_handle(context, OFFER_BYTES)?;
        let handle = offer.handle()?.map_or_else(Vec::new, Vec::from);
        exact(self.ask(Task::Handle { handle, bytes: offer.bytes() }, None)?)
    }

    fn registration(&self, report: &mut Report) {
        if !self.info.abilities.host_register {
            let found = "the device cannot read registered host memory, which the arena is";
            return report.add("register", self.bad, found.into(), Some("update the driver".into()));
        }
        match self.ask(Task::Register, None) {
            Ok(answer) => {
                let per_gib = answer.us / 1e6 * (1 << 30) as f64 / REGISTER_BYTES as f64;
                let arena = self.config.arena.as_u64() as f64 / (1u64 << 30) as f64;
                report.pass(
                    "register",
                    format!(
                        "{per_gib:.2} s a GiB: about {:.1} s for the arena, in the background",
                        per_gib * arena
                    ),
                );
            }
            Err(refusal) => {
                self.refusal(report, "register", "host memory cannot be registered", refusal);
            }
        }
    }

    fn ask(&self, task: Task, descriptor: Option<std::os::fd::OwnedFd>) -> Result<Answer, Refusal> {
        peer::ask(&Order { ordinal: self.info.ordinal, task }, descriptor)
    }

    fn refusal(&self, report: &mut Report, name: &'static str, what: &str, refusal: Refusal) {
        report.add(name, self.bad, format!("{what}: {}", refusal.what), Some(refusal.advice));
    }

    fn trial(
        &self,
        report: &mut Report,
        name: &'static str,
        result: Result<Answer, Refusal>,
        words: &str,
    ) -> bool {
        match result {
            Ok(_) => {
                report.pass(name, words);
                true
            }
            Err(refusal) => {
                self.refusal(report, name, "they do not work", refusal);
                false
            }
        }
    }
}

/// What was read must be what was offered.
fn exact(answer: Answer) -> Result<Answer, Refusal> {
    if answer.exact { Ok(answer) } else { Err(Refusal::new("it reads other bytes than we wrote")) }
}

/// Bytes for people.
pub(crate) fn gib(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}
