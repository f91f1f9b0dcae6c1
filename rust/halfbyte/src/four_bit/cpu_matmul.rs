//! `x · wᵀ` with 4-bit `w` on the CPU, written once for all levels.
//!
//! *Few rows of `x`*: for each row of `w`, read its bytes once, turn each vector of codes to weights in registers and multiply
//! it with every row of `x`. *Many rows*: decode [`PANEL`] rows of `w` by [`DEPTH`] columns to fp32 in the cache, multiply
//! that with all of `x` by a kernel that keeps a tile of the result in registers.
//!
//! ```text
//! x, in tiles        [tile of 2·N rows of x][k][row]       a vector is one column of several rows
//! w, decoded         [PANEL][DEPTH]                        a number is splat to all lanes
//! tile in registers  NR rows of w × MV vectors             result[row of w][rows of x] += w[row, k] · x[k, rows]
//! ```
//!
//! Each result is the sum of partial sums over DEPTH columns (or over the lanes), so rounding errors grow with K / DEPTH + DEPTH
//! and not with K. Threads divide the rows of `w`; no result depends on how.

use super::cpu_lanes::{Lanes, decode_run};
use super::cpu_scales::Scales;
use crate::codebook::Kind;
use crate::element::Element;

/// Rows of `x` up to which each row of `w` is multiplied as it is decoded.
pub(super) const FEW: usize = 8;

/// Rows of `w` decoded at once. A multiple of every NR.
const PANEL: usize = 48;

/// Columns decoded at once.
const DEPTH: usize = 256;

/// Most rows of `x` that are worked on together: `TOGETHER × DEPTH` numbers stay in the second-level cache.
pub(super) const TOGETHER: usize = 256;

/// The weight of a task: rows `first` to `first + columns of out` of `w`.
#[derive(Clone, Copy)]
pub(super) struct Weight<'a> {
    pub(super) packed: &'a [u8],
    pub(super) scales: Scales<'a>,
    pub(super) kind: Kind,
    pub(super) block: usize,
    pub(super) k: usize,
}

impl Weight<'_> {
    /// The scales of the blocks that hold weights `start` to `start + count` (at least one weight).
    fn scales_of(&self, start: usize, count: usize, into: &mut Vec<f32>) {
        let (first, last) = (start / self.block, (start + count - 1) / self.block);
        into.resize(last - first + 1, 0.0);
        self.scales.read(first, into);
    }
}

/// Results of a task: `rows[m][j]` is for row `m` of `x` and row `first + j` of `w`.
pub(super) struct Part<'a, T> {
    pub(super) first: usize,
    pub(super) rows: Vec<&'a mut [T]>,
}

impl<T: Element> Part<'_, T> {
    fn columns(&self) -> usize {
        self.rows.first().map_or(0, |row| row.len())
    }

    #[inline(always)]
    fn set(&mut self, m: usize, j: usize, sum: f32, bias: Option<&[T]>) {
        let bias = bias.map_or(0.0, |bias| bias[self.first + j].to_f32());
        self.rows[m][j] = T::from_f32(sum + bias);
    }
}

/// Whether [`few`] can: every row of `w` and every block in it must be whole vectors.
pub(super) fn few_can(m: usize, k: usize) -> bool {
    m <= FEW && k.is_multiple_of(32)
}

/// Up to [`FEW`] rows of `x`, which is `[m][k]`.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
pub(super) unsafe fn few<V: Lanes, T: Element>(x: &[f32], w: &Weight, bias: Option<&[T]>, mut part: Part<'_, T>) {
    let mut scales = Vec::new();
    for j in 0..part.columns() {
        let start = (part.first + j) * w.k;
        w.scales_of(start, w.k, &mut scales);
        // SAFETY: passed on; `x` has as many rows of K numbers as `part`.
        unsafe {
            match part.rows.len() {
                1 => dots::<V, T, 1, 2>(x, w, start, &scales, bias, &mut part, j),
                2 => dots::<V, T, 2, 2>(x, w, start, &scales, bias, &mut part, j),
                3 => dots::<V, T, 3, 2>(x, w, start, &scales, bias, &mut part, j),
                4 => dots::<V, T, 4, 2>(x, w, start, &scales, bias, &mut part, j),
                5 => dots::<V, T, 5, 1>(x, w, start, &scales, bias, &mut part, j),
                6 => dots::<V, T, 6, 1>(x, w, start, &scales, bias, &mut part, j),
                7 => dots::<V, T, 7, 1>(x, w, start, &scales, bias, &mut part, j),
                _ => dots::<V, T, 8, 1>(x, w, start, &scales, bias, &mut part, j),
            }
        }
    }
}

/// `M` dot products with one row of `w`, each in `U` vectors of partial sums.
///
/// # Safety
/// The CPU has the instructions of `V`, and `x` has `M` rows.
#[inline(always)]
unsafe fn dots<V: Lanes, T: Element, const M: usize, const U: usize>(
    x: &[f32],
    w: &Weight,
    start: usize,
    scales: &[f32],
    bias: Option<&[T]>,
    part: &mut Part<'_, T>,
    j: usize,
) {
    assert!(x.len() == M * w.k && w.k.is_multiple_of(32));
    let bytes = &w.packed[start / 2..][..w.k / 2];
    // SAFETY: the instructions are there. `k` and all block ends are multiples of 32, hence of `U · N` (at most 32); so the
    // vectors of codes lie within `bytes`, which has K / 2, and those of `x` within its row of K.
    unsafe {
        let mut sums = [[V::zero(); M]; U];
        let mut k = 0;
        for &scale in scales {
            let table = V::table(w.kind.values(), scale);
            // Blocks are powers of two long.
            let end = w.k.min(k + w.block - ((start + k) & (w.block - 1)));
            while k < end {
                for sums in &mut sums {
                    let weights = V::decode(&table, bytes.as_ptr().add(k / 2));
                    for (m, sum) in sums.iter_mut().enumerate() {
                        *sum = weights.fma(V::load(x.as_ptr().add(m * w.k + k)), *sum);
                    }
                    k += V::N;
                }
            }
        }
        for m in 0..M {
            let mut total = V::zero();
            for sums in &sums {
                total = total.add(sums[m]);
            }
            part.set(m, j, total.sum(), bias);
        }
    }
}

/// Rows of `x` in a tile: two vectors.
pub(super) const fn tile_rows<V: Lanes>() -> usize {
    2 * V::N
}

/// Any number of rows of `x` up to [`TOGETHER`], laid out in tiles of [`tile_rows`].
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
pub(super) unsafe fn many<V: Lanes, T: Element, const NR: usize>(
    x: &[f32],
    w: &Weight,
    bias: Option<&[T]>,
    mut part: Part<'_, T>,
) {
    let (rows, tile) = (part.rows.len(), tile_rows::<V>());
    let padded = rows.next_multiple_of(tile);
    assert!(x.len() == padded * w.k && PANEL.is_multiple_of(NR));
    let mut sums = vec![0f32; PANEL * padded];
    let mut decoded = vec![0f32; PANEL * DEPTH];
    let mut scales = Vec::new();
    let columns = part.columns();
    for j in (0..columns).step_by(PANEL) {
        let here = PANEL.min(columns - j);
        sums.fill(0.0);
        for k in (0..w.k).step_by(DEPTH) {
            let depth = DEPTH.min(w.k - k);
            for (i, row) in decoded.chunks_exact_mut(DEPTH).take(here).enumerate() {
                let start = (part.first + j + i) * w.k + k;
                w.scales_of(start, depth, &mut scales);
                // SAFETY: passed on.
                unsafe { decode_run::<V>(w.packed, start, w.kind.values(), w.block, &scales, &mut row[..depth]) };
            }
            for (p, panel) in x.chunks_exact(tile * w.k).enumerate() {
                let panel = &panel[k * tile..(k + depth) * tile];
                // The last panel may be half empty.
                let half = rows - p * tile <= V::N;
                for i in (0..here).step_by(NR) {
                    let (w, sums) = (&decoded[i * DEPTH..], &mut sums[i * padded + p * tile..]);
                    // SAFETY: the instructions are there; NR divides PANEL, so NR rows of `decoded` and of `sums` follow.
                    unsafe {
                        if half {
                            tile_kernel::<V, 1, NR>(depth, panel, w, sums, padded);
                        } else {
                            tile_kernel::<V, 2, NR>(depth, panel, w, sums, padded);
                        }
                    }
                }
            }
        }
        for m in 0..rows {
            for i in 0..here {
                part.set(m, j + i, sums[i * padded + m], bias);
            }
        }
    }
}

/// Adds to `NR × MV` vectors of `sums` the products over `depth` columns.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
unsafe fn tile_kernel<V: Lanes, const MV: usize, const NR: usize>(
    depth: usize,
    x: &[f32],
    w: &[f32],
    sums: &mut [f32],
    stride: usize,
) {
    assert!(MV <= 2 && depth <= DEPTH && x.len() >= depth * tile_rows::<V>());
    assert!(w.len() >= NR * DEPTH && sums.len() >= (NR - 1) * stride + MV * V::N);
    // SAFETY: the instructions are there, and the assertions are about the very elements read and written.
    unsafe {
        let mut tile = [[V::zero(); MV]; NR];
        for k in 0..depth {
            let mut columns = [V::zero(); MV];
            for (v, column) in columns.iter_mut().enumerate() {
                *column = V::load(x.as_ptr().add(k * tile_rows::<V>() + v * V::N));
            }
            for (i, sums) in tile.iter_mut().enumerate() {
                let weight = V::splat(w.as_ptr().add(i * DEPTH + k));
                for (sum, &column) in sums.iter_mut().zip(&columns) {
                    *sum = weight.fma(column, *sum);
                }
            }
        }
        for (i, tile) in tile.iter().enumerate() {
            for (v, &partial) in tile.iter().enumerate() {
                let at = sums.as_mut_ptr().add(i * stride + v * V::N);
                V::load(at).add(partial).store(at);
            }
        }
    }
}
