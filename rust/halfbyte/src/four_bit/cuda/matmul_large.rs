//! Many rows on compute capability 9.0: the kernel of cuda/src/four_bit_large.cu.

use crate::codebook::Kind;
use crate::device::cuda::{
    Arguments, Around, Device, Kernel, Launch, MapElement, Pointer, Stream, dtype_index, matrix,
};
use crate::element::Dtype;
use crate::error::{Error, Result};

use super::group::GroupPiece;
use super::matmul_small::mma_values;
use super::matmul_wgmma;

/// Most rows of x that the kernel is used for, of weights of fewer than `WIDE` rows and of others. Measured on an H200
/// (benches/NOTES.md): beyond, what dequantizing costs is less than what cuBLAS gains.
const MOST: [usize; 2] = [4096, 8192];
const WIDE: usize = 16384;

/// Weights of a tile.
const WEIGHTS: u32 = 128;
/// K of a stage of packed weights, which is what a cluster's blocks share.
const STAGE: usize = 256;

/// A kernel: the tokens of its tiles, and what a step of 64 along K costs.
#[derive(Debug)]
struct Size {
    tokens: u32,
    /// Cycles that a step takes, measured.
    step: u64,
    /// By dtype.
    kernels: [Kernel; 2],
}

const fn size(tokens: u32, step: u64, bf16: &'static str, f16: &'static str) -> Size {
    Size { tokens, step, kernels: [Kernel::new(bf16, "matmul_4bit_large"), Kernel::new(f16, "matmul_4bit_large")] }
}

static SIZES: [Size; 2] = [
    size(128, 790, "four_bit_large_bf16_128", "four_bit_large_f16_128"),
    size(256, 1200, "four_bit_large_bf16_256", "four_bit_large_f16_256"),
];

/// What of a plan is set from outside, for tests and measurements; `None` for what the plan chooses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LargeChoice {
    /// Tokens of a tile: 128 or 256.
    pub tokens: Option<u32>,
    /// Blocks that share a tile along K: 1, 2 or 4.
    pub split: Option<u32>,
}

/// Whether the kernel is the one for a product (M, N, K), where the tensor-core kernels fit: up to the rows that the kernel for fewer
/// takes, where it is expected to be faster than that.
pub(super) fn takes(gpu: &Device, dtype: Dtype, (m, n, k): (usize, usize, usize)) -> bool {
    if m > MOST[usize::from(n >= WIDE)] || n == 0 || !matmul_wgmma::fits(gpu, dtype) {
        return false;
    }
    m > matmul_wgmma::MOST_ROWS || {
        let plan = Plan::new((m, n, k), gpu.multiprocessors, LargeChoice::default());
        plan.is_some_and(|plan| plan.cycles < matmul_wgmma::cycles((m, n, k), gpu.multiprocessors))
    }
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
    choice: LargeChoice,
) -> Result<()> {
    let Some(plan) = Plan::new((m, piece.n, k), gpu.multiprocessors, choice) else {
        return Err(Error::value("choice", "tiles and splits that there are", format!("{choice:?}")));
    };
    let size = &SIZES[plan.size];
    let (values, gain) = values(kind, dtype);
    let (scales, nested, map, offset, nested_shift) = piece.absmax.parts();
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let problem = [
        piece.packed,
        scales,
        nested,
        map,
        offset,
        piece.bias.unwrap_or(0),
        piece.out,
        pair(m as u32, piece.n as u32),
        pair(k as u32, block.trailing_zeros()),
        pair(nested_shift, (1.0 / gain).to_bits()),
        pair(plan.group, 0),
    ];
    let activations = matrix(x, MapElement::Half, (m, k), size.tokens, Around::Bytes256)?;
    let arguments = Arguments::default().block(&activations);
    let mut arguments = values.into_iter().fold(arguments, Arguments::u64).block(&problem);
    // SAFETY: the arguments are those of `matmul_4bit_large`; the caller vouches for the pointers.
    unsafe { size.kernels[dtype_index(dtype)].launch(stream, plan.launch, &mut arguments) }
}

/// A code's values as the kernel's table has them, and the gain that they were multiplied with: f16 where weights become bf16; for
/// f16 weights, which are rounded as finely as that, integers around 32768. FP4 is exact in both.
fn values(kind: Kind, dtype: Dtype) -> ([u64; 4], f32) {
    if dtype != Dtype::F16 {
        return mma_values(kind, Dtype::F16);
    }
    let gain = match kind {
        Kind::Nf4 => 32767.0,
        Kind::Fp4 => 12.0 * 2048.0,
    };
    let mut words = [0; 4];
    for (i, value) in kind.values().iter().enumerate() {
        let integer = (value * gain).round() as i64 + 32768;
        words[i / 4] |= (integer as u64) << (i % 4 * 16);
    }
    (words, gain)
}

/// Loads the images for an activation type.
pub(super) fn preload(ordinal: i32, dtype: Dtype) -> Result<()> {
    SIZES.iter().try_for_each(|size| size.kernels[dtype_index(dtype)].load(ordinal))
}

pub(super) fn kernels() -> impl Iterator<Item = &'static Kernel> {
    SIZES.iter().flat_map(|size| &size.kernels)
}

/// How a product is cut up: a function of its shape, of the number of multiprocessors, and of what is set.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Plan {
    launch: Launch,
    /// Place in [`SIZES`].
    size: usize,
    /// Tiles of tokens that are gone through for each tile of weights.
    group: u32,
    /// What it is expected to take.
    cycles: u64,
}

impl Plan {
    /// Dynamic shared memory: up to 224 KB from the begin of the window, whose first KB is the system's.
    const SHARED: u32 = (128 + 96 - 1) * 1024;

    /// The plan that is expected to take the fewest cycles; none if there is not what `choice` asks for.
    fn new((m, n, k): (usize, usize, usize), multiprocessors: u32, choice: LargeChoice) -> Option<Self> {
        let stages = k.div_ceil(STAGE) as u32;
        let across = (n as u32).div_ceil(WEIGHTS);
        let mut best: Option<Self> = None;
        for (place, size) in SIZES.iter().enumerate() {
            if choice.tokens.is_some_and(|tokens| tokens != size.tokens) {
                continue;
            }
            let tiles = across * (m as u32).div_ceil(size.tokens);
            for split in [1, 2, 4] {
                if split > stages || choice.split.is_some_and(|wanted| wanted != split) {
                    continue;
                }
                // Clusters that run at a time, one block a multiprocessor: on an H200 66 of 2 and 30 of 4.
                let at_a_time = match split {
                    1 => multiprocessors,
                    2 => multiprocessors / 2,
                    _ => multiprocessors * 30 / 132,
                };
                let waves = u64::from(tiles.div_ceil(at_a_time.max(1)));
                let steps = u64::from(stages.div_ceil(split)) * 4;
                // Begin and end of a tile, and of a block: one for each tile where there are clusters.
                let (tile, block) = (600 + u64::from(size.tokens) * 5, 3500);
                let cycles = if split == 1 {
                    block + waves * (steps * size.step + tile)
                } else {
                    waves * (block + steps * size.step + tile + u64::from(split) * 800)
                };
                let launch = Launch {
                    grid: (if split == 1 { tiles.min(multiprocessors) } else { tiles * split }, 1),
                    threads: 384,
                    shared: Self::SHARED,
                    cluster: split,
                    programmatic: true,
                };
                if best.is_none_or(|best| cycles < best.cycles) {
                    best = Some(Self { launch, size: place, group: (2048 / size.tokens).max(1), cycles });
                }
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_cover_the_product() {
        for m in [1, 64, 128, 129, 256, 257, 512, 2048, 8192, 1 << 20] {
            for n in [1, 100, 128, 4096, 14336, 28672] {
                for k in [64, 256, 320, 4096, 14336, 28672] {
                    let choice = LargeChoice::default();
                    let plan = Plan::new((m, n, k), 132, choice).expect("there is one for every shape");
                    let Launch { grid, threads, cluster, .. } = plan.launch;
                    let tokens = SIZES[plan.size].tokens as usize;
                    let tiles = n.div_ceil(128) * m.div_ceil(tokens);
                    assert!(threads == 384 && plan.group >= 1, "{m} {n} {k}: {plan:?}");
                    // A cluster has one tile, as its sums go where x has been; other blocks have all between them.
                    if cluster == 1 {
                        assert_eq!(grid.0 as usize, tiles.min(132), "{m} {n} {k}: {plan:?}");
                    } else {
                        assert_eq!(grid.0 as usize, tiles * cluster as usize, "{m} {n} {k}: {plan:?}");
                        // Each block has some of K.
                        assert!(cluster as usize <= k.div_ceil(STAGE), "{m} {n} {k}: {plan:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn values_are_near_the_codes() {
        for kind in [Kind::Nf4, Kind::Fp4] {
            let (words, gain) = values(kind, Dtype::F16);
            for (i, value) in kind.values().iter().enumerate() {
                let integer = (words[i / 4] >> (i % 4 * 16) & 0xffff) as i32;
                let error = ((integer - 32768) as f32 / gain - value).abs();
                assert!(error < if kind == Kind::Fp4 { 1e-7 } else { 1.6e-5 }, "{kind:?} {i}: {error}");
            }
        }
    }

    #[test]
    fn few_tiles_are_shared_along_k_and_many_are_not() {
        let plan = |m, n, k| Plan::new((m, n, k), 132, LargeChoice::default()).expect("there is one");
        assert!(plan(256, 4096, 14336).launch.cluster > 1);
        assert_eq!(plan(8192, 14336, 4096).launch.cluster, 1);
        assert_eq!(SIZES[plan(8192, 14336, 4096).size].tokens, 256);
    }

    #[test]
    fn what_is_set_is_kept() {
        for (tokens, split) in [(128, 1), (128, 4), (256, 1), (256, 2)] {
            let choice = LargeChoice { tokens: Some(tokens), split: Some(split) };
            let plan = Plan::new((512, 4096, 4096), 132, choice).expect("there is one");
            assert_eq!((SIZES[plan.size].tokens, plan.launch.cluster), (tokens, split));
        }
        for (tokens, split) in [(64, 1), (256, 3), (256, 4)] {
            let choice = LargeChoice { tokens: Some(tokens), split: Some(split) };
            assert_eq!(Plan::new((512, 4096, 256), 132, choice), None, "{choice:?}");
        }
    }

    /// What of up to 128 rows goes to which kernel, as measured on an H200.
    #[test]
    fn few_rows_go_to_the_faster_kernel() {
        for (shape, large) in [
            ((128, 14336, 4096), true),
            ((128, 28672, 8192), true),
            ((128, 4096, 14336), false),
            ((64, 14336, 4096), false),
            ((64, 4096, 14336), false),
            ((64, 28672, 8192), false),
            ((16, 14336, 4096), false),
        ] {
            let plan = Plan::new(shape, 132, LargeChoice::default()).expect("there is one");
            assert_eq!(plan.cycles < matmul_wgmma::cycles(shape, 132), large, "{shape:?}");
        }
    }
}
