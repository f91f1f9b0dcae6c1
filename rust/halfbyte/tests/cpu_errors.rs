//! Every way to call the CPU operations wrongly: an error that names the argument, and buffers as they were.

use halfbyte::codebook::dynamic_map;
use halfbyte::device::cpu::{Level, available_levels};
use halfbyte::eight_bit::{self, Rounding};
use halfbyte::four_bit::{self, Spec};
use halfbyte::layout::{Absmax, Nested};
use halfbyte::{Error, Kind, Result};

/// What the error says is wrong: the kind of error and the argument.
fn blamed(result: Result<()>) -> (&'static str, &'static str) {
    match result {
        Err(Error::Value { argument, .. }) => ("value", argument),
        Err(Error::Shape { argument, .. }) => ("shape", argument),
        other => panic!("expected an error about an argument, got {other:?}"),
    }
}

#[test]
fn quantize_four_bit() {
    let a = [1f32; 100];
    // (block, bytes, scales) for 100 weights, of which 64, 50, 2 would be right.
    let wrong = [
        ((0, 50, 2), ("value", "blocksize")),
        ((16, 50, 7), ("value", "blocksize")),
        ((65, 50, 2), ("value", "blocksize")),
        ((8192, 50, 1), ("value", "blocksize")),
        ((64, 49, 2), ("shape", "packed")),
        ((64, 0, 2), ("shape", "packed")),
        ((64, 50, 1), ("shape", "absmax")),
        ((64, 50, 3), ("shape", "absmax")),
    ];
    for ((block, bytes, scales), blame) in wrong {
        let (mut packed, mut absmax) = (vec![0xaa; bytes], vec![7.0; scales]);
        let result = four_bit::quantize_into(&a, Kind::Nf4, block, &mut packed, &mut absmax);
        assert_eq!(blamed(result), blame, "{block} {bytes} {scales}");
        assert!(packed.iter().all(|&b| b == 0xaa) && absmax.iter().all(|&s| s == 7.0), "written in spite of the error");
    }
    assert_eq!(blamed(four_bit::quantize(&a, Spec { block: 48, ..Spec::default() }).map(drop)), ("value", "blocksize"));
}

#[test]
fn dequantize_four_bit() {
    let (packed, plain, map) = ([0u8; 50], [1f32; 3], dynamic_map(true));
    let nested = |codes, absmax, block| Absmax::Nested(Nested { codes, absmax, map, offset: 0.0, block });
    let (codes, scales) = ([0u8; 3], [1f32; 3]);
    let wrong = [
        (48, 50, Absmax::Plain(&plain[..2]), ("value", "blocksize")),
        (64, 49, Absmax::Plain(&plain[..2]), ("shape", "packed")),
        (64, 50, Absmax::Plain(&plain[..1]), ("shape", "absmax")),
        (64, 50, Absmax::Plain(&plain[..3]), ("shape", "absmax")),
        (64, 50, nested(&codes[..1], &scales[..1], 256), ("shape", "absmax")),
        (64, 50, nested(&codes[..2], &scales[..2], 256), ("shape", "nested_absmax")),
        (64, 50, nested(&codes[..2], &[], 256), ("shape", "nested_absmax")),
        (64, 50, nested(&codes[..2], &scales[..1], 1), ("shape", "nested_absmax")),
        (64, 50, nested(&codes[..2], &scales[..1], 0), ("value", "nested_blocksize")),
    ];
    for (block, bytes, absmax, blame) in wrong {
        let mut out = [7f32; 100];
        let result = four_bit::dequantize_into(&packed[..bytes], absmax, Kind::Fp4, block, &mut out);
        assert_eq!(blamed(result), blame, "{absmax:?}");
        assert_eq!(out, [7f32; 100], "written in spite of the error");
    }
}

#[test]
fn matmul_four_bit() {
    let (x, packed, absmax, bias) = ([1f32; 31], [0u8; 50], [1f32; 3], [1f32; 11]);
    // 3 × 10 by 10 × 10: x of 30, 50 bytes, 2 scales, a bias of 10, 30 results.
    let right = (3, 10, 10);
    let huge = usize::MAX / 2;
    let wrong = [
        (right, 31, 50, 2, 10, 30, ("shape", "x")),
        (right, 29, 50, 2, 10, 30, ("shape", "x")),
        (right, 30, 49, 2, 10, 30, ("shape", "packed")),
        (right, 30, 50, 1, 10, 30, ("shape", "absmax")),
        (right, 30, 50, 3, 10, 30, ("shape", "absmax")),
        (right, 30, 50, 2, 9, 30, ("shape", "bias")),
        (right, 30, 50, 2, 11, 30, ("shape", "bias")),
        (right, 30, 50, 2, 10, 29, ("shape", "out")),
        (right, 30, 50, 2, 10, 0, ("shape", "out")),
        ((huge, 10, 10), 30, 50, 2, 10, 30, ("shape", "x")),
        ((3, huge, 10), 30, 50, 2, 10, 30, ("shape", "out")),
        ((0, huge, 10), 0, 50, 2, 10, 0, ("shape", "packed")),
        ((3, 0, huge), 30, 0, 0, 0, 0, ("shape", "x")),
    ];
    for (shape, x_len, bytes, scales, bias_len, out_len, blame) in wrong {
        let mut out = vec![7f32; out_len];
        let absmax = Absmax::Plain(&absmax[..scales]);
        let bias = Some(&bias[..bias_len]);
        let result = four_bit::matmul_into(&x[..x_len], shape, &packed[..bytes], absmax, Kind::Nf4, 64, bias, &mut out);
        assert_eq!(blamed(result), blame, "{shape:?} {x_len} {bytes} {scales} {bias_len} {out_len}");
        assert!(out.iter().all(|&v| v == 7.0), "written in spite of the error");
    }
    let mut out = [7f32; 30];
    let absmax = Absmax::Plain(&absmax[..2]);
    let result = four_bit::matmul_into(&x[..30], right, &packed, absmax, Kind::Nf4, 100, None, &mut out);
    assert_eq!(blamed(result), ("value", "blocksize"));
    assert_eq!(out, [7f32; 30]);
}

#[test]
fn matmul_experts() {
    let (x, packed, absmax) = ([0f32; 4 * 8], [0; 2 * 3 * 8 / 2], [1.0; 1]);
    let run = |x: &[f32], offsets: &[i32], packed: &[u8], bias: Option<&[f32]>, out: &mut [f32]| {
        let shape = (4, 2, 3, 8);
        four_bit::matmul_experts_into(x, offsets, shape, packed, Absmax::Plain(&absmax), Kind::Nf4, 64, bias, out)
    };
    let mut out = [0f32; 12];
    run(&x, &[0, 1, 4], &packed, Some(&[0.0; 6]), &mut out).unwrap();
    for (result, argument) in [
        (run(&x[1..], &[0, 1, 4], &packed, None, &mut out), "x"),
        (run(&x, &[0, 1], &packed, None, &mut out), "offsets"),
        (run(&x, &[0, 2, 1], &packed, None, &mut out), "offsets"),
        (run(&x, &[-1, 2, 4], &packed, None, &mut out), "offsets"),
        (run(&x, &[0, 2, 5], &packed, None, &mut out), "offsets"),
        (run(&x, &[0, 1, 4], &packed[1..], None, &mut out), "packed"),
        (run(&x, &[0, 1, 4], &packed, Some(&[0.0; 5]), &mut out), "bias"),
        (run(&x, &[0, 1, 4], &packed, None, &mut out[1..]), "out"),
    ] {
        assert_eq!(blamed(result).1, argument);
    }
}

#[test]
fn eight_bit_both_ways() {
    let a = [1f32; 100];
    let mut falling = *dynamic_map(true);
    falling.swap(100, 101);
    let mut with_nan = *dynamic_map(true);
    with_nan[255] = f32::NAN;
    let map = dynamic_map(true);
    // (map, block, codes, scales) for 100 values.
    let wrong = [
        (map, 0, 100, 1, ("value", "blocksize")),
        (map, 64, 99, 2, ("shape", "codes")),
        (map, 64, 101, 2, ("shape", "codes")),
        (map, 64, 100, 1, ("shape", "absmax")),
        (map, 100, 100, 2, ("shape", "absmax")),
        (&falling, 64, 100, 2, ("value", "code")),
        (&with_nan, 64, 100, 2, ("value", "code")),
    ];
    for (map, block, count, scales, blame) in wrong {
        let (mut codes, mut absmax) = (vec![9; count], vec![7f32; scales]);
        let result = eight_bit::quantize_into(&a, map, block, 0.0, Rounding::Nearest, &mut codes, &mut absmax);
        assert_eq!(blamed(result), blame, "{block} {count} {scales}");
        assert!(codes.iter().all(|&c| c == 9) && absmax.iter().all(|&s| s == 7.0), "written in spite of the error");
        if blame.1 != "code" {
            let mut out = [7f32; 100];
            let result = eight_bit::dequantize_into(&codes, map, &absmax, block, 0.0, &mut out);
            assert_eq!(blamed(result), blame, "{block} {count} {scales}");
            assert_eq!(out, [7f32; 100], "written in spite of the error");
        }
    }
}

#[test]
fn levels_that_the_cpu_lacks() {
    for level in Level::ALL {
        let (mut packed, mut absmax) = ([0xaau8; 1], [7f32; 1]);
        let result = four_bit::cpu::quantize(level, &[1f32], Kind::Nf4, 64, &mut packed, &mut absmax);
        if available_levels().contains(&level) {
            result.unwrap();
            assert_eq!((packed, absmax), ([0xf7], [1.0]));
        } else {
            assert_eq!(blamed(result), ("value", "level"));
            assert_eq!((packed, absmax), ([0xaa], [7.0]));
        }
    }
}

#[test]
fn empty_tensors_are_right() {
    let none: [f32; 0] = [];
    let q = four_bit::quantize(&none, Spec { double_quant: true, ..Spec::default() }).unwrap();
    assert!(q.packed.is_empty() && q.absmax.view().is_empty());
    four_bit::dequantize_into(&[], Absmax::Plain(&[]), Kind::Nf4, 64, &mut [0f32; 0]).unwrap();
    // No columns to sum over: what is left is the bias, or nothing.
    let mut out = [7f32; 6];
    let absmax = Absmax::Plain(&[]);
    four_bit::matmul_into(&none, (2, 3, 0), &[], absmax, Kind::Nf4, 64, Some(&[1.0, 2.0, 3.0]), &mut out).unwrap();
    assert_eq!(out, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
    four_bit::matmul_into(&none, (2, 3, 0), &[], absmax, Kind::Nf4, 64, None, &mut out).unwrap();
    assert_eq!(out, [0.0; 6]);
    four_bit::matmul_into(&none, (0, 4, 8), &[0; 16], Absmax::Plain(&[1.0]), Kind::Nf4, 64, None, &mut []).unwrap();
    four_bit::matmul_into(&[1.0; 16], (2, 0, 8), &[], absmax, Kind::Nf4, 64, None, &mut [0f32; 0]).unwrap();
}
