//! 4-bit with AVX2, FMA and F16C.
//!
//! Functions here are compiled for those instructions; calling them is `unsafe` from code that is not, and sound once
//! [`crate::device::cpu::Level::check`] has passed.

use std::arch::x86_64::*;

use super::cpu_lanes::{Lanes, decode_run};
use super::cpu_matmul::{self as product, Part, Weight};
use super::reference::{self, at_least_smallest};
use crate::codebook::Kind;
use crate::device::cpu::avx2::{from_bits16, largest_i32, largest_u16, load, to_bf16};
use crate::element::{Dtype, Element};

/// Eight fp32 numbers.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256);

impl Lanes for Avx2 {
    const N: usize = 8;
    /// The values of codes 0 to 7 and of 8 to 15.
    type Table = (__m256, __m256);

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the contract of `Lanes`, here and below.
        Self(unsafe { _mm256_setzero_ps() })
    }

    #[inline(always)]
    unsafe fn splat(p: *const f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_broadcast_ss(&*p) })
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_loadu_ps(p) })
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(p, self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: as above.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn table(values: &[f32; 16], scale: f32) -> Self::Table {
        // SAFETY: as above; the halves of `values` are eight numbers each.
        unsafe {
            let scale = _mm256_set1_ps(scale);
            let half = |p| _mm256_mul_ps(_mm256_loadu_ps(p), scale);
            (half(values.as_ptr()), half(values.as_ptr().add(8)))
        }
    }

    #[inline(always)]
    unsafe fn decode(&(low, high): &Self::Table, p: *const u8) -> Self {
        // SAFETY: as above: four bytes at `p`.
        unsafe {
            // All eight codes to each lane, each lane shifts its own to the bottom. The even one is in the high nibble.
            let all = _mm256_set1_epi32(p.cast::<i32>().read_unaligned());
            let codes = _mm256_srlv_epi32(all, _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
            // The permutation looks at three bits of the code, the choice between its results is the fourth.
            let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            Self(_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), fourth))
        }
    }
}

/// The largest magnitude of `a`, whose length is a multiple of 16; NaN if there is one.
///
/// Magnitudes are compared as the integers that their bits are: that is their order, and NaN is above all.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn absmax<T: Element>(a: &[T]) -> f32 {
    let chunks = a.chunks_exact(16);
    let most = if T::DTYPE == Dtype::F32 {
        let magnitude = _mm256_set1_epi32(0x7fff_ffff);
        let mut most = _mm256_setzero_si256();
        for chunk in chunks {
            // SAFETY: 16 elements of four bytes.
            let (u, v) = unsafe {
                let p: *const __m256i = chunk.as_ptr().cast();
                (_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1)))
            };
            let larger = _mm256_max_epi32(_mm256_and_si256(u, magnitude), _mm256_and_si256(v, magnitude));
            most = _mm256_max_epi32(most, larger);
        }
        f32::from_bits(largest_i32(most))
    } else {
        let magnitude = _mm256_set1_epi16(0x7fff);
        let mut most = _mm256_setzero_si256();
        for chunk in chunks {
            // SAFETY: 16 elements of two bytes.
            let v = unsafe { _mm256_loadu_si256(chunk.as_ptr().cast()) };
            most = _mm256_max_epu16(most, _mm256_and_si256(v, magnitude));
        }
        from_bits16::<T>(largest_u16(most))
    };
    if most.is_nan() { f32::NAN } else { most }
}

/// A binary search among the 15 decision points, eight values at once.
///
/// A step holds the outcomes so far as a number that counts from below up to −1 for the uppermost: then a comparison's mask,
/// 0 or −1, is an outcome as it stands, and the low bits of the number point into the table of the next step.
#[derive(Clone, Copy)]
struct Search {
    middle: __m256,
    quarters: __m256,
    eighths: __m256,
    sixteenths: __m256,
}

impl Search {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(points: &[f32; 15]) -> Self {
        // Step s has 2^s points apart by 16 / 2^s, in places −2^(s−1) to 2^(s−1) − 1 modulo 8, the lower half from 0.
        let step = |count: usize| {
            let mut table = [0f32; 8];
            for i in 0..count {
                let place = if i < count / 2 { i } else { 8 - count + i };
                table[place] = points[16 / count * i + 8 / count - 1];
            }
            table
        };
        // SAFETY: eight numbers each.
        let load = |table: [f32; 8]| unsafe { _mm256_loadu_ps(table.as_ptr()) };
        Self {
            middle: _mm256_set1_ps(points[7]),
            quarters: load(step(2)),
            eighths: load(step(4)),
            sixteenths: load(step(8)),
        }
    }

    /// The low four bits of each lane are the number of points strictly below; NaN is above all.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn rank(&self, v: __m256) -> __m256i {
        let above = |point| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NLE_UQ>(v, point));
        let mut at = above(self.middle);
        for table in [self.quarters, self.eighths, self.sixteenths] {
            let outcome = above(_mm256_permutevar8x32_ps(table, at));
            at = _mm256_sub_epi32(_mm256_add_epi32(at, at), outcome);
        }
        at
    }
}

/// Values to packed codes.
#[derive(Clone, Copy)]
pub(super) struct Encoder {
    search: Search,
    /// Codes by rank, in both halves.
    codes: __m256i,
}

impl Encoder {
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn new(kind: Kind) -> Self {
        // SAFETY: 16 bytes.
        let codes = unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(kind.by_value().as_ptr().cast())) };
        Self { search: Search::new(kind.decision_points()), codes }
    }

    /// [`Search::rank`].
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn rank(&self, v: __m256) -> __m256i {
        self.search.rank(v)
    }

    /// Codes of `values · reciprocal`, whose number is a multiple of 32.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn encode<T: Element>(&self, values: &[T], reciprocal: f32, bytes: &mut [u8]) {
        let reciprocal = _mm256_set1_ps(reciprocal);
        for (values, bytes) in values.chunks_exact(32).zip(bytes.chunks_exact_mut(16)) {
            // No clamp to [−1, 1]: all points are inside.
            // SAFETY: `values` are 32 elements, and `i` is at most 3.
            let rank = |i: usize| self.rank(_mm256_mul_ps(unsafe { load(values.as_ptr().add(8 * i)) }, reciprocal));
            let pairs = _mm256_packs_epi32(rank(0), rank(1));
            let ranks = _mm256_packs_epi16(pairs, _mm256_packs_epi32(rank(2), rank(3)));
            let codes = _mm256_shuffle_epi8(self.codes, _mm256_and_si256(ranks, _mm256_set1_epi8(15)));
            // The even one of each pair times 16 plus the odd one, in 16 bits, of which the lower 8 are all.
            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
            let packed = _mm256_packus_epi16(pairs, pairs);
            // The lower half has elements 0–3, 8–11, 16–19, 24–27; the upper half those between.
            let (even, odd) = (_mm256_castsi256_si128(packed), _mm256_extracti128_si256::<1>(packed));
            // SAFETY: room for 16 bytes.
            unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm_unpacklo_epi16(even, odd)) };
        }
    }
}

/// [`reference::quantize`], the same bytes.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn quantize<T: Element>(a: &[T], kind: Kind, block: usize, packed: &mut [u8], absmax_out: &mut [f32]) {
    let encoder = Encoder::new(kind);
    let full = a.len() / block;
    let (whole, tail) = a.split_at(full * block);
    let (packed, tail_packed) = packed.split_at_mut(full * block / 2);
    let (scales, tail_scales) = absmax_out.split_at_mut(full);
    for ((values, bytes), scale) in whole.chunks_exact(block).zip(packed.chunks_exact_mut(block / 2)).zip(scales) {
        *scale = absmax(values);
        encoder.encode(values, 1.0 / at_least_smallest(*scale), bytes);
    }
    reference::quantize(tail, kind, block, tail_packed, tail_scales);
}

/// Dequantizes whole groups of 32 weights with one scale to 16-bit elements: `out.len()` is a multiple of 32.
///
/// There are but 16 different results in a block. They are made and rounded once; each weight then looks up its two bytes.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn dequantize_block16<T: Element>(packed: &[u8], values: &[f32; 16], scale: f32, out: &mut [T]) {
    let scale = _mm256_set1_ps(scale);
    let round = |v| match T::DTYPE {
        Dtype::F16 => _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v),
        _ => to_bf16(v),
    };
    // SAFETY: the halves of `values` are eight numbers each.
    let (v, w) = unsafe { (_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))) };
    let (v, w) = (round(_mm256_mul_ps(v, scale)), round(_mm256_mul_ps(w, scale)));
    let byte = _mm_set1_epi16(0xff);
    let lower = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(v, byte), _mm_and_si128(w, byte)));
    let upper = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16::<8>(v), _mm_srli_epi16::<8>(w)));
    let nibble = _mm_set1_epi8(15);
    for (bytes, out) in packed.chunks_exact(16).zip(out.chunks_exact_mut(32)) {
        // SAFETY: 16 bytes.
        let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
        let (even, odd) = (_mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble), _mm_and_si128(bytes, nibble));
        let (first, second) = (_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd));
        // Eights 0, 2 | 1, 3: unpacking within halves then makes 0 | 1 and 2 | 3.
        let codes = _mm256_set_m128i(_mm_unpackhi_epi64(first, second), _mm_unpacklo_epi64(first, second));
        let (low, high) = (_mm256_shuffle_epi8(lower, codes), _mm256_shuffle_epi8(upper, codes));
        let to: *mut __m256i = out.as_mut_ptr().cast();
        // SAFETY: room for 32 elements of two bytes.
        unsafe {
            _mm256_storeu_si256(to, _mm256_unpacklo_epi8(low, high));
            _mm256_storeu_si256(to.add(1), _mm256_unpackhi_epi8(low, high));
        }
    }
}

/// Dequantizes to 16-bit elements: whole groups of 32 weights of blocks that start with `packed`, and `out.len()` weights at
/// that.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn dequantize16<T: Element>(packed: &[u8], scales: &[f32], kind: Kind, block: usize, out: &mut [T]) {
    for ((bytes, out), &scale) in packed.chunks(block / 2).zip(out.chunks_mut(block)).zip(scales) {
        dequantize_block16(bytes, kind.values(), scale, out);
    }
}

/// Dequantizes blocks that start with `packed` to fp32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn decode(packed: &[u8], kind: Kind, block: usize, scales: &[f32], out: &mut [f32]) {
    // SAFETY: the instructions are those of this function.
    unsafe { decode_run::<Avx2>(packed, 0, kind.values(), block, scales, out) }
}

/// [`product::few`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn few<T: Element>(x: &[f32], w: &Weight, bias: Option<&[T]>, part: Part<'_, T>) {
    // SAFETY: the instructions are those of this function.
    unsafe { product::few::<Avx2, T>(x, w, bias, part) }
}

/// [`product::many`]: 6 × 2 of 16 registers hold sums.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn many<T: Element>(x: &[f32], w: &Weight, bias: Option<&[T]>, part: Part<'_, T>) {
    // SAFETY: the instructions are those of this function.
    unsafe { product::many::<Avx2, T, 6>(x, w, bias, part) }
}
