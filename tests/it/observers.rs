//! Observers against searches over the values themselves: activations of real models, with what numpy found for them
//! (`tests/data/observers/make.py`).
#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "helpers of tests")]

use std::collections::BTreeMap;

use amax::algorithms::observers::{error, range};
use amax::numerics::qparams_from_range;
use amax::quant::{Format, Observer, QParam, RangeSpec};
use amax::statistics::SiteStatistics;
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    /// By percentage: lower and upper end where each tail is cut, and the magnitude.
    quantiles: BTreeMap<String, [f64; 3]>,
    /// Least error by format and exponent.
    error: BTreeMap<String, BTreeMap<String, f64>>,
    divergence: BTreeMap<String, Divergence>,
}

#[derive(Deserialize)]
struct Divergence {
    least: f64,
    amax: f64,
    whole: f64,
}

fn folder() -> std::path::PathBuf {
    crate::support::root("tests/data/observers")
}

fn values(name: &str) -> Vec<f32> {
    let bytes = std::fs::read(folder().join(format!("{name}.f32"))).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn cases() -> Vec<(String, Vec<f32>, Expected)> {
    let text = std::fs::read_to_string(folder().join("expected.json")).unwrap();
    let expected: BTreeMap<String, Expected> = serde_json::from_str(&text).unwrap();
    assert!(expected.len() >= 8);
    expected.into_iter().map(|(name, e)| (name.clone(), values(&name), e)).collect()
}

fn observed(values: &[f32]) -> SiteStatistics {
    let mut site = SiteStatistics::new();
    for (index, part) in (0..).zip(values.chunks(1000)) {
        site.observe(index, part);
    }
    site
}

fn spec(name: &str) -> RangeSpec {
    RangeSpec::new(Format::parse(name).unwrap(), !name.starts_with('u'))
}

fn cut(values: &[f32], amax: f64) -> (f32, f32) {
    let (low, high) = values.iter().fold((f32::MAX, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
    (low.max(-amax as f32), high.min(amax as f32))
}

/// Mean error, value by value.
fn error_of(values: &[f32], (low, high): (f32, f32), spec: RangeSpec, p: f64) -> f64 {
    let QParam { scale, zero_point: zero } = qparams_from_range(low, high, &spec);
    let (first, last) = spec.format.range();
    let (scale, zero) = (f64::from(scale), f64::from(zero));
    let one = |v: &f32| {
        let v = f64::from(*v);
        let code = ((v / scale).round_ties_even() + zero).clamp(f64::from(first), f64::from(last));
        (v - (code - zero) * scale).abs().powf(p)
    };
    values.iter().map(one).sum::<f64>() / values.len() as f64
}

/// Nats a value that are lost, counted value by value; the definition of the entropy observer.
fn divergence_of(values: &[f32], (low, high): (f32, f32), spec: RangeSpec) -> f64 {
    let QParam { scale, zero_point: zero } = qparams_from_range(low, high, &spec);
    let (scale, zero) = (f64::from(scale), f64::from(zero));
    let (first, last) = spec.format.range();
    let (low, high) = (f64::from(low).min(0.0), f64::from(high).max(0.0));
    let amax = high.max(-low);
    let (low, high) = if spec.is_symmetric() && low < 0.0 { (-amax, amax) } else { (low, high) };
    let width = (high - low) / 2048.0;
    let mut bins: BTreeMap<usize, u64> = BTreeMap::new();
    let mut count = 0.0;
    for v in values.iter().map(|&v| f64::from(v)).filter(|&v| v != 0.0) {
        *bins.entry((((v.clamp(low, high) - low) / width) as usize).min(2047)).or_default() += 1;
        count += 1.0;
    }
    let mut cells: BTreeMap<i64, Vec<f64>> = BTreeMap::new();
    for (bin, held) in bins {
        let middle = low + (bin as f64 + 0.5) * width;
        let code = ((middle / scale).round_ties_even() + zero).clamp(f64::from(first), f64::from(last));
        cells.entry(code as i64).or_default().push(held as f64);
    }
    let feigned = |mean: f64| {
        let exact = |mean: f64| {
            let (mut chance, mut sum) = ((-mean).exp(), 0.0);
            for k in 1..=100 {
                let k = f64::from(k);
                chance *= mean / k;
                sum += chance * k * k.ln();
            }
            sum - mean * (mean / (1.0 - (-mean).exp())).ln()
        };
        if mean >= 16.0 {
            return 0.5 + 1.0 / (12.0 * mean);
        }
        let below = (mean * 16.0).floor() / 16.0;
        let share = (mean - below) * 16.0;
        exact(below) * (1.0 - share) + exact(below + 0.0625) * share
    };
    let cell = |held: &Vec<f64>| {
        let even = held.iter().sum::<f64>() / held.len() as f64;
        held.iter().map(|c| c * (c / even).ln()).sum::<f64>() - (held.len() - 1) as f64 * feigned(even)
    };
    cells.values().map(cell).sum::<f64>() / count
}

#[test]
fn percentiles_are_numpys_to_within_a_bin() {
    for (name, values, expected) in cases() {
        let site = observed(&values);
        let amax = f64::from(site.amax());
        for (percent, want) in &expected.quantiles {
            let percent: f64 = percent.parse().unwrap();
            let check = |symmetric, want: [f64; 2]| {
                let spec = RangeSpec::new(spec("int8").format, symmetric);
                let got = range(&site, Observer::Percentile(percent), spec);
                for (got, want) in [got.0, got.1].into_iter().zip(want) {
                    // Two order statistics may lie in bins of their own.
                    let bin = (amax / 1024.0).min(want.abs() / 256.0).max(amax * 1e-6);
                    assert!((f64::from(got) - want).abs() <= bin, "{name} {percent} {symmetric}: {got} for {want}");
                }
            };
            let [low, high, magnitude] = *want;
            let (least, most) = cut(&values, magnitude);
            let within = [f64::from(least), f64::from(most)];
            check(false, [low, high]);
            check(true, within);
        }
    }
}

#[test]
fn least_error_is_that_of_a_search_over_the_values() {
    for (name, values, expected) in cases() {
        let site = observed(&values);
        for (format, by_power) in &expected.error {
            let spec = spec(format);
            for (p, &least) in by_power {
                let p: f64 = p.parse().unwrap();
                let found = range(&site, Observer::Mse(p), spec);
                let got = error_of(&values, found, spec, p);
                println!("{name} {format} p {p}: {found:?}, {:.4} of the least", got / least);
                // A mask's constant is taken to be spread over its bin, at the end of the range.
                let masked = name == "scores";
                let slack = if masked { f64::from(site.amax()) / 64.0 } else { 0.0 };
                let bound = ((least * 1.01).powf(1.0 / p) + slack).powf(p);
                assert!(got <= bound, "{name} {format} p {p}: {found:?} has {got}, possible is {least}");
                let predicted = error(&site, found, spec, p);
                let off = (predicted.powf(1.0 / p) - got.powf(1.0 / p)).abs();
                let bound = if masked { f64::from(site.amax()) / 1024.0 } else { 0.03 * got.powf(1.0 / p) };
                assert!(off <= bound, "{name} {format} p {p}: {predicted} for {got}");
            }
        }
    }
}

#[test]
fn least_divergence_is_that_of_a_search_over_the_values() {
    for (name, values, expected) in cases() {
        let site = observed(&values);
        for (format, Divergence { least, amax, whole }) in &expected.divergence {
            let spec = spec(format);
            let check = |amax: f64, want: f64| {
                let got = divergence_of(&values, cut(&values, amax), spec);
                // Small values beside a mask's constant sit on an edge between two bins.
                assert!(
                    (got - want).abs() < 1e-4 || name == "scores",
                    "{name} {format}: {got} at {amax}, numpy has {want}"
                );
            };
            check(*amax, *least);
            check(f64::from(site.amax()), *whole);
            let found = range(&site, Observer::Entropy, spec);
            let got = divergence_of(&values, found, spec);
            println!("{name} {format}: {found:?} {got:.5}, numpy ±{amax:.4} {least:.5}, all {whole:.5}");
            assert!(got <= least + 0.01, "{name} {format}: {found:?} loses {got}, possible is {least} at {amax}");
        }
    }
}

#[test]
fn an_outlier_is_cut_by_what_can_cut_it() {
    let values = values("outlier");
    let site = observed(&values);
    for format in ["int8", "int4", "uint8"] {
        let spec = spec(format);
        let high = |observer| range(&site, observer, spec).1;
        assert_eq!(high(Observer::MinMax), 1000.0);
        let entropy = high(Observer::Entropy);
        assert!((3.0..20.0).contains(&entropy), "{format}: {entropy}");
        let percentile = high(Observer::Percentile(99.9));
        assert!((3.0..4.0).contains(&percentile), "{format}: {percentile}");
        let mean = high(Observer::Mean);
        assert!((100.0..200.0).contains(&mean), "{format}: {mean}");
    }
    // One value in 8192 that is a thousand times the others: to keep it is what costs the least squared error.
    assert!(range(&site, Observer::MSE, spec("int8")).1 > 500.0);
}

#[test]
fn four_bits_clip_harder_than_eight() {
    let site = observed(&values("normal"));
    let amax = |format: &str| range(&site, Observer::MSE, spec(format)).1;
    assert!((2.2..2.9).contains(&amax("int4")), "{}", amax("int4"));
    assert!((3.3..4.0).contains(&amax("int8")), "{}", amax("int8"));
    assert!(amax("int16") > 3.7);
}

/// Formats of every width and kind.
const HARD: [Format; 6] =
    [Format::Int2, Format::Int4, Format::Uint8, Format::Int16, Format::Float8e4m3fn, Format::Float4e2m1];

/// Every observer on tensors that are hard: no panic, a finite range within the values', and the same one in
/// whatever order values came.
#[test]
fn ranges_are_sound_whatever_the_values() {
    let observers = [
        Observer::MinMax,
        Observer::Mean,
        Observer::PERCENTILE,
        Observer::Percentile(f64::NAN),
        Observer::Percentile(0.001),
        Observer::MSE,
        Observer::Mse(2.4),
        Observer::Mse(f64::NAN),
        Observer::Entropy,
    ];
    let ramp: Vec<f32> = (0..5000u16).map(f32::from).collect();
    let sets: Vec<(&str, Vec<f32>)> = vec![
        ("none", vec![]),
        ("nan", vec![f32::NAN; 9]),
        ("zeros", vec![0.0, -0.0, 0.0]),
        ("one", vec![-7.25]),
        ("constant", vec![0.3; 100]),
        ("subnormal", vec![1e-42, -3e-42, 2e-41]),
        ("tiny", vec![f32::from_bits(1), 0.0]),
        ("huge", vec![f32::MAX, f32::MIN, 1.0, -1e30]),
        ("positive", ramp.iter().map(|v| v + 3.0).collect()),
        ("negative", ramp.iter().map(|v| -v).collect()),
        ("two values", [[-1.0, 5.0]; 300].concat()),
        ("masked", ramp.iter().map(|&v| if (v as u16).is_multiple_of(3) { f32::MIN } else { v / 100.0 }).collect()),
        ("with infinity", [ramp.clone(), vec![f32::INFINITY, f32::NAN]].concat()),
    ];
    for (name, mut values) in sets {
        let site = observed(&values);
        values.reverse();
        let mut backwards = SiteStatistics::new();
        let parts: Vec<_> =
            (0..).zip(values.iter().rev().copied().collect::<Vec<_>>().chunks(1000).map(<[f32]>::to_vec)).collect();
        for (index, part) in parts.iter().rev() {
            backwards.observe(*index, part);
        }
        for format in HARD {
            for symmetric in [true, false] {
                let spec = RangeSpec::new(format, symmetric);
                for observer in observers {
                    let (low, high) = range(&site, observer, spec);
                    let seen = site.range().map_or((0.0, 0.0), |r| (r.min, r.max));
                    let sound = low <= high && low >= seen.0 && high <= seen.1;
                    assert!(sound, "{name} {format} {observer:?}: {low} to {high}, seen {seen:?}");
                    if format == Format::Uint8 {
                        assert_eq!(range(&backwards, observer, spec), (low, high), "{name} {format} {observer:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    let check = |observer: Observer, why: &str| match observer.check() {
        Ok(()) => assert_eq!(why, "", "{observer:?}"),
        Err(error) => assert!(error.to_string().contains(why) && !why.is_empty(), "{error}"),
    };
    for percent in [0.0, 0.9999, 50.0, 100.5, f64::NAN] {
        check(Observer::Percentile(percent), "percentile: ");
        check(Observer::Percentile(percent), "above 50 and up to 100");
    }
    for p in [0.5, 16.5, -1.0, f64::NAN, f64::INFINITY] {
        check(Observer::Mse(p), "mse_p: ");
        check(Observer::Mse(p), "from 1 to 16");
    }
    for observer in [Observer::MinMax, Observer::Mean, Observer::PERCENTILE, Observer::MSE, Observer::Entropy] {
        check(observer, "");
        assert_eq!(Observer::new(observer.kind(), None, None), observer);
    }
}

#[test]
fn sufficiency_finds_the_sample_that_a_range_rests_on() {
    use amax::algorithms::sufficiency::{Choice, sufficiency};
    let report = |samples: &[&[f32]], observer| {
        let mut site = SiteStatistics::per_channel(-1);
        for (index, values) in (0..).zip(samples) {
            site.observe_tensor(index, &[values.len() / 2, 2], values);
        }
        let mut statistics = amax::statistics::Statistics::default();
        statistics.ran = (0..samples.len() as u32).collect();
        statistics.sample_count = samples.len() as u64;
        statistics.sites.insert("t".to_owned(), site);
        sufficiency(&statistics, |_, site| Some(Choice::new(site, observer, spec("uint8"))))
    };
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} is not {b}");
    let even: Vec<&[f32]> = vec![&[-1.0, 3.0]; 9];
    let found = report(&even, Observer::MinMax);
    assert!(found.enough && found.verdict.starts_with("enough"), "{}", found.verdict);
    let mut spiky = even.clone();
    spiky[4] = &[-2.0, 10.0];
    let found = report(&spiky, Observer::MinMax);
    let site = &found.sites["t"];
    assert!(!found.enough && found.verdict.contains("depend on one sample"), "{}", found.verdict);
    // From 12 to 4 without sample 4, and not at all without another.
    near(site.moves, 8.0 / 12.0);
    near(site.growth, 8.0 / 12.0 / 9.0);
    assert_eq!((site.moved_by, site.min.unwrap().sample, site.max.unwrap().sample), (Some(4), 4, 4));
    assert_eq!((found.unsteady, found.decisive), (vec!["t".to_owned()], vec![(4, 1)]));
    // The means are -10/9 and 34/9, without sample 4 -1 and 3; to a percentile that cuts the spike it is not there.
    near(report(&spiky, Observer::Mean).sites["t"].moves, 1.0 - 4.0 / (44.0 / 9.0));
    let cut = Observer::Percentile(50.0);
    assert!(report(&spiky, cut).enough);
    // But for where in its bin a value is taken to lie.
    assert!(report(&spiky, cut).sites["t"].moves < 1.0 / 512.0);
    let half: Vec<&[f32]> = vec![&[0.0, 3.0]; 9];
    let found = report(&half, Observer::MinMax);
    assert_eq!((found.sites["t"].channels, &found.sites["t"].dead_channels[..]), (Some(2), &[0][..]));
    let found = report(&[&[0.0, 0.0][..]; 9], Observer::MinMax);
    assert_eq!(found.dead, ["t"]);
    let found = report(&even[..3], Observer::MinMax);
    assert!(!found.enough && found.verdict.starts_with("too few: 3 samples"), "{}", found.verdict);
    assert!(!report(&[], Observer::MinMax).enough);
    let found = report(&[&[f32::NAN, f32::NAN][..]; 9], Observer::MSE);
    assert_eq!((found.sites["t"].min, found.sites["t"].nan), (None, 18));
}
