//! LLM.int8() with every set of instructions that this CPU has against the reference: the same codes, statistics, bitmaps and
//! integer sums, the same scaled products to the bit, and columns in floating point within the rounding of an fp32 sum.

mod cpu_common;

use cpu_common::{Bits, Noise, assert_same};
use halfbyte::int8::cpu::{self, Instructions};
use halfbyte::int8::{self, reference};
use halfbyte::{Element, Error};
use proptest::prelude::*;

/// Calls a generic function for all three element types.
macro_rules! all_dtypes {
    ($function:ident) => {
        $function::<f32>();
        $function::<half::f16>();
        $function::<half::bf16>();
    };
}

/// Row lengths around everything that vectors and words of a bitmap divide by.
const LENGTHS: [usize; 14] = [1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 499, 4096 + 17];

fn codes(noise: &mut Noise, n: usize) -> Vec<i8> {
    noise.bytes(n).into_iter().map(u8::cast_signed).collect()
}

/// Normal numbers, a few columns of them thirty times as large, and special values.
fn activations<T: Element>(noise: &mut Noise, m: usize, k: usize) -> Vec<T> {
    let mut x: Vec<T> = noise.with_specials(m * k, 5000);
    for column in (0..k).filter(|column| column % 37 == 5) {
        x.iter_mut().skip(column).step_by(k).for_each(|v| *v = T::from_f32(v.to_f32() * 30.0));
    }
    x
}

#[test]
fn quantizing_is_the_reference() {
    all_dtypes!(quantizing);
}

fn quantizing<T: Element + Bits>() {
    let mut noise = Noise::new(1);
    for k in LENGTHS {
        for (m, threshold) in
            [(0, 6.0), (1, 0.0), (1, 6.0), (5, 3.1), (70, 0.0), (70, 6.0), (3, f32::INFINITY), (4, 0.01)]
        {
            let x: Vec<T> = activations(&mut noise, m, k);
            let threshold = T::from_f32(threshold).to_f32();
            let (mut want, mut want_stats, mut want_bitmap) = (vec![9; m * k], vec![0.0; m], vec![7; k.div_ceil(32)]);
            reference::quantize_rows(&x, k, threshold, &mut want, &mut want_stats, Some(&mut want_bitmap));
            let mut columns = vec![0.0; k];
            reference::column_stats(&x, k, threshold, &mut columns);
            let mut by_columns = vec![0; m * k];
            reference::quantize_columns(&x, k, threshold, &columns, &mut by_columns);
            for instructions in Instructions::available() {
                let context = format!("{instructions:?} {m} x {k}, threshold {threshold}");
                let (mut got, mut stats, mut bitmap) = (vec![1; m * k], vec![-1.0; m], vec![5; k.div_ceil(32)]);
                cpu::quantize_rows(instructions, &x, k, threshold, &mut got, &mut stats, Some(&mut bitmap)).unwrap();
                assert_eq!(got, want, "{context}");
                assert_eq!(bitmap, want_bitmap, "{context}");
                assert_same(&stats, &want_stats);
                let mut stats = vec![-1.0; k];
                cpu::column_stats(instructions, &x, k, threshold, &mut stats).unwrap();
                assert_same(&stats, &columns);
                cpu::quantize_columns(instructions, &x, k, threshold, &columns, &mut got).unwrap();
                assert_eq!(got, by_columns, "{context}");
                let mut decoded: (Vec<T>, Vec<T>) = (vec![T::default(); m * k], vec![T::default(); m * k]);
                cpu::dequantize(instructions, &want, k, &want_stats, &mut decoded.0).unwrap();
                reference::dequantize(&want, k, &want_stats, &mut decoded.1);
                assert_same(&decoded.0, &decoded.1);
            }
        }
    }
}

#[test]
fn every_sixteen_bit_number_quantizes_as_the_reference_does() {
    fn exhaustive<T: Element + Bits>(values: &[T]) {
        for k in [64, 65_536] {
            let m = values.len() / k;
            for threshold in [0.0, 6.0] {
                let (mut want, mut want_stats, mut want_bitmap) =
                    (vec![0; m * k], vec![0.0; m], vec![0; k.div_ceil(32)]);
                reference::quantize_rows(values, k, threshold, &mut want, &mut want_stats, Some(&mut want_bitmap));
                for instructions in Instructions::available() {
                    let (mut got, mut stats, mut bitmap) = (want.clone(), want_stats.clone(), want_bitmap.clone());
                    cpu::quantize_rows(instructions, values, k, threshold, &mut got, &mut stats, Some(&mut bitmap))
                        .unwrap();
                    assert_eq!((got, bitmap), (want.clone(), want_bitmap.clone()));
                    assert_same(&stats, &want_stats);
                }
            }
        }
    }
    exhaustive(&(0..=u16::MAX).map(half::f16::from_bits).collect::<Vec<_>>());
    exhaustive(&(0..=u16::MAX).map(half::bf16::from_bits).collect::<Vec<_>>());
}

/// Sizes around those of tiles, panels and depths.
const SIZES: [(usize, usize, usize); 17] = [
    (32, 50, 128),
    (100, 33, 1024 + 64),
    (200, 65, 1024),
    (1, 1, 1),
    (1, 5, 64),
    (2, 3, 63),
    (3, 49, 65),
    (5, 48, 32),
    (6, 4, 499),
    (7, 100, 502),
    (13, 47, 130),
    (129, 53, 77),
    (131, 7, 4096 + 33),
    (2, 97, 2 * 4096 + 1),
    (300, 20, 40),
    (4, 6, 0),
    (0, 6, 3),
];

#[test]
fn integer_products_are_exact() {
    let mut noise = Noise::new(2);
    for (m, n, k) in SIZES {
        for extreme in [false, true] {
            let fill = |noise: &mut Noise, n| if extreme { vec![i8::MIN; n] } else { codes(noise, n) };
            let (a, b) = (fill(&mut noise, m * k), fill(&mut noise, n * k));
            let (mut got, mut want) = (vec![1; m * n], vec![0; m * n]);
            reference::matmul(&a, &b, (m, n, k), &mut want);
            for instructions in Instructions::available() {
                cpu::matmul(instructions, &a, &b, (m, n, k), &mut got).unwrap();
                assert_eq!(got, want, "{instructions:?} {m} x {n} x {k}");
            }
        }
    }
}

#[test]
fn scaled_products_are_the_reference() {
    all_dtypes!(scaled);
}

fn scaled<T: Element + Bits>() {
    let mut noise = Noise::new(3);
    for (m, n, k) in SIZES {
        let (a, b) = (codes(&mut noise, m * k), codes(&mut noise, n * k));
        let (rows, columns): (Vec<f32>, Vec<f32>) = (noise.with_specials(m, 50), noise.with_specials(n, 50));
        let bias: Vec<T> = noise.normal(n);
        for bias in [None, Some(&bias[..])] {
            let (mut got, mut want) = (vec![T::default(); m * n], vec![T::default(); m * n]);
            let mut sums = vec![0; m * n];
            reference::matmul(&a, &b, (m, n, k), &mut sums);
            reference::dequantize_product(&sums, &rows, &columns, bias, &mut want);
            for instructions in Instructions::available() {
                cpu::scaled(instructions, &a, &b, (m, n, k), &rows, &columns, bias, &mut got).unwrap();
                assert_same(&got, &want);
                cpu::dequantize_product(instructions, &sums, &rows, &columns, bias, &mut got).unwrap();
                assert_same(&got, &want);
            }
        }
    }
}

#[test]
fn layers_with_columns_in_floating_point_are_close_to_exact_arithmetic() {
    all_dtypes!(layers);
}

/// A whole layer in fp64 on the quantized operands, and how far an fp32 computation may be off.
fn exact<T: Element>(
    x: &[T],
    b: &[i8],
    (m, n, k): (usize, usize, usize),
    stats: &[f32],
    threshold: f32,
    bias: Option<&[T]>,
) -> Vec<(f64, f64)> {
    let (mut a, mut rows, mut bitmap) = (vec![0; m * k], vec![0.0; m], vec![0; k.div_ceil(32)]);
    reference::quantize_rows(x, k, threshold, &mut a, &mut rows, Some(&mut bitmap));
    let mut results = Vec::new();
    for row in 0..m {
        for column in 0..n {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[column].to_f32()));
            let (mut sum, mut size) = (bias, bias.abs());
            for c in 0..k {
                let weight = f64::from(b[column * k + c]) * f64::from(stats[column]) / 127.0;
                let left = if reference::in_bitmap(&bitmap, c) {
                    f64::from(x[row * k + c].to_f32())
                } else {
                    f64::from(a[row * k + c]) * f64::from(rows[row]) / 127.0
                };
                sum += left * weight;
                size += (left * weight).abs();
            }
            results.push((sum, size));
        }
    }
    results
}

fn layers<T: Element + Bits>() {
    let mut noise = Noise::new(4);
    let unit = match T::DTYPE.name() {
        "float32" => 2f64.powi(-24),
        "float16" => 2f64.powi(-11),
        _ => 2f64.powi(-8),
    };
    for (m, n, k) in [(1, 50, 64), (2, 5, 300), (7, 97, 502), (130, 9, 77), (3, 49, 4096 + 5)] {
        let b = codes(&mut noise, n * k);
        let stats: Vec<f32> = noise.normal(n).into_iter().map(f32::abs).collect();
        let bias: Vec<T> = noise.normal(n);
        // None, a few, many and all columns.
        for threshold in [0.0, 5.0, 1.5, 1e-6] {
            let mut x: Vec<T> = noise.normal(m * k);
            x.iter_mut().skip(k / 2).step_by(k).for_each(|v| *v = T::from_f32(60.0));
            let want = exact(&x, &b, (m, n, k), &stats, threshold, Some(&bias));
            for instructions in Instructions::available() {
                let mut got = vec![T::default(); m * n];
                cpu::linear(instructions, &x, &b, (m, n, k), &stats, threshold, Some(&bias), &mut got).unwrap();
                for (got, (want, size)) in got.iter().zip(&want) {
                    let bound = (k + 6) as f64 * 2f64.powi(-24) * size + unit * want.abs() * 1.01 + 1e-7;
                    let off = (f64::from(got.to_f32()) - want).abs();
                    assert!(
                        off <= bound,
                        "{instructions:?} {m} x {n} x {k} threshold {threshold}: off by {off}, not {bound}"
                    );
                }
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_threads_and_codes_of_outlier_columns_do_not_matter() {
    let (m, n, k) = (150, 400, 260);
    let mut noise = Noise::new(5);
    let b = codes(&mut noise, n * k);
    let stats: Vec<f32> = noise.normal(n);
    let x: Vec<f32> = activations(&mut noise, m, k);
    let run = || {
        let mut out = vec![0.0; m * n];
        int8::linear_into(&x, &b, (m, n, k), &stats, 6.0, None, &mut out).unwrap();
        out
    };
    let all = run();
    halfbyte::device::cpu::set_threads(1);
    let one = run();
    halfbyte::device::cpu::set_threads(0);
    assert_same(&all, &one);
    // The product takes out what the codes of those columns put in.
    let (mut a, mut rows, mut bitmap) = (vec![0; m * k], vec![0.0; m], vec![0; k.div_ceil(32)]);
    int8::quantize_rows_into(&x, k, 6.0, &mut a, &mut rows, Some(&mut bitmap)).unwrap();
    let mut mixed = vec![0f32; m * n];
    int8::mixed_into(&x, &a, &b, (m, n, k), &rows, &stats, &bitmap, None, &mut mixed).unwrap();
    for (a, b) in all.iter().zip(&mixed) {
        assert!((a.is_nan() && b.is_nan()) || a == b || (a - b).abs() <= 1e-3 + a.abs() * 1e-4, "{a} {b}");
    }
}

#[test]
fn rows_with_nan_and_infinity_have_defined_results() {
    let k = 40;
    let b: Vec<i8> = (0..2 * k).map(|i| if i < k { 0 } else { 3 }).collect();
    for instructions in Instructions::available() {
        for threshold in [0.0, 6.0] {
            let mut x = vec![1f32; 4 * k];
            x[3] = f32::NAN;
            x[k + 4] = f32::INFINITY;
            x[2 * k + 5] = f32::NEG_INFINITY;
            let mut out = vec![0f32; 8];
            cpu::linear(instructions, &x, &b, (4, 2, k), &[1.0, 1.0], threshold, None, &mut out).unwrap();
            assert!(out[0].is_nan() && out[1].is_nan());
            if threshold > 0.0 {
                // In floating point, infinities are what they are everywhere; times zero, that is NaN.
                assert!(out[2].is_nan() && out[4].is_nan());
                assert_eq!((out[3], out[5]), (f32::INFINITY, f32::NEG_INFINITY));
            } else {
                assert!(out[2..6].iter().all(|v| v.is_nan()));
            }
            // Other rows do not notice.
            assert!(out[6] == 0.0 && (out[7] - 40.0 * 3.0 / 127.0).abs() < 1e-5, "{out:?}");
        }
    }
}

#[test]
fn bitmaps_and_columns_are_each_others_inverse() {
    let columns = [0i64, 31, 32, 63, 64, 99];
    let mut bitmap = vec![!0; 4];
    int8::bitmap_into(&[&columns[..], &[-1, 100, 127, i64::MAX]].concat(), 100, &mut bitmap).unwrap();
    assert_eq!(int8::columns_of(&bitmap, 100), columns.map(|c| c as usize));
    let mut codes = vec![1i8; 200];
    int8::zero_columns(&mut codes, 100, &bitmap).unwrap();
    assert_eq!(codes.iter().filter(|&&c| c == 0).count(), 2 * columns.len());
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    fn argument<T: std::fmt::Debug>(result: halfbyte::Result<T>) -> &'static str {
        match result.unwrap_err() {
            Error::Shape { argument, .. } | Error::Value { argument, .. } => argument,
            other => panic!("{other}"),
        }
    }
    let x = [1f32; 12];
    let mut codes = [0i8; 12];
    assert_eq!(argument(int8::quantize_rows_into(&x, 4, 6.0, &mut codes, &mut [0.0; 3], None)), "outliers");
    assert_eq!(argument(int8::quantize_rows_into(&x, 4, f32::NAN, &mut codes, &mut [0.0; 3], None)), "threshold");
    assert_eq!(argument(int8::quantize_rows_into(&x, 4, 0.0, &mut codes, &mut [0.0; 4], None)), "x");
    assert_eq!(argument(int8::quantize_rows_into(&x, 4, 0.0, &mut codes[1..], &mut [0.0; 3], None)), "codes");
    assert_eq!(argument(int8::matmul_into(&[0; 6], &[0; 9], (2, 3, 3), &mut [0; 5])), "out");
    assert_eq!(argument(int8::matmul_into(&[0; 6], &[0; 8], (2, 3, 3), &mut [0; 6])), "b");
    assert_eq!(argument(int8::matmul_into(&[0; 6], &[0; 8], (usize::MAX, 3, 3), &mut [0; 6])), "a");
    let mut out = [0f32; 6];
    let scaled = |rows: &[f32], columns: &[f32], bias: Option<&[f32]>, out: &mut [f32]| {
        int8::scaled_into(&[0; 6], &[0; 9], (2, 3, 3), rows, columns, bias, out)
    };
    assert_eq!(argument(scaled(&[1.0], &[1.0; 3], None, &mut out)), "row_stats");
    assert_eq!(argument(scaled(&[1.0; 2], &[1.0; 2], None, &mut out)), "column_stats");
    assert_eq!(argument(scaled(&[1.0; 2], &[1.0; 3], Some(&[1.0; 2]), &mut out)), "bias");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever the numbers, a code is within half a step of its value, and no other code is nearer.
    #[test]
    fn codes_are_the_nearest(values in prop::collection::vec(prop::num::f32::NORMAL | prop::num::f32::ZERO, 1..80)) {
        let k = values.len();
        for instructions in Instructions::available() {
            let (mut codes, mut stats) = (vec![0; k], vec![0.0]);
            cpu::quantize_rows(instructions, &values, k, 0.0, &mut codes, &mut stats, None).unwrap();
            let step = f64::from(stats[0]) / 127.0;
            for (&v, &code) in values.iter().zip(&codes) {
                prop_assert!((f64::from(v) - f64::from(code) * step).abs() <= step * 0.50001, "{} {} {}", v, code, step);
            }
        }
    }

    #[test]
    fn products_of_any_size_are_exact(m in 0usize..160, n in 0usize..120, k in 0usize..700, seed: u64) {
        let mut noise = Noise::new(seed);
        let (a, b) = (codes(&mut noise, m * k), codes(&mut noise, n * k));
        let (mut got, mut want) = (vec![0; m * n], vec![0; m * n]);
        reference::matmul(&a, &b, (m, n, k), &mut want);
        for instructions in Instructions::available() {
            cpu::matmul(instructions, &a, &b, (m, n, k), &mut got).unwrap();
            prop_assert_eq!(&got, &want);
        }
    }
}
