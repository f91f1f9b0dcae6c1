//! `a · bᵀ` of 8-bit codes on the CPU, written once for all instruction sets.
//!
//! ```text
//! a, left    rows of codes; where they are to be widened or are not whole vectors, a copy is made, once
//! b, right   rows of codes as they are, a panel of PANEL rows by DEPTH columns in the second-level cache
//! tile       ROWS rows of a (in the first-level cache) × 4 rows of b: as many vectors of sums as fit in registers
//! ```
//!
//! A sum is the total of a vector's lanes, taken once for DEPTH columns. For many rows of `a` the panel is packed first, see
//! [`super::cpu_packed`]. Integer sums wrap and so are the same in any order.
//! Columns in floating point are gathered to fp32 for a panel and multiplied by broadcasting. Threads divide the rows of `b`,
//! or of `a` where there are more; no result depends on how.

use std::array;

use super::cpu_dot::Dot;
use super::cpu_packed::{Aligned, depth_of, packed_len, packed_panel};
use super::reference::UNIT;
use crate::device::cpu::{for_each_task, share};
use crate::four_bit::cpu_lanes::Lanes;

/// Rows of `b` that are worked on together. A multiple of 16 and of QUAD.
pub(super) const PANEL: usize = 48;

/// Columns that are worked on together, a multiple of every STEP.
pub(super) const DEPTH: usize = 4096;

/// Rows of `a` from which on a panel of `b` is packed first, for a kernel without totals.
const WORTH_PACKING: usize = 24;

/// Rows of `a` from which on they are copied to blocks of columns.
const WORTH_BLOCKS: usize = 128;

/// Rows of `a` that are worked on together.
const TOGETHER: usize = 256;

/// Rows of `b` in a tile.
const QUAD: usize = 4;

/// Columns in floating point that are gathered at once.
const FLOAT_DEPTH: usize = 256;

/// Columns in floating point up to which those of the next panel are fetched ahead.
const FEW_COLUMNS: usize = 16;

/// Products below which a second thread does not pay.
const GRAIN: usize = 1 << 19;

/// What becomes of the sums of a row of `a` with some rows of `b`.
pub(super) trait Finish: Sync {
    type Out: Copy + Send + Sync;

    /// `out[i]` from the sum, and the floating-point part, of row `row` of `a` with row `first + i` of `b`.
    fn finish(&self, row: usize, first: usize, sums: &[i32], floats: Option<&[f32]>, out: &mut [Self::Out]);
}

/// Takes complete sums. So the kernel, most of the code, is one for all types of results.
pub(super) type Sink<'a> = dyn FnMut(Done<'_>) + 'a;

/// Complete sums of rows and columns of a task, rows PANEL apart, and their part in floating point.
pub(super) struct Done<'a> {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
    sums: &'a [i32],
    floats: Option<&'a [f32]>,
}

/// Columns to multiply in floating point.
pub(super) struct Floats {
    /// Their numbers.
    pub(super) columns: Vec<usize>,
    /// `[row of a][column]`.
    pub(super) values: Vec<f32>,
}

/// A product: what all tasks share.
pub(super) struct Job<'a, D: Dot> {
    /// Rows of `k` codes, padded with zeros to `stride`, whole vectors: `[block of depth columns][row][column]`.
    left: &'a [D::Left],
    m: usize,
    stride: usize,
    depth: usize,
    /// Whether panels of `b` are packed first.
    packs: bool,
    pub(super) b: &'a [i8],
    pub(super) k: usize,
    /// With the statistics of the rows of `b`.
    floats: Option<(&'a Floats, &'a [f32])>,
}

impl<D: Dot> Job<'_, D> {
    /// The left side from row `row` and column `from` on, which starts a block, or lies in the only one; and how far apart its
    /// rows are.
    pub(super) fn left_at(&self, row: usize, from: usize) -> (&[D::Left], usize) {
        let start = from - from % self.depth;
        let width = self.depth.min(self.stride - start);
        (&self.left[self.m * start + row * width + from % self.depth..], width)
    }
}

/// A task: `rows` rows of `a` from `row` on with `columns` rows of `b` from `first` on.
#[derive(Clone, Copy)]
pub(super) struct Part {
    row: usize,
    rows: usize,
    first: usize,
    columns: usize,
}

/// Multiplies on all threads.
///
/// # Safety
/// The CPU has the instructions of `D`, and the sizes fit: `a` is `[m][k]`, `b` is `[n][k]`, `out` is `[m][n]`, the statistics
/// beside `floats` are `n`, and its columns are below `k`.
pub(super) unsafe fn multiply<D: Dot, F: Finish>(
    a: &[i8],
    b: &[i8],
    (m, n, k): (usize, usize, usize),
    floats: Option<(&Floats, &[f32])>,
    finish: &F,
    out: &mut [F::Out],
) {
    if out.is_empty() {
        return;
    }
    let stride = k.next_multiple_of(D::STEP);
    let packs = D::PACKED_ROWS > 0 && m >= WORTH_PACKING && k > 0;
    // Blocks bring what is used together together: rows a page apart share sets of the cache and entries of page tables.
    let blocks = packs && m > WORTH_BLOCKS;
    let depth = if blocks { depth_of::<D>().min(stride) } else { stride }.max(1);
    let as_is = if stride == k && !blocks { D::as_is(a) } else { None };
    let copy = as_is.is_none().then(|| prepared::<D>(a, (m, k), stride, depth));
    let left = copy.as_deref().or(as_is).unwrap_or_default();
    let job = Job::<D> { left, m, stride, depth, packs, b, k, floats };
    let work = |rows: usize| GRAIN / (rows * k).max(1);
    let (rows, columns) = if m > n { (share(m, work(n)).next_multiple_of(D::ROWS), n) } else { (m, share(n, work(m))) };
    let columns = columns.next_multiple_of(QUAD);
    let mut tasks: Vec<(Part, Vec<&mut [F::Out]>)> = Vec::new();
    for (block, out) in out.chunks_mut(rows * n).enumerate() {
        let (here, row, rows) = (tasks.len(), block * rows, out.len() / n);
        for first in (0..n).step_by(columns) {
            tasks.push((Part { row, rows, first, columns: columns.min(n - first) }, Vec::with_capacity(rows)));
        }
        for out in out.chunks_exact_mut(n) {
            tasks[here..].iter_mut().zip(out.chunks_mut(columns)).for_each(|((_, outs), out)| outs.push(out));
        }
    }
    for_each_task(tasks, |(part, mut outs)| {
        let mut sink = |done: Done<'_>| {
            let outs = outs[done.row..][..done.rows].iter_mut();
            for (i, (out, sums)) in outs.zip(done.sums.chunks_exact(PANEL)).enumerate() {
                let out = &mut out[done.column..][..done.columns];
                let floats = done.floats.map(|floats| &floats[i * PANEL..][..done.columns]);
                let (row, first) = (part.row + done.row + i, part.first + done.column);
                finish.finish(row, first, &sums[..done.columns], floats, out);
            }
        };
        // SAFETY: the caller's promise.
        unsafe { D::run(&job, part, &mut sink) };
    });
}

/// The left side, as [`Job`] has it.
fn prepared<D: Dot>(a: &[i8], (m, k): (usize, usize), stride: usize, depth: usize) -> Aligned<D::Left> {
    let mut left = Aligned::new(m * stride, D::Left::default());
    if k == 0 {
        return left;
    }
    let rows = share(m, GRAIN / k);
    let mut tasks = Vec::new();
    for (block, left) in left.chunks_mut(m * depth).enumerate() {
        let width = left.len() / m;
        tasks.extend(left.chunks_mut(rows * width).enumerate().map(|(i, left)| (block * depth, i * rows, width, left)));
    }
    for_each_task(tasks, |(from, row, width, left)| {
        for (a, left) in a[row * k..].chunks_exact(k).zip(left.chunks_exact_mut(width)) {
            left.iter_mut().zip(&a[from..]).for_each(|(left, &code)| *left = D::encode(code));
        }
    });
    left
}

/// A task.
///
/// # Safety
/// The CPU has the instructions of `D`; `job` and `part` are as [`multiply`] makes them.
#[inline(always)]
pub(super) unsafe fn part<D: Dot>(job: &Job<'_, D>, part: Part, sink: &mut Sink<'_>) {
    let columns = part.columns;
    let together = TOGETHER.min(part.rows);
    let mut sums = vec![0i32; together * PANEL];
    let mut starts = vec![0i32; together];
    // Where every column is in floating point, all codes of `a` are 0.
    let integers = job.floats.is_none_or(|(floats, _)| floats.columns.len() < job.k) && job.k > 0;
    let mut packed = Aligned::new(if job.packs { packed_len::<D>(job.k) } else { 0 }, 0i32);
    let mut floats = job.floats.map(|_| (vec![0f32; sums.len()], vec![0f32; FLOAT_DEPTH * PANEL]));
    for block in (0..part.rows).step_by(TOGETHER) {
        let (row, rows) = (part.row + block, TOGETHER.min(part.rows - block));
        if D::BIAS != 0 {
            for (i, start) in starts.iter_mut().enumerate().take(rows) {
                // SAFETY: passed on.
                *start = unsafe { row_total(job, row + i) }.wrapping_mul(-D::BIAS);
            }
        }
        for from in (0..columns).step_by(PANEL) {
            let first = part.first + from;
            let here = PANEL.min(columns - from);
            if let (Some((sums, gathered)), Some((floats, stats))) = (&mut floats, job.floats) {
                // SAFETY: passed on; rows `row..row + rows` of `a` and `first..first + here` of `b` exist.
                unsafe { float_panel(job, floats, stats, row, rows, first, here, gathered, sums) };
            }
            let floats = floats.as_ref().map(|(sums, _)| &sums[..]);
            let mut finish = |i: usize, rows: usize, sums: &[i32]| {
                let floats = floats.map(|sums| &sums[i * PANEL..]);
                sink(Done { row: block + i, rows, column: from, columns: here, sums, floats });
            };
            if job.packs && integers {
                // SAFETY: as above.
                unsafe { packed_panel(job, (row, rows), (first, here), &starts, &mut packed, &mut sums, finish) };
                continue;
            }
            sums.chunks_exact_mut(PANEL).zip(&starts).for_each(|(sums, &start)| sums.fill(start));
            if integers {
                // SAFETY: as above.
                unsafe { panel(job, row, rows, first, here, &mut sums) };
            }
            finish(0, rows, &sums);
        }
    }
}

/// The sum of a row of `a`.
///
/// # Safety
/// The CPU has the instructions of `D`.
#[inline(always)]
unsafe fn row_total<D: Dot>(job: &Job<'_, D>, row: usize) -> i32 {
    // SAFETY: the instructions are there, and a row of a block is whole vectors.
    unsafe {
        let mut sums = [D::zero(); 4];
        for from in (0..job.stride).step_by(job.depth) {
            let (left, width) = job.left_at(row, from);
            let left = &left[..width];
            let mut k = 0;
            while k + 2 * D::STEP <= width {
                sums[0] = D::dot(sums[0], D::left(left.as_ptr().add(k)), D::ones());
                sums[1] = D::dot(sums[1], D::left(left.as_ptr().add(k + D::STEP)), D::ones());
                k += 2 * D::STEP;
            }
            if k < width {
                sums[2] = D::dot(sums[2], D::left(left.as_ptr().add(k)), D::ones());
            }
        }
        D::totals(sums).into_iter().fold(0, i32::wrapping_add)
    }
}

/// Sums of `rows` rows of `a` with `here` rows of `b`, added to `sums`.
///
/// # Safety
/// The CPU has the instructions of `D`, and the rows exist.
#[inline(always)]
unsafe fn panel<D: Dot>(job: &Job<'_, D>, row: usize, rows: usize, first: usize, here: usize, sums: &mut [i32]) {
    let k = job.k;
    assert!(
        job.depth >= job.stride && job.left.len() >= (row + rows) * job.stride && job.b.len() >= (first + here) * k
    );
    assert!(sums.len() >= rows * PANEL && here <= PANEL && DEPTH.is_multiple_of(D::STEP));
    for from in (0..k).step_by(DEPTH) {
        let depth = DEPTH.min(k - from);
        // Four rows of the right side from column `from` on. Past the last row it is that one again, into sums nobody reads.
        let quad = |at: usize| -> [*const i8; QUAD] {
            array::from_fn(|i| job.b[(first + (at + i).min(here - 1)) * k + from..].as_ptr())
        };
        let mut i = 0;
        while i < rows {
            let left = job.left_at(row + i, from).0.as_ptr();
            let some = D::ROWS.min(rows - i);
            for at in (0..here).step_by(QUAD) {
                let (right, sums) = (quad(at), &mut sums[i * PANEL + at..]);
                // SAFETY: the instructions are there, and `some` rows from `row + i` on; each has `depth` elements, padded to
                // whole vectors, from column `from` on.
                unsafe {
                    match some {
                        1 => tile::<D, 1>(left, job.stride, right, depth, sums),
                        2 if D::ROWS >= 2 => tile::<D, 2>(left, job.stride, right, depth, sums),
                        3 if D::ROWS >= 3 => tile::<D, 3>(left, job.stride, right, depth, sums),
                        4 if D::ROWS >= 4 => tile::<D, 4>(left, job.stride, right, depth, sums),
                        5 if D::ROWS >= 5 => tile::<D, 5>(left, job.stride, right, depth, sums),
                        _ if D::ROWS >= 6 => tile::<D, 6>(left, job.stride, right, depth, sums),
                        _ => unreachable!("no more rows than D::ROWS"),
                    }
                }
            }
            i += some;
        }
    }
}

/// A vector of each of `M` rows, `stride` apart.
///
/// # Safety
/// As [`Dot::left`].
#[inline(always)]
unsafe fn lefts<D: Dot, const M: usize>(left: *const D::Left, stride: usize) -> [D::A; M] {
    // Here and in what follows are neither closures, which are compiled without the caller's instructions, nor iterators, of
    // which parts may stay calls: either would keep the vectors in memory.
    // SAFETY: passed on.
    unsafe {
        let mut vectors = [D::left(left); M];
        let mut i = 1;
        while i < M {
            vectors[i] = D::left(left.add(i * stride));
            i += 1;
        }
        vectors
    }
}

/// Adds the products of `M` vectors with four to the sums.
///
/// # Safety
/// As [`Dot::dot`].
#[inline(always)]
unsafe fn dots<D: Dot, const M: usize>(tile: &mut [[D::Sum; QUAD]; M], a: &[D::A; M], j: usize, b: D::B) {
    let mut i = 0;
    while i < M {
        // SAFETY: passed on.
        tile[i][j] = unsafe { D::dot(tile[i][j], a[i], b) };
        i += 1;
    }
}

/// Adds `M × QUAD` dot products over `depth` columns to `sums`, whose rows are PANEL apart.
///
/// # Safety
/// The CPU has the instructions of `D`. At `left` and at `stride`s after it are `M` rows of `depth` elements, padded to whole
/// vectors; at each of `right`, `depth` codes.
#[inline(always)]
unsafe fn tile<D: Dot, const M: usize>(
    left: *const D::Left,
    stride: usize,
    right: [*const i8; QUAD],
    depth: usize,
    sums: &mut [i32],
) {
    assert!(sums.len() >= (M - 1) * PANEL + QUAD);
    // SAFETY: the caller's promise.
    unsafe {
        let mut tile = [[D::zero(); QUAD]; M];
        let mut k = 0;
        while k + D::STEP <= depth {
            let a = lefts::<D, M>(left.add(k), stride);
            dots::<D, M>(&mut tile, &a, 0, D::right(right[0].add(k)));
            dots::<D, M>(&mut tile, &a, 1, D::right(right[1].add(k)));
            dots::<D, M>(&mut tile, &a, 2, D::right(right[2].add(k)));
            dots::<D, M>(&mut tile, &a, 3, D::right(right[3].add(k)));
            k += D::STEP;
        }
        if k < depth {
            let (a, some) = (lefts::<D, M>(left.add(k), stride), depth - k);
            dots::<D, M>(&mut tile, &a, 0, D::right_some(right[0].add(k), some));
            dots::<D, M>(&mut tile, &a, 1, D::right_some(right[1].add(k), some));
            dots::<D, M>(&mut tile, &a, 2, D::right_some(right[2].add(k), some));
            dots::<D, M>(&mut tile, &a, 3, D::right_some(right[3].add(k), some));
        }
        let mut i = 0;
        while i < M {
            let totals = D::totals(tile[i]);
            for (sum, total) in sums[i * PANEL..][..QUAD].iter_mut().zip(totals) {
                *sum = sum.wrapping_add(total);
            }
            i += 1;
        }
    }
}

/// Has the line of `p` brought to the second-level cache, where there is an instruction for that.
#[inline(always)]
fn prefetch(p: *const i8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a part of every x86-64, and no address is wrong for it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(p);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// The floating-point part of `rows` rows of `a` with `here` rows of `b`, into `sums`.
///
/// # Safety
/// The CPU has the instructions of `D`, and the rows exist.
#[inline(always)]
unsafe fn float_panel<D: Dot>(
    job: &Job<'_, D>,
    floats: &Floats,
    stats: &[f32],
    row: usize,
    rows: usize,
    first: usize,
    here: usize,
    gathered: &mut [f32],
    sums: &mut [f32],
) {
    let count = floats.columns.len();
    sums.fill(0.0);
    for from in (0..count).step_by(FLOAT_DEPTH) {
        let columns = &floats.columns[from..count.min(from + FLOAT_DEPTH)];
        for c in 0..here {
            let (codes, unit) = (&job.b[(first + c) * job.k..][..job.k], stats[first + c] * UNIT);
            for (weights, &column) in gathered.chunks_exact_mut(PANEL).zip(columns) {
                weights[c] = f32::from(codes[column]) * unit;
            }
        }
        // Each of these is a line of its own, often of a page of its own: those of the next panel come while this one is
        // worked on.
        if columns.len() <= FEW_COLUMNS {
            let next = job.b.get((first + PANEL) * job.k..).unwrap_or_default();
            for row in next.chunks_exact(job.k).take(PANEL) {
                for &column in columns {
                    prefetch(&raw const row[column]);
                }
            }
        }
        let mut i = 0;
        while i < rows {
            let values = &floats.values[(row + i) * count + from..];
            let sums = &mut sums[i * PANEL..];
            let some = D::FLOAT_ROWS.min(rows - i);
            // SAFETY: the instructions are there; the slices are checked in the function.
            unsafe {
                match (some, D::Floats::N) {
                    (4, 16) => float_tile::<D::Floats, 4, 3>(values, count, gathered, columns.len(), sums),
                    (2, 8) => float_tile::<D::Floats, 2, 6>(values, count, gathered, columns.len(), sums),
                    (_, 16) => {
                        for r in 0..some {
                            float_tile::<D::Floats, 1, 3>(
                                &values[r * count..],
                                count,
                                gathered,
                                columns.len(),
                                &mut sums[r * PANEL..],
                            );
                        }
                    }
                    _ => {
                        for r in 0..some {
                            float_tile::<D::Floats, 1, 6>(
                                &values[r * count..],
                                count,
                                gathered,
                                columns.len(),
                                &mut sums[r * PANEL..],
                            );
                        }
                    }
                }
            }
            i += some;
        }
    }
}

/// Adds to `M` rows of `sums` the products of `values`, whose rows are `stride` apart, with `depth` rows of `weights`. Both
/// `sums` and `weights` have rows of PANEL numbers, which are `V` vectors.
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
unsafe fn float_tile<L: Lanes, const M: usize, const V: usize>(
    values: &[f32],
    stride: usize,
    weights: &[f32],
    depth: usize,
    sums: &mut [f32],
) {
    assert!(V * L::N == PANEL && weights.len() >= depth * PANEL && sums.len() >= M * PANEL);
    assert!(values.len() >= (M - 1) * stride + depth);
    // SAFETY: the instructions are there, and the assertions are about the very elements read and written.
    unsafe {
        let mut tile = [[L::zero(); V]; M];
        for j in 0..depth {
            let mut w = [L::zero(); V];
            let mut v = 0;
            while v < V {
                w[v] = L::load(weights.as_ptr().add(j * PANEL + v * L::N));
                v += 1;
            }
            let mut i = 0;
            while i < M {
                let value = L::splat(values.as_ptr().add(i * stride + j));
                let mut v = 0;
                while v < V {
                    tile[i][v] = value.fma(w[v], tile[i][v]);
                    v += 1;
                }
                i += 1;
            }
        }
        for (i, tile) in tile.iter().enumerate() {
            for (v, &partial) in tile.iter().enumerate() {
                let at = sums.as_mut_ptr().add(i * PANEL + v * L::N);
                L::load(at).add(partial).store(at);
            }
        }
    }
}
