//! Memory that the driver moves between host and device: allocated, asked for ahead of use, freed.

use std::ffi::c_int;

use cudarc::driver::sys;

use super::context::device;
use super::error::Named;
use super::{Pointer, Stream};
use crate::error::{Error, Result};

/// Managed memory, which holds anything at first. Freed when dropped, which waits for the device.
#[derive(Debug)]
pub struct Managed {
    address: Pointer,
    bytes: usize,
    device: i32,
}

impl Managed {
    /// Allocates `bytes` for a device; its pages come to be where they are first touched.
    pub fn new(device: i32, bytes: usize) -> Result<Self> {
        let _entered = super::context::device(device)?.enter()?;
        let mut address = 0;
        let flags = sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL as u32;
        // SAFETY: the pointer to write to lives through the call; a size of zero is refused by the driver, so it is never asked for.
        unsafe { sys::cuMemAllocManaged(&raw mut address, bytes.max(1), flags) }.result().named("cuMemAllocManaged")?;
        Ok(Self { address, bytes, device })
    }

    /// Where it begins, on the host and on every device.
    pub fn address(&self) -> Pointer {
        self.address
    }

    /// How long it is.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl Drop for Managed {
    fn drop(&mut self) {
        if let Ok(_entered) = device(self.device).and_then(super::Device::enter) {
            // SAFETY: allocated by `zeroed` and freed only here. There is nothing to do about a failure.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// Asks for `bytes` of managed memory on a device, or on the host, by the time that the stream gets there.
///
/// # Safety
/// The range must be managed memory.
pub unsafe fn prefetch(stream: &Stream, address: Pointer, bytes: usize, to_host: bool) -> Result<()> {
    const HOST: c_int = -1; // CU_DEVICE_CPU
    if bytes == 0 {
        return Ok(());
    }
    let _entered = device(stream.device)?.enter()?;
    let target = if to_host { HOST } else { stream.device };
    // SAFETY: the caller's promise.
    unsafe { sys::cuMemPrefetchAsync(address, bytes, target, stream.handle.cast()) }
        .result()
        .named("cuMemPrefetchAsync")
}

/// Bytes free on a device, and all.
pub fn memory_left(ordinal: i32) -> Result<(usize, usize)> {
    let _entered = device(ordinal)?.enter()?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: both pointers live through the call.
    unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }.result().named("cuMemGetInfo")?;
    Ok((free, total))
}

/// Whether kernels of a device can use host memory at an address: managed, or page-locked and mapped at the same address.
pub fn is_reachable(ordinal: i32, address: Pointer) -> Result<bool> {
    use sys::CUpointer_attribute as Attribute;
    let _entered = device(ordinal)?.enter()?;
    let (mut managed, mut mapped) = (0u32, 0u64);
    // SAFETY: each pointer is to what the attribute is, and lives through its call. Memory that the driver does not know is an
    // error of these calls, and the answer then is no.
    let (is_known, is_mapped) = unsafe {
        (
            sys::cuPointerGetAttribute((&raw mut managed).cast(), Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED, address)
                .result()
                .is_ok(),
            sys::cuPointerGetAttribute(
                (&raw mut mapped).cast(),
                Attribute::CU_POINTER_ATTRIBUTE_DEVICE_POINTER,
                address,
            )
            .result()
            .is_ok(),
        )
    };
    Ok((is_known && managed != 0) || (is_mapped && mapped == address))
}

/// Whether memory at an address is a device's own, which it stays: neither managed nor the host's.
pub fn is_resident(ordinal: i32, address: Pointer) -> Result<bool> {
    use sys::CUpointer_attribute as Attribute;
    let _entered = device(ordinal)?.enter()?;
    let (mut kind, mut managed) = (0u32, 0u32);
    let mut names = [Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED];
    let mut values = [(&raw mut kind).cast(), (&raw mut managed).cast()];
    // SAFETY: two attributes, and pointers to what they are, which live through the call. Of memory that the driver does not know it
    // says nothing: zeros, of which the first is no type of memory.
    let known =
        unsafe { sys::cuPointerGetAttributes(2, names.as_mut_ptr(), values.as_mut_ptr(), address) }.result().is_ok();
    Ok(known && kind == sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32 && managed == 0)
}

/// An error that names the argument, for memory that a device cannot use.
pub fn check_reachable(argument: &'static str, ordinal: i32, address: Pointer) -> Result<()> {
    if is_reachable(ordinal, address)? {
        return Ok(());
    }
    let expected = format!("cuda:{ordinal}, or managed or page-locked memory");
    Err(Error::Device { argument, expected, got: "ordinary host memory".into() })
}
