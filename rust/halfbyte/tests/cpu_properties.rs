//! Properties that hold for any input, on every vector level that this CPU has.

mod cpu_common;

use cpu_common::{Bits, Noise, assert_close, assert_same};
use half::{bf16, f16};
use halfbyte::codebook::{Map, dynamic_map};
use halfbyte::device::cpu::{self, available_levels};
use halfbyte::eight_bit::{self, Rounding};
use halfbyte::four_bit::{self, Quantized, Spec};
use halfbyte::layout::{FOUR_BIT_BLOCKS, block_count, packed_len};
use halfbyte::{Dtype, Element, Kind};
use proptest::prelude::*;

/// Numbers of every class: any bits at all, plain ones, zeros, subnormal, infinite, NaN.
fn number() -> impl Strategy<Value = f32> {
    prop_oneof![
        3 => any::<u32>().prop_map(f32::from_bits),
        12 => -2f32..2.0,
        2 => Just(0.0),
        1 => prop::sample::select(vec![-0.0, 1e-45, -1e-39, 1e-38, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN]),
    ]
}

fn numbers(most: usize) -> impl Strategy<Value = Vec<f32>> {
    // Often without any that spoil their block.
    prop_oneof![prop::collection::vec(number(), 0..most), prop::collection::vec(-3f32..3.0, 0..most)]
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![Dtype::F32, Dtype::F16, Dtype::Bf16])
}

fn kind() -> impl Strategy<Value = Kind> {
    prop::sample::select(Kind::ALL.to_vec())
}

fn block() -> impl Strategy<Value = usize> {
    prop::sample::select(FOUR_BIT_BLOCKS.to_vec())
}

/// Any rising map: sorted numbers, from very near each other to far apart.
fn map() -> impl Strategy<Value = Map> {
    prop_oneof![
        Just(*dynamic_map(true)),
        Just(*dynamic_map(false)),
        prop::collection::vec(prop_oneof![-1f32..1.0, -1e-6f32..1e-6, -50f32..50.0], 256).prop_map(|mut values| {
            values.sort_by(f32::total_cmp);
            values.try_into().expect("256 values")
        }),
    ]
}

/// Calls `$function::<T>` with the type that a tag names.
macro_rules! with_dtype {
    ($dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            Dtype::F32 => $function::<f32>($($argument),*),
            Dtype::F16 => $function::<f16>($($argument),*),
            Dtype::Bf16 => $function::<bf16>($($argument),*),
        }
    };
}

fn converted<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&v| T::from_f32(v)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn four_bit_levels_agree(values in numbers(3000), dtype in dtype(), kind in kind(), block in block()) {
        with_dtype!(dtype, four_bit_agrees(&values, kind, block));
    }

    #[test]
    fn four_bit_is_within_half_a_step(values in prop::collection::vec(-3f32..3.0, 1..3000), kind in kind(), block in block()) {
        half_a_step(&values, kind, block);
    }

    #[test]
    fn double_quantization_keeps_scales_within_a_step(
        values in prop::collection::vec(-3f32..3.0, 64..30_000), kind in kind(),
    ) {
        double_quantization(&values, kind);
    }

    #[test]
    fn eight_bit_levels_agree(
        values in numbers(3000), dtype in dtype(), map in map(), block in 1usize..700,
        offset in prop_oneof![Just(0.0), -2f32..2.0], grid in any::<bool>(),
    ) {
        let rounding = if grid { Rounding::Grid } else { Rounding::Nearest };
        with_dtype!(dtype, eight_bit_agrees(&values, &map, block, offset, rounding));
    }

    #[test]
    fn matmul_is_an_fp32_dot_product(
        m in 0usize..40, n in 0usize..60, k in prop_oneof![0usize..300, (0usize..20).prop_map(|k| 32 * k)],
        dtype in dtype(), kind in kind(), block in block(), double_quant in any::<bool>(), bias in any::<bool>(), seed: u64,
    ) {
        with_dtype!(dtype, matmul_agrees((m, n, k), Spec { kind, block, double_quant }, bias, seed));
    }

    #[test]
    fn matmul_passes_nan_and_infinity_on(
        m in 1usize..20, n in 1usize..30, k in prop_oneof![1usize..200, (1usize..10).prop_map(|k| 32 * k)],
        specials in prop::collection::vec((any::<prop::sample::Index>(), 0usize..3), 1..4), seed: u64,
    ) {
        specials_go_through((m, n, k), &specials, seed);
    }

    #[test]
    fn results_do_not_depend_on_threads(threads in 1usize..9, m in 1usize..20, seed: u64) {
        threads_do_not_matter(threads, m, seed);
    }
}

fn four_bit_agrees<T: Element + Bits>(values: &[f32], kind: Kind, block: usize) {
    let a = converted::<T>(values);
    let n = a.len();
    let (mut packed, mut absmax) = (vec![0; packed_len(n)], vec![0.0; block_count(n, block)]);
    let (mut want_packed, mut want_absmax) = (packed.clone(), absmax.clone());
    four_bit::reference::quantize(&a, kind, block, &mut want_packed, &mut want_absmax);
    let (mut out, mut want_out) = (vec![T::default(); n], vec![T::default(); n]);
    let view = halfbyte::layout::Absmax::Plain(&want_absmax);
    four_bit::reference::dequantize(&want_packed, view, kind, block, &mut want_out);
    for level in available_levels() {
        four_bit::cpu::quantize(level, &a, kind, block, &mut packed, &mut absmax).unwrap();
        assert_eq!(packed, want_packed, "{level:?}");
        assert_same(&absmax, &want_absmax);
        four_bit::cpu::dequantize(level, &packed, view, kind, block, &mut out).unwrap();
        assert_same(&out, &want_out);
    }
}

/// A weight decodes to the nearest value of its code: off by no more than half of the widest gap, times its scale.
fn half_a_step(values: &[f32], kind: Kind, block: usize) {
    let q = four_bit::quantize(values, Spec { kind, block, double_quant: false }).unwrap();
    let mut again = vec![0f32; values.len()];
    four_bit::dequantize_into(&q.packed, q.absmax.view(), kind, block, &mut again).unwrap();
    let sorted = kind.by_value().map(|code| kind.values()[usize::from(code)]);
    let widest = sorted.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f32::max);
    for (i, (&value, &again)) in values.iter().zip(&again).enumerate() {
        let scale = q.absmax.view().get(i / block);
        assert!((value - again).abs() <= scale * widest / 2.0 * 1.0001, "{value} became {again}, scale {scale}");
    }
}

/// The steps of the signed dynamic map are at most 1/70 of its range, and the grid adds little.
fn double_quantization(values: &[f32], kind: Kind) {
    let plain = four_bit::quantize(values, Spec { kind, block: 64, double_quant: false }).unwrap();
    let nested = four_bit::quantize(values, Spec { kind, block: 64, double_quant: true }).unwrap();
    assert_eq!(plain.packed, nested.packed);
    let (plain, nested) = (plain.absmax.view(), nested.absmax.view());
    let scales: Vec<f32> = (0..plain.len()).map(|i| plain.get(i)).collect();
    let mean = scales.iter().sum::<f32>() / scales.len() as f32;
    let range = scales.iter().map(|s| (s - mean).abs()).fold(0.0, f32::max);
    for (i, scale) in scales.iter().enumerate() {
        let off = (scale - nested.get(i)).abs();
        assert!(off <= range / 70.0 + 1e-5, "scale {scale} is off by {off}, range {range}");
    }
}

fn eight_bit_agrees<T: Element + Bits>(values: &[f32], map: &Map, block: usize, offset: f32, rounding: Rounding) {
    let a = converted::<T>(values);
    let n = a.len();
    let (mut codes, mut absmax) = (vec![0; n], vec![0.0; block_count(n, block)]);
    let (mut want_codes, mut want_absmax) = (codes.clone(), absmax.clone());
    eight_bit::reference::quantize(&a, map, block, offset, rounding, &mut want_codes, &mut want_absmax);
    let (mut out, mut want_out) = (vec![T::default(); n], vec![T::default(); n]);
    eight_bit::reference::dequantize(&want_codes, map, &want_absmax, block, offset, &mut want_out);
    for level in available_levels() {
        eight_bit::cpu::quantize(level, &a, map, block, offset, rounding, &mut codes, &mut absmax).unwrap();
        assert_eq!(codes, want_codes, "{level:?}");
        assert_same(&absmax, &want_absmax);
        eight_bit::cpu::dequantize(level, &codes, map, &absmax, block, offset, &mut out).unwrap();
        assert_same(&out, &want_out);
    }
}

fn random_weight(n: usize, k: usize, spec: Spec, noise: &mut Noise) -> Quantized {
    four_bit::quantize(&noise.normal::<f32>(n * k), spec).unwrap()
}

fn matmul_agrees<T: Element + Bits>((m, n, k): (usize, usize, usize), spec: Spec, with_bias: bool, seed: u64) {
    let mut noise = Noise::new(seed);
    let q = random_weight(n, k, spec, &mut noise);
    let (x, bias): (Vec<T>, Vec<T>) = (noise.normal(m * k), noise.normal(n));
    let bias = with_bias.then_some(&bias[..]);
    for level in available_levels() {
        let mut out = vec![T::from_f32(7.0); m * n];
        let absmax = q.absmax.view();
        four_bit::cpu::matmul(level, &x, (m, n, k), &q.packed, absmax, spec.kind, spec.block, bias, &mut out).unwrap();
        assert_close(&x, (m, n, k), &q, bias, &out, &format!("{level:?}"));
    }
}

fn specials_go_through((m, n, k): (usize, usize, usize), specials: &[(prop::sample::Index, usize)], seed: u64) {
    let mut noise = Noise::new(seed);
    let q = random_weight(n, k, Spec::default(), &mut noise);
    let mut x: Vec<f32> = noise.normal(m * k);
    for (index, which) in specials {
        x[index.index(m * k)] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][*which];
    }
    let mut want = vec![0f32; m * n];
    four_bit::reference::matmul(&x, (m, n, k), &q.packed, q.absmax.view(), Kind::Nf4, 64, None, &mut want);
    for level in available_levels() {
        let mut out = vec![0f32; m * n];
        let absmax = q.absmax.view();
        four_bit::cpu::matmul(level, &x, (m, n, k), &q.packed, absmax, Kind::Nf4, 64, None, &mut out).unwrap();
        for (got, want) in out.iter().zip(&want).filter(|(_, want)| !want.is_finite()) {
            assert_eq!(got.bits(), want.bits(), "{level:?}");
        }
        assert!(out.iter().zip(&want).all(|(got, want)| got.is_finite() == want.is_finite()), "{level:?}");
    }
}

fn threads_do_not_matter(threads: usize, m: usize, seed: u64) {
    let mut noise = Noise::new(seed);
    let (n, k) = (1030, 320);
    let a: Vec<f32> = noise.normal(n * k);
    let x: Vec<bf16> = noise.normal(m * k);
    let run = |threads| {
        cpu::set_threads(threads);
        let q = four_bit::quantize(&a, Spec { double_quant: true, ..Spec::default() }).unwrap();
        let (mut again, mut out) = (vec![bf16::ZERO; n * k], vec![bf16::ZERO; m * n]);
        four_bit::dequantize_into(&q.packed, q.absmax.view(), Kind::Nf4, 64, &mut again).unwrap();
        let absmax = q.absmax.view();
        four_bit::matmul_into(&x, (m, n, k), &q.packed, absmax, Kind::Nf4, 64, None, &mut out).unwrap();
        cpu::set_threads(0);
        (q, again, out)
    };
    assert!(run(1) == run(threads), "{threads} threads give another result than one");
}
