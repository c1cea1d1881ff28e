//! Samples in all their forms hold what numpy put there, and everything else is refused with a way out.
//!
//! The files are in `tests/data/samples`; the script beside them says what each one is.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use amax::error::{Kind, Result};
use amax::ir::{Model, Tensor, tensor_type};
use amax::onnx::{
    DataType, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TypeProto, ValueInfoProto, tensor_shape_proto,
    type_proto,
};
use amax::samples::{self, Options, Sample, SampleSet};
use prost::Message;
use serde_json::Value;

const DATA: &str = "tests/data/samples";

fn data_type(name: &str) -> DataType {
    DataType::ALL.into_iter().find(|t| t.name() == name).unwrap()
}

/// A dimension of a test model.
#[derive(Clone, Copy)]
enum Size<'a> {
    Fixed(i64),
    Free(&'a str),
    Nameless,
}

struct Input<'a> {
    name: &'a str,
    ty: TypeProto,
    default: bool,
}

fn input<'a>(name: &'a str, dtype: DataType, sizes: Option<&[Size]>) -> Input<'a> {
    let mut ty = tensor_type(dtype, sizes.map(|s| vec![None; s.len()]).as_deref());
    if let (Some(type_proto::Value::TensorType(tensor)), Some(sizes)) = (&mut ty.value, sizes) {
        for (dim, size) in tensor.shape.iter_mut().flat_map(|s| &mut s.dim).zip(sizes) {
            dim.value = match *size {
                Size::Fixed(n) => Some(tensor_shape_proto::dimension::Value::DimValue(n)),
                Size::Free(name) => Some(tensor_shape_proto::dimension::Value::DimParam(name.to_owned())),
                Size::Nameless => None,
            };
        }
    }
    Input { name, ty, default: false }
}

/// A model with these inputs, whose only node hands on the first.
fn model(inputs: &[Input]) -> Model {
    let info = |name: &str, ty: &TypeProto| ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(ty.clone()),
        ..ValueInfoProto::default()
    };
    let default = |name: &str| {
        let mut proto = Tensor::from_f32(&[2], &[1.0, 2.0]).proto().clone();
        proto.name = Some(name.to_owned());
        proto
    };
    let graph = GraphProto {
        name: Some("g".to_owned()),
        node: vec![NodeProto {
            op_type: Some("Identity".to_owned()),
            input: vec![inputs[0].name.to_owned()],
            output: vec!["out".to_owned()],
            ..NodeProto::default()
        }],
        input: inputs.iter().map(|i| info(i.name, &i.ty)).collect(),
        output: vec![info("out", &inputs[0].ty)],
        initializer: inputs.iter().filter(|i| i.default).map(|i| default(i.name)).collect(),
        ..GraphProto::default()
    };
    let proto = ModelProto {
        ir_version: Some(10),
        opset_import: vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(21) }],
        graph: Some(graph),
        ..ModelProto::default()
    };
    let folder = crate::support::folder();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, proto.encode_to_vec()).unwrap();
    amax::ir::file::load(&path).unwrap()
}

struct Cases {
    models: BTreeMap<String, Model>,
    cases: Vec<Value>,
}

fn cases() -> Cases {
    let text = std::fs::read_to_string(format!("{DATA}/cases.json")).unwrap();
    let Value::Object(mut document) = serde_json::from_str(&text).unwrap() else { panic!("not a table") };
    let models = document["models"].as_object().unwrap().iter().map(|(name, inputs)| {
        let inputs: Vec<Input> = inputs.as_array().unwrap().iter().map(described).collect();
        (name.clone(), model(&inputs))
    });
    let models = models.collect();
    let Some(Value::Array(cases)) = document.remove("cases") else { panic!("no cases") };
    Cases { models, cases }
}

/// An input as `cases.json` describes it.
fn described(value: &Value) -> Input<'_> {
    let sizes: Option<Vec<Size>> = value[2].as_array().map(|dims| {
        dims.iter().map(|d| d.as_i64().map_or_else(|| Size::Free(d.as_str().unwrap()), Size::Fixed)).collect()
    });
    let mut input = input(value[0].as_str().unwrap(), data_type(value[1].as_str().unwrap()), sizes.as_deref());
    input.default = value[3].as_bool().unwrap();
    input
}

fn open(path: &str, model: &Model) -> Result<SampleSet> {
    SampleSet::open(&Path::new(DATA).join(path), model)
}

/// The set of a case, with its options.
fn open_case(case: &Value, models: &BTreeMap<String, Model>) -> Result<SampleSet> {
    let preprocess = case["preprocess"].as_str().map(|path| Path::new(DATA).join(path));
    let dims = case["dims"].as_object().into_iter().flatten();
    let dims = dims.map(|(name, size)| (name.clone(), size.as_u64().unwrap() as usize)).collect();
    let path = Path::new(DATA).join(case["path"].as_str().unwrap());
    SampleSet::open_with(&path, &models[case["model"].as_str().unwrap()], &Options { preprocess, dims })
}

/// A tensor as `cases.json` writes it.
fn shown(tensor: &Tensor) -> Value {
    let content: Value = if tensor.dtype() == DataType::String {
        tensor.strings().iter().map(|s| String::from_utf8_lossy(s).into_owned()).collect()
    } else {
        tensor
            .raw()
            .iter()
            .fold(String::new(), |mut hex, byte| {
                write!(hex, "{byte:02x}").unwrap();
                hex
            })
            .into()
    };
    serde_json::json!([tensor.dtype().name(), tensor.dims(), content])
}

fn read_all(set: &SampleSet) -> Result<Vec<Sample>> {
    (0..set.len()).map(|i| set.get(i)).collect()
}

#[test]
fn every_form_holds_what_numpy_put_there() {
    let Cases { models, cases } = cases();
    let mut count = 0;
    for case in &cases {
        let Some(want) = case["samples"].as_array() else { continue };
        let path = case["path"].as_str().unwrap();
        let set = open_case(case, &models).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert_eq!(set.len(), want.len(), "{path}");
        // Backwards and twice: samples do not depend on what was read before.
        for index in (0..set.len()).rev().chain(0..set.len()) {
            let sample = set.get(index).unwrap_or_else(|e| panic!("{path}: {e}"));
            let got: serde_json::Map<_, _> = sample.iter().map(|(name, t)| (name.clone(), shown(t))).collect();
            assert_eq!(Value::Object(got), want[index], "{path}, sample {index}");
            let key: Vec<_> = sample.iter().map(|(name, t)| (name.clone(), t.dims())).collect();
            assert_eq!(set.shape_key(index), key, "{path}, sample {index}");
        }
        assert!(set.get(set.len()).is_err(), "{path}");
        assert!(set.shape_key(set.len()).is_empty(), "{path}");
        assert_eq!(set.content_hash().unwrap().len(), 64, "{path}");
        count += 1;
    }
    assert!(count > 60, "{count} cases");
}

#[test]
fn what_does_not_fit_is_refused_with_a_way_out() {
    let Cases { models, cases } = cases();
    let mut report = String::new();
    for case in cases.iter().filter(|c| c["samples"].is_null()) {
        let path = case["path"].as_str().unwrap();
        let error = open_case(case, &models)
            .and_then(|set| set.content_hash())
            .err()
            .unwrap_or_else(|| panic!("{path} was accepted"));
        let options: Vec<String> = ["preprocess", "dims"]
            .iter()
            .filter(|k| !case[**k].is_null())
            .map(|k| format!(", {k} {}", case[*k]))
            .collect();
        let documents = error.at().file.as_ref().is_some_and(|f| f.extension().is_some_and(|e| e == "toml"));
        let kind = match error.kind() {
            Kind::Usage if !options.is_empty() => Kind::Usage,
            _ if documents => Kind::Config,
            _ => Kind::Samples,
        };
        assert_eq!(error.kind(), kind, "{path}: {error}");
        writeln!(report, "{path} ({}{})\n{error}\n", case["model"].as_str().unwrap(), options.concat()).unwrap();
    }
    crate::snapshot::check("data/samples/refused.txt", &report);
}

#[test]
fn damage_is_found_wherever_it_is() {
    let Cases { models, .. } = cases();
    let folder = crate::support::folder();
    for (file, model) in [
        ("good/rows.npz", "rows"),
        ("good/deflated.npz", "rows"),
        ("good/tokens.npz", "tokens"),
        ("good/zip64.npz", "rows"),
        ("good/rows.npy", "rows"),
        ("good/typed.pb", "rows"),
    ] {
        let path = Path::new(DATA).join(file);
        let whole = std::fs::read(&path).unwrap();
        let want = read_all(&SampleSet::open(&path, &models[model]).unwrap()).unwrap();
        let copy = folder.path().join(path.file_name().unwrap());
        let attempt = |bytes: &[u8]| {
            std::fs::write(&copy, bytes).unwrap();
            let set = SampleSet::open(&copy, &models[model])?;
            set.content_hash()?;
            read_all(&set)
        };
        for length in (0..whole.len()).step_by(3) {
            // A message may end after any of its fields.
            let got = attempt(&whole[..length]).ok().filter(|got| *got != want || !file.ends_with("pb"));
            assert!(got.is_none(), "{file} cut to {length}");
        }
        for at in (0..whole.len()).step_by(3) {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 8);
            // Dates and the like may change; without a checksum the values may too. Nothing else may happen.
            if let Ok(got) = attempt(&damaged)
                && file.ends_with("npz")
            {
                assert_eq!(got.len(), want.len(), "{file} damaged at {at}");
                assert!(got == want, "{file} damaged at {at} reads otherwise");
            }
        }
    }
}

#[test]
fn the_hash_is_of_content_and_order() {
    let Cases { models, .. } = cases();
    let hash = |path: &str, model: &str| open(path, &models[model]).unwrap().content_hash().unwrap();
    let rows = hash("good/rows.npz", "rows");
    for same in ["deflated.npz", "fortran.npz", "big_endian.npz", "rows.npy", "zip64.npz", "extra.npz", "arr_0.npz"] {
        assert_eq!(hash(&format!("good/{same}"), "rows"), rows, "{same}");
    }
    assert_eq!(hash("good/tokens.npz", "tokens"), hash("good/onnx", "tokens"));
    let mut all: Vec<String> = vec![rows];
    for (other, model) in [
        ("float64.npz", "rows"),
        ("half.npy", "half"),
        ("one.npz", "rows"),
        ("many", "rows"),
        ("batch.npz", "batch"),
        ("tokens.npz", "tokens"),
        ("defaults.npz", "tokens"),
    ] {
        all.push(hash(&format!("good/{other}"), model));
    }
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 8);
}

/// Decoders fill what is missing with gray, which is no picture.
/// Arrays that lack an axis, or have them in another order, are refused with what to write.
#[test]
fn shapes_that_nearly_fit() {
    let fixed = [Size::Free("N"), Size::Fixed(1), Size::Fixed(8), Size::Fixed(8)];
    let colors = [Size::Free("N"), Size::Fixed(3), Size::Fixed(8), Size::Fixed(9)];
    for (sizes, shape, change) in [
        (fixed, &[64, 8, 8][..], "array[:, None, None]"),
        (fixed, &[1, 8, 8], "array[:, None]"),
        (fixed, &[8, 8], "array[None, None]"),
        (fixed, &[64, 1, 8, 8, 1], "numpy.moveaxis(array, -1, 1)"),
        (colors, &[64, 3, 1, 8, 9], ""),
        (colors, &[3, 8, 9], "array[None]"),
        (colors, &[64, 1, 8, 9, 3], "numpy.moveaxis(array, -1, 2)"),
        (colors, &[1, 8, 9, 3], "numpy.moveaxis(array, -1, 1)"),
        (colors, &[8, 9], ""),
        (colors, &[64, 3, 9, 8], ""),
    ] {
        let model = model(&[input("x", DataType::Float, Some(&sizes))]);
        let array = ndarray::ArrayD::<f32>::zeros(shape);
        let error = SampleSet::from_arrays(&model, [("x", array.into())]).unwrap_err();
        let hint = error.hint().unwrap();
        assert_eq!(
            hint.split(" would fit").next().filter(|start| *start != hint).unwrap_or_default(),
            change,
            "{shape:?}: {hint}"
        );
    }
}

#[test]
fn a_cut_jpeg_is_an_error() {
    let Cases { models, .. } = cases();
    let options = Options { preprocess: Some(Path::new(DATA).join("empty.toml")), ..Options::default() };
    let folder = crate::support::folder();
    let at = folder.path().join("image.jpg");
    for name in ["420.jpg", "444.jpg", "progressive.jpg"] {
        let whole = std::fs::read(Path::new(DATA).join("good/jpeg").join(name)).unwrap();
        let read = |bytes: &[u8]| {
            std::fs::write(&at, bytes).unwrap();
            SampleSet::open_with(&at, &models["pixels"], &options).and_then(|set| set.get(0))
        };
        let want = read(&whole).unwrap();
        // Cameras write more behind the picture.
        assert_eq!(read(&[&whole, &b"more"[..]].concat()).unwrap(), want, "{name}");
        for length in (2..whole.len()).step_by(101).chain([whole.len() - 2, whole.len() - 1]) {
            let error = read(&whole[..length]).err().unwrap_or_else(|| panic!("{name} cut to {length}"));
            assert_eq!(error.kind(), Kind::Samples, "{name} cut to {length}: {error}");
        }
    }
}

/// Decoders of JPEG differ in how they transform and how they stretch colors. Pillow's libjpeg-turbo made the pixels.
#[test]
fn another_decoder_of_jpeg_is_close() {
    let Cases { models, .. } = cases();
    let options = Options { preprocess: Some(Path::new(DATA).join("empty.toml")), ..Options::default() };
    let open = |folder: &str| {
        let path = Path::new(DATA).join("good").join(folder);
        read_all(&SampleSet::open_with(&path, &models["pixels"], &options).unwrap()).unwrap()
    };
    let (ours, theirs) = (open("jpeg"), open("jpeg_decoded"));
    assert_eq!((ours.len(), theirs.len()), (3, 3));
    // In order of names: colors at half the resolution, in full, progressive at half.
    for (at, limits) in [(8, 0.5), (3, 0.3), (8, 0.5)].iter().enumerate() {
        let (ours, theirs) = (ours[at]["image"].raw(), theirs[at]["image"].raw());
        let apart: Vec<u8> = ours.iter().zip(theirs.iter()).map(|(a, b)| a.abs_diff(*b)).collect();
        let (most, mean) = (apart.iter().max(), apart.iter().map(|&d| f64::from(d)).sum::<f64>() / apart.len() as f64);
        println!("jpeg {at}: at most {most:?}, mean {mean:.4}");
        assert!(most <= Some(&limits.0) && mean < limits.1, "{at}: {most:?}, {mean}");
    }
}

#[test]
fn the_hash_covers_preprocessing() {
    let Cases { models, .. } = cases();
    let folder = crate::support::folder();
    let hash = |toml: &str| {
        let path = folder.path().join("spec.toml");
        std::fs::write(&path, toml).unwrap();
        let options = Options { preprocess: Some(path), ..Options::default() };
        let images = Path::new(DATA).join("good/classes");
        SampleSet::open_with(&images, &models["nchw"], &options).unwrap().content_hash().unwrap()
    };
    let first = hash("crop = 8");
    assert_eq!(first, hash("crop = [8, 8]\nscale = \"1/255\""));
    let others = ["crop = 7", "crop = 8\nmean = 0.5", "crop = 8\ncolor = \"bgr\"", "crop = 8\nscale = 1"];
    assert!(others.iter().all(|toml| hash(toml) != first));
}

#[test]
fn preprocessing_beside_the_model_is_found() {
    let Cases { models, .. } = cases();
    let folder = crate::support::folder();
    let path = folder.path().join("net.onnx");
    amax::ir::file::save(&models["pixels"], &path).unwrap();
    std::fs::write(folder.path().join("net.preprocess.toml"), "crop = 5").unwrap();
    let set = open("good/classes", &amax::ir::file::load(&path).unwrap()).unwrap();
    assert_eq!(set.shape_key(1), [("image".to_owned(), vec![1, 3, 5, 5])]);
}

#[test]
fn threads_may_read_at_the_same_time() {
    let Cases { models, .. } = cases();
    for (path, model) in [("good/tokens_deflated.npz", "tokens"), ("good/fortran_deflated.npz", "rows")] {
        let want = read_all(&open(path, &models[model]).unwrap()).unwrap();
        let set = open(path, &models[model]).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (set, want) = (&set, &want);
                scope.spawn(move || {
                    for round in 0..50 {
                        let index = (thread + round) % want.len();
                        assert!(set.get(index).unwrap() == want[index], "{path}");
                    }
                });
            }
        });
    }
}

#[test]
fn sets_describe_themselves() {
    let Cases { models, .. } = cases();
    let describe = |path: &str, model: &str| open(path, &models[model]).unwrap().describe();
    assert_eq!(describe("good/rows.npz", "rows"), "4 samples of rows.npz");
    assert_eq!(describe("good/one.npz", "rows"), "1 sample of one.npz");
    assert_eq!(describe("good/ragged", "tokens"), "4 samples of ragged, with empty ids and 1 more like it");
    assert_eq!(SampleSet::random(&models["tokens"], 16, 3).unwrap().describe(), "16 random samples (seed 3)");
}

#[test]
fn not_a_number_is_let_through_and_counted() {
    let Cases { models, .. } = cases();
    let set = open("good/special.npz", &models["rows"]).unwrap();
    assert_eq!(samples::non_finite(&set.get(0).unwrap()), BTreeMap::from([("x".to_owned(), 3)]));
    assert_eq!(samples::non_finite(&set.get(1).unwrap()), BTreeMap::new());
}

#[test]
fn random_samples_are_a_function_of_their_seed() {
    use DataType::{Bfloat16, Bool, Double, Float, Float16, Int32, Int64, Uint8};
    use Size::{Fixed, Free, Nameless};
    let mut defaulted = input("weights", Float, Some(&[Fixed(2)]));
    defaulted.default = true;
    let model = model(&[
        input("image", Float, Some(&[Free("batch"), Fixed(3), Nameless, Free("width")])),
        input("ids", Int64, Some(&[Free("batch"), Free("seq")])),
        input("mask", Bool, Some(&[Fixed(-1), Free("seq")])),
        input("wide", Double, Some(&[Fixed(1000)])),
        input("half", Float16, Some(&[Free("seq"), Fixed(4)])),
        input("brain", Bfloat16, Some(&[])),
        input("pixel", Uint8, Some(&[Fixed(0), Fixed(2), Nameless, Nameless])),
        input("length", Int32, Some(&[Fixed(500)])),
        defaulted,
    ]);
    let set = SampleSet::random(&model, 3, 42).unwrap();
    let shapes: BTreeMap<String, Vec<usize>> = set.shape_key(2).into_iter().collect();
    let want = [
        ("brain", &[][..]),
        ("half", &[8, 4]),
        ("ids", &[1, 8]),
        ("image", &[1, 3, 64, 64]),
        ("length", &[500]),
        ("mask", &[1, 8]),
        ("pixel", &[1, 2, 8, 8]),
        ("wide", &[1000]),
    ];
    assert_eq!(shapes, want.into_iter().map(|(n, s)| (n.to_owned(), s.to_vec())).collect());
    let samples = read_all(&set).unwrap();
    let again = SampleSet::random(&model, 2, 42).unwrap();
    assert!(samples[1] == again.get(1).unwrap(), "a sample depends on how many there are");
    assert!(samples[0] != samples[1]);
    assert!(samples[0] != SampleSet::random(&model, 1, 43).unwrap().get(0).unwrap());
    assert_eq!(set.content_hash().unwrap(), SampleSet::random(&model, 3, 42).unwrap().content_hash().unwrap());

    let image = samples[0]["image"].to_f32().unwrap();
    let mean = image.iter().sum::<f32>() / image.len() as f32;
    let variance = image.iter().map(|v| v * v).sum::<f32>() / image.len() as f32;
    // 12 288 numbers: standard errors are 0.009 and 0.013.
    assert!(mean.abs() < 0.04 && (variance - 1.0).abs() < 0.06, "mean {mean}, variance {variance}");
    let lengths = samples[0]["length"].to_i64().unwrap();
    assert_eq!((lengths.iter().min(), lengths.iter().max()), (Some(&0), Some(&7)));
    assert!(samples[0]["mask"].raw().iter().all(|b| *b < 2));

    assert!(SampleSet::random(&model, 0, 0).is_err());
    let Cases { models, .. } = cases();
    for (name, why) in [("words", "values of type string"), ("unranked", "how many axes")] {
        let error = SampleSet::random(&models[name], 1, 0).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn inputs_that_are_not_tensors_are_refused() {
    let sequence = TypeProto {
        value: Some(type_proto::Value::SequenceType(type_proto::Sequence {
            elem_type: Some(Box::new(tensor_type(DataType::Float, None))),
        })),
        denotation: None,
    };
    let model = model(&[Input { name: "many", ty: sequence, default: false }]);
    let error = open("good/rows.npz", &model).unwrap_err().to_string();
    assert!(error.contains("samples can only give tensors") && error.contains("\"many\""), "{error}");
}

#[test]
fn samples_beside_the_model_are_found() {
    let folder = crate::support::folder();
    let model = folder.path().join("digits.v2.onnx");
    assert_eq!(samples::default_path(&model), None);
    let beside: PathBuf = folder.path().join("digits.v2.calib.npz");
    std::fs::create_dir(&beside).unwrap();
    assert_eq!(samples::default_path(&model), None, "a folder");
    std::fs::remove_dir(&beside).unwrap();
    std::fs::write(&beside, "").unwrap();
    assert_eq!(samples::default_path(&model), Some(beside));
    assert_eq!(samples::default_path(Path::new("/")), None);
}

/// Lines of tokens for a decoder: what is remembered of tokens before is empty, and the summary says so.
#[test]
fn caches_that_no_line_gives_are_empty() {
    let text = r#"<ir_version: 10, opset_import: ["": 21]>
    decoder (int64[b,s] input_ids, int64[b,t] attention_mask, float16["b",2,past,4] past_key_values_0_key, float[b,8,3] cache_window, bool use_cache_branch)
        => (int64[b,s] y) { y = Identity (input_ids) }"#;
    let model = crate::support::parsed(text);
    let folder = crate::support::folder();
    let path = folder.path().join("tokens.jsonl");
    std::fs::write(&path, "{\"input_ids\": [[1, 2, 3], [4, 5, 6]]}\n[7, 8]\n").unwrap();
    let set = SampleSet::open(&path, &model).unwrap();
    for (index, rows, tokens) in [(0, 2, 3), (1, 1, 2)] {
        let sample = set.get(index).unwrap();
        let of = |name: &str| &sample[name];
        assert_eq!(of("past_key_values_0_key").dims(), [rows, 2, 0, 4]);
        assert_eq!(of("past_key_values_0_key").dtype(), DataType::Float16);
        assert_eq!(of("cache_window").to_f32().unwrap(), vec![0.0; rows * 24]);
        assert_eq!(of("attention_mask").to_i64().unwrap(), vec![1; rows * tokens]);
        assert_eq!((of("use_cache_branch").dims(), &*of("use_cache_branch").raw()), (vec![], &[0u8][..]));
    }
    assert_eq!(set.describe(), "2 samples of tokens.jsonl, with empty past_key_values_0_key");
}

/// What numpy.save writes; `None` for what numpy has no type for.
fn npy(tensor: &Tensor) -> Option<Vec<u8>> {
    let code = match tensor.dtype() {
        DataType::Bool => "|b1",
        DataType::Int8 => "|i1",
        DataType::Int32 => "<i4",
        DataType::Int64 => "<i8",
        DataType::Uint8 => "|u1",
        DataType::Float16 => "<f2",
        DataType::Float => "<f4",
        DataType::Double => "<f8",
        _ => return None,
    };
    let dims: Vec<String> = tensor.dims().iter().map(|d| d.to_string() + ",").collect();
    let header = format!("{{'descr': '{code}', 'fortran_order': False, 'shape': ({}), }}\n", dims.concat());
    let length = u16::try_from(header.len()).unwrap().to_le_bytes();
    Some([b"\x93NUMPY\x01\0", &length[..], header.as_bytes(), &tensor.raw()].concat())
}

/// The stream of a set.
fn stream(set: &SampleSet) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for sample in read_all(set).unwrap() {
        for (name, tensor) in &sample {
            bytes.extend_from_slice(format!("{name}\n").as_bytes());
            bytes.extend_from_slice(&npy(tensor)?);
        }
        bytes.push(b'\n');
    }
    Some(bytes)
}

#[test]
fn a_stream_is_as_good_as_a_file() {
    let Cases { models, cases } = cases();
    let mut count = 0;
    for case in cases.iter().filter(|c| c["samples"].is_array()) {
        let (path, model) = (case["path"].as_str().unwrap(), &models[case["model"].as_str().unwrap()]);
        let set = open_case(case, &models).unwrap();
        let Some(bytes) = stream(&set) else { continue };
        let options = Options::default();
        let streamed = SampleSet::from_stream(&mut bytes.as_slice(), model, &options);
        let streamed = streamed.unwrap_or_else(|e| panic!("{path}: {e}"));
        assert_eq!(streamed.content_hash().unwrap(), set.content_hash().unwrap(), "{path}");
        assert!(read_all(&streamed).unwrap() == read_all(&set).unwrap(), "{path}");
        // A stream that is cut holds fewer samples, or is an error; it never holds others.
        for cut in (0..bytes.len()).step_by(bytes.len() / 50 + 1) {
            match SampleSet::from_stream(&mut &bytes[..cut], model, &options) {
                Ok(fewer) => assert!((0..fewer.len()).all(|i| fewer.get(i).unwrap() == set.get(i).unwrap()), "{path}"),
                Err(error) => assert_eq!(error.kind(), Kind::Samples, "{path}: {error}"),
            }
        }
        count += 1;
    }
    assert!(count > 20, "only {count} sets were streamed");
}

#[test]
fn what_is_no_stream_is_refused() {
    let Cases { models, .. } = cases();
    let whole = stream(&open("good/rows.npz", &models["rows"]).unwrap()).unwrap();
    let other = String::from_utf8_lossy(&whole).replacen("x\n", "y\n", 1);
    let pickled = b"x\n\x93NUMPY\x01\0\x40\0{'descr': '|O', 'fortran_order': False, 'shape': (1,), }        \n";
    let huge =
        b"x\n\x93NUMPY\x01\0\x50\0{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 99999999), }    \n";
    for (bytes, why) in [
        (&b""[..], "the stream holds no samples"),
        (b"PK\x03\x04", "the stream ends within a sample, or is not one of samples"),
        (b"x", "the stream ends within a sample"),
        (b"x\n", "truncated in its header"),
        (b"\n", "no array for this input"),
        (&whole[..whole.len() - 1], "the stream ends within a sample"),
        (&whole[..whole.len() - 3], "the array is truncated"),
        (other.as_bytes(), "no input \"y\""),
        (pickled, "Python objects"),
        (huge, "the array"),
    ] {
        let error = SampleSet::from_stream(&mut &*bytes, &models["rows"], &Options::default()).unwrap_err();
        assert!(error.kind() == Kind::Samples && error.to_string().contains(why), "{why}: {error}");
    }
}
