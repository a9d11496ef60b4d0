//! Tensors of a GGUF file, dequantised on all cores.

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use kvoyant_kernels::packed::PackedMatrix;
use rayon::prelude::*;

use super::assemble::TensorSource;
use super::gguf_header::{Header, TensorEntry};
use super::names::{LayerTensor, TensorName};
use crate::config::{Architecture, ModelConfig};
use crate::error::LoadError;

/// Values that one task dequantises, about.
const TASK_VALUES: usize = 1 << 16;

/// A GGUF file, open, its header read.
#[derive(Debug)]
pub(super) struct GgufTensors {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) length: u64,
    pub(super) header: Header,
    /// q and k rows stand in the order of interleaved RoPE: heads and values per head of both.
    pub(super) interleaved: Option<HeadCounts>,
}

/// What un-permuting needs to know.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadCounts {
    head_dim: usize,
}

impl HeadCounts {
    /// GGUF files of architecture `llama` are permuted, those of `qwen2` are not.
    pub(super) fn of(config: &ModelConfig) -> Option<Self> {
        (config.architecture != Architecture::Qwen2).then_some(Self { head_dim: config.head_dim })
    }
}

/// Storage type by GGML's number.
fn kind(id: u32) -> Option<GgmlDType> {
    Some(match id {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

impl GgufTensors {
    /// A tensor under its name in the file, as it is stored.
    fn stored(&self, tensor: &str, shape: &[usize]) -> Result<Stored, LoadError> {
        let Some(entry) = self.header.tensors.get(tensor) else {
            return Err(LoadError::MissingTensor { tensor: tensor.to_owned(), path: self.path.clone() });
        };
        if !entry.shape.iter().eq(shape.iter().map(|&n| n as u64).collect::<Vec<_>>().iter()) {
            return Err(LoadError::WrongShape {
                tensor: tensor.to_owned(),
                expected: shape.into(),
                found: entry.shape.iter().map(|&n| usize::try_from(n).unwrap_or(usize::MAX)).collect(),
            });
        }
        let Some(kind) = kind(entry.kind) else {
            return Err(LoadError::UnknownGgmlType { tensor: tensor.to_owned(), id: entry.kind });
        };
        let columns = shape.last().copied().unwrap_or(1);
        let values: usize = shape.iter().product();
        if !columns.is_multiple_of(kind.block_size()) {
            let reason =
                format!("tensor {tensor} has rows of {columns} values, which are no whole {kind:?} blocks");
            return Err(LoadError::Malformed { path: self.path.clone(), reason });
        }
        let words = self.bytes(entry, values / kind.block_size() * kind.type_size())?;
        let row_bytes = columns / kind.block_size() * kind.type_size();
        Ok(Stored { kind, words, columns, row_bytes, bytes: values / columns * row_bytes })
    }

    /// Values of a tensor under its name in the file.
    pub(super) fn read(&self, tensor: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        let stored = self.stored(tensor, shape)?;
        let (kind, columns, row_bytes, bytes) =
            (stored.kind, stored.columns, stored.row_bytes, stored.bytes());
        let values = shape.iter().product();
        let rows = (TASK_VALUES / columns).max(1);
        let mut out = vec![0.0; values];
        out.par_chunks_mut(rows * columns).zip(bytes.par_chunks(rows * row_bytes)).try_for_each(
            |(out, bytes)| match kind.from_data(Cow::Borrowed(bytes)).dequantize(out.len()) {
                Ok(CpuStorage::F32(values)) => {
                    out.copy_from_slice(&values);
                    Ok(())
                }
                _ => Err(LoadError::Malformed {
                    path: self.path.clone(),
                    reason: format!("tensor {tensor} cannot be dequantised"),
                }),
            },
        )?;
        Ok(out)
    }

    /// A tensor's bytes, in words so that blocks are aligned.
    fn bytes(&self, entry: &TensorEntry, bytes: usize) -> Result<Vec<u64>, LoadError> {
        let start = self.header.data_start.saturating_add(entry.offset);
        let needed = start.saturating_add(bytes as u64);
        if needed > self.length {
            return Err(LoadError::Truncated { path: self.path.clone(), needed, found: self.length });
        }
        let mut words = vec![0u64; bytes.div_ceil(8)];
        self.file
            .read_exact_at(&mut bytemuck::cast_slice_mut(&mut words)[..bytes], start)
            .map_err(|source| LoadError::Io { path: self.path.clone(), source })?;
        Ok(words)
    }
}

/// A tensor's bytes.
struct Stored {
    kind: GgmlDType,
    /// In words, so that blocks are aligned.
    words: Vec<u64>,
    bytes: usize,
    /// Values and bytes of a row.
    columns: usize,
    row_bytes: usize,
}

impl Stored {
    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }
}

/// Whether the file has a tensor's rows in the order of interleaved RoPE.
fn rotated(name: TensorName) -> bool {
    use LayerTensor as T;
    matches!(name, TensorName::Layer(_, T::Query | T::QueryBias | T::Key | T::KeyBias))
}

impl TensorSource for GgufTensors {
    fn tensor(&self, name: TensorName, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        let values = self.read(&name.gguf(), shape)?;
        Ok(match self.interleaved.filter(|_| rotated(name)) {
            Some(heads) => rotate_half_order(&values, heads.head_dim, values.len() / shape[0]),
            None => values,
        })
    }

    fn packed(&self, name: TensorName, shape: [usize; 2]) -> Result<Option<PackedMatrix>, LoadError> {
        let stored = self.stored(&name.gguf(), &shape)?;
        let pack = match stored.kind {
            GgmlDType::Q4_0 => PackedMatrix::from_q4_0,
            GgmlDType::Q4_1 => PackedMatrix::from_q4_1,
            GgmlDType::Q8_0 => PackedMatrix::from_q8_0,
            _ => return Ok(None),
        };
        let bytes = match self.interleaved.filter(|_| rotated(name)) {
            Some(heads) => Cow::Owned(rotate_half_order(stored.bytes(), heads.head_dim, stored.row_bytes)),
            None => Cow::Borrowed(stored.bytes()),
        };
        Ok(Some(pack(&bytes, stored.columns)))
    }

    fn has(&self, name: TensorName) -> bool {
        self.header.tensors.contains_key(&name.gguf())
    }

    fn is_quantised(&self) -> bool {
        let query = TensorName::Layer(0, LayerTensor::Query).gguf();
        self.header.tensors.get(&query).is_some_and(|entry| !matches!(entry.kind, 0 | 1 | 30))
    }
}

/// Brings rows from the order of interleaved RoPE, where `2j` pairs with `2j + 1`, into that of rotate-half, where `j` pairs with
/// `j + d/2`, head by head.
pub(crate) fn rotate_half_order<T: Copy + Default>(rows: &[T], head_dim: usize, columns: usize) -> Vec<T> {
    let mut out = vec![T::default(); rows.len()];
    let head_values = head_dim * columns;
    for (to, from) in out.chunks_exact_mut(head_values).zip(rows.chunks_exact(head_values)) {
        for (row, to) in to.chunks_exact_mut(columns).enumerate() {
            let (half, j) = (row / (head_dim / 2), row % (head_dim / 2));
            to.copy_from_slice(&from[(2 * j + half) * columns..][..columns]);
        }
    }
    out
}

/// The inverse of [`rotate_half_order`], for writing files.
pub(crate) fn interleaved_order(rows: &[f32], head_dim: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows.len()];
    let head_values = head_dim * columns;
    for (to, from) in out.chunks_exact_mut(head_values).zip(rows.chunks_exact(head_values)) {
        for (row, to) in to.chunks_exact_mut(columns).enumerate() {
            let (j, half) = (row / 2, row % 2);
            to.copy_from_slice(&from[(half * head_dim / 2 + j) * columns..][..columns]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_orders_are_inverses_and_pair_as_they_say() {
        let rows: Vec<f32> = (0..2 * 6 * 3).map(|i| i as f32).collect();
        let interleaved = interleaved_order(&rows, 6, 3);
        assert_eq!(rotate_half_order(&interleaved, 6, 3), rows);
        // Rows 0 and 3 of a head of 6 pair; interleaved they stand side by side.
        assert_eq!(&interleaved[0..3], &rows[0..3]);
        assert_eq!(&interleaved[3..6], &rows[9..12]);
    }
}
