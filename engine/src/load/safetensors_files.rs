//! Tensors of a checkpoint folder: one safetensors file, or shards named by an index.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kvoyant_kernels::{Dtype, Kernels};
use serde::Deserialize;

use super::assemble::TensorSource;
use super::names::TensorName;
use crate::error::LoadError;

/// The file of an unsharded checkpoint.
const SINGLE: &str = "model.safetensors";
/// The file that names the shards of a sharded one.
const INDEX: &str = "model.safetensors.index.json";
/// Headers above this are refused, as in the format's own library.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Where a tensor lies.
#[derive(Debug)]
struct Located {
    file: usize,
    dtype: String,
    shape: Vec<usize>,
    /// Bytes in the file.
    start: u64,
    end: u64,
}

/// All files of a checkpoint, opened and their headers read.
#[derive(Debug)]
pub(super) struct SafetensorsFiles {
    folder: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: HashMap<String, Located>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl SafetensorsFiles {
    /// Opens `model.safetensors` or the shards of `model.safetensors.index.json`.
    pub(super) fn open(folder: &Path) -> Result<Self, LoadError> {
        let index_path = folder.join(INDEX);
        let mut this = Self { folder: folder.into(), files: Vec::new(), tensors: HashMap::new() };
        if !index_path.exists() {
            let path = folder.join(SINGLE);
            if !path.exists() {
                let named_by = format!("a checkpoint has this or {INDEX}");
                return Err(LoadError::MissingFile { path, named_by });
            }
            this.add(path)?;
            return Ok(this);
        }
        let text = std::fs::read_to_string(&index_path)
            .map_err(|source| LoadError::Io { path: index_path.clone(), source })?;
        let index: Index = serde_json::from_str(&text)
            .map_err(|error| LoadError::Malformed { path: index_path, reason: error.to_string() })?;
        for shard in index.weight_map.values().collect::<BTreeSet<_>>() {
            let path = folder.join(shard);
            if !path.exists() {
                return Err(LoadError::MissingFile { path, named_by: INDEX.to_owned() });
            }
            this.add(path)?;
        }
        Ok(this)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), LoadError> {
        let io = |source| LoadError::Io { path: path.clone(), source };
        let file = File::open(&path).map_err(io)?;
        let found = file.metadata().map_err(io)?.len();
        let truncated = |needed| LoadError::Truncated { path: path.clone(), needed, found };
        if found < 8 {
            return Err(truncated(8));
        }
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).map_err(io)?;
        let header_bytes = u64::from_le_bytes(length);
        let malformed = |reason| LoadError::Malformed { path: path.clone(), reason };
        if header_bytes > MAX_HEADER_BYTES {
            return Err(malformed(format!("its header would have {header_bytes} bytes")));
        }
        if found < 8 + header_bytes {
            return Err(truncated(8 + header_bytes));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact_at(&mut header, 8).map_err(io)?;
        let entries: HashMap<String, serde_json::Value> =
            serde_json::from_slice(&header).map_err(|error| malformed(error.to_string()))?;
        for (name, entry) in entries.into_iter().filter(|(name, _)| name != "__metadata__") {
            let entry: Entry = serde_json::from_value(entry)
                .map_err(|error| malformed(format!("tensor {name}: {error}")))?;
            let place = |offset: u64| offset.checked_add(8 + header_bytes);
            let (Some(start), Some(end)) = (place(entry.data_offsets.0), place(entry.data_offsets.1)) else {
                return Err(malformed(format!("tensor {name} lies beyond every file")));
            };
            if end > found {
                return Err(truncated(end));
            }
            let located =
                Located { file: self.files.len(), dtype: entry.dtype, shape: entry.shape, start, end };
            self.tensors.insert(name, located);
        }
        self.files.push((path, file));
        Ok(())
    }
}

impl TensorSource for SafetensorsFiles {
    fn tensor(&self, name: TensorName, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        let tensor = name.hugging_face();
        let Some(located) = self.tensors.get(&tensor) else {
            return Err(LoadError::MissingTensor { tensor, path: self.folder.clone() });
        };
        if located.shape != shape {
            return Err(LoadError::WrongShape {
                tensor,
                expected: shape.into(),
                found: located.shape.clone(),
            });
        }
        let (path, file) = &self.files[located.file];
        let values: usize = shape.iter().product();
        let value_bytes = match located.dtype.as_str() {
            "F64" => 8,
            "F32" => 4,
            "F16" | "BF16" => 2,
            other => return Err(LoadError::UnknownDtype { tensor, dtype: other.to_owned() }),
        };
        if located.end.checked_sub(located.start) != Some((values * value_bytes) as u64) {
            let reason = format!("tensor {tensor} has other than {values} values of {value_bytes} bytes");
            return Err(LoadError::Malformed { path: path.clone(), reason });
        }
        let mut bytes = vec![0; values * value_bytes];
        file.read_exact_at(&mut bytes, located.start)
            .map_err(|source| LoadError::Io { path: path.clone(), source })?;
        let narrow = |dtype| {
            let mut out = vec![0.0; values];
            Kernels::best().to_f32(dtype, &bytes, &mut out);
            out
        };
        Ok(match located.dtype.as_str() {
            "F32" => narrow(Dtype::F32),
            "F16" => narrow(Dtype::F16),
            "BF16" => narrow(Dtype::Bf16),
            _ => bytes.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes) as f32).collect(),
        })
    }

    fn has(&self, name: TensorName) -> bool {
        self.tensors.contains_key(&name.hugging_face())
    }

    fn is_quantised(&self) -> bool {
        false
    }
}
