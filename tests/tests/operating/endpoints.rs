//! Every path and method of docs/openapi.json, each with right and with wrong input, over the socket and over TCP. A request that is in the
//! document and not in the table below fails the test, and so does one that is in the table alone.

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use kvoyant_client::{Model, Sequence};
use kvoyant_tests::http::{Answer, exchange};
use kvoyant_tests::{Daemon, PATIENCE, fake, wait_until};
use serde_json::{Value, json};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const TOKEN: &str = "a-token-that-nobody-guesses";
/// What the daemon takes of a body.
const BODY_MAX: usize = 64 << 10;

/// A request whose path or body is right, or wrong in one way; `{uid}`, `{seq}` and `{image}` stand for what there is.
struct Case {
    path: &'static str,
    body: &'static str,
    status: u16,
    /// What the answer has to say.
    says: &'static str,
}

const fn case(path: &'static str, body: &'static str, status: u16, says: &'static str) -> Case {
    Case { path, body, status, says }
}

/// What is asked of an operation of the document.
struct Operation {
    id: &'static str,
    right: &'static [Case],
    wrong: &'static [Case],
}

const fn operation(id: &'static str, right: &'static [Case], wrong: &'static [Case]) -> Operation {
    Operation { id, right, wrong }
}

/// A name that is longer than any can be.
const LONG: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

static OPERATIONS: &[Operation] = &[
    operation("Metrics", &[case("/metrics", "", 200, "# TYPE kvoyant_uptime_seconds gauge")], &[]),
    operation("Health", &[case("/health", "", 200, "\"ready\":true")], &[]),
    operation("Ready", &[case("/ready", "", 200, "\"ready\":true")], &[]),
    operation("Dashboard", &[case("/dashboard", "", 200, "<!doctype html>")], &[]),
    operation("OpenApi", &[case("/v1/openapi.json", "", 200, "\"openapi\":\"3.1.0\"")], &[]),
    operation("Status", &[case("/v1/status", "", 200, "\"boot_id\":")], &[]),
    operation("Sessions", &[case("/v1/sessions", "", 200, "\"client\":")], &[]),
    operation("Devices", &[case("/v1/devices", "", 200, "\"name\":\"host\"")], &[]),
    operation("Tiers", &[case("/v1/tiers", "", 200, "\"spill\":[{")], &[]),
    operation("Lanes", &[case("/v1/lanes", "", 200, "\"sessions\":[1]")], &[]),
    operation("Methods", &[case("/v1/methods", "", 200, "\"name\":\"kvoyant\"")], &[]),
    operation("Sequences", &[case("/v1/sequences", "", 200, "\"keeps_images\":true")], &[]),
    operation(
        "Suspend",
        &[case(
            "/v1/sequences/suspend",
            "{\"session\":1,\"sequence\":\"{seq}\",\"image\":\"{image}\",\"label\":\"a note\"}",
            200,
            "\"image\":\"{image}\"",
        )],
        &[
            case("/v1/sequences/suspend", "{\"session\":1}", 400, "missing field `sequence`"),
            case(
                "/v1/sequences/suspend",
                "{\"session\":99,\"sequence\":\"0.0\",\"image\":\"a\"}",
                404,
                "kvoyant sequences",
            ),
            case(
                "/v1/sequences/suspend",
                "{\"session\":1,\"sequence\":\"900.3\",\"image\":\"a\"}",
                404,
                "900.3",
            ),
            case(
                "/v1/sequences/suspend",
                "{\"session\":1,\"sequence\":\"x\",\"image\":\"a\"}",
                400,
                "as 3.0",
            ),
            case("/v1/sequences/suspend", "{\"session\":-1,\"sequence\":\"0.0\",\"image\":\"a\"}", 400, "-1"),
            case(
                "/v1/sequences/suspend",
                "{\"session\":1,\"sequence\":\"{seq}\",\"image\":\"../a\"}",
                400,
                "../a",
            ),
            case(
                "/v1/sequences/suspend",
                "{\"session\":1,\"sequence\":\"{seq}\",\"image\":\"{long}\"}",
                400,
                "image",
            ),
            case(
                "/v1/sequences/suspend",
                "{\"session\":1,\"sequence\":\"{seq}\",\"image\":\"kept\"}",
                409,
                "overwrite",
            ),
            case(
                "/v1/sequences/suspend",
                "{\"session\":1,\"sequence\":\"{seq}\",\"image\":\"a\",\"label\":\"{long}{long}{long}{long}{long}\"}",
                400,
                "label",
            ),
        ],
    ),
    operation(
        "Bring",
        &[
            case("/v1/images/bring", "{\"image\":\"kept\"}", 200, "\"kept\":\"here\""),
            case("/v1/images/bring", "{\"image\":\"kept\",\"uid\":{uid}}", 200, "\"tokens\":"),
        ],
        &[
            case("/v1/images/bring", "{\"image\":\"nothing\"}", 404, "nothing"),
            case("/v1/images/bring", "{\"image\":\"kept\",\"uid\":\"root\"}", 400, "invalid type"),
            case("/v1/images/bring", "{\"image\":\"kept\",\"uid\":4294967296}", 400, "4294967296"),
            case("/v1/images/bring", "{\"image\":\"{long}\"}", 400, "image"),
            case("/v1/images/bring", "{\"image\":\"\"}", 400, "image"),
        ],
    ),
    operation(
        "Remove",
        &[case("/v1/images/{uid}/{image}", "", 200, "\"image\":\"{image}\"")],
        &[
            case("/v1/images/{uid}/nothing", "", 404, "nothing"),
            case("/v1/images/root/kept", "", 400, "/v1/images/1000/name"),
            case("/v1/images/99999999999/kept", "", 400, "99999999999"),
            case("/v1/images/{uid}/{long}", "", 400, "image"),
            case("/v1/images/{uid}/..", "", 400, "image"),
        ],
    ),
    operation("Config", &[case("/v1/config", "", 200, "\"max_sessions\":{")], &[]),
    operation(
        "SetConfig",
        &[
            case("/v1/config", "{\"max_sessions\":7}", 200, "\"to\":\"7\""),
            case("/v1/config", "{\"max_sessions\":null}", 200, "\"from\":\"7\""),
            case("/v1/config", "{}", 200, "\"changed\":[]"),
        ],
        &[
            case("/v1/config", "{\"max_session\":7}", 400, "did you mean `max_sessions`?"),
            case("/v1/config", "{\"max_sessions\":\"many\"}", 400, "max_sessions"),
            case("/v1/config", "{\"max_sessions\":-1}", 400, "max_sessions"),
            case("/v1/config", "{\"{long}\":1}", 400, "aaaa"),
            case("/v1/config", "{\"arena\":\"1GiB\"}", 409, "while the daemon runs"),
        ],
    ),
    operation("Reload", &[case("/v1/config/reload", "", 200, "\"changed\":[")], &[]),
    operation("Log", &[case("/v1/log", "", 200, "\"filter\":\"info\"")], &[]),
    operation(
        "SetLog",
        &[case("/v1/log", "{\"filter\":\"info\"}", 200, "\"filter\":\"info\"")],
        &[
            case("/v1/log", "{\"filter\":\"kvoyant=loud\"}", 400, "kvoyant=loud"),
            case("/v1/log", "{\"filter\":7}", 400, "invalid type"),
            case("/v1/log", "{\"level\":\"info\"}", 400, "unknown field `level`"),
            case("/v1/log", "{}", 400, "missing field `filter`"),
        ],
    ),
    operation("Draining", &[case("/v1/drain", "", 200, "\"draining\":false")], &[]),
    operation("Drain", &[case("/v1/drain", "", 200, "\"draining\":true")], &[]),
    operation("Undrain", &[case("/v1/drain", "", 200, "\"draining\":false")], &[]),
    operation(
        "Evict",
        &[
            case("/v1/evict", "{\"session\":1,\"sequence\":\"{seq}\"}", 200, "\"pages\":"),
            case("/v1/evict", "{\"session\":1}", 200, "\"extent_bytes\":"),
            case("/v1/evict", "{}", 200, "\"unfinished\":"),
        ],
        &[
            case("/v1/evict", "{\"session\":99}", 404, "session 99"),
            case("/v1/evict", "{\"session\":1,\"sequence\":\"77.1\"}", 404, "77.1"),
            case("/v1/evict", "{\"session\":1,\"sequence\":\"x\"}", 400, "as 3.0"),
            case("/v1/evict", "{\"sequence\":\"0.0\"}", 400, "its session"),
            case("/v1/evict", "{\"session\":\"1\"}", 400, "invalid type"),
        ],
    ),
];

/// A daemon with everything that its interface is about.
struct Stand {
    daemon: Daemon,
    address: String,
    model: Model,
    /// The next one to be suspended, and those that were.
    sequences: Vec<Sequence>,
    images: usize,
    _folder: tempfile::TempDir,
}

#[derive(Clone, Copy)]
enum Way {
    Socket,
    /// With these header lines.
    Tcp(&'static str),
}

const WITH_TOKEN: Way = Way::Tcp("Authorization: Bearer a-token-that-nobody-guesses\r\n");

impl Stand {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let below = |name: &str| folder.path().join(name).display().to_string();
        let (store, spill, token) = (below("images"), below("spill"), below("token"));
        std::fs::create_dir(&spill).unwrap();
        std::fs::write(&token, TOKEN).unwrap();
        std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let address = free.to_string();
        let flags = [
            ["--store", &store],
            ["--spill", &spill],
            ["--spill-bytes", "64MiB"],
            ["--monitor", &address],
            ["--monitor-token", &token],
        ];
        let daemon = Daemon::start(DAEMON, flags.as_flattened());
        let model = fake::connect(&daemon, &["quest:budget=50%"]);
        let mut stand = Self { daemon, address, model, sequences: Vec::new(), images: 0, _folder: folder };
        stand.open().suspend("kept", false, "").map_err(|(_, error)| error).unwrap();
        let next = stand.open();
        stand.sequences.push(next);
        stand
    }

    fn open(&self) -> Sequence {
        let sequence = self.model.open(0, 400).unwrap();
        fake::fill(&self.model, &sequence, 1, 400).unwrap();
        sequence
    }

    fn send(&self, way: Way, request: &str, body: &[u8]) -> Answer {
        match way {
            Way::Socket => {
                let stream = UnixStream::connect(self.daemon.admin()).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                exchange(stream, request, "", body)
            }
            Way::Tcp(headers) => {
                let stream = TcpStream::connect(&self.address).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                exchange(stream, request, headers, body)
            }
        }
    }

    fn put(&self, text: &str) -> String {
        let uid = nix::unistd::geteuid().to_string();
        let sequence = self.sequences.last().unwrap().id().to_string();
        let image = format!("taken-{}", self.images);
        text.replace("{uid}", &uid)
            .replace("{seq}", &sequence)
            .replace("{image}", &image)
            .replace("{long}", LONG)
    }

    fn ask(&self, way: Way, method: &str, case: &Case) -> Answer {
        self.send(way, &format!("{method} {}", self.put(case.path)), self.put(case.body).as_bytes())
    }

    /// After each operation everything is as before.
    fn settle(&mut self, id: &str) {
        match id {
            "Suspend" => {
                let next = self.open();
                self.sequences.push(next);
            }
            // What was suspended is erased, so that the next image has another name.
            "Remove" => self.images += 1,
            "Drain" => {
                let ready = self.send(Way::Socket, "GET /ready", b"");
                assert!(ready.status == 503 && ready.body.contains("being drained"), "{ready:?}");
                assert_eq!(self.send(Way::Socket, "DELETE /v1/drain", b"").status, 200);
            }
            _ => {}
        }
    }
}

fn document() -> Value {
    serde_json::from_str(include_str!("../../../docs/openapi.json")).unwrap()
}

/// Method, path, and operation of everything in the document, in an order in which what is erased was made before.
fn all(document: &Value) -> Vec<(String, String, Value)> {
    let mut all = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            all.push((method.to_uppercase(), path.clone(), operation.clone()));
        }
    }
    let at = |operation: &Value| OPERATIONS.iter().position(|known| operation["operationId"] == known.id);
    all.sort_by_key(|(_, _, operation)| at(operation));
    all
}

fn of(operation: &Value) -> &'static Operation {
    let found = OPERATIONS.iter().find(|known| operation["operationId"] == known.id);
    found.unwrap_or_else(|| panic!("nothing asks for {}: add it to the table", operation["operationId"]))
}

/// Why a value is not what a schema of the document says.
fn fault(document: &Value, schema: &Value, value: &Value) -> Option<String> {
    if let Some(name) = schema["$ref"].as_str() {
        let target = document.pointer(name.trim_start_matches('#')).expect("what is referred to");
        return fault(document, target, value);
    }
    for key in ["anyOf", "oneOf"] {
        if let Some(all) = schema[key].as_array()
            && all.iter().all(|one| fault(document, one, value).is_some())
        {
            return Some(format!("{value} is none of {all:?}"));
        }
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let fits = |wanted: &Value| wanted == kind || (wanted == "number" && kind == "integer");
    match &schema["type"] {
        Value::Array(kinds) if !kinds.iter().any(fits) => {
            return Some(format!("{value} is none of {kinds:?}"));
        }
        wanted @ Value::String(_) if !fits(wanted) => return Some(format!("{value} is no {wanted}")),
        _ => {}
    }
    if schema["minimum"].as_f64() > value.as_f64() && value.is_number() {
        return Some(format!("{value} is too small"));
    }
    let allowed = schema["enum"].as_array().map(|all| all.contains(value));
    if allowed == Some(false) || schema.get("const").is_some_and(|only| only != value) {
        return Some(format!("{value} is not one of {schema}"));
    }
    if let (Some(items), Some(values)) = (schema.get("items"), value.as_array()) {
        return values.iter().find_map(|value| fault(document, items, value));
    }
    let object = value.as_object()?;
    let missing = schema["required"].as_array().into_iter().flatten();
    for name in missing.filter_map(Value::as_str) {
        if !object.contains_key(name) {
            return Some(format!("{name} is missing in {value}"));
        }
    }
    object.iter().find_map(|(name, value)| {
        match (schema["properties"].get(name), &schema["additionalProperties"]) {
            (Some(schema), _) => fault(document, schema, value),
            (None, schema @ Value::Object(_)) => fault(document, schema, value),
            // Whatever is given is described.
            (None, _) if schema.get("properties").is_some() => Some(format!("{name} is not described")),
            (None, _) => None,
        }
        .map(|why| format!("{name}: {why}"))
    })
}

/// A refusal is one sentence of JSON, of the kind that the document says.
fn refused(document: &Value, what: &str, answer: &Answer, status: u16, says: &str) {
    assert_eq!(answer.status, status, "{what}: {answer:?}");
    let body: Value =
        serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{what}: {error}: {answer:?}"));
    let wrong = fault(document, &json!({"$ref": "#/components/schemas/ErrorBody"}), &body);
    assert_eq!(wrong, None, "{what}");
    let sentence = body["error"].as_str().unwrap();
    assert!(sentence.contains(says) && sentence.len() > 10, "{what}: {says:?} is not in {sentence:?}");
}

#[test]
fn the_table_and_the_document_name_the_same_operations() {
    let document = document();
    let told: BTreeSet<String> =
        all(&document).iter().map(|(_, _, one)| one["operationId"].as_str().unwrap().to_owned()).collect();
    let known: BTreeSet<String> = OPERATIONS.iter().map(|operation| operation.id.to_owned()).collect();
    assert_eq!(told, known);
    assert_eq!(known.len(), OPERATIONS.len(), "none comes twice");
    for operation in OPERATIONS {
        assert!(!operation.right.is_empty(), "{}", operation.id);
    }
    // What describes answers can tell a wrong one.
    let health = json!({"$ref": "#/components/schemas/Health"});
    assert_eq!(fault(&document, &health, &json!({"ready": true, "troubles": ["a"]})), None);
    for wrong in [
        json!({"ready": 1, "troubles": []}),
        json!({"ready": true}),
        json!({"ready": true, "troubles": [1]}),
        json!({"ready": true, "troubles": [], "more": 1}),
        json!([]),
    ] {
        assert!(fault(&document, &health, &wrong).is_some(), "{wrong}");
    }
}

#[test]
fn every_operation_answers_right_input_as_the_document_says_and_refuses_wrong_input() {
    let mut stand = Stand::start();
    let (status, document) = (stand.send(Way::Socket, "GET /v1/openapi.json", b""), document());
    let given: Value = serde_json::from_str(&status.body).unwrap();
    assert!(given == document, "docs/openapi.json is what the daemon says");
    for way in [Way::Socket, WITH_TOKEN] {
        for (method, path, operation) in all(&document) {
            let (known, content) = (of(&operation), &operation["responses"]["200"]["content"]);
            for case in known.right {
                let (what, answer) =
                    (format!("{method} {path} {}", case.body), stand.ask(way, &method, case));
                assert_eq!(answer.status, case.status, "{what}: {answer:?}");
                assert!(
                    answer.body.contains(&stand.put(case.says)),
                    "{what}: {} is not in {answer:?}",
                    case.says
                );
                let (kind, content) = content.as_object().unwrap().iter().next().unwrap();
                assert!(
                    answer.head.to_lowercase().contains(&format!("content-type: {kind}")),
                    "{what}: {answer:?}"
                );
                if kind == "application/json" {
                    let body = serde_json::from_str(&answer.body).unwrap();
                    assert_eq!(fault(&document, &content["schema"], &body), None, "{what}");
                }
            }
            stand.settle(known.id);
            for case in known.wrong {
                let (what, answer) =
                    (format!("{method} {path} {}", case.body), stand.ask(way, &method, case));
                refused(&document, &what, &answer, case.status, case.says);
            }
        }
    }
    wait_until("the daemon to be as before", || {
        let status = stand.daemon.status();
        !status.draining && status.totals.sequences == 1
    });
}

#[test]
fn what_fits_no_operation_is_refused_on_every_path_and_the_daemon_goes_on() {
    let stand = Stand::start();
    let document = document();
    let uid = nix::unistd::geteuid().to_string();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let concrete = path.replace("{uid}", &uid).replace("{name}", "kept");
        let known: Vec<String> =
            methods.as_object().unwrap().keys().map(|method| method.to_uppercase()).collect();
        for method in ["GET", "PUT", "POST", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"] {
            if known.iter().any(|known| known == method) {
                continue;
            }
            let (what, answer) =
                (format!("{method} {path}"), stand.send(Way::Socket, &format!("{method} {concrete}"), b"{}"));
            refused(&document, &what, &answer, 405, &concrete);
            for known in &known {
                assert!(answer.body.contains(known.as_str()), "{what}: {answer:?}");
            }
        }
        for wrong in [
            format!("{concrete}/"),
            format!("{concrete}/more/and/more"),
            format!("/v9{concrete}"),
            format!("{concrete}x"),
        ] {
            // Another name of an image is a name.
            if wrong == format!("{concrete}x") && path.ends_with('}') {
                continue;
            }
            for method in &known {
                let answer = stand.send(Way::Socket, &format!("{method} {wrong}"), b"");
                refused(&document, &format!("{method} {wrong}"), &answer, 404, "/v1/openapi.json");
            }
        }
        for (method, operation) in methods.as_object().unwrap() {
            let request = format!("{} {concrete}", method.to_uppercase());
            // More than any path may have is refused before it is looked at, and not by the daemon's own words.
            let long = format!("{request}/{}", "a".repeat(70_000));
            assert!([400, 414, 431].contains(&stand.send(Way::Socket, &long, b"").status), "{request}");
            if operation.get("requestBody").is_none() {
                continue;
            }
            for wrong in [
                &b""[..],
                b"{",
                b"[]",
                b"[1]",
                b"null",
                b"7",
                b"\"x\"",
                b"{\"nonsense\":1}",
                b"\xff\xfe",
                b"{}{}",
            ] {
                let what = format!("{request} {}", String::from_utf8_lossy(wrong));
                refused(&document, &what, &stand.send(Way::Socket, &request, wrong), 400, "");
            }
            let much = vec![b' '; BODY_MAX + 1];
            refused(&document, &request, &stand.send(Way::Socket, &request, &much), 413, "65536 bytes");
        }
    }
    for nonsense in ["GET", "GET  /health", "\x00\x01"] {
        let answer = stand.send(Way::Socket, nonsense, b"");
        assert_eq!(answer.status, 400, "{nonsense:?}");
    }
    assert_eq!(stand.send(Way::Socket, "GET /health", b"").status, 200);
    assert!(!stand.daemon.status().draining);
}

#[test]
fn over_tcp_what_is_not_for_the_machine_takes_the_token_and_no_other() {
    let stand = Stand::start();
    let document = document();
    let wrong = [
        Way::Tcp(""),
        Way::Tcp("Authorization: Bearer wrong-token-wrong-token\r\n"),
        Way::Tcp("Authorization: a-token-that-nobody-guesses\r\n"),
        Way::Tcp("Authorization: Basic a-token-that-nobody-guesses\r\n"),
        Way::Tcp("Authorization: Bearer a-token-that-nobody-guesses-and-more\r\n"),
        Way::Tcp("Authorization: Bearer \r\n"),
    ];
    let (mut open, mut closed) = (0, 0);
    for (method, path, operation) in all(&document) {
        let machine =
            operation["description"].as_str().unwrap().contains("over TCP whoever is on the machine");
        let known = of(&operation);
        for way in wrong {
            let answer = stand.ask(way, &method, &known.right[0]);
            if machine {
                assert_eq!(answer.status, known.right[0].status, "{method} {path}: {answer:?}");
                open += 1;
            } else {
                refused(&document, &format!("{method} {path}"), &answer, 403, "monitor_token");
                closed += 1;
            }
        }
        // A path that is none says no more to strangers than one that is.
        refused(
            &document,
            &path,
            &stand.send(wrong[0], &format!("{method} {path}/x/y"), b""),
            403,
            "monitor_token",
        );
    }
    assert!(open >= 4 * wrong.len() && closed >= 20 * wrong.len(), "{open} {closed}");
    let status = stand.daemon.status();
    assert!(!status.draining && status.totals.sequences == 1, "nothing was done");
    assert!(Path::new(&stand.daemon.admin()).exists());
}
