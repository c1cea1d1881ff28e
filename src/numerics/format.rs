//! The numbers that codes stand for.

use super::{Format, Round, quantize_value};

impl Format {
    /// The largest finite magnitude: 128 for `int8`, 448 for `float8e4m3fn`.
    pub fn max_value(self) -> f32 {
        let (qmin, qmax) = self.range();
        self.float().map_or_else(|| (qmin.unsigned_abs().max(qmax.unsigned_abs())) as f32, |float| float.max)
    }

    /// The code nearest to `x`: for integers `rne(x)` saturated, NaN becoming the smallest code; for floats the bit pattern,
    /// ties to the even mantissa, infinities and whatever is too large saturated to [`max_value`](Self::max_value), NaN
    /// kept where the format has one and otherwise 0.
    ///
    /// As ONNX QuantizeLinear-25 with `saturate = 1` and scale 1.
    pub fn encode(self, x: f32) -> i32 {
        match self.float() {
            Some(float) => float.encode(x),
            None => quantize_value(x, 1.0, 0, self, Round::HalfEven),
        }
    }

    /// The number that `code` stands for; bits above [`bits`](Self::bits) are ignored for floats.
    pub fn decode(self, code: i32) -> f32 {
        self.float().map_or_else(|| code as f32, |float| float.decode(code as u8))
    }
}
