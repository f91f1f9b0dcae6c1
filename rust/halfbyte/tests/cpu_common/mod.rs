//! What the CPU tests share: random inputs, comparisons to the bit, and the bound that an fp32 dot product keeps.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

use half::{bf16, f16};
use halfbyte::Element;
use halfbyte::four_bit::{self, Quantized};

/// The bits of a number, all NaN alike.
pub trait Bits: Copy {
    fn bits(self) -> u32;
}

impl Bits for f32 {
    fn bits(self) -> u32 {
        if self.is_nan() { Self::NAN.to_bits() } else { self.to_bits() }
    }
}

impl Bits for f16 {
    fn bits(self) -> u32 {
        if self.is_nan() { Self::NAN.to_bits().into() } else { self.to_bits().into() }
    }
}

impl Bits for bf16 {
    fn bits(self) -> u32 {
        if self.is_nan() { Self::NAN.to_bits().into() } else { self.to_bits().into() }
    }
}

/// Panics unless both are the same numbers, to the bit.
#[track_caller]
pub fn assert_same<T: Bits>(got: &[T], want: &[T]) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.bits(), want.bits(), "element {i} of {}", want.bits());
    }
}

/// Random numbers (SplitMix64): the same ones in every run.
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }

    /// About normally distributed: sums of four uniform numbers.
    pub fn normal<T: Element>(&mut self, n: usize) -> Vec<T> {
        (0..n).map(|_| T::from_f32((0..4).map(|_| self.uniform()).sum::<f32>() * 1.7)).collect()
    }

    /// Normal numbers, one of `rarity` something special, and runs of 300 that are zeros or tiny.
    pub fn with_specials<T: Element>(&mut self, n: usize, rarity: u64) -> Vec<T> {
        let special = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-39, -1e-45, 0.0, -0.0, 6e-8, -65504.0];
        let mut values: Vec<T> = self.normal(n);
        for value in &mut values {
            let random = self.next();
            if random.is_multiple_of(rarity) {
                *value = T::from_f32(special[(random / rarity) as usize % special.len()]);
            }
        }
        for (i, run) in values.chunks_mut(300).enumerate() {
            let factor = match i % 5 {
                1 => 0.0,
                3 => 1e-39,
                4 => 1e-5,
                _ => continue,
            };
            for v in run {
                *v = T::from_f32(v.to_f32() * factor);
            }
        }
        values
    }
}

/// Panics unless each element of `out` is `x · wᵀ + bias` up to what an fp32 dot product, an fp32 weight and one rounding to
/// `T` may be off: |error| ≤ (K + 3) · 2⁻²⁴ · Σ|x·w| + half a unit in the last place of `T`.
#[track_caller]
pub fn assert_close<T: Element>(
    x: &[T],
    (m, n, k): (usize, usize, usize),
    q: &Quantized,
    bias: Option<&[T]>,
    out: &[T],
    context: &str,
) {
    let mut w = vec![0f32; n * k];
    four_bit::reference::dequantize(&q.packed, q.absmax.view(), q.spec.kind, q.spec.block, &mut w);
    // Relative: half of the distance of neighbours; absolute: that of the smallest numbers.
    let (relative, smallest) = match T::DTYPE.name() {
        "float32" => (2f64.powi(-24), 2f64.powi(-150)),
        "float16" => (2f64.powi(-11), 2f64.powi(-25)),
        _ => (2f64.powi(-8), 2f64.powi(-134)),
    };
    for row in 0..m {
        for column in 0..n {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[column].to_f32()));
            let (mut sum, mut size) = (bias, bias.abs());
            for i in 0..k {
                let product = f64::from(x[row * k + i].to_f32()) * f64::from(w[column * k + i]);
                sum += product;
                size += product.abs();
            }
            let bound = (k + 3) as f64 * 2f64.powi(-24) * size + relative * sum.abs() * 1.01 + smallest;
            let got = f64::from(out[row * n + column].to_f32());
            assert!((got - sum).abs() <= bound, "{context}: [{row}, {column}] is {got}, not {sum} ± {bound}");
        }
    }
}
