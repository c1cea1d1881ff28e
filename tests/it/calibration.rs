//! Statistics: their state does not depend on order or grouping, and the noise they predict is the noise there is.
#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "helpers of tests; what is said to be exact is compared exactly"
)]

use amax::statistics::{Range, SiteStatistics, Statistics};

/// Deterministic numbers in [0, 1).
struct Uniform(u64);

impl Uniform {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * (1.0 - self.next()).ln()).sqrt() * (std::f64::consts::TAU * self.next()).cos()
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, (self.next() * (i + 1) as f64) as usize);
        }
    }
}

/// Tensors of many kinds, each with a name.
fn data_sets() -> Vec<(&'static str, Vec<f32>)> {
    let mut random = Uniform(88_172_645_463_325_252);
    let mut fill = |count: usize, next: &mut dyn FnMut(&mut Uniform) -> f64| -> Vec<f32> {
        (0..count).map(|_| next(&mut random) as f32).collect()
    };
    let normal = fill(60_000, &mut Uniform::normal);
    let relu: Vec<f32> = normal.iter().map(|v| v.max(0.0)).collect();
    let mut masked = normal.clone();
    masked.iter_mut().step_by(7).for_each(|v| *v = f32::MIN);
    let mut outlier = normal.clone();
    outlier[777] = 1000.0;
    let images = fill(60_000, &mut |r| (r.next() * 256.0).floor() / 255.0);
    vec![
        ("normal", normal),
        ("relu", relu),
        ("outlier", outlier),
        ("masked", masked),
        ("images", images),
        ("uniform", fill(60_000, &mut |r| r.next() * 6.0 - 1.0)),
        ("laplace", fill(60_000, &mut |r| (1.0 - r.next()).ln() * (if r.next() < 0.5 { 1.0 } else { -1.0 }))),
        ("softmax", fill(60_000, &mut |r| (20.0 * r.normal() - 40.0).exp())),
        ("small", fill(1_000, &mut Uniform::normal)),
        ("subnormal", fill(9_000, &mut |r| r.normal() * 1e-40)),
        ("huge", fill(9_000, &mut |r| r.normal() * 5e37)),
        ("constant", vec![0.3; 5_000]),
        ("zeros", [0.0, -0.0].repeat(10_000)),
        ("one", vec![-7.25]),
        ("none", Vec::new()),
        ("edges", vec![f32::MAX, f32::MIN, f32::MIN_POSITIVE, -f32::MIN_POSITIVE, f32::from_bits(1), -0.0, 0.0, 1.0]),
    ]
}

fn observed<'a>(parts: impl IntoIterator<Item = (u32, &'a [f32])>) -> SiteStatistics {
    let mut site = SiteStatistics::new();
    for (index, values) in parts {
        site.observe(index, values);
    }
    site
}

fn json(site: &SiteStatistics) -> String {
    serde_json::to_string(site).unwrap()
}

/// The state without what depends on how one sample was cut or ordered: the last bits of its sums.
fn exact_parts(site: &SiteStatistics) -> String {
    let counts = [site.count(), site.nan(), site.inf(), site.zeros()];
    format!("{counts:?} {:?} {}", site.range(), serde_json::to_string(site.histogram()).unwrap())
}

#[test]
fn values_may_come_in_any_order_and_grouping() {
    for (name, mut values) in data_sets() {
        let whole = exact_parts(&observed([(0, values.as_slice())]));
        for size in [1, 3, 1000, 8192, 50_000] {
            let chunked = observed(values.chunks(size).map(|part| (0, part)));
            assert_eq!(exact_parts(&chunked), whole, "{name} in chunks of {size}");
        }
        let backwards = observed(values.chunks(777).rev().map(|part| (0, part)));
        assert_eq!(exact_parts(&backwards), whole, "{name} backwards");
        values.sort_by(f32::total_cmp);
        assert_eq!(exact_parts(&observed(values.chunks(100).map(|p| (0, p)))), whole, "{name} ascending");
        Uniform(7).shuffle(&mut values);
        assert_eq!(exact_parts(&observed([(0, values.as_slice())])), whole, "{name} shuffled");
    }
}

#[test]
fn shards_merge_to_the_bytes_of_one_run() {
    for (name, values) in data_sets() {
        let mut samples: Vec<(u32, &[f32])> = (0..).zip(values.chunks(999)).collect();
        let whole = json(&observed(samples.iter().copied()));
        Uniform(3).shuffle(&mut samples);
        assert_eq!(json(&observed(samples.iter().copied())), whole, "{name} shuffled");
        for shards in [2, 3, 10] {
            let mut parts: Vec<SiteStatistics> = (0..shards)
                .map(|shard| observed(samples.iter().copied().filter(|(i, _)| *i as usize % shards == shard)))
                .collect();
            Uniform(shards as u64 + 1).shuffle(&mut parts);
            // As a balanced tree and as a chain.
            let mut tree = parts.clone();
            while tree.len() > 1 {
                let last = tree.pop().unwrap();
                let at = tree.len() / 2;
                tree[at].merge(&last);
            }
            let chain = parts.iter().fold(SiteStatistics::new(), |mut all, part| {
                all.merge(part);
                all
            });
            assert_eq!(json(&tree[0]), whole, "{name}, {shards} shards as a tree");
            assert_eq!(json(&chain), whole, "{name}, {shards} shards as a chain");
        }
    }
}

#[test]
fn state_survives_a_document() {
    for (name, values) in data_sets() {
        let site = observed([(4, values.as_slice())]);
        let back: SiteStatistics = serde_json::from_str(&json(&site)).unwrap();
        assert_eq!(exact_parts(&back), exact_parts(&site), "{name}");
    }
}

#[test]
fn counts_are_exact_beyond_every_width() {
    let document = |count: u64| {
        let mut counts = vec![0u64; 1024];
        (counts[3], counts[1023]) = (count, 1);
        format!(
            "{{\"zeros\":0,\"octaves\":[{{\"prefix\":127,\"counts\":{}}}]}}",
            serde_json::to_string(&counts).unwrap()
        )
    };
    let read = |count: u64| serde_json::from_str::<amax::statistics::Histogram>(&document(count)).unwrap();
    for power in [7, 8, 15, 16, 31, 32, 40] {
        for near in [-2i64, -1, 0, 1] {
            let half = (1u64 << power).wrapping_add_signed(near);
            let mut sum = read(half);
            sum.merge(&read(half));
            assert_eq!(sum.bins().map(|bin| bin.count).collect::<Vec<_>>(), [2 * half, 2], "{half}");
            assert_eq!(serde_json::to_string(&sum).unwrap().replace(",2]", ",1]"), document(2 * half), "{half}");
        }
    }
    // One by one, many at once, and both in turn.
    for count in [255usize, 256, 65_535, 65_536, 70_000] {
        let ones = vec![1.0f32; count];
        let whole = observed([(0, ones.as_slice())]);
        for size in [100, 1000, 50_000] {
            let parts = observed(ones.chunks(size).map(|part| (0, part)));
            assert_eq!(parts.histogram(), whole.histogram(), "{count} in parts of {size}");
        }
        assert_eq!(whole.bins().map(|bin| bin.count).collect::<Vec<_>>(), [count as u64]);
    }
}

#[test]
fn documents_with_impossible_histograms_are_refused() {
    let bins = |count: usize| format!("[{}]", vec!["1"; count].join(","));
    let check = |octaves: &str, why: &str| {
        let document = format!(r#"{{"zeros":0,"octaves":[{octaves}]}}"#);
        let error = serde_json::from_str::<amax::statistics::Histogram>(&document).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    check(&format!(r#"{{"prefix":127,"counts":{}}}"#, bins(5)), "octave 127 cannot have 5 bins");
    check(&format!(r#"{{"prefix":255,"counts":{}}}"#, bins(1024)), "octave 255 cannot");
    check(&format!(r#"{{"prefix":600,"counts":{}}}"#, bins(1024)), "octave 600 cannot");
    let octave = format!(r#"{{"prefix":127,"counts":{}}}"#, bins(1024));
    check(&format!("{octave},{octave}"), "not in order");
}

#[test]
fn histogram_counts_what_lies_between_its_edges() {
    for (name, values) in data_sets() {
        let site = observed([(0, values.as_slice())]);
        let mut sorted: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
        sorted.sort_by(f64::total_cmp);
        let amax = sorted.iter().fold(0f64, |a, v| a.max(v.abs()));
        let mut end = f64::NEG_INFINITY;
        let mut at = 0;
        for bin in site.histogram().bins() {
            let inside = |v: f64| {
                if bin.low == bin.high {
                    v == 0.0
                } else if bin.low < 0.0 {
                    bin.low < v && v <= bin.high && v != 0.0
                } else {
                    bin.low <= v && v < bin.high && v != 0.0
                }
            };
            let count = sorted[at..].iter().take_while(|v| inside(**v)).count();
            assert_eq!(count as u64, bin.count, "{name}: {bin:?}");
            assert!(bin.low >= end, "{name}: {bin:?} starts before {end}");
            let width = bin.high - bin.low;
            assert!(width <= amax.max(f64::from(f32::MIN_POSITIVE)) / 1024.0, "{name}: {bin:?} is wide");
            let magnitude = bin.low.abs().min(bin.high.abs());
            assert!(width <= (magnitude / 512.0).max(f64::from(f32::MIN_POSITIVE) / 512.0), "{name}: {bin:?} is wide");
            at += count;
            end = bin.high;
        }
        assert_eq!(at, sorted.len(), "{name}");
        assert_eq!(site.histogram().count(), sorted.len() as u64, "{name}");
    }
}

#[test]
fn moments_and_ranges_are_those_of_the_values() {
    for (name, values) in data_sets() {
        let site = observed((0..).zip(values.chunks(100)));
        let wide: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
        let count = wide.len().max(1) as f64;
        let mean = wide.iter().sum::<f64>() / count;
        let squares = wide.iter().map(|v| v * v).sum::<f64>() / count;
        assert!((site.mean() - mean).abs() <= 1e-12 * squares.sqrt(), "{name}: {} {mean}", site.mean());
        assert!((site.mean_square() - squares).abs() <= 1e-12 * squares, "{name}: {} {squares}", site.mean_square());
        assert_eq!(site.min(), values.iter().copied().reduce(f32::min), "{name}");
        assert_eq!(site.max(), values.iter().copied().reduce(f32::max), "{name}");
        assert_eq!(site.amax(), values.iter().fold(0f32, |a, v| a.max(v.abs())), "{name}");
        assert_eq!(site.zeros(), values.iter().filter(|v| **v == 0.0).count() as u64, "{name}");
        assert!(site.range().is_none_or(|r| r.min.to_bits() != (-0f32).to_bits()), "{name}: negative zero");
    }
}

#[test]
fn nan_and_infinity_are_counted_and_spoil_nothing() {
    for (name, values) in data_sets() {
        let clean = observed([(0, values.as_slice()), (1, values.as_slice())]);
        let mut broken = values.clone();
        for (at, bad) in [(0, f32::NAN), (values.len() / 2, f32::INFINITY), (values.len() / 3, f32::NEG_INFINITY)] {
            broken.insert(at, bad);
        }
        broken.push(-f32::NAN);
        let site = observed([(0, values.as_slice()), (1, broken.as_slice())]);
        assert_eq!((site.nan(), site.inf()), (2, 2), "{name}");
        assert_eq!(site.count(), clean.count() + 4, "{name}");
        assert_eq!(site.finite(), clean.finite(), "{name}");
        assert_eq!(site.range(), clean.range(), "{name}");
        assert_eq!(site.histogram(), clean.histogram(), "{name}");
        assert_eq!(site.samples().last().map(|r| r.non_finite), Some(4), "{name}");
        assert!(values.is_empty() || site.samples()[0] == clean.samples()[0], "{name}");
        assert_eq!(site.mean_square(), clean.mean_square(), "{name}");
    }
    let only = observed([(0, [f32::NAN, f32::INFINITY].as_slice())]);
    assert_eq!((only.count(), only.range(), only.amax(), only.mean()), (2, None, 0.0, 0.0));
    assert_eq!(only.quantization_noise(0.1, 0, -128, 127), 0.0);
}

/// Mean squared error of fake quantization, value by value.
fn noise(values: &[f32], scale: f32, zero_point: i32, qmin: i32, qmax: i32) -> f64 {
    let (scale, zero_point) = (f64::from(scale), f64::from(zero_point));
    let error = |v: &f32| {
        let v = f64::from(*v);
        let code = ((v / scale).round_ties_even() + zero_point).clamp(f64::from(qmin), f64::from(qmax));
        v - (code - zero_point) * scale
    };
    values.iter().map(|v| error(v).powi(2)).sum::<f64>() / values.len().max(1) as f64
}

#[test]
fn predicted_noise_is_within_its_bound() {
    for (name, values) in data_sets() {
        let site = observed([(0, values.as_slice())]);
        let (min, max) = (site.min().unwrap_or(0.0).min(0.0), site.max().unwrap_or(0.0).max(0.0));
        for (bits, clip) in [(8, 1.0f32), (8, 0.5), (8, 0.01), (4, 1.0), (4, 0.3), (2, 1.0), (16, 1.0)] {
            let top = (1 << (bits - 1)) - 1;
            let symmetric = (site.amax() * clip / top as f32, 0, -top, top);
            let levels = (1 << bits) - 1;
            let scale = (max / levels as f32 - min / levels as f32) * clip;
            let affine = (scale, (-min * clip / scale).round() as i32, 0, levels);
            for (scale, zero_point, qmin, qmax) in [symmetric, affine] {
                if !(scale.is_normal()) {
                    continue;
                }
                let got = site.quantization_noise(scale, zero_point, qmin, qmax).sqrt();
                let want = noise(&values, scale, zero_point, qmin, qmax).sqrt();
                let squared_width =
                    |b: amax::statistics::Bin| b.count as f64 * ((b.high - b.low) / f64::from(site.amax())).powi(2);
                let width =
                    (site.bins().map(squared_width).sum::<f64>() / values.len() as f64).sqrt() * f64::from(site.amax());
                let bound = width * (1.0 + 1e-9) + f64::from(site.amax()) * 1e-12;
                assert!(
                    (got - want).abs() <= bound,
                    "{name} {bits} bits, clip {clip}: {got} for {want}, bound {bound}"
                );
                assert!(width <= f64::from(site.amax()) / 1024.0, "{name}");
            }
        }
    }
}

#[test]
fn predicted_noise_is_close_for_smooth_data() {
    for (name, values) in data_sets() {
        if !["normal", "relu", "outlier", "uniform", "laplace", "huge"].contains(&name) {
            continue;
        }
        let site = observed([(0, values.as_slice())]);
        for (bits, clip) in [(8, 1.0f32), (8, 0.5), (4, 1.0), (4, 0.5), (16, 1.0)] {
            let top = (1 << (bits - 1)) - 1;
            let scale = site.amax() * clip / top as f32;
            let got = site.quantization_noise(scale, 0, -top, top);
            let want = noise(&values, scale, 0, -top, top);
            // 60 000 squared errors, whose mean has a relative deviation of about 1/270.
            assert!((got / want - 1.0).abs() < 0.02, "{name} {bits} bits, clip {clip}: {got} for {want}");
            let squares = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64;
            let decibels = 10.0 * (squares / want).log10();
            assert!((site.sqnr_db(scale, 0, -top, top) - decibels).abs() < 0.1, "{name} {bits} bits, clip {clip}");
        }
    }
}

#[test]
fn noise_is_exact_where_a_tensor_holds_one_value() {
    let check = |value: f32, scale: f32, zero_point: i32, qmin: i32, qmax: i32| {
        let site = observed([(0, [value; 100].as_slice())]);
        let got = site.quantization_noise(scale, zero_point, qmin, qmax).sqrt();
        let want = noise(&[value], scale, zero_point, qmin, qmax).sqrt();
        assert!((got - want).abs() <= 1e-15 * f64::from(value.abs()), "{value} by {scale}: {got} for {want}");
    };
    check(0.3, 0.007, 0, -127, 127);
    check(0.3, 0.25, 3, 0, 15);
    check(-5.5, 0.01, 128, 0, 255);
    check(1e30, 1.0, 0, -128, 127);
    check(1e-42, 1e-3, 0, -128, 127);
    check(0.0, 0.5, 0, -8, 7);
    check(0.125, 0.25, 0, -8, 7);
    let zeros = observed([(0, [0.0, -0.0, 0.0].as_slice())]);
    assert_eq!(zeros.quantization_noise(0.1, 5, 0, 15), 0.0);
    assert_eq!(zeros.sqnr_db(0.1, 5, 0, 15), f64::INFINITY);
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(zeros.quantization_noise(scale, 0, -8, 7).is_nan(), "{scale}");
    }
    assert!(zeros.quantization_noise(1.0, 0, 7, -8).is_nan());
}

#[test]
fn an_outlier_leaves_small_values_their_resolution() {
    let bulk = observed([(0, data_sets()[0].1.as_slice())]);
    let (_, masked) = data_sets().into_iter().find(|(name, _)| *name == "masked").unwrap();
    let masked = observed([(0, masked.as_slice())]);
    assert_eq!(masked.min(), Some(f32::MIN));
    let near_one = |site: &SiteStatistics| site.bins().filter(|b| (0.5..2.0).contains(&b.low)).count();
    assert!(near_one(&masked) > 900);
    assert!(near_one(&bulk) > 900);
}

#[test]
fn channels_keep_their_own_ranges() {
    // Two images of three channels and 2x2 pixels.
    let values: Vec<f32> = (0..24).map(|i| i as f32 * if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let check = |axis: usize, dims: &[usize], values: &[f32]| {
        let mut site = SiteStatistics::per_channel(axis as isize);
        site.observe_tensor(0, dims, values);
        let inner: usize = dims[axis + 1..].iter().product();
        let want: Vec<Option<Range>> = (0..dims[axis])
            .map(|channel| {
                let mine =
                    values.iter().enumerate().filter(|(i, v)| i / inner % dims[axis] == channel && v.is_finite());
                mine.map(|(_, &v)| Range { min: v, max: v }).reduce(Range::union)
            })
            .collect();
        assert_eq!(site.channels().unwrap().ranges(), want, "axis {axis} of {dims:?}");
        site
    };
    for (axis, dims) in [(0, &[2, 3, 2, 2][..]), (1, &[2, 3, 2, 2]), (3, &[2, 3, 2, 2]), (0, &[24]), (1, &[4, 6])] {
        check(axis, dims, &values);
    }
    let mut broken = values.clone();
    broken[4] = f32::NAN;
    broken[5] = f32::INFINITY;
    broken[3] = f32::NEG_INFINITY;
    let mut site = check(1, &[2, 3, 2, 2], &broken);
    check(0, &[24], &broken);

    let other = check(1, &[2, 3, 2, 2], &values);
    let mut both = other.clone();
    both.merge(&site);
    site.merge(&other);
    assert_eq!(site.channels(), both.channels());
    assert_eq!(site.channels().unwrap().amax(), [15.0, 19.0, 23.0]);

    site.observe_tensor(1, &[1, 4], &[1.0, 2.0, 3.0, 4.0]);
    assert!(site.channels().unwrap().is_ragged());
    assert!(site.channels().unwrap().ranges().is_empty());
    site.merge(&other);
    assert!(site.channels().unwrap().is_ragged());
    let mut flat = SiteStatistics::per_channel(1);
    flat.observe_tensor(0, &[24], &values);
    assert!(flat.channels().unwrap().is_ragged());
}

#[test]
fn shards_of_a_run_merge_and_others_do_not() {
    let (_, values) = data_sets().remove(0);
    let run = |samples: &mut dyn Iterator<Item = u32>, model: &str, set: &str| {
        let mut statistics = Statistics::default();
        statistics.model_hash = model.to_owned();
        statistics.samples_hash = set.to_owned();
        for index in samples {
            statistics.sample_count += 1;
            statistics.ran.push(index);
            statistics.sites.entry("rare.output".to_owned()).or_default();
            let values = &values[index as usize * 1000..][..1000];
            for (site, size) in [("conv.input", 1000), ("conv.output", 10)] {
                statistics.sites.entry(site.to_owned()).or_default().observe(index, &values[..size]);
            }
            if index > 6 {
                statistics.sites.entry("rare.output".to_owned()).or_default().observe(index, values);
            }
        }
        statistics
    };
    let whole = serde_json::to_string(&run(&mut (0..10), "m", "s")).unwrap();
    let (even, odd) = (run(&mut (0..10).step_by(2), "m", "s"), run(&mut (1..10).step_by(2), "m", "s"));
    for (mut first, second) in [(even.clone(), odd.clone()), (odd, even.clone())] {
        first.merge(&second).unwrap();
        assert_eq!(serde_json::to_string(&first).unwrap(), whole);
    }
    let fails = |other: &Statistics, why: &str| {
        let mut statistics = even.clone();
        let error = statistics.merge(other).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
        assert_eq!(statistics, even, "changed by a merge that failed");
    };
    fails(&run(&mut (1..2), "other", "s"), "different models");
    fails(&run(&mut (1..2), "m", "other"), "different sample sets");
    fails(&run(&mut (3..5), "m", "s"), "both parts ran sample 4");
}
