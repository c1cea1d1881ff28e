//! The textual form: what it prints, what it reads, what it refuses.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use amax::ir::text::{PrintOptions, parse, parse_with_fill, print, print_with};
use amax::ir::{Model, Tensor, file};
use amax::onnx::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto,
};
use prost::Message;
use proptest::prelude::*;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/text")
}

fn proto(model: &Model) -> ModelProto {
    let folder = tempfile::tempdir().unwrap();
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

const WHOLE: PrintOptions = PrintOptions { limit: usize::MAX, values: false, packed: false };

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

fn models(folder: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            models(&path, found);
        } else if path.extension().is_some_and(|e| e == "onnx") {
            found.push(path);
        }
    }
}

/// Every model below `tests/data/text`, and below the folder that `AMAX_TEXT_DIR` names.
/// With `AMAX_TEXT_OUT`, each text is left there for other tools to read.
#[test]
fn parse_undoes_print() {
    let mut paths = Vec::new();
    models(&data(), &mut paths);
    assert!(paths.len() >= 20, "{}", paths.len());
    if let Some(more) = std::env::var_os("AMAX_TEXT_DIR") {
        models(Path::new(&more), &mut paths);
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
