//! What the kernel of [`super::cpu_product`] asks of a vector instruction set, and the portable answer.
//!
//! As with [`crate::four_bit::cpu_lanes`], the kernel is written once and inlined into one function for each implementing type.
//! Every `unsafe fn` here has the same contract: *the CPU has the instructions of the implementing type*, and pointers are
//! good for as many elements as the text says.

use super::cpu_product::{Job, Part, Sink, part};
use crate::four_bit::cpu_lanes::{Lanes, Portable};

/// Dot products of 8-bit codes, several in a vector.
///
/// Instructions that multiply bytes take one side unsigned; there, the right side is `code + BIAS`, and the kernel subtracts
/// `BIAS` times the sum of the left side, which it reads once.
pub(super) trait Dot: Copy + 'static {
    /// An element of the left side.
    type Left: Copy + Default + Send + Sync;
    /// A vector of the left side, of the right side, of partial sums.
    type A: Copy;
    type B: Copy;
    type Sum: Copy;
    /// fp32 vectors for columns in floating point.
    type Floats: Lanes;

    /// Codes in a vector.
    const STEP: usize;
    /// What is added to codes of the right side.
    const BIAS: i32;
    /// Rows of the left side whose sums fit in registers, with four of the right side; at most six.
    const ROWS: usize;
    /// Rows of the left side whose fp32 sums over a panel fit in registers.
    const FLOAT_ROWS: usize;
    /// 32-bit lanes of a vector. A lane holds `STEP / LANES` codes.
    const LANES: usize;
    /// Rows of the left side whose sums over three vectors of a packed panel fit in registers: 8, 3, or 0 for code that does
    /// not pack.
    const PACKED_ROWS: usize = 0;

    fn encode(code: i8) -> Self::Left;
    /// Codes as a left side, where they need no encoding.
    fn as_is(_codes: &[i8]) -> Option<&[Self::Left]> {
        None
    }
    unsafe fn zero() -> Self::Sum;
    /// `STEP` elements at `p`.
    unsafe fn left(p: *const Self::Left) -> Self::A;
    /// A vector of ones that are not biased.
    unsafe fn ones() -> Self::B;
    /// `STEP` codes at `p`.
    unsafe fn right(p: *const i8) -> Self::B;
    /// `count` codes at `p`, fewer than `STEP`, and after them what is multiplied with zeros.
    unsafe fn right_some(p: *const i8, count: usize) -> Self::B;
    /// `sum` plus products; which lane they go to is the type's affair.
    unsafe fn dot(sum: Self::Sum, a: Self::A, b: Self::B) -> Self::Sum;
    /// The totals of the lanes.
    unsafe fn totals(sums: [Self::Sum; 4]) -> [i32; 4];
    /// Writes the lanes of `LANES` vectors as columns: lane `j` of each to `p + j · PANEL`.
    unsafe fn transpose(_vectors: &[Self::B], _p: *mut i32) {
        unreachable!("only where PACKED_ROWS is not 0")
    }
    /// The lane at `p` in all lanes.
    unsafe fn splat(_p: *const Self::Left) -> Self::A {
        unreachable!("only where PACKED_ROWS is not 0")
    }
    /// `LANES` lanes at `p`.
    unsafe fn packed(_p: *const i32) -> Self::B {
        unreachable!("only where PACKED_ROWS is not 0")
    }
    /// All sums `value`.
    unsafe fn start(_value: i32) -> Self::Sum {
        unreachable!("only where PACKED_ROWS is not 0")
    }
    /// The `LANES` sums at `p`.
    unsafe fn sums(_p: *const i32) -> Self::Sum {
        unreachable!("only where PACKED_ROWS is not 0")
    }
    /// Writes a vector of sums to `p`.
    unsafe fn write(_sum: Self::Sum, _p: *mut i32) {
        unreachable!("only where PACKED_ROWS is not 0")
    }
    /// [`part`], compiled with the instructions.
    unsafe fn run(job: &Job<'_, Self>, part: Part, sink: &mut Sink<'_>);
}

/// Sixteen codes in an array: code for any CPU.
#[derive(Clone, Copy)]
pub(super) struct Plain;

impl Dot for Plain {
    type Left = i16;
    type A = [i16; 16];
    type B = [i16; 16];
    type Sum = [i32; 8];
    type Floats = Portable;
    const STEP: usize = 16;
    const BIAS: i32 = 0;
    const ROWS: usize = 1;
    const FLOAT_ROWS: usize = 1;
    const LANES: usize = 8;

    #[inline(always)]
    fn encode(code: i8) -> i16 {
        code.into()
    }

    #[inline(always)]
    unsafe fn zero() -> [i32; 8] {
        [0; 8]
    }

    #[inline(always)]
    unsafe fn left(p: *const i16) -> [i16; 16] {
        // SAFETY: the contract of `Dot`; an array needs no more alignment than its elements.
        unsafe { *p.cast() }
    }

    #[inline(always)]
    unsafe fn ones() -> [i16; 16] {
        [1; 16]
    }

    #[inline(always)]
    unsafe fn right(p: *const i8) -> [i16; 16] {
        // SAFETY: as above.
        unsafe { *p.cast::<[i8; 16]>() }.map(i16::from)
    }

    #[inline(always)]
    unsafe fn right_some(p: *const i8, count: usize) -> [i16; 16] {
        // SAFETY: the contract of `Dot`: `i < count` are there.
        std::array::from_fn(|i| if i < count { unsafe { *p.add(i) }.into() } else { 0 })
    }

    #[inline(always)]
    unsafe fn dot(sum: [i32; 8], a: [i16; 16], b: [i16; 16]) -> [i32; 8] {
        let product = |i: usize| i32::from(a[i]) * i32::from(b[i]);
        std::array::from_fn(|i| sum[i].wrapping_add(product(2 * i) + product(2 * i + 1)))
    }

    #[inline(always)]
    unsafe fn totals(sums: [[i32; 8]; 4]) -> [i32; 4] {
        sums.map(|sum| sum.into_iter().fold(0, i32::wrapping_add))
    }

    unsafe fn run(job: &Job<'_, Self>, its: Part, sink: &mut Sink<'_>) {
        // SAFETY: portable code needs no instructions.
        unsafe { part(job, its, sink) }
    }
}
