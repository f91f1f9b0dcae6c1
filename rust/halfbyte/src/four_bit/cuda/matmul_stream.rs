//! Up to 16 rows on compute capability 9.0 and later: the kernel of cuda/src/four_bit_stream.cu.

use crate::codebook::Kind;
use crate::device::cuda::{Arguments, Device, Kernel, Launch, Pointer, Stream, dtype_index};
use crate::element::Dtype;
use crate::error::Result;

use super::gated::Gate;
use super::group::{GroupPiece, MATMUL_GROUP_MOST as MOST_PIECES};
use super::matmul_next::{Said, said_of};
use super::matmul_small::mma_values;

/// Most rows of activations.
pub(super) const MOST_ROWS: usize = 16;
/// Rows of one column, and most rows of activations that gated weights take. What two columns have is the second of all that is kept by columns.
pub(super) const COLUMN: usize = 8;

/// By dtype, for up to 8 and up to 16 rows, plain and nested.
pub(super) static STREAM: [[[Kernel; 2]; 2]; 2] = [
    [
        [stream("four_bit_stream_bf16_m8"), stream("four_bit_stream_nested_bf16_m8")],
        [stream("four_bit_stream_bf16_m16"), stream("four_bit_stream_nested_bf16_m16")],
    ],
    [
        [stream("four_bit_stream_f16_m8"), stream("four_bit_stream_nested_f16_m8")],
        [stream("four_bit_stream_f16_m16"), stream("four_bit_stream_nested_f16_m16")],
    ],
];

const fn stream(family: &'static str) -> Kernel {
    Kernel::new(family, "matmul_4bit_stream")
}

/// Whether the device runs this kernel: it needs nearly all of an H200's shared memory.
pub(super) fn fits(gpu: &Device, dtype: Dtype, m: usize) -> bool {
    // Beyond eight rows warps pass on registers, which PTX has for this GPU alone.
    let most = if gpu.capability == 90 { MOST_ROWS } else { COLUMN };
    gpu.capability >= 90 && gpu.shared_memory >= SHARED && dtype != Dtype::F32 && m <= most
}

/// Launches the product of `x` [m, k] with each of `pieces`: with `gate`, each weight is two of `n` rows, 16 or more, and m at most [`COLUMN`].
///
/// # Safety
/// As `super::matmul`; K, block and alignments are those that the tensor-core kernels want, and there are 1 to [`MOST_PIECES`]
/// pieces, all nested with one block size or all plain.
pub(super) unsafe fn launch(
    stream: &Stream,
    gpu: &Device,
    dtype: Dtype,
    x: Pointer,
    (m, k): (usize, usize),
    pieces: &[GroupPiece],
    kind: Kind,
    block: usize,
    gate: Option<Gate>,
) -> Result<()> {
    let rows: [usize; MOST_PIECES] = std::array::from_fn(|i| pieces.get(i).map_or(0, |piece| piece.n));
    let nested = pieces.first().is_some_and(|piece| piece.absmax.is_nested());
    let plan = Plan::new(m, &rows[..pieces.len()], k, nested, gate.is_some(), gpu.multiprocessors);
    let (values, gain) = mma_values(kind, dtype);
    let mut table = [0; MOST_PIECES * PIECE_WORDS];
    let mut shift = 0;
    let mut first = 0;
    for (words, piece) in table.chunks_exact_mut(PIECE_WORDS).zip(pieces) {
        let (scales, nested, map, offset, nested_shift) = piece.absmax.parts();
        shift = nested_shift;
        let place = piece.n as u64 | u64::from(first) << 32;
        words.copy_from_slice(&[piece.packed, scales, nested, map, offset, piece.bias.unwrap_or(0), piece.out, place]);
        first += plan.clusters(piece.n);
    }
    let arguments = Arguments::default().u64(x).u32(m as u32).u32(k as u32).u32(block.trailing_zeros()).u32(shift);
    let arguments = values
        .into_iter()
        .fold(arguments, Arguments::u64)
        .u32((1.0 / gain).to_bits())
        .u32(plan.tiles)
        .u32(pieces.len() as u32)
        .u32(gate.map_or(0, Gate::number));
    // What comes after several weights is said of the last one, and that they are settled, of all.
    let (settled, next) = pieces.iter().fold((true, Said::default()), |(settled, _), piece| {
        let said = said_of(piece.packed);
        (settled && said.settled, said)
    });
    let mut arguments = arguments.u32(u32::from(settled)).block(&table).block(&next.words);
    let kernel = &STREAM[dtype_index(dtype)][usize::from(m > COLUMN)][usize::from(nested)];
    // SAFETY: the arguments are those of `matmul_4bit_stream`; the caller vouches for the pointers.
    unsafe { kernel.launch(stream, plan.launch, &mut arguments) }
}

/// `Piece` of the kernel, in 64-bit words.
const PIECE_WORDS: usize = 8;
/// Dynamic and static shared memory of a block, 227 KB.
const SHARED: u32 = 227 * 1024;
/// At most what the kernels have of static shared memory, by columns of 8 tokens, where scales are plain and where they are nested; dynamic
/// shared memory begins behind it.
const STATIC: [[u32; 2]; 2] = [[4 * 1024, 8 * 1024], [1024, 5 * 1024]];
/// At least that.
const STATIC_MOST: [[u32; 2]; 2] = [[6 * 1024, 11 * 1024], [2 * 1024, 6 * 1024]];
/// Tiles of 16 rows whose sums a block has in registers at a time.
const GROUP: u32 = 8;
/// Warps that compute, at most.
const MOST_WARPS: [u32; 2] = [16, 12];
/// Other warps, that serve: where scales are plain and where they are nested.
const SERVING: [[u32; 2]; 2] = [[2, 4], [4, 4]];
/// A warp's blocks of 64 in a stage.
const SLICE: u32 = 2;
/// From the begin of shared memory to its end: static and a stage, the pair table up to 128 K, sums (a tile's of 8 tokens are 512 bytes a
/// warp), two stages or three. A stage is 32 rows of weights and of scales, padded.
const fn end(columns: usize) -> u32 {
    let warps = MOST_WARPS[columns - 1];
    let stage = 32 * (warps * SLICE * 32 + 32 + (warps * SLICE + 4) * 4);
    128 * 1024 + warps * 1024 + (1 + columns as u32) * stage
}
/// By columns of 8 tokens.
const END_AT: [u32; 2] = [end(1), end(2)];
const _: () = {
    let mut i = 0;
    while i < 4 {
        assert!(END_AT[i / 2] - STATIC[i / 2][i % 2] + STATIC_MOST[i / 2][i % 2] <= SHARED);
        i += 1;
    }
};

/// How a launch cuts up its products; the layout of its shared memory is that of the kernel.
#[derive(Debug, PartialEq)]
struct Plan {
    launch: Launch,
    /// Tiles of 16 rows of a block, or of the blocks of a cluster together.
    tiles: u32,
    /// Tiles that stay together: of gated weights, one of each half.
    together: u32,
}

impl Plan {
    fn new(m: usize, rows: &[usize], k: usize, nested: bool, gated: bool, multiprocessors: u32) -> Self {
        let together = if gated { 2 } else { 1 };
        let tiles_of = |n: usize| n.div_ceil(16) as u32 * together;
        let count = |tiles: u32| rows.iter().map(|&n| tiles_of(n).div_ceil(tiles)).sum::<u32>();
        // The fewest tiles a block with which all blocks run at once.
        let tiles_for = |blocks: u32| {
            let all = rows.iter().map(|&n| tiles_of(n)).sum::<u32>();
            let mut tiles = all.div_ceil(blocks.max(1)).max(1).next_multiple_of(together);
            while count(tiles) > blocks.max(rows.len() as u32) {
                tiles += together;
            }
            tiles
        };
        let mut split = 1;
        let mut tiles = tiles_for(multiprocessors);
        // Activations that weigh half as much as the weights of a block: two blocks share their K.
        if k >= 8192 && m as u32 * 2 >= tiles * 4 {
            let shared = tiles_for(multiprocessors / 2);
            if shared <= GROUP {
                (split, tiles) = (2, shared);
            }
        }
        let columns = usize::from(m > COLUMN);
        let slices = (k / 64).div_ceil(SLICE as usize).div_ceil(split as usize) as u32;
        let steps = slices.div_ceil(MOST_WARPS[columns]).max(1);
        // An even number of warps, for copies of 16 bytes of scales; whole warpgroups where they pass on registers.
        let warps = slices.div_ceil(steps).next_multiple_of([2, 4][columns]);
        Self {
            launch: Launch {
                grid: (count(tiles) * split, 1),
                threads: (warps + SERVING[columns][usize::from(nested)]) * 32,
                shared: END_AT[columns] - STATIC[columns][usize::from(nested)],
                cluster: split,
                programmatic: true,
            },
            tiles,
            together,
        }
    }

    /// Clusters (or blocks, where K is not split) of a weight of `n` rows.
    fn clusters(&self, n: usize) -> u32 {
        (n.div_ceil(16) as u32 * self.together).div_ceil(self.tiles)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_cover_all_rows() {
        for m in 1..=MOST_ROWS {
            for rows in
                [&[1][..], &[16], &[4096], &[14336], &[28672], &[4096, 1024, 1024], &[1; 8], &[1 << 20], &[100, 14336]]
            {
                let ks = [64, 128, 192, 1024, 4096, 11008, 14336, 28672, 1 << 17];
                let forms = [(false, false), (false, true), (true, false), (true, true)];
                for (k, (nested, gated)) in ks.into_iter().flat_map(|k| forms.map(|form| (k, form))) {
                    let plan = Plan::new(m, rows, k, nested, gated, 132);
                    assert!(!gated || plan.tiles.is_multiple_of(2));
                    let Launch { grid, threads, cluster, .. } = plan.launch;
                    let columns = usize::from(m > COLUMN);
                    let computing = threads / 32 - SERVING[columns][usize::from(nested)];
                    assert!(computing <= MOST_WARPS[columns]);
                    assert!(computing >= 2 && computing.is_multiple_of([2, 4][columns]));
                    assert!(cluster == 1 || plan.tiles <= GROUP);
                    let blocks = rows.iter().map(|&n| plan.clusters(n)).sum::<u32>() * cluster;
                    assert_eq!(blocks, grid.0);
                    assert!(blocks <= 132.max(rows.len() as u32 * cluster));
                }
            }
        }
    }
}
