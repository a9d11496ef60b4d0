//! What is timed, over which memory.

use std::cell::Cell;
use std::hint::black_box;

use kvoyant_kernels::{
    AttendScratch, CodeBits, CodeLayout, CodeOut, CodeScan, CodeSums, CodeTaken, CodeTotal, CodeWeighing,
    CodeWeights, Dtype, Kernels, Run, TopKScratch,
};

use crate::{Task, limits};

/// Tokens of the long context.
pub(crate) const TOKENS: usize = 128 << 10;
/// Tokens of a page.
pub(crate) const PAGE: usize = 32;
const PAGES: usize = TOKENS / PAGE;
/// KV heads, and queries of each.
const HEADS: usize = 8;
pub(crate) const GROUP: usize = 4;
pub(crate) const DIM: usize = 128;
/// Pages of one head that are selected, and tokens.
const BUDGET_PAGES: usize = 64;
const BUDGET: usize = BUDGET_PAGES * PAGE;
/// Columns of a partial key: three tenths of a head.
pub(crate) const COLUMNS: usize = 38;
/// Rows that attention goes over in one step.
pub(crate) const ROWS: usize = 4 << 10;

/// Bytes of a step of each task.
pub(crate) const READ_BYTES: usize = 8 << 20;
pub(crate) const F16_BYTES: usize = PAGES * 2 * DIM * 2;
pub(crate) const CODE_BYTES: usize = TOKENS * 16;
pub(crate) const COLUMN_BYTES: usize = TOKENS * COLUMNS * 2;

/// Bytes of the 8-bit digests of one head, and of all.
pub(crate) fn i8_bytes() -> usize {
    PAGES * Kernels::bounds_i8_bytes(DIM)
}

pub(crate) fn selection_bytes() -> usize {
    HEADS * i8_bytes()
}

/// Digests in codes that are measured.
pub(crate) struct Codes {
    bits: CodeBits,
    group: usize,
    pub(crate) dim: usize,
    /// Queries of a head.
    pub(crate) queries: usize,
    /// Tokens of the context.
    pub(crate) tokens: usize,
}

/// All of them: contexts whose digests fit a second-level cache, and some that do not.
pub(crate) fn codes() -> impl Iterator<Item = Codes> {
    [TOKENS / 4, TOKENS].into_iter().flat_map(|tokens| {
        [(CodeBits::Four, 16), (CodeBits::Six, PAGE)].into_iter().flat_map(move |(bits, group)| {
            [(64, 3), (128, 4)].into_iter().map(move |(dim, queries)| Codes {
                bits,
                group,
                dim,
                queries,
                tokens,
            })
        })
    })
}

impl Codes {
    /// For the report.
    pub(crate) fn what(&self) -> String {
        let bits = if self.bits == CodeBits::Four { 4 } else { 6 };
        let (dim, queries, tokens) = (self.dim, self.queries, self.tokens >> 10);
        format!("int{bits} group {}, d={dim} g={queries}, {tokens}K", self.group)
    }

    fn layout(&self) -> CodeLayout {
        CodeLayout::new(self.dim, self.dim, PAGE, self.bits, self.group).expect("a layout")
    }

    fn pages(&self) -> usize {
        self.tokens / PAGE
    }

    /// Bytes that scores are made of: all but spreads and means.
    pub(crate) fn score_bytes(&self) -> usize {
        self.pages() * (self.layout().bytes() - PAGE - 2 * self.dim)
    }

    /// The tasks' names: scores alone, and with all that follows them.
    pub(crate) fn names(&self) -> [String; 2] {
        [format!("scores {}", self.what()), format!("all {}", self.what())]
    }

    /// Scores of all tokens.
    fn scores_task(self, arena: &Arena) -> Task<'_> {
        let (layout, g, n, kernels) = (self.layout(), self.queries, self.tokens, Kernels::best());
        let (parts, queries) = (arena.parts(self.pages() * layout.bytes()), values(g * self.dim));
        let groups = self.pages() * layout.groups();
        let (mut scores, mut margins) = (vec![0.0; g * n], vec![0.0; g * groups]);
        let [name, _] = self.names();
        Task::new(name, move || {
            let (blocks, scores, margins) = (parts.next(), &mut scores, &mut margins);
            let scan = CodeScan { layout: &layout, queries: &queries, group: g, scale: 0.1, blocks };
            let mut out = CodeOut { rows: scores, stride: n, margins, margin_stride: groups };
            kernels.code_scores(&scan, &mut out);
            black_box(&scores);
        })
    }

    /// Weights of all tokens, which of them have the largest shares in the queries' mean, and sums over the others.
    fn all_task(self, arena: &Arena) -> Task<'_> {
        let (layout, g, n, kernels) = (self.layout(), self.queries, self.tokens, Kernels::best());
        let (parts, queries) = (arena.parts(self.pages() * layout.bytes()), values(g * self.dim));
        let groups = self.pages() * layout.groups();
        let (mut weights, mut margins) = (vec![0.0; g * n], vec![0.0; g * groups]);
        let (mut ids, mut threshold) = (Vec::new(), None);
        let (mut sums, mut means) = (vec![CodeSums::default(); g], vec![0.0; g * self.dim]);
        let (mut totals, mut factors) = (vec![CodeTotal::default(); g], vec![0.0; g]);
        let [_, name] = self.names();
        Task::new(name, move || {
            let (blocks, weights, margins) = (parts.next(), &mut weights, &mut margins);
            totals.fill(CodeTotal::default());
            let scan = CodeScan { layout: &layout, queries: &queries, group: g, scale: 0.1, blocks };
            let mut out =
                CodeOut { rows: &mut *weights, stride: n, margins: &mut *margins, margin_stride: groups };
            let mut weighing = CodeWeighing { before: 0, rows: &(0..n), totals: &mut totals };
            kernels.code_weights(&scan, &mut weighing, &mut out);
            for (factor, total) in factors.iter_mut().zip(&totals) {
                *factor = (1.0 / (total.sum * g as f64)) as f32;
            }
            // One of 64, the first time.
            let threshold = *threshold.get_or_insert_with(|| {
                let mut shares = vec![0.0; n];
                kernels.mix_rows(weights, n, &factors, &mut shares);
                shares.sort_by(|a, b| b.total_cmp(a));
                shares[n / 64]
            });
            ids.clear();
            sums.fill(CodeSums::default());
            means.fill(0.0);
            let of = CodeWeights { rows: weights, stride: n, margins, margin_stride: groups };
            let mut taken = CodeTaken { factors: &factors, threshold, first: 0, ids: &mut ids };
            kernels.code_rest_below(&layout, blocks, &of, &mut taken, &mut sums, &mut means);
            black_box(&ids);
            black_box((&sums, &means));
        })
    }
}

/// Memory larger than the caches. It is read as f16, as digests in 8 bits and as codes; what it holds means nothing in any of them but is
/// finite in all.
pub(crate) struct Arena {
    bytes: Vec<u8>,
}

/// Goes through the arena in parts, from the first one again after the last.
struct Parts<'a> {
    arena: &'a [u8],
    bytes: usize,
    next: Cell<usize>,
}

impl<'a> Parts<'a> {
    fn next(&self) -> &'a [u8] {
        let at = self.next.get();
        let at = if at + self.bytes > self.arena.len() { 0 } else { at };
        self.next.set(at + self.bytes);
        &self.arena[at..][..self.bytes]
    }
}

impl Arena {
    pub(crate) fn new(bytes: usize) -> Self {
        assert!(bytes >= 20 << 20, "--mib takes 20 at least");
        // Numbers between 0.1 and 0.4 as f16 and as f32, of any bits below.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut bits = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        let bytes = (0..bytes / 2).flat_map(|_| (0x2e00 | (bits() & 0x0bff) as u16).to_le_bytes()).collect();
        Self { bytes }
    }

    fn parts(&self, bytes: usize) -> Parts<'_> {
        Parts { arena: &self.bytes, bytes, next: Cell::new(0) }
    }
}

/// Reproducible values within ±2, bell-shaped as scores are.
fn values(n: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..n).map(|_| (next() + next() + next() + next()) * 0.5).collect()
}

/// Attention over pages that lie anywhere in their part of the arena.
fn attention<'a>(name: &'static str, arena: &'a Arena, d: usize, group: usize) -> Task<'a> {
    let row_bytes = 4 * d;
    let (parts, pages) = (arena.parts(ROWS * row_bytes), ROWS / PAGE);
    let (queries, mut scratch) = (values(group * d), AttendScratch::default());
    let (mut out, mut lse) = (vec![0.0; group * d], vec![0.0; group]);
    Task::new(name, move || {
        let part = parts.next();
        let place = |i: usize| (i * 101 + 7) % pages * PAGE * row_bytes;
        let runs: Vec<Run> = (0..pages).map(|i| Run::new(part[place(i)..].as_ptr(), PAGE)).collect();
        // SAFETY: the runs lie within the arena.
        unsafe {
            let kernels = Kernels::best();
            kernels.attend(Dtype::F16, &queries, group, d, 0.1, &runs, &mut scratch, &mut out, &mut lse);
        }
        black_box(&out);
    })
}

/// Selection of the best pages of every head by their largest bound in the group.
fn selection(arena: &Arena) -> Task<'_> {
    let (parts, kernels) = (arena.parts(selection_bytes()), Kernels::best());
    let queries = values(HEADS * GROUP * DIM);
    let (mut bounds, mut scratch, mut ids) = (vec![0.0; GROUP * PAGES], TopKScratch::default(), Vec::new());
    Task::new("page selection", move || {
        let digests = parts.next().chunks_exact(i8_bytes());
        for (queries, digests) in queries.chunks_exact(GROUP * DIM).zip(digests) {
            kernels.page_bounds_i8(queries, GROUP, digests, PAGES, &mut bounds, PAGES);
            let (best, others) = bounds.split_at_mut(PAGES);
            for other in others.chunks_exact(PAGES) {
                best.iter_mut()
                    .zip(other)
                    .for_each(|(best, bound)| *best = if *bound > *best { *bound } else { *best });
            }
            kernels.top_k(best, BUDGET_PAGES, &mut scratch, &mut ids);
            black_box(&ids);
        }
    })
}

/// Everything that is measured.
pub(crate) fn all(arena: &Arena) -> Vec<Task<'_>> {
    let kernels = Kernels::best();
    let read = |name, bytes| {
        let parts = arena.parts(bytes);
        Task::new(name, move || limits::read(parts.next()))
    };
    let queries = values(GROUP * DIM);
    let bounds_f16 = {
        let (parts, queries, mut out) = (arena.parts(F16_BYTES), queries.clone(), vec![0.0; GROUP * PAGES]);
        Task::new("bounds f16", move || {
            kernels.page_bounds_many(Dtype::F16, &queries, GROUP, parts.next(), PAGES, &mut out, PAGES);
            black_box(&out);
        })
    };
    let bounds_i8 = {
        let (parts, queries, mut out) = (arena.parts(i8_bytes()), queries.clone(), vec![0.0; GROUP * PAGES]);
        Task::new("bounds int8", move || {
            kernels.page_bounds_i8(&queries, GROUP, parts.next(), PAGES, &mut out, PAGES);
            black_box(&out);
        })
    };
    let codes: Vec<u64> =
        values(2 * GROUP).iter().map(|v| u64::from(v.to_bits()) * 0x9e37_79b9_7f4a_7c15).collect();
    let hamming = {
        let (parts, codes, mut out) = (arena.parts(CODE_BYTES), codes.clone(), vec![0; TOKENS]);
        Task::new("hamming sum", move || {
            kernels.hamming_sum_bytes(&codes, GROUP, parts.next(), &mut out);
            black_box(&out);
        })
    };
    let hamming_each = {
        let (parts, mut out) = (arena.parts(CODE_BYTES), vec![0; GROUP * TOKENS]);
        Task::new("hamming each", move || {
            kernels.hamming_bytes(&codes, GROUP, parts.next(), &mut out, TOKENS);
            black_box(&out);
        })
    };
    let partial = {
        let (parts, queries, mut out) =
            (arena.parts(COLUMN_BYTES), values(GROUP * COLUMNS), vec![0.0; GROUP * TOKENS]);
        Task::new("partial scores", move || {
            for (i, block) in parts.next().chunks_exact(PAGE * COLUMNS * 2).enumerate() {
                kernels.score_columns(Dtype::F16, &queries, GROUP, block, PAGE, &mut out[i * PAGE..], TOKENS);
            }
            black_box(&out);
        })
    };
    let top = {
        let (scores, mut scratch, mut ids) = (values(TOKENS), TopKScratch::default(), Vec::new());
        Task::new("top-k", move || {
            kernels.top_k(black_box(&scores), BUDGET, &mut scratch, &mut ids);
            black_box(&ids);
        })
    };
    let mut all = vec![
        read("read", READ_BYTES),
        Task::new("products", limits::products),
        bounds_f16,
        bounds_i8,
        hamming,
        hamming_each,
        attention("attention 64", arena, 64, 3),
        attention("attention 128", arena, 128, 4),
        partial,
        top,
        selection(arena),
        read("read digests", selection_bytes()),
    ];
    all.extend(self::codes().map(|codes| codes.scores_task(arena)));
    all.extend(self::codes().map(|codes| codes.all_task(arena)));
    all
}
