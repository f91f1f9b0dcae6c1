//! 4-bit with AVX-512 F, BW, DQ and VL. As in [`super::cpu_avx2`], with vectors of 16.

use std::arch::x86_64::*;

use super::cpu_lanes::Lanes;
use super::cpu_matmul::{self as product, Part, Weight};
use super::reference::{self, at_least_smallest};
use crate::codebook::Kind;
use crate::device::cpu::avx2::{from_bits16, largest_i32, largest_u16};
use crate::element::{Dtype, Element};

/// Sixteen fp32 numbers.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

impl Lanes for Avx512 {
    const N: usize = 16;
    /// The values of all codes.
    type Table = __m512;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the contract of `Lanes`, here and below.
        Self(unsafe { _mm512_setzero_ps() })
    }

    #[inline(always)]
    unsafe fn splat(p: *const f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_set1_ps(*p) })
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_loadu_ps(p) })
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: as above.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }

    #[inline(always)]
    unsafe fn table(values: &[f32; 16], scale: f32) -> Self::Table {
        // SAFETY: as above; `values` are sixteen numbers.
        unsafe { _mm512_mul_ps(_mm512_loadu_ps(values.as_ptr()), _mm512_set1_ps(scale)) }
    }

    #[inline(always)]
    unsafe fn decode(&table: &Self::Table, p: *const u8) -> Self {
        // SAFETY: as above: eight bytes at `p`.
        unsafe {
            // The first eight codes to lanes 0–7, the second to 8–15; each lane shifts its own to the bottom, where the
            // permutation looks at four bits. The even code of a byte is in the high nibble.
            let bytes = _mm512_castsi128_si512(_mm_loadl_epi64(p.cast()));
            let half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            let shift = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
            let codes = _mm512_srlv_epi32(_mm512_permutexvar_epi32(half, bytes), shift);
            Self(_mm512_permutexvar_ps(codes, table))
        }
    }
}

/// Sixteen elements, widened exactly.
///
/// # Safety
/// Sixteen elements at `p`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn load<T: Element>(p: *const T) -> __m512 {
    // SAFETY: `Element` is sealed, and its tag tells what `T` is.
    unsafe {
        match T::DTYPE {
            Dtype::F32 => _mm512_loadu_ps(p.cast()),
            Dtype::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())),
            Dtype::Bf16 => {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
    }
}

/// The largest magnitude of `a`, whose length is a multiple of 32; NaN if there is one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
fn absmax<T: Element>(a: &[T]) -> f32 {
    let chunks = a.chunks_exact(32);
    let most = if T::DTYPE == Dtype::F32 {
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        let mut most = _mm512_setzero_si512();
        for chunk in chunks {
            // SAFETY: 32 elements of four bytes.
            let (u, v) = unsafe {
                let p: *const __m512i = chunk.as_ptr().cast();
                (_mm512_loadu_si512(p), _mm512_loadu_si512(p.add(1)))
            };
            let larger = _mm512_max_epi32(_mm512_and_si512(u, magnitude), _mm512_and_si512(v, magnitude));
            most = _mm512_max_epi32(most, larger);
        }
        let halves = (_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64::<1>(most));
        f32::from_bits(largest_i32(_mm256_max_epi32(halves.0, halves.1)))
    } else {
        let magnitude = _mm512_set1_epi16(0x7fff);
        let mut most = _mm512_setzero_si512();
        for chunk in chunks {
            // SAFETY: 32 elements of two bytes.
            let v = unsafe { _mm512_loadu_si512(chunk.as_ptr().cast()) };
            most = _mm512_max_epu16(most, _mm512_and_si512(v, magnitude));
        }
        let halves = (_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64::<1>(most));
        from_bits16::<T>(largest_u16(_mm256_max_epu16(halves.0, halves.1)))
    };
    if most.is_nan() { f32::NAN } else { most }
}

/// A binary search among the 15 decision points, as in [`super::cpu_avx2`].
#[derive(Clone, Copy)]
struct Search {
    middle: __m512,
    quarters: __m512,
    eighths: __m512,
    sixteenths: __m512,
}

impl Search {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn new(points: &[f32; 15]) -> Self {
        // As for AVX2, but places are modulo 16.
        let step = |count: usize| {
            let mut table = [0f32; 16];
            for i in 0..count {
                let place = if i < count / 2 { i } else { 16 - count + i };
                table[place] = points[16 / count * i + 8 / count - 1];
            }
            table
        };
        // SAFETY: sixteen numbers each.
        let load = |table: [f32; 16]| unsafe { _mm512_loadu_ps(table.as_ptr()) };
        Self {
            middle: _mm512_set1_ps(points[7]),
            quarters: load(step(2)),
            eighths: load(step(4)),
            sixteenths: load(step(8)),
        }
    }

    /// The low four bits of each lane are the number of points strictly below; NaN is above all.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn rank(&self, v: __m512) -> __m512i {
        let above = |point| _mm512_movm_epi32(_mm512_cmp_ps_mask::<_CMP_NLE_UQ>(v, point));
        let mut at = above(self.middle);
        for table in [self.quarters, self.eighths, self.sixteenths] {
            let outcome = above(_mm512_permutexvar_ps(at, table));
            at = _mm512_sub_epi32(_mm512_add_epi32(at, at), outcome);
        }
        at
    }
}

/// [`reference::quantize`], the same bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) fn quantize<T: Element>(a: &[T], kind: Kind, block: usize, packed: &mut [u8], absmax_out: &mut [f32]) {
    let search = Search::new(kind.decision_points());
    // SAFETY: 16 bytes.
    let codes = unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(kind.by_value().as_ptr().cast())) };
    let full = a.len() / block;
    let (whole, tail) = a.split_at(full * block);
    let (packed, tail_packed) = packed.split_at_mut(full * block / 2);
    let (scales, tail_scales) = absmax_out.split_at_mut(full);
    for ((values, bytes), scale) in whole.chunks_exact(block).zip(packed.chunks_exact_mut(block / 2)).zip(scales) {
        *scale = absmax(values);
        let reciprocal = _mm512_set1_ps(1.0 / at_least_smallest(*scale));
        for (values, bytes) in values.chunks_exact(32).zip(bytes.chunks_exact_mut(16)) {
            // No clamp to [−1, 1]: all points are inside.
            // SAFETY: `values` are 32 elements, and `i` is at most 1.
            let rank = |i: usize| search.rank(_mm512_mul_ps(unsafe { load(values.as_ptr().add(16 * i)) }, reciprocal));
            let ranks = _mm256_set_m128i(_mm512_cvtepi32_epi8(rank(1)), _mm512_cvtepi32_epi8(rank(0)));
            let codes = _mm256_shuffle_epi8(codes, _mm256_and_si256(ranks, _mm256_set1_epi8(15)));
            // The even one of each pair times 16 plus the odd one, in 16 bits, of which the lower 8 are all.
            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
            // SAFETY: room for 16 bytes.
            unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm256_cvtepi16_epi8(pairs)) };
        }
    }
    reference::quantize(tail, kind, block, tail_packed, tail_scales);
}

/// [`product::few`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
pub(super) fn few<T: Element>(x: &[f32], w: &Weight, bias: Option<&[T]>, part: Part<'_, T>) {
    // SAFETY: the instructions are those of this function.
    unsafe { product::few::<Avx512, T>(x, w, bias, part) }
}

/// [`product::many`]: 12 × 2 of 32 registers hold sums.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
pub(super) fn many<T: Element>(x: &[f32], w: &Weight, bias: Option<&[T]>, part: Part<'_, T>) {
    // SAFETY: the instructions are those of this function.
    unsafe { product::many::<Avx512, T, 12>(x, w, bias, part) }
}
