//! What 4-bit quantization means: scalar, one weight at a time, slow. Every fast path is tested against this.
//!
//! Lengths are the caller's business: these functions panic where [`super::quantize_into`] and the others return errors.

use crate::codebook::{Kind, zero_code};
use crate::element::Element;
use crate::layout::Absmax;

/// Below this a scale counts as this, so that blocks of zeros have a quotient.
pub(crate) const SMALLEST_SCALE: f32 = 1e-38;

/// `absmax` and no less than [`SMALLEST_SCALE`]; NaN stays NaN.
pub(crate) fn at_least_smallest(absmax: f32) -> f32 {
    if absmax < SMALLEST_SCALE { SMALLEST_SCALE } else { absmax }
}

/// Largest magnitude; NaN if there is one among them.
pub(crate) fn absmax_of(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(0.0, |most: f32, v| if most.is_nan() || v.is_nan() { f32::NAN } else { most.max(v.abs()) })
}

/// Quantizes `a` to `packed` and one scale a block.
///
/// A full block is multiplied by the reciprocal of its scale; a shorter last block is divided by it, and its scale is
/// stored as at least 1e-38. That is how bitsandbytes does it on the CPU, and it can decide between two codes.
pub fn quantize<T: Element>(a: &[T], kind: Kind, block: usize, packed: &mut [u8], absmax: &mut [f32]) {
    for (i, values) in a.chunks(block).enumerate() {
        let most = absmax_of(values.iter().map(|v| v.to_f32()));
        let scale = at_least_smallest(most);
        let full = values.len() == block;
        absmax[i] = if full { most } else { scale };
        let reciprocal = 1.0 / scale;
        let code = |v: &T| {
            let scaled = if full { v.to_f32() * reciprocal } else { v.to_f32() / scale };
            kind.encode(scaled.clamp(-1.0, 1.0))
        };
        for (j, pair) in values.chunks(2).enumerate() {
            let low = pair.get(1).map_or(zero_code(kind), code);
            packed[i * block / 2 + j] = code(&pair[0]) << 4 | low;
        }
    }
}

/// The code of weight `i`.
#[inline(always)]
pub(crate) fn code_at(packed: &[u8], i: usize) -> usize {
    let byte = packed[i / 2];
    usize::from(if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 })
}

/// The fp32 value of weight `i`.
#[inline(always)]
fn weight(packed: &[u8], absmax: &Absmax, kind: Kind, block: usize, i: usize) -> f32 {
    kind.values()[code_at(packed, i)] * absmax.get(i / block)
}

/// `out[i] = value(code[i]) · absmax[i / block]` in fp32, rounded once.
pub fn dequantize<T: Element>(packed: &[u8], absmax: Absmax, kind: Kind, block: usize, out: &mut [T]) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = T::from_f32(weight(packed, &absmax, kind, block, i));
    }
}

/// `out[m, n] = Σ_k x[m, k] · w[n, k] + bias[n]` with `w` as [`dequantize`] gives it in fp32.
///
/// The sum is fp64: it is what the fp32 sums of the fast paths are measured by.
pub fn matmul<T: Element>(
    x: &[T],
    (m, n, k): (usize, usize, usize),
    packed: &[u8],
    absmax: Absmax,
    kind: Kind,
    block: usize,
    bias: Option<&[T]>,
    out: &mut [T],
) {
    for row in 0..m {
        for column in 0..n {
            let product = |i: usize| {
                let w = weight(packed, &absmax, kind, block, column * k + i);
                f64::from(x[row * k + i].to_f32()) * f64::from(w)
            };
            let bias = bias.map_or(0.0, |bias| bias[column].to_f32());
            let sum = (0..k).map(product).sum::<f64>() + f64::from(bias);
            out[row * n + column] = T::from_f32(sum as f32);
        }
    }
}
