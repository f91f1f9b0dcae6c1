//! What this build is, and what it found: for `halfbyte doctor` and bug reports.

use halfbyte::device::cpu;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Threads that CPU operations use from now on: as many as this, torch's own where possible.
#[pyfunction]
pub(crate) fn set_num_threads(threads: usize) {
    crate::openmp::share_threads();
    cpu::set_threads(threads);
}

/// The SIMD level in use.
#[pyfunction]
pub(crate) fn simd_level() -> &'static str {
    cpu::level().name()
}

/// The SIMD levels that this processor has, lowest first.
#[pyfunction]
pub(crate) fn simd_levels() -> Vec<&'static str> {
    cpu::available_levels().into_iter().map(cpu::Level::name).collect()
}

/// Version, build profile and features.
#[pyfunction]
pub(crate) fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    info.set_item("cuda", cfg!(feature = "cuda"))?;
    info.set_item("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS))?;
    Ok(info)
}

/// Driver version, devices and the kernel image each would use. Raises `CudaUnavailableError` where there is none.
#[pyfunction]
pub(crate) fn cuda_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    #[cfg(not(feature = "cuda"))]
    return Err({
        let _ = py;
        crate::errors::raise(crate::no_cuda())
    });
    #[cfg(feature = "cuda")]
    {
        use crate::errors::raise;
        use halfbyte::device::cuda;
        let info = PyDict::new(py);
        let version = cuda::driver_version().map_err(raise)?;
        info.set_item("driver_cuda", format!("{}.{}", version / 1000, version % 1000 / 10))?;
        let mut devices = Vec::new();
        for ordinal in 0..cuda::device_count().map_err(raise)? {
            let device = cuda::device(ordinal as i32).map_err(raise)?;
            let entry = PyDict::new(py);
            entry.set_item("name", &device.name)?;
            entry.set_item("capability", format!("{}.{}", device.capability / 10, device.capability % 10))?;
            entry.set_item("multiprocessors", device.multiprocessors)?;
            entry.set_item("shared_memory", device.shared_memory)?;
            let images = PyDict::new(py);
            for (family, image) in cuda::images_for(device.capability) {
                images.set_item(family, image)?;
            }
            entry.set_item("images", images)?;
            devices.push(entry);
        }
        info.set_item("devices", devices)?;
        Ok(info)
    }
}

/// Family, entry and whether it is loaded, of every kernel that there is an image of for a device.
#[pyfunction]
pub(crate) fn cuda_kernels(device: i32) -> PyResult<Vec<(&'static str, &'static str, bool)>> {
    #[cfg(not(feature = "cuda"))]
    return Err({
        let _ = device;
        crate::errors::raise(crate::no_cuda())
    });
    #[cfg(feature = "cuda")]
    {
        use halfbyte::device::cuda;
        let gpu = cuda::device(device).map_err(crate::errors::raise)?;
        let images = cuda::images_for(gpu.capability);
        let served = |family: &str| images.iter().any(|(name, image)| *name == family && image.is_some());
        let all = [
            halfbyte::four_bit::cuda::kernels(),
            halfbyte::eight_bit::cuda::kernels(),
            halfbyte::int8::cuda::kernels(),
            halfbyte::optim::cuda::kernels(),
        ];
        let kernels = all.into_iter().flatten().map(|kernel| (kernel.name(), kernel.is_loaded(gpu)));
        Ok(kernels.filter(|((family, _), _)| served(family)).map(|((f, entry), loaded)| (f, entry, loaded)).collect())
    }
}
