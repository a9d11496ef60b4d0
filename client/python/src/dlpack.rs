//! Tensors between libraries, as DLPack lays them out (<https://dmlc.github.io/dlpack>): read from others, and given to them.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use pyo3::types::PyCapsuleMethods;

use crate::errors::{Result, Wrong};

/// Device types of DLPack.
pub(crate) const CPU: i32 = 1;
pub(crate) const CUDA: i32 = 2;
pub(crate) const CUDA_HOST: i32 = 3;

/// Kinds of values of DLPack.
pub(crate) const UNSIGNED: u8 = 1;
pub(crate) const FLOAT: u8 = 2;
pub(crate) const BFLOAT: u8 = 4;

const PLAIN: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
const READ_ONLY: u64 = 1;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct DataType {
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
}

#[repr(C)]
#[derive(Debug)]
struct Tensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct Managed {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

#[repr(C)]
struct ManagedVersioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedVersioned)>,
    flags: u64,
    tensor: Tensor,
}

/// An array of somebody else's, while its capsule lives.
#[derive(Debug)]
pub(crate) struct Foreign {
    pub(crate) data: *const u8,
    pub(crate) device_type: i32,
    pub(crate) dtype: DataType,
    pub(crate) shape: Vec<usize>,
    /// In values; `None`: contiguous.
    pub(crate) strides: Option<Vec<i64>>,
}

/// Reads a capsule that nobody has taken.
pub(crate) fn read(capsule: &Bound<'_, PyCapsule>, what: &str) -> Result<Foreign> {
    let pointer = capsule.pointer_checked(Some(PLAIN)).map_err(|_| {
        Wrong::argument(format!(
            "{what}: its __dlpack__() gave a capsule that is no unversioned DLPack tensor"
        ))
    })?;
    // SAFETY: a capsule of this name holds a managed tensor, by DLPack's contract, until somebody takes it; it was made for this call.
    let Tensor { data, device_type, ndim, dtype, shape, strides, byte_offset, .. } =
        unsafe { &pointer.cast::<Managed>().as_ref().tensor };
    let dims = usize::try_from(*ndim).unwrap_or(0);
    let list = |at: *mut i64| -> Option<Vec<i64>> {
        // SAFETY: by the same contract there are `ndim` of each, or none.
        (!at.is_null()).then(|| unsafe { std::slice::from_raw_parts(at, dims) }.to_vec())
    };
    let lengths = list(*shape).unwrap_or_default();
    Ok(Foreign {
        data: data.cast::<u8>().cast_const().wrapping_add(*byte_offset as usize),
        device_type: *device_type,
        dtype: *dtype,
        shape: lengths.iter().map(|length| usize::try_from(*length).unwrap_or(0)).collect(),
        strides: list(*strides),
    })
}

/// A two-dimensional array of ours, for others.
pub(crate) struct Given<T> {
    pub(crate) data: u64,
    pub(crate) device: (i32, i32),
    pub(crate) dtype: DataType,
    /// Rows and values of each.
    pub(crate) shape: [i64; 2],
    /// Values from one row to the next.
    pub(crate) stride: i64,
    /// What keeps the memory.
    pub(crate) keeper: Arc<T>,
}

/// What a tensor of ours takes along.
struct Context<T> {
    shape: [i64; 2],
    strides: [i64; 2],
    _keeper: Arc<T>,
}

impl<T: Send + Sync + 'static> Given<T> {
    fn tensor(&self) -> (Tensor, *mut Context<T>) {
        let context = Box::new(Context {
            shape: self.shape,
            strides: [self.stride, 1],
            _keeper: Arc::clone(&self.keeper),
        });
        let context = Box::into_raw(context);
        // SAFETY: made just now, and only fields' addresses are taken.
        let (shape, strides) =
            unsafe { ((&raw mut (*context).shape).cast(), (&raw mut (*context).strides).cast()) };
        let tensor = Tensor {
            data: std::ptr::without_provenance_mut(self.data as usize),
            device_type: self.device.0,
            device_id: self.device.1,
            ndim: 2,
            dtype: self.dtype,
            shape,
            strides,
            byte_offset: 0,
        };
        (tensor, context)
    }

    /// A capsule with it; `versioned` says that its values are only for reading, which the older form cannot.
    pub(crate) fn capsule<'py>(&self, py: Python<'py>, versioned: bool) -> PyResult<Bound<'py, PyAny>> {
        let (tensor, context) = self.tensor();
        let context = context.cast();
        let (pointer, name, drop): (*mut c_void, &CStr, pyo3::ffi::PyCapsule_Destructor) = if versioned {
            let managed = ManagedVersioned {
                major: 1,
                minor: 0,
                context,
                deleter: Some(delete_versioned::<T>),
                flags: READ_ONLY,
                tensor,
            };
            (Box::into_raw(Box::new(managed)).cast(), VERSIONED, drop_versioned)
        } else {
            let managed = Managed { tensor, context, deleter: Some(delete::<T>) };
            (Box::into_raw(Box::new(managed)).cast(), PLAIN, drop_plain)
        };
        // SAFETY: the pointer is not null, and name and destructor are static; the capsule owns it until somebody takes it, by renaming it.
        unsafe {
            let capsule = pyo3::ffi::PyCapsule_New(pointer, name.as_ptr(), Some(drop));
            Bound::from_owned_ptr_or_err(py, capsule)
        }
    }
}

/// # Safety
/// Called once, with what [`Given::capsule`] made.
unsafe extern "C" fn delete<T>(managed: *mut Managed) {
    // SAFETY: the contract of this function: both came from boxes.
    unsafe {
        let managed = Box::from_raw(managed);
        drop(Box::from_raw(managed.context.cast::<Context<T>>()));
    }
}

/// # Safety
/// As for [`delete`].
unsafe extern "C" fn delete_versioned<T>(managed: *mut ManagedVersioned) {
    // SAFETY: the contract of this function: both came from boxes.
    unsafe {
        let managed = Box::from_raw(managed);
        drop(Box::from_raw(managed.context.cast::<Context<T>>()));
    }
}

/// # Safety
/// Called by Python when a capsule of ours ends.
unsafe extern "C" fn drop_plain(capsule: *mut pyo3::ffi::PyObject) {
    // SAFETY: a valid capsule; under this name nobody has taken what it holds, which is a `Managed` of ours.
    unsafe {
        if pyo3::ffi::PyCapsule_IsValid(capsule, PLAIN.as_ptr()) == 1 {
            let managed = pyo3::ffi::PyCapsule_GetPointer(capsule, PLAIN.as_ptr()).cast::<Managed>();
            if let Some(delete) = (*managed).deleter {
                delete(managed);
            }
        }
    }
}

/// # Safety
/// As for [`drop_plain`].
unsafe extern "C" fn drop_versioned(capsule: *mut pyo3::ffi::PyObject) {
    // SAFETY: a valid capsule; under this name nobody has taken what it holds, which is a `ManagedVersioned` of ours.
    unsafe {
        if pyo3::ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) == 1 {
            let managed =
                pyo3::ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr()).cast::<ManagedVersioned>();
            if let Some(delete) = (*managed).deleter {
                delete(managed);
            }
        }
    }
}
