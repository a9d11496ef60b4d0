//! The clusters of one KV head, in its memory.
//!
//! From the front: tokens and clusters held (two u32), then every token's cluster (u32 each). From the *end* backwards: the
//! clusters, each its size and its hash (u32) and its mean key (`[d]` f32). So either part grows into the middle, and a memory
//! that is made larger needs no table of where things were.
//!
//! A memory may come from an image that somebody else wrote. Numbers are cut, where they are read, to what the memory can hold;
//! a token's cluster may still be one that is not there, for whoever reads it to pass over.

use kvoyant_kernels::{Dtype, Kernels};

use crate::budget::Share;

const WORD: usize = size_of::<u32>();
/// Tokens and clusters.
const HEADER: usize = 2 * WORD;
/// A short sequence may have so many clusters whatever its share.
const CLUSTERS_MIN: usize = 32;

/// Hyperplanes, one for each bit of a hash.
pub(super) const PLANES: usize = 32;

/// What shapes the clusters of a memory.
#[derive(Debug, Clone)]
pub(super) struct Tables {
    pub(super) head_dim: usize,
    /// `[d][32]`.
    pub(super) planes: Vec<f32>,
    /// A key joins a cluster at a Hamming distance below.
    pub(super) distance: u32,
    pub(super) recent: usize,
    pub(super) clusters: Share,
    pub(super) kernels: Kernels,
}

impl Tables {
    /// How many clusters `tokens` tokens may be in.
    pub(super) fn limit(&self, tokens: usize) -> usize {
        self.clusters.of(tokens.max(1)).max(CLUSTERS_MIN)
    }

    pub(super) fn bytes(&self, max_tokens: usize) -> usize {
        HEADER + max_tokens * WORD + self.limit(max_tokens) * self.record()
    }

    fn record(&self) -> usize {
        2 * WORD + self.head_dim * WORD
    }

    /// Tokens held.
    pub(super) fn tokens(memory: &[u8]) -> usize {
        (read(memory, 0) as usize).min(memory.len().saturating_sub(HEADER) / WORD)
    }

    /// Clusters held.
    pub(super) fn count(&self, memory: &[u8]) -> usize {
        (read(memory, WORD) as usize).min(self.places(memory))
    }

    /// Clusters that a memory can hold.
    fn places(&self, memory: &[u8]) -> usize {
        memory.len().saturating_sub(HEADER) / self.record()
    }

    /// The cluster of a token that is held; in a memory that lies it may be any number.
    pub(super) fn cluster_of(memory: &[u8], token: usize) -> usize {
        read(memory, HEADER + token * WORD) as usize
    }

    fn place(&self, memory: &[u8], cluster: usize) -> usize {
        memory.len() - (cluster + 1) * self.record()
    }

    /// Tokens of a cluster, no more than are held.
    pub(super) fn size(&self, memory: &[u8], cluster: usize) -> u32 {
        read(memory, self.place(memory, cluster)).min(Self::tokens(memory) as u32)
    }

    pub(super) fn hash_of(&self, memory: &[u8], cluster: usize) -> u32 {
        read(memory, self.place(memory, cluster) + WORD)
    }

    /// The mean of a cluster's keys.
    pub(super) fn mean(&self, memory: &[u8], cluster: usize, out: &mut [f32]) {
        let at = self.place(memory, cluster) + 2 * WORD;
        self.kernels.to_f32(Dtype::F32, &memory[at..at + self.head_dim * WORD], out);
    }

    /// A key's sign bits: bit m is set where it lies strictly above hyperplane m.
    pub(super) fn hash(&self, key: &[f32]) -> u32 {
        let mut sides = [0.0; PLANES];
        self.kernels.project(key, &self.planes, &mut sides);
        sides.iter().enumerate().fold(0, |hash, (bit, side)| hash | u32::from(*side > 0.0) << bit)
    }

    /// Takes in the key of the next token: it joins the nearest of the recent clusters (of equally near ones the first), or opens
    /// one where none is near and the limit is not reached.
    pub(super) fn push(&self, key: &[f32], memory: &mut [u8], mean: &mut [f32]) {
        let (token, count, places) = (Self::tokens(memory), self.count(memory), self.places(memory));
        if HEADER + (token + 1) * WORD > memory.len() || places == 0 {
            return;
        }
        let hash = self.hash(key);
        let nearest = (token.saturating_sub(self.recent)..token)
            .map(|other| Self::cluster_of(memory, other))
            .filter(|cluster| *cluster < count)
            .map(|cluster| ((self.hash_of(memory, cluster) ^ hash).count_ones(), cluster))
            .min();
        let full = count >= self.limit(token + 1).min(places);
        let cluster = match nearest {
            Some((distance, cluster)) if distance < self.distance || full => cluster,
            // Full, and no recent token has a cluster: only in a memory that lies.
            None if full => 0,
            _ => count,
        };
        let mut size = 1;
        if cluster == count {
            mean.copy_from_slice(key);
            write(memory, WORD, count as u32 + 1);
        } else {
            size += self.size(memory, cluster);
            self.mean(memory, cluster, mean);
            mean.iter_mut().zip(key).for_each(|(mean, key)| *mean += (key - *mean) / size as f32);
        }
        let place = self.place(memory, cluster);
        write(memory, place, size);
        // Of the mean itself: the mean of the projections, in exact numbers.
        write(memory, place + WORD, self.hash(mean));
        let at = place + 2 * WORD;
        self.kernels.from_f32(Dtype::F32, mean, &mut memory[at..at + self.head_dim * WORD]);
        write(memory, HEADER + token * WORD, cluster as u32);
        write(memory, 0, token as u32 + 1);
    }

    /// Moves what `old` holds into a longer memory.
    pub(super) fn grow(&self, old: &[u8], new: &mut [u8]) {
        if old.len() >= HEADER {
            let front = HEADER + Self::tokens(old) * WORD;
            let back = self.count(old) * self.record();
            new[..front].copy_from_slice(&old[..front]);
            let at = new.len() - back;
            new[at..].copy_from_slice(&old[old.len() - back..]);
        }
    }
}

fn read(memory: &[u8], at: usize) -> u32 {
    memory[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn write(memory: &mut [u8], at: usize, value: u32) {
    memory[at..at + WORD].copy_from_slice(&value.to_le_bytes());
}
