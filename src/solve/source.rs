//! A constant as numbers that are read piece by piece.

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::ir::Tensor;
use crate::numerics::blocks::Values;
use crate::onnx::DataType;

/// The elements of a float tensor, in the order in which they are quantized. Nothing is copied but what is read.
#[derive(Clone, Debug)]
pub(super) struct Source {
    raw: Bytes,
    dtype: DataType,
    len: usize,
    /// Rows and columns of a matrix whose transpose is read.
    transpose: Option<(usize, usize)>,
}

impl Source {
    /// The elements of a tensor; `None` if it is not float.
    pub(super) fn new(tensor: &Tensor) -> Option<Self> {
        let dtype = tensor.dtype();
        let floats = [DataType::Float, DataType::Float16, DataType::Bfloat16, DataType::Double];
        floats.contains(&dtype).then(|| Self { raw: tensor.raw(), dtype, len: tensor.len(), transpose: None })
    }

    /// The elements of the transpose.
    pub(super) fn transposed(self, rows: usize, columns: usize) -> Self {
        Self { transpose: Some((rows, columns)), ..self }
    }

    /// All of them.
    pub(super) fn all(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len];
        self.read(0, &mut out);
        out
    }

    /// Says where there is NaN or infinity.
    pub(super) fn check_finite(&self) -> Result<()> {
        let mut buffer = vec![0.0; 1 << 16];
        for start in (0..self.len).step_by(buffer.len()) {
            let buffer = &mut buffer[..(1 << 16).min(self.len - start)];
            self.stretch(start, buffer);
            if let Some(at) = buffer.iter().position(|v| !v.is_finite()) {
                return Err(Error::model(format!("element {} of the constant is {}", start + at, buffer[at]))
                    .with_hint(
                        "a tensor with NaN or infinity cannot be quantized; repair the checkpoint or --exclude the node",
                    ));
            }
        }
        Ok(())
    }

    /// Elements as they are stored, from one on.
    fn stretch(&self, start: usize, out: &mut [f32]) {
        match self.dtype {
            DataType::Float => self.convert(start, out, f32::from_le_bytes),
            DataType::Float16 => self.convert(start, out, |b| half::f16::from_le_bytes(b).to_f32()),
            DataType::Bfloat16 => self.convert(start, out, |b| half::bf16::from_le_bytes(b).to_f32()),
            _ => self.convert(start, out, |b| f64::from_le_bytes(b) as f32),
        }
    }

    fn convert<const N: usize>(&self, start: usize, out: &mut [f32], number: impl Fn([u8; N]) -> f32) {
        let stored = &self.raw.as_chunks::<N>().0[start..start + out.len()];
        out.iter_mut().zip(stored).for_each(|(out, &bytes)| *out = number(bytes));
    }
}

impl Values for Source {
    fn count(&self) -> usize {
        self.len
    }

    fn read(&self, start: usize, out: &mut [f32]) {
        // Squares of a few cache lines, so that neither side is walked in long strides.
        const TILE: usize = 32;
        let Some((rows, columns)) = self.transpose else { return self.stretch(start, out) };
        let (mut done, mut tile) = (0, [0.0; TILE]);
        while done < out.len() {
            let at = start + done;
            let (column, row) = (at / rows, at % rows);
            let whole = (out.len() - done) / rows;
            if row > 0 || whole == 0 {
                // The rest of a column of the tensor.
                let len = (rows - row).min(out.len() - done);
                for (row, out) in (row..).zip(&mut out[done..done + len]) {
                    self.stretch(row * columns + column, std::slice::from_mut(out));
                }
                done += len;
                continue;
            }
            let width = whole.min(TILE);
            let part = &mut out[done..done + width * rows];
            for top in (0..rows).step_by(TILE) {
                for row in top..rows.min(top + TILE) {
                    let tile = &mut tile[..width];
                    self.stretch(row * columns + column, tile);
                    tile.iter().enumerate().for_each(|(at, &value)| part[at * rows + row] = value);
                }
            }
            done += width * rows;
        }
    }

    fn slice(&self, start: usize, len: usize) -> Option<&[f32]> {
        if self.dtype != DataType::Float || self.transpose.is_some() || cfg!(target_endian = "big") {
            return None;
        }
        bytemuck::try_cast_slice(self.raw.get(start * 4..(start + len) * 4)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However a transpose is cut into pieces, they are its elements.
    #[test]
    fn any_piece_of_a_transpose_is_read() {
        for (rows, columns) in [(3, 5), (40, 3), (3, 70), (33, 34)] {
            let values: Vec<f32> = (0..rows * columns).map(|v| v as f32).collect();
            let source = Source::new(&Tensor::from_f32(&[rows, columns], &values)).map(|s| s.transposed(rows, columns));
            let source = source.expect("floats are read");
            let wanted: Vec<f32> =
                (0..columns).flat_map(|c| (0..rows).map(move |r| (r * columns + c) as f32)).collect();
            assert_eq!(source.all(), wanted);
            let straight = Source::new(&Tensor::from_f32(&[rows, columns], &values)).expect("floats are read");
            assert_eq!(source.slice(0, 1), None, "a transpose is nowhere in one piece");
            for start in 0..wanted.len() {
                for len in [1, 2, rows - 1, rows, rows + 1, 3 * rows + 2] {
                    let len = len.min(wanted.len() - start);
                    let mut piece = vec![-1.0; len];
                    source.read(start, &mut piece);
                    assert_eq!(piece, wanted[start..start + len], "{len} of {rows} x {columns} from {start}");
                    assert_eq!(straight.slice(start, len), Some(&values[start..start + len]));
                }
            }
        }
    }
}
