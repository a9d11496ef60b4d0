//! The admin socket: HTTP over a Unix socket, JSON bodies and answers.
//!
//! What can be asked is in one table (`api`), which the router goes by and the OpenAPI file is made of (docs/openapi.json).
//!
//! What cannot be done is answered with its HTTP status and `{"error": "…"}`, a sentence that says what to do.
//!
//! With `monitor` set to a loopback address, metrics, health and the dashboard, which name no process and nothing that clients have named,
//! are answered over TCP as well: what Prometheus scrapes, and a browser shows. Whoever sends the token (`monitor_token`) has everything
//! there.
//!
//! Whoever may connect sees the status. Sequences and images are shown to, and changed by, the user whose they are, root, and the
//! daemon's own user; nobody else. The daemon as a whole is changed by the last two alone.
//!
//! | room | what lives there |
//! |---|---|
//! | `api` | what can be asked, and by whom |
//! | `messages`, `reports` | bodies and answers: about sequences and images, about the daemon |
//! | `caller` | who asks, and what of |
//! | `refusal` | why something is not done, and its HTTP status |
//! | `server` | connections |
//! | `patient` | a stream that gives up on who does not read |
//! | `token` | what stands for the daemon's user over TCP |
//! | `routes`, `operate` | what each request does: about sequences and images, about the daemon |
//! | `dashboard` | the page for a browser |
//! | `client` | the other side |

mod api;
mod caller;
mod client;
mod dashboard;
mod messages;
mod operate;
mod patient;
mod refusal;
mod reports;
mod routes;
mod server;
mod token;

use std::time::Duration;

pub(crate) use client::answers;
pub use client::{
    AdminError, bring_image, drain, evict, fetch_config, fetch_draining, fetch_log, fetch_sequences,
    fetch_status, reload_config, remove_image, set_config, set_log, suspend_sequence,
};
pub use messages::{BringOrder, Done, Health, ImageReport, SequenceReport, SequencesReport, SuspendOrder};
pub use reports::{
    ChangeReport, Changed, ConfigPatch, ConfigReport, ConfigValue, DeviceState, DevicesReport, DrainReport,
    EvictOrder, EvictReport, KnownMethod, LaneReport, LanesReport, LogReport, MethodsReport, TiersReport,
};
pub use server::serve;
pub(crate) use server::serve_tcp;
pub(crate) use token::Token;
pub use token::TokenError;

/// How long an image may take to be written, read or erased: as long as its disk. It goes on when nobody waits any more.
const WORK_TIMEOUT: Duration = Duration::from_secs(600);

/// How long the remote store's part of a list is waited for.
const REMOTE_LIST_TIMEOUT: Duration = Duration::from_secs(15);

/// How long lanes may take to list their sequences, or to give a sign of life.
const LANES_TIMEOUT: Duration = Duration::from_secs(5);
