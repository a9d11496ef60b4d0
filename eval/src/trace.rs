//! Trace files: queries, keys and values of one sequence, as attention saw them.
//!
//! A trace is a safetensors file; `docs/traces.md` has its schema. Everything that comes from a file is checked before it is
//! used: a trace that was read has finite values and dimensions that go together.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use kvoyant_kernels::Kernels;
use kvoyant_methods::{Dtype, Fingerprint, MethodError, Shape};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as FileDtype, TensorView};

/// The value of the metadata's `format`.
pub const FORMAT: &str = "kvoyant-trace-1";

/// No dimension of a trace is larger: four million tokens.
const MOST: usize = 1 << 22;

/// Why a trace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read or written.
    #[error("the trace {} cannot be read or written: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// It is no safetensors file.
    #[error("the trace is no safetensors file: {0}")]
    File(#[from] safetensors::SafeTensorError),
    /// Its contents do not go together.
    #[error("the trace makes no sense: {reason}; capture it again")]
    Content {
        /// What does not.
        reason: String,
    },
    /// Its shape is no model's.
    #[error(transparent)]
    Shape(#[from] MethodError),
}

fn content<T>(reason: impl Into<String>) -> Result<T, TraceError> {
    Err(TraceError::Content { reason: reason.into() })
}

/// Sizes of a trace and the regions of its attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceShape {
    /// Layers.
    pub layers: usize,
    /// Query heads of a layer.
    pub query_heads: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Values of a key and of a value, `d`.
    pub head_dim: usize,
    /// Tokens of the sequence when the last step is over, `n`.
    pub tokens: usize,
    /// Decode steps: the sequence's last tokens.
    pub steps: usize,
    /// Queries kept of the prompt's last tokens.
    pub prompt_queries: usize,
    /// First tokens that are always attended, `S`.
    pub sinks: usize,
    /// Newest tokens that are always attended, `W`.
    pub window: usize,
    /// Layers `0..dense_layers` are never selected for.
    pub dense_layers: usize,
    /// The storage type of keys and values in the model that was captured.
    pub dtype: Dtype,
}

impl TraceShape {
    /// Tokens of the prompt: those before the first step's.
    #[must_use]
    pub fn prompt(&self) -> usize {
        self.tokens - self.steps
    }

    fn queries(&self, rows: usize) -> [usize; 4] {
        [self.layers, rows, self.query_heads, self.head_dim]
    }

    fn rows(&self) -> [usize; 4] {
        [self.layers, self.kv_heads, self.tokens, self.head_dim]
    }

    fn check(&self) -> Result<(), TraceError> {
        for (name, value, least) in [
            ("layers", self.layers, 1),
            ("query heads", self.query_heads, 1),
            ("KV heads", self.kv_heads, 1),
            ("values of a head", self.head_dim, 1),
            ("tokens", self.tokens, 2),
            ("steps", self.steps, 1),
            ("prompt queries", self.prompt_queries, 0),
            ("sinks", self.sinks, 0),
            ("tokens of the window", self.window, 1),
            ("dense layers", self.dense_layers, 0),
        ] {
            if !(least..=MOST).contains(&value) {
                return content(format!("it has {value} {name}, and {least} to {MOST} can be"));
            }
        }
        if self.steps >= self.tokens || self.prompt_queries > self.tokens - self.steps {
            return content(format!(
                "{} steps and {} prompt queries do not fit {} tokens",
                self.steps, self.prompt_queries, self.tokens
            ));
        }
        Ok(())
    }
}

/// Queries, keys and values of one sequence.
///
/// Step `s` is the decoding of token `prompt + s`: then the sequence has `prompt + s + 1` tokens, the current one among them.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// Its sizes.
    pub shape: TraceShape,
    /// The model's fingerprint; artifacts of that model fit it.
    pub fingerprint: Fingerprint,
    /// The model's name.
    pub model: String,
    /// What was read: a text's name, or a generator's with its seed.
    pub source: String,
    /// True queries after RoPE, not scaled by `1/√d`, `[layers, steps, Hq, d]`.
    pub q: Vec<f32>,
    /// Queries as predicted one layer ahead, `[layers, steps, Hq, d]`; those of layer 0 are the true ones.
    pub hint: Vec<f32>,
    /// True queries of the prompt's last tokens, `[layers, prompt_queries, Hq, d]`; may be empty.
    pub prompt_q: Vec<f32>,
    /// Keys after RoPE, `[layers, Hkv, n, d]`.
    pub k: Vec<f32>,
    /// Values, `[layers, Hkv, n, d]`.
    pub v: Vec<f32>,
    /// One [mark](kvoyant_methods::needs::mark) per token, or none at all.
    pub marks: Vec<u8>,
}

impl Trace {
    /// Whether its parts go together.
    ///
    /// # Errors
    /// [`TraceError::Content`] or [`TraceError::Shape`] with what does not.
    pub fn check(&self) -> Result<(), TraceError> {
        let shape = &self.shape;
        shape.check()?;
        self.methods_shape(1).check()?;
        let floats = [
            ("q", &self.q, shape.queries(shape.steps)),
            ("hint", &self.hint, shape.queries(shape.steps)),
            ("prompt_q", &self.prompt_q, shape.queries(shape.prompt_queries)),
            ("k", &self.k, shape.rows()),
            ("v", &self.v, shape.rows()),
        ];
        for (name, values, wanted) in floats {
            if values_of(&wanted)? != values.len() {
                return content(format!("`{name}` has {} values for {wanted:?}", values.len()));
            }
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                return content(format!("`{name}` has {} at {at}", values[at]));
            }
        }
        if !self.marks.is_empty() && self.marks.len() != shape.tokens {
            return content(format!("{} marks for {} tokens", self.marks.len(), shape.tokens));
        }
        Ok(())
    }

    /// The shape that methods are built for, with pages of `page_rows` rows.
    #[must_use]
    pub fn methods_shape(&self, page_rows: usize) -> Shape {
        let shape = &self.shape;
        Shape {
            layers: shape.layers,
            query_heads: shape.query_heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            value_dim: shape.head_dim,
            page_rows,
            sinks: shape.sinks,
            window: shape.window,
            dense_layers: shape.dense_layers,
            dtype: shape.dtype,
            fingerprint: self.fingerprint,
        }
    }

    /// The true queries of a step, `[Hq][d]`.
    #[must_use]
    pub fn query(&self, layer: usize, step: usize) -> &[f32] {
        self.of_step(&self.q, layer, step)
    }

    /// The queries of a step as predicted one layer ahead, `[Hq][d]`.
    #[must_use]
    pub fn hint(&self, layer: usize, step: usize) -> &[f32] {
        self.of_step(&self.hint, layer, step)
    }

    fn of_step<'a>(&self, values: &'a [f32], layer: usize, step: usize) -> &'a [f32] {
        let width = self.shape.query_heads * self.shape.head_dim;
        &values[(layer * self.shape.steps + step) * width..][..width]
    }

    /// The true queries of the prompt's last tokens, `[prompt_queries][Hq][d]`.
    #[must_use]
    pub fn prompt_queries(&self, layer: usize) -> &[f32] {
        let width = self.shape.prompt_queries * self.shape.query_heads * self.shape.head_dim;
        &self.prompt_q[layer * width..][..width]
    }

    /// Keys of a KV head, `[n][d]`.
    #[must_use]
    pub fn keys(&self, layer: usize, kv_head: usize) -> &[f32] {
        self.of_head(&self.k, layer, kv_head)
    }

    /// Values of a KV head, `[n][d]`.
    #[must_use]
    pub fn values(&self, layer: usize, kv_head: usize) -> &[f32] {
        self.of_head(&self.v, layer, kv_head)
    }

    fn of_head<'a>(&self, values: &'a [f32], layer: usize, kv_head: usize) -> &'a [f32] {
        let width = self.shape.tokens * self.shape.head_dim;
        &values[(layer * self.shape.kv_heads + kv_head) * width..][..width]
    }

    /// Writes the file form: `k` and `v` as stored by the model ([`TraceShape::dtype`]), everything else f32.
    ///
    /// # Errors
    /// Contents that do not go together, or a file that cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), TraceError> {
        let bytes = self.to_bytes()?;
        std::fs::write(path, bytes).map_err(|error| TraceError::Io { path: path.to_owned(), error })
    }

    /// The file form.
    ///
    /// # Errors
    /// Contents that do not go together.
    pub fn to_bytes(&self) -> Result<Vec<u8>, TraceError> {
        self.check()?;
        let shape = &self.shape;
        let floats = [
            ("q", &self.q, shape.queries(shape.steps), Dtype::F32),
            ("hint", &self.hint, shape.queries(shape.steps), Dtype::F32),
            ("prompt_q", &self.prompt_q, shape.queries(shape.prompt_queries), Dtype::F32),
            ("k", &self.k, shape.rows(), shape.dtype),
            ("v", &self.v, shape.rows(), shape.dtype),
        ];
        let mut parts = Vec::new();
        for (name, values, dims, dtype) in floats {
            let mut bytes = vec![0; values.len() * dtype.bytes()];
            Kernels::best().from_f32(dtype, values, &mut bytes);
            parts.push((name, file_dtype(dtype), dims.to_vec(), bytes));
        }
        parts.push(("marks", FileDtype::U8, vec![self.marks.len()], self.marks.clone()));
        let views = parts
            .iter()
            .filter(|(_, _, _, bytes)| !bytes.is_empty())
            .map(|(name, dtype, dims, bytes)| Ok((*name, TensorView::new(*dtype, dims.clone(), bytes)?)))
            .collect::<Result<Vec<_>, TraceError>>()?;
        let metadata = [
            ("format", FORMAT.to_owned()),
            ("fingerprint", self.fingerprint.to_string()),
            ("model", self.model.clone()),
            ("source", self.source.clone()),
            ("sinks", shape.sinks.to_string()),
            ("window", shape.window.to_string()),
            ("dense_layers", shape.dense_layers.to_string()),
        ];
        let metadata = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Ok(safetensors::serialize(views, Some(metadata))?)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// A file that cannot be read, is no trace, or makes no sense.
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        let bytes = std::fs::read(path).map_err(|error| TraceError::Io { path: path.to_owned(), error })?;
        Self::from_bytes(&bytes)
    }

    /// Reads the file form.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TraceError> {
        let (_, metadata) = SafeTensors::read_metadata(bytes)?;
        let metadata = metadata.metadata().clone().unwrap_or_default();
        if word(&metadata, "format")? != FORMAT {
            return content(format!("its format is `{}`, not `{FORMAT}`", word(&metadata, "format")?));
        }
        let file = SafeTensors::deserialize(bytes)?;
        let (q, _) = floats(&file, "q")?;
        let (k, dtype) = floats(&file, "k")?;
        let [layers, steps, query_heads, head_dim] = q.dims;
        let [_, kv_heads, tokens, _] = k.dims;
        let prompt = match floats(&file, "prompt_q") {
            Ok((prompt, _)) => prompt,
            Err(_) if file.tensor("prompt_q").is_err() => {
                Floats { dims: [layers, 0, query_heads, head_dim], values: Vec::new() }
            }
            Err(error) => return Err(error),
        };
        let (hint, _) = floats(&file, "hint")?;
        let (v, _) = floats(&file, "v")?;
        let shape = TraceShape {
            layers,
            query_heads,
            kv_heads,
            head_dim,
            tokens,
            steps,
            prompt_queries: prompt.dims[1],
            sinks: number(&metadata, "sinks")?,
            window: number(&metadata, "window")?,
            dense_layers: number(&metadata, "dense_layers")?,
            dtype,
        };
        shape.check()?;
        for (name, found, wanted) in [
            ("hint", hint.dims, shape.queries(steps)),
            ("prompt_q", prompt.dims, shape.queries(prompt.dims[1])),
            ("k", k.dims, shape.rows()),
            ("v", v.dims, shape.rows()),
        ] {
            if found != wanted {
                return content(format!("`{name}` is {found:?}, and {wanted:?} goes with `q` and `k`"));
            }
        }
        let marks = match file.tensor("marks") {
            Ok(view) if view.dtype() == FileDtype::U8 => view.data().to_vec(),
            Ok(view) => return content(format!("`marks` holds {:?}, not u8", view.dtype())),
            Err(_) => Vec::new(),
        };
        let trace = Self {
            shape,
            fingerprint: word(&metadata, "fingerprint")?.parse()?,
            model: word(&metadata, "model")?.to_owned(),
            source: word(&metadata, "source")?.to_owned(),
            q: q.values,
            hint: hint.values,
            prompt_q: prompt.values,
            k: k.values,
            v: v.values,
            marks,
        };
        trace.check()?;
        Ok(trace)
    }
}

/// How many values these dimensions hold.
fn values_of(dims: &[usize]) -> Result<usize, TraceError> {
    match dims.iter().try_fold(1_usize, |all, side| all.checked_mul(*side)) {
        Some(values) => Ok(values),
        None => content(format!("{dims:?} is more than memory can hold")),
    }
}

fn word<'a>(metadata: &'a HashMap<String, String>, name: &str) -> Result<&'a str, TraceError> {
    match metadata.get(name) {
        Some(value) => Ok(value),
        None => content(format!("its metadata has no `{name}`")),
    }
}

fn number(metadata: &HashMap<String, String>, name: &str) -> Result<usize, TraceError> {
    let text = word(metadata, name)?;
    text.parse().or_else(|_| content(format!("`{name}` is `{text}`, which is no number")))
}

fn file_dtype(dtype: Dtype) -> FileDtype {
    match dtype {
        Dtype::F32 => FileDtype::F32,
        Dtype::F16 => FileDtype::F16,
        Dtype::Bf16 => FileDtype::BF16,
    }
}

/// A tensor of four dimensions.
struct Floats {
    dims: [usize; 4],
    values: Vec<f32>,
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Result<(Floats, Dtype), TraceError> {
    let view = file.tensor(name).or_else(|_| content(format!("it has no tensor `{name}`")))?;
    let dtype = match view.dtype() {
        FileDtype::F32 => Dtype::F32,
        FileDtype::F16 => Dtype::F16,
        FileDtype::BF16 => Dtype::Bf16,
        other => return content(format!("`{name}` holds {other:?}, not f32, f16 or bf16")),
    };
    let Ok(dims) = <[usize; 4]>::try_from(view.shape()) else {
        return content(format!("`{name}` is {:?}, not of four dimensions", view.shape()));
    };
    let mut values = vec![0.0; values_of(&dims)?];
    if view.data().len() != values.len() * dtype.bytes() {
        return content(format!("`{name}` has {} bytes for {dims:?}", view.data().len()));
    }
    Kernels::best().to_f32(dtype, view.data(), &mut values);
    Ok((Floats { dims, values }, dtype))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::{Generator, Kind};

    fn made() -> Trace {
        Generator { tokens: 96, steps: 4, ..Generator::new(Kind::Sinks, 3) }.trace()
    }

    #[test]
    fn a_trace_reads_back_as_it_was_written() {
        let mut trace = made();
        trace.shape.dtype = Dtype::F32;
        trace.marks = vec![1; 96];
        assert_eq!(Trace::from_bytes(&trace.to_bytes().unwrap()).unwrap(), trace);
        let without = Trace { prompt_q: Vec::new(), marks: Vec::new(), ..trace };
        let without = Trace { shape: TraceShape { prompt_queries: 0, ..without.shape }, ..without };
        assert_eq!(Trace::from_bytes(&without.to_bytes().unwrap()).unwrap(), without);
    }

    #[test]
    fn keys_come_back_as_their_storage_rounds_them() {
        let trace = made();
        assert_eq!(trace.shape.dtype, Dtype::F16);
        let back = Trace::from_bytes(&trace.to_bytes().unwrap()).unwrap();
        assert!(back.k.iter().zip(&trace.k).all(|(a, b)| (a - b).abs() <= 1e-3 * (1.0 + b.abs())));
    }

    #[test]
    fn every_cut_or_changed_byte_of_a_file_is_refused_or_read_as_some_trace() {
        let bytes = made().to_bytes().unwrap();
        for cut in [0, 7, 8, 100, bytes.len() - 1] {
            assert!(Trace::from_bytes(&bytes[..cut]).is_err(), "{cut}");
        }
        for at in 0..600.min(bytes.len()) {
            let mut changed = bytes.clone();
            changed[at] ^= 0x15;
            if let Ok(trace) = Trace::from_bytes(&changed) {
                trace.check().unwrap();
            }
        }
    }

    #[test]
    fn values_that_are_no_numbers_and_sizes_that_do_not_fit_are_named() {
        let mut trace = made();
        trace.q[5] = f32::NAN;
        assert!(trace.check().unwrap_err().to_string().contains("`q` has NaN at 5"));
        let mut trace = made();
        trace.v.pop();
        assert!(trace.check().unwrap_err().to_string().contains("`v`"));
        let mut trace = made();
        trace.marks = vec![0; 5];
        assert!(trace.check().is_err());
        let mut trace = made();
        trace.shape.steps = trace.shape.tokens;
        assert!(trace.check().is_err());
    }
}
