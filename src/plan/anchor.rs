//! Operators that run on integers wherever their inputs are quantized: Conv, products, and what a rule asks for by name.

use super::form::{Constant, Runs, fits};
use super::kernels::{self, Operands};
use super::planner::{Kindness, Made, Planner, Read};
use super::site::Refusal;
use super::{Mode, Scheme};
use crate::config::SiteKind;
use crate::config::rules::Resolved;
use crate::config::spec::{Dtype, Field, Form};
use crate::error::{Error, Kind, Result};
use crate::ir::{NodeId, ValueId};
use crate::ops::{self, Channel, Role, Row};
use crate::reason::Reason;
use crate::targets::Anchor;

/// A node that might run on integers, or have its weight stored in few bits.
struct Heavy<'a> {
    node: NodeId,
    op: &'a str,
    /// What the target says of the operator.
    anchor: Option<&'a Anchor>,
    /// The constant weight, and how it is quantized.
    weight: Option<(usize, Scheme)>,
    /// The inputs that are computed.
    data: Vec<usize>,
}

/// How a node runs on integers.
struct Run {
    ask: Resolved,
    inputs: Vec<(usize, ValueId, Mode)>,
    output: Option<(ValueId, Resolved)>,
}

/// Why a node does not run on integers, and what becomes of its weight.
enum NotInteger {
    Wrong(Error),
    Float(Reason),
    WeightOnly(Reason),
    /// The weight alone, beside an input that is fake quantized with a scale for each token, not below this one.
    PerToken {
        input: usize,
        eps: f32,
    },
}

impl From<Refusal> for NotInteger {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Wrong(error) => Self::Wrong(error),
            Refusal::Unfit(why) => Self::WeightOnly(why),
        }
    }
}

impl From<Reason> for NotInteger {
    fn from(why: Reason) -> Self {
        Self::WeightOnly(why)
    }
}

impl<'a> Planner<'a> {
    /// Plans a Conv, a product and the like.
    pub(super) fn anchor(&mut self, node: NodeId) -> Result<()> {
        let Some(row) = self.may_anchor(node) else { return Ok(()) };
        if let Some(why) = self.untouchable(node) {
            self.refuse(node, why);
            return Ok(());
        }
        if row.role(1) == Role::Weight(Channel::Gates) {
            return self.gates(node);
        }
        let heavy = self.heavy(node, row);
        let Some(heavy) = self.or_refuse(node, heavy)? else { return Ok(()) };
        let why = match self.run(&heavy) {
            Ok(run) => {
                if let Some(run) = run {
                    self.start(&heavy, run);
                }
                return Ok(());
            }
            Err(NotInteger::Wrong(error)) => return Err(error),
            Err(NotInteger::Float(why)) => {
                self.refuse(node, why);
                return Ok(());
            }
            Err(NotInteger::WeightOnly(why)) => why,
            Err(NotInteger::PerToken { input, eps }) => {
                self.tokens.insert(node, (input, eps));
                Reason::PerToken
            }
        };
        if heavy.weight.is_some() && self.off(node, SiteKind::Weight).is_none() {
            self.quantized.insert(node, Kindness::WeightOnly);
            self.notes.insert(node, why);
        } else {
            self.refuse(node, why);
        }
        Ok(())
    }

    /// Plans a node that runs on integers.
    fn start(&mut self, heavy: &Heavy<'_>, run: Run) {
        let Run { ask, inputs, output } = run;
        let (node, op) = (heavy.node, heavy.op.to_owned());
        let name = self.model.node_name(node).to_owned();
        self.quantized.insert(node, Kindness::Integer);
        for (index, value, mode) in inputs {
            let why = match (mode, self.veto(value)) {
                (Mode::Dynamic, Some(veto)) => veto.why.clone(),
                _ => Reason::InputOf { op: op.clone(), node: name.clone() },
            };
            self.read(value, (node, index), Read { ask: ask.clone(), adopts: false, mode, why });
        }
        if let Some((site, ask)) = output {
            self.make(site, Made { ask, keeps: None, why: Reason::OutputOf { op, node: name } });
        }
    }

    /// The row of a node that has something to quantize whatever its neighbours are.
    pub(super) fn may_anchor(&self, node: NodeId) -> Option<&'static Row> {
        let row = ops::of(self.model, node)?;
        // A weight needs no integer kernel to be stored in few bits.
        let transposed = row.role(1) == Role::Weight(Channel::ConvTranspose) && !self.knowledge.calibrated;
        let lstm = Form::DynamicQuantizeLstm;
        let gates = self.asks_for(node, lstm) && lstm.serves(row.op) && self.target.forms.contains(&lstm);
        let gates = gates || self.is_small(node, row);
        let stored = transposed || gates || self.is_table(node) || self.is_forced(node, SiteKind::Weight);
        let known = self.target.anchor(row.op).is_some() || stored;
        let reads = row.has_weight() || row.inputs.contains(&Role::Data);
        (known && reads).then_some(row)
    }

    /// Whether a recurrent layer has weights that are asked for in 8 bits, where inputs are not or at run time only: stored so, they
    /// need no kernel.
    fn is_small(&self, node: NodeId, row: &Row) -> bool {
        let (weight, input) = (&self.ask(node, SiteKind::Weight).spec, self.ask(node, SiteKind::Input));
        let bytes = weight.dtype.and_then(Dtype::element).is_some_and(|format| format.bits() == 8);
        let floats = input.is_off() || input.spec.dynamic == Some(true);
        row.role(1) == Role::Weight(Channel::Gates) && row.op != "LSTM" && bytes && floats
    }

    /// Whether the weight of a node is to be stored in a form.
    pub(super) fn asks_for(&self, node: NodeId, form: Form) -> bool {
        self.ask(node, SiteKind::Weight).spec.form == Some(form)
    }

    /// Whether a node reads rows of a float table that is to be stored in a form of its own: the target would dequantize
    /// any other as a whole at every run.
    fn is_table(&self, node: NodeId) -> bool {
        let floats = self.model.constant_input(node, 0).is_some_and(|t| t.dtype().has_quantizers());
        ops::constant_weight(self.model, node, 0) == Some(Channel::Rows)
            && floats
            && self.asks_for(node, Form::GatherBlockQuantized)
            && !self.is_forced(node, SiteKind::Weight)
    }

    /// What there is to quantize at a node, or why it stays float.
    fn heavy(&self, node: NodeId, row: &'static Row) -> Result<Heavy<'a>, Refusal> {
        let Operands { weight, data } = kernels::operands(self.model, node)?;
        let everywhere = self.place.everywhere() || self.is_forced(node, SiteKind::Input);
        match weight {
            Some(index) => {
                kernels::weight(self.model, node, index)?;
                if !self.is_wanted(node) {
                    kernels::sums(self.model, node, index)?;
                }
            }
            None if everywhere || self.place.multiplies_activations() && row.role(0) == Role::Weight(Channel::Left) => {
            }
            None => kernels::without_weight(self.model, node, row)?,
        }
        kernels::attributes(self.model, node)?;
        let weight = match weight {
            Some(index) => Some((index, self.weight(node, index)?)),
            None => None,
        };
        if let Some((index, scheme)) = &weight {
            self.weight_may(node, *index, scheme)?;
            let value = self.model.node(node).input(*index);
            let off = self.off(node, SiteKind::Weight).or_else(|| value.and_then(|v| self.unquantized(v)));
            if let Some(why) = off.filter(|_| !everywhere) {
                return Err(why.into());
            }
        }
        Ok(Heavy { node, op: row.op, anchor: self.target.anchor(row.op), weight, data })
    }

    /// Whether the user asks for the weight of a node, or of its operator.
    fn is_wanted(&self, node: NodeId) -> bool {
        let ask = self.ask(node, SiteKind::Weight);
        self.is_forced(node, SiteKind::Weight) && self.rules.rule(ask, Field::Enable).is_some_and(|rule| !rule.preset)
    }

    /// Why the weight of a node must not be quantized.
    fn weight_may(&self, node: NodeId, index: usize, scheme: &Scheme) -> Result<(), Reason> {
        if let Some(veto) = self.knowledge.vetoes.get(&self.site(node, SiteKind::Weight)) {
            return Err(veto.why.clone());
        }
        if !self.is_table(node) {
            return Ok(());
        }
        let float = self.float_at(node, index);
        let constant = Constant { node, index, scheme, float, runs: Runs::Float, transposed: false };
        fits(self.model, self.target, Form::GatherBlockQuantized, &constant)
    }

    /// How a node runs on integers, or why it does not; nothing where nothing comes out of it.
    fn run(&self, heavy: &Heavy<'_>) -> Result<Option<Run>, NotInteger> {
        let node = heavy.node;
        let anchor = heavy.anchor.ok_or_else(|| Reason::NoKernel { target: self.target.name.clone() })?;
        if let Some(why) = self.off(node, SiteKind::Input) {
            return Err(why.into());
        }
        if self.per_token(node, SiteKind::Input) {
            return Err(self.tokens_of(heavy));
        }
        if self.in_body(node) {
            return Err(Reason::InBody.into());
        }
        if !self.is_forced(node, SiteKind::Input)
            && let Some(why) = self.place.unfit_product(self.model, node)
        {
            return Err(NotInteger::Float(why));
        }
        let lowered = self.is_lowered(heavy)?;
        let ask = self.ask(node, SiteKind::Input).clone();
        let (scheme, run_time) = self.activation(node, SiteKind::Input, &ask)?;
        self.kernel_takes(heavy, &ask, &scheme)?;
        let lowered = lowered && run_time && self.multiplies_integers(heavy);
        let fuses = lowered || anchor.dynamic && self.fuses_at_run_time(heavy);
        let blocks = scheme.scale_dtype.is_block();
        if run_time && !fuses && !blocks {
            return Err(self.not_at_run_time(heavy, &ask));
        }
        let Some((site, made)) = self.output_site(node) else { return Ok(None) };
        // Where every pair is an option, one at the input alone is another.
        let alone = self.place.everywhere() && made.is_off();
        let needed = anchor.output && !lowered && !alone || self.is_forced(node, SiteKind::Output);
        if needed && !blocks && made.is_off() {
            return Err(needs_output(heavy, self.off_by(&made, SiteKind::Output)).into());
        }
        let output = (needed && !blocks).then_some((site, made));
        let inputs = self.run_inputs(heavy, run_time, fuses)?;
        if !lowered
            && let Some((index, _)) = heavy.weight
            && let Some(why) = self.place.unfit_bias(self.model, node, index)
        {
            return Err(NotInteger::Float(why));
        }
        if let Some(why) = output.as_ref().and_then(|(site, _)| self.unquantizable(*site)) {
            let why = needs_output(heavy, why);
            return Err(if self.knowledge.calibrated { NotInteger::Float(why) } else { why.into() });
        }
        Ok(Some(Run { ask, inputs, output }))
    }

    /// The token input of a linear layer, or why it has none.
    fn tokens_of(&self, heavy: &Heavy<'_>) -> NotInteger {
        let site = self.site(heavy.node, SiteKind::Input);
        let reader = self.reader(&site, SiteKind::Input, self.ask(heavy.node, SiteKind::Input));
        match (reader.per_token(), &heavy.data[..], &heavy.weight) {
            (Err(refusal), ..) => refusal.into(),
            (Ok(eps), &[input], Some((1, _))) => NotInteger::PerToken { input, eps },
            _ => Reason::NoTokens.into(),
        }
    }

    /// Whether the weight is to be that of an integer product; operators in other forms read floats.
    fn is_lowered(&self, heavy: &Heavy<'_>) -> Result<bool, Reason> {
        let asked = self.ask(heavy.node, SiteKind::Weight).spec.form;
        let stored = asked.filter(|&form| form != Form::Qdq && form.serves(heavy.op));
        match stored.filter(|form| heavy.weight.is_some() && self.target.forms.contains(form)) {
            None => Ok(false),
            Some(Form::Matmulinteger) => Ok(true),
            Some(form) => Err(Reason::FormReadsFloats { form }),
        }
    }

    /// Whether there is a kernel, or someone wants it without one.
    fn kernel_takes(&self, heavy: &Heavy<'_>, ask: &Resolved, scheme: &Scheme) -> Result<(), Reason> {
        let weight = heavy.weight.as_ref().map(|(_, scheme)| scheme);
        if let Some(why) = weight.and_then(|weight| self.place.unfit_weight(self.target, weight)) {
            return Err(why);
        }
        kernels::whole_blocks(self.model, heavy.node, scheme)?;
        let named = [Field::Dtype, Field::Dynamic].iter().any(|&f| ask.from(f) > Some(0));
        if named || self.place.everywhere() || self.is_forced(heavy.node, SiteKind::Input) {
            return Ok(());
        }
        kernels::integer(self.target, scheme, weight)
    }

    fn multiplies_integers(&self, heavy: &Heavy<'_>) -> bool {
        let product = |index, scheme| kernels::integer_product(self.model, heavy.node, index, scheme);
        heavy.weight.as_ref().is_some_and(|(index, scheme)| product(*index, scheme).is_ok())
    }

    fn fuses_at_run_time(&self, heavy: &Heavy<'_>) -> bool {
        let fuses = |scheme| kernels::fuses_at_run_time(self.model, self.target, heavy.node, scheme);
        heavy.weight.as_ref().is_some_and(|(index, scheme)| *index == 1 && fuses(scheme))
    }

    /// A range found at run time that no kernel takes: a mistake where a rule about this node asks for it.
    fn not_at_run_time(&self, heavy: &Heavy<'_>, ask: &Resolved) -> NotInteger {
        let why = Reason::NoKernelAtRunTime { target: self.target.name.clone(), op: heavy.op.to_owned() };
        let rule = self.rules.rule(ask, Field::Dynamic).filter(|rule| rule.is_named() && !rule.optional);
        let Some(rule) = rule else { return why.into() };
        let error = Error::new(Kind::Config, format!("{}, input.dynamic: {why}", rule.label));
        let error = error.at_node(self.model.node_name(heavy.node), heavy.op);
        NotInteger::Wrong(rule.origin.at(error, "input.dynamic").with_hint("leave it out for this operator"))
    }

    /// The inputs that are read as integers, and where their scales come from.
    fn run_inputs(
        &self,
        heavy: &Heavy<'_>,
        run_time: bool,
        fuses: bool,
    ) -> Result<Vec<(usize, ValueId, Mode)>, NotInteger> {
        let at = self.model.node(heavy.node);
        let inputs = heavy.data.iter().filter_map(|&index| Some((index, at.input(index)?)));
        inputs
            .map(|(index, value)| {
                let mode = if run_time { self.ranged(value)? } else { self.calibrated(heavy, value, fuses)? };
                Ok((index, value, mode))
            })
            .collect()
    }

    /// Whether a value may have a range that is found at run time.
    fn ranged(&self, value: ValueId) -> Result<Mode, NotInteger> {
        let veto = || self.veto(value).filter(|v| !v.dynamic).map(|v| v.why.clone());
        self.unquantized(value).or_else(veto).map_or(Ok(Mode::Dynamic), |why| Err(NotInteger::Float(why)))
    }

    /// Whether a value may have a range from samples, or one found at run time where the guard forbids that.
    fn calibrated(&self, heavy: &Heavy<'_>, value: ValueId, fuses: bool) -> Result<Mode, NotInteger> {
        let Some(why) = self.unquantizable(value) else { return Ok(Mode::Static) };
        match self.veto(value) {
            None if !self.knowledge.calibrated && heavy.weight.is_some() => Err(Reason::WithoutSamples.into()),
            None if !self.knowledge.calibrated => Err(Reason::NoWeightWithoutSamples.into()),
            Some(veto) if fuses && veto.dynamic => Ok(Mode::Dynamic),
            _ => Err(NotInteger::Float(why)),
        }
    }

    /// Quantizes what a rule about this very node or operator asks for, where the target would not.
    pub(super) fn force(&mut self, node: NodeId) {
        let Some(row) = ops::of(self.model, node) else { return };
        if self.quantized.get(&node) == Some(&Kindness::Integer) || self.untouchable(node).is_some() {
            return;
        }
        let forced = [SiteKind::Input, SiteKind::Output].into_iter().any(|kind| self.is_forced(node, kind));
        if forced
            && self.carries(node)
            && let Some(input) = self.model.node(node).input(0)
        {
            self.carry(node, input, &self.outputs(node));
            return;
        }
        let op = self.model.node(node).op_type().to_owned();
        let name = self.model.node_name(node).to_owned();
        if self.is_forced(node, SiteKind::Input) && !self.per_token(node, SiteKind::Input) {
            let inputs = self.model.node(node).inputs().iter().enumerate().filter_map(|(i, v)| Some((i, (*v)?)));
            let data: Vec<(usize, ValueId)> = inputs
                .filter(|&(i, v)| {
                    matches!(row.role(i), Role::Data | Role::Weight(_)) && self.model.constant(v).is_none()
                })
                .collect();
            for (index, value) in data {
                let ask = self.ask(node, SiteKind::Input).clone();
                let blocks = ask.spec.dtype.is_some_and(|d| d.block().is_some());
                if self.unquantizable(value).is_none() && !blocks {
                    let why = Reason::InputAsAsked { op: op.clone(), node: name.clone() };
                    self.read(value, (node, index), Read { ask, adopts: false, mode: Mode::Static, why });
                }
            }
        }
        if self.is_forced(node, SiteKind::Output)
            && let Some((site, ask)) = self.output_site(node)
            && self.unquantizable(site).is_none()
        {
            self.make(site, Made { ask, keeps: None, why: Reason::OutputAsAsked { op, node: name } });
        }
    }
}

/// A kernel that needs a quantized output, which it cannot have.
fn needs_output(heavy: &Heavy<'_>, because: Reason) -> Reason {
    Reason::NeedsOutput { op: heavy.op.to_owned(), because: Box::new(because) }
}
