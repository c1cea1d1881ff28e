//! Weights in one pass, against the scalar specification; algorithms by group, against others' and a search.

use amax::algorithms::tinygemm::Grid;
use amax::algorithms::{Choice, Group, hqq, kquant, tinygemm};
use amax::numerics::blocks::{
    Bands, Between, Encoding, Values, encode, encode_singly, params, quantize_between, quantize_by, quantize_ranges,
    ranges,
};
use amax::numerics::{channel_ranges, dequantize, pack, qparams_from_range};
use amax::quant::{
    Arithmetic, Coding, Format, Granularity, Precision, QParam, QParams, RangeSpec, Round, ScaleDtype, Symmetry,
};
use proptest::prelude::*;

use crate::support::{numbers, vectors};

const FORMATS: [Format; 6] = [Format::Int2, Format::Uint2, Format::Int4, Format::Uint4, Format::Int8, Format::Uint8];

const CODINGS: [Coding; 6] = [
    Coding::Divided(Round::HalfEven),
    Coding::Divided(Round::HalfAway),
    Coding::Divided(Round::Floor),
    Coding::Reciprocal,
    Coding::MlasSum,
    Coding::MlasQuotient,
];

/// Numbers of which nothing lies in memory as it is.
struct Hidden<'a>(&'a [f32]);

impl Values for Hidden<'_> {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn read(&self, start: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.0[start..start + out.len()]);
    }
}

fn specs() -> impl Strategy<Value = RangeSpec> {
    let symmetry = prop_oneof![Just(Symmetry::Symmetric), Just(Symmetry::Asymmetric), Just(Symmetry::Signed)];
    let precision = prop_oneof![Just(Precision::Double), Just(Precision::Single), Just(Precision::Mlas)];
    (0..FORMATS.len(), symmetry, any::<bool>(), any::<bool>(), precision, prop_oneof![Just(0.0f32), Just(0.01)])
        .prop_map(|(format, symmetry, narrow, reduce, precision, eps)| {
            let format = FORMATS[format];
            RangeSpec {
                symmetry,
                narrow: narrow && symmetry != Symmetry::Signed,
                reduce: reduce && format.bits() > 2,
                precision,
                // torch has a least scale always.
                eps: if precision == Precision::Single { eps.max(f32::MIN_POSITIVE) } else { eps },
                ..RangeSpec::new(format, true)
            }
        })
}

/// Numbers that meet the middle between two codes often, and others.
fn values() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => (-40i32..40).prop_map(|v| v as f32 * 0.25),
        4 => -3.0f32..3.0,
        1 => Just(0.0f32),
        1 => Just(-0.0f32),
        1 => -1e-40f32..1e-40,
        1 => prop_oneof![Just(3.0e38f32), Just(-3.4e38)],
    ]
}

proptest! {
    #![proptest_config(crate::random_cases(400))]

    #[test]
    fn one_pass_is_what_the_specification_says(
        spec in specs(),
        coding in 0..CODINGS.len(),
        dims in (1usize..5, 1usize..40, 1usize..40),
        shape in 0usize..5,
        size in 1usize..40,
        seed in proptest::collection::vec(values(), 1..400),
    ) {
        let dims = [dims.0, dims.1, dims.2];
        let granularity = [
            Granularity::PerTensor,
            Granularity::PerChannel { axis: 0 },
            Granularity::PerChannel { axis: 2 },
            Granularity::PerGroup { axis: 1, size },
            Granularity::PerGroup { axis: 2, size },
        ][shape];
        let x: Vec<f32> = (0..dims.iter().product()).map(|at: usize| seed[at % seed.len()]).collect();
        let mut coding = CODINGS[coding];
        if spec.precision == Precision::Mlas && !matches!(coding, Coding::MlasSum | Coding::MlasQuotient) {
            // Only codings of MLAS know the scale 0.
            coding = Coding::MlasSum;
        }
        let encoding = Encoding { format: spec.format, codes: spec.codes(), coding };

        // The specification, one by one.
        let bounds = channel_ranges(&x, &dims, &granularity).unwrap();
        let expected: QParams = bounds.iter().map(|&(low, high)| qparams_from_range(low, high, &spec)).collect();
        let codes = encode_singly(&x, &dims, &granularity, &encoding, &expected).unwrap();
        let raw = pack::pack(&codes, spec.format.bits());

        let bands = Bands::new(&dims, &granularity).unwrap().unwrap();
        let all = |low: &[f32], high: &[f32], scales: &mut [f32], zeros: &mut [i32]| {
            params(&spec, low, high, scales, zeros);
        };
        let found = quantize_ranges(x.as_slice(), &bands, &encoding, all).unwrap();
        let bits = |q: &QParams| q.scales.iter().map(|s| s.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&found.qparams), bits(&expected));
        prop_assert_eq!(&found.qparams.zero_points, &expected.zero_points);
        prop_assert_eq!(&found.codes, &raw);

        // Numbers that must be read, given scales, and scales that are chosen give the same.
        let hidden = Hidden(&x);
        prop_assert_eq!(&quantize_ranges(&hidden, &bands, &encoding, all).unwrap().codes, &raw);
        let encoded = encode(&hidden, &bands, &encoding, expected.clone()).unwrap();
        prop_assert_eq!(&encoded.codes, &raw);
        let chosen = quantize_by(&hidden, &bands, &encoding, |band, scales, zeros| {
            let mut column = Vec::new();
            for (at, (scale, zero)) in scales.iter_mut().zip(zeros).enumerate() {
                let column = band.column(at, &mut column);
                let low = column.iter().copied().fold(0.0, f32::min);
                let high = column.iter().copied().fold(0.0, f32::max);
                QParam { scale: *scale, zero_point: *zero } = qparams_from_range(low, high, &spec);
            }
        }).unwrap();
        prop_assert_eq!(&chosen.codes, &raw);
        let found_ranges = ranges(&hidden, &bands).unwrap();
        prop_assert_eq!(found_ranges, bounds);

        // The error is that of what is stored.
        let y = dequantize(&raw, spec.format, &dims, &granularity, &expected).unwrap();
        let noise: f64 = x.iter().zip(&y).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum();
        for coded in [found.noise, encoded.noise, chosen.noise] {
            // Codes of numbers near the end of f32 stand for infinity.
            prop_assert!(coded.total_cmp(&noise).is_eq() || (coded - noise).abs() <= noise * 1e-9, "{} {}", coded, noise);
        }
    }
}

#[test]
fn long_tensors_are_cut_without_a_trace() {
    let spec = RangeSpec::new(Format::Uint4, false);
    let encoding = Encoding { format: spec.format, codes: spec.codes(), coding: Coding::Divided(Round::HalfEven) };
    let x: Vec<f32> = (0..4_400_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e6 - 7.0).collect();
    let all =
        |low: &[f32], high: &[f32], scales: &mut [f32], zeros: &mut [i32]| params(&spec, low, high, scales, zeros);
    for (dims, granularity) in [
        (vec![4_400_000], Granularity::PerTensor),
        (vec![4_400, 1_000], Granularity::PerChannel { axis: 1 }),
        (vec![44_000, 100], Granularity::PerChannel { axis: 0 }),
        (vec![1_100, 4_000], Granularity::PerGroup { axis: 0, size: 33 }),
        (vec![88_000, 50], Granularity::PerGroup { axis: 1, size: 33 }),
    ] {
        let bands = Bands::new(&dims, &granularity).unwrap().unwrap();
        let found = quantize_ranges(x.as_slice(), &bands, &encoding, all).unwrap();
        let codes = encode_singly(&x, &dims, &granularity, &encoding, &found.qparams).unwrap();
        assert!(found.codes == pack::pack(&codes, 4), "{dims:?} {granularity:?}");
        let bounds = channel_ranges(&x, &dims, &granularity).unwrap();
        let expected: Vec<f32> = bounds.iter().map(|&(low, high)| qparams_from_range(low, high, &spec).scale).collect();
        assert!(found.qparams.scales == expected, "{dims:?} {granularity:?}");
    }
}

#[test]
fn what_cannot_be_quantized_is_refused() {
    let spec = RangeSpec::new(Format::Int4, true);
    let encoding = Encoding { format: spec.format, codes: spec.codes(), coding: Coding::Divided(Round::HalfEven) };
    let all =
        |low: &[f32], high: &[f32], scales: &mut [f32], zeros: &mut [i32]| params(&spec, low, high, scales, zeros);
    let bands = Bands::new(&[2, 3], &Granularity::PerTensor).unwrap().unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let x = [1.0, 2.0, 3.0, bad, 5.0, 6.0];
        let error = quantize_ranges(x.as_slice(), &bands, &encoding, all).unwrap_err().to_string();
        assert!(error.contains("element 3"), "{error}");
    }
    let short = [1.0_f32; 5];
    assert!(quantize_ranges(short.as_slice(), &bands, &encoding, all).is_err());
    let x = [1.0_f32; 6];
    for scale in [0.0, f32::NAN, f32::INFINITY, 1e-40] {
        assert!(encode(x.as_slice(), &bands, &encoding, QParams::per_tensor(scale, 0)).is_err(), "{scale}");
    }
    assert!(encode(x.as_slice(), &bands, &encoding, QParams::per_tensor(1.0, 8)).is_err());
    assert!(encode(x.as_slice(), &bands, &encoding, QParams::symmetric(vec![1.0; 2])).is_err());
    assert!(Bands::new(&[2, 3, 4], &Granularity::PerChannel { axis: 1 }).unwrap().is_none());
    assert!(Bands::new(&[2, 3], &Granularity::PerChannel { axis: 2 }).is_err());
}

/// The zero points are those of the published algorithm, where groups stop together as they do there.
#[test]
fn hqq_finds_the_zero_points_of_others() {
    let file = vectors("blocks.json");
    let case = &file["hqq"];
    let [x, inverse, mut zeros, expected] = ["values", "inverse", "first", "zeros"].map(|key| numbers(&case[key]));
    hqq::fit_zeros(&x, 32, &inverse, &mut zeros, 15.0, hqq::ITERATIONS);
    for (found, expected) in zeros.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-4, "{found} {expected}");
    }
}

/// torchao's codes, scales, and zero points as `MatMulNBits` counts them, groups along either axis; and what its fake
/// quantizers give.
#[test]
fn tinygemm_is_that_of_torchao() {
    let file = vectors("tinygemm.json");
    let x = numbers(&file["x"]);
    for case in file["cases"].as_array().unwrap() {
        let scale_dtype = if case["scale_dtype"] == "bfloat16" { ScaleDtype::Bfloat16 } else { ScaleDtype::Float32 };
        let spec = RangeSpec { scale_dtype, eps: 1e-6, ..RangeSpec::new(Format::Uint4, false) };
        let kernel = if case["kernel"] == "mslk" { Arithmetic::Mslk } else { Arithmetic::Tinygemm };
        for (values, expected) in x.chunks(8).zip(numbers(&case["fq"]).chunks(8)) {
            let mut codes = [0; 8];
            let chosen = tinygemm::choose(kernel, values, &spec, &mut codes);
            let Grid { scale, value, .. } = tinygemm::grid(kernel, values, &spec);
            assert_eq!(codes.map(|code| (f32::from(code) - 8.0) * scale + value).as_slice(), expected);
            for (code, expected) in codes.iter().zip(expected) {
                let near = (f32::from(*code) - chosen.zero_point) * chosen.scale;
                assert!((near - expected).abs() <= 1e-5 * (value.abs() + scale), "{near} {expected}");
            }
        }
        if case.get("q").is_none() {
            continue;
        }
        let [scales, zeros, codes] = ["scales", "zero_points", "q"].map(|key| numbers(&case[key]));
        let encoding = Encoding { format: spec.format, codes: spec.codes(), coding: Coding::Divided(Round::HalfEven) };
        let check = |x: &[f32], dims: [usize; 2], axis: usize, expected: [&[f32]; 3]| {
            let granularity = Granularity::PerGroup { axis, size: 8 };
            let bands = Bands::new(&dims, &granularity).unwrap().unwrap();
            let found = quantize_between(x, &bands, &encoding, |x, codes| {
                tinygemm::choose(Arithmetic::Tinygemm, x, &spec, codes)
            })
            .unwrap();
            let found_codes = pack::unpack(&found.codes, &spec.format, x.len());
            let zeros: Vec<f32> = found.said.iter().map(|b| b.zero_point).collect();
            assert_eq!(found_codes.iter().map(|&c| c as f32).collect::<Vec<_>>(), expected[0]);
            assert_eq!((found.qparams.scales.as_slice(), zeros.as_slice()), (expected[1], expected[2]));
            for (near, exact) in found.qparams.zero_points.iter().zip(&zeros) {
                assert!((f64::from(*near) - f64::from(exact.clamp(0.0, 15.0))).abs() <= 0.5);
            }
        };
        check(&x, [4, 32], 1, [&codes, &scales, &zeros]);
        let turned =
            |v: &[f32], columns: usize| -> Vec<f32> { (0..v.len()).map(|at| v[at % 4 * columns + at / 4]).collect() };
        check(&turned(&x, 32), [32, 4], 0, [&turned(&codes, 32), &turned(&scales, 4), &turned(&zeros, 4)]);
    }
}

/// `Σ (σ + |x|) (x − y)²` and `Σ |x − y|^0.7` of a choice.
fn errors(x: &[f32], spec: &RangeSpec, encoding: &Encoding, at: QParam) -> (f64, f64) {
    let QParam { scale, zero_point: zero } = at;
    let (low, high) = spec.format.range();
    assert!((low..=high).contains(&zero));
    let sigma = (x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64).sqrt();
    let each = x.iter().map(|&x| {
        let y = f64::from((encoding.code(x, scale, zero) - zero) as f32 * scale);
        let error = (f64::from(x) - y).abs();
        ((sigma + f64::from(x.abs())) * error * error, error.powf(0.7))
    });
    each.fold((0.0, 0.0), |sum, each| (sum.0 + each.0, sum.1 + each.1))
}

#[test]
fn least_squares_come_near_the_least_that_a_search_finds() {
    let file = vectors("blocks.json");
    let case = &file["kquant"];
    let [x, theirs, searched] = ["values", "onnxruntime", "searched"].map(|key| numbers(&case[key]));
    let spec = RangeSpec::new(Format::Uint4, false);
    let encoding = Encoding { format: spec.format, codes: spec.codes(), coding: Coding::Divided(Round::HalfEven) };
    let (mut ours, mut least) = (0.0, 0.0);
    for ((x, &theirs), &searched) in x.chunks(32).zip(&theirs).zip(&searched) {
        let choice = kquant::choose(&Group { values: x, spec: &spec, encoding: &encoding });
        let found = errors(x, &spec, &encoding, choice.found).0;
        assert!(found <= f64::from(theirs) * 1.0001, "{found} {theirs}");
        assert!(found <= f64::from(searched) * 1.25, "{found} {searched}");
        ours += found;
        least += f64::from(searched);
    }
    assert!(ours < least * 1.05, "{ours} {least}");
}

fn is_no_worse_than_rounding(spec: &RangeSpec, coding: Coding, x: &[f32]) {
    let encoding = Encoding { format: spec.format, codes: spec.codes(), coding };
    let group = Group { values: x, spec, encoding: &encoding };
    let (low, high) = x.iter().fold((0.0f32, 0.0f32), |(low, high), &x| (low.min(x), high.max(x)));
    let rounding = qparams_from_range(low, high, spec);
    let before = errors(x, spec, &encoding, rounding);
    for (is_hqq, choice) in [(true, hqq::choose(&group, 20)), (false, kquant::choose(&group))] {
        let Choice { found, fell_back, rounding_noise } = choice;
        let after = errors(x, spec, &encoding, found);
        let (before, after) = if is_hqq { (before.1, after.1) } else { (before.0, after.0) };
        assert!(after <= before * 1.00001, "{is_hqq} {before} {after} {x:?}");
        if fell_back {
            assert_eq!((found.scale.to_bits(), found.zero_point), (rounding.scale.to_bits(), rounding.zero_point));
        }
        assert!(rounding_noise.is_finite());
    }
}

#[test]
fn codes_that_differ_by_rounding_alone_are_no_worse() {
    let spec = RangeSpec { narrow: true, ..RangeSpec::new(Format::Int8, false) };
    for coding in CODINGS {
        is_no_worse_than_rounding(&spec, coding, &[2.812_104, 0.716_734_6, 0.0, 0.0, -2.689_32]);
    }
}

proptest! {
    #![proptest_config(crate::random_cases(256))]

    #[test]
    fn zero_points_between_codes_are_no_worse_than_codes(
        bits in 1usize..3,
        shift in -4.0f32..4.0,
        x in proptest::collection::vec(prop_oneof![-3.0f32..3.0, 2.0f32..3.0, Just(0.0f32)], 1..70),
    ) {
        let x: Vec<f32> = x.iter().map(|x| x + shift).collect();
        let spec = RangeSpec::new(if bits == 1 { Format::Uint2 } else { Format::Uint4 }, false);
        let encoding = Encoding { format: spec.format, codes: spec.codes(), coding: Coding::Divided(Round::HalfEven) };
        let group = Group { values: &x, spec: &spec, encoding: &encoding };
        let mut codes = vec![0xff; x.len()];
        let Between { scale, zero_point, said } = hqq::choose_between(&group, 20, &mut codes);
        let (low, high) = x.iter().fold((0.0f32, 0.0f32), |(low, high), &x| (low.min(x), high.max(x)));
        let rounding = qparams_from_range(low, high, &spec);
        let before = errors(&x, &spec, &encoding, rounding).1;
        let level = |code: &u8| (f64::from(*code) - f64::from(zero_point)) * f64::from(scale);
        let after: f64 = x.iter().zip(&codes).map(|(&x, code)| (f64::from(x) - level(code)).abs().powf(0.7)).sum();
        prop_assert!(codes.iter().all(|&code| i32::from(code) <= spec.codes().1));
        // Both are small where all values are codes; the one of floats is rounded.
        prop_assert!(after <= before * 1.0001 + 1e-3, "{} {}", before, after);
        if said.fell_back {
            prop_assert_eq!((scale, zero_point), (rounding.scale, rounding.zero_point as f32));
        }
    }

    #[test]
    fn no_algorithm_is_worse_than_rounding(
        spec in specs(),
        coding in 0..CODINGS.len(),
        x in proptest::collection::vec(prop_oneof![-3.0f32..3.0, 2.0f32..3.0, Just(0.0f32)], 1..70),
    ) {
        prop_assume!(spec.precision != Precision::Mlas || CODINGS[coding] == Coding::MlasSum);
        is_no_worse_than_rounding(&spec, CODINGS[coding], &x);
    }
}
