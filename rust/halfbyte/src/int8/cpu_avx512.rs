//! Dot products of codes with AVX-512: VNNI's instruction for bytes where the CPU has it, else widened to 16 bits.

use std::arch::x86_64::*;

use super::cpu_product::{Job, PANEL, Part, Sink, part};
use super::cpu_vector::{Bytes, Vector, Words};
use crate::four_bit::cpu_avx512::Avx512 as Floats;

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

impl Vector for __m512i {
    type Floats = Floats;
    const BYTES: usize = 64;
    const ROWS: usize = 6;
    const FLOAT_ROWS: usize = 4;
    const PACKED_ROWS: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the contract of `Vector`, here and below.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn splat_i8(byte: i8) -> Self {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi8(byte) }
    }

    #[inline(always)]
    unsafe fn splat_i16(word: i16) -> Self {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi16(word) }
    }

    #[inline(always)]
    unsafe fn splat_i32(lane: i32) -> Self {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi32(lane) }
    }

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        // SAFETY: as above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(p.cast(), self) }
    }

    #[inline(always)]
    unsafe fn load_some(p: *const i8, count: usize) -> Self {
        // SAFETY: as above; bytes that are not asked for are not touched.
        unsafe { _mm512_maskz_loadu_epi8((1 << count) - 1, p) }
    }

    #[inline(always)]
    unsafe fn widen(p: *const i8) -> Self {
        // SAFETY: as above.
        unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn widen_some(p: *const i8, count: usize) -> Self {
        // SAFETY: as above; bytes that are not asked for are not touched.
        unsafe { _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1 << count) - 1, p)) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm512_xor_si512(self, other) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm512_add_epi32(self, other) }
    }

    #[inline(always)]
    unsafe fn dot_bytes(self, unsigned: Self, signed: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm512_dpbusd_epi32(self, unsigned, signed) }
    }

    #[inline(always)]
    unsafe fn dot_words(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm512_madd_epi16(self, other) }
    }

    #[inline(always)]
    unsafe fn totals(vectors: [Self; 4]) -> [i32; 4] {
        // SAFETY: as above.
        unsafe { totals(vectors) }
    }

    #[inline(always)]
    unsafe fn transpose(vectors: &[Self], p: *mut i32) {
        let vectors = vectors.first_chunk().expect("as many vectors as lanes");
        // SAFETY: as above.
        unsafe { transpose(vectors, p) }
    }

    #[inline(always)]
    unsafe fn run_bytes(job: &Job<'_, Bytes<Self>>, its: Part, sink: &mut Sink<'_>) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        unsafe fn compiled(job: &Job<'_, Bytes<__m512i>>, its: Part, sink: &mut Sink<'_>) {
            // SAFETY: passed on.
            unsafe { part(job, its, sink) }
        }
        // SAFETY: as above.
        unsafe { compiled(job, its, sink) }
    }

    #[inline(always)]
    unsafe fn run_words(job: &Job<'_, Words<Self>>, its: Part, sink: &mut Sink<'_>) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        unsafe fn compiled(job: &Job<'_, Words<__m512i>>, its: Part, sink: &mut Sink<'_>) {
            // SAFETY: passed on.
            unsafe { part(job, its, sink) }
        }
        // SAFETY: as above.
        unsafe { compiled(job, its, sink) }
    }
}
