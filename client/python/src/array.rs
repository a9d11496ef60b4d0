//! Arrays of the caller's, and arrays for the caller: numpy's by its array interface, those of other libraries by DLPack.
#![allow(unsafe_code)]

use std::borrow::Cow;

use kvoyant_kernels::{Dtype, Kernels};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyCapsule, PyDict, PyTuple};

use crate::dlpack;
use crate::errors::{Result, Wrong};

/// An array of the caller's: contiguous, in host memory, the last dimension fastest. It is read while Python holds still.
#[derive(Debug)]
pub(crate) struct Array<'py> {
    what: String,
    data: *const u8,
    /// `None`: bytes.
    dtype: Option<Dtype>,
    shape: Vec<usize>,
    /// What keeps the memory.
    _owner: Bound<'py, PyAny>,
}

fn listed(shape: &[usize]) -> String {
    let numbers: Vec<_> = shape.iter().map(ToString::to_string).collect();
    format!("[{}]", numbers.join(", "))
}

/// Whether strides are those of a contiguous array; those of dimensions of one value do not matter.
fn is_contiguous(shape: &[usize], strides: &[i64], unit: i64) -> bool {
    let mut wanted = unit;
    for (length, stride) in shape.iter().zip(strides).rev() {
        if *length > 1 && *stride != wanted {
            return shape.contains(&0);
        }
        wanted *= *length as i64;
    }
    true
}

impl<'py> Array<'py> {
    /// Looks at an object. `what` names it in errors.
    pub(crate) fn of(object: &Bound<'py, PyAny>, what: &str) -> PyResult<Self> {
        let array = match object.getattr_opt("__array_interface__")? {
            Some(interface) => Self::of_numpy(object, &interface.cast_into::<PyDict>()?, what)?,
            None if object.hasattr("__dlpack__")? => Self::of_dlpack(object, what)?,
            None => {
                let kind = object.get_type().name()?;
                return Err(Wrong::argument(format!(
                    "{what}: a {kind} is no array: pass a numpy array, or a tensor in host memory that has __dlpack__"
                ))
                .into());
            }
        };
        let align = array.dtype.map_or(1, Dtype::bytes);
        if array.values() > 0 && (array.data.is_null() || !array.data.addr().is_multiple_of(align)) {
            return Err(Wrong::argument(format!(
                "{what}: its memory is not aligned to {align} bytes; copy it"
            ))
            .into());
        }
        Ok(array)
    }

    fn of_numpy(object: &Bound<'py, PyAny>, interface: &Bound<'py, PyDict>, what: &str) -> PyResult<Self> {
        let item = |name: &str| {
            let item = interface.get_item(name)?;
            item.ok_or_else(|| {
                Wrong::argument(format!("{what}: its __array_interface__ has no {name}")).into()
            })
        };
        let typestr: String = item("typestr").and_then(|text: Bound<'py, PyAny>| text.extract())?;
        let shape: Vec<usize> = item("shape").and_then(|shape: Bound<'py, PyAny>| shape.extract())?;
        let (data, _): (usize, bool) = item("data").and_then(|data: Bound<'py, PyAny>| data.extract())?;
        let dtype = match typestr.as_str() {
            "<f4" => Some(Dtype::F32),
            "<f2" => Some(Dtype::F16),
            "|u1" => None,
            _ => {
                let name = object
                    .getattr_opt("dtype")?
                    .map_or(Ok(typestr), |dtype| dtype.str().map(|text| text.to_string()))?;
                return Err(Wrong::dtype(format!(
                    "{what}: the dtype is {name}, where float32 or float16 is needed (bfloat16 as a torch tensor)"
                ))
                .into());
            }
        };
        let bytes = dtype.map_or(1, Dtype::bytes) as i64;
        if let Some(strides) = interface.get_item("strides")?.filter(|strides| !strides.is_none()) {
            let strides: Vec<i64> = strides.extract()?;
            if !is_contiguous(&shape, &strides, bytes) {
                return Err(not_contiguous(what, "numpy.ascontiguousarray(…)").into());
            }
        }
        let data = std::ptr::with_exposed_provenance(data);
        Ok(Self { what: what.into(), data, dtype, shape, _owner: object.clone() })
    }

    fn of_dlpack(object: &Bound<'py, PyAny>, what: &str) -> PyResult<Self> {
        let (device, _): (i32, i32) = object.call_method0("__dlpack_device__")?.extract()?;
        if device != dlpack::CPU && device != dlpack::CUDA_HOST {
            return Err(Wrong::argument(format!(
                "{what}: it lies on a device (DLPack type {device}): copy it to host memory first, as with .cpu()"
            ))
            .into());
        }
        let capsule = object.call_method0("__dlpack__")?.cast_into::<PyCapsule>()?;
        let foreign = dlpack::read(&capsule, what)?;
        let dlpack::DataType { code, bits, lanes } = foreign.dtype;
        let dtype = match (code, bits, lanes) {
            (dlpack::FLOAT, 32, 1) => Some(Dtype::F32),
            (dlpack::FLOAT, 16, 1) => Some(Dtype::F16),
            (dlpack::BFLOAT, 16, 1) => Some(Dtype::Bf16),
            (dlpack::UNSIGNED, 8, 1) => None,
            _ => {
                let name = object.getattr("dtype").and_then(|dtype| dtype.str());
                let name =
                    name.map_or_else(|_| format!("DLPack's {code} of {bits} bits"), |name| name.to_string());
                return Err(Wrong::dtype(format!(
                    "{what}: the dtype is {name}, where float32, float16 or bfloat16 is needed"
                ))
                .into());
            }
        };
        debug_assert_eq!(foreign.device_type, device);
        if foreign.strides.as_ref().is_some_and(|strides| !is_contiguous(&foreign.shape, strides, 1)) {
            return Err(not_contiguous(what, ".contiguous()").into());
        }
        let (data, shape) = (foreign.data, foreign.shape);
        Ok(Self { what: what.into(), data, dtype, shape, _owner: capsule.into_any() })
    }

    /// Its shape.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Checks that it has one of these shapes. `of` names the dimensions.
    pub(crate) fn expect_shape(&self, of: &str, shapes: &[&[usize]]) -> Result<()> {
        if shapes.contains(&self.shape.as_slice()) {
            return Ok(());
        }
        let wanted: Vec<_> = shapes.iter().map(|shape| listed(shape)).collect();
        Err(Wrong::shape(format!(
            "{}: the shape is {}, where {} is needed ({of})",
            self.what,
            listed(&self.shape),
            wanted.join(" or ")
        )))
    }

    fn bytes(&self) -> &[u8] {
        let bytes = self.values() * self.dtype.map_or(1, Dtype::bytes);
        if bytes == 0 {
            return &[];
        }
        // SAFETY: whoever gave the address keeps so many bytes there while its owner lives, which `self` holds on to; nobody writes there
        // while Python is attached to this thread.
        unsafe { std::slice::from_raw_parts(self.data, bytes) }
    }

    /// Its values as f32, copied where they are not.
    pub(crate) fn floats(&self) -> Result<Cow<'_, [f32]>> {
        let Some(dtype) = self.dtype else {
            return Err(Wrong::dtype(format!(
                "{}: the dtype is uint8, where float32, float16 or bfloat16 is needed",
                self.what
            )));
        };
        let values = self.values();
        if dtype == Dtype::F32 && values > 0 {
            // SAFETY: as in `bytes`, and the address was checked to be aligned.
            return Ok(unsafe { std::slice::from_raw_parts(self.data.cast::<f32>(), values) }.into());
        }
        let mut out = vec![0.0; values];
        Kernels::best().to_f32(dtype, self.bytes(), &mut out);
        Ok(out.into())
    }

    /// Its bytes, if it is of this type; `None`: of bytes.
    pub(crate) fn as_stored(&self, dtype: Option<Dtype>) -> Result<&[u8]> {
        if self.dtype == dtype {
            return Ok(self.bytes());
        }
        let name = |dtype: Option<Dtype>| dtype.map_or("uint8", Dtype::name);
        Err(Wrong::dtype(format!(
            "{}: the dtype is {}, where {} is needed",
            self.what,
            name(self.dtype),
            name(dtype)
        )))
    }
}

fn not_contiguous(what: &str, how: &str) -> Wrong {
    Wrong::argument(format!("{what}: the array is not contiguous; pass {how}"))
}

/// A numpy array of one's own with these bytes.
pub(crate) fn numpy<'py>(
    py: Python<'py>,
    dtype: &str,
    shape: &[usize],
    bytes: &[u8],
) -> PyResult<Bound<'py, PyAny>> {
    let numpy = py.import("numpy")?;
    let shape = PyTuple::new(py, shape)?;
    if bytes.is_empty() {
        return numpy.call_method1("zeros", (shape, dtype));
    }
    let memory = PyByteArray::new_with(py, bytes.len(), |memory| {
        memory.copy_from_slice(bytes);
        Ok(())
    })?;
    numpy.call_method1("frombuffer", (memory, dtype))?.call_method1("reshape", (shape,))
}

/// A numpy array of float32.
pub(crate) fn floats<'py>(py: Python<'py>, shape: &[usize], values: &[f32]) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: the same memory as bytes.
    let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    numpy(py, "float32", shape, bytes)
}
