//! What memory this machine has to offer: huge pages and NUMA nodes.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Bytes of a huge page as extents use them.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Whether extents are made of huge pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Those that the operator set aside (hugetlb) as long as there are any, else ordinary ones with the advice to
    /// make them huge.
    #[default]
    Auto,
    /// Ordinary pages.
    Off,
    /// Those that the operator set aside, or none at all.
    Require,
}

/// Huge pages of 2 MiB that are set aside and that nobody has or has been promised.
#[must_use]
pub fn free_huge_pages() -> u64 {
    free_huge_pages_in(Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB"))
}

fn free_huge_pages_in(folder: &Path) -> u64 {
    let count = |name: &str| -> u64 {
        fs::read_to_string(folder.join(name)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    count("free_hugepages").saturating_sub(count("resv_hugepages"))
}

/// Huge pages of 2 MiB that are set aside, whoever has them.
#[must_use]
pub fn huge_pages_set_aside() -> u64 {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Whether the machine has this core and runs on it, as far as the system says.
#[must_use]
pub fn is_core_online(core: usize) -> bool {
    let list = fs::read_to_string("/sys/devices/system/cpu/online");
    list.map_or(true, |list| u32::try_from(core).is_ok_and(|core| lists(&list, core)))
}

/// Whether the kernel takes advice to make pages of shared memory huge.
#[must_use]
pub fn takes_huge_advice() -> bool {
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    fs::read_to_string(path).is_ok_and(|text| advised(&text))
}

/// The choice that is in force stands in brackets.
fn advised(text: &str) -> bool {
    let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(chosen, _)| chosen);
    matches!(chosen, Some("advise" | "within_size" | "always" | "force"))
}

/// Whether the machine has this NUMA node, and memory there.
#[must_use]
pub fn node_has_memory(node: u32) -> bool {
    fs::read_to_string("/sys/devices/system/node/has_memory").is_ok_and(|list| lists(&list, node))
}

/// Whether a list like `0-3,8` has a number.
fn lists(list: &str, number: u32) -> bool {
    list.trim().split(',').any(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        matches!((first.parse::<u32>(), last.parse::<u32>()), (Ok(first), Ok(last)) if (first..=last).contains(&number))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_promised_are_not_free_and_a_machine_without_any_has_none() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(free_huge_pages_in(folder.path()), 0);
        fs::write(folder.path().join("free_hugepages"), "40\n").unwrap();
        assert_eq!(free_huge_pages_in(folder.path()), 40);
        fs::write(folder.path().join("resv_hugepages"), "8\n").unwrap();
        assert_eq!(free_huge_pages_in(folder.path()), 32);
    }

    #[test]
    fn the_choice_in_brackets_is_the_one_in_force() {
        assert!(advised("always within_size [advise] never deny force"));
        assert!(!advised("always within_size advise [never] deny force"));
        assert!(!advised(""));
    }

    #[test]
    fn node_lists_have_single_numbers_and_ranges() {
        for (list, number, there) in [
            ("0\n", 0, true),
            ("0\n", 1, false),
            ("0-3,8", 2, true),
            ("0-3,8", 8, true),
            ("0-3,8", 5, false),
            ("", 0, false),
        ] {
            assert_eq!(lists(list, number), there, "{number} in {list:?}");
        }
    }
}
