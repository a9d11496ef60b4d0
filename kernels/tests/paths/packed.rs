//! Products of quantised matrices: what GGUF's blocks mean, the same on every path, however the work is cut.

use crate::common::{Draw, close, paths, scalar};
use half::f16;
use kvoyant_kernels::Kernels;
use kvoyant_kernels::packed::{BLOCK, Codes, PANEL, PackedMatrix, QuantisedRows, gather};
use proptest::prelude::*;

/// A kind of GGUF's blocks.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Q40,
    Q41,
    Q80,
}

/// Random blocks of rows, and the weights that they stand for.
fn matrix(kind: Kind, rows: usize, columns: usize, draw: &mut Draw) -> (PackedMatrix, Vec<f32>) {
    let (mut bytes, mut weights) = (Vec::new(), Vec::new());
    for _ in 0..rows * columns / BLOCK {
        let (d, m) = (f16::from_f32(draw.value(0.5)), f16::from_f32(draw.value(2.0)));
        bytes.extend(d.to_le_bytes());
        if matches!(kind, Kind::Q41) {
            bytes.extend(m.to_le_bytes());
        }
        let (d, m) = (d.to_f32(), m.to_f32());
        if matches!(kind, Kind::Q80) {
            let codes: Vec<i8> = (0..BLOCK).map(|_| draw.bits() as i8).collect();
            bytes.extend(codes.iter().map(|code| *code as u8));
            weights.extend(codes.iter().map(|code| d * f32::from(*code)));
        } else {
            let codes: Vec<u8> = (0..BLOCK / 2).map(|_| draw.bits() as u8).collect();
            bytes.extend(&codes);
            let halves = codes.iter().map(|code| code & 15).chain(codes.iter().map(|code| code >> 4));
            weights.extend(halves.map(|code| match kind {
                Kind::Q41 => d * f32::from(code) + m,
                _ => d * (f32::from(code) - 8.0),
            }));
        }
    }
    let packed = match kind {
        Kind::Q40 => PackedMatrix::from_q4_0(&bytes, columns),
        Kind::Q41 => PackedMatrix::from_q4_1(&bytes, columns),
        Kind::Q80 => PackedMatrix::from_q8_0(&bytes, columns),
    };
    (packed, weights)
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop::sample::select(vec![Kind::Q40, Kind::Q41, Kind::Q80])
}

/// Vectors whose values are whole numbers of a step, so that 8 bits hold them exactly.
fn exact_rows(rows: usize, columns: usize, draw: &mut Draw) -> Vec<f32> {
    let mut x = Vec::new();
    for _ in 0..rows * columns / BLOCK {
        let step = 2_f32.powi(draw.below(9) as i32 - 4);
        x.push(127.0 * step);
        x.extend((1..BLOCK).map(|_| (draw.below(255) as f32 - 127.0) * step));
    }
    x
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_product_is_that_of_the_weights_that_blocks_stand_for(
        kind in kinds(), rows in 1_usize..40, blocks in 1_usize..5, vectors in 1_usize..4, seed in any::<u64>(),
    ) {
        let (mut draw, columns) = (Draw::new(seed), blocks * BLOCK);
        let (packed, weights) = matrix(kind, rows, columns, &mut draw);
        let x = exact_rows(vectors, columns, &mut draw);
        let mut x8 = QuantisedRows::default();
        scalar().quantise_rows(&x, columns, &mut x8);
        let mut out = vec![f32::NAN; rows * vectors];
        scalar().multiply_packed(&packed, 0..packed.panels(), &x8, &mut out);
        for (r, weights) in weights.chunks_exact(columns).enumerate() {
            for (t, x) in x.chunks_exact(columns).enumerate() {
                let products = || weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let (sum, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                let found = f64::from(out[r * vectors + t]);
                prop_assert!((found - sum).abs() <= 1e-5 * size, "{} where {} is due", found, sum);
            }
        }
    }

    #[test]
    fn every_path_gives_the_twins_products_to_the_last_bit_however_panels_are_cut(
        kind in kinds(), rows in 1_usize..70, blocks in 1_usize..7, vectors in 1_usize..10, seed in any::<u64>(),
    ) {
        let (mut draw, columns) = (Draw::new(seed), blocks * BLOCK);
        let (packed, _) = matrix(kind, rows, columns, &mut draw);
        let x = draw.values(vectors * columns, 4.0);
        let mut x8 = QuantisedRows::default();
        scalar().quantise_rows(&x, columns, &mut x8);
        let mut expected = vec![f32::NAN; rows * vectors];
        scalar().multiply_packed(&packed, 0..packed.panels(), &x8, &mut expected);
        for kernels in paths() {
            let mut own = QuantisedRows::default();
            kernels.quantise_rows(&x, columns, &mut own);
            let mut out = vec![f32::NAN; rows * vectors];
            let cut = draw.below(packed.panels() + 1);
            let (first, second) = out.split_at_mut((cut * PANEL).min(rows) * vectors);
            kernels.multiply_packed(&packed, 0..cut, &own, first);
            kernels.multiply_packed(&packed, cut..packed.panels(), &own, second);
            for (found, expected) in out.iter().zip(&expected) {
                prop_assert_eq!(found.to_bits(), expected.to_bits(), "{:?} on {}", kind, kernels.path());
            }
        }
    }

    #[test]
    fn a_vector_gets_the_same_alone_as_among_others(kind in kinds(), vectors in 2_usize..10, seed in any::<u64>()) {
        let (rows, columns) = (2 * PANEL + 5, 3 * BLOCK);
        let mut draw = Draw::new(seed);
        let (packed, _) = matrix(kind, rows, columns, &mut draw);
        let x = draw.values(vectors * columns, 4.0);
        for kernels in paths() {
            let multiply = |x: &[f32]| {
                let mut x8 = QuantisedRows::default();
                kernels.quantise_rows(x, columns, &mut x8);
                let mut out = vec![0.0; rows * x8.rows()];
                kernels.multiply_packed(&packed, 0..packed.panels(), &x8, &mut out);
                out
            };
            let together = multiply(&x);
            for (t, x) in x.chunks_exact(columns).enumerate() {
                let mine: Vec<f32> = together.iter().skip(t).step_by(vectors).copied().collect();
                prop_assert_eq!(multiply(x), mine);
            }
        }
    }

    #[test]
    fn quantised_weights_are_within_half_a_step(rows in 1_usize..20, seed in any::<u64>(), exponent in -20_i32..8) {
        let columns = 2 * BLOCK;
        let mut draw = Draw::new(seed);
        let weights = draw.values(rows * columns, 2_f32.powi(exponent));
        let packed = PackedMatrix::quantise(&weights, columns);
        prop_assert_eq!((packed.codes(), packed.rows(), packed.columns()), (Codes::Eight, rows, columns));
        // A unit vector reads a column of the matrix.
        for column in [0, BLOCK - 1, BLOCK + 3] {
            let mut x = vec![0.0; columns];
            x[column] = 1.0;
            let mut x8 = QuantisedRows::default();
            Kernels::quantise_rows(scalar(), &x, columns, &mut x8);
            let mut out = vec![0.0; rows];
            scalar().multiply_packed(&packed, 0..packed.panels(), &x8, &mut out);
            for (r, found) in out.iter().enumerate() {
                let block = &weights[r * columns + column / BLOCK * BLOCK..][..BLOCK];
                let step = block.iter().fold(0.0_f32, |largest, w| largest.max(w.abs())) / 127.0;
                // A step is stored as f16: 2⁻¹¹ of it, for each of 127, and 2⁻²⁵ where it is too small for that.
                let most = step * (0.5 + 127.0 / 2048.0) + 127.0 * 2_f32.powi(-25) + 1e-6 * step;
                prop_assert!((found - block[column % BLOCK]).abs() <= most, "{} for {}", found, block[column % BLOCK]);
            }
        }
    }
}

#[test]
fn matrices_that_are_gathered_give_what_they_gave() {
    let mut draw = Draw::new(9);
    let shapes = [(Kind::Q41, 37, 3 * BLOCK), (Kind::Q80, 5, BLOCK), (Kind::Q40, 16, 2 * BLOCK)];
    let mut all: Vec<PackedMatrix> =
        shapes.iter().map(|(kind, rows, columns)| matrix(*kind, *rows, *columns, &mut draw).0).collect();
    let products = |all: &[PackedMatrix]| -> Vec<Vec<f32>> {
        let multiply = |matrix: &PackedMatrix| {
            let x: Vec<f32> = (0..matrix.columns()).map(|i| (i as f32).sin()).collect();
            let mut x8 = QuantisedRows::default();
            Kernels::best().quantise_rows(&x, matrix.columns(), &mut x8);
            let mut out = vec![f32::NAN; matrix.rows()];
            Kernels::best().multiply_packed(matrix, 0..matrix.panels(), &x8, &mut out);
            out
        };
        all.iter().map(multiply).collect()
    };
    let before = products(&all);
    gather(&mut all);
    assert_eq!(products(&all), before);
    gather(&mut []);
}

#[test]
fn a_vector_of_zeros_gives_zeros_and_one_too_small_to_divide_by_too() {
    let mut draw = Draw::new(3);
    let (packed, _) = matrix(Kind::Q41, PANEL, BLOCK, &mut draw);
    for value in [0.0, 1e-40] {
        for kernels in paths() {
            let mut x8 = QuantisedRows::default();
            kernels.quantise_rows(&[value; BLOCK], BLOCK, &mut x8);
            let mut out = [f32::NAN; PANEL];
            kernels.multiply_packed(&packed, 0..1, &x8, &mut out);
            close("products with nothing", &out, &[0.0; PANEL], 0.0);
        }
    }
}
