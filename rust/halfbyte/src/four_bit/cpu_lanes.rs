//! What the kernels of [`super::cpu_matmul`] ask of a vector instruction set, and the portable answer.
//!
//! A kernel is written once, generic over [`Lanes`] and always inlined, into one function for each level that is compiled
//! with the level's instructions. So every `unsafe fn` here has the same contract: *the CPU has the instructions of the
//! implementing type*, and pointers are good for as many elements as the text says.

use super::reference::code_at;

/// A vector of fp32 numbers and the decoding of 4-bit codes to it.
pub(crate) trait Lanes: Copy {
    /// Numbers in a vector.
    const N: usize;
    /// The 16 values of a code, times a scale.
    type Table: Copy;

    /// All lanes zero.
    unsafe fn zero() -> Self;
    /// All lanes `*p`.
    unsafe fn splat(p: *const f32) -> Self;
    /// `N` numbers at `p`.
    unsafe fn load(p: *const f32) -> Self;
    /// Writes `N` numbers to `p`.
    unsafe fn store(self, p: *mut f32);
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// `self · b + c`, with one rounding where the instructions have that.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// Sum of the lanes.
    unsafe fn sum(self) -> f32;
    /// `values[i] · scale`.
    unsafe fn table(values: &[f32; 16], scale: f32) -> Self::Table;
    /// The weights of `N` codes in the `N / 2` bytes at `p`.
    unsafe fn decode(table: &Self::Table, p: *const u8) -> Self;
}

/// Eight numbers in an array: code for any CPU, which compilers turn into the vectors they know.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

impl Lanes for Portable {
    const N: usize = 8;
    type Table = [f32; 16];

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; 8])
    }

    #[inline(always)]
    unsafe fn splat(p: *const f32) -> Self {
        // SAFETY: the contract of `Lanes`.
        Self([unsafe { *p }; 8])
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the contract of `Lanes`; an array needs no more alignment than its elements.
        Self(unsafe { *p.cast() })
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as in `load`.
        unsafe { *p.cast() = self.0 }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // Not `mul_add`: without the instruction that is a call for each number.
        Self(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        self.0.iter().sum()
    }

    #[inline(always)]
    unsafe fn table(values: &[f32; 16], scale: f32) -> [f32; 16] {
        values.map(|v| v * scale)
    }

    #[inline(always)]
    unsafe fn decode(table: &[f32; 16], p: *const u8) -> Self {
        // SAFETY: the contract of `Lanes`.
        let bytes: [u8; 4] = unsafe { *p.cast() };
        Self(std::array::from_fn(|i| {
            let byte = bytes[i / 2];
            table[usize::from(if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 })]
        }))
    }
}

/// Decodes `out.len()` weights from weight `start` on to fp32. `scales[0]` is that of the block in which `start` lies.
///
/// # Safety
/// The CPU has the instructions of `V`. (All else is checked.)
#[inline(always)]
pub(super) unsafe fn decode_run<V: Lanes>(
    packed: &[u8],
    start: usize,
    values: &[f32; 16],
    block: usize,
    scales: &[f32],
    out: &mut [f32],
) {
    let packed = &packed[start / 2..(start + out.len()).div_ceil(2)];
    let end = start + out.len();
    let (mut at, mut rest) = (start, out);
    for &scale in scales {
        let here = (block - at % block).min(end - at);
        let (run, beyond) = rest.split_at_mut(here);
        // SAFETY: passed on.
        unsafe { decode_block::<V>(&packed[at / 2 - start / 2..], at % 2 == 1, values, scale, run) };
        (at, rest) = (at + here, beyond);
    }
}

/// Decodes `out.len()` weights with one scale, from the first nibble of `packed` on or (`odd`) the second.
#[inline(always)]
unsafe fn decode_block<V: Lanes>(packed: &[u8], odd: bool, values: &[f32; 16], scale: f32, out: &mut [f32]) {
    let (mut packed, mut out) = (packed, out);
    if odd && let Some((first, rest)) = std::mem::take(&mut out).split_first_mut() {
        *first = values[usize::from(packed[0] & 15)] * scale;
        (packed, out) = (&packed[1..], rest);
    }
    // SAFETY: passed on.
    let table = unsafe { V::table(values, scale) };
    let whole = out.len() - out.len() % V::N;
    let (vectors, tail) = out.split_at_mut(whole);
    let (bytes, tail_bytes) = packed.split_at(whole / 2);
    for (vector, bytes) in vectors.chunks_exact_mut(V::N).zip(bytes.chunks_exact(V::N / 2)) {
        // SAFETY: the instructions are there, and both chunks have the sizes asked for.
        unsafe { V::decode(&table, bytes.as_ptr()).store(vector.as_mut_ptr()) };
    }
    for (i, out) in tail.iter_mut().enumerate() {
        *out = values[code_at(tail_bytes, i)] * scale;
    }
}
