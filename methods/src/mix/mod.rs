//! `mix`: methods chosen per layer and per KV head.
//!
//! Every layer and KV head belongs to one part, which answers for it as if it were alone: it gets the appends, the feedback and the
//! requests of its heads, with the digests, state and memory that it asked for. A digest block and a state are as long as the
//! longest part's; a memory has in front of it which part it belongs to.
//!
//! Parts must agree on what is of a whole request: which query comes, which half of a row is moved, whether the CPU attends what
//! is missing, and how attention rows are reported. At most one may drop rows for good. A part that asks for nothing of the kind
//! (say `full` beside any query) agrees with all. What a part would estimate of the rows it left out is not asked for in a mix.

pub mod spec;

mod store;

#[cfg(test)]
mod tests;

use std::ops::Range;

pub use spec::{MixSpec, Part, Place, Span};

use crate::artifact::{Artifacts, fnv};
use crate::context::SelectContext;
use crate::error::MethodError;
use crate::method::{Append, DigestKey, FeedbackRow, Method, Truncated};
use crate::needs::{HintSource, Needs};
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::{Selection, TokenRange};
use crate::shape::Shape;
use crate::spec::MethodSpec;
use crate::store::Store;
use store::PartStore;

/// The method's name.
pub const NAME: &str = "mix";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "other methods, chosen per layer and KV head",
    parse: |options| Ok(Box::new(MixSpec::from_options(options)?)),
};

/// In front of a memory: 1 more than the number of its part, as u32; 0 before the first append.
const OWNER: usize = size_of::<u32>();
/// No sequence has so many tokens.
const TOKENS_MAX: usize = u32::MAX as usize;

/// Lets each layer and KV head be answered for by its part.
#[derive(Debug)]
pub struct Mix {
    spec: MethodSpec,
    parts: Vec<Box<dyn Method>>,
    /// Part of each layer and KV head, `[layers][Hkv]`.
    owners: Vec<usize>,
    kv_heads: usize,
    needs: Needs,
    digest_bytes: usize,
    state_bytes: usize,
}

impl Mix {
    /// For a model of that shape.
    ///
    /// # Errors
    /// [`MethodError::Parts`] where two parts exclude each other, [`MethodError::Unsuitable`] where a layer and KV head belongs to
    /// none or a part has none, and what the parts' own methods refuse.
    pub fn new(mix: MixSpec, shape: &Shape, artifacts: &Artifacts) -> Result<Self, MethodError> {
        let unsuitable = |reason: String| MethodError::Unsuitable { method: NAME, reason };
        const NOBODY: usize = usize::MAX;
        let mut owners = vec![NOBODY; shape.layers * shape.kv_heads];
        // `rest` is the last in order.
        for (at, part) in mix.parts().iter().enumerate() {
            let (layers, heads) = match part.place {
                Place::Rest => (0..shape.layers, 0..shape.kv_heads),
                Place::At { layers, heads } => (layers.within(shape.layers), heads.within(shape.kv_heads)),
            };
            let mut any = false;
            for layer in layers {
                for owner in &mut owners[layer * shape.kv_heads..][heads.clone()] {
                    if *owner == NOBODY {
                        (*owner, any) = (at, true);
                    }
                }
            }
            if !any {
                return Err(unsuitable(format!(
                    "part `{part}` has no layer and KV head of {} and {}: leave it out",
                    shape.layers, shape.kv_heads
                )));
            }
        }
        if let Some(at) = owners.iter().position(|owner| *owner == NOBODY) {
            return Err(unsuitable(format!(
                "no part answers for layer {}, KV head {}: add a part or `rest=(…)`",
                at / shape.kv_heads,
                at % shape.kv_heads
            )));
        }
        let parts = mix
            .parts()
            .iter()
            .map(|part| crate::build(&part.spec, shape, artifacts))
            .collect::<Result<Vec<_>, _>>()?;
        let needs = common_needs(&mix, &parts)?;
        let most =
            |bytes: fn(&dyn Method) -> usize| parts.iter().map(|part| bytes(&**part)).max().unwrap_or(0);
        Ok(Self {
            digest_bytes: most(|part| part.digest_bytes()),
            state_bytes: most(|part| part.head_state_bytes()),
            spec: MethodSpec::new(mix),
            parts,
            owners,
            kv_heads: shape.kv_heads,
            needs,
        })
    }

    fn part(&self, layer: usize, kv_head: usize) -> &dyn Method {
        &*self.parts[self.owners[layer * self.kv_heads + kv_head]]
    }

    /// Runs of KV heads of a layer with one part.
    fn runs(&self, layer: usize, heads: Range<usize>) -> impl Iterator<Item = (&dyn Method, Range<usize>)> {
        let owners = &self.owners[layer * self.kv_heads..][heads.clone()];
        let mut first = heads.start;
        owners.chunk_by(|a, b| a == b).map(move |run| {
            let heads = first..first + run.len();
            first = heads.end;
            (&*self.parts[run[0]], heads)
        })
    }

    /// Where in what a sequence keeps the part's own lies.
    fn place_in_sequence(&self, part: &dyn Method) -> Range<usize> {
        let before = self.parts.iter().take_while(|other| !std::ptr::addr_eq(&***other, part));
        let first = before.map(|part| part.sequence_bytes()).sum();
        first..first + part.sequence_bytes()
    }

    /// The part that a memory belongs to, once it is known.
    fn owner(&self, memory: &[u8]) -> Option<&dyn Method> {
        let number = memory.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        self.parts.get((number as usize).checked_sub(1)?).map(|part| &**part)
    }

    /// Where in a memory of `len` bytes the part's own lies: as long as the part asks for the tokens that it was made for.
    fn place(&self, part: &dyn Method, len: usize) -> Range<usize> {
        if !part.needs().memory || len < OWNER {
            return 0..0;
        }
        // The most tokens that it can be of; more tokens never take less.
        let (mut enough, mut more) = (0, TOKENS_MAX);
        while enough < more {
            let tokens = enough + (more - enough).div_ceil(2);
            if self.memory_bytes(tokens) <= len { enough = tokens } else { more = tokens - 1 }
        }
        OWNER..(OWNER + part.memory_bytes(enough)).min(len)
    }

    /// Lets each run's part write its heads into `out`; true where any of them says so.
    fn ask(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
        call: impl Fn(&dyn Method, &SelectContext<'_>, &mut dyn Store, &mut Scratch, &mut Selection) -> bool,
    ) -> bool {
        out.clear();
        let mut of_part = std::mem::take(&mut scratch.part);
        let mut any = false;
        for (part, heads) in self.runs(context.layer, context.heads.clone()) {
            let count = heads.len();
            let context = SelectContext { heads, ..context.clone() };
            let mut store = PartStore { mix: self, part, inner: &mut *store };
            let chosen = call(part, &context, &mut store, scratch, &mut of_part);
            any |= chosen;
            if chosen {
                out.leave_as(&of_part);
            }
            for head in 0..count {
                if chosen {
                    of_part.head(head).iter().for_each(|range| {
                        out.push(range.first as usize, range.end() as usize);
                    });
                }
                out.finish_head();
            }
        }
        scratch.part = of_part;
        any
    }
}

/// What all parts together want.
fn common_needs(mix: &MixSpec, parts: &[Box<dyn Method>]) -> Result<Needs, MethodError> {
    let mut common = parts[0].needs();
    let all: Vec<Needs> = parts.iter().map(|part| part.needs()).collect();
    for (at, needs) in all.iter().enumerate() {
        for (before, other) in all[..at].iter().enumerate() {
            let differ =
                needs.hint != HintSource::None && other.hint != HintSource::None && needs.hint != other.hint;
            let reports = needs.feedback.is_some() && other.feedback.is_some();
            let reason = if differ {
                "they select by different queries"
            } else if needs.part != other.part {
                "they move different halves of a row"
            } else if needs.cpu_attention != other.cpu_attention {
                "they attend missing rows in different ways"
            } else if reports && needs.feedback != other.feedback {
                "they want different attention rows"
            } else if needs.digest && other.digest && needs.sealed_rows != other.sealed_rows {
                "one digests whole pages, the other rows as they come"
            } else if needs.drops_rows && other.drops_rows {
                "both drop rows for good"
            } else {
                continue;
            };
            let [first, second] = [before, at].map(|at| mix.parts()[at].to_string());
            return Err(MethodError::Parts { first, second, reason });
        }
        if common.hint == HintSource::None {
            common.hint = needs.hint;
        }
        common.observe |= needs.observe;
        common.artifact = common.artifact.or(needs.artifact);
        common.digest |= needs.digest;
        common.memory |= needs.memory;
        common.drops_rows |= needs.drops_rows;
        common.rows |= needs.rows;
        common.values |= needs.values;
        common.sealed_rows = common.sealed_rows.max(needs.sealed_rows);
        common.floors |= needs.floors;
        common.attend_resident |= needs.attend_resident;
        common.feedback = common.feedback.or(needs.feedback);
        common.marks |= needs.marks;
        common.prefetch |= needs.prefetch;
        common.heads_together |= needs.heads_together;
        common.leaves_late |= needs.leaves_late;
        common.sees_resident |= needs.sees_resident;
    }
    // A memory's owner is written by the first append, which comes to those with digests.
    common.digest |= common.memory;
    common.rest = false;
    Ok(common)
}

impl Method for Mix {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        self.needs
    }

    fn digest_key(&self) -> Option<DigestKey> {
        let keys: Vec<Option<DigestKey>> = self.parts.iter().map(|part| part.digest_key()).collect();
        if keys.iter().all(Option::is_none) {
            return None;
        }
        // Every layer and KV head with the key of its part, in 128 bits.
        let bytes = |key: &Option<DigestKey>| -> Vec<u8> {
            let words = |key: &DigestKey| key.parameters.map(u64::to_le_bytes).concat();
            key.as_ref().map_or(vec![0], |key| [key.method.as_bytes(), &words(key)].concat())
        };
        let keys: Vec<Vec<u8>> = keys.iter().map(bytes).collect();
        let all = || self.owners.iter().flat_map(|owner| keys[*owner].iter().copied());
        let parameters = [
            fnv(all()),
            fnv(std::iter::once(1).chain(all())),
            self.digest_bytes as u64,
            self.state_bytes as u64,
        ];
        Some(DigestKey { method: NAME, parameters })
    }

    fn digest_bytes(&self) -> usize {
        self.digest_bytes
    }

    fn head_state_bytes(&self) -> usize {
        self.state_bytes
    }

    fn init_state(&self, layer: usize, kv_head: usize, state: &mut [u8]) {
        let part = self.part(layer, kv_head);
        part.init_state(layer, kv_head, &mut state[..part.head_state_bytes()]);
    }

    fn observe(&self, layer: usize, kv_head: usize, column_sums: &[f32], state: &mut [u8]) -> bool {
        let part = self.part(layer, kv_head);
        part.needs().observe
            && part.observe(layer, kv_head, column_sums, &mut state[..part.head_state_bytes()])
    }

    fn on_append(&self, append: &Append<'_>, digest: &mut [u8], memory: &mut [u8], scratch: &mut Scratch) {
        let owner = self.owners[append.layer * self.kv_heads + append.kv_head];
        let part = &*self.parts[owner];
        if let Some(number) = memory.first_chunk_mut() {
            *number = (owner as u32 + 1).to_le_bytes();
        }
        if !part.needs().digest {
            return;
        }
        let place = self.place(part, memory.len());
        let append = Append { state: &append.state[..part.head_state_bytes()], ..*append };
        part.on_append(&append, &mut digest[..part.digest_bytes()], &mut memory[place], scratch);
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        self.ask(context, store, scratch, out, |part, context, store, scratch, out| {
            part.select(context, store, scratch, out);
            true
        });
    }

    fn steer(&self, context: &SelectContext<'_>, selected: &Selection, store: &mut dyn Store) {
        let mut of_part = Selection::new();
        for (part, heads) in self.runs(context.layer, context.heads.clone()) {
            of_part.clear();
            for head in heads.clone() {
                for range in selected.head(head - context.heads.start) {
                    of_part.push(range.first as usize, range.end() as usize);
                }
                of_part.leave(selected.left_out(head - context.heads.start));
                of_part.finish_head();
            }
            let context = SelectContext { heads, ..context.clone() };
            part.steer(&context, &of_part, &mut PartStore { mix: self, part, inner: &mut *store });
        }
    }

    fn prefetch(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) -> bool {
        self.ask(context, store, scratch, out, |part, context, store, scratch, out| {
            part.needs().prefetch && part.prefetch(context, store, scratch, out)
        })
    }

    /// The parts' own, one behind the other.
    fn sequence_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.sequence_bytes()).sum()
    }

    fn note_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.note_bytes()).max().unwrap_or(0)
    }

    fn memory_bytes(&self, max_tokens: usize) -> usize {
        if self.needs.memory {
            OWNER + self.parts.iter().map(|part| part.memory_bytes(max_tokens)).max().unwrap_or(0)
        } else {
            0
        }
    }

    fn grow_memory(&self, old: &[u8], new: &mut [u8]) {
        if let Some(part) = self.owner(old) {
            let (from, to) = (self.place(part, old.len()), self.place(part, new.len()));
            new[..OWNER].copy_from_slice(&old[..OWNER]);
            part.grow_memory(&old[from], &mut new[to]);
        }
    }

    fn on_feedback(&self, feedback: &FeedbackRow<'_>, memory: &mut [u8]) {
        let part = self.part(feedback.layer, feedback.kv_head);
        if part.needs().feedback.is_some() {
            let place = self.place(part, memory.len());
            part.on_feedback(feedback, &mut memory[place]);
        }
    }

    fn on_admit(&self, tokens: usize, memory: &mut [u8], victim: &mut dyn FnMut(u32)) {
        if let Some(part) = self.owner(memory).filter(|part| part.needs().drops_rows) {
            let place = self.place(part, memory.len());
            part.on_admit(tokens, &mut memory[place], victim);
        }
    }

    fn on_selected(&self, selected: &[TokenRange], memory: &mut [u8]) {
        if let Some(part) = self.owner(memory).filter(|part| part.needs().drops_rows) {
            let place = self.place(part, memory.len());
            part.on_selected(selected, &mut memory[place]);
        }
    }

    fn on_truncate(&self, tokens: usize, memory: &mut [u8]) -> Truncated {
        match self.owner(memory) {
            Some(part) => {
                let place = self.place(part, memory.len());
                part.on_truncate(tokens, &mut memory[place])
            }
            None => Truncated::Kept,
        }
    }
}
