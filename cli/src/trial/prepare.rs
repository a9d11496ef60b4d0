//! Reading everything once: contexts, the questions behind them, and the texts to continue.

use std::ops::ControlFlow;

use kvoyant_engine::{
    DaemonError, DaemonKv, DaemonSequence, Decoder, DenseKv, DenseSequence, ForwardError, KvBackend, KvShape,
    Logits, PrefillOptions,
};

use super::plan::Plan;
use crate::progress::Progress;

/// A place for KV whose sequences can be forked.
///
/// What a fork shares with its parent stays when the parent is closed.
pub(crate) trait Forks: KvBackend {
    /// An empty sequence.
    fn open(&mut self) -> Result<Self::Sequence, Self::Error>;

    /// A second sequence with the same tokens, sharing their rows.
    fn fork(&mut self, sequence: &mut Self::Sequence) -> Result<Self::Sequence, Self::Error>;
}

impl Forks for DaemonKv {
    fn open(&mut self) -> Result<DaemonSequence, DaemonError> {
        // Reading is dense whatever the method; forks choose their own, but where a session has one method alone.
        self.sequence(0)
    }

    fn fork(&mut self, sequence: &mut DaemonSequence) -> Result<DaemonSequence, DaemonError> {
        Self::fork(self, sequence, None)
    }
}

impl Forks for DenseKv {
    fn open(&mut self) -> Result<DenseSequence, Self::Error> {
        Ok(self.sequence())
    }

    fn fork(&mut self, sequence: &mut DenseSequence) -> Result<DenseSequence, Self::Error> {
        Ok(Self::fork(self, sequence))
    }
}

/// Sequences that have been read and are forked for every row.
#[derive(Debug)]
pub(crate) struct Prepared<S> {
    /// The contexts; question `i` is a fork of context `contexts_of[i]`.
    pub(crate) contexts: Vec<S>,
    /// Which context a question belongs to.
    pub(crate) contexts_of: Vec<usize>,
    /// One for each question, all but its last token read.
    pub(crate) questions: Vec<S>,
    /// Where texts are continued from.
    pub(crate) texts: Vec<S>,
}

impl Prepared<DaemonSequence> {
    /// Forks of what rows fork, for the rows of one kind of method: what it keeps of them goes with them.
    ///
    /// # Errors
    /// The daemon's own.
    pub(crate) fn forked(&mut self, kv: &mut DaemonKv) -> Result<Self, DaemonError> {
        let mut forks = |of: &mut Vec<DaemonSequence>| {
            of.iter_mut().map(|sequence| Forks::fork(kv, sequence)).collect::<Result<Vec<_>, _>>()
        };
        let (questions, texts) = (forks(&mut self.questions)?, forks(&mut self.texts)?);
        Ok(Self { contexts: Vec::new(), contexts_of: self.contexts_of.clone(), questions, texts })
    }

    /// Closes them all.
    ///
    /// # Errors
    /// The daemon's own.
    pub(crate) fn close(self, kv: &DaemonKv) -> Result<(), DaemonError> {
        kv.close([self.contexts, self.questions, self.texts].into_iter().flatten().collect())
    }
}

/// Reads all that the plan asks, densely.
///
/// # Errors
/// As [`Decoder::prefill`].
pub(crate) fn read<B: Forks>(
    decoder: &mut Decoder,
    backend: &mut B,
    plan: &Plan,
    progress: Progress,
) -> Result<Prepared<B::Sequence>, ForwardError<B::Error>> {
    let step = progress.step(
        format!("reading {} texts", plan.contexts.len() + plan.continued.len()),
        plan.prefill_tokens() as u64,
    );
    let mut fill = |backend: &mut B, sequence: &mut B::Sequence, tokens: &[u32]| {
        let mut before = 0;
        let mut report = |done: usize, _| {
            step.advance((done - before) as u64);
            before = done;
            ControlFlow::Continue(())
        };
        let options =
            PrefillOptions { logits: Logits::None, progress: Some(&mut report), ..PrefillOptions::default() };
        decoder.prefill(backend, sequence, tokens, options).map(drop)
    };
    let mut all =
        Prepared { contexts: Vec::new(), contexts_of: Vec::new(), questions: Vec::new(), texts: Vec::new() };
    for (at, context) in plan.contexts.iter().enumerate() {
        let mut sequence = backend.open()?;
        fill(backend, &mut sequence, &context.tokens)?;
        for (_, tokens) in &context.questions {
            let mut asked = backend.fork(&mut sequence)?;
            // The last token is every row's own first step.
            fill(backend, &mut asked, &tokens[..tokens.len() - 1])?;
            all.questions.push(asked);
            all.contexts_of.push(at);
        }
        all.contexts.push(sequence);
    }
    for text in &plan.continued {
        let mut sequence = backend.open()?;
        let mut read = 0;
        for &start in &text.starts {
            if start > read {
                fill(backend, &mut sequence, &text.tokens[read..start])?;
            }
            read = start;
            all.texts.push(backend.fork(&mut sequence)?);
        }
    }
    Ok(all)
}

/// The same sequences in this process's own memory, for the dense row: rows copied, nothing computed again.
///
/// # Errors
/// The backend's own, in giving its rows back.
pub(crate) fn copy<B: KvBackend>(
    backend: &mut B,
    prepared: &Prepared<B::Sequence>,
    shape: &KvShape,
) -> Result<(DenseKv, Prepared<DenseSequence>), B::Error> {
    let mut dense = DenseKv::new(shape.clone());
    let mut whole = |dense: &mut DenseKv, from: &B::Sequence| {
        let mut to = dense.sequence();
        copy_rows(backend, from, dense, &mut to, shape).map(|()| to)
    };
    let mut contexts =
        prepared.contexts.iter().map(|from| whole(&mut dense, from)).collect::<Result<Vec<_>, _>>()?;
    let texts = prepared.texts.iter().map(|from| whole(&mut dense, from)).collect::<Result<Vec<_>, _>>()?;
    let mut questions = Vec::new();
    for (from, &context) in prepared.questions.iter().zip(&prepared.contexts_of) {
        let mut to = Forks::fork(&mut dense, &mut contexts[context]).unwrap_or_else(|never| match never {});
        copy_rows(backend, from, &mut dense, &mut to, shape)?;
        questions.push(to);
    }
    let contexts_of = prepared.contexts_of.clone();
    Ok((dense, Prepared { contexts, contexts_of, questions, texts }))
}

/// Copies the rows that `to` lacks.
///
/// # Errors
/// The backend's own, in giving its rows back.
pub(crate) fn copy_rows<B: KvBackend>(
    backend: &mut B,
    from: &B::Sequence,
    dense: &mut DenseKv,
    to: &mut DenseSequence,
    shape: &KvShape,
) -> Result<(), B::Error> {
    let (start, end) = (to.tokens(), backend.tokens(from));
    let (n, heads, d) = (end - start, shape.kv_heads, shape.head_dim);
    let mut given = [vec![0.0; n * heads * d], vec![0.0; n * heads * d]];
    let mut wanted = given.clone();
    for layer in 0..shape.layers {
        let [k, v] = &mut given;
        backend.read(layer, from, start..end, k, v)?;
        for (given, wanted) in given.iter().zip(&mut wanted) {
            // [Hkv][n][d] to [n][Hkv][d].
            for (at, row) in given.chunks_exact(d).enumerate() {
                let (head, token) = (at / n, at % n);
                wanted[(token * heads + head) * d..][..d].copy_from_slice(row);
            }
        }
        let never = dense.store(layer, to, start, &wanted[0], &wanted[1]);
        never.unwrap_or_else(|never| match never {});
    }
    dense.commit(to, end).unwrap_or_else(|never| match never {});
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trial::plan::Size;
    use kvoyant_engine::{DecoderOptions, Dtype, synthetic};

    #[test]
    fn a_copy_has_the_rows_of_its_original_and_goes_on_like_it() {
        let model = synthetic::tiny(1);
        let shape = KvShape::new(model.config(), Dtype::F16);
        let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
        let mut backend = DenseKv::new(shape.clone());
        let plan = Plan::new(&model, &Size::demo(512), None, 3).unwrap();
        let mut prepared = read(&mut decoder, &mut backend, &plan, Progress::quiet()).unwrap();
        let (mut dense, mut copied) = copy(&mut backend, &prepared, &shape).unwrap();
        assert_eq!(copied.questions.len(), prepared.questions.len());
        let last = *plan.contexts[0].questions[0].1.last().unwrap();
        let one = decoder.step(&mut backend, &mut [&mut prepared.questions[0]], &[last]).unwrap();
        let two = decoder.step(&mut dense, &mut [&mut copied.questions[0]], &[last]).unwrap();
        assert_eq!(one.logits, two.logits);
    }
}
