//! The 8-bit layer of a token: all that one eager `Linear8bitLt` needs, in one call from Python (see `eager.rs`).

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::dlpack::{ElementKind, Place, TensorRef};
use crate::eager::{Torch, attributes, entry, or_general};
use crate::errors::raise;

/// `Linear8bitLt.forward`, if this is the plain case: a layer whose codes and statistics are with its state, on the device
/// of `x`, and nobody wants a gradient. `None` if not, and nothing is written or set then.
///
/// With `forward`, the one of the class, it is the layer's call that is asked for, hooks and all: `None` where those matter.
#[pyfunction]
#[pyo3(signature = (layer, x, forward=None))]
pub(crate) fn eager_linear_int8<'py>(
    py: Python<'py>,
    layer: &Bound<'py, PyAny>,
    x: &Bound<'py, PyAny>,
    forward: Option<&Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let torch = Torch::get(py)?;
    if !x.get_type().is(&torch.tensor) {
        return Ok(None);
    }
    or_general(py, run(torch, layer, x, forward))
}

fn run<'py>(
    torch: &Torch,
    layer: &Bound<'py, PyAny>,
    x: &Bound<'py, PyAny>,
    forward: Option<&Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = x.py();
    if !forward.map_or(Ok(true), |forward| torch.calls_forward(layer, forward))? {
        return Ok(None);
    }
    let fields = attributes(layer)?;
    let state = entry(&fields, intern!(py, "state"))?;
    let truth = |name| state.getattr(name)?.is_truthy();
    // The general way keeps the two flags equal; where they are not, it has something to do.
    let settled = truth(intern!(py, "is_training"))? == entry(&fields, intern!(py, "training"))?.is_truthy()?;
    if !settled || truth(intern!(py, "has_fp16_weights"))? {
        return Ok(None);
    }
    let (codes, stats) = (state.getattr(intern!(py, "CB"))?, state.getattr(intern!(py, "SCB"))?);
    let parameters = entry(&fields, intern!(py, "_parameters"))?.cast_into::<PyDict>()?;
    // Another weight may have taken the place of the one whose codes the state has, for a call or for good.
    let own = entry(&parameters, intern!(py, "weight"))?.getattr_opt(intern!(py, "CB"))?;
    if !own.is_some_and(|own| own.is(&codes)) {
        return Ok(None);
    }
    let bias = entry(&parameters, intern!(py, "bias"))?;
    let bias = (!bias.is_none()).then_some(&bias);
    if codes.is_none() || stats.is_none() || !torch.is_plain(x, bias)? {
        return Ok(None);
    }
    let threshold = state.getattr(intern!(py, "threshold"))?.extract::<f32>()?;
    let view = TensorRef::plain("x", x)?;
    let (Ok(ElementKind::Float(dtype)), Ok(place)) = (view.element(), view.place()) else { return Ok(None) };
    if torch.autocast(py, place)?.is_some() || view.expect_contiguous().is_err() {
        return Ok(None);
    }
    let Some((_, rows)) = view.shape().split_last() else { return Ok(None) };
    let n = TensorRef::plain("SCB", &stats)?.len();
    let workspace = match place {
        Place::Cpu => None,
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            match crate::int8_cuda::workspace_for(device, (&view, &TensorRef::plain("CB", &codes)?), n, threshold)
                .map_err(raise)?
            {
                0 => None,
                bytes => Some(torch.empty(x, (dtype, place), &[], bytes.div_ceil(dtype.size()))?.0),
            }
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => return Ok(None),
    };
    let (out, _) = torch.empty(x, (dtype, place), rows, n)?;
    // Looked at anew, after the last thing that could run Python; an error there is the general way's to tell.
    crate::int8::layer(py, [x, &codes, &stats, &out], workspace.as_ref(), bias, threshold)?;
    Ok(Some(out))
}
