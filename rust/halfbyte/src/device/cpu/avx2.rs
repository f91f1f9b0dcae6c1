//! Elements in and out of AVX2 vectors, and other things that every operation needs.
//!
//! Functions here are compiled for AVX2 and F16C; calling them is `unsafe` from code that is not, and sound once
//! [`super::Level::check`] has passed.

use std::arch::x86_64::*;

use crate::element::{Dtype, Element};

/// Eight elements, widened exactly.
///
/// # Safety
/// Eight elements at `p`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(crate) unsafe fn load<T: Element>(p: *const T) -> __m256 {
    // SAFETY: `Element` is sealed, and its tag tells what `T` is.
    unsafe {
        match T::DTYPE {
            Dtype::F32 => _mm256_loadu_ps(p.cast()),
            Dtype::F16 => _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
            Dtype::Bf16 => {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))))
            }
        }
    }
}

/// Eight bf16 numbers, rounded to nearest even. NaN is made quiet and keeps the upper bits of its payload.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn to_bf16(v: __m256) -> __m128i {
    let bits = _mm256_castps_si256(v);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
    let upper = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
    // Packing works within halves: bring the two results together.
    let packed = _mm256_packus_epi32(upper, upper);
    _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b1000>(packed))
}

/// Rounds eight numbers to nearest even and writes them.
///
/// # Safety
/// Room for eight elements at `p`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(crate) unsafe fn store<T: Element>(p: *mut T, v: __m256) {
    // SAFETY: as in `load`.
    unsafe {
        match T::DTYPE {
            Dtype::F32 => _mm256_storeu_ps(p.cast(), v),
            Dtype::F16 => _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)),
            Dtype::Bf16 => _mm_storeu_si128(p.cast(), to_bf16(v)),
        }
    }
}

/// Widens `x` exactly.
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn widen<T: Element>(x: &[T], wide: &mut [f32]) {
    let whole = x.len() - x.len() % 8;
    for (x, wide) in x.chunks_exact(8).zip(wide.chunks_exact_mut(8)) {
        // SAFETY: eight of each.
        unsafe { _mm256_storeu_ps(wide.as_mut_ptr(), load(x.as_ptr())) };
    }
    wide[whole..].iter_mut().zip(&x[whole..]).for_each(|(wide, x)| *wide = x.to_f32());
}

/// The largest of eight non-negative numbers.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn largest_i32(v: __m256i) -> u32 {
    let four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
    _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two))) as u32
}

/// The largest of 16.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn largest_u16(v: __m256i) -> u16 {
    let eight = _mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    // There is an instruction for the smallest of eight: complement before and after.
    let smallest = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi32(-1)));
    !(_mm_cvtsi128_si32(smallest) as u16)
}

/// The value of the bits of an `f16` or `bf16`.
#[inline]
#[target_feature(enable = "f16c")]
pub(crate) fn from_bits16<T: Element>(bits: u16) -> f32 {
    match T::DTYPE {
        Dtype::F16 => _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))),
        _ => f32::from_bits(u32::from(bits) << 16),
    }
}
