//! The product of a token: all that one eager `matmul_4bit` or `Linear4bit` needs, in one call from Python.
//!
//! At one row the product takes about as long on the GPU as Python needs to ask for it, so nothing is done twice here and
//! nothing through torch's dispatcher. Whatever is not the plain case (a gradient, a cast, a mode, a tracer, another type of
//! tensor, arguments that do not fit) gives `None`, before anything is written: the general way in Python takes it, and either
//! works or raises an error that says why.

use halfbyte::Dtype;
use pyo3::exceptions::{PyException, PyTypeError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString, PyTuple};

use crate::dlpack::{ElementKind, Place, TensorRef};
use crate::errors::raise;
#[cfg(feature = "cuda")]
use crate::four_bit::dequantize;
use crate::four_bit::{Scales, matmul, parse_kind};

/// What is used of torch: found once, as every look-up would cost what a tensor's whole check costs.
pub(crate) struct Torch {
    pub(crate) tensor: Py<PyAny>,
    dtypes: [Py<PyAny>; 3],
    grad_enabled: Py<PyAny>,
    tracing_state: Py<PyAny>,
    /// Functions without arguments; a true result of any means that somebody watches or changes what operations do.
    watchers: [Py<PyAny>; 2],
    /// Of `torch.autograd.forward_ad`, whose `_current_level` is −1 where no tensor can have a tangent.
    forward_ad: Py<PyDict>,
    any_autocast: Py<PyAny>,
    autocast_enabled: Py<PyAny>,
    autocast_dtype: Py<PyAny>,
    num_threads: Py<PyAny>,
    #[cfg(feature = "cuda")]
    linear: Py<PyAny>,
    module: Py<PyAny>,
    /// `nn.Module.__call__`, and the hooks that it runs for every module.
    module_call: Py<PyAny>,
    global_hooks: [Py<PyAny>; 4],
    /// Allocators past the dispatcher, which is most of what an allocation costs: (sizes, strides, dtype) to a tensor, on the
    /// current device. Missing where torch does not have them.
    empty_cpu: Option<Py<PyAny>>,
    empty_cuda: Option<Py<PyAny>>,
}

impl Torch {
    pub(crate) fn get(py: Python<'_>) -> PyResult<&'static Self> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let inner = torch.getattr("_C")?;
            let modules = py.import("torch.nn.modules.module")?.into_any();
            let find = |module: &Bound<'_, PyAny>, name| module.getattr(name).map(Bound::unbind);
            let guards = inner.getattr("_dynamo").and_then(|dynamo| dynamo.getattr("guards"));
            let allocator = |name| guards.as_ref().ok().and_then(|guards| find(guards, name).ok());
            Ok(Self {
                tensor: find(&torch, "Tensor")?,
                dtypes: [find(&torch, "float32")?, find(&torch, "float16")?, find(&torch, "bfloat16")?],
                grad_enabled: find(&torch, "is_grad_enabled")?,
                tracing_state: find(&inner, "_get_tracing_state")?,
                watchers: [
                    find(&inner, "_len_torch_dispatch_stack")?,
                    find(&inner, "_are_functorch_transforms_active")?,
                ],
                forward_ad: py.import("torch.autograd.forward_ad")?.dict().unbind(),
                any_autocast: find(&inner, "_is_any_autocast_enabled")?,
                autocast_enabled: find(&torch, "is_autocast_enabled")?,
                autocast_dtype: find(&torch, "get_autocast_dtype")?,
                num_threads: find(&torch, "get_num_threads")?,
                #[cfg(feature = "cuda")]
                linear: find(&inner.getattr("_nn")?, "linear")?,
                module: find(&modules, "Module")?,
                module_call: find(&modules.getattr("Module")?, "_wrapped_call_impl")?,
                global_hooks: [
                    find(&modules, "_global_backward_pre_hooks")?,
                    find(&modules, "_global_backward_hooks")?,
                    find(&modules, "_global_forward_hooks")?,
                    find(&modules, "_global_forward_pre_hooks")?,
                ],
                empty_cpu: allocator("_empty_strided_cpu"),
                empty_cuda: allocator("_empty_strided_cuda"),
            })
        })
    }

    fn dtype<'py>(&self, py: Python<'py>, dtype: Dtype) -> &Bound<'py, PyAny> {
        let place = match dtype {
            Dtype::F32 => 0,
            Dtype::F16 => 1,
            Dtype::Bf16 => 2,
        };
        self.dtypes[place].bind(py)
    }

    /// Whether this thread runs operations as they are, and no gradient is wanted of `x` and `bias`.
    pub(crate) fn is_plain(&self, x: &Bound<'_, PyAny>, bias: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        let py = x.py();
        for watcher in &self.watchers {
            if watcher.bind(py).call0()?.is_truthy()? {
                return Ok(false);
            }
        }
        if !self.tracing_state.bind(py).call0()?.is_none() {
            return Ok(false);
        }
        let level = self.forward_ad.bind(py).get_item(intern!(py, "_current_level"))?;
        if !level.is_some_and(|level| level.extract::<i64>().is_ok_and(|level| level < 0)) {
            return Ok(false);
        }
        if !self.grad_enabled.bind(py).call0()?.is_truthy()? {
            return Ok(true);
        }
        let wants = |tensor: &Bound<'_, PyAny>| tensor.getattr(intern!(py, "requires_grad"))?.is_truthy();
        Ok(!wants(x)? && !bias.map(wants).transpose()?.unwrap_or(false))
    }

    /// What autocast would cast to at a place; `None` where it is off.
    pub(crate) fn autocast<'py>(&self, py: Python<'py>, place: Place) -> PyResult<Option<Bound<'py, PyAny>>> {
        if !self.any_autocast.bind(py).call0()?.is_truthy()? {
            return Ok(None);
        }
        let kind = match place {
            Place::Cpu => intern!(py, "cpu"),
            Place::Cuda(_) => intern!(py, "cuda"),
        };
        let enabled = self.autocast_enabled.bind(py).call1((kind,))?.is_truthy()?;
        enabled.then(|| self.autocast_dtype.bind(py).call1((kind,))).transpose()
    }

    /// A new tensor [`rows`…, `columns`] for the kind of `like`, whose type and place are given; and what is in it.
    pub(crate) fn empty<'py>(
        &self,
        like: &Bound<'py, PyAny>,
        (dtype, place): (Dtype, Place),
        rows: &[i64],
        columns: usize,
    ) -> PyResult<(Bound<'py, PyAny>, TensorRef)> {
        const MOST: usize = 8;
        let py = like.py();
        let dimensions = rows.len() + 1;
        if dimensions > MOST {
            return Err(not_plain());
        }
        let mut sizes = [columns as i64; MOST];
        sizes[..rows.len()].copy_from_slice(rows);
        let shape = PyTuple::new(py, &sizes[..dimensions])?;
        let allocator = match place {
            Place::Cpu => &self.empty_cpu,
            Place::Cuda(_) => &self.empty_cuda,
        };
        if let Some(allocator) = allocator {
            let mut strides = [1; MOST];
            for i in (0..rows.len()).rev() {
                strides[i] = sizes[i + 1].max(1).saturating_mul(strides[i + 1]);
            }
            let strides = PyTuple::new(py, &strides[..dimensions])?;
            let made = allocator.bind(py).call1((&shape, strides, self.dtype(py, dtype)))?;
            let view = TensorRef::plain("out", &made)?;
            // It is on the current device, which need not be that of `like`.
            if view.place().is_ok_and(|found| found == place) {
                return Ok((made, view));
            }
        }
        let made = like.call_method1(intern!(py, "new_empty"), (shape,))?;
        let view = TensorRef::plain("out", &made)?;
        Ok((made, view))
    }

    /// Whether calling a layer comes to no more than calling `forward`, which its class still has: no hooks of its own or of
    /// everybody, not compiled, no other `forward` put over it, nobody in the place of `nn.Module.__call__`.
    pub(crate) fn calls_forward(&self, layer: &Bound<'_, PyAny>, forward: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = layer.py();
        let fields = attributes(layer)?;
        let none_there = |hooks: &Bound<'_, PyAny>| Ok::<_, PyErr>(hooks.cast::<PyDict>()?.is_empty());
        let own = [
            intern!(py, "_backward_hooks"),
            intern!(py, "_backward_pre_hooks"),
            intern!(py, "_forward_hooks"),
            intern!(py, "_forward_pre_hooks"),
        ];
        for name in own {
            if !none_there(&entry(&fields, name)?)? {
                return Ok(false);
            }
        }
        for hooks in &self.global_hooks {
            if !none_there(hooks.bind(py))? {
                return Ok(false);
            }
        }
        // Each of these is absent or None unless somebody is between the call and the class's own forward.
        for name in [intern!(py, "forward"), intern!(py, "_compiled_call_impl"), intern!(py, "_siblings")] {
            if fields.get_item(name)?.is_some_and(|value| !value.is_none()) {
                return Ok(false);
            }
        }
        Ok(layer.get_type().getattr(intern!(py, "forward"))?.is(forward)
            && self.module.bind(py).getattr(intern!(py, "__call__"))?.is(&self.module_call))
    }
}

/// An object's own attributes.
pub(crate) fn attributes<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyDict>> {
    // SAFETY: returns a new reference to the dict of an object that has one, or null with an exception set.
    let dict = unsafe {
        Bound::from_owned_ptr_or_err(object.py(), ffi::PyObject_GenericGetDict(object.as_ptr(), std::ptr::null_mut()))
    }?;
    Ok(dict.cast_into::<PyDict>()?)
}

/// What there is no plain way for. Never seen by anybody.
pub(crate) fn not_plain() -> PyErr {
    PyTypeError::new_err("not the plain case")
}

/// Entry of an object's attributes.
pub(crate) fn entry<'py>(fields: &Bound<'py, PyDict>, name: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
    fields.get_item(name)?.ok_or_else(not_plain)
}

/// What nested scales are made of beside their codes.
struct Inner<'py> {
    absmax: Bound<'py, PyAny>,
    code: Bound<'py, PyAny>,
    offset: Bound<'py, PyAny>,
    blocksize: usize,
}

/// A weight's `QuantState`, read once.
struct State<'py> {
    shape: (usize, usize),
    kind: halfbyte::Kind,
    blocksize: usize,
    absmax: Bound<'py, PyAny>,
    nested: Option<Inner<'py>>,
}

impl<'py> State<'py> {
    fn read(state: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = state.py();
        let fields = attributes(state)?;
        let shape = entry(&fields, intern!(py, "shape"))?;
        let shape = shape.cast::<PyTuple>()?;
        if shape.len() != 2 {
            return Err(not_plain());
        }
        let quant_type = entry(&fields, intern!(py, "quant_type"))?;
        let inner = entry(&fields, intern!(py, "state2"))?;
        let nested = if inner.is_none() || !entry(&fields, intern!(py, "nested"))?.is_truthy()? {
            None
        } else {
            let inner = attributes(&inner)?;
            Some(Inner {
                absmax: entry(&inner, intern!(py, "absmax"))?,
                code: entry(&inner, intern!(py, "code"))?,
                offset: entry(&fields, intern!(py, "offset"))?,
                blocksize: entry(&inner, intern!(py, "blocksize"))?.extract()?,
            })
        };
        Ok(Self {
            shape: (shape.get_borrowed_item(0)?.extract()?, shape.get_borrowed_item(1)?.extract()?),
            kind: parse_kind(quant_type.extract()?).map_err(raise)?,
            blocksize: entry(&fields, intern!(py, "blocksize"))?.extract()?,
            absmax: entry(&fields, intern!(py, "absmax"))?,
            nested,
        })
    }

    fn scales(&self) -> PyResult<Scales> {
        let nested = match &self.nested {
            None => None,
            Some(inner) => Some((
                TensorRef::plain("nested_absmax", &inner.absmax)?,
                TensorRef::plain("nested_code", &inner.code)?,
                TensorRef::plain("nested_offset", &inner.offset)?,
                inner.blocksize,
            )),
        };
        Ok(Scales { absmax: TensorRef::plain("absmax", &self.absmax)?, nested })
    }
}

/// What the product is to be computed in.
#[derive(Clone, Copy)]
enum Compute<'a, 'py> {
    /// Autocast's dtype where that is on, else that of `x`.
    Input,
    /// Autocast's dtype where that is on, else this one.
    Settled(&'a Bound<'py, PyAny>),
    /// Autocast's dtype where that is on; else the general way has to settle it.
    Unsettled,
    /// This one, as somebody has said.
    Fixed(&'a Bound<'py, PyAny>),
}

/// `x · wᵀ + bias`, if this is the plain case and nothing has to be cast; an error or `None` if not, and nothing is written then.
fn product<'py>(
    torch: &Torch,
    x: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    state: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
    compute: Compute<'_, 'py>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = x.py();
    let view = TensorRef::plain("x", x)?;
    let (Ok(ElementKind::Float(dtype)), Ok(place)) = (view.element(), view.place()) else { return Ok(None) };
    let autocast = torch.autocast(py, place)?;
    let as_it_is = match (compute, &autocast) {
        (Compute::Fixed(wanted), _) | (Compute::Settled(wanted), None) | (_, Some(wanted)) => {
            wanted.is(torch.dtype(py, dtype))
        }
        (Compute::Input, None) => true,
        (Compute::Unsettled, None) => false,
    };
    if !as_it_is {
        return Ok(None);
    }
    let state = State::read(state)?;
    let (n, k) = state.shape;
    let Some((&inner, rows)) = view.shape().split_last() else { return Ok(None) };
    // K is known to the core from x alone.
    if inner as usize != k || k == 0 || view.expect_contiguous().is_err() {
        return Ok(None);
    }
    match place {
        Place::Cpu => crate::info::set_num_threads(torch.num_threads.bind(py).call0()?.extract()?),
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let shape = (rows.iter().map(|&size| size as usize).product(), n, k);
            if !halfbyte::four_bit::cuda::fused(device, dtype, shape, state.blocksize).map_err(raise)? {
                // The general way has guards against TF32 and autocast.
                let guarded = dtype == Dtype::F32 || autocast.is_some();
                let dense = || dense(torch, x, (dtype, place), weight, &state, bias);
                return if guarded { Ok(None) } else { dense().map(Some) };
            }
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => return Ok(None),
    }
    let (out, out_view) = torch.empty(x, (dtype, place), rows, n)?;
    // Read anew, after the last thing that could run Python.
    let done = matmul(
        x,
        &TensorRef::plain("x", x)?,
        &TensorRef::plain("packed", weight)?,
        &state.scales()?,
        bias.map(|bias| TensorRef::plain("bias", bias)).transpose()?.as_ref(),
        &out_view,
        state.kind,
        state.blocksize,
    )?;
    Ok(done.then_some(out))
}

/// The product with the dequantized weight.
#[cfg(feature = "cuda")]
fn dense<'py>(
    torch: &Torch,
    x: &Bound<'py, PyAny>,
    kind: (Dtype, Place),
    weight: &Bound<'py, PyAny>,
    state: &State<'py>,
    bias: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = x.py();
    let (decoded, decoded_view) = torch.empty(x, kind, &[state.shape.0 as i64], state.shape.1)?;
    dequantize(py, &TensorRef::plain("packed", weight)?, &state.scales()?, &decoded_view, state.kind, state.blocksize)?;
    torch.linear.bind(py).call1((x, decoded, bias))
}

/// Ordinary exceptions mean that the general way has to see to it; interrupts and their like go on.
pub(crate) fn or_general<T>(py: Python<'_>, result: PyResult<Option<T>>) -> PyResult<Option<T>> {
    match result {
        Err(error) if error.is_instance_of::<PyException>(py) => Ok(None),
        other => other,
    }
}

/// `halfbyte.matmul_4bit` of torch tensors, if this is the plain case; `None` if not, and nothing is written then.
#[pyfunction]
#[pyo3(signature = (x, packed, state, bias=None))]
pub(crate) fn eager_matmul_4bit<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    packed: &Bound<'py, PyAny>,
    state: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let torch = Torch::get(py)?;
    if !x.get_type().is(&torch.tensor) {
        return Ok(None);
    }
    let run =
        || if torch.is_plain(x, bias)? { product(torch, x, packed, state, bias, Compute::Input) } else { Ok(None) };
    or_general(py, run())
}

/// `Linear4bit.forward`, if this is the plain case and the input has the compute dtype; `None` if not, and nothing is written
/// or set then.
///
/// With `forward`, the one of the class, it is the layer's call that is asked for, hooks and all: `None` where those matter.
#[pyfunction]
#[pyo3(signature = (layer, x, forward=None))]
pub(crate) fn eager_linear_4bit<'py>(
    py: Python<'py>,
    layer: &Bound<'py, PyAny>,
    x: &Bound<'py, PyAny>,
    forward: Option<&Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let torch = Torch::get(py)?;
    if !x.get_type().is(&torch.tensor) {
        return Ok(None);
    }
    let run = || {
        if !forward.map_or(Ok(true), |forward| torch.calls_forward(layer, forward))? {
            return Ok(None);
        }
        let fields = attributes(layer)?;
        let dtype = entry(&fields, intern!(py, "compute_dtype"))?;
        let inferred = entry(&fields, intern!(py, "_inferred_dtype"))?;
        let settled = entry(&fields, intern!(py, "compute_type_is_set"))?.is_truthy()?;
        let compute = match (settled, dtype.is_none(), dtype.is(&inferred)) {
            (true, false, false) => Compute::Fixed(&dtype),
            (true, false, _) => Compute::Settled(&dtype),
            (true, true, _) => Compute::Input,
            (false, true, _) => Compute::Unsettled,
            (false, false, _) => return Ok(None),
        };
        let parameters = entry(&fields, intern!(py, "_parameters"))?.cast_into::<PyDict>()?;
        let weight = entry(&parameters, intern!(py, "weight"))?;
        let bias = entry(&parameters, intern!(py, "bias"))?;
        let bias = (!bias.is_none()).then_some(&bias);
        let state = entry(&attributes(&weight)?, intern!(py, "quant_state"))?;
        if !torch.is_plain(x, bias)? {
            return Ok(None);
        }
        product(torch, x, &weight, &state, bias, compute)
    };
    or_general(py, run())
}
