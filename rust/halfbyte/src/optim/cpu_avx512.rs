//! Codes with AVX-512; elements go as with AVX2, which keeps up with the memory.

use std::arch::x86_64::*;

use super::cpu_avx2::{Avx2, factor};
use super::cpu_block::{Block, Ways, update};
use super::rules::Law;
use super::{BLOCK, Floats, FloatsMut, Scalars};
use crate::codebook::dynamic_map;
use crate::eight_bit::carry::{Carry, LEAST, offset};

/// The level's ways. Whoever calls them has checked [`crate::device::cpu::Level::Avx512`].
pub(super) struct Avx512;

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn decode(codes: &[u8], signed: bool, scale: f32, to: &mut Block) {
    let map = dynamic_map(signed);
    let scales = _mm512_set1_ps(scale);
    let whole = codes.len() - codes.len() % 16;
    for i in (0..whole).step_by(16) {
        // SAFETY: sixteen codes from `i` on, each less than 256, and sixteen numbers.
        unsafe {
            let indices = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().add(i).cast()));
            let values = _mm512_i32gather_ps::<4>(indices, map.as_ptr());
            _mm512_storeu_ps(to.as_mut_ptr().add(i), _mm512_mul_ps(values, scales));
        }
    }
    to[whole..].iter_mut().zip(&codes[whole..]).for_each(|(to, &code)| *to = map[usize::from(code)] * scale);
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn encode<const SIGNED: bool, const PLACE: u32, const UP: u32>(from: &Block, codes: &mut [u8]) -> f32 {
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    // SAFETY: a block is a multiple of sixteen numbers.
    let at = |i: usize| unsafe { _mm512_loadu_ps(from.as_ptr().add(i)) };
    let mut most = _mm512_setzero_si512();
    for i in (0..from.len()).step_by(16) {
        most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(at(i)), magnitude));
    }
    let (factor, stored) = factor(_mm512_reduce_max_epi32(most) as u32);
    let (factor, one) = (_mm512_set1_ps(factor), _mm512_set1_ps(1.0));
    let (least, offset) = (_mm512_set1_epi32(LEAST), _mm512_set1_epi32(offset(SIGNED)));
    let table = Carry::of(SIGNED).entries.as_ptr().cast();
    let mut made = [0u8; 256];
    for i in (0..codes.len()).step_by(16) {
        // Of a NaN and a number the minimum is the second operand, the number.
        let bits = _mm512_castps_si512(_mm512_mul_ps(at(i), factor));
        let size = _mm512_castps_si512(_mm512_min_ps(_mm512_castsi512_ps(_mm512_and_si512(bits, magnitude)), one));
        let mut order = _mm512_sub_epi32(_mm512_max_epi32(size, least), least);
        if SIGNED {
            order = _mm512_xor_si512(order, _mm512_srai_epi32::<31>(bits));
        }
        let rows = _mm512_add_epi32(_mm512_srai_epi32::<PLACE>(order), offset);
        // SAFETY: magnitudes up to 1 are rows of the table.
        let entries = unsafe { _mm512_i32gather_epi32::<4>(rows, table) };
        let code = _mm512_srli_epi32::<24>(_mm512_add_epi32(entries, _mm512_slli_epi32::<UP>(order)));
        // SAFETY: `made` is as long as a block.
        unsafe { _mm_storeu_si128(made.as_mut_ptr().add(i).cast(), _mm512_cvtepi32_epi8(code)) };
    }
    codes.copy_from_slice(&made[..codes.len()]);
    stored
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
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

impl Ways for Avx512 {
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
        Avx2::load(from, to);
    }

    #[inline(always)]
    fn store(from: &Block, to: FloatsMut<'_>) {
        Avx2::store(from, to);
    }

    #[inline(always)]
    fn decode(codes: &[u8], signed: bool, scale: f32, to: &mut Block) {
        // SAFETY: the CPU has the level.
        unsafe { decode(codes, signed, scale, to) }
    }

    #[inline(always)]
    fn encode(from: &Block, signed: bool, codes: &mut [u8]) -> f32 {
        // SAFETY: the CPU has the level.
        unsafe { if signed { encode::<true, 17, 7>(from, codes) } else { encode::<false, 16, 8>(from, codes) } }
    }
}
