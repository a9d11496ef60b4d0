//! `kvoyant status`: what a running daemon holds.

mod stores;
mod users;

use std::fmt::Write;

use kvoyant_daemon::admin::{AdminError, fetch_status};
use kvoyant_daemon::status::{
    DeviceReport, MethodReport, PoolReport, PoolState, SessionReport, StatusReport,
};

use crate::args::StatusArgs;
use crate::operate::{admin_socket, told};

/// The daemon's status as text or JSON, with a line's end.
///
/// # Errors
/// If the daemon cannot be asked.
pub(crate) fn text(args: &StatusArgs) -> Result<String, AdminError> {
    let path = admin_socket(args.admin.as_ref())?;
    let report = fetch_status(&path)?;
    told(args.json, path, &report, || words(&report))
}

/// The report for people.
fn words(report: &StatusReport) -> String {
    let mut out = String::new();
    let arena = &report.arena;
    let _ = writeln!(
        out,
        "kvoyantd {} (protocol {}, boot {}), up {}",
        report.version,
        report.protocol,
        report.boot_id,
        duration(report.uptime_s)
    );
    let _ = writeln!(
        out,
        "device     {} ({}), {}",
        report.device,
        report.mode,
        counted(report.lanes as u64, "lane")
    );
    if report.draining {
        let _ =
            writeln!(out, "draining   no new sessions are taken (`kvoyant drain --undo` takes them again)");
    }
    if report.log_lines_dropped > 0 {
        let _ = writeln!(
            out,
            "log        {} lines dropped: nobody reads its standard error",
            report.log_lines_dropped
        );
    }
    if let Some(gpu) = &report.gpu {
        let _ = writeln!(out, "gpu        {}", gpu_line(gpu));
    }
    let _ = writeln!(
        out,
        "arena      {} of {} in use, {} locked into memory",
        bytes(arena.used_bytes),
        bytes(arena.total_bytes),
        bytes(arena.locked_bytes)
    );
    let _ = writeln!(out, "pool       {}", pool(&arena.pool));
    stores::lines(report, &mut out);
    if let Some(access) = users::access(&report.access) {
        let _ = writeln!(out, "serves     {access}");
    }
    let totals = &report.totals;
    let _ = writeln!(
        out,
        "holds      {}, {}, {} tokens, {} ({} of KV, {} of digests), {} on the device",
        counted(totals.sessions, "session"),
        counted(totals.sequences, "sequence"),
        totals.tokens,
        counted(totals.pages, "page"),
        bytes(totals.kv_bytes),
        bytes(totals.digest_bytes),
        bytes(totals.slab_bytes)
    );
    let _ = write!(out, "moved      {}", bytes(totals.bytes_moved));
    let ahead: u64 = report.sessions.iter().map(|session| session.prefetch_bytes).sum();
    if ahead > 0 {
        let _ = write!(out, ", and {} ahead of any request", bytes(ahead));
    }
    let attended: u64 = report.sessions.iter().map(|session| session.cpu_rows).sum();
    if attended > 0 {
        let _ = write!(out, "; {} attended by the CPU", counted(attended, "row"));
    }
    let certified: u64 = report.sessions.iter().map(|session| session.certified_heads).sum();
    if certified > 0 {
        let within: u64 =
            report.sessions.iter().map(|session| session.missed_heads[..2].iter().sum::<u64>()).sum();
        let share = within as f64 / certified as f64 * 100.0;
        let _ = write!(out, "; {share:.0} % of query heads missed at most 1 % of a layer's attention");
    }
    out.push('\n');
    if report.sessions.is_empty() {
        users::table(report, &mut out);
        return out;
    }
    let _ = writeln!(
        out,
        "\n{:>7}  {:<20} {:>8} {:>9} {:>9} {:>10} {:>10} {:>6}",
        "session", "client", "pid", "sequences", "tokens", "KV", "moved", "hits"
    );
    for session in &report.sessions {
        let _ = writeln!(out, "{}", line(session));
        if let Some(kept) = kept(session) {
            let _ = writeln!(out, "{:>7}  keeps {kept}", "");
        }
        if let Some(pages) = stores::pages(report, session) {
            let _ = writeln!(out, "{:>7}  pages {pages}", "");
        }
    }
    users::table(report, &mut out);
    out
}

fn gpu_line(gpu: &DeviceReport) -> String {
    let [dma, staged, zerocopy] = gpu.transfers;
    let mut text = format!(
        "{} (CUDA {}), {} of {} set aside in use, by {} and {}; {dma} transfers by dma, {staged} staged, {zerocopy} by \
         zero copy, costs {}",
        gpu.model,
        gpu.driver,
        bytes(gpu.used_bytes),
        bytes(gpu.set_aside_bytes),
        gpu.export,
        gpu.signal,
        gpu.costs
    );
    if gpu.quarantined_bytes > 0 {
        let _ = write!(text, "; {} wait for dead processes", bytes(gpu.quarantined_bytes));
    }
    if let Some(lost) = &gpu.lost {
        let _ = write!(text, "; LOST: {lost}");
    }
    text
}

fn pool(pool: &PoolReport) -> String {
    let mut text = format!("{} ready", bytes(pool.ready_bytes));
    if pool.ahead_bytes > 0 {
        let _ = write!(
            text,
            ", {} of {} ahead of time",
            bytes(pool.made_bytes.min(pool.ahead_bytes)),
            bytes(pool.ahead_bytes)
        );
    }
    let _ = write!(text, ", {} in huge pages, pinned by {}", bytes(pool.huge_bytes), pool.pin);
    if let Some(node) = pool.numa_node {
        let _ = write!(text, ", on NUMA node {node}");
    }
    match (pool.state, &pool.trouble) {
        (PoolState::Filling, _) => text.push_str("; being filled"),
        (PoolState::Idle | PoolState::Failed, None) => {}
        (PoolState::Idle | PoolState::Failed, Some(trouble)) => {
            let _ = write!(text, "; {trouble}");
        }
    }
    text
}

fn line(session: &SessionReport) -> String {
    let found = session.rows_hit + session.rows_in_place + session.graph_hits;
    let hits = match session.rows_selected + session.graph_hits + session.graph_misses {
        0 => "–".to_owned(),
        all => format!("{:.0} %", found as f64 / all as f64 * 100.0),
    };
    let name = plain(&session.client, 20);
    format!(
        "{:>7}  {name:<20} {:>8} {:>9} {:>9} {:>10} {:>10} {hits:>6}",
        session.id,
        session.pid,
        session.sequences,
        session.tokens,
        bytes(session.kv_bytes),
        bytes(session.bytes_moved),
    )
}

/// What its methods keep, if they keep anything.
fn kept(session: &SessionReport) -> Option<String> {
    let keeps = |method: &MethodReport| {
        let parts = [(method.digest_bytes, "digests"), (method.memory_bytes, "memory")];
        let parts: Vec<_> = parts
            .into_iter()
            .filter(|(size, _)| *size > 0)
            .map(|(size, what)| format!("{} of {what}", bytes(size)))
            .collect();
        (!parts.is_empty()).then(|| format!("{} for {}", parts.join(" and "), method.method))
    };
    let all: Vec<_> = session.methods.iter().filter_map(keeps).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// What somebody else has chosen, as far as there is room: what could steer a terminal is not passed on.
pub(crate) fn plain(text: &str, characters: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(characters).collect()
}

pub(crate) fn counted(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

pub(crate) fn bytes(n: u64) -> String {
    indicatif::HumanBytes(n).to_string()
}

fn duration(seconds: f64) -> String {
    indicatif::HumanDuration(std::time::Duration::from_secs_f64(seconds.max(0.0))).to_string()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use kvoyant_daemon::quota::AccessReport;
    use kvoyant_daemon::status::{ArenaReport, Totals};

    /// A daemon with one session, whose client has a name that would clear a terminal.
    pub(crate) fn sample() -> StatusReport {
        let session = SessionReport {
            id: 7,
            client: "engine\x1b[2J".into(),
            pid: 4242,
            uid: 0,
            lane: 0,
            model: "tiny".into(),
            sequences: 2,
            tokens: 100,
            pages: 3,
            pages_peak: 0,
            spilled_pages: 0,
            page_bytes: 4096,
            kv_bytes: 12_288,
            extents: 1,
            digest_bytes: 3080,
            methods: [("quest+scout", 1024, 0), ("resv", 8, 2048), ("given", 0, 0)]
                .map(|(method, digest_bytes, memory_bytes)| MethodReport {
                    method: method.into(),
                    digest_bytes,
                    memory_bytes,
                })
                .into(),
            slab_bytes: 0,
            speculations: 1,
            rows_selected: 8,
            rows_hit: 6,
            rows_in_place: 0,
            rows_appended: 1,
            bytes_moved: 0,
            select_ns: 0,
            transfer_ns: 0,
            graph_reports: 0,
            graph_hits: 0,
            graph_misses: 0,
            graph_lost: 0,
            cpu_rows: 3,
            prefetched_rows: 8,
            prefetch_bytes: 2048,
            estimated_rows: 90,
            late_rows: 0,
            pages_written: 0,
            pages_read: 0,
            pages_lost: 0,
            page_wait_ns: 0,
            certified_heads: 10,
            missed_heads: [5, 3, 1, 1, 0],
        };
        StatusReport {
            version: "1.2.3".into(),
            protocol: 1,
            boot_id: "00ff".into(),
            uptime_s: 61.0,
            device: "host".into(),
            gpu: None,
            mode: "slab".into(),
            lanes: 1,
            draining: false,
            log_lines_dropped: 0,
            arena: ArenaReport {
                total_bytes: 1 << 30,
                used_bytes: 64 << 20,
                locked_bytes: 64 << 20,
                pool: PoolReport {
                    made_bytes: 128 << 20,
                    ready_bytes: 64 << 20,
                    pinned_bytes: 64 << 20,
                    huge_bytes: 0,
                    ahead_bytes: 256 << 20,
                    numa_node: Some(1),
                    pin: "mlock".into(),
                    state: PoolState::Failed,
                    trouble: Some("the memlock limit is 0".into()),
                },
            },
            totals: Totals {
                sessions: 1,
                sequences: 2,
                tokens: 100,
                pages: 3,
                kv_bytes: 12_288,
                digest_bytes: 3080,
                slab_bytes: 0,
                bytes_moved: 0,
            },
            spill: Vec::new(),
            store: None,
            sessions: vec![session],
            access: AccessReport::default(),
            users: Vec::new(),
        }
    }

    #[test]
    fn the_words_name_every_session_and_no_control_character_gets_through() {
        let text = words(&sample());
        for part in [
            "1.2.3",
            "1 session,",
            "2 sequences",
            "4242",
            "75 %",
            "64.00 MiB of 1.00 GiB",
            "128.00 MiB of 256.00 MiB ahead",
            "node 1",
            "limit is 0",
            "2.00 KiB ahead of any request; 3 rows attended",
            "keeps 1.00 KiB of digests for quest+scout, 8 B of digests and 2.00 KiB of memory for resv\n",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(!text.contains('\x1b'));
    }
}
