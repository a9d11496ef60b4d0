//! Digests in codes: scores, margins, and what is left out.

use kvoyant_kernels::cuda::params::{CodeRestParams, CodeScoresParams, CodeShape};
use kvoyant_kernels::{CodeBits, CodeLayout, CodeOut, CodeScan, CodeSums, CodeWeights, Kernels};

use super::{Device, Numbers, assert_close};

const HEADS: usize = 3;
/// Pages that there is room for, and that each head has.
const STRIDE: usize = 5;
const PAGES: [usize; HEADS] = [4, 0, 3];

fn layouts() -> Vec<(CodeLayout, usize)> {
    let shapes = [(64, 64, 32, 16, 3), (40, 24, 64, 32, 10), (128, 128, 32, 32, 4), (17, 5, 16, 16, 1)];
    let both = shapes.iter().flat_map(|shape| [(CodeBits::Four, shape), (CodeBits::Six, shape)]);
    both.map(|(bits, (d, dv, rows, group, queries))| {
        (CodeLayout::new(*d, *dv, *rows, bits, *group).unwrap(), *queries)
    })
    .collect()
}

/// Blocks `[HEADS][STRIDE]`, of which each head has some.
fn blocks(layout: &CodeLayout, numbers: &mut Numbers) -> Vec<u8> {
    let mut blocks = vec![0xff; HEADS * STRIDE * layout.bytes()];
    for (head, pages) in PAGES.iter().enumerate() {
        for page in 0..*pages {
            let mut keys = numbers.normal(layout.rows() * layout.head_dim());
            // Channels are not alike.
            for (i, k) in keys.iter_mut().enumerate() {
                let j = i % layout.head_dim();
                *k = *k * (j % 5) as f32 + (j % 7) as f32;
            }
            let values = numbers.normal(layout.rows() * layout.value_dim());
            layout.encode(
                &keys,
                &values,
                &mut blocks[(head * STRIDE + page) * layout.bytes()..][..layout.bytes()],
            );
        }
    }
    blocks
}

fn of_head<'a>(layout: &CodeLayout, blocks: &'a [u8], head: usize) -> &'a [u8] {
    &blocks[head * STRIDE * layout.bytes()..][..PAGES[head] * layout.bytes()]
}

/// The margin of a query in the first group of some blocks.
fn first_margin(layout: &CodeLayout, query: &[f32], blocks: &[u8]) -> f32 {
    let pages = blocks.len() / layout.bytes();
    let (stride, margin_stride) = (pages * layout.rows(), pages * layout.groups());
    let (mut rows, mut margins) = (vec![0.0; stride], vec![0.0; margin_stride]);
    let scan = CodeScan { layout, queries: query, group: 1, scale: 0.125, blocks };
    let mut out = CodeOut { rows: &mut rows, stride, margins: &mut margins, margin_stride };
    Kernels::best().code_scores(&scan, &mut out);
    margins[0]
}

pub(crate) fn scores_and_margins_of_codes_are_those_of_the_cpu_to_the_last_bit(device: &mut impl Device) {
    for (layout, group) in layouts() {
        let mut numbers = Numbers::new(layout.head_dim() as u64);
        let blocks = blocks(&layout, &mut numbers);
        let d = layout.head_dim();
        let mut queries = numbers.normal(HEADS * group * d);
        // What has no weights, and what is no number.
        queries[..d].fill(1e-33);
        queries[2 * group * d] = f32::NAN;
        // A margin a little larger than what is told.
        if group > 1 {
            let large = &mut queries[(3 * group - 1) * d..][..d];
            let factor = 45.0 / first_margin(&layout, large, of_head(&layout, &blocks, 2));
            large.iter_mut().for_each(|q| *q *= factor);
        }
        let (stride, margin_stride) = (STRIDE * layout.rows(), STRIDE * layout.groups());
        let mut wanted = vec![-7.0_f32; HEADS * group * stride];
        let mut wanted_margins = vec![-7.0_f32; HEADS * group * margin_stride];
        for head in 0..HEADS {
            let scan = CodeScan {
                layout: &layout,
                queries: &queries[head * group * d..][..group * d],
                group,
                scale: 0.125,
                blocks: of_head(&layout, &blocks, head),
            };
            let mut out = CodeOut {
                rows: &mut wanted[head * group * stride..][..group * stride],
                stride,
                margins: &mut wanted_margins[head * group * margin_stride..][..group * margin_stride],
                margin_stride,
            };
            Kernels::best().code_scores(&scan, &mut out);
        }
        let untold = wanted_margins[(3 * group - 1) * margin_stride];
        assert!(group == 1 || untold == f32::INFINITY, "{untold}, {layout:?}");
        let out = device.put(&vec![-7.0_f32; wanted.len()]);
        let margins = device.put(&vec![-7.0_f32; wanted_margins.len()]);
        let params = CodeScoresParams {
            queries: device.put(&queries),
            blocks: device.put(&blocks),
            out,
            margins,
            lengths: device.put(&PAGES.map(|pages| pages as u32)),
            shape: CodeShape::from(&layout),
            group: group as u32,
            heads: HEADS as u32,
            pages: 0,
            stride: STRIDE as u32,
            out_stride: stride as u32,
            margin_stride: margin_stride as u32,
            splits: 2,
            scale: 0.125,
        };
        device.launch("codes", "code_scores", &params, params.launch());
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&device.get::<f32>(out, wanted.len())), bits(&wanted), "scores, {layout:?}");
        let got = device.get::<f32>(margins, wanted_margins.len());
        assert_eq!(bits(&got), bits(&wanted_margins), "margins, {layout:?}");
    }
}

pub(crate) fn what_codes_leave_out_is_summed_as_on_the_cpu(device: &mut impl Device) {
    for (layout, group) in layouts() {
        let mut numbers = Numbers::new(layout.head_dim() as u64 + 100);
        let blocks = blocks(&layout, &mut numbers);
        let (dv, splits) = (layout.value_dim(), 3);
        let (stride, margin_stride) = (STRIDE * layout.rows(), STRIDE * layout.groups());
        let mut weights = numbers.normal(HEADS * group * stride);
        // A third of the rows is attended.
        weights
            .iter_mut()
            .enumerate()
            .for_each(|(i, w)| *w = if i % 3 == 0 { 0.0 } else { (*w - 3.0).exp() });
        let mut margins: Vec<f32> =
            numbers.normal(HEADS * group * margin_stride).iter().map(|m| m.abs()).collect();
        // The last query knows nothing of its first rows.
        margins[(HEADS * group - 1) * margin_stride] = f32::INFINITY;
        let (mut wanted, mut wanted_means) =
            (vec![CodeSums::default(); HEADS * group], vec![0.0; HEADS * group * dv]);
        for head in 0..HEADS {
            let first = head * group;
            Kernels::best().code_rest(
                &layout,
                of_head(&layout, &blocks, head),
                &CodeWeights {
                    rows: &weights[first * stride..][..group * stride],
                    stride,
                    margins: &margins[first * margin_stride..][..group * margin_stride],
                    margin_stride,
                },
                &mut wanted[first..][..group],
                &mut wanted_means[first * dv..][..group * dv],
            );
        }
        let sums = device.put(&vec![-1.0_f64; splits * HEADS * group * 5]);
        let means = device.put(&vec![-1.0_f32; splits * wanted_means.len()]);
        let params = CodeRestParams {
            blocks: device.put(&blocks),
            weights: device.put(&weights),
            margins: device.put(&margins),
            sums,
            means,
            lengths: device.put(&PAGES.map(|pages| pages as u32)),
            shape: CodeShape::from(&layout),
            group: group as u32,
            heads: HEADS as u32,
            pages: 0,
            stride: STRIDE as u32,
            weight_stride: stride as u32,
            margin_stride: margin_stride as u32,
            splits: splits as u32,
            pad: 0,
        };
        device.launch("codes", "code_rest", &params, params.launch());
        let parts = device.get::<f64>(sums, splits * HEADS * group * 5);
        let of_splits = |i: usize| parts.iter().skip(i).step_by(HEADS * group * 5).sum::<f64>();
        for (query, sums) in wanted.iter().enumerate() {
            let wanted = [sums.weight, sums.upper, sums.lower, sums.scatter, sums.spread];
            for (i, wanted) in wanted.into_iter().enumerate() {
                let got = of_splits(query * 5 + i);
                // `e^m − 1` is rounded up, which shows where margins are small.
                let tolerance = if i == 3 { 1e-4 } else { 1e-5 };
                let near = got == wanted || (got - wanted).abs() <= tolerance * wanted;
                assert!(near, "sum {i} of query {query}, {layout:?}: {got} instead of {wanted}");
            }
        }
        let parts = device.get::<f32>(means, splits * wanted_means.len());
        let added: Vec<f32> =
            (0..wanted_means.len()).map(|i| parts.iter().skip(i).step_by(wanted_means.len()).sum()).collect();
        assert_close(&format!("means, {layout:?}"), &added, &wanted_means);
    }
}
