//! `Scan` of opset 8, which had a batch axis.
//!
//! Its state variables and scanned tensors all had the batch in axis 0 and the sequence in axis 1. Since opset 9
//! there is no batch, so the node becomes a scan over the batch whose body is the scan over the sequence.

use super::Raising;
use crate::error::{Error, Result};
use crate::ir::{Attr, Def, GraphId, Model, Node, NodeId, Owner, Port, User, ValueId};
use crate::onnx::{AttributeProto, GraphProto, NodeProto, ValueInfoProto, attribute_type};

pub(super) fn nest_batches(raising: &mut Raising<'_>, node: NodeId) -> Result<Option<String>> {
    let slot = raising.model.node(node);
    if slot.input(0).is_some() {
        return Err(Error::model("sequences of different lengths (input 0) cannot be scanned from opset 9 on")
            .with_hint("pad the sequences and drop the lengths, or export the model again"));
    }
    let inputs = slot.inputs().get(1..).unwrap_or_default().to_vec();
    let Some(body) = slot.attr("body").and_then(|a| a.graphs().first().copied()) else {
        return Err(Error::model("attribute \"body\" is missing"));
    };
    let outputs = raising.model.graph(body).outputs().len();
    let scanned = raising.int(node, "num_scan_inputs")?.unwrap_or(0);
    let directions = raising.ints(node, "directions")?;

    let name = raising.model.node_name(node).to_owned();
    let model = &mut *raising.model;
    let rest = GraphProto { name: Some(format!("{name}.batch")), ..GraphProto::default() };
    let outer = model.open(Owner::Node(node), rest);
    let arguments = (0..inputs.len()).map(|i| add_input(model, outer, &format!("{name}.in{i}"))).collect::<Vec<_>>();
    let inner = NodeId(model.nodes.len() as u32);
    let mut attrs = std::mem::take(&mut model.nodes[node.0 as usize].attrs);
    attrs.retain(|a| a.name() == "body");
    attrs.push(plain(Attr::int("num_scan_inputs", scanned)));
    if let Some(directions) = directions {
        attrs.push(plain(Attr::ints("scan_input_directions", &directions)));
    }
    model.nodes.push(Node {
        graph: Some(outer),
        inputs: Vec::new(),
        outputs: Vec::new(),
        attrs,
        rest: NodeProto {
            name: Some(format!("{name}.sequence")),
            op_type: Some("Scan".to_owned()),
            ..NodeProto::default()
        },
    });
    model.graphs[outer.0 as usize].nodes.push(inner);
    model.graphs[body.0 as usize].owner = Owner::Node(inner);
    for (index, &argument) in arguments.iter().enumerate() {
        model.set_input(inner, index, Some(argument));
    }
    for index in 0..outputs {
        let value = model.new_value(outer, &format!("{name}.out{index}"), Def::Output { node: inner, index });
        model.nodes[inner.0 as usize].outputs.push(Some(value));
        model.values[value.0 as usize].users.push(User::Output { graph: outer, index });
        let port = port(model, value);
        model.graphs[outer.0 as usize].outputs.push(port);
    }

    // The empty message says that the attribute holds one graph.
    let proto = AttributeProto {
        name: Some("body".to_owned()),
        r#type: Some(attribute_type::GRAPH),
        g: Some(GraphProto::default()),
        ..AttributeProto::default()
    };
    let batch = Attr { proto, graphs: vec![outer] };
    model.nodes[node.0 as usize].attrs = vec![batch, plain(Attr::int("num_scan_inputs", inputs.len() as i64))];
    model.truncate_inputs(node, 0);
    for (index, input) in inputs.into_iter().enumerate() {
        model.set_input(node, index, input);
    }
    Ok(Some("nested in a Scan over the batch".to_owned()))
}

fn plain(proto: AttributeProto) -> Attr {
    Attr { proto, graphs: Vec::new() }
}

fn add_input(model: &mut Model, graph: GraphId, name: &str) -> ValueId {
    let value = model.new_value(graph, name, Def::Input { default: None });
    let port = port(model, value);
    model.graphs[graph.0 as usize].inputs.push(port);
    value
}

fn port(model: &Model, value: ValueId) -> Port {
    let name = Some(model.value(value).name().to_owned());
    Port { value: Some(value), info: ValueInfoProto { name, ..ValueInfoProto::default() } }
}
