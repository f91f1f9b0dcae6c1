//! LLM.int8(): rows and columns to codes, products of codes, whole layers.
//!
//! Outlier columns travel as a bitmap: int32 `[⌈K / 32⌉]`, bit `c % 32` of word `c / 32` for column `c`.

use halfbyte::int8;
use halfbyte::{Dtype, Error};
use pyo3::prelude::*;

use crate::dlpack::{Place, TensorRef};
use crate::errors::raise;
use crate::four_bit::{product_shape, with_type};
#[cfg(feature = "cuda")]
use crate::int8_cuda as cuda;
use crate::{check_together, detached, expect_len, shape_error};

/// One arm for the host, one for a device.
macro_rules! by_place {
    ($place:expr, $host:expr, $device:ident => $cuda:expr) => {
        match $place {
            Place::Cpu => $host.map_err(raise),
            #[cfg(feature = "cuda")]
            Place::Cuda($device) => $cuda,
            #[cfg(not(feature = "cuda"))]
            Place::Cuda(_) => Err(raise(crate::no_cuda())),
        }
    };
}

/// Words of the bitmap of `k` columns.
fn words(k: usize) -> usize {
    k.div_ceil(32)
}

/// The last size, and the product of those before it.
fn rows_of(tensor: &TensorRef) -> Result<(usize, usize), Error> {
    let Some((&k, rows)) = tensor.shape().split_last() else {
        return Err(shape_error(tensor.name, "at least one dimension".into(), tensor));
    };
    Ok((rows.iter().map(|&size| size as usize).product(), k as usize))
}

/// A matrix.
fn matrix(tensor: &TensorRef) -> Result<(usize, usize), Error> {
    if tensor.shape().len() == 2 {
        rows_of(tensor)
    } else {
        Err(shape_error(tensor.name, "[rows, columns]".into(), tensor))
    }
}

fn expect_f32(tensor: &TensorRef, len: usize) -> Result<(), Error> {
    tensor.expect_dtype(Dtype::F32)?;
    expect_len(tensor, len)
}

fn expect_bitmap(tensor: &TensorRef, k: usize) -> Result<(), Error> {
    tensor.expect_i32()?;
    expect_len(tensor, words(k))
}

/// What is written.
fn expect_outputs(outputs: &[&TensorRef]) -> Result<(), Error> {
    outputs.iter().try_for_each(|output| output.expect_writable())
}

fn check_threshold(threshold: f32) -> Result<(), Error> {
    if threshold.is_nan() {
        return Err(Error::Value { argument: "threshold", expected: "a number".into(), got: "NaN".into() });
    }
    Ok(())
}

/// Bias of the output's type, one number a column.
fn check_bias(bias: Option<&TensorRef>, place: Place, dtype: Dtype, n: usize) -> Result<(), Error> {
    let Some(bias) = bias else { return Ok(()) };
    check_together(place, &[bias])?;
    bias.expect_dtype(dtype)?;
    expect_len(bias, n)
}

/// Quantizes rows of `x` [..., K] into `q` and `stats`; sets the columns that have an outlier in the bitmap.
#[pyfunction]
#[pyo3(signature = (x, q, stats, threshold=0.0, outliers=None))]
pub(crate) fn int8_quantize_rows(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    q: &Bound<'_, PyAny>,
    stats: &Bound<'_, PyAny>,
    threshold: f32,
    outliers: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let x = TensorRef::new("x", x)?;
    let q = TensorRef::new("q", q)?;
    let stats = TensorRef::new("stats", stats)?;
    let outliers = TensorRef::optional("outliers", outliers)?;
    let checked = || {
        check_threshold(threshold)?;
        let dtype = x.float()?;
        let place = x.place()?;
        check_together(place, &[&x, &q, &stats])?;
        expect_outputs(&[&q, &stats])?;
        let (m, k) = rows_of(&x)?;
        q.expect_i8()?;
        expect_len(&q, x.len())?;
        expect_f32(&stats, m)?;
        match &outliers {
            Some(outliers) => {
                check_together(place, &[outliers])?;
                expect_outputs(&[outliers])?;
                expect_bitmap(outliers, k)?;
            }
            None if threshold > 0.0 => {
                let expected = "a bitmap where there is a threshold".into();
                return Err(Error::Value { argument: "outliers", expected, got: "None".into() });
            }
            None => {}
        }
        Ok((dtype, place, k))
    };
    let (dtype, place, k) = checked().map_err(raise)?;
    by_place!(
        place,
        with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (x, q, stats) = unsafe { (x.slice::<T>(), q.slice_mut::<i8>(), stats.slice_mut::<f32>()) };
            // SAFETY: as above.
            let outliers = outliers.as_ref().map(|outliers| unsafe { outliers.slice_mut::<u32>() });
            detached(py, x.len(), || int8::quantize_rows_into(x, k, threshold, q, stats, outliers))
        }),
        device => cuda::quantize_rows(device, &x, &q, &stats, threshold, outliers.as_ref())
    )
}

/// Makes the codes of the columns in the bitmap 0, in place.
#[pyfunction]
pub(crate) fn int8_zero_columns(py: Python<'_>, q: &Bound<'_, PyAny>, outliers: &Bound<'_, PyAny>) -> PyResult<()> {
    let q = TensorRef::new("q", q)?;
    let outliers = TensorRef::new("outliers", outliers)?;
    let checked = || {
        let place = q.place()?;
        check_together(place, &[&q, &outliers])?;
        expect_outputs(&[&q])?;
        q.expect_i8()?;
        let (_, k) = rows_of(&q)?;
        expect_bitmap(&outliers, k)?;
        Ok((place, k))
    };
    let (place, k) = checked().map_err(raise)?;
    by_place!(
        place,
        {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (q, outliers) = unsafe { (q.slice_mut::<i8>(), outliers.slice::<u32>()) };
            detached(py, q.len(), || int8::zero_columns(q, k, outliers))
        },
        device => cuda::zero_columns(device, &q, &outliers)
    )
}

/// Lists the columns in the bitmap: int64 [K], of which the first `count` (int32 [1]) are valid, rising.
#[pyfunction]
pub(crate) fn int8_outlier_columns(
    outliers: &Bound<'_, PyAny>,
    columns: &Bound<'_, PyAny>,
    count: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let outliers = TensorRef::new("outliers", outliers)?;
    let columns = TensorRef::new("columns", columns)?;
    let count = TensorRef::new("count", count)?;
    let checked = || {
        let place = outliers.place()?;
        check_together(place, &[&outliers, &columns, &count])?;
        expect_outputs(&[&columns, &count])?;
        if !columns.wide_integer()? {
            let (expected, got) = ("int64".into(), "int32".into());
            return Err(Error::Dtype { argument: "columns", expected, got });
        }
        expect_bitmap(&outliers, columns.len())?;
        count.expect_i32()?;
        expect_len(&count, 1)?;
        Ok(place)
    };
    let place = checked().map_err(raise)?;
    by_place!(
        place,
        {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (outliers, columns) = unsafe { (outliers.slice::<u32>(), columns.slice_mut::<i64>()) };
            // SAFETY: as above.
            let count = unsafe { count.slice_mut::<i32>() };
            let found = int8::columns_of(outliers, columns.len());
            columns.iter_mut().zip(&found).for_each(|(column, &found)| *column = found as i64);
            count[0] = found.len() as i32;
            Ok(())
        },
        device => cuda::outlier_columns(device, &outliers, &columns, &count)
    )
}

/// Sets `columns` (int64) in a bitmap of `k` columns, which is cleared first; those that are no column are passed over.
#[pyfunction]
pub(crate) fn int8_outlier_bitmap(columns: &Bound<'_, PyAny>, outliers: &Bound<'_, PyAny>, k: usize) -> PyResult<()> {
    let columns = TensorRef::new("columns", columns)?;
    let outliers = TensorRef::new("outliers", outliers)?;
    let checked = || {
        let place = outliers.place()?;
        check_together(place, &[&outliers, &columns])?;
        expect_outputs(&[&outliers])?;
        if !columns.wide_integer()? {
            let (expected, got) = ("int64".into(), "int32".into());
            return Err(Error::Dtype { argument: "columns", expected, got });
        }
        expect_bitmap(&outliers, k)?;
        Ok(place)
    };
    let place = checked().map_err(raise)?;
    by_place!(
        place,
        {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (columns, outliers) = unsafe { (columns.slice::<i64>(), outliers.slice_mut::<u32>()) };
            int8::bitmap_into(columns, k, outliers)
        },
        device => cuda::outlier_bitmap(device, &columns, &outliers, k)
    )
}

/// The statistic of each column of `x` [..., K], without outliers.
#[pyfunction]
#[pyo3(signature = (x, stats, threshold=0.0))]
pub(crate) fn int8_column_stats(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    stats: &Bound<'_, PyAny>,
    threshold: f32,
) -> PyResult<()> {
    let x = TensorRef::new("x", x)?;
    let stats = TensorRef::new("stats", stats)?;
    let checked = || {
        check_threshold(threshold)?;
        let dtype = x.float()?;
        let place = x.place()?;
        check_together(place, &[&x, &stats])?;
        expect_outputs(&[&stats])?;
        let (_, k) = rows_of(&x)?;
        expect_f32(&stats, k)?;
        Ok((dtype, place, k))
    };
    let (dtype, place, k) = checked().map_err(raise)?;
    by_place!(
        place,
        with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (x, stats) = unsafe { (x.slice::<T>(), stats.slice_mut::<f32>()) };
            detached(py, x.len(), || int8::column_stats_into(x, k, threshold, stats))
        }),
        device => cuda::column_stats(device, &x, &stats, threshold)
    )
}

/// Quantizes the columns of `x` [..., K] with their statistics into `q`; outliers get 0.
#[pyfunction]
#[pyo3(signature = (x, stats, q, threshold=0.0))]
pub(crate) fn int8_quantize_columns(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    stats: &Bound<'_, PyAny>,
    q: &Bound<'_, PyAny>,
    threshold: f32,
) -> PyResult<()> {
    let x = TensorRef::new("x", x)?;
    let stats = TensorRef::new("stats", stats)?;
    let q = TensorRef::new("q", q)?;
    let checked = || {
        check_threshold(threshold)?;
        let dtype = x.float()?;
        let place = x.place()?;
        check_together(place, &[&x, &stats, &q])?;
        expect_outputs(&[&q])?;
        let (_, k) = rows_of(&x)?;
        expect_f32(&stats, k)?;
        q.expect_i8()?;
        expect_len(&q, x.len())?;
        Ok((dtype, place, k))
    };
    let (dtype, place, k) = checked().map_err(raise)?;
    by_place!(
        place,
        with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (x, stats, q) = unsafe { (x.slice::<T>(), stats.slice::<f32>(), q.slice_mut::<i8>()) };
            detached(py, x.len(), || int8::quantize_columns_into(x, k, threshold, stats, q))
        }),
        device => cuda::quantize_columns(device, &x, &stats, &q, threshold)
    )
}

/// (M, N, K) of codes `a` [..., K], codes `b` [N, K] and `out` [..., N], all in one place, with the place.
fn check_codes(a: &TensorRef, b: &TensorRef, out: &TensorRef) -> Result<(Place, (usize, usize, usize)), Error> {
    let place = a.place()?;
    check_together(place, &[a, b, out])?;
    expect_outputs(&[out])?;
    a.expect_i8()?;
    b.expect_i8()?;
    let shape = product_shape(a, out)?;
    if matrix(b)? != (shape.1, shape.2) {
        return Err(shape_error(b.name, format!("[{}, {}]", shape.1, shape.2), b));
    }
    Ok((place, shape))
}

/// The work of a product, for whether it is worth to release the GIL.
fn work((m, n, k): (usize, usize, usize)) -> usize {
    m.saturating_mul(n).saturating_mul(k)
}

/// `out = a · bᵀ` in 32-bit integers.
#[pyfunction]
pub(crate) fn int8_matmul_int32(
    py: Python<'_>,
    a: &Bound<'_, PyAny>,
    b: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let a = TensorRef::new("a", a)?;
    let b = TensorRef::new("b", b)?;
    let out = TensorRef::new("out", out)?;
    let checked = || {
        out.expect_i32()?;
        check_codes(&a, &b, &out)
    };
    let (place, shape) = checked().map_err(raise)?;
    by_place!(
        place,
        {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (a, b, out) = unsafe { (a.slice::<i8>(), b.slice::<i8>(), out.slice_mut::<i32>()) };
            detached(py, work(shape), || int8::matmul_into(a, b, shape, out))
        },
        device => cuda::matmul_int32(device, &a, &b, &out)
    )
}

/// `out = q · wᵀ`, scaled, plus `bias`; with `x` and a bitmap, the columns in it are multiplied in floating point.
#[pyfunction]
#[pyo3(signature = (q, row_stats, w, col_stats, out, bias=None, x=None, outliers=None))]
pub(crate) fn int8_matmul(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    row_stats: &Bound<'_, PyAny>,
    w: &Bound<'_, PyAny>,
    col_stats: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    x: Option<&Bound<'_, PyAny>>,
    outliers: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let q = TensorRef::new("q", q)?;
    let row_stats = TensorRef::new("row_stats", row_stats)?;
    let w = TensorRef::new("w", w)?;
    let col_stats = TensorRef::new("col_stats", col_stats)?;
    let out = TensorRef::new("out", out)?;
    let bias = TensorRef::optional("bias", bias)?;
    let x = TensorRef::optional("x", x)?;
    let outliers = TensorRef::optional("outliers", outliers)?;
    let checked = || {
        let dtype = out.float()?;
        let (place, shape) = check_codes(&q, &w, &out)?;
        check_together(place, &[&row_stats, &col_stats])?;
        expect_f32(&row_stats, shape.0)?;
        expect_f32(&col_stats, shape.1)?;
        check_bias(bias.as_ref(), place, dtype, shape.1)?;
        let floats = match (&x, &outliers) {
            (Some(x), Some(outliers)) => {
                check_together(place, &[x, outliers])?;
                expect_len(x, q.len())?;
                expect_bitmap(outliers, shape.2)?;
                Some((x, outliers, x.float()?))
            }
            (None, None) => None,
            _ => {
                let expected = "both or neither".into();
                return Err(Error::Value { argument: "x, outliers", expected, got: "one of them".into() });
            }
        };
        Ok((dtype, place, shape, floats))
    };
    let (dtype, place, shape, floats) = checked().map_err(raise)?;
    by_place!(
        place,
        with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (q, w, out) = unsafe { (q.slice::<i8>(), w.slice::<i8>(), out.slice_mut::<T>()) };
            // SAFETY: as above.
            let (rows, columns) = unsafe { (row_stats.slice::<f32>(), col_stats.slice::<f32>()) };
            // SAFETY: as above.
            let bias = bias.as_ref().map(|bias| unsafe { bias.slice::<T>() });
            match floats {
                None => detached(py, work(shape), || int8::scaled_into(q, w, shape, rows, columns, bias, out)),
                Some((x, outliers, of_x)) => with_type!(of_x, X => {
                    // SAFETY: as above.
                    let (x, outliers) = unsafe { (x.slice::<X>(), outliers.slice::<u32>()) };
                    detached(py, work(shape), || {
                        int8::mixed_into(x, q, w, shape, rows, columns, outliers, bias, out)
                    })
                }),
            }
        }),
        device => {
            let floats = floats.map(|(x, outliers, _)| (x, outliers));
            cuda::matmul(device, &q, &row_stats, &w, &col_stats, &out, bias.as_ref(), floats)
        }
    )
}

/// Scales the sums of a product, `acc` [..., N], and adds `bias`.
#[pyfunction]
#[pyo3(signature = (acc, row_stats, col_stats, out, bias=None))]
pub(crate) fn int8_mm_dequant(
    py: Python<'_>,
    acc: &Bound<'_, PyAny>,
    row_stats: &Bound<'_, PyAny>,
    col_stats: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let acc = TensorRef::new("acc", acc)?;
    let row_stats = TensorRef::new("row_stats", row_stats)?;
    let col_stats = TensorRef::new("col_stats", col_stats)?;
    let out = TensorRef::new("out", out)?;
    let bias = TensorRef::optional("bias", bias)?;
    let checked = || {
        let dtype = out.float()?;
        let place = acc.place()?;
        check_together(place, &[&acc, &row_stats, &col_stats, &out])?;
        expect_outputs(&[&out])?;
        acc.expect_i32()?;
        let (m, n) = rows_of(&acc)?;
        expect_f32(&row_stats, m)?;
        expect_f32(&col_stats, n)?;
        expect_len(&out, acc.len())?;
        check_bias(bias.as_ref(), place, dtype, n)?;
        Ok((dtype, place))
    };
    let (dtype, place) = checked().map_err(raise)?;
    by_place!(
        place,
        with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (acc, out) = unsafe { (acc.slice::<i32>(), out.slice_mut::<T>()) };
            // SAFETY: as above.
            let (rows, columns) = unsafe { (row_stats.slice::<f32>(), col_stats.slice::<f32>()) };
            // SAFETY: as above.
            let bias = bias.as_ref().map(|bias| unsafe { bias.slice::<T>() });
            detached(py, acc.len(), || int8::dequantize_product_into(acc, rows, columns, bias, out))
        }),
        device => cuda::mm_dequant(device, &acc, &row_stats, &col_stats, &out, bias.as_ref())
    )
}

/// `out = q · stats / 127`, row by row.
#[pyfunction]
pub(crate) fn int8_dequantize_rows(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    stats: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let q = TensorRef::new("q", q)?;
    let stats = TensorRef::new("stats", stats)?;
    let out = TensorRef::new("out", out)?;
    let checked = || {
        let dtype = out.float()?;
        let place = q.place()?;
        check_together(place, &[&q, &stats, &out])?;
        expect_outputs(&[&out])?;
        q.expect_i8()?;
        let (m, k) = rows_of(&q)?;
        expect_f32(&stats, m)?;
        expect_len(&out, q.len())?;
        Ok((dtype, place, k))
    };
    let (dtype, place, k) = checked().map_err(raise)?;
    by_place!(
        place,
        with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (q, stats, out) = unsafe { (q.slice::<i8>(), stats.slice::<f32>(), out.slice_mut::<T>()) };
            detached(py, out.len(), || int8::dequantize_into(q, k, stats, out))
        }),
        device => cuda::dequantize_rows(device, &q, &stats, &out)
    )
}

/// Bytes of workspace that [`int8_linear`] wants for this `x` and a weight of `n` rows.
#[pyfunction]
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "only devices want a workspace"))]
pub(crate) fn int8_linear_workspace(x: &Bound<'_, PyAny>, n: usize, threshold: f32) -> PyResult<usize> {
    let x = TensorRef::new("x", x)?;
    let place = x.place().map_err(raise)?;
    let none = || -> Result<usize, Error> { Ok(0) };
    by_place!(place, none(), _device => Ok(cuda::linear_workspace(&x, n, threshold)))
}

/// A whole layer: rows of `x` [..., K] quantized, multiplied with `w` [N, K], outlier columns in floating point, `bias` added.
#[pyfunction]
#[pyo3(signature = (x, w, col_stats, out, workspace=None, bias=None, threshold=0.0))]
pub(crate) fn int8_linear(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    w: &Bound<'_, PyAny>,
    col_stats: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    workspace: Option<&Bound<'_, PyAny>>,
    bias: Option<&Bound<'_, PyAny>>,
    threshold: f32,
) -> PyResult<()> {
    layer(py, [x, w, col_stats, out], workspace, bias, threshold)
}

/// [`int8_linear`] of `x`, `w`, `col_stats` and `out`. The type of the workspace does not matter.
pub(crate) fn layer(
    py: Python<'_>,
    [x, w, col_stats, out]: [&Bound<'_, PyAny>; 4],
    workspace: Option<&Bound<'_, PyAny>>,
    bias: Option<&Bound<'_, PyAny>>,
    threshold: f32,
) -> PyResult<()> {
    let x = TensorRef::new("x", x)?;
    let w = TensorRef::new("w", w)?;
    let col_stats = TensorRef::new("col_stats", col_stats)?;
    let out = TensorRef::new("out", out)?;
    let workspace = TensorRef::optional("workspace", workspace)?;
    let bias = TensorRef::optional("bias", bias)?;
    let checked = || {
        check_threshold(threshold)?;
        let dtype = x.float()?;
        let place = x.place()?;
        check_together(place, &[&x, &w, &col_stats, &out])?;
        expect_outputs(&[&out])?;
        out.expect_dtype(dtype)?;
        w.expect_i8()?;
        let shape = product_shape(&x, &out)?;
        if matrix(&w)? != (shape.1, shape.2) {
            return Err(shape_error("w", format!("[{}, {}]", shape.1, shape.2), &w));
        }
        expect_f32(&col_stats, shape.1)?;
        check_bias(bias.as_ref(), place, dtype, shape.1)?;
        if let Some(workspace) = &workspace {
            check_together(place, &[workspace])?;
            expect_outputs(&[workspace])?;
        }
        Ok((dtype, place, shape))
    };
    let (dtype, place, shape) = checked().map_err(raise)?;
    by_place!(
        place,
        with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (x, w, out) = unsafe { (x.slice::<T>(), w.slice::<i8>(), out.slice_mut::<T>()) };
            // SAFETY: as above.
            let (columns, bias) = unsafe { (col_stats.slice::<f32>(), bias.as_ref().map(|bias| bias.slice::<T>())) };
            detached(py, work(shape), || int8::linear_into(x, w, shape, columns, threshold, bias, out))
        }),
        device => cuda::linear(device, &x, &w, &col_stats, &out, workspace.as_ref(), bias.as_ref(), threshold)
    )
}

/// The instructions that integer products can use on this CPU, the slowest first; the last are what they do use, unless
/// `HALFBYTE_SIMD` says otherwise.
#[pyfunction]
pub(crate) fn int8_levels() -> Vec<String> {
    int8::cpu::Instructions::available()
        .into_iter()
        .map(|instructions| format!("{instructions:?}").to_lowercase())
        .collect()
}
