//! The same metrics for OpenTelemetry: the text, read back, as an export request of OTLP in JSON, and sent to a collector.
//!
//! One description of what there is serves both: whatever the text has is exported, under the same names.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use url::Url;

use super::Format;
use crate::status::Registry;

/// How often metrics are sent.
const EVERY: Duration = Duration::from_secs(30);

/// How long a collector may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes of its answer that are read.
const ANSWER_MAX: usize = 64 << 10;

/// Where collectors take metrics unless the address says otherwise.
const RESOURCE: &str = "/v1/metrics";

/// Sums since the start.
const CUMULATIVE: u64 = 2;

/// The collector that an address names.
///
/// # Errors
/// One that is none, in words.
pub fn collector(address: &str) -> Result<Url, String> {
    let mut url = Url::parse(address)
        .map_err(|error| format!("{error}: write a URL, such as http://127.0.0.1:4318"))?;
    if url.scheme() != "http" || url.host().is_none() {
        return Err("it must be an http:// URL with a host: for another machine, a collector on this one passes it on".into());
    }
    if matches!(url.path(), "" | "/") {
        url.set_path(RESOURCE);
    }
    Ok(url)
}

/// Labels of a series, and their values.
type Labels = Vec<(String, String)>;

/// A family of the text.
#[derive(Debug, Default)]
struct Family<'a> {
    kind: &'a str,
    help: String,
    unit: &'a str,
    /// By name and labels.
    series: Vec<Series<'a>>,
}

/// A line of the text.
#[derive(Debug)]
struct Series<'a> {
    name: &'a str,
    labels: Labels,
    value: f64,
}

fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('n') => out.push('\n'),
                Some(other) => out.push(other),
                None => out.push('\\'),
            },
            c => out.push(c),
        }
    }
    out
}

/// Labels between braces: names, and values in quotes in which quotes are escaped.
fn labels(mut text: &str) -> Labels {
    let mut all = Vec::new();
    while let Some((name, rest)) = text.split_once("=\"") {
        let mut escaped = false;
        let end = rest.find(|c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        let Some(end) = end else { break };
        all.push((name.trim_start_matches(',').to_owned(), unescaped(&rest[..end])));
        text = &rest[end + 1..];
    }
    all
}

/// A line without the example behind it. No label can look like one: quotes are escaped in there.
fn without_example(line: &str) -> &str {
    line.rsplit_once(" # {session=\"").map_or(line, |(line, _)| line)
}

fn families(text: &str) -> Vec<(&str, Family<'_>)> {
    let mut all: Vec<(&str, Family<'_>)> = Vec::new();
    for line in text.lines() {
        if let Some((about, rest)) = line.strip_prefix("# ").and_then(|rest| rest.split_once(' ')) {
            let Some((name, said)) = rest.split_once(' ') else { continue };
            if all.last().is_none_or(|(last, _)| *last != name) {
                all.push((name, Family::default()));
            }
            let Some((_, family)) = all.last_mut() else { continue };
            match about {
                "HELP" => family.help = unescaped(said),
                "TYPE" => family.kind = said,
                "UNIT" => family.unit = said,
                _ => {}
            }
        } else if let Some((series, value)) = without_example(line).rsplit_once(' ')
            && let (Some((_, family)), Ok(value)) = (all.last_mut(), value.parse())
        {
            let (name, inside) = series.split_once('{').unwrap_or((series, ""));
            let labels = labels(inside.strip_suffix('}').unwrap_or(inside));
            family.series.push(Series { name, labels, value });
        }
    }
    all
}

fn attributes<'a>(labels: impl Iterator<Item = (&'a str, &'a str)>) -> Value {
    labels.map(|(key, value)| json!({"key": key, "value": {"stringValue": value}})).collect()
}

fn attributes_of(labels: &[(String, String)]) -> Value {
    attributes(labels.iter().map(|(key, value)| (key.as_str(), value.as_str())))
}

/// A histogram's series by their labels: what ended in each bucket, the sum, and how many.
#[derive(Debug, Default)]
struct Buckets {
    cumulative: Vec<(f64, f64)>,
    sum: f64,
    count: f64,
}

fn histograms(family: &Family<'_>, times: &Value) -> Vec<Value> {
    let mut all: BTreeMap<Labels, Buckets> = BTreeMap::new();
    for Series { name, labels, value } in &family.series {
        let others: Vec<_> = labels.iter().filter(|(key, _)| key != "le").cloned().collect();
        let buckets = all.entry(others).or_default();
        match name.rsplit('_').next() {
            Some("bucket") => {
                let end = labels.iter().find(|(key, _)| key == "le");
                let end = end.and_then(|(_, end)| end.trim_start_matches('+').parse().ok());
                buckets.cumulative.push((end.unwrap_or(f64::INFINITY), *value));
            }
            Some("sum") => buckets.sum = *value,
            _ => buckets.count = *value,
        }
    }
    let point = |(labels, buckets): (&Labels, &Buckets)| {
        let mut before = 0.0;
        let counts: Vec<String> = buckets
            .cumulative
            .iter()
            .map(|(_, upto)| {
                let here = upto - before;
                before = *upto;
                (here.max(0.0) as u64).to_string()
            })
            .collect();
        let ends: Vec<f64> =
            buckets.cumulative.iter().map(|(end, _)| *end).filter(|end| end.is_finite()).collect();
        let mut point = times.clone();
        point["attributes"] = attributes_of(labels);
        point["count"] = (buckets.count as u64).to_string().into();
        point["sum"] = buckets.sum.into();
        point["bucketCounts"] = counts.into();
        point["explicitBounds"] = ends.into();
        point
    };
    all.iter().map(point).collect()
}

fn unit_of(unit: &str) -> &str {
    match unit {
        "bytes" => "By",
        "seconds" => "s",
        "ratio" => "1",
        other => other,
    }
}

fn unix_ns(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos().min(u128::from(u64::MAX)) as u64)
}

/// An export request: all families of a text in OpenMetrics.
#[must_use]
pub(super) fn request(text: &str, resource: &[(&str, &str)], began: SystemTime, now: SystemTime) -> Value {
    // 64-bit numbers are strings in protobuf's JSON.
    let times =
        json!({"startTimeUnixNano": unix_ns(began).to_string(), "timeUnixNano": unix_ns(now).to_string()});
    let metrics: Vec<Value> = families(text)
        .iter()
        .filter(|(_, family)| !family.series.is_empty())
        .map(|(name, family)| {
            let points = || -> Value {
                let point = |series: &Series<'_>| {
                    let mut point = times.clone();
                    point["attributes"] = attributes_of(&series.labels);
                    point["asDouble"] = series.value.into();
                    point
                };
                family.series.iter().map(point).collect()
            };
            let mut metric = json!({"name": name, "description": family.help, "unit": unit_of(family.unit)});
            match family.kind {
                "counter" => {
                    metric["sum"] =
                        json!({"aggregationTemporality": CUMULATIVE, "isMonotonic": true, "dataPoints": points()});
                }
                "histogram" => {
                    let points = histograms(family, &times);
                    metric["histogram"] = json!({"aggregationTemporality": CUMULATIVE, "dataPoints": points});
                }
                _ => metric["gauge"] = json!({"dataPoints": points()}),
            }
            metric
        })
        .collect();
    json!({"resourceMetrics": [{
        "resource": {"attributes": attributes(resource.iter().copied())},
        "scopeMetrics": [{"scope": {"name": "kvoyant", "version": env!("CARGO_PKG_VERSION")}, "metrics": metrics}],
    }]})
}

/// Sends metrics to a collector until the task is dropped. One that does not take them is told of once.
pub(crate) async fn export(to: Url, registry: Arc<Registry>) {
    let began = SystemTime::now();
    let boot = format!("{:016x}", registry.boot_id());
    let resource = [
        ("service.name", "kvoyantd"),
        ("service.version", env!("CARGO_PKG_VERSION")),
        ("service.instance.id", boot.as_str()),
    ];
    let mut well = true;
    loop {
        let sent = match registry.snapshot().text(Format::OpenMetrics) {
            Ok(text) => {
                let body = request(&text, &resource, began, SystemTime::now()).to_string();
                let sent = tokio::time::timeout(PATIENCE, send(&to, body)).await;
                sent.unwrap_or_else(|_| Err(format!("it did not answer within {} s", PATIENCE.as_secs())))
            }
            Err(error) => Err(error.to_string()),
        };
        match &sent {
            Err(why) if well => {
                tracing::warn!(
                    "the OpenTelemetry collector at {to} takes no metrics: {why}; it is tried every {} s",
                    EVERY.as_secs()
                );
            }
            Ok(()) if !well => tracing::info!("the OpenTelemetry collector at {to} takes metrics again"),
            _ => {}
        }
        well = sent.is_ok();
        tokio::time::sleep(EVERY).await;
    }
}

async fn send(to: &Url, body: String) -> Result<(), String> {
    let said = |error: &dyn std::fmt::Display| error.to_string();
    // Names are looked up beside this thread, which serves everybody.
    let place = (to.host_str().unwrap_or_default(), to.port_or_known_default().unwrap_or(80));
    let stream = TcpStream::connect(place).await.map_err(|error| said(&error))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| said(&error))?;
    let host = to.host_str().unwrap_or_default();
    let host = to.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
    let request = Request::post(to.path())
        .header(HOST, host)
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| said(&error))?;
    let exchange = async {
        let answer = sender.send_request(request).await.map_err(|error| said(&error))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let words = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
        let words =
            words.map(|words| String::from_utf8_lossy(&words.to_bytes()).into_owned()).unwrap_or_default();
        let words: String = words.chars().filter(|c| !c.is_control()).take(200).collect();
        Err(format!("{status} {words}"))
    };
    // Beside it, for an answer counts that came before the connection was closed.
    let connection = tokio::task::spawn_local(connection);
    let done = exchange.await;
    connection.abort();
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_path_gets_the_usual_one_and_one_that_is_none_is_refused() {
        assert_eq!(collector("http://127.0.0.1:4318").unwrap().as_str(), "http://127.0.0.1:4318/v1/metrics");
        assert_eq!(collector("http://[::1]:1/otel/v1/metrics").unwrap().path(), "/otel/v1/metrics");
        for wrong in ["", "127.0.0.1:4318", "https://host", "unix:/run/x", "http://", "collector"] {
            assert!(collector(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_kind_of_family_becomes_its_kind_of_metric() {
        let text = "# HELP a_bytes What \\\"a\\\" is.\n# TYPE a_bytes gauge\n# UNIT a_bytes bytes\na_bytes{path=\"/x \\\"y\\\",z\",uid=\"7\"} 1.5\n\
                    # HELP b Count.\n# TYPE b counter\nb_total 3\n\
                    # HELP c_seconds Times.\n# TYPE c_seconds histogram\n# UNIT c_seconds seconds\n\
                    c_seconds_sum{stage=\"q\"} 0.7\nc_seconds_count{stage=\"q\"} 3\nc_seconds_bucket{le=\"0.1\",stage=\"q\"} 1 # {session=\"1\",ticket=\"2\",layer=\"3\"} 0.05\n\
                    c_seconds_bucket{le=\"+Inf\",stage=\"q\"} 3\n# EOF\n";
        let now = UNIX_EPOCH + Duration::from_secs(2);
        let all = request(text, &[("service.name", "kvoyantd")], UNIX_EPOCH, now);
        let metrics = &all["resourceMetrics"][0]["scopeMetrics"][0]["metrics"];
        let gauge = &metrics[0];
        assert_eq!((&gauge["name"], &gauge["unit"]), (&json!("a_bytes"), &json!("By")));
        assert_eq!(gauge["description"], "What \"a\" is.");
        let point = &gauge["gauge"]["dataPoints"][0];
        assert_eq!((&point["asDouble"], &point["timeUnixNano"]), (&json!(1.5), &json!("2000000000")));
        assert_eq!(point["attributes"][0], json!({"key": "path", "value": {"stringValue": "/x \"y\",z"}}));
        assert_eq!(point["attributes"][1]["value"]["stringValue"], "7");
        let sum = &metrics[1]["sum"];
        assert_eq!((&sum["isMonotonic"], &sum["dataPoints"][0]["asDouble"]), (&json!(true), &json!(3.0)));
        let point = &metrics[2]["histogram"]["dataPoints"][0];
        assert_eq!((&point["bucketCounts"], &point["explicitBounds"]), (&json!(["1", "2"]), &json!([0.1])));
        assert_eq!((&point["count"], &point["sum"]), (&json!("3"), &json!(0.7)));
        assert_eq!(point["attributes"], json!([{"key": "stage", "value": {"stringValue": "q"}}]));
        assert_eq!(metrics.as_array().unwrap().len(), 3);
    }
}
