//! What a backend is told, when, and in which shape.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use crate::common::{exact_kv, some_tokens, worst};
use kvoyant_engine::calibrate::{calibrate, hint_errors};
use kvoyant_engine::synthetic::tiny;
use kvoyant_engine::*;
use kvoyant_methods::hint::HintArtifact;
use kvoyant_methods::{Artifact, ArtifactKind, Fingerprint, MethodError, Shape};

/// A call and its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Store(usize),
    Observe(usize),
    Read(usize),
    BeginStep,
    Hint(usize),
    Append(usize),
    Attend(usize),
    Commit,
    EndStep,
}

/// A dense backend that writes down what it is called with.
struct Recorder {
    inner: DenseKv,
    calls: Vec<Call>,
    hints: Vec<Vec<f32>>,
    queries: Vec<Vec<f32>>,
    observed: Vec<Vec<f32>>,
}

impl KvBackend for Recorder {
    type Sequence = DenseSequence;
    type Error = Infallible;

    fn shape(&self) -> &KvShape {
        self.inner.shape()
    }

    fn tokens(&self, sequence: &DenseSequence) -> usize {
        self.inner.tokens(sequence)
    }

    fn store(
        &mut self,
        layer: usize,
        sequence: &mut DenseSequence,
        start: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), Infallible> {
        self.calls.push(Call::Store(layer));
        self.inner.store(layer, sequence, start, k, v)
    }

    fn read(
        &mut self,
        layer: usize,
        sequence: &DenseSequence,
        tokens: Range<usize>,
        k: &mut [f32],
        v: &mut [f32],
    ) -> Result<(), Infallible> {
        self.calls.push(Call::Read(layer));
        self.inner.read(layer, sequence, tokens, k, v)
    }

    fn observe_queries(
        &mut self,
        layer: usize,
        _: &mut DenseSequence,
        _: usize,
        queries: &[f32],
    ) -> Result<(), Infallible> {
        self.calls.push(Call::Observe(layer));
        self.observed.push(queries.to_vec());
        Ok(())
    }

    fn commit(&mut self, sequence: &mut DenseSequence, tokens: usize) -> Result<(), Infallible> {
        self.calls.push(Call::Commit);
        self.inner.commit(sequence, tokens)
    }

    fn begin_step(&mut self, _: &mut [&mut DenseSequence], positions: &[usize]) -> Result<(), Infallible> {
        assert_eq!(positions, [12, 30]);
        self.calls.push(Call::BeginStep);
        Ok(())
    }

    fn wants_hint(&self, layer: usize) -> bool {
        layer >= 2
    }

    fn hint(
        &mut self,
        layer: usize,
        _: &mut [&mut DenseSequence],
        _: &[usize],
        queries: &[f32],
    ) -> Result<(), Infallible> {
        self.calls.push(Call::Hint(layer));
        self.hints.push(queries.to_vec());
        Ok(())
    }

    fn append(
        &mut self,
        layer: usize,
        batch: &mut [&mut DenseSequence],
        positions: &[usize],
        k: &[f32],
        v: &[f32],
    ) -> Result<(), Infallible> {
        self.calls.push(Call::Append(layer));
        self.inner.append(layer, batch, positions, k, v)
    }

    fn attend(
        &mut self,
        layer: usize,
        batch: &mut [&mut DenseSequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<(), Infallible> {
        self.calls.push(Call::Attend(layer));
        self.queries.push(queries.to_vec());
        self.inner.attend(layer, batch, positions, queries, out)
    }

    fn end_step(&mut self, _: &mut [&mut DenseSequence]) -> Result<(), Infallible> {
        self.calls.push(Call::EndStep);
        Ok(())
    }
}

/// One step of two sequences with the calls it made.
fn step_with(norm: HintNorm) -> Recorder {
    let model = tiny(1);
    let mut decoder =
        Decoder::new(model.clone(), DecoderOptions { hint_norm: norm, ..DecoderOptions::default() });
    let mut backend = Recorder {
        inner: exact_kv(&model),
        calls: Vec::new(),
        hints: Vec::new(),
        queries: Vec::new(),
        observed: Vec::new(),
    };
    let (mut a, mut b) = (backend.inner.sequence(), backend.inner.sequence());
    decoder.prefill(&mut backend, &mut a, &some_tokens(12, 1), PrefillOptions::default()).unwrap();
    decoder.prefill(&mut backend, &mut b, &some_tokens(30, 2), PrefillOptions::default()).unwrap();
    assert_eq!(backend.observed.len(), 2 * model.config().layers);
    assert_eq!(backend.observed[0].len(), 12 * model.config().query_width());
    let prefill = [Call::Store(0), Call::Observe(0), Call::Read(0), Call::Store(1)];
    assert_eq!(backend.calls[..4], prefill);
    backend.calls.clear();
    decoder.step(&mut backend, &mut [&mut a, &mut b], &[5, 6]).unwrap();
    backend
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn a_hint_goes_out_before_the_layer_ahead_of_its_own_begins() {
    use Call::{Append, Attend, BeginStep, Commit, EndStep, Hint};
    let recorder = step_with(HintNorm::Own);
    let expected = [
        BeginStep,
        Append(0),
        Attend(0),
        Hint(2),
        Append(1),
        Attend(1),
        Hint(3),
        Append(2),
        Attend(2),
        Append(3),
        Attend(3),
        Commit,
        Commit,
        EndStep,
    ];
    assert_eq!(recorder.calls, expected);
}

#[test]
fn a_hint_is_the_query_that_the_layer_would_have_without_the_one_before_it() {
    let (own, previous) = (step_with(HintNorm::Own), step_with(HintNorm::Previous));
    let width = tiny(1).config().query_width();
    for (i, hint) in own.hints.iter().enumerate() {
        let truth = &own.queries[i + 2];
        assert_eq!(hint.len(), 2 * width);
        // On random weights a layer changes much; but the hint is no stranger to the query.
        assert!(cosine(hint, truth) > 0.3, "{}", cosine(hint, truth));
        assert!(worst(hint, &previous.hints[i]) > 1e-3, "the norms differ, so do the hints");
    }
}

fn shape(model: &Model) -> Shape {
    DaemonOptions::default().shape(&KvShape::new(model.config(), Dtype::F32), 32)
}

/// What a model learns of its hints from 2,000 tokens.
fn corrections(model: &Arc<Model>) -> Arc<HintArtifact> {
    let text = some_tokens(2000, 3);
    let mut said = Vec::new();
    let mut report = |what: &'static str, done: usize, all: usize| said.push((what, done, all));
    let made = calibrate(model, ArtifactKind::Hint, &shape(model), &text, &mut report).unwrap();
    assert!(said.contains(&("reading the text", 2000, 2000)));
    let solved = model.config().layers - 1;
    assert_eq!(said.last(), Some(&("solving for corrections", solved, solved)));
    match made {
        Artifact::Hint(hint) => hint,
        other => panic!("{}", other.kind()),
    }
}

#[test]
fn a_learned_hint_is_nearer_to_the_query_on_a_text_that_it_was_not_learnt_from() {
    let model = tiny(1);
    let hint = corrections(&model);
    let learned = Arc::new(LearnedHints::new(&model, &shape(&model), &hint).unwrap());
    let kinds = [HintNorm::Own, HintNorm::Previous, HintNorm::Learned(learned.clone())];
    let errors = hint_errors(&model, &kinds, &some_tokens(500, 4), &mut |_, _, _| {}).unwrap();
    assert_eq!(errors.len(), model.config().layers - 1);
    for error in errors {
        let [own, previous, learned] = error.relative[..] else { panic!("three kinds") };
        // On random weights little of what a layer adds is linear.
        assert!(learned < 0.95 * own, "layer {}: {learned} {own}", error.layer);
        assert!(previous > 0.0 && learned > 0.0, "layer {}", error.layer);
    }

    let (own, steps) = (step_with(HintNorm::Own), step_with(HintNorm::Learned(learned)));
    let width = model.config().query_width();
    let mut nearer = 0;
    for (i, truth) in own.queries[2..].iter().enumerate() {
        for row in 0..2 {
            let of = |values: &[f32]| values[row * width..(row + 1) * width].to_vec();
            let truth = of(truth);
            nearer += usize::from(cosine(&of(&steps.hints[i]), &truth) > cosine(&of(&own.hints[i]), &truth));
        }
    }
    // What goes out in a decode step is what was learnt: queries after RoPE, of the layer ahead.
    assert!(nearer >= 3, "{nearer} of 4");
    assert_eq!(steps.queries, own.queries, "hints change no answer of a dense backend");
}

#[test]
fn the_same_text_teaches_the_same_and_corrections_of_nothing_leave_the_hint_as_it_is() {
    let model = tiny(1);
    assert_eq!(corrections(&model), corrections(&model));
    let (shape, config) = (shape(&model), model.config());
    let nothing = vec![0.0; config.query_width() * config.hidden_size];
    let nothing = std::iter::repeat_n(nothing.as_slice(), config.layers - 1);
    let nothing = HintArtifact::new(&shape, config.hidden_size, nothing).unwrap();
    let learned = Arc::new(LearnedHints::new(&model, &shape, &nothing).unwrap());
    assert_eq!(step_with(HintNorm::Learned(learned)).hints, step_with(HintNorm::Own).hints);
}

#[test]
fn corrections_of_another_model_or_width_are_refused() {
    let model = tiny(1);
    let hint = corrections(&model);
    let other = Shape { fingerprint: Fingerprint([1; 16]), ..shape(&model) };
    let error = LearnedHints::new(&model, &other, &hint).unwrap_err();
    assert!(matches!(error, MethodError::ArtifactFingerprint { .. }), "{error}");
    let config = model.config();
    let narrow = vec![0.0; config.query_width() * (config.hidden_size - 1)];
    let narrow = std::iter::repeat_n(narrow.as_slice(), config.layers - 1);
    let narrow = HintArtifact::new(&shape(&model), config.hidden_size - 1, narrow).unwrap();
    let error = LearnedHints::new(&model, &shape(&model), &narrow).unwrap_err();
    assert!(matches!(error, MethodError::ArtifactShape { .. }), "{error}");
}
