//! 4-bit operations on CUDA: raw device pointers and a raw stream in, work enqueued, nothing waited for.

mod elementwise;
mod experts;
mod gated;
mod group;
mod matmul;
mod matmul_large;
mod matmul_next;
mod matmul_small;
mod matmul_stream;
mod matmul_wgmma;
mod search;
mod split;

pub use elementwise::{dequantize, quantize};
pub use experts::{clear_rows, matmul_experts, route_experts};
pub use gated::{Gate, gate, matmul_gated};
pub use group::{GroupPiece, MATMUL_GROUP_MOST, matmul_group};
pub use matmul::{fused, large_scratch_bytes, matmul, matmul_by_large, scratch_bytes};
pub use matmul_large::LargeChoice;
pub use matmul_next::{NextRead, read_next, settle};
pub use search::{encode, quantize_search};

use crate::codebook::Kind;
use crate::device::cuda::{Kernel, Pointer, device, dtype_index};
use crate::element::Dtype;
use crate::error::Result;
use elementwise::{DEQUANTIZE, QUANTIZE};
use matmul::MATMUL_SIMT;
use matmul_small::MATMUL_MMA;
use matmul_stream::STREAM;
use search::{ENCODE, SEARCH};

/// NF4 is 0 and FP4 is 1 on the device.
const fn kind_number(kind: Kind) -> u32 {
    match kind {
        Kind::Nf4 => 0,
        Kind::Fp4 => 1,
    }
}

fn aligned(pointers: &[(Pointer, u64)]) -> bool {
    pointers.iter().all(|(pointer, align)| pointer.is_multiple_of(*align))
}

/// Loads the images that 4-bit operations of this activation type use, so that no first call has to.
pub fn preload(ordinal: i32, dtype: Dtype) -> Result<()> {
    DEQUANTIZE[dtype_index(dtype)].load(ordinal)?;
    MATMUL_SIMT[dtype_index(dtype)].load(ordinal)?;
    if dtype != Dtype::F32 && device(ordinal)?.capability >= 80 {
        for kernel in &MATMUL_MMA[dtype_index(dtype)][0] {
            kernel.load(ordinal)?;
        }
    }
    if dtype != Dtype::F32 && device(ordinal)?.capability >= 90 {
        for kernel in STREAM[dtype_index(dtype)].iter().flatten() {
            kernel.load(ordinal)?;
        }
    }
    if matmul_wgmma::fits(device(ordinal)?, dtype) {
        for size in &matmul_wgmma::SIZES {
            size.kernels[dtype_index(dtype)].load(ordinal)?;
        }
        matmul_large::preload(ordinal, dtype)?;
    }
    Ok(())
}

/// Every kernel of this module, for a test that each is in the images.
#[doc(hidden)]
pub fn kernels() -> Vec<&'static Kernel> {
    let mma = MATMUL_MMA.iter().flatten().flatten();
    let search = SEARCH.iter().chain(&ENCODE);
    QUANTIZE
        .iter()
        .chain(&DEQUANTIZE)
        .chain(search)
        .chain(&MATMUL_SIMT)
        .chain(mma)
        .chain(STREAM.iter().flatten().flatten())
        .chain(matmul_wgmma::SIZES.iter().flat_map(|size| &size.kernels))
        .chain(matmul_large::kernels())
        .chain(experts::kernels())
        .chain(&gated::GATE)
        .collect()
}
