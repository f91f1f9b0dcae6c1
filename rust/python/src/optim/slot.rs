//! A parameter of a plan and the dict of its states: read, checked, and kept as addresses until something changes.

use halfbyte::layout::block_count;
use halfbyte::optim::{BLOCK, Rule};
use halfbyte::{Dtype, Error};
use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt};

use crate::dlpack::{ElementKind, Form, Place, TensorRef};
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

/// A gradient, checked: its type is in the slot, and it is as long as the parameter. Or none.
#[derive(Default)]
pub(super) struct Gradient<'py> {
    /// Keeps the memory alive until the step has been asked for, of a contiguous copy too.
    object: Option<Bound<'py, PyAny>>,
    pub(super) address: usize,
}

impl Gradient<'_> {
    pub(super) fn is_some(&self) -> bool {
        self.object.is_some()
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
    /// Whether it is a large parameter of a GPU, in memory that stays there.
    pub(super) resident: bool,
    /// Whether its states and their scales are in such memory too, all of them.
    pub(super) resident_states: bool,
}

#[cfg(feature = "cuda")]
impl Places {
    /// Looks where a large parameter and its states are: whether the driver knows them as memory of the device itself.
    fn find_residents(&mut self, device: i32) -> Result<(), Error> {
        use halfbyte::device::cuda::is_resident;
        self.resident = self.n >= halfbyte::optim::cuda::LARGE && is_resident(device, self.p as u64)?;
        self.resident_states = self.resident && self.paged == 0;
        for address in self.states.iter().chain(&self.absmax).filter(|address| **address != 0) {
            self.resident_states = self.resident_states && is_resident(device, *address as u64)?;
        }
        Ok(())
    }
}

/// See the head of this file.
pub(super) struct Slot {
    pub(super) param: Py<PyAny>,
    pub(super) state: Py<PyDict>,
    pub(super) places: Places,
    /// Whether `places` were read since somebody last took this back.
    pub(super) is_fresh: bool,
    /// The dict's keys and values as they were when `places` were read; references, so that no other object can have their
    /// addresses. The value of `step` is not looked at.
    seen: Vec<(Py<PyAny>, Py<PyAny>)>,
    /// Where in `seen` the key `step` is.
    step_key: Option<usize>,
    /// Steps done, where the host counts.
    pub(super) steps: u64,
    /// What `steps` or `step_at` was read from, or what was put there: while it is in the dict, nothing is to be read.
    counted: Option<Py<PyAny>>,
    /// Whether it was there when `seen` was compared.
    is_counted: bool,
    /// The address of the count, where the device does.
    pub(super) step_at: usize,
    /// What the parameter was like when `places` were read.
    param_form: Form,
    /// What the last gradient was like, if it was contiguous, and its type.
    form: Form,
    pub(super) grad_dtype: Option<Dtype>,
}

const STATES: [&str; 2] = ["state1", "state2"];

impl Slot {
    pub(super) fn new(param: Py<PyAny>, state: Py<PyDict>) -> Self {
        Self {
            param,
            state,
            places: Places::default(),
            is_fresh: true,
            seen: Vec::new(),
            step_key: None,
            steps: 0,
            counted: None,
            is_counted: false,
            step_at: 0,
            param_form: Form::NONE,
            form: Form::NONE,
            grad_dtype: None,
        }
    }

    /// Where the dict's keys and values are kept.
    #[inline]
    pub(super) fn seen_at(&self) -> *const u8 {
        self.seen.as_ptr().cast()
    }

    /// Checks a gradient, which may be None, and brings all but the count of steps up to date for it.
    pub(super) fn take<'py>(&mut self, rule: Rule, place: Place, object: Bound<'py, PyAny>) -> PyResult<Gradient<'py>> {
        if object.is_none() {
            return Ok(Gradient::default());
        }
        let py = object.py();
        // Where all is as it was, only the gradient's address is news.
        if let Some(address) = self.form.address_of(&object)
            && self.is_current(py)
        {
            return Ok(Gradient { object: Some(object), address });
        }
        let view = tensor("grad", &object)?;
        let (object, view, form) = if view.expect_contiguous().is_ok() {
            let form = view.form();
            (object, view, form)
        } else {
            let copy = object.call_method0(intern!(py, "contiguous"))?;
            let view = tensor("grad", &copy)?;
            view.expect_contiguous().map_err(raise)?;
            (copy, view, Form::NONE)
        };
        self.form = Form::NONE;
        if !self.is_current(py) {
            self.refresh(py, rule, place)?;
        }
        view.expect_place(place).map_err(raise)?;
        crate::expect_len(&view, self.places.n).map_err(raise)?;
        self.grad_dtype = Some(view.float().map_err(raise)?);
        self.form = form;
        Ok(Gradient { address: view.address(), object: Some(object) })
    }

    /// Whether the parameter is like it was and where it was, and the dict is as it was.
    #[inline]
    fn is_current(&mut self, py: Python<'_>) -> bool {
        self.param_form.address_of(self.param.bind(py)) == Some(self.places.p) && self.is_unchanged()
    }

    /// Reads the parameter and the dict. `step` is left to the caller.
    fn refresh(&mut self, py: Python<'_>, rule: Rule, place: Place) -> PyResult<()> {
        self.seen.clear();
        self.is_fresh = true;
        self.is_counted = false;
        let param = tensor("params", self.param.bind(py))?;
        self.places = self.read(py, rule, place, &param)?;
        self.param_form = param.form();
        self.step_key = None;
        for (key, value) in self.state.bind(py).iter() {
            if key.eq(intern!(py, "step"))? {
                self.step_key = Some(self.seen.len());
            }
            self.seen.push((key.unbind(), value.unbind()));
        }
        Ok(())
    }

    /// Whether the dict has the very objects that were read, `step` apart.
    fn is_unchanged(&mut self) -> bool {
        let dict = self.state.as_ptr();
        // SAFETY: the GIL is held and nothing runs between the calls that could change the dict; keys and values are borrowed.
        unsafe {
            if self.seen.is_empty() || ffi::PyDict_Size(dict) != self.seen.len() as isize {
                return false;
            }
            let (mut position, mut key, mut value) = (0, std::ptr::null_mut(), std::ptr::null_mut());
            for (at, (seen_key, seen)) in self.seen.iter().enumerate() {
                if ffi::PyDict_Next(dict, &raw mut position, &raw mut key, &raw mut value) == 0
                    || key != seen_key.as_ptr()
                {
                    return false;
                }
                if self.step_key == Some(at) {
                    self.is_counted = self.counted.as_ref().is_some_and(|counted| counted.as_ptr() == value);
                } else if value != seen.as_ptr() {
                    return false;
                }
            }
        }
        true
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
            places.find_residents(device).map_err(raise)?;
        }
        Ok(places)
    }

    /// Whether the count of steps is the object that it was read from when [`Slot::take`] looked.
    pub(super) fn is_counted(&self) -> bool {
        self.is_counted
    }

    /// Takes note of the object that the count of steps was read from.
    pub(super) fn count_from(&mut self, object: Option<Py<PyAny>>) {
        self.counted = object;
    }

    /// Reads how many steps there were from the dict, an int or a tensor.
    pub(super) fn read_steps(&mut self, py: Python<'_>) -> PyResult<()> {
        if self.is_counted {
            return Ok(());
        }
        let wrong = |got: String| raise(Error::Value { argument: "step", expected: "a count of steps".into(), got });
        let Some(step) = self.state.bind(py).get_item(intern!(py, "step"))? else {
            return Err(wrong("nothing".into()));
        };
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
    fn count_step(&mut self, py: Python<'_>, steps: u64, number: &Bound<'_, PyAny>) -> PyResult<()> {
        let state = self.state.bind(py);
        match self.step_key.and_then(|at| self.seen.get(at)) {
            // The very key, which is found without a look at its text.
            Some((key, _)) => state.set_item(key, number)?,
            None => state.set_item(intern!(py, "step"), number)?,
        }
        self.steps = steps;
        self.counted = Some(number.clone().unbind());
        Ok(())
    }
}

/// Counts a step of every slot that has a gradient.
pub(super) fn count_steps(py: Python<'_>, slots: &mut [Slot], gradients: &[Gradient<'_>]) -> PyResult<()> {
    // Most have done as many, and share the number.
    let mut last: Option<(u64, Bound<'_, PyAny>)> = None;
    for (slot, _) in slots.iter_mut().zip(gradients).filter(|(_, gradient)| gradient.is_some()) {
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
