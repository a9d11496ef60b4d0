//! Views of rows where they lie.

use std::sync::Arc;

use kvoyant_client::{Format, RowLayout};
use kvoyant_kernels::Dtype;
use pyo3::exceptions::PyAttributeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::answer::Held;
use crate::dlpack::{BFLOAT, CPU, CUDA, DataType, FLOAT, Given, UNSIGNED};
use crate::errors::Wrong;
use crate::sequence::View;

/// What keeps rows where they are.
#[derive(Debug)]
#[allow(dead_code, reason = "held for what they keep")]
pub(crate) enum Keeper {
    /// The sequence, which is not changed meanwhile.
    Sequence(View),
    /// The answer, and the sequences whose own memory it points to.
    Answer(Arc<Held>, Option<View>),
}

/// Rows of one KV head that follow one another, in memory and in the sequence, without a copy.
///
/// numpy.asarray(rows) is float32 or float16 `[count, key_values + value_values]`, for reading only; torch.from_dlpack(rows) the same, and
/// bfloat16, where it is by agreement that nobody writes; rows of a GPU have `__cuda_array_interface__` and DLPack. Formats other
/// than f32, f16 and bf16 are uint8 `[count, row_bytes]`. The rows stay as long as this, or any array made of it, is alive.
#[pyclass(frozen, module = "kvoyant", name = "Rows")]
#[derive(Debug)]
pub(crate) struct Rows {
    pub(crate) keeper: Arc<Keeper>,
    pub(crate) address: u64,
    pub(crate) layout: RowLayout,
    /// Ordinal of the GPU that it lies on.
    pub(crate) device: Option<i32>,
    /// Position of the first row's token.
    #[pyo3(get)]
    pub(crate) token: usize,
    /// How many rows (tokens).
    #[pyo3(get)]
    pub(crate) count: usize,
    /// Whether they lie in the device's slab; else in the session's own memory.
    #[pyo3(get)]
    pub(crate) in_slab: bool,
}

impl Rows {
    fn dtype(&self) -> Option<Dtype> {
        match self.layout.format() {
            Format::Plain(dtype) => Some(dtype),
            _ => None,
        }
    }

    /// Values of a row, or its bytes where they are none of a plain type.
    fn width(&self) -> usize {
        let bytes = self.layout.row_bytes().unwrap_or(0);
        self.dtype().map_or(bytes, |dtype| bytes / dtype.bytes())
    }

    fn interface<'py>(&self, py: Python<'py>, version: u8) -> PyResult<Bound<'py, PyDict>> {
        let typestr = match self.dtype() {
            Some(Dtype::F32) => "<f4",
            Some(Dtype::F16) => "<f2",
            None => "|u1",
            Some(Dtype::Bf16) => {
                return Err(PyAttributeError::new_err(
                    "numpy has no bfloat16: use torch.from_dlpack(rows), or read() for float32 copies",
                ));
            }
        };
        let interface = PyDict::new(py);
        interface.set_item("shape", (self.count, self.width()))?;
        interface.set_item("typestr", typestr)?;
        interface.set_item("data", (self.address, true))?;
        interface.set_item("strides", py.None())?;
        interface.set_item("version", version)?;
        Ok(interface)
    }
}

#[pymethods]
impl Rows {
    fn __len__(&self) -> usize {
        self.count
    }

    fn __repr__(&self) -> String {
        let place = if self.in_slab { "in the slab" } else { "in place" };
        format!("<kvoyant.Rows of tokens {}..{}, {place}>", self.token, self.token + self.count)
    }

    /// For numpy: rows in host memory, for reading only.
    #[getter(__array_interface__)]
    fn array_interface<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        if self.device.is_some() {
            return Err(PyAttributeError::new_err(
                "these rows lie on a GPU: use __cuda_array_interface__ or DLPack, or read() for copies",
            ));
        }
        self.interface(py, 3)
    }

    /// For libraries of a GPU: rows in its memory.
    #[getter(__cuda_array_interface__)]
    fn cuda_array_interface<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        if self.device.is_none() {
            return Err(PyAttributeError::new_err("these rows lie in host memory: use numpy.asarray(rows)"));
        }
        self.interface(py, 3)
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        self.device.map_or((CPU, 0), |ordinal| (CUDA, ordinal))
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        // An answer that was waited for is complete in whatever stream.
        let _ = stream;
        if copy == Some(true) || dl_device.is_some_and(|device| device != self.__dlpack_device__()) {
            return Err(pyo3::exceptions::PyBufferError::new_err(
                "rows are given where they lie and as they are: copy the array that is made of them",
            ));
        }
        let dtype = match self.dtype() {
            Some(Dtype::F32) => DataType { code: FLOAT, bits: 32, lanes: 1 },
            Some(Dtype::F16) => DataType { code: FLOAT, bits: 16, lanes: 1 },
            Some(Dtype::Bf16) => DataType { code: BFLOAT, bits: 16, lanes: 1 },
            None => DataType { code: UNSIGNED, bits: 8, lanes: 1 },
        };
        let given = Given {
            data: self.address,
            device: self.__dlpack_device__(),
            dtype,
            shape: [self.count as i64, self.width() as i64],
            stride: self.width() as i64,
            keeper: Arc::clone(&self.keeper),
        };
        given.capsule(py, max_version.is_some_and(|(major, _)| major >= 1))
    }

    /// The rows as a numpy array, for reading only: float32 or float16 `[count, key_values + value_values]`.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("numpy")?.call_method1("asarray", (slf,))
    }

    /// The keys, float32 or float16 `[count, key_values]`, without a copy.
    #[getter]
    fn keys<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        Self::part(slf, |layout| (0, layout.key_values()))
    }

    /// The values, float32 or float16 `[count, value_values]`, without a copy.
    #[getter]
    fn values<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        Self::part(slf, |layout| match layout {
            RowLayout::KeyValue { d, .. } => (d, 2 * d),
            RowLayout::Latent { value, .. } => (0, value),
        })
    }
}

impl Rows {
    fn part<'py>(
        slf: &Bound<'py, Self>,
        columns: impl FnOnce(RowLayout) -> (usize, usize),
    ) -> PyResult<Bound<'py, PyAny>> {
        let rows = slf.get();
        if rows.dtype().is_none() {
            return Err(Wrong::unsupported(format!(
                "rows of {} are codes: read() gives them as float32",
                rows.layout.format()
            ))
            .into());
        }
        let (first, end) = columns(rows.layout);
        let py = slf.py();
        let slice = py.import("builtins")?.getattr("slice")?;
        let every = slice.call1((py.None(),))?;
        let index = PyTuple::new(py, [every, slice.call1((first, end))?])?;
        Self::numpy(slf)?.get_item(index)
    }
}
