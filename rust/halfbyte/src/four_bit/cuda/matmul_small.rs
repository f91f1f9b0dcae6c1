//! Few rows: kernels of cuda/src/four_bit_mma.cu.

use half::{bf16, f16};

use crate::codebook::Kind;
use crate::device::cuda::{Kernel, Launch};
use crate::element::Dtype;

/// By dtype, nested or not, and 8 or 16 tokens a row of blocks.
pub(super) static MATMUL_MMA: [[[Kernel; 2]; 2]; 2] = [
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

/// A code's values as 16-bit numbers, four a word, and the gain that they were multiplied with before rounding.
///
/// FP4 × 12 is exact. For NF4 these gains make the relative rounding error, weighted by how often normal weights use each
/// code, least: 7.8e-4 in bf16 (1.36e-3 without) and 8.1e-5 in fp16 (1.8e-4).
pub(super) fn mma_values(kind: Kind, dtype: Dtype) -> ([u64; 4], f32) {
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
pub(super) struct MmaPlan {
    pub(super) launch: Launch,
    pub(super) tiles_per_block: u32,
    pub(super) tiles_per_pass: u32,
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

    pub(super) fn new(m: usize, n: usize, k: usize, multiprocessors: u32, shared: u32) -> Self {
        // Tiles of 8 tokens and stages of the two kernels.
        let (columns, stages) = if m > 8 { (2, 4) } else { (1, 6) };
        let ring = stages * Self::STAGE;
        // A row of blocks for each 16 tokens; all rows together fill the GPU.
        let rows = m.div_ceil(8 * columns as usize) as u32;
        let tiles = n.div_ceil(16) as u32;
        let tiles_per_block = tiles.div_ceil((multiprocessors / rows).max(1));
        let room = shared.saturating_sub(Self::TABLE + Self::MAP + 1024);
        // A warp has at least one step of 64 along K, and as many run as leave room for the sums of a tile each.
        let useful = (k / super::matmul::MMA_STEP).min(Self::MOST_WARPS) as u32;
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
                cluster: 1,
                programmatic: false,
            },
            tiles_per_block,
            tiles_per_pass,
        }
    }
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
