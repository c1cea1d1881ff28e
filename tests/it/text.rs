//! The textual form: what it prints, what it reads, what it refuses.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::snapshot;
use amax::ir::text::{PrintOptions, parse, parse_with_fill, print, print_with};
use amax::ir::{Model, Tensor, file};
use amax::onnx::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto,
};
use proptest::prelude::*;
use prost::Message;

use crate::support::{models_below, root};

fn data() -> PathBuf {
    root("tests/data/text")
}

fn proto(model: &Model) -> ModelProto {
    let folder = crate::support::folder();
    let path = folder.path().join("m.onnx");
    file::save(model, &path).unwrap();
    let mut proto = ModelProto::decode(std::fs::read(&path).unwrap().as_slice()).unwrap();
    normal(&mut proto);
    proto
}

/// Takes away what the text does not carry, and makes absent and empty one.
fn normal(model: &mut ModelProto) {
    model.training_info.clear();
    model.configuration.clear();
    for import in &mut model.opset_import {
        import.domain.get_or_insert_default();
        import.version.get_or_insert_default();
    }
    for pair in &mut model.metadata_props {
        pair.key.get_or_insert_default();
        pair.value.get_or_insert_default();
    }
    model.graph.iter_mut().for_each(normal_graph);
    for function in &mut model.functions {
        let FunctionProto { attribute_proto, node, opset_import, domain, overload, value_info, metadata_props, .. } =
            function;
        attribute_proto.iter_mut().for_each(normal_attribute);
        node.iter_mut().for_each(normal_node);
        value_info.iter_mut().for_each(normal_info);
        metadata_props.clear();
        domain.get_or_insert_default();
        drop_empty(overload);
        for import in opset_import {
            import.domain.get_or_insert_default();
        }
    }
}

fn drop_empty(text: &mut Option<String>) {
    if text.as_deref() == Some("") {
        *text = None;
    }
}

fn normal_graph(graph: &mut GraphProto) {
    let GraphProto {
        node,
        name,
        initializer,
        sparse_initializer,
        doc_string,
        input,
        output,
        value_info,
        quantization_annotation,
        metadata_props,
    } = graph;
    name.get_or_insert_default();
    *doc_string = None;
    quantization_annotation.clear();
    metadata_props.clear();
    node.iter_mut().for_each(normal_node);
    initializer.iter_mut().for_each(normal_tensor);
    for sparse in sparse_initializer {
        sparse.values.iter_mut().chain(&mut sparse.indices).for_each(normal_tensor);
    }
    input.iter_mut().chain(output).chain(value_info).for_each(normal_info);
}

fn normal_node(node: &mut NodeProto) {
    let NodeProto {
        attribute,
        domain,
        overload,
        doc_string,
        metadata_props,
        device_configurations,
        input: _,
        output: _,
        name: _,
        op_type: _,
    } = node;
    drop_empty(domain);
    drop_empty(overload);
    *doc_string = None;
    metadata_props.clear();
    device_configurations.clear();
    attribute.iter_mut().for_each(normal_attribute);
}

fn normal_attribute(attr: &mut AttributeProto) {
    attr.doc_string = None;
    attr.t.iter_mut().chain(&mut attr.tensors).for_each(normal_tensor);
    attr.g.iter_mut().chain(&mut attr.graphs).for_each(normal_graph);
    for sparse in attr.sparse_tensor.iter_mut().chain(&mut attr.sparse_tensors) {
        sparse.values.iter_mut().chain(&mut sparse.indices).for_each(normal_tensor);
    }
    attr.tp.iter_mut().chain(&mut attr.type_protos).for_each(normal_type);
}

fn normal_info(info: &mut ValueInfoProto) {
    info.name.get_or_insert_default();
    info.doc_string = None;
    info.metadata_props.clear();
    info.r#type.iter_mut().for_each(normal_type);
    if info.r#type.as_ref().is_some_and(|t| t.value.is_none()) {
        info.r#type = None;
    }
}

fn normal_type(ty: &mut TypeProto) {
    use amax::onnx::type_proto::Value;
    ty.denotation = None;
    match &mut ty.value {
        Some(Value::TensorType(t)) => {
            for dim in t.shape.iter_mut().flat_map(|s| &mut s.dim) {
                dim.denotation = None;
            }
        }
        Some(Value::SequenceType(s)) => s.elem_type.iter_mut().for_each(|t| normal_type(t)),
        Some(Value::OptionalType(o)) => o.elem_type.iter_mut().for_each(|t| normal_type(t)),
        Some(Value::MapType(m)) => m.value_type.iter_mut().for_each(|t| normal_type(t)),
        Some(Value::SparseTensorType(_) | Value::OpaqueType(_)) | None => {}
    }
}

fn normal_tensor(tensor: &mut TensorProto) {
    let TensorProto { name, doc_string, metadata_props, segment, .. } = tensor;
    drop_empty(name);
    *doc_string = None;
    metadata_props.clear();
    *segment = None;
    let Ok(checked) = Tensor::from_proto(tensor.clone(), None) else { return };
    if checked.dtype().bits().is_some() {
        tensor.raw_data = Some(checked.raw());
        tensor.int32_data.clear();
        tensor.int64_data.clear();
        tensor.uint64_data.clear();
        tensor.float_data.clear();
        tensor.double_data.clear();
    }
    tensor.data_location = None;
}

const WHOLE: PrintOptions = PrintOptions { limit: usize::MAX, values: false, portable: false };

/// Takes away the names of tensors in attributes that need quotes.
fn unquotable(model: &mut ModelProto) {
    fn graph(proto: &mut GraphProto) {
        proto.node.iter_mut().for_each(node);
    }
    fn node(proto: &mut NodeProto) {
        for attr in &mut proto.attribute {
            let sparse = attr.sparse_tensor.iter_mut().chain(&mut attr.sparse_tensors);
            let parts = sparse.flat_map(|s| s.values.iter_mut().chain(&mut s.indices));
            for tensor in attr.t.iter_mut().chain(&mut attr.tensors).chain(parts) {
                let plain = |n: &String| {
                    n.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
                        && !n.starts_with(|c: char| c.is_ascii_digit())
                };
                tensor.name = tensor.name.take().filter(plain);
            }
            attr.g.iter_mut().chain(&mut attr.graphs).for_each(graph);
        }
    }
    model.graph.iter_mut().for_each(graph);
    model.functions.iter_mut().flat_map(|f| &mut f.node).for_each(node);
}

/// The first lines that differ.
fn difference(got: &ModelProto, want: &ModelProto) -> String {
    let (got, want) = (format!("{got:#?}"), format!("{want:#?}"));
    let at = got.lines().zip(want.lines()).position(|(a, b)| a != b).unwrap_or(0);
    let part = |text: &str| text.lines().skip(at.saturating_sub(4)).take(9).collect::<Vec<_>>().join("\n");
    format!("got\n{}\nwanted\n{}", part(&got), part(&want))
}

/// Prints in every form and reads back.
fn round_trip(model: &Model) -> Result<(), String> {
    let want = proto(model);
    for options in [WHOLE, PrintOptions::portable(), PrintOptions { values: true, ..WHOLE }] {
        let text = print_with(model, &options);
        let back = parse(&text).map_err(|e| format!("{options:?}: {e}"))?;
        let again = print_with(&back, &options);
        if again != text {
            return Err(format!("{options:?}: printing is not stable\n{text}\n{again}"));
        }
        let got = proto(&back);
        let mut want = want.clone();
        if options.portable {
            unquotable(&mut want);
        }
        // As bytes: a NaN is not equal to itself.
        if got.encode_to_vec() != want.encode_to_vec() {
            return Err(format!("{options:?}: another model\n{}", difference(&got, &want)));
        }
    }
    let text = print(model);
    let filled = parse_with_fill(&text).map_err(|e| format!("filled: {e}"))?;
    if print(&filled) != text {
        return Err("the filled model prints differently".to_owned());
    }
    Ok(())
}

/// Every model below `tests/data/text`, and below the folder that `AMAX_TEXT_DIR` names.
/// With `AMAX_TEXT_OUT`, each text is left there for other tools to read.
#[test]
fn parse_undoes_print() {
    let mut paths = models_below(&data());
    assert!(paths.len() >= 20, "{}", paths.len());
    if let Some(more) = std::env::var_os("AMAX_TEXT_DIR") {
        paths.extend(models_below(Path::new(&more)));
    }
    let out = std::env::var_os("AMAX_TEXT_OUT").map(PathBuf::from);
    let (mut failed, mut refused) = (String::new(), 0);
    for path in &paths {
        let model = match file::load(path) {
            Ok(model) => model,
            Err(error) => {
                println!("{}: {error}", path.display());
                refused += 1;
                continue;
            }
        };
        if let Some(out) = &out {
            let name = path.to_string_lossy().replace(['/', '\\'], "~");
            std::fs::write(out.join(format!("{name}.txt")), print_with(&model, &PrintOptions::portable())).unwrap();
        }
        if let Err(why) = round_trip(&model) {
            let why: String = why.chars().take(4000).collect();
            writeln!(failed, "{}: {why}", path.display()).unwrap();
        }
    }
    println!("{} models, {refused} not loaded", paths.len());
    assert!(failed.is_empty(), "{failed}");
}

/// Texts of `onnx.printer` give the model that was printed; more of them lie in the folder that `AMAX_TEXT_OFFICIAL`
/// names, with full paths of their models as names.
#[test]
fn reads_what_onnx_prints() {
    let texts = |folder: &Path| -> Vec<PathBuf> {
        let mut found: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        found.retain(|p| p.to_string_lossy().ends_with(".official.txt"));
        found.sort();
        found
    };
    let mut paths: Vec<(PathBuf, PathBuf)> =
        texts(&data()).into_iter().map(|text| (text.with_extension("").with_extension("onnx"), text)).collect();
    assert!(paths.len() >= 10, "{}", paths.len());
    if let Some(more) = std::env::var_os("AMAX_TEXT_OFFICIAL") {
        paths.extend(texts(Path::new(&more)).into_iter().map(|text| {
            let name = text.file_name().unwrap().to_string_lossy().replace('~', "/");
            (PathBuf::from(name.strip_suffix(".official.txt").unwrap()), text)
        }));
    }
    let mut failed = String::new();
    for (model, text) in &paths {
        let mut want = proto(&file::load(model).unwrap());
        // The official printer leaves these out.
        for function in &mut want.functions {
            function.attribute_proto.clear();
            function.value_info.clear();
            function.doc_string = None;
        }
        match parse(&std::fs::read_to_string(text).unwrap()) {
            Ok(got) if proto(&got).encode_to_vec() == want.encode_to_vec() => {}
            Ok(got) => writeln!(failed, "{}: {}", text.display(), difference(&proto(&got), &want)).unwrap(),
            Err(error) => writeln!(failed, "{}: {error}", text.display()).unwrap(),
        }
    }
    println!("{} texts", paths.len());
    assert!(failed.is_empty(), "{failed}");
}

const HEAD: &str = "<ir_version: 10, opset_import: [\"\": 21, \"t\": 1]>\n";

/// A text without its header reads as `want` prints.
fn reads(text: &str, want: &str) {
    let model = parse(&format!("{HEAD}{text}")).unwrap_or_else(|e| panic!("{text}: {e}"));
    let printed = print_with(&model, &WHOLE);
    let body = printed.split_once(">\n").unwrap().1;
    assert_eq!(body.trim_end(), want, "{text}");
}

#[test]
fn reads_every_spelling() {
    let node = |line: &str| format!("g (float x) => (y) {{\n  {line}\n}}");
    for (line, want) in [
        ("y = Relu(x)", "y = Relu (x)"),
        ("y=Relu(x,)", "y = Relu (x)"),
        ("\"y\" = Relu (\"x\") # comment\n # and more {", "y = Relu (x)"),
        ("y = t.Op (,x)", "y = t.Op (\"\", x)"),
        ("y = t.Op (x,,x)", "y = t.Op (x, \"\", x)"),
        ("y,, = t.Op (,)", "y, \"\" = t.Op (\"\")"),
        ("[] y = t.Op ()", "[\"\"] y = t.Op ()"),
        ("[ \"a/b\" ] y = t.Op:v ()", "[\"a/b\"] y = t.Op:v ()"),
        ("y = t.Op () <a = 1>", "y = t.Op <a = 1> ()"),
        ("y = t.Op <a: float = 1, b: floats = [-0, 2]> ()", "y = t.Op <a = 1.0, b = [-0.0, 2.0]> ()"),
        (
            "y = t.Op <a = 1., b = 1E3, c = -Infinity, d = NaN> ()",
            "y = t.Op <a = 1.0, b = 1000.0, c = -inf, d = nan> ()",
        ),
        ("y = t.Op <a = -nan, b = nan(0x7f800001)> ()", "y = t.Op <a = -nan, b = nan(0x7f800001)> ()"),
        ("y = t.Op <a: int = [3]> ()", "y = t.Op <a = [3]> ()"),
        ("y = t.Op <a: ints = [], b: type_protos = []> ()", "y = t.Op <a: ints = [], b: type_protos = []> ()"),
        ("y = t.Op <a = \"q\\\"\\\\\\n\"> ()", "y = t.Op <a = \"q\\\"\\\\n\"> ()"),
        ("y = t.Op <a = hex\"FF00\", b = hex\"6869\"> ()", "y = t.Op <a = hex\"ff00\", b = \"hi\"> ()"),
        ("y = t.Op <a = float[2] t = {1, 2}> ()", "y = t.Op <a = float[2] t {1, 2}> ()"),
        ("y = t.Op <a = float {1}, b = float[N]> ()", "y = t.Op <a = float {1}, b = float[N]> ()"),
        ("y = t.Op <a = seq(map(int64, float[]))> ()", "y = t.Op <a = seq(map(int64, float[]))> ()"),
        ("y = t.Op <a = @b, c: ints = @\"d e\"> ()", "y = t.Op <a = @b, c: ints = @\"d e\"> ()"),
        ("y = ai.onnx.Relu (x)", "y = ai.onnx.Relu (x)"),
    ] {
        reads(&node(line), &node(want));
    }
    reads(
        "g (float[1] x = {3}) => (float y) {y=Relu(x)}",
        "g (float[1] x) => (float y) <\n  float[1] x = {3}\n> {\n  y = Relu (x)\n}",
    );
    reads("\"\" () => () <> {}", "\"\" () => () {\n}");
}

/// One tensor as text and its raw bytes.
#[test]
fn reads_elements() {
    for (text, bytes) in [
        ("float[3] w = {1, -0, 1e-45}", &b"\0\0\x80\x3f\0\0\0\x80\x01\0\0\0"[..]),
        ("double w = {0.1}", &[0x9a, 0x99, 0x99, 0x99, 0x99, 0x99, 0xb9, 0x3f]),
        ("float16[4] w = {15360, 1.0, 65519.0, -inf}", &[0, 0x3c, 0, 0x3c, 0xff, 0x7b, 0, 0xfc]),
        ("float16[2] w = {0.1, 1.00048828125}", &[0x66, 0x2e, 0, 0x3c]),
        ("bfloat16[3] w = {1.0, 16256, 3.140625}", &[0x80, 0x3f, 0x80, 0x3f, 0x49, 0x40]),
        ("float8e4m3fn[5] w = {1.0, 448.0, 56, nan, -0.0}", &[0x38, 0x7e, 0x38, 0x7f, 0x80]),
        ("float8e4m3fnuz[3] w = {1.0, 240.0, -nan}", &[0x40, 0x7f, 0x80]),
        ("float8e5m2[4] w = {1.0, 57344.0, inf, -inf}", &[0x3c, 0x7b, 0x7c, 0xfc]),
        ("float8e5m2fnuz[2] w = {1.0, 57344.0}", &[0x40, 0x7f]),
        ("float8e8m0[3] w = {1.0, 0.5, nan}", &[127, 126, 255]),
        ("float4e2m1[3] w = {0.5, -6.0, 2}", &[0xf1, 0x02]),
        ("float6e2m3[4] w = {1.0, 7.5, -7.5, 1}", &[0xc8, 0xf7, 0x07]),
        ("float6e3m2[1] w = {28.0}", &[0x1f]),
        ("int4[3] w = {-8, 7, -1}", &[0x78, 0x0f]),
        ("int4[3] w = {120, 15}", &[0x78, 0x0f]),
        ("int4[1] w = {-1}", &[0x0f]),
        ("uint4[2] w = {15, 1}", &[0x1f]),
        ("uint4[2] w = {31}", &[0x1f]),
        ("int2[5] w = {-2, -1, 0, 1, 1}", &[0x4e, 0x01]),
        ("uint2[4] w = {0, 1, 2, 3}", &[0xe4]),
        ("int8[2] w = {-128, 127}", &[0x80, 0x7f]),
        ("uint16 w = {65535}", &[0xff, 0xff]),
        ("uint32 w = {4294967295}", &[0xff; 4]),
        ("uint64 w = {18446744073709551615}", &[0xff; 8]),
        ("int64 w = {-9223372036854775808}", &[0, 0, 0, 0, 0, 0, 0, 0x80]),
        ("bool[2] w = {1, 0}", &[1, 0]),
        ("complex64[1] w = {1, -2}", &[0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]),
        ("float[2, 0] w = {}", &[]),
    ] {
        let model = parse(&format!("{HEAD}g () => () <{text}> {{}}")).unwrap_or_else(|e| panic!("{text}: {e}"));
        let value = model.value_named("w").unwrap();
        assert_eq!(model.constant(value).unwrap().raw(), bytes, "{text}");
    }
}

#[test]
fn refuses_with_position() {
    let mut report = String::new();
    for text in [
        "",
        "g",
        "g (float x) => (y) { y = Relu (x }",
        "g (float x) => (y) {\n  y = Relu (x)\n  z = \u{e9}\n}",
        "g (float x) = > (y) {}",
        "g (float x,) => (y) {}",
        "g (floaty x) => (y) {}",
        "g () => () <float[2] w = {1}> {}",
        "g () => () <float[2] w = {1, 2, x}> {}",
        "g () => () <float[2] w = {1, 1e39}> {}",
        "g () => () <float[2] w = {1, 2e}> {}",
        "g () => () <float[N] w = {1}> {}",
        "g () => () <float[] w = {1}> {}",
        "g () => () <float[-1] w = {}> {}",
        "g () => () <seq(float) w = {}> {}",
        "g () => () <w = {}> {}",
        "g () => () <float[4294967296,4294967296,2] w = {...}> {}",
        "g () => () <float[64,3,3,3] w = ...> {}",
        "g () => () <float[2] w = [\"location\": \"w.bin\"]> {}",
        "g () => () <uint8[2] w = {1, 256}> {}",
        "g () => () <int4[3] w = {1, 2, 16}> {}",
        "g () => () <int4[3] w = {1, 2, -9}> {}",
        "g () => () <int32 w = {1.5}> {}",
        "g () => () <float8e4m3fn w = {0.1}> {}",
        "g () => () <string w = {1}> {}",
        "g () => () { = t.Op <a = []> () }",
        "g () => () { = t.Op <a = [1, 2.5]> () }",
        "g () => () { = t.Op <a: int = 2.5> () }",
        "g () => () { = t.Op <a: integer = 2> () }",
        "g () => () { = t.Op <a = 99999999999999999999> () }",
        "g () => () { = t.Op <a = \"open> () }",
        "g () => () { = t.Op <a = hex\"f\"> () }",
        "g () => () { = t.Op <a = nan(0x1)> () }",
        "g () => () { = \"Op\" }",
        "g () => () {} f",
        "<ir_version: 10, opset: []> g () => () {}",
        "<ir_version: \"10\"> g () => () {}",
        "g () => () { y = Relu (nothing) }",
        "g () => () { = nowhere.Op () }",
        "g (float x) => (y) { y = Relu (x) y = Relu (x) }",
    ] {
        let text = if text.starts_with('<') { text.to_owned() } else { format!("{HEAD}{text}") };
        let error = parse(&text).expect_err(&text);
        assert_eq!(error.kind(), amax::error::Kind::Model, "{text}");
        writeln!(report, "{error}\n").unwrap();
    }
    snapshot::check("data/text/snapshots/refuses_with_position.txt", &report);
}

#[test]
fn refuses_deep_nesting() {
    for (open, close) in [("seq(", ")"), ("optional(", ")"), ("map(int64, ", ")")] {
        let deep = |n: usize| format!("{HEAD}g ({}float{} x) => () {{}}", open.repeat(n), close.repeat(n));
        parse(&deep(60)).unwrap();
        let error = parse(&deep(100_000)).unwrap_err();
        assert!(error.message().contains("nest more than 64 deep"), "{error}");
    }
    let deep =
        |n: usize| format!("{HEAD}g () => () {{ {} }}", "= t.Op <a = b () => () {".repeat(n) + &"}> ()".repeat(n));
    parse(&deep(60)).unwrap();
    assert!(parse(&deep(100_000)).unwrap_err().message().contains("nest more than 64 deep"));
}

#[test]
fn fills_elided_tensors_the_same_each_time() {
    let text = format!(
        "{HEAD}g () => () <float[64,3,3,3] a = {{...}}, float[64,3,3,3] b = ..., int4[5] c = ..., float16[9] d = ..., \
         int64[40] e = ..., float8e5m2[999] f = ..., bool[40] g = ..., string[2] h = ...> {{ = t.Op <v = float[99] ...> () }}"
    );
    let model = parse_with_fill(&text).unwrap();
    let tensor = |name: &str| model.constant(model.value_named(name).unwrap()).unwrap().clone();
    let a = tensor("a").to_f32().unwrap();
    assert!(a.iter().all(|v| (-1.0..1.0).contains(v)));
    let mean = a.iter().sum::<f32>() / a.len() as f32;
    let variance = a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32;
    assert!(mean.abs() < 0.05 && (variance - 1.0 / 3.0).abs() < 0.03, "{mean} {variance}");
    assert_ne!(tensor("a").raw(), tensor("b").raw());
    assert!(tensor("e").to_i64().unwrap().iter().all(|v| (-128..128).contains(v)));
    assert!(tensor("f").raw().iter().all(|code| code & 0x7c != 0x7c), "not finite");
    assert!(tensor("g").raw().iter().all(|&b| b < 2));
    // Fixtures rely on these numbers.
    let text = format!(
        "{HEAD}g () => () <float[3] a = ..., int4[5] c = ..., float16[3] d = ..., uint8[4] u = ..., string[2] h = ...> {{}}"
    );
    let printed = print_with(&parse_with_fill(&text).unwrap(), &PrintOptions { values: true, ..WHOLE });
    snapshot::check("data/text/snapshots/fills_elided_tensors_the_same_each_time.txt", &printed);
}

#[test]
fn prints_as_before() {
    for name in ["attributes", "floats", "functions", "initializers", "names", "typed", "test_loop13_seq"] {
        let model = file::load(&data().join(name).with_extension("onnx")).unwrap();
        snapshot::check(&format!("data/text/snapshots/{name}.txt"), &print(&model));
    }
    let model = file::load(&data().join("dtypes.onnx")).unwrap();
    let values = print_with(&model, &PrintOptions { values: true, ..PrintOptions::default() });
    snapshot::check("data/text/snapshots/values.txt", &values);
    let portable = print_with(&model, &PrintOptions { portable: true, ..PrintOptions::default() });
    snapshot::check("data/text/snapshots/portable.txt", &portable);
}

/// Inputs that do not fit on a line are listed.
#[test]
fn wraps_long_lists() {
    let inputs: Vec<String> = (0..8).map(|i| format!("float[batch,{i}] past_key_values_{i}")).collect();
    let text = format!("g ({}) => () {{}}", inputs.join(", "));
    reads(&text, &format!("g (\n  {}\n) => () {{\n}}", inputs.join(",\n  ")));
}

fn corpus() -> Vec<String> {
    let paths = models_below(&data());
    paths.iter().map(|p| print_with(&file::load(p).unwrap(), &WHOLE)).collect()
}

proptest! {
    #![proptest_config(crate::random_cases(400))]

    #[test]
    fn any_text_is_read_or_refused(text in "\\PC*") {
        let _ = parse(&text);
    }

    #[test]
    fn any_tokens_are_read_or_refused(tokens in prop::collection::vec(prop::sample::select(vec![
        "<", ">", "(", ")", "{", "}", "[", "]", "=", "=>", ",", ":", ".", "...", "@", "\"", "\"a\"", "\\", "#", "\n", "-",
        "1", "1.5", "1e", "nan", "nan(0x", "hex\"", "inf", "a", "g () => () {", "float", "int4[3]", "float[2] w = {", "seq(",
        "sparse_tensor(float[3])", "opaque(", "ir_version", "opset_import: [", "?", "\u{e9}", "string",
    ]), 0..40)) {
        for separator in ["", " "] {
            let text = tokens.join(separator);
            let _ = parse_with_fill(&text);
            let _ = parse(&format!("{HEAD}g (float x) => (x) <{text}"));
            let _ = parse(&format!("{HEAD}g (float x) => (x) {{ y = t.Op <a = {text}"));
        }
    }

    /// A mutated text gives an error, or a model whose text is stable.
    #[test]
    fn mutated_text_is_stable(
        which in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..4usize), 1..4),
    ) {
        thread_local!(static TEXTS: Vec<String> = corpus());
        let mut text: Vec<char> = TEXTS.with(|t| which.get(t).chars().collect());
        for (at, from, kind) in edits {
            if text.is_empty() {
                break;
            }
            let (at, from) = (at.index(text.len()), from.index(text.len()));
            match kind {
                0 => { text.remove(at); }
                1 => { let c = text[from]; text.insert(at, c); }
                2 => text[at] = text[from],
                _ => text.truncate(at.max(1)),
            }
        }
        let text: String = text.into_iter().collect();
        if let Ok(model) = parse(&text) {
            let printed = print_with(&model, &WHOLE);
            let again = parse(&printed).map_err(|e| TestCaseError::fail(format!("{text}\n---\n{printed}\n---\n{e}")))?;
            prop_assert_eq!(print_with(&again, &WHOLE), printed);
            prop_assert!(proto(&again).encode_to_vec() == proto(&model).encode_to_vec());
        }
    }

    #[test]
    fn every_float_survives(bits in any::<u32>(), wide in any::<u64>(), small in any::<u16>()) {
        for values in [false, true] {
            let text = format!("{HEAD}g () => () <float a = {{0}}> {{}}");
            let mut model = parse(&text).unwrap();
            let graph = model.main();
            let all = [
                Tensor::new(amax::onnx::DataType::Float, &[], bits.to_le_bytes().to_vec()),
                Tensor::new(amax::onnx::DataType::Double, &[], wide.to_le_bytes().to_vec()),
                Tensor::new(amax::onnx::DataType::Float16, &[], small.to_le_bytes().to_vec()),
                Tensor::new(amax::onnx::DataType::Bfloat16, &[], small.to_le_bytes().to_vec()),
            ];
            let ids: Vec<_> = all.iter().map(|t| model.add_initializer(graph, "w", t.clone())).collect();
            let back = parse(&print_with(&model, &PrintOptions { values, ..WHOLE })).unwrap();
            for (id, tensor) in ids.iter().zip(&all) {
                let same = back.value_named(model.value(*id).name()).unwrap();
                prop_assert_eq!(back.constant(same).unwrap().raw(), tensor.raw());
            }
        }
    }
}
