//! Forms of quantized constants: the same codes and scales, there and back.

use amax::convert::{Converted, Request, To, convert};
use amax::ir::text::parse;
use amax::ir::{Model, NodeId, Tensor};
use amax::numerics::{Format, Granularity, QParams, Round, dequantize, pack, quantize};
use amax::onnx::DataType;
use amax::ops::Form;
use amax::passes::Evaluate;
use amax::passes::forms::{Quantized, ZeroPoints, find_dequantized};
use amax::targets::Target;
use proptest::prelude::*;
use std::ops::ControlFlow;

/// A runtime that can run nothing.
struct NoRuntime;

impl Evaluate for NoRuntime {
    fn evaluate(&self, _: &Model, _: NodeId, _: &[Option<Tensor>]) -> Option<Vec<Tensor>> {
        None
    }
}

fn converted(model: &Model, into: &[To]) -> amax::Result<Converted> {
    let target = Target::load("ort-cpu").unwrap();
    let after: &dyn Fn(&Model, &str, &amax::passes::Outcome) -> amax::Result<ControlFlow<()>> =
        &|_, _, _| Ok(ControlFlow::Continue(()));
    convert(model, &Request { simulate: false, into, accuracy_level: 4, target: &target, evaluate: &NoRuntime, after })
}

const BITS: [(Format, usize); 6] = [
    (Format::Int2, 2),
    (Format::Uint2, 2),
    (Format::Int4, 4),
    (Format::Uint4, 4),
    (Format::Int8, 8),
    (Format::Uint8, 8),
];

/// A matrix with codes that are anything; of a granularity along or across its rows.
fn matrix() -> impl Strategy<Value = Quantized> {
    let share = prop_oneof![
        Just(Granularity::PerTensor),
        Just(Granularity::PerChannel { axis: 0 }),
        (4u32..9).prop_map(|log| Granularity::PerGroup { axis: 1, size: 1 << log }),
    ];
    (0usize..6, 1usize..9, 1usize..70, share, any::<bool>(), any::<u64>()).prop_map(
        |(at, rows, columns, share, zero, seed)| {
            let (format, bits) = BITS[at];
            let mut state = seed | 1;
            let mut random = move || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as u32
            };
            let dims = vec![rows, columns];
            let entries: usize = share.scale_dims(&dims).iter().product();
            let codes = (0..rows * columns).map(|_| (random() & ((1 << bits) - 1)) as u8).collect();
            let (low, high) = format.range();
            let signed_zero = zero && !format.is_signed();
            let zeros = (0..entries)
                .map(|_| if signed_zero { low + (random() % (high - low + 1) as u32) as i32 } else { 0 })
                .collect();
            Quantized {
                format,
                dims,
                granularity: share,
                scales: (0..entries).map(|_| f32::from_bits(0x3c00_0000 + random() % 0x0100_0000)).collect(),
                scale_dtype: DataType::Float,
                zero_points: ZeroPoints::Integers(zeros),
                codes,
            }
        },
    )
}

/// A model that reads a matrix `[K, N]` in a product and `[V, D]` in a table.
fn model(constant: &Quantized, op: &str) -> Model {
    let pair = constant.to_qdq().unwrap();
    let text = match op {
        "MatMul" => {
            "<ir_version: 13, opset_import: [\"\" : 25]>\nm (float[2,K] x) => (float[2,N] y) {\n  y = MatMul (x, x)\n}"
        }
        _ => "<ir_version: 13, opset_import: [\"\" : 25]>\nm (int64[2] x) => (float[2,N] y) {\n  y = Gather (x, x)\n}",
    };
    let mut model = parse(text).unwrap();
    let (graph, node) = (model.main(), model.graph(model.main()).nodes()[0]);
    let codes = model.add_initializer(graph, "w_quantized", pair.codes.clone());
    let scale = model.add_initializer(graph, "w_scale", pair.scale.clone());
    let zero = model.add_initializer(graph, "w_zero_point", pair.zero_point.clone());
    let new = amax::ir::NewNode::new("DequantizeLinear", "dq", &[codes, scale, zero], &["w"]);
    let dq = model.insert(amax::ir::Place::Before(node), pair.describe(new));
    let weight = model.node(dq).output(0);
    model.set_input(node, usize::from(op == "MatMul"), weight);
    model
}

/// What the only product or Gather of a model reads.
fn constant_of(model: &Model, input: usize) -> Quantized {
    let nodes = model.graph(model.main()).nodes();
    let node = *nodes.iter().find(|&&n| !model.node(n).is("DequantizeLinear")).unwrap();
    let (dq, exchanged) = find_dequantized(model, model.node(node).input(input).unwrap()).unwrap();
    assert!(!exchanged);
    Quantized::from_qdq(model, dq).unwrap()
}

/// With the scales of a granularity written out for each element, so that two of them can be held against each other.
fn spread(constant: &Quantized) -> (Vec<i32>, Vec<u32>, Vec<i32>) {
    let middle = if constant.format.is_signed() { 0 } else { 1 << (constant.format.bits() - 1) };
    let raw = pack::pack_bytes(&constant.codes, constant.format.bits());
    let codes = pack::unpack(&raw, &constant.format, constant.codes.len());
    let ZeroPoints::Integers(zeros) = &constant.zero_points else { panic!("floats") };
    let entry = |at| constant.granularity.entry(&constant.dims, at).unwrap();
    let all = 0..codes.len();
    let scales = all.clone().map(|at| constant.scales[entry(at)].to_bits()).collect();
    (codes.iter().map(|c| c - middle).collect(), scales, all.map(|at| zeros[entry(at)] - middle).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn products_come_back_as_they_were(constant in matrix()) {
        let stored = constant.transposed().unwrap();
        let there = converted(&model(&stored, "MatMul"), &[To::Form(Form::Matmulnbits)]).unwrap();
        prop_assert_eq!((there.changed.len(), there.kept.len()), (1, 0));
        let back = converted(&there.model, &[To::Form(Form::Qdq)]).unwrap();
        let back = constant_of(&back.model, 1);
        prop_assert_eq!(&back.format, &stored.format);
        prop_assert_eq!(spread(&back), spread(&stored));
        if matches!(stored.granularity, Granularity::PerGroup { .. }) && back.granularity == stored.granularity {
            prop_assert_eq!(back, stored);
        }
    }

    #[test]
    fn tables_come_back_as_they_were(constant in matrix()) {
        let there = converted(&model(&constant, "Gather"), &[To::Form(Form::GatherBlockQuantized)]).unwrap();
        let whole = (constant.dims[1] * constant.format.bits()).is_multiple_of(8);
        prop_assert_eq!(there.changed.len(), usize::from(whole || constant.format.bits() == 4));
        let back = converted(&there.model, &[To::Form(Form::Qdq)]).unwrap();
        let back = constant_of(&back.model, 0);
        prop_assert_eq!(&back.format, &constant.format);
        prop_assert_eq!(spread(&back), spread(&constant));
    }

    #[test]
    fn numbers_are_those_of_the_codes(constant in matrix()) {
        let ZeroPoints::Integers(zero_points) = constant.zero_points.clone() else { unreachable!() };
        let qparams = QParams { scales: constant.scales.clone(), zero_points };
        let raw = pack::pack_bytes(&constant.codes, constant.format.bits());
        let expected = dequantize(&raw, constant.format, &constant.dims, &constant.granularity, &qparams).unwrap();
        prop_assert_eq!(constant.values().unwrap(), expected.clone());
        let float = converted(&model(&constant, "Gather"), &[To::Float]).unwrap().model;
        let node = float.graph(float.main()).nodes()[0];
        prop_assert_eq!(float.constant_input(node, 0).and_then(Tensor::to_f32), Some(expected));
    }
}

#[test]
fn zero_points_between_codes_are_for_matmulnbits_alone() {
    let mut constant = Quantized {
        format: Format::Uint4,
        dims: vec![2, 16],
        granularity: Granularity::PerGroup { axis: 1, size: 16 },
        scales: vec![0.5, 0.25],
        scale_dtype: DataType::Float,
        zero_points: ZeroPoints::Floats(vec![7.5, 0.25]),
        codes: (0..32).map(|i| i % 16).collect(),
    };
    let blocks = constant.to_nbits().unwrap();
    assert_eq!(blocks.zero_points.unwrap().to_f32(), Some(vec![7.5, 0.25]));
    assert!(constant.to_qdq().unwrap_err().contains("zero points are no codes"));
    assert!(constant.to_gather(0).unwrap_err().contains("zero points are no codes"));
    let values = constant.values().unwrap();
    assert_eq!((values[0], values[15], values[17]), (-3.75, 3.75, 0.1875));
    constant.format = Format::Uint8;
    assert!(constant.to_nbits().unwrap_err().contains("8-bit codes with zero points between codes"));
}

#[test]
fn scales_keep_their_type() {
    let values: Vec<f32> = (0..64).map(|i| (i * 37 % 64) as f32 / 32.0 - 1.0).collect();
    let granularity = Granularity::PerGroup { axis: 1, size: 16 };
    let qparams = QParams::symmetric(vec![0.125, 0.25, 0.5, 1.0]);
    let raw = quantize(&values, &[2, 32], &granularity, &qparams, Format::Int4, Round::HalfEven).unwrap();
    let constant = Quantized {
        format: Format::Int4,
        dims: vec![2, 32],
        granularity,
        scales: qparams.scales,
        scale_dtype: DataType::Float16,
        zero_points: ZeroPoints::Integers(qparams.zero_points),
        codes: pack::unpack_bytes(&raw, 4, 64),
    };
    assert_eq!(constant.to_nbits().unwrap().scales.dtype(), DataType::Float16);
    assert_eq!(constant.to_gather(0).unwrap().scales.dtype(), DataType::Float16);
    assert_eq!(constant.to_qdq().unwrap().scale.dtype(), DataType::Float16);
}

#[test]
fn forms_that_exclude_each_other_are_refused() {
    let model = parse("<ir_version: 8, opset_import: [\"\" : 17]>\nm (float x) => (float y) { y = Abs (x) }").unwrap();
    let check = |into: &[To], fine: bool| assert_eq!(converted(&model, into).is_ok(), fine, "{into:?}");
    let [qdq, nbits, gather] = Form::ALL.map(To::Form);
    check(&[], true);
    check(&[nbits, gather], true);
    check(&[qdq], true);
    check(&[To::Float], true);
    check(&[qdq, nbits], false);
    check(&[To::Float, gather], false);
}
