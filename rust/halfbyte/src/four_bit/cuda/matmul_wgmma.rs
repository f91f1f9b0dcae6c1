//! From 17 rows on compute capability 9.0: the kernel of cuda/src/four_bit_wgmma.cu.

use crate::codebook::Kind;
use crate::device::cuda::{
    Arguments, Around, Device, Kernel, Launch, MapElement, Pointer, Stream, dtype_index, matrix,
};
use crate::element::Dtype;
use crate::error::Result;

use super::group::GroupPiece;
use super::matmul_small::mma_values;

/// Most rows of x that the kernel is used for.
pub(super) const MOST_ROWS: usize = 128;

/// Rows of x that a row of blocks takes, one kernel each.
const TOKENS: [u32; 3] = [32, 64, 128];

/// By dtype and tokens; the second, with more rows a block, is not there where its registers would spill.
pub(super) static WGMMA: [[[Option<Kernel>; 2]; 3]; 2] = [
    [one("four_bit_wgmma_bf16_m32"), entries("four_bit_wgmma_bf16_m64"), one("four_bit_wgmma_bf16_m128")],
    [one("four_bit_wgmma_f16_m32"), entries("four_bit_wgmma_f16_m64"), one("four_bit_wgmma_f16_m128")],
];

const fn one(family: &'static str) -> [Option<Kernel>; 2] {
    [Some(Kernel::new(family, "matmul_4bit_wgmma_r128")), None]
}

const fn entries(family: &'static str) -> [Option<Kernel>; 2] {
    [Some(Kernel::new(family, "matmul_4bit_wgmma_r128")), Some(Kernel::new(family, "matmul_4bit_wgmma_r256"))]
}

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
) -> Result<()> {
    let plan = Plan::new(m, piece.n, k, gpu.multiprocessors);
    let (values, gain) = mma_values(kind, dtype);
    let (scales, nested, map, offset, nested_shift) = piece.absmax.parts();
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
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
    ];
    let weights = matrix(piece.packed, MapElement::Byte, (piece.n, k / 2), plan.rows, Around::Bytes128)?;
    let activations = matrix(x, MapElement::Half, (m, k), TOKENS[plan.tokens], Around::Bytes128)?;
    let arguments = Arguments::default().block(&weights).block(&activations);
    let mut arguments = values.into_iter().fold(arguments, Arguments::u64).block(&problem);
    let kernel = WGMMA[dtype_index(dtype)][plan.tokens][usize::from(plan.rows == 256)].as_ref();
    // SAFETY: the arguments are those of `matmul_4bit_wgmma_*`; the caller vouches for the pointers.
    unsafe { kernel.expect("plans name kernels that are there").launch(stream, plan.launch, &mut arguments) }
}

/// Cycles that a product (M, N, K) is expected to take.
pub(super) fn cycles((m, n, k): (usize, usize, usize), multiprocessors: u32) -> u64 {
    Plan::new(m, n, k, multiprocessors).cycles
}

/// How a launch cuts up its product.
#[derive(Debug, PartialEq)]
struct Plan {
    launch: Launch,
    /// What it is expected to take.
    cycles: u64,
    /// Place in [`TOKENS`].
    tokens: usize,
    /// Of the weight, a block of threads: 128 or 256.
    rows: u32,
}

/// The kernel's rings end here, from the begin of the window of shared memory, whose first KB is the system's.
const SHARED: u32 = (128 + 96 - 1) * 1024;
/// K of a stage.
const STAGE: usize = 256;

impl Plan {
    fn new(m: usize, n: usize, k: usize, multiprocessors: u32) -> Self {
        let tokens = TOKENS.iter().position(|&t| m <= t as usize).unwrap_or(TOKENS.len() - 1);
        let columns = m.div_ceil(TOKENS[tokens] as usize) as u32;
        let stages = k.div_ceil(STAGE) as u32;
        // Clusters that run at a time, one block a multiprocessor: on an H200 66 of 2, 39 of 3, 30 of 4.
        let at_a_time = |cluster: u32| match cluster {
            1 => multiprocessors,
            2 => multiprocessors / 2,
            3 => multiprocessors * 39 / 132,
            _ => multiprocessors * 30 / 132,
        };
        let cost = |rows: u32, cluster: u32| {
            let waves = ((n as u32).div_ceil(rows) * columns).div_ceil(at_a_time(cluster).max(1));
            // Cycles: of a unit of 64 rows × 64 of K (measured), of the start and the end of a block, and of adding up a cluster's
            // sums.
            let unit = 120 + TOKENS[tokens] * 13 / 4;
            let block = stages.div_ceil(cluster) * 4 * (rows / 64) * unit;
            u64::from(waves) * u64::from(block + 4000 + (cluster - 1) * 600)
        };
        let sizes: &[u32] = if WGMMA[0][tokens][1].is_some() { &[128, 256] } else { &[128] };
        let choices = sizes.iter().flat_map(|&rows| (1..=4).map(move |cluster| (rows, cluster)));
        let choices = choices.filter(|&(_, cluster)| cluster == 1 || cluster <= stages);
        let costs = choices.map(|(rows, cluster)| (cost(rows, cluster), rows, cluster));
        let (cycles, rows, cluster) = costs.min_by_key(|&(cycles, ..)| cycles).unwrap_or((u64::MAX, 128, 1));
        let computing = if TOKENS[tokens] <= 32 { 4 } else { 2 };
        Self {
            launch: Launch {
                grid: ((n as u32).div_ceil(rows) * cluster, columns),
                threads: 128 + computing * 128,
                shared: SHARED,
                cluster,
                programmatic: true,
            },
            cycles,
            tokens,
            rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_cover_the_product() {
        for m in [1, 9, 16, 17, 33, 64, 65, 128, 129, 500] {
            for n in [1, 16, 100, 1024, 4096, 14336, 28672, 1 << 20] {
                for k in [64, 128, 256, 4096, 14336, 28672] {
                    let plan = Plan::new(m, n, k, 132);
                    let Launch { grid, threads, cluster, .. } = plan.launch;
                    assert!(grid.0.is_multiple_of(cluster) && threads <= 640, "{m} {n} {k}: {plan:?}");
                    assert!(u64::from(grid.0 / cluster * plan.rows) >= n as u64);
                    assert!(grid.1 as usize * TOKENS[plan.tokens] as usize >= m);
                    assert!(WGMMA[0][plan.tokens][usize::from(plan.rows == 256)].is_some());
                    assert!(cluster == 1 || cluster as usize <= k.div_ceil(STAGE));
                }
            }
        }
    }
}
