//! Quantize and dequantize: kernels of cuda/src/four_bit.cu.

use crate::codebook::Kind;
use crate::device::cuda::{Absmax, Arguments, Kernel, Launch, Pointer, Stream, dtype_index, tiles};
use crate::element::Dtype;
use crate::error::Result;
use crate::layout::check_four_bit_block;

use super::{aligned, kind_number};

/// Elements that a block of threads takes, in cuda/src/four_bit.cu.
const DEQUANTIZE_SPAN: u64 = 4096;

pub(super) static QUANTIZE: [Kernel; 3] = [
    Kernel::new("four_bit", "quantize_4bit_bf16"),
    Kernel::new("four_bit", "quantize_4bit_f16"),
    Kernel::new("four_bit", "quantize_4bit_f32"),
];

pub(super) static DEQUANTIZE: [Kernel; 3] = [
    Kernel::new("four_bit", "dequantize_4bit_bf16"),
    Kernel::new("four_bit", "dequantize_4bit_f16"),
    Kernel::new("four_bit", "dequantize_4bit_f32"),
];

/// Quantizes `n` elements at `a` into `packed` (`(n + 1) / 2` bytes) and `absmax` (fp32, one a block of `block`).
///
/// # Safety
/// The pointers must be device memory of the stream's device, of these sizes, until the stream has passed the launch.
pub unsafe fn quantize(
    stream: &Stream,
    (a, dtype): (Pointer, Dtype),
    n: usize,
    kind: Kind,
    block: usize,
    packed: Pointer,
    absmax: Pointer,
) -> Result<()> {
    let kernel = &QUANTIZE[dtype_index(dtype)];
    // SAFETY: the arguments are those of `quantize_4bit_*` in cuda/src/four_bit.cu; the caller vouches for the pointers.
    unsafe { quantize_by(kernel, |n| tiles(kernel, stream, dtype, n), 16, stream, a, n, kind, block, (packed, absmax)) }
}

/// Launches a kernel that takes what [`quantize`] does, with packed bytes aligned for it if they lie at a multiple of `align`.
///
/// # Safety
/// As [`quantize`].
pub(super) unsafe fn quantize_by(
    kernel: &Kernel,
    launch: impl FnOnce(usize) -> Result<Launch>,
    align: u64,
    stream: &Stream,
    a: Pointer,
    n: usize,
    kind: Kind,
    block: usize,
    (packed, absmax): (Pointer, Pointer),
) -> Result<()> {
    check_four_bit_block(block)?;
    if n == 0 {
        return Ok(());
    }
    let mut arguments = Arguments::default()
        .u64(a)
        .u64(n as u64)
        .u64(packed)
        .u64(absmax)
        .u32(block.trailing_zeros())
        .u32(kind_number(kind))
        .u32(u32::from(aligned(&[(a, 16), (packed, align)])));
    // SAFETY: passed on.
    unsafe { kernel.launch(stream, launch(n)?, &mut arguments) }
}

/// Dequantizes `n` weights into `out`.
///
/// # Safety
/// As [`quantize`].
pub unsafe fn dequantize(
    stream: &Stream,
    packed: Pointer,
    absmax: Absmax,
    kind: Kind,
    block: usize,
    (out, dtype): (Pointer, Dtype),
    n: usize,
) -> Result<()> {
    check_four_bit_block(block)?;
    if n == 0 {
        return Ok(());
    }
    let kernel = &DEQUANTIZE[dtype_index(dtype)];
    let launch = Kernel::spread((n as u64).div_ceil(DEQUANTIZE_SPAN));
    let mut arguments = Arguments::default()
        .u64(packed)
        .scales(absmax)
        .u64(out)
        .u64(n as u64)
        .u32(block.trailing_zeros())
        .u32(kind_number(kind))
        .u32(u32::from(aligned(&[(packed, 4), (out, 16)])));
    // SAFETY: the arguments are those of `dequantize_4bit_*`; the caller vouches for the pointers.
    unsafe { kernel.launch(stream, launch, &mut arguments) }
}
