//! The k best scores: one pass keeps what is above a pivot drawn from a sample, a little more than k; among those few, a threshold is
//! found between further pivots, and a second pass keeps what is above it.

use super::Simd;
use crate::run::TopKScratch;

/// The key of -inf (and of NaN); no score has a lower one.
pub(super) const LOWEST: i32 = (0x807f_ffff_u32).cast_signed();
/// The key of +inf.
const HIGHEST: i32 = 0x7f80_0000;
/// Below every score's key: fills registers up.
const NOTHING: i32 = i32::MIN;
/// So many keys are bisected outright.
const FEW: usize = 768;
/// The widest register: room that compression may overwrite.
const SLACK: usize = 16;

/// Where the chosen end: every key above `key`, and the first `ties` that equal it.
struct Cut {
    key: i32,
    ties: usize,
}

#[inline(always)]
pub(super) fn top_k<S: Simd>(s: S, scores: &[f32], k: usize, scratch: &mut TopKScratch, out: &mut Vec<u32>) {
    let n = scores.len();
    for room in [&mut scratch.keys, &mut scratch.candidates, &mut scratch.ids] {
        if room.len() < n + SLACK {
            room.resize(n + SLACK, NOTHING);
        }
    }
    out.reserve(k + SLACK);
    let (count, ids) = match likely(s, scores, k, scratch) {
        Some(count) => (count, Some(&scratch.ids[..])),
        None => {
            for (chunk, scores) in scores.chunks(S::LANES).enumerate() {
                let keys = s.keys(s.load(scores));
                // SAFETY: `keys` has SLACK places more than there are scores.
                unsafe { s.store_i32(keys, scratch.keys.as_mut_ptr().add(chunk * S::LANES)) };
            }
            (n, None)
        }
    };
    scratch.keys[count..count + SLACK].fill(NOTHING);
    let cut = if count == k {
        Cut { key: NOTHING, ties: 0 }
    } else {
        cut(s, &scratch.keys, count, k, &mut scratch.candidates)
    };
    // SAFETY: `keys` holds as many keys, and NOTHING up to a whole register; `ids` as many; `out` is empty and has room for k ids and a
    // register.
    unsafe {
        let kept = emit(s, &scratch.keys, ids, count, &cut, out.as_mut_ptr());
        debug_assert_eq!(kept, k);
        out.set_len(kept);
    }
}

/// The scores that are likely to be among the `k` best: their ids, ascending, and keys, and how many they are. `None` where there are
/// few scores, where the pivot would be -inf, or where it left too few.
#[inline(always)]
fn likely<S: Simd>(s: S, scores: &[f32], k: usize, scratch: &mut TopKScratch) -> Option<usize> {
    let n = scores.len();
    if n <= FEW {
        return None;
    }
    let size = sample_size(n);
    let mut sample = [NOTHING; MOST + SLACK];
    for (i, sampled) in sample[..size].chunks_exact_mut(S::LANES).enumerate() {
        let mut drawn = [0.0; SLACK];
        for lane in 0..S::LANES {
            drawn[lane] = scores[(i * S::LANES + lane) * n / size];
        }
        // SAFETY: both have room for a register.
        unsafe { s.store_i32(s.keys(s.load(&drawn)), sampled.as_mut_ptr()) };
    }
    let (_, last) = places(size, k as f32 / n as f32);
    if last >= size {
        return None;
    }
    let pivot = bisect(s, &sample, size, last, LOWEST, HIGHEST).key;
    if pivot <= LOWEST {
        return None;
    }
    let below = s.splat(below(pivot));
    let mut count = 0;
    let whole = n - n % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: the scores have a register from `at` on; as many ids as scores so far and a register have room.
        unsafe {
            let lanes = s.above(s.load_f32(scores.as_ptr().add(at).cast()), below);
            s.compress_i32(s.ids(at as u32), lanes, scratch.ids.as_mut_ptr().add(count));
            count += lanes.count_ones() as usize;
        }
    }
    for (id, score) in scores.iter().enumerate().skip(whole) {
        scratch.ids[count] = id as i32;
        count += usize::from(s.above(s.splat(*score), below) & 1 == 1);
    }
    if count < k {
        return None;
    }
    for first in (0..count).step_by(S::LANES) {
        let mut chosen = [0.0; SLACK];
        for (chosen, id) in chosen.iter_mut().zip(&scratch.ids[first..count.min(first + S::LANES)]) {
            *chosen = scores[*id as u32 as usize];
        }
        // SAFETY: `keys` has SLACK places more than there are scores.
        unsafe { s.store_i32(s.keys(s.load(&chosen)), scratch.keys.as_mut_ptr().add(first)) };
    }
    Some(count)
}

/// The score that those of `key` and above are above, and no others.
#[inline(always)]
fn below(key: i32) -> f32 {
    // -1 would be -0, which 0 is not above; no score has that key.
    let key = if key == 0 { -2 } else { key - 1 };
    f32::from_bits((key ^ ((key >> 31) & i32::MAX)).cast_unsigned())
}

/// Of the first `n` keys those that the cut leaves, as ids: the ones given, or their places.
///
/// # Safety
/// `keys` and `ids` are readable up to whole registers; `out` has room for the ids and one register more.
#[inline(always)]
unsafe fn emit<S: Simd>(
    s: S,
    keys: &[i32],
    ids: Option<&[i32]>,
    n: usize,
    cut: &Cut,
    out: *mut u32,
) -> usize {
    let (above, equal_or_above) = (s.splat_i32(cut.key), s.splat_i32(cut.key.saturating_sub(1)));
    let (mut kept, mut ties) = (0, cut.ties);
    for at in (0..n).step_by(S::LANES) {
        // SAFETY: the caller promises keys and ids up to whole registers, and room after the ids so far.
        unsafe {
            let keys = s.load_i32(keys.as_ptr().add(at));
            let mut lanes = s.above_i32(keys, above);
            if ties > 0 {
                let mut equal = s.above_i32(keys, equal_or_above) & !lanes;
                while equal != 0 && ties > 0 {
                    lanes |= equal & equal.wrapping_neg();
                    equal &= equal - 1;
                    ties -= 1;
                }
            }
            let ids = ids.map_or_else(|| s.ids(at as u32), |ids| s.load_i32(ids.as_ptr().add(at)));
            s.compress_i32(ids, lanes, out.add(kept).cast());
            kept += lanes.count_ones() as usize;
        }
    }
    kept
}

/// The cut that leaves `k` of the first `n` keys, `0 < k < n`.
///
/// Pivots around the k-th largest of a strided sample leave few candidates, among which the search goes on; a sample that misleads
/// costs one more pass, never a wrong answer.
#[inline(always)]
fn cut<S: Simd>(s: S, keys: &[i32], n: usize, k: usize, candidates: &mut [i32]) -> Cut {
    if n <= FEW {
        return bisect(s, keys, n, k, LOWEST, HIGHEST);
    }
    let (mut first, mut len, mut need) = (true, n, k);
    let (mut low, mut high) = (LOWEST, HIGHEST);
    loop {
        let (low_pivot, high_pivot) = pivots(s, if first { keys } else { candidates }, len, need, low, high);
        let to = candidates.as_mut_ptr();
        let from = if first { keys.as_ptr() } else { to.cast_const() };
        // SAFETY: `from` has `len` keys and is readable up to a whole register; `to` has room for as many and a register.
        let (above, mut between) = unsafe { narrow(s, from, len, low_pivot, high_pivot, to) };
        if need > above && need <= above + between {
            (low, high) = (low_pivot, high_pivot);
            need -= above;
        } else {
            // The sample misled, and candidates that are wanted may be overwritten: back to all keys, outside the pivots.
            (low, high) = if need <= above { (high_pivot + 1, high) } else { (low, low_pivot - 1) };
            // SAFETY: as above, with all keys.
            let (above, again) = unsafe { narrow(s, keys.as_ptr(), n, low, high, to) };
            (need, between) = (k - above, again);
        }
        let smaller = between < len;
        (first, len) = (false, between);
        if len <= FEW || !smaller {
            return bisect(s, candidates, len, need, low, high);
        }
    }
}

/// How many keys are above `high`; and the keys within `low ..= high`, side by side in `to`, filled up to a whole register, and how many
/// they are.
///
/// # Safety
/// `keys` is readable, and `to` writable, for `len` keys and a register more; they may be the same.
#[inline(always)]
unsafe fn narrow<S: Simd>(
    s: S,
    keys: *const i32,
    len: usize,
    low: i32,
    high: i32,
    to: *mut i32,
) -> (usize, usize) {
    let (low, high) = (s.splat_i32(low - 1), s.splat_i32(high));
    let (mut above, mut between) = (0, 0);
    // SAFETY: the caller promises the room; `between` never overtakes `at`.
    unsafe {
        for at in (0..len).step_by(S::LANES) {
            let keys = s.load_i32(keys.add(at));
            let over = s.above_i32(keys, high);
            let within = s.above_i32(keys, low) & !over;
            above += over.count_ones() as usize;
            s.compress_i32(keys, within, to.add(between));
            between += within.count_ones() as usize;
        }
        s.store_i32(s.splat_i32(NOTHING), to.add(between));
    }
    (above, between)
}

/// Most keys of a sample.
const MOST: usize = 1024;

/// How many of so many keys are sampled; whole registers.
fn sample_size(len: usize) -> usize {
    if len < 16 * MOST { MOST / 4 } else { MOST }
}

/// Around which places of a sample, from the largest down, a share ends in all likelihood.
fn places(size: usize, share: f32) -> (usize, usize) {
    let place = share * size as f32;
    // Two and a half standard deviations of the number of sampled keys above the wanted one.
    let spread = 2.5 * (place * (1.0 - share)).sqrt() + 2.0;
    ((place - spread) as usize, (place + spread) as usize)
}

/// Two keys within `low ..= high` between which the `need`-th largest lies in all likelihood.
#[inline(always)]
fn pivots<S: Simd>(s: S, keys: &[i32], len: usize, need: usize, low: i32, high: i32) -> (i32, i32) {
    let size = sample_size(len);
    let mut sample = [NOTHING; MOST + SLACK];
    for (i, sampled) in sample[..size].iter_mut().enumerate() {
        *sampled = keys[i * len / size];
    }
    let (first, last) = places(size, need as f32 / len as f32);
    let high_pivot = if first == 0 { high } else { bisect(s, &sample, size, first, low, high).key };
    let low_pivot = if last >= size { low } else { bisect(s, &sample, size, last, low, high_pivot).key };
    (low_pivot.clamp(low, high), high_pivot.clamp(low, high))
}

/// The cut that leaves `need` of the first `len` keys, all of which are within `low ..= high`, `0 < need <= len`.
#[inline(always)]
fn bisect<S: Simd>(s: S, keys: &[i32], len: usize, need: usize, mut low: i32, mut high: i32) -> Cut {
    // At least `need` keys are not below `low`; `above`, fewer than `need`, are above `high`.
    let mut above = 0;
    while low < high {
        let middle = ((i64::from(low) + i64::from(high)) >> 1) as i32;
        let count = count_above_key(s, keys, len, middle);
        if count == need {
            return Cut { key: middle, ties: 0 };
        } else if count > need {
            low = middle + 1;
        } else {
            (high, above) = (middle, count);
        }
    }
    Cut { key: low, ties: need - above }
}

/// How many of the first `len` keys are above `key`.
#[inline(always)]
fn count_above_key<S: Simd>(s: S, keys: &[i32], len: usize, key: i32) -> usize {
    let key = s.splat_i32(key);
    let mut count = 0;
    for keys in keys[..len.next_multiple_of(S::LANES)].chunks_exact(S::LANES) {
        // SAFETY: the chunk holds a register.
        count += s.above_i32(unsafe { s.load_i32(keys.as_ptr()) }, key).count_ones() as usize;
    }
    count
}
