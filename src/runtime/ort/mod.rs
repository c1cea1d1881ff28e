//! onnxruntime, through its shared library.
//!
//! It is given the model as it is, with the observed tensors as further outputs and with its own rewriting switched off,
//! so that each tensor is computed as the graph says. Sessions of onnxruntime run one sample at a time on one thread, and
//! there are as many as samples ran at once: what a sample shows does not depend on how many that were.
//!
//! A session that is [deployed](Session::deployed) is what users have: everything that onnxruntime rewrites, on all threads.

mod kernels;
mod library;
mod values;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::ort::execution_providers::CPUExecutionProvider;
use ::ort::logging::LogLevel;
use ::ort::session::Session as Native;
use ::ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ::ort::value::{DynValue, ValueType};
use prost::Message;
use tempfile::TempDir;

use super::deployed::Kernels;
use super::inputs::{self, Input};
use super::{Observe, Options, Sample};
use crate::error::{Error, Kind, Result};
use crate::ir::{Model, Tensor};
use crate::onnx::{
    DATA_LOCATION_EXTERNAL, DataType, GraphProto, ModelProto, NodeProto, StringStringEntryProto, ValueInfoProto,
};

pub(super) use library::load;

/// Models above this go through a temporary file: onnxruntime maps weights from there, and sessions share them.
const MAX_IN_MEMORY: usize = 64 << 20;

/// Weights from this size on are stored beside the model in that file.
const MIN_EXTERNAL: usize = 1024;

/// What weights in a file are aligned to.
const ALIGNMENT: u64 = 64;

/// Name of the file of weights.
const WEIGHTS: &str = "weights";

/// Name of the file in which onnxruntime writes what it made of a model.
const REWRITTEN: &str = "rewritten.onnx";

/// Why tensors that are never computed are not observed.
const NOT_COMPUTED: &str = "it is not a float tensor of the main graph that is computed";

/// One model prepared for running in onnxruntime.
pub struct Session {
    source: Source,
    inputs: Vec<Input>,
    /// The outputs of the graph, in its order.
    outputs: Vec<String>,
    /// Observed inputs, and the sites that they are.
    fed: BTreeMap<String, Vec<usize>>,
    /// Observed tensors that are outputs of the run, and the sites that they are.
    computed: BTreeMap<String, Vec<usize>>,
    idle: Mutex<Vec<Native>>,
    silent: Mutex<BTreeMap<String, String>>,
    /// Where onnxruntime writes what it made of the model, if it is to rewrite it.
    rewritten: Option<TempDir>,
}

/// Where onnxruntime reads the model.
enum Source {
    Memory(Vec<u8>),
    Folder(TempDir),
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("observed", &(self.fed.len() + self.computed.len())).finish_non_exhaustive()
    }
}

impl Session {
    /// Hands a model over; the tensors named in `observed` will be shown. Options that are about tract are ignored.
    ///
    /// # Errors
    /// [`Kind::Runtime`] where no library is found, or the model is one that onnxruntime or its binding does not take;
    /// [`Kind::Output`] where a large model does not fit the temporary folder.
    pub fn with_options(model: &Model, observed: &[String], _options: Options) -> Result<Self> {
        Self::prepare(model, observed, MAX_IN_MEMORY, None)
    }

    /// Hands a model over to be rewritten and run as onnxruntime does by default.
    ///
    /// # Errors
    /// As [`with_options`](Self::with_options).
    pub fn deployed(model: &Model) -> Result<Self> {
        Self::prepare(model, &[], MAX_IN_MEMORY, Some(temporary()?))
    }

    /// What onnxruntime made of a model that is deployed, in nodes.
    ///
    /// # Errors
    /// [`Kind::Runtime`] where it wrote nothing that can be read.
    pub fn kernels(&self) -> Result<Kernels> {
        let written = self.rewritten.as_ref().and_then(|folder| std::fs::read(folder.path().join(REWRITTEN)).ok());
        let proto = written.and_then(|bytes| ModelProto::decode(bytes.as_slice()).ok());
        proto.map(|proto| Kernels::of(&proto)).ok_or_else(|| refusal("it does not write what it makes of it"))
    }

    fn prepare(model: &Model, observed: &[String], max_in_memory: usize, rewritten: Option<TempDir>) -> Result<Self> {
        load()?;
        let mut proto = model.to_proto(&mut |tensor, bytes| {
            tensor.data_location = None;
            tensor.external_data.clear();
            tensor.raw_data = Some(bytes);
        });
        let Some(graph) = &mut proto.graph else { return Err(Error::model("the model has no graph")) };
        let inputs = read_inputs(graph)?;
        let outputs: Vec<String> = graph.output.iter().map(|o| o.name.clone().unwrap_or_default()).collect();
        for info in &graph.output {
            let dtype = inputs::tensor_type(info.r#type.as_ref()).map(|t| t.elem_type.unwrap_or(0));
            if let Some(dtype) = dtype.and_then(DataType::from_code).filter(|d| !values::is_known(*d)) {
                return Err(
                    refusal(format!("an output is of type {dtype}")).at_value(info.name.as_deref().unwrap_or_default())
                );
            }
        }
        let Observed { fed, computed, silent } = Observed::new(model, graph, &inputs, observed);
        let declared: BTreeSet<&String> = outputs.iter().collect();
        let further = computed.keys().filter(|name| !declared.contains(name));
        // Without a type: onnxruntime infers it.
        graph
            .output
            .extend(further.map(|name| ValueInfoProto { name: Some(name.clone()), ..ValueInfoProto::default() }));
        let names = inputs.iter().map(|i| &i.name).chain(&outputs).chain(computed.keys());
        if let Some(name) = names.into_iter().find(|n| n.contains('\0')) {
            return Err(refusal("a name has a zero byte").at_value(name));
        }
        let session = Self {
            source: store(proto, max_in_memory)?,
            inputs,
            outputs,
            fed,
            computed,
            idle: Mutex::default(),
            silent: Mutex::new(silent),
            rewritten,
        };
        // Refusals should not wait for the first sample.
        let native = session.native()?;
        lock(&session.idle).push(native);
        Ok(session)
    }

    /// Runs one sample and gives back the graph outputs, in graph order; half and bfloat16 as float32. Observed tensors
    /// go to `observe` after the run.
    ///
    /// # Errors
    /// [`Kind::Samples`] for inputs that are missing, unknown, or of the wrong type or shape; [`Kind::Runtime`] where
    /// onnxruntime fails.
    pub fn run(&self, sample: &Sample, observe: &Arc<dyn Observe>) -> Result<Vec<(String, Tensor)>> {
        self.timed(sample, observe).map(|(outputs, _)| outputs)
    }

    /// As [`run`](Self::run), with the time that onnxruntime took.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn timed(&self, sample: &Sample, observe: &Arc<dyn Observe>) -> Result<(Vec<(String, Tensor)>, Duration)> {
        let bound = inputs::bind(&self.inputs, sample)?;
        let mut feed: Vec<(Cow<'_, str>, DynValue)> = Vec::with_capacity(bound.len());
        for (input, tensor) in &bound {
            let value = values::to_value(tensor).map_err(|why| refusal(why).at_value(&input.name))?;
            feed.push((input.name.as_str().into(), value));
        }
        let idle = lock(&self.idle).pop();
        let mut native = match idle {
            Some(native) => native,
            None => self.native()?,
        };
        let result = self.run_in(&mut native, feed, observe.as_ref());
        lock(&self.idle).push(native);
        let found = result?;
        for (input, tensor) in &bound {
            let Some(sites) = self.fed.get(&input.name) else { continue };
            if let Some(numbers) = tensor.to_f32() {
                for &site in sites {
                    observe.see(site, &numbers, &tensor.dims());
                }
            }
        }
        Ok(found)
    }

    fn run_in(
        &self,
        native: &mut Native,
        feed: Vec<(Cow<'_, str>, DynValue)>,
        observe: &dyn Observe,
    ) -> Result<(Vec<(String, Tensor)>, Duration)> {
        let begun = Instant::now();
        let mut found = native.run(feed).map_err(|e| explain(&e))?;
        let time = begun.elapsed();
        let mut outputs = Vec::with_capacity(self.outputs.len());
        for name in &self.outputs {
            let value = found.get(name).ok_or_else(|| refusal("an output is not computed").at_value(name))?;
            let tensor = values::from_value(value).map_err(|why| refusal(why).at_value(name))?;
            outputs.push((name.clone(), tensor));
        }
        for (name, sites) in &self.computed {
            // Taken out, so that its memory is free again before the next is looked at.
            let Some(value) = found.remove(name) else { continue };
            let seen = values::floats(&value, &mut |numbers, shape| {
                for &site in sites {
                    observe.see(site, numbers, shape);
                }
            });
            match seen {
                Ok(true) => {}
                Ok(false) => {
                    let why = match value.dtype() {
                        ValueType::Tensor { ty, .. } => format!("it is not a float tensor ({ty})"),
                        _ => "it is not a tensor".to_owned(),
                    };
                    lock(&self.silent).insert(name.clone(), why);
                }
                Err(why) => return Err(refusal(why).at_value(name)),
            }
        }
        Ok((outputs, time))
    }

    /// Observed names that produce nothing, with the reason. Complete once a sample has run.
    #[must_use]
    pub fn unobserved(&self) -> Vec<(String, String)> {
        lock(&self.silent).iter().map(|(name, why)| (name.clone(), why.clone())).collect()
    }

    /// What runs the model.
    #[must_use]
    #[allow(clippy::unused_self, reason = "the other runtime's answer depends on the session")]
    pub fn method(&self) -> &'static str {
        "onnxruntime"
    }

    /// One more session of onnxruntime.
    fn native(&self) -> Result<Native> {
        let make = || -> ::ort::Result<Native> {
            let builder = Native::builder()?.with_log_level(LogLevel::Fatal)?;
            if let Some(folder) = &self.rewritten {
                let builder = builder
                    .with_optimization_level(GraphOptimizationLevel::Level3)?
                    .with_optimized_model_path(folder.path().join(REWRITTEN))?
                    .with_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)?;
                return self.source.commit(builder);
            }
            let builder = builder
                .with_optimization_level(GraphOptimizationLevel::Disable)?
                .with_intra_threads(1)?
                .with_inter_threads(1)?
                .with_deterministic_compute(true)?
                // What is kept between runs would be the largest that any sample needed.
                .with_memory_pattern(false)?
                .with_execution_providers([CPUExecutionProvider::default().with_arena_allocator(false).build()])?;
            self.source.commit(builder)
        };
        make().map_err(|e| explain(&e))
    }
}

impl Source {
    fn commit(&self, builder: SessionBuilder) -> ::ort::Result<Native> {
        match self {
            Self::Memory(bytes) => builder.commit_from_memory(bytes),
            Self::Folder(folder) => builder.commit_from_file(folder.path().join("model.onnx")),
        }
    }
}

/// A folder that goes when it is no longer used.
fn temporary() -> Result<TempDir> {
    let folder = std::env::temp_dir();
    tempfile::Builder::new().prefix("amax-").tempdir_in(&folder).map_err(|e| no_room(&folder, e))
}

fn no_room(folder: &Path, e: std::io::Error) -> Error {
    Error::io(Kind::Output, "write a copy of the model to", folder, e)
        .with_hint("large models are handed to onnxruntime in a file; set TMPDIR to a folder with room for one")
}

/// The inputs of a graph. Types that the binding has no name for are refused.
fn read_inputs(graph: &GraphProto) -> Result<Vec<Input>> {
    let defaults: BTreeMap<&str, &crate::onnx::TensorProto> =
        graph.initializer.iter().filter_map(|t| Some((t.name.as_deref()?, t))).collect();
    let mut inputs = Vec::with_capacity(graph.input.len());
    for info in &graph.input {
        let name = info.name.as_deref().unwrap_or_default();
        let default = defaults.get(name).map(|t| Tensor::from_proto((*t).clone(), None)).transpose()?;
        let input = Input::new(info, default).map_err(|why| refusal(why).at_value(name))?;
        if !values::is_known(input.dtype) {
            return Err(refusal(format!("an input is of type {}", input.dtype)).at_value(name));
        }
        inputs.push(input);
    }
    Ok(inputs)
}

/// Which tensors are shown, and how they are come by.
#[derive(Default)]
struct Observed {
    fed: BTreeMap<String, Vec<usize>>,
    computed: BTreeMap<String, Vec<usize>>,
    silent: BTreeMap<String, String>,
}

impl Observed {
    fn new(model: &Model, graph: &GraphProto, inputs: &[Input], observed: &[String]) -> Self {
        let makers: BTreeMap<&str, &NodeProto> =
            graph.node.iter().flat_map(|n| n.output.iter().map(move |o| (o.as_str(), n))).collect();
        let constants: BTreeSet<&str> = graph.initializer.iter().filter_map(|t| t.name.as_deref()).collect();
        let mut found = Self::default();
        for (site, name) in observed.iter().enumerate() {
            let declared = model.value_named(name).and_then(|v| model.dtype(v));
            let float = declared.is_none_or(values::is_float);
            let why = if !float {
                format!("it is not a float tensor ({})", declared.map_or(String::new(), |d| d.to_string()))
            } else if inputs.iter().any(|i| i.name == *name) {
                found.fed.entry(name.clone()).or_default().push(site);
                continue;
            } else if constants.contains(name.as_str()) {
                "it is constant".to_owned()
            } else if let Some(maker) = makers.get(name.as_str()) {
                match maker.op_type() {
                    "Constant" => "it is constant".to_owned(),
                    // Of types that the binding may have no name for, which must not become outputs.
                    "QuantizeLinear" => NOT_COMPUTED.to_owned(),
                    "Cast" if !casts_to_float(maker) => NOT_COMPUTED.to_owned(),
                    _ => {
                        found.computed.entry(name.clone()).or_default().push(site);
                        continue;
                    }
                }
            } else {
                NOT_COMPUTED.to_owned()
            };
            found.silent.insert(name.clone(), why);
        }
        found
    }
}

fn casts_to_float(cast: &NodeProto) -> bool {
    let to = cast.attribute.iter().find(|a| a.name.as_deref() == Some("to")).and_then(|a| a.i);
    to.and_then(|to| DataType::from_code(i32::try_from(to).ok()?)).is_some_and(values::is_float)
}

/// Writes the model to where onnxruntime reads it.
fn store(mut proto: ModelProto, max_in_memory: usize) -> Result<Source> {
    if proto.encoded_len() <= max_in_memory {
        return Ok(Source::Memory(proto.encode_to_vec()));
    }
    let folder = temporary()?;
    let fail = |e| no_room(&std::env::temp_dir(), e);
    if let Some(graph) = &mut proto.graph {
        move_weights(graph, &folder.path().join(WEIGHTS)).map_err(fail)?;
    }
    std::fs::write(folder.path().join("model.onnx"), proto.encode_to_vec()).map_err(fail)?;
    Ok(Source::Folder(folder))
}

/// Moves the larger weights of a graph to a file.
fn move_weights(graph: &mut GraphProto, path: &Path) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut end = 0u64;
    for tensor in &mut graph.initializer {
        let Some(raw) = tensor.raw_data.take_if(|raw| raw.len() >= MIN_EXTERNAL) else { continue };
        let start = end.next_multiple_of(ALIGNMENT);
        file.write_all(&vec![0; (start - end) as usize])?;
        file.write_all(&raw)?;
        end = start + raw.len() as u64;
        let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) };
        tensor.data_location = Some(DATA_LOCATION_EXTERNAL);
        tensor.external_data = vec![
            entry("location", WEIGHTS.to_owned()),
            entry("offset", start.to_string()),
            entry("length", raw.len().to_string()),
        ];
    }
    file.flush()
}

/// The error for something onnxruntime cannot run.
fn refusal(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Runtime, format!("onnxruntime cannot run the model: {why}")).with_hint(
        "pass --runtime tract to run it in tract, use another version of onnxruntime, or pass --calib none to quantize \
         weights only, which needs no runtime",
    )
}

/// What onnxruntime says, at the node that it says it of: `… while running Conv node. Name:'c1' Status Message: …`.
fn explain(error: &::ort::Error) -> Error {
    let message = error.message().trim().replace('\n', " ");
    let why = message.rsplit("Status Message: ").next().unwrap_or(&message);
    let error = refusal(why.chars().take(400).collect::<String>());
    let node = message
        .split_once(" node. Name:'")
        .and_then(|(before, after)| Some((after.split_once('\'')?.0, before.rsplit(' ').next()?)));
    match node {
        Some((name, op)) => error.at_node(name, op),
        None => error,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

    use std::sync::{Arc, Mutex};

    use super::{MAX_IN_MEMORY, Observe, Session, Source};
    use crate::ir::file;
    use crate::samples::SampleSet;

    #[derive(Default)]
    struct Seen(Mutex<Vec<(usize, Vec<f32>)>>);

    impl Observe for Seen {
        fn see(&self, site: usize, values: &[f32], _shape: &[usize]) {
            self.0.lock().unwrap().push((site, values.to_vec()));
        }
    }

    #[test]
    fn models_in_files_run_as_those_in_memory() {
        let model = file::load("models/digits.onnx".as_ref()).unwrap();
        let samples = SampleSet::open("models/digits.calib.npz", &model).unwrap();
        let names = ["stem_relu_out", "pool_out", "logits"].map(str::to_owned);
        let run = |limit| {
            let session = Session::prepare(&model, &names, limit, None).unwrap();
            if let Source::Folder(folder) = &session.source {
                assert!(folder.path().join("weights").metadata().unwrap().len() > 1024);
            }
            assert_eq!(matches!(session.source, Source::Folder(_)), limit == 0);
            let seen = Arc::new(Seen::default());
            let observe: Arc<dyn Observe> = seen.clone();
            session.run(&samples.get(0).unwrap(), &observe).unwrap();
            let seen = std::mem::take(&mut *seen.0.lock().unwrap());
            assert_eq!(seen.len(), 3);
            seen
        };
        assert!(run(0) == run(MAX_IN_MEMORY));
    }
}
