//! Times the CPU paths on 4096 × 4096 weights, milliseconds, best of several: `cargo run --release --example cpu_bench`.
//!
//! `HALFBYTE_SIMD=avx2` (or `scalar`) lowers the level; the number of threads can be given as the first argument.

#![expect(clippy::print_stdout, reason = "it is a table for the terminal")]

use std::time::{Duration, Instant};

use halfbyte::codebook::dynamic_map;
use halfbyte::device::cpu;
use halfbyte::eight_bit::{self, Rounding};
use halfbyte::four_bit::{self, Spec};
use halfbyte::{Kind, Result, bf16};

const SIDE: usize = 4096;
const N: usize = SIDE * SIDE;

fn main() -> Result<()> {
    if let Some(threads) = std::env::args().nth(1).and_then(|arg| arg.parse().ok()) {
        cpu::set_threads(threads);
    }
    println!("{} threads, {}, best of several, ms", cpu::threads(), cpu::level().name());
    four_bit_rows()?;
    eight_bit_rows()
}

fn four_bit_rows() -> Result<()> {
    let weights: Vec<bf16> = noise(1).take(N).map(bf16::from_f32).collect();
    let mut again = vec![bf16::ZERO; N];
    for kind in Kind::ALL {
        for double_quant in [false, true] {
            let spec = Spec { kind, block: 64, double_quant };
            let label = format!("{}{}", kind.name(), if double_quant { " nested" } else { "" });
            row(&format!("quantize {label}, bf16"), || four_bit::quantize(&weights, spec).map(drop))?;
            let q = four_bit::quantize(&weights, spec)?;
            row(&format!("dequantize {label}, bf16"), || {
                four_bit::dequantize_into(&q.packed, q.absmax.view(), kind, 64, &mut again)
            })?;
        }
    }
    let mut packed = vec![0; N / 2];
    let mut absmax = vec![0.0; N / 64];
    row("quantize nf4, bf16, into warm buffers", || {
        four_bit::quantize_into(&weights, Kind::Nf4, 64, &mut packed, &mut absmax)
    })?;
    let q = four_bit::quantize(&weights, Spec::default())?;
    for m in [1, 2, 4, 8, 9, 16, 32, 128, 512] {
        let x: Vec<bf16> = noise(2).take(m * SIDE).map(bf16::from_f32).collect();
        let mut out = vec![bf16::ZERO; m * SIDE];
        row(&format!("matmul nf4, M = {m}, bf16"), || {
            let shape = (m, SIDE, SIDE);
            four_bit::matmul_into(&x, shape, &q.packed, q.absmax.view(), Kind::Nf4, 64, None, &mut out)
        })?;
    }
    Ok(())
}

fn eight_bit_rows() -> Result<()> {
    let values: Vec<f32> = noise(3).take(N).collect();
    let (mut codes, mut absmax, mut again) = (vec![0; N], vec![0.0; N / 256], vec![0f32; N]);
    let map = dynamic_map(true);
    for rounding in [Rounding::Nearest, Rounding::Grid] {
        row(&format!("quantize 8-bit {rounding:?}, fp32"), || {
            eight_bit::quantize_into(&values, map, 256, 0.0, rounding, &mut codes, &mut absmax)
        })?;
    }
    row("dequantize 8-bit, fp32", || eight_bit::dequantize_into(&codes, map, &absmax, 256, 0.0, &mut again))
}

/// Runs `body` for about a second and prints the shortest time.
fn row(label: &str, mut body: impl FnMut() -> Result<()>) -> Result<()> {
    let (begin, mut best, mut runs) = (Instant::now(), Duration::MAX, 0);
    while runs < 3 || begin.elapsed() < Duration::from_millis(700) {
        let start = Instant::now();
        body()?;
        best = best.min(start.elapsed());
        runs += 1;
    }
    println!("{label:40} {:9.2}", best.as_secs_f64() * 1e3);
    Ok(())
}

/// About normally distributed numbers: sums of four uniform ones.
fn noise(seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed;
    let mut uniform = move || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    std::iter::repeat_with(move || (0..4).map(|_| uniform()).sum::<f32>() * 1.7)
}
