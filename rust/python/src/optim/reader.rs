//! What a step asks of many objects, without the look-up of an attribute or a loop of the interpreter for each.

use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

/// What `grad` is for one type of tensor. Looked up anew at every step, for somebody may have replaced it.
pub(super) struct Reader<'py> {
    kind: *mut ffi::PyTypeObject,
    /// The descriptor, if it is one in C, and what gets a value from it.
    grad: Option<(Bound<'py, PyAny>, ffi::descrgetfunc)>,
}

impl<'py> Reader<'py> {
    /// A reader for tensors of the type of this one.
    pub(super) fn of(tensor: &Bound<'py, PyAny>) -> PyResult<Self> {
        let grad = tensor.get_type().getattr_opt(intern!(tensor.py(), "grad"))?.and_then(|descriptor| {
            // SAFETY: asks what an object is, and a type in C for its function of this kind, which is null or of this signature.
            let get = unsafe {
                if descriptor.get_type_ptr() != &raw mut ffi::PyGetSetDescr_Type {
                    return None;
                }
                let slot = ffi::PyType_GetSlot(descriptor.get_type_ptr(), ffi::Py_tp_descr_get);
                std::mem::transmute::<*mut std::ffi::c_void, Option<ffi::descrgetfunc>>(slot)
            };
            get.map(|get| (descriptor, get))
        });
        Ok(Self { kind: tensor.get_type_ptr(), grad })
    }

    /// `tensor.grad`.
    #[inline]
    pub(super) fn grad(&self, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        match &self.grad {
            Some((descriptor, get)) if tensor.get_type_ptr() == self.kind => {
                // SAFETY: what `getattr` does once it has found the descriptor; a new reference or an error comes back.
                unsafe {
                    let found = get(descriptor.as_ptr(), tensor.as_ptr(), self.kind.cast());
                    Bound::from_owned_ptr_or_err(tensor.py(), found)
                }
            }
            _ => tensor.getattr(intern!(tensor.py(), "grad")),
        }
    }
}

/// Items of a list, borrowed. Nothing may run between them that could change the list.
fn items(list: &Bound<'_, PyList>) -> impl Iterator<Item = *mut ffi::PyObject> {
    let (list, len) = (list.as_ptr(), list.len() as isize);
    // SAFETY: the caller of this file's functions holds the list and the GIL; the positions are in it.
    (0..len).map(move |at| unsafe { ffi::PyList_GetItem(list, at) })
}

/// Whether both have the very same objects in the same order.
#[pyfunction]
pub(crate) fn same_items(kept: &Bound<'_, PyList>, now: &Bound<'_, PyAny>) -> PyResult<bool> {
    if let Ok(list) = now.cast::<PyList>() {
        return Ok(kept.len() == list.len() && items(kept).eq(items(list)));
    }
    let now = now.try_iter()?.collect::<PyResult<Vec<_>>>()?;
    Ok(items(kept).eq(now.iter().map(Bound::as_ptr)))
}

/// Whether the values of a dict are the very objects of a list, in the same order.
#[pyfunction]
pub(crate) fn same_values(kept: &Bound<'_, PyList>, now: &Bound<'_, PyAny>) -> PyResult<bool> {
    let Ok(dict) = now.cast::<PyDict>() else {
        return same_items(kept, &now.call_method0(intern!(now.py(), "values"))?);
    };
    let (mut position, mut value) = (0, std::ptr::null_mut());
    Ok(kept.len() == dict.len()
        && items(kept).all(|expected| {
            // SAFETY: the GIL is held and nothing runs between the calls that could change the dict; the value is borrowed. A null
            // pointer says that keys are not wanted.
            let found =
                unsafe { ffi::PyDict_Next(dict.as_ptr(), &raw mut position, std::ptr::null_mut(), &raw mut value) };
            found != 0 && value == expected
        }))
}

/// Whether none of these dicts is empty.
#[pyfunction]
pub(crate) fn all_filled(dicts: &Bound<'_, PyList>) -> PyResult<bool> {
    let py = dicts.py();
    // SAFETY: the GIL is held; of what is no dict the size is -1, and an error is set.
    let least = items(dicts).map(|dict| unsafe { ffi::PyDict_Size(dict) }).min();
    match least {
        Some(-1) => Err(PyErr::fetch(py)),
        least => Ok(least != Some(0)),
    }
}
