//! Attributes, read.

use bytes::Bytes;

use super::tokens::{Literal, Parser, is_float_word, is_type_word};
use crate::error::Result;
use crate::onnx::{AttributeProto, GraphProto, SparseTensorProto, TensorProto, TypeProto, attribute_type, type_proto};

/// Kinds of attributes by their names in the syntax.
pub(super) const KINDS: [(&str, i32); 14] = [
    ("float", attribute_type::FLOAT),
    ("int", attribute_type::INT),
    ("string", attribute_type::STRING),
    ("tensor", attribute_type::TENSOR),
    ("graph", attribute_type::GRAPH),
    ("sparse_tensor", attribute_type::SPARSE_TENSOR),
    ("type_proto", attribute_type::TYPE_PROTO),
    ("floats", attribute_type::FLOATS),
    ("ints", attribute_type::INTS),
    ("strings", attribute_type::STRINGS),
    ("tensors", attribute_type::TENSORS),
    ("graphs", attribute_type::GRAPHS),
    ("sparse_tensors", attribute_type::SPARSE_TENSORS),
    ("type_protos", attribute_type::TYPE_PROTOS),
];

/// The value of an attribute, or one of its list.
enum Single {
    Float(f32),
    Int(i64),
    Text(Vec<u8>),
    Tensor(TensorProto),
    Graph(GraphProto),
    Sparse(Box<SparseTensorProto>),
    Type(TypeProto),
}

impl Single {
    fn kind(&self) -> i32 {
        match self {
            Self::Float(_) => attribute_type::FLOAT,
            Self::Int(_) => attribute_type::INT,
            Self::Text(_) => attribute_type::STRING,
            Self::Tensor(_) => attribute_type::TENSOR,
            Self::Graph(_) => attribute_type::GRAPH,
            Self::Sparse(_) => attribute_type::SPARSE_TENSOR,
            Self::Type(_) => attribute_type::TYPE_PROTO,
        }
    }
}

/// The kind of the lists of a kind.
fn list_kind(single: i32) -> i32 {
    match single {
        attribute_type::FLOAT => attribute_type::FLOATS,
        attribute_type::INT => attribute_type::INTS,
        attribute_type::STRING => attribute_type::STRINGS,
        attribute_type::TENSOR => attribute_type::TENSORS,
        attribute_type::GRAPH => attribute_type::GRAPHS,
        attribute_type::SPARSE_TENSOR => attribute_type::SPARSE_TENSORS,
        attribute_type::TYPE_PROTO => attribute_type::TYPE_PROTOS,
        list => list,
    }
}

/// The kind of the entries of a kind of list.
fn single_kind(kind: i32) -> i32 {
    KINDS.iter().map(|(_, k)| *k).find(|&k| k != kind && list_kind(k) == kind).unwrap_or(kind)
}

impl Parser<'_> {
    pub(super) fn attributes(&mut self) -> Result<Vec<AttributeProto>> {
        let mut attributes = Vec::new();
        if self.accept("<") {
            loop {
                let name = self.name("the name of an attribute")?;
                attributes.push(self.attribute(name)?);
                if self.accept(">") {
                    break;
                }
                if !self.accept(",") {
                    return self.expected("`,` or `>`");
                }
            }
        }
        Ok(attributes)
    }

    /// What follows the name of an attribute.
    pub(super) fn attribute(&mut self, name: String) -> Result<AttributeProto> {
        let mut attr = AttributeProto { name: Some(name), ..AttributeProto::default() };
        let mut kind = 0;
        if self.accept(":") {
            self.blank();
            let from = self.at;
            let word = self.word();
            let Some((_, found)) = KINDS.iter().find(|(name, _)| *name == word) else {
                let known = KINDS.map(|(name, _)| name).join(", ");
                return Err(self.error(from, "not the type of an attribute").with_hint(format!("one of {known}")));
            };
            kind = *found;
            attr.r#type = Some(kind);
        }
        self.expect("=")?;
        if self.accept("@") {
            attr.ref_attr_name = Some(self.name("the name of the function's attribute")?);
            return Ok(attr);
        }
        self.blank();
        let from = self.at;
        if self.accept("[") {
            let mut entries = single_kind(kind);
            self.list("]", |p| {
                p.blank();
                let from = p.at;
                let value = p.single(entries)?;
                p.check_kind(from, entries, value.kind())?;
                entries = value.kind();
                match value {
                    Single::Float(v) => attr.floats.push(v),
                    Single::Int(v) => attr.ints.push(v),
                    Single::Text(v) => attr.strings.push(Bytes::from(v)),
                    Single::Tensor(v) => attr.tensors.push(v),
                    Single::Graph(v) => attr.graphs.push(v),
                    Single::Sparse(v) => attr.sparse_tensors.push(*v),
                    Single::Type(v) => attr.type_protos.push(v),
                }
                Ok(())
            })?;
            if entries == 0 {
                return Err(self
                    .error(from, "an empty list needs a type")
                    .with_hint("write for example `a: ints = []`"));
            }
            attr.r#type = Some(list_kind(entries));
            return Ok(attr);
        }
        let value = self.single(kind)?;
        self.check_kind(from, kind, value.kind())?;
        attr.r#type = Some(value.kind());
        match value {
            Single::Float(v) => attr.f = Some(v),
            Single::Int(v) => attr.i = Some(v),
            Single::Text(v) => attr.s = Some(Bytes::from(v)),
            Single::Tensor(v) => attr.t = Some(v),
            Single::Graph(v) => attr.g = Some(v),
            Single::Sparse(v) => attr.sparse_tensor = Some(*v),
            Single::Type(v) => attr.tp = Some(v),
        }
        Ok(attr)
    }

    fn check_kind(&self, from: usize, wanted: i32, found: i32) -> Result<()> {
        let name = |kind| super::print::kind_name(kind).unwrap_or("undefined");
        if wanted == 0 || wanted == found {
            return Ok(());
        }
        Err(self.error(from, format!("expected a value of type {}, found one of type {}", name(wanted), name(found))))
    }

    fn single(&mut self, wanted: i32) -> Result<Single> {
        let word = self.peek_word();
        let from = self.at;
        if is_type_word(word) {
            let ty = self.ty()?;
            let next = self.peek();
            if let (Some(type_proto::Value::SparseTensorType(sparse)), Some(b'{')) = (&ty.value, next) {
                return Ok(Single::Sparse(Box::new(self.sparse(from, sparse)?)));
            }
            let more = next.is_some_and(|b| matches!(b, b'{' | b'=' | b'.' | b'"' | b'_') || b.is_ascii_alphabetic());
            return if more { Ok(Single::Tensor(self.named_tensor(from, &ty)?)) } else { Ok(Single::Type(ty)) };
        }
        let is_hex = word == "hex" && self.text[self.at + 3..].starts_with('"');
        if !word.is_empty() && !is_float_word(word) && !is_hex {
            let name = self.word().to_owned();
            return Ok(Single::Graph(self.graph(name)?));
        }
        Ok(match self.literal()? {
            Literal::Int(text) if wanted == attribute_type::FLOAT => Single::Float(self.f32(from, text)?),
            Literal::Int(text) => {
                Single::Int(text.parse().map_err(|_| self.error(from, "the integer does not fit into 64 bits"))?)
            }
            Literal::Float(text) => Single::Float(self.f32(from, text)?),
            Literal::Nan(bits) => Single::Float(self.nan32(from, bits)?),
            Literal::Text(text) => {
                // A graph's name in quotes.
                if self.peek() == Some(b'(') && self.text.as_bytes()[from] == b'"' {
                    let name = String::from_utf8_lossy(&text).into_owned();
                    return Ok(Single::Graph(self.graph(name)?));
                }
                Single::Text(text)
            }
        })
    }
}
