//! Operators on images that tract does not have.

#[allow(clippy::wildcard_imports, reason = "tract's macros need its prelude")]
use tract_hir::internal::*;

use super::native::{Known, Native, floats, integers, need};
use super::structural::{axis_of, is_float, sizes_of};

#[derive(Debug)]
pub(super) struct CenterCropPad {
    pub axes: Option<Vec<i64>>,
}

impl CenterCropPad {
    fn target(&self, shape: &[usize], sizes: &[usize]) -> TractResult<Vec<usize>> {
        let axes = self.axes.clone().unwrap_or_else(|| (0..shape.len() as i64).collect());
        ensure!(axes.len() == sizes.len(), "{} sizes for {} axes", sizes.len(), axes.len());
        let mut target = shape.to_vec();
        for (axis, &size) in axes.iter().zip(sizes) {
            target[axis_of(*axis, shape.len())?] = size;
        }
        Ok(target)
    }
}

impl Native for CenterCropPad {
    fn name(&self) -> &'static str {
        "CenterCropPad"
    }

    fn shaping(&self) -> &[usize] {
        &[1]
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let x = need(inputs, 0)?;
        Ok(vec![(x.dtype, self.target(&x.shape, &sizes_of(need(inputs, 1)?)?)?)])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let x = need(inputs, 0)?;
        let sizes = integers(need(inputs, 1)?)?.into_iter().map(usize::try_from).collect::<Result<Vec<_>, _>>()?;
        let target = self.target(x.shape(), &sizes)?;
        let mut out = x.deep_clone();
        for (axis, &size) in target.iter().enumerate() {
            let have = out.shape()[axis];
            if size < have {
                let start = (have - size) / 2;
                out = out.slice(axis, start, start + size)?;
            } else if size > have {
                let mut shape = out.shape().to_vec();
                shape[axis] = size;
                let mut padded = Tensor::zero_dt(out.datum_type(), &shape)?;
                let start = (size - have) / 2;
                padded.assign_slice(start..start + have, &out, 0..have, axis)?;
                out = padded;
            }
        }
        Ok(vec![out])
    }
}

#[derive(Debug)]
pub(super) struct Col2Im {
    pub dilations: Option<Vec<i64>>,
    pub pads: Option<Vec<i64>>,
    pub strides: Option<Vec<i64>>,
}

impl Native for Col2Im {
    fn name(&self) -> &'static str {
        "Col2Im"
    }

    fn shaping(&self) -> &[usize] {
        &[1, 2]
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let x = need(inputs, 0)?;
        is_float(x, "Col2Im")?;
        let (image, block) = (sizes_of(need(inputs, 1)?)?, sizes_of(need(inputs, 2)?)?);
        let window = block.iter().product::<usize>();
        ensure!(
            x.shape.len() == 3 && window > 0 && x.shape[1].is_multiple_of(window) && image.len() == block.len(),
            "Col2Im of {:?} with blocks of {block:?}",
            x.shape
        );
        let mut shape = vec![x.shape[0], x.shape[1] / window];
        shape.extend(image);
        Ok(vec![(DatumType::F32, shape)])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let x = need(inputs, 0)?;
        let (image, block) = (integers(need(inputs, 1)?)?, integers(need(inputs, 2)?)?);
        let rank = image.len();
        let or =
            |given: &Option<Vec<i64>>, default: i64, len: usize| given.clone().unwrap_or_else(|| vec![default; len]);
        let (dilations, strides) = (or(&self.dilations, 1, rank), or(&self.strides, 1, rank));
        let pads = or(&self.pads, 0, 2 * rank);
        ensure!(
            dilations.len() == rank
                && strides.len() == rank
                && pads.len() == 2 * rank
                && strides.iter().all(|&s| s > 0),
            "attributes for {rank} axes"
        );
        let columns: Vec<i64> = (0..rank)
            .map(|i| {
                (image[i] + pads[i] + pads[rank + i] - dilations[i] * (block[i] - 1) - 1).div_euclid(strides[i]) + 1
            })
            .collect();
        let (count, window) = (columns.iter().product::<i64>(), block.iter().product::<i64>());
        ensure!(
            columns.iter().all(|&c| c > 0) && x.shape()[2] as i64 == count,
            "{} columns instead of {count}",
            x.shape()[2]
        );
        let (planes, area) = (x.shape()[0] * x.shape()[1] / window as usize, image.iter().product::<i64>() as usize);
        let values = floats(x)?;
        let mut out = vec![0f32; planes * area];
        for plane in 0..planes {
            for cell in 0..window {
                let offset = unravel(cell, &block);
                for column in 0..count {
                    let place = unravel(column, &columns);
                    let mut at = Some(0usize);
                    for i in 0..rank {
                        let index = place[i] * strides[i] - pads[i] + offset[i] * dilations[i];
                        let inside = (0..image[i]).contains(&index);
                        at = at.filter(|_| inside).map(|at| at * image[i] as usize + index as usize);
                    }
                    if let Some(at) = at {
                        let from = (plane * window as usize + cell as usize) * count as usize + column as usize;
                        out[plane * area + at] += values[from];
                    }
                }
            }
        }
        let mut shape = vec![x.shape()[0], x.shape()[1] / window as usize];
        shape.extend(image.iter().map(|&n| n as usize));
        Ok(vec![Tensor::from_shape(&shape, &out)?])
    }
}

/// The index along each axis of element `at` of an array of this shape.
fn unravel(mut at: i64, shape: &[i64]) -> Vec<i64> {
    let mut index = vec![0; shape.len()];
    for (slot, &size) in index.iter_mut().zip(shape).rev() {
        *slot = at % size;
        at /= size;
    }
    index
}

#[derive(Debug)]
pub(super) struct AffineGrid {
    pub align_corners: bool,
}

impl AffineGrid {
    /// Where element `at` of `count` lies between -1 and 1.
    fn place(&self, at: usize, count: usize) -> f64 {
        let (at, count) = (at as f64, count as f64);
        if self.align_corners { 2. * at / (count - 1.) - 1. } else { (2. * at + 1.) / count - 1. }
    }
}

impl Native for AffineGrid {
    fn name(&self) -> &'static str {
        "AffineGrid"
    }

    fn shaping(&self) -> &[usize] {
        &[1]
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let (theta, size) = (need(inputs, 0)?, sizes_of(need(inputs, 1)?)?);
        is_float(theta, "AffineGrid")?;
        let axes = size.len().saturating_sub(2);
        ensure!((2..=3).contains(&axes) && theta.shape == [size[0], axes, axes + 1], "{:?} for {size:?}", theta.shape);
        let mut shape = vec![size[0]];
        shape.extend(&size[2..]);
        shape.push(axes);
        Ok(vec![(DatumType::F32, shape)])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let (theta, size) = (floats(need(inputs, 0)?)?, integers(need(inputs, 1)?)?);
        let (batch, image) = (size[0] as usize, &size[2..]);
        let axes = image.len();
        let mut out = Vec::new();
        for matrix in theta.chunks_exact(axes * (axes + 1)).take(batch) {
            for at in 0..image.iter().product() {
                let index = unravel(at, image);
                // Coordinates go from the last axis to the first.
                let places: Vec<f64> =
                    index.iter().zip(image).rev().map(|(&i, &n)| self.place(i as usize, n as usize)).collect();
                for row in matrix.chunks_exact(axes + 1) {
                    let sum: f64 = row.iter().zip(&places).map(|(m, p)| f64::from(*m) * p).sum();
                    out.push((sum + f64::from(row[axes])) as f32);
                }
            }
        }
        let mut shape = vec![batch];
        shape.extend(image.iter().map(|&n| n as usize));
        shape.push(axes);
        Ok(vec![Tensor::from_shape(&shape, &out)?])
    }
}

/// The four neighbours of a point in an image, and their weights.
fn corners(y: f32, x: f32, height: usize, width: usize) -> [(usize, f32); 4] {
    let split = |at: f32, size: usize| {
        let low = at as usize;
        if low + 1 >= size { (size - 1, size - 1, 0.) } else { (low, low + 1, at - low as f32) }
    };
    let ((top, bottom, down), (left, right, across)) = (split(y, height), split(x, width));
    [
        (top * width + left, (1. - down) * (1. - across)),
        (top * width + right, (1. - down) * across),
        (bottom * width + left, down * (1. - across)),
        (bottom * width + right, down * across),
    ]
}

#[derive(Debug)]
pub(super) struct RoiAlign {
    pub half_pixel: bool,
    pub max: bool,
    pub size: [usize; 2],
    pub samples: usize,
    pub scale: f32,
}

impl Native for RoiAlign {
    fn name(&self) -> &'static str {
        "RoiAlign"
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let (x, rois, batch) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?);
        is_float(x, "RoiAlign")?;
        ensure!(
            x.shape.len() == 4 && rois.shape.len() == 2 && rois.shape[1] == 4 && batch.shape == rois.shape[..1],
            "RoiAlign of {:?} with regions {:?} of {:?}",
            x.shape,
            rois.shape,
            batch.shape
        );
        Ok(vec![(DatumType::F32, vec![rois.shape[0], x.shape[1], self.size[0], self.size[1]])])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let (x, rois, batches) = (need(inputs, 0)?, floats(need(inputs, 1)?)?, integers(need(inputs, 2)?)?);
        let &[batch, channels, height, width] = x.shape() else { bail!("an image of shape {:?}", x.shape()) };
        let values = floats(x)?;
        let [rows, columns] = self.size;
        let mut out = Vec::with_capacity(batches.len() * channels * rows * columns);
        for (roi, &image) in rois.chunks_exact(4).zip(&batches) {
            let image = usize::try_from(image).ok().filter(|&i| i < batch).with_context(|| "a region of no image")?;
            let offset = if self.half_pixel { 0.5 } else { 0. };
            let edge = |at: usize| roi[at] * self.scale - offset;
            let (x0, y0) = (edge(0), edge(1));
            let (mut wide, mut tall) = (edge(2) - x0, edge(3) - y0);
            if !self.half_pixel {
                (wide, tall) = (wide.max(1.), tall.max(1.));
            }
            let (bin_w, bin_h) = (wide / columns as f32, tall / rows as f32);
            let count = |bin: f32| if self.samples > 0 { self.samples } else { bin.ceil().max(0.) as usize };
            let (nx, ny) = (count(bin_w), count(bin_h));
            ensure!(nx.saturating_mul(ny) <= 1 << 24, "a region of {wide} by {tall}");
            for channel in 0..channels {
                let plane = &values[(image * channels + channel) * height * width..][..height * width];
                for row in 0..rows {
                    for column in 0..columns {
                        let (mut sum, mut largest) = (0f32, None::<f32>);
                        for iy in 0..ny {
                            for ix in 0..nx {
                                let y = y0 + row as f32 * bin_h + (iy as f32 + 0.5) * bin_h / ny as f32;
                                let x = x0 + column as f32 * bin_w + (ix as f32 + 0.5) * bin_w / nx as f32;
                                let inside = y >= -1. && y <= height as f32 && x >= -1. && x <= width as f32;
                                let parts = if inside {
                                    corners(y.max(0.), x.max(0.), height, width).map(|(at, weight)| plane[at] * weight)
                                } else {
                                    [0.; 4]
                                };
                                sum += parts.iter().sum::<f32>();
                                let most = parts.into_iter().fold(f32::NEG_INFINITY, f32::max);
                                largest = Some(largest.map_or(most, |l| l.max(most)));
                            }
                        }
                        let mean = sum / (nx * ny).max(1) as f32;
                        out.push(if self.max { largest.unwrap_or(0.) } else { mean });
                    }
                }
            }
        }
        Ok(vec![Tensor::from_shape(&[batches.len(), channels, rows, columns], &out)?])
    }
}

#[derive(Debug)]
pub(super) struct DeformConv {
    pub dilations: Vec<i64>,
    pub pads: Vec<i64>,
    pub strides: Vec<i64>,
    pub groups: usize,
    pub offset_groups: usize,
}

impl Native for DeformConv {
    fn name(&self) -> &'static str {
        "DeformConv"
    }

    fn outputs(&self, inputs: &[Option<Known>]) -> TractResult<Vec<(DatumType, Vec<usize>)>> {
        let (x, w, offset) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?);
        is_float(x, "DeformConv")?;
        let fits = x.shape.len() == 4
            && w.shape.len() == 4
            && offset.shape.len() == 4
            && x.shape[1] == w.shape[1] * self.groups
            && w.shape[0].is_multiple_of(self.groups)
            && x.shape[1].is_multiple_of(self.offset_groups)
            && offset.shape[0] == x.shape[0]
            && offset.shape[1] == 2 * self.offset_groups * w.shape[2] * w.shape[3]
            && self.dilations.len() == 2
            && self.strides.len() == 2
            && self.pads.len() == 4;
        ensure!(fits, "DeformConv of {:?} with {:?} and offsets {:?}", x.shape, w.shape, offset.shape);
        Ok(vec![(DatumType::F32, vec![x.shape[0], w.shape[0], offset.shape[2], offset.shape[3]])])
    }

    fn eval(&self, inputs: &[Option<&Tensor>]) -> TractResult<Vec<Tensor>> {
        let (x, w, offset) = (need(inputs, 0)?, need(inputs, 1)?, need(inputs, 2)?);
        let (&[batch, channels, height, width], &[filters, depth, kh, kw]) = (x.shape(), w.shape()) else {
            bail!("DeformConv of {:?}", x.shape())
        };
        let (oh, ow) = (offset.shape()[2], offset.shape()[3]);
        let optional = |index: usize| inputs.get(index).copied().flatten();
        let (x, w, offset) = (floats(x)?, floats(w)?, floats(offset)?);
        let bias = optional(3).map(floats).transpose()?;
        let mask = optional(4).map(floats).transpose()?;
        let window = kh * kw;
        let (area, spots) = (height * width, oh * ow);
        ensure!(
            bias.as_ref().is_none_or(|b| b.len() == filters)
                && mask.as_ref().is_none_or(|m| m.len() == batch * self.offset_groups * window * spots),
            "bias or mask do not fit"
        );
        let per_offset = channels / self.offset_groups;
        let mut out = vec![0f32; batch * filters * spots];
        let mut patch = vec![0f32; channels * window];
        for b in 0..batch {
            for spot in 0..spots {
                for group in 0..self.offset_groups {
                    for cell in 0..window {
                        let field = (b * self.offset_groups + group) * window + cell;
                        let moved = |axis: usize| offset[(field * 2 + axis) * spots + spot];
                        let start = |axis: usize, at: usize, step: usize| {
                            (at as i64 * self.strides[axis] - self.pads[axis] + step as i64 * self.dilations[axis])
                                as f32
                        };
                        let y = start(0, spot / ow, cell / kw) + moved(0);
                        let x_at = start(1, spot % ow, cell % kw) + moved(1);
                        let weight = mask.as_ref().map_or(1., |m| m[field * spots + spot]);
                        for channel in group * per_offset..(group + 1) * per_offset {
                            let plane = &x[(b * channels + channel) * area..][..area];
                            patch[channel * window + cell] = weight * sample(plane, y, x_at, height, width);
                        }
                    }
                }
                for filter in 0..filters {
                    let group = filter / (filters / self.groups);
                    let patch = &patch[group * depth * window..(group + 1) * depth * window];
                    let kernel = &w[filter * depth * window..(filter + 1) * depth * window];
                    let sum: f32 = patch.iter().zip(kernel).map(|(p, k)| p * k).sum();
                    out[(b * filters + filter) * spots + spot] = sum + bias.as_ref().map_or(0., |b| b[filter]);
                }
            }
        }
        Ok(vec![Tensor::from_shape(&[batch, filters, oh, ow], &out)?])
    }
}

/// An image between its pixels, with zeros around it.
fn sample(plane: &[f32], y: f32, x: f32, height: usize, width: usize) -> f32 {
    let (top, left) = (y.floor(), x.floor());
    let (down, across) = (y - top, x - left);
    let pixel = |row: f32, column: f32| {
        let inside = row >= 0. && row < height as f32 && column >= 0. && column < width as f32;
        if inside { plane[row as usize * width + column as usize] } else { 0. }
    };
    (1. - down) * ((1. - across) * pixel(top, left) + across * pixel(top, left + 1.))
        + down * ((1. - across) * pixel(top + 1., left) + across * pixel(top + 1., left + 1.))
}
