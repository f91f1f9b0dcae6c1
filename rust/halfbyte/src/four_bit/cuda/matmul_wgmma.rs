//! 17 to 64 rows on compute capability 9.0: the kernel of cuda/src/four_bit_wgmma.cu.

use crate::codebook::Kind;
use crate::device::cuda::{
    Arguments, Around, Device, Kernel, Launch, MapElement, Pointer, Stream, dtype_index, matrix,
};
use crate::element::Dtype;
use crate::error::Result;

use super::group::GroupPiece;
use super::matmul_small::mma_values;
use super::split::{Cycles, Split};

/// Most rows of x that the kernel is used for.
pub(super) const MOST_ROWS: usize = 64;

/// A kernel: the rows of weights and of x of its tiles.
#[derive(Debug)]
pub(super) struct Size {
    tokens: u32,
    rows: u32,
    /// Cycles of a unit of 64 rows × 64 of K, measured.
    unit: u64,
    /// By dtype.
    pub(super) kernels: [Kernel; 2],
}

const fn size(tokens: u32, rows: u32, unit: u64, families: [&'static str; 2], entry: &'static str) -> Size {
    let [bf16, f16] = families;
    Size { tokens, rows, unit, kernels: [Kernel::new(bf16, entry), Kernel::new(f16, entry)] }
}

const M32: [&str; 2] = ["four_bit_wgmma_bf16_m32", "four_bit_wgmma_f16_m32"];
const M64: [&str; 2] = ["four_bit_wgmma_bf16_m64", "four_bit_wgmma_f16_m64"];

pub(super) static SIZES: [Size; 4] = [
    size(32, 128, 215, M32, "matmul_4bit_wgmma_r128"),
    size(32, 192, 200, M32, "matmul_4bit_wgmma_r192"),
    size(64, 128, 305, M64, "matmul_4bit_wgmma_r128"),
    size(64, 192, 295, M64, "matmul_4bit_wgmma_r192"),
];

/// Whether the device runs this kernel.
pub(super) fn fits(gpu: &Device, dtype: Dtype) -> bool {
    gpu.capability == 90 && gpu.shared_memory >= 227 * 1024 && dtype != Dtype::F32
}

/// The product of `x` [m, k] with a weight.
///
/// # Safety
/// As `super::matmul`; K, block and alignments are those that the tensor-core kernels want.
pub(super) unsafe fn launch(
    stream: &Stream,
    gpu: &Device,
    dtype: Dtype,
    x: Pointer,
    (m, k): (usize, usize),
    piece: &GroupPiece,
    kind: Kind,
    block: usize,
    scratch: Option<Pointer>,
) -> Result<()> {
    let plan = Plan::new((m, piece.n, k), gpu.multiprocessors, scratch.is_some());
    let size = plan.size;
    let (values, gain) = mma_values(kind, dtype);
    let (scales, nested, map, offset, nested_shift) = piece.absmax.parts();
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let [sums, flags, number, shared] = plan.split.words(size.numbers(), scratch);
    let problem = [
        scales,
        nested,
        map,
        offset,
        piece.bias.unwrap_or(0),
        piece.out,
        pair(m as u32, piece.n as u32),
        pair(k as u32, block.trailing_zeros()),
        pair(nested_shift, (1.0 / gain).to_bits()),
        sums,
        flags,
        number,
        shared,
    ];
    let weights = matrix(piece.packed, MapElement::Byte, (piece.n, k / 2), size.rows, Around::Bytes128)?;
    let activations = matrix(x, MapElement::Half, (m, k), size.tokens, Around::Bytes128)?;
    let arguments = Arguments::default().block(&weights).block(&activations);
    let mut arguments = values.into_iter().fold(arguments, Arguments::u64).block(&problem);
    // SAFETY: the arguments are those of `matmul_4bit_wgmma_*`; the caller vouches for the pointers.
    unsafe { size.kernels[dtype_index(dtype)].launch(stream, plan.launch(), &mut arguments) }
}

/// Scratch memory that a product (M, N, K) takes.
pub(super) fn scratch_bytes(gpu: &Device, shape: (usize, usize, usize)) -> usize {
    let plan = Plan::new(shape, gpu.multiprocessors, true);
    plan.split.bytes(plan.size.numbers())
}

/// How a launch cuts up its product.
#[derive(Debug, Clone, Copy)]
struct Plan {
    size: &'static Size,
    split: Split,
}

/// The kernel's rings end here, from the begin of the window of shared memory, whose first KB is the system's.
const SHARED: u32 = (128 + 96 - 1) * 1024;
/// K of a stage.
const STAGE: usize = 256;

impl Size {
    /// Sums of a tile.
    fn numbers(&self) -> usize {
        (self.rows * self.tokens) as usize
    }
}

impl Plan {
    fn new((m, n, k): (usize, usize, usize), multiprocessors: u32, scratch: bool) -> Self {
        let stages = k.div_ceil(STAGE) as u32;
        let tokens = if m <= 32 { 32 } else { 64 };
        let plans = SIZES.iter().filter(|size| size.tokens == tokens).map(|size| {
            let tiles = (n as u32).div_ceil(size.rows) * m.div_ceil(tokens as usize) as u32;
            let cycles = Cycles {
                block: 3000,
                stage: u64::from(size.rows / 64 * 4) * size.unit,
                tile: 1000,
                wait: 1500,
                add: 300 + u64::from(size.rows * size.tokens) / 16,
            };
            let (split, cycles) = Split::new((tiles, stages), multiprocessors, cycles, scratch);
            (cycles, Self { size, split })
        });
        plans.min_by_key(|&(cycles, _)| cycles).expect("there are sizes for either number of tokens").1
    }

    fn launch(self) -> Launch {
        // Warps that serve, and a warpgroup for 64 rows.
        let threads = 128 + self.size.rows * 2;
        Launch { grid: (self.split.blocks, 1), threads, shared: SHARED, cluster: 1, programmatic: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_has_a_part_of_the_product() {
        for m in [1, 9, 16, 17, 33, 64, 65, 128, 500] {
            for n in [1, 16, 100, 1024, 4096, 14336, 28672, 1 << 20] {
                for k in [64, 128, 256, 4096, 14336, 28672] {
                    for scratch in [false, true] {
                        let plan = Plan::new((m, n, k), 132, scratch);
                        let tiles = n.div_ceil(plan.size.rows as usize) * m.div_ceil(plan.size.tokens as usize);
                        assert!(
                            plan.split.shared as usize <= tiles && plan.launch().grid.0 <= 132,
                            "{m} {n} {k}: {plan:?}"
                        );
                        assert!(plan.split.blocks as usize <= tiles * k.div_ceil(STAGE));
                        assert!(scratch || plan.split.shared == 0);
                    }
                }
            }
        }
    }
}
