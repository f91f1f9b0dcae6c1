//! Finding the nearest of 256 entries fast.
//!
//! The bits of a float, without its sign and its lower mantissa bits, are the number of a bucket: 128 buckets an octave. A
//! table says which code the lowest value of a bucket gets; where no bucket has more than one decision point inside, one
//! comparison with the next point settles the code of any value. The dynamic maps are like that: their finest octave has 71
//! even steps.

use std::sync::LazyLock;

use crate::codebook::{Map, dynamic_map};

/// Mantissa bits that do not count.
pub(super) const SHIFT: u32 = 16;

/// Bucket of 1, before subtracting the lowest.
pub(super) const HIGHEST: u32 = 1f32.to_bits() >> SHIFT;

/// Buckets for each sign: 32 octaves.
pub(super) const BUCKETS: usize = 4096;

/// The decision points of a map, and buckets where they help.
#[derive(Debug)]
pub(super) struct Nearest {
    /// Point `i` is between entries `i` and `i + 1`; the last is never exceeded.
    pub(super) points: [f32; 256],
    pub(super) buckets: Option<Buckets>,
}

/// Codes by bucket.
#[derive(Debug)]
pub(super) struct Buckets {
    /// Bucket number of all magnitudes that are smaller than any point's.
    pub(super) lowest: u32,
    /// Code of the lowest value of each bucket, those of positive values first.
    pub(super) codes: Box<[u8; 2 * BUCKETS]>,
}

impl Nearest {
    /// The points of `map`, without buckets.
    pub(super) fn points_only(map: &Map) -> Self {
        let mut points = [f32::INFINITY; 256];
        for (point, pair) in points.iter_mut().zip(map.windows(2)) {
            *point = f32::midpoint(pair[0], pair[1]);
        }
        Self { points, buckets: None }
    }

    /// The points and, if every bucket can settle its code, the buckets.
    pub(super) fn new(map: &Map) -> Self {
        let mut nearest = Self::points_only(map);
        nearest.buckets = nearest.buckets();
        nearest
    }

    /// For one of the dynamic maps, made once; for others, `None`.
    pub(super) fn known(map: &Map) -> Option<&'static Self> {
        static KNOWN: LazyLock<[Nearest; 2]> =
            LazyLock::new(|| [true, false].map(|signed| Nearest::new(dynamic_map(signed))));
        let which = [true, false].into_iter().position(|signed| map == dynamic_map(signed))?;
        Some(&KNOWN[which])
    }

    fn buckets(&self) -> Option<Buckets> {
        // NaN is put in the bucket of 1, and must get the last code there.
        if self.points[254] >= 1.0 {
            return None;
        }
        let numbers = self.points[..255].iter().filter(|&&p| p != 0.0).map(|p| p.abs().to_bits() >> SHIFT);
        let lowest = numbers.min()?.saturating_sub(1).clamp(HIGHEST + 1 - BUCKETS as u32, HIGHEST);
        let mut codes = Box::new([0; 2 * BUCKETS]);
        for bucket in lowest..=HIGHEST {
            let least = if bucket == lowest { 0.0 } else { f32::from_bits(bucket << SHIFT) };
            let most = f32::from_bits(((bucket + 1) << SHIFT) - 1);
            for (half, from, to) in [(0, least, most), (BUCKETS, -most, -least)] {
                let (first, last) = (self.search(from), self.search(to));
                if last - first > 1 {
                    return None;
                }
                codes[half + (bucket - lowest) as usize] = first;
            }
        }
        Some(Buckets { lowest, codes })
    }

    /// The code of `scaled`, by binary search: the number of points strictly below it; NaN is above all.
    pub(super) fn search(&self, scaled: f32) -> u8 {
        #[expect(clippy::neg_cmp_op_on_partial_ord, reason = "NaN must count as above")]
        let code = self.points[..255].partition_point(|&point| !(scaled <= point));
        code as u8
    }
}

impl Buckets {
    /// The code of a value in [−1, 1] with this bucket number.
    #[inline(always)]
    pub(super) fn code(&self, points: &[f32; 256], scaled: f32, bucket: u32) -> u8 {
        let first = self.codes[bucket as usize % (2 * BUCKETS)];
        // Where the bucket has no point inside, the next one is not below `scaled`. The last point never is.
        first.wrapping_add(u8::from(scaled > points[usize::from(first)]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eight_bit::reference;

    /// Around every decision point, bucket border and special value.
    fn probes(nearest: &Nearest) -> impl Iterator<Item = f32> {
        let borders = (0..=HIGHEST).map(|bucket| f32::from_bits(bucket << SHIFT));
        let special = [0.0, 1.0, f32::MIN_POSITIVE, 1e-45, f32::INFINITY, f32::NAN];
        let around = nearest.points.into_iter().chain(borders).chain(special);
        around.flat_map(|v| [v, v.next_up(), v.next_down()]).flat_map(|v| [v, -v])
    }

    #[test]
    fn search_is_the_reference() {
        for signed in [true, false] {
            let nearest = Nearest::known(dynamic_map(signed)).expect("a dynamic map is known");
            for v in probes(nearest) {
                assert_eq!(nearest.search(v), reference::encode(dynamic_map(signed), v), "{v}");
            }
        }
    }

    #[test]
    fn buckets_settle_every_code() {
        let even: Map = std::array::from_fn(|i| -1.0 + i as f32 * (2.0 / 255.0));
        for map in [dynamic_map(true), dynamic_map(false), &even] {
            let nearest = Nearest::new(map);
            let buckets = nearest.buckets.as_ref().expect("these maps are fit for buckets");
            for v in probes(&nearest).filter(|v| v.abs() <= 1.0) {
                let number = (v.abs().to_bits() >> SHIFT).max(buckets.lowest) - buckets.lowest;
                let half = if v.is_sign_negative() { BUCKETS as u32 } else { 0 };
                assert_eq!(buckets.code(&nearest.points, v, number + half), nearest.search(v), "{v}");
            }
        }
    }

    #[test]
    fn maps_too_fine_or_too_wide_have_no_buckets() {
        let fine: Map = std::array::from_fn(|i| 0.5 + i as f32 * 1e-5);
        let wide: Map = std::array::from_fn(|i| i as f32);
        assert!(Nearest::new(&fine).buckets.is_none());
        assert!(Nearest::new(&wide).buckets.is_none());
    }
}
