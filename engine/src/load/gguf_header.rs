//! The header of a GGUF file: metadata and where the tensors lie (ggml's `docs/gguf.md`, versions 2 and 3).

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use crate::error::LoadError;

/// Alignment of tensor data when the file names none.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Dimensions that a tensor has at most.
const MAX_DIMENSIONS: u32 = 4;
/// Arrays within arrays that are followed.
const MAX_DEPTH: usize = 4;

/// A metadata value. Integers are widened; arrays of strings and numbers are kept as such.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    Texts(Vec<String>),
    /// Arrays of arrays or of booleans: nothing here needs them.
    Other,
}

/// A tensor's entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorEntry {
    /// Outermost first.
    pub(super) shape: Vec<u64>,
    /// GGML's number of the storage type.
    pub(super) kind: u32,
    /// Bytes after the start of the tensor data.
    pub(super) offset: u64,
}

/// Everything before the tensor data.
#[derive(Debug, Default)]
pub(super) struct Header {
    pub(super) metadata: HashMap<String, Value>,
    pub(super) tensors: HashMap<String, TensorEntry>,
    /// Where tensor data starts in the file.
    pub(super) data_start: u64,
}

/// Reads forward and knows how much of the file is left, so that no length in the file makes it allocate more than the file has.
struct Reader<'a, R> {
    inner: R,
    position: u64,
    length: u64,
    path: &'a Path,
}

impl<R: Read> Reader<'_, R> {
    fn malformed(&self, reason: String) -> LoadError {
        LoadError::Malformed { path: self.path.into(), reason }
    }

    /// Refuses to go on when fewer than `items` of at least `item_bytes` are left.
    fn expect(&self, items: u64, item_bytes: u64) -> Result<usize, LoadError> {
        let needed = items.saturating_mul(item_bytes).saturating_add(self.position);
        if needed > self.length {
            return Err(LoadError::Truncated { path: self.path.into(), needed, found: self.length });
        }
        Ok(items as usize)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], LoadError> {
        self.expect(1, N as u64)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), LoadError> {
        self.inner.read_exact(bytes).map_err(|source| LoadError::Io { path: self.path.into(), source })?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn u32(&mut self) -> Result<u32, LoadError> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, LoadError> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, LoadError> {
        let length = self.u64()?;
        let mut bytes = vec![0; self.expect(length, 1)?];
        self.fill(&mut bytes)?;
        // Token lists of some files hold pieces that are no UTF-8 on their own.
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value, LoadError> {
        Ok(match kind {
            0 => Value::Integer(self.bytes::<1>()?[0].into()),
            1 => Value::Integer(i8::from_le_bytes(self.bytes()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.bytes()?).into()),
            7 => Value::Bool(self.bytes::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 => self.array(depth)?,
            10 => Value::Integer(self.u64()?.into()),
            11 => Value::Integer(i64::from_le_bytes(self.bytes()?).into()),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            _ => return Err(self.malformed(format!("a metadata value has the unknown type {kind}"))),
        })
    }

    fn array(&mut self, depth: usize) -> Result<Value, LoadError> {
        if depth == MAX_DEPTH {
            return Err(self.malformed("metadata arrays are nested too deeply".to_owned()));
        }
        let kind = self.u32()?;
        let items = self.u64()?;
        // A string or an array takes at least its length, everything else at least a byte.
        let items = self.expect(items, if matches!(kind, 8 | 9) { 8 } else { 1 })?;
        let mut values = (0..items).map(|_| self.value(kind, depth + 1));
        Ok(match kind {
            0..=5 | 10 | 11 => {
                let integer = |value| match value {
                    Value::Integer(number) => number as i64,
                    _ => 0,
                };
                Value::Integers(values.map(|value| value.map(integer)).collect::<Result<_, _>>()?)
            }
            6 | 12 => {
                let float = |value| match value {
                    Value::Float(number) => number as f32,
                    _ => 0.0,
                };
                Value::Floats(values.map(|value| value.map(float)).collect::<Result<_, _>>()?)
            }
            8 => {
                let text = |value| match value {
                    Value::Text(text) => text,
                    _ => String::new(),
                };
                Value::Texts(values.map(|value| value.map(text)).collect::<Result<_, _>>()?)
            }
            _ => values.try_for_each(|value| value.map(|_| ())).map(|()| Value::Other)?,
        })
    }
}

impl Header {
    /// Reads the header of a file of `length` bytes.
    pub(super) fn read(inner: impl Read, length: u64, path: &Path) -> Result<Self, LoadError> {
        let mut reader = Reader { inner, position: 0, length, path };
        if reader.bytes()? != super::GGUF_MAGIC {
            return Err(reader.malformed("its first bytes are not GGUF".to_owned()));
        }
        let version = reader.u32()?;
        if !matches!(version, 2 | 3) {
            return Err(reader.malformed(format!("GGUF version {version} is not 2 or 3")));
        }
        let tensors = reader.u64()?;
        let keys = reader.u64()?;
        let mut header = Self::default();
        for _ in 0..keys {
            let key = reader.text()?;
            let kind = reader.u32()?;
            let value = reader.value(kind, 0)?;
            header.metadata.insert(key, value);
        }
        for _ in 0..tensors {
            let name = reader.text()?;
            let dimensions = reader.u32()?;
            if dimensions > MAX_DIMENSIONS {
                return Err(reader.malformed(format!("tensor {name} has {dimensions} dimensions")));
            }
            let mut shape = (0..dimensions).map(|_| reader.u64()).collect::<Result<Vec<_>, _>>()?;
            shape.reverse();
            let entry = TensorEntry { shape, kind: reader.u32()?, offset: reader.u64()? };
            header.tensors.insert(name, entry);
        }
        let alignment = match header.metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Integer(bytes @ 1..=0x1_0000)) => *bytes as u64,
            Some(other) => return Err(reader.malformed(format!("its alignment is {other:?}"))),
        };
        header.data_start = reader.position.next_multiple_of(alignment);
        Ok(header)
    }
}
