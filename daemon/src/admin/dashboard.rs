//! The page for a browser: one file, checked in as it is served, which reads `/metrics` and `/ready` and nothing else.
//!
//! Nobody has to trust more than that file: the policy allows its own style and script, by their hashes, and requests to where it came from.
//! `tests/tests/operating/dashboard.rs` says what the hashes are when the page has changed.

use http_body_util::Full;
use hyper::Response;
use hyper::body::Bytes;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};

const PAGE: &str = include_str!("dashboard.html");

const POLICY: &str = "default-src 'none'; script-src 'sha256-qOFnk5XxWrnhA/YoS7Ej5vCbTTeY9OIMuCTD8wi/yDQ='; style-src 'sha256-8ZEm9j+tzRHI31oE1N3QQZ5eWHvoNEC3OFUWOLcE19k='; connect-src 'self'; img-src data:; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'";

/// The page.
pub(super) fn page() -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(PAGE.as_bytes())));
    let headers = response.headers_mut();
    let all = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ];
    for (name, value) in all {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}
