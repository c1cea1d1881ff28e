//! Configurations: what each level says, who has the last word, what is refused and where; presets, imports, the schema.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use amax::config::rules::{Resolved, Rules};
use amax::config::spec::{Dtype, Field, ObserverKind, Share};
use amax::config::{Config, Level, SiteKind, Source, Spec, import, presets, schema};
use amax::ir::text;
use amax::numerics::Format;
use amax::quant::algorithm::Method;
use amax::targets::Target;

use crate::snapshot;
use crate::support::{folder, root};

fn target(name: &str) -> Target {
    Target::load(name).unwrap()
}

fn config(text: &str) -> Config {
    Config::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn rules(config: &Config) -> Rules {
    Rules::new(&target("generic"), config).unwrap_or_else(|e| panic!("{e}"))
}

/// Two values of each key that stand in no contradiction to any other key, as TOML.
fn values(field: Field) -> [&'static str; 2] {
    match field {
        Field::Enable | Field::Symmetric | Field::NarrowRange => ["true", "false"],
        Field::Dtype => ["\"int4\"", "\"uint16\""],
        Field::Granularity => ["\"per-tensor\"", "\"per-channel\""],
        Field::ChAxis => ["0", "-1"],
        Field::GroupSize => ["32", "64"],
        Field::Dynamic | Field::ReduceRange | Field::SignedScale => ["false", "true"],
        Field::Observer => ["\"mse\"", "\"entropy\""],
        Field::Percentile => ["99.9", "99.99"],
        Field::MseP => ["2.0", "2.4"],
        Field::ScaleType => ["\"power-of-two\"", "\"float\""],
        Field::ScaleDtype => ["\"float16\"", "\"bfloat16\""],
        Field::MxRounding => ["\"floor\"", "\"even\""],
        Field::Round => ["\"floor\"", "\"half-away\""],
        Field::Eps => ["0.001", "0.5"],
        Field::Postprocess => ["{ scale = 0.5 }", "{ max = 6.0, power_of_two = true }"],
        Field::Form => ["\"matmulnbits\"", "\"qdq\""],
        Field::AccuracyLevel => ["0", "4"],
        Field::Arithmetic => ["\"onnx\"", "\"torch\""],
    }
}

/// The levels in the order of their strength, each as text that sets one key; the first is a preset.
const LEVELS: [&str; 6] = ["target", "default", "op_type", "layer", "later layer", "command line"];

fn level_text(level: &str, kind: &str, key: &str, value: &str) -> String {
    match level {
        "default" => format!("[default.{kind}]\n{key} = {value}\n"),
        "op_type" => format!("[op_type.Conv.{kind}]\n{key} = {value}\n"),
        "layer" => format!("[[layer]]\nmatch = \"/head/*\"\n{kind}.{key} = {value}\n"),
        "later layer" => format!("[[layer]]\nmatch = \"*/conv.{kind}\"\n{kind}.{key} = {value}\n"),
        _ => String::new(),
    }
}

/// A key is decided by the strongest level that has it, and inherited through those that leave it out.
#[test]
fn the_later_level_has_the_last_word_on_every_key() {
    let mut cases = 0;
    for &field in Field::ALL {
        for kind in SiteKind::ALL {
            let (key, kind_name) = (field.name(), kind.name());
            let only = match field {
                Field::Dynamic => Some(SiteKind::Input),
                Field::SignedScale | Field::Arithmetic => Some(SiteKind::Weight),
                _ => None,
            };
            if only.is_some_and(|only| only != kind) {
                continue;
            }
            // What is said of everything leaves out operators that have no such form; another test is about that.
            if matches!(field, Field::Form | Field::AccuracyLevel) {
                continue;
            }
            for (weak, &weaker) in LEVELS.iter().enumerate().skip(1) {
                for &stronger in &LEVELS[weak + 1..] {
                    let [low, high] = values(field);
                    for (low, high) in [(low, high), (high, low)] {
                        let mut text =
                            level_text(weaker, kind_name, key, low) + &level_text(stronger, kind_name, key, high);
                        // Levels that say something else do not disturb.
                        let other = if field == Field::Eps { ("narrow_range", "true") } else { ("eps", "0.25") };
                        for between in LEVELS {
                            if between != weaker && between != stronger {
                                text += &level_text(between, kind_name, other.0, other.1);
                            }
                        }
                        let mut config = config(&text);
                        if stronger == "command line" {
                            config.set(&format!("layer.*.{kind_name}.{key}={}", high.trim_matches('"'))).unwrap();
                        }
                        let rules = rules(&config);
                        let site = rules.site("/head/conv", "Conv", kind, false);
                        // `layer` precedes `later layer` only in the order of the file.
                        assert_eq!(
                            site.spec.written(field).as_deref(),
                            Some(high),
                            "{weaker} < {stronger}, {kind_name}.{key}:\n{text}"
                        );
                        let label = &rules.rule(&site, field).unwrap().label;
                        let named = match stronger {
                            "op_type" => "[op_type.Conv]",
                            "layer" => "[[layer]] \"/head/*\"",
                            "later layer" => "[[layer]] \"*/conv.",
                            _ => "--set layer.*.",
                        };
                        assert!(label.starts_with(named), "{label} for {stronger}");
                        let elsewhere = rules.site("/body/fc", "Gemm", kind, false);
                        let expected = match (weaker, stronger) {
                            (_, "command line") => Some(high),
                            ("default", _) => Some(low),
                            _ => continue,
                        };
                        assert_eq!(
                            elsewhere.spec.written(field).as_deref(),
                            expected,
                            "{weaker} < {stronger}:\n{text}"
                        );
                        cases += 1;
                    }
                }
            }
        }
    }
    assert!(cases > 400, "{cases}");
}

/// The target's own defaults are the weakest level, and a preset comes before everything in the file.
#[test]
fn presets_stand_between_the_target_and_the_file() {
    let check = |text: &str, kind: SiteKind, field: Field, value: &str, label: &str| {
        let config = config(text);
        let rules = Rules::new(&target("tensorrt"), &config).unwrap();
        let site = rules.site("fc", "MatMul", kind, false);
        assert_eq!(site.spec.written(field).as_deref(), Some(value), "{text}");
        assert_eq!(rules.rule(&site, field).unwrap().label, label, "{text}");
    };
    check("", SiteKind::Input, Field::Dtype, "\"int8\"", "target tensorrt");
    check("", SiteKind::Weight, Field::Granularity, "\"per-channel\"", "target tensorrt");
    check("preset = \"w4\"", SiteKind::Weight, Field::Dtype, "\"int4\"", "preset w4: [op_type.MatMul]");
    check("preset = \"w4\"", SiteKind::Weight, Field::Symmetric, "true", "preset w4: [default]");
    check(
        "preset = \"w4\"\n[default]\nweight.dtype = \"int8\"",
        SiteKind::Weight,
        Field::Dtype,
        "\"int8\"",
        "[default]",
    );
    check(
        "preset = \"w4\"\n[default]\nweight.eps = 0.1",
        SiteKind::Weight,
        Field::GroupSize,
        "32",
        "preset w4: [op_type.MatMul]",
    );
}

/// `enable` of a level means all its kinds of sites; that of a spec is nearer.
#[test]
fn enable_of_a_spec_is_nearer_than_that_of_its_level() {
    let check = |text: &str, expected: [Option<bool>; 4]| {
        let rules = rules(&config(text));
        let found = SiteKind::ALL.map(|kind| rules.site("a", "Conv", kind, false).spec.enable);
        assert_eq!(found, expected, "{text}");
    };
    // Inputs, weights, biases, outputs.
    check("[default]\nenable = false", [Some(false); 4]);
    check("[default]\nenable = false\nweight.enable = true", [Some(false), Some(true), Some(false), Some(false)]);
    check("exclude = [\"a\"]\n[[layer]]\nmatch = \"a\"\nenable = true", [Some(false); 4]);
    check(
        "[default]\nenable = false\n[op_type.Conv]\ninput.enable = true",
        [Some(true), Some(false), Some(false), Some(false)],
    );
    check("[[layer]]\nmatch = \"*.weight\"\nenable = false", [None, Some(false), None, None]);
    check("[[layer]]\nmatch = \"*\"\nop_type = [\"Gemm\"]\nenable = false", [None; 4]);
}

/// Patterns mean nodes, or with a kind of site at the end that kind only.
#[test]
fn patterns_mean_nodes_or_sites() {
    let check = |pattern: &str, node: &str, expected: &str| {
        let mut config = Config::default();
        config.switch("--disable", pattern, false).unwrap();
        let rules = rules(&config);
        let off = SiteKind::ALL.into_iter().filter(|&kind| rules.site(node, "MatMul", kind, false).is_off());
        let off: Vec<&str> = off.map(SiteKind::name).collect();
        assert_eq!(off.join(" "), expected, "{pattern} on {node}");
    };
    let (all, none) = ("input weight bias output", "");
    check("*", "a", all);
    check("*.weight", "a", "weight");
    check("*.weight", "a.weight", all);
    check("*weight_quantizer", "/a/b", "weight");
    check("*input_quantizer", "/a/b", "input");
    check("*output_quantizer", "/a/b", "output");
    check("*lm_head*", "/lm_head/MatMul", all);
    check("*output*", "/a/MatMul", none);
    check("/encoder/layer.[0-5]/*.input", "/encoder/layer.3/ffn/MatMul", "input");
    check("/encoder/layer.[0-5]/*.input", "/encoder/layer.7/ffn/MatMul", none);
    check("/encoder/layer.[0-5]/*", "/encoder/layer.0/ffn/MatMul", all);
    check("*.{input,weight}", "a", "input weight");
    check("re:^/a/.*\\.(bias|output)$", "/a/b", "bias output");
    check("re:^/a/", "/a/b", all);
    check("/A/*", "/a/b", none);
    check("a[0]", "a[0]", all);
    check("a?", "ab", all);
    check("a?", "abc", none);
}

/// `--set` in all its forms.
#[test]
fn keys_can_be_set_one_by_one() {
    let check = |settings: &[&str], see: &dyn Fn(&Config) -> bool| {
        let mut config = Config::default();
        for text in settings {
            config.set(text).unwrap_or_else(|e| panic!("{e}"));
        }
        assert!(see(&config), "{settings:?}: {config:?}");
    };
    let at = |config: &Config, node: &str, kind| rules(config).site(node, "Conv", kind, false).spec;
    check(&["default.weight.dtype=int4"], &|c| {
        at(c, "a", SiteKind::Weight).dtype == Some(Dtype::Element(Format::Int4))
    });
    check(&["default.weight.dtype = \"int4\""], &|c| {
        at(c, "a", SiteKind::Weight).dtype == Some(Dtype::Element(Format::Int4))
    });
    check(&["op_type.Conv.input.symmetric=true"], &|c| at(c, "a", SiteKind::Input).symmetric == Some(true));
    check(&["op_type.Gemm.input.eps=0.5"], &|c| at(c, "a", SiteKind::Input).eps.is_none());
    check(&["op_type.Conv.enable=false"], &|c| at(c, "a", SiteKind::Input).enable == Some(false));
    check(&["layer.model.0.fc.weight.dtype=int4"], &|c| {
        at(c, "model.0.fc", SiteKind::Weight).dtype == Some(Dtype::Element(Format::Int4))
    });
    check(&["layer./a/*.weight.ch_axis=-2"], &|c| at(c, "/a/b", SiteKind::Weight).ch_axis == Some(-2));
    check(&["layer./a/*.weight.ch_axis=-2"], &|c| at(c, "/b/b", SiteKind::Weight).ch_axis.is_none());
    check(&["layer.a.enable=false"], &|c| at(c, "a", SiteKind::Bias).enable == Some(false));
    check(&["layer.a.enable=false", "layer.*.enable=true"], &|c| at(c, "a", SiteKind::Bias).enable == Some(true));
    check(&["layer.re:^a[0-9]$.output.percentile=99.5"], &|c| at(c, "a7", SiteKind::Output).percentile == Some(99.5));
    check(&["layer.conv.weight.enable=false"], &|c| at(c, "conv", SiteKind::Weight).enable == Some(false));
    check(&["layer.conv.weight.enable=false"], &|c| at(c, "conv", SiteKind::Input).enable.is_none());
    check(&["guard.weight_db=15"], &|c| c.guard.weight_db.to_bits() == 15f64.to_bits() && c.guard.enabled);
    check(&["guard.output_db=-inf", "guard.enabled=false"], &|c| c.guard.output_db.is_infinite() && !c.guard.enabled);
    check(&["preset=w4", "target=generic"], &|c| {
        c.preset.as_deref() == Some("w4") && c.target.as_deref() == Some("generic")
    });
    check(&["algorithm=max"], &|c| c.algorithm.as_ref().is_some_and(|a| a.method == Method::Max));
    check(&["algorithm.method=awq_lite", "algorithm.alpha_step=0.2"], &|c| {
        c.algorithm.as_ref().is_some_and(|a| a.method == Method::AwqLite && a.alpha_step == Some(0.2))
    });
    check(&["tensor.a.b/c.range=[-1, 2.5]"], &|c| c.tensor["a.b/c"].range == Some([-1.0, 2.5]));
    check(&["tensor.x.scale=0.5", "tensor.x.zero_point=3"], &|c| {
        c.tensor["x"].zero_point.as_ref().unwrap().to_vec() == [3]
    });
    check(&["exclude=[\"a\"]"], &|c| at(c, "a", SiteKind::Input).enable == Some(false));
}

/// Every mistake that a file or `--set` can contain: what is said about it, and where.
#[test]
fn mistakes_are_named_with_their_place() {
    let path = root("tests/data/config/mistakes.txt");
    let text = std::fs::read_to_string(path).unwrap();
    let mut out = String::new();
    let mut cases = 0;
    for block in text.split("\n====\n") {
        let (head, rest) = block.trim_start_matches('\n').split_once('\n').unwrap_or((block, ""));
        let (written, _) = rest.split_once("\n----\n").unwrap_or((rest.trim_end(), ""));
        let found = match head {
            "file" => Config::parse(written).and_then(|c| Rules::new(&target("generic"), &c)?.check(&model())),
            "import" => import::convert(written).map(drop),
            _ => {
                let mut config = Config::default();
                config.set(written).and_then(|()| rules(&config).check(&model()))
            }
        };
        let said = match found {
            Ok(()) => "accepted".to_owned(),
            Err(error) => error.to_string(),
        };
        assert_ne!(said, "accepted", "{written}");
        let _ = write!(out, "{}{head}\n{written}\n----\n{said}", if cases > 0 { "\n====\n" } else { "" });
        cases += 1;
    }
    assert!(cases > 80, "{cases}");
    snapshot::check("data/config/mistakes.txt", &out);
}

fn model() -> amax::ir::Model {
    text::parse(
        "<ir_version: 10, opset_import: [\"\" : 21]>
        small (float[1,4] x) => (float[1,2] y)
        <float[4,2] w = {1,0, 0,1, 1,0, 0,1}>
        { [\"/head/fc/MatMul\"] m = MatMul (x, w)  [\"/head/act/Relu\"] y = Relu (m) }",
    )
    .unwrap()
}

/// Rules that match are fine, optional ones may match nothing.
#[test]
fn patterns_must_match_unless_optional() {
    let check = |text: &str| rules(&config(text)).check(&model()).unwrap_or_else(|e| panic!("{e}\n{text}"));
    check("exclude = [\"/head/*\", \"*.weight\", \"re:Relu$\", \"/head/fc/MatMul.input\"]");
    check("[[layer]]\nmatch = \"*lm_head*\"\noptional = true\nenable = false");
    check("[[layer]]\nmatch = \"*\"\nop_type = [\"MatMul\", \"Conv\"]\nenable = false");
    check("preset = \"INT8_DEFAULT_CFG\"");
}

/// A rule tells its file and line, in TOML and JSON; those of presets tell the preset's.
#[test]
fn rules_know_their_lines() {
    let folder = folder();
    let toml = "preset = \"w4\"\nexclude = [\n  \"b\",\n]\n[default]\nweight.eps = 0.1\n\n[op_type.Conv.weight]\ndtype = \"int4\"\n\n\
                [[layer]]\nmatch = \"a\"\nweight = { group_size = 32,\n  granularity = \"per-group\" }\n";
    let json = "{\"preset\": \"w4\", \"exclude\": [\n\n\"b\"],\n\"default\": {\n\n\"weight\": {\"eps\": 0.1}},\n\
                \"op_type\": {\"Conv\":\n{\"weight\":\n{\"dtype\": \"int4\"}}},\n\n\"layer\": [{\"match\": \"a\",\n\"weight\": {\"group_size\": 32,\n\
                \"granularity\": \"per-group\"}}]}";
    let lines = [("amax.toml", toml, ["6", "9", "13", "14", "3"]), ("amax.json", json, ["6", "9", "12", "13", "3"])];
    for (name, text, [eps, dtype, size, share, exclude]) in lines {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let rules = rules(&Config::load(&path).unwrap());
        let check = |node: &str, field: Field, line: &str| {
            let site = rules.site(node, "Conv", SiteKind::Weight, false);
            let place = rules.rule(&site, field).unwrap().origin.place(&format!("weight.{}", field.name()));
            assert_eq!(place, format!("{}:{line}", path.display()), "{name}, {field:?}");
        };
        check("a", Field::Eps, eps);
        check("a", Field::Dtype, dtype);
        check("a", Field::GroupSize, size);
        check("a", Field::Granularity, share);
        check("b", Field::Enable, exclude);
        let site = rules.site("c", "Gemm", SiteKind::Weight, false);
        let place = rules.rule(&site, Field::GroupSize).unwrap().origin.place("weight.group_size");
        let (preset, line) = place.split_once(':').unwrap();
        let said = presets::text("w4").unwrap().lines().nth(line.parse::<usize>().unwrap() - 1).unwrap();
        assert_eq!((preset, said), ("preset w4", "group_size = 32"));
    }
}

/// The chain names every rule that said something, with what was there before.
#[test]
fn the_chain_of_rules_accounts_for_a_site() {
    let mut config = config(
        "[default]\nweight.dtype = \"int4\"\n[[layer]]\nmatch = \"a\"\nweight = { dtype = \"int16\", eps = 0.5 }",
    );
    config.switch("--enable", "a", true).unwrap();
    let rules = rules(&config);
    let mut out = String::new();
    for step in rules.chain("a", "Conv", SiteKind::Weight, false, "w").iter().skip(1) {
        let _ = write!(out, "{}:", rules.all()[step.rule].label);
        for (field, before, after) in &step.changes {
            let _ = write!(out, " {} {} -> {after}", field.name(), before.as_deref().unwrap_or("none"));
        }
        out.push('\n');
    }
    assert_eq!(
        out,
        "[default]: dtype \"int8\" -> \"int4\"\n\
         [[layer]] \"a\": dtype \"int4\" -> \"int16\" eps none -> 0.5\n\
         --enable \"a\": enable none -> true\n"
    );
}

/// A preset is a configuration that can be printed, saved and used; it sets nothing that is not a rule.
#[test]
fn presets_print_as_what_they_are() {
    let folder = folder();
    let names: Vec<&str> = presets::names().collect();
    assert_eq!(names.len(), 28);
    for name in names {
        let path = folder.path().join("amax.toml");
        std::fs::write(&path, presets::text(name).unwrap()).unwrap();
        let written = Config::load(&path).unwrap_or_else(|e| panic!("{e}"));
        let preset = presets::load(name).unwrap();
        let bare = |config: &Config| {
            let mut config = config.clone();
            config.source = Source::default();
            config
        };
        assert_eq!(bare(&written), bare(&preset), "{name}");
        let again = config(&written.to_toml().unwrap());
        assert_eq!(bare(&again), bare(&preset), "{name} in our own words");
        assert!(written.target.is_none() && written.preset.is_none(), "{name}");
        assert!(
            written.exclude.is_empty() && written.tensor.is_empty() && written.guard == amax::config::Guard::default()
        );
        let summary = presets::summary(name).unwrap();
        assert!(summary.len() > 20 && summary.len() < 100, "{name}: {summary}");
        // Used by name or saved, the rules say the same.
        let (named, saved) = (rules(&config(&format!("preset = \"{name}\""))), rules(&written));
        assert_eq!((named.algorithm(), named.pre_quant_opt()), (saved.algorithm(), saved.pre_quant_opt()), "{name}");
        for (op, kind) in
            ["MatMul", "Conv", "Add", "MaxPool"].iter().flat_map(|op| SiteKind::ALL.map(|kind| (op, kind)))
        {
            for node in ["/a/MatMul", "/lm_head/MatMul", "/mlp/gate/MatMul", "/output/MatMul"] {
                let specs = [&named, &saved].map(|rules| rules.site(node, op, kind, false).spec);
                assert_eq!(specs[0], specs[1], "{name}, {node}.{kind:?} of {op}");
            }
        }
    }
}

/// One line for each kind of site: what is quantized, how.
fn written(rules: &Rules, node: &str, op: &str) -> String {
    let mut out = String::new();
    for kind in [SiteKind::Input, SiteKind::Weight, SiteKind::Output] {
        let Resolved { spec, .. } = rules.site(node, op, kind, false);
        if spec.enable == Some(false) {
            continue;
        }
        let plain =
            |f: Field| spec.written(f).is_some_and(|v| v == "\"half-even\"" || v == "false" && f == Field::ReduceRange);
        let fields = Field::ALL.iter().filter(|&&f| f != Field::Enable && !plain(f));
        let said = fields.filter_map(|f| Some(format!("{}={}", f.name(), spec.written(*f)?.replace('"', ""))));
        let _ = writeln!(out, "{} {}", kind.name(), said.collect::<Vec<_>>().join(" "));
    }
    out
}

/// What each preset asks for at a product, a convolution, a sum, and at what ModelOpt leaves out.
#[test]
fn presets_ask_for_what_they_say() {
    let mut out = String::new();
    for name in presets::names() {
        let rules = rules(&config(&format!("preset = \"{name}\"")));
        let _ = writeln!(out, "== {name}");
        if let Some(algorithm) = rules.algorithm() {
            let _ = writeln!(out, "algorithm {} {:?}", algorithm.method.name(), algorithm.alpha_step);
        }
        for (node, op) in
            [("/mlp/fc1/MatMul", "MatMul"), ("/conv/Conv", "Conv"), ("/Add", "Add"), ("/lm_head/MatMul", "MatMul")]
        {
            let _ = write!(out, "{node}\n{}", written(&rules, node, op));
        }
    }
    snapshot::check("data/config/presets.txt", &out);
}

/// The examples of the tools that the configuration learned from, as ours.
#[test]
fn examples_of_other_tools_can_be_said() {
    let mut out = String::new();
    for name in ["quark", "modelopt", "torchao_8da4w", "torchao_int4_weight_only", "torchao_qat_linear"] {
        let path = format!("tests/data/config/examples/{name}.toml");
        let text = std::fs::read_to_string(root(&path)).unwrap();
        let rules = rules(&config(&text));
        let _ = writeln!(out, "== {name}");
        for (node, op) in [
            ("/conv1/Conv", "Conv"),
            ("/layers.0/fc1/MatMul", "MatMul"),
            ("/layers.1/fc1/Gemm", "Gemm"),
            ("/lm_head/MatMul", "MatMul"),
            ("/emb/Gather", "Gather"),
        ] {
            let _ = write!(out, "{node}\n{}", written(&rules, node, op));
        }
    }
    snapshot::check("data/config/examples.txt", &out);
}

/// Imported configurations resolve, site by site, to what the tools' own rules give (`expected.py`).
#[test]
fn imports_mean_what_they_meant() {
    let folder = root("tests/data/config/import");
    let text = std::fs::read_to_string(folder.join("expected.json")).unwrap();
    let expected: BTreeMap<String, BTreeMap<String, (String, Option<Spec>)>> = serde_json::from_str(&text).unwrap();
    assert_eq!(expected.len(), 5);
    for (name, sites) in expected {
        let imported = import::load(&folder.join(format!("{name}.json"))).unwrap_or_else(|e| panic!("{e}"));
        let text = imported.to_toml().unwrap();
        let config = config(&text);
        let rules = Rules::new(&target("generic"), &config).unwrap();
        let mut on = 0;
        for (site, (op, expected)) in sites {
            let (node, kind) = site.rsplit_once('.').unwrap();
            let kind = SiteKind::ALL.into_iter().find(|k| k.name() == kind).unwrap();
            let found = rules.site(node, &op, kind, false).spec;
            let Some(expected) = expected else {
                assert_eq!(found.enable, Some(false), "{name}, {site}: {found:?}");
                continue;
            };
            assert_eq!(found.enable, Some(true), "{name}, {site}");
            let observer = expected.observer.unwrap_or(ObserverKind::Minmax);
            assert_eq!(found.observer, Some(observer), "{name}, {site}");
            for &field in Field::ALL {
                // A group size says nothing where the scales are not those of groups.
                let due = expected.written(field).is_some()
                    || field == Field::GroupSize && found.granularity == Some(Share::PerGroup);
                if due {
                    assert_eq!(found.written(field), expected.written(field), "{name}, {site}, {}", field.name());
                }
            }
            if found.dtype.and_then(Dtype::element).is_some_and(Format::is_integer) && name.starts_with("modelopt") {
                assert_eq!((found.symmetric, found.narrow_range), (Some(true), Some(true)), "{name}, {site}");
            }
            on += 1;
        }
        assert!(on > 5, "{name}: {on}");
        // Operators between the modules stay float.
        for node in ["/model/layers.0/Add", "/model/layers.1/mlp/fc1/Add", "/Softmax"] {
            assert_eq!(written(&rules, node, "Add"), "", "{name}, {node}");
        }
        snapshot::check(&format!("data/config/import/{name}.toml"), &text);
    }
}

/// Damaged documents are errors or other documents, whatever the damage.
#[test]
fn damage_is_survived() {
    let folder = root("tests/data/config");
    let names =
        ["import/modelopt_replace.json", "import/quark_w8a8.json", "examples/quark.toml", "import/quark_w8a8.toml"];
    let (mut accepted, mut refused) = (0, 0);
    for name in names {
        let text = std::fs::read_to_string(folder.join(name)).unwrap();
        let signs: Vec<char> = text.chars().collect();
        for step in 0..400 {
            let at = step * 7919 % signs.len();
            let mut damaged = signs.clone();
            match step % 4 {
                0 => drop(damaged.remove(at)),
                1 => damaged[at] = ['"', '[', '{', '*', '.', '0', '-', 'é'][step / 4 % 8],
                2 => damaged.truncate(at),
                _ => damaged.swap(at, (at + 1 + step) % signs.len()),
            }
            let damaged: String = damaged.into_iter().collect();
            let found = if name.ends_with("json") {
                import::convert(&damaged).and_then(|imported| imported.to_toml())
            } else {
                Config::parse(&damaged).and_then(|config| config.to_toml())
            };
            match found {
                Ok(text) => {
                    config(&text);
                    accepted += 1;
                }
                Err(error) => {
                    assert!(!error.message().is_empty(), "{damaged}");
                    refused += 1;
                }
            }
        }
    }
    assert!(accepted > 100 && refused > 400, "{accepted} {refused}");
}

/// The algorithm of a preset is used unless the configuration has its own.
#[test]
fn algorithms_are_typed_and_inherited() {
    let check = |text: &str, method: Option<Method>| {
        assert_eq!(rules(&config(text)).algorithm().map(|a| a.method), method, "{text}");
    };
    check("", None);
    check("algorithm = \"gptq\"", Some(Method::Gptq));
    check("algorithm = { method = \"hqq\", iterations = 20 }", Some(Method::Hqq));
    check("{\"algorithm\": null}", None);
    check("{\"algorithm\": {\"method\": \"null\"}}", Some(Method::None));
    check("preset = \"INT4_AWQ_CFG\"", Some(Method::AwqLite));
    check("preset = \"INT4_AWQ_CFG\"\nalgorithm = \"max\"", Some(Method::Max));
    let list = config("pre_quant_opt = [\"smoothquant\", { method = \"smoothquant\", alpha = 0.5 }]");
    assert_eq!(rules(&list).pre_quant_opt().iter().map(|a| a.alpha).collect::<Vec<_>>(), [None, Some(0.5)]);
}

/// A form that is asked for everywhere is meant for the operators that can have it; the others keep what they had.
#[test]
fn a_form_is_for_the_operators_that_it_serves() {
    let check = |text: &str, expected: [Option<&str>; 3]| {
        let rules = rules(&config(text));
        let form = |op| rules.site("/a/node", op, SiteKind::Weight, false).spec.written(Field::Form);
        let found = ["MatMul", "Gather", "Conv"].map(form);
        assert_eq!(found, expected.map(|e| e.map(|e| format!("\"{e}\""))), "{text}");
    };
    let (nbits, rows) = (Some("matmulnbits"), Some("gather-block-quantized"));
    check("default.weight.form = \"matmulnbits\"", [nbits, None, None]);
    check("default.weight.form = \"qdq\"", [Some("qdq"); 3]);
    check("preset = \"w4\"\ndefault.weight.form = \"matmulnbits\"", [nbits, rows, None]);
    check("preset = \"w4\"\ndefault.weight.form = \"qdq\"", [Some("qdq"); 3]);
    check("[[layer]]\nmatch = \"/a/*\"\nweight.form = \"matmulnbits\"", [nbits; 3]);
    check("[[layer]]\nmatch = \"*\"\nweight.form = \"gather-block-quantized\"", [None, rows, None]);
}

/// A configuration survives being written and read, with every key in it.
#[test]
fn every_key_survives_toml() {
    let mut specs: [Spec; 4] = Default::default();
    for (kind, spec) in SiteKind::ALL.into_iter().zip(&mut specs) {
        for field in Field::ALL.iter().filter(|&&f| kind == SiteKind::Input || f != Field::Dynamic) {
            // Keys that only go with one observer or granularity are not held against others that are not there.
            if matches!(field, Field::Form | Field::AccuracyLevel) && kind != SiteKind::Weight {
                continue;
            }
            let text = format!("{} = {}", field.name(), values(*field)[0]);
            if !matches!(field, Field::Granularity | Field::Observer) {
                spec.overlay(&toml_spec(&text));
            }
        }
    }
    let [input, weight, bias, output] = specs.map(Some);
    let mut config = Config::default();
    config.default = Some(Level { enable: Some(true), input, output, weight, bias, algorithm: None });
    let read = Config::parse(&config.to_toml().unwrap()).unwrap();
    assert_eq!(read.default, config.default);
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(Config::parse(&json).unwrap().default, config.default);
}

fn toml_spec(text: &str) -> Spec {
    // Of the keys that not every kind of site has, weights and inputs have all.
    let level = |kind: &str| Config::parse(&format!("[default.{kind}]\n{text}")).map(|c| c.default.unwrap());
    match level("input") {
        Ok(level) => level.input.unwrap(),
        Err(_) => level("weight").unwrap().weight.unwrap(),
    }
}

/// The schema has every key, and forbids others.
#[test]
fn the_schema_has_every_key() {
    let schema: serde_json::Value = serde_json::from_str(&schema().unwrap()).unwrap();
    let keys = |value: &serde_json::Value| value["properties"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let mut fields: Vec<&str> = Field::ALL.iter().map(|f| f.name()).collect();
    fields.sort_unstable();
    assert_eq!(keys(&schema["$defs"]["Spec"]), fields);
    let top = [
        "algorithm",
        "budget",
        "default",
        "exclude",
        "guard",
        "layer",
        "op_type",
        "postprocess",
        "pre_quant_opt",
        "preset",
        "target",
        "tensor",
    ];
    assert_eq!(keys(&schema), top);
    for part in ["Spec", "Level", "Layer", "Adjusted", "Postprocess", "Tensor", "Guard", "Budget", "Algorithm"] {
        assert_eq!(schema["$defs"][part]["additionalProperties"], false, "{part}");
    }
}

#[test]
fn each_site_of_a_large_model_has_its_rules() {
    let mut text = String::from("preset = \"INT8_DEFAULT_CFG\"\nexclude = [\"*lm_head*\", \"re:/norm/\"]\n");
    for layer in 0..24 {
        let _ = write!(
            text,
            "[[layer]]\nmatch = \"/model/layers.{layer}/*{}\"\nweight = {{ dtype = \"int{}\", eps = {layer}.5 }}\n",
            if layer % 2 == 0 { ".weight" } else { "" },
            [4, 8, 16][layer % 3],
        );
    }
    let config = config(&text);
    let rules = rules(&config);
    assert!(rules.all().len() >= 30, "{}", rules.all().len());
    let mut set = 0;
    for node in 0..5000 {
        let name = format!("/model/layers.{}/self_attn/q_proj_{node}/MatMul", node % 30);
        for kind in SiteKind::ALL {
            let site = rules.site(&name, "MatMul", kind, false);
            set += usize::from(site.spec.eps.is_some());
        }
    }
    assert_eq!(set, 20 * 167 + 4 * 166, "the weights of 24 layers of 30");
}
