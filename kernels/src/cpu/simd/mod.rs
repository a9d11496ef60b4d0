//! The kernels once more, over vectors of any width. [`Simd`] is what an instruction set has to offer; [`avx2`] and [`avx512`] offer
//! it, and hold one compiled copy of every kernel each.

// Tiles walk several small arrays of registers by one index.
#![allow(clippy::needless_range_loop)]

mod attend;
mod avx2;
mod avx512;
mod bounds;
mod bounds_i8;
mod code_rest;
mod code_room;
mod code_sums;
mod code_weights;
mod codes;
mod convert;
mod copy;
mod dequantise;
mod elementwise;
mod hash;
mod lanes;
mod layout;
mod packed;
mod paths;
mod reduce;
mod rows;
mod score;
mod stored;
mod stream;
mod top_k;
mod values;
mod whole;

pub(super) use paths::{avx2 as avx2_path, avx512 as avx512_path};

/// Asks for a cache line, to be near (NEAR) or in the second-level cache; any address will do.
#[inline(always)]
fn prefetch<const NEAR: bool>(line: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    // SAFETY: a prefetch reads nothing, whatever the address; SSE is part of x86-64.
    unsafe {
        if NEAR { _mm_prefetch::<_MM_HINT_T0>(line.cast()) } else { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }
}

/// Makes stores around the cache visible in order.
#[inline(always)]
fn fence() {
    // SAFETY: SSE is part of x86-64.
    unsafe { std::arch::x86_64::_mm_sfence() }
}

/// Writes the first `count` of four values.
///
/// One by one at the end: a call to memcpy here would have every register saved around it.
///
/// # Safety
/// `out` has room for `count` values, 1 to 4.
#[inline(always)]
unsafe fn write4(values: [f32; 4], count: usize, out: *mut f32) {
    // SAFETY: passed on to the caller.
    unsafe {
        if count == 4 {
            out.cast::<[f32; 4]>().write_unaligned(values);
        } else {
            out.write(values[0]);
            if count > 1 {
                out.add(1).write(values[1]);
            }
            if count > 2 {
                out.add(2).write(values[2]);
            }
        }
    }
}

/// Writes the first `count` of two values.
///
/// # Safety
/// `out` has room for `count` values, 1 or 2.
#[inline(always)]
unsafe fn write2(values: [f32; 2], count: usize, out: *mut f32) {
    // SAFETY: passed on to the caller.
    unsafe {
        if count == 2 {
            out.cast::<[f32; 2]>().write_unaligned(values);
        } else {
            out.write(values[0]);
        }
    }
}

/// How many of `left` queries the next tile takes, `most` being 3 or 4: four as two and two rather than three and one.
#[inline(always)]
fn tile(left: usize, most: usize) -> usize {
    if left == 4 && most == 3 { 2 } else { left.min(most) }
}

/// An instruction set. A value of such a type is the proof that this machine has it, so that methods over registers are safe.
pub(super) trait Simd: Copy {
    /// A register of [`Simd::LANES`] f32.
    type V: Copy;
    /// A register of as many i32.
    type I: Copy;
    /// Some of a register's lanes.
    type M: Copy;
    /// Values in a register; a multiple of 4.
    const LANES: usize;
    /// Queries that a tile of four accumulators each serves at once, with registers to spare for the operands; at most 4.
    const HEADS: usize;

    fn splat(self, value: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a` where `by >= 0`, else `b`.
    fn where_positive(self, by: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// Lanes where `a > b`, not those with NaN.
    fn lanes_above(self, a: Self::V, b: Self::V) -> Self::M;
    /// One bit per lane.
    fn bits(self, lanes: Self::M) -> u32;
    /// The first `n < LANES` lanes, and `rest` in the others.
    fn first(self, v: Self::V, n: usize, rest: Self::V) -> Self::V;
    /// The nearest integer, ties to even.
    fn round(self, v: Self::V) -> Self::V;
    /// `p · 2^n` where not `x < -86.5`, else 0; `p` is within 2^±1, `n` a whole number of at most 127.
    fn scale_exp(self, p: Self::V, n: Self::V, x: Self::V) -> Self::V;
    /// The sums of four registers, each in one and the same order.
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4];
    /// The largest lane.
    fn max_lane(self, v: Self::V) -> f32;

    /// # Safety
    /// `LANES` f32 are readable at `at`, at any alignment; so for every full load and store, `n` of them for the parts.
    unsafe fn load_f32(self, at: *const u8) -> Self::V;
    /// 0 in some of the lanes.
    /// # Safety
    /// As above.
    unsafe fn load_f32_but(self, lanes: Self::M, at: *const u8) -> Self::V;
    /// The first `n < LANES` values; 0 in the other lanes.
    /// # Safety
    /// As above.
    unsafe fn load_f32_part(self, at: *const u8, n: usize) -> Self::V;
    /// # Safety
    /// As above.
    unsafe fn load_f16(self, at: *const u8) -> Self::V;
    /// # Safety
    /// As above.
    unsafe fn load_f16_part(self, at: *const u8, n: usize) -> Self::V;
    /// # Safety
    /// As above.
    unsafe fn load_bf16(self, at: *const u8) -> Self::V;
    /// # Safety
    /// As above.
    unsafe fn load_bf16_part(self, at: *const u8, n: usize) -> Self::V;
    /// # Safety
    /// As above.
    unsafe fn store_f32(self, v: Self::V, at: *mut u8);
    /// # Safety
    /// As above.
    unsafe fn store_f32_part(self, v: Self::V, at: *mut u8, n: usize);
    /// # Safety
    /// As above.
    unsafe fn store_f16(self, v: Self::V, at: *mut u8);
    /// # Safety
    /// As above.
    unsafe fn store_f16_part(self, v: Self::V, at: *mut u8, n: usize);
    /// # Safety
    /// As above.
    unsafe fn store_bf16(self, v: Self::V, at: *mut u8);
    /// # Safety
    /// As above.
    unsafe fn store_bf16_part(self, v: Self::V, at: *mut u8, n: usize);

    /// `LANES` signed bytes as f32.
    /// # Safety
    /// `LANES` bytes are readable at `at`.
    unsafe fn load_i8(self, at: *const u8) -> Self::V;
    /// `LANES` bytes as f32.
    /// # Safety
    /// As above.
    unsafe fn load_u8(self, at: *const u8) -> Self::V;
    /// `LANES` half bytes as f32, of each byte the low half first.
    /// # Safety
    /// `LANES / 2` bytes are readable at `at`.
    unsafe fn load_u4(self, at: *const u8) -> Self::V;
    /// `LANES` fp8 (e4m3) as f32.
    /// # Safety
    /// `LANES` bytes are readable at `at`.
    unsafe fn load_fp8(self, at: *const u8) -> Self::V;

    /// Integers that order as the scores do; NaN as -inf, -0 as 0.
    fn keys(self, v: Self::V) -> Self::I;
    fn splat_i32(self, value: i32) -> Self::I;
    /// `base, base + 1, …`
    fn ids(self, base: u32) -> Self::I;
    /// One bit per lane: `a > b`.
    fn above_i32(self, a: Self::I, b: Self::I) -> u32;
    /// # Safety
    /// `LANES` i32 are readable at `at`.
    unsafe fn load_i32(self, at: *const i32) -> Self::I;
    /// # Safety
    /// `LANES` i32 are writable at `at`.
    unsafe fn store_i32(self, v: Self::I, at: *mut i32);
    /// Writes the lanes whose bit is set, side by side; what follows them, up to a whole register, is undefined.
    /// # Safety
    /// `LANES` i32 are writable at `at`.
    unsafe fn compress_i32(self, v: Self::I, lanes: u32, at: *mut i32);

    /// One bit per lane: `a > b`, false for NaN.
    #[inline(always)]
    fn above(self, a: Self::V, b: Self::V) -> u32 {
        self.bits(self.lanes_above(a, b))
    }

    /// 64 bytes around the cache.
    /// # Safety
    /// 64 bytes are readable at `from` and writable at `to`, which is aligned to 64.
    unsafe fn stream_line(self, from: *const u8, to: *mut u8);
    /// 64 bytes.
    /// # Safety
    /// 64 bytes are readable at `from` and writable at `to`.
    unsafe fn copy_line(self, from: *const u8, to: *mut u8);

    /// The first values of a slice, up to a whole register; 0 in the lanes that it cannot fill.
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::V {
        let at = from.as_ptr().cast();
        if from.len() >= Self::LANES {
            // SAFETY: the slice holds LANES values.
            unsafe { self.load_f32(at) }
        } else {
            // SAFETY: the slice holds as many values as are read.
            unsafe { self.load_f32_part(at, from.len()) }
        }
    }

    /// Fills the start of a slice, up to a whole register.
    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32]) {
        let at = to.as_mut_ptr().cast();
        if to.len() >= Self::LANES {
            // SAFETY: the slice has room for LANES values.
            unsafe { self.store_f32(v, at) }
        } else {
            // SAFETY: the slice has room for as many values as are written.
            unsafe { self.store_f32_part(v, at, to.len()) }
        }
    }

    /// The sum of all lanes, in the order of [`Simd::sum4`].
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        self.sum4([v; 4])[0]
    }

    /// `e^x`, within 2 ulp; 0 below -86.5 (2.7e-38), `e^88` from there upwards, NaN of NaN.
    ///
    /// `x = n·ln 2 + r` with `|r| <= ln 2 / 2`, then Taylor's polynomial of degree 7, whose remainder is below 6e-9.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        /// ln 2 in two parts: products of the first with a whole number of up to 8 bits are exact.
        const LN_2_HIGH: f32 = 355.0 / 512.0;
        const LN_2_LOW: f32 = -2.121_944_4e-4;
        const TAYLOR: [f32; 6] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];
        let x = self.min(self.splat(88.0), x);
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-LN_2_HIGH), x);
        let r = self.fma(n, self.splat(-LN_2_LOW), r);
        let mut p = self.splat(1.0 / 5040.0);
        for coefficient in TAYLOR {
            p = self.fma(p, r, self.splat(coefficient));
        }
        self.scale_exp(self.fma(p, r, self.splat(1.0)), n, x)
    }

    /// `e^x` of what is at most 88 and no NaN, within 3e-7 of it; 0 below -86.5, and so of -inf. Three quarters of the work of
    /// [`Simd::exp`]: a polynomial of degree 5 that is least wrong at its worst.
    #[inline(always)]
    fn exp_of_small(self, x: Self::V) -> Self::V {
        const LN_2_HIGH: f32 = 355.0 / 512.0;
        const LN_2_LOW: f32 = -2.121_944_4e-4;
        /// Near it neighbours are 1 apart: a sum with it is rounded to a whole number.
        const NEAREST: f32 = 12_582_912.0;
        const POLYNOMIAL: [f32; 5] = [0.041_915_48, 0.166_675_76, 0.499_988_94, 0.999_999_7, 1.000_000_1];
        let nearest = self.splat(NEAREST);
        let n = self.sub(self.fma(x, self.splat(std::f32::consts::LOG2_E), nearest), nearest);
        let r = self.fma(n, self.splat(-LN_2_HIGH), x);
        let r = self.fma(n, self.splat(-LN_2_LOW), r);
        let mut p = self.splat(0.008_297_641);
        for coefficient in POLYNOMIAL {
            p = self.fma(p, r, self.splat(coefficient));
        }
        self.scale_exp(p, n, x)
    }
}
