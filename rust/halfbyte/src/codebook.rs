//! Code tables of the formats: which value each code stands for, and which code a value gets.
//!
//! NF4 is from QLoRA (arXiv 2305.14314), the dynamic maps from "8-bit Optimizers via Block-wise Quantization"
//! (arXiv 2110.02861); FP4 is sign, two exponent bits and one mantissa bit, divided by 12. The values are those that
//! bitsandbytes stores in its checkpoints, to the bit.

use std::sync::LazyLock;

/// A 4-bit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Normal float: quantiles of a normal distribution, 0 and ±1 included.
    Nf4,
    /// Float with 1 sign, 2 exponent and 1 mantissa bits.
    Fp4,
}

/// NF4 values in code order, which is value order.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// FP4 values in code order, which is *not* value order.
pub const FP4: [f32; 16] = {
    const POSITIVE: [f32; 8] = [0.0, 0.0625 / 12.0, 8.0 / 12.0, 1.0, 4.0 / 12.0, 6.0 / 12.0, 2.0 / 12.0, 3.0 / 12.0];
    let mut values = [0.0; 16];
    let mut i = 0;
    while i < 8 {
        values[i] = POSITIVE[i];
        values[i + 8] = -POSITIVE[i];
        i += 1;
    }
    values
};

/// FP4 codes by rising value. The two zeros stand in the order that bitsandbytes' CPU path gives them: what lies in
/// (−1/384, 0] becomes code 0 and what lies in (0, 1/384] code 8. Both decode to zero.
const FP4_BY_VALUE: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

const NF4_BY_VALUE: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// Decision points: the fp32 midpoints between neighbours by value.
const fn midpoints(values: &[f32; 16], by_value: &[u8; 16]) -> [f32; 15] {
    let mut points = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        points[i] = f32::midpoint(values[by_value[i] as usize], values[by_value[i + 1] as usize]);
        i += 1;
    }
    points
}

const NF4_POINTS: [f32; 15] = midpoints(&NF4, &NF4_BY_VALUE);
const FP4_POINTS: [f32; 15] = midpoints(&FP4, &FP4_BY_VALUE);

impl Kind {
    /// Both kinds.
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// The name used in checkpoints and in Python: `nf4` or `fp4`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// The inverse of [`Kind::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.name() == name)
    }

    /// The 16 values in code order, each in [−1, 1].
    pub const fn values(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    /// The 15 decision points, rising: code `by_value()[i]` is for what lies above point `i − 1` and not above point `i`.
    pub const fn decision_points(self) -> &'static [f32; 15] {
        match self {
            Self::Nf4 => &NF4_POINTS,
            Self::Fp4 => &FP4_POINTS,
        }
    }

    /// Codes by rising value.
    pub const fn by_value(self) -> &'static [u8; 16] {
        match self {
            Self::Nf4 => &NF4_BY_VALUE,
            Self::Fp4 => &FP4_BY_VALUE,
        }
    }

    /// The code of a value already divided by its block's absmax: as many steps up as there are decision points strictly
    /// below it. NaN is above them all.
    pub fn encode(self, scaled: f32) -> u8 {
        // `!(x <= point)` and not `x > point`, so that NaN counts.
        #[expect(clippy::neg_cmp_op_on_partial_ord, reason = "NaN must count as above")]
        let rank = self.decision_points().iter().filter(|&&point| !(scaled <= point)).count();
        self.by_value()[rank]
    }
}

/// The code of zero: what pads the last byte of an odd number of weights.
pub(crate) fn zero_code(kind: Kind) -> u8 {
    kind.encode(0.0)
}

/// A 256-entry 8-bit code, in rising order.
pub type Map = [f32; 256];

/// The dynamic 8-bit map: a sign, a run of zeros for the decimal exponent, the rest a linear fraction.
///
/// `signed` spans (−0.993, 1], unsigned [0, 1]. Entry for entry equal to bitsandbytes' `create_dynamic_map`.
pub fn dynamic_map(signed: bool) -> &'static Map {
    static SIGNED: LazyLock<Map> = LazyLock::new(|| build_dynamic_map(true));
    static UNSIGNED: LazyLock<Map> = LazyLock::new(|| build_dynamic_map(false));
    if signed { &SIGNED } else { &UNSIGNED }
}

/// Decade i of 7 spans [0.1, 1] · 10^(i−6) and is cut into 2^i (signed) or 2^(i+1) equal intervals, whose midpoints are the
/// entries; then 0 and 1 are added. All of it in fp32, the grid as torch's `linspace` makes it.
fn build_dynamic_map(signed: bool) -> Map {
    let mut entries = Vec::with_capacity(256);
    for decade in 0..7i32 {
        let intervals = 1usize << if signed { decade } else { decade + 1 };
        let grid: Vec<f32> = (0..=intervals).map(|i| linspace(0.1, 1.0, intervals + 1, i)).collect();
        let scale = 10f64.powi(decade - 6) as f32;
        for pair in grid.windows(2) {
            let middle = scale * f32::midpoint(pair[0], pair[1]);
            entries.push(middle);
            if signed {
                entries.push(-middle);
            }
        }
    }
    entries.extend([0.0, 1.0]);
    entries.sort_by(f32::total_cmp);
    entries.try_into().expect("7 decades make 254 entries, and two more")
}

/// Element `i` of torch's fp32 `linspace` of `steps` points: from both ends to the middle, with one rounding.
fn linspace(start: f32, end: f32, steps: usize, i: usize) -> f32 {
    let step = (end - start) / (steps - 1) as f32;
    if i < steps / 2 { step.mul_add(i as f32, start) } else { (-step).mul_add((steps - 1 - i) as f32, end) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decision_points_are_those_of_the_format() {
        assert_eq!(NF4_POINTS[0], -0.8480963706970215);
        assert_eq!(NF4_POINTS[7], 0.03979014977812767);
        assert_eq!(NF4_POINTS[14], 0.8614784479141235);
    }

    #[test]
    fn every_value_encodes_to_its_own_code() {
        for kind in Kind::ALL {
            for (code, &value) in kind.values().iter().enumerate() {
                let again = kind.encode(value);
                assert_eq!(kind.values()[again as usize], value, "{} {code}", kind.name());
            }
        }
    }

    #[test]
    fn nan_and_out_of_range_have_a_code() {
        assert_eq!(Kind::Nf4.encode(f32::NAN), 15);
        assert_eq!(Kind::Nf4.encode(f32::INFINITY), 15);
        assert_eq!(Kind::Nf4.encode(f32::NEG_INFINITY), 0);
        assert_eq!(Kind::Fp4.encode(f32::NAN), 3);
        assert_eq!(Kind::Fp4.encode(f32::NEG_INFINITY), 11);
    }

    #[test]
    fn dynamic_maps_rise_and_have_their_ends() {
        for signed in [true, false] {
            let map = dynamic_map(signed);
            assert!(map.windows(2).all(|w| w[0] < w[1]));
            assert_eq!(map[255], 1.0);
        }
        assert_eq!(dynamic_map(true)[127], 0.0);
        assert_eq!(dynamic_map(false)[0], 0.0);
    }
}
