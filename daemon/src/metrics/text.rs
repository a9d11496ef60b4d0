//! The text, by the `prometheus-client` crate: it knows the format, we say what there is.

use std::fmt;

use kvoyant_protocol::wire::{Stat, Told};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet, prometheus_text, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::done::{Done, OTHERS, Users};
use super::histogram::{Example, STAGES, WHOLE};
use super::sights;
use crate::status::{PoolState, StatusReport};
use crate::tiers::nvme::{DeviceState, LATENCY_BUCKETS_US};

/// What a text can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// What Prometheus asks for first.
    OpenMetrics,
    /// What everybody else reads.
    Text,
}

impl Format {
    /// What the asker takes, by the `Accept` header of the request.
    #[must_use]
    pub fn accepted(header: &str) -> Self {
        if header.contains("application/openmetrics-text") { Self::OpenMetrics } else { Self::Text }
    }

    /// The `Content-Type` that goes with it.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => prometheus_text::CONTENT_TYPE,
        }
    }
}

/// Everything that the text says, at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// How things are.
    pub status: StatusReport,
    /// What has been done, by user, open sessions included.
    pub users: Users,
    /// How sessions ended.
    pub endings: Vec<(&'static str, u64)>,
    /// Bytes of sessions' files of tables and digests in which nothing is, and the longest span of them.
    pub table_room: [u64; 2],
}

impl Snapshot {
    /// As text.
    ///
    /// # Errors
    /// None that memory does not make.
    pub fn text(self, format: Format) -> Result<String, fmt::Error> {
        let examples = self.users.all().examples;
        let mut registry = Registry::with_prefix("kvoyant");
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        match format {
            Format::OpenMetrics => {
                text::encode(&mut text, &registry)?;
                text = with_examples(&text, &examples);
            }
            Format::Text => prometheus_text::encode(&mut text, &registry)?,
        }
        Ok(text)
    }
}

/// Writes families, one after the other.
pub(super) struct Page<'a>(DescriptorEncoder<'a>);

pub(super) type Labels = [(&'static str, String)];

impl Page<'_> {
    /// One family; nothing of it where there are no values.
    fn family<M: EncodeMetric>(
        &mut self,
        (name, unit): (&str, Option<Unit>),
        help: &str,
        values: &[(&Labels, f64)],
        metric: fn(f64) -> M,
    ) -> fmt::Result {
        let Some((_, first)) = values.first() else { return Ok(()) };
        let kind = metric(*first).metric_type();
        let mut family = self.0.encode_descriptor(name, help, unit.as_ref(), kind)?;
        for (labels, value) in values {
            metric(*value).encode(family.encode_family(labels)?)?;
        }
        Ok(())
    }

    fn gauges(&mut self, name: (&str, Option<Unit>), help: &str, values: &[(&Labels, f64)]) -> fmt::Result {
        self.family(name, help, values, ConstGauge::new)
    }

    pub(super) fn counters(
        &mut self,
        name: (&str, Option<Unit>),
        help: &str,
        values: &[(&Labels, f64)],
    ) -> fmt::Result {
        self.family(name, help, values, ConstCounter::new)
    }

    /// The head of a family of histograms, which are to follow.
    pub(super) fn histogram<'p>(
        &'p mut self,
        name: &'p str,
        unit: &'p Option<Unit>,
        help: &'p str,
    ) -> Result<MetricEncoder<'p>, fmt::Error> {
        self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Histogram)
    }

    fn gauge(&mut self, name: (&str, Option<Unit>), help: &str, value: f64) -> fmt::Result {
        self.gauges(name, help, &[(&[], value)])
    }

    pub(super) fn counter(&mut self, name: (&str, Option<Unit>), help: &str, value: f64) -> fmt::Result {
        self.counters(name, help, &[(&[], value)])
    }
}

/// A share of a whole.
pub(super) fn ratio() -> Option<Unit> {
    Some(Unit::Other("ratio".into()))
}

const BYTES: Option<Unit> = Some(Unit::Bytes);
pub(super) const SECONDS: Option<Unit> = Some(Unit::Seconds);

pub(super) fn seconds(ns: u64) -> f64 {
    ns as f64 * 1e-9
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        let all = self.users.all();
        self.daemon(&mut page)?;
        self.memory(&mut page)?;
        work(&all, &mut page)?;
        quality(&all, &mut page)?;
        sights::write(&all.sights, &mut page)?;
        times(&all, &mut page)?;
        self.disk(&all, &mut page)?;
        self.by_user(&mut page)?;
        self.gpu(&mut page)
    }
}

impl Snapshot {
    fn daemon(&self, page: &mut Page<'_>) -> fmt::Result {
        let status = &self.status;
        let build = [
            ("version", status.version.clone()),
            ("protocol", status.protocol.to_string()),
            ("device", status.device.clone()),
            ("mode", status.mode.clone()),
            ("boot_id", status.boot_id.clone()),
        ];
        page.gauges(("build", None), "What runs; always 1", &[(&build, 1.0)])?;
        page.gauge(("uptime", SECONDS), "Time since the daemon's start", status.uptime_s)?;
        page.gauge(("lanes", None), "Threads that serve sessions", status.lanes as f64)?;
        let draining = f64::from(u8::from(status.draining));
        page.gauge(("draining", None), "1 while no new sessions are taken", draining)?;
        page.counter(
            ("log_lines_dropped", None),
            "Lines of the log that were dropped because nobody read it",
            status.log_lines_dropped as f64,
        )?;
        let totals = &status.totals;
        page.gauge(("sessions", None), "Sessions that are open", totals.sessions as f64)?;
        page.gauge(("sequences", None), "Sequences that are open", totals.sequences as f64)?;
        page.gauge(
            ("tokens", None),
            "Tokens in open sequences; what forks share counts for each",
            totals.tokens as f64,
        )?;
        let endings: Vec<_> =
            self.endings.iter().map(|(how, n)| ([("how", (*how).to_owned())], *n as f64)).collect();
        let endings: Vec<(&Labels, f64)> = endings.iter().map(|(labels, n)| (&labels[..], *n)).collect();
        let help = "Sessions that have ended, and attempts at one: left, reaped (without a word, also by dying), rejected (broke the protocol), refused, failed, too_slow";
        page.counters(("sessions_ended", None), help, &endings)
    }

    fn memory(&self, page: &mut Page<'_>) -> fmt::Result {
        let (arena, totals) = (&self.status.arena, &self.status.totals);
        let pool = &arena.pool;
        page.gauge(
            ("arena_size", BYTES),
            "Host memory that sessions may have together",
            arena.total_bytes as f64,
        )?;
        page.gauge(("arena_used", BYTES), "Host memory in extents of sessions", arena.used_bytes as f64)?;
        page.gauge(
            ("arena_locked", BYTES),
            "Host memory that is locked or pinned, in use or ready",
            arena.locked_bytes as f64,
        )?;
        page.gauge(
            ("pool_ready", BYTES),
            "Extents that a session could have at once",
            pool.ready_bytes as f64,
        )?;
        page.gauge(
            ("pool_huge", BYTES),
            "Extents in huge pages that were set aside",
            pool.huge_bytes as f64,
        )?;
        let failed = f64::from(u8::from(pool.state == PoolState::Failed));
        page.gauge(("pool_failed", None), "1 if extents could not be made or pinned as configured", failed)?;
        page.gauge(
            ("kv", BYTES),
            "Pages of K and V in use; what forks share counts once",
            totals.kv_bytes as f64,
        )?;
        page.gauge(("digest", BYTES), "Digests, states and memories of methods", totals.digest_bytes as f64)?;
        page.gauge(("slab_used", BYTES), "Slab pages in use", totals.slab_bytes as f64)?;
        let arena = arena.total_bytes.saturating_sub(arena.used_bytes);
        let mut free = vec![("arena", arena as f64), ("tables", self.table_room[1] as f64)];
        free.extend(
            self.status
                .gpu
                .as_ref()
                .map(|gpu| ("device", gpu.set_aside_bytes.saturating_sub(gpu.used_bytes) as f64)),
        );
        let disks = self.status.spill.iter().map(|disk| disk.total_bytes.saturating_sub(disk.used_bytes));
        free.extend(disks.max().map(|bytes| ("spill", bytes as f64)));
        let labels: Vec<_> = free.iter().map(|(of, _)| [("of", (*of).to_owned())]).collect();
        let values: Vec<(&Labels, f64)> =
            labels.iter().zip(&free).map(|(labels, (_, bytes))| (&labels[..], *bytes)).collect();
        let help = "Largest free region: arena, device and spill are given out in units any of which will do; tables are the files that sessions have \
                    for page tables and digests, where a region is in one piece";
        page.gauges(("largest_free", BYTES), help, &values)?;
        page.gauge(
            ("tables_free", BYTES),
            "Files of page tables and digests in which nothing is, all sessions together; far above largest_free: in small pieces",
            self.table_room[0] as f64,
        )
    }

    fn disk(&self, all: &Done, page: &mut Page<'_>) -> fmt::Result {
        let count = |stat| all.stat(stat) as f64;
        page.counter(
            ("pages_written", None),
            "Pages that left host memory for a disk",
            count(Stat::PagesWritten),
        )?;
        page.counter(("pages_read", None), "Pages that came back from a disk", count(Stat::PagesRead))?;
        page.counter(
            ("pages_lost", None),
            "Pages that could not be read back whole",
            count(Stat::PagesLost),
        )?;
        let waited = seconds(all.stat(Stat::PageWaitNs));
        page.counter(("page_wait", SECONDS), "Time that answers waited for pages from a disk", waited)?;
        let spilled: u64 = self.status.sessions.iter().map(|session| session.spilled_pages).sum();
        page.gauge(("pages_spilled", None), "Pages that are on a disk alone", spilled as f64)?;
        let devices = &self.status.spill;
        let labels: Vec<_> = devices.iter().map(|d| [("path", d.path.display().to_string())]).collect();
        let of = |value: &dyn Fn(usize) -> f64| -> Vec<(&Labels, f64)> {
            labels.iter().enumerate().map(|(i, labels)| (&labels[..], value(i))).collect()
        };
        page.gauges(
            ("spill_size", BYTES),
            "Room for pages on a disk",
            &of(&|i| devices[i].total_bytes as f64),
        )?;
        page.gauges(
            ("spill_used", BYTES),
            "Room for pages on a disk that is taken",
            &of(&|i| devices[i].used_bytes as f64),
        )?;
        let failed = |i: usize| f64::from(u8::from(devices[i].state != DeviceState::Serving));
        page.gauges(("spill_failed", None), "1 if a disk takes no more pages", &of(&failed))?;
        page.counters(
            ("spill_read", BYTES),
            "Bytes of pages read from a disk",
            &of(&|i| devices[i].read_bytes as f64),
        )?;
        page.counters(
            ("spill_written", BYTES),
            "Bytes of pages written to a disk",
            &of(&|i| devices[i].written_bytes as f64),
        )?;
        page.counters(
            ("spill_late_reads", None),
            "Pages that came after their deadline",
            &of(&|i| devices[i].late_reads as f64),
        )?;
        let failures = |i: usize| (devices[i].read_failures + devices[i].write_failures) as f64;
        page.counters(("spill_failures", None), "Pages that could not be read or written", &of(&failures))?;
        if devices.is_empty() {
            return Ok(());
        }
        // Only buckets are kept: a sum of their ends is an upper bound of the true one.
        let help =
            "Reads of pages from submission to report; the sum is an upper bound, from the buckets' ends";
        let mut family =
            page.0.encode_descriptor("spill_read_time", help, SECONDS.as_ref(), MetricType::Histogram)?;
        for (device, labels) in devices.iter().zip(&labels) {
            let ends = LATENCY_BUCKETS_US.iter().map(|us| *us as f64 / 1e6).chain([f64::INFINITY]);
            let buckets: Vec<_> = ends.zip(device.read_latency.iter().copied()).collect();
            let last = LATENCY_BUCKETS_US[LATENCY_BUCKETS_US.len() - 1] as f64 / 1e6;
            let sum = buckets.iter().map(|(end, n)| end.min(last) * *n as f64).sum();
            let count = buckets.iter().map(|(_, n)| n).sum();
            family.encode_family(labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }

    fn by_user(&self, page: &mut Page<'_>) -> fmt::Result {
        let users: Vec<_> = self.users.0.iter().collect();
        let name = |uid: u32| if uid == OTHERS { "others".to_owned() } else { uid.to_string() };
        let labels: Vec<_> = users.iter().map(|(uid, _)| [("uid", name(**uid))]).collect();
        let of = |value: &dyn Fn(&Done) -> f64| -> Vec<(&Labels, f64)> {
            labels.iter().zip(&users).map(|(labels, (_, done))| (&labels[..], value(done))).collect()
        };
        page.counters(
            ("user_sessions", None),
            "Sessions that have begun, by user",
            &of(&|done| done.sessions as f64),
        )?;
        let requests = |done: &Done| done.stat(Stat::Speculations) as f64;
        page.counters(("user_requests", None), "Speculations answered, by user", &of(&requests))?;
        let moved = |done: &Done| done.stat(Stat::BytesMoved) as f64;
        page.counters(("user_moved", BYTES), "Bytes copied to the device for answers, by user", &of(&moved))?;
        let mut held: std::collections::BTreeMap<u32, (f64, f64)> =
            self.users.0.keys().map(|uid| (*uid, (0.0, 0.0))).collect();
        for session in &self.status.sessions {
            let uid = if held.contains_key(&session.uid) { session.uid } else { OTHERS };
            let (sequences, bytes) = held.entry(uid).or_default();
            *sequences += session.sequences as f64;
            *bytes += (session.kv_bytes + session.digest_bytes) as f64;
        }
        let labels: Vec<_> = held.keys().map(|uid| [("uid", name(*uid))]).collect();
        let of = |value: &dyn Fn(&(f64, f64)) -> f64| -> Vec<(&Labels, f64)> {
            labels.iter().zip(held.values()).map(|(labels, held)| (&labels[..], value(held))).collect()
        };
        page.gauges(("user_sequences", None), "Sequences that are open, by user", &of(&|held| held.0))?;
        page.gauges(("user_held", BYTES), "Pages and digests that are held, by user", &of(&|held| held.1))
    }

    fn gpu(&self, page: &mut Page<'_>) -> fmt::Result {
        let Some(gpu) = &self.status.gpu else { return Ok(()) };
        page.gauge(
            ("device_size", BYTES),
            "Memory of the device that sessions may have together",
            gpu.set_aside_bytes as f64,
        )?;
        page.gauge(
            ("device_used", BYTES),
            "Memory of the device in slabs and boards",
            gpu.used_bytes as f64,
        )?;
        let quarantined = gpu.quarantined_bytes as f64;
        page.gauge(
            ("device_quarantined", BYTES),
            "Of that, of ended sessions whose processes may still have it open",
            quarantined,
        )?;
        let lost = f64::from(u8::from(gpu.lost.is_some()));
        page.gauge(("device_lost", None), "1 once the device does not work any more", lost)?;
        let engines = ["dma", "staged", "zerocopy"].map(|engine| [("engine", engine.to_owned())]);
        let values: Vec<(&Labels, f64)> =
            engines.iter().zip(gpu.transfers).map(|(labels, n)| (&labels[..], n as f64)).collect();
        page.counters(("transfers", None), "Transfers to the device, by engine", &values)
    }
}

/// What has been asked for, and how much of it had to be moved.
fn work(all: &Done, page: &mut Page<'_>) -> fmt::Result {
    let count = |stat| all.stat(stat) as f64;
    page.counter(("requests", None), "Speculations answered", count(Stat::Speculations))?;
    let by = [
        ("lane", count(Stat::Speculations)),
        ("client", all.sights.told[Told::SelectedHere as usize] as f64),
    ];
    let labels = by.map(|(by, _)| [("by", by.to_owned())]);
    let values: Vec<(&Labels, f64)> =
        labels.iter().zip(by).map(|(labels, (_, n))| (&labels[..], n)).collect();
    page.counters(
        ("selections", None),
        "Selections, by who made them: lanes (one for each answer), or clients in their own threads, as they say (one for each sequence and layer)",
        &values,
    )?;
    page.counter(
        ("rows_appended", None),
        "Rows appended, all layers and heads together",
        count(Stat::RowsAppended),
    )?;
    page.counter(("rows_selected", None), "Rows selected", count(Stat::RowsSelected))?;
    let found = [("resident", Stat::RowsHit), ("in_place", Stat::RowsInPlace), ("graph", Stat::GraphHits)];
    let labels = found.map(|(how, _)| [("how", how.to_owned())]);
    let values: Vec<(&Labels, f64)> =
        labels.iter().zip(found).map(|(labels, (_, stat))| (&labels[..], count(stat))).collect();
    page.counters(("rows_found", None), "Selected rows that nothing had to be moved for", &values)?;
    page.counter(("rows_attended_by_cpu", None), "Rows attended by the daemon's CPU", count(Stat::CpuRows))?;
    page.counter(
        ("rows_prefetched", None),
        "Rows brought to the device ahead of any request",
        count(Stat::PrefetchedRows),
    )?;
    let why = [("answer", Stat::BytesMoved), ("prefetch", Stat::PrefetchBytes)];
    let labels = why.map(|(why, _)| [("for", why.to_owned())]);
    let values: Vec<(&Labels, f64)> =
        labels.iter().zip(why).map(|(labels, (_, stat))| (&labels[..], count(stat))).collect();
    page.counters(("moved", BYTES), "Bytes copied to the device", &values)?;
    let graph = [("read", Stat::GraphReports), ("lost", Stat::GraphLost)];
    let labels = graph.map(|(how, _)| [("how", how.to_owned())]);
    let values: Vec<(&Labels, f64)> =
        labels.iter().zip(graph).map(|(labels, (_, stat))| (&labels[..], count(stat))).collect();
    page.counters(("graph_reports", None), "Reports of kernels in graph mode", &values)?;
    page.counter(
        ("graph_misses", None),
        "Rows that kernels of graph mode read over the link",
        count(Stat::GraphMisses),
    )
}

/// What answers may have missed.
fn quality(all: &Done, page: &mut Page<'_>) -> fmt::Result {
    page.counter(
        ("rows_estimated", None),
        "Rows that answers left out and estimated, all query heads together",
        all.stat(Stat::EstimatedRows) as f64,
    )?;
    page.counter(
        ("rows_late", None),
        "Rows left out of answers because they would have come after their deadline",
        all.stat(Stat::LateRows) as f64,
    )?;
    let buckets = [
        (0.001, all.stat(Stat::MissedTo0001)),
        (0.01, all.stat(Stat::MissedTo001)),
        (0.05, all.stat(Stat::MissedTo005)),
        (0.2, all.stat(Stat::MissedTo02)),
        (f64::INFINITY, all.stat(Stat::MissedMore)),
    ];
    let sum = buckets.iter().map(|(end, n)| end.min(1.0) * *n as f64).sum();
    let count = buckets.iter().map(|(_, n)| n).sum();
    let help = "Query heads by the share of a layer's attention that they may have missed at most, as lanes can tell; the sum is an upper bound, from the buckets' ends";
    page.0
        .encode_descriptor("missed_mass", help, ratio().as_ref(), MetricType::Histogram)?
        .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
}

fn times(all: &Done, page: &mut Page<'_>) -> fmt::Result {
    let help = "Requests by the time that each stage took: queue (arrival until the lane took it), select (selection and planning), transfer (plan until the last byte), whole";
    let mut family =
        page.0.encode_descriptor("request_time", help, SECONDS.as_ref(), MetricType::Histogram)?;
    for (stage, counts) in STAGES.iter().zip(&all.times) {
        let labels = [("stage", *stage)];
        let (buckets, sum) = (counts.in_seconds(), seconds(counts.sum_ns));
        family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(sum, counts.count(), &buckets, None)?;
    }
    Ok(())
}

/// The text with an example behind each bucket of whole requests: what its session, ticket and layer are in the log. The crate has no way to
/// be given an exemplar that it has not observed itself.
fn with_examples(text: &str, examples: &[Option<Example>]) -> String {
    let stage = format!("stage=\"{WHOLE}\"");
    let mut examples = examples.iter();
    let mut with = String::with_capacity(text.len() + 1024);
    for line in text.lines() {
        with.push_str(line);
        let is_bucket = line.starts_with("kvoyant_request_time_seconds_bucket{") && line.contains(&stage);
        if is_bucket && let Some(Some(Example { session, ticket, layer, ns })) = examples.next() {
            let labels = format!("session=\"{session}\",ticket=\"{ticket}\",layer=\"{layer}\"");
            with.push_str(&format!(" # {{{labels}}} {}", seconds(*ns)));
        }
        with.push('\n');
    }
    with
}
