//! Throughput of the weights' quantizer, in bytes of float input, beside a copy of the same bytes.
//!
//!     cargo bench --profile dev --no-default-features --bench blocks [MEGABYTES]

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program that prints")]

use std::hint::black_box;
use std::time::Instant;

use amax::numerics::blocks::{Bands, Encoding, params, quantize_ranges};
use amax::quant::{Coding, Format, Granularity, RangeSpec, Round};
use rayon::prelude::*;

/// Processor seconds of all threads so far, where the system tells.
fn processor() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // Behind the name in parentheses, the 12th and 13th fields are ticks of a hundredth of a second.
    let ticks = stat.rsplit(')').next()?.split_whitespace().skip(11).take(2).map(|t| t.parse::<f64>().ok());
    Some(ticks.sum::<Option<f64>>()? / 100.0)
}

/// Prints gigabytes a second of the best of some runs, and gigabytes a second of one processor's time, which other programs
/// that run beside this disturb less.
fn measure(what: &str, bytes: usize, mut run: impl FnMut()) {
    const RUNS: u32 = 5;
    let before = processor();
    let time = || {
        let begun = Instant::now();
        run();
        begun.elapsed().as_secs_f64()
    };
    let seconds = std::iter::repeat_with(time).take(RUNS as usize).fold(f64::INFINITY, f64::min);
    let bytes = bytes as f64 / 1e9;
    let used = before.zip(processor()).map(|(before, after)| (after - before) / f64::from(RUNS));
    let used = used.map_or_else(String::new, |used| format!("{:7.2} GB per second of processor time", bytes / used));
    println!("{what:<40} {:6.2} GB/s {used}", bytes / seconds);
}

fn main() {
    let megabytes = std::env::args().find_map(|a| a.parse::<usize>().ok()).unwrap_or(256);
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
    measure("copy", bytes, || {
        copy.par_chunks_mut(1 << 16).zip(x.par_chunks(1 << 16)).for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&copy);
    });
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
            let all = |low: &[f32], high: &[f32], scales: &mut [f32], zeros: &mut [i32]| {
                params(&spec, low, high, scales, zeros);
            };
            let bands = Bands::new(&dims, &granularity).unwrap().unwrap();
            measure(&format!("{format}, {what}"), bytes, || {
                black_box(quantize_ranges(x.as_slice(), &bands, &encoding, all).unwrap());
            });
        }
    }
}
