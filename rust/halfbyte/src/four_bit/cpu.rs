//! 4-bit on the CPU at a chosen level. [`super::quantize_into`] and the others choose the best one.
//!
//! Here work is divided among threads and handed to the code of the level: [`super::cpu_avx2`], [`super::cpu_avx512`], and
//! [`super::cpu_matmul`] with the vectors of either or with portable ones.

use std::ops::Range;
use std::slice;

use super::cpu_lanes::Portable;
use super::cpu_matmul::{self as product, Part, TOGETHER, Weight};
use super::cpu_scales::Scales;
use super::reference::code_at;
use super::{check_dequantize, check_experts, check_matmul, check_quantize, reference};
#[cfg(target_arch = "x86_64")]
use super::{cpu_avx2, cpu_avx512};
use crate::codebook::Kind;
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::avx2;
use crate::device::cpu::{Level, for_each_task, share};
use crate::element::{Dtype, Element};
use crate::error::Result;
use crate::layout::{Absmax, packed_len};

/// Weights below which a second thread does not pay.
const GRAIN: usize = 1 << 16;

/// Scales read at once.
const RUN: usize = 64;

/// [`super::quantize_into`] at a level.
pub fn quantize<T: Element>(
    level: Level,
    a: &[T],
    kind: Kind,
    block: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    level.check()?;
    check_quantize(a.len(), block, packed.len(), absmax.len())?;
    let packed = &mut packed[..packed_len(a.len())];
    let blocks = share(absmax.len(), GRAIN / block);
    let tasks = a.chunks(blocks * block).zip(packed.chunks_mut(blocks * block / 2)).zip(absmax.chunks_mut(blocks));
    for_each_task(tasks.collect(), |((a, packed), absmax)| match level {
        // SAFETY: `level.check()` has passed.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { cpu_avx512::quantize(a, kind, block, packed, absmax) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { cpu_avx2::quantize(a, kind, block, packed, absmax) },
        _ => reference::quantize(a, kind, block, packed, absmax),
    });
    Ok(())
}

/// [`super::dequantize_into`] at a level.
pub fn dequantize<T: Element>(
    level: Level,
    packed: &[u8],
    absmax: Absmax,
    kind: Kind,
    block: usize,
    out: &mut [T],
) -> Result<()> {
    level.check()?;
    check_dequantize(out.len(), block, packed.len(), &absmax)?;
    let packed = &packed[..packed_len(out.len())];
    let scales = Scales(absmax);
    let blocks = share(absmax.len(), GRAIN / block);
    let tasks = packed.chunks(blocks * block / 2).zip(out.chunks_mut(blocks * block)).enumerate();
    for_each_task(tasks.collect(), |(i, (packed, out))| {
        let mut read = [0.0; RUN];
        let runs = packed.chunks(RUN * block / 2).zip(out.chunks_mut(RUN * block)).enumerate();
        for (j, (packed, out)) in runs {
            let read = &mut read[..out.len().div_ceil(block)];
            scales.read(i * blocks + j * RUN, read);
            dequantize_run(level, packed, read, kind, block, out);
        }
    });
    Ok(())
}

/// Dequantizes some blocks. The level has been checked.
fn dequantize_run<T: Element>(level: Level, packed: &[u8], scales: &[f32], kind: Kind, block: usize, out: &mut [T]) {
    match (level, T::DTYPE) {
        // Bound by memory: vectors wider than AVX2's would bring nothing.
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2 | Level::Avx512, Dtype::F16 | Dtype::Bf16) => {
            let (groups, tail) = out.split_at_mut(out.len() - out.len() % 32);
            let (packed, tail_packed) = packed.split_at(groups.len() / 2);
            let last = scales.len() - 1;
            // SAFETY: the level has been checked, and both have AVX2.
            unsafe { cpu_avx2::dequantize16(packed, scales, kind, block, groups) };
            // Less than 32 weights, so all in the last block.
            reference::dequantize(tail_packed, Absmax::Plain(&scales[last..]), kind, block, tail);
        }
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2 | Level::Avx512, Dtype::F32) => {
            // SAFETY: `Element` is sealed and `T` is `f32`.
            let out = unsafe { slice::from_raw_parts_mut(out.as_mut_ptr().cast(), out.len()) };
            // SAFETY: the level has been checked, and both have AVX2.
            unsafe { cpu_avx2::decode(packed, kind, block, scales, out) };
        }
        _ => {
            for ((packed, out), scale) in packed.chunks(block / 2).zip(out.chunks_mut(block)).zip(scales) {
                let rounded = kind.values().map(|v| T::from_f32(v * scale));
                for (i, out) in out.iter_mut().enumerate() {
                    *out = rounded[code_at(packed, i)];
                }
            }
        }
    }
}

/// [`super::matmul_into`] at a level.
pub fn matmul<T: Element>(
    level: Level,
    x: &[T],
    (m, n, k): (usize, usize, usize),
    packed: &[u8],
    absmax: Absmax,
    kind: Kind,
    block: usize,
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    level.check()?;
    check_matmul((m, n, k), x.len(), packed.len(), &absmax, block, bias.map(<[T]>::len), out.len())?;
    rows(level, x, &Weight { packed, scales: Scales(absmax), kind, block, k }, 0..n, bias, out);
    Ok(())
}

/// [`super::matmul_experts_into`] at a level.
pub fn matmul_experts<T: Element>(
    level: Level,
    x: &[T],
    offsets: &[i32],
    (s, e, n, k): (usize, usize, usize, usize),
    packed: &[u8],
    absmax: Absmax,
    kind: Kind,
    block: usize,
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    level.check()?;
    check_experts((s, e, n, k), x.len(), offsets, packed.len(), &absmax, block, bias.map(<[T]>::len), out.len())?;
    let weight = Weight { packed, scales: Scales(absmax), kind, block, k };
    let (first, last) = (offsets[0] as usize, offsets[e] as usize);
    out[..first * n].fill(T::default());
    out[last * n..].fill(T::default());
    for (expert, ends) in offsets.windows(2).enumerate() {
        let (begin, end) = (ends[0] as usize, ends[1] as usize);
        // The stack is one matrix of E · N rows, and an expert N of them.
        let its_rows = expert * n..(expert + 1) * n;
        rows(level, &x[begin * k..end * k], &weight, its_rows, bias, &mut out[begin * n..end * n]);
    }
    Ok(())
}

/// `x` times some rows of `weight`; `bias` has one number for each row of the whole weight. Everything has been checked.
fn rows<T: Element>(
    level: Level,
    x: &[T],
    weight: &Weight,
    of_weight: Range<usize>,
    bias: Option<&[T]>,
    out: &mut [T],
) {
    let (n, k) = (of_weight.len(), weight.k);
    if out.is_empty() {
        return;
    }
    if k == 0 {
        let row = bias.map_or_else(|| vec![T::default(); n], |bias| bias[of_weight].to_vec());
        out.chunks_exact_mut(n).for_each(|out| out.copy_from_slice(&row));
        return;
    }
    for (x, out) in x.chunks(TOGETHER * k).zip(out.chunks_mut(TOGETHER * n)) {
        let rows = x.len() / k;
        let few = product::few_can(rows, k);
        let x = if few { widened(level, x) } else { tiles(level, x, k) };
        // A row of the weight is work for all rows of `x`; decoding it is about as much as multiplying it eight times.
        let columns = share(n, GRAIN / (k * rows.div_ceil(8)).max(1));
        let mut parts: Vec<_> =
            (of_weight.clone()).step_by(columns).map(|first| Part { first, rows: Vec::with_capacity(rows) }).collect();
        for row in out.chunks_exact_mut(n) {
            parts.iter_mut().zip(row.chunks_mut(columns)).for_each(|(part, row)| part.rows.push(row));
        }
        for_each_task(parts, |part| match (level, few) {
            // SAFETY: the level has been checked, here and below.
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, true) => unsafe { cpu_avx512::few(&x, weight, bias, part) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, false) => unsafe { cpu_avx512::many(&x, weight, bias, part) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, true) => unsafe { cpu_avx2::few(&x, weight, bias, part) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, false) => unsafe { cpu_avx2::many(&x, weight, bias, part) },
            // SAFETY: portable code needs no instructions.
            (_, true) => unsafe { product::few::<Portable, T>(&x, weight, bias, part) },
            // SAFETY: as above.
            (_, false) => unsafe { product::many::<Portable, T, 2>(&x, weight, bias, part) },
        });
    }
}

/// `x` in fp32.
fn widened<T: Element>(level: Level, x: &[T]) -> Vec<f32> {
    let mut wide = vec![0.0; x.len()];
    widen(level, x, &mut wide);
    wide
}

fn widen<T: Element>(level: Level, x: &[T], wide: &mut [f32]) {
    match level {
        // SAFETY: the level has been checked, and both have AVX2.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 => unsafe { avx2::widen(x, wide) },
        _ => wide.iter_mut().zip(x).for_each(|(wide, x)| *wide = x.to_f32()),
    }
}

/// `x` as [`product::many`] takes it: `[tile of rows][k][row]` in fp32, with zeros for rows that are not there.
fn tiles<T: Element>(level: Level, x: &[T], k: usize) -> Vec<f32> {
    /// Columns turned at once, so that what is written stays in the cache until all rows have been there.
    const STRIP: usize = 64;
    let tile = match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => product::tile_rows::<cpu_avx512::Avx512>(),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => product::tile_rows::<cpu_avx2::Avx2>(),
        _ => product::tile_rows::<Portable>(),
    };
    let mut tiles = vec![0.0; (x.len() / k).next_multiple_of(tile) * k];
    let together = share(tiles.len() / (tile * k), GRAIN / (tile * k));
    let tasks = x.chunks(together * tile * k).zip(tiles.chunks_mut(together * tile * k));
    for_each_task(tasks.collect(), |(x, tiles)| {
        let mut wide = [0.0; STRIP];
        for (x, tile_of_x) in x.chunks(tile * k).zip(tiles.chunks_exact_mut(tile * k)) {
            for (strip, first) in tile_of_x.chunks_mut(STRIP * tile).zip((0..k).step_by(STRIP)) {
                let wide = &mut wide[..strip.len() / tile];
                for (row, x) in x.chunks_exact(k).enumerate() {
                    widen(level, &x[first..first + wide.len()], wide);
                    strip[row..].iter_mut().step_by(tile).zip(&*wide).for_each(|(to, &from)| *to = from);
                }
            }
        }
    });
    tiles
}
