//! What becomes of ranges after they were chosen.

use amax::config::Config;
use amax::config::spec::Postprocess;
use amax::plan::Plan;
use amax::report::Report;

const NONE: Postprocess = Postprocess { scale: None, min: None, max: None, power_of_two: false };

#[test]
fn amax_is_multiplied_then_clamped_then_rounded_up() {
    let scaled = |scale| Postprocess { scale: Some(scale), ..NONE };
    let bounds = |min, max| Postprocess { min, max, ..NONE };
    let power = Postprocess { power_of_two: true, ..NONE };
    let cases = [
        (scaled(0.5), (-2.0, 6.0), (-1.0, 3.0)),
        (scaled(1.5), (-8.0, 4.0), (-12.0, 6.0)),
        (bounds(None, Some(6.0)), (-3.0, 12.0), (-1.5, 6.0)),
        (bounds(None, Some(6.0)), (0.0, 5.0), (0.0, 5.0)),
        (bounds(Some(1.0), None), (-0.25, 0.125), (-1.0, 0.5)),
        (bounds(Some(1.0), Some(2.0)), (0.0, 0.0), (0.0, 1.0)),
        (power, (-0.5, 3.0), (-4.0 / 6.0, 4.0)),
        (power, (0.0, 4.0), (0.0, 4.0)),
        (power, (0.0, 4.000_000_5), (0.0, 8.0)),
        (power, (-1.0, 0.0), (-1.0, 0.0)),
        (power, (0.0, 0.0), (0.0, 0.0)),
        (power, (0.0, 1.0e-40), (0.0, f32::from_bits(1 << 17))),
        (power, (0.0, f32::MAX), (0.0, f32::MAX)),
        (Postprocess { scale: Some(0.5), max: Some(5.0), power_of_two: true, ..NONE }, (0.0, 20.0), (0.0, 8.0)),
        (Postprocess { scale: Some(0.5), min: Some(3.0), power_of_two: true, ..NONE }, (0.0, 2.0), (0.0, 4.0)),
    ];
    for (rule, range, expected) in cases {
        assert_eq!(rule.apply(range), expected, "{rule:?} of {range:?}");
        assert_eq!(rule.check(), Ok(()), "{rule:?}");
    }
    let mistakes = [NONE, scaled(-1.0), scaled(f64::NAN), bounds(Some(0.0), None), bounds(Some(2.0), Some(1.0))];
    for rule in mistakes {
        assert!(rule.check().is_err(), "{rule:?}");
    }
}

fn rewritten(config: &str) -> (Plan, Report) {
    let (model, samples) = crate::support::digits();
    let config = Config::parse(config).unwrap();
    let done = crate::pipeline::run(&model, Some(&samples), &config, amax::targets::DEFAULT, 2);
    (done.plan.unwrap(), done.report)
}

/// The scales of a model are those of the ranges that were asked for.
#[test]
fn scales_follow() {
    let guard = "[guard]\nenabled = false\n";
    let (_, plain) = rewritten(guard);
    let (plan, changed) = rewritten(&format!(
        "{guard}[[postprocess]]\nmatch = \"*.{{input,output}}\"\nscale = 0.5\n\
         [[postprocess]]\nmatch = \"classifier.weight\"\npower_of_two = true"
    ));
    assert!(!plain.activations.is_empty());
    for (before, after) in plain.activations.iter().zip(&changed.activations) {
        assert_eq!(before.tensor, after.tensor);
        let (before, after) = (before.scale.unwrap(), after.scale.unwrap());
        assert!((after * 2.0 - before).abs() <= before * 1e-6, "{before} {after}");
    }
    let classifier = plan.weights.iter().find(|w| w.site == "classifier.weight").unwrap();
    assert_eq!(classifier.quantizer.postprocess, Some(Postprocess { power_of_two: true, ..NONE }));
    assert!(plan.weights.iter().filter(|w| w.site != classifier.site).all(|w| w.quantizer.postprocess.is_none()));
}
