//! The admin socket: HTTP over a Unix socket, JSON bodies and answers.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status` | a [`StatusReport`](crate::status::StatusReport) |
//! | `GET /metrics` | text for Prometheus: see [`metrics`](crate::metrics) |
//! | `GET /health` | a [`Health`], if the lanes answer |
//! | `GET /ready` | the same, with status 503 where a new session could not be served |
//! | `GET /dashboard` | a page for a browser, which draws the metrics |
//! | `GET /v1/sequences` | a [`SequencesReport`]: open sequences, and images |
//! | `POST /v1/sequences/suspend` with a [`SuspendOrder`] | [`Done`], once the image is kept and the sequence closed |
//! | `POST /v1/images/bring` with a [`BringOrder`] | an [`ImageReport`], once the image is here and every byte compared |
//! | `DELETE /v1/images/<uid>/<name>` | [`Done`], once the image is erased wherever it was |
//!
//! What cannot be done is answered with its HTTP status and `{"error": "…"}`, a sentence that says what to do.
//!
//! With `monitor` set to a loopback address, metrics, health and the page, which name no process and nothing that clients have named, are
//! answered over TCP as well: what Prometheus scrapes, and a browser shows.
//!
//! Whoever may connect sees the status. Sequences and images are shown to, and changed by, the user whose they are, root, and the
//! daemon's own user; nobody else.
//!
//! | room | what lives there |
//! |---|---|
//! | `messages` | bodies and answers |
//! | `caller` | who asks, and what of |
//! | `refusal` | why something is not done, and its HTTP status |
//! | `server` | connections |
//! | `patient` | a stream that gives up on who does not read |
//! | `routes` | what each request does |
//! | `dashboard` | the page |
//! | `client` | the other side |

mod caller;
mod client;
mod dashboard;
mod messages;
mod patient;
mod refusal;
mod routes;
mod server;

use std::time::Duration;

pub use client::{AdminError, bring_image, fetch_sequences, fetch_status, remove_image, suspend_sequence};
pub use messages::{BringOrder, Done, Health, ImageReport, SequenceReport, SequencesReport, SuspendOrder};
pub use server::{serve, serve_tcp};

/// How long an image may take to be written, read or erased: as long as its disk. It goes on when nobody waits any more.
const WORK_TIMEOUT: Duration = Duration::from_secs(600);

/// How long the remote store's part of a list is waited for.
const REMOTE_LIST_TIMEOUT: Duration = Duration::from_secs(15);

/// How long lanes may take to list their sequences.
const LANES_TIMEOUT: Duration = Duration::from_secs(5);
