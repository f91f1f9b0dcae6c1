//! 4-bit operations on CUDA: raw device pointers and a raw stream in, work enqueued, nothing waited for.

use half::{bf16, f16};

use crate::codebook::Kind;
use crate::device::cuda::{Absmax, Arguments, Kernel, Launch, Pointer, Stream, THREADS, device, dtype_index};
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::layout::check_four_bit_block;

/// Most rows of activations that [`matmul`] takes. Beyond, dequantizing and a dense product is the better way.
pub const MATMUL_MAX_ROWS: usize = 32;

/// Elements that a block of threads takes at a time, in cuda/src/four_bit.cu.
const QUANTIZE_SPAN: u64 = 4096;
const DEQUANTIZE_SPAN: u64 = 8192;

/// Smallest block that the tensor-core kernel takes: its step along K.
const MMA_STEP: usize = 64;

/// NF4 is 0 and FP4 is 1 on the device.
const fn kind_number(kind: Kind) -> u32 {
    match kind {
        Kind::Nf4 => 0,
        Kind::Fp4 => 1,
    }
}

fn aligned(pointers: &[(Pointer, u64)]) -> bool {
    pointers.iter().all(|(pointer, align)| pointer.is_multiple_of(*align))
}

/// By dtype; blocks of up to 256, and wider ones.
static QUANTIZE: [[Kernel; 2]; 3] = [
    [Kernel::new("four_bit", "quantize_4bit_bf16"), Kernel::new("four_bit", "quantize_4bit_wide_bf16")],
    [Kernel::new("four_bit", "quantize_4bit_f16"), Kernel::new("four_bit", "quantize_4bit_wide_f16")],
    [Kernel::new("four_bit", "quantize_4bit_f32"), Kernel::new("four_bit", "quantize_4bit_wide_f32")],
];

static DEQUANTIZE: [Kernel; 3] = [
    Kernel::new("four_bit", "dequantize_4bit_bf16"),
    Kernel::new("four_bit", "dequantize_4bit_f16"),
    Kernel::new("four_bit", "dequantize_4bit_f32"),
];

static MATMUL_SIMT: [Kernel; 3] = [
    Kernel::new("four_bit_simt", "matmul_4bit_simt_bf16"),
    Kernel::new("four_bit_simt", "matmul_4bit_simt_f16"),
    Kernel::new("four_bit_simt", "matmul_4bit_simt_f32"),
];

/// By dtype, nested or not, and 8 or 16 tokens a row of blocks.
static MATMUL_MMA: [[[Kernel; 2]; 2]; 2] = [
    [
        [
            Kernel::new("four_bit_mma_bf16_m8", "matmul_4bit_mma_plain_m8"),
            Kernel::new("four_bit_mma_bf16_m16", "matmul_4bit_mma_plain_m16"),
        ],
        [
            Kernel::new("four_bit_mma_bf16_m8", "matmul_4bit_mma_nested_m8"),
            Kernel::new("four_bit_mma_bf16_m16", "matmul_4bit_mma_nested_m16"),
        ],
    ],
    [
        [
            Kernel::new("four_bit_mma_f16_m8", "matmul_4bit_mma_plain_m8"),
            Kernel::new("four_bit_mma_f16_m16", "matmul_4bit_mma_plain_m16"),
        ],
        [
            Kernel::new("four_bit_mma_f16_m8", "matmul_4bit_mma_nested_m8"),
            Kernel::new("four_bit_mma_f16_m16", "matmul_4bit_mma_nested_m16"),
        ],
    ],
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
    check_four_bit_block(block)?;
    if n == 0 {
        return Ok(());
    }
    let log2_block = block.trailing_zeros();
    let kernel = &QUANTIZE[dtype_index(dtype)][usize::from(block > 256)];
    let launch = kernel.filling(stream.device, (n as u64).div_ceil(QUANTIZE_SPAN))?;
    let mut arguments = Arguments::default()
        .u64(a)
        .u64(n as u64)
        .u64(packed)
        .u64(absmax)
        .u32(log2_block)
        .u32(kind_number(kind))
        .u32(u32::from(aligned(&[(a, 16), (packed, 4)])));
    // SAFETY: the arguments are those of `quantize_4bit_*` in cuda/src/four_bit.cu; the caller vouches for the pointers.
    unsafe { kernel.launch(stream, launch, &mut arguments) }
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
    let (scales, nested, map, offset, nested_shift) = absmax.parts();
    let kernel = &DEQUANTIZE[dtype_index(dtype)];
    let launch = Kernel::spread((n as u64).div_ceil(DEQUANTIZE_SPAN));
    let mut arguments = Arguments::default()
        .u64(packed)
        .u64(scales)
        .u64(nested)
        .u64(map)
        .u64(offset)
        .u32(nested_shift)
        .u64(out)
        .u64(n as u64)
        .u32(block.trailing_zeros())
        .u32(kind_number(kind))
        .u32(u32::from(aligned(&[(packed, 4), (out, 16)])));
    // SAFETY: the arguments are those of `dequantize_4bit_*`; the caller vouches for the pointers.
    unsafe { kernel.launch(stream, launch, &mut arguments) }
}

/// `out[m, n] = Σ_k x[m, k] · w[n, k] + bias[n]` for at most [`MATMUL_MAX_ROWS`] rows, straight from the packed weights.
///
/// 16-bit activations go through the tensor cores where the GPU and the shape allow it (compute capability 8.0, K a multiple
/// of 64, blocks of 64 and more); fp32 ones, and the rest, through fp32 arithmetic. The choice depends on shape, type and
/// device alone.
///
/// # Safety
/// As [`quantize`]; `x` is [M, K] and `out` [M, N] row by row, `bias` [N], all of `dtype`.
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
) -> Result<()> {
    check_four_bit_block(block)?;
    if m > MATMUL_MAX_ROWS {
        return Err(Error::shape("x", format!("at most [{MATMUL_MAX_ROWS}, K] on CUDA"), format!("[{m}, {k}]")));
    }
    for (argument, size) in [("out", n), ("x", k)] {
        if size > i32::MAX as usize {
            return Err(Error::shape(argument, "at most 2147483647 columns", size));
        }
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    let gpu = device(stream.device)?;
    let (scales, nested, map, offset, nested_shift) = absmax.parts();
    let arguments = Arguments::default()
        .u64(x)
        .u64(packed)
        .u64(scales)
        .u64(nested)
        .u64(map)
        .u64(offset)
        .u32(nested_shift)
        .u64(bias.unwrap_or(0))
        .u64(out)
        .u32(m as u32)
        .u32(n as u32)
        .u32(k as u32)
        .u32(block.trailing_zeros());
    let tensor_cores = dtype != Dtype::F32
        && gpu.capability >= 80
        && k > 0
        && k.is_multiple_of(MMA_STEP)
        && block >= MMA_STEP
        && aligned(&[(x, 16), (packed, 16)]);
    if tensor_cores {
        let plan = MmaPlan::new(m, n, k, gpu.multiprocessors, gpu.shared_memory);
        let (values, gain) = mma_values(kind, dtype);
        let arguments = values.into_iter().fold(arguments, Arguments::u64).u32((1.0 / gain).to_bits());
        let mut arguments = arguments.u32(plan.tiles_per_block).u32(plan.tiles_per_pass);
        let kernel = &MATMUL_MMA[dtype_index(dtype)][usize::from(absmax.is_nested())][usize::from(m > 8)];
        // SAFETY: the arguments are those of `matmul_4bit_mma_*`; the caller vouches for the pointers.
        return unsafe { kernel.launch(stream, plan.launch, &mut arguments) };
    }
    let launch = Launch { grid: (n.div_ceil(THREADS as usize / 32) as u32, 1), threads: THREADS, shared: 0 };
    let vectors = k.is_multiple_of(8) && aligned(&[(x, 16), (packed, 4)]);
    let mut arguments = arguments.u32(kind_number(kind)).u32(u32::from(vectors));
    // SAFETY: the arguments are those of `matmul_4bit_simt_*`; the caller vouches for the pointers.
    unsafe { MATMUL_SIMT[dtype_index(dtype)].launch(stream, launch, &mut arguments) }
}

/// A code's values as 16-bit numbers, four a word, and the gain that they were multiplied with before rounding.
///
/// FP4 × 12 is exact. For NF4 these gains make the relative rounding error, weighted by how often normal weights use each
/// code, least: 7.8e-4 in bf16 (1.36e-3 without) and 8.1e-5 in fp16 (1.8e-4).
fn mma_values(kind: Kind, dtype: Dtype) -> ([u64; 4], f32) {
    let gain = match (kind, dtype) {
        (Kind::Fp4, _) => 12.0,
        (Kind::Nf4, Dtype::F16) => 1.36621,
        (Kind::Nf4, _) => 1.43677,
    };
    let mut words = [0; 4];
    for (i, value) in kind.values().iter().enumerate() {
        let bits = match dtype {
            Dtype::F16 => f16::from_f32(value * gain).to_bits(),
            _ => bf16::from_f32(value * gain).to_bits(),
        };
        words[i / 4] |= u64::from(bits) << (i % 4 * 16);
    }
    (words, gain)
}

/// How the tensor-core kernel cuts up a product; its shared memory is laid out in cuda/src/four_bit_mma.cu.
#[derive(Debug, PartialEq)]
struct MmaPlan {
    launch: Launch,
    tiles_per_block: u32,
    tiles_per_pass: u32,
}

impl MmaPlan {
    /// The pair table: 256 words, a copy a bank. It is static shared memory.
    const TABLE: u32 = 32 * 1024;
    /// The nested map, static too.
    const MAP: u32 = 1024;
    /// A stage of a warp's ring: 16 rows × (128 bytes of weights + 4 scales).
    const STAGE: u32 = 16 * 128 + 16 * 16;
    /// Warps of a block: the activations they hold take so many registers that there are no more.
    const MOST_WARPS: usize = 8;
    /// Accumulators of one warp for one tile of 16 rows × 8 columns.
    const TILE: u32 = 16 * 8 * 4;

    fn new(m: usize, n: usize, k: usize, multiprocessors: u32, shared: u32) -> Self {
        // Tiles of 8 tokens and stages of the two kernels.
        let (columns, stages) = if m > 8 { (2, 4) } else { (1, 6) };
        let ring = stages * Self::STAGE;
        // A row of blocks for each 16 tokens; all rows together fill the GPU.
        let rows = m.div_ceil(8 * columns as usize) as u32;
        let tiles = n.div_ceil(16) as u32;
        let tiles_per_block = tiles.div_ceil((multiprocessors / rows).max(1));
        let room = shared.saturating_sub(Self::TABLE + Self::MAP + 1024);
        // A warp has at least one step of 64 along K, and as many run as leave room for the sums of a tile each.
        let useful = (k / MMA_STEP).min(Self::MOST_WARPS) as u32;
        let fits = |warps: u32| room / warps >= ring + Self::TILE * columns;
        let warps = [8, 4, 2, 1].into_iter().find(|&w| (w <= useful.next_power_of_two()) && fits(w)).unwrap_or(1);
        let most = ((room / warps - ring) / (Self::TILE * columns)).clamp(1, tiles_per_block);
        // Passes of even length: a last one of a tile or two would leave the ring half empty.
        let tiles_per_pass = tiles_per_block.div_ceil(tiles_per_block.div_ceil(most));
        Self {
            launch: Launch {
                grid: (tiles.div_ceil(tiles_per_block), rows),
                threads: warps * 32,
                shared: warps * (ring + tiles_per_pass * Self::TILE * columns),
            },
            tiles_per_block,
            tiles_per_pass,
        }
    }
}

/// Loads the images that 4-bit operations of this activation type use, so that no first call has to.
pub fn preload(ordinal: i32, dtype: Dtype) -> Result<()> {
    DEQUANTIZE[dtype_index(dtype)].load(ordinal)?;
    MATMUL_SIMT[dtype_index(dtype)].load(ordinal)?;
    if dtype != Dtype::F32 && device(ordinal)?.capability >= 80 {
        for kernel in &MATMUL_MMA[dtype_index(dtype)][0] {
            kernel.load(ordinal)?;
        }
    }
    Ok(())
}

/// Every kernel of this module, for a test that each is in the images.
#[doc(hidden)]
pub fn kernels() -> Vec<&'static Kernel> {
    let mma = MATMUL_MMA.iter().flatten().flatten();
    QUANTIZE.iter().flatten().chain(&DEQUANTIZE).chain(&MATMUL_SIMT).chain(mma).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_fit_every_gpu() {
        // Shared memory a block can have: H200, A100, A10 and consumer GPUs.
        for shared in [227 * 1024, 163 * 1024, 99 * 1024] {
            for m in [1, 8, 9, 16, 17, 32] {
                for (n, k) in
                    [(1, 64), (16, 128), (4096, 4096), (14336, 4096), (28672, 8192), (1 << 20, 64), (100, 1 << 16)]
                {
                    let plan = MmaPlan::new(m, n, k, 132, shared);
                    assert!(plan.launch.shared + MmaPlan::TABLE + MmaPlan::MAP <= shared, "{m} {n} {k}: {plan:?}");
                    assert!(plan.launch.grid.0 * plan.tiles_per_block * 16 >= n as u32);
                    assert!((plan.launch.grid.0 - 1) * plan.tiles_per_block * 16 < n as u32);
                }
            }
        }
    }
}
