//! Mutations as fuzzers make them, from a number: the same number, the same input.

/// Numbers at the edges of things.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 32,
    i64::MAX as u64,
    u64::MAX - 7,
    u64::MAX,
];

/// Most bytes of a mutated input.
const BYTES_MAX: usize = 1 << 16;

/// A generator of numbers (splitmix64).
#[derive(Debug, Clone, Copy)]
pub struct Numbers(pub u64);

impl Numbers {
    /// The next one.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One below `end`, which is not zero.
    pub fn below(&mut self, end: usize) -> usize {
        (self.draw() % end as u64) as usize
    }
}

/// A few mutations of one of the seeds.
#[must_use]
pub fn mutated(seeds: &[Vec<u8>], number: u64) -> Vec<u8> {
    let mut numbers = Numbers(number);
    let mut bytes = if seeds.is_empty() { Vec::new() } else { seeds[numbers.below(seeds.len())].clone() };
    for _ in 0..=numbers.below(4) {
        once(&mut bytes, seeds, &mut numbers);
    }
    bytes.truncate(BYTES_MAX);
    bytes
}

fn once(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], numbers: &mut Numbers) {
    if bytes.is_empty() {
        bytes.extend((0..numbers.below(64)).map(|_| numbers.draw() as u8));
        return;
    }
    let at = numbers.below(bytes.len());
    let to = (at + 1 + numbers.below(16)).min(bytes.len());
    match numbers.below(9) {
        0 => bytes[at] ^= 1 << numbers.below(8),
        1 => bytes[at] = numbers.draw() as u8,
        2 => bytes[at] = bytes[at].wrapping_add(if numbers.below(2) == 0 { 1 } else { 255 }),
        3 => {
            let edge = EDGES[numbers.below(EDGES.len())].to_le_bytes();
            let width = [1, 2, 4, 8][numbers.below(4)].min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&edge[..width]);
        }
        4 => bytes.truncate(at),
        5 => drop(bytes.drain(at..to)),
        6 => {
            let piece = bytes[at..to].to_vec();
            let into = numbers.below(bytes.len() + 1);
            bytes.splice(into..into, piece);
        }
        7 => {
            let piece: Vec<u8> = (0..=numbers.below(16)).map(|_| numbers.draw() as u8).collect();
            bytes.splice(at..at, piece);
        }
        _ => {
            let other = &seeds[numbers.below(seeds.len())];
            if !other.is_empty() {
                let from = numbers.below(other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
}
