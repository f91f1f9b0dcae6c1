//! Gradients and addresses of many tensors of one type, without the look-up of an attribute for each.

use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;

/// What `grad` and `data_ptr` are for one type of tensor. Looked up anew at every step, for somebody may have replaced them.
pub(super) struct Reader<'py> {
    kind: *mut ffi::PyTypeObject,
    /// The descriptor of `grad`, which is in C, and what gets a value from it.
    grad: Option<(Bound<'py, PyAny>, ffi::descrgetfunc)>,
    /// The function in C behind `data_ptr()`.
    address: Option<ffi::PyCFunction>,
}

impl<'py> Reader<'py> {
    /// A reader for tensors of the type of this one.
    pub(super) fn of(tensor: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = tensor.py();
        let grad = tensor.get_type().getattr_opt(intern!(py, "grad"))?.and_then(|descriptor| {
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
        let address = tensor.getattr_opt(intern!(py, "data_ptr"))?.and_then(|method| {
            // SAFETY: asks what an object is, and a function in C, bound to its tensor, for its address and its calling convention.
            unsafe {
                let is_plain = method.get_type_ptr() == &raw mut ffi::PyCFunction_Type
                    && ffi::PyCFunction_GetFlags(method.as_ptr()) == ffi::METH_NOARGS;
                if is_plain { ffi::PyCFunction_GetFunction(method.as_ptr()) } else { None }
            }
        });
        Ok(Self { kind: tensor.get_type_ptr(), grad, address })
    }

    /// `tensor.grad`.
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

    /// `tensor.data_ptr()`; nothing for a tensor of another type, or one that has no memory.
    pub(super) fn address(&self, tensor: &Bound<'py, PyAny>) -> Option<usize> {
        let address = self.address.filter(|_| tensor.get_type_ptr() == self.kind)?;
        // SAFETY: what calling the bound method does: the function takes its tensor, which is of the type that it was found on, and
        // no argument; a new reference or an error comes back.
        unsafe {
            let number = address(tensor.as_ptr(), std::ptr::null_mut());
            if number.is_null() {
                ffi::PyErr_Clear();
                return None;
            }
            let value = ffi::PyLong_AsUnsignedLongLong(number);
            ffi::Py_DECREF(number);
            if value == u64::MAX {
                ffi::PyErr_Clear();
                return None;
            }
            Some(value as usize)
        }
    }
}
