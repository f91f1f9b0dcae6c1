//! `halfbyte._native`: tensors in through `DLPack`, one call into the core, errors out as `halfbyte.errors`.

mod c_api;
mod checkpoint;
mod dlpack;
mod eager;
mod eager_int8;
mod eight_bit;
mod errors;
mod four_bit;
mod groups;
mod info;
mod int8;
#[cfg(feature = "cuda")]
mod int8_cuda;
mod openmp;
mod optim;
#[cfg(feature = "cuda")]
mod scratch;
mod search;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use super::c_api::{remember_code, take_c_error};
    #[pymodule_export]
    use super::checkpoint::{Conversion, inspect_checkpoint};
    #[pymodule_export]
    use super::eager::{eager_linear_4bit, eager_matmul_4bit};
    #[pymodule_export]
    use super::eager_int8::eager_linear_int8;
    #[pymodule_export]
    use super::eight_bit::{dequantize_blockwise, dynamic_map, quantize_blockwise};
    #[pymodule_export]
    use super::four_bit::{code_values, dequantize_4bit, matmul_4bit, quantize_4bit};
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use super::four_bit::{gate, matmul_4bit_gated, matmul_4bit_large, read_next_4bit, settle_4bit};
    #[pymodule_export]
    use super::groups::{capture_of, clear_expert_rows, matmul_4bit_experts, matmul_4bit_group, route_experts};
    #[pymodule_export]
    use super::info::{build_info, cuda_info, cuda_kernels, set_num_threads, simd_level, simd_levels};
    #[pymodule_export]
    use super::int8::{
        int8_column_stats, int8_dequantize_rows, int8_levels, int8_linear, int8_linear_workspace, int8_matmul,
        int8_matmul_int32, int8_mm_dequant, int8_outlier_bitmap, int8_outlier_columns, int8_quantize_columns,
        int8_quantize_rows, int8_zero_columns,
    };
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use super::optim::PagedBuffer;
    #[pymodule_export]
    use super::optim::{OptimPlan, all_filled, optim_grad_norm, same_items, same_values};
    #[pymodule_export]
    use super::search::encode_4bit;
}

use dlpack::{Place, TensorRef};
use halfbyte::Error;

/// Checks that tensors lie together on one place and are contiguous.
fn check_together(place: Place, tensors: &[&TensorRef]) -> Result<(), Error> {
    for tensor in tensors {
        tensor.expect_place(place)?;
        tensor.expect_contiguous()?;
    }
    Ok(())
}

fn shape_error(argument: &'static str, expected: String, tensor: &TensorRef) -> Error {
    Error::Shape { argument, expected, got: format!("{:?}", tensor.shape()) }
}

fn expect_len(tensor: &TensorRef, len: usize) -> Result<(), Error> {
    if tensor.len() == len {
        return Ok(());
    }
    Err(shape_error(tensor.name, format!("{len} elements"), tensor))
}

/// The error of a CUDA tensor in a build without CUDA.
#[cfg(not(feature = "cuda"))]
fn no_cuda() -> Error {
    Error::CudaUnavailable { reason: "this build of halfbyte has no CUDA support".into() }
}

/// Runs host work with the GIL released where there is enough of it to be worth the release.
fn detached<T: Send>(py: Python<'_>, elements: usize, work: impl FnOnce() -> T + Send) -> T {
    const WORTH_IT: usize = 1 << 14;
    if elements >= WORTH_IT { py.detach(work) } else { work() }
}

#[cfg(feature = "cuda")]
fn stream_of(tensor: &TensorRef, device: i32) -> PyResult<halfbyte::device::cuda::Stream> {
    Ok(halfbyte::device::cuda::Stream { device, handle: tensor.stream()? })
}
