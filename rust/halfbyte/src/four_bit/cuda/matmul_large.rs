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
use super::split::{Cycles, Split};

/// Most rows of x that the kernel is used for, of weights of fewer than `WIDE` rows and of others. Measured on an H200
/// (benches/NOTES.md): beyond, what dequantizing costs is less than what cuBLAS gains.
const MOST: [usize; 2] = [4096, 8192];
const WIDE: usize = 16384;

/// Weights of a tile.
const WEIGHTS: u32 = 128;
/// K of a stage of packed weights, which is what blocks share.
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
    /// Blocks that have the tiles, at most one a multiprocessor; where these do not come out even, they share some along K.
    pub blocks: Option<u32>,
}

/// Whether the kernel is the one for a product (M, N, K), where the tensor-core kernels fit.
pub(super) fn takes(gpu: &Device, dtype: Dtype, (m, n, _): (usize, usize, usize)) -> bool {
    m > matmul_wgmma::MOST_ROWS && m <= MOST[usize::from(n >= WIDE)] && n > 0 && matmul_wgmma::fits(gpu, dtype)
}

/// Scratch memory that a product (M, N, K) takes.
pub(super) fn scratch_bytes(gpu: &Device, shape: (usize, usize, usize), choice: LargeChoice) -> usize {
    Plan::new(shape, gpu.multiprocessors, choice, true).map_or(0, Plan::scratch_bytes)
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
    choice: LargeChoice,
) -> Result<()> {
    let Some(plan) = Plan::new((m, piece.n, k), gpu.multiprocessors, choice, scratch.is_some()) else {
        return Err(Error::value("choice", "tiles and blocks that there are", format!("{choice:?}")));
    };
    let size = &SIZES[plan.size];
    let (values, gain) = values(kind, dtype);
    let (scales, nested, map, offset, nested_shift) = piece.absmax.parts();
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let [sums, flags, number, shared] = plan.split.words(plan.numbers(), scratch);
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
        sums,
        flags,
        number,
        shared,
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
    split: Split,
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
    fn new((m, n, k): (usize, usize, usize), multiprocessors: u32, choice: LargeChoice, scratch: bool) -> Option<Self> {
        let stages = k.div_ceil(STAGE) as u32;
        let across = (n as u32).div_ceil(WEIGHTS);
        let plans = SIZES.iter().enumerate().filter_map(|(place, size)| {
            if choice.tokens.is_some_and(|tokens| tokens != size.tokens) {
                return None;
            }
            let tiles = across * (m as u32).div_ceil(size.tokens);
            let tokens = u64::from(size.tokens);
            let cycles =
                Cycles { block: 3500, stage: 4 * size.step, tile: 600 + tokens * 5, wait: 1500, add: 300 + tokens * 8 };
            let (split, cycles) = match choice.blocks {
                None => Split::new((tiles, stages), multiprocessors, cycles, scratch),
                Some(blocks) => {
                    let there_are = (1..=multiprocessors.min(tiles.saturating_mul(stages))).contains(&blocks);
                    let split = there_are.then(|| Split::even(tiles, blocks))?;
                    ((scratch || split.shared == 0).then_some(split)?, 0)
                }
            };
            let launch =
                Launch { grid: (split.blocks, 1), threads: 384, shared: Self::SHARED, cluster: 1, programmatic: true };
            Some(Self { split, launch, size: place, group: (2048 / size.tokens).max(1), cycles })
        });
        plans.min_by_key(|plan| plan.cycles)
    }

    /// Sums of a tile.
    fn numbers(self) -> usize {
        (WEIGHTS * SIZES[self.size].tokens) as usize
    }

    fn scratch_bytes(self) -> usize {
        self.split.bytes(self.numbers())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn blocks_have_as_much_to_do_as_each_other() {
        let plan = |shape, scratch| Plan::new(shape, 132, LargeChoice::default(), scratch).expect("there is one");
        for shape in [(256, 14336, 4096), (512, 28672, 8192), (128, 4096, 14336)] {
            let (shared, alone) = (plan(shape, true), plan(shape, false));
            assert!(shared.cycles < alone.cycles && shared.scratch_bytes() > 0, "{shape:?}: {shared:?}");
            assert_eq!((alone.split.shared, alone.scratch_bytes()), (0, 0));
            assert!(shared.scratch_bytes() <= 132 * (128 * 1024 + 8));
        }
        let many = plan((8192, 14336, 4096), true);
        assert_eq!((SIZES[many.size].tokens, many.launch.threads), (256, 384));
    }

    #[test]
    fn what_is_set_is_kept() {
        let plan = |shape, choice| Plan::new(shape, 132, choice, true);
        for (tokens, blocks) in [(128, 1), (128, 132), (256, 33), (256, 7)] {
            let choice = LargeChoice { tokens: Some(tokens), blocks: Some(blocks) };
            let plan = plan((512, 4096, 4096), choice).expect("there is one");
            assert_eq!((SIZES[plan.size].tokens, plan.launch.grid), (tokens, (blocks, 1)));
        }
        for (tokens, blocks) in [(64, 1), (256, 133), (256, 65)] {
            let choice = LargeChoice { tokens: Some(tokens), blocks: Some(blocks) };
            assert_eq!(plan((512, 4096, 256), choice), None, "{choice:?}");
        }
    }
}
