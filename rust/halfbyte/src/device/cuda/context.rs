//! Devices, their primary contexts, and the guard that makes one current for a call.

use std::ffi::c_int;
use std::sync::OnceLock;

use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{result, sys};

use super::Stream;
use super::error::Named;
use crate::error::{Error, Result};

/// More devices than any one machine shows a process.
pub(super) const MAX_DEVICES: usize = 64;

/// A GPU, with its primary context retained for the life of the process.
#[derive(Debug)]
pub struct Device {
    /// Its number.
    pub ordinal: i32,
    /// The name that the driver gives.
    pub name: String,
    /// Compute capability times ten: 90 for an H200.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that one block can ask for, in bytes.
    pub shared_memory: u32,
    context: Context,
}

#[derive(Debug, Clone, Copy)]
struct Context(sys::CUcontext);
// SAFETY: a context handle may be used from any thread; the driver locks.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// Initializes the driver once; the count of devices, or why there are none.
pub(super) fn count() -> Result<c_int> {
    static COUNT: OnceLock<Result<c_int>> = OnceLock::new();
    COUNT
        .get_or_init(|| {
            // SAFETY: looks for the library by name; its initializers are the driver's own.
            if !unsafe { sys::is_culib_present() } {
                let reason = "the CUDA driver (libcuda.so.1) was not found; install the NVIDIA driver, or use the CPU";
                return Err(Error::CudaUnavailable { reason: reason.into() });
            }
            let unavailable = |error: Error| Error::CudaUnavailable { reason: error.to_string() };
            result::init().named("cuInit").map_err(unavailable)?;
            let count = result::device::get_count().named("cuDeviceGetCount").map_err(unavailable)?;
            if count == 0 {
                return Err(Error::CudaUnavailable { reason: "the driver shows no GPU".into() });
            }
            Ok(count)
        })
        .clone()
}

/// Number of GPUs that this process sees.
pub fn device_count() -> Result<usize> {
    Ok(count()? as usize)
}

/// The CUDA version of the driver, times a thousand plus ten times the minor: 13000 for 13.0.
pub fn driver_version() -> Result<u32> {
    count()?;
    let mut version = 0;
    // SAFETY: the driver is there and initialized; the pointer lives through the call.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().named("cuDriverGetVersion")?;
    Ok(version as u32)
}

/// The device of this number, with its context retained at first use.
pub fn device(ordinal: i32) -> Result<&'static Device> {
    static DEVICES: [OnceLock<Device>; MAX_DEVICES] = [const { OnceLock::new() }; MAX_DEVICES];
    let slot = usize::try_from(ordinal).ok().and_then(|i| DEVICES.get(i));
    if let Some(device) = slot.and_then(OnceLock::get) {
        return Ok(device);
    }
    let count = count()?;
    let Some(slot) = slot.filter(|_| ordinal < count) else {
        return Err(Error::Device {
            argument: "device",
            expected: format!("a number below {}", count.min(MAX_DEVICES as c_int)),
            got: ordinal.to_string(),
        });
    };
    let opened = Device::open(ordinal)?;
    Ok(slot.get_or_init(|| opened))
}

/// The number of the capture that a stream is in; 0 for none. No two captures of a process have the same.
pub fn capture_of(stream: &Stream) -> Result<u64> {
    let _entered = device(stream.device)?.enter()?;
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let mut id = 0;
    // SAFETY: a query, which every driver has in this form; the pointers it may write through are given or null.
    unsafe {
        sys::cuStreamGetCaptureInfo_v2(
            stream.handle.cast(),
            &raw mut status,
            &raw mut id,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    }
    .result()
    .named("cuStreamGetCaptureInfo")?;
    Ok(if status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE { 0 } else { id })
}

impl Device {
    fn open(ordinal: i32) -> Result<Self> {
        let handle = result::device::get(ordinal).named("cuDeviceGet")?;
        let attribute = |which| {
            // SAFETY: `handle` is a device of this driver.
            unsafe { result::device::get_attribute(handle, which) }.named("cuDeviceGetAttribute").map(|v| v as u32)
        };
        let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok(Self {
            ordinal,
            name: result::device::get_name(handle).named("cuDeviceGetName")?,
            capability: major * 10 + minor,
            multiprocessors: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_memory: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            // SAFETY: never released, so that it outlives every handle made in it.
            context: Context(unsafe { result::primary_ctx::retain(handle) }.named("cuDevicePrimaryCtxRetain")?),
        })
    }

    /// Makes this device's context current until the guard is dropped; costs one driver query where it already is.
    pub(super) fn enter(&self) -> Result<Entered> {
        let current = result::ctx::get_current().named("cuCtxGetCurrent")?;
        if current == Some(self.context.0) {
            return Ok(Entered { pushed: false });
        }
        // SAFETY: a context that stays retained.
        unsafe { sys::cuCtxPushCurrent_v2(self.context.0) }.result().named("cuCtxPushCurrent")?;
        Ok(Entered { pushed: true })
    }
}

/// Puts the caller's context back.
pub(super) struct Entered {
    pushed: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: pops what `enter` pushed on this thread. There is nothing to do about a failure here.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
        }
    }
}
