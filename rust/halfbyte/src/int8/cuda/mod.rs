//! LLM.int8 on CUDA: raw device pointers and a raw stream in, work enqueued, nothing waited for.

mod elementwise;
mod layer_stream;
mod product;
mod product_wgmma;

pub use elementwise::{
    column_stats, dequantize_rows, mark_columns, mm_dequant, outlier_columns, quantize_columns, quantize_rows,
    zero_columns,
};
pub use product::{Columns, Floats, MOST_GATHERED, Product, Target, matmul};

use crate::device::cuda::{Kernel, Pointer, Stream, device};
use crate::element::Dtype;
use crate::error::Result;

/// Bytes of the bitmap of `k` columns and of their number.
const fn columns_bytes(k: usize) -> usize {
    (k.div_ceil(32) + 1) * 4
}

const fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of(256)
}

/// Whether [`linear`] of these operands needs no workspace.
pub fn needs_no_workspace(
    ordinal: i32,
    x: (Pointer, Dtype),
    w: Pointer,
    shape: (usize, usize, usize),
    threshold: f32,
) -> Result<bool> {
    Ok(layer_stream::plan(device(ordinal)?, x, w, shape, threshold).is_some())
}

/// Bytes of workspace that [`linear`] wants: quantized rows, their statistics, and columns with outliers where there is a threshold.
pub const fn linear_workspace((m, _, k): (usize, usize, usize), threshold: f32) -> usize {
    rounded(m * k) + rounded(m * 4) + if threshold > 0.0 { columns_bytes(k) } else { 0 }
}

/// A whole layer: rows of `x` [m, k] quantized, multiplied with `w` [n, k], columns with outliers in floating point, bias
/// added; `out` has the type of `x`.
///
/// # Safety
/// The pointers must be device memory of the stream's device, of these sizes and of [`linear_workspace`] bytes (none where
/// [`needs_no_workspace`]), until the stream has passed the launches.
pub unsafe fn linear(
    stream: &Stream,
    (x, dtype): (Pointer, Dtype),
    (w, column_stats): (Pointer, Pointer),
    (m, n, k): (usize, usize, usize),
    threshold: f32,
    bias: Option<Pointer>,
    out: Pointer,
    workspace: Pointer,
) -> Result<()> {
    if m == 0 || n == 0 {
        return Ok(());
    }
    if let Some(plan) = layer_stream::plan(device(stream.device)?, (x, dtype), w, (m, n, k), threshold) {
        let layer = layer_stream::Layer { x, dtype, w, column_stats, bias, threshold, out };
        // SAFETY: the caller's promise.
        return unsafe { layer_stream::launch(stream, plan, &layer, (m, n, k)) };
    }
    let q = workspace;
    let row_stats = q + rounded(m * k) as u64;
    let bitmap = row_stats + rounded(m * 4) as u64;
    let outliers = (threshold > 0.0).then_some(Columns { bitmap, counted: true });
    // SAFETY: the caller's promise.
    unsafe { quantize_rows(stream, (x, dtype), (m, k), threshold, q, row_stats, outliers) }?;
    let floats = outliers.map(|outliers| Floats { x, dtype, outliers });
    let product = Product { q, row_stats, w, column_stats, bias, floats };
    // SAFETY: as above.
    unsafe { matmul(stream, &product, (m, n, k), out, Target::Float(dtype)) }
}

/// Loads the images that layers of this activation type use, so that no first call has to.
pub fn preload(ordinal: i32, dtype: Dtype) -> Result<()> {
    elementwise::preload(ordinal, dtype)?;
    layer_stream::preload(device(ordinal)?, dtype)?;
    product::preload(device(ordinal)?, dtype)
}

/// Every kernel of this module, for a test that each is in the images.
#[doc(hidden)]
pub fn kernels() -> Vec<&'static Kernel> {
    elementwise::kernels().into_iter().chain(layer_stream::kernels()).chain(product::kernels()).collect()
}
