//! A parameter of a plan and the dict of its states: read, checked, and kept as addresses until something changes.

use halfbyte::layout::block_count;
use halfbyte::optim::{BLOCK, Rule};
use halfbyte::{Dtype, Error};
use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt};

use crate::dlpack::{ElementKind, Place, TensorRef};
use crate::errors::raise;

/// Borrows a tensor whose memory is what it says.
pub(super) fn tensor(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<TensorRef> {
    TensorRef::plain(name, object).map_err(|error| {
        if error.is_instance_of::<PyTypeError>(object.py()) {
            let got = object.get_type().to_string();
            return raise(Error::Dtype { argument: name, expected: "a plain torch.Tensor".into(), got });
        }
        error
    })
}

/// A gradient, or none.
pub(super) struct Gradient<'py> {
    /// Keeps a contiguous copy alive until the step has been asked for.
    _object: Bound<'py, PyAny>,
    pub(super) tensor: Option<TensorRef>,
}

impl<'py> Gradient<'py> {
    pub(super) fn new(object: Bound<'py, PyAny>) -> PyResult<Self> {
        if object.is_none() {
            return Ok(Self { _object: object, tensor: None });
        }
        let view = tensor("grad", &object)?;
        if view.expect_contiguous().is_ok() {
            return Ok(Self { _object: object, tensor: Some(view) });
        }
        let copy = object.call_method0(intern!(object.py(), "contiguous"))?;
        let view = tensor("grad", &copy)?;
        view.expect_contiguous().map_err(raise)?;
        Ok(Self { _object: copy, tensor: Some(view) })
    }
}

/// Where everything of a parameter lies, checked.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) p: usize,
    pub(super) n: usize,
    pub(super) dtype: Option<Dtype>,
    pub(super) eight: bool,
    pub(super) states: [usize; 3],
    pub(super) absmax: [usize; 3],
    pub(super) master: usize,
    pub(super) compensation: usize,
    pub(super) unorm: usize,
    /// Bytes of states that the driver moves between host and device.
    pub(super) paged: usize,
    /// Whether it is a large parameter of a GPU, and all of it in memory that stays there.
    pub(super) resident: bool,
}

#[cfg(feature = "cuda")]
impl Places {
    /// Whether it is large and the driver knows all of it, the gradient apart, as memory of the device itself.
    fn is_resident(&self, device: i32) -> Result<bool, Error> {
        if self.n < halfbyte::optim::cuda::LARGE || self.paged > 0 {
            return Ok(false);
        }
        let all = self.states.iter().chain(&self.absmax).chain([&self.p]).filter(|address| **address != 0);
        for address in all {
            if !halfbyte::device::cuda::is_resident(device, *address as u64)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// See the head of this file.
pub(super) struct Slot {
    pub(super) param: Py<PyAny>,
    pub(super) state: Py<PyDict>,
    pub(super) places: Places,
    /// The dict's keys and values as they were when `places` were read; references to values, so that no other object can
    /// have their addresses.
    seen: Vec<(usize, Py<PyAny>)>,
    /// The key `step` of the dict, which is another string in one that comes from a file.
    step_key: usize,
    /// Steps done, where the host counts.
    pub(super) steps: u64,
    /// The number in the dict that `steps` was read from, or that was put there: while it is there, nothing is to be read.
    counted: Option<Py<PyAny>>,
    /// The address of the count, where the device does.
    pub(super) step_at: usize,
}

const STATES: [&str; 2] = ["state1", "state2"];

impl Slot {
    pub(super) fn new(param: Py<PyAny>, state: Py<PyDict>) -> Self {
        Self {
            param,
            state,
            places: Places::default(),
            seen: Vec::new(),
            step_key: 0,
            steps: 0,
            counted: None,
            step_at: 0,
        }
    }

    /// Brings `places` up to date; whether they changed. `step` of the state is left to the caller.
    pub(super) fn refresh(&mut self, py: Python<'_>, rule: Rule, place: Place) -> PyResult<bool> {
        let param = tensor("params", self.param.bind(py))?;
        if param.address() == self.places.p && param.len() == self.places.n && self.is_unchanged() {
            return Ok(false);
        }
        let places = self.read(py, rule, place, &param)?;
        let state = self.state.bind(py);
        self.seen.clear();
        for (key, value) in state.iter() {
            if key.eq(intern!(py, "step"))? {
                self.step_key = key.as_ptr() as usize;
            } else {
                self.seen.push((key.as_ptr() as usize, value.unbind()));
            }
        }
        let changed = places != self.places;
        self.places = places;
        Ok(changed)
    }

    /// Whether the dict has the very objects that were read, `step` apart.
    fn is_unchanged(&self) -> bool {
        let (mut position, mut key, mut value) = (0, std::ptr::null_mut(), std::ptr::null_mut());
        let mut expected = self.seen.iter();
        // SAFETY: the GIL is held and nothing runs between the calls that could change the dict; keys and values are borrowed.
        while unsafe { ffi::PyDict_Next(self.state.as_ptr(), &raw mut position, &raw mut key, &raw mut value) } != 0 {
            if key as usize == self.step_key {
                continue;
            }
            match expected.next() {
                Some((seen, object)) if *seen == key as usize && object.as_ptr() == value => {}
                _ => return false,
            }
        }
        !self.seen.is_empty() && expected.next().is_none()
    }

    fn read(&self, py: Python<'_>, rule: Rule, place: Place, param: &TensorRef) -> PyResult<Places> {
        let state = self.state.bind(py);
        let n = param.len();
        let checked = || -> Result<Dtype, Error> {
            param.expect_place(place)?;
            param.expect_contiguous()?;
            param.float()
        };
        let dtype = checked().map_err(raise)?;
        let mut places = Places { p: param.address(), n, dtype: Some(dtype), ..Places::default() };
        let find = |key: &'static str| -> PyResult<Option<TensorRef>> {
            let Some(object) = state.get_item(key)?.filter(|object| !object.is_none()) else { return Ok(None) };
            let found = tensor(key, &object)?;
            found.expect_contiguous().map_err(raise)?;
            found.expect_writable().map_err(raise)?;
            Ok(Some(found))
        };
        let need = |key: &'static str| -> PyResult<TensorRef> {
            find(key)?.ok_or_else(|| {
                raise(Error::Value { argument: key, expected: "a tensor in the state".into(), got: "nothing".into() })
            })
        };
        let whole = rule.signed().len();
        let blocks = block_count(n, BLOCK);
        let mut at = 0;
        for (key, absmax_key) in STATES.into_iter().zip(["absmax1", "absmax2"]) {
            if at == whole {
                break;
            }
            // AdEMAMix has two averages in its first state.
            let parts = if at == 0 { whole.div_ceil(2) } else { 1 };
            let held = need(key)?;
            let eight = held.element().map_err(raise)? == ElementKind::U8;
            if at > 0 && eight != places.eight {
                let expected = if places.eight { "uint8" } else { "float32" };
                let got = if eight { "uint8" } else { "another" };
                return Err(raise(Error::Dtype { argument: key, expected: expected.into(), got: got.into() }));
            }
            places.eight = eight;
            if !eight {
                held.expect_dtype(Dtype::F32).map_err(raise)?;
            }
            crate::expect_len(&held, parts * n).map_err(raise)?;
            reach(&held, place)?;
            if is_paged(state, key)? {
                places.paged += held.byte_len();
            }
            let absmax = if eight { Some(need(absmax_key)?) } else { None };
            if let Some(absmax) = &absmax {
                absmax.expect_dtype(Dtype::F32).map_err(raise)?;
                crate::expect_len(absmax, parts * blocks).map_err(raise)?;
                reach(absmax, place)?;
            }
            for part in 0..parts {
                places.states[at] = held.address() + part * n * if eight { 1 } else { 4 };
                places.absmax[at] = absmax.as_ref().map_or(0, |absmax| absmax.address() + part * blocks * 4);
                at += 1;
            }
        }
        for (key, dtype) in [("master", Dtype::F32), ("compensation", dtype)] {
            if let Some(extra) = find(key)? {
                extra.expect_dtype(dtype).map_err(raise)?;
                crate::expect_len(&extra, n).map_err(raise)?;
                reach(&extra, place)?;
                let to = if key == "master" { &mut places.master } else { &mut places.compensation };
                *to = extra.address();
            }
        }
        if places.master != 0 && places.compensation != 0 {
            let (expected, got) = ("no more than one of master and compensation".into(), "both".into());
            return Err(raise(Error::Value { argument: "master", expected, got }));
        }
        if rule.has_trust()
            && let Some(unorm) = find("unorm_vec")?
        {
            unorm.expect_dtype(Dtype::F32).map_err(raise)?;
            crate::expect_len(&unorm, 1).map_err(raise)?;
            reach(&unorm, place)?;
            places.unorm = unorm.address();
        }
        #[cfg(feature = "cuda")]
        if let Place::Cuda(device) = place {
            places.resident = places.is_resident(device).map_err(raise)?;
        }
        Ok(places)
    }

    /// Reads how many steps there were from the dict, an int or a tensor.
    pub(super) fn read_steps(&mut self, py: Python<'_>) -> PyResult<()> {
        let wrong = |got: String| raise(Error::Value { argument: "step", expected: "a count of steps".into(), got });
        let Some(step) = self.state.bind(py).get_item(intern!(py, "step"))? else {
            return Err(wrong("nothing".into()));
        };
        if self.counted.as_ref().is_some_and(|counted| counted.is(&step)) {
            return Ok(());
        }
        let count = if step.is_instance_of::<PyInt>() {
            step.extract::<i64>()?
        } else {
            step.call_method0(intern!(py, "item"))?.extract::<f64>()? as i64
        };
        self.steps = u64::try_from(count).map_err(|_| wrong(count.to_string()))?;
        self.counted = step.is_instance_of::<PyInt>().then(|| step.unbind());
        Ok(())
    }

    /// Puts a number of steps in the dict.
    pub(super) fn count_step(&mut self, py: Python<'_>, steps: u64, number: &Bound<'_, PyAny>) -> PyResult<()> {
        self.state.bind(py).set_item(intern!(py, "step"), number)?;
        self.steps = steps;
        self.counted = Some(number.clone().unbind());
        Ok(())
    }
}

/// Counts a step of every slot that has a gradient.
pub(super) fn count_steps(py: Python<'_>, slots: &mut [Slot], gradients: &[Gradient<'_>]) -> PyResult<()> {
    // Most have done as many, and share the number.
    let mut last: Option<(u64, Bound<'_, PyAny>)> = None;
    for (slot, gradient) in slots.iter_mut().zip(gradients) {
        if gradient.tensor.is_none() {
            continue;
        }
        let steps = slot.steps + 1;
        let (_, number) = match last.take() {
            Some(found) if found.0 == steps => last.insert(found),
            _ => last.insert((steps, steps.into_pyobject(py)?.into_any())),
        };
        slot.count_step(py, steps, number)?;
    }
    Ok(())
}

/// Whether a state is in memory that the driver moves between host and device: whoever made it says so.
fn is_paged(state: &Bound<'_, PyDict>, key: &str) -> PyResult<bool> {
    let Some(object) = state.get_item(key)? else { return Ok(false) };
    object.getattr_opt(intern!(state.py(), "is_paged"))?.map_or(Ok(false), |paged| paged.is_truthy())
}

/// An error unless the device of the parameter can use a tensor.
fn reach(tensor: &TensorRef, place: Place) -> PyResult<()> {
    if tensor.place().map_err(raise)? == place || tensor.len() == 0 {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if let (Place::Cuda(device), Place::Cpu) = (place, tensor.place().map_err(raise)?) {
        return halfbyte::device::cuda::check_reachable(tensor.name, device, tensor.address() as u64).map_err(raise);
    }
    tensor.expect_place(place).map_err(raise)
}
