//! Rows in and out of codes of LLM.int8() with AVX2. The AVX-512 level comes here too: memory binds these.
//!
//! Functions here are compiled for AVX2 and F16C; calling them is sound once [`crate::device::cpu::Level::check`] has passed.

use std::arch::x86_64::*;

use super::reference::{self, UNIT, UNIT2};
use crate::device::cpu::avx2::{from_bits16, largest_i32, largest_u16, load, store};
use crate::element::{Dtype, Element};

// Loops by hand: iterators may stay calls in a build of several codegen units, which costs a factor of ten.

/// Values that are worked on together.
const RUN: usize = 32;

/// Runs with outliers up to which those are made 0 one by one; with more, the whole row is compared.
const FEW: usize = 32;

/// Where there are outliers: the number of the first value of a run, and a bit for each of the run.
pub(super) type Found = Vec<(usize, u32)>;

/// A row: its codes, and its statistic as result. With a bitmap, values from `threshold` on in magnitude are outliers: they get
/// code 0, and their columns are set in it. `found` is overwritten.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn quantize_row<T: Element>(
    x: &[T],
    threshold: f32,
    codes: &mut [i8],
    outliers: Option<&mut [u32]>,
    found: &mut Found,
) -> f32 {
    found.clear();
    let (x, tail) = x.split_at(x.len() - x.len() % RUN);
    let (codes, tail_codes) = codes.split_at_mut(x.len());
    // What is missing to a whole run is zeros, which change nothing.
    let mut last = [T::default(); RUN];
    last[..tail.len()].copy_from_slice(tail);
    let most = match (T::DTYPE, outliers.is_some()) {
        (Dtype::F32, false) => largest_wide::<T, false>(x, &last, threshold, found),
        (Dtype::F32, true) => largest_wide::<T, true>(x, &last, threshold, found),
        (_, false) => largest_narrow::<T, false>(x, &last, threshold, found),
        (_, true) => largest_narrow::<T, true>(x, &last, threshold, found),
    };
    if let Some(outliers) = outliers {
        for &(run, bits) in &*found {
            outliers[run / RUN] |= bits;
        }
    }
    let stat = if most.is_nan() { f32::NAN } else { most };
    let factor = reference::factor(stat);
    if stat.is_nan() || stat.is_infinite() {
        // No product with 127 / stat is a number other than 0.
        codes.fill(0);
        tail_codes.fill(0);
        return stat;
    }
    let mut last_codes = [0; RUN];
    if factor.is_infinite() {
        // A statistic of 0, or nearly.
        codes.iter_mut().zip(x).for_each(|(code, v)| *code = reference::code(v.to_f32(), stat));
        tail_codes.iter_mut().zip(tail).for_each(|(code, v)| *code = reference::code(v.to_f32(), stat));
    } else if found.len() > FEW {
        encode::<T, true>(x, factor, threshold, codes);
        encode::<T, true>(&last, factor, threshold, &mut last_codes);
        tail_codes.copy_from_slice(&last_codes[..tail.len()]);
        return stat;
    } else {
        encode::<T, false>(x, factor, threshold, codes);
        encode::<T, false>(&last, factor, threshold, &mut last_codes);
        tail_codes.copy_from_slice(&last_codes[..tail.len()]);
    }
    for &(run, bits) in &*found {
        let codes = if run < x.len() { &mut codes[run..] } else { &mut *tail_codes };
        codes.iter_mut().take(RUN).enumerate().filter(|(i, _)| bits >> i & 1 == 1).for_each(|(_, code)| *code = 0);
    }
    stat
}

/// The largest magnitude, without outliers if there can be some, in whole runs and the last one; NaN if there is one.
#[target_feature(enable = "avx2,f16c")]
fn largest_wide<T: Element, const OUTLIERS: bool>(x: &[T], last: &[T; RUN], threshold: f32, found: &mut Found) -> f32 {
    let (magnitude, limit) = (_mm256_set1_epi32(0x7fff_ffff), _mm256_set1_ps(threshold));
    let mut most = _mm256_setzero_si256();
    let mut run = 0;
    while run <= x.len() / RUN {
        let p = if run < x.len() / RUN { x[run * RUN..][..RUN].as_ptr() } else { last.as_ptr() };
        let mut outs = [_mm256_setzero_ps(); 4];
        let mut i = 0;
        while i < 4 {
            // SAFETY: a run is four times eight elements.
            let mut bits = _mm256_and_si256(_mm256_castps_si256(unsafe { load(p.add(8 * i)) }), magnitude);
            if OUTLIERS {
                // False for NaN, which so counts for the statistic.
                outs[i] = _mm256_cmp_ps::<_CMP_GE_OQ>(_mm256_castsi256_ps(bits), limit);
                bits = _mm256_andnot_si256(_mm256_castps_si256(outs[i]), bits);
            }
            // As integers, the bits of NaN are above those of every number.
            most = _mm256_max_epi32(most, bits);
            i += 1;
        }
        let any = _mm256_or_ps(_mm256_or_ps(outs[0], outs[1]), _mm256_or_ps(outs[2], outs[3]));
        if OUTLIERS && _mm256_movemask_ps(any) != 0 {
            let bytes = [0, 1, 2, 3].map(|i| _mm256_movemask_ps(outs[i]) as u8);
            found.push((run * RUN, u32::from_le_bytes(bytes)));
        }
        run += 1;
    }
    f32::from_bits(largest_i32(most))
}

/// [`largest_wide`] for types of 16 bits, whose magnitudes have the order of their bits.
#[target_feature(enable = "avx2,f16c")]
fn largest_narrow<T: Element, const OUTLIERS: bool>(
    x: &[T],
    last: &[T; RUN],
    threshold: f32,
    found: &mut Found,
) -> f32 {
    // Outliers are those above `below` and not above `infinity`: NaN is none.
    let infinity = bits16(T::from_f32(f32::INFINITY));
    let nearest = T::from_f32(threshold);
    let below = bits16(nearest) - i16::from(nearest.to_f32() >= threshold);
    let (below, infinity) = (_mm256_set1_epi16(below), _mm256_set1_epi16(infinity));
    let magnitude = _mm256_set1_epi16(0x7fff);
    let mut most = _mm256_setzero_si256();
    let mut run = 0;
    while run <= x.len() / RUN {
        let p = if run < x.len() / RUN { x[run * RUN..][..RUN].as_ptr() } else { last.as_ptr() };
        let mut outs = [_mm256_setzero_si256(); 2];
        let mut i = 0;
        while i < 2 {
            // SAFETY: a run is twice sixteen elements, of 16 bits each.
            let mut bits = _mm256_and_si256(unsafe { _mm256_loadu_si256(p.add(16 * i).cast()) }, magnitude);
            if OUTLIERS {
                outs[i] = _mm256_andnot_si256(_mm256_cmpgt_epi16(bits, infinity), _mm256_cmpgt_epi16(bits, below));
                bits = _mm256_andnot_si256(outs[i], bits);
            }
            most = _mm256_max_epu16(most, bits);
            i += 1;
        }
        if OUTLIERS && _mm256_movemask_epi8(_mm256_or_si256(outs[0], outs[1])) != 0 {
            // Packing works within halves: bring the quarters in order.
            let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi16(outs[0], outs[1]));
            found.push((run * RUN, _mm256_movemask_epi8(bytes) as u32));
        }
        run += 1;
    }
    from_bits16::<T>(largest_u16(most))
}

/// The bits of a number of 16 that is not negative.
fn bits16<T: Element>(v: T) -> i16 {
    debug_assert!(size_of::<T>() == 2);
    // SAFETY: the callers' types have 16 bits, all of which are set.
    unsafe { (&raw const v).cast::<i16>().read() }
}

/// The codes of whole runs whose statistic is a finite number. With OUTLIERS, those get 0; else their codes mean nothing.
#[target_feature(enable = "avx2,f16c")]
fn encode<T: Element, const OUTLIERS: bool>(x: &[T], factor: f32, threshold: f32, codes: &mut [i8]) {
    let (factor, limit) = (_mm256_set1_ps(factor), _mm256_set1_ps(threshold));
    let magnitude = _mm256_set1_ps(f32::from_bits(0x7fff_ffff));
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let whole = x.len() - x.len() % RUN;
    assert!(codes.len() >= whole);
    let mut run = 0;
    while run < whole {
        let mut wide = [_mm256_setzero_si256(); 4];
        let mut i = 0;
        while i < 4 {
            // SAFETY: a run is four times eight elements.
            let v = unsafe { load(x.as_ptr().add(run + 8 * i)) };
            // A magnitude up to the statistic's, times 127 over that: 127 at most, when rounded. There is no NaN.
            wide[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v, factor));
            if OUTLIERS {
                let out = _mm256_cmp_ps::<_CMP_GE_OQ>(_mm256_and_ps(v, magnitude), limit);
                wide[i] = _mm256_andnot_si256(_mm256_castps_si256(out), wide[i]);
            }
            i += 1;
        }
        // Packing works within halves: put the groups of four in order.
        let words = (_mm256_packs_epi32(wide[0], wide[1]), _mm256_packs_epi32(wide[2], wide[3]));
        let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words.0, words.1), order);
        // SAFETY: room for 32 codes from `run` on, as asserted.
        unsafe { _mm256_storeu_si256(codes.as_mut_ptr().add(run).cast(), bytes) };
        run += RUN;
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
    let mut i = 0;
    while i < whole {
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
        i += 8;
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
    assert!(codes.len() >= whole);
    let mut i = 0;
    while i < whole {
        // SAFETY: eight codes from `i` on, and room for eight elements.
        unsafe {
            let wide = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(codes.as_ptr().add(i).cast())));
            store(out.as_mut_ptr().add(i), _mm256_mul_ps(_mm256_mul_ps(wide, scale), unit));
        }
        i += 8;
    }
    reference::dequantize(&codes[whole..], codes.len().max(1), &[stat], &mut out[whole..]);
}
