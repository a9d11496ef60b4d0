//! What a start would find wrong, looked for without changing anything: what `kvoyantd --check` says beyond the values themselves.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use bytesize::ByteSize;
use kvoyant_protocol::EXTENT_BYTES;
use nix::unistd::{AccessFlags, eaccess};

use super::{Config, ConfigError, PinAhead};
use crate::admin::Token;
use crate::tiers::host_memory::{
    HUGE_PAGE_BYTES, HugePages, free_huge_pages, huge_pages_set_aside, is_core_online,
};
use crate::tiers::store::check_url;

impl Config {
    /// Looks at the places that are named.
    ///
    /// # Errors
    /// The first one that a start would refuse.
    pub fn look_around(&self) -> Result<(), ConfigError> {
        let bad = |key, value: String, reason: String| Err(ConfigError::Value { key, value, reason });
        for path in &self.spill {
            if let Err(reason) = look_at_area(path) {
                return bad("spill", path.display().to_string(), reason);
            }
        }
        if !self.store.as_os_str().is_empty()
            && let Some(there) = self.store.ancestors().find(|path| path.exists())
            && !there.is_dir()
        {
            let reason = format!("{} is no folder", there.display());
            return bad("store", self.store.display().to_string(), reason);
        }
        if !self.remote.is_empty()
            && let Err(error) = check_url(&self.remote)
        {
            // What it says has no password in it.
            return bad("remote", "a URL".into(), error.to_string());
        }
        if !self.monitor_token.as_os_str().is_empty()
            && let Err(error) = Token::read(&self.monitor_token)
        {
            return bad("monitor_token", self.monitor_token.display().to_string(), error.to_string());
        }
        Ok(())
    }

    /// What a start goes on with, though it is hardly what was meant.
    #[must_use]
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        let arena = self.arena.as_u64();
        let missing: Vec<_> = self.lane_cpus.iter().filter(|core| !is_core_online(**core)).collect();
        if !missing.is_empty() {
            doubts.push(format!(
                "lane_cpus: this machine has no core {missing:?} that is online; those lanes run unpinned"
            ));
        }
        let mut more = |key: &str, bytes: ByteSize| {
            if bytes.as_u64() > arena {
                doubts.push(format!(
                    "{key} = {bytes} is more than the arena, {}: it counts as all of it",
                    self.arena
                ));
            }
        };
        more("prefixes", self.prefixes);
        if let PinAhead::Bytes(bytes) = self.pin_ahead {
            more("pin_ahead", bytes);
        }
        let pages = arena / EXTENT_BYTES as u64 * (EXTENT_BYTES as u64 / HUGE_PAGE_BYTES);
        let free = free_huge_pages();
        if self.huge_pages == HugePages::Require && free < pages {
            doubts.push(format!(
                "huge_pages = \"require\", and {free} huge pages of 2 MiB are free where the arena takes {pages}: sessions that need more are \
                 refused; set them aside with `sysctl vm.nr_hugepages={}`, or set huge_pages = \"auto\"",
                huge_pages_set_aside() + pages - free
            ));
        }
        doubts
    }
}

/// What is wrong with a place of a spill area.
fn look_at_area(path: &Path) -> Result<(), String> {
    let folder = match std::fs::metadata(path) {
        Ok(there) if there.is_dir() => path,
        Ok(there) if there.is_file() || there.file_type().is_block_device() => return Ok(()),
        Ok(_) => return Err("it is neither a folder, nor a regular file, nor a block device".into()),
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.to_string()),
        Err(_) => match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) if parent.is_dir() => parent,
            _ => return Err("there is no such file, and no folder for one: make the folder".into()),
        },
    };
    eaccess(folder, AccessFlags::W_OK | AccessFlags::X_OK)
        .map_err(|errno| format!("no file can be made in {}: {}", folder.display(), errno.desc()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_a_start_would_refuse_are_found_and_nothing_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let (inside, file) = (folder.path().join("new"), folder.path().join("file"));
        std::fs::write(&file, "").unwrap();
        let good = Config {
            spill: vec![folder.path().into(), inside.clone(), file.clone()],
            store: inside.join("store"),
            remote: format!("file://{}", inside.display()),
            ..Config::default()
        };
        good.look_around().unwrap();
        assert!(!inside.exists());
        for (bad, key) in [
            (Config { spill: vec![inside.join("a")], ..good.clone() }, "spill"),
            (Config { spill: vec!["/dev/null".into()], ..good.clone() }, "spill"),
            (Config { store: file.join("a"), ..good.clone() }, "store"),
            (Config { monitor_token: inside.clone(), ..good.clone() }, "monitor_token"),
            (Config { remote: "ftp://x".into(), ..good.clone() }, "remote"),
            (Config { remote: "s3://".into(), ..good.clone() }, "remote"),
            (Config { remote: "redis://".into(), ..good.clone() }, "remote"),
            (Config { remote: "file://rel".into(), ..good.clone() }, "remote"),
        ] {
            let error = bad.look_around().unwrap_err().to_string();
            assert!(error.starts_with(&format!("bad configuration: {key} = ")), "{error}");
        }
    }

    #[test]
    fn what_is_hardly_meant_is_said() {
        let sane = Config { huge_pages: HugePages::Off, ..Config::default() };
        assert_eq!(sane.doubts(), Vec::<String>::new());
        let odd = Config {
            lane_cpus: vec![0, 99_999],
            prefixes: ByteSize::tib(1),
            pin_ahead: PinAhead::Bytes(ByteSize::tib(1)),
            arena: ByteSize::gib(512),
            huge_pages: HugePages::Require,
            ..sane
        };
        let doubts = odd.doubts();
        assert_eq!(doubts.len(), 4, "{doubts:?}");
        assert!(doubts[0].contains("[99999]") && doubts[3].contains("sysctl vm.nr_hugepages="), "{doubts:?}");
    }
}
