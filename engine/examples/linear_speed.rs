//! Where quantised weights stop paying: one linear layer by batch size, in 4 bits, 8 bits and f32.
//!
//! `cargo run --release -p kvoyant-engine --example linear_speed -- [OUTPUTS] [INPUTS]`

use std::time::Instant;

use kvoyant_engine::{Linear, SplitMix64};
use kvoyant_kernels::packed::{BLOCK, PackedMatrix, gather};

/// Layers gone through in turn, so that weights come from memory as in a model.
const LAYERS: usize = 60;

/// Bytes of a block of Q4_1.
const Q4_1_BYTES: usize = 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let outputs: usize = arguments.next().map_or(Ok(1536), |text| text.parse())?;
    let inputs: usize = arguments.next().map_or(Ok(576), |text| text.parse())?;
    let mut random = SplitMix64::new(1);
    let weight: Vec<f32> = (0..outputs * inputs).map(|_| random.normal()).collect();
    // Products take as long whatever the codes are.
    let four = PackedMatrix::from_q4_1(&vec![0; outputs * inputs / BLOCK * Q4_1_BYTES], inputs);
    let eight = PackedMatrix::quantise(&weight, inputs);
    let make = |packed: Option<&PackedMatrix>| -> Vec<Linear> {
        let mut all = vec![packed.cloned(); LAYERS];
        // Each gets memory of its own.
        gather(all.iter_mut().flatten());
        all.into_iter().map(|packed| Linear::new(&weight, None, outputs, inputs, packed)).collect()
    };
    let kinds = [("q4_1", make(Some(&four))), ("q8_0", make(Some(&eight))), ("f32", make(None))];
    println!("{outputs} x {inputs}, microseconds a layer");
    for rows in [1, 2, 4, 8, 12, 16, 24, 32, 64] {
        let x: Vec<f32> = (0..rows * inputs).map(|_| random.normal()).collect();
        let mut out = vec![0.0; rows * outputs];
        print!("batch {rows:3}");
        for (name, layers) in &kinds {
            let mut best = f64::MAX;
            for _ in 0..5 {
                let begin = Instant::now();
                layers.iter().for_each(|layer| layer.forward_as_stored(&x, rows, &mut out));
                best = best.min(begin.elapsed().as_secs_f64() * 1e6 / LAYERS as f64);
            }
            print!("   {name} {best:7.1}");
        }
        println!();
    }
    Ok(())
}
