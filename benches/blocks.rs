//! Throughput of the weights' quantizer, in bytes of float input, beside a copy of the same bytes.
//!
//!     cargo bench --profile dev --no-default-features --bench blocks [MEGABYTES]

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program that prints")]

use std::hint::black_box;
use std::time::Instant;

use amax::numerics::blocks::{Bands, Coding, Encoding, quantize_ranges};
use amax::numerics::{Format, Granularity, RangeSpec, Round, qparams_from_range};
use rayon::prelude::*;

/// Gigabytes a second of the best of some runs.
fn best(bytes: usize, mut run: impl FnMut()) -> f64 {
    let time = || {
        let begun = Instant::now();
        run();
        begun.elapsed().as_secs_f64()
    };
    let seconds = std::iter::repeat_with(time).take(5).fold(f64::INFINITY, f64::min);
    bytes as f64 / seconds / 1e9
}

fn main() {
    let megabytes = std::env::args().filter_map(|a| a.parse::<usize>().ok()).next().unwrap_or(256);
    let columns = 4096;
    let rows = megabytes * (1 << 20) / 4 / columns;
    let mut state = 1_u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    // The sum of some, so that few values are large.
    let x: Vec<f32> = (0..rows * columns).map(|_| random() + random() + random() + random()).collect();
    let bytes = x.len() * 4;
    println!("{} MB of float32 as {rows} x {columns}, {} threads", bytes >> 20, rayon::current_num_threads());
    let mut copy = vec![0.0_f32; x.len()];
    println!("{:<44} {:6.2} GB/s", "copy", best(bytes, || {
        copy.par_chunks_mut(1 << 16).zip(x.par_chunks(1 << 16)).for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&copy);
    }));
    drop(copy);
    let dims = [rows, columns];
    for (what, granularity) in [
        ("groups of 32, last axis", Granularity::PerGroup { axis: 1, size: 32 }),
        ("groups of 32, first axis", Granularity::PerGroup { axis: 0, size: 32 }),
        ("groups of 128, first axis", Granularity::PerGroup { axis: 0, size: 128 }),
        ("a scale a row", Granularity::PerChannel { axis: 0 }),
        ("a scale a column", Granularity::PerChannel { axis: 1 }),
        ("one scale", Granularity::PerTensor),
    ] {
        for (format, symmetric) in [(Format::Int4, true), (Format::Uint4, false), (Format::Int8, true)] {
            let spec = RangeSpec::new(format, symmetric);
            let coding = Coding::Divided(Round::HalfEven);
            let encoding = Encoding { format, codes: spec.codes(), coding };
            let params = |(low, high): (f32, f32)| qparams_from_range(low, high, &spec);
            let bands = Bands::new(&dims, &granularity).unwrap().unwrap();
            let rate = best(bytes, || {
                black_box(quantize_ranges(x.as_slice(), &bands, &encoding, params).unwrap());
            });
            println!("{:<44} {rate:6.2} GB/s", format!("{format}, {what}"));
        }
    }
}
