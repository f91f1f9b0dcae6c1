//! Rows of int8, as LLM.int8() stores weights: `w[r, c] = q[r, c] · scale[r] / 127`, the scale being the row's largest magnitude.

use half::f16;

use crate::device::cpu::{for_each_task, share};
use crate::element::Element;

/// Weights below which a second thread does not pay.
const GRAIN: usize = 1 << 14;

/// Quantizes rows of `columns` weights, each rounded to fp16 first, as bitsandbytes does. A row whose scale is 0, infinite or NaN
/// becomes zeros.
pub(super) fn quantize<T: Element>(weights: &[T], columns: usize, codes: &mut [u8], scales: &mut [f32]) {
    let rows = share(scales.len(), GRAIN.div_ceil(columns));
    let tasks = weights.chunks(rows * columns).zip(codes.chunks_mut(rows * columns)).zip(scales.chunks_mut(rows));
    for_each_task(tasks.collect(), |((weights, codes), scales)| {
        for ((row, codes), scale) in weights.chunks(columns).zip(codes.chunks_mut(columns)).zip(scales) {
            let half = |v: &T| f16::from_f32(v.to_f32()).to_f32();
            *scale = row
                .iter()
                .map(half)
                .fold(0.0, |most, v| if v.is_nan() || most.is_nan() { f32::NAN } else { most.max(v.abs()) });
            // Two roundings, as torch has them where a number is divided by a tensor.
            let factor = (1.0 / *scale) * 127.0;
            for (v, code) in row.iter().zip(codes) {
                // A cast takes NaN, which 0 · ∞ is, for 0.
                *code = (half(v) * factor).round_ties_even() as i8 as u8;
            }
        }
    });
}

/// Decodes rows, in fp32 and rounded once.
pub(super) fn dequantize<T: Element>(codes: &[u8], columns: usize, scales: &[f32], out: &mut [T]) {
    let rows = share(scales.len(), GRAIN.div_ceil(columns));
    let tasks = codes.chunks(rows * columns).zip(out.chunks_mut(rows * columns)).zip(scales.chunks(rows));
    for_each_task(tasks.collect(), |((codes, out), scales)| {
        for ((codes, out), scale) in codes.chunks(columns).zip(out.chunks_mut(columns)).zip(scales) {
            codes.iter().zip(out).for_each(|(&q, out)| *out = T::from_f32(f32::from(q as i8) * scale * (1.0 / 127.0)));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_by_their_largest_magnitude() {
        let weights = [1.0f32, -2.0, 0.5, 0.0, 0.0, 0.0, 1e6, 1.0, -1.0, f32::NAN, 1.0, 2.0];
        let (mut codes, mut scales) = ([1u8; 12], [0.0; 4]);
        quantize(&weights, 3, &mut codes, &mut scales);
        assert_eq!(codes[..9], [64, 129, 32, 0, 0, 0, 0, 0, 0]);
        assert_eq!(scales[..3], [2.0, 0.0, f32::INFINITY]);
        assert!(scales[3].is_nan());
        assert_eq!(codes[9..], [0, 0, 0]);
        let mut out = [0.0f32; 6];
        dequantize(&codes[..6], 3, &scales[..2], &mut out);
        assert_eq!(out, [128.0 / 127.0, -254.0 * (1.0 / 127.0), 64.0 / 127.0, 0.0, 0.0, 0.0]);
    }
}
