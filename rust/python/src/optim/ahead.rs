//! Memory that a step is going to read, asked for before it is read.
//!
//! A backward pass leaves little of it in a cache, and a step reads some twenty lines of each parameter, a few of which lead to others: to
//! wait for one after another takes longer than all that is done with them. Nothing here decides anything: an address that is not what it is
//! taken for is asked for in vain.

use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;

use crate::dlpack::is_plain;

/// An object is asked for this many objects ahead of what it leads to, which is asked for as many ahead of its use or of what it leads to.
const STRIDE: usize = 4;

/// A type of plain tensors whose third word is the address of the C++ tensor; null where that is not so.
pub(super) struct Known(*mut ffi::PyTypeObject);

impl Known {
    /// The type of this object, if it is a plain tensor and torch says that it is so.
    pub(super) fn of(object: &Bound<'_, PyAny>) -> Self {
        let address = || object.getattr(intern!(object.py(), "_cdata")).ok()?.extract::<usize>().ok();
        // SAFETY: torch's tensors have more than three words.
        let is_there = is_plain(object)
            && address().is_some_and(|address| unsafe { word(object.as_ptr().cast(), 2) }.addr() == address);
        Self(if is_there { object.get_type_ptr() } else { std::ptr::null_mut() })
    }

    /// The C++ tensor of an object that lives, if it is of this type.
    #[inline]
    fn tensor(&self, object: *mut ffi::PyObject) -> Option<*const usize> {
        // SAFETY: the object lives, and those of this type have the word.
        let tensor = unsafe { (ffi::Py_TYPE(object) == self.0).then(|| word(object.cast(), 2)) };
        tensor.filter(|tensor| !tensor.is_null())
    }
}

/// # Safety
/// There must be a word `at`, counted from 0.
#[inline]
unsafe fn word(object: *const usize, at: usize) -> *const usize {
    // SAFETY: the caller's promise.
    unsafe { *object.cast::<*const usize>().add(at) }
}

/// Asks for cache lines at an address, which need not be one of anything.
#[inline]
fn fetch<T>(address: *const T, lines: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..lines {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the processor leaves alone what is not there.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast::<i8>().wrapping_add(64 * line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (address, lines);
}

/// Asks for what reading `grad` of parameters after `at` touches. `object` gives a parameter that is held.
#[inline]
pub(super) fn before_grad(known: &Known, at: usize, object: impl Fn(usize) -> Option<*mut ffi::PyObject>) {
    if let Some(param) = object(at + 3 * STRIDE) {
        fetch(param, 2);
    }
    if let Some(tensor) = object(at + 2 * STRIDE).and_then(|param| known.tensor(param)) {
        fetch(tensor, 4);
    }
    if let Some(tensor) = object(at + STRIDE).and_then(|param| known.tensor(param)) {
        // SAFETY: a C++ tensor begins with its functions, counts, storage, and what autograd knows of it; it has more words than these.
        let (storage, autograd) = unsafe { (word(tensor, 2), word(tensor, 3)) };
        fetch(storage, 2);
        fetch(autograd, 2);
    }
}

/// Asks for what DLPack reads of gradients after `at`. `object` gives a gradient, or None, that is held.
#[inline]
pub(super) fn before_address(known: &Known, at: usize, object: impl Fn(usize) -> Option<*mut ffi::PyObject>) {
    if let Some(tensor) = object(at + 2 * STRIDE).and_then(|grad| known.tensor(grad)) {
        fetch(tensor, 4);
    }
    if let Some(tensor) = object(at + STRIDE).and_then(|grad| known.tensor(grad)) {
        // SAFETY: as above.
        fetch(unsafe { word(tensor, 2) }, 2);
    }
}

/// Asks for what is compared of dicts after `at`. `dict` gives one that is held, and the memory it is compared with.
#[inline]
pub(super) fn before_compare(at: usize, dict: impl Fn(usize) -> Option<(*mut ffi::PyObject, *const u8)>) {
    if let Some((dict, seen)) = dict(at + 2 * STRIDE) {
        fetch(dict, 1);
        fetch(seen, 2);
    }
    if let Some((dict, _)) = dict(at + STRIDE) {
        // SAFETY: a dict has more words; this one is where its keys and values are.
        fetch(unsafe { word(dict.cast(), 4) }, 4);
    }
}
