//! Blockwise 8-bit with AVX2. The AVX-512 level comes here too: the time goes to looking up one value after the other, which
//! wider vectors do not change.
//!
//! Functions here are compiled for AVX2 and F16C; calling them is sound once [`crate::device::cpu::Level::check`] has passed.

use std::arch::x86_64::*;

use super::Rounding;
use super::nearest::{BUCKETS, Buckets, HIGHEST, SHIFT};
use super::reference::{Scaling, most_of, scaling};
use crate::codebook::Map;
use crate::device::cpu::avx2::{largest_i32, load, store};
use crate::element::Element;

/// Values between whose vector part and whose look-ups a buffer stands.
const STRIP: usize = 64;

/// Up to eight elements (at least one), the missing ones copies of the first.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_some<T: Element>(a: &[T]) -> __m256 {
    let mut eight = [a[0]; 8];
    let whole: &[T] = if a.len() >= 8 {
        a
    } else {
        eight[..a.len()].copy_from_slice(a);
        &eight
    };
    // SAFETY: at least eight elements.
    unsafe { load(whole.as_ptr()) }
}

/// The largest magnitude of `a − offset`; NaN if there is one.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn absmax<T: Element>(a: &[T], offset: f32) -> f32 {
    let (offset, magnitude) = (_mm256_set1_ps(offset), _mm256_set1_epi32(0x7fff_ffff));
    let mut most = _mm256_setzero_si256();
    for a in a.chunks(8) {
        let bits = _mm256_castps_si256(_mm256_sub_ps(load_some(a), offset));
        most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
    }
    let most = f32::from_bits(largest_i32(most));
    if most.is_nan() { f32::NAN } else { most }
}

/// The value that decides: `v` scaled and limited to [−1, 1], on the grid or not. NaN becomes what gets NaN's code.
#[inline]
#[target_feature(enable = "avx2")]
fn decider(v: __m256, scaling: Scaling, rounding: Rounding) -> __m256 {
    let one = _mm256_set1_ps(1.0);
    let scaled = match scaling {
        Scaling::Multiply(factor) => _mm256_mul_ps(v, _mm256_set1_ps(factor)),
        Scaling::Divide(scale) => _mm256_div_ps(v, _mm256_set1_ps(scale)),
    };
    // Of a NaN and a number these two instructions give the second operand, the number.
    match rounding {
        Rounding::Nearest => _mm256_max_ps(_mm256_min_ps(scaled, one), _mm256_set1_ps(-1.0)),
        Rounding::Grid => {
            let limited = _mm256_min_ps(one, _mm256_max_ps(_mm256_set1_ps(-1.0), scaled));
            let up = _mm256_mul_ps(_mm256_mul_ps(_mm256_add_ps(limited, one), _mm256_set1_ps(0.5)), top());
            let level = _mm256_max_ps(_mm256_add_ps(up, _mm256_set1_ps(0.5)), _mm256_setzero_ps());
            let level = _mm256_cvtepi32_ps(_mm256_cvttps_epi32(level));
            _mm256_sub_ps(_mm256_div_ps(_mm256_add_ps(level, level), top()), one)
        }
    }
}

/// The highest level of the grid.
#[inline]
#[target_feature(enable = "avx2")]
fn top() -> __m256 {
    _mm256_set1_ps(65535.0)
}

/// [`super::reference::quantize`], the same bytes.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn quantize<T: Element>(
    a: &[T],
    points: &[f32; 256],
    buckets: &Buckets,
    block: usize,
    offset: f32,
    rounding: Rounding,
    codes: &mut [u8],
    absmax_out: &mut [f32],
) {
    let (lowest, highest) = (_mm256_set1_epi32(buckets.lowest as i32), _mm256_set1_epi32(HIGHEST as i32));
    let (magnitude, half) = (_mm256_set1_epi32(0x7fff_ffff), _mm256_set1_epi32(BUCKETS as i32));
    let subtract = _mm256_set1_ps(offset);
    let (mut deciders, mut numbers) = ([0f32; STRIP], [0u32; STRIP]);
    for ((values, codes), stored) in a.chunks(block).zip(codes.chunks_mut(block)).zip(absmax_out) {
        let mut most = absmax(values, offset);
        if most.is_nan() && rounding == Rounding::Grid {
            most = most_of(rounding, values.iter().map(|v| v.to_f32() - offset));
        }
        let (scaling, to_store) = scaling(rounding, most, values.len() == block);
        *stored = to_store;
        for (values, codes) in values.chunks(STRIP).zip(codes.chunks_mut(STRIP)) {
            let vectors = deciders.chunks_exact_mut(8).zip(numbers.chunks_exact_mut(8));
            for (values, (deciders, numbers)) in values.chunks(8).zip(vectors) {
                let decider = decider(_mm256_sub_ps(load_some(values), subtract), scaling, rounding);
                let bits = _mm256_castps_si256(decider);
                let number = _mm256_srli_epi32::<{ SHIFT as i32 }>(_mm256_and_si256(bits, magnitude));
                let number = _mm256_min_epi32(_mm256_max_epi32(number, lowest), highest);
                let sign = _mm256_and_si256(_mm256_srai_epi32::<31>(bits), half);
                let number = _mm256_add_epi32(_mm256_sub_epi32(number, lowest), sign);
                // SAFETY: room for eight numbers each.
                unsafe {
                    _mm256_storeu_ps(deciders.as_mut_ptr(), decider);
                    _mm256_storeu_si256(numbers.as_mut_ptr().cast(), number);
                }
            }
            for ((code, &decider), &number) in codes.iter_mut().zip(&deciders).zip(&numbers) {
                *code = buckets.code(points, decider, number);
            }
        }
    }
}

/// [`super::reference::dequantize`], the same numbers.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn dequantize<T: Element>(
    codes: &[u8],
    map: &Map,
    absmax: &[f32],
    block: usize,
    offset: f32,
    out: &mut [T],
) {
    let offset = _mm256_set1_ps(offset);
    let mut values = [0f32; STRIP];
    for ((codes, out), &scale) in codes.chunks(block).zip(out.chunks_mut(block)).zip(absmax) {
        let scale = _mm256_set1_ps(scale);
        for (codes, out) in codes.chunks(STRIP).zip(out.chunks_mut(STRIP)) {
            for (value, &code) in values.iter_mut().zip(codes) {
                *value = map[usize::from(code)];
            }
            for (values, out) in values.chunks_exact(8).zip(out.chunks_mut(8)) {
                // SAFETY: eight numbers.
                let values = unsafe { _mm256_loadu_ps(values.as_ptr()) };
                let result = _mm256_add_ps(_mm256_mul_ps(values, scale), offset);
                if out.len() == 8 {
                    // SAFETY: room for eight elements.
                    unsafe { store(out.as_mut_ptr(), result) };
                } else {
                    let mut eight = [T::default(); 8];
                    // SAFETY: as above.
                    unsafe { store(eight.as_mut_ptr(), result) };
                    out.copy_from_slice(&eight[..out.len()]);
                }
            }
        }
    }
}
