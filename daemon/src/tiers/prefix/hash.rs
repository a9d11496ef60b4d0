//! Chained hashes of blocks of tokens.
//!
//! ```text
//! root     = H(model, adapter, RoPE, row format, page, scope, salt)
//! block[0] = H(root,     tokens of block 0)
//! block[i] = H(block[i-1], tokens of block i)
//! ```
//!
//! A row depends on everything before its token and on nothing after it, so equal hashes mean equal rows. H is BLAKE3
//! in its key derivation mode, with another context for roots than for blocks. Whoever does not know another tenant's
//! salt cannot find out by asking which prompts that tenant has published.

use std::fmt;

use crate::tiers::store::ModelKey;

/// What roots are derived in. A new version of the formula gets a new text.
const ROOT: &str = "kvoyant 2026-11-29 prefix root v1";

/// What blocks are derived in.
const BLOCK: &str = "kvoyant 2026-11-29 prefix block v1";

/// What a block's rows depend on, in 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for BlockHash {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockHash({self})")
    }
}

/// Who may attach to a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Sessions of one user.
    Uid(u32),
    /// Sessions of every user that know the salt; with an empty salt all of them. Somebody chose this on purpose.
    Shared,
}

/// What, beside the tokens, makes rows what they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixKey {
    /// Model, adapter, row format and pages.
    pub model: ModelKey,
    /// The rotation of keys, in whatever form the engine has it (base, scaling and its parameters): the same text, the
    /// same rotation.
    pub rope: String,
}

impl PrefixKey {
    /// The root of all chains of this key, scope and salt.
    #[must_use]
    pub fn root(&self, scope: Scope, salt: &[u8]) -> BlockHash {
        let ModelKey {
            fingerprint,
            adapter,
            layers,
            kv_heads,
            head_dim,
            latent_values,
            dtype,
            page_rows,
            row_bytes,
        } = &self.model;
        let mut hasher = blake3::Hasher::new_derive_key(ROOT);
        // Each text with its length before it, so that none can pass for a part of its neighbour.
        for text in [fingerprint.as_bytes(), adapter.as_bytes(), self.rope.as_bytes(), salt] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text);
        }
        let dtype = u32::from(*dtype);
        for number in [*layers, *kv_heads, *head_dim, *latent_values, dtype, *page_rows, *row_bytes] {
            hasher.update(&number.to_le_bytes());
        }
        let (kind, uid) = match scope {
            Scope::Uid(uid) => (0u32, uid),
            Scope::Shared => (1, 0),
        };
        hasher.update(&kind.to_le_bytes());
        hasher.update(&uid.to_le_bytes());
        BlockHash(hasher.finalize().into())
    }
}

/// Hashes of the full blocks of `block_tokens` tokens; what is left at the end has none. With blocks of 0 tokens there
/// are none at all.
#[must_use]
pub fn chain(root: BlockHash, tokens: &[u32], block_tokens: usize) -> Vec<BlockHash> {
    if block_tokens == 0 {
        return Vec::new();
    }
    let mut bytes = Vec::with_capacity(block_tokens.min(tokens.len()) * 4);
    let mut parent = root;
    let blocks = tokens.chunks_exact(block_tokens).map(|block| {
        bytes.clear();
        bytes.extend(block.iter().flat_map(|token| token.to_le_bytes()));
        let mut hasher = blake3::Hasher::new_derive_key(BLOCK);
        hasher.update(&parent.0);
        hasher.update(&bytes);
        parent = BlockHash(hasher.finalize().into());
        parent
    });
    blocks.collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    pub(in super::super) fn key() -> PrefixKey {
        let model = ModelKey {
            fingerprint: "00112233".into(),
            adapter: "a".into(),
            layers: 2,
            kv_heads: 2,
            head_dim: 4,
            latent_values: 0,
            dtype: 1,
            page_rows: 4,
            row_bytes: 16,
        };
        PrefixKey { model, rope: "theta=10000".into() }
    }

    #[test]
    fn whatever_makes_rows_differ_makes_roots_differ() {
        let changes: [fn(&mut PrefixKey); 10] = [
            |key| key.model.fingerprint.push('0'),
            |key| key.model.adapter.push('0'),
            |key| key.model.layers += 1,
            |key| key.model.kv_heads += 1,
            |key| key.model.head_dim += 1,
            |key| key.model.latent_values += 1,
            |key| key.model.dtype += 1,
            |key| key.model.page_rows += 1,
            |key| key.model.row_bytes += 1,
            |key| key.rope.push('0'),
        ];
        let mut keys = vec![key()];
        for change in changes {
            let mut other = key();
            change(&mut other);
            keys.push(other);
        }
        let mut roots = HashSet::new();
        for key in &keys {
            for scope in [Scope::Uid(0), Scope::Uid(1), Scope::Shared] {
                for salt in [&b""[..], b"a", b"b", b"ab"] {
                    assert!(roots.insert(key.root(scope, salt)), "{key:?} {scope:?} {salt:?}");
                }
            }
        }
        assert_eq!(roots.len(), 11 * 3 * 4);
    }

    #[test]
    fn texts_do_not_run_into_each_other() {
        let root = |fingerprint: &str, adapter: &str| {
            let mut key = key();
            fingerprint.clone_into(&mut key.model.fingerprint);
            adapter.clone_into(&mut key.model.adapter);
            key.root(Scope::Shared, b"")
        };
        assert_ne!(root("ab", "c"), root("a", "bc"));
    }

    /// Whoever changes the formula changes the contexts too, and loses what was published before: this notices.
    #[test]
    fn the_formula_is_the_one_of_the_contexts() {
        let root = key().root(Scope::Uid(1000), b"salt");
        let hashes = chain(root, &[1, 2, 3, 4, 5], 2);
        assert_eq!(hashes.len(), 2);
        assert_eq!(&root.to_string()[..16], "9728f8f912a18849");
        assert_eq!(&hashes[1].to_string()[..16], "39ea7aac21050401");
    }

    proptest! {
        #[test]
        fn a_token_changed_in_block_k_leaves_exactly_k_blocks(
            tokens in proptest::collection::vec(any::<u32>(), 1..100),
            at in any::<prop::sample::Index>(),
            flip in 1u32..,
            block_tokens in 1usize..9,
        ) {
            let root = key().root(Scope::Shared, b"");
            let hashes = chain(root, &tokens, block_tokens);
            prop_assert_eq!(hashes.len(), tokens.len() / block_tokens);
            let at = at.index(tokens.len());
            let mut other = tokens.clone();
            other[at] ^= flip;
            let others = chain(root, &other, block_tokens);
            let same = hashes.iter().zip(&others).take_while(|(a, b)| a == b).count();
            prop_assert_eq!(same, (at / block_tokens).min(hashes.len()));
            prop_assert!(hashes[same..].iter().all(|hash| !others.contains(hash)));
            // A prefix has the hashes of its blocks, and no more.
            prop_assert_eq!(chain(root, &tokens[..at], block_tokens), &hashes[..at / block_tokens]);
        }
    }
}
