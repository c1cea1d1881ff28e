//! The parser: recursive descent over the text, straight into messages. Here models, graphs, functions and nodes.

use super::tokens::{Parser, is_type_word};
use crate::error::Result;
use crate::onnx::{
    FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
    ValueInfoProto, type_proto,
};

pub(super) fn model(text: &str, fill: bool) -> Result<ModelProto> {
    Parser::new(text, fill).model()
}

impl Parser<'_> {
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

    pub(super) fn pairs(&mut self) -> Result<Vec<StringStringEntryProto>> {
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

    pub(super) fn graph(&mut self, name: String) -> Result<GraphProto> {
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
    pub(super) fn value_info(&mut self) -> Result<(ValueInfoProto, usize)> {
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
}
