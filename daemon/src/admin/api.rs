//! What can be asked of the admin interface, in one table: the router and the OpenAPI file both come from it.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::Value;

use super::messages::{BringOrder, Done, ErrorBody, Health, ImageReport, SequencesReport, SuspendOrder};
use super::reports::{
    Changed, ConfigPatch, ConfigReport, DevicesReport, DrainReport, EvictOrder, EvictReport, LanesReport,
    LogReport, MethodsReport, TiersReport,
};
use crate::status::{SessionReport, StatusReport};

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Metrics,
    Health,
    Ready,
    Dashboard,
    OpenApi,
    Status,
    Sessions,
    Devices,
    Tiers,
    Lanes,
    Methods,
    Sequences,
    Suspend,
    Bring,
    Remove,
    Config,
    SetConfig,
    Reload,
    Log,
    SetLog,
    Draining,
    Drain,
    Undrain,
    Evict,
}

/// Whom a request is for, beside root and the daemon's own user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum For {
    /// Whoever is on this machine, over TCP too.
    Machine,
    /// Whoever may connect to the socket.
    Group,
    /// The user whose it is, of what is theirs.
    Owner,
    /// Nobody else.
    Operator,
}

type MakeSchema = fn(&mut SchemaGenerator) -> Schema;

/// What an answer is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Answer {
    Json(MakeSchema),
    Text,
    Page,
}

/// A line of the table.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) action: Action,
    pub(super) method: &'static str,
    /// With names in braces where something is to be named.
    pub(super) path: &'static str,
    pub(super) whom: For,
    about: &'static str,
    body: Option<MakeSchema>,
    answer: Answer,
}

fn schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn any(_: &mut SchemaGenerator) -> Schema {
    Schema::default()
}

impl Route {
    const fn new(
        action: Action,
        method: &'static str,
        path: &'static str,
        whom: For,
        answer: Answer,
        about: &'static str,
    ) -> Self {
        Self { action, method, path, whom, about, body: None, answer }
    }

    const fn with(self, body: MakeSchema) -> Self {
        Self { body: Some(body), ..self }
    }
}

/// All of them.
pub(super) static ROUTES: &[Route] = {
    use Answer::{Json, Page, Text};
    use For::{Group, Machine, Operator, Owner};
    const GET: &str = "GET";
    const PUT: &str = "PUT";
    const POST: &str = "POST";
    const PATCH: &str = "PATCH";
    const DELETE: &str = "DELETE";
    &[
        Route::new(Action::Metrics, GET, "/metrics", Machine, Text, "Metrics, as OpenMetrics where `Accept` names it, else as Prometheus's text."),
        Route::new(Action::Health, GET, "/health", Machine, Json(schema::<Health>), "Whether the lanes answer, and what is not as it should be."),
        Route::new(Action::Ready, GET, "/ready", Machine, Json(schema::<Health>), "The same, with status 503 where a new session would not be served."),
        Route::new(Action::Dashboard, GET, "/dashboard", Machine, Page, "A page for a browser, which draws the metrics."),
        Route::new(Action::OpenApi, GET, "/v1/openapi.json", Group, Json(any), "This document."),
        Route::new(Action::Status, GET, "/v1/status", Group, Json(schema::<StatusReport>), "Everything that the daemon counts, at this moment."),
        Route::new(Action::Sessions, GET, "/v1/sessions", Group, Json(schema::<Vec<SessionReport>>), "Open sessions."),
        Route::new(Action::Devices, GET, "/v1/devices", Group, Json(schema::<DevicesReport>), "The device that attention runs on."),
        Route::new(Action::Tiers, GET, "/v1/tiers", Group, Json(schema::<TiersReport>), "Host memory, places on disk, and the store of images."),
        Route::new(Action::Lanes, GET, "/v1/lanes", Group, Json(schema::<LanesReport>), "Lanes, what they serve and whether they move."),
        Route::new(Action::Methods, GET, "/v1/methods", Group, Json(schema::<MethodsReport>), "Methods that sessions may name, and what those that are used keep."),
        Route::new(Action::Sequences, GET, "/v1/sequences", Owner, Json(schema::<SequencesReport>), "Open sequences and images."),
        Route::new(Action::Suspend, POST, "/v1/sequences/suspend", Owner, Json(schema::<Done>), "Writes an open sequence to an image and closes it.")
            .with(schema::<SuspendOrder>),
        Route::new(Action::Bring, POST, "/v1/images/bring", Owner, Json(schema::<ImageReport>), "Has an image here, and every byte of it compared.")
            .with(schema::<BringOrder>),
        Route::new(Action::Remove, DELETE, "/v1/images/{uid}/{name}", Owner, Json(schema::<Done>), "Erases an image wherever it is."),
        Route::new(Action::Config, GET, "/v1/config", Group, Json(schema::<ConfigReport>), "The configuration by key: its value, where that came from, and when a change counts."),
        Route::new(Action::SetConfig, PATCH, "/v1/config", Operator, Json(schema::<Changed>), "Sets keys that may change while the daemon runs, until it reloads or restarts; null takes a value back.")
            .with(schema::<ConfigPatch>),
        Route::new(Action::Reload, POST, "/v1/config/reload", Operator, Json(schema::<Changed>), "Reads the file, the environment and the flags again, as SIGHUP does."),
        Route::new(Action::Log, GET, "/v1/log", Group, Json(schema::<LogReport>), "What is logged, and what was dropped because nobody read it."),
        Route::new(Action::SetLog, PUT, "/v1/log", Operator, Json(schema::<LogReport>), "Logs something else from now on: the key `log`.")
            .with(schema::<LogReport>),
        Route::new(Action::Draining, GET, "/v1/drain", Group, Json(schema::<DrainReport>), "Whether no new sessions are taken, and how many there are."),
        Route::new(Action::Drain, POST, "/v1/drain", Operator, Json(schema::<DrainReport>), "Takes no new sessions; those that there are go on. `/ready` says so."),
        Route::new(Action::Undrain, DELETE, "/v1/drain", Operator, Json(schema::<DrainReport>), "Takes new sessions again."),
        Route::new(Action::Evict, POST, "/v1/evict", Owner, Json(schema::<EvictReport>), "Has pages of a sequence, a session or all leave for the disk, and unused extents go back.")
            .with(schema::<EvictOrder>),
    ]
};

/// What a request may be about.
#[derive(Debug)]
pub(super) enum Found<'a> {
    /// This, with what the path names.
    Route(&'static Route, Vec<&'a str>),
    /// Something that is asked in other ways.
    Otherwise(Vec<&'static str>),
    /// Nothing.
    Nothing,
}

/// What the path names in the places of a template's braces, if it fits.
fn names<'a>(template: &str, path: &'a str) -> Option<Vec<&'a str>> {
    let (mut wanted, mut given, mut names) = (template.split('/'), path.split('/'), Vec::new());
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return Some(names),
            (Some(part), Some(name)) if part.starts_with('{') && !name.is_empty() => names.push(name),
            (Some(part), Some(name)) if part == name => {}
            _ => return None,
        }
    }
}

/// Looks a request up.
pub(super) fn find<'a>(method: &str, path: &'a str) -> Found<'a> {
    let mut otherwise = Vec::new();
    for route in ROUTES {
        if let Some(names) = names(route.path, path) {
            if route.method == method {
                return Found::Route(route, names);
            }
            otherwise.push(route.method);
        }
    }
    if otherwise.is_empty() { Found::Nothing } else { Found::Otherwise(otherwise) }
}

/// The OpenAPI document.
pub(super) fn document() -> Value {
    let mut generator = schemars::generate::SchemaSettings::draft2020_12()
        .with(|settings| settings.definitions_path = "/components/schemas".into())
        .into_generator();
    let error = schema::<ErrorBody>(&mut generator);
    let mut paths = serde_json::Map::new();
    for route in ROUTES {
        let content = match route.answer {
            Answer::Json(make) => serde_json::json!({"application/json": {"schema": make(&mut generator)}}),
            Answer::Text => serde_json::json!({"text/plain": {"schema": {"type": "string"}}}),
            Answer::Page => serde_json::json!({"text/html": {"schema": {"type": "string"}}}),
        };
        let whom = match route.whom {
            For::Machine => "Everybody who may connect, and over TCP whoever is on the machine.",
            For::Group => "Everybody who may connect.",
            For::Owner => "Root and the daemon's user; others, of what is theirs.",
            For::Operator => "Root and the daemon's user.",
        };
        let mut operation = serde_json::json!({
            "operationId": format!("{:?}", route.action),
            "summary": route.about,
            "description": whom,
            "responses": {
                "200": {"description": "Done.", "content": content},
                "default": {
                    "description": "Not done: a sentence that says why, and what to do.",
                    "content": {"application/json": {"schema": error}},
                },
            },
        });
        let parameters: Vec<Value> = route
            .path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            .map(|name| serde_json::json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
            .collect();
        if !parameters.is_empty() {
            operation["parameters"] = parameters.into();
        }
        if let Some(make) = route.body {
            operation["requestBody"] = serde_json::json!({"required": true, "content": {"application/json": {"schema": make(&mut generator)}}});
        }
        let methods = paths.entry(route.path).or_insert_with(|| Value::Object(serde_json::Map::new()));
        methods[route.method.to_lowercase()] = operation;
    }
    let schemas = generator.take_definitions(true);
    serde_json::json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Kvoyant's admin interface",
            "version": "1",
            "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
            "description": "HTTP over the admin socket; with `monitor` over TCP on a loopback address as well, where only metrics, health and \
                            the dashboard are had unless a token is set (`monitor_token`) and sent (`Authorization: Bearer …`). Answers are JSON; fields may be \
                            added within /v1.",
        },
        "servers": [{"url": "http://localhost", "description": "By its Unix socket, or the address in `monitor`."}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_leads_to_its_route_and_names_what_is_in_braces() {
        let found = find("DELETE", "/v1/images/1000/chat");
        assert!(
            matches!(&found, Found::Route(route, names) if route.action == Action::Remove && *names == ["1000", "chat"])
        );
        assert!(matches!(find("GET", "/v1/status"), Found::Route(..)));
        for wrong in [
            "",
            "/",
            "/v1/status/",
            "/v1/images/1000",
            "/v1/images//chat",
            "/v1/images/1000/a/b",
            "/v2/status",
        ] {
            assert!(matches!(find("GET", wrong), Found::Nothing), "{wrong}");
        }
        let Found::Otherwise(methods) = find("PUT", "/v1/config") else { panic!() };
        assert_eq!(methods, ["GET", "PATCH"]);
    }

    #[test]
    fn no_two_routes_are_the_same_and_each_has_an_action_of_its_own() {
        for (at, route) in ROUTES.iter().enumerate() {
            for other in &ROUTES[..at] {
                assert!(
                    route.action != other.action && (route.path, route.method) != (other.path, other.method),
                    "{}",
                    route.path
                );
            }
        }
    }

    #[test]
    fn the_file_in_the_manual_is_what_the_code_says() {
        let file: Value = serde_json::from_str(include_str!("../../../docs/openapi.json")).unwrap();
        assert!(
            file == document(),
            "docs/openapi.json is old: curl --unix-socket admin.sock http://localhost/v1/openapi.json | python3 -m json.tool --no-ensure-ascii"
        );
        let text = file.to_string();
        // Whatever is referred to is there.
        for reference in text.split("\"#/components/schemas/").skip(1) {
            let name = reference.split('"').next().unwrap();
            assert!(file["components"]["schemas"].get(name).is_some(), "{name}");
        }
    }
}
