//! Dot products of codes with AVX-512: VNNI's instruction for bytes where the CPU has it, else widened to 16 bits.

use std::arch::x86_64::*;

use super::cpu_dot::Dot;
use super::cpu_product::{Finish, Job, PANEL, Part, part};
use crate::four_bit::cpu_avx512::Avx512 as Floats;

/// Vectors of 64 bytes.
#[derive(Clone, Copy)]
pub(super) struct Vnni;

/// Vectors of 32 codes of 16 bits.
#[derive(Clone, Copy)]
pub(super) struct Words;

/// The totals of four vectors: transposed by halves until their lanes stand one above the other.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn totals([a, b, c, d]: [__m512i; 4]) -> [i32; 4] {
    let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    let all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    let half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64::<1>(all));
    let four = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
    let mut totals = [0; 4];
    // SAFETY: room for four numbers.
    unsafe { _mm_storeu_si128(totals.as_mut_ptr().cast(), four) };
    totals
}

/// Writes the 32-bit lanes of 16 vectors as columns, lane `j` of each to `p + j · PANEL`.
///
/// # Safety
/// Room for `15 · PANEL + 16` numbers at `p`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn transpose(rows: &[__m512i; 16], p: *mut i32) {
    let mut pairs = *rows;
    let mut i = 0;
    while i < 16 {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        i += 2;
    }
    // Quarter l of `fours[4 q + j]`: column 4 l + j of rows 4 q to 4 q + 3.
    let mut fours = pairs;
    i = 0;
    while i < 16 {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
        i += 4;
    }
    let mut j = 0;
    while j < 4 {
        let even = |a, b| _mm512_shuffle_i32x4::<0x88>(a, b);
        let odd = |a, b| _mm512_shuffle_i32x4::<0xdd>(a, b);
        let (first, second) = ((fours[j], fours[4 + j]), (fours[8 + j], fours[12 + j]));
        let evens = (even(first.0, first.1), even(second.0, second.1));
        let odds = (odd(first.0, first.1), odd(second.0, second.1));
        // SAFETY: the caller's promise.
        unsafe {
            _mm512_storeu_si512(p.add(j * PANEL).cast(), even(evens.0, evens.1));
            _mm512_storeu_si512(p.add((4 + j) * PANEL).cast(), even(odds.0, odds.1));
            _mm512_storeu_si512(p.add((8 + j) * PANEL).cast(), odd(evens.0, evens.1));
            _mm512_storeu_si512(p.add((12 + j) * PANEL).cast(), odd(odds.0, odds.1));
        }
        j += 1;
    }
}

/// What both types do alike for packed panels.
macro_rules! packed_panels {
    () => {
        const LANES: usize = 16;
        const PACKED_ROWS: usize = 8;

        #[inline(always)]
        unsafe fn transpose(vectors: &[__m512i], p: *mut i32) {
            let vectors = vectors.first_chunk().expect("LANES vectors");
            // SAFETY: the contract of `Dot`.
            unsafe { transpose(vectors, p) }
        }

        #[inline(always)]
        unsafe fn splat(p: *const Self::Left) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
        }

        #[inline(always)]
        unsafe fn packed(p: *const i32) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_loadu_si512(p.cast()) }
        }

        #[inline(always)]
        unsafe fn add_to(sum: __m512i, p: *mut i32) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(p.cast(), _mm512_add_epi32(sum, _mm512_loadu_si512(p.cast()))) }
        }
    };
}

impl Dot for Vnni {
    type Left = u8;
    type A = __m512i;
    type B = __m512i;
    type Sum = __m512i;
    type Floats = Floats;
    const STEP: usize = 64;
    const BIAS: i32 = 128;
    const ROWS: usize = 6;
    const FLOAT_ROWS: usize = 4;
    const ONE: u8 = 1;
    packed_panels!();

    #[inline(always)]
    fn encode(code: i8) -> u8 {
        code.cast_unsigned() ^ 0x80
    }

    #[inline(always)]
    unsafe fn zero() -> __m512i {
        // SAFETY: the contract of `Dot`, here and below.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn left(p: *const u8) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn right(p: *const i8) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn right_some(p: *const i8, count: usize) -> __m512i {
        // SAFETY: as above; bytes that are not asked for are not touched.
        unsafe { _mm512_maskz_loadu_epi8((1 << count) - 1, p) }
    }

    #[inline(always)]
    unsafe fn dot(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_dpbusd_epi32(sum, a, b) }
    }

    #[inline(always)]
    unsafe fn totals(sums: [__m512i; 4]) -> [i32; 4] {
        // SAFETY: as above.
        unsafe { totals(sums) }
    }

    unsafe fn run<F: Finish>(job: &Job<'_, Self, F>, its: Part<'_, F::Out>) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
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
    type A = __m512i;
    type B = __m512i;
    type Sum = __m512i;
    type Floats = Floats;
    const STEP: usize = 32;
    const BIAS: i32 = 0;
    const ROWS: usize = 6;
    const FLOAT_ROWS: usize = 4;
    const ONE: i16 = 1;
    packed_panels!();

    #[inline(always)]
    fn encode(code: i8) -> i16 {
        code.into()
    }

    #[inline(always)]
    unsafe fn zero() -> __m512i {
        // SAFETY: the contract of `Dot`, here and below.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn left(p: *const i16) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn right(p: *const i8) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn right_some(p: *const i8, count: usize) -> __m512i {
        // SAFETY: as above; bytes that are not asked for are not touched.
        unsafe { _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1 << count) - 1, p)) }
    }

    #[inline(always)]
    unsafe fn dot(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above. Two products of codes are far from the limits of 32 bits.
        unsafe { _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)) }
    }

    #[inline(always)]
    unsafe fn totals(sums: [__m512i; 4]) -> [i32; 4] {
        // SAFETY: as above.
        unsafe { totals(sums) }
    }

    unsafe fn run<F: Finish>(job: &Job<'_, Self, F>, its: Part<'_, F::Out>) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        unsafe fn compiled<F: Finish>(job: &Job<'_, Words, F>, its: Part<'_, F::Out>) {
            // SAFETY: passed on.
            unsafe { part(job, its) }
        }
        // SAFETY: passed on.
        unsafe { compiled(job, its) }
    }
}
