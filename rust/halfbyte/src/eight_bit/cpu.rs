//! Blockwise 8-bit on the CPU at a chosen level. [`super::quantize_into`] and its inverse choose the best one.

#[cfg(target_arch = "x86_64")]
use super::cpu_avx2;
use super::nearest::Nearest;
use super::reference::{most_of, on_grid, scaling};
use super::{Rounding, check, check_map};
use crate::codebook::{Map, dynamic_map};
use crate::device::cpu::{Level, for_each_task, share};
use crate::element::Element;
use crate::error::Result;

/// Values below which a second thread does not pay.
const GRAIN: usize = 1 << 15;

/// Values below which making buckets for an unknown map does not pay.
const WORTH_BUCKETS: usize = 1 << 14;

/// [`super::quantize_into`] at a level.
pub fn quantize<T: Element>(
    level: Level,
    a: &[T],
    map: &Map,
    block: usize,
    offset: f32,
    rounding: Rounding,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    level.check()?;
    check(a.len(), block, codes.len(), absmax.len())?;
    check_map(map)?;
    let made;
    let nearest = if let Some(known) = Nearest::known(map) {
        known
    } else {
        made = if a.len() < WORTH_BUCKETS { Nearest::points_only(map) } else { Nearest::new(map) };
        &made
    };
    let blocks = share(absmax.len(), GRAIN / block);
    let each = blocks.saturating_mul(block);
    let tasks = a.chunks(each).zip(codes.chunks_mut(each)).zip(absmax.chunks_mut(blocks));
    for_each_task(tasks.collect(), |((a, codes), absmax)| match (level, &nearest.buckets) {
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2 | Level::Avx512, Some(buckets)) => {
            // SAFETY: `level.check()` has passed, and both levels have AVX2.
            unsafe { cpu_avx2::quantize(a, &nearest.points, buckets, block, offset, rounding, codes, absmax) }
        }
        _ => by_search(a, nearest, block, offset, rounding, codes, absmax),
    });
    Ok(())
}

/// Codes in a dynamic map of a block of at most 256 values, and the block's scale: for any CPU.
pub(crate) fn encode_dynamic(values: &[f32], signed: bool, codes: &mut [u8]) -> f32 {
    let nearest = Nearest::known(dynamic_map(signed)).expect("a dynamic map is known");
    let (scaling, stored) = scaling(Rounding::Nearest, most_of(Rounding::Nearest, values.iter().copied()), true);
    codes.iter_mut().zip(values).for_each(|(code, &v)| *code = nearest.search(scaling.apply(v)));
    stored
}

/// [`super::reference::quantize`] with a binary search: for any CPU and any map.
fn by_search<T: Element>(
    a: &[T],
    nearest: &Nearest,
    block: usize,
    offset: f32,
    rounding: Rounding,
    codes: &mut [u8],
    absmax: &mut [f32],
) {
    for ((values, codes), absmax) in a.chunks(block).zip(codes.chunks_mut(block)).zip(absmax) {
        let most = most_of(rounding, values.iter().map(|v| v.to_f32() - offset));
        let (scaling, stored) = scaling(rounding, most, values.len() == block);
        *absmax = stored;
        for (v, code) in values.iter().zip(codes) {
            let scaled = scaling.apply(v.to_f32() - offset);
            *code = nearest.search(if rounding == Rounding::Grid { on_grid(scaled) } else { scaled });
        }
    }
}

/// [`super::dequantize_into`] at a level.
pub fn dequantize<T: Element>(
    level: Level,
    codes: &[u8],
    map: &Map,
    absmax: &[f32],
    block: usize,
    offset: f32,
    out: &mut [T],
) -> Result<()> {
    level.check()?;
    check(out.len(), block, codes.len(), absmax.len())?;
    let blocks = share(absmax.len(), GRAIN / block);
    let each = blocks.saturating_mul(block);
    let tasks = codes.chunks(each).zip(out.chunks_mut(each)).zip(absmax.chunks(blocks));
    for_each_task(tasks.collect(), |((codes, out), absmax)| match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 => {
            // SAFETY: `level.check()` has passed, and both levels have AVX2.
            unsafe { cpu_avx2::dequantize(codes, map, absmax, block, offset, out) }
        }
        _ => {
            for ((codes, out), &scale) in codes.chunks(block).zip(out.chunks_mut(block)).zip(absmax) {
                for (out, &code) in out.iter_mut().zip(codes) {
                    *out = T::from_f32(map[usize::from(code)] * scale + offset);
                }
            }
        }
    });
    Ok(())
}
