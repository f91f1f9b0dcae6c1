//! Tensor maps: how the copy engine of compute capability 9.0 sees a matrix.

use cudarc::driver::sys;

use super::Pointer;
use super::error::Named;
use crate::error::Result;

/// Words of a tensor map, as [`super::Arguments::block`] takes them.
pub type TensorMap = [u64; 16];

/// What a matrix's elements are: only their size matters, as what lies outside is filled with zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MapElement {
    Byte,
    Half,
}

/// Bytes around a box that the L2 is asked for with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Around {
    Bytes128,
    Bytes256,
}

/// A matrix of `rows` × `columns` in boxes of `box_rows` rows of 128 bytes that lie in shared memory with the swizzle of 128
/// bytes. The pointer and the bytes of a row are multiples of 16; `box_rows` is 256 at the most.
pub(crate) fn matrix(
    at: Pointer,
    element: MapElement,
    (rows, columns): (usize, usize),
    box_rows: u32,
    around: Around,
) -> Result<TensorMap> {
    let (kind, size) = match element {
        MapElement::Byte => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
        MapElement::Half => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16, 2),
    };
    let promotion = match around {
        Around::Bytes128 => sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        Around::Bytes256 => sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
    };
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let (sizes, strides) = ([columns as u64, rows as u64], [columns as u64 * size]);
    let (bounds, steps) = ([128 / size as u32, box_rows], [1, 1]);
    // SAFETY: the map is 64-byte aligned by its type; sizes and bounds are arrays of the rank, strides of one less. The address is
    // only written down.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            kind,
            2,
            at as *mut _,
            sizes.as_ptr(),
            strides.as_ptr(),
            bounds.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            promotion,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .named("cuTensorMapEncodeTiled")?;
    Ok(map.opaque)
}

/// [`matrix`] of bytes that are read in full lines.
pub fn byte_matrix(at: Pointer, rows: usize, columns: usize, box_rows: u32) -> Result<TensorMap> {
    matrix(at, MapElement::Byte, (rows, columns), box_rows, Around::Bytes256)
}
