//! Storage types as types, so that a kernel is compiled once for each.

use super::Simd;

/// A storage type that registers are loaded from and stored to.
pub(super) trait Stored {
    /// Bytes of a value.
    const BYTES: usize;
    /// # Safety
    /// `LANES` values are readable at `at`, at any alignment.
    unsafe fn load<S: Simd>(s: S, at: *const u8) -> S::V;
    /// # Safety
    /// `n < LANES` values are readable at `at`, at any alignment.
    unsafe fn load_part<S: Simd>(s: S, at: *const u8, n: usize) -> S::V;
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

        impl Stored for $name {
            const BYTES: usize = $bytes;
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
