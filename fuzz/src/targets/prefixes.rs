//! Hashes of prompts, and the tree of published prefixes under any sequence of calls.

use std::collections::HashMap;
use std::sync::Arc;

use kvoyant_daemon::tiers::prefix::hash::{BlockHash, PrefixKey, Scope, chain};
use kvoyant_daemon::tiers::prefix::index::{Evictions, Handle, Limits, Place, PrefixIndex, Tier};
use kvoyant_daemon::tiers::store::{ImageId, ModelKey};

use crate::input::Input;

const BLOCK_BYTES: u64 = 64;
const TOKENS_OF_A_BLOCK: usize = 2;

/// The longest known prefix is the longest that was published and has not gone; what is attached to stays; and once nobody
/// is attached everything can go.
///
/// # Panics
/// If it is not so.
pub fn run(bytes: &[u8]) {
    let mut input = Input(bytes);
    let limits = Limits { host_bytes: input.u8().into(), stored_bytes: input.u16().into() };
    let key = key(&mut input);
    let root = key.root(if input.u8() & 1 == 0 { Scope::Shared } else { Scope::Uid(7) }, input.chunk());
    let image = Arc::new("image".parse::<ImageId>().expect("an id"));
    let mut tree = Tree { index: PrefixIndex::new(limits), places: HashMap::new() };
    let mut attached: Vec<(Handle, usize)> = Vec::new();
    while !input.is_empty() {
        let call = input.u8() % 8;
        let tokens: Vec<u32> = input.chunk().iter().take(16).map(|token| u32::from(*token % 4)).collect();
        let hashes = chain(root, &tokens, TOKENS_OF_A_BLOCK);
        assert_eq!(hashes.len(), tokens.len() / TOKENS_OF_A_BLOCK);
        match call {
            0 | 1 => tree.publish(root, &hashes, &image, &mut input),
            2 => {
                let found = tree.index.longest(root, &hashes);
                assert_eq!(found.map_or(0, |found| found.blocks), tree.known(&hashes));
                let Some(found) = found else { continue };
                assert_eq!(tree.index.path(found.handle).expect("it is there").len(), found.blocks);
                if tree.index.attach(found.handle).is_ok() {
                    attached.push((found.handle, found.blocks));
                }
            }
            3 if !attached.is_empty() => {
                let (handle, _) = attached.swap_remove(usize::from(input.u8()) % attached.len());
                tree.index.detach(handle).expect("it is attached");
            }
            4 => {
                let evicted = tree.index.evict(tier(&mut input), input.u16().into());
                tree.take_out(evicted);
            }
            5 => {
                if let Some(hash) = hashes.last()
                    && let Ok(evicted) = tree.index.forget(hash)
                {
                    tree.take_out(evicted);
                }
            }
            6 | 7 => {
                if let Some(hash) = hashes.last() {
                    let evicted = match call {
                        6 => tree.index.set_host(hash, 1),
                        _ => tree.index.set_stored(hash, Arc::clone(&image)),
                    };
                    tree.take_out(evicted.unwrap_or_default());
                }
            }
            _ => {}
        }
        for (handle, blocks) in &attached {
            assert_eq!(tree.index.path(*handle).expect("somebody is attached").len(), *blocks);
        }
        for (tier, most) in [(Tier::Host, limits.host_bytes), (Tier::Stored, limits.stored_bytes)] {
            assert!(tree.index.bytes(tier) <= most, "{tier:?} holds more than it may");
        }
        assert_eq!(tree.index.len(), tree.places.len());
    }
    for (handle, _) in attached {
        tree.index.detach(handle).expect("it is attached");
    }
    // What lies in one tier waits for what lies behind it in the other.
    let mut known = usize::MAX;
    while tree.index.len() < known {
        known = tree.index.len();
        for tier in [Tier::Host, Tier::Stored] {
            let evicted = tree.index.evict(tier, u64::MAX);
            tree.take_out(evicted);
        }
    }
    assert!(tree.index.is_empty() && tree.places.is_empty());
    assert_eq!((tree.index.bytes(Tier::Host), tree.index.bytes(Tier::Stored)), (0, 0));
}

fn tier(input: &mut Input<'_>) -> Tier {
    if input.u8() & 1 == 0 { Tier::Host } else { Tier::Stored }
}

/// Texts and numbers of any kind go into a root.
fn key(input: &mut Input<'_>) -> PrefixKey {
    let mut text = || String::from_utf8_lossy(input.chunk()).into_owned();
    let (fingerprint, adapter, rope) = (text(), text(), text());
    let model = ModelKey {
        fingerprint,
        adapter,
        layers: input.u32(),
        kv_heads: 1,
        head_dim: 4,
        latent_values: 0,
        dtype: 1,
        page_rows: input.u32(),
        row_bytes: 16,
    };
    PrefixKey { model, rope }
}

/// The index, and beside it what it must know.
struct Tree {
    index: PrefixIndex<u32>,
    places: HashMap<BlockHash, ()>,
}

impl Tree {
    fn known(&self, hashes: &[BlockHash]) -> usize {
        hashes.iter().take_while(|hash| self.places.contains_key(hash)).count()
    }

    fn publish(
        &mut self,
        root: BlockHash,
        hashes: &[BlockHash],
        image: &Arc<ImageId>,
        input: &mut Input<'_>,
    ) {
        let known = self.index.known(root, hashes);
        assert_eq!(known, self.known(hashes));
        let place = || match input.u8() % 3 {
            0 => Place::Host(1),
            1 => Place::Stored(Arc::clone(image)),
            _ => Place::Both(1, Arc::clone(image)),
        };
        let places: Vec<_> = std::iter::repeat_with(place).take(hashes.len() - known).collect();
        if let Ok(published) = self.index.publish(root, hashes, places, BLOCK_BYTES) {
            assert_eq!(published.known, known);
            self.places.extend(hashes.iter().map(|hash| (*hash, ())));
            self.take_out(published.evicted);
        }
    }

    fn take_out(&mut self, evicted: Evictions<u32>) {
        for hash in evicted.blocks {
            assert!(self.places.remove(&hash).is_some(), "block {hash} goes and was not there");
        }
    }
}

/// A few prompts that begin alike.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut head = vec![255, 0, 4];
    head.extend_from_slice(b"\x08deadbeef\x00\x0btheta=10000");
    head.extend_from_slice(&2_u32.to_le_bytes());
    head.extend_from_slice(&16_u32.to_le_bytes());
    head.extend_from_slice(b"\x01\x04salt");
    let calls: [&[u8]; 4] = [
        b"\x00\x04\x01\x02\x03\x00\x00\x01\x02\x06\x01\x02\x03\x00\x01\x01\x03\x00\x00",
        b"\x00\x06\x01\x02\x03\x00\x01\x01\x00\x00\x00\x02\x04\x01\x02\x03\x00\x04\x00\x00\xff\x00\x05\x02\x01\x02",
        b"\x00\x02\x01\x02\x01\x06\x02\x01\x02\x07\x02\x01\x02\x04\x00\x01\x40\x00",
        b"\x00\x02\x00\x00\x00\x00\x04\x00\x00\x01\x01\x00\x00\x08\x00\x00\x01\x01\x02\x02\x03\x03\x00\x00\x00",
    ];
    calls.iter().map(|calls| [head.as_slice(), calls].concat()).collect()
}
