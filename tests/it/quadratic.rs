//! Algorithms that weigh errors by what samples show, against definitions in float64.
#![allow(clippy::many_single_char_names, reason = "matrices have names of one letter")]
#![allow(clippy::float_cmp, reason = "levels are whole numbers")]

use amax::algorithms::quadratic::factor::{self, Damped, damped};
use amax::algorithms::quadratic::{Coded, Levels, Problem, clip, gptq, local, loss, scales};
use amax::numerics::Format;
use ndarray::{Array2, s};
use proptest::prelude::*;
use serde_json::Value;

use super::random_cases;
use super::segments::noise;
use super::support::vectors;

/// A list of lists.
fn matrix(value: &Value) -> Array2<f64> {
    let rows = value.as_array().unwrap();
    let width = rows[0].as_array().unwrap().len();
    let all = rows.iter().flat_map(|row| row.as_array().unwrap()).map(|v| v.as_f64().unwrap());
    Array2::from_shape_vec((rows.len(), width), all.collect()).unwrap()
}

/// A square matrix in base64.
fn packed(value: &Value) -> Array2<f64> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let text = value.as_str().unwrap().trim_end_matches('=').as_bytes();
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0_u32, 0);
    for &c in text {
        bits = bits << 6 | u32::from(digit(c));
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    let numbers: Vec<f64> = bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
    let size = (numbers.len() as f64).sqrt() as usize;
    Array2::from_shape_vec((size, size), numbers).unwrap()
}

fn integers(bits: u64, symmetric: bool) -> Levels {
    let (low, high) = if symmetric { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) };
    Levels::new(Format::Int8, (low, high))
}

fn number(case: &Value, key: &str) -> f64 {
    case[key].as_f64().unwrap()
}

/// A case of the file, with nothing coded yet.
fn coded(case: &Value) -> Coded {
    let scales = matrix(&case["s"]);
    let zeros = if case["z"].is_null() { Array2::zeros(scales.dim()) } else { matrix(&case["z"]) };
    Coded { size: number(case, "group") as usize, scales, zeros, levels: Array2::zeros(matrix(&case["w"]).dim()) }
}

/// Its codes.
fn codes(coded: &Coded) -> Array2<f64> {
    Array2::from_shape_fn(coded.levels.dim(), |(n, k)| coded.levels[[n, k]] + coded.zeros[[n, k / coded.size]])
}

/// The Hessian as it is, so that nothing is added.
fn exact(h: &Array2<f64>) -> Damped {
    damped(h.clone(), 0.0, true).unwrap()
}

#[test]
fn gptq_gives_the_codes_of_least_squares() {
    for (at, case) in vectors("quadratic.json")["gptq"].as_array().unwrap().iter().enumerate() {
        let (w, h) = (matrix(&case["w"]), packed(&case["h"]));
        let partners: Vec<usize> = (0..w.ncols()).collect();
        let levels = integers(case["bits"].as_u64().unwrap(), case["symmetric"].as_bool().unwrap());
        let problem = Problem { target: w.view(), hessian: h.view(), levels: &levels, partners: &partners };
        let found = damped(h.clone(), number(case, "damp"), case["act_order"].as_bool().unwrap()).unwrap();
        assert!((found.damp - number(case, "damp")).abs() < 1e-15, "no retry");
        let mut coded = coded(case);
        gptq::solve(&problem, &mut coded, &found);
        assert_eq!(codes(&coded), matrix(&case["q"]), "case {at}");
        assert!(number(case, "loss") < number(case, "loss_rounding"), "case {at}");
    }
}

#[test]
fn targets_make_up_for_other_inputs() {
    for (at, case) in vectors("quadratic.json")["mismatch"].as_array().unwrap().iter().enumerate() {
        let (w, h, g) = (matrix(&case["w"]), packed(&case["h"]), packed(&case["g"]));
        let found = damped(h.clone(), number(case, "damp"), case["act_order"].as_bool().unwrap()).unwrap();
        let target = found.target(w.view(), h.view(), g.view());
        let off = (&target - &matrix(&case["t"])).iter().fold(0f64, |most, v| most.max(v.abs()));
        assert!(off < 1e-9, "case {at}: {off}");
        let partners: Vec<usize> = (0..w.ncols()).collect();
        let levels = integers(case["bits"].as_u64().unwrap(), true);
        let problem = Problem { target: target.view(), hessian: h.view(), levels: &levels, partners: &partners };
        let mut coded = coded(case);
        gptq::solve(&problem, &mut coded, &found);
        assert_eq!(codes(&coded), matrix(&case["q"]), "case {at}");
        let same = found.target(w.view(), h.view(), h.view());
        assert!((&same - &w).iter().all(|v| v.abs() < 1e-12), "the same inputs, the same weights");
    }
}

#[test]
fn local_search_ends_where_no_code_can_be_improved() {
    let end = local::Effort { rounds: 1, sweeps: 100, scales: false };
    for (at, case) in vectors("quadratic.json")["local"].as_array().unwrap().iter().enumerate() {
        let (w, h) = (matrix(&case["w"]), packed(&case["h"]));
        let partners: Vec<usize> = (0..w.ncols()).collect();
        let levels = integers(case["bits"].as_u64().unwrap(), case["symmetric"].as_bool().unwrap());
        let problem = Problem { target: w.view(), hessian: h.view(), levels: &levels, partners: &partners };
        let mut coded = coded(case);
        local::round(&problem, &mut coded);
        local::improve(&problem, &mut coded, &exact(&h), end, &Some);
        assert_eq!(codes(&coded), matrix(&case["q"]), "case {at}");
        for (row, least) in case["least"].as_array().unwrap().iter().enumerate() {
            let error = &w.slice(s![row..=row, ..]) - &coded.values().slice(s![row..=row, ..]);
            assert!(loss(error.view(), h.view()) >= least.as_f64().unwrap() - 1e-9, "case {at}");
        }
        // Scales alone: no sweep.
        let before = loss((&w - &coded.values()).view(), h.view());
        let refit = local::Effort { rounds: 1, sweeps: 0, scales: true };
        let mut fitted = coded.clone();
        local::improve(&problem, &mut fitted, &exact(&h), refit, &Some);
        assert!(loss((&w - &fitted.values()).view(), h.view()) <= before, "case {at}");
        for ((want, found), first) in matrix(&case["refit"]).iter().zip(&fitted.scales).zip(&coded.scales) {
            let (far, taken) = (want / first < 1.0 / 3.0 || want / first > 3.0, (want / found - 1.0).abs() < 1e-3);
            assert!(taken || far || found == first, "case {at}: {found} instead of {want}");
        }
    }
}

/// Random rows with something in common, and weights.
fn layer(seed: usize, n: usize, k: usize, rows: usize) -> (Array2<f64>, Array2<f64>) {
    let at = |seed: usize, shape: (usize, usize)| {
        let values = noise(seed, shape.0 * shape.1).into_iter().map(f64::from).collect();
        Array2::from_shape_vec(shape, values).unwrap()
    };
    let x = at(seed, (rows, k)).dot(&(at(seed + 1, (k, k)) + Array2::<f64>::eye(k)));
    (at(seed + 2, (n, k)), x.t().dot(&x) / rows as f64)
}

/// The scales of ranges.
fn ranged(w: &Array2<f64>, size: usize, high: f64) -> Coded {
    let groups = w.ncols().div_ceil(size);
    let scales = Array2::from_shape_fn((w.nrows(), groups), |(n, g)| {
        let own = w.slice(s![n, g * size..w.ncols().min((g + 1) * size)]);
        own.iter().fold(1e-3f64, |most, v| most.max(v.abs())) / high
    });
    Coded { size, zeros: Array2::zeros(scales.dim()), scales, levels: Array2::zeros(w.dim()) }
}

proptest! {
    #![proptest_config(random_cases(40))]

    /// After each code, what the later columns are taken to be is the least squares solution beside the codes so far.
    #[test]
    fn each_code_rounds_the_least_squares_solution(seed in 0usize..10_000, k in 2usize..90, size in 1usize..40) {
        let (w, h) = layer(seed, 3, k, 2 * k);
        let levels = Levels::new(Format::Int4, (-8, 7));
        let partners: Vec<usize> = (0..k).collect();
        let problem = Problem { target: w.view(), hessian: h.view(), levels: &levels, partners: &partners };
        let found = damped(h.clone(), 0.05, true).unwrap();
        let mut coded = ranged(&w, size, 7.0);
        gptq::solve(&problem, &mut coded, &found);
        let v = coded.values();
        for at in [0, 1, k / 2, k - 1] {
            let (done, rest) = found.order.split_at(at);
            let pick = |of: &Array2<f64>, rows: &[usize], columns: &[usize]| {
                Array2::from_shape_fn((rows.len(), columns.len()), |(i, j)| of[[rows[i], columns[j]]])
            };
            for row in 0..w.nrows() {
                let errors: Vec<f64> = done.iter().map(|&c| w[[row, c]] - v[[row, c]]).collect();
                let right = pick(&found.hessian, rest, done).dot(&ndarray::Array1::from(errors)).to_vec();
                let moved = factor::solve(pick(&found.hessian, rest, rest), &right).unwrap();
                let column = rest[0];
                let steps = (w[[row, column]] + moved[0]) / coded.scales[[row, column / size]];
                let level = steps.round_ties_even().clamp(-8.0, 7.0);
                let tie = ((steps - steps.floor()) - 0.5).abs() < 1e-6;
                prop_assert!(tie || coded.levels[[row, column]] == level, "{row} {column}: {steps}");
            }
        }
    }

    /// No single code can be improved, no state is worse than the one before, and where errors cost nothing together,
    /// rounding is left as it is.
    #[test]
    fn search_never_loses(seed in 0usize..10_000, k in 2usize..70, size in 1usize..40, pairs: bool) {
        let (w, h) = layer(seed, 4, k, k.div_ceil(2));
        let levels = Levels::new(Format::Int8, (-127, 127));
        let partners: Vec<usize> = (0..k).map(|c| if pairs && (c ^ 1) < k { c ^ 1 } else { c }).collect();
        let problem = Problem { target: w.view(), hessian: h.view(), levels: &levels, partners: &partners };
        let found = damped(h.clone(), 0.1, true).unwrap();
        let of = |coded: &Coded| loss((&w - &coded.values()).view(), found.hessian.view());
        let safe = |coded: &Coded| {
            let code = |n: usize, c: usize| coded.levels[[n, c]];
            (0..w.nrows()).all(|n| (0..k).all(|c| partners[c] == c || (code(n, c) + code(n, partners[c])).abs() <= 128.0))
        };
        let mut coded = ranged(&w, size, 127.0);
        gptq::solve(&problem, &mut coded, &found);
        prop_assert!(safe(&coded));
        let before = of(&coded);
        local::improve(&problem, &mut coded, &found, local::USUAL, &Some);
        prop_assert!(safe(&coded) && of(&coded) <= before * (1.0 + 1e-9));
        let end = local::Effort { rounds: 1, sweeps: 100, scales: false };
        local::improve(&problem, &mut coded, &found, end, &Some);
        let least = of(&coded);
        for column in [0, k / 2, k - 1] {
            for by in [-1.0, 1.0] {
                let mut other = coded.clone();
                other.levels[[0, column]] += by;
                let fits = other.levels[[0, column]].abs() <= 127.0 && safe(&other);
                prop_assert!(!fits || of(&other) >= least * (1.0 - 1e-9), "{column} {by}");
            }
        }
        let alone = Array2::eye(k);
        let plain = Problem { hessian: alone.view(), partners: &(0..k).collect::<Vec<_>>(), ..problem };
        let (mut rounded, mut solved) = (ranged(&w, size, 127.0), ranged(&w, size, 127.0));
        local::round(&plain, &mut rounded);
        gptq::solve(&plain, &mut solved, &exact(&alone));
        prop_assert_eq!(&rounded, &solved);
        local::improve(&plain, &mut solved, &exact(&alone), end, &Some);
        prop_assert_eq!(&rounded, &solved);
    }

    /// Searched scales are no worse than those of the range, by the error that is searched for.
    #[test]
    fn searched_scales_lose_less(seed in 0usize..10_000, k in 1usize..50, size in 1usize..40, zeros: bool, signed: bool) {
        let (w, h) = layer(seed, 4, k, 2 * k);
        let levels = if zeros { Levels::new(Format::Uint4, (0, 15)) } else { Levels::new(Format::Int4, (-8, 7)) };
        let partners: Vec<usize> = (0..k).collect();
        let diagonal = Array2::from_diag(&h.diag());
        let problem = Problem { target: w.view(), hessian: diagonal.view(), levels: &levels, partners: &partners };
        let mut plain = ranged(&w, size, 7.0);
        if zeros {
            plain.zeros.fill(8.0);
        }
        let mut found = plain.clone();
        scales::search(&problem, &mut found, scales::Freedom { signed, zeros }, &Some);
        let of = |coded: &mut Coded| {
            local::round(&problem, coded);
            loss((&w - &coded.values()).view(), diagonal.view())
        };
        let (before, after) = (of(&mut plain), of(&mut found));
        prop_assert!(after <= before * (1.0 + 1e-12) + 1e-24, "{after} {before}");
        prop_assert!(zeros || found.zeros.iter().all(|z| *z == 0.0));
        prop_assert!(signed || found.scales.iter().all(|s| *s > 0.0));
    }
}

#[test]
fn factors_are_of_the_inverse() {
    for k in [1, 2, 63, 64, 65, 130, 200] {
        let (_, h) = layer(k, 1, k, k + 10);
        let found = damped(h.clone(), 0.01, k % 2 == 0).unwrap();
        let back = found.upper.t().dot(&found.upper);
        let own = Array2::from_shape_fn((k, k), |(i, j)| found.hessian[[found.order[i], found.order[j]]]);
        let one = back.dot(&own);
        assert!((&one - &Array2::<f64>::eye(k)).iter().all(|v| v.abs() < 1e-8), "{k}");
        assert!(found.upper.indexed_iter().all(|((i, j), v)| i <= j || *v == 0.0));
    }
    // Of fewer rows than columns, with columns of nothing, or of nothing at all.
    let (_, mut h) = layer(7, 1, 40, 5);
    assert!(damped(h.clone(), 0.01, true).is_some());
    h.row_mut(3).fill(0.0);
    h.column_mut(3).fill(0.0);
    let found = damped(h, 0.01, true).unwrap();
    assert!(found.hessian[[3, 3]] > 0.0);
    assert!(damped(Array2::zeros((4, 4)), 0.01, true).is_none());
    // One that is not positive definite gets more, up to a limit.
    let mut bad = Array2::eye(3);
    (bad[[0, 1]], bad[[1, 0]]) = (1.05, 1.05);
    let found = damped(bad.clone(), 0.01, false).unwrap();
    assert!((found.damp - 0.1).abs() < 1e-12);
    (bad[[0, 1]], bad[[1, 0]]) = (1e9, 1e9);
    assert!(damped(bad, 0.01, false).is_none());
}

#[test]
fn clipping_takes_the_share_of_least_error() {
    let (rows, columns, outputs, size) = (48, 20, 6, 8);
    let matrix = |count: usize, seed: usize| {
        let values = noise(seed, count * columns).into_iter().map(|x| f64::from(x).powi(3));
        Array2::from_shape_vec((count, columns), values.collect()).unwrap()
    };
    let (x, w) = (matrix(rows, 1), matrix(outputs, 2));
    let groups = columns.div_ceil(size);
    let range = |n: usize, g: usize| w.slice(s![n, g * size..columns.min((g + 1) * size)]).to_owned();
    let first = Array2::from_shape_fn((outputs, groups), |(n, g)| {
        range(n, g).iter().fold(0.0f64, |most, w| most.max(w.abs())) / 7.0
    });
    let levels = integers(4, true);
    let hessian = x.t().dot(&x) / rows as f64;
    let partners: Vec<usize> = (0..columns).collect();
    let problem = Problem { target: w.view(), hessian: hessian.view(), levels: &levels, partners: &partners };
    let (scales, zeros) = (first.clone(), Array2::zeros(first.dim()));
    let mut coded = Coded { size, scales, zeros, levels: Array2::zeros(w.dim()) };
    clip::search(&problem, &mut coded, clip::USUAL, &Some);
    local::round(&problem, &mut coded);
    let mut clipped = 0;
    for ((n, g), scale) in coded.scales.indexed_iter() {
        let values = range(n, g);
        let rounded = |scale: f64| values.mapv(|w| (w / scale).round_ties_even().clamp(-8.0, 7.0) * scale);
        let seen = x.slice(s![.., g * size..columns.min((g + 1) * size)]);
        let error = |scale: f64| seen.dot(&(&values - &rounded(scale))).mapv(|y| y * y).sum();
        let share = |at: u32| if at == 10 { 1.0 } else { 0.5 + 0.05 * f64::from(at) };
        let best =
            (0..=10).min_by(|&a, &b| error(first[[n, g]] * share(a)).total_cmp(&error(first[[n, g]] * share(b))));
        let best = first[[n, g]] * share(best.unwrap());
        assert!((scale - best).abs() < 1e-12, "{scale} instead of {best}");
        clipped += usize::from(best < first[[n, g]]);
        let own = coded.values().slice(s![n, g * size..columns.min((g + 1) * size)]).to_owned();
        assert!(own.iter().zip(rounded(best)).all(|(a, b)| (a - b).abs() < 1e-12));
    }
    assert!(clipped > 3, "{clipped}");
}
