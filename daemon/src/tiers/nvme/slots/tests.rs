use super::super::device::Area;
use super::*;
use proptest::prelude::*;
use std::collections::HashSet;
use std::sync::atomic::Ordering;

/// A device without a thread: what is given back is free once [`settle`] was called.
fn disk(number: usize, chunks: u64) -> (tempfile::TempDir, Arc<Disk>) {
    let folder = tempfile::tempdir().unwrap();
    let area = Area::open(folder.path(), chunks * CHUNK_BYTES, false).unwrap();
    (folder, Arc::new(Disk::new(number, area)))
}

fn settle(disk: &Disk) {
    while let Some(chunk) = disk.returned.pop() {
        (chunk.0..chunk.0 + chunk.1).for_each(|chunk| disk.free.give(chunk));
    }
}

#[test]
fn pages_of_a_group_lie_side_by_side_whatever_the_order() {
    let (_folder, disk) = disk(0, 1);
    let mut slots = Slots::new(Arc::new([disk]), 16 << 10);
    let first = slots.assign(37, None, 0).unwrap();
    let before = slots.assign(36, Some(first), 0).unwrap();
    let last = slots.assign(47, Some(before), 0).unwrap();
    assert_eq!((before + 1, last), (first, first + 10));
    assert!(slots.slot(before).is_followed_by(&slots.slot(first)));
    let other = slots.assign(48, None, 0).unwrap();
    assert!(other / 16 != first / 16, "another group lies elsewhere");
}

#[test]
fn a_copy_of_a_page_that_has_its_place_already_gets_another_group() {
    let (_folder, disk) = disk(0, 1);
    let mut slots = Slots::new(Arc::new([disk]), 16 << 10);
    let page = slots.assign(3, None, 0).unwrap();
    let copy = slots.assign(3, Some(page), 0).unwrap();
    assert_eq!(copy % 16, 3);
    assert_ne!(copy, page);
}

#[test]
fn a_slot_that_a_job_still_refers_to_is_not_given_out_again() {
    let (_folder, disk) = disk(0, 1);
    let mut slots = Slots::new(Arc::new([Arc::clone(&disk)]), 16 << 10);
    let keep = slots.assign(0, None, 0).unwrap();
    let page = slots.assign(1, Some(keep), 0).unwrap();
    let job = slots.slot(page);
    let copy = job.clone();
    assert!(slots.release(page));
    drop(job);
    assert_ne!(slots.assign(1, Some(keep), 0).unwrap(), page);
    drop(copy);
    let again = slots.assign(1, Some(keep), 0).unwrap();
    assert_eq!(again, page);

    // … and neither is its chunk.
    let job = slots.slot(keep);
    drop(slots);
    settle(&disk);
    assert_eq!(disk.free.free(), 0);
    drop(job);
    settle(&disk);
    assert_eq!(disk.free.free(), 1);
}

#[test]
fn groups_go_to_the_device_of_their_stripe_and_elsewhere_when_that_is_full_or_has_failed() {
    let (_folders, disks): (Vec<_>, Vec<_>) = (0..3).map(|number| disk(number, 1)).unzip();
    let mut slots = Slots::new(disks.clone().into(), 1 << 20);
    let on = |slots: &Slots, slot: u32| slots.slot(slot).chunk.disk.number;
    for stripe in [0, 1, 2] {
        let slot = slots.assign(0, None, stripe).unwrap();
        assert_eq!(on(&slots, slot), stripe);
    }
    let full = slots.assign(0, None, 4).unwrap_err();
    assert_eq!((full.free_bytes, full.total_bytes), (0, 3 * CHUNK_BYTES));
    assert!(full.to_string().contains("larger area"), "{full}");

    let mut slots = Slots::new(disks.clone().into(), 16 << 10);
    for disk in &disks {
        settle(disk);
    }
    assert!(slots.assign(0, None, 0).is_err(), "the first session has all of it");
    disks[0].fail("it broke".into());
    drop(slots);
    let mut slots = Slots::new(disks[..2].to_vec().into(), 16 << 10);
    disks[1].free.give(0);
    let slot = slots.assign(0, None, 0).unwrap();
    assert_eq!(on(&slots, slot), 1);
    disks[1].stopping.store(true, Ordering::Relaxed);
    assert!(slots.assign(0, None, 1).is_err());
}

#[test]
fn pages_of_a_size_that_no_device_takes_are_refused() {
    let (_folder, disk) = disk(0, 1);
    for bytes in [0, 100, 4097, (CHUNK_BYTES as usize) + 4096] {
        let mut slots = Slots::new(Arc::new([Arc::clone(&disk)]), bytes);
        assert!(slots.assign(0, None, 0).is_err(), "{bytes}");
    }
    let mut slots = Slots::new(Arc::new([Arc::clone(&disk)]), CHUNK_BYTES as usize);
    let slot = slots.assign(5, None, 7).unwrap();
    assert!(slots.release(slot));
}

proptest! {
    /// No slot is owned twice, siblings lie where they should, and releases in any order return everything.
    #[test]
    fn no_slot_is_owned_twice_and_everything_returns(
        page_bytes in prop::sample::select(vec![4096usize, 8192, 12288, 16384, 1 << 20, 3 << 20]),
        moves in proptest::collection::vec((0u8..4, 0usize..40, any::<prop::sample::Index>()), 1..200),
    ) {
        let (_folder, disk) = disk(0, 4);
        let mut slots = Slots::new(Arc::new([Arc::clone(&disk)]), page_bytes);
        let group = (CHUNK_BYTES as usize / page_bytes).min(GROUP_PAGES);
        let mut owners: Vec<(u32, usize)> = Vec::new();
        for (kind, page, index) in moves {
            match kind {
                0 | 1 => {
                    let sibling = owners.iter().rev().find(|(_, other)| other / group == page / group);
                    let Ok(slot) = slots.assign(page, sibling.map(|found| found.0), 0) else { continue };
                    prop_assert!(!owners.iter().any(|(other, _)| *other == slot), "slot {} was given out twice", slot);
                    let place = slots.slot(slot);
                    prop_assert_eq!(place.index as usize % group, page % group);
                    prop_assert!(place.offset() + page_bytes as u64 <= disk.chunk_offset(place.chunk.number) + CHUNK_BYTES);
                    if let Some((sibling, other)) = sibling.copied()
                        && !owners.iter().any(|(_, owned)| *owned == page)
                    {
                        prop_assert_eq!(i64::from(slot) - i64::from(sibling), page as i64 - other as i64);
                    }
                    owners.push((slot, page));
                }
                2 if !owners.is_empty() => {
                    let owner = owners[index.index(owners.len())];
                    slots.share(owner.0);
                    owners.push(owner);
                }
                3 if !owners.is_empty() => {
                    let (slot, _) = owners.swap_remove(index.index(owners.len()));
                    prop_assert_eq!(slots.release(slot), !owners.iter().any(|(other, _)| *other == slot));
                    settle(&disk);
                }
                _ => {}
            }
            let distinct: HashSet<u32> = owners.iter().map(|owner| owner.0).collect();
            prop_assert_eq!(slots.used(), distinct.len());
            prop_assert_eq!(slots.used_bytes(), (distinct.len() * page_bytes) as u64);
        }
        for (slot, _) in owners {
            slots.release(slot);
        }
        settle(&disk);
        prop_assert_eq!(slots.used(), 0);
        prop_assert_eq!(disk.free.free(), 4, "whole chunks go back at once");
    }
}
