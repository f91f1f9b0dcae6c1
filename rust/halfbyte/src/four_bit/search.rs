//! Scales by least squared error: the same format, better codes.
//!
//! A block's scale need not be its largest magnitude *m*. Here it is `r · m`, where r is the one of 16 ratios and, for NF4 (whose
//! values are not symmetric), of two signs that makes the squared error least; and *m* itself where none of them is better.
//! A negative scale is nothing new to a reader: a weight is `value · scale`.
//!
//! **Choice.** With u = x / m, the error of a weight under ratio r is `(u − r · value)²` in units of m²: a function of u and r
//! alone. It is tabulated for u to 1/128 in steps of 2⁻¹¹, up to 63; under −r it is that of −u. So a weight is one index and two
//! rows of 16 bytes, and a block's errors are sums of integers, the same in any order and on any device. On the weights of a small
//! language model the choice comes within 0.5 % of the error of an exact one.
//!
//! **Guard.** The chosen scale and m then compete with their exact errors, in integers again (steps of 2⁻²⁰ m²), and m wins
//! unless it is worse by more than rounding could be. So no block's error is above that of plain quantization. Blocks whose
//! m is not in [2⁻¹⁰⁰, 2¹⁵] (zeros, NaN, infinities; above, fp16 could overflow) are plain.
//!
//! **Nested statistics** change the scales a little, so that codes are chosen again, for the scales that readers will decode.

use std::sync::OnceLock;

use super::reference::{self, absmax_of};
#[cfg(target_arch = "x86_64")]
use super::search_avx2;
use super::{Quantized, Spec, check_dequantize, check_quantize};
use crate::codebook::Kind;
use crate::device::cpu::{self, Level, for_each_task, share};
use crate::element::Element;
use crate::error::Result;
use crate::layout::{Absmax, packed_len};

/// Ratios that are tried, with each sign.
pub const RATIOS: usize = 16;
/// Steps of u from 0 to 1 in the table.
const STEPS: usize = 128;
/// Rows of a table: u from −1 to 1.
pub(super) const ROWS: usize = 2 * STEPS + 1;
/// What is added to `u · STEPS` so that the low bits of the sum are the row.
pub(super) const ROW_MAGIC: f32 = 8_388_608.0 + STEPS as f32;
/// Squared errors a unit of m² in the table, and the largest entry: four of them are less than 256.
const PER_UNIT: f32 = 2048.0;
const MOST: f32 = 63.0;
/// Of the guard: `(1024 · d)²` is d² in steps of 2⁻²⁰.
pub(super) const GUARD_SCALE: f32 = 1024.0;
pub(super) const GUARD_MAGIC: f32 = 8_388_608.0;
/// Weights below which a second thread does not pay.
const GRAIN: usize = 1 << 14;

/// What to try on a block, and what each try costs.
#[derive(Debug)]
pub(super) struct Table {
    /// Ratio of scale to m: the positive ones first.
    pub ratios: [f32; 2 * RATIOS],
    /// How many of them count.
    pub tries: usize,
    /// Errors under each ratio, by row of u.
    pub rows: [[u8; 2 * RATIOS]; ROWS],
}

/// The ratios for a block size, in hundredths. They fall with the size, as m grows beyond the bulk of the weights. NF4's small blocks
/// have less squared error with ratios up to 1.4 (by 1 %), but models lose less with these, which keep large weights exact.
fn hundredths(kind: Kind, block: usize) -> [u16; RATIOS] {
    const FIRST: [u16; 8] = [84, 82, 82, 78, 74, 68, 62, 56];
    let first = match (kind, block) {
        (Kind::Nf4, 32 | 64) => 76,
        _ => FIRST[block.trailing_zeros() as usize - 5],
    };
    std::array::from_fn(|k| first + 2 * k as u16)
}

impl Table {
    fn new(kind: Kind, block: usize) -> Self {
        let positive = hundredths(kind, block).map(|r| f32::from(r) / 100.0);
        let error = |row: usize, ratio: f32| {
            let u = (row as f32 - STEPS as f32) / STEPS as f32;
            let nearest = kind.values().iter().map(|v| (u - v * ratio).abs()).fold(f32::INFINITY, f32::min);
            (nearest * nearest * PER_UNIT).round_ties_even().min(MOST) as u8
        };
        let signed = |k: usize| if k < RATIOS { positive[k] } else { -positive[k - RATIOS] };
        Self {
            ratios: std::array::from_fn(signed),
            tries: if kind == Kind::Nf4 { 2 * RATIOS } else { RATIOS },
            rows: std::array::from_fn(|row| std::array::from_fn(|k| error(row, signed(k)))),
        }
    }

    /// The table for a block size, made at first use.
    pub(super) fn of(kind: Kind, block: usize) -> &'static Self {
        static TABLES: [[OnceLock<Box<Table>>; 8]; 2] = [const { [const { OnceLock::new() }; 8] }; 2];
        let of_kind = &TABLES[usize::from(kind == Kind::Fp4)];
        of_kind[block.trailing_zeros() as usize - 5].get_or_init(|| Box::new(Self::new(kind, block)))
    }

    /// The ratio whose sum is least; the first of equals.
    pub(super) fn best(&self, sums: &[u32; 2 * RATIOS]) -> f32 {
        let best = (0..self.tries).min_by_key(|&k| sums[k]).unwrap_or(0);
        self.ratios[best]
    }
}

/// Whether a block of this largest magnitude is searched.
pub(super) fn searchable(most: f32) -> bool {
    const SMALLEST: f32 = f32::from_bits((127 - 100) << 23);
    (SMALLEST..=32768.0).contains(&most)
}

/// Whether codes are chosen for a scale that came out of nested statistics.
pub(super) fn encodable(scale: f32) -> bool {
    (1e-30..=1e30).contains(&scale.abs())
}

/// Whether the guard lets a searched scale in, from both sums of a block.
pub(super) fn accepted(searched: u32, plain: u32, block: usize) -> bool {
    searched + block as u32 <= plain
}

/// The scale that the search finds for a block of `block` weights (or fewer), slowly; `None` for plain quantization.
fn scale_of(values: &[f32], kind: Kind, block: usize) -> Option<f32> {
    let most = absmax_of(values.iter().copied());
    if !searchable(most) {
        return None;
    }
    let table = Table::of(kind, block);
    let inverse = 1.0 / most;
    let mut sums = [0; 2 * RATIOS];
    for v in values {
        let row = (v.mul_add(inverse * STEPS as f32, ROW_MAGIC).to_bits() & 0x1ff) as usize;
        sums.iter_mut().zip(table.rows[row]).for_each(|(sum, e)| *sum += u32::from(e));
    }
    let ratio = table.best(&sums);
    let scale = most * ratio;
    let error = |ratio: f32, inverse_of_scale: f32| {
        let of_one = |v: &f32| {
            let value = kind.values()[usize::from(kind.encode(v * inverse_of_scale))];
            let d = (-value).mul_add(ratio * GUARD_SCALE, v * (inverse * GUARD_SCALE));
            d.mul_add(d, GUARD_MAGIC).to_bits() - GUARD_MAGIC.to_bits()
        };
        values.iter().map(of_one).sum()
    };
    accepted(error(ratio, 1.0 / scale), error(1.0, inverse), block).then_some(scale)
}

/// The codes of the values nearest to `x / scale`.
fn encode<T: Element>(a: &[T], scale: f32, kind: Kind, packed: &mut [u8]) {
    let reciprocal = 1.0 / scale;
    let code = |v: &T| kind.encode(v.to_f32() * reciprocal);
    for (pair, byte) in a.chunks(2).zip(packed) {
        *byte = code(&pair[0]) << 4 | pair.get(1).map_or(crate::codebook::zero_code(kind), code);
    }
}

/// What [`quantize_search_into`] means: scalar, slow. Every fast path gives the same bytes.
#[doc(hidden)]
pub fn quantize_reference<T: Element>(a: &[T], kind: Kind, block: usize, packed: &mut [u8], absmax: &mut [f32]) {
    for ((a, packed), absmax) in a.chunks(block).zip(packed.chunks_mut(block / 2)).zip(absmax) {
        let values: Vec<f32> = a.iter().map(|v| v.to_f32()).collect();
        if let Some(scale) = scale_of(&values, kind, block) {
            *absmax = scale;
            encode(a, scale, kind, packed);
        } else {
            reference::quantize(a, kind, block, packed, std::slice::from_mut(absmax));
        }
    }
}

/// What [`encode_into`] means: scalar, slow. Every fast path gives the same bytes.
#[doc(hidden)]
pub fn encode_reference<T: Element>(a: &[T], scales: &[f32], kind: Kind, block: usize, packed: &mut [u8]) {
    for ((a, packed), &scale) in a.chunks(block).zip(packed.chunks_mut(block / 2)).zip(scales) {
        if encodable(scale) {
            encode(a, scale, kind, packed);
        }
    }
}

/// [`super::quantize`] with scales by least squared error.
///
/// ```
/// use halfbyte::four_bit::{self, Spec};
/// let weights: Vec<f32> = (0..64).map(|i| (i as f32).sin()).collect();
/// let error = |q: four_bit::Quantized| {
///     let mut again = vec![0f32; 64];
///     four_bit::dequantize_into(&q.packed, q.absmax.view(), q.spec.kind, q.spec.block, &mut again).unwrap();
///     weights.iter().zip(&again).map(|(w, v)| (w - v).powi(2)).sum::<f32>()
/// };
/// let (plain, searched) = (four_bit::quantize(&weights, Spec::default())?, four_bit::quantize_search(&weights, Spec::default())?);
/// assert!(error(searched) < error(plain));
/// # Ok::<(), halfbyte::Error>(())
/// ```
pub fn quantize_search<T: Element>(a: &[T], spec: Spec) -> Result<Quantized> {
    super::quantize_with(a, spec, true, &super::mean)
}

/// [`super::quantize_into`] with scales by least squared error, which may be negative.
pub fn quantize_search_into<T: Element>(
    a: &[T],
    kind: Kind,
    block: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    quantize_at(cpu::level(), a, kind, block, packed, absmax)
}

/// [`quantize_search_into`] at a level.
pub fn quantize_at<T: Element>(
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
        // SAFETY: `level.check()` has passed, and both have AVX2 and FMA. Wider vectors would bring little: the sums are bound by
        // loads of rows.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 => unsafe { search_avx2::quantize(a, kind, block, packed, absmax) },
        _ => quantize_reference(a, kind, block, packed, absmax),
    });
    Ok(())
}

/// Chooses codes again, for scales as readers decode them: each becomes that of the value nearest to `x / scale`. Codes of blocks
/// whose scale is 0, not finite or beyond 10^±30 stay.
pub fn encode_into<T: Element>(a: &[T], absmax: Absmax, kind: Kind, block: usize, packed: &mut [u8]) -> Result<()> {
    encode_at(cpu::level(), a, absmax, kind, block, packed)
}

/// [`encode_into`] at a level.
pub fn encode_at<T: Element>(
    level: Level,
    a: &[T],
    absmax: Absmax,
    kind: Kind,
    block: usize,
    packed: &mut [u8],
) -> Result<()> {
    level.check()?;
    check_dequantize(a.len(), block, packed.len(), &absmax)?;
    let packed = &mut packed[..packed_len(a.len())];
    let scales: Vec<f32> = (0..absmax.len()).map(|i| absmax.get(i)).collect();
    let blocks = share(scales.len(), GRAIN / block);
    let tasks = a.chunks(blocks * block).zip(packed.chunks_mut(blocks * block / 2)).zip(scales.chunks(blocks));
    for_each_task(tasks.collect(), |((a, packed), scales)| match level {
        // SAFETY: `level.check()` has passed, and both have AVX2.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 => unsafe { search_avx2::encode(a, scales, kind, block, packed) },
        _ => encode_reference(a, scales, kind, block, packed),
    });
    Ok(())
}
