//! The device half of `int8.rs`: addresses and sizes of checked tensors to the core.

use halfbyte::Error;
use halfbyte::device::cuda::Stream;
use halfbyte::int8::cuda::{self, Columns, Floats, Product, Target};
use pyo3::prelude::*;

use crate::dlpack::TensorRef;
use crate::errors::raise;
use crate::stream_of;

fn at(tensor: &TensorRef) -> u64 {
    tensor.address() as u64
}

fn float(tensor: &TensorRef) -> PyResult<(u64, halfbyte::Dtype)> {
    Ok((at(tensor), tensor.float().map_err(raise)?))
}

/// Columns of a bitmap that came from outside.
fn uncounted(bitmap: &TensorRef) -> Columns {
    Columns { bitmap: at(bitmap), counted: false }
}

/// Rows and columns of `x`, whose rows are as many as `rows` has elements.
fn shape(x: &TensorRef, rows: &TensorRef) -> (usize, usize) {
    (rows.len(), last(x))
}

fn last(x: &TensorRef) -> usize {
    x.shape().last().map_or(0, |&size| size as usize)
}

pub(crate) fn quantize_rows(
    device: i32,
    x: &TensorRef,
    q: &TensorRef,
    stats: &TensorRef,
    threshold: f32,
    outliers: Option<&TensorRef>,
) -> PyResult<()> {
    let stream = stream_of(x, device)?;
    let outliers = outliers.map(uncounted);
    // SAFETY: sizes and device are checked; torch keeps the memory for as long as its stream needs it.
    unsafe { cuda::quantize_rows(&stream, float(x)?, shape(x, stats), threshold, at(q), at(stats), outliers) }
        .map_err(raise)
}

pub(crate) fn zero_columns(device: i32, q: &TensorRef, outliers: &TensorRef) -> PyResult<()> {
    let stream = stream_of(q, device)?;
    let k = last(q);
    // SAFETY: as above.
    unsafe { cuda::zero_columns(&stream, at(q), (q.len() / k.max(1), k), at(outliers)) }.map_err(raise)
}

pub(crate) fn outlier_columns(
    device: i32,
    outliers: &TensorRef,
    columns: &TensorRef,
    count: &TensorRef,
) -> PyResult<()> {
    let stream = stream_of(outliers, device)?;
    // SAFETY: as above.
    unsafe { cuda::outlier_columns(&stream, at(outliers), columns.len(), at(columns), at(count)) }.map_err(raise)
}

pub(crate) fn outlier_bitmap(device: i32, columns: &TensorRef, outliers: &TensorRef, k: usize) -> PyResult<()> {
    let stream = stream_of(outliers, device)?;
    // SAFETY: as above.
    unsafe { cuda::mark_columns(&stream, at(columns), columns.len(), k, at(outliers)) }.map_err(raise)
}

pub(crate) fn column_stats(device: i32, x: &TensorRef, stats: &TensorRef, threshold: f32) -> PyResult<()> {
    let stream = stream_of(x, device)?;
    let k = stats.len();
    // SAFETY: as above.
    unsafe { cuda::column_stats(&stream, float(x)?, (x.len() / k.max(1), k), threshold, at(stats)) }.map_err(raise)
}

pub(crate) fn quantize_columns(
    device: i32,
    x: &TensorRef,
    stats: &TensorRef,
    q: &TensorRef,
    threshold: f32,
) -> PyResult<()> {
    let stream = stream_of(x, device)?;
    let k = stats.len();
    // SAFETY: as above.
    unsafe { cuda::quantize_columns(&stream, float(x)?, (x.len() / k.max(1), k), threshold, at(stats), at(q)) }
        .map_err(raise)
}

pub(crate) fn matmul_int32(device: i32, a: &TensorRef, b: &TensorRef, out: &TensorRef) -> PyResult<()> {
    let stream = stream_of(a, device)?;
    let n = last(out);
    let product = Product { q: at(a), row_stats: 0, w: at(b), column_stats: 0, bias: None, floats: None };
    // SAFETY: as above.
    unsafe { cuda::matmul(&stream, &product, (out.len() / n.max(1), n, last(a)), at(out), Target::Sums) }.map_err(raise)
}

pub(crate) fn matmul(
    device: i32,
    q: &TensorRef,
    row_stats: &TensorRef,
    w: &TensorRef,
    col_stats: &TensorRef,
    out: &TensorRef,
    bias: Option<&TensorRef>,
    floats: Option<(&TensorRef, &TensorRef)>,
) -> PyResult<()> {
    let stream = stream_of(q, device)?;
    let floats = match floats {
        Some((x, outliers)) => {
            Some(Floats { x: at(x), dtype: x.float().map_err(raise)?, outliers: uncounted(outliers) })
        }
        None => None,
    };
    let (row_stats_at, column_stats) = (at(row_stats), at(col_stats));
    let product = Product { q: at(q), row_stats: row_stats_at, w: at(w), column_stats, bias: bias.map(at), floats };
    let (out, dtype) = float(out)?;
    let shape = (row_stats.len(), col_stats.len(), last(q));
    // SAFETY: as above.
    unsafe { cuda::matmul(&stream, &product, shape, out, Target::Float(dtype)) }.map_err(raise)
}

pub(crate) fn mm_dequant(
    device: i32,
    acc: &TensorRef,
    row_stats: &TensorRef,
    col_stats: &TensorRef,
    out: &TensorRef,
    bias: Option<&TensorRef>,
) -> PyResult<()> {
    let stream = stream_of(acc, device)?;
    let (shape, stats) = ((row_stats.len(), col_stats.len()), (at(row_stats), at(col_stats)));
    // SAFETY: as above.
    unsafe { cuda::mm_dequant(&stream, at(acc), stats, shape, bias.map(at), float(out)?) }.map_err(raise)
}

pub(crate) fn dequantize_rows(device: i32, q: &TensorRef, stats: &TensorRef, out: &TensorRef) -> PyResult<()> {
    let stream = stream_of(q, device)?;
    // SAFETY: as above.
    unsafe { cuda::dequantize_rows(&stream, (at(q), at(stats)), shape(q, stats), float(out)?) }.map_err(raise)
}

/// Rows, outputs and inputs of a layer.
fn layer(x: &TensorRef, n: usize) -> (usize, usize, usize) {
    let rows = x.shape().split_last().map_or(&[][..], |(_, rows)| rows);
    (rows.iter().map(|&size| size as usize).product(), n, last(x))
}

/// [`linear_workspace`] where the weight is known, and 0 if it is not needed after all.
pub(crate) fn workspace_for(
    device: i32,
    (x, w): (&TensorRef, &TensorRef),
    n: usize,
    threshold: f32,
) -> Result<usize, Error> {
    let shape = layer(x, n);
    let none = cuda::needs_no_workspace(device, (at(x), x.float()?), at(w), shape, threshold)?;
    Ok(if none { 0 } else { cuda::linear_workspace(shape, threshold) })
}

pub(crate) fn linear_workspace(x: &TensorRef, n: usize, threshold: f32) -> usize {
    cuda::linear_workspace(layer(x, n), threshold)
}

pub(crate) fn linear(
    device: i32,
    x: &TensorRef,
    w: &TensorRef,
    col_stats: &TensorRef,
    out: &TensorRef,
    workspace: Option<&TensorRef>,
    bias: Option<&TensorRef>,
    threshold: f32,
) -> PyResult<()> {
    let stream = Stream { device, handle: x.stream()? };
    let shape = layer(x, col_stats.len());
    let wanted = workspace_for(device, (x, w), col_stats.len(), threshold).map_err(raise)?;
    let place = workspace.map_or((0, 0), |workspace| (at(workspace), workspace.byte_len()));
    if place.1 < wanted || !place.0.is_multiple_of(16) {
        return Err(raise(Error::Value {
            argument: "workspace",
            expected: format!("{wanted} bytes at a multiple of 16"),
            got: format!("{} at {:#x}", place.1, place.0),
        }));
    }
    let weight = (at(w), at(col_stats));
    // SAFETY: as above.
    unsafe { cuda::linear(&stream, float(x)?, weight, shape, threshold, bias.map(at), at(out), place.0) }.map_err(raise)
}
