//! Where operations run: the CPU's SIMD levels and threads, the CUDA driver. Nothing here knows an operation.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
