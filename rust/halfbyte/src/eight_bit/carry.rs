//! The nearest code of a dynamic map by one look-up and one addition, for vectors of values.
//!
//! `order` is an integer that rises with the value x̂ in [−1, 1]: the bits of its magnitude above those of 2^−24, negated for
//! negative values. Its upper bits are a row, and no row has more than one decision point:
//!
//! ```text
//! order     row | place in the row (SHIFT bits)
//! entry     code below the point − row [8] | 2^SHIFT − 1 − place of the point [SHIFT] | 0 [24 − SHIFT]
//! ```
//!
//! `entry + (order << (24 − SHIFT))` carries into the code where the value is above the point, and the code is its top byte.
//! CUDA kernels do the same (cuda/include/search_table.cuh).

use std::sync::LazyLock;

use super::nearest::Nearest;
use crate::codebook::dynamic_map;

/// Bits of the magnitude below which everything is one row: no point is that small.
pub(crate) const LEAST: i32 = 0x3380_0000; // 2^−24

const OCTAVES: i32 = 24;

/// Entries of a map. Both maps have as many rows: the unsigned one has half the range and twice the resolution.
const ENTRIES: usize = 2 * (OCTAVES as usize * 64 + 1);

/// The look-up table of a map.
#[derive(Debug)]
pub(crate) struct Carry {
    pub(crate) entries: [u32; ENTRIES],
}

/// Bits of `order` that are the place in a row.
pub(crate) const fn shift(signed: bool) -> u32 {
    if signed { 17 } else { 16 }
}

/// What is added to a row to make it an index.
pub(crate) const fn offset(signed: bool) -> i32 {
    if signed { OCTAVES * 64 + 1 } else { 0 }
}

/// See the head of this file. For values in [−1, 1]; in the unsigned map signs count for nothing.
fn order(scaled: f32, signed: bool) -> i32 {
    let bits = scaled.to_bits() as i32;
    let magnitude = (bits & 0x7fff_ffff).max(LEAST) - LEAST;
    if signed { magnitude ^ (bits >> 31) } else { magnitude }
}

impl Carry {
    /// The table of a dynamic map, made once.
    pub(crate) fn of(signed: bool) -> &'static Self {
        static TABLES: LazyLock<[Carry; 2]> = LazyLock::new(|| [false, true].map(Carry::new));
        &TABLES[usize::from(signed)]
    }

    fn new(signed: bool) -> Self {
        let nearest = Nearest::known(dynamic_map(signed)).expect("a dynamic map is known");
        let points: Vec<i32> = nearest.points[..255].iter().map(|&point| order(point, signed)).collect();
        let shift = shift(signed);
        let mask = (1u32 << shift) - 1;
        let entry = |index: usize| {
            let row = index as i32 - offset(signed);
            let q = points.partition_point(|&point| point >> shift < row) as u32;
            // No point: nothing is above this one.
            let place = points.get(q as usize).filter(|&&p| p >> shift == row).map_or(mask, |&p| p as u32 & mask);
            q.wrapping_sub(row as u32) << 24 | (mask - place) << (24 - shift)
        };
        Self { entries: std::array::from_fn(entry) }
    }

    /// The code of a value in [−1, 1], which vectors compute the same way.
    #[cfg(test)]
    fn code(&self, scaled: f32, signed: bool) -> u8 {
        let at = order(scaled, signed);
        let entry = self.entries[((at >> shift(signed)) + offset(signed)) as usize];
        (entry.wrapping_add((at as u32) << (24 - shift(signed))) >> 24) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_that_of_the_search() {
        for signed in [true, false] {
            let (carry, nearest) = (Carry::of(signed), Nearest::known(dynamic_map(signed)).expect("known"));
            let rows = (0..=OCTAVES * 128).map(|row| f32::from_bits((LEAST + (row << 16)) as u32));
            let special = [0.0, 1.0, f32::MIN_POSITIVE, 1e-45];
            let all = nearest.points[..255].iter().copied().chain(rows).chain(special);
            let around = all.flat_map(|v| [v, v.next_up(), v.next_down()]).flat_map(|v| [v, -v]);
            for v in around.filter(|v| v.abs() <= 1.0 && (signed || *v >= 0.0)) {
                assert_eq!(carry.code(v, signed), nearest.search(v), "{v} {signed}");
            }
        }
    }
}
