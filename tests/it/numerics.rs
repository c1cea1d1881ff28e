//! Numerics against `onnx`, `onnxruntime`, `torchao`, `modelopt` and `ml_dtypes`, and against the definitions by brute force.

#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test fails by panicking, and bits are compared on purpose"
)]

use amax::numerics::logits::Logits;
use amax::numerics::pair_safe::{self, Rows};
use amax::numerics::{
    bias_scale, channel_ranges, dequantize, dequantize_serial, fake_quantize, fake_quantize_nd, fake_quantize_serial,
    metrics, min_max, mse_ranges, pack, percentile_ranges, qparams_from_range, quantize, quantize_bias, quantize_codes,
    quantize_serial, quantize_value, weight_scale_floor,
};
use amax::quant::{Format, Granularity, Precision, QParam, QParams, RangeSpec, Round, ScaleDtype};
use proptest::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::support::vectors;

fn number(value: &Value) -> f32 {
    match value {
        Value::Null => f32::NAN,
        Value::String(text) => text.parse().unwrap(),
        value => value.as_f64().unwrap() as f32,
    }
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(number).collect()
}

fn integers(value: &Value) -> Vec<i32> {
    value.as_array().unwrap().iter().map(|value| i32::try_from(value.as_i64().unwrap()).unwrap()).collect()
}

fn extents(value: &Value) -> Vec<usize> {
    integers(value).into_iter().map(|extent| usize::try_from(extent).unwrap()).collect()
}

fn format(value: &Value) -> Format {
    Format::parse(value.as_str().unwrap()).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { 0x7fc0_0000 } else { value.to_bits() }).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

/// The code that stands for exactly this number.
fn code_of(format: Format, value: f32) -> i32 {
    if format.is_integer() {
        return value as i32;
    }
    let (low, high) = format.range();
    (low..=high).find(|&code| bits(&[format.decode(code)]) == bits(&[value])).unwrap()
}

/// The entry of the scale tensor for element `at`, from its index in every dimension.
fn entry(dims: &[usize], granularity: &Granularity, mut at: usize) -> usize {
    let mut index = vec![0; dims.len()];
    for axis in (0..dims.len()).rev() {
        index[axis] = at % dims[axis];
        at /= dims[axis];
    }
    match *granularity {
        Granularity::PerTensor => 0,
        Granularity::PerChannel { axis } => index[axis],
        Granularity::PerGroup { axis, size } => {
            index[axis] /= size;
            granularity.scale_dims(dims).iter().zip(&index).fold(0, |flat, (extent, index)| flat * extent + index)
        }
    }
}

struct Case {
    name: String,
    format: Format,
    dims: Vec<usize>,
    granularity: Granularity,
    qparams: QParams,
    x: Vec<f32>,
}

impl Case {
    fn new(case: &Value) -> Self {
        let granularity = serde_json::from_value(case["granularity"].clone()).unwrap();
        let qparams = QParams { scales: numbers(&case["scales"]), zero_points: integers(&case["zero_points"]) };
        let name = format!("{} {} {:?} {qparams:?}", case["name"], case["format"], granularity);
        let (format, dims, x) = (format(&case["format"]), extents(&case["dims"]), numbers(&case["x"]));
        Self { name, format, dims, granularity, qparams, x }
    }

    fn quantize(&self) -> amax::Result<Vec<i32>> {
        let Self { name, format, dims, granularity, qparams, x } = self;
        let codes = quantize_codes(x, dims, granularity, qparams, *format, Round::HalfEven);
        let raw = quantize(x, dims, granularity, qparams, *format, Round::HalfEven);
        match (&codes, raw) {
            (Ok(codes), Ok(raw)) => {
                assert_eq!(raw, pack::pack(codes, format.bits()), "{name}");
                assert_eq!(&pack::unpack(&raw, format, x.len()), codes, "{name}");
            }
            (Err(_), Err(_)) => {}
            (codes, raw) => panic!("{name}: {codes:?} but {raw:?}"),
        }
        if let Ok(codes) = &codes {
            assert_eq!(&quantize_serial(x, dims, granularity, qparams, *format).unwrap(), codes, "{name}");
        }
        codes
    }

    fn dequantize(&self, codes: &[i32]) -> Vec<f32> {
        let raw = pack::pack(codes, self.format.bits());
        let Self { name, format, dims, granularity, qparams, x: _ } = self;
        let values = dequantize(&raw, *format, dims, granularity, qparams).unwrap();
        let serial = dequantize_serial(&raw, *format, dims, granularity, qparams).unwrap();
        assert_eq!(bits(&values), bits(&serial), "{name}");
        values
    }

    fn fake(&self) -> Vec<f32> {
        let mut x = self.x.clone();
        fake_quantize_nd(&mut x, &self.dims, &self.granularity, &self.qparams, self.format).unwrap();
        let mut serial = self.x.clone();
        fake_quantize_serial(&mut serial, &self.dims, &self.granularity, &self.qparams, self.format).unwrap();
        assert_eq!(bits(&x), bits(&serial), "{}", self.name);
        if self.granularity == Granularity::PerTensor {
            let mut y = self.x.clone();
            fake_quantize(&mut y, self.qparams.scales[0], self.qparams.zero_points[0], self.format);
            assert_eq!(bits(&x), bits(&y), "{}", self.name);
        }
        x
    }

    /// The specification, element by element.
    fn specified(&self, round: Round) -> Vec<i32> {
        let code = |(at, &x): (usize, &f32)| {
            let entry = entry(&self.dims, &self.granularity, at);
            quantize_value(x, self.qparams.scales[entry], self.qparams.zero_points[entry], self.format, round)
        };
        self.x.iter().enumerate().map(code).collect()
    }
}

#[test]
fn quantizes_as_onnx() {
    let cases = vectors("quantize_linear.json");
    for value in cases.as_array().unwrap() {
        let case = Case::new(value);
        let codes = case.specified(Round::HalfEven);
        let decoded: Vec<f32> = codes.iter().map(|&code| case.format.decode(code)).collect();
        assert_eq!(bits(&decoded), bits(&numbers(&value["expected"])), "{}", case.name);
        match case.quantize() {
            Ok(quantized) => assert_eq!(quantized, codes, "{}", case.name),
            Err(error) => assert!(case.x.iter().any(|x| !x.is_finite()), "{}: {error}", case.name),
        }
        assert_eq!(bits(&case.fake()), bits(&case.dequantize(&codes)), "{}", case.name);
    }
}

#[test]
fn dequantizes_as_onnx() {
    for value in vectors("dequantize_linear.json").as_array().unwrap() {
        let case = Case::new(value);
        // f32 does not hold every int32.
        let codes: Vec<i32> = match case.format {
            Format::Int32 => integers(&value["x"]),
            format => case.x.iter().map(|&x| code_of(format, x)).collect(),
        };
        assert_eq!(bits(&case.dequantize(&codes)), bits(&numbers(&value["expected"])), "{}", case.name);
    }
}

#[test]
fn packs_as_onnx() {
    for case in vectors("packing.json").as_array().unwrap() {
        let format = format(&case["format"]);
        let codes: Vec<i32> = numbers(&case["values"]).into_iter().map(|value| code_of(format, value)).collect();
        let raw = bytes(case["raw"].as_str().unwrap());
        assert_eq!(pack::pack(&codes, format.bits()), raw, "{case}");
        assert_eq!(pack::unpack(&raw, &format, codes.len()), codes, "{case}");
    }
}

#[test]
fn agrees_with_onnxruntime_quantizer() {
    for case in vectors("ort_quantizer.json").as_array().unwrap() {
        match case["op"].as_str().unwrap() {
            // No key of ours makes ranges longer.
            "range" if case.get("min_real_range").is_some() => {}
            "range" => check_ranges(case),
            "data" => {
                let (scales, zero_points) = (numbers(&case["scale"]), integers(&case["zp"]));
                check_codes(case, Granularity::PerTensor, scales, zero_points, &case["q"]);
                let (scales, zero_points) = (numbers(&case["pc_scale"]), integers(&case["pc_zp"]));
                check_codes(case, Granularity::PerChannel { axis: 0 }, scales, zero_points, &case["pc_q"]);
            }
            "blocked" => {
                let [axis, size] = ["axis", "size"].map(|key| usize::try_from(case[key].as_u64().unwrap()).unwrap());
                let (scales, zero_points) = (numbers(&case["scale"]), integers(&case["zp"]));
                let raw = check_codes(case, Granularity::PerGroup { axis, size }, scales, zero_points, &case["q"]);
                assert_eq!(raw, bytes(case["raw"].as_str().unwrap()), "{case}");
            }
            "bias" => check_bias(case),
            op => panic!("{op}"),
        }
    }
}

/// onnxruntime leaves the lowest code of symmetric int8 and int16 unused, and of no other format.
fn onnxruntime_spec(case: &Value, format: Format) -> RangeSpec {
    let symmetric = case["symmetric"].as_bool().unwrap();
    let narrow = symmetric && matches!(format, Format::Int8 | Format::Int16);
    let reduce = case.get("reduce").is_some_and(|reduce| reduce.as_bool().unwrap());
    let spec = RangeSpec { narrow, reduce, ..RangeSpec::new(format, symmetric) };
    if let Some(codes) = case.get("codes") {
        assert_eq!([spec.codes().0, spec.codes().1], *integers(codes), "{format} {reduce}");
    }
    spec
}

/// Rows of min, max, scale, zero point.
fn check_ranges(case: &Value) {
    let format = format(&case["format"]);
    let spec = onnxruntime_spec(case, format);
    for row in case["rows"].as_array().unwrap() {
        let row = numbers(row);
        assert_eq!(
            qparams_from_range(row[0], row[1], &spec),
            QParam { scale: row[2], zero_point: row[3] as i32 },
            "{format} {row:?}"
        );
    }
}

fn check_codes(
    case: &Value,
    granularity: Granularity,
    scales: Vec<f32>,
    zero_points: Vec<i32>,
    expected: &Value,
) -> Vec<u8> {
    let (format, dims, x) = (format(&case["format"]), extents(&case["dims"]), numbers(&case["x"]));
    let qparams = QParams { scales, zero_points };
    let codes = quantize_codes(&x, &dims, &granularity, &qparams, format, Round::HalfEven).unwrap();
    assert_eq!(codes, integers(expected), "{case}");
    let spec = onnxruntime_spec(case, format);
    let ranges = channel_ranges(&x, &dims, &granularity).unwrap();
    let QParams { scales, zero_points } =
        ranges.iter().map(|&(min, max)| qparams_from_range(min, max, &spec)).collect();
    assert_eq!(zero_points, qparams.zero_points, "{case}");
    // Its blocked form computes scales in f32.
    let tolerance = u32::from(case["op"] == "blocked");
    for (scale, expected) in scales.iter().zip(&qparams.scales) {
        assert!(scale.to_bits().abs_diff(expected.to_bits()) <= tolerance, "{scale} {expected} {case}");
    }
    quantize(&x, &dims, &granularity, &qparams, format, Round::HalfEven).unwrap()
}

fn check_bias(case: &Value) {
    let [bias, inputs, weights, expected] = ["bias", "s_x", "s_w", "scale"].map(|key| numbers(&case[key]));
    let scales: Vec<f32> = weights.iter().map(|&weight| bias_scale(inputs[0], weight)).collect();
    assert_eq!(scales, expected, "{case}");
    assert_eq!(quantize_bias(&bias, &scales).unwrap(), integers(&case["q"]), "{case}");
    let absmax = bias.iter().fold(0.0, |absmax: f32, value| absmax.max(value.abs()));
    let floor = weight_scale_floor(absmax, inputs[0]);
    if case["adjusted"].as_bool().unwrap() {
        assert_eq!(vec![floor], numbers(&case["new_s_w"]), "{case}");
    } else {
        assert!(weights.iter().all(|&weight| weight >= floor), "{case}");
    }
}

#[test]
fn folds_what_torchao_and_modelopt_export() {
    for value in vectors("rivals.json").as_array().unwrap() {
        let case = Case::new(value);
        let codes = case.quantize().unwrap();
        if let Some(expected) = value.get("q") {
            assert_eq!(codes, integers(expected), "{} {}", value["source"], case.name);
            if let Some(expected) = value.get("dq") {
                let expected = numbers(expected);
                assert_eq!(case.dequantize(&codes), expected, "{} {}", value["source"], case.name);
                assert_eq!(case.fake(), expected, "{} {}", value["source"], case.name);
            }
        }
    }
}

#[test]
fn small_floats_are_those_of_ml_dtypes() {
    let tables = vectors("minifloat.json");
    for format in Format::ALL.into_iter().filter(|format| !format.is_integer()) {
        let table = &tables[format.name()];
        let expected = numbers(&table["decoded"]);
        let (low, high) = format.range();
        let decoded: Vec<f32> = (low..=high).map(|code| format.decode(code)).collect();
        assert_eq!(bits(&decoded), bits(&expected), "{format}");
        for (code, &value) in (low..=high).zip(&decoded).filter(|(_, value)| value.is_finite()) {
            assert_eq!(format.encode(value), code, "{format} {value}");
        }
        let of_half = |half: u16| {
            let value = half::f16::from_bits(half).to_f32();
            if value.is_nan() { 0 } else { u8::try_from(format.encode(value)).unwrap() }
        };
        let encoded: Vec<u8> = (0..=u16::MAX).map(of_half).collect();
        let hash = bytes(table["sha256_of_encoded_float16"].as_str().unwrap());
        assert_eq!(Sha256::digest(&encoded).as_slice(), hash, "{format}");
    }
}

/// Around every code and every midpoint between neighbours, and at both ends of f32.
#[test]
fn small_floats_round_to_the_nearest_code_ties_to_even() {
    for format in Format::ALL.into_iter().filter(|format| !format.is_integer()) {
        let (low, high) = format.range();
        let mut table: Vec<(f64, i32)> = (low..=high)
            .map(|code| (f64::from(format.decode(code)), code))
            .filter(|(value, code)| value.is_finite() && (*value != 0.0 || *code == 0))
            .collect();
        table.sort_by(|a, b| a.0.total_cmp(&b.0));
        let nearest = |x: f32| {
            let x = x.clamp(-format.max_value(), format.max_value());
            let distance = |entry: &&(f64, i32)| (entry.0 - f64::from(x)).abs();
            let least = table.iter().map(|entry| distance(&entry)).fold(f64::INFINITY, f64::min);
            let ties: Vec<_> = table.iter().filter(|entry| distance(entry) == least).collect();
            ties.iter().find(|entry| ties.len() == 1 || entry.1 % 2 == 0).unwrap().0
        };
        let mut points: Vec<f32> = table.iter().map(|entry| entry.0 as f32).collect();
        points.extend(table.windows(2).map(|pair| f64::midpoint(pair[0].0, pair[1].0) as f32));
        points.extend([f32::MIN_POSITIVE, f32::from_bits(1), f32::MAX, 1e-20, 57345.0, 61440.0, 464.0, 480.0]);
        for x in points.iter().flat_map(|&x| [x, x.next_up(), x.next_down(), -x]) {
            let code = format.encode(x);
            assert_eq!(f64::from(format.decode(code)), nearest(x), "{format} {x:e}");
            let has_negative_zero = !matches!(format, Format::Float8e4m3fnuz | Format::Float8e5m2fnuz);
            let is_negative = format.decode(code).is_sign_negative();
            assert_eq!(is_negative, x.is_sign_negative() && (has_negative_zero || nearest(x) != 0.0), "{format} {x:e}");
            let mut y = [x];
            fake_quantize(&mut y, 1.0, 0, format);
            assert_eq!(bits(&y), bits(&[format.decode(code)]), "{format} {x:e}");
        }
        for (x, sign) in [(f32::INFINITY, 1.0), (f32::NEG_INFINITY, -1.0)] {
            assert_eq!(format.decode(format.encode(x)), sign * format.max_value(), "{format}");
        }
        let nan = if format.bits() < 8 { 0.0 } else { f32::NAN };
        assert_eq!(bits(&[format.decode(format.encode(f32::NAN))]), bits(&[nan]), "{format}");
    }
}

#[test]
fn formats_are_what_their_names_say() {
    let rows = [
        ("int2", 2, true, -2, 1, 2.0),
        ("uint2", 2, false, 0, 3, 3.0),
        ("int4", 4, true, -8, 7, 8.0),
        ("uint4", 4, false, 0, 15, 15.0),
        ("int8", 8, true, -128, 127, 128.0),
        ("uint8", 8, false, 0, 255, 255.0),
        ("int16", 16, true, -32768, 32767, 32768.0),
        ("uint16", 16, false, 0, 65535, 65535.0),
        ("int32", 32, true, i32::MIN, i32::MAX, 2_147_483_648.0),
        ("float8e4m3fn", 8, true, 0, 255, 448.0),
        ("float8e4m3fnuz", 8, true, 0, 255, 240.0),
        ("float8e5m2", 8, true, 0, 255, 57344.0),
        ("float8e5m2fnuz", 8, true, 0, 255, 57344.0),
        ("float4e2m1", 4, true, 0, 15, 6.0),
        ("float6e2m3", 6, true, 0, 63, 7.5),
        ("float6e3m2", 6, true, 0, 63, 28.0),
    ];
    assert_eq!(rows.len(), Format::ALL.len());
    for ((name, bits, signed, low, high, max), format) in rows.into_iter().zip(Format::ALL) {
        assert_eq!(Format::parse(name), Some(format));
        assert_eq!(serde_json::to_value(format).unwrap(), name);
        assert_eq!((format.name(), format.bits(), format.is_signed()), (name, bits, signed));
        assert_eq!((format.range(), format.max_value()), ((low, high), max), "{name}");
        assert_eq!(format.is_integer(), name.contains("int"), "{name}");
    }
    assert_eq!(Format::parse("INT8"), None);
}

#[test]
fn ranges_become_parameters() {
    // Symmetric, narrow.
    let (sym, asym, narrow) = ((true, true), (false, false), (false, true));
    let rows = [
        (Format::Int8, sym, -1.0, 2.54, 2.54 / 127.0, 0),
        (Format::Int4, sym, -7.0, 3.0, 1.0, 0),
        (Format::Int2, sym, -1.5, 0.0, 1.5, 0),
        (Format::Uint8, sym, -1.27, 1.0, 0.01, 128),
        (Format::Uint4, sym, -14.0, 1.0, 2.0, 8),
        (Format::Uint2, sym, -3.0, 1.0, 3.0, 2),
        (Format::Uint8, asym, 0.0, 2.55, 0.01, 0),
        (Format::Uint8, asym, 1.0, 2.55, 0.01, 0),
        (Format::Uint8, asym, -2.55, -1.0, 0.01, 255),
        (Format::Int8, asym, -1.0, 1.55, 0.01, -28),
        (Format::Int8, narrow, -2.54, 0.0, 0.01, 127),
        (Format::Int8, narrow, 0.0, 2.54, 0.01, -127),
        (Format::Int8, narrow, -1.27, 1.27, 0.01, 0),
        (Format::Uint4, asym, -5.0, 10.0, 1.0, 5),
        (Format::Float8e4m3fn, asym, -448.0, 3.0, 1.0, 0),
        (Format::Float4e2m1, sym, -1.0, 3.0, 0.5, 0),
        (Format::Int8, sym, 0.0, 0.0, 1.0, 0),
        (Format::Uint8, sym, 0.0, 0.0, 1.0, 1),
        (Format::Uint8, (true, false), 0.0, 0.0, 1.0, 0),
        (Format::Uint8, asym, 0.0, 1e-40, 1.0, 0),
        (Format::Float8e5m2, sym, 0.0, 1e-38, 1.0, 0),
        (Format::Int8, asym, f32::NAN, f32::NAN, 1.0, 0),
        (Format::Int2, sym, f32::MIN, f32::INFINITY, f32::MAX, 0),
    ];
    for (format, (symmetric, narrow), min, max, scale, zero_point) in rows {
        let spec = RangeSpec { narrow, ..RangeSpec::new(format, symmetric) };
        assert_eq!(qparams_from_range(min, max, &spec), QParam { scale, zero_point }, "{spec:?} {min} {max}");
    }
}

#[test]
fn scales_are_rounded_as_asked() {
    let sym = |format| RangeSpec::new(format, true);
    let full = |format| RangeSpec { narrow: false, ..sym(format) };
    let asym = |format| RangeSpec::new(format, false);
    let pot = |spec| RangeSpec { power_of_two: true, ..spec };
    let half = |spec| RangeSpec { scale_dtype: ScaleDtype::Float16, ..spec };
    let brain = |spec| RangeSpec { scale_dtype: ScaleDtype::Bfloat16, ..spec };
    let least = |spec, eps| RangeSpec { eps, ..spec };
    let single = |spec| RangeSpec { precision: Precision::Single, ..spec };
    let power = |exponent: i32| 2.0_f32.powi(exponent);
    let rows = [
        // onnxruntime's own tests of compute_scale_zp.
        (sym(Format::Int8), -1.0, 2.0, 2.0 / 127.0, 0),
        (RangeSpec { narrow: true, ..asym(Format::Int8) }, -1.0, 2.0, 3.0 / 254.0, -42),
        (full(Format::Uint8), -1.0, 2.0, 4.0 / 255.0, 128),
        (asym(Format::Uint8), -1.0, 2.0, 3.0 / 255.0, 85),
        (sym(Format::Int8), -1e-39, 1e-39, 1.0, 0),
        // Powers of two: up, exact ones kept, to both ends.
        (pot(sym(Format::Int8)), 0.0, 127.0, 1.0, 0),
        (pot(sym(Format::Int8)), 0.0, 127.1, 2.0, 0),
        (pot(sym(Format::Int8)), 0.0, 126.9, 1.0, 0),
        (pot(asym(Format::Uint8)), -1.0, 254.1, 2.0, 0),
        (pot(asym(Format::Uint8)), -4.0, 252.0, 2.0, 2),
        (pot(sym(Format::Int2)), f32::MIN, 0.0, power(127), 0),
        (pot(sym(Format::Int8)), 0.0, 1e-40, 1.0, 0),
        (pot(least(sym(Format::Int8), 0.3)), 0.0, 0.0, 0.5, 0),
        (pot(sym(Format::Float8e4m3fn)), 0.0, 449.0, 2.0, 0),
        // Halves: nearest even, never zero nor infinite.
        (half(sym(Format::Int8)), 0.0, 127.0 * (1.0 + power(-11)), 1.0, 0),
        (half(sym(Format::Int8)), 0.0, 127.0 * (1.0 + 3.0 * power(-11)), 1.0 + power(-9), 0),
        (half(sym(Format::Int8)), 0.0, 1e30, 65504.0, 0),
        (half(pot(sym(Format::Int8))), 0.0, 1e30, 32768.0, 0),
        (half(sym(Format::Int8)), 0.0, 1e-20, power(-24), 0),
        (half(asym(Format::Uint8)), -1e-20, 1e-20, power(-24), 0),
        (half(least(sym(Format::Int8), 1.0 + power(-12))), 0.0, 0.0, 1.0 + power(-10), 0),
        (brain(sym(Format::Int8)), 0.0, 127.0 * (1.0 + power(-8)), 1.0, 0),
        (brain(sym(Format::Int8)), 0.0, 127.0 * (1.0 + 3.0 * power(-8)), 1.0 + power(-6), 0),
        (brain(sym(Format::Int2)), f32::MIN, 0.0, half::bf16::MAX.to_f32(), 0),
        // The zero point is that of the rounded scale.
        (brain(asym(Format::Uint16)), -3.0, 7.0, 160.0 * power(-20), 19661),
        // The least scale.
        (least(asym(Format::Int8), f32::MIN_POSITIVE), 0.0, 0.0, f32::MIN_POSITIVE, -128),
        (least(sym(Format::Int8), 1e-3), 0.0, 0.127, 1e-3, 0),
        (least(sym(Format::Int8), 1e-3), 0.0, 1.27, 1.27 / 127.0, 0),
        (least(sym(Format::Int8), 1e-40), 0.0, 0.0, f32::MIN_POSITIVE, 0),
        // torch rounds the width to f32 first.
        (asym(Format::Int8), -0.123_456_79, 1.987_654_3, 0.008_278_867, -113),
        (single(asym(Format::Int8)), -16_777_216.0, 1.0, 16_777_216.0 / 255.0, 127),
        (asym(Format::Int8), -16_777_216.0, 1.0, 16_777_217.0 / 255.0, 127),
        (asym(Format::Uint8), f32::MIN, f32::MAX, f32::MAX / 127.5, 128),
        (RangeSpec { reduce: true, ..asym(Format::Uint2) }, f32::MIN, f32::MAX, f32::MAX, 0),
    ];
    for (spec, min, max, scale, zero_point) in rows {
        assert_eq!(qparams_from_range(min, max, &spec), QParam { scale, zero_point }, "{spec:?} {min} {max}");
    }
}

#[test]
fn codes_in_use_are_those_of_their_formats() {
    let rows = [
        ("int2", (-1, 1), (-1, 0), (0, 0)),
        ("uint2", (1, 3), (0, 1), (1, 1)),
        ("int4", (-7, 7), (-4, 3), (-3, 3)),
        ("uint4", (1, 15), (0, 7), (1, 7)),
        ("int8", (-127, 127), (-64, 64), (-64, 64)),
        ("uint8", (1, 255), (0, 127), (1, 127)),
        ("int16", (-32767, 32767), (-16384, 16384), (-16384, 16384)),
        ("uint16", (1, 65535), (0, 32767), (1, 32767)),
        ("float8e4m3fn", (0, 255), (0, 255), (0, 255)),
    ];
    for (name, narrow_codes, reduced, both) in rows {
        let format = Format::parse(name).unwrap();
        let codes = |narrow, reduce| RangeSpec { narrow, reduce, ..RangeSpec::new(format, false) }.codes();
        assert_eq!(codes(false, false), format.range(), "{name}");
        assert_eq!(
            [codes(true, false), codes(false, true), codes(true, true)],
            [narrow_codes, reduced, both],
            "{name}"
        );
    }
}

#[test]
fn searches_refuse_what_has_no_range() {
    let spec = RangeSpec::new(Format::Int8, true);
    let search = |x: &[f32]| {
        let errors = [
            mse_ranges(x, &[2], &Granularity::PerTensor, &spec, Round::HalfEven, 2.0).err(),
            percentile_ranges(x, &[2], &Granularity::PerTensor, 99.0, true).err(),
        ];
        errors.map(|error| error.map(|error| error.message().to_owned()).unwrap_or_default())
    };
    assert!(search(&[0.0]).iter().all(|message| message.contains("do not fill")));
    assert!(search(&[0.0, f32::NAN]).iter().all(|message| message.contains("element 1 is NaN")));
    assert!(search(&[0.0, 0.0]).iter().all(String::is_empty));
    let empty = Granularity::PerChannel { axis: 1 };
    assert_eq!(mse_ranges(&[], &[0, 2], &empty, &spec, Round::HalfEven, 2.0).unwrap(), [(0.0, 0.0); 2]);
    assert_eq!(percentile_ranges(&[], &[0, 2], &empty, 50.0, false).unwrap(), [(0.0, 0.0); 2]);
}

#[test]
fn extremes_skip_what_is_no_number() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let many: Vec<f32> = (0..1000).map(|at| (at * 37 % 1000) as f32 - 300.0).collect();
    let rows = [
        (vec![], (0.0, 0.0, 0, 0)),
        (vec![3.0], (3.0, 3.0, 0, 0)),
        (vec![nan, inf, -inf], (0.0, 0.0, 1, 2)),
        (vec![nan, 2.0, inf, -1.0], (-1.0, 2.0, 1, 1)),
        (many.clone(), (-300.0, 699.0, 0, 0)),
        ([&many[..], &[nan, -inf]].concat(), (-300.0, 699.0, 1, 1)),
    ];
    for (x, (min, max, nan, inf)) in rows {
        let found = min_max(&x);
        assert_eq!((found.min, found.max, found.nan, found.inf), (min, max, nan, inf), "{} elements", x.len());
    }
    let x = [1.0, nan, -2.0, nan, 5.0, inf];
    let per_channel = |axis| channel_ranges(&x, &[3, 2], &Granularity::PerChannel { axis }).unwrap();
    assert_eq!(per_channel(0), [(1.0, 1.0), (-2.0, -2.0), (5.0, 5.0)]);
    assert_eq!(per_channel(1), [(-2.0, 5.0), (0.0, 0.0)]);
}

#[test]
fn refuses_what_does_not_fit() {
    let channel = Granularity::PerChannel { axis: 0 };
    let two = |scale| QParams { scales: vec![1.0, scale], zero_points: vec![0, 0] };
    let tensor = |zero_point| QParams::per_tensor(1.0, zero_point);
    let rows = [
        ("do not fill", vec![0.0; 3], channel, two(1.0), Format::Int8, Round::HalfEven),
        ("axis 2", vec![0.0; 4], Granularity::PerChannel { axis: 2 }, two(1.0), Format::Int8, Round::HalfEven),
        ("at least 1", vec![0.0; 4], Granularity::PerGroup { axis: 0, size: 0 }, two(1.0), Format::Int8, Round::Floor),
        ("needs 1 each", vec![0.0; 4], Granularity::PerTensor, two(1.0), Format::Int8, Round::HalfEven),
        ("scale 0", vec![0.0; 4], channel, two(0.0), Format::Int8, Round::HalfEven),
        ("scale -1", vec![0.0; 4], channel, two(-1.0), Format::Int8, Round::HalfEven),
        ("scale NaN", vec![0.0; 4], channel, two(f32::NAN), Format::Int8, Round::HalfEven),
        ("scale inf", vec![0.0; 4], channel, two(f32::INFINITY), Format::Int8, Round::HalfEven),
        ("zero point 128", vec![0.0; 4], Granularity::PerTensor, tensor(128), Format::Int8, Round::HalfEven),
        ("zero point -1", vec![0.0; 4], Granularity::PerTensor, tensor(-1), Format::Uint4, Round::HalfEven),
        ("zero point 1", vec![0.0; 4], Granularity::PerTensor, tensor(1), Format::Float8e5m2, Round::HalfEven),
        ("rounding", vec![0.0; 4], Granularity::PerTensor, tensor(0), Format::Float4e2m1, Round::Floor),
        ("element 2 is NaN", vec![0.0, 0.0, f32::NAN, 0.0], channel, two(1.0), Format::Int4, Round::HalfEven),
        ("element 0 is inf", vec![f32::INFINITY; 4], channel, two(1.0), Format::Float8e4m3fn, Round::HalfEven),
    ];
    for (message, x, granularity, qparams, format, round) in rows {
        let error = quantize(&x, &[2, 2], &granularity, &qparams, format, round).unwrap_err();
        assert!(error.message().contains(message), "{message}: {error}");
        assert!(quantize_codes(&x, &[2, 2], &granularity, &qparams, format, round).is_err(), "{message}");
    }
    let short = dequantize(&[0; 3], Format::Int8, &[2, 2], &Granularity::PerTensor, &tensor(0)).unwrap_err();
    assert!(short.message().contains("3 bytes"), "{short}");
    let vast = dequantize(&[], Format::Int8, &[usize::MAX, 2], &Granularity::PerTensor, &tensor(0)).unwrap_err();
    assert!(vast.message().contains("more elements"), "{vast}");
    let hollow = channel_ranges(&[], &[1 << 50, 0], &Granularity::PerChannel { axis: 0 }).unwrap_err();
    assert!(hollow.message().contains("no elements but"), "{hollow}");
    assert!(quantize_bias(&[1.0, 2.0], &[1.0, 1.0, 1.0]).is_err());
    assert!(quantize_bias(&[f32::NAN], &[1.0]).is_err());
    assert!(quantize_bias(&[1.0], &[0.0]).is_err());
}

#[test]
fn bias_rounds_in_double_precision_and_saturates() {
    let rows = [(0.5, 1.0, 0), (1.5, 1.0, 2), (-2.5, 1.0, -2), (1e30, 1.0, i32::MAX), (-1e30, 1.0, i32::MIN)];
    for (bias, scale, code) in rows {
        assert_eq!(quantize_bias(&[bias], &[scale]).unwrap(), [code], "{bias}");
    }
    // In f32 the quotient would be 16777216 or 16777218.
    assert_eq!(quantize_bias(&[16_777_216.0], &[1.0 - f32::EPSILON / 2.0]).unwrap(), [16_777_217]);
    assert_eq!(quantize_bias(&[], &[1.0]).unwrap(), Vec::<i32>::new());
    for (absmax, input) in [(1.0, 1e-6), (1e5, 0.02), (3e-3, 1e-12)] {
        let scale = bias_scale(input, weight_scale_floor(absmax, input));
        let code = quantize_bias(&[absmax], &[scale]).unwrap()[0];
        assert!((2_147_000_000..i32::MAX).contains(&code), "{absmax} {input} {code}");
    }
}

#[test]
fn empty_and_tiny_tensors_quantize() {
    for format in Format::ALL {
        for (dims, entries) in [(vec![0], 0), (vec![3, 0], 0), (vec![0, 3], 3), (vec![1, 1], 1), (vec![2, 1], 1)] {
            let granularity = Granularity::PerChannel { axis: dims.len() - 1 };
            let x = vec![0.75; dims.iter().product()];
            let qparams = QParams::symmetric(vec![0.5; entries]);
            let case = Case { name: format!("{format} {dims:?}"), format, dims, granularity, qparams, x };
            let codes = case.quantize().unwrap();
            assert_eq!(codes, case.specified(Round::HalfEven), "{}", case.name);
            assert_eq!(case.dequantize(&codes), case.fake(), "{}", case.name);
        }
        let subnormal = f32::from_bits(3);
        let extreme = [f32::MAX, f32::MIN, f32::MIN_POSITIVE, subnormal, -subnormal, 0.0, -0.0];
        for scale in [f32::MIN_POSITIVE, f32::MAX, subnormal, 1.0] {
            let (dims, granularity, qparams) = (vec![7], Granularity::PerTensor, QParams::per_tensor(scale, 0));
            let case =
                Case { name: format!("{format} {scale}"), format, dims, granularity, qparams, x: extreme.to_vec() };
            let codes = case.quantize().unwrap();
            assert_eq!(codes, case.specified(Round::HalfEven), "{}", case.name);
            assert_eq!(bits(&case.dequantize(&codes)), bits(&case.fake()), "{}", case.name);
        }
    }
}

#[test]
fn threads_do_not_change_a_byte() {
    let dims = vec![3, 70_001];
    let x: Vec<f32> = (0..210_003_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e6 - 8.0).collect();
    let granularities = [
        (Granularity::PerTensor, 1),
        (Granularity::PerChannel { axis: 0 }, 3),
        (Granularity::PerChannel { axis: 1 }, 70_001),
        (Granularity::PerGroup { axis: 1, size: 128 }, 3 * 547),
        (Granularity::PerGroup { axis: 0, size: 2 }, 2 * 70_001),
    ];
    for (format, (granularity, entries)) in
        [Format::Int8, Format::Uint4, Format::Int2, Format::Int16, Format::Float8e4m3fn, Format::Float4e2m1]
            .into_iter()
            .flat_map(|format| granularities.map(|granularity| (format, granularity)))
    {
        let qparams = QParams::symmetric((0..entries).map(|at| 0.01 + at as f32 * 1e-6).collect());
        let name = format!("{format} {granularity:?}");
        let case = Case { name, format, dims: dims.clone(), granularity, qparams, x: x.clone() };
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| case.quantize().unwrap())
        };
        let codes = run(1);
        assert!(codes == run(3), "{}", case.name);
        assert!(codes == case.specified(Round::HalfEven), "{}", case.name);
        assert!(bits(&case.dequantize(&codes)) == bits(&case.fake()), "{}", case.name);
    }
}

/// Tensors of up to four dimensions with every format, granularity and rounding.
fn any_case() -> impl Strategy<Value = (Case, Round)> {
    let shape = (proptest::collection::vec(1_usize..6, 1..4), 0_usize..4, 1_usize..5, 0_usize..3);
    let format = proptest::sample::select(Format::ALL.to_vec());
    let rounds = proptest::sample::select(vec![Round::HalfEven, Round::HalfAway, Round::Floor]);
    (shape, format, rounds).prop_flat_map(|((dims, axis, size, kind), format, round)| {
        let axis = axis % dims.len();
        let granularity = match kind {
            0 => Granularity::PerTensor,
            1 => Granularity::PerChannel { axis },
            _ => Granularity::PerGroup { axis, size },
        };
        let entries = granularity.scale_dims(&dims).iter().product::<usize>();
        let (low, high) = if format.is_integer() && format != Format::Int32 { format.range() } else { (0, 0) };
        let round = if format.is_integer() { round } else { Round::HalfEven };
        let scales = proptest::collection::vec(prop_oneof![Just(1.0_f32), Just(0.37), 1e-3_f32..10.0], entries);
        let zero_points = proptest::collection::vec(low..=high, entries);
        // Half steps make ties; the others reach past every range.
        let element = prop_oneof![(-600_i32..600).prop_map(|x| x as f32 / 2.0), -20.0_f32..20.0, -1e9_f32..1e9];
        let x = proptest::collection::vec(element, dims.iter().product::<usize>());
        (scales, zero_points, x).prop_map(move |(scales, zero_points, x)| {
            let qparams = QParams { scales, zero_points };
            let name = format!("{format} {dims:?} {granularity:?} {round:?}");
            (Case { name, format, dims: dims.clone(), granularity, qparams, x }, round)
        })
    })
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} {:?}", self.name, self.qparams, self.x)
    }
}

proptest! {
    #![proptest_config(crate::random_cases(2000))]

    #[test]
    fn fast_paths_equal_the_specification((case, round) in any_case()) {
        let Case { name: _, format, dims, granularity, qparams, x } = &case;
        let codes = quantize_codes(x, dims, granularity, qparams, *format, round).unwrap();
        prop_assert_eq!(&codes, &case.specified(round));
        let raw = quantize(x, dims, granularity, qparams, *format, round).unwrap();
        prop_assert_eq!(pack::unpack(&raw, format, x.len()), codes.clone());
        let values = case.dequantize(&codes);
        if round == Round::HalfEven {
            prop_assert_eq!(bits(&case.fake()), bits(&values));
        }
        for (at, (&code, &value)) in codes.iter().zip(&values).enumerate() {
            let entry = entry(dims, granularity, at);
            let (scale, zero_point) = (qparams.scales[entry], qparams.zero_points[entry]);
            let number = if format.is_integer() { (i64::from(code) - i64::from(zero_point)) as f32 } else { format.decode(code) };
            prop_assert_eq!(value, number * scale);
        }
    }

    #[test]
    fn errors_stay_below_half_a_step(
        x in proptest::collection::vec(-100.0_f32..100.0, 1..50),
        symmetric: bool,
        format in proptest::sample::select(vec![Format::Int4, Format::Uint4, Format::Int8, Format::Uint8, Format::Int16, Format::Uint16]),
    ) {
        let extremes = min_max(&x);
        let QParam { scale, zero_point } = qparams_from_range(extremes.min, extremes.max, &RangeSpec::new(format, symmetric));
        let mut y = x.clone();
        fake_quantize(&mut y, scale, zero_point, format);
        // The zero point is rounded too, so that the ends of an asymmetric range may saturate by half a step.
        let steps = if symmetric { 0.5 } else { 1.0 };
        for (x, y) in x.iter().zip(&y) {
            let rounding = 4.0 * f32::EPSILON * x.abs();
            prop_assert!((x - y).abs() <= scale * steps + rounding, "{} {} {}", x, y, scale);
        }
        let mut zero = [0.0];
        fake_quantize(&mut zero, scale, zero_point, format);
        prop_assert_eq!(zero[0].to_bits(), 0);
    }

    #[test]
    fn packing_is_reversible(format in proptest::sample::select(Format::ALL.to_vec()), seeds in proptest::collection::vec(any::<u32>(), 0..40)) {
        let (low, high) = format.range();
        let span = i64::from(high) - i64::from(low) + 1;
        let codes: Vec<i32> = seeds.iter().map(|&seed| i32::try_from(i64::from(low) + i64::from(seed) % span).unwrap()).collect();
        let raw = pack::pack(&codes, format.bits());
        prop_assert_eq!(raw.len(), (codes.len() * format.bits()).div_ceil(8));
        prop_assert_eq!(pack::unpack(&raw, &format, codes.len()), codes);
    }
}

/// What `vpmaddubsw` makes of one pair.
fn saturating_pair([a, b]: [u8; 2], [v, w]: [i8; 2]) -> i32 {
    (i32::from(a) * i32::from(v) + i32::from(b) * i32::from(w)).clamp(-32768, 32767)
}

#[test]
fn pairs_are_safe_exactly_when_no_activation_saturates() {
    for v in i8::MIN..=i8::MAX {
        for w in i8::MIN..=i8::MAX {
            let exact = |[a, b]: [u8; 2]| i32::from(a) * i32::from(v) + i32::from(b) * i32::from(w);
            let is_exact = [[0, 0], [0, 255], [255, 0], [255, 255]].map(|a| saturating_pair(a, [v, w]) == exact(a));
            assert_eq!(pair_safe::is_safe(&[v, w]), is_exact == [true; 4], "{v} {w}");
        }
    }
    assert!(pair_safe::is_safe(&[]));
    assert!(pair_safe::is_safe(&[0, 127, 127]));
    assert!(!pair_safe::is_safe(&[0, 0, 65, 64]));
}

fn squared_error(row: &[f32], scale: f32, codes: &[i8]) -> f64 {
    let error = |(&weight, &code): (&f32, &i8)| f64::from(weight) - f64::from(scale) * f64::from(code);
    row.iter().zip(codes).map(error).map(|error| error * error).sum()
}

/// The best safe codes for a pair at this scale, among all.
fn best_pair_error(pair: [f32; 2], scale: f32) -> f64 {
    let errors = (-127_i8..=127).flat_map(|v| {
        let room = 128 - i32::from(v).abs();
        let safe = move |w: &i8| i32::from(v) * i32::from(*w) <= 0 || i32::from(*w).abs() <= room;
        (-127_i8..=127).filter(safe).map(move |w| squared_error(&pair, scale, &[v, w]))
    });
    errors.fold(f64::INFINITY, f64::min)
}

/// The smallest scale at which plain rounding keeps every pair safe.
fn unprojected_scale(row: &[f32]) -> f32 {
    let pairs = row
        .chunks_exact(2)
        .filter(|pair| pair[0] * pair[1] > 0.0)
        .map(|pair| f64::from(pair[0].abs()) + f64::from(pair[1].abs()));
    let largest = row.iter().map(|weight| f64::from(weight.abs())).chain(pairs).fold(0.0, f64::max);
    if largest == 0.0 { 1.0 } else { (largest / 127.0) as f32 }
}

proptest! {
    #![proptest_config(crate::random_cases(200))]

    #[test]
    fn pair_safe_rows_are_safe_and_no_worse_than_a_coarser_scale(
        row in proptest::collection::vec(prop_oneof![-1.0_f32..1.0, -1e-3_f32..1e-3, Just(0.0), Just(1.0), Just(-1.0)], 0..40),
    ) {
        let (scale, codes) = pair_safe::quantize_row(&row);
        prop_assert_eq!(codes.len(), row.len());
        prop_assert!(pair_safe::is_safe(&codes));
        let plain = unprojected_scale(&row);
        let rounded: Vec<i8> = row.iter().map(|weight| (weight / plain).round_ties_even() as i8).collect();
        prop_assert!(pair_safe::is_safe(&rounded), "{:?} {}", row, plain);
        prop_assert!(scale <= plain);
        prop_assert!(squared_error(&row, scale, &codes) <= squared_error(&row, plain, &rounded));
    }

    #[test]
    fn projection_is_the_nearest_safe_pair(pair in proptest::array::uniform2(-1.0_f32..1.0)) {
        let (scale, codes) = pair_safe::quantize_row(&pair);
        let best = best_pair_error(pair, scale);
        let error = squared_error(&pair, scale, &codes);
        // Rounding divides in f32, which may turn a tie of the exact quotient.
        prop_assert!(error <= best * 1.001 + 1e-12, "{:?} {} {:?} {} {}", pair, scale, codes, error, best);
    }
}

#[test]
fn pair_safe_rows_at_the_edges() {
    let rows: [(&[f32], f32, &[i8]); 6] = [
        (&[], 1.0, &[]),
        (&[0.0, 0.0, 0.0], 1.0, &[0, 0, 0]),
        (&[1e-40, 1e-40], 1.0, &[0, 0]),
        (&[1.27, -1.27, 0.01], 0.01, &[127, -127, 1]),
        (&[0.5, 0.0, 1.27], 0.01, &[50, 0, 127]),
        (&[f32::MAX], f32::MAX / 127.0, &[127]),
    ];
    for (row, scale, codes) in rows {
        assert_eq!(pair_safe::quantize_row(row), (scale, codes.to_vec()), "{row:?}");
    }
    for row in [[f32::MAX, f32::MAX], [f32::NAN, 1.0], [f32::INFINITY, f32::INFINITY], [f32::MIN, f32::MIN]] {
        assert!(pair_safe::is_safe(&pair_safe::quantize_row(&row).1), "{row:?}");
    }
    // Many small weights and one large pair: giving way in the pair costs less than coarsening all others.
    let mut row = vec![0.1; 4000];
    for (at, weight) in row.iter_mut().enumerate() {
        *weight *= (at as f32 * 0.7).sin();
    }
    row[10..12].copy_from_slice(&[1.0, 0.05]);
    let (scale, codes) = pair_safe::quantize_row(&row);
    assert_eq!((codes[10], codes[11]), (122, 6));
    assert!(scale > 1.0 / 127.0 && scale < 1.05 / 127.0, "{scale}");
}

/// Channels and pairs by nested loops over what each operator multiplies.
#[test]
fn rows_pair_what_the_kernel_pairs() {
    let elements: Vec<usize> = (0..2 * 3 * 4).collect();
    let rows = Rows::conv(&[2, 3, 2, 2]);
    assert_eq!(rows.count(), 2);
    for out in 0..2 {
        let mut expected = Vec::new();
        for height in 0..2 {
            for width in 0..2 {
                expected.extend((0..3).map(|input| ((out * 3 + input) * 2 + height) * 2 + width));
            }
        }
        assert_eq!(rows.gather(out, &elements), expected);
    }
    for axis in 0..3 {
        let dims = [2, 3, 4];
        let rows = Rows::along(&dims, axis);
        let mut expected = Vec::new();
        let others: Vec<usize> = (0..3).filter(|&other| other != axis).collect();
        for first in 0..dims[others[0]] {
            for second in 0..dims[others[1]] {
                let mut at = [0; 3];
                (at[others[0]], at[others[1]]) = (first, second);
                let row = (0..dims[axis]).map(|k| {
                    at[axis] = k;
                    (at[0] * 3 + at[1]) * 4 + at[2]
                });
                expected.push(row.collect::<Vec<_>>());
            }
        }
        let found: Vec<Vec<usize>> = (0..rows.count()).map(|row| rows.positions(row).collect()).collect();
        assert_eq!(found, expected, "axis {axis}");
    }
    for empty in [Rows::conv(&[0, 4, 3]), Rows::along(&[2, 3, 0], 1), Rows::along(&[0, 3], 1), Rows::default()] {
        assert_eq!(empty.count(), 0, "{empty:?}");
    }
    assert!(Rows::along(&[3, 0], 1).gather::<i8>(2, &[]).is_empty());
}

#[test]
fn codes_of_safe_rows_survive_as_float_weights() {
    let weight: Vec<f32> = (0..2 * 5 * 3 * 3).map(|at| ((at * 7919 % 181) as f32 - 90.0).powi(3)).collect();
    let layouts = [
        (Rows::conv(&[2, 5, 3, 3]), Granularity::PerChannel { axis: 0 }, vec![2, 5, 3, 3]),
        (Rows::along(&[10, 9], 0), Granularity::PerChannel { axis: 1 }, vec![10, 9]),
        (Rows::along(&[9, 10], 1), Granularity::PerChannel { axis: 0 }, vec![9, 10]),
    ];
    for (rows, granularity, dims) in layouts {
        let (mut scales, mut raw) = (Vec::new(), vec![0; weight.len()]);
        for row in 0..rows.count() {
            let (scale, codes) = pair_safe::quantize_row(&rows.gather(row, &weight));
            assert!(pair_safe::is_safe(&codes), "{dims:?} {row}");
            rows.positions(row).zip(codes).for_each(|(at, code)| raw[at] = code.cast_unsigned());
            scales.push(scale);
        }
        let qparams = QParams::symmetric(scales);
        let values = dequantize(&raw, Format::Int8, &dims, &granularity, &qparams).unwrap();
        assert_eq!(quantize(&values, &dims, &granularity, &qparams, Format::Int8, Round::HalfEven).unwrap(), raw);
    }
}

#[test]
fn measures_follow_their_formulas() {
    let rows = [
        ([0.0, 0.0], [0.0, 0.0], f64::INFINITY, 1.0, 0.0),
        ([1.0, -2.0], [1.0, -2.0], f64::INFINITY, 1.0, 0.0),
        ([10.0, 0.0], [9.0, 0.0], 20.0, 1.0, 1.0),
        ([1.0, 0.0], [0.0, 1.0], -3.010_299_956_639_812, 0.0, 1.0),
        ([3.0, 4.0], [-3.0, -4.0], -6.020_599_913_279_624, -1.0, 8.0),
        ([0.0, 0.0], [1.0, 0.0], f64::NEG_INFINITY, 0.0, 1.0),
    ];
    assert_eq!((metrics::sqnr_db(&[], &[]), metrics::cosine(&[], &[])), (f64::INFINITY, 1.0));
    for (reference, test, sqnr, cosine, max) in &rows {
        let (sqnr, cosine, max) = (*sqnr, *cosine, *max);
        let close = |a: f64, b: f64| a == b || (a - b).abs() < 1e-12;
        assert!(close(metrics::sqnr_db(reference, test), sqnr), "{reference:?} {test:?}");
        assert!(close(metrics::cosine(reference, test), cosine), "{reference:?} {test:?}");
        assert_eq!(metrics::max_abs_error(reference, test), max, "{reference:?} {test:?}");
    }
    assert!(metrics::sqnr_db(&[1.0, f32::NAN], &[1.0, 1.0]).is_nan());
    assert!(metrics::max_abs_error(&[f32::NAN, 1.0], &[1.0, 1.0]).is_nan());
    assert!(metrics::max_abs_error(&[1.0, 1.0], &[f32::NAN, 1.0]).is_nan());
}

#[test]
fn measures_merge() {
    let reference: Vec<f32> = (0..1000).map(|at| (at as f32 * 0.37).sin()).collect();
    let test: Vec<f32> = reference.iter().map(|value| (value * 64.0).round() / 64.0).collect();
    let whole = metrics::Metrics::of(&reference, &test);
    let signal: f64 = reference.iter().map(|&r| f64::from(r) * f64::from(r)).sum();
    let noise: f64 = reference.iter().zip(&test).map(|(&r, &t)| (f64::from(r) - f64::from(t)).powi(2)).sum();
    assert!((whole.sqnr_db() - 10.0 * (signal / noise).log10()).abs() < 1e-9);
    assert!((whole.mse() - noise / 1000.0).abs() < 1e-12);
    let mut pieces = metrics::Metrics::default();
    for (reference, test) in reference.chunks(77).zip(test.chunks(77)) {
        let mut piece = metrics::Metrics::default();
        piece.feed(reference, test);
        pieces.merge(&piece);
    }
    assert_eq!((pieces.count, pieces.max_abs_error()), (1000, whole.max_abs_error()));
    assert!((pieces.sqnr_db() - whole.sqnr_db()).abs() < 1e-9);
    assert!((pieces.cosine() - whole.cosine()).abs() < 1e-12);
}

/// By hand: `KL = Σ p log(p / q)`, and the perplexity of one token is one over its probability.
#[test]
fn logits_are_compared_as_distributions() {
    type Case<'a> = (&'a [f32], &'a [f32], Option<usize>, f64, f64, Option<[f64; 2]>);
    let none = f32::NEG_INFINITY;
    let cases: &[Case] = &[
        (&[0.0, 0.0], &[3f32.ln(), 0.0], Some(0), 0.143_841_036, 1.0, Some([2.0, 4.0 / 3.0])),
        (&[0.0, 0.0], &[0.0, 3f32.ln()], Some(1), 0.143_841_036, 0.0, Some([2.0, 4.0 / 3.0])),
        (&[none, 0.0], &[0.0, 0.0], None, std::f64::consts::LN_2, 0.0, None),
        (&[0.0, 0.0], &[none, 0.0], None, f64::INFINITY, 0.0, None),
        (&[1000.0, 1000.0], &[-1000.0, -1000.0], Some(7), 0.0, 1.0, None),
    ];
    for &(reference, test, next, kl, top1, perplexity) in cases {
        let mut found = Logits::default();
        found.feed(reference, test, next);
        assert!(found.kl() == kl || (found.kl() - kl).abs() < 1e-6, "{reference:?} {test:?}: {}", found.kl());
        assert_eq!(found.top1().to_bits(), top1.to_bits(), "{reference:?} {test:?}");
        let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-6;
        let same = match (found.perplexity(), perplexity) {
            (Some(a), Some(b)) => a.iter().zip(&b).all(near),
            (a, b) => a == b,
        };
        assert!(same, "{reference:?} {test:?}: {:?}", found.perplexity());
    }
}
