//! Rows and columns to int8 and back: the kernels of cuda/src/int8_rows.cu and cuda/src/int8.cu.

use super::product::Columns;
use crate::device::cuda::{Arguments, Kernel, Launch, Pointer, Stream, THREADS, device, dtype_index};
use crate::element::Dtype;
use crate::error::Result;
use half::f16;

const fn three(family: &'static str, names: [&'static str; 3]) -> [Kernel; 3] {
    [Kernel::new(family, names[0]), Kernel::new(family, names[1]), Kernel::new(family, names[2])]
}

/// By how many times 8 elements a thread has of a row: 1, 2, 4.
static ROWS: [[Kernel; 3]; 3] = [
    three("int8_rows", ["quantize_rows_bf16_1", "quantize_rows_f16_1", "quantize_rows_f32_1"]),
    three("int8_rows", ["quantize_rows_bf16_2", "quantize_rows_f16_2", "quantize_rows_f32_2"]),
    three("int8_rows", ["quantize_rows_bf16_4", "quantize_rows_f16_4", "quantize_rows_f32_4"]),
];
static ROWS_ANY: [Kernel; 3] =
    three("int8_rows", ["quantize_rows_any_bf16", "quantize_rows_any_f16", "quantize_rows_any_f32"]);
static CLEAR: Kernel = Kernel::new("int8_rows", "clear_words");
static COLUMN_STATS: [Kernel; 3] = three("int8", ["column_stats_bf16", "column_stats_f16", "column_stats_f32"]);
static COLUMNS: [Kernel; 3] = three("int8", ["quantize_columns_bf16", "quantize_columns_f16", "quantize_columns_f32"]);
static DEQUANTIZE: [Kernel; 3] = three("int8", ["dequantize_rows_bf16", "dequantize_rows_f16", "dequantize_rows_f32"]);
static MM_DEQUANT: [Kernel; 3] = three("int8", ["mm_dequant_bf16", "mm_dequant_f16", "mm_dequant_f32"]);
static ZERO_COLUMNS: Kernel = Kernel::new("int8", "zero_columns");
static LIST_COLUMNS: Kernel = Kernel::new("int8", "list_columns");
static MARK_COLUMNS: Kernel = Kernel::new("int8", "mark_columns");

/// Most threads of a block.
const MOST_THREADS: usize = 1024;

/// The threshold as kernels take it: in the precision of the elements where that is fp16, NaN for none.
pub(super) fn threshold_word(threshold: f32, dtype: Dtype) -> u32 {
    match (threshold > 0.0, dtype) {
        (false, _) => f32::NAN.to_bits(),
        (true, Dtype::F16) => f16::from_f32(threshold).to_f32().to_bits(),
        (true, _) => threshold.to_bits(),
    }
}

/// Launches that overlap, where the GPU has them.
fn overlapping(stream: &Stream, launch: Launch) -> Result<Launch> {
    Ok(Launch { programmatic: device(stream.device)?.capability >= 90, ..launch })
}

/// Zeros `words` words of 32 bits.
unsafe fn clear(stream: &Stream, at: Pointer, words: usize) -> Result<()> {
    let threads = (words.clamp(1, 1024) as u32).next_multiple_of(32);
    let launch = overlapping(stream, Launch::new((1, 1), threads))?;
    let mut arguments = Arguments::default().u64(at).u32(words as u32);
    // SAFETY: the arguments are those of `clear_words`; the caller vouches for the pointer.
    unsafe { CLEAR.launch(stream, launch, &mut arguments) }
}

/// Quantizes rows of `x` [m, k]: `q` [m, k] gets codes, `stats` [m] the largest magnitudes. With a threshold, elements
/// that reach it are left out, get code 0, and mark their column in `outliers`, which are none at first.
///
/// # Safety
/// The pointers must be device memory of the stream's device, of these sizes, until the stream has passed the launches.
pub unsafe fn quantize_rows(
    stream: &Stream,
    (x, dtype): (Pointer, Dtype),
    (m, k): (usize, usize),
    threshold: f32,
    q: Pointer,
    stats: Pointer,
    outliers: Option<Columns>,
) -> Result<()> {
    if let Some(outliers) = outliers {
        // SAFETY: the caller's promise.
        unsafe { clear(stream, outliers.bitmap, k.div_ceil(32) + usize::from(outliers.counted)) }?;
    }
    if m == 0 {
        return Ok(());
    }
    let type_index = dtype_index(dtype);
    let vectors = k.div_ceil(8);
    let wide =
        k > 0 && k.is_multiple_of(8) && x.is_multiple_of(16) && q.is_multiple_of(8) && vectors <= 4 * MOST_THREADS;
    let (kernel, threads) = if wide {
        let each = usize::from(vectors > 256) + usize::from(vectors > 512);
        (&ROWS[each][type_index], vectors.div_ceil(1 << each).next_multiple_of(32) as u32)
    } else {
        (&ROWS_ANY[type_index], THREADS)
    };
    let launch = overlapping(stream, Launch::new((m as u32, 1), threads))?;
    let (bitmap, count) = outliers.filter(|_| threshold > 0.0).map_or((0, 0), |o| (o.bitmap, o.count(k)));
    let arguments = Arguments::default().u64(x).u32(k as u32).u32(threshold_word(threshold, dtype));
    let mut arguments = arguments.u64(q).u64(stats).u64(bitmap).u64(count);
    // SAFETY: the arguments are those of the kernels in cuda/src/int8_rows.cu; the caller vouches for the pointers.
    unsafe { kernel.launch(stream, launch, &mut arguments) }
}

/// The largest magnitudes of columns of `x` [m, k], elements that reach the threshold left out.
///
/// # Safety
/// As [`quantize_rows`].
pub unsafe fn column_stats(
    stream: &Stream,
    (x, dtype): (Pointer, Dtype),
    (m, k): (usize, usize),
    threshold: f32,
    stats: Pointer,
) -> Result<()> {
    const ROWS_A_BLOCK: usize = 256;
    // SAFETY: the caller's promise.
    unsafe { clear(stream, stats, k) }?;
    if m == 0 || k == 0 {
        return Ok(());
    }
    let rows = ROWS_A_BLOCK.max(m.div_ceil(65535));
    let grid = (k.div_ceil(THREADS as usize) as u32, m.div_ceil(rows) as u32);
    let arguments = Arguments::default().u64(x).u32(m as u32).u32(k as u32).u32(rows as u32);
    let mut arguments = arguments.u32(threshold_word(threshold, dtype)).u64(stats);
    // SAFETY: the arguments are those of `column_stats_*`; the caller vouches for the pointers.
    unsafe { COLUMN_STATS[dtype_index(dtype)].launch(stream, Launch::new(grid, THREADS), &mut arguments) }
}

/// Quantizes `x` [m, k] by the statistics of its columns; elements that reach the threshold get code 0.
///
/// # Safety
/// As [`quantize_rows`].
pub unsafe fn quantize_columns(
    stream: &Stream,
    (x, dtype): (Pointer, Dtype),
    (m, k): (usize, usize),
    threshold: f32,
    stats: Pointer,
    q: Pointer,
) -> Result<()> {
    if m == 0 || k == 0 {
        return Ok(());
    }
    let grid = (k.div_ceil(THREADS as usize) as u32, m.div_ceil(4).min(65535) as u32);
    let arguments = Arguments::default().u64(x).u32(m as u32).u32(k as u32);
    let mut arguments = arguments.u32(threshold_word(threshold, dtype)).u64(stats).u64(q);
    // SAFETY: the arguments are those of `quantize_columns_*`; the caller vouches for the pointers.
    unsafe { COLUMNS[dtype_index(dtype)].launch(stream, Launch::new(grid, THREADS), &mut arguments) }
}

/// Rows of codes back to floats: `out[m, k] = q · stats[m] / 127`.
///
/// # Safety
/// As [`quantize_rows`].
pub unsafe fn dequantize_rows(
    stream: &Stream,
    (q, stats): (Pointer, Pointer),
    (m, k): (usize, usize),
    (out, dtype): (Pointer, Dtype),
) -> Result<()> {
    if m == 0 || k == 0 {
        return Ok(());
    }
    let eights = k.is_multiple_of(8) && q.is_multiple_of(8) && out.is_multiple_of(16);
    let items = (m * k) as u64 / if eights { 8 } else { 1 };
    let launch = Kernel::spread(items.div_ceil(u64::from(THREADS)));
    let arguments = Arguments::default().u64(q).u64(stats).u64(m as u64).u32(k as u32);
    let mut arguments = arguments.u32(u32::from(eights)).u64(out);
    // SAFETY: the arguments are those of `dequantize_rows_*`; the caller vouches for the pointers.
    unsafe { DEQUANTIZE[dtype_index(dtype)].launch(stream, launch, &mut arguments) }
}

/// Integer sums [m, n] to floats: times the statistics of row and column, over 127², plus bias [n].
///
/// # Safety
/// As [`quantize_rows`].
pub unsafe fn mm_dequant(
    stream: &Stream,
    sums: Pointer,
    (row_stats, column_stats): (Pointer, Pointer),
    (m, n): (usize, usize),
    bias: Option<Pointer>,
    (out, dtype): (Pointer, Dtype),
) -> Result<()> {
    if m == 0 || n == 0 {
        return Ok(());
    }
    let launch = Kernel::spread(((m * n) as u64).div_ceil(u64::from(THREADS)));
    let arguments = Arguments::default().u64(sums).u64(row_stats).u64(column_stats).u64(bias.unwrap_or(0));
    let mut arguments = arguments.u64(m as u64).u32(n as u32).u64(out);
    // SAFETY: the arguments are those of `mm_dequant_*`; the caller vouches for the pointers.
    unsafe { MM_DEQUANT[dtype_index(dtype)].launch(stream, launch, &mut arguments) }
}

/// Makes the codes of marked columns 0 in `q` [m, k].
///
/// # Safety
/// As [`quantize_rows`].
pub unsafe fn zero_columns(stream: &Stream, q: Pointer, (m, k): (usize, usize), outliers: Pointer) -> Result<()> {
    if m == 0 || k == 0 {
        return Ok(());
    }
    let launch = Kernel::spread(((m * k.div_ceil(32)) as u64).div_ceil(u64::from(THREADS)));
    let mut arguments = Arguments::default().u64(q).u64(m as u64).u32(k as u32).u64(outliers);
    // SAFETY: the arguments are those of `zero_columns`; the caller vouches for the pointers.
    unsafe { ZERO_COLUMNS.launch(stream, launch, &mut arguments) }
}

/// Lists the marked columns, rising: `columns` [k] 64-bit, of which the first `count` are written.
///
/// # Safety
/// As [`quantize_rows`].
pub unsafe fn outlier_columns(
    stream: &Stream,
    outliers: Pointer,
    k: usize,
    columns: Pointer,
    count: Pointer,
) -> Result<()> {
    let mut arguments = Arguments::default().u64(outliers).u32(k as u32).u64(columns).u64(count);
    // SAFETY: the arguments are those of `list_columns`; the caller vouches for the pointers.
    unsafe { LIST_COLUMNS.launch(stream, Launch::new((1, 1), 32), &mut arguments) }
}

/// The bitmap of `n` columns given as 64-bit numbers; those that are not in [0, k) are ignored.
///
/// # Safety
/// As [`quantize_rows`].
pub unsafe fn mark_columns(stream: &Stream, columns: Pointer, n: usize, k: usize, outliers: Pointer) -> Result<()> {
    let mut arguments = Arguments::default().u64(columns).u32(n as u32).u32(k as u32).u64(outliers);
    // SAFETY: the arguments are those of `mark_columns`; the caller vouches for the pointers.
    unsafe { MARK_COLUMNS.launch(stream, Launch::new((1, 1), 1024), &mut arguments) }
}

/// Loads the image that quantizes rows.
pub(super) fn preload(ordinal: i32, dtype: Dtype) -> Result<()> {
    ROWS[0][dtype_index(dtype)].load(ordinal)
}

pub(super) fn kernels() -> Vec<&'static Kernel> {
    ROWS.iter()
        .flatten()
        .chain(&ROWS_ANY)
        .chain([&CLEAR, &ZERO_COLUMNS, &LIST_COLUMNS, &MARK_COLUMNS])
        .chain(&COLUMN_STATS)
        .chain(&COLUMNS)
        .chain(&DEQUANTIZE)
        .chain(&MM_DEQUANT)
        .collect()
}
