//! Block formats and small floats, from the scale of a block to the size of the file.

#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test fails by panicking, and bits are compared on purpose"
)]

use amax::config::Config;
use amax::convert::Convert;
use amax::ir::text::parse;
use amax::ir::{Model, Tensor, file};
use amax::numerics::{
    self, ElementRange, Format, Granularity, MxRounding, QParams, Round, TwoLevel, decode_float8e8m0, e8m0_scale, pack,
};
use amax::onnx::DataType;
use amax::plan::{Knowledge, plan};
use amax::rewrite::Rewrite;
use amax::targets::{self, Target};
use serde_json::Value;

use crate::support::vectors;

fn numbers(value: &Value) -> Vec<f32> {
    let number = |v: &Value| v.as_str().map_or_else(|| v.as_f64().unwrap() as f32, |text| text.parse().unwrap());
    value.as_array().unwrap().iter().map(number).collect()
}

fn codes(value: &Value) -> Vec<i32> {
    numbers(value).into_iter().map(|v| v as i32).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Scales, codes and numbers of torchao and ModelOpt. Where a block is so small that its scale would be 2^-127, torchao
/// divides by twice what it multiplies with; there the result only has to be nearer.
#[test]
fn blocks_as_torchao_and_modelopt() {
    let document = vectors("block_scales.json");
    let mut checked = 0;
    for case in document["cases"].as_array().unwrap() {
        let said = |key: &str| case[key].as_str().unwrap_or_default().to_owned();
        let name = format!("{} {} {} {}", said("tool"), said("kind"), said("format"), said("mode"));
        let format = Format::parse(&said("format")).unwrap();
        let x = numbers(&document["inputs"][said("x")]);
        let size = usize::try_from(case["block"].as_u64().unwrap()).unwrap();
        let amax: Vec<f32> = x.chunks(size).map(|b| b.iter().fold(0f32, |m, v| m.max(v.abs()))).collect();
        let elements = ElementRange::new(format);
        let (found, scales) = if said("kind") == "nvfp4" {
            let least = case["least"].as_f64().map(|l| l as f32);
            let found = TwoLevel::new(&amax, elements, least);
            assert_eq!(
                f64::from(found.tensor_scale),
                f64::from(numbers(&Value::Array(vec![case["whole"].clone()]))[0])
            );
            let scales = found.effective();
            (found.codes, scales)
        } else {
            let mode = MxRounding::ALL.into_iter().find(|m| m.name() == said("mode")).unwrap();
            let found: Vec<u8> = amax.iter().map(|&amax| e8m0_scale(amax, elements, mode)).collect();
            let scales = found.iter().map(|&code| decode_float8e8m0(code)).collect();
            (found, scales)
        };
        let found: Vec<i32> = found.into_iter().map(i32::from).collect();
        assert_eq!(found, codes(&case["scale"]), "{name}: scales");
        if case["q"].is_null() {
            continue;
        }
        let (dims, granularity) = ([x.len() / size, size], Granularity::PerGroup { axis: 1, size });
        let qparams = QParams { zero_points: vec![0; scales.len()], scales };
        let raw = numerics::quantize(&x, &dims, &granularity, &qparams, format, Round::HalfEven).unwrap();
        let back = numerics::dequantize(&raw, format, &dims, &granularity, &qparams).unwrap();
        let (due, kept) = (codes(&case["q"]), pack::unpack(&raw, &format, x.len()));
        let theirs = (!case["dq"].is_null()).then(|| numbers(&case["dq"]));
        for (block, &amax) in amax.iter().enumerate() {
            let at = block * size..(block + 1) * size;
            let tiny = amax > 0.0 && found[block] == 0;
            let error = |values: &[f32]| -> f64 {
                let pairs = values[at.clone()].iter().zip(&x[at.clone()]);
                pairs.map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).sum()
            };
            if tiny {
                assert!(theirs.as_ref().is_none_or(|theirs| error(&back) <= error(theirs)), "{name}: block {block}");
                continue;
            }
            assert_eq!(kept[at.clone()], due[at.clone()], "{name}: codes of block {block}");
            if let Some(theirs) = &theirs {
                // ModelOpt's numbers have no negative zero.
                let plain = |values: &[f32]| bits(&values.iter().map(|v| v + 0.0).collect::<Vec<_>>());
                assert_eq!(plain(&back[at.clone()]), plain(&theirs[at.clone()]), "{name}: block {block}");
            }
            checked += 1;
        }
    }
    assert!(checked > 100, "{checked}");
    // ModelOpt's table.
    let e4m3 = ElementRange::new(Format::Float8e4m3fn);
    let table = [(1.0, 119), (448.0, 127), (449.0, 128), (3.5, 120), (1e-40, 0)];
    assert!(table.iter().all(|&(amax, code)| e8m0_scale(amax, e4m3, MxRounding::Rceil) == code));
}

/// Each way of rounding against its definition in f64.
#[test]
fn powers_of_two_are_as_defined() {
    let formats = [
        (Format::Float8e4m3fn, 448.0, 8, 3),
        (Format::Float8e5m2, 57344.0, 15, 2),
        (Format::Float8e4m3fnuz, 240.0, 7, 3),
        (Format::Float6e2m3, 7.5, 2, 3),
        (Format::Float6e3m2, 28.0, 4, 2),
        (Format::Float4e2m1, 6.0, 2, 1),
        (Format::Int8, 127.0, 6, 6),
        (Format::Int4, 7.0, 2, 2),
        (Format::Int2, 1.0, 0, 0),
    ];
    for (format, max, exponent, mantissa_bits) in formats {
        let elements = ElementRange::new(format);
        assert_eq!(elements, ElementRange { max, exponent, mantissa_bits }, "{format}");
        let edges =
            (-120..120).flat_map(|e| [1.0, 1.5, f64::from(max), 1.75, 1.9375].map(|m| (m * 2f64.powi(e)) as f32));
        for amax in edges.flat_map(|a| [a.next_down(), a, a.next_up()]).filter(|a| a.is_normal()) {
            let exact = f64::from(amax);
            let floor = |x: f64| (-400..400).rev().find(|&e| 2f64.powi(e) <= x).unwrap();
            let ceil = |x: f64| (-400..400).find(|&e| 2f64.powi(e) >= x).unwrap();
            // To the precision of the elements, half up.
            let step = 2f64.powi(floor(exact) - i32::try_from(mantissa_bits).unwrap());
            let rounded = (exact / step + 0.5).floor() * step;
            let due = [
                (MxRounding::Floor, floor(exact) - exponent),
                (MxRounding::Rceil, ceil(exact / f64::from(max))),
                (MxRounding::Ceil, ceil(exact) - exponent),
                (MxRounding::Even, floor(rounded) - exponent),
            ];
            for (mode, due) in due {
                let code = e8m0_scale(amax, elements, mode);
                assert_eq!(i32::from(code) - 127, due.clamp(-127, 127), "{format} {amax:e} {}", mode.name());
            }
        }
        for mode in MxRounding::ALL {
            assert_eq!(e8m0_scale(0.0, elements, mode), 0, "a block of zeros");
            assert_eq!(e8m0_scale(f32::NAN, elements, mode), 255);
        }
    }
    for code in 0..=254u8 {
        assert_eq!(numerics::encode_float8e8m0(decode_float8e8m0(code)), Some(code));
    }
    assert_eq!(numerics::encode_float8e8m0(3.0), None);
}

#[test]
fn two_levels_have_their_limits() {
    let elements = ElementRange::new(Format::Float4e2m1);
    let found = TwoLevel::new(&[2688.0, 6.0, 0.0, 1e-6], elements, None);
    assert_eq!(found.tensor_scale, 1.0);
    assert_eq!(found.effective(), [448.0, 1.0, 1.0, 1.0 / 512.0]);
    let torchao = TwoLevel::new(&[2688.0, 6.0, 0.0, 1e-6], elements, Some(1.0 / 64.0));
    assert_eq!(torchao.effective(), [448.0, 1.0, 1.0 / 64.0, 1.0 / 64.0]);
    for amax in [vec![0.0; 3], vec![f32::MIN_POSITIVE; 2], vec![1e-44], vec![f32::MAX, 1.0], vec![]] {
        let scales = TwoLevel::new(&amax, elements, None).effective();
        assert!(scales.iter().all(|s| s.is_normal() && *s > 0.0), "{amax:?} {scales:?}");
    }
}

/// A product with a matrix of `rows` times `columns`, of values between -1 and 1.
fn product(rows: usize, columns: usize) -> Model {
    let text = format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[n,{rows}] x) => (float[n,{columns}] y) <float[{rows},{columns}] w = ...> {{\n  [fc] y = MatMul (x, w)\n}}"
    );
    amax::ir::text::parse_with_fill(&text).unwrap()
}

fn rewritten(model: &Model, config: &str, target: &Target) -> Model {
    let config = Config::parse(config).unwrap_or_else(|e| panic!("{e}\n{config}"));
    Rewrite::new(model).config(&config).target(target).measure(false).run().unwrap_or_else(|e| panic!("{e}")).model
}

/// Dtype, bits of an element with its share of the scales, opset, IR version.
const BLOCKS: [(&str, f64, i64, i64); 7] = [
    ("mxfp8", 8.25, 24, 12),
    ("mxfp8e5m2", 8.25, 24, 12),
    ("mxfp6e2m3", 6.25, 28, 14),
    ("mxfp6e3m2", 6.25, 28, 14),
    ("mxfp4", 4.25, 24, 12),
    ("mxint8", 8.25, 24, 12),
    ("nvfp4", 4.5, 23, 11),
];

#[test]
fn files_have_the_size_that_formats_say() {
    // 1 MB in float.
    let (rows, columns) = (512, 512);
    let model = product(rows, columns);
    let plain = |dtype: &'static str, bits: f64, opset: i64, ir: i64| (dtype, bits, opset, ir, "per-tensor");
    let cases = BLOCKS.map(|(dtype, bits, opset, ir)| (dtype, bits, opset, ir, "per-group")).into_iter().chain([
        plain("int8", 8.0, 17, 8),
        plain("uint8", 8.0, 17, 8),
        plain("int16", 16.0, 21, 10),
        plain("uint16", 16.0, 21, 10),
        plain("int4", 4.0, 21, 10),
        plain("uint4", 4.0, 21, 10),
        plain("int2", 2.0, 25, 13),
        plain("uint2", 2.0, 25, 13),
        plain("float8e4m3fn", 8.0, 19, 9),
        plain("float8e4m3fnuz", 8.0, 19, 9),
        plain("float8e5m2", 8.0, 19, 9),
        plain("float8e5m2fnuz", 8.0, 19, 9),
        plain("float6e2m3", 6.0, 28, 14),
        plain("float6e3m2", 6.0, 28, 14),
        plain("float4e2m1", 4.0, 23, 11),
    ]);
    let generic = Target::load("generic").unwrap();
    for (dtype, bits, opset, ir, share) in cases {
        let granularity = if share == "per-tensor" { "granularity = \"per-tensor\"" } else { "" };
        let config = format!("[default]\ninput.enable = false\n[default.weight]\ndtype = \"{dtype}\"\n{granularity}");
        let made = rewritten(&model, &config, &generic);
        assert_eq!((made.opset(), made.ir_version()), (Some(opset), ir), "{dtype}");
        assert_eq!(targets::check::violations(&made, &generic), Vec::<String>::new(), "{dtype}");
        let bytes = file::to_bytes(&made).unwrap().len() as f64;
        let due = bits * (rows * columns) as f64 / 8.0;
        // Names, shapes and operators take a kilobyte, of a quarter of a megabyte and more.
        assert!(
            bytes >= due && bytes <= due.mul_add(1.01, 600.0) && (bits < 3.0 || bytes <= due * 1.01),
            "{dtype}: {bytes} bytes, {due} due"
        );
    }
}

/// Weights as they are stored, read back by hand, are those that the simulation has as floats.
#[test]
fn stored_and_simulated_weights_are_one() {
    let model = product(96, 40);
    let x = model.constant(model.value_named("w").unwrap()).unwrap().to_f32().unwrap();
    let generic = Target::load("generic").unwrap();
    let ort = Target::load("ort-cpu").unwrap().simulated();
    for (dtype, ..) in BLOCKS {
        for mode in MxRounding::ALL {
            if dtype == "nvfp4" && mode != MxRounding::Rceil {
                continue;
            }
            let rounding = if dtype == "nvfp4" { String::new() } else { format!("mx_rounding = \"{}\"", mode.name()) };
            let config = format!("[default]\ninput.enable = false\n[default.weight]\ndtype = \"{dtype}\"\n{rounding}");
            let stored = rewritten(&model, &config, &generic);
            let simulated = rewritten(&model, &config, &ort);
            assert_eq!((simulated.opset(), simulated.ir_version()), (Some(17), 8), "{dtype}");
            let operand = |model: &Model| {
                let reader = model.producer(model.value_named("y").unwrap()).unwrap();
                model.node(reader).input(1).unwrap()
            };
            let floats = simulated.constant(operand(&simulated)).unwrap().to_f32().unwrap();

            let node = stored.producer(operand(&stored)).unwrap();
            let [codes, scale] = [0, 1].map(|index| stored.constant_input(node, index));
            let codes = codes.unwrap();
            let format = codes.dtype().format().unwrap();
            let size = if dtype == "nvfp4" { 16 } else { 32 };
            assert_eq!(stored.node(node).int("axis"), Some(0));
            assert_eq!(stored.node(node).int("block_size"), Some(size));
            assert_eq!(stored.node(node).input(2), None);
            let scales: Vec<f32> = if let Some(scale) = scale {
                assert_eq!(scale.dtype(), DataType::Float8e8m0);
                assert_eq!(stored.node(node).int("output_dtype"), Some(1));
                scale.raw().iter().map(|&code| decode_float8e8m0(code)).collect()
            } else {
                let above = stored.producer(stored.node(node).input(1).unwrap()).unwrap();
                let [scale, whole] = [0, 1].map(|index| stored.constant_input(above, index).unwrap());
                assert_eq!((scale.dtype(), whole.dims()), (DataType::Float8e4m3fn, vec![]));
                let whole = whole.to_f32().unwrap()[0];
                scale.raw().iter().map(|&code| Format::Float8e4m3fn.decode(code.into()) * whole).collect()
            };
            let size = usize::try_from(size).unwrap();
            let by_hand: Vec<f32> = pack::unpack(&codes.raw(), &format, codes.len())
                .into_iter()
                .enumerate()
                .map(|(at, code)| format.decode(code) * scales[at / 40 / size * 40 + at % 40])
                .collect();
            assert_eq!(bits(&by_hand), bits(&floats), "{dtype} {}", mode.name());
            // Nothing is further off than half a step of the coarsest binade, or than the saturation of `floor`.
            let amax = x.iter().fold(0f32, |m, v| m.max(v.abs()));
            assert!(by_hand.iter().zip(&x).all(|(a, b)| (a - b).abs() <= amax / 2.0), "{dtype}");
        }
    }
}

/// What a target has no kernels for is refused, and the ways out are named.
#[test]
fn refusals_name_the_ways_out() {
    let model = product(64, 32);
    let refused = |target: &str, config: &str| {
        let config = Config::parse(config)
            .and_then(|config| plan(&model, &config, &Target::load(target).unwrap(), &Knowledge::default()).map(drop));
        config.expect_err("this should be refused").to_string()
    };
    for (dtype, ..) in BLOCKS {
        let error = refused("ort-cpu", &format!("[default.weight]\ndtype = \"{dtype}\""));
        assert!(error.contains("--simulate") && error.contains("--target generic") && error.contains(dtype), "{error}");
    }
    let group = "granularity = \"per-group\"\ngroup_size = 16";
    let cases = [
        ("generic", "[default.weight]\ndtype = \"mxfp4\"\nmx_rounding = \"up\"".to_owned(), "rceil"),
        (
            "generic",
            "[default.weight]\ndtype = \"nvfp4\"\nmx_rounding = \"floor\"".to_owned(),
            "no power-of-two scales",
        ),
        ("generic", "[default.weight]\nmx_rounding = \"floor\"".to_owned(), "only power-of-two scales of blocks"),
        ("generic", "[default.weight]\ndtype = \"mxfp4\"\ngroup_size = 16".to_owned(), "blocks of 32"),
        ("generic", "[default.weight]\ndtype = \"mxint8\"\nsymmetric = false".to_owned(), "no zero point"),
        ("generic", "[default.weight]\ndtype = \"mxfp4\"\neps = 0.1".to_owned(), "2^-127"),
        (
            "generic",
            "[default.weight]\ndtype = \"int4\"\nscale_dtype = \"float8e8m0\"".to_owned(),
            "require granularity",
        ),
        ("generic", format!("[default.weight]\ndtype = \"uint4\"\nscale_dtype = \"float8e8m0\"\n{group}"), "no sign"),
        ("ort-cpu", format!("[default.weight]\ndtype = \"int4\"\nscale_dtype = \"float8e8m0\"\n{group}"), "--simulate"),
        ("generic", "[default.input]\ndtype = \"mxfp8\"\ndynamic = false".to_owned(), "each time the model runs"),
        ("generic", "[default.input]\ndtype = \"mxfp8\"\nobserver = \"mse\"".to_owned(), "largest magnitude"),
        ("generic", "[op_type.MatMul.output]\ndtype = \"mxfp8\"".to_owned(), "for inputs only"),
        (
            "generic",
            "[default.input]\ndtype = \"int8\"\nscale_dtype = \"float8e8m0\"".to_owned(),
            "only in block formats",
        ),
    ];
    for (target, config, part) in cases {
        let error = refused(target, &config);
        assert!(error.contains(part), "{config}\n{error}\ndoes not say \"{part}\"");
    }
}

/// Scales of 8 bits are no privilege of the block formats that have names.
#[test]
fn groups_of_integers_can_have_small_scales() {
    let model = product(64, 32);
    let generic = Target::load("generic").unwrap();
    for (scale, opset) in [("float8e8m0", 24), ("float8e4m3fn", 21)] {
        let config = format!(
            "[default]\ninput.enable = false\n[default.weight]\ndtype = \"int4\"\ngranularity = \"per-group\"\ngroup_size = 16\nscale_dtype = \"{scale}\""
        );
        let made = rewritten(&model, &config, &generic);
        assert_eq!(made.opset(), Some(opset));
        let stored = made.value_named("w_scale").and_then(|v| made.constant(v)).map(Tensor::dtype);
        assert_eq!(stored.map(|d| d.to_string()).as_deref(), Some(scale));
    }
}

#[cfg(feature = "tract")]
mod runs {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use amax::runtime::{Observe, Options, Session};

    use super::*;

    struct Nobody;

    impl Observe for Nobody {
        fn see(&self, _site: usize, _values: &[f32], _shape: &[usize]) {}
    }

    fn run(model: &Model, x: &Tensor) -> Vec<f32> {
        let sample = BTreeMap::from([("x".to_owned(), x.clone())]);
        let observe: Arc<dyn Observe> = Arc::new(Nobody);
        let session = Session::with_options(model, &[], Options::default()).unwrap_or_else(|e| panic!("{e}"));
        let outputs = session.run(&sample, &observe).unwrap_or_else(|e| panic!("{e}"));
        outputs[0].1.to_f32().unwrap()
    }

    /// A product with the unit matrix: what comes out is the activation as it is quantized.
    fn through(rows: usize) -> Model {
        let unit: Vec<String> =
            (0..rows * rows).map(|at| if at / rows == at % rows { "1" } else { "0" }.to_owned()).collect();
        let text = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[n,{rows}] x) => (float[n,{rows}] y) <float[{rows},{rows}] w = {{{}}}> {{\n  [fc] y = MatMul (x, w)\n}}",
            unit.join(",")
        );
        parse(&text).unwrap()
    }

    /// Values of every magnitude, some of them ties and powers of two.
    fn values(count: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        (0..count)
            .map(|at| {
                let wide = 2f32.powi(i32::try_from(random() % 20).unwrap() - 10);
                let fine = if at % 3 == 0 { (random() % 64) as f32 / 16.0 } else { random() as f32 / 1e9 };
                let sign = if random() % 2 == 0 { 1.0 } else { -1.0 };
                if at / 64 == 3 { 0.0 } else { sign * fine * wide }
            })
            .collect()
    }

    #[test]
    fn activations_in_blocks_are_as_defined() {
        let model = through(64);
        let x = values(64 * 30);
        let input = Tensor::from_f32(&[30, 64], &x);
        let generic = Target::load("generic").unwrap();
        let ort = Target::load("ort-cpu").unwrap().simulated();
        for (dtype, ..) in BLOCKS {
            for mode in MxRounding::ALL {
                let two_level = dtype == "nvfp4";
                if two_level && mode != MxRounding::Rceil {
                    continue;
                }
                let rounding = if two_level { String::new() } else { format!("mx_rounding = \"{}\"", mode.name()) };
                let config = format!(
                    "[default]\noutput.enable = false\nweight.dtype = \"float8e4m3fn\"\n[default.input]\ndtype = \"{dtype}\"\n{rounding}"
                );
                let format = dtype_format(dtype);
                let size = if two_level { 16 } else { 32 };
                let amax: Vec<f32> = x.chunks(size).map(|b| b.iter().fold(0f32, |m, v| m.max(v.abs()))).collect();
                let elements = ElementRange::new(format);
                let scales = if two_level {
                    TwoLevel::new(&amax, elements, None).effective()
                } else {
                    amax.iter().map(|&a| decode_float8e8m0(e8m0_scale(a, elements, mode))).collect()
                };
                let mut due = x.clone();
                let qparams = QParams { zero_points: vec![0; scales.len()], scales };
                let granularity = Granularity::PerGroup { axis: 1, size };
                numerics::fake_quantize_nd(&mut due, &[x.len() / size, size], &granularity, &qparams, format).unwrap();
                for (target, again) in [(&generic, false), (&ort, false), (&generic, true)] {
                    let made = rewritten(&model, &config, target);
                    let made = if again { converted(&made) } else { made };
                    let got = run(&made, &input);
                    // A sum with zeros has no negative zero.
                    let plain = |values: &[f32]| bits(&values.iter().map(|v| v + 0.0).collect::<Vec<_>>());
                    assert_eq!(plain(&got), plain(&due), "{dtype} {} {} {}", mode.name(), target.name, target.simulate);
                }
            }
        }
    }

    /// A saved model, its quantizers as float operators.
    fn converted(model: &Model) -> Model {
        let saved = file::from_bytes(file::to_bytes(model).unwrap()).unwrap();
        let target = Target::load("generic").unwrap();
        let done = Convert::new(&saved).simulate(true).target(&target).run().unwrap_or_else(|e| panic!("{e}"));
        // Scales per block are computed by operators, and are no quantizers to name.
        let left: Vec<_> = done
            .kept
            .iter()
            .filter(|note| !matches!(note.what, amax::reason::Reason::LeftAsOperators { .. }))
            .collect();
        assert!(left.is_empty(), "every quantizer has become float operators: {left:?}");
        done.model
    }

    fn dtype_format(dtype: &str) -> Format {
        match dtype {
            "mxfp8" => Format::Float8e4m3fn,
            "mxfp8e5m2" => Format::Float8e5m2,
            "mxfp6e2m3" => Format::Float6e2m3,
            "mxfp6e3m2" => Format::Float6e3m2,
            "mxint8" => Format::Int8,
            _ => Format::Float4e2m1,
        }
    }

    /// Every finite float16 through every format with one scale, as float operators.
    #[test]
    fn simulated_formats_are_exact() {
        let model = through(8);
        let x: Vec<f32> = (0..=u16::MAX).map(|b| half::f16::from_bits(b).to_f32()).filter(|v| v.is_finite()).collect();
        let input = Tensor::from_f32(&[x.len() / 8, 8], &x);
        for format in Format::ALL.into_iter().filter(|&f| f != Format::Int32) {
            for scale in [1.0f32, 0.37] {
                let config = format!(
                    "[default]\noutput.enable = false\nweight.enable = false\n[default.input]\ndtype = \"{format}\"\n[op_type.MatMul.input]\nenable = true\n[tensor.x]\nscale = {scale:?}"
                );
                let made = rewritten(&model, &config, &Target::load("generic").unwrap().simulated());
                let ops: Vec<&str> = made.graph(made.main()).nodes().iter().map(|&n| made.node(n).op_type()).collect();
                assert!(ops.contains(&"Round") && ops.iter().all(|op| !op.contains("Quantize")), "{format}: {ops:?}");
                let middle = if format.is_integer() && !format.is_signed() { 1 << (format.bits() - 1) } else { 0 };
                let mut due = x.clone();
                let got = run(&made, &input);
                let best = [0, middle].into_iter().any(|zero| {
                    due.copy_from_slice(&x);
                    numerics::fake_quantize(&mut due, scale, zero, format);
                    got.iter().zip(&due).all(|(a, b)| a == b)
                });
                assert!(best, "{format} {scale}");
            }
        }
    }
}
