//! Elements and codes with AVX2.

use std::arch::x86_64::*;

use super::cpu_block::{Block, Ways, update};
use super::data::each;
use super::rules::Law;
use super::{BLOCK, Floats, FloatsMut, Scalars};
use crate::codebook::dynamic_map;
use crate::device::cpu::avx2::{largest_i32, load, store};
use crate::eight_bit::Rounding;
use crate::eight_bit::carry::{Carry, LEAST, offset, shift};
use crate::eight_bit::reference::{Scaling, scaling};
use crate::element::Element;

/// The level's ways. Whoever calls them has checked [`crate::device::cpu::Level::Avx2`].
pub(super) struct Avx2;

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widen<T: Element>(from: &[T], to: &mut Block) {
    let whole = from.len() - from.len() % 8;
    for i in (0..whole).step_by(8) {
        // SAFETY: eight elements from `i` on in both.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr().add(i), load(from.as_ptr().add(i))) };
    }
    to[whole..].iter_mut().zip(&from[whole..]).for_each(|(to, v)| *to = v.to_f32());
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn narrow<T: Element>(from: &Block, to: &mut [T]) {
    let whole = to.len() - to.len() % 8;
    for i in (0..whole).step_by(8) {
        // SAFETY: eight elements from `i` on in both.
        unsafe { store(to.as_mut_ptr().add(i), _mm256_loadu_ps(from.as_ptr().add(i))) };
    }
    to[whole..].iter_mut().zip(&from[whole..]).for_each(|(to, v)| *to = T::from_f32(*v));
}

#[inline]
#[target_feature(enable = "avx2")]
fn decode(codes: &[u8], signed: bool, scale: f32, to: &mut Block) {
    let map = dynamic_map(signed);
    let scales = _mm256_set1_ps(scale);
    let whole = codes.len() - codes.len() % 8;
    for i in (0..whole).step_by(8) {
        // SAFETY: eight codes from `i` on, each less than 256, and eight numbers.
        unsafe {
            let indices = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().add(i).cast()));
            let values = _mm256_i32gather_ps::<4>(map.as_ptr(), indices);
            _mm256_storeu_ps(to.as_mut_ptr().add(i), _mm256_mul_ps(values, scales));
        }
    }
    to[whole..].iter_mut().zip(&codes[whole..]).for_each(|(to, &code)| *to = map[usize::from(code)] * scale);
}

/// How a block's values are brought to [−1, 1], and the scale to store.
pub(super) fn factor(most: u32) -> (f32, f32) {
    match scaling(Rounding::Nearest, f32::from_bits(most), true) {
        (Scaling::Multiply(factor) | Scaling::Divide(factor), stored) => (factor, stored),
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn encode<const SIGNED: bool, const PLACE: i32, const UP: i32>(from: &Block, codes: &mut [u8]) -> f32 {
    let magnitude = _mm256_set1_epi32(0x7fff_ffff);
    // SAFETY: a block is a multiple of eight numbers.
    let at = |i: usize| unsafe { _mm256_loadu_ps(from.as_ptr().add(i)) };
    let mut most = _mm256_setzero_si256();
    for i in (0..from.len()).step_by(8) {
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(at(i)), magnitude));
    }
    let (factor, stored) = factor(largest_i32(most));
    let (factor, one) = (_mm256_set1_ps(factor), _mm256_set1_ps(1.0));
    let (least, offset) = (_mm256_set1_epi32(LEAST), _mm256_set1_epi32(offset(SIGNED)));
    let table = Carry::of(SIGNED).entries.as_ptr().cast();
    let mut made = [0u8; 256];
    for i in (0..codes.len()).step_by(8) {
        // Of a NaN and a number the minimum is the second operand, the number.
        let bits = _mm256_castps_si256(_mm256_mul_ps(at(i), factor));
        let size = _mm256_castps_si256(_mm256_min_ps(_mm256_castsi256_ps(_mm256_and_si256(bits, magnitude)), one));
        let mut order = _mm256_sub_epi32(_mm256_max_epi32(size, least), least);
        if SIGNED {
            order = _mm256_xor_si256(order, _mm256_srai_epi32::<31>(bits));
        }
        let rows = _mm256_add_epi32(_mm256_srai_epi32::<PLACE>(order), offset);
        // SAFETY: magnitudes up to 1 are rows of the table.
        let entries = unsafe { _mm256_i32gather_epi32::<4>(table, rows) };
        let code = _mm256_srli_epi32::<24>(_mm256_add_epi32(entries, _mm256_slli_epi32::<UP>(order)));
        let pairs = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(code, code));
        let bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm_setzero_si128());
        // SAFETY: `made` is as long as a block.
        unsafe { _mm_storel_epi64(made.as_mut_ptr().add(i).cast(), bytes) };
    }
    codes.copy_from_slice(&made[..codes.len()]);
    stored
}

const _: () = assert!(shift(true) == 17 && shift(false) == 16);

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn update_vectors<L: Law>(
    w: &Block,
    g: &Block,
    states: &mut [Block; 3],
    updates: &mut Block,
    sound: &mut [u32; BLOCK],
    k: &Scalars,
    scaling: (f32, bool),
) {
    update::<L>(w, g, states, updates, sound, k, scaling);
}

impl Ways for Avx2 {
    #[inline(always)]
    fn update<L: Law>(
        w: &Block,
        g: &Block,
        states: &mut [Block; 3],
        updates: &mut Block,
        sound: &mut [u32; BLOCK],
        k: &Scalars,
        scaling: (f32, bool),
    ) {
        // SAFETY: the CPU has the level.
        unsafe { update_vectors::<L>(w, g, states, updates, sound, k, scaling) }
    }

    #[inline(always)]
    fn load(from: Floats<'_>, to: &mut Block) {
        // SAFETY: the CPU has the level, as for all below.
        each!(Floats, from, a => unsafe { widen(a, to) });
    }

    #[inline(always)]
    fn store(from: &Block, to: FloatsMut<'_>) {
        // SAFETY: see `load`.
        each!(FloatsMut, to, a => unsafe { narrow(from, a) });
    }

    #[inline(always)]
    fn decode(codes: &[u8], signed: bool, scale: f32, to: &mut Block) {
        // SAFETY: see `load`.
        unsafe { decode(codes, signed, scale, to) }
    }

    #[inline(always)]
    fn encode(from: &Block, signed: bool, codes: &mut [u8]) -> f32 {
        // SAFETY: see `load`.
        unsafe { if signed { encode::<true, 17, 7>(from, codes) } else { encode::<false, 16, 8>(from, codes) } }
    }
}
