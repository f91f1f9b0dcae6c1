//! Blockwise 8-bit quantization on CUDA.

use crate::device::cuda::{Arguments, Kernel, Pointer, Stream, THREADS, dtype_index, tiles};
use crate::element::Dtype;
use crate::error::{Error, Result};

/// Elements that a block of threads takes at a time, in cuda/src/eight_bit.cu.
const DEQUANTIZE_SPAN: u64 = 4096;

static QUANTIZE: [Kernel; 3] = [
    Kernel::new("eight_bit", "quantize_8bit_bf16"),
    Kernel::new("eight_bit", "quantize_8bit_f16"),
    Kernel::new("eight_bit", "quantize_8bit_f32"),
];

/// For blocks of any size, a warp a block.
static QUANTIZE_ANY: [Kernel; 3] = [
    Kernel::new("eight_bit", "quantize_8bit_any_bf16"),
    Kernel::new("eight_bit", "quantize_8bit_any_f16"),
    Kernel::new("eight_bit", "quantize_8bit_any_f32"),
];

static DEQUANTIZE: [Kernel; 3] = [
    Kernel::new("eight_bit", "dequantize_8bit_bf16"),
    Kernel::new("eight_bit", "dequantize_8bit_f16"),
    Kernel::new("eight_bit", "dequantize_8bit_f32"),
];

fn aligned(a: Pointer, b: Pointer) -> u32 {
    u32::from(a.is_multiple_of(16) && b.is_multiple_of(16))
}

fn check_block(block: usize) -> Result<u32> {
    match u32::try_from(block) {
        Ok(block) if block > 0 => Ok(block),
        _ => Err(Error::value("blocksize", "a number from 1 to 4294967295", block)),
    }
}

/// Quantizes `n` elements at `a`, less the fp32 at `offset` if it is given, to the nearest of the 256 rising fp32 at `map`:
/// `codes` gets a byte an element, `absmax` an fp32 a block.
///
/// # Safety
/// The pointers must be device memory of the stream's device, of these sizes, until the stream has passed the launch.
pub unsafe fn quantize(
    stream: &Stream,
    (a, dtype): (Pointer, Dtype),
    n: usize,
    map: Pointer,
    block: usize,
    offset: Option<Pointer>,
    codes: Pointer,
    absmax: Pointer,
) -> Result<()> {
    let block = check_block(block)?;
    if n == 0 {
        return Ok(());
    }
    // By tiles, where they hold whole blocks or blocks whole tiles. An offset comes with scales, which are fp32.
    let tiled = block.is_power_of_two() && (32..=4096).contains(&block) && (offset.is_none() || dtype == Dtype::F32);
    let arguments = Arguments::default().u64(a).u64(n as u64).u64(map).u64(offset.unwrap_or(0)).u64(codes).u64(absmax);
    let (kernel, launch, mut arguments) = if tiled {
        let kernel = &QUANTIZE[dtype_index(dtype)];
        let launch = tiles(kernel, stream, dtype, n)?;
        (kernel, launch, arguments.u32(block.trailing_zeros()).u32(aligned(a, codes)))
    } else {
        let kernel = &QUANTIZE_ANY[dtype_index(dtype)];
        let blocks = (n as u64).div_ceil(u64::from(block));
        let launch = kernel.filling(stream.device, blocks.div_ceil(u64::from(THREADS / 32)), THREADS, 0)?;
        (kernel, launch, arguments.u32(block))
    };
    // SAFETY: the arguments are those of the kernel in cuda/src/eight_bit.cu; the caller vouches for the pointers.
    unsafe { kernel.launch(stream, launch, &mut arguments) }
}

/// Dequantizes: `out[i] = map[codes[i]] · absmax[i / block] + offset`.
///
/// # Safety
/// As [`quantize`].
pub unsafe fn dequantize(
    stream: &Stream,
    codes: Pointer,
    map: Pointer,
    absmax: Pointer,
    block: usize,
    offset: Option<Pointer>,
    (out, dtype): (Pointer, Dtype),
    n: usize,
) -> Result<()> {
    let block = check_block(block)?;
    if n == 0 {
        return Ok(());
    }
    let kernel = &DEQUANTIZE[dtype_index(dtype)];
    let launch = Kernel::spread((n as u64).div_ceil(DEQUANTIZE_SPAN));
    let mut arguments = Arguments::default()
        .u64(codes)
        .u64(map)
        .u64(absmax)
        .u64(offset.unwrap_or(0))
        .u64(out)
        .u64(n as u64)
        .u32(block)
        .u32(aligned(codes, out));
    // SAFETY: the arguments are those of `dequantize_8bit_*`; the caller vouches for the pointers.
    unsafe { kernel.launch(stream, launch, &mut arguments) }
}

/// Every kernel of this module, for a test that each is in the images.
#[doc(hidden)]
pub fn kernels() -> Vec<&'static Kernel> {
    QUANTIZE.iter().chain(&QUANTIZE_ANY).chain(&DEQUANTIZE).collect()
}
