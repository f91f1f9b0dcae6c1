//! What foreign pointers are: for callers that hand over bare addresses.

use std::ffi::c_void;

use cudarc::driver::sys;
use cudarc::driver::sys::{CUmemorytype, CUpointer_attribute, CUresult};

use super::context::{count, device};
use super::error::Named;
use super::{Pointer, Stream};
use crate::error::Result;

/// The device whose memory an address is in; `None` for host memory, pinned or not, and where there is no GPU.
pub fn device_of(pointer: Pointer) -> Result<Option<i32>> {
    if count().is_err() {
        return Ok(None);
    }
    let mut memory: u32 = 0;
    let mut ordinal: i32 = 0;
    let mut attributes = [
        CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
        CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
    ];
    let mut data: [*mut c_void; 2] = [(&raw mut memory).cast(), (&raw mut ordinal).cast()];
    let mut ask = || {
        // SAFETY: two attributes, with a place of the right size for each. An address that CUDA does not know gets zeros.
        unsafe { sys::cuPointerGetAttributes(2, attributes.as_mut_ptr(), data.as_mut_ptr(), pointer) }
    };
    let mut answer = ask();
    if answer == CUresult::CUDA_ERROR_INVALID_CONTEXT {
        let _entered = device(0)?.enter()?;
        answer = ask();
    }
    answer.result().named("cuPointerGetAttributes")?;
    Ok((memory == CUmemorytype::CU_MEMORYTYPE_DEVICE as u32).then_some(ordinal))
}

/// Copies device memory to the host, in the order of the stream, and waits for it. Not during a capture.
///
/// # Safety
/// `source` must be memory of the stream's device, of the size of `target`.
pub unsafe fn read(stream: &Stream, source: Pointer, target: &mut [f32]) -> Result<()> {
    let _entered = device(stream.device)?.enter()?;
    // SAFETY: the caller vouches for the source; the target is borrowed until the copy is done.
    unsafe {
        sys::cuMemcpyDtoHAsync_v2(
            target.as_mut_ptr().cast(),
            source,
            std::mem::size_of_val(target),
            stream.handle.cast(),
        )
    }
    .result()
    .named("cuMemcpyDtoHAsync")?;
    // SAFETY: a stream of this context.
    unsafe { sys::cuStreamSynchronize(stream.handle.cast()) }.result().named("cuStreamSynchronize")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_memory_is_of_no_device() {
        let values = [1f32; 4];
        assert_eq!(device_of(values.as_ptr() as Pointer).unwrap(), None);
        assert_eq!(device_of(0).unwrap(), None);
    }
}
