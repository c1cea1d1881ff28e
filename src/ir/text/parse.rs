//! The parser: recursive descent over the text, straight into messages.

use bytes::Bytes;

use super::elements::{encode, entries_per_element, entry_bits, fill, is_signed, is_small_float, pack};
use crate::error::{Error, Result};
use crate::ir::element_count;
use crate::onnx::{
    AttributeProto, DATA_LOCATION_EXTERNAL, DataType, FunctionProto, GraphProto, ModelProto, NodeProto,
    OperatorSetIdProto, SparseTensorProto, StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto, attribute_type, tensor_shape_proto, type_proto,
};

/// Bodies and types may nest this deep; a file may too, as messages nest at most 100 deep.
const MAX_DEPTH: usize = 64;
/// Most elements that are made up for one tensor.
const MAX_FILL: usize = 1 << 28;
/// Columns of the offending line that an error shows.
const SHOWN: usize = 100;

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

pub(super) fn model(text: &str, fill: bool) -> Result<ModelProto> {
    Parser { text, at: 0, depth: 0, fill }.model()
}

/// Whether `name` needs no quotes.
pub(super) fn is_identifier(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// Whether `word` starts a type.
pub(super) fn is_type_word(word: &str) -> bool {
    matches!(word, "seq" | "map" | "optional" | "sparse_tensor" | "opaque") || dtype_code(word).is_some()
}

/// Whether `word` is a float.
pub(super) fn is_float_word(word: &str) -> bool {
    ["inf", "infinity", "nan"].iter().any(|f| word.eq_ignore_ascii_case(f))
}

/// The code of an element type; 0 for `undefined`.
fn dtype_code(word: &str) -> Option<i32> {
    if word == "undefined" {
        return Some(0);
    }
    DataType::ALL.iter().find(|d| d.name() == word).map(|d| d.code())
}

/// A number or a string as written.
enum Literal<'a> {
    Int(&'a str),
    Float(&'a str),
    /// A NaN by its bits.
    Nan(u64),
    Text(Vec<u8>),
}

/// The value of an attribute, or one of its list.
enum Single {
    Float(f32),
    Int(i64),
    Text(Vec<u8>),
    Tensor(TensorProto),
    Graph(GraphProto),
    Sparse(SparseTensorProto),
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

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
    fill: bool,
}

impl<'a> Parser<'a> {
    /// An error at byte `at`, with its line.
    fn error(&self, at: usize, message: impl AsRef<str>) -> Error {
        let at = at.min(self.text.len());
        let start = self.text[..at].rfind('\n').map_or(0, |n| n + 1);
        let end = self.text[at..].find('\n').map_or(self.text.len(), |n| at + n);
        let number = self.text[..at].bytes().filter(|&b| b == b'\n').count() + 1;
        let column = self.text[start..at].chars().count();
        let skipped = if column >= SHOWN { column - SHOWN / 2 } else { 0 };
        let printable = |c: char| if c.is_control() { ' ' } else { c };
        let shown: String = self.text[start..end].chars().skip(skipped).take(SHOWN).map(printable).collect();
        let margin = " ".repeat(number.to_string().len());
        let caret = " ".repeat(column - skipped);
        Error::model(format!(
            "line {number}, column {}: {}\n{number} | {}\n{margin} | {caret}^",
            column + 1,
            message.as_ref(),
            shown.trim_end(),
        ))
    }

    /// An error at the next token.
    fn expected<T>(&mut self, what: &str) -> Result<T> {
        self.blank();
        let rest = &self.text[self.at..];
        let word = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let found = match rest.chars().next() {
            None => "the end of the text".to_owned(),
            Some(_) if word > 0 => format!("`{}`", &rest[..word]),
            Some(c) => format!("`{}`", c.escape_debug()),
        };
        Err(self.error(self.at, format!("expected {what}, found {found}")))
    }

    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Skips white space and comments.
    fn blank(&mut self) {
        while let Some(byte) = self.byte() {
            match byte {
                b' ' | b'\t' | b'\n' | 0x0b | 0x0c | b'\r' => self.at += 1,
                b'#' => self.at += self.text[self.at..].find('\n').unwrap_or(self.text.len() - self.at),
                _ => break,
            }
        }
    }

    fn peek(&mut self) -> Option<u8> {
        self.blank();
        self.byte()
    }

    fn accept(&mut self, token: &str) -> bool {
        self.blank();
        let found = self.text[self.at..].starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn expect(&mut self, token: &str) -> Result<()> {
        if self.accept(token) { Ok(()) } else { self.expected(&format!("`{token}`")) }
    }

    /// Bytes of the text that satisfy `test`, from here on.
    fn run(&mut self, test: impl Fn(u8) -> bool) -> &'a str {
        let from = self.at;
        while self.byte().is_some_and(&test) {
            self.at += 1;
        }
        &self.text[from..self.at]
    }

    /// An identifier; empty where there is none.
    fn word(&mut self) -> &'a str {
        match self.peek() {
            Some(b) if b.is_ascii_alphabetic() || b == b'_' => self.run(|b| b.is_ascii_alphanumeric() || b == b'_'),
            _ => "",
        }
    }

    /// What [`Self::word`] would return.
    fn peek_word(&mut self) -> &'a str {
        self.blank();
        let from = self.at;
        let word = self.word();
        self.at = from;
        word
    }

    fn name(&mut self, what: &str) -> Result<String> {
        if self.peek() == Some(b'"') {
            return self.quoted();
        }
        match self.word() {
            "" => self.expected(what),
            word => Ok(word.to_owned()),
        }
    }

    /// A string, which must be next.
    fn quoted(&mut self) -> Result<String> {
        if self.peek() != Some(b'"') {
            return self.expected("a string in double quotes");
        }
        let from = self.at;
        let mut out = String::new();
        let mut chars = self.text[from + 1..].char_indices();
        while let Some((offset, c)) = chars.next() {
            match c {
                '"' => {
                    self.at = from + 1 + offset + 1;
                    return Ok(out);
                }
                '\\' => out.extend(chars.next().map(|(_, c)| c)),
                c => out.push(c),
            }
        }
        Err(self.error(from, "the string has no end"))
    }

    fn literal(&mut self) -> Result<Literal<'a>> {
        let Some(first) = self.peek() else { return self.expected("a value") };
        let from = self.at;
        if first == b'"' {
            return Ok(Literal::Text(self.quoted()?.into_bytes()));
        }
        if first == b'-' {
            self.at += 1;
        }
        if self.byte().is_some_and(|b| b.is_ascii_digit()) {
            self.run(|b| b.is_ascii_digit());
            let mut float = false;
            // Not the dots of an elision.
            if self.byte() == Some(b'.') && !self.text[self.at..].starts_with("..") {
                float = true;
                self.at += 1;
                self.run(|b| b.is_ascii_digit());
            }
            if matches!(self.byte(), Some(b'e' | b'E')) {
                float = true;
                self.at += 1;
                if matches!(self.byte(), Some(b'+' | b'-')) {
                    self.at += 1;
                }
                if self.run(|b| b.is_ascii_digit()).is_empty() {
                    return Err(self.error(from, "the exponent has no digits"));
                }
            }
            let text = &self.text[from..self.at];
            return Ok(if float { Literal::Float(text) } else { Literal::Int(text) });
        }
        let word = self.run(|b| b.is_ascii_alphanumeric() || b == b'_');
        if is_float_word(word) {
            if word == "nan" && self.text[self.at..].starts_with("(0x") {
                self.at += 3;
                let digits = self.run(|b| b.is_ascii_hexdigit());
                let Ok(bits) = u64::from_str_radix(digits, 16) else {
                    return Err(self.error(from, "not the bits of a NaN"));
                };
                self.expect(")")?;
                return Ok(Literal::Nan(bits));
            }
            return Ok(Literal::Float(&self.text[from..self.at]));
        }
        if word == "hex" && first != b'-' && self.byte() == Some(b'"') {
            let digits = self.quoted()?;
            return match unhex(&digits) {
                Some(bytes) => Ok(Literal::Text(bytes)),
                None => Err(self.error(from, "not pairs of hexadecimal digits")),
            };
        }
        self.at = from;
        self.expected("a number or a string")
    }

    fn int(&mut self) -> Result<i64> {
        self.blank();
        let from = self.at;
        if !self.byte().is_some_and(|b| b == b'-' || b.is_ascii_digit()) {
            return self.expected("an integer");
        }
        match self.literal()? {
            Literal::Int(text) => text.parse().map_err(|_| self.error(from, "the integer does not fit into 64 bits")),
            _ => Err(self.error(from, "expected an integer")),
        }
    }

    fn f32(&self, from: usize, text: &str) -> Result<f32> {
        match text.parse::<f32>() {
            Ok(v) if v.is_infinite() && !text.contains(['i', 'I']) => {
                Err(self.error(from, "the number does not fit into 32 bits"))
            }
            Ok(v) => Ok(v),
            Err(_) => Err(self.error(from, "not a number")),
        }
    }

    fn f64(&self, from: usize, text: &str) -> Result<f64> {
        match text.parse::<f64>() {
            Ok(v) if v.is_infinite() && !text.contains(['i', 'I']) => {
                Err(self.error(from, "the number does not fit into 64 bits"))
            }
            Ok(v) => Ok(v),
            Err(_) => Err(self.error(from, "not a number")),
        }
    }

    /// Items up to `close`, which is consumed.
    fn list(&mut self, close: &str, mut item: impl FnMut(&mut Self) -> Result<()>) -> Result<()> {
        if self.accept(close) {
            return Ok(());
        }
        loop {
            item(self)?;
            if self.accept(close) {
                return Ok(());
            }
            if !self.accept(",") {
                return self.expected(&format!("`,` or `{close}`"));
            }
        }
    }

    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth == MAX_DEPTH {
            return Err(self.error(self.at, format!("graphs and types nest more than {MAX_DEPTH} deep")));
        }
        self.depth += 1;
        let result = parse(self);
        self.depth -= 1;
        result
    }

    fn model(&mut self) -> Result<ModelProto> {
        let mut model = ModelProto::default();
        if self.accept("<") {
            self.list(">", |p| {
                p.blank();
                let from = p.at;
                let key = p.word();
                p.expect(":")?;
                match key {
                    "ir_version" => model.ir_version = Some(p.int()?),
                    "opset_import" => model.opset_import.extend(p.imports()?),
                    "producer_name" => model.producer_name = Some(p.quoted()?),
                    "producer_version" => model.producer_version = Some(p.quoted()?),
                    "domain" => model.domain = Some(p.quoted()?),
                    "model_version" => model.model_version = Some(p.int()?),
                    "doc_string" => model.doc_string = Some(p.quoted()?),
                    "metadata_props" => model.metadata_props.extend(p.pairs()?),
                    _ => return Err(p.error(from, format!("a model has no `{key}`"))),
                }
                Ok(())
            })?;
        }
        let name = self.name("the name of the graph")?;
        model.graph = Some(self.graph(name)?);
        while self.peek().is_some() {
            model.functions.push(self.function()?);
        }
        Ok(model)
    }

    fn imports(&mut self) -> Result<Vec<OperatorSetIdProto>> {
        let mut imports = Vec::new();
        self.expect("[")?;
        self.list("]", |p| {
            let domain = Some(p.quoted()?);
            p.expect(":")?;
            imports.push(OperatorSetIdProto { domain, version: Some(p.int()?) });
            Ok(())
        })?;
        Ok(imports)
    }

    fn pairs(&mut self) -> Result<Vec<StringStringEntryProto>> {
        let mut pairs = Vec::new();
        self.expect("[")?;
        self.list("]", |p| {
            let key = Some(p.quoted()?);
            p.expect(":")?;
            pairs.push(StringStringEntryProto { key, value: Some(p.quoted()?) });
            Ok(())
        })?;
        Ok(pairs)
    }

    fn graph(&mut self, name: String) -> Result<GraphProto> {
        self.deeper(|p| {
            let mut graph = GraphProto { name: Some(name), ..GraphProto::default() };
            p.expect("(")?;
            p.list(")", |p| {
                let (info, _) = p.value_info()?;
                if p.accept("=") {
                    let initializer = p.initializer(&info)?;
                    graph.initializer.push(initializer);
                }
                graph.input.push(info);
                Ok(())
            })?;
            p.expect("=>")?;
            p.expect("(")?;
            p.list(")", |p| {
                graph.output.push(p.value_info()?.0);
                Ok(())
            })?;
            if p.accept("<") {
                p.list(">", |p| p.entry(&mut graph))?;
            }
            graph.node = p.nodes()?;
            Ok(graph)
        })
    }

    /// An initializer or the type of a value.
    fn entry(&mut self, graph: &mut GraphProto) -> Result<()> {
        let (info, at) = self.value_info()?;
        if !self.accept("=") {
            graph.value_info.push(info);
            return Ok(());
        }
        match info.r#type.as_ref().and_then(|t| t.value.as_ref()) {
            Some(type_proto::Value::SparseTensorType(ty)) => {
                let mut sparse = self.sparse(at, ty)?;
                sparse.values.get_or_insert_default().name = info.name;
                graph.sparse_initializer.push(sparse);
            }
            _ => graph.initializer.push(self.initializer(&info)?),
        }
        Ok(())
    }

    fn initializer(&mut self, info: &ValueInfoProto) -> Result<TensorProto> {
        self.blank();
        let at = self.at;
        let Some(ty) = &info.r#type else {
            return Err(self.error(at, "a value with elements needs a type in front of its name"));
        };
        self.tensor(at, ty, info.name.clone())
    }

    /// A name with its type, and where that started.
    fn value_info(&mut self) -> Result<(ValueInfoProto, usize)> {
        self.blank();
        let at = self.at;
        let word = self.peek_word();
        let r#type = if is_type_word(word) { Some(self.ty()?) } else { None };
        let name = Some(self.name("a type and a name")?);
        Ok((ValueInfoProto { name, r#type, ..ValueInfoProto::default() }, at))
    }

    fn function(&mut self) -> Result<FunctionProto> {
        let mut function = FunctionProto::default();
        if self.accept("<") {
            self.list(">", |p| {
                p.blank();
                let from = p.at;
                let key = p.word();
                p.expect(":")?;
                match key {
                    "domain" => function.domain = Some(p.quoted()?),
                    "overload" => function.overload = Some(p.quoted()?),
                    "opset_import" => function.opset_import.extend(p.imports()?),
                    "doc_string" => function.doc_string = Some(p.quoted()?),
                    _ => return Err(p.error(from, format!("a function has no `{key}`"))),
                }
                Ok(())
            })?;
        }
        function.name = Some(self.name("the name of a function")?);
        if self.accept("<") {
            self.list(">", |p| {
                let name = p.name("the name of an attribute")?;
                if matches!(p.peek(), Some(b':' | b'=')) {
                    function.attribute_proto.push(p.attribute(name)?);
                } else {
                    function.attribute.push(name);
                }
                Ok(())
            })?;
        }
        let mut infos = Vec::new();
        let mut ports = |p: &mut Self| -> Result<Vec<String>> {
            let mut names = Vec::new();
            p.expect("(")?;
            p.list(")", |p| {
                let (info, _) = p.value_info()?;
                names.extend(info.name.clone());
                if info.r#type.is_some() {
                    infos.push(info);
                }
                Ok(())
            })?;
            Ok(names)
        };
        function.input = ports(self)?;
        self.expect("=>")?;
        function.output = ports(self)?;
        function.value_info = infos;
        if self.accept("<") {
            self.list(">", |p| {
                function.value_info.push(p.value_info()?.0);
                Ok(())
            })?;
        }
        function.node = self.nodes()?;
        Ok(function)
    }

    fn nodes(&mut self) -> Result<Vec<NodeProto>> {
        let mut nodes = Vec::new();
        self.expect("{")?;
        while !self.accept("}") {
            nodes.push(self.node()?);
        }
        Ok(nodes)
    }

    fn node(&mut self) -> Result<NodeProto> {
        let mut node = NodeProto::default();
        if self.accept("[") {
            node.name = Some(if self.peek() == Some(b']') { String::new() } else { self.name("the name of a node")? });
            self.expect("]")?;
        }
        node.output = self.ids()?;
        self.expect("=")?;
        let mut parts = vec![self.name("an operator")?];
        while self.accept(".") {
            parts.push(self.name("an operator")?);
        }
        node.op_type = parts.pop();
        node.domain = (!parts.is_empty()).then(|| parts.join("."));
        if self.accept(":") {
            node.overload = Some(self.name("an overload")?);
        }
        node.attribute = self.attributes()?;
        self.expect("(")?;
        node.input = self.ids()?;
        self.expect(")")?;
        if node.attribute.is_empty() {
            node.attribute = self.attributes()?;
        }
        Ok(node)
    }

    /// Names, of which some may be left out: `""`, or nothing before a comma. A last comma adds no name.
    fn ids(&mut self) -> Result<Vec<String>> {
        let mut ids = Vec::new();
        loop {
            match self.peek() {
                Some(b'"') => ids.push(self.quoted()?),
                next => match self.word() {
                    "" if next != Some(b',') => return Ok(ids),
                    word => ids.push(word.to_owned()),
                },
            }
            if !self.accept(",") {
                return Ok(ids);
            }
        }
    }

    fn attributes(&mut self) -> Result<Vec<AttributeProto>> {
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
    fn attribute(&mut self, name: String) -> Result<AttributeProto> {
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
                    Single::Sparse(v) => attr.sparse_tensors.push(v),
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
            Single::Sparse(v) => attr.sparse_tensor = Some(v),
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
                return Ok(Single::Sparse(self.sparse(from, sparse)?));
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

    fn nan32(&self, from: usize, bits: u64) -> Result<f32> {
        u32::try_from(bits)
            .ok()
            .map(f32::from_bits)
            .filter(|v| v.is_nan())
            .ok_or_else(|| self.error(from, "not the bits of a NaN of 32 bits"))
    }

    fn ty(&mut self) -> Result<TypeProto> {
        self.deeper(|p| {
            p.blank();
            let from = p.at;
            let word = p.word();
            let value = if let Some(code) = dtype_code(word) {
                type_proto::Value::TensorType(type_proto::Tensor { elem_type: Some(code), shape: p.shape()? })
            } else {
                p.expect("(")?;
                let value = match word {
                    "seq" => type_proto::Value::SequenceType(type_proto::Sequence { elem_type: p.inner()? }),
                    "optional" => type_proto::Value::OptionalType(type_proto::Optional { elem_type: p.inner()? }),
                    "map" => {
                        let key_type = Some(p.dtype()?);
                        let value_type = if p.accept(",") { p.inner()? } else { None };
                        type_proto::Value::MapType(type_proto::Map { key_type, value_type })
                    }
                    "sparse_tensor" => {
                        let elem_type = Some(p.dtype()?);
                        type_proto::Value::SparseTensorType(type_proto::SparseTensor { elem_type, shape: p.shape()? })
                    }
                    "opaque" => type_proto::Value::OpaqueType(p.opaque()?),
                    _ => return Err(p.error(from, "not a type")),
                };
                p.expect(")")?;
                value
            };
            Ok(TypeProto { value: Some(value), denotation: None })
        })
    }

    fn dtype(&mut self) -> Result<i32> {
        self.blank();
        let from = self.at;
        dtype_code(self.word()).ok_or_else(|| self.error(from, "not an element type"))
    }

    fn inner(&mut self) -> Result<Option<Box<TypeProto>>> {
        if self.peek() == Some(b')') {
            return Ok(None);
        }
        if !is_type_word(self.peek_word()) {
            return self.expected("a type");
        }
        Ok(Some(Box::new(self.ty()?)))
    }

    fn opaque(&mut self) -> Result<type_proto::Opaque> {
        if self.peek() == Some(b')') {
            return Ok(type_proto::Opaque::default());
        }
        let mut first = self.name("a name")?;
        while self.accept(".") {
            first = format!("{first}.{}", self.name("a name")?);
        }
        Ok(if self.accept(",") {
            type_proto::Opaque { domain: Some(first), name: Some(self.name("a name")?) }
        } else {
            type_proto::Opaque { domain: None, name: Some(first) }
        })
    }

    /// Dimensions: none is a scalar, `[]` an unknown rank.
    fn shape(&mut self) -> Result<Option<TensorShapeProto>> {
        let mut shape = TensorShapeProto::default();
        if self.accept("[") {
            if self.accept("]") {
                return Ok(None);
            }
            self.list("]", |p| {
                let value = match p.peek() {
                    Some(b'?') => {
                        p.at += 1;
                        None
                    }
                    Some(b) if b == b'-' || b.is_ascii_digit() => {
                        Some(tensor_shape_proto::dimension::Value::DimValue(p.int()?))
                    }
                    _ => Some(tensor_shape_proto::dimension::Value::DimParam(p.name("a dimension")?)),
                };
                shape.dim.push(tensor_shape_proto::Dimension { value, denotation: None });
                Ok(())
            })?;
        }
        Ok(Some(shape))
    }

    /// A tensor of an attribute or a sparse tensor, after its type.
    fn named_tensor(&mut self, at: usize, ty: &TypeProto) -> Result<TensorProto> {
        let name = match self.peek() {
            Some(b'"') => Some(self.quoted()?),
            _ => Some(self.word()).filter(|w| !w.is_empty()).map(str::to_owned),
        };
        self.accept("=");
        self.tensor(at, ty, name)
    }

    fn sparse(&mut self, at: usize, ty: &type_proto::SparseTensor) -> Result<SparseTensorProto> {
        let dims = self.fixed(at, ty.shape.as_ref())?;
        let part = |p: &mut Self| {
            p.blank();
            let at = p.at;
            if !is_type_word(p.peek_word()) {
                return p.expected("a tensor");
            }
            let ty = p.ty()?;
            p.named_tensor(at, &ty)
        };
        self.expect("{")?;
        let values = Some(part(self)?);
        self.expect(",")?;
        let indices = Some(part(self)?);
        self.expect("}")?;
        Ok(SparseTensorProto { values, indices, dims })
    }

    /// The dimensions of a tensor's type, which started at `at`.
    fn fixed(&self, at: usize, shape: Option<&TensorShapeProto>) -> Result<Vec<i64>> {
        let Some(shape) = shape else {
            return Err(self.error(at, "a tensor with elements needs a shape; `[]` is an unknown one"));
        };
        let dim = |d: &tensor_shape_proto::Dimension| match d.value {
            Some(tensor_shape_proto::dimension::Value::DimValue(n)) if n >= 0 => Some(n),
            _ => None,
        };
        shape
            .dim
            .iter()
            .map(dim)
            .collect::<Option<_>>()
            .ok_or_else(|| self.error(at, "a tensor with elements needs dimensions that are numbers"))
    }

    /// The elements of a tensor of type `ty`, which started at `at`.
    fn tensor(&mut self, at: usize, ty: &TypeProto, name: Option<String>) -> Result<TensorProto> {
        let Some(type_proto::Value::TensorType(type_proto::Tensor { elem_type, shape })) = &ty.value else {
            return Err(self.error(at, "only a tensor has elements"));
        };
        let Some(dtype) = elem_type.and_then(DataType::from_code) else {
            return Err(self.error(at, "a tensor with elements needs an element type"));
        };
        let dims = self.fixed(at, shape.as_ref())?;
        let count = element_count(&dims)
            .filter(|n| n.checked_mul(16).is_some())
            .ok_or_else(|| self.error(at, "the tensor is too large"))?;
        let mut tensor = TensorProto { data_type: Some(dtype.code()), dims, name, ..TensorProto::default() };
        self.blank();
        let from = self.at;
        if self.peek() == Some(b'[') {
            tensor.data_location = Some(DATA_LOCATION_EXTERNAL);
            tensor.external_data = self.pairs()?;
            return Ok(tensor);
        }
        if self.accept("...") {
            self.filled(from, &mut tensor, dtype, count)?;
            return Ok(tensor);
        }
        if !self.accept("{") {
            return self.expected("the elements of a tensor: `{`, `...` or `[`");
        }
        if self.accept("...") {
            self.expect("}")?;
            self.filled(from, &mut tensor, dtype, count)?;
            return Ok(tensor);
        }
        let Some(bits) = entry_bits(dtype) else {
            self.list("}", |p| {
                p.blank();
                let from = p.at;
                match p.literal()? {
                    Literal::Text(text) => tensor.string_data.push(Bytes::from(text)),
                    _ => return Err(p.error(from, "expected a string")),
                }
                Ok(())
            })?;
            self.check_count(from, dtype, &tensor.dims, tensor.string_data.len(), count)?;
            return Ok(tensor);
        };
        let mut codes = Vec::new();
        let mut widest = None;
        self.list("}", |p| {
            p.blank();
            let from = p.at;
            let code = p.element(dtype, bits)?;
            if bits < 8 && code >= 1 << bits {
                widest.get_or_insert((from, code));
            }
            codes.push(code);
            Ok(())
        })?;
        let packed = bits < 8 && codes.len() == (count * bits).div_ceil(8);
        if packed && (codes.len() != count || widest.is_some()) {
            tensor.raw_data = Some(codes.iter().map(|&c| c as u8).collect::<Vec<_>>().into());
            return Ok(tensor);
        }
        if let Some((at, code)) = widest {
            return Err(self.error(at, format!("{code} does not fit into {dtype}")));
        }
        self.check_count(from, dtype, &tensor.dims, codes.len(), count * entries_per_element(dtype))?;
        tensor.raw_data = Some(pack(bits, &codes).into());
        Ok(tensor)
    }

    fn check_count(&self, from: usize, dtype: DataType, dims: &[i64], found: usize, wanted: usize) -> Result<()> {
        if found == wanted {
            return Ok(());
        }
        Err(self.error(from, format!("{dtype} {dims:?} takes {wanted} elements, found {found}")))
    }

    /// An entry of a tensor, as a code. Entries of less than a byte may also be whole bytes.
    fn element(&mut self, dtype: DataType, bits: usize) -> Result<u64> {
        let from = self.at;
        let literal = self.literal()?;
        let misfit = |p: &Self, text: &str| p.error(from, format!("{text} does not fit into {dtype}"));
        match (dtype, literal) {
            (_, Literal::Text(_)) => Err(self.error(from, "expected a number")),
            (DataType::Float | DataType::Complex64, Literal::Int(text) | Literal::Float(text)) => {
                Ok(self.f32(from, text)?.to_bits().into())
            }
            (DataType::Float | DataType::Complex64, Literal::Nan(nan)) => Ok(self.nan32(from, nan)?.to_bits().into()),
            (DataType::Double | DataType::Complex128, Literal::Int(text) | Literal::Float(text)) => {
                Ok(self.f64(from, text)?.to_bits())
            }
            (DataType::Double | DataType::Complex128, Literal::Nan(nan)) if f64::from_bits(nan).is_nan() => Ok(nan),
            (_, Literal::Float(text)) if is_small_float(dtype) => {
                encode(dtype, self.f64(from, text)?).ok_or_else(|| {
                    misfit(self, text).with_hint("floats of 8 bits and less must be exact; integers are codes")
                })
            }
            (_, Literal::Float(_) | Literal::Nan(_)) => Err(self.error(from, format!("not a value of {dtype}"))),
            (_, Literal::Int(text)) => {
                let value: i128 = text.parse().map_err(|_| misfit(self, text))?;
                let low = if is_signed(dtype) { -(1i128 << (bits - 1)) } else { 0 };
                let high = match (bits < 8, is_signed(dtype)) {
                    (true, _) => 256,
                    (false, true) => 1i128 << (bits - 1),
                    (false, false) => 1i128 << bits,
                };
                if (low..high).contains(&value) {
                    let mask = if value < 0 { (1i128 << bits) - 1 } else { i128::from(u64::MAX) };
                    Ok((value & mask) as u64)
                } else {
                    Err(misfit(self, text))
                }
            }
        }
    }

    fn filled(&self, from: usize, tensor: &mut TensorProto, dtype: DataType, count: usize) -> Result<()> {
        if !self.fill {
            return Err(self.error(from, "the elements of this tensor were left out when it was printed").with_hint(
                "print with a higher limit, or read with a reader that fills elided tensors with made-up numbers",
            ));
        }
        if count > MAX_FILL {
            return Err(self.error(from, "the tensor is too large to be filled"));
        }
        let entries = count * entries_per_element(dtype);
        let codes = fill(dtype, tensor.name.as_deref().unwrap_or(""), &tensor.dims, entries);
        match entry_bits(dtype) {
            Some(bits) => tensor.raw_data = Some(pack(bits, &codes).into()),
            None => tensor.string_data = codes.iter().map(|c| Bytes::from(c.to_string())).collect(),
        }
        Ok(())
    }
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    if !digits.bytes().all(|b| b.is_ascii_hexdigit()) || digits.len() % 2 != 0 {
        return None;
    }
    (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).ok()).collect()
}
