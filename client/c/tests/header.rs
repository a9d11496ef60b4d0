//! The header is what the code gives, and its declarations are those that programs were built with.
//!
//! `KVOYANT_BLESS=1 cargo test -p kvoyant-c` writes both files anew. What that changes is looked at before it is committed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn here(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

fn text(file: &str) -> String {
    fs::read_to_string(here(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn blessed() -> bool {
    std::env::var_os("KVOYANT_BLESS").is_some()
}

fn write(file: &str, text: &str) {
    fs::write(here(file), text).unwrap_or_else(|error| panic!("{file}: {error}"));
}

/// The header as the sources have it now.
fn generated() -> String {
    let config = cbindgen::Config::from_file(here("cbindgen.toml")).expect("cbindgen.toml");
    let mut builder = cbindgen::Builder::new().with_config(config).with_header(HEAD);
    for room in ["types", "status", "model", "sequence", "rows", "request", "answer", "images"] {
        builder = builder.with_src(here(&format!("src/{room}.rs")));
    }
    let mut bytes = Vec::new();
    builder.generate().expect("the sources").write(&mut bytes);
    String::from_utf8(bytes).expect("UTF-8")
}

const HEAD: &str = include_str!("../include/head.txt");

/// A declaration without its comments, in one line.
fn plain(header: &str) -> String {
    let lines = header.lines().map(|line| line.split("//").next().unwrap_or_default());
    let lines = lines.filter(|line| !line.trim_start().starts_with('#'));
    lines.flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ")
}

/// Every declaration of a header, by the name that it declares, with constants.
fn declarations(header: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for line in header.lines().filter(|line| line.starts_with("#define KVOYANT_")) {
        let line = line.split("//").next().unwrap_or_default().trim();
        if let [_, name, _, ..] = line.split_whitespace().collect::<Vec<_>>()[..] {
            found.insert(name.to_owned(), line.to_owned());
        }
    }
    let (mut depth, mut start) = (0, 0);
    let plain = plain(header).replace("extern \"C\" {", "").replace("} // extern", "");
    for (at, letter) in plain.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ';' if depth == 0 => {
                let item = plain[start..=at].trim();
                start = at + 1;
                found.insert(name_of(item), item.to_owned());
            }
            _ => {}
        }
    }
    found
}

fn name_of(item: &str) -> String {
    let words = |text: &str| {
        let split = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
        split.filter(|word| word.starts_with("kvoyant_")).map(str::to_owned).collect::<Vec<_>>()
    };
    if let Some((before, _)) = item.split_once('(') {
        return words(before).pop().unwrap_or_else(|| panic!("a function without a name: {item}"));
    }
    let kind = item.split_whitespace().next().unwrap_or_default();
    let name = words(item).into_iter().next();
    format!("{kind} {}", name.unwrap_or_else(|| panic!("a declaration without a name: {item}")))
}

/// Whether a struct that says its size, or an enum, has only grown at its end.
fn has_grown(before: &str, now: &str) -> bool {
    let fields = |item: &str| {
        item.split_once('{')
            .and_then(|(_, rest)| rest.rsplit_once('}'))
            .map(|(fields, _)| fields.trim().to_owned())
    };
    let (Some(old), Some(new)) = (fields(before), fields(now)) else { return false };
    let may = old.starts_with("size_t size;") || before.contains("enum ");
    may && new.trim_end_matches(',').starts_with(old.trim_end_matches(','))
}

#[test]
fn the_header_is_what_the_code_gives() {
    let now = generated();
    if blessed() {
        write("include/kvoyant.h", &now);
    }
    let checked_in = text("include/kvoyant.h");
    for (at, (line, wanted)) in checked_in.lines().zip(now.lines()).enumerate() {
        assert_eq!(
            line,
            wanted,
            "client/c/include/kvoyant.h:{} is old: KVOYANT_BLESS=1 cargo test -p kvoyant-c",
            at + 1
        );
    }
    assert_eq!(checked_in, now, "client/c/include/kvoyant.h is old: KVOYANT_BLESS=1 cargo test -p kvoyant-c");
}

#[test]
fn programs_that_were_built_with_this_interface_still_work_with_it() {
    let file = format!("abi/kvoyant-{}.txt", kvoyant::KVOYANT_ABI);
    let now = declarations(&generated());
    if blessed() {
        let list: Vec<_> = now.iter().map(|(name, item)| format!("{name}: {item}\n")).collect();
        write(&file, &list.concat());
    }
    let before: BTreeMap<String, String> = text(&file)
        .lines()
        .filter_map(|line| line.split_once(": ").map(|(name, item)| (name.to_owned(), item.to_owned())))
        .collect();
    let broken = before
        .iter()
        .filter(|(name, item)| now.get(*name).is_none_or(|now| now != *item && !has_grown(item, now)));
    let broken: Vec<_> = broken
        .map(|(name, item)| {
            format!("{name}\n  was: {item}\n  is:  {}", now.get(name).map_or("gone", |item| item))
        })
        .collect();
    assert!(
        broken.is_empty(),
        "programs that were built before do not work with this any more:\n{}\nUndo it, or, if it must be, raise KVOYANT_ABI, which is in \
         the names of the library and of its symbols' version, begin abi/kvoyant-{}.txt with KVOYANT_BLESS=1 cargo test -p kvoyant-c, and \
         say so in CHANGELOG.md",
        broken.join("\n"),
        kvoyant::KVOYANT_ABI + 1,
    );
    let new: Vec<_> =
        now.iter().filter(|(name, item)| before.get(*name) != Some(*item)).map(|(name, _)| &**name).collect();
    assert!(
        new.is_empty(),
        "new in the interface, which breaks nothing: {}. KVOYANT_BLESS=1 cargo test -p kvoyant-c takes it into {file}; raise the \
         workspace's minor version before it is released",
        new.join(", "),
    );
}

#[test]
fn what_breaks_programs_is_told_from_what_does_not() {
    let list = |item: &str| declarations(&format!("{item}\n#define KVOYANT_ABI 0\n"));
    let old = list(
        "typedef struct kvoyant_a {\n    size_t size; // its size\n    uint32_t x;\n} kvoyant_a;\nuint32_t kvoyant_f(struct kvoyant_a a);",
    );
    assert_eq!(old.keys().collect::<Vec<_>>(), ["KVOYANT_ABI", "kvoyant_f", "typedef kvoyant_a"]);
    let grown = list("typedef struct kvoyant_a { size_t size; uint32_t x; uint32_t y; } kvoyant_a;");
    let changed = list("typedef struct kvoyant_a { size_t size; uint64_t x; } kvoyant_a;");
    let key = "typedef kvoyant_a";
    assert!(has_grown(&old[key], &grown[key]) && !has_grown(&old[key], &changed[key]));
    assert!(!has_grown(&grown[key], &old[key]), "nothing shrinks");
    let unsized_ = "typedef struct kvoyant_b { uint32_t x; } kvoyant_b;";
    assert!(!has_grown(unsized_, "typedef struct kvoyant_b { uint32_t x; uint32_t y; } kvoyant_b;"));
}
