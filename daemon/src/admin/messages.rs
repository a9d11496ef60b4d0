//! Bodies and answers of the admin socket.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::keeper::Kept;
use crate::lane::list::OpenSequence;
use crate::status::{PoolState, SessionStatus, StatusReport};
use crate::tiers::nvme::DeviceState;
use crate::tiers::store::ImageSummary;

/// Open sequences and images, as far as who asks may see them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SequencesReport {
    /// By session.
    pub sequences: Vec<SequenceReport>,
    /// By user and name.
    pub images: Vec<ImageReport>,
    /// Whether the daemon keeps images at all.
    pub keeps_images: bool,
    /// Why images of the remote store are missing, if they are.
    pub remote_error: Option<String>,
}

/// An open sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SequenceReport {
    /// Number of its session.
    pub session: u64,
    /// User of the session's client, as the kernel says.
    pub uid: u32,
    /// Name that the client gave.
    pub client: String,
    /// Its handle: slot and generation, with a dot between them.
    pub sequence: String,
    /// Its method's specification.
    pub method: String,
    /// Tokens that every layer has.
    pub tokens: u64,
    /// Pages in host memory; what forks share counts for each. Absent where counting would have kept a lane too long.
    pub pages: Option<u64>,
    /// Pages on disk alone.
    pub spilled_pages: Option<u64>,
}

impl SequenceReport {
    /// Of what a lane says, and whose it is.
    pub(super) fn new(open: OpenSequence, session: &SessionStatus) -> Self {
        Self {
            session: open.session,
            uid: session.uid,
            client: session.client.clone(),
            sequence: open.sequence.to_string(),
            method: open.method,
            tokens: open.tokens,
            pages: open.pages.map(|[here, _]| here),
            spilled_pages: open.pages.map(|[_, on_disk]| on_disk),
        }
    }
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImageReport {
    /// What its user calls it.
    pub name: String,
    /// Whose it is; absent where that cannot be known.
    pub uid: Option<u32>,
    /// `sequence` or `prefix`; absent, like what follows, where it is damaged.
    pub kind: Option<String>,
    /// Tokens that it is worth.
    pub tokens: Option<u32>,
    /// Bytes of its parts, as far as they are known.
    pub bytes: u64,
    /// When it was made, in seconds since 1970.
    pub created_unix: Option<u64>,
    /// Whatever its owner calls it besides.
    pub label: Option<String>,
    /// Where it is.
    pub kept: Kept,
    /// What is wrong with it.
    pub damaged: Option<String>,
}

impl ImageReport {
    /// Of what a store says. Names of sequences carry their user: `u1000.chat`.
    pub(super) fn new(summary: &ImageSummary, kept: Kept) -> Self {
        let id = summary.id.as_str();
        let named = id.strip_prefix('u').and_then(|rest| rest.split_once('.'));
        let named = named.and_then(|(uid, name)| Some((uid.parse::<u32>().ok()?, name.to_owned())));
        let facts = summary.content.as_ref().ok();
        // One that says to be somebody else's than its name does is nobody's.
        let uid = match (&named, facts) {
            (Some((uid, _)), Some(facts)) => (*uid == facts.uid).then_some(*uid),
            (Some((uid, _)), None) => Some(*uid),
            (None, facts) => facts.map(|facts| facts.uid),
        };
        Self {
            name: named.map_or_else(|| id.to_owned(), |(_, name)| name),
            uid,
            kind: facts.map(|facts| facts.kind.to_string()),
            tokens: facts.map(|facts| facts.tokens),
            bytes: summary.bytes,
            created_unix: facts.map(|facts| facts.created_unix),
            label: facts.map(|facts| facts.label.clone()),
            kept,
            damaged: summary.content.as_ref().err().map(ToString::to_string),
        }
    }
}

/// Suspend an open sequence while its client lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SuspendOrder {
    /// Its session.
    pub session: u64,
    /// Its handle: slot and generation, with a dot between them.
    pub sequence: String,
    /// What the image is to be called.
    pub image: String,
    /// Whether an image of that name is replaced.
    #[serde(default)]
    pub overwrite: bool,
    /// Whatever one calls it besides.
    #[serde(default)]
    pub label: String,
}

/// Copy an image from the remote store, if it is only there, and compare all of it with its checksums.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BringOrder {
    /// What it is called.
    pub image: String,
    /// Whose it is; without it, the caller's.
    #[serde(default)]
    pub uid: Option<u32>,
}

/// Something was done to an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Done {
    /// What it is called.
    pub image: String,
    /// Whose it is.
    pub uid: u32,
}

/// What is answered instead of what was asked for.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(super) struct ErrorBody {
    /// Why, and what to do.
    pub(super) error: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::store::{Damage, ImageFacts, ImageKind};

    fn summary(id: &str, uid: Option<u32>) -> ImageSummary {
        let facts = |uid| ImageFacts {
            kind: ImageKind::Sequence,
            tokens: 7,
            created_unix: 1,
            fingerprint: String::new(),
            uid,
            label: String::new(),
        };
        let content = uid.map(facts).ok_or(Damage::Missing { file: "pages".into() });
        ImageSummary { id: id.parse().unwrap(), bytes: 1, content }
    }

    #[test]
    fn an_image_is_its_users_if_its_name_and_its_manifest_agree() {
        let report = |id, uid| ImageReport::new(&summary(id, uid), Kept::Here);
        let image = report("u1000.chat.7", Some(1000));
        assert_eq!((image.name.as_str(), image.uid, image.tokens), ("chat.7", Some(1000), Some(7)));
        assert_eq!(report("u1000.chat", Some(1001)).uid, None);
        let damaged = report("u1000.chat", None);
        assert_eq!((damaged.uid, damaged.tokens), (Some(1000), None));
        assert_eq!(damaged.damaged.as_deref(), Some("pages is missing"));
        let other = report("u-7.chat", Some(3));
        assert_eq!((other.name.as_str(), other.uid), ("u-7.chat", Some(3)));
        assert_eq!(report("prefix", None).uid, None);
    }
}

/// How the daemon is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Health {
    /// Whether a new session would be served.
    pub ready: bool,
    /// What is not as it should be, each with what to do; nothing, in the best case.
    pub troubles: Vec<String>,
}

impl Health {
    /// By the daemon's status.
    pub(super) fn of(status: &StatusReport) -> Self {
        let lost = status.gpu.as_ref().and_then(|gpu| gpu.lost.clone());
        let lost = lost.map(|reason| {
            format!("the device is lost: {reason}; the daemon ends, and its supervisor starts it again")
        });
        let pool = &status.arena.pool;
        let trouble = pool.trouble.as_ref().filter(|_| pool.state == PoolState::Failed);
        let pool = trouble.map(|reason| format!("extents are not as configured: {reason}"));
        let disks = status.spill.iter().filter_map(|device| match &device.state {
            DeviceState::Serving => None,
            DeviceState::Failed(reason) => Some(format!(
                "{} takes no more pages: {reason}; replace it and restart",
                device.path.display()
            )),
        });
        let remote = status.store.as_ref().and_then(|store| store.remote_error.clone());
        let remote = remote.map(|reason| format!("the remote store does not answer: {reason}"));
        let draining = status.draining.then(|| {
            "the daemon is being drained and takes no new sessions; `kvoyant drain --undo` has it take them again".to_owned()
        });
        let ready = lost.is_none() && !status.draining;
        let dropped = status.log_lines_dropped;
        let log = (dropped > 0)
            .then(|| format!("{dropped} lines of the log were dropped: nobody reads its standard error"));
        let troubles = lost.into_iter().chain(draining).chain(log).chain(pool).chain(disks).chain(remote);
        Self { ready, troubles: troubles.collect() }
    }
}
