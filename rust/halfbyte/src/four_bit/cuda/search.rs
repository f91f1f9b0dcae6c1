//! Scales by least squared error: kernels of cuda/src/four_bit_search.cu.

use crate::codebook::Kind;
use crate::device::cuda::{Absmax, Arguments, Kernel, Pointer, Stream, THREADS, dtype_index};
use crate::element::Dtype;
use crate::error::Result;
use crate::layout::check_four_bit_block;

use super::elementwise::quantize_by;
use super::{aligned, kind_number};

/// Elements that a block of threads takes at a time, in cuda/src/four_bit_search.cu.
const SEARCH_SPAN: u64 = 4096;
const ENCODE_SPAN: u64 = 2048;

pub(super) static SEARCH: [Kernel; 3] = [
    Kernel::new("four_bit_search", "search_4bit_bf16"),
    Kernel::new("four_bit_search", "search_4bit_f16"),
    Kernel::new("four_bit_search", "search_4bit_f32"),
];

pub(super) static ENCODE: [Kernel; 3] = [
    Kernel::new("four_bit_search", "encode_4bit_bf16"),
    Kernel::new("four_bit_search", "encode_4bit_f16"),
    Kernel::new("four_bit_search", "encode_4bit_f32"),
];

/// [`super::quantize`] with scales by least squared error, as in [`crate::four_bit::search`].
///
/// # Safety
/// As [`super::quantize`].
pub unsafe fn quantize_search(
    stream: &Stream,
    (a, dtype): (Pointer, Dtype),
    n: usize,
    kind: Kind,
    block: usize,
    packed: Pointer,
    absmax: Pointer,
) -> Result<()> {
    let kernel = &SEARCH[dtype_index(dtype)];
    let launch = |n| kernel.filling(stream.device, (n as u64).div_ceil(SEARCH_SPAN), THREADS, 0);
    // SAFETY: the arguments are those of `search_4bit_*` in cuda/src/four_bit_search.cu; the caller vouches for the pointers.
    unsafe { quantize_by(kernel, launch, 8, stream, a, n, kind, block, (packed, absmax)) }
}

/// Chooses codes again, for given scales, as [`crate::four_bit::search::encode_into`] does.
///
/// # Safety
/// As [`super::quantize`].
pub unsafe fn encode(
    stream: &Stream,
    (a, dtype): (Pointer, Dtype),
    n: usize,
    kind: Kind,
    block: usize,
    packed: Pointer,
    absmax: Absmax,
) -> Result<()> {
    check_four_bit_block(block)?;
    if n == 0 {
        return Ok(());
    }
    let kernel = &ENCODE[dtype_index(dtype)];
    let launch = kernel.filling(stream.device, (n as u64).div_ceil(ENCODE_SPAN), THREADS, 0)?;
    let mut arguments = Arguments::default()
        .u64(a)
        .u64(n as u64)
        .u64(packed)
        .scales(absmax)
        .u32(block.trailing_zeros())
        .u32(kind_number(kind))
        .u32(u32::from(aligned(&[(a, 16), (packed, 4)])));
    // SAFETY: the arguments are those of `encode_4bit_*`; the caller vouches for the pointers.
    unsafe { kernel.launch(stream, launch, &mut arguments) }
}
