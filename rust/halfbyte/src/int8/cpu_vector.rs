//! [`Dot`] for the vectors of x86-64, written once for all their widths: codes as bytes, where the CPU has the instruction
//! that multiplies those (VNNI), and codes widened to 16 bits.

use super::cpu_dot::Dot;
use super::cpu_product::{Job, Part, Sink};
use crate::four_bit::cpu_lanes::Lanes;

/// A vector register. Every `unsafe fn` has the contract of [`Dot`].
pub(super) trait Vector: Copy + 'static {
    /// fp32 vectors of the same width.
    type Floats: Lanes;

    const BYTES: usize;
    /// What [`Dot`] says of them.
    const ROWS: usize;
    const FLOAT_ROWS: usize;
    const PACKED_ROWS: usize;

    unsafe fn zero() -> Self;
    unsafe fn splat_i8(byte: i8) -> Self;
    unsafe fn splat_i16(word: i16) -> Self;
    unsafe fn splat_i32(lane: i32) -> Self;
    /// The bytes at `p`.
    unsafe fn load(p: *const u8) -> Self;
    /// Writes them to `p`.
    unsafe fn store(self, p: *mut u8);
    /// `count` bytes at `p`, fewer than there is room for, and zeros.
    unsafe fn load_some(p: *const i8, count: usize) -> Self;
    /// Half as many codes as there is room for bytes at `p`, widened.
    unsafe fn widen(p: *const i8) -> Self;
    /// `count` codes at `p`, widened, and zeros.
    unsafe fn widen_some(p: *const i8, count: usize) -> Self;
    unsafe fn xor(self, other: Self) -> Self;
    /// Adds 32-bit lanes.
    unsafe fn add(self, other: Self) -> Self;
    /// Adds to each 32-bit lane the products of its four bytes: those of `unsigned` with those of `signed`. Only where the CPU
    /// has it, which those who use [`Bytes`] have checked.
    unsafe fn dot_bytes(self, unsigned: Self, signed: Self) -> Self;
    /// In each 32-bit lane the sum of the products of its two signed words.
    unsafe fn dot_words(self, other: Self) -> Self;
    /// The totals of the lanes of four vectors.
    unsafe fn totals(vectors: [Self; 4]) -> [i32; 4];
    /// Writes the 32-bit lanes of as many vectors as there are lanes as columns: lane `j` of each to `p + j · PANEL`.
    unsafe fn transpose(vectors: &[Self], p: *mut i32);
    /// [`super::cpu_product::part`], compiled with the instructions for [`Bytes`] and for [`Words`].
    unsafe fn run_bytes(job: &Job<'_, Bytes<Self>>, part: Part, sink: &mut Sink<'_>);
    unsafe fn run_words(job: &Job<'_, Words<Self>>, part: Part, sink: &mut Sink<'_>);
}

/// Codes as bytes: the right side unsigned, `code + 128`.
#[derive(Clone, Copy)]
pub(super) struct Bytes<V>(V);

/// Codes as 16-bit words.
#[derive(Clone, Copy)]
pub(super) struct Words<V>(V);

/// What both do alike.
macro_rules! alike {
    () => {
        type A = V;
        type B = V;
        type Sum = V;
        type Floats = V::Floats;
        const ROWS: usize = V::ROWS;
        const FLOAT_ROWS: usize = V::FLOAT_ROWS;
        const LANES: usize = V::BYTES / 4;
        const PACKED_ROWS: usize = V::PACKED_ROWS;

        #[inline(always)]
        unsafe fn zero() -> V {
            // SAFETY: the contract of `Dot`, here and below.
            unsafe { V::zero() }
        }

        #[inline(always)]
        unsafe fn left(p: *const Self::Left) -> V {
            // SAFETY: as above.
            unsafe { V::load(p.cast()) }
        }

        #[inline(always)]
        unsafe fn totals(sums: [V; 4]) -> [i32; 4] {
            // SAFETY: as above.
            unsafe { V::totals(sums) }
        }

        #[inline(always)]
        unsafe fn transpose(vectors: &[V], p: *mut i32) {
            // SAFETY: as above.
            unsafe { V::transpose(vectors, p) }
        }

        #[inline(always)]
        unsafe fn splat(p: *const Self::Left) -> V {
            // SAFETY: as above.
            unsafe { V::splat_i32(p.cast::<i32>().read_unaligned()) }
        }

        #[inline(always)]
        unsafe fn packed(p: *const i32) -> V {
            // SAFETY: as above.
            unsafe { V::load(p.cast()) }
        }

        #[inline(always)]
        unsafe fn start(value: i32) -> V {
            // SAFETY: as above.
            unsafe { V::splat_i32(value) }
        }

        #[inline(always)]
        unsafe fn sums(p: *const i32) -> V {
            // SAFETY: as above.
            unsafe { V::load(p.cast()) }
        }

        #[inline(always)]
        unsafe fn write(sum: V, p: *mut i32) {
            // SAFETY: as above.
            unsafe { sum.store(p.cast()) }
        }
    };
}

impl<V: Vector> Dot for Bytes<V> {
    type Left = i8;
    const STEP: usize = V::BYTES;
    const BIAS: i32 = 128;
    alike!();

    #[inline(always)]
    fn encode(code: i8) -> i8 {
        code
    }

    fn as_is(codes: &[i8]) -> Option<&[i8]> {
        Some(codes)
    }

    #[inline(always)]
    unsafe fn ones() -> V {
        // SAFETY: as above.
        unsafe { V::splat_i8(1) }
    }

    #[inline(always)]
    unsafe fn right(p: *const i8) -> V {
        // SAFETY: as above. The sign bit turned over is 128 more.
        unsafe { V::load(p.cast()).xor(V::splat_i8(i8::MIN)) }
    }

    #[inline(always)]
    unsafe fn right_some(p: *const i8, count: usize) -> V {
        // SAFETY: as above.
        unsafe { V::load_some(p, count).xor(V::splat_i8(i8::MIN)) }
    }

    #[inline(always)]
    unsafe fn dot(sum: V, a: V, b: V) -> V {
        // SAFETY: as above, and whoever runs this has checked the instruction.
        unsafe { sum.dot_bytes(b, a) }
    }

    #[inline(always)]
    unsafe fn run(job: &Job<'_, Self>, its: Part, sink: &mut Sink<'_>) {
        // SAFETY: as above.
        unsafe { V::run_bytes(job, its, sink) }
    }
}

impl<V: Vector> Dot for Words<V> {
    type Left = i16;
    const STEP: usize = V::BYTES / 2;
    const BIAS: i32 = 0;
    alike!();

    #[inline(always)]
    fn encode(code: i8) -> i16 {
        code.into()
    }

    #[inline(always)]
    unsafe fn ones() -> V {
        // SAFETY: as above.
        unsafe { V::splat_i16(1) }
    }

    #[inline(always)]
    unsafe fn right(p: *const i8) -> V {
        // SAFETY: as above.
        unsafe { V::widen(p) }
    }

    #[inline(always)]
    unsafe fn right_some(p: *const i8, count: usize) -> V {
        // SAFETY: as above.
        unsafe { V::widen_some(p, count) }
    }

    #[inline(always)]
    unsafe fn dot(sum: V, a: V, b: V) -> V {
        // SAFETY: as above. Two products of codes are far from the limits of 32 bits.
        unsafe { sum.add(a.dot_words(b)) }
    }

    #[inline(always)]
    unsafe fn run(job: &Job<'_, Self>, its: Part, sink: &mut Sink<'_>) {
        // SAFETY: as above.
        unsafe { V::run_words(job, its, sink) }
    }
}
