//! Every vector level that this CPU has against the reference: the same bytes, the same numbers, and matrix products within
//! the rounding of an fp32 sum.

mod cpu_common;

use cpu_common::{Bits, Noise, assert_close, assert_same};
use halfbyte::codebook::{Map, dynamic_map};
use halfbyte::device::cpu::available_levels;
use halfbyte::eight_bit::{self, Rounding};
use halfbyte::four_bit::{self, Spec};
use halfbyte::layout::{Absmax, FOUR_BIT_BLOCKS, block_count, packed_len};
use halfbyte::{Element, Kind};

/// Calls a generic function for all three element types.
macro_rules! all_dtypes {
    ($function:ident) => {
        $function::<f32>();
        $function::<half::f16>();
        $function::<half::bf16>();
    };
}
/// Lengths around everything that vectors, groups, blocks and threads divide by.
const LENGTHS: [usize; 17] =
    [0, 1, 2, 3, 15, 31, 32, 33, 63, 64, 65, 127, 255, 1000, 4096 + 17, 70_001, 3 * 65_536 + 33];

#[test]
fn quantize_four_bit_is_the_reference() {
    all_dtypes!(quantize_four_bit);
}

fn quantize_four_bit<T: Element + Bits>() {
    let mut noise = Noise::new(1);
    for n in LENGTHS {
        let a: Vec<T> = noise.with_specials(n, 4096);
        for (kind, block) in each_format(n) {
            let (mut packed, mut absmax) = (vec![0xaa; packed_len(n) + 3], vec![0.0; block_count(n, block)]);
            let (mut want_packed, mut want_absmax) = (packed.clone(), absmax.clone());
            four_bit::reference::quantize(&a, kind, block, &mut want_packed, &mut want_absmax);
            for level in available_levels() {
                packed.fill(0xaa);
                four_bit::cpu::quantize(level, &a, kind, block, &mut packed, &mut absmax).unwrap();
                assert_eq!(packed, want_packed, "{level:?} {kind:?} n {n} block {block}");
                assert_same(&absmax, &want_absmax);
            }
        }
    }
}

#[test]
fn every_value_quantizes_as_the_reference_does() {
    // All 65,536 patterns of 16 bits, by blocks of their own kind: each block has 1 or a NaN or an infinity in it.
    let patterns = || (0..=u16::MAX).flat_map(|bits| [bits, bits.rotate_left(7), 0x3c00, 0x3f80]);
    exhaustive(&patterns().map(half::f16::from_bits).collect::<Vec<_>>());
    exhaustive(&patterns().map(half::bf16::from_bits).collect::<Vec<_>>());
    // And all fp32 numbers near a decision point, in blocks whose scale is 1.
    let near = |kind: Kind| {
        let points = kind.decision_points().iter();
        points.flat_map(|p| (-20..=20).map(|d| f32::from_bits(p.to_bits().wrapping_add_signed(d))))
    };
    exhaustive(&Kind::ALL.into_iter().flat_map(near).flat_map(|v| [v, 1.0]).collect::<Vec<_>>());
}

fn exhaustive<T: Element>(a: &[T]) {
    for kind in Kind::ALL {
        let (mut packed, mut absmax) = (vec![0; packed_len(a.len())], vec![0.0; block_count(a.len(), 32)]);
        let (mut want_packed, mut want_absmax) = (packed.clone(), absmax.clone());
        four_bit::reference::quantize(a, kind, 32, &mut want_packed, &mut want_absmax);
        for level in available_levels() {
            four_bit::cpu::quantize(level, a, kind, 32, &mut packed, &mut absmax).unwrap();
            assert_eq!(packed, want_packed, "{level:?} {kind:?}");
            assert_same(&absmax, &want_absmax);
        }
    }
}

#[test]
fn dequantize_four_bit_is_the_reference() {
    all_dtypes!(dequantize_four_bit);
}

fn dequantize_four_bit<T: Element + Bits>() {
    let mut noise = Noise::new(2);
    for n in LENGTHS {
        let packed = noise.bytes(packed_len(n) + 2);
        for (kind, block) in each_format(n) {
            let blocks = block_count(n, block);
            let plain: Vec<f32> = noise.with_specials(blocks, 50);
            let (codes, absmax) = (noise.bytes(blocks), noise.with_specials(block_count(blocks, 7), 50));
            let nested = halfbyte::layout::Nested {
                codes: &codes,
                absmax: &absmax,
                map: dynamic_map(true),
                offset: 0.3,
                block: 7,
            };
            for absmax in [Absmax::Plain(&plain), Absmax::Nested(nested)] {
                let mut want = vec![T::default(); n];
                four_bit::reference::dequantize(&packed, absmax, kind, block, &mut want);
                for level in available_levels() {
                    let mut out = vec![T::from_f32(7.0); n];
                    four_bit::cpu::dequantize(level, &packed, absmax, kind, block, &mut out).unwrap();
                    assert_same(&out, &want);
                }
            }
        }
    }
}

#[test]
fn matmul_is_the_reference_within_rounding() {
    all_dtypes!(matmul);
}

fn matmul<T: Element + Bits>() {
    let mut noise = Noise::new(3);
    // (m, n, k): few and many rows of x, odd K (rows that begin within a byte), blocks across rows, more rows than are
    // worked on together, more columns than are decoded together, more work than one thread takes.
    let shapes = [
        (1, 1, 1),
        (1, 7, 64),
        (1, 130, 1024),
        (2, 5, 96),
        (3, 9, 160),
        (4, 64, 64),
        (5, 3, 32),
        (6, 50, 256),
        (7, 2, 2048),
        (8, 100, 544),
        (9, 97, 64),
        (1, 300, 77),
        (2, 10, 1001),
        (8, 49, 33),
        (13, 48, 300),
        (16, 31, 512),
        (17, 96, 129),
        (33, 61, 700),
        (64, 200, 257),
        (260, 20, 64),
        (300, 70, 45),
        (2, 3000, 128),
        (40, 1500, 96),
    ];
    for (i, &(m, n, k)) in shapes.iter().enumerate() {
        let kind = Kind::ALL[i % 2];
        let spec = Spec { kind, block: FOUR_BIT_BLOCKS[i % 5], double_quant: i % 3 == 0 };
        let (x, w): (Vec<T>, Vec<f32>) = (noise.normal(m * k), noise.normal(n * k));
        let bias: Vec<T> = noise.normal(n);
        let q = four_bit::quantize(&w, spec).unwrap();
        for bias in [None, Some(&bias[..])] {
            for level in available_levels() {
                let mut out = vec![T::from_f32(7.0); m * n];
                let absmax = q.absmax.view();
                four_bit::cpu::matmul(level, &x, (m, n, k), &q.packed, absmax, kind, spec.block, bias, &mut out)
                    .unwrap();
                let context = format!("{level:?} {m}×{n}×{k} block {}", spec.block);
                assert_close(&x, (m, n, k), &q, bias, &out, &context);
            }
        }
    }
}

#[test]
fn experts_are_products_with_parts_of_the_stack() {
    all_dtypes!(experts);
}

fn experts<T: Element + Bits>() {
    let mut noise = Noise::new(14);
    // Rows of x before the first expert and of each; experts with none; (N, K) whose experts begin within bytes and blocks too.
    for (counts, (n, k)) in [
        (&[2, 3, 0, 1][..], (5, 64)),
        (&[0, 1, 0, 0, 20], (7, 33)),
        (&[1, 9, 300], (3, 128)),
        (&[4], (2, 8)),
        (&[0, 2], (3, 0)),
    ] {
        let mut offsets = vec![counts[0]];
        offsets.extend(counts[1..].iter().scan(counts[0], |end, count| {
            *end += count;
            Some(*end)
        }));
        let (e, s) = (counts.len() - 1, offsets[counts.len() - 1] as usize + 2);
        for double_quant in [false, true] {
            let spec = Spec { kind: Kind::Nf4, block: 64, double_quant };
            let q = four_bit::quantize(&noise.normal::<f32>(e * n * k), spec).unwrap();
            let (x, bias) = (noise.normal::<T>(s * k), noise.normal::<T>(e * n));
            let mut weights = vec![0f32; e * n * k];
            four_bit::dequantize_into(&q.packed, q.absmax.view(), spec.kind, spec.block, &mut weights).unwrap();
            for level in available_levels() {
                for bias in [None, Some(&bias[..])] {
                    let mut out = vec![T::from_f32(f32::NAN); s * n];
                    let absmax = q.absmax.view();
                    let shape = (s, e, n, k);
                    four_bit::cpu::matmul_experts(
                        level, &x, &offsets, shape, &q.packed, absmax, spec.kind, spec.block, bias, &mut out,
                    )
                    .unwrap();
                    for row in 0..s {
                        let expert = offsets.windows(2).position(|ends| (ends[0]..ends[1]).contains(&(row as i32)));
                        for column in 0..n {
                            let got = f64::from(out[row * n + column].to_f32());
                            let Some(expert) = expert else {
                                assert!(got == 0.0, "row {row} is nobody's");
                                continue;
                            };
                            let of = expert * n + column;
                            let mut want = bias.map_or(0.0, |bias| f64::from(bias[of].to_f32()));
                            let mut reach = want.abs();
                            for i in 0..k {
                                let product = f64::from(x[row * k + i].to_f32()) * f64::from(weights[of * k + i]);
                                want += product;
                                reach += product.abs();
                            }
                            let bound = reach * 1e-5 + want.abs() / 128.0;
                            assert!(
                                (got - want).abs() <= bound,
                                "{level:?} {counts:?} [{row}, {column}]: {got}, {want}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn eight_bit_is_the_reference() {
    all_dtypes!(eight_bit);
}

fn eight_bit<T: Element + Bits>() {
    let mut noise = Noise::new(4);
    let even: Map = std::array::from_fn(|i| i as f32 / 255.0 * 2.0 - 1.0);
    let wide: Map = std::array::from_fn(|i| i as f32 - 100.0);
    let mut padded = [0.0; 256];
    padded[..100].fill(-0.5);
    padded[200..].fill(1.0);
    for n in LENGTHS {
        let a: Vec<T> = noise.with_specials(n, 5000);
        let maps = [dynamic_map(true), &even, dynamic_map(false), &wide, &padded];
        let blocks = [(256, -0.7), (7, 0.1), (1, 0.0), (64, 0.0), (1000, 1.5), (1 << 40, 0.0)];
        // The reference is slow: long inputs, which are about threads and tables, go through some of them.
        let (maps, blocks) = if n < 10_000 { (&maps[..], &blocks[..]) } else { (&maps[..2], &blocks[..2]) };
        for map in maps {
            for &(block, offset) in blocks {
                for rounding in [Rounding::Nearest, Rounding::Grid] {
                    let (mut codes, mut absmax) = (vec![9; n], vec![9.0; block_count(n, block)]);
                    let (mut want_codes, mut want_absmax) = (codes.clone(), absmax.clone());
                    let want = (&mut want_codes[..], &mut want_absmax[..]);
                    eight_bit::reference::quantize(&a, map, block, offset, rounding, want.0, want.1);
                    for level in available_levels() {
                        let got = (&mut codes[..], &mut absmax[..]);
                        eight_bit::cpu::quantize(level, &a, map, block, offset, rounding, got.0, got.1).unwrap();
                        assert_eq!(codes, want_codes, "{level:?} {rounding:?} n {n} block {block} offset {offset}");
                        assert_same(&absmax, &want_absmax);
                    }
                }
                let (codes, absmax) = (noise.bytes(n), noise.with_specials(block_count(n, block), 60));
                let mut want = vec![T::default(); n];
                eight_bit::reference::dequantize(&codes, map, &absmax, block, offset, &mut want);
                for level in available_levels() {
                    let mut out = vec![T::from_f32(7.0); n];
                    eight_bit::cpu::dequantize(level, &codes, map, &absmax, block, offset, &mut out).unwrap();
                    assert_same(&out, &want);
                }
            }
        }
    }
}

/// Both kinds with all block sizes; with a few where the tensor is large.
fn each_format(n: usize) -> impl Iterator<Item = (Kind, usize)> {
    let blocks = if n < 10_000 { &FOUR_BIT_BLOCKS[..] } else { &[32, 64, 4096] };
    Kind::ALL.into_iter().flat_map(move |kind| blocks.iter().map(move |&block| (kind, block)))
}
