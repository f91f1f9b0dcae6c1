//! The product, and which kernel makes it.

use crate::codebook::Kind;
use crate::device::cuda::{Absmax, Arguments, Device, Kernel, Launch, Pointer, Stream, THREADS, device, dtype_index};
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::layout::check_four_bit_block;

use super::group::GroupPiece;
use super::matmul_large::LargeChoice;
use super::matmul_small::{MATMUL_MMA, MmaPlan, mma_values};
use super::{aligned, kind_number};
use super::{matmul_large, matmul_stream, matmul_wgmma};

/// Most rows of activations that [`matmul`] takes where there is nothing better than `mma.sync`.
const MOST_ROWS: usize = 32;

/// Smallest block that the tensor-core kernel takes: its step along K.
pub(super) const MMA_STEP: usize = 64;

pub(super) static MATMUL_SIMT: [Kernel; 3] = [
    Kernel::new("four_bit_simt", "matmul_4bit_simt_bf16"),
    Kernel::new("four_bit_simt", "matmul_4bit_simt_f16"),
    Kernel::new("four_bit_simt", "matmul_4bit_simt_f32"),
];

/// Whether [`matmul`] takes a product of this shape (M, N, K) and type on a device: false where dequantizing the weight and a
/// dense product is the better way. A pure function of its arguments and of what the device is.
pub fn fused(ordinal: i32, dtype: Dtype, (m, n, k): (usize, usize, usize), block: usize) -> Result<bool> {
    check_four_bit_block(block)?;
    let gpu = device(ordinal)?;
    let takes = m <= most_rows(gpu, dtype, k, block) || large(gpu, dtype, (m, n, k), block);
    Ok(takes && i32::try_from(n.max(k)).is_ok())
}

/// Whether the kernel for many rows is the one to take.
fn large(gpu: &Device, dtype: Dtype, shape: (usize, usize, usize), block: usize) -> bool {
    tensor_cores(gpu, dtype, shape.2, block, &[]) && matmul_large::takes(gpu, dtype, shape)
}

fn most_rows(gpu: &Device, dtype: Dtype, k: usize, block: usize) -> usize {
    let wgmma = matmul_wgmma::fits(gpu, dtype) && tensor_cores(gpu, dtype, k, block, &[]);
    if wgmma { matmul_wgmma::MOST_ROWS } else { MOST_ROWS }
}

/// Whether the tensor-core kernels take activations of this type and K, and tensors that lie at these addresses.
pub(super) fn tensor_cores(gpu: &Device, dtype: Dtype, k: usize, block: usize, tensors: &[Pointer]) -> bool {
    dtype != Dtype::F32
        && gpu.capability >= 80
        && k > 0
        && k.is_multiple_of(MMA_STEP)
        && block >= MMA_STEP
        && tensors.iter().all(|tensor| tensor.is_multiple_of(16))
}

/// Which kernel has a product on tensor cores whose tensors lie as they want it.
enum Way {
    Large,
    Stream,
    Wgmma,
    Other,
}

fn way(gpu: &Device, dtype: Dtype, shape: (usize, usize, usize)) -> Way {
    if matmul_large::takes(gpu, dtype, shape) {
        Way::Large
    } else if matmul_stream::fits(gpu, dtype, shape.0) {
        Way::Stream
    } else if matmul_wgmma::fits(gpu, dtype) {
        Way::Wgmma
    } else {
        Way::Other
    }
}

/// Bytes of scratch memory with which [`matmul`] is fastest on a product of this shape (M, N, K); 0 where it needs none. At most 128 KB and 8 bytes
/// for each multiprocessor.
pub fn scratch_bytes(ordinal: i32, dtype: Dtype, shape: (usize, usize, usize), block: usize) -> Result<usize> {
    let (m, n, k) = shape;
    let gpu = device(ordinal)?;
    if m <= matmul_stream::MOST_ROWS || n == 0 || !tensor_cores(gpu, dtype, k, block, &[]) {
        return Ok(0);
    }
    Ok(match way(gpu, dtype, shape) {
        Way::Large => matmul_large::scratch_bytes(gpu, shape, LargeChoice::default()),
        Way::Wgmma => matmul_wgmma::scratch_bytes(gpu, shape),
        Way::Stream | Way::Other => 0,
    })
}

/// `out[m, n] = Σ_k x[m, k] · w[n, k] + bias[n]` straight from the packed weights, for what [`fused`] is true of.
///
/// 16-bit activations go through the tensor cores where the GPU and the shape allow it (compute capability 8.0, K a multiple
/// of 64, blocks of 64 and more); fp32 ones, and the rest, through fp32 arithmetic. The choice depends on shape, type and
/// device alone. `scratch` is device memory for sums of blocks of threads that share a tile; whatever is in it. Without it a product of more than
/// 16 rows may be slower, and its sums are added in another order.
///
/// # Safety
/// As [`quantize`]; `x` is [M, K] and `out` [M, N] row by row, `bias` [N], all of `dtype`. `scratch` has [`scratch_bytes`] bytes, begins at a
/// multiple of 16, and is nobody else's until the product is there.
pub unsafe fn matmul(
    stream: &Stream,
    dtype: Dtype,
    x: Pointer,
    (m, n, k): (usize, usize, usize),
    packed: Pointer,
    absmax: Absmax,
    kind: Kind,
    block: usize,
    bias: Option<Pointer>,
    out: Pointer,
    scratch: Option<Pointer>,
) -> Result<()> {
    check_four_bit_block(block)?;
    let gpu = device(stream.device)?;
    let most = most_rows(gpu, dtype, k, block);
    if m > most && !large(gpu, dtype, (m, n, k), block) {
        return Err(Error::shape("x", format!("at most [{most}, K] on this GPU"), format!("[{m}, {k}]")));
    }
    check_columns(n, k)?;
    if m == 0 || n == 0 {
        return Ok(());
    }
    let tensor_cores = tensor_cores(gpu, dtype, k, block, &[x, packed]);
    if tensor_cores {
        let piece = GroupPiece { n, packed, absmax, bias, out };
        // SAFETY: the caller vouches for the pointers; shape and alignment are as the kernels want them.
        let launched = unsafe {
            match way(gpu, dtype, (m, n, k)) {
                Way::Large => {
                    let choice = LargeChoice::default();
                    Some(matmul_large::launch(stream, gpu, dtype, x, (m, k), &piece, kind, block, scratch, choice))
                }
                Way::Stream => Some(matmul_stream::launch(stream, gpu, dtype, x, (m, k), &[piece], kind, block, None)),
                Way::Wgmma => Some(matmul_wgmma::launch(stream, gpu, dtype, x, (m, k), &piece, kind, block, scratch)),
                Way::Other => None,
            }
        };
        if let Some(launched) = launched {
            return launched;
        }
    }
    let arguments = |x: Pointer, out: Pointer, m: usize| {
        Arguments::default()
            .u64(x)
            .u64(packed)
            .scales(absmax)
            .u64(bias.unwrap_or(0))
            .u64(out)
            .u32(m as u32)
            .u32(n as u32)
            .u32(k as u32)
            .u32(block.trailing_zeros())
    };
    if tensor_cores {
        let plan = MmaPlan::new(m, n, k, gpu.multiprocessors, gpu.shared_memory);
        let (values, gain) = mma_values(kind, dtype);
        let arguments = values.into_iter().fold(arguments(x, out, m), Arguments::u64).u32((1.0 / gain).to_bits());
        let mut arguments = arguments.u32(plan.tiles_per_block).u32(plan.tiles_per_pass);
        let kernel = &MATMUL_MMA[dtype_index(dtype)][usize::from(absmax.is_nested())][usize::from(m > 8)];
        // SAFETY: the arguments are those of `matmul_4bit_mma_*`; the caller vouches for the pointers.
        return unsafe { kernel.launch(stream, plan.launch, &mut arguments) };
    }
    let launch = Launch::new((n.div_ceil(THREADS as usize / 32) as u32, 1), THREADS);
    let vectors = k.is_multiple_of(8) && aligned(&[(x, 16), (packed, 4)]);
    for row in (0..m).step_by(MOST_ROWS) {
        let at = |base: Pointer, width: usize| base + (row * width * dtype.size()) as u64;
        let mut arguments =
            arguments(at(x, k), at(out, n), MOST_ROWS.min(m - row)).u32(kind_number(kind)).u32(u32::from(vectors));
        // SAFETY: the arguments are those of `matmul_4bit_simt_*`; the caller vouches for the pointers.
        unsafe { MATMUL_SIMT[dtype_index(dtype)].launch(stream, launch, &mut arguments)? };
    }
    Ok(())
}

pub(super) fn check_columns(n: usize, k: usize) -> Result<()> {
    for (argument, size) in [("out", n), ("x", k)] {
        if size > i32::MAX as usize {
            return Err(Error::shape(argument, "at most 2147483647 columns", size));
        }
    }
    Ok(())
}

/// Scratch memory that [`matmul_by_large`] takes.
#[doc(hidden)]
pub fn large_scratch_bytes(ordinal: i32, shape: (usize, usize, usize), choice: LargeChoice) -> Result<usize> {
    Ok(matmul_large::scratch_bytes(device(ordinal)?, shape, choice))
}

/// [`matmul`] by the kernel for many rows, whatever M: for tests and measurements. False, and nothing enqueued, where it does not
/// fit.
///
/// # Safety
/// As [`matmul`]; `scratch` has [`large_scratch_bytes`] bytes.
#[doc(hidden)]
pub unsafe fn matmul_by_large(
    stream: &Stream,
    dtype: Dtype,
    x: Pointer,
    (m, n, k): (usize, usize, usize),
    packed: Pointer,
    absmax: Absmax,
    kind: Kind,
    block: usize,
    bias: Option<Pointer>,
    out: Pointer,
    scratch: Option<Pointer>,
    choice: LargeChoice,
) -> Result<bool> {
    check_four_bit_block(block)?;
    check_columns(n, k)?;
    let gpu = device(stream.device)?;
    if !matmul_wgmma::fits(gpu, dtype) || !tensor_cores(gpu, dtype, k, block, &[x, packed]) {
        return Ok(false);
    }
    if m > 0 && n > 0 {
        let piece = GroupPiece { n, packed, absmax, bias, out };
        // SAFETY: passed on; shape and alignment are as the kernel wants them.
        unsafe { matmul_large::launch(stream, gpu, dtype, x, (m, k), &piece, kind, block, scratch, choice)? };
    }
    Ok(true)
}
