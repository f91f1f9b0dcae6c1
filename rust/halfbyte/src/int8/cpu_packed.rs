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

/// Sums of rows of `a` with at most PANEL rows of `b`, both given by the first one and how many; what the sums of a row of `a`
/// start from is in `starts`. `done` gets the number of a row, how many there are from it on, and their sums, when they are
/// complete.
///
/// # Safety
/// The CPU has the instructions of `D`, and the rows exist.
#[inline(always)]
pub(super) unsafe fn packed_panel<D: Dot>(
    job: &Job<'_, D>,
    (row, rows): (usize, usize),
    (first, here): (usize, usize),
    starts: &[i32],
    packed: &mut [i32],
    sums: &mut [i32],
    mut done: impl FnMut(usize, usize, &[i32]),
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
            let ((left, stride), sums) = (job.left_at(row + i, from), &mut sums[i * PANEL..]);
            let starts = (from == 0).then_some(&starts[i..]);
            let tile = Tile::<D> { left, stride, packed, groups, vectors: here.div_ceil(D::LANES) };
            // SAFETY: the instructions are there; the slices are checked in the function.
            let some = unsafe {
                match rows - i {
                    8.. if D::PACKED_ROWS >= 8 => tile.rows::<8>(starts, sums),
                    4.. if D::PACKED_ROWS >= 8 => tile.rows::<4>(starts, sums),
                    3.. => tile.rows::<3>(starts, sums),
                    2.. => tile.rows::<2>(starts, sums),
                    _ => tile.rows::<1>(starts, sums),
                }
            };
            if from + depth == k {
                done(i, some, sums);
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
    assert!(
        packed.len() >= depth.div_ceil(D::STEP) * D::LANES * PANEL && from + depth <= k && rows > 0 && rows <= PANEL
    );
    let mut at = 0;
    while at < depth {
        let count = D::STEP.min(depth - at);
        let mut lane = 0;
        while lane < rows {
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
                D::transpose(&vectors, packed.as_mut_ptr().add(at / D::STEP * D::LANES * PANEL + lane));
            }
            lane += D::LANES;
        }
        at += D::STEP;
    }
}

/// Rows of the left side, `stride` apart, and a packed panel of which the first `vectors` vectors count.
struct Tile<'a, D: Dot> {
    left: &'a [D::Left],
    stride: usize,
    packed: &'a [i32],
    groups: usize,
    vectors: usize,
}

impl<D: Dot> Tile<'_, D> {
    /// The dot products of `M` rows with the panel, which start from `starts`, or else are added to `sums`; returns `M`.
    ///
    /// # Safety
    /// The CPU has the instructions of `D`.
    #[inline(always)]
    unsafe fn rows<const M: usize>(&self, starts: Option<&[i32]>, sums: &mut [i32]) -> usize {
        let mut v = 0;
        while v < self.vectors {
            // SAFETY: passed on.
            unsafe {
                match self.vectors - v {
                    1 => self.run::<M, 1>(v, starts, sums),
                    2 => self.run::<M, 2>(v, starts, sums),
                    _ => self.run::<M, 3>(v, starts, sums),
                }
            }
            v += 3;
        }
        M
    }

    /// The same for `V` vectors of the panel from number `first` on.
    ///
    /// # Safety
    /// The CPU has the instructions of `D`.
    #[inline(always)]
    unsafe fn run<const M: usize, const V: usize>(&self, first: usize, starts: Option<&[i32]>, sums: &mut [i32]) {
        let codes = D::STEP / D::LANES;
        let (packed, sums) = (&self.packed[first * D::LANES..], &mut sums[first * D::LANES..]);
        assert!(self.left.len() >= (M - 1) * self.stride + self.groups * codes && self.groups > 0);
        assert!(packed.len() >= (self.groups - 1) * PANEL + V * D::LANES);
        assert!(sums.len() >= (M - 1) * PANEL + V * D::LANES);
        let (left, packed, sums) = (self.left.as_ptr(), packed.as_ptr(), sums.as_mut_ptr());
        // Loops by hand, for the reason given in `cpu_product`.
        // SAFETY: the instructions are there, and the assertions are about the very elements read and written.
        unsafe {
            let mut tile = [[D::zero(); V]; M];
            let mut i = 0;
            while i < M {
                let mut v = 0;
                while v < V {
                    tile[i][v] = match starts {
                        Some(starts) => D::start(starts[i]),
                        None => D::sums(sums.add(i * PANEL + v * D::LANES)),
                    };
                    v += 1;
                }
                i += 1;
            }
            let mut group = 0;
            while group < self.groups {
                let mut b = [D::packed(packed.add(group * PANEL)); V];
                let mut v = 1;
                while v < V {
                    b[v] = D::packed(packed.add(group * PANEL + v * D::LANES));
                    v += 1;
                }
                let mut i = 0;
                while i < M {
                    let a = D::splat(left.add(i * self.stride + group * codes));
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
                    D::write(tile[i][v], sums.add(i * PANEL + v * D::LANES));
                    v += 1;
                }
                i += 1;
            }
        }
    }
}
