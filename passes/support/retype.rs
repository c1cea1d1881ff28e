//! Gives nodes another float type to compute in: Casts stand where types meet, constants are converted.
//!
//! Inputs and outputs of the model keep their types. A tensor that exists in a second type has it behind its name: `x`,
//! `x_float32`.

use std::collections::{BTreeMap, HashMap};

use crate::ir::{Attr, Def, GraphId, Model, NewNode, NodeId, Owner, Place, Tensor, User, ValueId};
use crate::onnx::{DataType, TypeProto, type_proto};
use crate::ops;

/// Elements from which a constant is stored as it was, behind a Cast, rather than in more bits.
const LARGE: usize = 4096;

/// Inputs whose type is not that of what an operator computes.
const OTHERS: &[(&str, usize)] = &[("Resize", 1), ("Resize", 2), ("Upsample", 1)];

/// What a tensor is called in another type.
pub(crate) fn name_in(name: &str, dtype: DataType) -> String {
    let suffix = if dtype == DataType::Float { "float32" } else { dtype.name() };
    format!("{name}_{suffix}")
}

/// The tensor that a name means to nodes that compute in float32, where the model's own one has 16 bits.
pub(crate) fn widened(model: &Model, value: ValueId) -> ValueId {
    let other = model.value_named(&name_in(model.value(value).name(), DataType::Float));
    let cast = |to: ValueId, from: ValueId| {
        model.producer(to).is_some_and(|p| model.node(p).is("Cast") && model.node(p).input(0) == Some(from))
    };
    let constant = model.constant(value).is_some();
    other.filter(|&other| !constant && (cast(other, value) || cast(value, other))).unwrap_or(value)
}

/// Whether a value is read as an output of the model alone.
pub(crate) fn is_last(model: &Model, value: ValueId) -> bool {
    let users = model.value(value).users();
    users.iter().all(|user| matches!(user, User::Output { graph, .. } if *graph == model.main()))
}

struct Retype<'a> {
    model: &'a mut Model,
    /// The float types that values had.
    types: BTreeMap<ValueId, DataType>,
    /// What nodes compute in; others are left as they are.
    computes: &'a BTreeMap<NodeId, DataType>,
    /// The graphs of initializers.
    homes: HashMap<ValueId, GraphId>,
    made: HashMap<(ValueId, DataType), ValueId>,
}

/// The float types of all values that have one with quantizers.
pub(crate) fn float_types(model: &Model) -> BTreeMap<ValueId, DataType> {
    let mut types = ops::undeclared_types(model);
    for node in model.nodes_outside_functions() {
        let at = model.node(node);
        let bodies = at.bodies().flat_map(|body| model.graph(body).inputs());
        let values = at.inputs().iter().chain(at.outputs()).flatten().copied().chain(bodies);
        types.extend(values.filter_map(|v| Some((v, model.dtype(v)?))));
    }
    let outputs = model.graph(model.main()).outputs();
    types.extend(outputs.filter_map(|v| Some((v, model.dtype(v)?))));
    types.retain(|_, dtype| dtype.has_quantizers());
    types
}

/// Carries it out.
pub(crate) fn retype(model: &mut Model, types: BTreeMap<ValueId, DataType>, computes: &BTreeMap<NodeId, DataType>) {
    let all = model.nodes_outside_functions();
    let graphs = model.all_graphs();
    let homes = graphs.iter().flat_map(|&g| model.graph(g).initializers().iter().map(move |&v| (v, g))).collect();
    let mut retype = Retype { model, types, computes, homes, made: HashMap::new() };
    for &node in &all {
        retype.node(node);
    }
    for graph in graphs {
        retype.outputs(graph);
    }
    retype.declare(&all);
}

impl Retype<'_> {
    /// The type that a value is to have.
    fn to(&self, value: ValueId) -> Option<DataType> {
        let own = *self.types.get(&value)?;
        let node = match *self.model.value(value).def() {
            Def::Output { node, .. } => Some(node),
            Def::Input { .. } => self.owner(value),
            _ => None,
        };
        Some(node.and_then(|node| self.computes.get(&node)).copied().unwrap_or(own))
    }

    /// The node whose body has this input.
    fn owner(&self, value: ValueId) -> Option<NodeId> {
        match self.model.graph(self.model.home(value)?).owner() {
            Owner::Node(node) => Some(node),
            _ => None,
        }
    }

    fn node(&mut self, node: NodeId) {
        let at = self.model.node(node);
        if at.is("Cast") {
            return;
        }
        let op = at.op_type().to_owned();
        for (index, value) in at.inputs().to_vec().into_iter().enumerate() {
            let Some((value, &own)) = value.and_then(|v| Some((v, self.types.get(&v)?))) else { continue };
            let other = OTHERS.contains(&(&*op, index));
            let wanted = self.computes.get(&node).copied().filter(|_| !other).unwrap_or(own);
            let read = self.read(value, wanted);
            self.model.set_input(node, index, Some(read));
        }
    }

    /// A value in a type.
    fn read(&mut self, value: ValueId, wanted: DataType) -> ValueId {
        if self.to(value).is_none_or(|found| found == wanted) {
            return value;
        }
        if let Some(&made) = self.made.get(&(value, wanted)) {
            return made;
        }
        let made = self.convert(value, wanted);
        self.made.insert((value, wanted), made);
        made
    }

    fn convert(&mut self, value: ValueId, wanted: DataType) -> ValueId {
        let name = self.model.value(value).name().to_owned();
        let home = self.homes.get(&value).copied();
        if let (Some(tensor), Some(home)) = (self.model.constant(value), home) {
            let narrows = wanted != DataType::Float;
            if let Some(made) = converted(tensor, wanted).filter(|_| narrows || tensor.len() < LARGE) {
                return self.model.add_initializer(home, &name_in(&name, wanted), made);
            }
        }
        let place = match (self.model.producer(value), home) {
            (Some(node), _) => Place::After(node),
            (None, Some(home)) => Place::First(home),
            (None, None) => Place::First(self.model.home(value).unwrap_or(self.model.main())),
        };
        self.cast(value, wanted, place, &name_in(&name, wanted))
    }

    fn cast(&mut self, value: ValueId, to: DataType, place: Place, output: &str) -> ValueId {
        let new = NewNode::new("Cast", format!("{output}_Cast"), &[value], &[output]);
        let node = self.model.insert(place, new.with(Attr::int("to", to.code().into())));
        let made = self.model.node(node).output(0).expect("just made");
        if let Some(ty) = self.model.value(value).ty().cloned() {
            self.model.set_type(made, with_element(ty, to));
        }
        made
    }

    /// Outputs of the model keep their types, those of bodies are of that which their node has.
    fn outputs(&mut self, graph: GraphId) {
        let owner = match self.model.graph(graph).owner() {
            Owner::Main => None,
            Owner::Node(node) => Some(node),
            Owner::Function(..) => return,
        };
        let outputs: Vec<ValueId> = self.model.graph(graph).outputs().collect();
        for (index, value) in outputs.into_iter().enumerate() {
            let Some(&own) = self.types.get(&value) else { continue };
            let wanted = owner.and_then(|node| self.computes.get(&node)).copied().unwrap_or(own);
            let found = self.to(value);
            if found == Some(wanted) {
                continue;
            }
            if owner.is_some() || self.homes.contains_key(&value) {
                let read = self.read(value, wanted);
                self.model.set_user(User::Output { graph, index }, read);
                continue;
            }
            let name = self.model.value(value).name().to_owned();
            let Some(place) = self.model.producer(value).map(Place::After) else { continue };
            let made = self.cast(value, wanted, place, &format!("{name}_kept"));
            self.model.replace_uses(value, made, |user| matches!(user, User::Output { .. }));
            self.model.take_name(value, made, &name_in(&name, found.unwrap_or(DataType::Float)));
        }
    }

    /// Says which types there are now: of values, and in attributes.
    fn declare(&mut self, all: &[NodeId]) {
        for (value, own) in self.types.clone() {
            let (Some(to), Some(ty)) = (self.to(value), self.model.value(value).ty().cloned()) else { continue };
            if to != own {
                self.model.set_type(value, with_element(ty, to));
            }
        }
        for &node in all {
            let Some(&to) = self.computes.get(&node) else { continue };
            let at = self.model.node(node);
            let makes = at.outputs().iter().flatten().any(|v| self.types.contains_key(v));
            let code = |a: &Attr| a.proto().i.and_then(|i| DataType::from_code(i32::try_from(i).ok()?));
            let names = ["to", "dtype", "output_dtype"];
            let typed = |a: &&Attr| names.contains(&a.name()) && code(a).is_some_and(DataType::has_quantizers);
            let name = at.attrs().iter().find(typed).map(|a| a.name().to_owned());
            if let Some(name) = name.filter(|_| makes) {
                self.model.set_attr(node, Attr::int(&name, to.code().into()));
            }
            let fills = self.model.node(node).is("ConstantOfShape") && makes;
            if fills {
                let zero = || Tensor::from_f32(&[1], &[0.0]);
                let held = self.model.node(node).attr("value").and_then(|a| a.proto().t.clone());
                let held = held.map_or_else(|| Some(zero()), |proto| Tensor::from_proto(proto, None).ok());
                if let Some(made) = held.and_then(|tensor| converted(&tensor, to)) {
                    let mut attr = Attr::int("value", 0);
                    attr.i = None;
                    attr.r#type = Some(crate::onnx::attribute_type::TENSOR);
                    attr.t = Some(made.into_proto().0);
                    self.model.set_attr(node, attr);
                }
            }
        }
    }
}

/// A float tensor in another type; finite numbers stay finite.
fn converted(tensor: &Tensor, to: DataType) -> Option<Tensor> {
    let most = match to {
        DataType::Float16 => f64::from(half::f16::MAX.to_f32()),
        DataType::Bfloat16 => f64::from(half::bf16::MAX.to_f32()),
        _ => f64::from(f32::MAX),
    };
    let fit = |v: f32| if v.is_finite() { f64::from(v).clamp(-most, most) } else { f64::from(v) };
    let values = tensor.to_f32()?;
    Tensor::from_f64(to, &tensor.dims(), values.into_iter().map(fit))
}

fn with_element(mut ty: TypeProto, to: DataType) -> TypeProto {
    if let Some(type_proto::Value::TensorType(tensor)) = &mut ty.value {
        tensor.elem_type = Some(to.code());
    }
    ty
}
