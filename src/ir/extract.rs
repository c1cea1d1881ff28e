//! A part of a model as a model.

use std::collections::BTreeSet;
use std::ops::Range;

use super::{Model, NodeId, ValueId, verify};
use crate::error::Result;
use crate::onnx::{TypeProto, ValueInfoProto};

impl Model {
    /// The values that a node reads, and those of outer graphs that bodies in it read, in the order of their making.
    #[must_use]
    pub fn reads(&self, node: NodeId) -> BTreeSet<ValueId> {
        let mut found: BTreeSet<ValueId> = self.node(node).inputs().iter().copied().flatten().collect();
        for body in self.node(node).bodies() {
            found.extend(self.graph(body).outputs());
            for &inner in self.graph(body).nodes() {
                found.extend(self.reads(inner));
            }
        }
        found
    }

    /// The nodes at positions `nodes` of the main graph as a model of their own: its inputs and outputs are those given,
    /// its initializers those that the nodes read. Weights are shared with this model, not copied.
    ///
    /// # Errors
    /// Inputs or outputs with which the part is not a valid model.
    pub fn extract(&self, nodes: Range<usize>, inputs: &[(String, TypeProto)], outputs: &[String]) -> Result<Self> {
        let mut proto = self.to_proto(&mut |tensor, bytes| {
            tensor.data_location = None;
            tensor.external_data.clear();
            tensor.raw_data = Some(bytes);
        });
        let main = self.graph(self.main());
        let inside = main.nodes().get(nodes.clone()).unwrap_or_default();
        let read: BTreeSet<&str> = inside.iter().flat_map(|&n| self.reads(n)).map(|v| self.value(v).name()).collect();
        let made: BTreeSet<&str> = inside
            .iter()
            .flat_map(|&n| self.node(n).outputs().iter().flatten())
            .map(|&v| self.value(v).name())
            .collect();
        let typed = |name: &String| {
            let value = self.value_named(name);
            let ty = value.and_then(|v| self.value(v).ty()).cloned();
            ValueInfoProto { name: Some(name.clone()), r#type: ty, ..ValueInfoProto::default() }
        };
        if let Some(graph) = &mut proto.graph {
            let all = std::mem::take(&mut graph.node);
            graph.node = all.into_iter().skip(nodes.start).take(nodes.len()).collect();
            graph.initializer.retain(|t| t.name.as_deref().is_some_and(|n| read.contains(n)));
            graph
                .value_info
                .retain(|i| i.name.as_deref().is_some_and(|n| made.contains(n) && !outputs.iter().any(|o| o == n)));
            graph.quantization_annotation.clear();
            graph.input = inputs
                .iter()
                .map(|(name, ty)| ValueInfoProto {
                    name: Some(name.clone()),
                    r#type: Some(ty.clone()),
                    ..ValueInfoProto::default()
                })
                .collect();
            graph.output = outputs.iter().map(typed).collect();
        }
        proto.training_info.clear();
        let mut part = Self::from_proto(proto, &mut |_| Ok(bytes::Bytes::new()))?;
        part.path.clone_from(&self.path);
        verify::verify(&part)?;
        Ok(part)
    }
}
