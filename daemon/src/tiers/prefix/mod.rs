//! Published prefixes: which of them a prompt begins with. Pure data: whoever asks copies, maps and stores.
//!
//! | room | what lives there |
//! |---|---|
//! | [`hash`] | chained hashes of blocks of tokens: equal hashes mean equal rows |
//! | [`index`] | the tree of published blocks, where each lies, and which may go |

pub mod hash;
pub mod index;

pub use hash::{BlockHash, PrefixKey, Scope, chain};
pub use index::{
    Counters, Evictions, Handle, Limits, Match, Place, PrefixError, PrefixIndex, Published, Tier,
};
