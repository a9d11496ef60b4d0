//! InfiniGen's offline part: the skew matrices of a model, made once and kept in the cache folder.

use std::convert::Infallible;
use std::io::{self, Write};
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvoyant_engine::{
    Decoder, DecoderOptions, DenseKv, DenseSequence, ForwardError, KvBackend, KvShape, Logits, Model,
    PrefillOptions, TextError,
};
use kvoyant_eval::texts::Filler;
use kvoyant_methods::infinigen::{SkewArtifact, SkewBuilder};
use kvoyant_methods::{MethodError, Shape};

use crate::cache::{self, CacheError};
use crate::progress::Progress;

/// Tokens of the calibration text, as in the paper.
const TOKENS: usize = 2048;

/// The chronicle that is the calibration text; the demo's own seeds are small numbers, so they differ.
const SEED: u64 = 0x6b76_6f79_616e_7421;

/// Why there are no skew matrices.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SkewError {
    /// No cache folder.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The artifact cannot be kept.
    #[error("the calibration cannot be kept in {}: {error}", .path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The model could not read the text.
    #[error("calibration failed: {0}")]
    Forward(#[from] ForwardError<Infallible>),
    /// The tokenizer could not.
    #[error("calibration failed: {0}")]
    Text(#[from] TextError),
    /// The matrices cannot be made.
    #[error(transparent)]
    Method(#[from] MethodError),
}

/// The model's skew matrices: from the cache, or calibrated now and kept there.
///
/// # Errors
/// If they can neither be read nor made.
pub(crate) fn skew(model: &Arc<Model>, shape: &Shape, progress: Progress) -> Result<SkewArtifact, SkewError> {
    let path = cache::folder("skew")?.join(format!("{}.safetensors", shape.fingerprint));
    // A file that is damaged, or of another shape, is made anew: it is only a cache.
    if let Some(found) = std::fs::read(&path).ok().and_then(|bytes| SkewArtifact::from_bytes(&bytes).ok())
        && found.check(shape).is_ok()
    {
        return Ok(found);
    }
    let made = calibrate(model, shape, progress)?;
    write(&path, &made.to_bytes()?).map_err(|error| SkewError::Write { path, error })?;
    Ok(made)
}

/// Writes a file whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

fn calibrate(model: &Arc<Model>, shape: &Shape, progress: Progress) -> Result<SkewArtifact, SkewError> {
    let tokenizer = model.tokenizer();
    let tokens = TOKENS.min(model.config().context_tokens);
    let count = |text: &str| tokenizer.encode(text, false).map_or(usize::MAX / 2, |tokens| tokens.len());
    let text = Filler::new(None, SEED).take(tokens.saturating_sub(1), &count).concat();
    let mut text = tokenizer.encode(&text, true)?;
    text.truncate(tokens);

    let step = progress.step("calibrating (once for each model)", text.len() as u64);
    let mut observer = Observer {
        dense: DenseKv::new(KvShape::new(model.config(), shape.dtype)),
        keys: Vec::new(),
        builder: SkewBuilder::new(shape)?,
    };
    let mut sequence = observer.dense.sequence();
    let mut report = |done: usize, _| {
        step.set(done as u64);
        ControlFlow::Continue(())
    };
    Decoder::new(model.clone(), DecoderOptions::default()).prefill(
        &mut observer,
        &mut sequence,
        &text,
        PrefillOptions { logits: Logits::None, progress: Some(&mut report) },
    )?;
    Ok(observer.builder.finish()?)
}

/// Dense attention that shows every layer's queries and keys to the builder.
#[derive(Debug)]
struct Observer {
    dense: DenseKv,
    /// The chunk's keys of the layer that is under way, `[T][Hkv][d]`.
    keys: Vec<f32>,
    builder: SkewBuilder,
}

impl KvBackend for Observer {
    type Sequence = DenseSequence;
    type Error = Infallible;

    fn tokens(&self, sequence: &DenseSequence) -> usize {
        sequence.tokens()
    }

    fn store(
        &mut self,
        layer: usize,
        sequence: &mut DenseSequence,
        start: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), Infallible> {
        self.keys.clear();
        self.keys.extend_from_slice(k);
        self.dense.store(layer, sequence, start, k, v)
    }

    fn read(
        &mut self,
        layer: usize,
        sequence: &DenseSequence,
        tokens: Range<usize>,
        k: &mut [f32],
        v: &mut [f32],
    ) -> Result<(), Infallible> {
        self.dense.read(layer, sequence, tokens, k, v)
    }

    fn observe_queries(
        &mut self,
        layer: usize,
        _sequence: &mut DenseSequence,
        _start: usize,
        queries: &[f32],
    ) -> Result<(), Infallible> {
        self.builder.observe(layer, queries, &self.keys);
        Ok(())
    }

    fn commit(&mut self, sequence: &mut DenseSequence, tokens: usize) -> Result<(), Infallible> {
        self.dense.commit(sequence, tokens)
    }

    fn append(
        &mut self,
        layer: usize,
        batch: &mut [&mut DenseSequence],
        positions: &[usize],
        k: &[f32],
        v: &[f32],
    ) -> Result<(), Infallible> {
        self.dense.append(layer, batch, positions, k, v)
    }

    fn attend(
        &mut self,
        layer: usize,
        batch: &mut [&mut DenseSequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<(), Infallible> {
        self.dense.attend(layer, batch, positions, queries, out)
    }
}
