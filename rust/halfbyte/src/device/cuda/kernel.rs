//! Kernels by name: the image for a GPU is chosen and loaded at first use, and a launch is one driver call.

use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

use cudarc::driver::{result, sys};
use halfbyte_kernels::{IMAGES, Image};

use super::context::{Device, MAX_DEVICES, device};
use super::error::Named;
use super::{Pointer, Stream};
use crate::error::{Error, Result};

/// One entry of an image family, with its handle for each device.
#[derive(Debug)]
pub struct Kernel {
    family: &'static str,
    entry: &'static str,
    handles: [AtomicPtr<sys::CUfunc_st>; MAX_DEVICES],
    /// Blocks that a multiprocessor holds, for [`Kernel::filling`]; 0 where not asked yet.
    resident: [AtomicU32; MAX_DEVICES],
}

/// Threads a block of most kernels that go over their data once.
pub const THREADS: u32 = 256;

/// Grid, block, dynamic shared memory and attributes of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x and y.
    pub grid: (u32, u32),
    /// Threads a block.
    pub threads: u32,
    /// Dynamic shared memory, in bytes.
    pub shared: u32,
    /// Blocks in x that form a cluster (compute capability 9.0); 1 for none.
    pub cluster: u32,
    /// Programmatic dependent launch (compute capability 9.0): the kernel may start while the one before it on the stream ends,
    /// and must execute `griddepcontrol.wait` in every thread before it reads or writes what that one or an earlier one touches.
    pub programmatic: bool,
}

impl Launch {
    /// A launch without dynamic shared memory or attributes.
    pub const fn new(grid: (u32, u32), threads: u32) -> Self {
        Self { grid, threads, shared: 0, cluster: 1, programmatic: false }
    }
}

/// Most arguments of a kernel.
const MOST_ARGUMENTS: usize = 40;

/// Arguments of a launch, gathered on the stack.
#[derive(Debug)]
#[repr(align(64))] // what a tensor map by value needs
pub struct Arguments {
    words: [u64; 128],
    /// Where each argument begins.
    starts: [u8; MOST_ARGUMENTS],
    len: usize,
    used: usize,
}

impl Default for Arguments {
    #[inline]
    fn default() -> Self {
        Self { words: [0; 128], starts: [0; MOST_ARGUMENTS], len: 0, used: 0 }
    }
}

impl Arguments {
    /// Adds a pointer or a 64-bit number.
    #[inline]
    #[must_use]
    pub fn u64(mut self, value: Pointer) -> Self {
        self.words[self.used] = value;
        self.starts[self.len] = self.used as u8;
        self.len += 1;
        self.used += 1;
        self
    }

    /// Adds a struct of 64-bit words by value, at a multiple of 64 bytes: a tensor map, or a table of pointers.
    #[inline]
    #[must_use]
    pub fn block(mut self, words: &[u64]) -> Self {
        let at = self.used.next_multiple_of(8);
        self.words[at..at + words.len()].copy_from_slice(words);
        self.starts[self.len] = at as u8;
        self.len += 1;
        self.used = at + words.len();
        self
    }

    /// Adds a 32-bit number. (The machine is little-endian, so that its first four bytes are the value.)
    #[inline]
    #[must_use]
    pub fn u32(self, value: u32) -> Self {
        self.u64(u64::from(value))
    }
}

/// The newest image of a family that a GPU of this capability can run: an architecture-specific one of exactly its
/// capability first, then the highest that is not above it.
fn choose(family: &str, capability: u32) -> Option<&'static Image> {
    IMAGES
        .iter()
        .filter(|image| image.family == family)
        .filter(|image| if image.specific { image.capability == capability } else { image.capability <= capability })
        .max_by_key(|image| (image.specific, image.capability))
}

/// A loaded module: a handle that any thread may use.
#[derive(Clone, Copy)]
struct Module(sys::CUmodule);
// SAFETY: module handles are usable from any thread; the driver locks.
unsafe impl Send for Module {}

impl Kernel {
    /// A kernel by its family and entry name, which must be that of an entry in every image of the family.
    pub const fn new(family: &'static str, entry: &'static str) -> Self {
        Self {
            family,
            entry,
            handles: [const { AtomicPtr::new(std::ptr::null_mut()) }; MAX_DEVICES],
            resident: [const { AtomicU32::new(0) }; MAX_DEVICES],
        }
    }

    /// A launch of a block of [`THREADS`] threads for each of `blocks` blocks' worth of work: what light kernels want, whose
    /// blocks cost little to start and end at different times anyway.
    pub fn spread(blocks: u64) -> Launch {
        Launch::new((blocks.clamp(1, i32::MAX as u64) as u32, 1), THREADS)
    }

    /// The launch of a kernel whose blocks of `threads` threads with `shared` bytes of dynamic shared memory stride over `blocks`
    /// blocks' worth of work: as many as run at once, so that all of them end together. The two are the same in all calls of a
    /// kernel.
    pub fn filling(&self, ordinal: i32, blocks: u64, threads: u32, shared: u32) -> Result<Launch> {
        let device = device(ordinal)?;
        let slot = &self.resident[ordinal as usize];
        let mut resident = slot.load(Ordering::Relaxed);
        if resident == 0 {
            let _entered = device.enter()?;
            let handle = self.handle(device)?;
            // SAFETY: a function of a loaded module.
            resident = unsafe {
                result::occupancy::max_active_block_per_multiprocessor(handle, threads as i32, shared as usize)
            }
            .named("cuOccupancyMaxActiveBlocksPerMultiprocessor")?
            .max(1) as u32;
            slot.store(resident, Ordering::Relaxed);
        }
        let most = u64::from(device.multiprocessors * resident);
        Ok(Launch { shared, ..Launch::new((blocks.clamp(1, most) as u32, 1), threads) })
    }

    /// Family and entry name.
    pub fn name(&self) -> (&'static str, &'static str) {
        (self.family, self.entry)
    }

    /// Loads the kernel's image for a device now, so that the first launch does not.
    pub fn load(&self, ordinal: i32) -> Result<()> {
        let device = device(ordinal)?;
        let _entered = device.enter()?;
        self.handle(device).map(drop)
    }

    /// Whether a device has it already: because of a launch, or of [`Kernel::load`].
    pub fn is_loaded(&self, device: &Device) -> bool {
        !self.handles[device.ordinal as usize].load(Ordering::Acquire).is_null()
    }

    fn handle(&self, device: &Device) -> Result<sys::CUfunction> {
        let slot = &self.handles[device.ordinal as usize];
        let handle = slot.load(Ordering::Acquire);
        if !handle.is_null() {
            return Ok(handle);
        }
        let handle = self.find(device)?;
        slot.store(handle, Ordering::Release);
        Ok(handle)
    }

    #[cold]
    fn find(&self, device: &Device) -> Result<sys::CUfunction> {
        let image = choose(self.family, device.capability).ok_or_else(|| Error::UnsupportedGpu {
            reason: format!(
                "{} has compute capability {}.{}; kernels `{}` need {} or newer",
                device.name,
                device.capability / 10,
                device.capability % 10,
                self.family,
                IMAGES.iter().filter(|i| i.family == self.family).map(|i| i.capability).min().unwrap_or(0),
            ),
        })?;
        let module = module(device, image)?;
        let entry = CString::new(self.entry).expect("entry names have no NUL");
        // SAFETY: the module is loaded and never unloaded.
        let handle = unsafe { result::module::get_function(module.0, entry) }.named("cuModuleGetFunction")?;
        // Blocks may use all the shared memory that the device gives; what a launch asks for is in the launch.
        let attribute = |which| {
            // SAFETY: `handle` is a function of a loaded module.
            unsafe { result::function::get_function_attribute(handle, which) }.named("cuFuncGetAttribute")
        };
        let fixed = attribute(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let dynamic = device.shared_memory as i32 - fixed;
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: as above.
        unsafe { result::function::set_function_attribute(handle, most, dynamic) }.named("cuFuncSetAttribute")?;
        Ok(handle)
    }

    /// Launches on a stream. Returns at once; errors of the kernel itself surface in a later call, as with all of CUDA.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, in order, and every pointer valid for what the kernel reads and writes until
    /// the stream has passed the launch.
    #[inline]
    pub unsafe fn launch(&self, stream: &Stream, launch: Launch, arguments: &mut Arguments) -> Result<()> {
        let mut pointers = [std::ptr::null_mut::<c_void>(); MOST_ARGUMENTS];
        for (pointer, start) in pointers.iter_mut().zip(&arguments.starts[..arguments.len]) {
            *pointer = std::ptr::from_mut(&mut arguments.words[usize::from(*start)]).cast();
        }
        // SAFETY: the caller's promise; the arguments outlive the call.
        unsafe { self.launch_pointers(stream, launch, &mut pointers[..arguments.len]) }
    }

    /// As [`Kernel::launch`], with a pointer to each argument.
    ///
    /// # Safety
    /// As [`Kernel::launch`], and the arguments must be there to read until this returns.
    #[inline]
    pub unsafe fn launch_pointers(&self, stream: &Stream, launch: Launch, pointers: &mut [*mut c_void]) -> Result<()> {
        let device = device(stream.device)?;
        let _entered = device.enter()?;
        let handle = self.handle(device)?;
        if launch.cluster > 1 || launch.programmatic {
            // SAFETY: the handle is of a loaded module; the caller vouches for the arguments.
            return unsafe { launch_with_attributes(handle, stream, launch, pointers) };
        }
        // SAFETY: as above.
        unsafe {
            result::launch_kernel(
                handle,
                (launch.grid.0, launch.grid.1, 1),
                (launch.threads, 1, 1),
                launch.shared,
                stream.handle.cast(),
                pointers,
            )
        }
        .named("cuLaunchKernel")
    }
}

/// # Safety
/// As [`Kernel::launch`]; the pointers are those of the arguments.
unsafe fn launch_with_attributes(
    handle: sys::CUfunction,
    stream: &Stream,
    launch: Launch,
    pointers: &mut [*mut c_void],
) -> Result<()> {
    use sys::CUlaunchAttributeID as Id;
    let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
    let cluster = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: launch.cluster, y: 1, z: 1 };
    let mut attributes = [
        attribute(
            Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: i32::from(launch.programmatic) },
        ),
        attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, sys::CUlaunchAttributeValue { clusterDim: cluster }),
    ];
    let config = sys::CUlaunchConfig {
        gridDimX: launch.grid.0,
        gridDimY: launch.grid.1,
        gridDimZ: 1,
        blockDimX: launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared,
        hStream: stream.handle.cast(),
        attrs: attributes.as_mut_ptr(),
        // The cluster is last, so that a launch without one leaves it away.
        numAttrs: 1 + u32::from(launch.cluster > 1),
    };
    // SAFETY: the handle is of a loaded module; the caller vouches for the arguments.
    unsafe { sys::cuLaunchKernelEx(&raw const config, handle, pointers.as_mut_ptr(), std::ptr::null_mut()) }
        .result()
        .named("cuLaunchKernelEx")
}

/// The image's module in the current context of `device`, loaded (and compiled by the driver) once.
fn module(device: &Device, image: &'static Image) -> Result<Module> {
    type Loaded = Vec<(i32, *const Image, Module)>;
    struct Table(Mutex<Loaded>);
    // SAFETY: the image pointers are to statics and only compared.
    unsafe impl Sync for Table {}
    // SAFETY: as above.
    unsafe impl Send for Table {}
    static MODULES: OnceLock<Table> = OnceLock::new();

    let table = MODULES.get_or_init(|| Table(Mutex::new(Vec::new())));
    let mut loaded = table.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let found = loaded.iter().find(|(ordinal, at, _)| *ordinal == device.ordinal && std::ptr::eq(*at, image));
    if let Some((_, _, module)) = found {
        return Ok(*module);
    }
    let module = Module(load(device, image)?);
    loaded.push((device.ordinal, std::ptr::from_ref(image), module));
    Ok(module)
}

/// Loads PTX. Allowed while another stream of this thread is being captured: loading does not touch the captured stream.
fn load(device: &Device, image: &Image) -> Result<sys::CUmodule> {
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: swaps this thread's capture mode with `mode`.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }
        .result()
        .named("cuThreadExchangeStreamCaptureMode")?;
    // SAFETY: PTX text that ends in NUL, static.
    let module = unsafe { result::module::load_data(image.ptx.as_ptr().cast()) };
    // SAFETY: puts the mode back.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }
        .result()
        .named("cuThreadExchangeStreamCaptureMode")?;
    module.map_err(|error| {
        use sys::CUresult::{CUDA_ERROR_INVALID_PTX, CUDA_ERROR_NO_BINARY_FOR_GPU, CUDA_ERROR_UNSUPPORTED_PTX_VERSION};
        let help = match error.0 {
            CUDA_ERROR_UNSUPPORTED_PTX_VERSION => "the driver is older than the image: update the NVIDIA driver",
            CUDA_ERROR_NO_BINARY_FOR_GPU | CUDA_ERROR_INVALID_PTX => "the driver's compiler refuses it for this GPU",
            _ => return Err::<(), _>(error).named("cuModuleLoadData").expect_err("made from an error"),
        };
        Error::UnsupportedGpu {
            reason: format!(
                "image `{}` (compute_{}, PTX {}) does not load on {} (compute capability {}.{}): {help}",
                image.family,
                image.capability,
                image.ptx_version,
                device.name,
                device.capability / 10,
                device.capability % 10
            ),
        }
    })
}

/// For each family of kernels the image that a device would use, as `compute_90`, or `None`.
pub fn images_for(capability: u32) -> Vec<(&'static str, Option<String>)> {
    let mut families: Vec<&'static str> = IMAGES.iter().map(|image| image.family).collect();
    families.sort_unstable();
    families.dedup();
    families
        .into_iter()
        .map(|family| {
            let image = choose(family, capability);
            (family, image.map(|i| format!("compute_{}{}", i.capability, if i.specific { "a" } else { "" })))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_image_that_fits_is_chosen() {
        for (family, image) in images_for(90) {
            assert!(image.is_some(), "{family}");
        }
        for (family, image) in images_for(70) {
            assert!(image.is_none(), "{family}: {image:?}");
        }
        // A GPU newer than any image runs the newest one that is not architecture-specific, where there is one.
        for (family, image) in images_for(999) {
            let general = IMAGES.iter().any(|i| i.family == family && !i.specific);
            assert_eq!(image.is_some(), general, "{family}: {image:?}");
            assert!(image.is_none_or(|i| !i.ends_with('a')), "{family}");
        }
    }
}
