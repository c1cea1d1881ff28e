//! A structural walk over the protobuf bytes of a model, before they are decoded.
//!
//! The decoder drops fields that [`crate::onnx`] does not know, and calls a file that ends early "buffer underflow".
//! This walk skips over the content of every field, so it costs time by the structure and not by the weights, and it
//! finds, with their place in the file:
//!
//! - a file that ends before a field does,
//! - a field that the schema does not have, which a save would lose,
//! - a field of another wire type than the schema's,
//! - messages nested deeper than [`MAX_DEPTH`].
//!
//! What passes is decoded without loss; only text that is not UTF-8 is left for the decoder to refuse.

use crate::error::{Error, Result};

/// Messages within messages that are read. The decoder's own limit: a file at this depth is hostile, since an `If` in
/// an `If` costs three.
pub(super) const MAX_DEPTH: usize = 100;

/// A message of the schema.
struct Message {
    fields: &'static [Field],
}

/// Number, name and shape of a field.
struct Field(u32, &'static str, Shape);

/// What a field holds, as far as the wire format tells.
#[derive(Clone, Copy)]
enum Shape {
    /// An integer.
    Integer,
    /// A 32-bit float.
    Float,
    /// Text or raw bytes.
    Bytes,
    /// Numbers, packed or one by one; the wire type of one.
    Numbers(u64),
    /// A message.
    Of(&'static Message),
}

use Shape::{Bytes, Float, Integer, Numbers, Of};

const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const DELIMITED: u64 = 2;
const FIXED32: u64 = 5;

static MODEL: Message = Message {
    fields: &[
        Field(1, "ir_version", Integer),
        Field(2, "producer_name", Bytes),
        Field(3, "producer_version", Bytes),
        Field(4, "domain", Bytes),
        Field(5, "model_version", Integer),
        Field(6, "doc_string", Bytes),
        Field(7, "graph", Of(&GRAPH)),
        Field(8, "opset_import", Of(&OPSET)),
        Field(14, "metadata_props", Of(&ENTRY)),
        Field(20, "training_info", Of(&TRAINING)),
        Field(25, "functions", Of(&FUNCTION)),
        Field(26, "configuration", Of(&DEVICE)),
    ],
};
static OPSET: Message = Message { fields: &[Field(1, "domain", Bytes), Field(2, "version", Integer)] };
static ENTRY: Message = Message { fields: &[Field(1, "key", Bytes), Field(2, "value", Bytes)] };
static FUNCTION: Message = Message {
    fields: &[
        Field(1, "name", Bytes),
        Field(4, "input", Bytes),
        Field(5, "output", Bytes),
        Field(6, "attribute", Bytes),
        Field(7, "node", Of(&NODE)),
        Field(8, "doc_string", Bytes),
        Field(9, "opset_import", Of(&OPSET)),
        Field(10, "domain", Bytes),
        Field(11, "attribute_proto", Of(&ATTRIBUTE)),
        Field(12, "value_info", Of(&VALUE_INFO)),
        Field(13, "overload", Bytes),
        Field(14, "metadata_props", Of(&ENTRY)),
    ],
};
static GRAPH: Message = Message {
    fields: &[
        Field(1, "node", Of(&NODE)),
        Field(2, "name", Bytes),
        Field(5, "initializer", Of(&TENSOR)),
        Field(10, "doc_string", Bytes),
        Field(11, "input", Of(&VALUE_INFO)),
        Field(12, "output", Of(&VALUE_INFO)),
        Field(13, "value_info", Of(&VALUE_INFO)),
        Field(14, "quantization_annotation", Of(&ANNOTATION)),
        Field(15, "sparse_initializer", Of(&SPARSE)),
        Field(16, "metadata_props", Of(&ENTRY)),
    ],
};
static NODE: Message = Message {
    fields: &[
        Field(1, "input", Bytes),
        Field(2, "output", Bytes),
        Field(3, "name", Bytes),
        Field(4, "op_type", Bytes),
        Field(5, "attribute", Of(&ATTRIBUTE)),
        Field(6, "doc_string", Bytes),
        Field(7, "domain", Bytes),
        Field(8, "overload", Bytes),
        Field(9, "metadata_props", Of(&ENTRY)),
        Field(10, "device_configurations", Of(&NODE_DEVICE)),
    ],
};
static ATTRIBUTE: Message = Message {
    fields: &[
        Field(1, "name", Bytes),
        Field(2, "f", Float),
        Field(3, "i", Integer),
        Field(4, "s", Bytes),
        Field(5, "t", Of(&TENSOR)),
        Field(6, "g", Of(&GRAPH)),
        Field(7, "floats", Numbers(FIXED32)),
        Field(8, "ints", Numbers(VARINT)),
        Field(9, "strings", Bytes),
        Field(10, "tensors", Of(&TENSOR)),
        Field(11, "graphs", Of(&GRAPH)),
        Field(13, "doc_string", Bytes),
        Field(14, "tp", Of(&TYPE)),
        Field(15, "type_protos", Of(&TYPE)),
        Field(20, "type", Integer),
        Field(21, "ref_attr_name", Bytes),
        Field(22, "sparse_tensor", Of(&SPARSE)),
        Field(23, "sparse_tensors", Of(&SPARSE)),
    ],
};
static VALUE_INFO: Message = Message {
    fields: &[
        Field(1, "name", Bytes),
        Field(2, "type", Of(&TYPE)),
        Field(3, "doc_string", Bytes),
        Field(4, "metadata_props", Of(&ENTRY)),
    ],
};
static TENSOR: Message = Message {
    fields: &[
        Field(1, "dims", Numbers(VARINT)),
        Field(2, "data_type", Integer),
        Field(3, "segment", Of(&SEGMENT)),
        Field(4, "float_data", Numbers(FIXED32)),
        Field(5, "int32_data", Numbers(VARINT)),
        Field(6, "string_data", Bytes),
        Field(7, "int64_data", Numbers(VARINT)),
        Field(8, "name", Bytes),
        Field(9, "raw_data", Bytes),
        Field(10, "double_data", Numbers(FIXED64)),
        Field(11, "uint64_data", Numbers(VARINT)),
        Field(12, "doc_string", Bytes),
        Field(13, "external_data", Of(&ENTRY)),
        Field(14, "data_location", Integer),
        Field(16, "metadata_props", Of(&ENTRY)),
    ],
};
static SEGMENT: Message = Message { fields: &[Field(1, "begin", Integer), Field(2, "end", Integer)] };
static SPARSE: Message = Message {
    fields: &[Field(1, "values", Of(&TENSOR)), Field(2, "indices", Of(&TENSOR)), Field(3, "dims", Numbers(VARINT))],
};
static TYPE: Message = Message {
    fields: &[
        Field(1, "tensor_type", Of(&TENSOR_TYPE)),
        Field(4, "sequence_type", Of(&WRAPPED_TYPE)),
        Field(5, "map_type", Of(&MAP_TYPE)),
        Field(6, "denotation", Bytes),
        Field(7, "opaque_type", Of(&OPAQUE_TYPE)),
        Field(8, "sparse_tensor_type", Of(&TENSOR_TYPE)),
        Field(9, "optional_type", Of(&WRAPPED_TYPE)),
    ],
};
static TENSOR_TYPE: Message =
    Message { fields: &[Field(1, "elem_type", Integer), Field(2, "shape", Of(&TENSOR_SHAPE))] };
static WRAPPED_TYPE: Message = Message { fields: &[Field(1, "elem_type", Of(&TYPE))] };
static MAP_TYPE: Message = Message { fields: &[Field(1, "key_type", Integer), Field(2, "value_type", Of(&TYPE))] };
static OPAQUE_TYPE: Message = Message { fields: &[Field(1, "domain", Bytes), Field(2, "name", Bytes)] };
static TENSOR_SHAPE: Message = Message { fields: &[Field(1, "dim", Of(&DIMENSION))] };
static DIMENSION: Message =
    Message { fields: &[Field(1, "dim_value", Integer), Field(2, "dim_param", Bytes), Field(3, "denotation", Bytes)] };
static ANNOTATION: Message =
    Message { fields: &[Field(1, "tensor_name", Bytes), Field(2, "quant_parameter_tensor_names", Of(&ENTRY))] };
static TRAINING: Message = Message {
    fields: &[
        Field(1, "initialization", Of(&GRAPH)),
        Field(2, "algorithm", Of(&GRAPH)),
        Field(3, "initialization_binding", Of(&ENTRY)),
        Field(4, "update_binding", Of(&ENTRY)),
    ],
};
static DEVICE: Message =
    Message { fields: &[Field(1, "name", Bytes), Field(2, "num_devices", Integer), Field(3, "device", Bytes)] };
static NODE_DEVICE: Message = Message {
    fields: &[
        Field(1, "configuration_id", Bytes),
        Field(2, "sharding_spec", Of(&SHARDING)),
        Field(3, "pipeline_stage", Integer),
    ],
};
static SHARDING: Message = Message {
    fields: &[
        Field(1, "tensor_name", Bytes),
        Field(2, "device", Numbers(VARINT)),
        Field(3, "index_to_device_group_map", Of(&DEVICE_GROUP)),
        Field(4, "sharded_dim", Of(&SHARDED_DIM)),
    ],
};
static DEVICE_GROUP: Message = Message { fields: &[Field(1, "key", Integer), Field(2, "value", Numbers(VARINT))] };
static SHARDED_DIM: Message =
    Message { fields: &[Field(1, "axis", Integer), Field(2, "simple_sharding", Of(&SIMPLE_SHARDED_DIM))] };
static SIMPLE_SHARDED_DIM: Message = Message {
    fields: &[Field(1, "dim_value", Integer), Field(2, "dim_param", Bytes), Field(3, "num_shards", Integer)],
};

/// Walks over `bytes` as a `ModelProto`.
///
/// # Errors
/// See the module.
pub(super) fn scan(bytes: &[u8]) -> Result<()> {
    let mut walk = Walk { bytes, at: 0, open: vec![Frame { message: &MODEL, end: bytes.len(), name: "" }] };
    while let Some(frame) = walk.open.last() {
        if walk.at < frame.end {
            walk.field()?;
        } else {
            walk.open.pop();
        }
    }
    Ok(())
}

struct Frame {
    message: &'static Message,
    end: usize,
    name: &'static str,
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    open: Vec<Frame>,
}

impl Walk<'_> {
    fn field(&mut self) -> Result<()> {
        let start = self.at;
        let Frame { message, .. } = *self.open.last().expect("inside a message");
        let key = self.varint("")?;
        let (number, wire) = (key >> 3, key & 7);
        let known = message.fields.iter().find(|f| u64::from(f.0) == number);
        let Some(&Field(_, name, shape)) = known else {
            return Err(self.unknown(start, number, wire));
        };
        let fits = match shape {
            Integer => wire == VARINT,
            Float => wire == FIXED32,
            Numbers(one) => wire == one || wire == DELIMITED,
            Bytes | Of(_) => wire == DELIMITED,
        };
        if !fits {
            return Err(damaged(start, &format!("field \"{}\" has wire type {wire}", self.path(name))));
        }
        match wire {
            VARINT => {
                self.varint(name)?;
            }
            FIXED64 => self.skip(8, name)?,
            FIXED32 => self.skip(4, name)?,
            _ => {
                let len = self.varint(name)?;
                let Of(inner) = shape else { return self.skip(len, name) };
                let end = self.end_of(len, name)?;
                if self.open.len() > MAX_DEPTH {
                    return Err(Error::model(format!("messages are nested more than {MAX_DEPTH} deep"))
                        .with_hint("no exporter writes this; the file is damaged or hostile"));
                }
                self.open.push(Frame { message: inner, end, name });
            }
        }
        Ok(())
    }

    fn varint(&mut self, name: &str) -> Result<u64> {
        let start = self.at;
        let end = self.open.last().expect("inside a message").end;
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            if self.at == end {
                return Err(self.too_short(1, name));
            }
            let byte = self.bytes[self.at];
            self.at += 1;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(damaged(start, "a number is longer than 64 bits"))
    }

    fn skip(&mut self, len: u64, name: &str) -> Result<()> {
        self.at = self.end_of(len, name)?;
        Ok(())
    }

    fn end_of(&self, len: u64, name: &str) -> Result<usize> {
        let end = usize::try_from(len).ok().and_then(|len| self.at.checked_add(len));
        match end {
            Some(end) if end <= self.open.last().expect("inside a message").end => Ok(end),
            _ => Err(self.too_short(len, name)),
        }
    }

    fn path(&self, name: &str) -> String {
        let open = self.open.iter().map(|f| f.name).chain([name]).filter(|n| !n.is_empty());
        open.collect::<Vec<_>>().join(".")
    }

    /// A field of `len` bytes runs over the end of its message. At the end of the file, the file was cut.
    fn too_short(&self, len: u64, name: &str) -> Error {
        let path = self.path(name);
        let file_ends = self.open.last().expect("inside a message").end == self.bytes.len();
        if file_ends && self.open.len() == 1 && !path.is_empty() {
            let missing = len.saturating_sub((self.bytes.len() - self.at) as u64);
            Error::model(format!("the file is truncated: \"{path}\" goes on for {missing} bytes after its end"))
                .with_hint("the download or export was interrupted; get the file again")
        } else {
            damaged(self.at, &format!("\"{path}\" is longer than what holds it"))
        }
    }

    fn unknown(&self, start: usize, number: u64, wire: u64) -> Error {
        if number == 0 || number >= 1 << 29 || !matches!(wire, VARINT | FIXED64 | DELIMITED | FIXED32) {
            return damaged(start, "this is not a protobuf field");
        }
        let path = self.path("");
        let place = if path.is_empty() { "the model".to_owned() } else { format!("\"{path}\"") };
        Error::model(format!(
            "{place} has field {number} at byte {start}, which ONNX IR version {} does not define",
            crate::onnx::MAX_IR_VERSION
        ))
        .with_hint(
            "amax would lose it on save; if it may be lost, drop it with DiscardUnknownFields() of Python's protobuf",
        )
    }
}

fn damaged(start: usize, what: &str) -> Error {
    Error::model(format!("not an ONNX model: at byte {start}, {what}"))
        .with_hint("the file is of another kind, or damaged")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;
    use prost::encoding::encode_varint;

    use super::*;
    use crate::onnx::ModelProto;

    fn key(number: u32, wire: u64, out: &mut Vec<u8>) {
        encode_varint(u64::from(number) << 3 | wire, out);
    }

    fn delimited(number: u32, content: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        key(number, DELIMITED, &mut out);
        encode_varint(content.len() as u64, &mut out);
        out.extend(content);
        out
    }

    /// The bytes of one field that is not empty.
    fn sample(number: u32, shape: Shape) -> Vec<u8> {
        let mut out = Vec::new();
        match shape {
            Integer | Numbers(VARINT) => {
                key(number, VARINT, &mut out);
                out.push(3);
            }
            Float | Numbers(FIXED32) => {
                key(number, FIXED32, &mut out);
                out.extend(1f32.to_le_bytes());
            }
            Numbers(_) => {
                key(number, FIXED64, &mut out);
                out.extend(1f64.to_le_bytes());
            }
            Bytes => out = delimited(number, b"x"),
            Of(_) => out = delimited(number, &[]),
        }
        out
    }

    /// Whether the decoder keeps all of `bytes`; a number that it packs grows.
    fn kept(bytes: &[u8]) -> bool {
        ModelProto::decode(bytes).is_ok_and(|m| m.encoded_len() >= bytes.len())
    }

    /// Visits each message type once, along the fields `path` from the model.
    fn visit(message: &'static Message, path: &[u32], seen: &mut BTreeSet<usize>, checked: &mut usize) {
        if !seen.insert(std::ptr::from_ref(message) as usize) {
            return;
        }
        let wrap = |inner: Vec<u8>| path.iter().rev().fold(inner, |inner, &number| delimited(number, &inner));
        for number in 1..40 {
            let field = message.fields.iter().find(|f| f.0 == number);
            let shapes = match field {
                Some(&Field(_, _, shape)) => vec![shape],
                None => vec![Integer, Float, Bytes],
            };
            for shape in shapes {
                let bytes = wrap(sample(number, shape));
                assert_eq!(scan(&bytes).is_ok(), field.is_some(), "{path:?} {number}: {:?}", scan(&bytes));
                assert_eq!(kept(&bytes), field.is_some(), "{path:?} {number}: the schema and this table differ");
                *checked += 1;
            }
        }
        for &Field(number, _, shape) in message.fields {
            if let Of(inner) = shape {
                visit(inner, &[path, &[number]].concat(), seen, checked);
            }
        }
    }

    #[test]
    fn knows_the_fields_the_decoder_keeps() {
        let (mut seen, mut checked) = (BTreeSet::new(), 0);
        visit(&MODEL, &[], &mut seen, &mut checked);
        // TensorType and SparseTensor have one shape, as do Sequence and Optional.
        assert_eq!(seen.len(), 26);
        assert!(checked > 2000, "{checked}");
    }
}
