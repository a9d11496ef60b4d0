//! What a request has to be. A daemon takes one that cannot be for an attack, and ends the session: so a caller's mistake is found here, before
//! anything is told, and nothing has happened.

use kvoyant_kernels::Dtype;
use kvoyant_kernels::quantise::Format;
use kvoyant_methods::{Artifact, Artifacts, Fingerprint, HintSource, MethodSpec, Needs, Shape, mark};
use kvoyant_protocol::control::ModelSpec;
use kvoyant_protocol::wire::{FEEDBACK_MAX, SCORES_MAX, WORK_MAX, work_of};

use crate::error::Error;
use crate::model::{Hint, Member};

/// What the registered methods need, by index.
#[derive(Debug)]
pub(crate) struct Usage {
    needs: Vec<Option<Needs>>,
    dense_layers: usize,
    sliding: Vec<u32>,
    layers: usize,
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Rows at both ends that are in no selection.
    anyway: usize,
}

impl Usage {
    /// Of a registration. Of a method that this library cannot build (a daemon of a later version knows more) nothing is known, and the daemon
    /// alone says what is wrong.
    pub(crate) fn of(spec: &ModelSpec, format: Format, page_rows: usize, artifacts: &[Vec<u8>]) -> Self {
        let needs = match shape(spec, format, page_rows) {
            Some(shape) => {
                let mut known = Artifacts::none();
                artifacts
                    .iter()
                    .filter_map(|bytes| Artifact::from_bytes(bytes).ok())
                    .for_each(|it| known.insert(it));
                let needs = |text: &String| {
                    let method: MethodSpec = text.parse().ok()?;
                    Some(kvoyant_methods::build(&method, &shape, &known).ok()?.needs())
                };
                spec.methods.iter().map(needs).collect()
            }
            None => vec![None; spec.methods.len()],
        };
        Self {
            needs,
            dense_layers: spec.dense_layers as usize,
            sliding: spec.sliding_layers.clone(),
            layers: spec.layers as usize,
            query_heads: spec.query_heads as usize,
            kv_heads: spec.kv_heads as usize,
            head_dim: spec.head_dim as usize,
            anyway: spec.sinks as usize + spec.window as usize,
        }
    }

    /// What a method needs.
    pub(crate) fn needs(&self, method: usize) -> Option<&Needs> {
        self.needs.get(method)?.as_ref()
    }

    /// Whether rows of a layer are selected.
    pub(crate) fn selected(&self, layer: usize) -> Result<(), Error> {
        let sliding = u32::try_from(layer).is_ok_and(|layer| self.sliding.contains(&layer));
        if layer < self.layers && (layer < self.dense_layers || sliding) {
            return Err(Error::NotSelected { layer });
        }
        Ok(())
    }

    /// Whether members have what their methods select by: a query of the step, if `true_query` is wanted whatever they select by.
    pub(crate) fn hints(&self, members: &[Member<'_>], true_query: bool) -> Result<(), Error> {
        for (at, Member { sequence, hint, .. }) in members.iter().enumerate() {
            let Some(needs) = sequence.method().and_then(|method| self.needs(method)) else { continue };
            let wanted = match needs.hint {
                _ if true_query => "a query",
                HintSource::None => continue,
                HintSource::Ids => "the rows that it names",
                HintSource::Ahead | HintSource::Previous | HintSource::Current => "a query",
            };
            let fits = match hint {
                Hint::None => false,
                Hint::Query(_) | Hint::Beside { .. } => wanted == "a query",
                Hint::Ids(words) => {
                    if wanted == "a query" {
                        false
                    } else {
                        self.named(words)?;
                        true
                    }
                }
            };
            if !fits {
                return Err(Error::Hint { member: at, method: sequence.method().unwrap_or(0), wanted });
            }
        }
        Ok(())
    }

    /// Whether these are a count and so many tokens for each KV head.
    fn named(&self, words: &[u32]) -> Result<(), Error> {
        let mut left = words;
        for _ in 0..self.kv_heads {
            let counted = left.split_first().and_then(|(count, rest)| rest.split_at_checked(*count as usize));
            let Some((_, rest)) = counted else {
                let (found, wanted) = (words.len(), self.kv_heads);
                return Err(Error::Size {
                    what: "named rows (a count and so many tokens for each KV head)",
                    found,
                    wanted,
                });
            };
            left = rest;
        }
        Ok(())
    }

    /// Whether one request is no more than a lane does at once.
    pub(crate) fn work(
        &self,
        members: &[(Option<usize>, usize)],
        queries: usize,
        true_query: bool,
    ) -> Result<(), Error> {
        let group = self.query_heads / self.kv_heads.max(1);
        let mut work = 0_usize;
        for (method, position) in members {
            let tokens = position.saturating_add(1);
            let needs = method.and_then(|method| self.needs(method));
            let by_query = true_query || needs.is_some_and(|needs| needs.hint.is_query());
            let scores = queries.saturating_mul(group).saturating_mul(tokens.saturating_sub(self.anyway));
            if by_query && scores > SCORES_MAX {
                return Err(Error::Size {
                    what: "a block (scores of its queries)",
                    found: scores,
                    wanted: SCORES_MAX,
                });
            }
            work = work.saturating_add(work_of(tokens, queries, self.query_heads, self.head_dim));
        }
        if work > WORK_MAX {
            return Err(Error::Size {
                what: "a batch (products of keys and queries)",
                found: work,
                wanted: WORK_MAX,
            });
        }
        Ok(())
    }

    /// Whether a sequence's method learns from such rows of attention.
    pub(crate) fn feedback(
        &self,
        method: Option<usize>,
        tokens: usize,
        room: usize,
        rows: &[f32],
    ) -> Result<(), Error> {
        if tokens == 0 || tokens > room {
            return Err(Error::NoRoom { position: tokens, room });
        }
        if let Some((method, needs)) = method.and_then(|method| Some((method, self.needs(method)?))) {
            let Some(feedback) = needs.feedback else { return Err(Error::NoFeedback { method }) };
            let wanted = self.kv_heads * tokens.div_ceil(feedback.block.max(1));
            if rows.len() != wanted {
                return Err(Error::Size { what: "feedback (weights of blocks)", found: rows.len(), wanted });
            }
        }
        if rows.len() > FEEDBACK_MAX {
            return Err(Error::Size { what: "feedback (weights)", found: rows.len(), wanted: FEEDBACK_MAX });
        }
        match rows.iter().find(|weight| !(0.0..=1.0).contains(*weight)) {
            Some(weight) => Err(Error::Weight { weight: *weight }),
            None => Ok(()),
        }
    }

    /// Whether marks are of tokens to come, and marks that there are.
    pub(crate) fn marks(first: usize, tokens: usize, marks: &[u8]) -> Result<(), Error> {
        if first < tokens {
            return Err(Error::Size { what: "the first token that is marked", found: first, wanted: tokens });
        }
        match marks.iter().find(|value| **value > mark::LINE) {
            Some(value) => Err(Error::Size {
                what: "a mark",
                found: usize::from(*value),
                wanted: usize::from(mark::LINE),
            }),
            None => Ok(()),
        }
    }
}

/// What methods are built for.
fn shape(spec: &ModelSpec, format: Format, page_rows: usize) -> Option<Shape> {
    let d = spec.head_dim as usize;
    Some(Shape {
        layers: spec.layers as usize,
        query_heads: spec.query_heads as usize,
        kv_heads: spec.kv_heads as usize,
        head_dim: d,
        value_dim: if spec.latent_values > 0 { spec.latent_values as usize } else { d },
        page_rows,
        sinks: spec.sinks as usize,
        window: spec.window as usize,
        dense_layers: spec.dense_layers as usize,
        dtype: match format {
            Format::Plain(dtype) => dtype,
            // What they are read as.
            _ => Dtype::F32,
        },
        fingerprint: spec.fingerprint.parse::<Fingerprint>().ok()?,
    })
}
