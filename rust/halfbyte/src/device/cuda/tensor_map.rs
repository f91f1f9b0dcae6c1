//! Maps for the tensor copy engine (compute capability 9.0): how boxes of a matrix in device memory come to shared memory.

use cudarc::driver::sys;

use super::Pointer;
use super::error::Named;
use crate::error::Result;

/// What the elements of a mapped matrix are: only their size matters, as what lies outside is filled with zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MapElement {
    /// One byte.
    Byte,
    /// Two bytes.
    Half,
}

/// A row-major matrix of `rows` × `columns` elements at `at` (a multiple of 16 bytes, as is a row), from which boxes of
/// `box_rows` (at most 256) × `box_columns` (128 bytes) are copied with their 16-byte chunks exchanged by the 128-byte swizzle.
///
/// The words are what a kernel takes by value, at a multiple of 64 bytes.
pub(crate) fn tensor_map(
    at: Pointer,
    element: MapElement,
    (rows, columns): (usize, usize),
    (box_rows, box_columns): (u32, u32),
) -> Result<[u64; 16]> {
    let (kind, size) = match element {
        MapElement::Byte => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
        MapElement::Half => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16, 2),
    };
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let sizes = [columns as u64, rows as u64];
    let strides = [columns as u64 * size];
    let boxes = [box_columns, box_rows];
    // SAFETY: the map is written, the arrays are read, all of them of the length that rank 2 says; the address is not followed.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            kind,
            2,
            at as *mut std::ffi::c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            [1, 1].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .named("cuTensorMapEncodeTiled")?;
    Ok(map.opaque)
}
