//! Panels of the right side packed for broadcasting: the kernel for many rows of the left side.
//!
//! ```text
//! packed     [group of codes][row of b]     a lane is the codes of one row that an instruction multiplies
//! tile       PACKED_ROWS rows of a × the whole panel: a group of a row of a is splat to all lanes
//! ```
//!
//! A lane of the sums is one result, so that nothing is left to total. Packing reads each row of `b` once for all rows of `a`.

use std::ops::{Deref, DerefMut};

use super::cpu_dot::Dot;
use super::cpu_product::{Job, PANEL};

/// Elements that start at a cache line, so that vectors do not cross one.
pub(super) struct Aligned<T> {
    elements: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy> Aligned<T> {
    pub(super) fn new(len: usize, value: T) -> Self {
        const LINE: usize = 64;
        let elements = vec![value; len + LINE / size_of::<T>()];
        let start = elements.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
        Self { elements, start, len }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.elements[self.start..self.start + self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.elements[self.start..self.start + self.len]
    }
}

/// Groups of codes that are worked on together: with the panel's width of 48 lanes, half of a first-level cache of 48 KiB.
const GROUPS: usize = 128;

/// Columns that are worked on together.
pub(super) const fn depth_of<D: Dot>() -> usize {
    GROUPS * (D::STEP / D::LANES)
}

/// The lanes of a packed panel of rows of `k` codes.
pub(super) fn packed_len<D: Dot>(k: usize) -> usize {
    depth_of::<D>().min(k.next_multiple_of(D::STEP)) / (D::STEP / D::LANES) * PANEL
}

/// Sums of `rows` rows of `a` with `here` rows of `b`, added to `sums`; `done` gets each row's number and sums when they are
/// complete.
///
/// # Safety
/// The CPU has the instructions of `D`, and the rows exist.
#[inline(always)]
pub(super) unsafe fn packed_panel<D: Dot>(
    job: &Job<'_, D>,
    row: usize,
    rows: usize,
    first: usize,
    here: usize,
    packed: &mut [i32],
    sums: &mut [i32],
    mut done: impl FnMut(usize, &[i32]),
) {
    let k = job.k;
    assert!(sums.len() >= rows * PANEL);
    for from in (0..k).step_by(depth_of::<D>()) {
        let depth = depth_of::<D>().min(k - from);
        // SAFETY: passed on.
        unsafe { pack::<D>(&job.b[first * k..(first + here) * k], k, from, depth, packed) };
        let groups = depth.div_ceil(D::STEP / D::LANES);
        let mut i = 0;
        while i < rows {
            let ((left, stride), its) = (job.left_at(row + i, from), &mut sums[i * PANEL..]);
            // SAFETY: the instructions are there; the slices are checked in the function.
            let some = unsafe {
                match rows - i {
                    8.. if D::PACKED_ROWS >= 8 => rows_of::<D, 8>(left, stride, packed, groups, its),
                    4.. if D::PACKED_ROWS >= 8 => rows_of::<D, 4>(left, stride, packed, groups, its),
                    2.. => rows_of::<D, 2>(left, stride, packed, groups, its),
                    _ => rows_of::<D, 1>(left, stride, packed, groups, its),
                }
            };
            if from + depth == k {
                its.chunks_exact(PANEL).take(some).enumerate().for_each(|(j, sums)| done(i + j, sums));
            }
            i += some;
        }
    }
}

/// Packs `depth` columns of rows of `k` codes, from column `from` on.
///
/// # Safety
/// The CPU has the instructions of `D`.
#[inline(always)]
unsafe fn pack<D: Dot>(b: &[i8], k: usize, from: usize, depth: usize, packed: &mut [i32]) {
    let rows = b.len() / k;
    assert!(packed.len() >= depth.div_ceil(D::STEP) * D::LANES * PANEL && from + depth <= k && rows > 0);
    for (block, at) in (0..depth).step_by(D::STEP).enumerate() {
        let count = D::STEP.min(depth - at);
        for lane in (0..PANEL).step_by(D::LANES) {
            // SAFETY: `count` codes from column `from + at` on are there in each row; what is written is checked above.
            unsafe {
                let mut vectors = [D::right_some(b.as_ptr(), 0); 16];
                let mut i = 0;
                while i < D::LANES {
                    // Past the last row it is that one again, into sums nobody reads.
                    let p = b.as_ptr().add((lane + i).min(rows - 1) * k + from + at);
                    vectors[i] = if count == D::STEP { D::right(p) } else { D::right_some(p, count) };
                    i += 1;
                }
                D::transpose(&vectors, packed.as_mut_ptr().add(block * D::LANES * PANEL + lane));
            }
        }
    }
}

/// Adds the dot products of `M` rows with the panel to `sums`; returns `M`.
///
/// # Safety
/// The CPU has the instructions of `D`.
#[inline(always)]
unsafe fn rows_of<D: Dot, const M: usize>(
    left: &[D::Left],
    stride: usize,
    packed: &[i32],
    groups: usize,
    sums: &mut [i32],
) -> usize {
    assert!(left.len() >= (M - 1) * stride + groups * (D::STEP / D::LANES));
    assert!(packed.len() >= groups * PANEL && sums.len() >= M * PANEL);
    // SAFETY: the instructions are there, and the assertions are about the very elements read and written.
    unsafe {
        if D::LANES == 16 {
            tile::<D, M, 3>(left.as_ptr(), stride, packed.as_ptr(), groups, sums.as_mut_ptr());
        } else {
            tile::<D, M, 6>(left.as_ptr(), stride, packed.as_ptr(), groups, sums.as_mut_ptr());
        }
    }
    M
}

/// The tile of [`rows_of`]; `V` vectors are a panel.
///
/// # Safety
/// The CPU has the instructions of `D`, and what is read and written is there.
#[inline(always)]
unsafe fn tile<D: Dot, const M: usize, const V: usize>(
    left: *const D::Left,
    stride: usize,
    packed: *const i32,
    groups: usize,
    sums: *mut i32,
) {
    // Loops by hand, for the reason given in `cpu_product`.
    // SAFETY: the caller's promise.
    unsafe {
        let mut tile = [[D::zero(); V]; M];
        let mut group = 0;
        while group < groups {
            let mut b = [D::packed(packed.add(group * PANEL)); V];
            let mut v = 1;
            while v < V {
                b[v] = D::packed(packed.add(group * PANEL + v * D::LANES));
                v += 1;
            }
            let mut i = 0;
            while i < M {
                let a = D::splat(left.add(i * stride + group * (D::STEP / D::LANES)));
                let mut v = 0;
                while v < V {
                    tile[i][v] = D::dot(tile[i][v], a, b[v]);
                    v += 1;
                }
                i += 1;
            }
            group += 1;
        }
        let mut i = 0;
        while i < M {
            let mut v = 0;
            while v < V {
                D::add_to(tile[i][v], sums.add(i * PANEL + v * D::LANES));
                v += 1;
            }
            i += 1;
        }
    }
}
