//! Steps on the CPU.

use half::{bf16, f16};
use halfbyte::Dtype;
use halfbyte::layout::block_count;
use halfbyte::optim::{self, BLOCK, Extra, Floats, FloatsMut, Parameter, Rule, State};
use pyo3::intern;
use pyo3::prelude::*;

use super::options::Options;
use super::slot::{Gradient, Places, Slot, count_steps};
use crate::detached;
use crate::dlpack::{Place, TensorRef};
use crate::errors::raise;

/// The number in a scalar tensor.
fn number(tensor: Option<&TensorRef>) -> PyResult<Option<f32>> {
    let Some(tensor) = tensor else { return Ok(None) };
    tensor.expect_place(Place::Cpu).map_err(raise)?;
    // SAFETY: on the CPU, fp32, one element, all checked; nobody writes while the GIL is held.
    Ok(Some(unsafe { tensor.slice::<f32>() }[0]))
}

pub(super) fn step(
    py: Python<'_>,
    rule: Rule,
    slots: &mut [Slot],
    gradients: &[Gradient<'_>],
    options: &Options,
) -> PyResult<usize> {
    let mut hyper = options.hyper;
    if let Some(lr) = number(options.lr.as_ref())? {
        hyper.lr = f64::from(lr);
    }
    let mut common = options.common;
    if let Some(scale) = number(options.grad_scale.as_ref())? {
        common.scale /= scale;
    }
    if let Some(norm) = number(options.total_norm.as_ref())? {
        common.scale *= (options.max_norm / (norm + 1e-6)).min(1.0);
    }
    let found_inf = number(options.found_inf.as_ref())?.is_some_and(|found| found != 0.0);
    let mut work = Vec::new();
    for (index, (slot, gradient)) in slots.iter_mut().zip(gradients).enumerate() {
        let Some((places, dtype, g)) = checked(slot, gradient) else { continue };
        slot.read_steps(py)?;
        let scalars = hyper.scalars(rule, slot.steps + 1);
        // SAFETY: addresses, types and sizes are those of tensors that the plan holds and has just checked; gradients are held
        // by the caller; others are kept from writing as for every operation of torch.
        work.push(unsafe { parameter(rule, &places, dtype, g, scalars, index as u32) });
    }
    if found_inf {
        return Ok(0);
    }
    let count = work.len();
    let threads = py.import(intern!(py, "torch"))?.call_method0(intern!(py, "get_num_threads"))?.extract()?;
    halfbyte::device::cpu::set_threads(threads);
    let elements = work.iter().map(|parameter| parameter.g.len()).sum();
    detached(py, elements, || optim::step(rule, &mut work, &common)).map_err(raise)?;
    drop(work);
    count_steps(py, slots, gradients)?;
    Ok(count)
}

/// # Safety
/// There must be `n` elements of type `T` at `address` that live and that nobody else touches while the slice lives.
unsafe fn slice<'a, T>(address: usize, n: usize) -> &'a mut [T] {
    if n == 0 {
        return &mut [];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(address as *mut T, n) }
}

/// # Safety
/// As [`slice`].
unsafe fn floats<'a>(address: usize, n: usize, dtype: Dtype) -> FloatsMut<'a> {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            Dtype::F32 => FloatsMut::F32(slice(address, n)),
            Dtype::F16 => FloatsMut::F16(slice::<f16>(address, n)),
            Dtype::Bf16 => FloatsMut::Bf16(slice::<bf16>(address, n)),
        }
    }
}

/// Where everything of a slot lies, the type of its parameter and its gradient, if it has one.
fn checked<'a>(slot: &Slot, gradient: &'a Gradient<'_>) -> Option<(Places, Dtype, Floats<'a>)> {
    let (address, n) = (gradient.address, slot.places.n);
    // SAFETY: on the CPU, contiguous, of this type and length, as was checked when the gradient was taken, which keeps the memory
    // alive; others are kept from writing as in every operation.
    let floats = unsafe {
        match slot.grad_dtype.filter(|_| gradient.is_some())? {
            Dtype::F32 => Floats::F32(shared(address, n)),
            Dtype::F16 => Floats::F16(shared(address, n)),
            Dtype::Bf16 => Floats::Bf16(shared(address, n)),
        }
    };
    Some((slot.places, slot.places.dtype?, floats))
}

/// # Safety
/// There must be `n` elements of type `T` at `address` that live and that nobody writes to while the slice lives.
unsafe fn shared<'a, T>(address: usize, n: usize) -> &'a [T] {
    if n == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(address as *const T, n) }
}

/// # Safety
/// `places` and `dtype` must be current, and `g` be as long as the parameter.
unsafe fn parameter<'a>(
    rule: Rule,
    places: &Places,
    dtype: Dtype,
    g: Floats<'a>,
    scalars: optim::Scalars,
    index: u32,
) -> Parameter<'a> {
    let n = places.n;
    let states = places.states.into_iter().zip(places.absmax).take(rule.signed().len());
    let state = |(state, absmax)| {
        // SAFETY: as above.
        unsafe {
            if places.eight {
                State::Eight { codes: slice(state, n), absmax: slice(absmax, block_count(n, BLOCK)) }
            } else {
                State::Full(slice(state, n))
            }
        }
    };
    // SAFETY: as above.
    let extra = unsafe {
        match (places.master, places.compensation) {
            (0, 0) => Extra::None,
            (0, lost) => Extra::Compensation(floats(lost, n, dtype)),
            (master, _) => Extra::Master(slice(master, n)),
        }
    };
    Parameter {
        // SAFETY: as above.
        p: unsafe { floats(places.p, n, dtype) },
        g,
        states: states.map(state).collect(),
        extra,
        scalars,
        index,
        // SAFETY: as above.
        update_squares: (places.unorm != 0).then(|| unsafe { &mut slice::<f32>(places.unorm, 1)[0] }),
    }
}

/// The sum of squares of gradients.
pub(super) fn squares(slots: &[Slot], gradients: &[Gradient<'_>]) -> f64 {
    let mut total = 0.0;
    for (_, _, values) in slots.iter().zip(gradients).filter_map(|(slot, gradient)| checked(slot, gradient)) {
        total += (0..values.len()).map(|i| f64::from(values.get(i)).powi(2)).sum::<f64>();
    }
    total
}
