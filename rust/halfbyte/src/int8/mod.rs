//! LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): rows of activations and of weights in 8-bit integers, their exact
//! integer product scaled to floating point, and columns of activations that have outliers multiplied in floating point.
//!
//! A row's statistic is its largest magnitude; a value is `code · statistic / 127`. What each function means to the last bit
//! is in [`mod@reference`].

#[cfg(feature = "cuda")]
pub mod cuda;

pub mod cpu;
#[cfg(target_arch = "x86_64")]
mod cpu_avx2;
#[cfg(target_arch = "x86_64")]
mod cpu_avx512;
mod cpu_dot;
mod cpu_packed;
mod cpu_product;
#[cfg(target_arch = "x86_64")]
mod cpu_rows;
#[cfg(target_arch = "x86_64")]
mod cpu_vector;
pub mod reference;

use crate::element::Element;
use crate::error::{Error, Result};

/// Quantizes rows of `k` values: `codes` gets one number a value, `stats` one a row.
///
/// `threshold` above zero needs `outliers`, a bitmap of the columns: bit `c % 32` of word `c / 32` is set where column `c` has
/// an outlier. Outliers themselves get code 0; [`zero_columns`] does that to their columns.
pub fn quantize_rows_into<T: Element>(
    x: &[T],
    k: usize,
    threshold: f32,
    codes: &mut [i8],
    stats: &mut [f32],
    outliers: Option<&mut [u32]>,
) -> Result<()> {
    cpu::quantize_rows(cpu::instructions(), x, k, threshold, codes, stats, outliers)
}

/// Makes all codes of the columns in a bitmap 0, in rows of `k`.
pub fn zero_columns(codes: &mut [i8], k: usize, outliers: &[u32]) -> Result<()> {
    check_len("outliers", outliers.len(), k.div_ceil(32))?;
    check_rows_of("codes", codes.len(), k)?;
    let columns = columns_of(outliers, k);
    if k > 0 && !columns.is_empty() {
        codes.chunks_exact_mut(k).for_each(|row| columns.iter().for_each(|&column| row[column] = 0));
    }
    Ok(())
}

/// The columns in a bitmap, rising.
pub fn columns_of(outliers: &[u32], k: usize) -> Vec<usize> {
    let words = outliers.iter().enumerate().filter(|&(_, &word)| word != 0);
    words
        .flat_map(|(i, &word)| (0..32).filter(move |bit| word >> bit & 1 == 1).map(move |bit| i * 32 + bit))
        .filter(|&c| c < k)
        .collect()
}

/// The bitmap of `columns`; those that are no column are passed over.
pub fn bitmap_into(columns: &[i64], k: usize, outliers: &mut [u32]) -> Result<()> {
    check_len("outliers", outliers.len(), k.div_ceil(32))?;
    outliers.fill(0);
    for column in columns.iter().filter_map(|&column| usize::try_from(column).ok()).filter(|&column| column < k) {
        outliers[column / 32] |= 1 << (column % 32);
    }
    Ok(())
}

/// The statistic of each of `k` columns, without outliers.
pub fn column_stats_into<T: Element>(x: &[T], k: usize, threshold: f32, stats: &mut [f32]) -> Result<()> {
    cpu::column_stats(cpu::instructions(), x, k, threshold, stats)
}

/// Quantizes by columns with given statistics; outliers get 0.
pub fn quantize_columns_into<T: Element>(
    x: &[T],
    k: usize,
    threshold: f32,
    stats: &[f32],
    codes: &mut [i8],
) -> Result<()> {
    cpu::quantize_columns(cpu::instructions(), x, k, threshold, stats, codes)
}

/// `a [M, K] · bᵀ [N, K]` in 32-bit integers, exact up to K = 131,071 (and modulo 2³² beyond).
pub fn matmul_into(a: &[i8], b: &[i8], mnk: (usize, usize, usize), out: &mut [i32]) -> Result<()> {
    cpu::matmul(cpu::instructions(), a, b, mnk, out)
}

/// The same, scaled to floating point: `sum · row_stat · column_stat / 127² + bias`.
pub fn scaled_into<T: Element>(
    a: &[i8],
    b: &[i8],
    mnk: (usize, usize, usize),
    row_stats: &[f32],
    column_stats: &[f32],
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    cpu::scaled(cpu::instructions(), a, b, mnk, row_stats, column_stats, bias, out)
}

/// The same, with the columns in the bitmap `outliers` in floating point: `x` itself takes the place of its codes there, whether
/// those are 0 or not.
pub fn mixed_into<X: Element, T: Element>(
    x: &[X],
    a: &[i8],
    b: &[i8],
    mnk: (usize, usize, usize),
    row_stats: &[f32],
    column_stats: &[f32],
    outliers: &[u32],
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    cpu::mixed(cpu::instructions(), x, a, b, mnk, row_stats, column_stats, outliers, bias, out)
}

/// A whole layer: `x [M, K]` quantized by rows, multiplied with the codes `b [N, K]` of a weight whose rows have the statistics
/// `column_stats`, columns with outliers in floating point, and `bias` added.
pub fn linear_into<T: Element>(
    x: &[T],
    b: &[i8],
    mnk: (usize, usize, usize),
    column_stats: &[f32],
    threshold: f32,
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    cpu::linear(cpu::instructions(), x, b, mnk, column_stats, threshold, bias, out)
}

/// Scales the sums of a product to floating point: `sum · row_stat · column_stat / 127² + bias`.
pub fn dequantize_product_into<T: Element>(
    sums: &[i32],
    row_stats: &[f32],
    column_stats: &[f32],
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    cpu::dequantize_product(cpu::instructions(), sums, row_stats, column_stats, bias, out)
}

/// Dequantizes rows of `k` codes: `code · stat / 127`.
pub fn dequantize_into<T: Element>(codes: &[i8], k: usize, stats: &[f32], out: &mut [T]) -> Result<()> {
    cpu::dequantize(cpu::instructions(), codes, k, stats, out)
}

fn check_len(argument: &'static str, got: usize, want: usize) -> Result<()> {
    if got == want { Ok(()) } else { Err(Error::shape(argument, format!("[{want}]"), format!("[{got}]"))) }
}

/// An error unless `len` is rows of `k`.
fn check_rows_of(argument: &'static str, len: usize, k: usize) -> Result<()> {
    let whole = if k == 0 { len == 0 } else { len.is_multiple_of(k) };
    if whole { Ok(()) } else { Err(Error::shape(argument, format!("rows of {k}"), format!("[{len}]"))) }
}

/// The product of two sizes, for an error where it overflows.
fn area(argument: &'static str, rows: usize, columns: usize) -> Result<usize> {
    rows.checked_mul(columns)
        .ok_or_else(|| Error::shape(argument, "a size that fits in memory", format!("[{rows}, {columns}]")))
}

fn check_threshold(threshold: f32) -> Result<()> {
    if threshold.is_nan() { Err(Error::value("threshold", "a number", threshold)) } else { Ok(()) }
}

/// What quantizing rows checks.
fn check_rows(x: usize, k: usize, threshold: f32, codes: usize, stats: usize, outliers: Option<usize>) -> Result<()> {
    check_threshold(threshold)?;
    check_len("x", x, area("x", stats, k)?)?;
    check_len("codes", codes, x)?;
    match outliers {
        Some(outliers) => check_len("outliers", outliers, k.div_ceil(32)),
        None if threshold > 0.0 => Err(Error::value("outliers", "a bitmap where there is a threshold", "none")),
        None => Ok(()),
    }
}

/// What every product checks.
fn check_product((m, n, k): (usize, usize, usize), a: usize, b: usize, bias: Option<usize>, out: usize) -> Result<()> {
    check_len("a", a, area("a", m, k)?)?;
    check_len("b", b, area("b", n, k)?)?;
    check_len("out", out, area("out", m, n)?)?;
    bias.map_or(Ok(()), |bias| check_len("bias", bias, n))
}

fn check_stats((m, n): (usize, usize), row_stats: usize, column_stats: usize) -> Result<()> {
    check_len("row_stats", row_stats, m)?;
    check_len("column_stats", column_stats, n)
}
