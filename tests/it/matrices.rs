//! Matrix statistics against their definitions, and the rows of products against the products.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "helpers of tests")]
#![allow(clippy::many_single_char_names, clippy::needless_pass_by_value, reason = "matrices have names of one letter")]

use amax::error::Kind;
use amax::observe::matrices::matrix_sites;
use amax::statistics::{MatrixStatistics, Sums};
use ndarray::{Array2, ArrayView2, ArrayViewD, IxDyn};

use super::segments::noise;

/// Rows of numbers, some of them much larger than others, some columns zero.
fn rows(seed: usize, count: usize, width: usize) -> Array2<f32> {
    let values = noise(seed, count * width);
    let scaled = values.iter().enumerate().map(|(at, v)| match at % width % 5 {
        0 => v * 1e4,
        1 => v * 1e-5,
        2 if width > 3 => 0.0,
        _ => *v,
    });
    Array2::from_shape_vec((count, width), scaled.collect()).unwrap()
}

/// The numbers `0..len` in an order that looks random.
fn shuffled(seed: usize, len: usize) -> Vec<usize> {
    let keys = noise(seed, len);
    let mut order: Vec<usize> = (0..len).collect();
    order.sort_by(|a, b| keys[*a].total_cmp(&keys[*b]));
    order
}

#[test]
fn sums_depend_on_neither_order_nor_grouping() {
    let check = |values: &[f64]| {
        let mut whole = Sums::new(1);
        for v in values {
            whole.merge(&Sums::of(&[*v]));
        }
        for seed in 0..20 {
            let order = shuffled(seed, values.len());
            let mut groups = vec![Sums::new(1); 1 + seed % 4];
            let count = groups.len();
            for (at, &value) in order.iter().enumerate() {
                groups[(at * 7 + seed) % count].merge(&Sums::of(&[values[value]]));
            }
            let mut found = Sums::new(1);
            groups.iter().rev().for_each(|group| found.merge(group));
            assert!(found == whole, "{values:?} in the order {order:?}");
        }
        let largest = values.iter().fold(0f64, |most, v| most.max(v.abs()));
        let mut sorted = values.to_vec();
        sorted.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
        let (sum, error) = (sorted.iter().sum::<f64>(), largest * values.len() as f64 / (1u64 << 40) as f64);
        assert!((whole.value(0) - sum).abs() <= error, "{} instead of {sum}, {values:?}", whole.value(0));
    };
    check(&[]);
    check(&[0.0, -0.0]);
    check(&[1.0, 1e-300, -1.0]);
    check(&[f64::MAX / 4.0, f64::MIN_POSITIVE, 5e-324, f64::MAX / 4.0]);
    check(&[1e12, 1e-12, -1e12, 1.0, 3.0]);
    for seed in 0..40 {
        let (mantissas, exponents) = (noise(seed, 60), noise(seed + 1000, 60));
        let spread = [1.0, 20.0, 80.0, 300.0][seed % 4];
        let values = mantissas.iter().zip(&exponents).map(|(m, e)| f64::from(*m) * (f64::from(*e) * spread).exp2());
        check(&values.collect::<Vec<_>>());
    }
    // One number comes back as it is, up to 41 bits.
    for value in [1.0, -3.5, 1e-9, 123_456_789.0, 2f64.powi(-1000)] {
        assert!((Sums::of(&[value]).value(0) - value).abs() <= value.abs() / 2f64.powi(40), "{value}");
    }
    // Whole numbers are exact.
    let mut sum = Sums::new(1);
    (0..1000).for_each(|v| sum.merge(&Sums::of(&[f64::from(v) - 300.0])));
    assert_eq!(sum.value(0).to_bits(), 199_500f64.to_bits());
}

/// `XᵀY / n` of the columns of a block, as defined.
fn moment(x: ArrayView2<'_, f32>, y: ArrayView2<'_, f32>, block: usize, columns: usize) -> Array2<f64> {
    let at = |i: usize| block * columns + i;
    Array2::from_shape_fn((columns, columns), |(i, j)| {
        let products = (0..x.nrows()).map(|n| f64::from(x[[n, at(i)]]) * f64::from(y[[n, at(j)]]));
        products.sum::<f64>() / x.nrows() as f64
    })
}

fn close(found: &Array2<f64>, wanted: &Array2<f64>, what: &str) {
    assert_eq!(found.dim(), wanted.dim(), "{what}");
    for ((i, j), want) in wanted.indexed_iter() {
        // Relative to the largest product of the two columns that there can be.
        let size = (wanted[[i, i]].abs() * wanted[[j, j]].abs()).sqrt().max(want.abs());
        assert!((found[[i, j]] - want).abs() <= 1e-9 * size, "{what} [{i}, {j}]: {} not {want}", found[[i, j]]);
    }
}

#[test]
fn statistics_are_what_they_are_defined_as() {
    let check = |counts: &[usize], blocks: usize, columns: usize, paired: bool| {
        let width = blocks * columns;
        let parts = |seed: usize| -> Vec<Array2<f32>> {
            counts.iter().enumerate().map(|(at, &count)| rows(seed + at, count, width)).collect()
        };
        let (changed, float) = (parts(0), parts(if paired { 500 } else { 0 }));
        let of = |sample: usize| {
            let float = paired.then(|| float[sample].view());
            MatrixStatistics::of(sample as u32, blocks, changed[sample].view(), float).unwrap()
        };
        let mut whole = MatrixStatistics::new(blocks, columns, paired);
        (0..counts.len()).for_each(|sample| whole.merge(&of(sample)).unwrap());
        let stack = |parts: &[Array2<f32>]| {
            let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
            ndarray::concatenate(ndarray::Axis(0), &views).unwrap()
        };
        let (x, f) = (stack(&changed), stack(&float));
        assert_eq!((whole.rows() as usize, whole.blocks(), whole.columns()), (x.nrows(), blocks, columns));
        assert_eq!(whole.is_paired(), paired);
        for block in 0..blocks {
            close(&whole.gram(block), &moment(x.view(), x.view(), block, columns), "XᵀX");
            let cross = moment(f.view(), x.view(), block, columns);
            let found = whole.cross(block);
            let scale = whole.gram(block).diag().iter().fold(0f64, |most, v| most.max(*v));
            assert!(found.iter().zip(&cross).all(|(a, b)| (a - b).abs() <= 1e-9 * scale.max(1e-9)), "X̂ᵀX");
        }
        for column in 0..width {
            let own = x.column(column);
            let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / x.nrows() as f64;
            let size = own.iter().fold(0f32, |most, v| most.max(v.abs()));
            let near = |found: f64, want: f64| (found - want).abs() <= 1e-9 * f64::from(size).max(1e-30);
            assert!(near(whole.mean()[column], mean(&mut own.iter().map(|v| f64::from(*v)))));
            assert!(near(whole.mean_absolute()[column], mean(&mut own.iter().map(|v| f64::from(v.abs())))));
            let float = mean(&mut f.column(column).iter().map(|v| f64::from(*v)));
            assert!((whole.float_mean()[column] - float).abs() <= 1e-9 * float.abs().max(1e4));
            let range = whole.ranges()[column].unwrap();
            let ends = own.iter().fold((f32::MAX, f32::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
            assert!(range.min.total_cmp(&(ends.0 + 0.0)).is_eq() && range.max.total_cmp(&(ends.1 + 0.0)).is_eq());
        }
        // Any order and any grouping.
        for seed in 0..6 {
            let mut groups = vec![MatrixStatistics::new(blocks, columns, paired); 3];
            for (at, sample) in shuffled(seed, counts.len()).into_iter().enumerate() {
                groups[(at + seed) % 3].merge(&of(sample)).unwrap();
            }
            let [mut a, b, c]: [MatrixStatistics; 3] = groups.try_into().unwrap();
            a.merge(&c).unwrap();
            a.merge(&b).unwrap();
            assert!(a == whole, "{counts:?}, {blocks} blocks of {columns}");
        }
    };
    check(&[5, 1, 70, 33], 1, 6, false);
    check(&[5, 1, 70, 33, 2, 2, 8], 1, 7, true);
    check(&[40, 9], 4, 3, false);
    check(&[40, 9, 3], 3, 4, true);
    check(&[3], 5, 1, true);
}

#[test]
fn what_cannot_be_counted_is_refused() {
    let one = MatrixStatistics::of(7, 1, rows(1, 4, 3).view(), None).unwrap();
    let check = |made: amax::Result<MatrixStatistics>, kind: Kind, text: &str| {
        let error = made.and_then(|made| one.clone().merge(&made)).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut broken = rows(2, 4, 3);
        broken[[2, 1]] = bad;
        check(MatrixStatistics::of(11, 1, broken.view(), None), Kind::Samples, "row 2 is NaN or infinite in sample 11");
        let paired = MatrixStatistics::of(12, 1, rows(2, 4, 3).view(), Some(broken.view()));
        check(paired, Kind::Samples, "in sample 12");
    }
    check(Ok(one.clone()), Kind::Samples, "sample 7 was counted already");
    check(MatrixStatistics::of(8, 1, rows(2, 4, 2).view(), None), Kind::Internal, "columns");
    check(MatrixStatistics::of(8, 3, rows(2, 4, 3).view(), None), Kind::Internal, "columns");
    check(MatrixStatistics::of(8, 1, rows(2, 4, 3).view(), Some(rows(2, 4, 3).view())), Kind::Internal, "columns");
    check(MatrixStatistics::of(8, 2, rows(2, 4, 3).view(), None), Kind::Internal, "rows of shape");
}

/// Each product of a graph is its rows times its weight.
#[test]
fn rows_times_weights_are_products() {
    use amax::ir::{Tensor, text};
    use amax::runtime::{Observe, Sample, Session};
    use std::sync::Arc;

    struct Blind;
    impl Observe for Blind {
        fn see(&self, _: usize, _: &[f32], _: &[usize]) {}
    }

    let check = |node: &str, x: &[usize], w: &[usize]| {
        let list = |dims: &[usize]| dims.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let weights = noise(9, w.iter().product());
        let numbers = weights.iter().map(|v| format!("{v:?}")).collect::<Vec<_>>().join(", ");
        let graph = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]>\ng (float[{}] x) => (float[{}] y)\n<float[{}] w = {{{numbers}}}>\n{{ y = {node} }}",
            list(x),
            (0..x.len()).map(|axis| format!("d{axis}")).collect::<Vec<_>>().join(","),
            list(w)
        );
        let model = text::parse(&graph).unwrap_or_else(|e| panic!("{e}\n{graph}"));
        let values = noise(3, x.iter().product());
        let sample = Sample::from([("x".to_owned(), Tensor::from_f32(x, &values))]);
        let observe: Arc<dyn Observe> = Arc::new(Blind);
        let outputs = Session::new(&model, &[]).unwrap().run(&sample, &observe).unwrap();
        let wanted = outputs[0].1.to_f32().unwrap();
        let sites = matrix_sites(&model);
        assert_eq!((sites.len(), sites[0].tensor.as_str()), (1, "x"), "{node}");
        let tensor = ArrayViewD::from_shape(IxDyn(x), &values).unwrap();
        let rows = sites[0].rows.matrix(&tensor, usize::MAX).unwrap();
        assert_eq!(rows.ncols(), sites[0].columns, "{node}");
        // Weights as [outputs, columns of a block].
        let conv = node.starts_with("Conv");
        let turned = conv || node.contains("transB = 1");
        let (outputs, columns) = if turned { (w[0], w[1..].iter().product()) } else { (w[1], w[0]) };
        let weight = |output: usize, column: usize| {
            f64::from(if turned { weights[output * columns + column] } else { weights[column * outputs + output] })
        };
        let blocks = sites[0].rows.blocks();
        assert_eq!(rows.nrows() * outputs, wanted.len(), "{node}");
        let positions = rows.nrows() / if conv { x[0] } else { 1 };
        for (row, values) in rows.rows().into_iter().enumerate() {
            for output in 0..outputs {
                let start = output / (outputs / blocks) * columns;
                let sum: f64 = (0..columns).map(|c| f64::from(values[start + c]) * weight(output, c)).sum();
                let at = if conv {
                    (row / positions * outputs + output) * positions + row % positions
                } else {
                    row * outputs + output
                };
                assert!(
                    (sum - f64::from(wanted[at])).abs() < 1e-4,
                    "{node} [{row}, {output}]: {sum} not {}",
                    wanted[at]
                );
            }
        }
        // At most so many, at even distances: the first is among them.
        let few = sites[0].rows.matrix(&tensor, 3).unwrap();
        assert_eq!(few.nrows(), rows.nrows().min(3), "{node}");
        assert_eq!(few.row(0), rows.row(0), "{node}");
        if rows.nrows() >= 3 {
            assert_eq!(few.row(2), rows.row(2 * rows.nrows() / 3), "{node}");
        }
    };
    check("MatMul (x, w)", &[2, 5, 4], &[4, 3]);
    check("MatMul (x, w)", &[7, 4], &[4, 2]);
    check("Gemm (x, w)", &[5, 4], &[4, 3]);
    check("Gemm <transB = 1> (x, w)", &[5, 4], &[3, 4]);
    check("Gemm <transA = 1> (x, w)", &[4, 5], &[4, 3]);
    check("Conv (x, w)", &[2, 3, 6, 5], &[4, 3, 3, 2]);
    check("Conv <pads = [1, 0, 2, 1], strides = [2, 1]> (x, w)", &[2, 3, 6, 5], &[4, 3, 3, 2]);
    check("Conv <dilations = [2, 3], pads = [2, 3, 2, 3]> (x, w)", &[1, 2, 7, 8], &[3, 2, 3, 2]);
    check("Conv <group = 2, pads = [1, 1, 1, 1]> (x, w)", &[2, 4, 5, 5], &[6, 2, 3, 3]);
    check("Conv <group = 4, pads = [1, 1, 1, 1], strides = [2, 2]> (x, w)", &[2, 4, 7, 6], &[4, 1, 3, 3]);
    check("Conv <group = 3> (x, w)", &[1, 3, 5, 5], &[6, 1, 2, 2]);
    check("Conv <auto_pad = \"SAME_UPPER\", strides = [2, 2]> (x, w)", &[1, 2, 7, 6], &[3, 2, 3, 2]);
    check("Conv <auto_pad = \"SAME_LOWER\", strides = [2, 2]> (x, w)", &[1, 2, 7, 6], &[3, 2, 3, 2]);
    check("Conv <auto_pad = \"VALID\"> (x, w)", &[1, 2, 7, 6], &[3, 2, 3, 2]);
    check("Conv <pads = [2, 1]> (x, w)", &[2, 3, 9], &[4, 3, 4]);
}
