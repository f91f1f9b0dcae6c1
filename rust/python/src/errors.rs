//! Core errors to the exceptions of `halfbyte.errors`.

use halfbyte::Error;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

static CLASSES: PyOnceLock<Py<PyModule>> = PyOnceLock::new();

fn class_name(error: &Error) -> &'static str {
    match error {
        Error::Value { .. } => "ArgumentError",
        Error::Dtype { .. } => "DtypeError",
        Error::Shape { .. } => "ShapeError",
        Error::Device { .. } => "DeviceError",
        Error::Checkpoint { .. } => "CheckpointError",
        Error::File { .. } => "FileError",
        Error::CudaUnavailable { .. } => "CudaUnavailableError",
        Error::UnsupportedGpu { .. } => "UnsupportedGpuError",
        Error::Cuda { .. } => "CudaError",
        _ => "HalfbyteError",
    }
}

/// The Python exception for a core error.
#[expect(clippy::needless_pass_by_value, reason = "reads well in map_err")]
pub(crate) fn raise(error: Error) -> PyErr {
    Python::attach(|py| {
        let make = || -> PyResult<PyErr> {
            let module = CLASSES.get_or_try_init(py, || PyModule::import(py, "halfbyte.errors").map(Bound::unbind))?;
            let class = module.bind(py).getattr(class_name(&error))?.cast_into::<PyType>()?;
            Ok(PyErr::from_type(class, (error.to_string(),)))
        };
        make().unwrap_or_else(|failure| failure)
    })
}
