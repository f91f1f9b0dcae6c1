//! `PagedBuffer`: memory that the driver moves between host and device.

use std::ffi::{c_int, c_void};

use halfbyte::Error;
use halfbyte::device::cuda::{Managed, Stream, prefetch};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::errors::raise;

/// Managed memory, which holds anything at first; a writable buffer of bytes. Freed with the last user of the buffer.
#[pyclass(frozen, module = "halfbyte._native")]
pub(crate) struct PagedBuffer {
    memory: Managed,
    device: i32,
}

/// torch's current stream of a device.
fn current_stream(py: Python<'_>, device: i32) -> PyResult<Stream> {
    let handle: usize =
        py.import("torch")?.getattr("_C")?.call_method1("_cuda_getCurrentRawStream", (device,))?.extract()?;
    Ok(Stream { device, handle: handle as *mut c_void })
}

#[pymethods]
impl PagedBuffer {
    #[new]
    fn new(nbytes: usize, device: i32) -> PyResult<Self> {
        Ok(Self { memory: Managed::new(device, nbytes).map_err(raise)?, device })
    }

    /// Bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.memory.len()
    }

    /// Asks for the memory on its device, or with -1 on the host, by the time that the current stream gets there.
    fn prefetch(&self, py: Python<'_>, device: i32) -> PyResult<()> {
        if device != -1 && device != self.device {
            let expected = format!("{} or -1", self.device);
            return Err(raise(Error::Value { argument: "device", expected, got: device.to_string() }));
        }
        let stream = current_stream(py, self.device)?;
        // SAFETY: the whole of what was allocated.
        unsafe { prefetch(&stream, self.memory.address(), self.memory.len(), device == -1) }.map_err(raise)
    }

    #[expect(clippy::needless_pass_by_value, reason = "the signature is PyO3's")]
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view to fill"));
        }
        let address = slf.get().memory.address() as usize as *mut c_void;
        let len = slf.get().memory.len() as ffi::Py_ssize_t;
        // SAFETY: `view` is there to be filled; the memory lives as long as the object, to which the view gets a reference.
        let status = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), address, len, 0, flags) };
        if status == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}
