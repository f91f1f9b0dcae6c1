//! Stacked weights of experts, each multiplied by the activations that were routed to it: kernels of
//! cuda/src/four_bit_experts.cu and four_bit_experts_mma.cu. Who has which rows only the device knows.

use crate::codebook::Kind;
use crate::device::cuda::{Absmax, Arguments, Kernel, Launch, Pointer, Stream, THREADS, device, dtype_index};
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::layout::check_four_bit_block;

use super::matmul::{MMA_STEP, tensor_cores};
use super::matmul_small::mma_values;
use super::{aligned, kind_number};

/// By dtype; plain and nested; few rows an expert and many.
static MMA: [[[Kernel; 2]; 2]; 2] = [
    [
        [
            Kernel::new("four_bit_experts_bf16_plain_few", "matmul_4bit_experts_plain"),
            Kernel::new("four_bit_experts_bf16_plain_many", "matmul_4bit_experts_plain"),
        ],
        [
            Kernel::new("four_bit_experts_bf16_nested_few", "matmul_4bit_experts_nested"),
            Kernel::new("four_bit_experts_bf16_nested_many", "matmul_4bit_experts_nested"),
        ],
    ],
    [
        [
            Kernel::new("four_bit_experts_f16_plain_few", "matmul_4bit_experts_plain"),
            Kernel::new("four_bit_experts_f16_plain_many", "matmul_4bit_experts_plain"),
        ],
        [
            Kernel::new("four_bit_experts_f16_nested_few", "matmul_4bit_experts_nested"),
            Kernel::new("four_bit_experts_f16_nested_many", "matmul_4bit_experts_nested"),
        ],
    ],
];

/// Rows an expert, on average, up to which the kernel for few rows is faster.
const FEW: usize = 3;

static SIMT: [Kernel; 3] = [
    Kernel::new("four_bit_experts", "matmul_4bit_experts_simt_bf16"),
    Kernel::new("four_bit_experts", "matmul_4bit_experts_simt_f16"),
    Kernel::new("four_bit_experts", "matmul_4bit_experts_simt_f32"),
];

/// For indices of 32 and of 64 bits.
static ROUTE: [Kernel; 2] =
    [Kernel::new("four_bit_experts", "experts_route_i32"), Kernel::new("four_bit_experts", "experts_route_i64")];

static CLEAR: Kernel = Kernel::new("four_bit_experts", "experts_clear_16");

pub(super) fn kernels() -> impl Iterator<Item = &'static Kernel> {
    MMA.iter().flatten().flatten().chain(&SIMT).chain(&ROUTE).chain([&CLEAR])
}

/// A whole number that kernels take as 32 bits with a sign.
fn small(argument: &'static str, what: &str, value: usize) -> Result<u32> {
    let fits = i32::try_from(value).map_err(|_| Error::shape(argument, format!("at most 2147483647 {what}"), value))?;
    Ok(fits as u32)
}

/// `out[s, n] = Σ_k x[s, k] · w[e, n, k] + bias[e, n]` for the rows `s` of each expert `e`, which are `offsets[e]` up to
/// `offsets[e + 1]`; zeros for rows of nobody. Reads the weights of experts that have rows, and no others.
///
/// # Safety
/// As [`super::quantize`]; `x` is [S, K] and `out` [S, N] row by row, `bias` [E, N], all of `dtype`; `offsets` is int32 [E + 1]
/// and does not fall. (Kernels stay within bounds whatever it holds.)
pub unsafe fn matmul_experts(
    stream: &Stream,
    dtype: Dtype,
    x: Pointer,
    offsets: Pointer,
    (s, e, n, k): (usize, usize, usize, usize),
    packed: Pointer,
    absmax: Absmax,
    kind: Kind,
    block: usize,
    bias: Option<Pointer>,
    out: Pointer,
) -> Result<()> {
    check_four_bit_block(block)?;
    let rows = small("x", "rows", s)?;
    let experts = small("offsets", "experts", e)?;
    let columns = small("out", "columns", n)?;
    let inner = small("x", "columns", k)?;
    if s == 0 || n == 0 {
        return Ok(());
    }
    let gpu = device(stream.device)?;
    let (scales, ..) = absmax.parts();
    let arguments = Arguments::default()
        .u64(x)
        .u64(offsets)
        .u64(packed)
        .scales(absmax)
        .u64(bias.unwrap_or(0))
        .u64(out)
        .u32(rows)
        .u32(experts)
        .u32(columns)
        .u32(inner)
        .u32(block.trailing_zeros());
    let tensor_cores = tensor_cores(gpu, dtype, k, block, &[x, packed])
        && u32::try_from(e.saturating_mul(n).saturating_mul(k / MMA_STEP)).is_ok()
        && aligned(&[(scales, 4)]);
    let many = s > FEW * e;
    let shape = (s, e, n, k);
    let plan = Plan::new(many, absmax.is_nested(), shape, gpu.multiprocessors, gpu.shared_memory);
    if let Some(plan) = plan.filter(|_| tensor_cores) {
        let (values, gain) = mma_values(kind, dtype);
        let arguments = values.into_iter().fold(arguments, Arguments::u64).u32((1.0 / gain).to_bits());
        let kernel = &MMA[dtype_index(dtype)][usize::from(absmax.is_nested())][usize::from(many)];
        // SAFETY: the arguments are those of `matmul_4bit_experts_*`; the caller vouches for the pointers.
        return unsafe { kernel.launch(stream, plan.launch, &mut arguments.u32(plan.split)) };
    }
    let launch = Launch::new((n.div_ceil(THREADS as usize / 32) as u32, experts.clamp(1, 65535)), THREADS);
    let vectors = k.is_multiple_of(8) && aligned(&[(x, 16), (packed, 4)]);
    let mut arguments = arguments.u32(kind_number(kind)).u32(u32::from(vectors));
    // SAFETY: the arguments are those of `matmul_4bit_experts_simt_*`; the caller vouches for the pointers.
    unsafe { SIMT[dtype_index(dtype)].launch(stream, launch, &mut arguments) }
}

/// How the tensor-core kernel is launched; its shared memory is laid out in cuda/src/four_bit_experts_mma.cu.
#[derive(Debug, PartialEq)]
struct Plan {
    launch: Launch,
    /// Warps that share K.
    split: u32,
}

impl Plan {
    /// Static shared memory, rounded up: the pair table, the nested map, slots and sums of the scan.
    const FIXED: u32 = 32 * 1024 + 1024 + 1024 + 256;
    /// Most warps that share K, in both kernels.
    const MOST_SPLIT: usize = 8;
    /// Weights of a row that a stage holds, in steps of [`MMA_STEP`].
    const STAGE_STEPS: usize = 4;

    /// None where the list of experts leaves no room for a warp.
    fn new(
        many: bool,
        nested: bool,
        (s, e, n, k): (usize, usize, usize, usize),
        multiprocessors: u32,
        shared: u32,
    ) -> Option<Self> {
        // As the kernel has them: rows of `x` an item, warps, stages of a warp's ring, tiles of a buffer of sums.
        let (chunk, most_warps, stages, slots) = if many { (32, 8, 4, 4) } else { (8, 16, 3, 2) };
        let warp = stages * (16 * 128 + 256 * (1 + usize::from(nested))) + 2 * slots * (16 * 8 * 4);
        let list = (e + 1).div_ceil(8).checked_mul(128)?;
        let room = (shared as usize).checked_sub(Self::FIXED as usize)?.checked_sub(list)?;
        let fits = (room / warp).min(most_warps);
        let warps = if fits == 0 { return None } else { 1 << fits.ilog2() };
        // Of the shape of the weights alone, and so is the order of sums.
        let steps = (k / MMA_STEP).div_ceil(Self::STAGE_STEPS);
        let split = steps.next_power_of_two().min(warps.min(Self::MOST_SPLIT));
        let items = (s.min(e) + s / chunk).saturating_mul(n.div_ceil(16)).max(1);
        let blocks = items.div_ceil(warps / split).min(multiprocessors as usize);
        let launch = Launch {
            threads: warps as u32 * 32,
            shared: (list + warps * warp) as u32,
            ..Launch::new((blocks as u32, 1), 0)
        };
        Some(Self { launch, split: split as u32 })
    }
}

/// Sorts `s` rows by expert, stably: `order[place]` is the row, `inverse[row]` the place, rows of expert `e` have the places
/// `offsets[e]` up to `offsets[e + 1]`. `index` holds integers of 64 bits if `wide`, else of 32; those that are no expert's
/// number come last.
///
/// # Safety
/// As [`super::quantize`]; `index`, `order` and `inverse` are [S], `offsets` [E + 1], all but `index` int32.
pub unsafe fn route_experts(
    stream: &Stream,
    (index, wide): (Pointer, bool),
    (s, e): (usize, usize),
    offsets: Pointer,
    order: Pointer,
    inverse: Pointer,
) -> Result<()> {
    let (rows, experts) = (small("index", "rows", s)?, small("offsets", "experts", e)?);
    let launch = Launch::new(((e + 1).div_ceil(THREADS as usize / 32) as u32, 1), THREADS);
    let mut arguments = Arguments::default().u64(index).u32(rows).u32(experts).u64(offsets).u64(order).u64(inverse);
    // SAFETY: the arguments are those of `experts_route_*`; the caller vouches for the pointers.
    unsafe { ROUTE[usize::from(wide)].launch(stream, launch, &mut arguments) }
}

/// Writes zeros to the rows of `out`, [S, N] of 16-bit elements, that are nobody's.
///
/// # Safety
/// As [`matmul_experts`].
pub unsafe fn clear_rows(
    stream: &Stream,
    offsets: Pointer,
    out: Pointer,
    (s, e, n): (usize, usize, usize),
) -> Result<()> {
    let (rows, experts) = (small("out", "rows", s)?, small("offsets", "experts", e)?);
    let launch = Kernel::spread(device(stream.device)?.multiprocessors.into());
    let mut arguments = Arguments::default().u64(offsets).u64(out).u32(rows).u32(experts).u64(n as u64);
    // SAFETY: the arguments are those of `experts_clear_16`; the caller vouches for the pointers.
    unsafe { CLEAR.launch(stream, launch, &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_fit_every_gpu() {
        // Shared memory a block can have: H200, A100, A10 and consumer GPUs.
        for shared in [227 * 1024, 163 * 1024, 99 * 1024] {
            for (s, e) in [(1, 1), (8, 128), (1 << 20, 256), (4096, 2048)] {
                for (n, k) in [(1, 64), (1536, 2048), (2048, 768), (28672, 4096), (4096, 14336), (1 << 30, 64)] {
                    for (many, nested) in [(false, false), (false, true), (true, false), (true, true)] {
                        let plan = Plan::new(many, nested, (s, e, n, k), 132, shared).expect("it fits");
                        assert!(plan.launch.shared + Plan::FIXED <= shared, "{s} {e} {n} {k}: {plan:?}");
                        assert!((plan.launch.threads / 32).is_multiple_of(plan.split));
                        assert!((1..=132).contains(&plan.launch.grid.0));
                    }
                }
            }
        }
        assert_eq!(Plan::new(false, false, (8, 1 << 20, 64, 64), 132, 227 * 1024), None);
    }
}
