//! LLM.int8() on the CPU with chosen instructions. [`super::linear_into`] and the others choose the best ones.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256i, __m512i};
use std::cell::Cell;
use std::sync::{LazyLock, Mutex, PoisonError};

use super::cpu_dot::{Dot, Plain};
use super::cpu_product::{Finish, Floats, multiply};
#[cfg(target_arch = "x86_64")]
use super::cpu_rows;
#[cfg(target_arch = "x86_64")]
use super::cpu_vector::{Bytes, Words};
use super::{area, check_len, check_product, check_rows, check_rows_of, check_stats, check_threshold};
use super::{columns_of, reference, zero_columns};
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::avx2;
use crate::device::cpu::{Level, for_each_task, level, share};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result};

/// Values below which a second thread does not pay.
const GRAIN: usize = 1 << 16;

/// The instructions that integer products use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Instructions {
    /// What every CPU has.
    Plain,
    /// AVX2, bytes widened to 16 bits.
    Avx2,
    /// AVX2 and AVX-VNNI, which multiplies bytes.
    AvxVnni,
    /// AVX-512, bytes widened to 16 bits.
    Avx512,
    /// AVX-512 and its VNNI, which multiplies bytes.
    Avx512Vnni,
}

impl Instructions {
    /// All of them, the slowest first.
    pub const ALL: [Self; 5] = [Self::Plain, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Avx512Vnni];

    /// The level of vector instructions that they belong to, which everything but products uses.
    pub const fn level(self) -> Level {
        match self {
            Self::Plain => Level::Scalar,
            Self::Avx2 | Self::AvxVnni => Level::Avx2,
            Self::Avx512 | Self::Avx512Vnni => Level::Avx512,
        }
    }

    /// An error unless this CPU has them. Whoever calls code compiled for them asks this first.
    pub fn check(self) -> Result<()> {
        self.level().check()?;
        #[cfg(target_arch = "x86_64")]
        let has = match self {
            Self::AvxVnni => is_x86_feature_detected!("avxvnni"),
            Self::Avx512Vnni => is_x86_feature_detected!("avx512vnni"),
            _ => true,
        };
        #[cfg(not(target_arch = "x86_64"))]
        let has = self == Self::Plain;
        if has { Ok(()) } else { Err(Error::value("instructions", "some that this CPU has", format!("{self:?}"))) }
    }

    /// Those that this CPU has, the slowest first.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|instructions| instructions.check().is_ok()).collect()
    }
}

/// The best that this CPU has, of the level that [`level`] allows.
pub fn instructions() -> Instructions {
    static BEST: LazyLock<Instructions> = LazyLock::new(|| {
        let best = Instructions::available().into_iter().rfind(|instructions| instructions.level() <= level());
        best.unwrap_or(Instructions::Plain)
    });
    *BEST
}

/// The threshold that values of type `T` are compared with: rounded to fp16 where they are that, as torch does.
fn limit<T: Element>(threshold: f32) -> f32 {
    let rounded = if T::DTYPE == Dtype::F16 { T::from_f32(threshold).to_f32() } else { threshold };
    if rounded > 0.0 { rounded } else { threshold }
}

/// [`super::quantize_rows_into`] with these instructions.
pub fn quantize_rows<T: Element>(
    instructions: Instructions,
    x: &[T],
    k: usize,
    threshold: f32,
    codes: &mut [i8],
    stats: &mut [f32],
    outliers: Option<&mut [u32]>,
) -> Result<()> {
    instructions.check()?;
    check_rows(x.len(), k, threshold, codes.len(), stats.len(), outliers.as_ref().map(|outliers| outliers.len()))?;
    let level = instructions.level();
    let threshold = limit::<T>(threshold);
    let mut outliers = outliers;
    if let Some(outliers) = outliers.as_deref_mut() {
        outliers.fill(0);
    }
    if k == 0 {
        stats.fill(0.0);
        return Ok(());
    }
    let found = outliers.filter(|_| threshold > 0.0).map(Mutex::new);
    let rows = share(stats.len(), GRAIN / k);
    let tasks = x.chunks(rows * k).zip(codes.chunks_mut(rows * k)).zip(stats.chunks_mut(rows));
    for_each_task(tasks.collect(), |((x, codes), stats)| {
        let mut mine = found.as_ref().map(|_| vec![0u32; k.div_ceil(32)]);
        let mut places = Vec::new();
        for ((x, codes), stat) in x.chunks_exact(k).zip(codes.chunks_exact_mut(k)).zip(stats) {
            quantize_row(level, x, threshold, codes, stat, mine.as_deref_mut(), &mut places);
        }
        if let (Some(found), Some(mine)) = (&found, mine) {
            // Words are only ever or-ed to, so a panic elsewhere leaves nothing half done.
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            found.iter_mut().zip(mine).for_each(|(found, mine)| *found |= mine);
        }
    });
    Ok(())
}

/// A row: its codes, its statistic, and its outliers' columns in the bitmap. The level has been checked. `places` is for the
/// use of vectorized code.
fn quantize_row<T: Element>(
    level: Level,
    x: &[T],
    threshold: f32,
    codes: &mut [i8],
    stat: &mut f32,
    outliers: Option<&mut [u32]>,
    places: &mut Vec<(usize, u32)>,
) {
    match level {
        // SAFETY: the level has been checked, and both have AVX2.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 => unsafe {
            *stat = cpu_rows::quantize_row(x, threshold, codes, outliers, places);
        },
        _ => {
            let mut bitmap = outliers.is_some().then(|| vec![0; x.len().div_ceil(32)]);
            let one = std::slice::from_mut(stat);
            reference::quantize_rows(x, x.len(), threshold, codes, one, bitmap.as_deref_mut());
            if let (Some(all), Some(its)) = (outliers, bitmap) {
                all.iter_mut().zip(its).for_each(|(all, its)| *all |= its);
            }
        }
    }
}

/// A row in fp32.
fn widen<T: Element>(level: Level, x: &[T], wide: &mut [f32]) {
    match level {
        // SAFETY: the level has been checked, and both have AVX2.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 => unsafe { avx2::widen(x, wide) },
        _ => wide.iter_mut().zip(x).for_each(|(wide, x)| *wide = x.to_f32()),
    }
}

/// [`super::column_stats_into`] with these instructions.
pub fn column_stats<T: Element>(
    instructions: Instructions,
    x: &[T],
    k: usize,
    threshold: f32,
    stats: &mut [f32],
) -> Result<()> {
    instructions.check()?;
    check_threshold(threshold)?;
    check_rows_of("x", x.len(), k)?;
    check_len("stats", stats.len(), k)?;
    stats.fill(0.0);
    let threshold = limit::<T>(threshold);
    let mut wide = vec![0.0; k];
    for row in x.chunks_exact(k.max(1)) {
        widen(instructions.level(), row, &mut wide);
        for (stat, &v) in stats.iter_mut().zip(&wide) {
            let v = if reference::is_outlier(v, threshold) { 0.0 } else { v.abs() };
            // Once NaN, it stays: nothing is more than NaN.
            *stat = if v > *stat || v.is_nan() { v } else { *stat };
        }
    }
    Ok(())
}

/// [`super::quantize_columns_into`] with these instructions.
pub fn quantize_columns<T: Element>(
    instructions: Instructions,
    x: &[T],
    k: usize,
    threshold: f32,
    stats: &[f32],
    codes: &mut [i8],
) -> Result<()> {
    instructions.check()?;
    check_threshold(threshold)?;
    check_rows_of("x", x.len(), k)?;
    check_len("stats", stats.len(), k)?;
    check_len("codes", codes.len(), x.len())?;
    if x.is_empty() {
        return Ok(());
    }
    let threshold = limit::<T>(threshold);
    let rows = share(x.len() / k, GRAIN / k);
    for_each_task(x.chunks(rows * k).zip(codes.chunks_mut(rows * k)).collect(), |(x, codes)| {
        let mut wide = vec![0.0; k];
        for (x, codes) in x.chunks_exact(k).zip(codes.chunks_exact_mut(k)) {
            widen(instructions.level(), x, &mut wide);
            reference::quantize_columns(&wide, k, threshold, stats, codes);
        }
    });
    Ok(())
}

/// Sums as they are.
struct Sums;

impl Finish for Sums {
    type Out = i32;

    fn finish(&self, _row: usize, _first: usize, sums: &[i32], _floats: Option<&[f32]>, out: &mut [i32]) {
        out.copy_from_slice(sums);
    }
}

/// Sums scaled to floating point.
struct Scaled<'a, T> {
    level: Level,
    row_stats: &'a [f32],
    column_stats: &'a [f32],
    bias: Option<&'a [T]>,
}

impl<T: Element> Finish for Scaled<'_, T> {
    type Out = T;

    fn finish(&self, row: usize, first: usize, sums: &[i32], floats: Option<&[f32]>, out: &mut [T]) {
        let row_stat = self.row_stats[row];
        let column_stats = &self.column_stats[first..first + out.len()];
        let bias = self.bias.map(|bias| &bias[first..first + out.len()]);
        match self.level {
            // SAFETY: the level has been checked, and both have AVX2.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 => unsafe {
                cpu_rows::scale_row(sums, row_stat, column_stats, floats, bias, out);
            },
            _ => {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = reference::finished(sums, row_stat, column_stats, floats, bias, i);
                }
            }
        }
    }
}

/// The product with these instructions, which have been checked, as have the sizes.
fn product<F: Finish>(
    instructions: Instructions,
    a: &[i8],
    b: &[i8],
    mnk: (usize, usize, usize),
    floats: Option<(&Floats, &[f32])>,
    finish: &F,
    out: &mut [F::Out],
) {
    fn with<D: Dot, F: Finish>(
        a: &[i8],
        b: &[i8],
        mnk: (usize, usize, usize),
        floats: Option<(&Floats, &[f32])>,
        finish: &F,
        out: &mut [F::Out],
    ) {
        // SAFETY: the caller has checked both the instructions and the sizes.
        unsafe { multiply::<D, F>(a, b, mnk, floats, finish, out) }
    }
    let run = match instructions {
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512Vnni => with::<Bytes<__m512i>, F>,
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 => with::<Words<__m512i>, F>,
        #[cfg(target_arch = "x86_64")]
        Instructions::AvxVnni => with::<Bytes<__m256i>, F>,
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => with::<Words<__m256i>, F>,
        _ => with::<Plain, F>,
    };
    run(a, b, mnk, floats, finish, out);
}

/// [`super::matmul_into`] with these instructions.
pub fn matmul(
    instructions: Instructions,
    a: &[i8],
    b: &[i8],
    mnk: (usize, usize, usize),
    out: &mut [i32],
) -> Result<()> {
    instructions.check()?;
    check_product(mnk, a.len(), b.len(), None, out.len())?;
    product(instructions, a, b, mnk, None, &Sums, out);
    Ok(())
}

/// [`super::scaled_into`] with these instructions.
pub fn scaled<T: Element>(
    instructions: Instructions,
    a: &[i8],
    b: &[i8],
    mnk: (usize, usize, usize),
    row_stats: &[f32],
    column_stats: &[f32],
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    instructions.check()?;
    check_product(mnk, a.len(), b.len(), bias.map(<[T]>::len), out.len())?;
    check_stats((mnk.0, mnk.1), row_stats.len(), column_stats.len())?;
    let finish = Scaled { level: instructions.level(), row_stats, column_stats, bias };
    product(instructions, a, b, mnk, None, &finish, out);
    Ok(())
}

/// What the codes leave of `columns` of `x`.
fn gather<X: Element>(level: Level, x: &[X], a: &[i8], k: usize, stats: &[f32], columns: Vec<usize>) -> Floats {
    let count = columns.len();
    let mut values = vec![0.0; stats.len() * count];
    if count > 0 {
        let rows = share(stats.len(), GRAIN / k);
        let tasks =
            x.chunks(rows * k).zip(a.chunks(rows * k)).zip(stats.chunks(rows)).zip(values.chunks_mut(rows * count));
        for_each_task(tasks.collect(), |(((x, a), stats), values)| {
            // One conversion is a call; of many columns, whole rows are converted by vectors.
            let mut wide = if count > k / 16 { vec![0.0; k] } else { Vec::new() };
            for (((x, a), &stat), values) in
                x.chunks_exact(k).zip(a.chunks_exact(k)).zip(stats).zip(values.chunks_exact_mut(count))
            {
                if !wide.is_empty() {
                    widen(level, x, &mut wide);
                }
                for (value, &column) in values.iter_mut().zip(&columns) {
                    let v = wide.get(column).copied().unwrap_or_else(|| x[column].to_f32());
                    *value = reference::residual(v, a[column], stat);
                }
            }
        });
    }
    Floats { columns, values }
}

/// [`super::mixed_into`] with these instructions.
pub fn mixed<X: Element, T: Element>(
    instructions: Instructions,
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
    let (m, n, k) = mnk;
    instructions.check()?;
    check_product(mnk, a.len(), b.len(), bias.map(<[T]>::len), out.len())?;
    check_stats((m, n), row_stats.len(), column_stats.len())?;
    check_len("x", x.len(), area("x", m, k)?)?;
    check_len("outliers", outliers.len(), k.div_ceil(32))?;
    let level = instructions.level();
    let floats = gather(level, x, a, k, row_stats, columns_of(outliers, k));
    let floats = (!floats.columns.is_empty()).then_some((&floats, column_stats));
    let finish = Scaled { level, row_stats, column_stats, bias };
    product(instructions, a, b, mnk, floats, &finish, out);
    Ok(())
}

/// [`super::linear_into`] with these instructions.
pub fn linear<T: Element>(
    instructions: Instructions,
    x: &[T],
    b: &[i8],
    (m, n, k): (usize, usize, usize),
    column_stats: &[f32],
    threshold: f32,
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    check_len("x", x.len(), area("x", m, k)?)?;
    check_product((m, n, k), x.len(), b.len(), bias.map(<[T]>::len), out.len())?;
    check_len("column_stats", column_stats.len(), n)?;
    let (mut stats, mut outliers) = (vec![0.0; m], vec![0; k.div_ceil(32)]);
    with_codes(m * k, |codes| {
        quantize_rows(instructions, x, k, threshold, codes, &mut stats, Some(&mut outliers))?;
        if outliers.iter().any(|&word| word != 0) {
            zero_columns(codes, k, &outliers)?;
            mixed(instructions, x, codes, b, (m, n, k), &stats, column_stats, &outliers, bias, out)
        } else {
            scaled(instructions, codes, b, (m, n, k), &stats, column_stats, bias, out)
        }
    })
}

/// Calls `body` with `len` codes, whatever they are. A layer after the other uses the same memory: the first touch of pages
/// that are new to the process takes longer than quantizing to them.
fn with_codes<R>(len: usize, body: impl FnOnce(&mut [i8]) -> R) -> R {
    /// Most that a thread keeps.
    const KEPT: usize = 1 << 24;
    thread_local! {
        static CODES: Cell<Vec<i8>> = const { Cell::new(Vec::new()) };
    }
    let mut codes = CODES.take();
    if codes.len() < len {
        codes = vec![0; len];
    }
    let result = body(&mut codes[..len]);
    if codes.len() <= KEPT {
        CODES.set(codes);
    }
    result
}

/// [`super::dequantize_product_into`] with these instructions.
pub fn dequantize_product<T: Element>(
    instructions: Instructions,
    sums: &[i32],
    row_stats: &[f32],
    column_stats: &[f32],
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    let (m, n) = (row_stats.len(), column_stats.len());
    instructions.check()?;
    check_len("sums", sums.len(), area("sums", m, n)?)?;
    check_len("out", out.len(), sums.len())?;
    bias.map_or(Ok(()), |bias| check_len("bias", bias.len(), n))?;
    if sums.is_empty() {
        return Ok(());
    }
    let finish = Scaled { level: instructions.level(), row_stats, column_stats, bias };
    let rows = share(m, GRAIN / n);
    for_each_task(sums.chunks(rows * n).zip(out.chunks_mut(rows * n)).enumerate().collect(), |(i, (sums, out))| {
        for (j, (sums, out)) in sums.chunks_exact(n).zip(out.chunks_exact_mut(n)).enumerate() {
            finish.finish(i * rows + j, 0, sums, None, out);
        }
    });
    Ok(())
}

/// [`super::dequantize_into`] with these instructions.
pub fn dequantize<T: Element>(
    instructions: Instructions,
    codes: &[i8],
    k: usize,
    stats: &[f32],
    out: &mut [T],
) -> Result<()> {
    instructions.check()?;
    check_len("codes", codes.len(), area("codes", stats.len(), k)?)?;
    check_len("out", out.len(), codes.len())?;
    if codes.is_empty() {
        return Ok(());
    }
    let rows = share(stats.len(), GRAIN / k);
    let tasks = codes.chunks(rows * k).zip(out.chunks_mut(rows * k)).zip(stats.chunks(rows));
    for_each_task(tasks.collect(), |((codes, out), stats)| match instructions.level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 => {
            for ((codes, out), &stat) in codes.chunks_exact(k).zip(out.chunks_exact_mut(k)).zip(stats) {
                // SAFETY: the level has been checked, and both have AVX2.
                unsafe { cpu_rows::decode_row(codes, stat, out) };
            }
        }
        _ => reference::dequantize(codes, k, stats, out),
    });
    Ok(())
}
