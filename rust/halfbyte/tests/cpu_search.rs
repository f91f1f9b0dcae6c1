//! Scales by least squared error: every vector level against the reference, no block worse than plain, and less error in all.

mod cpu_common;

use cpu_common::{Bits, Noise, assert_same};
use half::{bf16, f16};
use halfbyte::codebook::dynamic_map;
use halfbyte::device::cpu::available_levels;
use halfbyte::four_bit::{self, Spec, search};
use halfbyte::layout::{Absmax, FOUR_BIT_BLOCKS, Nested, block_count, packed_len};
use halfbyte::{Element, Kind};

const LENGTHS: [usize; 13] = [0, 1, 2, 31, 32, 33, 64, 65, 255, 1000, 4096 + 17, 9001, 70_001];

fn formats(n: usize) -> impl Iterator<Item = (Kind, usize)> {
    let blocks = if n < 5000 { &FOUR_BIT_BLOCKS[..] } else { &[32, 64, 2048] };
    Kind::ALL.into_iter().flat_map(move |kind| blocks.iter().map(move |&block| (kind, block)))
}

/// Normal numbers with special ones among them, in blocks of all scales: some too small or too large to be searched.
fn hostile<T: Element>(noise: &mut Noise, n: usize) -> Vec<T> {
    let mut a: Vec<T> = noise.with_specials(n, 3000);
    for (i, run) in a.chunks_mut(700).enumerate() {
        let factor = [1.0, 1e-20, 0.01, 20_000.0, 1.0, 65_000.0, 1e-31, 3e-6][i % 8];
        for v in run {
            *v = T::from_f32(v.to_f32() * factor);
        }
    }
    a
}

#[test]
fn every_level_is_the_reference() {
    levels::<f32>();
    levels::<f16>();
    levels::<bf16>();
}

fn levels<T: Element + Bits>() {
    let mut noise = Noise::new(11);
    for n in LENGTHS {
        let a: Vec<T> = hostile(&mut noise, n);
        for (kind, block) in formats(n) {
            let blocks = block_count(n, block);
            let (mut packed, mut absmax) = (vec![0xaa; packed_len(n) + 3], vec![0.0; blocks]);
            let (mut want_packed, mut want_absmax) = (packed.clone(), absmax.clone());
            search::quantize_reference(&a, kind, block, &mut want_packed[..packed_len(n)], &mut want_absmax);
            for level in available_levels() {
                packed.fill(0xaa);
                search::quantize_at(level, &a, kind, block, &mut packed, &mut absmax).unwrap();
                assert_eq!(packed, want_packed, "{level:?} {kind:?} n {n} block {block}");
                assert_same(&absmax, &want_absmax);
            }
            // Scales from anywhere: zeros, infinities, and ones that have nothing to do with the block.
            let (codes, nested) = (noise.bytes(blocks), noise.with_specials::<f32>(block_count(blocks, 7), 9));
            let nested = Nested { codes: &codes, absmax: &nested, map: dynamic_map(true), offset: 0.01, block: 7 };
            let scales: Vec<f32> = (0..blocks).map(|i| Absmax::Nested(nested).get(i)).collect();
            want_packed.fill(0x5a);
            search::encode_reference(&a, &scales, kind, block, &mut want_packed[..packed_len(n)]);
            for level in available_levels() {
                packed.fill(0x5a);
                search::encode_at(level, &a, Absmax::Nested(nested), kind, block, &mut packed).unwrap();
                assert_eq!(packed, want_packed, "{level:?} {kind:?} n {n} block {block}");
            }
        }
    }
}

/// Squared error of each block, in fp64.
fn errors<T: Element>(a: &[T], packed: &[u8], absmax: Absmax, kind: Kind, block: usize) -> Vec<f64> {
    let mut again = vec![0f32; a.len()];
    four_bit::dequantize_into(packed, absmax, kind, block, &mut again).unwrap();
    let square = |(x, y): (&T, &f32)| (f64::from(x.to_f32()) - f64::from(*y)).powi(2);
    a.chunks(block).zip(again.chunks(block)).map(|(a, b)| a.iter().zip(b).map(square).sum()).collect()
}

#[test]
fn no_block_is_worse_than_plain_and_what_is_not_searched_is_plain() {
    let mut noise = Noise::new(12);
    let a: Vec<bf16> = hostile(&mut noise, 60_000);
    let outliers: Vec<bf16> = (0..60_000u32)
        .map(|i| bf16::from_f32(if i.is_multiple_of(50) { 9.0 } else { (noise.next() % 7) as f32 * 0.1 - 0.3 }))
        .collect();
    for a in [a, outliers] {
        for (kind, block) in formats(0) {
            let (mut packed, mut absmax) = (vec![0; packed_len(a.len())], vec![0.0; block_count(a.len(), block)]);
            let (mut searched, mut scales) = (packed.clone(), absmax.clone());
            four_bit::quantize_into(&a, kind, block, &mut packed, &mut absmax).unwrap();
            four_bit::quantize_search_into(&a, kind, block, &mut searched, &mut scales).unwrap();
            let before = errors(&a, &packed, Absmax::Plain(&absmax), kind, block);
            let after = errors(&a, &searched, Absmax::Plain(&scales), kind, block);
            for (i, (before, after)) in before.iter().zip(&after).enumerate() {
                if absmax[i].is_nan() || absmax[i].is_infinite() || absmax[i] == 0.0 || scales[i] == absmax[i] {
                    assert_same(&scales[i..=i], &absmax[i..=i]);
                    let bytes = i * block / 2..(i * block / 2 + block / 2).min(packed.len());
                    assert_eq!(searched[bytes.clone()], packed[bytes], "{kind:?} block {block}: {i}");
                } else {
                    assert!(after <= before, "{kind:?} block {block}: {i} went from {before} to {after}");
                }
            }
        }
    }
}

#[test]
fn every_format_loses_error_on_normal_weights() {
    let mut noise = Noise::new(13);
    let a: Vec<bf16> = noise.normal(1 << 18);
    for (kind, block) in formats(0) {
        for double_quant in [false, true] {
            let spec = Spec { kind, block, double_quant };
            let total =
                |q: four_bit::Quantized| errors(&a, &q.packed, q.absmax.view(), kind, block).iter().sum::<f64>();
            let plain = total(four_bit::quantize(&a, spec).unwrap());
            let searched = total(four_bit::quantize_search(&a, spec).unwrap());
            assert!(searched < 0.93 * plain, "{spec:?}: {plain} to {searched}");
        }
    }
}

#[test]
fn nf4_scales_take_both_signs_and_fp4_scales_one() {
    let a: Vec<f32> = Noise::new(14).normal(1 << 14);
    let negative = |kind| {
        let q = four_bit::quantize_search(&a, Spec { kind, ..Spec::default() }).unwrap();
        (0..q.absmax.view().len()).filter(|&i| q.absmax.view().get(i) < 0.0).count()
    };
    assert!((70..=186).contains(&negative(Kind::Nf4)), "{} of 256", negative(Kind::Nf4));
    assert_eq!(negative(Kind::Fp4), 0);
}

#[test]
fn wrong_sizes_are_errors() {
    let a = [1f32; 64];
    let (mut packed, mut absmax) = ([0; 32], [0.0; 1]);
    assert!(four_bit::quantize_search_into(&a, Kind::Nf4, 48, &mut packed, &mut absmax).is_err());
    assert!(four_bit::quantize_search_into(&a, Kind::Nf4, 64, &mut packed[..31], &mut absmax).is_err());
    assert!(four_bit::quantize_search_into(&a, Kind::Nf4, 64, &mut packed, &mut [0.0; 2]).is_err());
    assert!(search::encode_into(&a, Absmax::Plain(&[1.0; 2]), Kind::Nf4, 64, &mut packed).is_err());
    assert!(search::encode_into(&a, Absmax::Plain(&[1.0]), Kind::Nf4, 64, &mut packed[..31]).is_err());
}
