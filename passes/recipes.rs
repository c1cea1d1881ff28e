//! Which passes run, and in which order: one table of recipes.
//!
//! What runs is read off this table and nowhere else, so that to add a pass to what is done, to reorder or to leave out, is
//! to change a row here.

use super::Pass;
use super::dequantize::Dequantize;
use super::drop_dead::DropDead;
use super::fold_clips::FoldClips;
use super::fold_constants::FoldConstants;
use super::fold_fake_quant::FoldFakeQuant;
use super::fold_gemm::FoldGemm;
use super::fold_weights::FoldWeights;
use super::freeze_inputs::FreezeInputs;
use super::fuse_batchnorm::FuseBatchnorm;
use super::fuse_scales::FuseScales;
use super::inline_functions::InlineFunctions;
use super::insert_qdq::InsertQdq;
use super::lift_constants::LiftConstants;
use super::lower_gather::LowerGather;
use super::lower_lstm::LowerLstm;
use super::lower_matmulinteger::LowerMatmulinteger;
use super::lower_matmulnbits::{ACCURACY_LEVEL, LowerMatmulnbits};
use super::lower_qoperator::LowerQoperator;
use super::name_bodies::NameBodies;
use super::name_quantizers::NameQuantizers;
use super::narrow_floats::NarrowFloats;
use super::per_token::PerToken;
use super::raise_opset::RaiseOpset;
use super::raise_qdq::RaiseQdq;
use super::raise_qoperator::RaiseQoperator;
use super::recover_codes::RecoverCodes;
use super::settle_quantizers::SettleQuantizers;
use super::simulate::Simulate;
use super::smooth::Smooth;
use super::split_attention::SplitAttention;
use super::split_embedding::SplitEmbedding;
use super::standard_quantizers::StandardQuantizers;
use super::switch_quantizers::{Switch, SwitchQuantizers};
use super::unfold_weights::UnfoldWeights;
use super::unfuse_matmul::UnfuseMatmul;
use super::widen_floats::WidenFloats;
use crate::onnx::DataType;
use crate::ops::Form;

/// Passes that run one after the other on a model.
pub struct Recipe {
    /// What it is called in the table.
    pub name: &'static str,
    /// The steps in order.
    pub steps: &'static [Step],
}

/// A pass in a recipe.
pub struct Step {
    /// What runs.
    pub pass: &'static dyn Pass,
    /// Where it is left out.
    pub when: When,
    /// Whether it applies a plan, so that there has to be one before it runs.
    pub planned: bool,
    /// What of its notes a conversion reports.
    pub notes: Notes,
}

/// When a step of a conversion runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Each time.
    Always,
    /// Where quantizers are taken out.
    Switched,
    /// Where none is.
    Unswitched,
    /// Where one of these is asked for.
    To(&'static [To]),
    /// Where anything is asked for.
    ToAny,
    /// Where floats get 16 bits.
    Narrowed,
    /// Where quantizers become float operators.
    Simulated,
}

/// What of a step's notes a conversion reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notes {
    /// Nothing: it tidies up.
    Nothing,
    /// What it left alone.
    Kept,
    /// What it changed, and what it left alone.
    Changed,
    /// The same, where constants that it stores as codes are listed apart.
    Folded,
    /// What it made float operators of, and what it left alone.
    Simulated,
}

/// What quantized constants become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// Codes in a form; operators that it is not for stay as they are.
    Form(Form),
    /// The numbers that the codes stand for; the quantizers of activations go too.
    Float,
    /// Operands of operators on codes, those of onnxruntime's `QOperator` format; activations too.
    Qoperator,
}

impl To {
    /// Every word.
    pub const ALL: [Self; 7] = [
        Self::Form(Form::Qdq),
        Self::Form(Form::Matmulnbits),
        Self::Form(Form::GatherBlockQuantized),
        Self::Form(Form::Matmulinteger),
        Self::Form(Form::DynamicQuantizeLstm),
        Self::Qoperator,
        Self::Float,
    ];

    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Form(form) => form.name(),
            Self::Float => "float",
            Self::Qoperator => "qoperator",
        }
    }
}

impl To {
    /// What is stored so, for messages.
    #[must_use]
    pub fn stores(self) -> &'static str {
        match self {
            Self::Form(Form::Qdq) => "operator on quantized values and no weight in another form",
            Self::Form(Form::Matmulnbits) => "product of a float input and a dequantized weight",
            Self::Form(Form::GatherBlockQuantized) => "Gather from a dequantized table",
            Self::Form(Form::Matmulinteger) => "product or convolution with an input that is quantized at run time",
            Self::Form(Form::DynamicQuantizeLstm) => "LSTM with dequantized weights",
            Self::Float => "quantized constant and no quantizer",
            Self::Qoperator => "operator between quantizers",
        }
    }
}

/// What a conversion is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Conversion<'a> {
    /// What quantized constants become; empty to leave them as they are.
    pub to: &'a [To],
    /// Sites whose quantizers are taken out, and sites that keep theirs; the last to match decides.
    pub switches: &'a [Switch],
    /// The float type of 16 bits that what computes in float32 is to have.
    pub dtype: Option<DataType>,
    /// Whether quantizers then become float operators.
    pub simulate: bool,
    /// Whether the scales of weights stay as they are where what follows could be fused into them.
    pub keep_scales: bool,
    /// `accuracy_level` of new `MatMulNBits` where no plan says it: 4 lets the runtime quantize the other operand to int8, 1
    /// computes in float32, 0 leaves it to the runtime.
    pub accuracy_level: u8,
}

impl Default for Conversion<'_> {
    fn default() -> Self {
        Self {
            to: &[],
            switches: &[],
            dtype: None,
            simulate: false,
            keep_scales: false,
            accuracy_level: ACCURACY_LEVEL,
        }
    }
}

impl Recipe {
    /// The steps that run for a conversion; those of other recipes run each time.
    pub fn steps(&self, asked: &Conversion<'_>) -> impl Iterator<Item = &'static Step> {
        let asked = *asked;
        self.steps.iter().filter(move |step| match step.when {
            When::Always => true,
            When::Switched => !asked.switches.is_empty(),
            When::Unswitched => asked.switches.is_empty(),
            When::To(any) => any.iter().any(|to| asked.to.contains(to)),
            When::ToAny => !asked.to.is_empty(),
            When::Narrowed => asked.dtype.is_some(),
            When::Simulated => asked.simulate,
        })
    }

    /// The passes of all steps.
    #[must_use]
    pub fn passes(&self) -> Vec<&'static dyn Pass> {
        self.steps.iter().map(|step| step.pass).collect()
    }
}

/// A step that tidies up.
const fn tidy(pass: &'static dyn Pass) -> Step {
    Step { pass, when: When::Always, planned: false, notes: Notes::Nothing }
}

/// A step whose refusals are reported.
const fn quiet(pass: &'static dyn Pass) -> Step {
    Step { notes: Notes::Kept, ..tidy(pass) }
}

/// A step whose changes and refusals are reported.
const fn told(pass: &'static dyn Pass) -> Step {
    Step { notes: Notes::Changed, ..tidy(pass) }
}

/// A step that makes codes of constants.
const fn folds(pass: &'static dyn Pass) -> Step {
    Step { notes: Notes::Folded, ..tidy(pass) }
}

/// A step that needs a plan.
const fn planned(pass: &'static dyn Pass) -> Step {
    Step { planned: true, ..tidy(pass) }
}

impl Step {
    const fn when(self, when: When) -> Self {
        Self { when, ..self }
    }
}

const QDQ: To = To::Form(Form::Qdq);

/// Before planning: brings a float model into the form that the planner knows. Outputs stay as they were, but for the
/// rounding of fused weights.
pub const PREPARE: Recipe = Recipe {
    name: "prepare",
    steps: &[
        tidy(&FreezeInputs),
        tidy(&InlineFunctions),
        tidy(&LiftConstants),
        tidy(&FoldConstants),
        tidy(&SplitEmbedding),
        tidy(&SplitAttention),
        tidy(&UnfuseMatmul),
        tidy(&FoldGemm),
        tidy(&FuseBatchnorm),
        tidy(&NarrowFloats),
        tidy(&DropDead),
        tidy(&NameBodies),
    ],
};

/// After solving: applies the plan.
pub const QUANTIZE: Recipe = Recipe {
    name: "quantize",
    steps: &[
        planned(&Smooth),
        planned(&RaiseOpset),
        planned(&WidenFloats),
        planned(&InsertQdq),
        planned(&FoldWeights),
        planned(&PerToken),
        planned(&Simulate),
        planned(&LowerMatmulnbits),
        planned(&LowerMatmulinteger),
        planned(&LowerLstm),
        planned(&LowerGather),
        tidy(&DropDead),
    ],
};

/// After solving, where weights are to stay floats: the plan as fake quantizers.
pub const FAKE: Recipe = Recipe {
    name: "fake",
    steps: &[
        planned(&Smooth),
        planned(&RaiseOpset),
        planned(&WidenFloats),
        planned(&InsertQdq),
        planned(&FoldWeights),
        planned(&UnfoldWeights),
        planned(&PerToken),
        planned(&Simulate),
        tidy(&DropDead),
    ],
};

/// Before conversions, and for the model that a proof compares with: constants where passes look for them, quantizers as
/// the standard has them, and without those that are taken out.
pub const READ: Recipe = Recipe {
    name: "read",
    steps: &[
        tidy(&FreezeInputs),
        tidy(&LiftConstants),
        told(&StandardQuantizers),
        told(&SwitchQuantizers).when(When::Switched),
    ],
};

/// A conversion: makes codes of what training frameworks quantize in fake, and stores what is quantized in other forms.
/// Each step is right for any model.
pub const CONVERT: Recipe = Recipe {
    name: "convert",
    steps: &[
        folds(&FoldFakeQuant),
        tidy(&DropDead),
        quiet(&SettleQuantizers),
        folds(&FoldWeights),
        told(&FoldClips),
        told(&NameQuantizers),
        // The floats of codes that were taken out lie on a grid.
        folds(&RecoverCodes).when(When::Unswitched),
        told(&FuseScales),
        tidy(&DropDead),
        told(&RaiseQoperator).when(When::To(&[QDQ, To::Float])),
        told(&RaiseQdq).when(When::To(&[QDQ])),
        told(&Dequantize).when(When::To(&[To::Float])),
        told(&LowerQoperator).when(When::To(&[To::Qoperator])),
        told(&LowerMatmulnbits).when(When::To(&[To::Form(Form::Matmulnbits)])),
        told(&LowerMatmulinteger).when(When::To(&[To::Form(Form::Matmulinteger)])),
        told(&LowerLstm).when(When::To(&[To::Form(Form::DynamicQuantizeLstm)])),
        // Tables look for products with the same weight.
        told(&LowerGather).when(When::To(&[To::Form(Form::GatherBlockQuantized)])),
        tidy(&DropDead).when(When::ToAny),
        told(&NarrowFloats).when(When::Narrowed),
        tidy(&DropDead).when(When::Narrowed),
        Step { notes: Notes::Simulated, ..tidy(&Simulate) }.when(When::Simulated),
        tidy(&DropDead).when(When::Simulated),
    ],
};

/// Every recipe.
pub const RECIPES: [&Recipe; 5] = [&PREPARE, &QUANTIZE, &FAKE, &READ, &CONVERT];

/// Every pass, each once, in the order of the table.
#[must_use]
pub fn all() -> Vec<&'static dyn Pass> {
    let mut found: Vec<&'static dyn Pass> = Vec::new();
    for pass in RECIPES.iter().flat_map(|recipe| recipe.passes()) {
        if found.iter().all(|known| known.name() != pass.name()) {
            found.push(pass);
        }
    }
    found
}
