//! What is asked of each command. `{home}`, `{admin}`, `{socket}`, `{seq}` and `{uid}` stand for what the test has.

mod models;

/// One command line.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) arguments: &'static [&'static str],
    pub(crate) code: i32,
    /// What its output says, or its refusal.
    pub(crate) says: &'static str,
    /// Whether it sees the driver in software.
    pub(crate) gpu: bool,
    /// Whether it needs the demo's model.
    pub(crate) model: bool,
    /// Whether it prints its report though it fails.
    pub(crate) reports: bool,
}

const fn good(arguments: &'static [&'static str], says: &'static str) -> Case {
    Case { arguments, code: 0, says, gpu: false, model: false, reports: false }
}

/// The command line is wrong.
const fn line(arguments: &'static [&'static str], says: &'static str) -> Case {
    Case { code: 2, ..good(arguments, says) }
}

/// It cannot be done.
const fn fails(arguments: &'static [&'static str], says: &'static str) -> Case {
    Case { code: 1, ..good(arguments, says) }
}

const fn on_gpu(case: Case) -> Case {
    Case { gpu: true, ..case }
}

/// A command.
pub(crate) struct Command {
    pub(crate) path: &'static [&'static str],
    /// Whether it runs a model.
    pub(crate) slow: bool,
    pub(crate) right: &'static [Case],
    pub(crate) wrong: &'static [Case],
}

const fn command(path: &'static [&'static str], right: &'static [Case], wrong: &'static [Case]) -> Command {
    Command { path, slow: false, right, wrong }
}

const fn slow(path: &'static [&'static str], right: &'static [Case], wrong: &'static [Case]) -> Command {
    Command { slow: true, ..command(path, right, wrong) }
}

const ADMIN: &str = "--admin={admin}";
const NOBODY: &str = "--admin={home}/none.sock";
const ASK: &str = "is kvoyantd running? Name its socket with --admin";

/// All of them, those that make what others read before these.
pub(crate) fn commands() -> impl Iterator<Item = &'static Command> {
    OPERATED.iter().chain(models::MODELS)
}

static OPERATED: &[Command] = &[
    command(
        &["serve"],
        &[
            good(&["--config", "/dev/null", "--check"], "arena = "),
            good(&["--print-config=markdown"], "| `arena` |"),
        ],
        &[
            fails(&["--config", "{home}/none.toml"], "none.toml"),
            fails(&["--config", "{home}/bad.toml", "--check"], "did you mean `arena`?"),
            line(&["--check=xml"], "toml, json"),
            line(&["--arena", "much"], "much"),
            fails(&["--config", "/dev/null", "--arena", "1PiB", "--check"], "--arena"),
            fails(
                &["--config", "/dev/null", "--socket", "{socket}", "--admin-socket", "{home}/a.sock"],
                "another daemon serves",
            ),
        ],
    ),
    command(
        &["status"],
        &[good(&[ADMIN], "arena "), good(&[ADMIN, "--json"], "\"boot_id\"")],
        &[
            fails(&[NOBODY], ASK),
            fails(&["--json", NOBODY], ASK),
            fails(&["--admin={socket}"], "the socket for engines, which `kvoyant run --socket` takes"),
            fails(&["--admin={home}/text"], "it is a file and no socket"),
            line(&["now"], "unexpected argument"),
        ],
    ),
    command(
        &["top"],
        &[
            good(&["--once", "--interval", "0.1", ADMIN], "answers"),
            good(&["--json", "--interval=0.1", ADMIN], "\"limit\""),
        ],
        &[
            fails(&["--once", NOBODY], ASK),
            line(&["--interval", "0"], "0.1 to 3600 seconds"),
            line(&["--interval", "soon"], "0.1 to 3600 seconds"),
        ],
    ),
    command(
        &["sequences"],
        &[good(&[ADMIN], "{seq}"), good(&[ADMIN, "--json"], "\"keeps_images\"")],
        &[fails(&[NOBODY], ASK), line(&["erase"], "erase")],
    ),
    command(
        &["sequences", "suspend"],
        &[
            good(&["1", "{seq}", "one", "--label", "a note", ADMIN], "resumes it by that name"),
            good(&["1", "{seq}", "one", "--overwrite", "--json", ADMIN], "\"image\": \"one\""),
        ],
        &[
            fails(&["1", "{seq}", "one", NOBODY], ASK),
            line(&["1", "five", "one"], "as 3.0"),
            line(&["one", "0.0", "one"], "SESSION"),
            line(&["1"], "required"),
            fails(&["7", "0.0", "one", ADMIN], "kvoyant sequences"),
            fails(&["1", "77.7", "one", ADMIN], "77.7"),
            fails(&["1", "{seq}", "../up", ADMIN], "../up"),
        ],
    ),
    command(
        &["sequences", "resume"],
        &[
            good(&["one", ADMIN], "200 tokens"),
            good(&["one", "--uid", "{uid}", "--json", ADMIN], "\"kept\": \"here\""),
        ],
        &[
            fails(&["one", NOBODY], ASK),
            fails(&["nothing", ADMIN], "nothing"),
            fails(&["../up", ADMIN], "../up"),
            line(&["one", "--uid", "root"], "root"),
            line(&[], "required"),
        ],
    ),
    command(
        &["sequences", "rm"],
        &[good(&["one", "--uid", "{uid}", "--json", ADMIN], "\"image\": \"one\"")],
        &[
            fails(&["one", NOBODY], ASK),
            fails(&["nothing", ADMIN], "nothing"),
            fails(&["../up", ADMIN], "../up"),
            line(&["one", "--uid", "-1"], "-1"),
            line(&["one", "two"], "unexpected argument"),
        ],
    ),
    command(
        &["drain"],
        &[
            good(&["--show", ADMIN], "new sessions are taken; 1 session open"),
            good(&[ADMIN], "no new sessions are taken"),
            good(&["--undo", "--json", ADMIN], "\"draining\": false"),
        ],
        &[
            fails(&[NOBODY], ASK),
            fails(&["--wait", "0", ADMIN], "1 session left after 0 s"),
            line(&["--wait", "soon"], "soon"),
            line(&["--undo", "--show"], "cannot be used with"),
        ],
    ),
    command(
        &["evict"],
        &[
            good(&["1", "{seq}", ADMIN], "left for the disk"),
            good(&["1", ADMIN], "went back to the arena"),
            good(&["--all", "--json", ADMIN], "\"pages\""),
        ],
        &[
            fails(&["--all", NOBODY], ASK),
            fails(&["7", ADMIN], "there is no session 7"),
            fails(&["1", "77.7", ADMIN], "77.7"),
            line(&["1", "x"], "as 3.0"),
            line(&["x"], "x"),
            line(&[], "--all"),
            line(&["1", "--all"], "cannot be used with"),
        ],
    ),
    command(
        &["log"],
        &[
            good(&[ADMIN], "info"),
            good(&["debug", ADMIN], "debug"),
            good(&["info", "--json", ADMIN], "\"filter\": \"info\""),
        ],
        &[
            fails(&[NOBODY], ASK),
            fails(&["a=b=c", ADMIN], "a=b=c"),
            line(&["info", "debug"], "unexpected argument"),
        ],
    ),
    command(
        &["config"],
        &[
            good(&[ADMIN], "# flag --arena; changes: restart"),
            good(&["--json", ADMIN], "\"changes\": \"restart\""),
        ],
        &[fails(&[NOBODY], ASK), line(&["put"], "put")],
    ),
    command(
        &["config", "get"],
        &[
            good(&["max_sessions", ADMIN], "max_sessions = "),
            good(&["arena", "--json", ADMIN], "\"from\": \"flag --arena\""),
        ],
        &[fails(&["arena", NOBODY], ASK), fails(&["nothing", ADMIN], "`kvoyant config` shows all")],
    ),
    command(
        &["config", "set"],
        &[
            good(&["max_sessions=9", "quotas.host=1GiB", ADMIN], "max_sessions: "),
            good(&["max_sessions=8", "--json", ADMIN], "\"to\": \"8\""),
        ],
        &[
            fails(&["max_sessions=9", NOBODY], ASK),
            fails(&["arena=1GiB", ADMIN], "cannot change while the daemon runs"),
            fails(&["max_session=9", ADMIN], "did you mean `max_sessions`?"),
            fails(&["max_sessions=many", ADMIN], "max_sessions"),
            fails(&["log.level=debug", ADMIN], "only quotas have keys of their own"),
            line(&["max_sessions"], "write KEY=VALUE"),
            line(&[], "required"),
        ],
    ),
    command(
        &["config", "unset"],
        &[
            good(&["max_sessions", ADMIN], "max_sessions: 8 -> "),
            good(&["quotas", "--json", ADMIN], "\"key\": \"quotas\""),
        ],
        &[
            fails(&["max_sessions", NOBODY], ASK),
            fails(&["max_session", ADMIN], "did you mean `max_sessions`?"),
            line(&[], "required"),
        ],
    ),
    command(
        &["config", "reload"],
        &[good(&[ADMIN], "nothing has changed"), good(&["--json", ADMIN], "\"waiting\": []")],
        &[fails(&[NOBODY], ASK), line(&["now"], "unexpected argument")],
    ),
    command(
        &["doctor"],
        &[
            good(&["--device", "host", "--config", "/dev/null", "--state", "{home}/state"], "memlock"),
            good(&["--device", "host", "--config=/dev/null", "--json"], "\"checks\""),
            on_gpu(good(&["--device", "cuda:0", "--config=/dev/null"], "driver")),
        ],
        &[
            line(&["--device", "tpu"], "cuda:0"),
            Case { reports: true, ..fails(&["--config", "{home}/bad.toml"], "") },
            Case { reports: true, ..fails(&["--device", "cuda:4096", "--config=/dev/null"], "") },
        ],
    ),
    command(
        &["fetch-model"],
        &[
            Case { model: true, ..good(&[], "SmolLM2-135M-Instruct") },
            Case { model: true, ..good(&["--json"], "\"path\"") },
        ],
        &[line(&["SmolLM2"], "unexpected argument")],
    ),
    command(
        &["calibrate"],
        &[
            on_gpu(good(&["--quick", "--device", "cuda:0", "--state", "{home}/state"], "softcuda")),
            on_gpu(good(&["--quick", "--json", "--state={home}/state"], "\"")),
        ],
        &[
            fails(&["--device", "host"], "cuda:0"),
            line(&["--device", "tpu"], "cuda:0"),
            fails(&["--quick", "--device", "cuda:4096"], "calibrated"),
        ],
    ),
    command(
        &["completions"],
        &[
            good(&["bash"], "_kvoyant()"),
            good(&["zsh"], "#compdef kvoyant"),
            good(&["fish"], "complete -c kvoyant"),
        ],
        &[line(&["tcsh"], "bash"), line(&[], "required")],
    ),
    command(
        &["man"],
        &[good(&["{home}/man1"], "kvoyant-config-set.1")],
        &[fails(&["{home}/text/man1"], "name a folder that can be written"), line(&[], "required")],
    ),
];
