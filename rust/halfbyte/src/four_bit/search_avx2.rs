//! The search for scales with AVX2 and FMA: [`super::search`] block by block, the same bytes.

use std::arch::x86_64::*;
use std::slice;

use super::cpu_avx2;
use super::cpu_avx2::{Encoder, absmax};
use super::search::{
    GUARD_MAGIC, GUARD_SCALE, RATIOS, ROW_MAGIC, Table, accepted, encodable, encode_reference, quantize_reference,
    searchable,
};
use crate::codebook::Kind;
use crate::device::cpu::avx2::load;
use crate::element::Element;

/// Weights whose sums fit 16 bits: 63 · 1024 < 65,536.
const SPAN: usize = 1024;

/// [`super::search::quantize_reference`], the same bytes.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize<T: Element>(a: &[T], kind: Kind, block: usize, packed: &mut [u8], absmax_out: &mut [f32]) {
    let encoder = Encoder::new(kind);
    let guard = Guard::new(kind, encoder);
    let table = Table::of(kind, block);
    let full = a.len() / block;
    let (whole, tail) = a.split_at(full * block);
    let (packed, tail_packed) = packed.split_at_mut(full * block / 2);
    let (scales, tail_scales) = absmax_out.split_at_mut(full);
    for ((values, bytes), scale) in whole.chunks_exact(block).zip(packed.chunks_exact_mut(block / 2)).zip(scales) {
        let most = absmax(values);
        if searchable(most) {
            let inverse = 1.0 / most;
            let ratio = table.best(&sums(values, table, inverse));
            let searched = most * ratio;
            if accepted(
                guard.error(values, inverse, ratio, 1.0 / searched),
                guard.error(values, inverse, 1.0, inverse),
                block,
            ) {
                *scale = searched;
                encoder.encode(values, 1.0 / searched, bytes);
                continue;
            }
        }
        cpu_avx2::quantize(values, kind, block, bytes, slice::from_mut(scale));
    }
    quantize_reference(tail, kind, block, tail_packed, tail_scales);
}

/// [`encode_reference`], the same bytes.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn encode<T: Element>(a: &[T], scales: &[f32], kind: Kind, block: usize, packed: &mut [u8]) {
    let encoder = Encoder::new(kind);
    let full = a.len() / block;
    for ((values, bytes), &scale) in a.chunks_exact(block).zip(packed.chunks_exact_mut(block / 2)).zip(scales) {
        if encodable(scale) {
            encoder.encode(values, 1.0 / scale, bytes);
        }
    }
    encode_reference(&a[full * block..], &scales[full..], kind, block, &mut packed[full * block / 2..]);
}

/// Sums of the table's rows for a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sums<T: Element>(values: &[T], table: &Table, inverse: f32) -> [u32; 2 * RATIOS] {
    let (factor, magic) = (_mm256_set1_ps(inverse * 128.0), _mm256_set1_ps(ROW_MAGIC));
    let mut sums = [0; 2 * RATIOS];
    let low_bytes = _mm256_set1_epi16(0xff);
    for span in values.chunks(SPAN) {
        // Ratios with an even number, and those with an odd one, in 16 bits each.
        let (mut even, mut odd) = (_mm256_setzero_si256(), _mm256_setzero_si256());
        for eight in span.chunks_exact(8) {
            let mut rows = [0u32; 8];
            // SAFETY: eight elements, and room for eight numbers.
            unsafe {
                let row = _mm256_castps_si256(_mm256_fmadd_ps(load(eight.as_ptr()), factor, magic));
                let row = _mm256_and_si256(row, _mm256_set1_epi32(0x1ff));
                _mm256_storeu_si256(rows.as_mut_ptr().cast(), row);
            }
            for four in rows.chunks_exact(4) {
                // SAFETY: a row has 32 bytes, and its number was checked.
                let row = |i: usize| unsafe { _mm256_loadu_si256(table.rows[four[i] as usize].as_ptr().cast()) };
                let all = _mm256_add_epi8(_mm256_add_epi8(row(0), row(1)), _mm256_add_epi8(row(2), row(3)));
                even = _mm256_add_epi16(even, _mm256_and_si256(all, low_bytes));
                odd = _mm256_add_epi16(odd, _mm256_srli_epi16::<8>(all));
            }
        }
        let (mut evens, mut odds) = ([0u16; RATIOS], [0u16; RATIOS]);
        // SAFETY: 32 bytes each.
        unsafe {
            _mm256_storeu_si256(evens.as_mut_ptr().cast(), even);
            _mm256_storeu_si256(odds.as_mut_ptr().cast(), odd);
        }
        for (pair, (even, odd)) in sums.chunks_exact_mut(2).zip(evens.into_iter().zip(odds)) {
            pair[0] += u32::from(even);
            pair[1] += u32::from(odd);
        }
    }
    sums
}

/// The exact error of a scale.
#[derive(Clone, Copy)]
struct Guard {
    encoder: Encoder,
    /// Values by rank, 0 to 7 and 8 to 15.
    values: (__m256, __m256),
}

impl Guard {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(kind: Kind, encoder: Encoder) -> Self {
        let by_rank = kind.by_value().map(|code| kind.values()[usize::from(code)]);
        // SAFETY: the halves are eight numbers each.
        let values = unsafe { (_mm256_loadu_ps(by_rank.as_ptr()), _mm256_loadu_ps(by_rank.as_ptr().add(8))) };
        Self { encoder, values }
    }

    /// The sum of squared errors in steps of 2⁻²⁰ m² under `ratio`, with codes for `inverse_of_scale`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn error<T: Element>(&self, values: &[T], inverse: f32, ratio: f32, inverse_of_scale: f32) -> u32 {
        let (unit, ratio) = (_mm256_set1_ps(inverse * GUARD_SCALE), _mm256_set1_ps(ratio * GUARD_SCALE));
        let (inverse, magic) = (_mm256_set1_ps(inverse_of_scale), _mm256_set1_ps(GUARD_MAGIC));
        let mut sum = _mm256_setzero_si256();
        for eight in values.chunks_exact(8) {
            // SAFETY: eight elements.
            let x = unsafe { load(eight.as_ptr()) };
            let rank = self.encoder.rank(_mm256_mul_ps(x, inverse));
            // The permutation looks at three bits of the rank, the choice between its results is the fourth.
            let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(rank));
            let (low, high) = self.values;
            let value =
                _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, rank), _mm256_permutevar8x32_ps(high, rank), fourth);
            let d = _mm256_fnmadd_ps(value, ratio, _mm256_mul_ps(x, unit));
            let squared = _mm256_castps_si256(_mm256_fmadd_ps(d, d, magic));
            sum = _mm256_add_epi32(sum, _mm256_sub_epi32(squared, _mm256_castps_si256(magic)));
        }
        let mut lanes = [0u32; 8];
        // SAFETY: room for eight numbers.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum) };
        lanes.iter().sum()
    }
}
