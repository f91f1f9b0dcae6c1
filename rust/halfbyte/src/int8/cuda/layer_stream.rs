//! Whole layers of a few rows on compute capability 9.0 and later: the kernel of cuda/src/int8_stream.cu.

use super::elementwise::threshold_word;
use super::product_wgmma::FEW_WEIGHTS;
use crate::device::cuda::{Arguments, Device, Kernel, Launch, Pointer, Stream, byte_matrix, dtype_index};
use crate::element::Dtype;
use crate::error::Result;

/// Most rows of activations. The kernel takes 8, but to quantize more than 4 in every block takes longer than a launch of
/// its own does.
const MOST_ROWS: usize = 4;
/// Rows times K from where on a launch that quantizes and one of the warpgroup MMA are faster, on an H200, where each
/// block quantizes all of `x`: 4096 × 14336 with 4 rows 20.8 instead of 26.6 µs, 8192 × 28672 with one 60.5 instead of 71.
const MOST_INPUTS: usize = 24 * 1024;

static STREAM: [Kernel; 3] = [
    Kernel::new("int8_stream_bf16", "linear_int8"),
    Kernel::new("int8_stream_f16", "linear_int8"),
    Kernel::new("int8_stream_f32", "linear_int8"),
];

/// What the kernel has of static shared memory, what the system keeps, and what beginning at a multiple of 1024 can take.
const STATIC: u32 = 4608 + 1024 + 1024;
/// Weights of a tile, bytes of a stage, bytes of K in a stage.
const TILE: usize = 16;
const STAGE: u32 = 16 * 1024;
const STEP: usize = 1024;
const MOST_STAGES: u32 = 16;
/// Fewer stages do not keep the memory busy.
const FEWEST_STAGES: u32 = 3;
/// More tiles of a block would take the room of the ring.
const MOST_TILES: usize = 16;
/// Outlier columns that are in shared memory at a time.
const OUTLIERS: usize = 64;

/// A layer's operands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layer {
    pub(super) x: Pointer,
    pub(super) dtype: Dtype,
    pub(super) w: Pointer,
    pub(super) column_stats: Pointer,
    pub(super) bias: Option<Pointer>,
    pub(super) threshold: f32,
    pub(super) out: Pointer,
}

/// How a layer is cut up, if the kernel takes it.
pub(super) fn plan(
    gpu: &Device,
    (x, dtype): (Pointer, Dtype),
    w: Pointer,
    (m, n, k): (usize, usize, usize),
    threshold: f32,
) -> Option<Plan> {
    let possible = gpu.capability >= 90
        && (1..=MOST_ROWS).contains(&m)
        && (gpu.capability != 90 || dtype == Dtype::F32 || m * k < MOST_INPUTS)
        && n > 0
        && k > 0
        && k.is_multiple_of(16)
        && x.is_multiple_of(16)
        && w.is_multiple_of(16);
    if possible { Plan::new((m, n, k), threshold > 0.0, gpu.multiprocessors, gpu.shared_memory) } else { None }
}

/// Launches a layer.
///
/// # Safety
/// As [`super::linear`], for what [`plan`] has a plan for.
pub(super) unsafe fn launch(
    stream: &Stream,
    plan: Plan,
    layer: &Layer,
    (m, n, k): (usize, usize, usize),
) -> Result<()> {
    let w_map = byte_matrix(layer.w, n, k, TILE as u32)?;
    let arguments = Arguments::default().block(&w_map).u64(layer.x).u64(layer.w).u64(layer.column_stats);
    let arguments = arguments.u64(layer.bias.unwrap_or(0)).u64(layer.out).u32(m as u32).u32(n as u32).u32(k as u32);
    let mut arguments = arguments.u32(threshold_word(layer.threshold, layer.dtype)).u32(plan.tiles).u32(plan.stages);
    // SAFETY: the arguments are those of `linear_int8` in cuda/src/int8_stream.cu; the caller vouches for the pointers.
    unsafe { STREAM[dtype_index(layer.dtype)].launch(stream, plan.launch, &mut arguments) }
}

/// How a layer is cut up: a function of its shape, of whether there is a threshold, and of the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    launch: Launch,
    tiles: u32,
    stages: u32,
}

impl Plan {
    fn new((m, n, k): (usize, usize, usize), marks: bool, multiprocessors: u32, shared: u32) -> Option<Self> {
        let all = n.div_ceil(TILE);
        let with = |ranks: usize| {
            let tiles = all.div_ceil((multiprocessors as usize / ranks).max(1)).clamp(1, MOST_TILES);
            let rows = tiles * TILE;
            let steps = k.div_ceil(128).div_ceil(ranks).div_ceil(STEP / 128);
            let bitmap = k.div_ceil(32) * 4;
            let outliers = if marks { OUTLIERS * rows } else { 0 };
            let beside = m * (steps * STEP + 16) + m * rows * 4 + bitmap + outliers;
            // Two blocks on a multiprocessor, if each has few weights.
            let small = rows * k.div_ceil(ranks) <= FEW_WEIGHTS;
            let room = if small { shared / 2 } else { shared };
            let room = room.checked_sub(STATIC + u32::try_from(beside).ok()?)?;
            let stages = (room / STAGE).min(MOST_STAGES);
            let launch = Launch {
                grid: ((all.div_ceil(tiles) * ranks) as u32, 1),
                threads: 8 * 32 + 32 + 96,
                shared: stages * STAGE + beside as u32 + 1024,
                cluster: ranks as u32,
                programmatic: true,
            };
            (stages >= FEWEST_STAGES).then_some(Self { launch, tiles: tiles as u32, stages })
        };
        // Two blocks share the K of tiles that are few, or of codes that would take the room of the ring.
        let few = all * 2 <= multiprocessors as usize || m * k > 64 * 1024;
        if few && k >= 2 * STEP { with(2).or_else(|| with(1)) } else { with(1) }
    }
}

/// Loads the image for an activation type.
pub(super) fn preload(gpu: &Device, dtype: Dtype) -> Result<()> {
    if gpu.capability >= 90 { STREAM[dtype_index(dtype)].load(gpu.ordinal) } else { Ok(()) }
}

pub(super) fn kernels() -> impl Iterator<Item = &'static Kernel> {
    STREAM.iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_cover_all_rows_and_fit() {
        for m in 1..=MOST_ROWS {
            for n in [1, 16, 17, 1024, 4096, 14336, 28672, 1 << 20] {
                for k in [16, 128, 1040, 4096, 14336, 28672, 1 << 17] {
                    for marks in [false, true] {
                        let Some(plan) = Plan::new((m, n, k), marks, 132, 227 * 1024) else {
                            assert!(m * k > 64 * 1024, "{m} {n} {k}");
                            continue;
                        };
                        let Launch { grid, shared, cluster, .. } = plan.launch;
                        assert!(shared + STATIC - 1024 <= 227 * 1024, "{m} {n} {k}: {plan:?}");
                        assert!((grid.0 / cluster * plan.tiles) as usize * TILE >= n, "{m} {n} {k}: {plan:?}");
                        assert!(cluster == 1 || k.div_ceil(128) >= 2);
                    }
                }
            }
        }
    }
}
