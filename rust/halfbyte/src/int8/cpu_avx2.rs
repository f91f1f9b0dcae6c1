//! LLM.int8() with AVX2: rows in and out of codes (the AVX-512 level comes here too: they are bound by memory), and dot
//! products, with AVX-VNNI's instruction where the CPU has it.
//!
//! Functions here are compiled for AVX2 and F16C; calling them is sound once [`crate::device::cpu::Level::check`] has passed.

use std::arch::x86_64::*;

use super::cpu_dot::Dot;
use super::cpu_product::{Finish, Job, PANEL, Part, part};
use super::reference::{self, MOST, UNIT, UNIT2};
use crate::device::cpu::avx2::{largest_i32, load, store};
use crate::element::Element;
use crate::four_bit::cpu_avx2::Avx2 as Floats;

/// The statistic of a row. With a bitmap, there is a threshold, and columns that have an outlier are set in it.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn row_stat<T: Element>(x: &[T], threshold: f32, outliers: Option<&mut [u32]>) -> f32 {
    let (magnitude, limit) = (_mm256_set1_epi32(0x7fff_ffff), _mm256_set1_ps(threshold));
    let mut most = _mm256_setzero_si256();
    let whole = x.len() - x.len() % 8;
    let tail = x[whole..].iter().map(|v| v.to_f32());
    let tail_stat = if let Some(outliers) = outliers {
        for (i, x) in x.chunks_exact(8).enumerate() {
            // SAFETY: eight elements.
            let bits = _mm256_and_si256(_mm256_castps_si256(unsafe { load(x.as_ptr()) }), magnitude);
            // False for NaN, which so counts for the statistic.
            let out = _mm256_cmp_ps::<_CMP_GE_OQ>(_mm256_castsi256_ps(bits), limit);
            most = _mm256_max_epi32(most, _mm256_andnot_si256(_mm256_castps_si256(out), bits));
            let found = _mm256_movemask_ps(out) as u32;
            if found != 0 {
                outliers[i / 4] |= found << (i % 4 * 8);
            }
        }
        for (i, _) in tail.clone().enumerate().filter(|&(_, v)| reference::is_outlier(v, threshold)) {
            outliers[(whole + i) / 32] |= 1 << ((whole + i) % 32);
        }
        reference::stat_of(tail, threshold)
    } else {
        for x in x.chunks_exact(8) {
            // SAFETY: eight elements.
            let bits = _mm256_castps_si256(unsafe { load(x.as_ptr()) });
            most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
        }
        reference::stat_of(tail, 0.0)
    };
    // As integers, the bits of NaN are above those of every number.
    let most = f32::from_bits(largest_i32(most).max(tail_stat.abs().to_bits()));
    if most.is_nan() { f32::NAN } else { most }
}

/// The codes of a row with the statistic `stat`; outliers get 0. Without a threshold, `threshold` is infinite.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn encode_row<T: Element>(x: &[T], stat: f32, threshold: f32, codes: &mut [i8]) {
    let factor = reference::factor(stat);
    let whole = x.len() - x.len() % 8;
    if factor.is_infinite() {
        // A statistic of 0, or nearly.
        return scalar_row(x, stat, threshold, codes);
    }
    let (factor, limit, most) = (_mm256_set1_ps(factor), _mm256_set1_ps(threshold), _mm256_set1_ps(MOST));
    let (magnitude, least) = (_mm256_set1_ps(f32::from_bits(0x7fff_ffff)), _mm256_set1_ps(-MOST));
    for (x, codes) in x.chunks_exact(8).zip(codes.chunks_exact_mut(8)) {
        // SAFETY: eight elements.
        let v = unsafe { load(x.as_ptr()) };
        let scaled = _mm256_mul_ps(v, factor);
        // Numbers below the threshold; also false for NaN, here or in the product.
        let keep = _mm256_and_ps(
            _mm256_cmp_ps::<_CMP_NGE_UQ>(_mm256_and_ps(v, magnitude), limit),
            _mm256_cmp_ps::<_CMP_ORD_Q>(scaled, scaled),
        );
        let limited = _mm256_and_ps(_mm256_max_ps(_mm256_min_ps(scaled, most), least), keep);
        let wide = _mm256_cvtps_epi32(limited);
        let words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256::<1>(wide));
        // SAFETY: room for eight codes.
        unsafe { _mm_storel_epi64(codes.as_mut_ptr().cast(), _mm_packs_epi16(words, words)) };
    }
    scalar_row(&x[whole..], stat, threshold, &mut codes[whole..]);
}

fn scalar_row<T: Element>(x: &[T], stat: f32, threshold: f32, codes: &mut [i8]) {
    for (v, code) in x.iter().zip(codes) {
        let v = v.to_f32();
        *code = if reference::is_outlier(v, threshold) { 0 } else { reference::code(v, stat) };
    }
}

/// [`reference::scaled`] for a part of a row, rounded: `floats` and `bias` are what is added.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn scale_row<T: Element>(
    sums: &[i32],
    row_stat: f32,
    column_stats: &[f32],
    floats: Option<&[f32]>,
    bias: Option<&[T]>,
    out: &mut [T],
) {
    let (count, row, unit) = (out.len(), _mm256_set1_ps(row_stat), _mm256_set1_ps(UNIT2));
    assert!(sums.len() >= count && column_stats.len() >= count);
    assert!(floats.is_none_or(|floats| floats.len() >= count) && bias.is_none_or(|bias| bias.len() >= count));
    let whole = count - count % 8;
    for i in (0..whole).step_by(8) {
        // SAFETY: eight of each from `i` on, as asserted.
        unsafe {
            let sum = _mm256_cvtepi32_ps(_mm256_loadu_si256(sums.as_ptr().add(i).cast()));
            let stats = _mm256_mul_ps(row, _mm256_loadu_ps(column_stats.as_ptr().add(i)));
            let scaled = _mm256_mul_ps(_mm256_mul_ps(sum, stats), unit);
            let mut rest = _mm256_setzero_ps();
            if let Some(floats) = floats {
                rest = _mm256_loadu_ps(floats.as_ptr().add(i));
            }
            if let Some(bias) = bias {
                rest = _mm256_add_ps(rest, load(bias.as_ptr().add(i)));
            }
            store(out.as_mut_ptr().add(i), _mm256_add_ps(scaled, rest));
        }
    }
    for (i, out) in out.iter_mut().enumerate().skip(whole) {
        *out = reference::finished(sums, row_stat, column_stats, floats, bias, i);
    }
}

/// [`reference::dequantize`] for a row.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn decode_row<T: Element>(codes: &[i8], stat: f32, out: &mut [T]) {
    let (scale, unit) = (_mm256_set1_ps(stat), _mm256_set1_ps(UNIT));
    let whole = out.len() - out.len() % 8;
    for (codes, out) in codes.chunks_exact(8).zip(out.chunks_exact_mut(8)) {
        // SAFETY: eight codes, and room for eight elements.
        unsafe {
            let wide = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(codes.as_ptr().cast())));
            store(out.as_mut_ptr(), _mm256_mul_ps(_mm256_mul_ps(wide, scale), unit));
        }
    }
    reference::dequantize(&codes[whole..], codes.len().max(1), &[stat], &mut out[whole..]);
}

/// The totals of four vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn totals([a, b, c, d]: [__m256i; 4]) -> [i32; 4] {
    let all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    let four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
    let mut totals = [0; 4];
    // SAFETY: room for four numbers.
    unsafe { _mm_storeu_si128(totals.as_mut_ptr().cast(), four) };
    totals
}

/// Vectors of 32 bytes, for AVX-VNNI.
#[derive(Clone, Copy)]
pub(super) struct Vnni;

/// Vectors of 16 codes of 16 bits.
#[derive(Clone, Copy)]
pub(super) struct Words;

/// `count` codes at `p` and zeros after them.
///
/// # Safety
/// So many codes are there, at most `N`.
#[inline(always)]
unsafe fn some<const N: usize>(p: *const i8, count: usize) -> [i8; N] {
    let mut codes = [0; N];
    // SAFETY: the caller's promise.
    codes[..count].copy_from_slice(unsafe { std::slice::from_raw_parts(p, count) });
    codes
}

/// Writes the 32-bit lanes of 8 vectors as columns, lane `j` of each to `p + j · PANEL`.
///
/// # Safety
/// Room for `7 · PANEL + 8` numbers at `p`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn transpose(rows: &[__m256i; 8], p: *mut i32) {
    let mut pairs = *rows;
    let mut i = 0;
    while i < 8 {
        pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
        i += 2;
    }
    // Half l of `fours[4 q + j]`: column 4 l + j of rows 4 q to 4 q + 3.
    let mut fours = pairs;
    i = 0;
    while i < 8 {
        fours[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
        i += 4;
    }
    let mut j = 0;
    while j < 4 {
        // SAFETY: the caller's promise.
        unsafe {
            let (low, high) = (p.add(j * PANEL).cast(), p.add((4 + j) * PANEL).cast());
            _mm256_storeu_si256(low, _mm256_permute2x128_si256::<0x20>(fours[j], fours[4 + j]));
            _mm256_storeu_si256(high, _mm256_permute2x128_si256::<0x31>(fours[j], fours[4 + j]));
        }
        j += 1;
    }
}

/// What both types do alike for packed panels.
macro_rules! packed_panels {
    () => {
        const LANES: usize = 8;
        const PACKED_ROWS: usize = 2;

        #[inline(always)]
        unsafe fn transpose(vectors: &[__m256i], p: *mut i32) {
            let vectors = vectors.first_chunk().expect("LANES vectors");
            // SAFETY: the contract of `Dot`.
            unsafe { transpose(vectors, p) }
        }

        #[inline(always)]
        unsafe fn splat(p: *const Self::Left) -> __m256i {
            // SAFETY: as above.
            unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
        }

        #[inline(always)]
        unsafe fn packed(p: *const i32) -> __m256i {
            // SAFETY: as above.
            unsafe { _mm256_loadu_si256(p.cast()) }
        }

        #[inline(always)]
        unsafe fn add_to(sum: __m256i, p: *mut i32) {
            // SAFETY: as above.
            unsafe { _mm256_storeu_si256(p.cast(), _mm256_add_epi32(sum, _mm256_loadu_si256(p.cast()))) }
        }
    };
}

impl Dot for Vnni {
    type Left = u8;
    type A = __m256i;
    type B = __m256i;
    type Sum = __m256i;
    type Floats = Floats;
    const STEP: usize = 32;
    const BIAS: i32 = 128;
    const ROWS: usize = 2;
    const FLOAT_ROWS: usize = 2;
    const ONE: u8 = 1;
    packed_panels!();

    #[inline(always)]
    fn encode(code: i8) -> u8 {
        code.cast_unsigned() ^ 0x80
    }

    #[inline(always)]
    unsafe fn zero() -> __m256i {
        // SAFETY: the contract of `Dot`, here and below.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn left(p: *const u8) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }

    #[inline(always)]
    unsafe fn right(p: *const i8) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }

    #[inline(always)]
    unsafe fn right_some(p: *const i8, count: usize) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_loadu_si256(some::<32>(p, count).as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn dot(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_dpbusd_avx_epi32(sum, a, b) }
    }

    #[inline(always)]
    unsafe fn totals(sums: [__m256i; 4]) -> [i32; 4] {
        // SAFETY: as above.
        unsafe { totals(sums) }
    }

    unsafe fn run<F: Finish>(job: &Job<'_, Self, F>, its: Part<'_, F::Out>) {
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        unsafe fn compiled<F: Finish>(job: &Job<'_, Vnni, F>, its: Part<'_, F::Out>) {
            // SAFETY: passed on.
            unsafe { part(job, its) }
        }
        // SAFETY: passed on.
        unsafe { compiled(job, its) }
    }
}

impl Dot for Words {
    type Left = i16;
    type A = __m256i;
    type B = __m256i;
    type Sum = __m256i;
    type Floats = Floats;
    const STEP: usize = 16;
    const BIAS: i32 = 0;
    const ROWS: usize = 2;
    const FLOAT_ROWS: usize = 2;
    const ONE: i16 = 1;
    packed_panels!();

    #[inline(always)]
    fn encode(code: i8) -> i16 {
        code.into()
    }

    #[inline(always)]
    unsafe fn zero() -> __m256i {
        // SAFETY: the contract of `Dot`, here and below.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn left(p: *const i16) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }

    #[inline(always)]
    unsafe fn right(p: *const i8) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn right_some(p: *const i8, count: usize) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(some::<16>(p, count).as_ptr().cast())) }
    }

    #[inline(always)]
    unsafe fn dot(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as above. Two products of codes are far from the limits of 32 bits.
        unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)) }
    }

    #[inline(always)]
    unsafe fn totals(sums: [__m256i; 4]) -> [i32; 4] {
        // SAFETY: as above.
        unsafe { totals(sums) }
    }

    unsafe fn run<F: Finish>(job: &Job<'_, Self, F>, its: Part<'_, F::Out>) {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn compiled<F: Finish>(job: &Job<'_, Words, F>, its: Part<'_, F::Out>) {
            // SAFETY: passed on.
            unsafe { part(job, its) }
        }
        // SAFETY: passed on.
        unsafe { compiled(job, its) }
    }
}
