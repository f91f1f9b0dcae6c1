//! What LLM.int8() means here: scalar, one value at a time, slow. Every fast path is tested against this.

use crate::element::Element;

/// The largest code. −128 is never written, but products take it.
pub const MOST: f32 = 127.0;

/// A weight is `code · stat · UNIT`.
pub const UNIT: f32 = 1.0 / MOST;

/// A product of a row and a column is `sum · (row_stat · column_stat) · UNIT2`.
pub const UNIT2: f32 = 1.0 / (MOST * MOST);

/// Whether `v` is an outlier: an infinity is, NaN is not. With a threshold of zero or less there are none.
pub fn is_outlier(v: f32, threshold: f32) -> bool {
    threshold > 0.0 && v.abs() >= threshold
}

/// The largest magnitude of those that are no outliers; NaN if there is one, 0 if there are none.
pub fn stat_of(values: impl Iterator<Item = f32>, threshold: f32) -> f32 {
    values
        .filter(|&v| !is_outlier(v, threshold))
        .map(f32::abs)
        .fold(0.0, |most, v| if v > most || v.is_nan() { v } else { most })
}

/// What values are multiplied with: a reciprocal and a product, each rounded, as torch divides a number by a tensor.
pub fn factor(stat: f32) -> f32 {
    1.0 / stat * MOST
}

/// The code of `v` in a row (or column) whose statistic is `stat`: `v · (127 / stat)`, rounded to nearest even and limited to
/// ±127; 0 where that is not a number, as in all-zero rows and those with a NaN or an infinity.
///
/// Where the quotient overflows (statistics below 4e-37, which fp16 does not have) `v / stat · 127` takes its place.
pub fn code(v: f32, stat: f32) -> i8 {
    let factor = factor(stat);
    let scaled = if factor.is_infinite() { v / stat * MOST } else { v * factor };
    // A float-to-integer cast makes 0 of NaN.
    scaled.round_ties_even().clamp(-MOST, MOST) as i8
}

/// Whether column `k` is in a bitmap.
pub fn in_bitmap(bitmap: &[u32], k: usize) -> bool {
    bitmap[k / 32] >> (k % 32) & 1 == 1
}

/// Quantizes rows of `k` values. With a threshold above zero, outliers get code 0 and do not count for their row's statistic,
/// and bit `column` of the bitmap `outliers` is set where any row has one in that column, else cleared.
pub fn quantize_rows<T: Element>(
    x: &[T],
    k: usize,
    threshold: f32,
    codes: &mut [i8],
    stats: &mut [f32],
    mut outliers: Option<&mut [u32]>,
) {
    if let Some(outliers) = outliers.as_deref_mut() {
        outliers.fill(0);
    }
    for (row, stat) in stats.iter_mut().enumerate() {
        let values = x[row * k..][..k].iter().map(|v| v.to_f32());
        *stat = stat_of(values.clone(), threshold);
        for (column, v) in values.enumerate() {
            let out = is_outlier(v, threshold);
            codes[row * k + column] = if out { 0 } else { code(v, *stat) };
            if out && let Some(outliers) = outliers.as_deref_mut() {
                outliers[column / 32] |= 1 << (column % 32);
            }
        }
    }
}

/// Makes all codes of the columns in a bitmap 0.
pub fn zero_columns(codes: &mut [i8], k: usize, outliers: &[u32]) {
    for (i, code) in codes.iter_mut().enumerate() {
        if in_bitmap(outliers, i % k) {
            *code = 0;
        }
    }
}

/// The statistic of each of `k` columns.
pub fn column_stats<T: Element>(x: &[T], k: usize, threshold: f32, stats: &mut [f32]) {
    for (column, stat) in stats.iter_mut().enumerate() {
        *stat = stat_of(x.iter().skip(column).step_by(k).map(|v| v.to_f32()), threshold);
    }
}

/// Quantizes by columns: each value with its column's statistic, outliers to 0.
pub fn quantize_columns<T: Element>(x: &[T], k: usize, threshold: f32, stats: &[f32], codes: &mut [i8]) {
    for (i, (v, out)) in x.iter().zip(codes).enumerate() {
        let v = v.to_f32();
        *out = if is_outlier(v, threshold) { 0 } else { code(v, stats[i % k]) };
    }
}

/// `out[m][n] = Σ a[m][k] · b[n][k]`, modulo 2³²: exact up to K = 131,071.
pub fn matmul(a: &[i8], b: &[i8], (m, n, k): (usize, usize, usize), out: &mut [i32]) {
    for row in 0..m {
        for column in 0..n {
            let products = a[row * k..][..k].iter().zip(&b[column * k..][..k]);
            let sum = products.fold(0i32, |sum, (&a, &b)| sum.wrapping_add(i32::from(a) * i32::from(b)));
            out[row * n + column] = sum;
        }
    }
}

/// `sum · (row_stat · column_stat) / 127² + rest`, each operation rounded to fp32.
pub fn scaled(sum: i32, row_stat: f32, column_stat: f32, rest: f32) -> f32 {
    sum as f32 * (row_stat * column_stat) * UNIT2 + rest
}

/// Result `i` of a row of a product, from the sums, the floating-point part and the bias.
pub(super) fn finished<T: Element>(
    sums: &[i32],
    row_stat: f32,
    column_stats: &[f32],
    floats: Option<&[f32]>,
    bias: Option<&[T]>,
    i: usize,
) -> T {
    let rest = floats.map_or(0.0, |floats| floats[i]) + bias.map_or(0.0, |bias| bias[i].to_f32());
    T::from_f32(scaled(sums[i], row_stat, column_stats[i], rest))
}

/// Scales the sums of a product and adds `bias`, rounded once more to the type of `out`.
pub fn dequantize_product<T: Element>(
    sums: &[i32],
    row_stats: &[f32],
    column_stats: &[f32],
    bias: Option<&[T]>,
    out: &mut [T],
) {
    let n = column_stats.len();
    for (i, (out, &sum)) in out.iter_mut().zip(sums).enumerate() {
        let bias = bias.map_or(0.0, |bias| bias[i % n].to_f32());
        *out = T::from_f32(scaled(sum, row_stats[i / n], column_stats[i % n], bias));
    }
}

/// `code · stat · (1 / 127)` for rows of `k` codes, rounded to the type of `out`.
pub fn dequantize<T: Element>(codes: &[i8], k: usize, stats: &[f32], out: &mut [T]) {
    for (i, (out, &code)) in out.iter_mut().zip(codes).enumerate() {
        *out = T::from_f32(f32::from(code) * stats[i / k] * UNIT);
    }
}

/// The product of codes plus that of some columns in floating point, those in the bitmap `outliers`: there the codes' part of
/// `x` is replaced by `x` itself, by adding `Σ (x[m][c] − a[m][c] · (row_stat / 127)) · (b[n][c] · (column_stat / 127))`.
pub fn mixed<T: Element>(
    x: &[T],
    a: &[i8],
    b: &[i8],
    (m, n, k): (usize, usize, usize),
    row_stats: &[f32],
    column_stats: &[f32],
    outliers: &[u32],
    bias: Option<&[T]>,
    out: &mut [T],
) {
    let mut sums = vec![0; m * n];
    matmul(a, b, (m, n, k), &mut sums);
    for (i, out) in out.iter_mut().enumerate() {
        let (row, column) = (i / n, i % n);
        let unit = column_stats[column] * UNIT;
        let products = (0..k).filter(|&c| in_bitmap(outliers, c)).map(|c| {
            let rest = residual(x[row * k + c].to_f32(), a[row * k + c], row_stats[row]);
            rest * (f32::from(b[column * k + c]) * unit)
        });
        let rest = products.sum::<f32>() + bias.map_or(0.0, |bias| bias[column].to_f32());
        *out = T::from_f32(scaled(sums[i], row_stats[row], column_stats[column], rest));
    }
}

/// What the code of a value leaves of it.
pub fn residual(v: f32, code: i8, stat: f32) -> f32 {
    if code == 0 { v } else { v - f32::from(code) * (stat * UNIT) }
}

/// A whole layer: rows of `x` quantized, multiplied with the codes of `b`, outlier columns in floating point.
pub fn linear<T: Element>(
    x: &[T],
    b: &[i8],
    (m, n, k): (usize, usize, usize),
    column_stats: &[f32],
    threshold: f32,
    bias: Option<&[T]>,
    out: &mut [T],
) {
    let (mut codes, mut stats, mut outliers) = (vec![0; m * k], vec![0.0; m], vec![0; k.div_ceil(32)]);
    quantize_rows(x, k, threshold, &mut codes, &mut stats, Some(&mut outliers));
    zero_columns(&mut codes, k, &outliers);
    mixed(x, &codes, b, (m, n, k), &stats, column_stats, &outliers, bias, out);
}
