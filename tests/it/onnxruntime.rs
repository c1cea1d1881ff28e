//! onnxruntime as a runtime: what it shows is what tract shows, and what it needs is said.
//!
//! In a build with the feature `ort` these tests need an onnxruntime, in `ORT_DYLIB_PATH` or installed for Python.

use std::path::Path;
use std::process::{Command, Output};

use crate::support::{folder, root};

/// Runs the program in an environment of these variables alone.
fn amax(arguments: &[&str], variables: &[(&str, &Path)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_amax"));
    command.args(arguments).env_clear().envs(variables.iter().copied()).output().unwrap()
}

/// What the program says where it fails as a runtime that is not there does.
fn refusal(variables: &[(&str, &Path)]) -> String {
    let digits = root("models/digits.onnx");
    let folder = folder();
    let output = folder.path().join("out");
    let (digits, output) = (digits.to_str().unwrap(), output.to_str().unwrap());
    let commands: [&[&str]; 5] = [
        &["calibrate", digits, "-o", output, "--runtime", "ort"],
        &["rewrite", digits, output, "--runtime", "ort"],
        &["rewrite", digits, output, "--verify", "on"],
        &["compare", digits, digits, "--runtime", "ort"],
        &["verify", digits, digits],
    ];
    let mut said = Vec::new();
    for command in commands {
        let found = amax(command, variables);
        assert_eq!(found.status.code(), Some(5), "{command:?}");
        said.push(String::from_utf8(found.stderr).unwrap());
    }
    assert!(said.iter().all(|s| *s == said[0]), "{said:?}");
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    said.swap_remove(0)
}

#[test]
fn runtimes_that_do_not_exist() {
    let found = amax(&["calibrate", "m", "-o", "o", "--runtime", "onnx"], &[]);
    assert_eq!(found.status.code(), Some(2));
    let error = String::from_utf8(found.stderr).unwrap();
    assert!(error.contains("runtimes are tract and ort"), "{error}");
}

#[cfg(not(feature = "ort"))]
#[test]
fn a_build_without_it_says_how_to_build() {
    let error = refusal(&[]);
    assert!(error.contains("built without onnxruntime"), "{error}");
    assert!(error.contains("cargo build --features ort"), "{error}");
}

#[cfg(feature = "ort")]
mod there {
    use std::collections::BTreeSet;
    use std::path::Path;
    use std::sync::{Arc, Mutex};

    use amax::config::presets;
    use amax::error::Kind;
    use amax::ir::{Model, Tensor, file, text};
    use amax::observe::Run;
    use amax::observe::calibrate::{Observation, Site};
    use amax::report::{Deployment, QualityRow};
    use amax::rewrite::{Rewrite, Verify};
    use amax::runtime::{Observe, Options, Runtime, Sample, Session};
    use amax::samples::SampleSet;
    use amax::statistics::Statistics;

    use super::refusal;
    use crate::support::{digits, folder, root};

    /// The errors of a library that is not there name what was looked at, and the ways out.
    #[test]
    fn libraries_that_are_not_there() {
        let folder = folder();
        let at = folder.path();
        let packages = at.join("venv/lib/python3.12/site-packages");
        let capi = packages.join("onnxruntime/capi");
        std::fs::create_dir_all(&capi).unwrap();
        let fake = at.join("libfake.so");
        std::fs::write(&fake, "not a library").unwrap();
        let check = |variables: &[(&str, &Path)], words: &[&str]| {
            let error = refusal(variables);
            for word in words.iter().chain(&["pip install onnxruntime", "set ORT_DYLIB_PATH", "1.22 or later"]) {
                assert!(error.contains(word), "{word} is not in: {error}");
            }
        };
        check(&[], &["was not found", "ORT_DYLIB_PATH is not set", "no Python to look in"]);
        check(&[("ORT_DYLIB_PATH", &at.join("nowhere.so"))], &["nowhere.so", "there is no such file"]);
        check(&[("ORT_DYLIB_PATH", &fake)], &["libfake.so", "cannot be used"]);
        // Named, so nothing else is tried.
        let venv = at.join("venv");
        check(&[("ORT_DYLIB_PATH", &fake), ("VIRTUAL_ENV", &venv)], &["libfake.so, which cannot be used"]);
        let capi_text = capi.to_str().unwrap();
        check(&[("VIRTUAL_ENV", &venv)], &[capi_text, "nothing there"]);
        std::fs::write(capi.join("libonnxruntime.so.1.22.0"), "not a library").unwrap();
        check(&[("VIRTUAL_ENV", &venv)], &[capi_text, "libonnxruntime.so.1.22.0: "]);
    }

    /// What a rewrite of the digits by a preset is as deployed.
    fn deployed(preset: &str) -> (Deployment, Vec<QualityRow>) {
        let (model, samples) = digits();
        let config = presets::load(preset).unwrap();
        let done = Rewrite::new(&model).config(&config).samples(&samples).verify(Verify::On).run().unwrap();
        (done.report.deployed.unwrap(), done.report.quality)
    }

    /// Which kernels run is what the runtime says, not what was planned.
    #[test]
    fn deployed_kernels_are_told() {
        let counts = |found: &[(&str, usize)]| found.iter().map(|&(op, n)| (op.to_owned(), n)).collect();
        let (int8, quality) = deployed("int8");
        let [float, quantized] = &int8.kernels;
        assert_eq!(float.float, counts(&[("Conv", 4), ("Gemm", 1)]));
        assert!(float.integer.is_empty() && float.dequantized.is_empty());
        assert!(quantized.float.is_empty() && quantized.dequantized.is_empty(), "{quantized:?}");
        let taken = ["QLinearConv", "QGemm"].map(|op| quantized.integer.get(op).copied());
        assert_eq!(taken, [Some(4), Some(1)]);
        let [kept, computed] = [&int8.quality, &quality].map(|rows| rows[0].sqnr_db().unwrap());
        assert!((kept - computed).abs() < 1.0, "{kept} and {computed}");
        assert!(int8.timed >= 8 && int8.milliseconds.iter().all(|&time| time > 0.0));
        assert!(int8.bytes[1] < int8.bytes[0]);
        assert_eq!(int8.worse_than(&quality), Vec::<String>::new());
        let mut promised = quality;
        promised[0].floats.as_mut().unwrap().sqnr_db += 2.0;
        let said = int8.worse_than(&promised);
        assert!(matches!(&said[..], [only] if only.contains("\"logits\" keeps")), "{said:?}");
        // No kernel takes weights of convolutions alone.
        let (weights, _) = deployed("w8");
        assert!(!weights.kernels[1].dequantized.is_empty());
        let products: usize = weights.kernels[1].float.values().sum();
        assert!(products >= 4, "{:?}", weights.kernels[1]);
    }

    #[test]
    fn a_model_is_itself_as_deployed() {
        let path = root("models/digits.onnx");
        let said = crate::support::succeed(folder().path(), &format!("verify {0} {0}", path.display()));
        assert!(said.contains("  logits  exact  "), "{said}");
    }

    /// Sites are compared by showing tensors of a model as it is, which onnxruntime's fusions would hide.
    #[test]
    fn sites_are_measured_in_tract_only() {
        let digits = root("models/digits.onnx").display().to_string();
        let words = format!("compare {digits} {digits} --sites --runtime ort");
        crate::support::fail(folder().path(), &words, 2, "--sites requires the runtime tract");
    }

    fn statistics(model: &Model, sites: &[Site], samples: &SampleSet, runtime: Runtime, threads: usize) -> Statistics {
        let indices: Vec<usize> = (0..samples.len()).collect();
        let run = Run { runtime, threads, ..Run::new(samples, &indices) };
        let observation = Observation { model, sites, run, checkpoint: None };
        observation.run(Statistics::default()).unwrap_or_else(|e| panic!("{e}"))
    }

    /// The greatest difference of the two runtimes at any site in extremes, mean, and root mean square, relative to the
    /// largest magnitude there. Counts, also those of NaN and infinities, must be equal.
    #[cfg(feature = "tract")]
    fn difference(model: &Model, samples: &SampleSet) -> (f64, String) {
        let evaluate = amax::runtime::TractEvaluate;
        let model = amax::observe::calibrate::prepare(model, &evaluate, true).unwrap();
        let sites = amax::observe::calibrate::sites(&model);
        let [a, b] = Runtime::ALL.map(|runtime| statistics(&model, &sites, samples, runtime, 2));
        let mut worst = (0f64, String::new());
        for (name, a) in &a.sites {
            let b = b.sites.get(name).unwrap_or_else(|| panic!("{name} is not observed in onnxruntime"));
            assert_eq!((a.count(), a.nan(), a.inf()), (b.count(), b.nan(), b.inf()), "{name}");
            let (Some(x), Some(y)) = (a.range(), b.range()) else { continue };
            let magnitude = f64::from(x.amax().max(y.amax())).max(1e-6);
            let near = [
                f64::from(x.min) - f64::from(y.min),
                f64::from(x.max) - f64::from(y.max),
                a.mean() - b.mean(),
                a.mean_square().sqrt() - b.mean_square().sqrt(),
            ];
            let difference = near.iter().fold(0f64, |d, v| d.max(v.abs())) / magnitude;
            if difference > worst.0 {
                worst = (difference, name.clone());
            }
        }
        assert!(a.sites.len() > 1, "{:?}", a.unobserved);
        worst
    }

    /// Sums in another order: a few units in the last place of a float32.
    #[cfg(feature = "tract")]
    #[test]
    fn both_runtimes_see_the_same() {
        let (model, samples) = digits();
        let (difference, name) = difference(&model, &samples);
        assert!(difference < 2e-6, "{difference:e} at {name}");
    }

    /// The models of `AMAX_MODELS`, or those that `models/fetch` fetched, on the samples beside them or on noise.
    #[cfg(feature = "tract")]
    #[test]
    #[ignore = "minutes, and models that are not in the repository"]
    fn both_runtimes_see_the_same_of_real_models() {
        let folder = std::env::var_os("AMAX_MODELS").map_or_else(|| root("models/fetched"), Into::into);
        let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().flatten().map(|e| e.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|e| e == "onnx"));
        paths.sort();
        assert!(!paths.is_empty());
        for path in paths {
            let model = file::load(&path).unwrap();
            let samples = match amax::samples::default_path(&path) {
                Some(beside) => SampleSet::open(&beside, &model).unwrap(),
                None => SampleSet::random(&model, 2, 0).unwrap(),
            };
            let (difference, name) = difference(&model, &samples);
            println!("{}: {difference:.1e} at {name}", path.display());
            assert!(difference < 1e-3, "{}: {difference:e} at {name}", path.display());
        }
    }

    #[test]
    fn threads_do_not_matter() {
        let (model, samples) = digits();
        let sites = amax::observe::calibrate::sites(&model);
        let [one, three] = [1, 3].map(|threads| statistics(&model, &sites, &samples, Runtime::Ort, threads).to_bytes());
        assert!(one == three);
    }

    /// Site, values and shape.
    type Shown = (usize, Vec<f32>, Vec<usize>);

    #[derive(Default)]
    struct Seen(Mutex<Vec<Shown>>);

    impl Observe for Seen {
        fn see(&self, site: usize, values: &[f32], shape: &[usize]) {
            self.0.lock().unwrap().push((site, values.to_vec(), shape.to_vec()));
        }
    }

    fn session(text: &str, observed: &[&str]) -> amax::Result<Session> {
        let model = text::parse(text).unwrap();
        let observed: Vec<String> = observed.iter().map(|&o| o.to_owned()).collect();
        Session::with_options(&model, &observed, Options { runtime: Runtime::Ort, ..Options::default() })
    }

    const SMALL: &str = r#"<ir_version: 10, opset_import: ["": 21]>
        small (float[N,2] x, float16[2] h) => (float[N,2] y, float16[2] k, int64[2] n) <float[2] c = {1, 2}> {
          a = Add (x, c)
          y = Relu (a)
          k = Neg (h)
          n = Shape (a)
          cast = Cast <to = 1> (n)
          whole = Cast <to = 6> (a)
        }"#;

    /// Inputs, inner tensors and outputs, half as float32; constants and integers are not shown.
    #[test]
    fn what_is_shown() {
        let names = ["x", "h", "a", "y", "k", "c", "n", "nowhere", "a", "cast", "whole"];
        let session = session(SMALL, &names).unwrap();
        let half = Tensor::from_f64(amax::onnx::DataType::Float16, &[2], [0.5, -3.0]).unwrap();
        let sample: Sample = [("x".to_owned(), Tensor::from_f32(&[1, 2], &[-4., 5.])), ("h".to_owned(), half)].into();
        let seen = Arc::new(Seen::default());
        let observe: Arc<dyn Observe> = seen.clone();
        let outputs = session.run(&sample, &observe).unwrap();
        let values: Vec<_> = outputs.iter().map(|(n, t)| (n.as_str(), t.to_f32(), t.to_i64())).collect();
        assert_eq!(
            values,
            [("y", Some(vec![0., 7.]), None), ("k", Some(vec![-0.5, 3.]), None), ("n", None, Some(vec![1, 2]))]
        );
        let mut seen = std::mem::take(&mut *seen.0.lock().unwrap());
        seen.sort_by_key(|s| s.0);
        let flat = |site, values: &[f32]| (site, values.to_vec(), vec![2]);
        let row = |site, values: &[f32]| (site, values.to_vec(), vec![1, 2]);
        let expected = [
            row(0, &[-4., 5.]),
            flat(1, &[0.5, -3.]),
            row(2, &[-3., 7.]),
            row(3, &[0., 7.]),
            flat(4, &[-0.5, 3.]),
            row(8, &[-3., 7.]),
            flat(9, &[1., 2.]),
        ];
        assert_eq!(seen, expected);
        let silent: BTreeSet<String> = session.unobserved().into_iter().map(|(name, _)| name).collect();
        assert_eq!(silent, ["c", "n", "nowhere", "whole"].map(str::to_owned).into());
    }

    #[test]
    fn samples_that_do_not_fit() {
        let session = session(SMALL, &[]).unwrap();
        let observe: Arc<dyn Observe> = Arc::new(Seen::default());
        let sample: Sample = [("x".to_owned(), Tensor::from_i64(&[1, 2], &[1, 2]))].into();
        let error = session.run(&sample, &observe).unwrap_err();
        assert_eq!(error.kind(), Kind::Samples, "{error}");
    }

    /// What onnxruntime does not have is said when the model is handed over, what fails later at its node.
    #[test]
    fn refusals() {
        let strange = r#"<ir_version: 10, opset_import: ["": 21, "strange": 1]>
            g (float[N] x) => (float[N] y) { [odd] y = strange.Odd (x) }"#;
        let error = session(strange, &[]).unwrap_err();
        assert_eq!(error.kind(), Kind::Runtime);
        assert!(error.to_string().contains("Odd"), "{error}");
        assert!(error.to_string().contains("--runtime tract"), "{error}");
        let mismatch = r#"<ir_version: 10, opset_import: ["": 21]>
            g (float[N,M] x) => (y) <float[2,2] w = {1, 2, 3, 4}> { [product] y = MatMul (x, w) }"#;
        let session = session(mismatch, &[]).unwrap();
        let observe: Arc<dyn Observe> = Arc::new(Seen::default());
        let sample: Sample = [("x".to_owned(), Tensor::from_f32(&[1, 3], &[1., 2., 3.]))].into();
        let error = session.run(&sample, &observe).unwrap_err();
        assert_eq!(error.kind(), Kind::Runtime);
        assert!(error.to_string().contains("\"product\" (MatMul)"), "{error}");
    }

    /// A loop whose length the data decides, which tract cannot run: doubled until the sum is 100 or more.
    #[test]
    fn what_tract_cannot_run() {
        let double = r#"<ir_version: 10, opset_import: ["": 21]>
            g (float[2] x) => (float[2] y) <bool yes = {1}, float limit = {100}> {
              [until] l = Loop ("", yes, x) <
                body = body (int64 i, bool c, float[2] s) => (bool d, float[2] t) {
                  t = Add (s, s)
                  sum = ReduceSum <keepdims = 0> (t)
                  d = Less (sum, limit)
                }
              >
              y = Relu (l)
            }"#;
        let session = session(double, &["l"]).unwrap();
        let seen = Arc::new(Seen::default());
        let observe: Arc<dyn Observe> = seen.clone();
        let sample: Sample = [("x".to_owned(), Tensor::from_f32(&[2], &[4., -1.]))].into();
        session.run(&sample, &observe).unwrap();
        assert_eq!(*seen.0.lock().unwrap(), [(0, vec![256., -64.], vec![2])]);
    }
}
