use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::tiers::prefix::hash::{Scope, chain, tests::key};

const BLOCK_TOKENS: usize = 2;
const BLOCK_BYTES: u64 = 10;

fn root() -> BlockHash {
    key().root(Scope::Uid(1), b"salt")
}

fn hashes(tokens: &[u32]) -> Vec<BlockHash> {
    chain(root(), tokens, BLOCK_TOKENS)
}

fn image(number: u32) -> Arc<ImageId> {
    Arc::new(format!("image-{number}").parse().unwrap())
}

fn index(host_bytes: u64, stored_bytes: u64) -> PrefixIndex<u32> {
    PrefixIndex::new(Limits { host_bytes, stored_bytes })
}

/// Publishes on the host, with the numbers from `first` on as payloads.
fn publish(index: &mut PrefixIndex<u32>, tokens: &[u32], first: u32) -> Result<Published<u32>, PrefixError> {
    let hashes = hashes(tokens);
    let new = hashes.len() - index.known(root(), &hashes);
    let places = (first..).take(new).map(Place::Host).collect();
    index.publish(root(), &hashes, places, BLOCK_BYTES)
}

#[test]
fn prefixes_share_their_first_blocks_and_the_longest_is_found() {
    let mut index = index(1000, 1000);
    let first = publish(&mut index, &[1, 2, 3, 4, 5, 6], 0).unwrap();
    let second = publish(&mut index, &[1, 2, 3, 4, 7, 8, 9], 10).unwrap();
    assert_eq!((first.known, second.known, index.len()), (0, 2, 4));
    let found = index.longest(root(), &hashes(&[1, 2, 3, 4, 7, 8, 1, 1])).unwrap();
    assert_eq!(found, Match { handle: second.handle, blocks: 3 });
    let path = index.path(found.handle).unwrap();
    assert_eq!(path.iter().map(|(_, place)| *place.host().unwrap()).collect::<Vec<_>>(), [0, 1, 10]);
    assert_eq!(index.longest(root(), &hashes(&[1, 2, 9, 9])).unwrap().blocks, 1);
    assert_eq!(index.longest(root(), &hashes(&[2, 2])), None);
    assert_eq!(index.longest(root(), &[]), None);
    let counters = Counters { hits: 2, hit_blocks: 4, misses: 2, ..Counters::default() };
    assert_eq!(index.counters(), counters);
}

#[test]
fn what_differs_in_anything_but_tokens_never_matches() {
    let mut index = index(1000, 1000);
    publish(&mut index, &[1, 2, 3, 4], 0).unwrap();
    let mut keys = [key(), key(), key(), key()];
    keys[0].model.fingerprint.push('0');
    keys[1].model.adapter.push('0');
    keys[2].rope.push('0');
    keys[3].model.dtype += 1;
    let mut roots: Vec<_> = keys.iter().map(|key| key.root(Scope::Uid(1), b"salt")).collect();
    roots.push(key().root(Scope::Uid(2), b"salt"));
    roots.push(key().root(Scope::Shared, b"salt"));
    roots.push(key().root(Scope::Uid(1), b"other salt"));
    for other in roots {
        assert_eq!(index.longest(other, &chain(other, &[1, 2, 3, 4], BLOCK_TOKENS)), None);
        // Not even with hashes that belong to another root.
        assert_eq!(index.longest(other, &hashes(&[1, 2, 3, 4])), None);
    }
    assert!(index.longest(root(), &hashes(&[1, 2, 3, 4])).is_some());
}

#[test]
fn what_is_used_stays_and_leaves_go_oldest_first() {
    let mut index = index(50, 0);
    let a = publish(&mut index, &[1, 1, 1, 1], 0).unwrap().handle;
    publish(&mut index, &[2, 2, 2, 2], 10).unwrap();
    index.attach(a).unwrap();
    index.longest(root(), &hashes(&[2, 2])).unwrap();
    // The leaf [2 2 2 2] is older than its parent, and goes although a block would fit without it.
    let new = publish(&mut index, &[3, 3, 3, 3], 20).unwrap();
    assert_eq!((new.evicted.payloads, index.bytes(Tier::Host)), (vec![11], 50));
    assert_eq!(index.longest(root(), &hashes(&[2, 2, 2, 2])).unwrap().blocks, 1);
    // Five more cannot be had: two are used.
    let error = publish(&mut index, &[4; 8], 30).unwrap_err();
    assert_eq!(error, PrefixError::Full { tier: Tier::Host, wanted_bytes: 40, free_bytes: 30 });
    assert_eq!(index.bytes(Tier::Host), 50, "something went for nothing");
    let part = index.longest(root(), &hashes(&[1, 1])).unwrap().handle;
    assert_eq!(index.detach(part), Err(PrefixError::NotAttached), "its user is attached to a longer one");
    index.detach(a).unwrap();
    assert_eq!(index.detach(a), Err(PrefixError::NotAttached));
    let new = publish(&mut index, &[4; 8], 30).unwrap();
    assert_eq!(index.bytes(Tier::Host), 50);
    assert_eq!(new.evicted.payloads.len(), 4);
    assert_eq!(index.counters().host_evictions, 5);
    assert_eq!(index.attach(a), Err(PrefixError::Gone));
}

#[test]
fn what_is_stored_survives_on_the_host_and_the_other_way_round() {
    let mut index = index(20, 40);
    let a = publish(&mut index, &[1, 1, 1, 1], 0).unwrap().handle;
    let blocks = hashes(&[1, 1, 1, 1]);
    for hash in &blocks {
        index.set_stored(hash, image(1)).unwrap();
    }
    assert_eq!((index.bytes(Tier::Host), index.bytes(Tier::Stored)), (20, 20));
    let evicted = publish(&mut index, &[2, 2, 2, 2], 10).unwrap().evicted;
    assert_eq!((evicted.payloads, evicted.blocks, evicted.images), (vec![1, 0], vec![], vec![]));
    assert_eq!(index.longest(root(), &blocks).unwrap().handle, a);
    assert!(index.path(a).unwrap().iter().all(|(_, place)| **place == Place::Stored(image(1))));
    // Back to the host, for somebody who attaches.
    index.attach(a).unwrap();
    let evicted: Vec<_> = (20..).zip(&blocks).map(|(payload, hash)| index.set_host(hash, payload)).collect();
    assert_eq!(
        evicted.into_iter().flat_map(|evicted| evicted.unwrap().payloads).collect::<Vec<_>>(),
        [11, 10]
    );
    assert_eq!(index.evict(Tier::Stored, 100), Evictions::default(), "it is used");
    assert_eq!(index.forget(&blocks[0]), Err(PrefixError::InUse));
    index.detach(a).unwrap();
    let evicted = index.evict(Tier::Stored, 1);
    assert_eq!((evicted.images.len(), index.bytes(Tier::Stored)), (0, 10));
    let evicted = index.evict(Tier::Stored, 1);
    assert_eq!((evicted.images, index.bytes(Tier::Stored)), (vec![image(1)], 0));
    let evicted = index.forget(&blocks[0]).unwrap();
    assert_eq!((evicted.payloads.len(), evicted.blocks.len(), index.is_empty()), (2, 2, true));
}

#[test]
fn chains_that_are_mixed_up_are_refused() {
    let mut index = index(1000, 1000);
    publish(&mut index, &[1, 1, 2, 2], 0).unwrap();
    let (a, b) = (hashes(&[1, 1, 2, 2]), hashes(&[3, 3]));
    let places = |count| (0..count).map(Place::Host).collect::<Vec<_>>();
    let mixed = [b[0], a[1]];
    assert_eq!(index.publish(root(), &mixed, places(2), 1), Err(PrefixError::Chain(a[1])));
    assert_eq!(index.publish(root(), &[b[0], b[0]], places(2), 1), Err(PrefixError::Chain(b[0])));
    assert_eq!(index.publish(root(), &[], vec![], 1), Err(PrefixError::Empty));
    let wrong = PrefixError::Places { wanted: 1, given: 2 };
    assert_eq!(index.publish(root(), &b, places(2), 1), Err(wrong));
    assert_eq!(index.len(), 2);
}

/// What the index is compared with: every block by its tokens.
#[derive(Default)]
struct Naive {
    blocks: HashMap<BlockHash, Vec<u32>>,
    attached: Vec<(Handle, Vec<u32>)>,
    payloads: HashSet<u32>,
}

impl Naive {
    fn longest(&self, tokens: &[u32]) -> usize {
        let full = (1..=tokens.len() / BLOCK_TOKENS).rev();
        let known =
            |blocks: &usize| self.blocks.values().any(|known| *known == tokens[..blocks * BLOCK_TOKENS]);
        full.into_iter().find(known).unwrap_or(0)
    }

    /// Whether somebody uses the block that ends these tokens.
    fn uses(&self, tokens: &[u32]) -> bool {
        self.attached.iter().any(|(_, attached)| attached.starts_with(tokens))
    }

    fn gone(&mut self, evicted: &Evictions<u32>) -> Result<(), TestCaseError> {
        for payload in &evicted.payloads {
            prop_assert!(self.payloads.remove(payload), "payload {} goes twice", payload);
        }
        for hash in &evicted.blocks {
            let tokens = self.blocks.remove(hash);
            let tokens = tokens.ok_or_else(|| TestCaseError::fail("a block goes twice"))?;
            prop_assert!(!self.uses(&tokens), "{:?} is used and goes", tokens);
            let behind = self.blocks.values().any(|other| other.starts_with(&tokens));
            prop_assert!(!behind, "{:?} goes and a block behind it stays", tokens);
        }
        Ok(())
    }

    fn check(&self, index: &PrefixIndex<u32>) -> Result<(), TestCaseError> {
        prop_assert_eq!(index.len(), self.blocks.len());
        let (mut bytes, mut payloads) = ([0, 0], HashSet::new());
        let mut images: HashMap<Arc<ImageId>, usize> = HashMap::new();
        for (slot, node) in index.nodes.iter() {
            for (sum, tier) in bytes.iter_mut().zip([Tier::Host, Tier::Stored]) {
                *sum += if node.place.is_in(tier) { node.bytes } else { 0 };
                let listed = index.account(tier).idle.contains(&(node.used, slot));
                prop_assert_eq!(listed, index.may_leave(slot, tier));
            }
            payloads.extend(node.place.host().copied());
            if let Some(image) = node.place.image() {
                *images.entry(Arc::clone(image)).or_default() += 1;
            }
        }
        prop_assert_eq!([index.bytes(Tier::Host), index.bytes(Tier::Stored)], bytes);
        prop_assert!(bytes[0] <= index.limits.host_bytes && bytes[1] <= index.limits.stored_bytes);
        prop_assert_eq!(&payloads, &self.payloads, "a payload is lost");
        prop_assert_eq!(&images, &index.images);
        for (handle, tokens) in &self.attached {
            let path = index.path(*handle);
            let path = path.map_err(|error| TestCaseError::fail(format!("{tokens:?}: {error}")))?;
            prop_assert_eq!(path.len() * BLOCK_TOKENS, tokens.len());
        }
        Ok(())
    }
}

/// What happens next: a kind, tokens of a small alphabet, and a choice among whatever there is.
fn moves() -> impl Strategy<Value = Vec<(u8, Vec<u32>, prop::sample::Index)>> {
    let tokens = proptest::collection::vec(0u32..3, 2..11);
    proptest::collection::vec((0u8..9, tokens, any::<prop::sample::Index>()), 1..120)
}

proptest! {
    /// Whatever happens: the longest match is that of brute force, nothing that is used goes, the accounts are exact,
    /// and what cannot be done changes nothing.
    #[test]
    fn the_index_agrees_with_brute_force(moves in moves(), host in 3u64..12, stored in 0u64..12) {
        let mut index = index(host * BLOCK_BYTES, stored * BLOCK_BYTES);
        let mut naive = Naive::default();
        for (number, (kind, tokens, choice)) in (0u32..).zip(moves) {
            let full = tokens.len() / BLOCK_TOKENS * BLOCK_TOKENS;
            let hashes = hashes(&tokens);
            let known = index.known(root(), &hashes);
            prop_assert_eq!(known, naive.longest(&tokens));
            // A block of those that are known.
            let mut all: Vec<_> = naive.blocks.iter().map(|(hash, tokens)| (tokens.clone(), *hash)).collect();
            all.sort();
            let some = (!all.is_empty()).then(|| all[choice.index(all.len())].clone());
            let before = (index.bytes(Tier::Host), index.bytes(Tier::Stored), index.len());
            let unchanged = |index: &PrefixIndex<u32>| {
                before == (index.bytes(Tier::Host), index.bytes(Tier::Stored), index.len())
            };
            let payloads = || (number * 100..).take(hashes.len() - known);
            match (kind, some) {
                (0 | 1, _) => {
                    let places: Vec<_> = payloads().map(|payload| match payload % 3 + u32::from(kind) {
                        0 | 1 => Place::Host(payload),
                        2 => Place::Both(payload, image(number)),
                        _ => Place::Stored(image(number)),
                    }).collect();
                    match index.publish(root(), &hashes, places.clone(), BLOCK_BYTES) {
                        Ok(published) => {
                            prop_assert_eq!(published.known, known);
                            naive.gone(&published.evicted)?;
                            naive.payloads.extend(places.iter().filter_map(Place::host));
                            for (hash, end) in hashes.iter().zip((BLOCK_TOKENS..).step_by(BLOCK_TOKENS)) {
                                naive.blocks.insert(*hash, tokens[..end].to_vec());
                            }
                        }
                        Err(error) => {
                            prop_assert!(matches!(error, PrefixError::Full { .. }), "{}", error);
                            prop_assert!(unchanged(&index));
                        }
                    }
                }
                (2, _) => match index.longest(root(), &hashes) {
                    Some(found) => {
                        prop_assert_eq!(found.blocks, known);
                        index.attach(found.handle).unwrap();
                        naive.attached.push((found.handle, tokens[..known * BLOCK_TOKENS].to_vec()));
                    }
                    None => prop_assert_eq!(known, 0),
                },
                (3 | 4, _) if !naive.attached.is_empty() => {
                    let (handle, _) = naive.attached.swap_remove(choice.index(naive.attached.len()));
                    index.detach(handle).unwrap();
                }
                (5, Some((_, hash))) => match index.set_stored(&hash, image(1000)) {
                    Ok(evicted) => naive.gone(&evicted)?,
                    Err(_) => prop_assert!(unchanged(&index)),
                },
                (6, Some((_, hash))) => {
                    let slot = index.slots[&hash];
                    let new = !index.nodes.get(slot).place.is_in(Tier::Host);
                    match index.set_host(&hash, number * 100) {
                        Ok(evicted) => {
                            naive.gone(&evicted)?;
                            naive.payloads.extend(new.then_some(number * 100));
                        }
                        Err(_) => prop_assert!(unchanged(&index)),
                    }
                }
                (7, Some((tokens, hash))) => match index.forget(&hash) {
                    Ok(evicted) => {
                        naive.gone(&evicted)?;
                        prop_assert_eq!(naive.longest(&tokens), tokens.len() / BLOCK_TOKENS - 1);
                    }
                    Err(error) => {
                        prop_assert_eq!(error, PrefixError::InUse);
                        prop_assert!(naive.uses(&tokens));
                    }
                },
                (8, _) => {
                    let tier = if full.is_multiple_of(4) { Tier::Host } else { Tier::Stored };
                    let staying = index.staying_bytes(tier);
                    let evicted = index.evict(tier, u64::MAX);
                    naive.gone(&evicted)?;
                    prop_assert_eq!(index.bytes(tier), staying, "what can go goes, and nothing else");
                }
                _ => {}
            }
            naive.check(&index)?;
        }
        for (handle, _) in naive.attached.drain(..) {
            index.detach(handle).unwrap();
        }
        // Blocks in one tier only wait for those behind them in the other: once for each change along a chain.
        for _ in 0..6 {
            for tier in [Tier::Host, Tier::Stored] {
                naive.gone(&index.evict(tier, u64::MAX))?;
            }
        }
        naive.check(&index)?;
        prop_assert_eq!((index.bytes(Tier::Host), index.bytes(Tier::Stored)), (0, 0), "something can never go");
    }
}
