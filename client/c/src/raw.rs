//! Reading what a caller points to, and writing where it says: every address that comes from outside is followed here.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

use crate::status::Wrong;
use crate::types::{kvoyant_dtype, kvoyant_status, kvoyant_tensor};

/// A text that may be null, which is none.
///
/// # Safety
/// If it is not null, it ends in a zero and stays as it is meanwhile.
pub(crate) unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Result<Option<&'a str>, Wrong> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: by the caller's contract, a text that ends in a zero.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map(Some).map_err(|error| Wrong::argument(format!("{what} is no UTF-8: {error}")))
}

fn check<T>(pointer: *const T, count: usize, what: &str) -> Result<(), Wrong> {
    if pointer.is_null() {
        let where_ = if count == 1 { String::new() } else { format!(", where {count} values are to be") };
        return Err(Wrong::argument(format!("{what}: a null pointer{where_}")));
    }
    if !pointer.is_aligned() {
        let align = align_of::<T>();
        return Err(Wrong::argument(format!("{what}: {pointer:p} is not aligned to {align} bytes")));
    }
    if count > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Wrong::argument(format!("{what}: {count} of them do not fit into memory")));
    }
    Ok(())
}

/// An array of the caller's; of none the address does not matter.
///
/// # Safety
/// If `count` is not 0 and the pointer not null, so many lie there, and stay as they are meanwhile.
pub(crate) unsafe fn slice<'a, T>(pointer: *const T, count: usize, what: &str) -> Result<&'a [T], Wrong> {
    if count == 0 {
        return Ok(&[]);
    }
    check(pointer, count, what)?;
    // SAFETY: not null, aligned and of a possible size; by the caller's contract there are so many.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// An array of the caller's to write to.
///
/// # Safety
/// If `count` is not 0 and the pointer not null, there is room for so many, which nobody else touches meanwhile, and which hold values of `T`
/// whatever their bytes are.
pub(crate) unsafe fn slice_mut<'a, T>(
    pointer: *mut T,
    count: usize,
    what: &str,
) -> Result<&'a mut [T], Wrong> {
    if count == 0 {
        return Ok(&mut []);
    }
    check(pointer, count, what)?;
    // SAFETY: not null, aligned and of a possible size; by the caller's contract there is room, and it is ours meanwhile.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, count) })
}

/// Where a result goes.
#[derive(Debug)]
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    /// # Safety
    /// If it is not null, there is room for a `T`.
    pub(crate) unsafe fn new(pointer: *mut T, what: &str) -> Result<Self, Wrong> {
        check(pointer, 1, what)?;
        Ok(Self(pointer))
    }

    /// Where a handle goes: it is none until the call has gone well.
    ///
    /// # Safety
    /// As for [`Self::new`]; all zero is a `T`.
    pub(crate) unsafe fn cleared(pointer: *mut T, what: &str) -> Result<Self, Wrong> {
        // SAFETY: the caller's contract.
        let out = unsafe { Self::new(pointer, what) }?;
        // SAFETY: checked, with room for one by the contract, for which all zero is a value.
        unsafe { pointer.write_bytes(0, 1) };
        Ok(out)
    }

    pub(crate) fn set(&self, value: T) {
        // SAFETY: checked by `new`, and by its contract there is room.
        unsafe { self.0.write(value) }
    }
}

/// A struct of the header that begins with its size: `Copy`, of plain fields, for each of which all zero is a value.
///
/// # Safety
/// It is `#[repr(C)]`, its first field is `size: usize`, and any bytes are a value.
pub(crate) unsafe trait Grows: Copy {
    /// Its name in the header.
    const NAME: &'static str;
    /// Bytes of its first version: no caller has a shorter one.
    const FIRST: usize;
}

macro_rules! grows {
    ($($type:ident: $first:literal),* $(,)?) => {
        $(
            const _: () = assert!(std::mem::offset_of!(crate::types::$type, size) == 0);
            const _: () = assert!(size_of::<crate::types::$type>() >= $first || usize::BITS != 64);
            // SAFETY: repr(C) with integers, floats and addresses only, `size` first (asserted).
            unsafe impl Grows for crate::types::$type {
                const NAME: &'static str = stringify!($type);
                const FIRST: usize = if usize::BITS == 64 { $first } else { size_of::<crate::types::$type>() };
            }
        )*
    };
}

// Never changed; a new struct comes with its size.
grows! {
    kvoyant_options: 64, kvoyant_spec: 136, kvoyant_model_info: 80, kvoyant_sequence_info: 32,
    kvoyant_table: 48, kvoyant_answer: 72, kvoyant_partial: 32, kvoyant_request: 48,
}

/// Its size as the caller's header has it.
unsafe fn size_of_theirs<T: Grows>(pointer: *const T) -> Result<usize, Wrong> {
    check(pointer, 1, T::NAME)?;
    // SAFETY: not null and aligned; by the caller's contract a struct of the header, which begins with its size.
    let size = unsafe { pointer.cast::<usize>().read() };
    if size < T::FIRST || size > 1 << 16 {
        return Err(Wrong::argument(format!(
            "{0}.size is {size}: set it to sizeof({0}), which is {1} here",
            T::NAME,
            size_of::<T>()
        )));
    }
    Ok(size)
}

/// Copies a struct that a caller of an older or a newer header has filled in. What it does not have is 0; what we do not know must be.
///
/// # Safety
/// If it is not null, it is a struct of the header of its size.
pub(crate) unsafe fn read<T: Grows>(pointer: *const T) -> Result<T, Wrong> {
    // SAFETY: the caller's contract.
    let size = unsafe { size_of_theirs(pointer) }?;
    let mut value = MaybeUninit::<T>::zeroed();
    let known = size.min(size_of::<T>());
    // SAFETY: the caller's struct has `size` bytes, of which at most ours are copied to ours.
    unsafe { value.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(pointer.cast(), known) };
    // SAFETY: the bytes of the caller's struct behind those that are known here.
    let unknown = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>().add(known), size - known) };
    if unknown.iter().any(|byte| *byte != 0) {
        return Err(Wrong::argument(format!(
            "{} has fields that this library does not know: the program was built with a newer header; install the library of that header",
            T::NAME
        )));
    }
    // SAFETY: any bytes are a value of a `Grows`.
    Ok(unsafe { value.assume_init() })
}

/// Fills a struct of a caller of an older or a newer header: as much as both know; what only the caller knows is 0. Its `size` stays.
///
/// # Safety
/// If it is not null, it is a struct of the header whose `size` is set.
pub(crate) unsafe fn fill<T: Grows>(pointer: *mut T, value: T) -> Result<(), Wrong> {
    // SAFETY: the caller's contract.
    let size = unsafe { size_of_theirs(pointer) }?;
    let known = size.min(size_of::<T>());
    let first = size_of::<usize>();
    // SAFETY: the caller's struct has `size` bytes and ours at least `known`; the size itself is passed over.
    unsafe {
        let (from, to) = ((&raw const value).cast::<u8>(), pointer.cast::<u8>());
        to.add(first).copy_from_nonoverlapping(from.add(first), known - first);
        to.add(known).write_bytes(0, size - known);
    }
    Ok(())
}

/// Names of types, by code.
const DTYPES: [&str; 7] = ["F32", "F16", "BF16", "FP8", "INT8", "INT4_OF32", "INT4_OF64"];

/// A type's name for a sentence.
pub(crate) fn dtype_name(code: u32) -> String {
    DTYPES.get(code as usize).map_or_else(|| format!("{code}, which is none"), ToString::to_string)
}

fn listed(shape: &[u64]) -> String {
    let numbers: Vec<_> = shape.iter().map(ToString::to_string).collect();
    format!("[{}]", numbers.join(", "))
}

/// An array's shape as the caller gives it.
fn shape_of<'a>(tensor: &'a kvoyant_tensor, what: &str) -> Result<&'a [u64], Wrong> {
    tensor.shape.get(..tensor.dims as usize).ok_or_else(|| {
        Wrong::shape(format!("{what}: there are {} dimensions, where an array has 0 to 4", tensor.dims))
    })
}

/// Copies the struct of an array; null is no array.
///
/// # Safety
/// If it is not null, it is such a struct.
pub(crate) unsafe fn tensor(
    pointer: *const kvoyant_tensor,
    what: &str,
) -> Result<Option<kvoyant_tensor>, Wrong> {
    if pointer.is_null() {
        return Ok(None);
    }
    check(pointer, 1, what)?;
    // SAFETY: not null, aligned, and by the caller's contract such a struct, of which any bytes are one.
    let tensor = unsafe { pointer.read() };
    Ok((!is_none(&tensor)).then_some(tensor))
}

/// Whether there is no array.
pub(crate) fn is_none(tensor: &kvoyant_tensor) -> bool {
    tensor.data.is_null() && tensor.dims == 0
}

/// Checks that an array has one of these shapes, and returns its number of values. `of` names the dimensions.
pub(crate) fn expect_shape(
    tensor: &kvoyant_tensor,
    (what, of): (&str, &str),
    shapes: &[&[u64]],
) -> Result<usize, Wrong> {
    let found = shape_of(tensor, what)?;
    if !shapes.contains(&found) {
        let wanted: Vec<_> = shapes.iter().map(|shape| listed(shape)).collect();
        let (found, wanted) = (listed(found), wanted.join(" or "));
        return Err(Wrong::shape(format!("{what}: the shape is {found}, where {wanted} is needed ({of})")));
    }
    let values =
        found.iter().try_fold(1_usize, |values, length| values.checked_mul(usize::try_from(*length).ok()?));
    values
        .ok_or_else(|| Wrong::shape(format!("{what}: the shape {} does not fit into memory", listed(found))))
}

/// Length of an array's first dimension, if it has one more than `dims`.
pub(crate) fn leading(tensor: &kvoyant_tensor, dims: u32) -> Option<u64> {
    (tensor.dims == dims + 1).then_some(tensor.shape[0])
}

fn wrong_dtype(what: &str, found: u32, wanted: &str) -> Wrong {
    let found = dtype_name(found);
    Wrong::new(kvoyant_status::Dtype, format!("{what}: the dtype is {found}, where {wanted} is needed"))
}

/// Checks an array's type.
pub(crate) fn expect_dtype(tensor: &kvoyant_tensor, what: &str, wanted: u32) -> Result<(), Wrong> {
    if tensor.dtype == wanted {
        return Ok(());
    }
    Err(wrong_dtype(what, tensor.dtype, &dtype_name(wanted)))
}

/// The values of an f32 array whose shape has been checked.
///
/// # Safety
/// The array has so many values.
pub(crate) unsafe fn floats<'a>(
    tensor: &kvoyant_tensor,
    what: &str,
    values: usize,
) -> Result<&'a [f32], Wrong> {
    expect_dtype(tensor, what, kvoyant_dtype::F32 as u32)?;
    // SAFETY: the caller's contract.
    unsafe { slice(tensor.data.cast(), values, what) }
}

/// The values of an array of F32, F16 or BF16 as f32, copied where they are not.
///
/// # Safety
/// The array has so many values.
pub(crate) unsafe fn as_floats<'a>(
    tensor: &kvoyant_tensor,
    what: &str,
    values: usize,
) -> Result<std::borrow::Cow<'a, [f32]>, Wrong> {
    use kvoyant_kernels::{Dtype, Kernels};
    let dtype = u8::try_from(tensor.dtype).ok().and_then(Dtype::from_code);
    let dtype = dtype.ok_or_else(|| wrong_dtype(what, tensor.dtype, "F32, F16 or BF16"))?;
    if dtype == Dtype::F32 {
        // SAFETY: the caller's contract.
        return Ok(unsafe { floats(tensor, what, values) }?.into());
    }
    // SAFETY: the caller's contract; a half value has two bytes, and is aligned as such.
    let halves: &[u16] = unsafe { slice(tensor.data.cast(), values, what) }?;
    // SAFETY: the same memory as bytes.
    let bytes = unsafe { std::slice::from_raw_parts(halves.as_ptr().cast::<u8>(), size_of_val(halves)) };
    let mut out = vec![0.0; values];
    Kernels::best().to_f32(dtype, bytes, &mut out);
    Ok(out.into())
}
