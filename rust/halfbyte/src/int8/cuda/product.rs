//! Products of codes: which kernel a shape gets, and the one that runs everywhere (cuda/src/int8_mma.cu).

use super::product_wgmma;
use crate::device::cuda::{Arguments, Device, Kernel, Launch, Pointer, Stream, THREADS, device, dtype_index};
use crate::element::Dtype;
use crate::error::Result;

/// Activations whose outlier columns take part in floating point.
#[derive(Debug, Clone, Copy)]
pub struct Floats {
    /// [m, k], what `q` was quantized from.
    pub x: Pointer,
    /// Its type.
    pub dtype: Dtype,
    /// The columns. Where it is known how many there are and they are more than [`MOST_GATHERED`], x itself may be multiplied, in
    /// every column: on compute capability 9.0 and for 16-bit types it is.
    pub outliers: Columns,
}

/// A set of columns.
#[derive(Debug, Clone, Copy)]
pub struct Columns {
    /// One bit each, in words of 32.
    pub bitmap: Pointer,
    /// Whether the word behind the bitmap holds how many there are.
    pub counted: bool,
}

impl Columns {
    /// Where the number of them is, of `k` columns in all; 0 if nowhere.
    pub(super) const fn count(self, k: usize) -> Pointer {
        if self.counted { self.bitmap + k.div_ceil(32) as u64 * 4 } else { 0 }
    }
}

/// Outlier columns beyond which a product of x itself is faster than gathering them, as measured on an H200: 16 on wide weights
/// with small K, 64 on the narrow ones with large K.
pub const MOST_GATHERED: u32 = 32;

/// Operands of a product.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// int8 [m, k].
    pub q: Pointer,
    /// fp32 [m].
    pub row_stats: Pointer,
    /// int8 [n, k].
    pub w: Pointer,
    /// fp32 [n].
    pub column_stats: Pointer,
    /// [n] of the output's type.
    pub bias: Option<Pointer>,
    /// Outliers, if there may be any.
    pub floats: Option<Floats>,
}

/// What a product is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The integer sums; statistics, bias and outliers do not take part.
    Sums,
    /// Scaled.
    Float(Dtype),
}

impl Target {
    /// Place in tables of kernels: bf16, fp16, fp32, int32.
    pub(super) const fn index(self) -> usize {
        match self {
            Self::Sums => 3,
            Self::Float(dtype) => dtype_index(dtype),
        }
    }
}

const fn both(family: &'static str) -> [Kernel; 2] {
    [Kernel::new(family, "matmul_int8_32"), Kernel::new(family, "matmul_int8_128")]
}

/// By output type, then tile of tokens: 32, 128.
static MMA: [[Kernel; 2]; 4] =
    [both("int8_mma_bf16"), both("int8_mma_f16"), both("int8_mma_f32"), both("int8_mma_i32")];

/// `out` [m, n] = `q` [m, k] · `w` [n, k]ᵀ, exact, scaled by the statistics if it is not the sums that are wanted.
///
/// # Safety
/// The pointers must be device memory of the stream's device, of these sizes, until the stream has passed the launch.
pub unsafe fn matmul(
    stream: &Stream,
    product: &Product,
    shape: (usize, usize, usize),
    out: Pointer,
    target: Target,
) -> Result<()> {
    let (m, n, _) = shape;
    if m == 0 || n == 0 {
        return Ok(());
    }
    let gpu = device(stream.device)?;
    if product_wgmma::fits(gpu, product, shape, target) {
        // SAFETY: the caller's promise.
        return unsafe { product_wgmma::launch(stream, gpu, product, shape, out, target) };
    }
    // SAFETY: as above.
    unsafe { launch_mma(stream, product, shape, out, target) }
}

/// The kernel for any GPU and shape.
///
/// # Safety
/// As [`matmul`].
unsafe fn launch_mma(
    stream: &Stream,
    product: &Product,
    (m, n, k): (usize, usize, usize),
    out: Pointer,
    target: Target,
) -> Result<()> {
    let large = usize::from(m > 32);
    let tile = if m > 32 { 128 } else { 32 };
    let launch = Launch::new((n.div_ceil(128) as u32, m.div_ceil(tile) as u32), THREADS);
    let (x, x_type, outliers) =
        product.floats.map_or((0, 0, 0), |f| (f.x, dtype_index(f.dtype) as u32, f.outliers.bitmap));
    let arguments = Arguments::default().u64(product.q).u64(product.w).u32(m as u32).u32(n as u32).u32(k as u32);
    let arguments = arguments.u64(product.row_stats).u64(product.column_stats).u64(product.bias.unwrap_or(0)).u64(out);
    let mut arguments = arguments.u64(x).u32(x_type).u64(outliers);
    // SAFETY: the arguments are those of `matmul_int8_*`; the caller vouches for the pointers.
    unsafe { MMA[target.index()][large].launch(stream, launch, &mut arguments) }
}

/// Loads the images of products of an activation type.
pub(super) fn preload(gpu: &Device, dtype: Dtype) -> Result<()> {
    if product_wgmma::runs_on(gpu) {
        product_wgmma::preload(gpu, dtype)
    } else {
        MMA[dtype_index(dtype)][0].load(gpu.ordinal)
    }
}

pub(super) fn kernels() -> Vec<&'static Kernel> {
    MMA.iter().flatten().chain(product_wgmma::kernels()).collect()
}
