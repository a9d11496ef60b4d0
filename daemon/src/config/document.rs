//! The configuration on paper: a commented file with every key, a table for the manual, and what has come out.

use std::fmt::Write;

use serde_json::{Map, Value};

use super::keys::{self, Key, SECTIONS};
use super::{Config, Loaded, PinAhead};

/// Columns of comments.
const WIDTH: usize = 100;

/// A configuration's values by key, bytes as numbers: as text they would be rounded. (None of its types can fail to be written.)
pub(crate) fn values(config: &Config) -> Map<String, Value> {
    let mut all = match serde_json::to_value(config) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    };
    let bytes = [
        ("arena", config.arena),
        ("device_memory", config.device_memory),
        ("spill_bytes", config.spill_bytes),
        ("prefixes", config.prefixes),
        ("slab", config.slab),
    ];
    all.extend(bytes.map(|(key, bytes)| (key.to_owned(), bytes.as_u64().into())));
    if let PinAhead::Bytes(bytes) = config.pin_ahead {
        all.insert("pin_ahead".into(), bytes.as_u64().into());
    }
    all
}

/// The file with every key, each with its default or an example, commented out.
#[must_use]
pub fn sample() -> String {
    let defaults = values(&Config::default());
    let mut text = String::from(
        "# Configuration of kvoyantd, with every key: what `kvoyantd --print-config` prints. Installed as /etc/kvoyant/kvoyantd.toml.\n\
         # What is commented out has its default; where a line shows something else, it is an example. The environment (KVOYANT_<KEY>) and\n\
         # flags override what is here. `kvoyantd --check` says what comes out, and from where each value comes.\n\
         # `systemctl reload kvoyantd` (SIGHUP) reads the file again: keys that say so count at once, or for new sessions; the others wait for\n\
         # a restart, which the log says.\n",
    );
    for section in SECTIONS {
        let _ = writeln!(text, "\n# ---- {} ----", section.title);
        for key in section.keys {
            let default = default_of(key, &defaults);
            let about = format!(
                "Unit: {}. Default: {default}. Change it when: {}. Counts: {}.",
                key.unit,
                key.change,
                key.reload.words()
            );
            text.push('\n');
            comment(&mut text, key.help);
            comment(&mut text, &about);
            let value = key.example.map_or_else(|| toml(key, &defaults[key.name]), str::to_owned);
            let _ = writeln!(text, "# {} = {value}", key.name);
        }
    }
    text
}

/// A table for the manual, by section.
#[must_use]
pub fn markdown() -> String {
    let defaults = values(&Config::default());
    let cell = |text: &str| text.replace('|', "\\|");
    let mut text = String::new();
    for section in SECTIONS {
        let _ = writeln!(
            text,
            "### {}\n\n| key | unit | default | what it is | change it when | counts |\n|---|---|---|---|---|---|",
            section.title
        );
        for key in section.keys {
            let _ = writeln!(
                text,
                "| `{}` | {} | {} | {} | {} | {} |",
                key.name,
                cell(key.unit),
                cell(&default_of(key, &defaults)),
                cell(key.help),
                cell(key.change),
                key.reload.words()
            );
        }
        text.push('\n');
    }
    text
}

/// What has come out, as a file that would give the same, with where each value came from.
#[must_use]
pub fn effective(loaded: &Loaded) -> String {
    let values = values(&loaded.config);
    let mut text = String::new();
    for key in keys::all() {
        let (Some(value), Some(origin)) = (values.get(key.name), loaded.origins.get(key.name)) else {
            continue;
        };
        let line = format!("{} = {}", key.name, toml(key, value));
        let _ = writeln!(text, "{line:<48} # {origin}");
    }
    text
}

/// The same for programs, with passwords in addresses or without.
#[must_use]
pub fn effective_json(loaded: &Loaded, secrets: bool) -> Value {
    let mut values = values(&loaded.config);
    let all = keys::all().filter_map(|key| {
        let (value, origin) = (values.remove(key.name)?, loaded.origins.get(key.name)?);
        let value = if secrets { value } else { public(key, &value) };
        Some((
            key.name.to_owned(),
            serde_json::json!({ "value": value, "from": origin, "changes": key.reload.words() }),
        ))
    });
    Value::Object(all.collect())
}

fn default_of(key: &Key, defaults: &Map<String, Value>) -> String {
    let bare = || toml(key, &defaults[key.name]).replace('"', "");
    key.default.map_or_else(bare, str::to_owned)
}

/// A value as TOML has it, on one line.
pub(crate) fn toml(key: &Key, value: &Value) -> String {
    match value {
        Value::Number(bytes) if key.unit.contains("bytes") => {
            bytes.as_u64().map_or_else(|| bytes.to_string(), |bytes| format!("\"{}\"", exact(bytes)))
        }
        other => inline(other),
    }
}

/// A value for people and logs: an address with a password in it is shown without that.
pub(crate) fn shown(key: &Key, value: &Value) -> String {
    toml(key, &public(key, value))
}

/// A value that everybody may see who may ask for the configuration.
pub(crate) fn public(key: &Key, value: &Value) -> Value {
    match value.as_str() {
        Some(text) if key.unit == "URL" && !text.is_empty() => without_secrets(text).into(),
        _ => value.clone(),
    }
}

fn without_secrets(text: &str) -> String {
    let hidden = || "(set)".to_owned();
    let Ok(mut url) = url::Url::parse(text) else { return hidden() };
    if url.host_str().is_none() {
        return if url.scheme() == "file" { text.to_owned() } else { hidden() };
    }
    url.set_query(None);
    match (url.set_username(""), url.set_password(None)) {
        (Ok(()), Ok(())) => url.to_string(),
        _ => hidden(),
    }
}

fn inline(value: &Value) -> String {
    match value {
        // JSON's escapes are TOML's.
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.to_string(),
        Value::Array(all) => format!("[{}]", all.iter().map(inline).collect::<Vec<_>>().join(", ")),
        Value::Object(map) if map.is_empty() => "{}".into(),
        Value::Object(map) => {
            let pairs = map.iter().map(|(key, value)| format!("{key} = {}", inline(value)));
            format!("{{ {} }}", pairs.collect::<Vec<_>>().join(", "))
        }
    }
}

/// So many bytes in the largest unit that has no fraction.
fn exact(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = units.into_iter().find(|(_, shift)| bytes != 0 && bytes.is_multiple_of(1 << shift));
    unit.map_or_else(|| format!("{bytes}B"), |(name, shift)| format!("{}{name}", bytes >> shift))
}

fn comment(text: &mut String, words: &str) {
    let mut line = String::from("#");
    for word in words.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            text.push_str(&line);
            text.push('\n');
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    text.push_str(&line);
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use bytesize::ByteSize;

    use super::*;
    use crate::config::Flags;

    fn load(text: &str) -> Result<Loaded, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kvoyantd.toml");
        std::fs::write(&file, text).unwrap();
        Loaded::load(Some(&file), Flags::default()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_sample_is_what_the_code_says_and_every_line_of_it_may_be_uncommented() {
        let sample = sample();
        let file = include_str!("../../../systemd/kvoyantd.toml");
        assert!(file == sample, "systemd/kvoyantd.toml is not what `kvoyantd --print-config` prints");
        assert_eq!(load(&sample).unwrap().config, Config::load(None, Flags::default()).unwrap());
        let mut tried = 0;
        for key in keys::all() {
            let line = sample.lines().find(|line| line.starts_with(&format!("# {} = ", key.name)));
            let line =
                line.and_then(|line| line.strip_prefix("# ")).unwrap_or_else(|| panic!("{}", key.name));
            // These need others beside them.
            let beside = match key.name {
                "remote" => "store = \"/x\"\n",
                "monitor_token" => "monitor = \"127.0.0.1:9464\"\n",
                "lane_cpus" => "lanes = 4\n",
                _ => "",
            };
            let loaded = load(&format!("{beside}{line}\n")).unwrap_or_else(|error| panic!("{line}: {error}"));
            assert!(matches!(loaded.origins[key.name], super::super::Origin::File(_)), "{}", key.name);
            tried += 1;
        }
        assert!(tried > 40, "{tried}");
    }

    #[test]
    fn defaults_in_the_sample_are_the_defaults() {
        // What has no words for its default shows the value itself.
        for key in keys::all().filter(|key| key.example.is_none()) {
            let line = sample().lines().find(|line| line.starts_with(&format!("# {} = ", key.name))).unwrap()
                [2..]
                .to_owned();
            let loaded = load(&line).unwrap();
            let (ours, default) = (values(&loaded.config), values(&Config::default()));
            assert_eq!(ours[key.name], default[key.name], "{line}");
        }
    }

    #[test]
    fn the_manuals_table_is_what_the_code_says() {
        let page = include_str!("../../../docs/configuration.md");
        let (_, tables) = page.split_once("a test holds it to that. -->").unwrap();
        assert!(
            tables.trim() == markdown().trim(),
            "docs/configuration.md does not end with what `kvoyantd --print-config=markdown` prints"
        );
    }

    #[test]
    fn what_has_come_out_gives_the_same_again_and_says_from_where() {
        let text = "arena = \"1536MiB\"\nlog = \"info,kvoyant_daemon=debug\"\nspill = [\"/a \\\"b\\\"\"]\n[quotas]\nhost = \"1GiB\"\n[quotas.user.7]\nhost = \"none\"\n";
        let loaded = load(text).unwrap();
        let printed = effective(&loaded);
        let again = load(&printed).unwrap();
        assert_eq!(again.config, loaded.config, "{printed}");
        assert!(
            printed.lines().any(|line| line.starts_with("arena = \"1536MiB\" ") && line.contains("# file ")),
            "{printed}"
        );
        assert!(
            printed.lines().any(|line| line.starts_with("keep = 2.0 ") && line.ends_with("# default")),
            "{printed}"
        );
        let json = effective_json(&loaded, false);
        assert_eq!(
            json["keep"],
            serde_json::json!({"value": 2.0, "from": "default", "changes": "new sessions"})
        );
        assert_eq!(json.as_object().unwrap().len(), keys::all().count());
    }

    #[test]
    fn no_password_is_shown() {
        for (url, seen) in [
            ("redis://me:hunter2@host:1/0?prefix=a", "redis://host:1/0"),
            ("s3://bucket/prefix", "s3://bucket/prefix"),
            ("file:///folder", "file:///folder"),
            ("hunter2", "(set)"),
            ("foo:hunter2", "(set)"),
        ] {
            assert_eq!(without_secrets(url), seen);
        }
        let loaded = load("store = \"/x\"\nremote = \"redis://me:hunter2@host:1/0\"\n").unwrap();
        assert!(!effective_json(&loaded, false).to_string().contains("hunter2"));
        assert!(effective_json(&loaded, true).to_string().contains("hunter2"));
    }

    #[test]
    fn bytes_are_written_without_loss() {
        for (bytes, text) in
            [(0, "0B"), (1, "1B"), (1 << 30, "1GiB"), (3 << 29, "1536MiB"), ((1 << 40) + 1, "1099511627777B")]
        {
            assert_eq!(exact(bytes), text);
            assert_eq!(text.parse::<ByteSize>().unwrap().as_u64(), bytes);
        }
    }
}
