//! Checkpoints: `Conversion`, item by item, and `inspect_checkpoint`.

#![expect(clippy::needless_pass_by_value, reason = "what Python passes is ours to keep")]

use std::cell::RefCell;
use std::path::PathBuf;

use halfbyte::checkpoint::{
    Action, Conversion as Core, DequantizeOptions, Existing, Part, QuantizeOptions, Scheme, inspect,
};
use halfbyte::four_bit::{self, Spec};
use halfbyte::{Dtype, Error};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict};

use crate::dlpack::{Place, TensorRef};
use crate::errors::raise;
use crate::four_bit::parse_kind;

/// A conversion of a checkpoint: planned by one of its constructors, then driven by `next`, `convert` (or `read` and `write`) and
/// `finish`.
#[pyclass(module = "halfbyte._native", unsendable)]
pub(crate) struct Conversion {
    core: Core,
}

fn wrong(argument: &'static str, expected: &str, got: &str) -> PyErr {
    raise(Error::Value { argument, expected: expected.into(), got: format!("'{got}'") })
}

fn parse_dtype(argument: &'static str, name: Option<&str>) -> PyResult<Option<Dtype>> {
    let parse = |name| Dtype::from_name(name).ok_or_else(|| wrong(argument, "float32, float16 or bfloat16", name));
    name.map(parse).transpose()
}

fn parse_existing(name: &str) -> PyResult<Existing> {
    match name {
        "refuse" => Ok(Existing::Refuse),
        "resume" => Ok(Existing::Resume),
        "overwrite" => Ok(Existing::Overwrite),
        _ => Err(wrong("existing", "refuse, resume or overwrite", name)),
    }
}

/// A dtype of safetensors by torch's name, of those that parts have.
fn parse_stored(argument: &'static str, name: &str) -> PyResult<safetensors::Dtype> {
    use safetensors::Dtype as Stored;
    match name {
        "uint8" => Ok(Stored::U8),
        "int8" => Ok(Stored::I8),
        "float16" => Ok(Stored::F16),
        "bfloat16" => Ok(Stored::BF16),
        "float32" => Ok(Stored::F32),
        _ => Err(wrong(argument, "uint8, int8, float16, bfloat16 or float32", name)),
    }
}

#[pymethods]
impl Conversion {
    /// Plans to quantize. `skip` is called with the name of each module that would be quantized.
    #[staticmethod]
    #[pyo3(signature = (source, destination, scheme, *, double_quant, blocksize, scale_search, storage, dtype, compute_dtype, skip, stacked_experts, shard_size, existing, device))]
    fn quantize(
        py: Python<'_>,
        source: PathBuf,
        destination: PathBuf,
        scheme: &str,
        double_quant: bool,
        blocksize: usize,
        scale_search: bool,
        storage: &str,
        dtype: Option<&str>,
        compute_dtype: Option<&str>,
        skip: Py<PyAny>,
        stacked_experts: bool,
        shard_size: u64,
        existing: &str,
        device: &str,
    ) -> PyResult<Self> {
        let scheme = match scheme {
            "int8" => Scheme::Int8,
            kind => Scheme::FourBit(Spec { kind: parse_kind(kind).map_err(raise)?, block: blocksize, double_quant }),
        };
        let failure = RefCell::new(None);
        let skip = |name: &str| {
            let answer = skip.call1(py, (name,)).and_then(|answer| answer.is_truthy(py));
            answer.unwrap_or_else(|error| {
                failure.borrow_mut().get_or_insert(error);
                false
            })
        };
        let options = QuantizeOptions {
            scheme,
            scale_search,
            storage: parse_stored("storage", storage)?,
            dtype: parse_dtype("dtype", dtype)?,
            compute_dtype: parse_dtype("compute_dtype", compute_dtype)?,
            skip: &skip,
            stacked_experts,
            shard_size,
            existing: parse_existing(existing)?,
            device,
        };
        let core = Core::quantize(&source, &destination, &options).map_err(raise);
        failure.into_inner().map_or(Ok(()), Err)?;
        core.map(|core| Self { core })
    }

    /// Plans to decode.
    #[staticmethod]
    #[pyo3(signature = (source, destination, *, dtype, shard_size, existing))]
    fn dequantize(
        source: PathBuf,
        destination: PathBuf,
        dtype: Option<&str>,
        shard_size: u64,
        existing: &str,
    ) -> PyResult<Self> {
        let dtype = parse_dtype("dtype", dtype)?;
        let options = DequantizeOptions { dtype, shard_size, existing: parse_existing(existing)? };
        Core::dequantize(&source, &destination, &options).map(|core| Self { core }).map_err(raise)
    }

    /// Of each item its name, what is done (`keep`, `cast`, `quantize`, `dequantize`), the reason or the dtype, the shape, and bytes.
    fn items(&self) -> Vec<(String, &'static str, String, Vec<usize>, u64)> {
        let items = self.core.items().iter().map(|item| {
            let (action, detail) = match item.action {
                Action::Keep(why) => ("keep", why.to_string()),
                Action::Cast(why, _) => ("cast", why.to_string()),
                Action::Quantize { dtype, .. } => ("quantize", dtype.name().to_owned()),
                Action::Dequantize { dtype, .. } => ("dequantize", dtype.name().to_owned()),
                _ => unreachable!("there are no other actions"),
            };
            (item.name.clone(), action, detail, item.shape.clone(), item.bytes)
        });
        items.collect()
    }

    /// The number of the item to convert now, None after the last.
    fn next(&mut self, py: Python<'_>) -> PyResult<Option<usize>> {
        let core = &mut self.core;
        // Finishing a file waits for the disk.
        detached(py, || core.next())
    }

    /// Converts the item; `mean` is called with the scales as fp32 bytes where they are quantized in turn.
    fn convert(&mut self, py: Python<'_>, mean: Py<PyAny>) -> PyResult<()> {
        let failure = std::sync::Mutex::new(None);
        let offset = |scales: &[f32]| {
            Python::attach(|py| {
                let bytes: Vec<u8> = scales.iter().flat_map(|v| v.to_le_bytes()).collect();
                let answer = mean.call1(py, (PyBytes::new(py, &bytes),)).and_then(|mean| mean.extract::<f32>(py));
                answer.unwrap_or_else(|error| {
                    failure.lock().expect("nobody panics with it").get_or_insert(error);
                    four_bit::mean(scales)
                })
            })
        };
        let core = &mut self.core;
        let done = detached(py, || core.convert(&offset));
        failure.into_inner().expect("nobody panics with it").map_or(done, Err)
    }

    /// Reads the weight of the item into a CPU tensor of its dtype and size.
    fn read(&mut self, py: Python<'_>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let out = TensorRef::new("out", out)?;
        out.expect_place(Place::Cpu).map_err(raise)?;
        out.expect_contiguous().map_err(raise)?;
        out.expect_writable().map_err(raise)?;
        // SAFETY: it is on the host, contiguous and writable; the caller keeps others from it.
        let bytes = unsafe { out.bytes_mut() };
        let core = &mut self.core;
        detached(py, || core.read(bytes))
    }

    /// Writes what was made of the item: of each tensor its name below that of the weight, its dtype and its bytes.
    fn write(&mut self, py: Python<'_>, parts: Vec<(String, String, PyBackedBytes)>) -> PyResult<()> {
        let parts = parts
            .iter()
            .map(|(name, dtype, data)| Ok(Part { name, dtype: parse_stored("parts", dtype)?, data }))
            .collect::<PyResult<Vec<_>>>()?;
        let core = &mut self.core;
        detached(py, || core.write(&parts))
    }

    /// Writes small files, index and config: files with tensors, bytes read, bytes written.
    fn finish(&mut self, py: Python<'_>) -> PyResult<(usize, u64, u64)> {
        let core = &mut self.core;
        let summary = detached(py, || core.finish())?;
        Ok((summary.files, summary.bytes_read, summary.bytes_written))
    }
}

/// Runs work that waits for files or computes, with the GIL released.
fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T, Error> + Send) -> PyResult<T> {
    py.detach(work).map_err(raise)
}

/// What a checkpoint holds: a dict a weight.
#[pyfunction]
pub(crate) fn inspect_checkpoint(py: Python<'_>, path: PathBuf) -> PyResult<Vec<Bound<'_, PyDict>>> {
    let weights = detached(py, || inspect(&path))?;
    weights
        .iter()
        .map(|weight| {
            let entry = PyDict::new(py);
            entry.set_item("name", &weight.name)?;
            entry.set_item("scheme", &weight.scheme)?;
            entry.set_item("quantized", weight.is_quantized())?;
            entry.set_item("blocksize", weight.block)?;
            entry.set_item("double_quant", weight.double_quant)?;
            entry.set_item("shape", &weight.shape)?;
            entry.set_item("dtype", weight.dtype.map(Dtype::name))?;
            entry.set_item("elements", weight.elements)?;
            entry.set_item("bytes", weight.bytes)?;
            Ok(entry)
        })
        .collect()
}
