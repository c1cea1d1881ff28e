//! Running a model and watching its tensors.
//!
//! A [`Session`] takes a model apart once and runs it over many samples. Each run hands every observed tensor to an
//! [`Observe`] as soon as it is computed, in the layout the ONNX graph gives it, and forgets it.
//!
//! The runtime is tract, in float32: half and bfloat16 are widened, quantized operators run as float operators between
//! quantize and dequantize steps, packed weights are decoded. Integer kernels are never used. Tensors of smaller floats are
//! float32 tensors of numbers that those can hold. Branches, loops and sequences are resolved before the run, where the shapes
//! of the sample and its switches tell how. What tract does not have, or computes wrongly, is expressed by other operators,
//! computed here, or refused by name.
//!
//! The other runtime is onnxruntime, for models that tract cannot run, and to check one by the other. Its shared library is
//! looked for when it is asked for.
//!
//! Without the feature of a [`Runtime`] everything here compiles, and sessions in it cannot be made.

#[cfg(not(all(feature = "tract", feature = "ort")))]
mod absent;
mod carried;
mod deployed;
#[cfg(any(feature = "tract", feature = "ort"))]
mod inputs;
#[cfg(feature = "ort")]
mod ort;
pub mod segments;
mod stop;
#[cfg(feature = "tract")]
mod tract;

use std::sync::Arc;

use crate::error::Result;
use crate::ir::{Model, Tensor};

#[cfg(not(feature = "ort"))]
use absent::Session as OrtSession;
#[cfg(not(feature = "tract"))]
use absent::Session as TractSession;
#[cfg(not(feature = "tract"))]
pub use absent::TractEvaluate;
#[cfg(feature = "ort")]
use ort::Session as OrtSession;
#[cfg(feature = "tract")]
use tract::Session as TractSession;
#[cfg(feature = "tract")]
pub use tract::TractEvaluate;

pub use crate::samples::Sample;
pub use carried::Carried;
pub use deployed::{Deployed, Kernels};
pub(crate) use stop::stoppable;

/// Called for each observed tensor of a run.
pub trait Observe: Send + Sync {
    /// Sees the tensor of site `site`, an index into the list that [`Session::new`] was given. `values` are in row-major
    /// order of `shape`, the shape the tensor has in the ONNX graph. Called at most once per site and run, on the thread
    /// that called [`Session::run`].
    fn see(&self, site: usize, values: &[f32], shape: &[usize]);
}

/// What runs models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Runtime {
    /// tract, which is part of the program. Needs the feature `tract`.
    Tract,
    /// onnxruntime, whose shared library is found at run time. Needs the feature `ort`.
    Ort,
}

impl Runtime {
    /// Both, the default of a full build first.
    pub const ALL: [Self; 2] = [Self::Tract, Self::Ort];

    /// What users call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tract => "tract",
            Self::Ort => "ort",
        }
    }

    /// Makes sure that the runtime is there. For [`Runtime::Ort`] this loads the library that `ORT_DYLIB_PATH` names, or
    /// that of an onnxruntime installed for Python; a process loads one only.
    ///
    /// # Errors
    /// [`Kind::Runtime`](crate::error::Kind::Runtime) if the program was built without it, or no library can be used.
    pub fn load(self) -> Result<()> {
        match self {
            #[cfg(feature = "tract")]
            Self::Tract => Ok(()),
            #[cfg(feature = "ort")]
            Self::Ort => ort::load().map(|_| ()),
            #[allow(unreachable_patterns, reason = "with all features every runtime is there")]
            #[cfg(not(all(feature = "tract", feature = "ort")))]
            missing => Err(absent::error(missing)),
        }
    }
}

/// The version of onnxruntime that models run in; `None` where there is none, or the program was built without it.
#[must_use]
pub fn onnxruntime() -> Option<String> {
    #[cfg(feature = "ort")]
    return ort::load().ok();
    #[cfg(not(feature = "ort"))]
    None
}

impl Default for Runtime {
    /// tract, unless the program was built with onnxruntime alone.
    fn default() -> Self {
        if cfg!(feature = "ort") && !cfg!(feature = "tract") { Self::Ort } else { Self::Tract }
    }
}

/// Bytes that running takes, by the shapes of the tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Weights, once for all samples.
    pub weights: u64,
    /// Tensors that are alive at once in one sample.
    pub sample: u64,
}

/// How a [`Session`] runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// What runs the model.
    pub runtime: Runtime,
    /// Whether the first sample is also run without any of tract's optimisations, and the two runs compared.
    pub check: bool,
    /// Compiled plans of tract kept, one for each distinct set of input shapes; at least one. Each holds its own packed
    /// weights.
    pub plans: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { runtime: Runtime::default(), check: true, plans: 1 }
    }
}

/// One model prepared for running.
///
/// `Session` is [`Sync`]: threads may run samples at once. In tract they share a plan that is compiled for each distinct set
/// of input shapes. In onnxruntime each has a session of its own, and models above 64 MB share their weights.
#[derive(Debug)]
pub struct Session(Inner);

#[derive(Debug)]
enum Inner {
    Tract(Box<TractSession>),
    Ort(Box<OrtSession>),
}

impl Session {
    /// Prepares `model`; the tensors of the main graph named in `observed` will be shown to the observer of each run.
    /// Names that have no float tensor to show are reported by [`Session::unobserved`].
    ///
    /// # Errors
    /// [`Kind::Runtime`](crate::error::Kind::Runtime) for operators and attributes that cannot be run, naming node,
    /// operator and reason, and where the runtime is not there.
    pub fn new(model: &Model, observed: &[String]) -> Result<Self> {
        Self::with_options(model, observed, Options::default())
    }

    /// As [`Session::new`], with options.
    ///
    /// # Errors
    /// As [`Session::new`].
    pub fn with_options(model: &Model, observed: &[String], options: Options) -> Result<Self> {
        Ok(Self(match options.runtime {
            Runtime::Tract => Inner::Tract(Box::new(TractSession::with_options(model, observed, options)?)),
            Runtime::Ort => Inner::Ort(Box::new(OrtSession::with_options(model, observed, options)?)),
        }))
    }

    /// Runs one sample and gives back the graph outputs, in graph order. Observed tensors go to `observe`: in tract as they
    /// are computed, in onnxruntime after the run. Outputs declared half or bfloat16 come back as float32.
    ///
    /// # Errors
    /// [`Kind::Samples`](crate::error::Kind::Samples) for inputs that are missing, unknown, or of the wrong type or shape;
    /// [`Kind::Runtime`](crate::error::Kind::Runtime) where the runtime fails. After an error the observer may have seen part
    /// of the sample.
    pub fn run(&self, sample: &Sample, observe: &Arc<dyn Observe>) -> Result<Vec<(String, Tensor)>> {
        match &self.0 {
            Inner::Tract(session) => session.run(sample, observe),
            Inner::Ort(session) => session.run(sample, observe),
        }
    }

    /// What running a sample of these shapes takes in memory; `None` where the runtime does not tell, as onnxruntime. Prepares
    /// the run, and checks it where it is the first.
    ///
    /// # Errors
    /// As [`Session::run`].
    pub fn footprint(&self, sample: &Sample) -> Result<Option<Footprint>> {
        match &self.0 {
            Inner::Tract(session) => session.footprint(sample).map(Some),
            Inner::Ort(_) => Ok(None),
        }
    }

    /// Observed names that produce nothing, with the reason. Complete once a sample has run.
    #[must_use]
    pub fn unobserved(&self) -> Vec<(String, String)> {
        match &self.0 {
            Inner::Tract(session) => session.unobserved(),
            Inner::Ort(session) => session.unobserved(),
        }
    }

    /// How the model is run: as far as tract optimises the plans in use, "optimized", "codegen only" or "raw"; or
    /// "onnxruntime".
    #[must_use]
    pub fn method(&self) -> &'static str {
        match &self.0 {
            Inner::Tract(session) => session.method(),
            Inner::Ort(session) => session.method(),
        }
    }
}
