//! Tiles that blocks of threads share along K, so that each has as much to do: cuda/include/split.cuh.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::cuda::Pointer;

/// How many blocks have a product's tiles, and how many of these they share; the others they have whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Split {
    pub(super) blocks: u32,
    pub(super) shared: u32,
}

/// What a kernel's parts take, in cycles.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cycles {
    /// Begin and end of a block.
    pub(super) block: u64,
    /// A stage of K of a tile.
    pub(super) stage: u64,
    /// The end of a tile.
    pub(super) tile: u64,
    /// Waiting for sums that others have left, and adding those of one block.
    pub(super) wait: u64,
    pub(super) add: u64,
}

/// Most blocks that have a part of the same tile, as its sums are added by one of them.
const MOST_PARTS: u32 = 12;

impl Split {
    /// All tiles whole.
    fn whole(tiles: u32, multiprocessors: u32) -> Self {
        Self { blocks: tiles.min(multiprocessors).max(1), shared: 0 }
    }

    /// As few shared as make `blocks` even, but no less than one for each block, so that a tile has few parts.
    pub(super) fn even(tiles: u32, blocks: u32) -> Self {
        let whole = if tiles.is_multiple_of(blocks) { tiles } else { (tiles / blocks).saturating_sub(1) * blocks };
        Self { blocks, shared: tiles - whole }
    }

    /// What is expected to take the fewest cycles, and how many; one block a multiprocessor. Without memory for sums nothing is shared.
    pub(super) fn new((tiles, stages): (u32, u32), multiprocessors: u32, cycles: Cycles, scratch: bool) -> (Self, u64) {
        let several = (2..=MOST_PARTS).map(|parts| tiles.saturating_mul(parts)).take_while(|&n| n <= multiprocessors);
        let counts = several
            .chain([multiprocessors])
            .filter(|&blocks| scratch && u64::from(blocks) <= u64::from(tiles) * u64::from(stages));
        let choices = counts.map(|blocks| Self::even(tiles, blocks)).chain([Self::whole(tiles, multiprocessors)]);
        let costs = choices.filter_map(|split| Some((split, split.cost((tiles, stages), cycles)?)));
        costs.min_by_key(|&(_, cost)| cost).unwrap_or((Self::whole(tiles, multiprocessors), u64::MAX))
    }

    /// None where a tile would have too many parts.
    fn cost(self, (tiles, stages): (u32, u32), cycles: Cycles) -> Option<u64> {
        let whole =
            u64::from((tiles - self.shared).div_ceil(self.blocks)) * (u64::from(stages) * cycles.stage + cycles.tile);
        if self.shared == 0 {
            return Some(cycles.block + whole);
        }
        let part = (u64::from(self.shared) * u64::from(stages)).div_ceil(u64::from(self.blocks));
        let parts = if self.blocks.is_multiple_of(self.shared) {
            self.blocks / self.shared
        } else {
            u64::from(stages).div_ceil(part) as u32 + 1
        };
        let sums = cycles.wait + u64::from(parts - 1) * cycles.add;
        (parts <= MOST_PARTS).then_some(cycles.block + whole + part * cycles.stage + cycles.tile + sums)
    }

    /// Scratch memory for tiles of so many numbers.
    pub(super) fn bytes(self, numbers: usize) -> usize {
        if self.shared == 0 { 0 } else { self.blocks as usize * (numbers * 4 + 8) }
    }

    /// The kernel's argument. `scratch` is of [`Split::bytes`].
    pub(super) fn words(self, numbers: usize, scratch: Option<Pointer>) -> [u64; 4] {
        let sums = scratch.unwrap_or(0);
        let flags = sums + (self.blocks as usize * numbers * 4) as u64;
        [sums, flags, launch_number(), u64::from(self.shared)]
    }
}

/// A number that no other launch of this process has, and that memory holds by no chance worth thinking of.
fn launch_number() -> u64 {
    static BEGIN: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one("halfbyte"));
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // An odd factor: no two of the first 2^64 are equal.
    NEXT.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(*BEGIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CYCLES: Cycles = Cycles { block: 3500, stage: 3000, tile: 1000, wait: 1500, add: 1200 };

    proptest! {
        #[test]
        fn every_block_has_something(tiles in 1u32..5000, stages in 1u32..200, multiprocessors in 1u32..200) {
            let (split, _) = Split::new((tiles, stages), multiprocessors, CYCLES, true);
            prop_assert!(split.blocks <= multiprocessors && split.shared <= tiles);
            prop_assert!(u64::from(split.blocks) <= u64::from(tiles) * u64::from(stages));
            if split.shared > 0 {
                prop_assert!(split.blocks <= split.shared * stages);
                // The rest is dealt evenly.
                prop_assert_eq!((tiles - split.shared) % split.blocks, 0);
            }
            let (alone, _) = Split::new((tiles, stages), multiprocessors, CYCLES, false);
            prop_assert_eq!((alone.shared, alone.bytes(1000)), (0, 0));
        }
    }

    #[test]
    fn tiles_are_shared_where_they_do_not_come_out_even() {
        let split = |tiles, stages| Split::new((tiles, stages), 132, CYCLES, true).0;
        assert_eq!(split(112, 16), Split { blocks: 132, shared: 112 });
        assert_eq!(split(896, 16), Split { blocks: 132, shared: 896 - 5 * 132 });
        assert_eq!(split(132, 16), Split { blocks: 132, shared: 0 });
        assert_eq!(split(66, 16), Split { blocks: 132, shared: 66 });
        // Not so many parts that adding them takes longer than it saves.
        assert!(split(1, 1000).blocks <= MOST_PARTS);
    }

    #[test]
    fn launches_have_numbers_of_their_own() {
        let numbers: std::collections::HashSet<u64> = (0..1000).map(|_| launch_number()).collect();
        assert_eq!(numbers.len(), 1000);
    }
}
