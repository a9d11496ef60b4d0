//! Gathers and dequantisation: exact to the last bit.

use kvoyant_kernels::Dtype;
use kvoyant_kernels::cuda::params::{DequantiseParams, GatherParams, GatherRun};
use kvoyant_kernels::quantise::Format;

use super::{Device, Numbers, stored};

pub(crate) fn runs_of_every_length_and_alignment_are_gathered_byte_for_byte(device: &mut impl Device) {
    let mut numbers = Numbers::new(1);
    let source: Vec<u64> = (0..40_000).map(|_| numbers.bits()).collect();
    let source: &[u8] = bytemuck::cast_slice(&source);
    let source_at = device.upload_mapped(source);
    for (count, longest, step) in [(1, 200_000, 16), (37, 512, 16), (50, 9000, 4), (64, 5000, 1), (3, 0, 1)] {
        let mut runs = Vec::new();
        let mut wanted = vec![0_u8; 320_000];
        let got = device.put(&wanted);
        let mut at = 0;
        for _ in 0..count {
            let bytes = if longest == 0 { 0 } else { numbers.below(longest / step + 1) * step };
            let from = numbers.below((source.len() - bytes) / step + 1) * step;
            wanted[at..at + bytes].copy_from_slice(&source[from..from + bytes]);
            runs.push(GatherRun { src: source_at + from as u64, dst: got + at as u64, bytes: bytes as u64 });
            at += bytes;
        }
        let params = GatherParams { runs: device.put(&runs), count, pad: 0 };
        let longest = runs.iter().map(|run| run.bytes).max().unwrap();
        device.launch("gather", "gather_runs", &params, params.launch(longest));
        assert!(device.get::<u8>(got, wanted.len()) == wanted, "{count} runs of up to {longest} bytes");
    }
}

pub(crate) fn quantised_rows_are_read_as_the_cpu_reads_them(device: &mut impl Device) {
    let formats = [
        Format::Plain(Dtype::F32),
        Format::Plain(Dtype::F16),
        Format::Plain(Dtype::Bf16),
        Format::Fp8,
        Format::Int8,
        Format::Int4 { group: 32 },
        Format::Int4 { group: 64 },
    ];
    let (rows, n) = (9, 192);
    for (format, dtype) in formats.into_iter().flat_map(|format| Dtype::ALL.map(|dtype| (format, dtype))) {
        let mut numbers = Numbers::new(2);
        let row_bytes = format.row_bytes(n).unwrap();
        let (mut src, mut wanted) = (vec![0; rows * row_bytes], Vec::new());
        for (i, row) in src.chunks_exact_mut(row_bytes).enumerate() {
            let mut values = numbers.normal(n);
            // Among them subnormal values of the smaller types.
            values.iter_mut().for_each(|value| *value *= 10_f32.powi(i as i32 - 6));
            format.quantise(&values, row);
            format.dequantise(row, &mut values);
            wanted.extend(stored(dtype, &values));
        }
        let dst = device.put(&vec![0xaa_u8; wanted.len()]);
        let params = DequantiseParams {
            src: device.put(&src),
            dst,
            src_stride: row_bytes as u64,
            dst_stride: (n * dtype.bytes()) as u64,
            rows: rows as u32,
            n: n as u32,
            format: u32::from(format.kernel_code()),
            group: format.group() as u32,
            dtype: u32::from(dtype.code()),
            pad: 0,
        };
        device.launch("dequantise", "dequantise", &params, params.launch());
        assert!(device.get::<u8>(dst, wanted.len()) == wanted, "{format:?} to {dtype}");
    }
}
