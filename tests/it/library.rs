//! The library as others call it: recipes that run as they stand, defaults, samples in memory, from file to file.

use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use amax::ir::file;
use amax::passes::Outcome;
use amax::passes::pipeline::{After, parse_pipeline};
use amax::passes::recipes::{CONVERT, Conversion, FAKE, PREPARE, QUANTIZE, READ, Recipe, To};
use amax::passes::switch_quantizers::Switch;
use amax::{
    Calibrate, Compare, Config, Convert, Form, Kind, Model, Pattern, Result, Rewrite, SampleSet, Target, Values,
    presets,
};
use ndarray::{Array, Array1, Array3, Axis, Ix5, array};

fn models(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name)
}

fn digits() -> (Model, SampleSet) {
    let model = amax::load(models("digits.onnx")).unwrap();
    let samples = SampleSet::open(&models("digits.calib.npz"), &model).unwrap();
    (model, samples)
}

/// The names of the passes that run.
fn ran(act: impl FnOnce(&After<'_>)) -> Vec<String> {
    let names = RefCell::new(Vec::new());
    act(&|_: &Model, name: &str, _: &Outcome| {
        names.borrow_mut().push(name.to_owned());
        Ok(ControlFlow::Continue(()))
    });
    names.into_inner()
}

/// The names of the passes in recipes.
fn table(recipes: &[&Recipe], asked: &Conversion<'_>) -> Vec<String> {
    recipes.iter().flat_map(|recipe| recipe.steps(asked)).map(|step| step.pass.name().to_owned()).collect()
}

#[test]
fn what_runs_is_what_the_recipes_say() {
    let (model, _) = digits();
    let rewritten = ran(|after| drop(Rewrite::new(&model).after(after).run().unwrap()));
    assert_eq!(rewritten, table(&[&PREPARE, &QUANTIZE], &Conversion::default()));
    let prepared = ran(|after| drop(Rewrite::new(&model).after(after).prepare().unwrap()));
    assert_eq!(prepared, table(&[&PREPARE, &FAKE], &Conversion::default()));

    let quantized = Rewrite::new(&model).run().unwrap().model;
    let switches = [Switch { pattern: Pattern::new("wide.weight").unwrap(), on: false }];
    let check = |asked: Conversion<'_>| {
        let converted = ran(|after| {
            let conversion = Convert::new(&quantized).to(asked.to).switches(asked.switches).simulate(asked.simulate);
            conversion.after(after).run().unwrap();
        });
        assert_eq!(converted, table(&[&READ, &CONVERT], &asked), "{asked:?}");
        converted
    };
    let plain = check(Conversion::default());
    for to in To::ALL {
        let to = [to];
        assert!(check(Conversion { to: &to, ..Conversion::default() }).len() > plain.len(), "{to:?}");
    }
    let simulated = check(Conversion { simulate: true, ..Conversion::default() });
    assert!(simulated.ends_with(&["simulate".to_owned(), "drop-dead".to_owned()]), "{simulated:?}");
    let switched = check(Conversion { switches: &switches, ..Conversion::default() });
    assert!(switched.contains(&"switch-quantizers".to_owned()) && !switched.contains(&"recover-codes".to_owned()));
}

/// Of a rewrite whose passes are listed only those run, and nothing is planned without one that a plan is for.
#[test]
fn only_the_passes_that_are_asked_for_run() {
    let (model, _) = digits();
    let check = |list: &str, planned: bool| {
        let passes = parse_pipeline(list).unwrap();
        let done = Rewrite::new(&model).passes(passes.as_slice()).run().unwrap();
        let names: Vec<&str> = done.report.passes.iter().map(|row| row.pass.as_str()).collect();
        assert_eq!((names.join(","), done.plan.is_some(), done.stopped), (list.to_owned(), planned, !planned));
    };
    check("lift-constants,fuse-batchnorm", false);
    check("fuse-batchnorm,insert-qdq", true);
}

/// Codes that nothing adds up in pairs before, and what a target does wrong after.
const SATURATES: &str = r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[2,2] x) => (float[2,2] y) <float s = {0.5}, uint8 z = {3}, int8[2,2] w = {100, 1, 100, 1}, int8 wz = {0}> {
  q = QuantizeLinear (x, s, z)
  p = QLinearMatMul (q, s, z, w, s, wz, s, z)
  y = DequantizeLinear (p, s, z)
}"#;

#[test]
fn a_conversion_warns_of_what_its_target_computes_wrongly() {
    let model = amax::ir::text::parse(SATURATES).unwrap();
    let to = [To::Form(Form::Qdq)];
    let done = Convert::new(&model).to(&to).run().unwrap();
    assert_eq!(done.warnings.len(), 1, "{:?}", done.warnings);
    assert!(done.warnings[0].contains("can saturate 16-bit pair sums"), "{:?}", done.warnings);
    let elsewhere = amax::Target::load("ort-cpu-vnni").unwrap();
    assert_eq!(Convert::new(&model).to(&to).target(&elsewhere).run().unwrap().warnings, [""; 0]);
    // What was wrong before is not the conversion's doing.
    assert_eq!(Convert::new(&done.model).run().unwrap().warnings, [""; 0]);
}

#[test]
fn forms_for_everything_stand_alone() {
    let (model, _) = digits();
    let check = |to: &[To], refused: Option<&str>| {
        let done = Convert::new(&model).to(to).run();
        let message = done.err().map(|e| (e.kind(), e.message().to_owned()));
        let expected = refused
            .map(|name| (Kind::Usage, format!("\"{name}\" is for everything, and leaves nothing to another form")));
        assert_eq!(message, expected, "{to:?}");
    };
    let (products, tables) = (To::Form(Form::Matmulnbits), To::Form(Form::GatherBlockQuantized));
    check(&[], None);
    check(&[To::Float], None);
    check(&[To::Form(Form::Qdq)], None);
    check(&[products, tables], None);
    check(&[To::Float, products], Some("float"));
    check(&[tables, To::Form(Form::Qdq)], Some("qdq"));
    check(&[To::Float, To::Form(Form::Qdq)], Some("qdq"));
}

/// The model that was made to measure it is the one that is given.
#[test]
#[cfg_attr(not(feature = "tract"), ignore = "runs samples")]
fn a_measured_model_is_not_made_again() {
    let (model, samples) = digits();
    let rewrite = Rewrite::new(&model).samples(&samples);
    let done = rewrite.run().unwrap();
    let again = ran(|after| {
        let watched = rewrite.after(after).run().unwrap();
        assert_eq!(amax::ir::file::to_bytes(&watched.model).unwrap(), amax::ir::file::to_bytes(&done.model).unwrap());
        let passes = |report: &amax::Report| serde_json::to_value(&report.passes).unwrap();
        assert_eq!(passes(&watched.report), passes(&done.report));
    });
    assert_eq!(again, table(&[&PREPARE, &QUANTIZE], &Conversion::default()));
    assert_eq!(done.report.passes.len(), again.len());
}

fn rows(samples: &SampleSet) -> Array<f32, Ix5> {
    let values: Vec<f32> =
        (0..samples.len()).flat_map(|i| samples.get(i).unwrap()["image"].to_f32().unwrap()).collect();
    Array::from_shape_vec((samples.len(), 1, 1, 8, 8), values).unwrap()
}

#[test]
fn arrays_in_memory_are_the_samples_of_a_file() {
    let (model, samples) = digits();
    let rows = rows(&samples);
    let check = |values: Values| {
        let found = SampleSet::from_arrays(&model, [("image", values)]).unwrap();
        assert_eq!(found.len(), samples.len());
        assert_eq!(found.content_hash().unwrap(), samples.content_hash().unwrap());
        assert_eq!(found.describe(), "64 samples from memory");
        assert!(found.files().is_empty());
    };
    check(Values::from(&rows));
    check(rows.view().into());
    check(rows.mapv(f64::from).into());
    // Whatever the order of elements in memory.
    let mut turned = rows.clone();
    turned.swap_axes(3, 4);
    let turned = turned.as_standard_layout().into_owned();
    check(turned.view().permuted_axes([0, 1, 2, 4, 3]).into());
    check(rows.into());
}

const EVERY: &str = r#"<ir_version: 8, opset_import: ["" : 17]>
g (float[2] f, int64[n] ids, bool b, uint8[2] u) => (float[2] y) {
  y = Relu (f)
}"#;

#[test]
fn arrays_of_every_kind_fit_or_say_why_not() {
    let model = amax::ir::text::parse(EVERY).unwrap();
    let set = |arrays: Vec<(&'static str, Values)>| SampleSet::from_arrays(&model, arrays);
    let given = || {
        vec![
            ("f", Values::from(array![[1.0f32, 2.0], [3.0, 4.0], [5.0, 6.0]])),
            ("ids", array![[1i64, 2], [3, 4], [5, 6]].into()),
            ("b", array![true, false, true].into()),
            ("u", array![7u8, 8].into()),
        ]
    };
    let samples = set(given()).unwrap();
    assert_eq!(samples.len(), 3);
    let second = samples.get(1).unwrap();
    assert_eq!(second["f"].to_f32().unwrap(), [3.0, 4.0]);
    assert_eq!(second["ids"].to_i64().unwrap(), [3, 4]);
    assert_eq!(&second["b"].raw()[..], [0]);
    assert_eq!(&second["u"].raw()[..], [7, 8]);
    let narrow = {
        let mut arrays = given();
        arrays[1] = ("ids", array![[1i32, -2], [3, 4], [5, 6]].into());
        set(arrays).unwrap().get(0).unwrap()["ids"].to_i64().unwrap()
    };
    assert_eq!(narrow, [1, -2]);

    let refused = |at: usize, name: &'static str, values: Values, message: &str| {
        let mut arrays = given();
        arrays[at] = (name, values);
        let error = set(arrays).unwrap_err();
        assert_eq!(error.kind(), Kind::Samples, "{error}");
        assert!(error.to_string().contains(message), "{error}");
    };
    refused(0, "f", array![[1i64, 2]].into(), "the input takes float32, but the samples give int64");
    refused(0, "f", Array3::<f32>::zeros((3, 2, 2)).into(), "the input takes [2], but the samples give [3, 2, 2]");
    refused(0, "g", array![[1.0f32, 2.0]].into(), "the model has no input \"g\"");
    refused(0, "ids", array![[1i64, 2]].into(), "two arrays are for one input");
    refused(1, "ids", array![[1i64, 2], [3, 4]].into(), "\"f\" holds 3 samples, but \"ids\" holds 2");
    let none = |len: usize| Array::<f32, _>::zeros((len, 2));
    let empty = amax::ir::text::parse(&EVERY.replace(", int64[n] ids, bool b, uint8[2] u", "")).unwrap();
    let error = SampleSet::from_arrays(&empty, [("f", none(0).into())]).unwrap_err();
    assert_eq!(error.message(), "there are no samples: the arrays have no rows");
    let error = SampleSet::from_arrays(&model, Vec::<(&str, Values)>::new()).unwrap_err();
    assert!(error.to_string().contains("the samples have no array for this input"), "{error}");
    let one: Array1<f32> = none(1).index_axis_move(Axis(0), 0);
    assert_eq!(SampleSet::from_arrays(&empty, [("f", one.into())]).unwrap().len(), 1);
}

#[test]
#[cfg_attr(not(feature = "tract"), ignore = "runs samples")]
fn from_file_to_file_as_the_command_does() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["digits.onnx", "digits.calib.npz"] {
        std::fs::copy(models(name), folder.path().join(name)).unwrap();
    }
    let (input, output) = (folder.path().join("digits.onnx"), folder.path().join("library.onnx"));
    let report = amax::quantize(&input, &output).unwrap();
    assert_eq!(report.files, [input.clone(), folder.path().join("digits.calib.npz")]);
    let (summary, warnings) = (report.summary(), report.warnings.len());
    for part in ["target ort-cpu", "4/4  Conv", "samples  64 samples of digits.calib.npz", "quality", "seconds  "] {
        assert!(summary.contains(part), "{part}: {summary}");
    }
    assert_eq!(summary.matches("warning: ").count(), warnings, "{summary}");
    let program = folder.path().join("program.onnx");
    let command =
        std::process::Command::new(env!("CARGO_BIN_EXE_amax")).arg("rewrite").args([&input, &program]).output();
    assert!(command.unwrap().status.success());
    assert_eq!(std::fs::read(&output).unwrap(), std::fs::read(&program).unwrap());

    let error = amax::quantize(&input, &input).unwrap_err();
    assert_eq!(error.kind(), Kind::Output, "{error}");
    let error = amax::quantize(folder.path().join("none.onnx"), &output).unwrap_err();
    assert_eq!(format!("{error:?}"), format!("{error}"));
    assert!(format!("{error:?}").contains("does not exist"), "{error:?}");
}

#[test]
#[cfg_attr(not(feature = "tract"), ignore = "runs samples")]
fn builders_do_what_the_steps_do() -> Result<()> {
    let (model, samples) = digits();
    let config = Config::parse("exclude = [\"wide\"]")?;
    let done = Rewrite::new(&model).config(&config).samples(&samples).run()?;
    assert_eq!(done.report.operators["Conv"], (3, 4));
    assert_eq!(done.report.target, "ort-cpu");
    // The target that the configuration names.
    let elsewhere = Config::parse("target = \"generic\"")?;
    assert_eq!(Rewrite::new(&model).config(&elsewhere).run()?.report.target, "generic");

    let statistics = Calibrate::new(&model, &samples).hold_out(true).run()?;
    let from_file = Rewrite::new(&model).config(&config).statistics(&statistics).samples(&samples).run()?;
    assert_eq!(amax::ir::file::to_bytes(&from_file.model)?, amax::ir::file::to_bytes(&done.model)?);
    let mut halves = [1, 2].map(|part| Calibrate::new(&model, &samples).shard((part, 2)).run().unwrap());
    assert_eq!(halves[0].sample_count + halves[1].sample_count, 64);
    // State of a run over other samples is refused.
    halves[0].samples_hash = String::new();
    let resumed = Calibrate::new(&model, &samples).resume((&halves[0], Path::new("state"))).run().unwrap_err();
    assert_eq!(resumed.message(), "the interrupted run had other samples");

    let comparison = Compare::new(&model, &done.model).samples(&samples);
    assert!(comparison.outputs()?[0].sqnr_db() > Some(25.0));
    assert!(!comparison.sites()?.is_empty());
    let none = Compare::new(&model, &done.model).outputs().unwrap_err();
    assert_eq!((none.kind(), none.message()), (Kind::Usage, "there are no samples to compare on"));
    let folded = Convert::new(&Rewrite::new(&model).samples(&samples).prepare()?.model).run()?;
    assert!(!folded.folded.is_empty() && folded.reference.is_none());
    Ok(())
}

/// A preset that is loaded is the preset that is named: keys that a target or a fake quantizer does not have are dropped.
#[test]
fn presets_may_be_loaded_or_named() {
    let model = amax::load(models("digits.onnx")).unwrap();
    for name in ["w4", "w8", "int8", "w4-best"] {
        let (loaded, mut named) = (presets::load(name).unwrap(), Config::default());
        named.preset = Some(name.to_owned());
        for target in ["ort-cpu", "generic", "tensorrt"] {
            let target = Target::load(target).unwrap();
            for fake in [false, true] {
                let bytes = |config: &Config| {
                    let rewrite = Rewrite::new(&model).config(config).target(&target);
                    let done = if fake { rewrite.prepare() } else { rewrite.run() };
                    let model = done.map_err(|e| e.kind())?.model;
                    for &node in model.graph(model.main()).nodes() {
                        if let Some(scale) =
                            model.constant_input(node, 1).filter(|_| fake && model.node(node).is("QuantizeLinear"))
                        {
                            assert!(
                                scale.to_f32().unwrap().iter().all(|&s| s > 0.0),
                                "{name} {}",
                                model.node_name(node)
                            );
                        }
                    }
                    Ok::<_, Kind>(file::to_bytes(&model).unwrap())
                };
                assert_eq!(bytes(&loaded), bytes(&named), "{name} on {}, fake: {fake}", target.name);
            }
        }
    }
}
