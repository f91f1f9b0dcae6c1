//! `OptimPlan`: the parameters of a group, updated by one call.

mod ahead;
#[cfg(feature = "cuda")]
mod device;
mod host;
mod options;
#[cfg(feature = "cuda")]
mod paged;
mod reader;
mod slot;

use std::sync::Mutex;

use halfbyte::Error;
use halfbyte::optim::Rule;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::dlpack::Place;
use crate::errors::raise;
use options::Options;
#[cfg(feature = "cuda")]
pub(crate) use paged::PagedBuffer;
use reader::Reader;
pub(crate) use reader::{all_filled, same_items, same_values};
use slot::{Gradient, Slot};

/// Parameters that are updated together, and their states.
#[pyclass(frozen, module = "halfbyte._native")]
pub(crate) struct OptimPlan {
    rule: Rule,
    place: Place,
    capturable: bool,
    inner: Mutex<Inner>,
}

struct Inner {
    slots: Vec<Slot>,
    #[cfg(feature = "cuda")]
    memory: device::Memory,
}

#[pymethods]
impl OptimPlan {
    #[new]
    #[pyo3(signature = (rule, params, states, capturable=false))]
    fn new(rule: &str, params: &Bound<'_, PyList>, states: &Bound<'_, PyList>, capturable: bool) -> PyResult<Self> {
        let rule = Rule::from_name(rule).ok_or_else(|| {
            let names = Rule::ALL.map(Rule::name).join(", ");
            raise(Error::Value { argument: "rule", expected: format!("one of {names}"), got: rule.into() })
        })?;
        if params.len() != states.len() || params.is_empty() {
            let got = format!("{} of {} parameters", states.len(), params.len());
            return Err(raise(Error::Value { argument: "states", expected: "one a parameter".into(), got }));
        }
        let place = slot::tensor("params", &params.get_item(0)?)?.place().map_err(raise)?;
        let pairs = params.iter().zip(states.iter());
        let slots = pairs.map(|(param, state)| Ok(Slot::new(param.unbind(), state.cast_into::<PyDict>()?.unbind())));
        let slots = slots.collect::<PyResult<Vec<_>>>()?;
        let inner = Inner {
            #[cfg(feature = "cuda")]
            memory: device::Memory::default(),
            slots,
        };
        Ok(Self { rule, place, capturable, inner: Mutex::new(inner) })
    }

    /// Updates every parameter that has a gradient; returns how many.
    #[pyo3(signature = (lr, beta1=0.9, beta2=0.999, beta3=0.0, alpha=0.0, eps=1e-8, weight_decay=0.0, *, t_alpha=None,
        t_beta3=None, decay="decoupled", bias_correction=true, dampening=0.0, nesterov=false, maximize=false, max_unorm=0.0,
        skip_zeros=false, gnorm_scale=1.0, grad_scale=None, found_inf=None, total_norm=None, max_norm=None, stochastic=false,
        seed=0, grads=None))]
    #[expect(clippy::fn_params_excessive_bools, reason = "keywords of a Python function")]
    fn step(
        &self,
        py: Python<'_>,
        lr: &Bound<'_, PyAny>,
        beta1: f64,
        beta2: f64,
        beta3: f64,
        alpha: f64,
        eps: f64,
        weight_decay: f64,
        t_alpha: Option<f64>,
        t_beta3: Option<f64>,
        decay: &str,
        bias_correction: bool,
        dampening: f64,
        nesterov: bool,
        maximize: bool,
        max_unorm: f64,
        skip_zeros: bool,
        gnorm_scale: f64,
        grad_scale: Option<&Bound<'_, PyAny>>,
        found_inf: Option<&Bound<'_, PyAny>>,
        total_norm: Option<&Bound<'_, PyAny>>,
        max_norm: Option<f64>,
        stochastic: bool,
        seed: u64,
        grads: Option<&Bound<'_, PyList>>,
    ) -> PyResult<usize> {
        let decoupled = options::is_decoupled(decay).map_err(raise)?;
        let mut options = Options::new(lr, [beta1, beta2, beta3], eps, weight_decay)?;
        options.hyper.alpha = alpha;
        options.hyper.t_alpha = t_alpha.unwrap_or(0.0);
        options.hyper.t_beta3 = t_beta3.unwrap_or(0.0);
        options.hyper.decoupled = f64::from(u8::from(decoupled));
        options.hyper.bias_correction = f64::from(u8::from(bias_correction));
        options.hyper.dampening = dampening;
        options.hyper.nesterov = f64::from(u8::from(nesterov));
        options.hyper.max_unorm = max_unorm;
        options.common.skip_zeros = skip_zeros;
        options.common.scale = if maximize { -gnorm_scale } else { gnorm_scale } as f32;
        options.common.seed = stochastic.then_some(seed);
        options.scaled_by(grad_scale, found_inf, total_norm, max_norm)?;
        let mut inner = self.lock();
        let gradients = inner.gradients(py, self, grads)?;
        match self.place {
            Place::Cpu => host::step(py, self.rule, &mut inner.slots, &gradients, &options),
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => {
                let Inner { slots, memory } = &mut *inner;
                device::step(py, device, self.rule, self.capturable, slots, memory, &gradients, &options)
            }
            #[cfg(not(feature = "cuda"))]
            Place::Cuda(_) => Err(raise(crate::no_cuda())),
        }
    }
}

impl OptimPlan {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Inner {
    /// The gradient of each slot, which is brought up to date for it.
    fn gradients<'py>(
        &mut self,
        py: Python<'py>,
        plan: &OptimPlan,
        given: Option<&Bound<'py, PyList>>,
    ) -> PyResult<Vec<Gradient<'py>>> {
        if let Some(given) = given.filter(|given| given.len() != self.slots.len()) {
            let expected = format!("{} of them", self.slots.len());
            return Err(raise(Error::Value { argument: "grads", expected, got: given.len().to_string() }));
        }
        let slots = &mut self.slots;
        let objects: Vec<_> = if let Some(given) = given {
            given.iter().collect()
        } else {
            let first = slots[0].param.bind(py);
            let (reader, known) = (Reader::of(first)?, ahead::Known::of(first));
            let grad = |(i, slot): (usize, &Slot)| {
                ahead::before_grad(&known, i, |at| slots.get(at).map(|slot| slot.param.as_ptr()));
                reader.grad(slot.param.bind(py))
            };
            slots.iter().enumerate().map(grad).collect::<PyResult<_>>()?
        };
        let known = ahead::Known::of(objects.iter().find(|object| !object.is_none()).unwrap_or(&objects[0]));
        let mut gradients = Vec::with_capacity(slots.len());
        for (i, object) in objects.iter().enumerate() {
            ahead::before_address(&known, i, |at| objects.get(at).map(Bound::as_ptr));
            ahead::before_compare(i, |at| slots.get(at).map(|slot| (slot.state.as_ptr(), slot.seen_at())));
            gradients.push(slots[i].take(plan.rule, plan.place, object.clone())?);
        }
        Ok(gradients)
    }
}

/// Writes the length of all gradients of all plans together to `out`, fp32 × 1.
#[pyfunction]
#[pyo3(signature = (plans, out, grads=None))]
#[expect(clippy::needless_pass_by_value, reason = "PyO3 makes lists of Python objects")]
pub(crate) fn optim_grad_norm(
    py: Python<'_>,
    plans: Vec<PyRef<'_, OptimPlan>>,
    out: &Bound<'_, PyAny>,
    grads: Option<Vec<Option<Bound<'_, PyList>>>>,
) -> PyResult<()> {
    let out = slot::tensor("out", out)?;
    let checked = || {
        out.expect_dtype(halfbyte::Dtype::F32)?;
        crate::expect_len(&out, 1)?;
        out.place()
    };
    let place = checked().map_err(raise)?;
    if let Some(other) = plans.iter().find(|plan| plan.place != place) {
        let (expected, got) = (format!("{place:?}"), format!("{:?}", other.place));
        return Err(raise(Error::Device { argument: "plans", expected, got }));
    }
    if let Some(given) = grads.as_ref().filter(|given| given.len() != plans.len()) {
        let (expected, got) = (format!("{} lists", plans.len()), given.len().to_string());
        return Err(raise(Error::Value { argument: "grads", expected, got }));
    }
    let given = |i: usize| grads.as_ref().and_then(|grads| grads[i].as_ref());
    match place {
        Place::Cpu => {
            let mut total = 0.0;
            for (i, plan) in plans.iter().enumerate() {
                let mut inner = plan.lock();
                let gradients = inner.gradients(py, plan, given(i))?;
                total += host::squares(&inner.slots, &gradients);
            }
            // SAFETY: on the CPU, fp32, one element, all checked.
            let out = unsafe { out.slice_mut::<f32>() };
            out[0] = total.sqrt() as f32;
            Ok(())
        }
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let (_keeper, total) = device::allocate(py, device, 1)?;
            for (i, plan) in plans.iter().enumerate() {
                let mut inner = plan.lock();
                let gradients = inner.gradients(py, plan, given(i))?;
                let root = if i + 1 == plans.len() { out.address() as u64 } else { 0 };
                let Inner { slots, memory } = &mut *inner;
                device::add_squares(py, device, slots, memory, &gradients, (total, i == 0, root))?;
            }
            Ok(())
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(raise(crate::no_cuda())),
    }
}
