//! Storage types as types, so that a kernel is compiled once for each.

use super::Simd;

/// Values in memory that registers are loaded from.
pub(super) trait Loaded {
    /// Bytes of a value.
    const BYTES: usize;
    /// Whether the values of a row's part are what was loaded times a factor, an f32 that follows them.
    const SCALED: bool;
    /// # Safety
    /// `LANES` values are readable at `at`, at any alignment.
    unsafe fn load<S: Simd>(s: S, at: *const u8) -> S::V;
    /// # Safety
    /// `n < LANES` values are readable at `at`, at any alignment.
    unsafe fn load_part<S: Simd>(s: S, at: *const u8, n: usize) -> S::V;

    /// The factor of `n` values that begin at `at`.
    ///
    /// # Safety
    /// They are readable, and the factor if there is one.
    #[inline(always)]
    unsafe fn factor(at: *const u8, n: usize) -> f32 {
        if Self::SCALED {
            // SAFETY: passed on to the caller.
            unsafe { at.add(n * Self::BYTES).cast::<f32>().read_unaligned() }
        } else {
            1.0
        }
    }
}

/// A storage type that registers are stored to, besides.
pub(super) trait Stored: Loaded {
    /// # Safety
    /// `LANES` values are writable at `at`, at any alignment.
    unsafe fn store<S: Simd>(s: S, v: S::V, at: *mut u8);
    /// # Safety
    /// `n < LANES` values are writable at `at`, at any alignment.
    unsafe fn store_part<S: Simd>(s: S, v: S::V, at: *mut u8, n: usize);
}

macro_rules! stored {
    ($name:ident, $bytes:literal, $load:ident, $load_part:ident, $store:ident, $store_part:ident) => {
        pub(super) struct $name;

        impl Loaded for $name {
            const BYTES: usize = $bytes;
            const SCALED: bool = false;
            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, at: *const u8) -> S::V {
                // SAFETY: passed on to the caller.
                unsafe { s.$load(at) }
            }
            #[inline(always)]
            unsafe fn load_part<S: Simd>(s: S, at: *const u8, n: usize) -> S::V {
                // SAFETY: passed on to the caller.
                unsafe { s.$load_part(at, n) }
            }
        }

        impl Stored for $name {
            #[inline(always)]
            unsafe fn store<S: Simd>(s: S, v: S::V, at: *mut u8) {
                // SAFETY: passed on to the caller.
                unsafe { s.$store(v, at) }
            }
            #[inline(always)]
            unsafe fn store_part<S: Simd>(s: S, v: S::V, at: *mut u8, n: usize) {
                // SAFETY: passed on to the caller.
                unsafe { s.$store_part(v, at, n) }
            }
        }
    };
}

stored!(F32, 4, load_f32, load_f32_part, store_f32, store_f32_part);
stored!(F16, 2, load_f16, load_f16_part, store_f16, store_f16_part);
stored!(Bf16, 2, load_bf16, load_bf16_part, store_bf16, store_bf16_part);

/// Signed codes of a byte with their factor behind them: rows of [`Format::Int8`](crate::quantise::Format::Int8).
pub(super) struct Int8;

impl Loaded for Int8 {
    const BYTES: usize = 1;
    const SCALED: bool = true;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const u8) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { s.load_i8(at) }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(s: S, at: *const u8, n: usize) -> S::V {
        /// Bytes of the longest register of codes.
        const MOST: usize = 16;
        debug_assert!(n < S::LANES && S::LANES <= MOST);
        let mut codes = [0_u8; MOST];
        // SAFETY: the caller promises n codes; the buffer holds a register of them.
        unsafe {
            std::ptr::copy_nonoverlapping(at, codes.as_mut_ptr(), n);
            s.load_i8(codes.as_ptr())
        }
    }
}

/// Calls `$function::<_, T>` with the type `T` that stands for a [`Dtype`](crate::Dtype).
macro_rules! by_dtype {
    ($dtype:expr, $function:ident ( $($argument:expr),* $(,)? )) => {
        match $dtype {
            $crate::Dtype::F32 => $function::<_, $crate::cpu::simd::stored::F32>($($argument),*),
            $crate::Dtype::F16 => $function::<_, $crate::cpu::simd::stored::F16>($($argument),*),
            $crate::Dtype::Bf16 => $function::<_, $crate::cpu::simd::stored::Bf16>($($argument),*),
        }
    };
}
pub(super) use by_dtype;
