//! Products of codes on compute capability 9.0: the kernel of cuda/src/int8_wgmma.cu.

use super::product::{MOST_GATHERED, Product, Target};
use crate::device::cuda::{
    Arguments, Around, Device, Kernel, Launch, MapElement, Pointer, Stream, byte_matrix, matrix,
};
use crate::element::Dtype;
use crate::error::Result;

/// Kernels of an output type, with the tokens of their tiles, rising.
type Sizes = [(u32, Kernel)];

const fn sized(tokens: u32, family: &'static str) -> (u32, Kernel) {
    (tokens, Kernel::new(family, "matmul_int8"))
}

static BF16: [(u32, Kernel); 5] = [
    sized(16, "int8_wgmma_bf16_16"),
    sized(32, "int8_wgmma_bf16_32"),
    sized(64, "int8_wgmma_bf16_64"),
    sized(128, "int8_wgmma_bf16_128"),
    sized(256, "int8_wgmma_bf16_256"),
];
static F16: [(u32, Kernel); 5] = [
    sized(16, "int8_wgmma_f16_16"),
    sized(32, "int8_wgmma_f16_32"),
    sized(64, "int8_wgmma_f16_64"),
    sized(128, "int8_wgmma_f16_128"),
    sized(256, "int8_wgmma_f16_256"),
];
static F32: [(u32, Kernel); 2] = [sized(32, "int8_wgmma_f32_32"), sized(128, "int8_wgmma_f32_128")];
static SUMS: [(u32, Kernel); 3] =
    [sized(32, "int8_wgmma_i32_32"), sized(128, "int8_wgmma_i32_128"), sized(256, "int8_wgmma_i32_256")];

fn sizes(target: Target) -> &'static Sizes {
    match target {
        Target::Float(Dtype::Bf16) => &BF16,
        Target::Float(Dtype::F16) => &F16,
        Target::Float(Dtype::F32) => &F32,
        Target::Sums => &SUMS,
    }
}

/// Shared memory of a block: what there is, less static variables and what it takes to begin at a multiple of 1024.
const SHARED: u32 = 227 * 1024 - 2048;
const MOST_STAGES: u32 = 16;
/// Most tokens of a tile that the blocks of a cluster can share.
const MOST_SHARED: u32 = 64;
/// Bytes of K in a stage.
const STEP: usize = 128;
/// Most weights of a tile.
const MOST_ROWS: u32 = 128;
/// A block of this many weights does without half of the shared memory.
pub(super) const FEW_WEIGHTS: usize = 256 << 10;

/// Whether the device is one that the kernel is compiled for.
pub(super) fn runs_on(gpu: &Device) -> bool {
    gpu.capability == 90 && gpu.shared_memory >= 227 * 1024
}

/// Whether the kernel takes this product: rows that tensor maps can describe, and outliers, if any, of the output's type, of
/// 16 bits (fp32's would lose precision).
pub(super) fn fits(gpu: &Device, product: &Product, (_, _, k): (usize, usize, usize), target: Target) -> bool {
    runs_on(gpu)
        && k > 0
        && k.is_multiple_of(16)
        && product.q.is_multiple_of(16)
        && product.w.is_multiple_of(16)
        && product.floats.is_none_or(|floats| floats.dtype != Dtype::F32 && Target::Float(floats.dtype) == target)
}

/// Launches the product.
///
/// # Safety
/// As [`super::matmul`], for what [`fits`].
pub(super) unsafe fn launch(
    stream: &Stream,
    gpu: &Device,
    product: &Product,
    shape: (usize, usize, usize),
    out: Pointer,
    target: Target,
) -> Result<()> {
    let (m, n, k) = shape;
    let sizes = sizes(target);
    let plan = Plan::new(shape, sizes, gpu.multiprocessors);
    let (tokens, kernel) = &sizes[plan.kernel];
    let w_map = byte_matrix(product.w, n, k, plan.rows)?;
    let q_map = byte_matrix(product.q, m, k, *tokens)?;
    let (x, bitmap, count) = product.floats.map_or((0, 0, 0), |f| (f.x, f.outliers.bitmap, f.outliers.count(k)));
    // x itself can be multiplied where a tensor map can describe it.
    let count = if x.is_multiple_of(16) { count } else { 0 };
    let x_map = match count {
        0 => q_map,
        _ => matrix(x, MapElement::Half, (m, k), *tokens, Around::Bytes128)?,
    };
    let arguments = Arguments::default().block(&w_map).block(&q_map).block(&x_map);
    let arguments = arguments.u64(product.row_stats).u64(product.column_stats);
    let arguments = arguments.u64(product.bias.unwrap_or(0)).u64(out).u64(x).u64(product.q).u64(product.w);
    let arguments = arguments.u64(bitmap).u64(count).u32(m as u32).u32(n as u32).u32(k as u32);
    let mut arguments = arguments.u32(plan.rows).u32(plan.stages).u32(plan.group).u32(MOST_GATHERED);
    // SAFETY: the arguments are those of `matmul_int8` in cuda/src/int8_wgmma.cu; the caller vouches for the pointers.
    unsafe { kernel.launch(stream, plan.launch, &mut arguments) }
}

/// How a product is cut up: a function of its shape, of the tiles that there are, and of the number of multiprocessors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    pub(super) launch: Launch,
    /// Place among the sizes.
    pub(super) kernel: usize,
    /// Weights of a tile.
    pub(super) rows: u32,
    stages: u32,
    /// Tiles of tokens that are gone through for each tile of weights.
    group: u32,
}

impl Plan {
    /// The plan that is expected to take the fewest cycles.
    fn new((m, n, k): (usize, usize, usize), sizes: &Sizes, multiprocessors: u32) -> Self {
        let smallest = sizes.iter().position(|&(tokens, _)| m <= tokens as usize).unwrap_or(sizes.len() - 1);
        // Boxes of less than a warpgroup's weights are slow to fetch: 64 blocks of 64 beat 128 blocks of 32.
        let fewest = (n as u32 / 32).next_multiple_of(8).clamp(8, 64);
        let mut best: Option<(u64, Self)> = None;
        for kernel in [smallest.saturating_sub(1), smallest] {
            let tokens = sizes[kernel].0;
            let down = m.div_ceil(tokens as usize);
            for (waves, ranks) in [(1, 1), (2, 1), (1, 2), (1, 4)] {
                // Tiles of weights such that all of them together fill these waves.
                let across = ((multiprocessors * waves / ranks) as usize / down).max(1);
                let rows = n.div_ceil(across).next_multiple_of(8) as u32;
                let rows = rows.clamp(fewest, MOST_ROWS);
                let plan = Self::with((m, n, k), (kernel, tokens), (rows, ranks), multiprocessors);
                if let Some((cycles, plan)) = plan
                    && best.is_none_or(|(least, _)| cycles < least)
                {
                    best = Some((cycles, plan));
                }
            }
        }
        best.expect("there is one without clusters").1
    }

    /// A plan with clusters of `ranks` blocks, and the cycles that it should take; none if there would be more tiles than
    /// clusters, or too little to share.
    fn with(
        (m, n, k): (usize, usize, usize),
        (kernel, tokens): (usize, u32),
        (rows, ranks): (u32, u32),
        multiprocessors: u32,
    ) -> Option<(u64, Self)> {
        /// Bytes that a multiprocessor gets from the L2 in a cycle, as measured on an H200.
        const L2: u64 = 44;
        /// Bytes that come from memory in a cycle.
        const MEMORY: u64 = 2400;
        let groups = if rows > 64 { 2 } else { 1 };
        let tiles = n.div_ceil(rows as usize) * m.div_ceil(tokens as usize);
        let steps = k.div_ceil(STEP);
        // Few tokens and weights leave room for two blocks on a multiprocessor: the next launch's are there before this
        // one ends.
        let small = tokens <= 32 && rows as usize * k <= FEW_WEIGHTS * ranks as usize;
        // A cluster's blocks lie close to each other, so that not everywhere is room for four.
        let room = if ranks > 2 && !small { multiprocessors / 2 } else { multiprocessors };
        let many = m > tokens as usize || tokens > MOST_SHARED || tiles * ranks as usize > room as usize;
        if ranks > 1 && (many || steps < 4 * ranks as usize) {
            return None;
        }
        let waves = tiles.div_ceil(multiprocessors as usize) as u64;
        let steps = steps.div_ceil(ranks as usize) as u64;
        let multiply = u64::from(groups * tokens * 2);
        let copy = u64::from(rows + tokens) * STEP as u64 / L2;
        let finish = 800 + u64::from(tokens) * 6;
        let finish = if ranks > 1 { finish + 800 + u64::from(tokens * (ranks - 1)) * 8 } else { finish };
        let parts = if ranks > 1 { groups * tokens * 256 } else { 0 };
        let behind = 128 * 32 + tokens * 32 + 2 * tokens.min(64) * 128 + 2 * tokens * 4 + 512 * 4 + parts;
        let stage = (rows + tokens) * STEP as u32;
        let room = if small { SHARED / 2 - 1024 } else { SHARED };
        let stages = ((room - behind) / stage).min(MOST_STAGES);
        let launch = Launch {
            grid: (tiles.min(multiprocessors as usize) as u32 * ranks, 1),
            threads: (groups + 1) * 128,
            shared: stages * stage + behind + 1024,
            cluster: ranks,
            programmatic: true,
        };
        let plan = Self { launch, kernel, rows, stages, group: (2048 / tokens).max(1) };
        let work = waves * steps * multiply.max(copy);
        // What a block copies does not bound a cluster's: memory does.
        let work = if ranks > 1 { work.max(n as u64 * k as u64 / MEMORY) } else { work };
        Some((work + waves * finish, plan))
    }
}

/// Loads the images for an activation type.
pub(super) fn preload(gpu: &Device, dtype: Dtype) -> Result<()> {
    sizes(Target::Float(dtype)).iter().try_for_each(|(_, kernel)| kernel.load(gpu.ordinal))
}

pub(super) fn kernels() -> impl Iterator<Item = &'static Kernel> {
    BF16.iter().chain(&F16).chain(&F32).chain(&SUMS).map(|(_, kernel)| kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_fit_and_cover_everything() {
        for m in [1, 2, 15, 16, 17, 33, 100, 128, 129, 512, 2048, 8192, 1 << 20] {
            for n in [1, 7, 8, 64, 100, 1024, 4096, 14336, 28672, 1 << 20] {
                for k in [16, 128, 144, 4096, 14336, 1 << 17] {
                    for sizes in [&BF16[..], &F32, &SUMS] {
                        let plan = Plan::new((m, n, k), sizes, 132);
                        let Launch { grid, threads, shared, .. } = plan.launch;
                        assert!(
                            plan.rows.is_multiple_of(8) && (8..=MOST_ROWS).contains(&plan.rows),
                            "{m} {n} {k}: {plan:?}"
                        );
                        assert!(plan.stages >= 3 && shared + 1024 <= 227 * 1024, "{m} {n} {k}: {plan:?}");
                        assert!(threads == if plan.rows > 64 { 384 } else { 256 });
                        let tokens = sizes[plan.kernel].0;
                        assert!(
                            plan.stages * (plan.rows + tokens) / (plan.rows + 2 * tokens) >= 2,
                            "{m} {n} {k}: {plan:?}"
                        );
                        assert!(grid.0 <= 132 && grid.0 > 0 && plan.kernel < sizes.len(), "{m} {n} {k}: {plan:?}");
                        let tiles = n.div_ceil(plan.rows as usize) * m.div_ceil(tokens as usize);
                        let ranks = plan.launch.cluster;
                        assert!(ranks == 1 || tiles as u32 * ranks == grid.0, "{m} {n} {k}: {plan:?}");
                        assert!(k.div_ceil(STEP) >= ranks as usize, "{m} {n} {k}: {plan:?}");
                    }
                }
            }
        }
    }
}
