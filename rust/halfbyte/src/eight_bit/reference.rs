//! What blockwise 8-bit quantization means: scalar, one value at a time, slow. Every fast path is tested against this.

use super::Rounding;
use crate::codebook::Map;
use crate::element::Element;
use crate::four_bit::reference::{absmax_of, at_least_smallest};

/// The entry nearest to `scaled`: as many steps up as there are midpoints strictly below it. NaN is above them all.
pub fn encode(map: &Map, scaled: f32) -> u8 {
    #[expect(clippy::neg_cmp_op_on_partial_ord, reason = "NaN must count as above")]
    let above = |pair: &&[f32]| !(scaled <= f32::midpoint(pair[0], pair[1]));
    map.windows(2).filter(above).count() as u8
}

/// [`Rounding::Grid`]: `scaled` in [−1, 1] goes to the nearest of 65,536 levels from −1 to 1, and that to the nearest entry.
pub fn encode_on_grid(map: &Map, scaled: f32) -> u8 {
    encode(map, on_grid(scaled))
}

/// The level of [`Rounding::Grid`] nearest to `scaled`. NaN goes to the lowest.
pub(crate) fn on_grid(scaled: f32) -> f32 {
    // A float-to-integer cast truncates, and makes 0 of NaN.
    let level = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5) as u16;
    -1.0 + 2.0 * f32::from(level) / 65535.0
}

/// How a block's values are brought to [−1, 1].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Scaling {
    /// `v · factor`.
    Multiply(f32),
    /// `v / scale`.
    Divide(f32),
}

impl Scaling {
    #[inline(always)]
    pub(crate) fn apply(self, v: f32) -> f32 {
        let scaled = match self {
            Self::Multiply(factor) => v * factor,
            Self::Divide(scale) => v / scale,
        };
        scaled.clamp(-1.0, 1.0)
    }
}

/// How to scale a block with this absmax, and the absmax to store.
///
/// Nearest does as the 4-bit code: the reciprocal in full blocks, a quotient in a shorter last one, the scale no less than
/// 1e-38. Grid has the reciprocal everywhere and no limit: a block of zeros has x̂ = 0 · ∞, which is NaN and gets code 0.
pub(crate) fn scaling(rounding: Rounding, absmax: f32, full: bool) -> (Scaling, f32) {
    let scale = at_least_smallest(absmax);
    match (rounding, full) {
        (Rounding::Nearest, true) => (Scaling::Multiply(1.0 / scale), absmax),
        (Rounding::Nearest, false) => (Scaling::Divide(scale), scale),
        (Rounding::Grid, _) => (Scaling::Multiply(1.0 / absmax), absmax),
    }
}

/// Largest magnitude. Nearest gives NaN if there is one among them, Grid passes over it.
pub(crate) fn most_of(rounding: Rounding, values: impl Iterator<Item = f32>) -> f32 {
    match rounding {
        Rounding::Nearest => absmax_of(values),
        Rounding::Grid => values.fold(0.0, |most: f32, v| most.max(v.abs())), // `max` passes over NaN
    }
}

/// Quantizes `a − offset` to one code a value and one scale a block.
pub fn quantize<T: Element>(
    a: &[T],
    map: &Map,
    block: usize,
    offset: f32,
    rounding: Rounding,
    codes: &mut [u8],
    absmax: &mut [f32],
) {
    for ((values, codes), absmax) in a.chunks(block).zip(codes.chunks_mut(block)).zip(absmax) {
        let most = most_of(rounding, values.iter().map(|v| v.to_f32() - offset));
        let (scaling, stored) = scaling(rounding, most, values.len() == block);
        *absmax = stored;
        for (v, code) in values.iter().zip(codes) {
            let scaled = scaling.apply(v.to_f32() - offset);
            *code = match rounding {
                Rounding::Nearest => encode(map, scaled),
                Rounding::Grid => encode_on_grid(map, scaled),
            };
        }
    }
}

/// `out[i] = map[codes[i]] · absmax[i / block] + offset` in fp32 (a product, then a sum), rounded once to the type of `out`.
pub fn dequantize<T: Element>(codes: &[u8], map: &Map, absmax: &[f32], block: usize, offset: f32, out: &mut [T]) {
    for (i, (out, &code)) in out.iter_mut().zip(codes).enumerate() {
        *out = T::from_f32(map[usize::from(code)] * absmax[i / block] + offset);
    }
}
