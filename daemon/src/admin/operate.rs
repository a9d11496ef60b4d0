//! What operators ask of the daemon as a whole: how it is in parts, and what they change while it runs.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvoyant_methods::registry::METHODS;
use serde_json::{Value, json};

use super::caller::Caller;
use super::refusal::Refusal;
use super::reports::{
    Changed, ConfigPatch, ConfigReport, ConfigValue, DeviceState, DevicesReport, DrainReport, EvictOrder,
    EvictReport, KnownMethod, LaneReport, LanesReport, LogReport, MethodsReport, TiersReport,
};
use super::routes::{Routes, allow, handle};
use crate::config::document;
use crate::control::OrderError;
use crate::settings::{Changes, SetError, Settings};
use crate::status::MethodReport;

impl Routes {
    pub(super) fn config(&self) -> ConfigReport {
        let all = document::effective_json(&self.plane.config(), false);
        let Value::Object(all) = all else { return ConfigReport::new() };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let value = |(key, entry): (String, Value)| {
            let (from, changes) = (text(&entry["from"]), text(&entry["changes"]));
            (key, ConfigValue { value: entry["value"].clone(), from, changes })
        };
        all.into_iter().map(value).collect()
    }

    pub(super) async fn set_config(&self, patch: ConfigPatch, caller: Caller) -> Result<Changed, Refusal> {
        let keys: Vec<_> = patch.keys().cloned().collect();
        let changed: Changed = self.change(move |settings| settings.set(&json!(patch))).await?.into();
        for change in &changed.changed {
            tracing::info!("{} sets {}: {} -> {}", caller.name(), change.key, change.from, change.to);
        }
        tracing::debug!("{} has set {keys:?}", caller.name());
        Ok(changed)
    }

    pub(super) async fn reload(&self, caller: Caller) -> Result<Changed, Refusal> {
        let changes = self.change(Settings::reload).await?;
        tracing::info!(changed = changes.made.len(), "{} has the configuration read again", caller.name());
        changes.log();
        Ok(changes.into())
    }

    /// Files and names of users may be on a network, which nobody else waits for.
    async fn change(
        &self,
        change: impl FnOnce(&Settings) -> Result<Changes, SetError> + Send + 'static,
    ) -> Result<Changes, Refusal> {
        let settings = Arc::clone(self.plane.settings());
        let done = tokio::task::spawn_blocking(move || change(&settings)).await;
        let changes = done.map_err(|error| Refusal::Internal(error.to_string()))?;
        changes.map_err(Refusal::Setting)
    }

    pub(super) fn log(&self) -> LogReport {
        LogReport {
            filter: self.plane.config().config.log.clone(),
            dropped_lines: crate::log::dropped_lines(),
        }
    }

    pub(super) async fn set_log(&self, wanted: LogReport, caller: Caller) -> Result<LogReport, Refusal> {
        self.set_config(ConfigPatch::from([("log".to_owned(), wanted.filter.into())]), caller).await?;
        Ok(self.log())
    }

    pub(super) fn draining(&self) -> DrainReport {
        let registry = self.plane.registry();
        DrainReport { draining: registry.is_draining(), sessions: registry.open_sessions().len() as u64 }
    }

    pub(super) fn drain(&self, draining: bool, caller: Caller) -> DrainReport {
        if self.plane.registry().drain(draining) {
            let what = if draining { "no new sessions" } else { "new sessions again" };
            tracing::info!("{} has the daemon take {what}", caller.name());
        }
        self.draining()
    }

    pub(super) async fn evict(&self, order: EvictOrder, caller: Caller) -> Result<EvictReport, Refusal> {
        let evicted = match order {
            EvictOrder { session: None, sequence: Some(_) } => {
                return Err(Refusal::Body("a sequence is named, and not its session".into()));
            }
            EvictOrder { session: None, sequence: None } => {
                if !caller.operates() {
                    return Err(Refusal::Operators { caller: caller.uid });
                }
                self.plane.evict_all().await
            }
            EvictOrder { session: Some(session), sequence } => {
                let sequence = match sequence {
                    None => None,
                    Some(text) => Some(handle(&text).ok_or(Refusal::Handle { text })?),
                };
                let owner =
                    self.plane.registry().session(session).ok_or(OrderError::NoSession { session })?.uid;
                allow(caller, owner)?;
                self.plane.evict(session, sequence).await?
            }
        };
        tracing::info!(
            pages = evicted.pages,
            extent_bytes = evicted.extent_bytes,
            "{} evicts",
            caller.name()
        );
        Ok(EvictReport {
            pages: evicted.pages,
            page_bytes: evicted.page_bytes,
            extent_bytes: evicted.extent_bytes,
            unfinished: evicted.unfinished,
        })
    }

    pub(super) fn devices(&self) -> DevicesReport {
        let status = self.plane.registry().report();
        let device = DeviceState {
            name: status.device,
            mode: status.mode,
            slab_bytes: status.totals.slab_bytes,
            bytes_moved: status.totals.bytes_moved,
            gpu: status.gpu,
        };
        DevicesReport { devices: vec![device] }
    }

    pub(super) fn tiers(&self) -> TiersReport {
        let status = self.plane.registry().report();
        TiersReport { arena: status.arena, spill: status.spill, store: status.store }
    }

    pub(super) fn lanes(&self) -> LanesReport {
        let (status, loaded) = (self.plane.registry().report(), self.plane.config());
        let lane = |(lane, rounds): (usize, u64)| {
            let sessions = || status.sessions.iter().filter(move |session| session.lane == lane);
            LaneReport {
                lane,
                cpu: loaded.config.lane_cpus.get(lane).copied(),
                rounds,
                sessions: sessions().map(|session| session.id).collect(),
                speculations: sessions().map(|session| session.speculations).sum(),
            }
        };
        LanesReport { lanes: self.plane.rounds().into_iter().enumerate().map(lane).collect() }
    }

    pub(super) fn methods(&self) -> MethodsReport {
        let mut used = BTreeMap::<String, MethodReport>::new();
        for kept in self.plane.registry().report().sessions.into_iter().flat_map(|session| session.methods) {
            let entry = used.entry(kept.method.clone());
            let sum = entry.or_insert(MethodReport { method: kept.method, digest_bytes: 0, memory_bytes: 0 });
            sum.digest_bytes += kept.digest_bytes;
            sum.memory_bytes += kept.memory_bytes;
        }
        let known =
            METHODS.iter().map(|entry| KnownMethod { name: entry.name.into(), about: entry.about.into() });
        MethodsReport { methods: known.collect(), used: used.into_values().collect() }
    }
}
