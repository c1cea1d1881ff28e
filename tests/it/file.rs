//! Model files: what is refused and how, external data in and out, whole files or none, memory.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use amax::error::Kind;
use amax::ir::file::{self, External, SaveOptions};
use amax::ir::{Attr, Model, NewNode, NodeId, Place, Tensor, content_hash, tensor_type, verify};
use amax::onnx::{
    AttributeProto, Bytes, DataType, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
    TensorProto, ValueInfoProto,
};
use proptest::prelude::*;
use prost::Message;

use crate::support::{folder, names_in, root};

fn data(name: &str) -> PathBuf {
    root("tests/data/roundtrip").join(name)
}

/// The name of the data file of a model.
fn data_of(folder: &Path, model: &str) -> String {
    let names = names_in(folder);
    let is_data =
        |n: &&String| n.starts_with(&format!("{model}.")) && Path::new(n).extension().is_some_and(|e| e == "data");
    let mut data = names.iter().filter(is_data);
    let found = data.next().unwrap_or_else(|| panic!("{model} has no data file: {names:?}")).clone();
    assert_eq!(data.next(), None, "{names:?}");
    found
}

/// `y = x·w0·w1·…`, for matrices of `width` × `width` floats.
fn layers(count: usize, width: usize) -> Model {
    let mut model = Model::new("layers", 10, 21);
    let main = model.main();
    let mut at = model.add_input(main, "x", tensor_type(DataType::Float, Some(&[None, Some(width)])));
    for layer in 0..count {
        let weights: Vec<f32> = (0..width * width).map(|i| (i * (layer + 1)) as f32).collect();
        let w = model.add_initializer(main, &format!("w{layer}"), Tensor::from_f32(&[width, width], &weights));
        let node = NewNode::new("MatMul", format!("layer{layer}"), &[at, w], &[&format!("h{layer}")]);
        let node = model.insert(Place::Last(main), node);
        at = model.node(node).output(0).unwrap();
    }
    model.add_output(main, at);
    model
}

fn proto(nodes: Vec<NodeProto>, outputs: &[&str]) -> ModelProto {
    let info = |name: &str| ValueInfoProto { name: Some(name.into()), ..ValueInfoProto::default() };
    ModelProto {
        ir_version: Some(10),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(21) }],
        graph: Some(GraphProto {
            node: nodes,
            name: Some("g".into()),
            input: vec![info("x")],
            output: outputs.iter().map(|o| info(o)).collect(),
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    }
}

fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        input: inputs.iter().map(|&i| i.into()).collect(),
        output: vec![output.into()],
        name: Some(format!("make_{output}")),
        op_type: Some(op.into()),
        ..NodeProto::default()
    }
}

/// Keys and values of `external_data`.
type Entries<'a> = &'a [(&'a str, &'a str)];

fn with_external(entries: Entries<'_>, dims: &[i64]) -> ModelProto {
    let mut model = proto(vec![node("Add", &["x", "w"], "y")], &["y"]);
    let entry =
        |&(key, value): &(&str, &str)| StringStringEntryProto { key: Some(key.into()), value: Some(value.into()) };
    model.graph.as_mut().unwrap().initializer.push(TensorProto {
        name: Some("w".into()),
        data_type: Some(1),
        dims: dims.to_vec(),
        data_location: Some(1),
        external_data: entries.iter().map(entry).collect(),
        ..TensorProto::default()
    });
    model
}

#[track_caller]
fn refused(result: amax::Result<Model>, parts: &[&str]) {
    let Err(error) = result else { panic!("not refused: {parts:?}") };
    assert_eq!(error.kind(), Kind::Model, "{error}");
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{text}\n  lacks {part:?}");
    }
}

#[test]
fn files_that_are_no_models_are_refused_with_a_way_out() {
    let good = fs::read(data("weights.onnx")).unwrap();
    let bytes_of = |model: ModelProto| model.encode_to_vec();
    let version = |ir: Option<i64>| bytes_of(ModelProto { ir_version: ir, ..proto(vec![], &[]) });
    let opset = |version| {
        let import = OperatorSetIdProto { domain: Some("ai.onnx".into()), version: Some(version) };
        bytes_of(ModelProto { opset_import: vec![import], ..proto(vec![], &[]) })
    };
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n";
    let mut not_utf8 = proto(vec![node("Relu", &["x"], "yy")], &["yy"]).encode_to_vec();
    let at = not_utf8.windows(4).position(|w| w == b"Relu").unwrap();
    not_utf8[at] = 0xff;
    let cases: &[(&str, Vec<u8>, &[&str])] = &[
        ("empty", vec![], &["the file is empty", "hint: the download"]),
        ("lfs", lfs.into(), &["git-lfs pointer", "git lfs pull"]),
        ("text", b"just some text\n".into(), &["text file", "name the .onnx file"]),
        ("zip", b"PK\x03\x04aaaaaaaaaaaaaaaa".into(), &["zip archive", "torch.onnx.export"]),
        ("safetensors", b"\x10\0\0\0\0\0\0\0{\"a\":1}".into(), &["safetensors"]),
        ("html", b"<!DOCTYPE html><html></html>".into(), &["web page"]),
        ("zeros", vec![0; 100], &["not an ONNX model", "byte 0"]),
        ("noise", vec![0xff; 100], &["not an ONNX model"]),
        ("cut", good[..good.len() / 2].into(), &["truncated", "\"graph\"", "get the file again"]),
        ("cut late", good[..good.len() - 1].into(), &["truncated", "opset_import", "1 bytes"]),
        ("no graph", bytes_of(ModelProto { graph: None, ..proto(vec![], &[]) }), &["the model has no graph"]),
        ("new IR", version(Some(15)), &["IR version 15 is not supported", "1 to 14", "update amax"]),
        ("no IR", version(None), &["no IR version"]),
        ("new opset", opset(29), &["opset 29 is not supported", "7 to 28", "update amax"]),
        ("old opset", opset(6), &["opset 6 is not supported", "7 to 28", "version_converter"]),
        ("not UTF-8", not_utf8, &["not an ONNX model", "UTF-8"]),
    ];
    let folder = folder();
    for (name, bytes, parts) in cases {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let parts: Vec<&str> = parts.iter().copied().chain([path.to_str().unwrap()]).collect();
        refused(file::load(&path), &parts);
    }
    assert_eq!(names_in(folder.path()).len(), cases.len());
}

#[test]
fn paths_that_are_no_files_are_refused_with_a_way_out() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("resnet50.onnx"), b"x").unwrap();
    fs::create_dir(at("sub")).unwrap();
    fs::write(at("sub/model.onnx"), b"x").unwrap();
    fs::create_dir(at("bare")).unwrap();
    refused(file::load(&at("resnet5O.onnx")), &["does not exist", "did you mean", "resnet50.onnx"]);
    refused(file::load(&at("Resnet-50.ONNX")), &["did you mean", "resnet50.onnx"]);
    refused(file::load(&at("entirely different")), &["does not exist", "no file of a similar name"]);
    refused(file::load(&at("no/where.onnx")), &["does not exist", "there is no folder"]);
    refused(file::load(&at("sub")), &["is a folder", "did you mean", "sub/model.onnx"]);
    refused(file::load(&at("bare")), &["is a folder", "name the .onnx file"]);
    refused(file::load(Path::new("/dev/zero")), &["/dev/zero is not a regular file"]);
}

#[test]
fn a_model_cut_anywhere_is_an_error() {
    let good = fs::read(data("kitchen_sink.onnx")).unwrap();
    for len in 0..good.len() {
        let Ok(model) = file::from_bytes(good[..len].to_vec()) else { continue };
        // What follows the graph may be cut off between two fields, and the rest still be a model.
        assert!(file::to_bytes(&model).unwrap() == good[..len], "{len}");
    }
}

#[test]
fn fields_that_a_save_would_lose_are_refused() {
    let good = proto(vec![node("Relu", &["x"], "y")], &["y"]);
    let with = |field: &[u8]| [&good.encode_to_vec()[..], field].concat();
    assert!(file::from_bytes(with(&[])).is_ok());
    // A varint in field 30, and a message in field 27, of the model.
    refused(file::from_bytes(with(&[0xf0, 1, 5])), &["the model has field 30 at byte", "IR version 14"]);
    refused(file::from_bytes(with(&[0xda, 1, 0])), &["the model has field 27", "DiscardUnknownFields"]);
    // A group, and a known field of another wire type.
    refused(file::from_bytes(with(&[0x0b, 0x0c])), &["not an ONNX model", "wire type"]);
    refused(file::from_bytes(with(&[0x0d, 0, 0, 0, 0])), &["\"ir_version\" has wire type 5"]);
    // Field 11 of the node.
    let mut inner = node("Relu", &["x"], "y").encode_to_vec();
    inner.extend([0x5a, 0]);
    let graph = [&[0x0a, inner.len() as u8][..], &inner].concat();
    let model = [&[0x08, 10, 0x3a, graph.len() as u8][..], &graph].concat();
    refused(file::from_bytes(model), &["\"graph.node\" has field 11"]);
}

fn nested(depth: usize) -> Vec<u8> {
    let mut graph = GraphProto { name: Some("body".into()), ..GraphProto::default() };
    for _ in 0..depth {
        let attribute =
            AttributeProto { name: Some("body".into()), r#type: Some(5), g: Some(graph), ..AttributeProto::default() };
        let mut node = node("Loop", &["", ""], "out");
        node.attribute = vec![attribute];
        graph = GraphProto { node: vec![node], name: Some("body".into()), ..GraphProto::default() };
    }
    ModelProto { graph: Some(graph), ..proto(vec![], &[]) }.encode_to_vec()
}

#[test]
fn nesting_is_bounded() {
    let load = |bytes: Vec<u8>| std::thread::Builder::new().stack_size(1 << 20).spawn(move || file::from_bytes(bytes));
    let model = load(nested(32)).unwrap().join().unwrap().unwrap();
    assert_eq!(model.all_graphs().len(), 33);
    refused(load(nested(100)).unwrap().join().unwrap(), &["nested more than 100 deep"]);
    // A sequence of sequences of …, inside an input's type: written from the inside out, and so backwards.
    let mut reversed = Vec::new();
    let tags = [0x0a, 0x22].into_iter().cycle().take(100_000).chain([0x12, 0x5a, 0x3a]);
    for tag in tags {
        let mut header = vec![tag];
        prost::encoding::encode_varint(reversed.len() as u64, &mut header);
        reversed.extend(header.into_iter().rev());
    }
    reversed.extend([10, 0x08]);
    reversed.reverse();
    refused(load(reversed).unwrap().join().unwrap(), &["nested more than 100 deep"]);
}

/// Of 64 bytes that are 1, as Python's hashlib has it.
const SHA1: &str = "320b018758ece3752ffedbaeb1a6db67c80b9359";

#[test]
fn external_data_stays_in_the_folder_and_in_bounds() {
    let outer = folder();
    let folder = outer.path().join("model");
    fs::create_dir_all(folder.join("sub")).unwrap();
    fs::write(outer.path().join("secret"), [7; 64]).unwrap();
    fs::write(folder.join("w.bin"), [1; 64]).unwrap();
    fs::write(folder.join("sub/w.bin"), [2; 64]).unwrap();
    symlink("../secret", folder.join("link_out")).unwrap();
    symlink("..", folder.join("folder_out")).unwrap();
    symlink("sub/w.bin", folder.join("link_in")).unwrap();
    symlink("/dev/zero", folder.join("device")).unwrap();
    fs::hard_link(outer.path().join("secret"), folder.join("hard_link")).unwrap();
    let secret = outer.path().join("secret").to_str().unwrap().to_owned();
    let load = |entries: &[(&str, &str)], dims: &[i64]| {
        let path = folder.join("m.onnx");
        fs::write(&path, with_external(entries, dims).encode_to_vec()).unwrap();
        file::load(&path)
    };
    let outside = "is not in the model's folder";
    let bad: &[(Entries, &[&str])] = &[
        (&[("location", "../secret")], &["\"../secret\"", outside]),
        (&[("location", &secret)], &[outside]),
        (&[("location", "sub/../../secret")], &[outside]),
        (&[("location", "link_out")], &[outside]),
        (&[("location", "folder_out/secret")], &[outside]),
        (&[("location", "device")], &[outside]),
        (&[("location", "hard_link")], &["\"hard_link\" is a hard link", "--allow-hard-links"]),
        (&[("location", "C:\\w.bin")], &[outside]),
        (&[("location", "")], &[outside]),
        (&[("location", "w.bin\0")], &[outside]),
        (&[("location", "sub")], &["is not a regular file"]),
        (&[("location", "gone.bin")], &["\"gone.bin\" is missing from", "copy it beside the model"]),
        (&[("location", "w.bim")], &["missing", "was \"w.bin\" renamed?"]),
        (&[("offset", "0")], &["without a location"]),
        (&[("location", "w.bin"), ("location", "w.bin")], &["two entries \"location\""]),
        (&[("location", "w.bin"), ("offset", "52")], &["has 64 bytes, but 16 are to be read at 52"]),
        (&[("location", "w.bin"), ("offset", "18446744073709551615")], &["but 16 are to be read at 184"]),
        (&[("location", "w.bin"), ("offset", "99999999999999999999")], &["the offset", "not a number"]),
        (&[("location", "w.bin"), ("offset", "-1")], &["the offset \"-1\", which is not a number"]),
        (&[("location", "w.bin"), ("offset", "+1")], &["not a number"]),
        (&[("location", "w.bin"), ("length", " 16")], &["the length \" 16\""]),
        (&[("location", "w.bin"), ("length", "")], &["not a number"]),
        (&[("location", "w.bin"), ("length", "12")], &["\"w.bin\" is said to hold 12 bytes", "ask for 16"]),
        (&[("location", "w.bin"), ("checksum", "?")], &["has the SHA-1", SHA1, "wants ?", "belongs to another model"]),
        (&[("location", "sub/w.bin"), ("checksum", SHA1)], &["has the SHA-1", "belongs to another model"]),
        (&[("location", "w.bin"), ("checksun", SHA1)], &["an entry \"checksun\""]),
    ];
    for (entries, parts) in bad {
        let parts: Vec<&str> = parts.iter().copied().chain(["tensor \"w\"", "m.onnx"]).collect();
        refused(load(entries, &[4]), &parts);
    }
    let good: &[(Entries, [u8; 16])] = &[
        (&[("location", "w.bin")], [1; 16]),
        (&[("location", "./w.bin"), ("offset", "3"), ("length", "16"), ("checksum", SHA1)], [1; 16]),
        (&[("location", "w.bin"), ("checksum", ""), ("basepath", "."), ("prepacked_0", "x|0|16|y")], [1; 16]),
        (&[("location", "sub/w.bin"), ("offset", "48")], [2; 16]),
        (&[("location", "link_in"), ("offset", "0048")], [2; 16]),
    ];
    for (entries, bytes) in good {
        let model = load(entries, &[4]).unwrap();
        let w = model.value_named("w").unwrap();
        assert_eq!(model.constant(w).unwrap().raw(), &bytes[..], "{entries:?}");
    }
    assert!(load(&[("location", "w.bin"), ("offset", "64")], &[0]).is_ok());
    refused(file::from_bytes(with_external(&[("location", "w.bin")], &[4]).encode_to_vec()), &["model is not a file"]);
}

#[test]
fn a_download_cache_of_links_is_one_folder() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("blobs")).unwrap();
    fs::create_dir(at("snapshot")).unwrap();
    fs::write(at("blobs/1"), with_external(&[("location", "w.bin")], &[4]).encode_to_vec()).unwrap();
    fs::write(at("blobs/2"), [1; 16]).unwrap();
    symlink("../blobs/1", at("snapshot/m.onnx")).unwrap();
    symlink("../blobs/2", at("snapshot/w.bin")).unwrap();
    file::load(&at("snapshot/m.onnx")).unwrap();
    fs::remove_file(at("snapshot/m.onnx")).unwrap();
    fs::rename(at("blobs/1"), at("snapshot/m.onnx")).unwrap();
    refused(file::load(&at("snapshot/m.onnx")), &["is not in the model's folder"]);
}

#[test]
fn external_data_of_attributes_is_taken_in() {
    let folder = folder();
    fs::write(folder.path().join("w.bin"), 1.5f32.to_le_bytes()).unwrap();
    let mut model = with_external(&[("location", "w.bin")], &[1]);
    let graph = model.graph.as_mut().unwrap();
    let tensor = graph.initializer.pop().unwrap();
    let mut constant = node("Constant", &[], "w");
    constant.attribute = vec![AttributeProto {
        name: Some("value".into()),
        r#type: Some(4),
        t: Some(tensor),
        ..AttributeProto::default()
    }];
    graph.node.insert(0, constant);
    fs::write(folder.path().join("m.onnx"), model.encode_to_vec()).unwrap();
    let model = file::load(&folder.path().join("m.onnx")).unwrap();
    let alone = file::from_bytes(file::to_bytes(&model).unwrap()).unwrap();
    let constant = alone.node(alone.producer(alone.value_named("w").unwrap()).unwrap());
    let tensor = constant.attr("value").unwrap().proto().t.clone().unwrap();
    assert_eq!(Tensor::from_proto(tensor, None).unwrap().to_f32(), Some(vec![1.5]));
}

fn external() -> SaveOptions {
    SaveOptions { external: External::Always, ..SaveOptions::default() }
}

#[test]
fn external_data_is_written_aligned_and_read_back() {
    let folder = folder();
    let path = folder.path().join("m.onnx");
    let original = file::load(&data("weights.onnx")).unwrap();
    file::save_with(&original, &path, &external()).unwrap();
    let data_name = data_of(folder.path(), "m.onnx");
    assert_eq!(names_in(folder.path()), ["m.onnx".to_owned(), data_name.clone()].into());
    let proto = ModelProto::decode(&*fs::read(&path).unwrap()).unwrap();
    let whole = fs::read(folder.path().join(&data_name)).unwrap();
    let mut seen = Vec::new();
    for tensor in &proto.graph.as_ref().unwrap().initializer {
        let name = tensor.name.clone().unwrap();
        let entry = |key: &str| {
            let found = tensor.external_data.iter().find(|e| e.key.as_deref() == Some(key));
            found.and_then(|e| e.value.clone())
        };
        let Some(location) = entry("location") else {
            seen.push((name, tensor.raw_data.as_ref().map(Bytes::len)));
            continue;
        };
        assert_eq!((location.as_str(), tensor.data_location, &tensor.raw_data), (data_name.as_str(), Some(1), &None));
        let offset: usize = entry("offset").unwrap().parse().unwrap();
        let length: usize = entry("length").unwrap().parse().unwrap();
        assert_eq!(offset % 4096, 0);
        let value = original.value_named(&name).unwrap();
        assert_eq!(original.constant(value).unwrap().raw(), &whole[offset..offset + length]);
        seen.push((name, None));
    }
    // The bias of 96 bytes stays; typed data goes out too.
    assert_eq!(seen, [("w".into(), None), ("b".into(), Some(96)), ("typed".into(), None)]);

    let again = file::load(&path).unwrap();
    assert_eq!(content_hash(&again), content_hash(&original));
    // What came with external data is written so again, under the new name, and the same bytes each time.
    for round in ["a", "b"] {
        fs::create_dir(folder.path().join(round)).unwrap();
        file::save(&again, &folder.path().join(round).join("n.onnx")).unwrap();
    }
    for name in ["n.onnx", &data_of(&folder.path().join("a"), "n.onnx")] {
        let [a, b] = ["a", "b"].map(|round| fs::read(folder.path().join(round).join(name)).unwrap());
        assert!(a == b, "{name}");
    }
    // Without external data, the file is the one before, but for the tensor that had typed data.
    let never = SaveOptions { external: External::Never, ..SaveOptions::default() };
    let inline = folder.path().join("inline.onnx");
    file::save_with(&again, &inline, &never).unwrap();
    assert_eq!(fs::metadata(&inline).unwrap().len(), file::estimated_size(&again));
    assert_eq!(fs::read(&inline).unwrap(), file::to_bytes(&again).unwrap());
    assert!(names_in(folder.path()).iter().all(|n| n == "inline.onnx" || !n.starts_with("inline")));
    assert_eq!(content_hash(&file::load(&inline).unwrap()), content_hash(&original));
}

#[test]
fn data_that_tensors_share_is_stored_once() {
    let folder = folder();
    let path = folder.path().join("m.onnx");
    let mut model = layers(1, 32);
    let main = model.main();
    let w = model.constant(model.value_named("w0").unwrap()).unwrap().clone();
    model.add_initializer(main, "tied", w.clone().reshaped(&[1024]));
    model.add_initializer(main, "other", Tensor::from_f32(&[32, 32], &w.to_f32().unwrap()));
    file::save_with(&model, &path, &external()).unwrap();
    assert_eq!(fs::metadata(folder.path().join(data_of(folder.path(), "m.onnx"))).unwrap().len(), 4096 * 2);
    assert_eq!(content_hash(&file::load(&path).unwrap()), content_hash(&model));
}

#[test]
fn a_model_that_does_not_fit_goes_outside_or_is_an_error() {
    let folder = folder();
    let path = folder.path().join("m.onnx");
    let model = layers(2, 32);
    let size = file::estimated_size(&model);
    let save = |external, max_protobuf| file::save_with(&model, &path, &SaveOptions { external, max_protobuf });
    let error = save(External::Never, size - 1).unwrap_err();
    assert_eq!(error.kind(), Kind::Output);
    assert!(error.to_string().contains("allow external data"), "{error}");
    let error = save(External::Auto, 100).unwrap_err();
    assert!(error.to_string().contains("lift-constants"), "{error}");
    assert!(names_in(folder.path()).is_empty());
    save(External::Auto, size).unwrap();
    assert_eq!(names_in(folder.path()).len(), 1);
    save(External::Auto, size - 1).unwrap();
    assert_eq!(names_in(folder.path()).len(), 2);
}

#[track_caller]
fn not_written(model: &Model, path: &Path, options: &SaveOptions, part: &str) {
    let error = file::save_with(model, path, options).unwrap_err();
    assert_eq!(error.kind(), Kind::Output, "{error}");
    assert!(error.to_string().contains(part), "{error}\n  lacks {part:?}");
}

#[test]
fn inputs_folders_and_devices_are_not_written_over() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    file::save_with(&layers(1, 32), &at("in.onnx"), &external()).unwrap();
    let before = fs::read(at("in.onnx")).unwrap();
    let model = file::load(&at("in.onnx")).unwrap();
    symlink("in.onnx", at("symlink.onnx")).unwrap();
    fs::hard_link(at("in.onnx"), at("hardlink.onnx")).unwrap();
    let data = data_of(folder.path(), "in.onnx");
    let hash = data.split('.').rev().nth(1).unwrap();
    fs::hard_link(at(&data), at(&format!("out.onnx.{hash}.data"))).unwrap();
    fs::create_dir(at("dir.onnx")).unwrap();
    fs::create_dir(at(&format!("blocked.onnx.{hash}.data"))).unwrap();
    symlink("dir.onnx", at("dirlink.onnx")).unwrap();
    symlink("nowhere.onnx", at("dangling.onnx")).unwrap();
    symlink("/dev/null", at("nulllink.onnx")).unwrap();
    let listed = names_in(folder.path());
    let default = SaveOptions::default();
    let read_from = "the model is read from this file";
    not_written(&model, &at("in.onnx"), &default, read_from);
    not_written(&model, &at("symlink.onnx"), &default, read_from);
    not_written(&model, &at("hardlink.onnx"), &default, read_from);
    not_written(&model, &at(&data), &default, read_from);
    not_written(&model, &at("out.onnx"), &default, read_from);
    not_written(&model, &at("dir.onnx"), &default, "it is a folder");
    not_written(&model, &at("blocked.onnx"), &default, "it is a folder");
    not_written(&model, &at("dirlink.onnx"), &default, "which is a folder");
    not_written(&model, &at("dangling.onnx"), &default, "a link that leads nowhere");
    not_written(&model, &at("nulllink.onnx"), &default, "which is not a regular file");
    not_written(&model, &at("new/"), &default, "it names a folder");
    not_written(&model, &at(".."), &default, "it names a folder");
    not_written(&model, &at("no/such.onnx"), &default, "create the folder first");
    not_written(&model, Path::new("/dev/null"), &default, "it is not a regular file");
    not_written(&model, Path::new("/proc/model.onnx"), &default, "cannot write /proc/model.onnx");
    assert_eq!(names_in(folder.path()), listed);
    assert_eq!(fs::read(at("in.onnx")).unwrap(), before);
}

#[test]
fn outputs_have_the_permissions_of_ordinary_files() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let mode = |name: &str| fs::metadata(at(name)).unwrap().mode() & 0o777;
    fs::File::create(at("ordinary")).unwrap();
    file::save_with(&layers(1, 32), &at("m.onnx"), &external()).unwrap();
    assert_eq!((mode("m.onnx"), mode(&data_of(folder.path(), "m.onnx"))), (mode("ordinary"), mode("ordinary")));
    fs::set_permissions(at("m.onnx"), fs::Permissions::from_mode(0o640)).unwrap();
    let inode = fs::metadata(at("m.onnx")).unwrap().ino();
    file::save(&layers(2, 8), &at("m.onnx")).unwrap();
    assert_eq!(mode("m.onnx"), 0o640);
    assert_ne!(fs::metadata(at("m.onnx")).unwrap().ino(), inode, "written in place");
    symlink("m.onnx", at("link.onnx")).unwrap();
    file::save(&layers(1, 8), &at("link.onnx")).unwrap();
    assert!(fs::symlink_metadata(at("link.onnx")).unwrap().is_symlink());
    assert_eq!(fs::read(at("m.onnx")).unwrap(), file::to_bytes(&layers(1, 8)).unwrap());
    assert_eq!(mode("m.onnx"), 0o640);
    let names = ["link.onnx", "m.onnx", "ordinary"].map(String::from);
    assert_eq!(names_in(folder.path()), names.into(), "the data of the first output is gone");
}

/// What is in the folder after `left` lay there and a model was saved to `m.onnx`, whose own files are left out.
#[track_caller]
fn check_strays(left: &[(&str, &str)], stay: &[&str]) {
    let folder = folder();
    for (name, content) in left {
        fs::write(folder.path().join(name), content).unwrap();
    }
    file::save_with(&layers(1, 32), &folder.path().join("m.onnx"), &external()).unwrap();
    let mut names = names_in(folder.path());
    let model = fs::read(folder.path().join("m.onnx")).unwrap();
    names.retain(|name| !model.windows(name.len()).any(|part| part == name.as_bytes()) && name != "m.onnx");
    assert_eq!(names, stay.iter().map(|&name| name.to_owned()).collect());
    file::load(&folder.path().join("m.onnx")).unwrap();
}

#[test]
fn what_a_killed_run_left_is_removed_and_nothing_else() {
    let data = "m.onnx.0123456789abcdef.data";
    check_strays(&[(data, "")], &[]);
    check_strays(&[(".amax-a1B2c3.tmp", "")], &[]);
    // A copy of an older output keeps its data.
    check_strays(&[(data, ""), ("copy.onnx", "…m.onnx.0123456789abcdef.data…")], &["copy.onnx", data]);
    for other in ["m.onnx.data", "n.onnx.0123456789abcdef.data", "m.onnx.0123456789abcdeg.data", ".amax", "x.tmp"] {
        check_strays(&[(other, "")], &[other]);
    }
}

#[test]
fn a_temporary_file_that_somebody_writes_stays() {
    let folder = folder();
    let held = fs::File::create(folder.path().join(".amax-held.tmp")).unwrap();
    held.lock().unwrap();
    file::save(&layers(1, 8), &folder.path().join("m.onnx")).unwrap();
    assert_eq!(names_in(folder.path()), [".amax-held.tmp", "m.onnx"].map(String::from).into());
    drop(held);
    file::save(&layers(1, 8), &folder.path().join("m.onnx")).unwrap();
    assert_eq!(names_in(folder.path()), ["m.onnx"].map(String::from).into());
}

/// Runs that write two models to one place at once: whoever comes last, the pair is that of one of them.
#[test]
fn writers_of_one_output_leave_one_pair() {
    let folder = folder();
    let path = folder.path().join("m.onnx");
    let models: Vec<Model> = (0..4).map(|n| layers(1, 32 + n)).collect();
    let hashes: Vec<String> = models.iter().map(content_hash).collect();
    for _ in 0..10 {
        std::thread::scope(|scope| {
            for model in &models {
                scope.spawn(|| file::save_with(model, &path, &external()).unwrap());
            }
        });
        let left = file::load(&path).unwrap();
        assert!(hashes.contains(&content_hash(&left)));
        data_of(folder.path(), "m.onnx");
        assert_eq!(names_in(folder.path()).len(), 2);
    }
}

#[test]
fn names_may_be_as_long_as_the_system_allows() {
    let folder = folder();
    let name = "m".repeat(250) + ".onnx";
    let path = folder.path().join(&name);
    file::save_with(&layers(1, 32), &path, &external()).unwrap();
    assert_eq!(content_hash(&file::load(&path).unwrap()), content_hash(&layers(1, 32)));
    let error = file::save(&layers(1, 8), &folder.path().join("m".repeat(256))).unwrap_err();
    assert_eq!(error.kind(), Kind::Output);
}

/// A model of one weight that takes `len` bytes, most of them a hole in the file.
fn sparse_model(path: &Path, len: usize) {
    let mut model = proto(vec![node("Add", &["x", "w"], "y")], &["y"]);
    model.graph.as_mut().unwrap().initializer.push(TensorProto {
        name: Some("w".into()),
        data_type: Some(2),
        dims: vec![len as i64],
        ..TensorProto::default()
    });
    let tensor = &model.graph.as_ref().unwrap().initializer[0];
    // Prost gives the bytes around the hole: the message of the same model with a weight of the right length.
    let varint = |value: usize| {
        let mut out = Vec::new();
        prost::encoding::encode_varint(value as u64, &mut out);
        out
    };
    let raw_header = [&[0x4a][..], &varint(len)].concat();
    let tensor_head = tensor.encode_to_vec();
    let tensor_len = tensor_head.len() + raw_header.len() + len;
    let graph = model.graph.take().unwrap();
    let head = GraphProto { node: graph.node, name: graph.name, ..GraphProto::default() }.encode_to_vec();
    let tail = GraphProto { input: graph.input, output: graph.output, ..GraphProto::default() }.encode_to_vec();
    let tensor_header = [&[0x2a][..], &varint(tensor_len)].concat();
    let graph_len = head.len() + tensor_header.len() + tensor_len + tail.len();
    let imports = std::mem::take(&mut model.opset_import);
    let model_tail = ModelProto { opset_import: imports, ..ModelProto::default() }.encode_to_vec();
    let front =
        [&model.encode_to_vec()[..], &[0x3a], &varint(graph_len), &head, &tensor_header, &tensor_head, &raw_header];
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&front.concat()).unwrap();
    file.seek(SeekFrom::Current(len as i64)).unwrap();
    file.write_all(&[tail, model_tail].concat()).unwrap();
}

/// Address range and resident bytes of the mapping of a file.
#[cfg(target_os = "linux")]
fn mapping(path: &Path) -> Option<(std::ops::Range<usize>, usize)> {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = maps.lines().skip_while(|line| !line.ends_with(path.to_str().unwrap()));
    let (start, end) = lines.next()?.split_whitespace().next()?.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).unwrap();
    let resident = lines.find(|line| line.starts_with("Rss:"))?.split_whitespace().nth(1)?.parse::<usize>().unwrap();
    Some((address(start)..address(end), resident * 1024))
}

#[test]
#[cfg(target_os = "linux")]
fn loading_touches_the_structure_only() {
    let folder = folder();
    // More than one protobuf may have elsewhere.
    for len in [500 << 20, (2 << 30) + 12345] {
        let path = folder.path().join(format!("{len}.onnx"));
        sparse_model(&path, len);
        let model = file::load(&path).unwrap();
        let raw = model.constant(model.value_named("w").unwrap()).unwrap().raw();
        let (addresses, resident) = mapping(&path).unwrap();
        assert_eq!(raw.len(), len);
        assert!(addresses.contains(&(raw.as_ptr() as usize)), "the weight was copied");
        assert!(resident < 4 << 20, "{resident} bytes were read");
        assert_eq!(file::estimated_size(&model), fs::metadata(&path).unwrap().len());
        assert_eq!(file::to_bytes(&model).is_err(), len > i32::MAX as usize);
        drop((model, raw));
        assert!(mapping(&path).is_none(), "the map outlives the model");
    }
}

/// Runs `child` of this file in another process that may allocate `kilobytes`, with `folder` to work in.
fn confined(child: &str, kilobytes: usize, folder: &Path) -> bool {
    let script = format!("ulimit -d {kilobytes} && exec \"$0\" \"$@\"");
    let status = std::process::Command::new("sh")
        .args(["-c", &script, std::env::current_exe().unwrap().to_str().unwrap()])
        .args([&format!("file::{child}"), "--exact", "--ignored", "--test-threads=1"])
        .env("AMAX_TEST_FOLDER", folder)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status();
    status.unwrap().success()
}

#[test]
#[cfg(target_os = "linux")]
fn saving_needs_no_memory_for_weights() {
    let folder = folder();
    sparse_model(&folder.path().join("in.onnx"), 200 << 20);
    assert!(!confined("copies_a_model", 100 << 10, folder.path()), "the limit does not hold");
    assert!(confined("saves_a_model", 100 << 10, folder.path()));
    assert_eq!(names_in(folder.path()).len(), 4);
}

#[test]
#[ignore = "run by saving_needs_no_memory_for_weights"]
fn copies_a_model() {
    let folder = PathBuf::from(std::env::var_os("AMAX_TEST_FOLDER").unwrap());
    file::to_bytes(&file::load(&folder.join("in.onnx")).unwrap()).unwrap();
}

#[test]
#[ignore = "run by saving_needs_no_memory_for_weights"]
fn saves_a_model() {
    let folder = PathBuf::from(std::env::var_os("AMAX_TEST_FOLDER").unwrap());
    let model = file::load(&folder.join("in.onnx")).unwrap();
    file::save(&model, &folder.join("inline.onnx")).unwrap();
    file::save_with(&model, &folder.join("external.onnx"), &external()).unwrap();
    assert_eq!(content_hash(&model).len(), 64);
}

#[test]
fn invalid_models_are_refused_by_node_and_tensor() {
    let cases: &[(ModelProto, &[&str])] = &[
        (
            proto(vec![node("Relu", &["nothing"], "y")], &["y"]),
            &["input 0 is not defined", "\"make_y\" (Relu)", "\"nothing\""],
        ),
        (proto(vec![node("Relu", &["x"], "x")], &["x"]), &["defined twice", "\"x\""]),
        (proto(vec![], &["z"]), &["the graph output is not computed", "\"z\""]),
        (proto(vec![node("", &["x"], "y")], &["y"]), &["\"make_y\" () has no operator"]),
        (
            proto(vec![node("Add", &["x", "b"], "a"), node("Relu", &["a"], "b"), node("Neg", &["b"], "y")], &["y"]),
            &["a cycle runs through node \"make_a\" (Add), node \"make_b\" (Relu)"],
        ),
        (proto(vec![node("Add", &["x", "a"], "a")], &["a"]), &["a cycle runs through node \"make_a\" (Add)"]),
        (
            proto(vec![NodeProto { domain: Some("d".into()), ..node("F", &["x"], "y") }], &["y"]),
            &["\"make_y\" (F) is of domain \"d\", which is not imported"],
        ),
        (
            ModelProto { opset_import: vec![], ..proto(vec![node("Relu", &["x"], "y")], &["y"]) },
            &["is of the default domain, which is not imported"],
        ),
    ];
    for (model, parts) in cases {
        refused(file::from_bytes(model.encode_to_vec()), parts);
    }
    let mut typed = with_external(&[], &[2]);
    let tensor = &mut typed.graph.as_mut().unwrap().initializer[0];
    tensor.data_location = None;
    tensor.int32_data = vec![1, 2];
    refused(file::from_bytes(typed.encode_to_vec()), &["of type float holds data of another type", "\"w\""]);
}

/// In a body, a name means the nearest tensor that has it; an edit must not make one that is hidden needed.
#[test]
fn captured_tensors_are_not_hidden() {
    let text = |captured: &str| {
        format!(
            r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[1] x, bool c) => (float[1] y) {{
  outer = Relu (x)
  other = Neg (x)
  y = If <
    then_branch = t () => (float[1] r) {{ outer = Abs (x)  s = Neg ({captured})  r = Add (outer, s) }},
    else_branch = e () => (float[1] r) {{ r = Exp (other) }}
  > (c)
}}"#
        )
    };
    let mut model = amax::ir::text::parse(&text("other")).unwrap();
    verify::verify(&model).unwrap();
    let [outer, other] = ["outer", "other"].map(|name| model.value_named(name).unwrap());
    model.replace_uses(other, outer, |_| true);
    let error = verify::verify(&model).unwrap_err().to_string();
    assert!(error.contains("\"outer\" of an outer graph, which is hidden by a tensor of the same name"), "{error}");
    // Only the branch that has a tensor of that name.
    assert_eq!(verify::violations(&model).len(), 1, "{error}");
}

#[test]
fn unsorted_nodes_are_sorted_stably() {
    let nodes = vec![
        node("Neg", &["b"], "y"),
        node("Relu", &["x"], "r"),
        node("Add", &["a", "r"], "b"),
        node("Abs", &["x"], "unused"),
        node("Exp", &["x"], "a"),
    ];
    let model = file::from_bytes(proto(nodes, &["y"]).encode_to_vec()).unwrap();
    let ops: Vec<_> = model.graph(model.main()).nodes().iter().map(|&n| model.node(n).op_type()).collect();
    assert_eq!(ops, ["Relu", "Abs", "Exp", "Add", "Neg"]);
}

/// On a stack that recursion would leave. `benches/structure.rs` takes the time.
#[test]
fn long_and_wide_models_are_read() {
    let name = |i: usize| format!("v{i}");
    let count = 100_000;
    let mut nodes: Vec<NodeProto> = (1..=count).map(|i| node("Relu", &[&name(i - 1)], &name(i))).collect();
    nodes[0].input[0] = "x".into();
    let read = |model: ModelProto| {
        let bytes = model.encode_to_vec();
        let read = std::thread::Builder::new().stack_size(1 << 20).spawn(move || file::from_bytes(bytes));
        read.unwrap().join().unwrap()
    };
    assert!(read(proto(nodes.clone(), &[&name(count)])).is_ok());
    let backwards = nodes.iter().rev().cloned().collect();
    assert!(read(proto(backwards, &[&name(count)])).is_ok());
    let mut cycle = nodes.clone();
    cycle[0].input[0] = name(count);
    refused(read(proto(cycle, &[])), &["a cycle runs through", "and 99992 more"]);
    let wide = (1..=count).map(|i| node("Relu", &["x"], &name(i))).collect();
    let mut model = read(proto(wide, &[])).unwrap();
    let main = model.main();
    let x = model.value_named("x").unwrap();
    let other = model.add_initializer(main, "other", Tensor::from_f32(&[1], &[0.0]));
    model.replace_uses(x, other, |_| true);
    let users: Vec<NodeId> = model.graph(main).nodes().to_vec();
    for &node in &users[..count / 10] {
        model.insert(Place::Before(node), NewNode::new("Neg", "", &[x], &["n"]));
    }
    model.remove(&users);
    verify::verify(&model).unwrap();
    assert_eq!(model.graph(main).nodes().len(), count / 10);
}

/// An edit that changes what a model computes.
type Change<'a> = &'a dyn Fn(&mut Model);

#[test]
fn the_hash_sees_content_and_not_storage() {
    let original = file::load(&data("weights.onnx")).unwrap();
    let hash = content_hash(&original);
    assert_eq!(hash.len(), 64);
    let mut same = original.clone();
    same.set_metadata("a", "b");
    same.set_ir_version(9);
    let typed = same.value_named("typed").unwrap();
    let tensor = same.constant(typed).unwrap().clone();
    let raw = Tensor::new(tensor.dtype(), &tensor.dims(), tensor.raw());
    assert_ne!(raw, tensor);
    same.set_constant(typed, raw);
    assert_eq!(content_hash(&same), hash);

    let node = original.graph(original.main()).nodes()[0];
    let w = original.value_named("w").unwrap();
    let changes: &[(&str, Change<'_>)] = &[
        ("weight", &|m| {
            let mut bytes = m.constant(w).unwrap().raw().to_vec();
            bytes[100] ^= 1;
            m.set_constant(w, Tensor::new(DataType::Float, &[24, 24], bytes));
        }),
        ("shape", &|m| m.set_constant(w, m.constant(w).unwrap().clone().reshaped(&[12, 48]))),
        ("tensor name", &|m| m.rename(w, "v")),
        ("operator", &|m| m.set_op(node, "", "Gemm")),
        ("attribute", &|m| m.set_attr(node, Attr::int("a", 1))),
        ("input", &|m| m.set_input(node, 1, m.node(node).input(0))),
        ("opset", &|m| m.set_domain_version("", 20)),
        ("output", &|m| m.add_output(m.main(), w)),
    ];
    let mut hashes = BTreeSet::from([hash]);
    for (what, change) in changes {
        let mut model = original.clone();
        change(&mut model);
        assert!(hashes.insert(content_hash(&model)), "{what}");
    }
}

/// Models with everything that files can hold.
pub static SEEDS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let mut paths: Vec<_> = fs::read_dir(data("")).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|p| fs::read(p).unwrap()).collect()
});

#[derive(Clone, Debug)]
enum Mutation {
    Flip(prop::sample::Index, u8),
    Set(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Duplicate(prop::sample::Index, usize),
    Remove(prop::sample::Index, usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        4 => (at(), 0..8u8).prop_map(|(at, bit)| Mutation::Flip(at, 1 << bit)),
        4 => (at(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        1 => at().prop_map(Mutation::Cut),
        2 => (at(), prop::collection::vec(any::<u8>(), 1..8)).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        2 => (at(), 1..64usize).prop_map(|(at, len)| Mutation::Duplicate(at, len)),
        2 => (at(), 1..64usize).prop_map(|(at, len)| Mutation::Remove(at, len)),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    if bytes.is_empty() {
        return;
    }
    let len = bytes.len();
    match mutation {
        Mutation::Flip(at, bit) => bytes[at.index(len)] ^= bit,
        Mutation::Set(at, byte) => bytes[at.index(len)] = *byte,
        Mutation::Cut(at) => bytes.truncate(at.index(len)),
        Mutation::Insert(at, new) => {
            bytes.splice(at.index(len)..at.index(len), new.iter().copied());
        }
        Mutation::Duplicate(at, size) => {
            let start = at.index(len);
            let copy = bytes[start..len.min(start + size)].to_vec();
            bytes.splice(start..start, copy);
        }
        Mutation::Remove(at, size) => {
            let start = at.index(len);
            bytes.drain(start..len.min(start + size));
        }
    }
}

proptest! {
    #![proptest_config(crate::random_cases(2000))]

    #[test]
    fn mutated_models_are_read_or_refused(
        seed in any::<prop::sample::Index>(),
        mutations in prop::collection::vec(mutation(), 1..4),
    ) {
        let mut bytes = SEEDS[seed.index(SEEDS.len())].clone();
        for mutation in &mutations {
            mutate(&mut bytes, mutation);
        }
        let folder = folder();
        let path = folder.path().join("m.onnx");
        fs::write(&path, &bytes).unwrap();
        if let Ok(model) = file::load(&path) {
            // What is read is written, and then is stable.
            let written = file::to_bytes(&model).unwrap();
            prop_assert_eq!(written.len() as u64, file::estimated_size(&model));
            let again = file::from_bytes(written.clone()).unwrap();
            prop_assert!(file::to_bytes(&again).unwrap() == written);
            prop_assert_eq!(content_hash(&again), content_hash(&model));
        }
        prop_assert_eq!(names_in(folder.path()).len(), 1);
    }
}
