//! What `kvoyant status` says of pages on disk and of images.

use std::fmt::Write;

use kvoyant_daemon::status::{SessionReport, StatusReport, StoreReport};
use kvoyant_daemon::tiers::nvme::{DeviceReport, DeviceState, Latency};

use super::{bytes, counted};

/// Three lines for each place on disk, and one or two for the store.
pub(super) fn lines(report: &StatusReport, out: &mut String) {
    for device in &report.spill {
        spill(device, out);
    }
    if let Some(store) = &report.store {
        self::store(store, out);
    }
}

fn spill(device: &DeviceReport, out: &mut String) {
    let direct = if device.direct { "direct" } else { "through the page cache" };
    let _ = writeln!(
        out,
        "spill      {}\n           {}, {direct}, {} of {} in use, {}",
        device.path.display(),
        device.engine,
        bytes(device.used_bytes),
        bytes(device.total_bytes),
        match &device.state {
            DeviceState::Serving => "serving".to_owned(),
            DeviceState::Failed(reason) => format!("FAILED, takes no more pages: {reason}"),
        }
    );
    let _ = write!(out, "           {} read", counted(device.reads, "page"));
    if let (Some(half), Some(most)) = (device.latency_at(50), device.latency_at(99)) {
        let _ = write!(out, " (p50 {}, p99 {})", latency(half), latency(most));
    }
    let _ = write!(out, ", {} written", device.writes);
    if device.late_reads > 0 {
        let _ = write!(out, ", {} late", device.late_reads);
    }
    let _ = match (device.read_failures, device.write_failures) {
        (0, 0) => writeln!(out, ", no failures"),
        (read, written) => writeln!(out, ", FAILED: {read} reads, {written} writes"),
    };
}

fn latency(latency: Latency) -> String {
    match latency {
        Latency::Within(us) => format!("≤ {}", time(us)),
        Latency::Beyond(us) => format!("> {}", time(us)),
    }
}

fn time(us: u64) -> String {
    match us {
        0..1000 => format!("{us} µs"),
        1000..1_000_000 => format!("{} ms", us / 1000),
        _ => format!("{} s", us / 1_000_000),
    }
}

fn store(store: &StoreReport, out: &mut String) {
    let _ = write!(out, "images     {}", store.folder.display());
    let Some(remote) = &store.remote else {
        out.push('\n');
        return;
    };
    let waiting = match store.waiting {
        0 => "nothing waits to be copied".to_owned(),
        1 => "1 image waits to be copied".to_owned(),
        n => format!("{n} images wait to be copied"),
    };
    let _ = writeln!(out, "\n           and {remote}: {waiting}");
    if let Some(error) = &store.remote_error {
        let _ = writeln!(out, "           last error: {error}");
    }
}

/// Where a session's pages are, if they can leave host memory.
pub(super) fn pages(report: &StatusReport, session: &SessionReport) -> Option<String> {
    let moved = session.spilled_pages + session.pages_written + session.pages_read + session.pages_lost > 0;
    (moved || !report.spill.is_empty()).then(|| {
        let mut text = format!(
            "{} in memory, {} on disk, {} read back",
            session.pages, session.spilled_pages, session.pages_read
        );
        if session.pages_lost > 0 {
            let _ = write!(text, ", {} LOST", session.pages_lost);
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvoyant_daemon::tiers::nvme::LATENCY_BUCKETS_US;

    #[test]
    fn a_device_and_a_store_say_what_an_operator_has_to_know() {
        let mut read_latency = vec![0; LATENCY_BUCKETS_US.len() + 1];
        (read_latency[3], read_latency[8]) = (98, 2);
        let device = DeviceReport {
            path: "/mnt/nvme/kvoyant-spill-0".into(),
            engine: "io_uring".into(),
            direct: true,
            total_bytes: 16 << 30,
            used_bytes: 1 << 30,
            reads: 100,
            writes: 3000,
            read_operations: 90,
            write_operations: 100,
            read_bytes: 100 << 14,
            written_bytes: 3000 << 14,
            late_reads: 0,
            read_failures: 0,
            write_failures: 0,
            read_latency,
            registered: 1,
            state: DeviceState::Serving,
        };
        let mut out = String::new();
        spill(&device, &mut out);
        assert_eq!(
            out,
            "spill      /mnt/nvme/kvoyant-spill-0\n           io_uring, direct, 1.00 GiB of 16.00 GiB in use, serving\n           \
             100 pages read (p50 ≤ 100 µs, p99 ≤ 2 ms), 3000 written, no failures\n"
        );
        let broken = DeviceReport {
            state: DeviceState::Failed("EIO".into()),
            write_failures: 3,
            late_reads: 2,
            ..device
        };
        out.clear();
        spill(&broken, &mut out);
        assert!(out.contains("FAILED, takes no more pages: EIO"), "{out}");
        assert!(out.contains("2 late, FAILED: 0 reads, 3 writes"), "{out}");
        out.clear();
        let report = StoreReport {
            folder: "/var/lib/kvoyant/images".into(),
            remote: Some("s3://bucket/a".into()),
            waiting: 2,
            remote_error: Some("it cannot be reached".into()),
        };
        store(&report, &mut out);
        assert!(out.contains("and s3://bucket/a: 2 images wait to be copied\n"), "{out}");
        assert!(out.contains("last error: it cannot be reached"), "{out}");
        out.clear();
        store(&StoreReport { remote: None, ..report }, &mut out);
        assert_eq!(out, "images     /var/lib/kvoyant/images\n");
    }
}
