//! What a monitoring system reads: text of OpenMetrics or of Prometheus, made when it is asked for.
//!
//! Lanes count what they do in their sessions' [`SessionStatus`](crate::status::SessionStatus); a session that ends is added to what
//! its user's have done before, under the registry's lock, so that no counter ever goes back while the daemon lives. Nothing is
//! labelled by session: names that clients choose would make as many time series as they like. (An exemplar of a time's bucket does name a
//! session's request: it is no series.) Users are told apart, up to
//! [`USERS_MAX`].
//!
//! | room | what lives there |
//! |---|---|
//! | `histogram` | times by buckets |
//! | `done` | what sessions have done, by user |
//! | `endings` | how sessions end |
//! | `seen` | deadlines, comparisons with exact attention, what clients say of themselves |
//! | `text`, `sights` | the text |
//! | `otlp` | the same for OpenTelemetry |

mod done;
mod endings;
mod histogram;
mod otlp;
mod seen;
mod sights;
mod text;

pub use done::{Done, OTHERS, USERS_MAX, Users};
pub use endings::{Endings, HOWS, How};
pub use histogram::{BUCKETS, BUCKETS_US, Counts, Example, Histogram, STAGES, Times, WHOLE};
pub use otlp::collector;
pub(crate) use otlp::export;
pub use seen::{
    COVERED, Check, Checked, DEADLINE_US, LAYERS_MAX, QUERIES, Query, REJECTIONS, Rejection, Seen, Sights,
    Slack,
};
pub use text::{Format, Snapshot};
