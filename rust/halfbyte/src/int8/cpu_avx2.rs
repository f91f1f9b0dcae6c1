//! Dot products of codes with AVX2, and with AVX-VNNI's instruction for bytes where the CPU has it.

use std::arch::x86_64::*;

use super::cpu_product::{Job, PANEL, Part, Sink, part};
use super::cpu_vector::{Bytes, Vector, Words};
use crate::four_bit::cpu_avx2::Avx2 as Floats;

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

impl Vector for __m256i {
    type Floats = Floats;
    const BYTES: usize = 32;
    const ROWS: usize = 2;
    const FLOAT_ROWS: usize = 2;
    // Four would leave no register over, and compilers move sums about then.
    const PACKED_ROWS: usize = 3;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the contract of `Vector`, here and below.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn splat_i8(byte: i8) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_set1_epi8(byte) }
    }

    #[inline(always)]
    unsafe fn splat_i16(word: i16) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_set1_epi16(word) }
    }

    #[inline(always)]
    unsafe fn splat_i32(lane: i32) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_set1_epi32(lane) }
    }

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        // SAFETY: as above.
        unsafe { _mm256_storeu_si256(p.cast(), self) }
    }

    #[inline(always)]
    unsafe fn load_some(p: *const i8, count: usize) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_loadu_si256(some::<32>(p, count).as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn widen(p: *const i8) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn widen_some(p: *const i8, count: usize) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(some::<16>(p, count).as_ptr().cast())) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_xor_si256(self, other) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_add_epi32(self, other) }
    }

    #[inline(always)]
    unsafe fn dot_bytes(self, unsigned: Self, signed: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_dpbusd_avx_epi32(self, unsigned, signed) }
    }

    #[inline(always)]
    unsafe fn dot_words(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { _mm256_madd_epi16(self, other) }
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
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        unsafe fn compiled(job: &Job<'_, Bytes<__m256i>>, its: Part, sink: &mut Sink<'_>) {
            // SAFETY: passed on.
            unsafe { part(job, its, sink) }
        }
        // SAFETY: as above.
        unsafe { compiled(job, its, sink) }
    }

    #[inline(always)]
    unsafe fn run_words(job: &Job<'_, Words<Self>>, its: Part, sink: &mut Sink<'_>) {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn compiled(job: &Job<'_, Words<__m256i>>, its: Part, sink: &mut Sink<'_>) {
            // SAFETY: passed on.
            unsafe { part(job, its, sink) }
        }
        // SAFETY: as above.
        unsafe { compiled(job, its, sink) }
    }
}
