//! The CUDA driver: found at run time, used through the primary context that torch and everybody else uses.
//!
//! Nothing here but [`Managed`] allocates device memory; nothing creates a stream or, but for [`read`], synchronizes. The caller's
//! current context is left as it was.

mod context;
mod error;
mod kernel;
mod managed;
mod memory;
mod tensor_map;

pub use context::{Device, capture_of, device, device_count, driver_version};
pub use kernel::{Arguments, Kernel, Launch, THREADS, images_for};
pub use managed::{Managed, check_reachable, is_reachable, is_resident, memory_left, prefetch};
pub use memory::{device_of, read};
pub(crate) use tensor_map::{Around, MapElement, matrix};
pub use tensor_map::{TensorMap, byte_matrix};

use std::ffi::c_void;

use crate::element::Dtype;
use crate::error::Result;

/// A stream of a device, by raw handle: `CUstream` of any CUDA binding. The null handle is the legacy default stream.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    /// The device, numbered as CUDA numbers visible devices.
    pub device: i32,
    /// The `CUstream`.
    pub handle: *mut c_void,
}

/// The address of device memory.
pub type Pointer = u64;

/// Scales of a tensor's blocks in device memory; [`crate::layout::Absmax`] describes the two forms.
#[derive(Debug, Clone, Copy)]
pub enum Absmax {
    /// One fp32 a block.
    Plain(Pointer),
    /// One `u8` code a block.
    Nested {
        /// `u8`, one a block.
        codes: Pointer,
        /// fp32, one for each `1 << log2_block` codes.
        absmax: Pointer,
        /// fp32 × 256.
        map: Pointer,
        /// fp32 × 1, in device memory too: reading it on the host would wait for the stream.
        offset: Pointer,
        /// Codes to a nested scale, as a power of two.
        log2_block: u32,
    },
}

/// Place of an element type in tables of kernels: bf16, fp16, fp32.
pub(crate) const fn dtype_index(dtype: Dtype) -> usize {
    match dtype {
        Dtype::Bf16 => 0,
        Dtype::F16 => 1,
        Dtype::F32 => 2,
    }
}

impl Absmax {
    /// The four pointers and the shift as kernels take them; the last three are null when plain.
    pub(crate) fn parts(self) -> (Pointer, Pointer, Pointer, Pointer, u32) {
        match self {
            Self::Plain(absmax) => (absmax, 0, 0, 0, 0),
            Self::Nested { codes, absmax, map, offset, log2_block } => (codes, absmax, map, offset, log2_block),
        }
    }

    /// Whether the scales are nested.
    pub fn is_nested(self) -> bool {
        matches!(self, Self::Nested { .. })
    }
}

impl Arguments {
    /// Adds the scales as kernels take them: four pointers and the shift.
    #[inline]
    #[must_use]
    pub(crate) fn scales(self, absmax: Absmax) -> Self {
        let (scales, nested, map, offset, nested_shift) = absmax.parts();
        self.u64(scales).u64(nested).u64(map).u64(offset).u32(nested_shift)
    }
}

/// The launch of a kernel that goes over `n` elements by tiles, two in shared memory for each warp: cuda/include/tile.cuh.
pub(crate) fn tiles(kernel: &Kernel, stream: &Stream, dtype: Dtype, n: usize) -> Result<Launch> {
    const TILE: u32 = 1024;
    let shared = if device(stream.device)?.capability >= 80 { 64 << 10 } else { 32 << 10 };
    let warps = shared / (2 * TILE * dtype.size() as u32);
    kernel.filling(stream.device, (n as u64).div_ceil(u64::from(TILE * warps)), warps * 32, shared)
}
