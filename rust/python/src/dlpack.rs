//! Tensors in from Python, borrowed for the length of a call, through DLPack.
//!
//! torch (2.10 and later) puts a table of C functions on its tensor type, `__dlpack_c_exchange_api__` (DLPack 1.3): one call
//! fills a `DLTensor` on the stack, without a reference taken, a capsule made or a stream synchronized, and another gives the
//! current stream. Other producers go through `__dlpack__` and its capsule, which is kept for the call and dropped after it.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use halfbyte::{Dtype, Error};
use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};

/// `kDLCPU`, `kDLCUDA`.
const CPU: i32 = 1;
const CUDA: i32 = 2;

#[repr(C)]
#[derive(Clone, Copy)]
struct DlDevice {
    kind: i32,
    id: i32,
}

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
struct DlDataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    ndim: i32,
    dtype: DlDataType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}
const _: () = assert!(size_of::<DlTensor>() == 48);

#[repr(C)]
#[derive(Clone, Copy)]
struct Version {
    major: u32,
    minor: u32,
}

/// `DLManagedTensor`, behind a capsule named "dltensor".
#[repr(C)]
struct Managed {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

/// `DLManagedTensorVersioned`, behind a capsule named "`dltensor_versioned`".
#[repr(C)]
struct ManagedVersioned {
    version: Version,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedVersioned)>,
    flags: u64,
    tensor: DlTensor,
}

const READ_ONLY: u64 = 1;

#[repr(C)]
struct ExchangeApi {
    version: Version,
    prev_api: *const c_void,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_py_object: *const c_void,
    managed_tensor_to_py_object: *const c_void,
    dltensor_from_py_object: Option<unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> c_int>,
    current_work_stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int>,
}
const _: () = assert!(size_of::<ExchangeApi>() == 56);

/// What is known of a type of tensor.
struct Known {
    kind: AtomicPtr<ffi::PyTypeObject>,
    api: AtomicPtr<ExchangeApi>,
    plain: AtomicBool,
}

/// The types seen so far: torch.Tensor, Parameter and a subclass or two. Only ever filled, never changed.
static KNOWN: [Known; 8] = [const {
    Known {
        kind: AtomicPtr::new(std::ptr::null_mut()),
        api: AtomicPtr::new(std::ptr::null_mut()),
        plain: AtomicBool::new(false),
    }
}; 8];

/// The exchange table of an object's type, if it has one that we can read, and whether instances are plain tensors: their
/// memory is what they say. Other subclasses may wrap, fake or shard, and their pointers mean nothing.
fn exchange_api(object: &Bound<'_, PyAny>) -> Option<(&'static ExchangeApi, bool)> {
    let kind = object.get_type_ptr();
    for known in &KNOWN {
        let seen = known.kind.load(Ordering::Acquire);
        if seen == kind {
            // SAFETY: `api` was stored before `kind`, from a capsule that lives as long as the type, which KNOWN keeps alive.
            let api = unsafe { known.api.load(Ordering::Relaxed).as_ref() };
            return api.map(|api| (api, known.plain.load(Ordering::Relaxed)));
        }
        if seen.is_null() {
            break;
        }
    }
    find_exchange_api(object)
}

#[cold]
fn find_exchange_api(object: &Bound<'_, PyAny>) -> Option<(&'static ExchangeApi, bool)> {
    let kind = object.get_type();
    let attribute = kind.getattr("__dlpack_c_exchange_api__").ok()?;
    let capsule = attribute.cast::<PyCapsule>().ok()?;
    let pointer = capsule.pointer_checked(Some(c"dlpack_exchange_api")).ok()?.as_ptr().cast::<ExchangeApi>();
    // SAFETY: the capsule's name says what it points to, and such a table is static in its library.
    let api = unsafe { &*pointer };
    if api.version.major != 1 || api.dltensor_from_py_object.is_none() || api.current_work_stream.is_none() {
        return None;
    }
    let plain_types = object.py().import("halfbyte.ops").and_then(|ops| ops.getattr("PLAIN_TENSORS"));
    let plain = plain_types.and_then(|types| types.contains(&kind)).unwrap_or(false);
    // A slot is taken by its api first and shown by its type last. The GIL, or on free-threaded builds the exchange on the
    // api, keeps two threads from sharing one. The type is made immortal, so that its address is never another type's.
    for known in &KNOWN {
        let free = std::ptr::null_mut();
        if known.api.compare_exchange(free, pointer, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            known.plain.store(plain, Ordering::Relaxed);
            known.kind.store(kind.into_ptr().cast(), Ordering::Release);
            break;
        }
    }
    Some((api, plain))
}

/// Whether an object is a torch tensor whose memory is what it says.
pub(crate) fn is_plain(object: &Bound<'_, PyAny>) -> bool {
    exchange_api(object).is_some_and(|(_, plain)| plain)
}

/// A tensor borrowed from Python.
pub(crate) struct TensorRef {
    pub(crate) name: &'static str,
    tensor: DlTensor,
    api: Option<&'static ExchangeApi>,
    read_only: bool,
    /// Keeps the memory alive during the call, where the Python object itself does not.
    _keeper: Option<Py<PyCapsule>>,
}

/// Device, type, shape and strides of a tensor, kept to see whether the next one is like it.
#[derive(Clone, Copy)]
pub(crate) struct Form {
    device: DlDevice,
    dtype: DlDataType,
    /// Less than zero where there is nothing to compare with.
    ndim: i32,
    sizes: [i64; MOST_DIMS],
    strides: [i64; MOST_DIMS],
    /// Bits that an address has none of.
    misaligned: usize,
}

/// Dimensions that a [`Form`] has room for.
const MOST_DIMS: usize = 5;

impl Form {
    /// What no tensor is like.
    pub(crate) const NONE: Self = Self {
        device: DlDevice { kind: 0, id: 0 },
        dtype: DlDataType { code: 0, bits: 0, lanes: 0 },
        ndim: -1,
        sizes: [0; MOST_DIMS],
        strides: [0; MOST_DIMS],
        misaligned: 0,
    };

    /// The address of a plain tensor of this form, if its type allows that address; nothing for any other object. All else that was
    /// found out about the tensor that the form is of holds for this one.
    #[inline]
    pub(crate) fn address_of(&self, object: &Bound<'_, PyAny>) -> Option<usize> {
        let ndim = usize::try_from(self.ndim).ok()?;
        let (api, plain) = exchange_api(object)?;
        let fill = api.dltensor_from_py_object.filter(|_| plain)?;
        let mut place = std::mem::MaybeUninit::<DlTensor>::uninit();
        // SAFETY: `object` is of the type that the table belongs to.
        if unsafe { fill(object.as_ptr().cast(), place.as_mut_ptr()) } != 0 {
            // SAFETY: the GIL is held. Whoever looks at the tensor more closely gets the error again.
            unsafe { ffi::PyErr_Clear() };
            return None;
        }
        // SAFETY: filled, by what was returned.
        let tensor = unsafe { place.assume_init_ref() };
        let same = tensor.ndim == self.ndim
            && tensor.dtype == self.dtype
            && tensor.device.kind == self.device.kind
            && tensor.device.id == self.device.id
            && (ndim == 0 || !tensor.shape.is_null() && !tensor.strides.is_null());
        if !same {
            return None;
        }
        for i in 0..ndim {
            // SAFETY: the producer gave `ndim` sizes and as many strides, and `ndim` is that of the form.
            if unsafe { *tensor.shape.add(i) != self.sizes[i] || *tensor.strides.add(i) != self.strides[i] } {
                return None;
            }
        }
        let address = tensor.data as usize + tensor.byte_offset as usize;
        (address & self.misaligned == 0).then_some(address)
    }
}

/// Bytes of an element.
fn item_size(dtype: DlDataType) -> usize {
    (dtype.bits as usize * dtype.lanes as usize).div_ceil(8)
}

/// What addresses of elements must be multiples of.
fn alignment(dtype: DlDataType) -> usize {
    item_size(dtype).max(1).next_power_of_two().min(8)
}

/// Where a tensor lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    Cpu,
    Cuda(i32),
}

/// Element types that operations take; everything else is named in the error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ElementKind {
    Float(Dtype),
    U8,
}

impl TensorRef {
    /// Borrows `object`, which is argument `name`. The result must not outlive the call that `object` was passed to.
    pub(crate) fn new(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        match exchange_api(object) {
            Some((api, _)) => Self::through(api, name, object),
            None => Self::from_capsule(name, object),
        }
    }

    /// As [`TensorRef::new`], for a torch tensor whose memory is what it says; a TypeError for anything else.
    #[inline]
    pub(crate) fn plain(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        match exchange_api(object) {
            Some((api, true)) => Self::through(api, name, object),
            _ => Err(PyTypeError::new_err("not a plain tensor")),
        }
    }

    #[inline]
    fn through(api: &'static ExchangeApi, name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let mut tensor = std::mem::MaybeUninit::<DlTensor>::uninit();
        let fill = api.dltensor_from_py_object.expect("checked when the table was found");
        // SAFETY: `object` is of the type that the table belongs to; on success `tensor` is filled.
        let status = unsafe { fill(object.as_ptr().cast(), tensor.as_mut_ptr()) };
        if status != 0 {
            let cause = PyErr::take(object.py());
            // torch appends a C++ stack trace; the first line says it all.
            let first_line = |e: PyErr| e.value(object.py()).to_string().lines().next().unwrap_or_default().to_owned();
            let got = cause.map_or_else(|| "a tensor without storage".to_owned(), first_line);
            return Err(crate::errors::raise(Error::Device {
                argument: name,
                expected: "a CPU or CUDA tensor with storage".into(),
                got,
            }));
        }
        // SAFETY: filled, see above.
        let tensor = unsafe { tensor.assume_init() };
        Ok(Self { name, tensor, api: Some(api), read_only: false, _keeper: None })
    }

    fn from_capsule(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let Ok(method) = object.getattr("__dlpack__") else {
            return Err(crate::errors::raise(Error::Dtype {
                argument: name,
                expected: "a tensor (an object with __dlpack__)".into(),
                got: object.get_type().fully_qualified_name()?.to_string(),
            }));
        };
        // A producer that does not know `max_version` speaks the older protocol.
        let keywords = PyDict::new(object.py());
        keywords.set_item("max_version", (1, 0))?;
        let capsule = match method.call((), Some(&keywords)) {
            Ok(capsule) => capsule,
            Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => method.call0()?,
            Err(error) => return Err(error),
        };
        let capsule = capsule.cast_into::<PyCapsule>()?;
        let (tensor, read_only) = if let Ok(pointer) = capsule.pointer_checked(Some(c"dltensor_versioned")) {
            // SAFETY: the name says what it points to; the capsule owns it until it is dropped or renamed.
            let managed = unsafe { pointer.cast::<ManagedVersioned>().as_ref() };
            if managed.version.major != 1 {
                let got = format!("{name}: expected DLPack 1.x, got {}", managed.version.major);
                return Err(pyo3::exceptions::PyBufferError::new_err(got));
            }
            (managed.tensor, managed.flags & READ_ONLY != 0)
        } else {
            let pointer = capsule.pointer_checked(Some(c"dltensor"))?;
            // SAFETY: as above.
            (unsafe { pointer.cast::<Managed>().as_ref() }.tensor, false)
        };
        // The capsule is left unconsumed: its own destructor frees the tensor when `_keeper` drops it.
        Ok(Self { name, tensor, api: None, read_only, _keeper: Some(capsule.unbind()) })
    }

    pub(crate) fn optional(name: &'static str, object: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Self>> {
        object.map(|object| Self::new(name, object)).transpose()
    }

    pub(crate) fn shape(&self) -> &[i64] {
        match usize::try_from(self.tensor.ndim) {
            // SAFETY: DLPack gives `ndim` sizes; for none the pointer may be null.
            Ok(ndim) if ndim > 0 => unsafe { std::slice::from_raw_parts(self.tensor.shape, ndim) },
            _ => &[],
        }
    }

    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        self.shape().iter().map(|&size| size as usize).product()
    }

    /// Sizes and strides, where both are given.
    fn extents(&self) -> Option<(&[i64], &[i64])> {
        let sizes = self.shape();
        if sizes.is_empty() {
            return Some((&[], &[]));
        }
        if self.tensor.strides.is_null() {
            return None;
        }
        // SAFETY: where strides are given there are `ndim` of them.
        let strides = unsafe { std::slice::from_raw_parts(self.tensor.strides, sizes.len()) };
        Some((sizes, strides))
    }

    /// The form of this tensor; that of none where it has too many dimensions.
    pub(crate) fn form(&self) -> Form {
        let mut form = Form { device: self.tensor.device, dtype: self.tensor.dtype, ..Form::NONE };
        if let Some((sizes, strides)) = self.extents().filter(|(sizes, _)| sizes.len() <= MOST_DIMS) {
            form.ndim = self.tensor.ndim;
            form.misaligned = alignment(form.dtype) - 1;
            form.sizes[..sizes.len()].copy_from_slice(sizes);
            form.strides[..sizes.len()].copy_from_slice(strides);
        }
        form
    }

    fn item_size(&self) -> usize {
        item_size(self.tensor.dtype)
    }

    pub(crate) fn byte_len(&self) -> usize {
        self.len() * self.item_size()
    }

    pub(crate) fn address(&self) -> usize {
        self.tensor.data as usize + self.tensor.byte_offset as usize
    }

    pub(crate) fn place(&self) -> Result<Place, Error> {
        match self.tensor.device.kind {
            CPU => Ok(Place::Cpu),
            CUDA => Ok(Place::Cuda(self.tensor.device.id)),
            other => Err(Error::Device {
                argument: self.name,
                expected: "cpu or cuda".into(),
                got: format!("DLPack device type {other}"),
            }),
        }
    }

    pub(crate) fn element(&self) -> Result<ElementKind, Error> {
        let DlDataType { code, bits, lanes } = self.tensor.dtype;
        match (code, bits, lanes) {
            (2, 32, 1) => Ok(ElementKind::Float(Dtype::F32)),
            (2, 16, 1) => Ok(ElementKind::Float(Dtype::F16)),
            (4, 16, 1) => Ok(ElementKind::Float(Dtype::Bf16)),
            (1, 8, 1) => Ok(ElementKind::U8),
            _ => Err(self.wrong_dtype("float32, float16, bfloat16 or uint8")),
        }
    }

    fn wrong_dtype(&self, expected: &str) -> Error {
        let DlDataType { code, bits, lanes } = self.tensor.dtype;
        let family = match code {
            0 => "int",
            1 => "uint",
            2 => "float",
            4 => "bfloat",
            5 => "complex",
            6 => "bool",
            _ => "dtype ",
        };
        let lanes = if lanes == 1 { String::new() } else { format!("x{lanes}") };
        Error::Dtype { argument: self.name, expected: expected.into(), got: format!("{family}{bits}{lanes}") }
    }

    /// The floating-point type, or an error.
    pub(crate) fn float(&self) -> Result<Dtype, Error> {
        match self.element() {
            Ok(ElementKind::Float(dtype)) => Ok(dtype),
            _ => Err(self.wrong_dtype("float32, float16 or bfloat16")),
        }
    }

    pub(crate) fn expect_dtype(&self, dtype: Dtype) -> Result<(), Error> {
        match self.element() {
            Ok(ElementKind::Float(found)) if found == dtype => Ok(()),
            _ => Err(self.wrong_dtype(dtype.name())),
        }
    }

    pub(crate) fn expect_u8(&self) -> Result<(), Error> {
        match self.element() {
            Ok(ElementKind::U8) => Ok(()),
            _ => Err(self.wrong_dtype("uint8")),
        }
    }

    pub(crate) fn expect_i8(&self) -> Result<(), Error> {
        let DlDataType { code, bits, lanes } = self.tensor.dtype;
        if (code, bits, lanes) == (0, 8, 1) { Ok(()) } else { Err(self.wrong_dtype("int8")) }
    }

    /// Whether a signed integer has 64 bits, and not 32; an error for all others.
    pub(crate) fn wide_integer(&self) -> Result<bool, Error> {
        let DlDataType { code, bits, lanes } = self.tensor.dtype;
        match (code, bits, lanes) {
            (0, 32, 1) => Ok(false),
            (0, 64, 1) => Ok(true),
            _ => Err(self.wrong_dtype("int32 or int64")),
        }
    }

    pub(crate) fn expect_i32(&self) -> Result<(), Error> {
        if self.wide_integer() == Ok(false) { Ok(()) } else { Err(self.wrong_dtype("int32")) }
    }

    /// Elements in C order without gaps, at an address that its type allows.
    pub(crate) fn expect_contiguous(&self) -> Result<(), Error> {
        let shape = self.shape();
        if self.tensor.strides.is_null() || self.len() == 0 {
            return Ok(());
        }
        let strides = self.extents().map_or(&[][..], |(_, strides)| strides);
        let mut expected = 1;
        for (&size, &stride) in shape.iter().zip(strides).rev() {
            if size != 1 && stride != expected {
                return Err(Error::Shape {
                    argument: self.name,
                    expected: "a contiguous tensor".into(),
                    got: format!("shape {shape:?} with strides {strides:?}"),
                });
            }
            expected *= size;
        }
        let align = alignment(self.tensor.dtype);
        if !self.address().is_multiple_of(align) {
            return Err(Error::Shape {
                argument: self.name,
                expected: format!("memory aligned to {align} bytes"),
                got: format!("address {:#x}", self.address()),
            });
        }
        Ok(())
    }

    /// An error for a producer that forbids writing (a read-only NumPy array).
    pub(crate) fn expect_writable(&self) -> Result<(), Error> {
        if self.read_only {
            return Err(Error::Value {
                argument: self.name,
                expected: "a writable tensor".into(),
                got: "a read-only one".into(),
            });
        }
        Ok(())
    }

    pub(crate) fn expect_place(&self, place: Place) -> Result<(), Error> {
        let found = self.place()?;
        if found == place {
            return Ok(());
        }
        let text = |p| match p {
            Place::Cpu => "cpu".to_owned(),
            Place::Cuda(id) => format!("cuda:{id}"),
        };
        Err(Error::Device { argument: self.name, expected: text(place), got: text(found) })
    }

    /// The elements as a slice of host memory.
    ///
    /// # Safety
    /// The tensor must be on the CPU, contiguous, of element type `T`, and nobody may write to it while the slice lives.
    pub(crate) unsafe fn slice<T>(&self) -> &[T] {
        if self.len() == 0 {
            return &[];
        }
        // SAFETY: the caller's promise; the memory is alive while `self` is.
        unsafe { std::slice::from_raw_parts(self.address() as *const T, self.len()) }
    }

    /// The elements as bytes of host memory.
    ///
    /// # Safety
    /// As [`TensorRef::slice`], for any element type.
    pub(crate) unsafe fn bytes(&self) -> &[u8] {
        if self.byte_len() == 0 {
            return &[];
        }
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.address() as *const u8, self.byte_len()) }
    }

    /// The elements as a mutable slice of host memory.
    ///
    /// # Safety
    /// As [`TensorRef::slice`], and no other slice of this memory may live.
    #[expect(clippy::mut_from_ref, reason = "the memory is the tensor's, not this struct's")]
    pub(crate) unsafe fn slice_mut<T>(&self) -> &mut [T] {
        if self.len() == 0 {
            return &mut [];
        }
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.address() as *mut T, self.len()) }
    }

    /// The elements as mutable bytes of host memory.
    ///
    /// # Safety
    /// As [`TensorRef::slice_mut`], for any element type.
    #[expect(clippy::mut_from_ref, reason = "the memory is the tensor's, not this struct's")]
    pub(crate) unsafe fn bytes_mut(&self) -> &mut [u8] {
        if self.byte_len() == 0 {
            return &mut [];
        }
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.address() as *mut u8, self.byte_len()) }
    }

    /// The stream that work on this tensor's device belongs on: the producer's current one, or the legacy default stream
    /// for a producer that does not say.
    pub(crate) fn stream(&self) -> PyResult<*mut c_void> {
        let Some(api) = self.api else { return Ok(std::ptr::null_mut()) };
        let mut stream = std::ptr::null_mut();
        let current = api.current_work_stream.expect("checked when the table was found");
        // SAFETY: a plain query of the producer, with an out pointer that lives through the call.
        let status = unsafe { current(self.tensor.device.kind, self.tensor.device.id, &raw mut stream) };
        if status == 0 {
            return Ok(stream);
        }
        Python::attach(|py| {
            Err(PyErr::take(py).unwrap_or_else(|| {
                crate::errors::raise(Error::Cuda {
                    call: "current_work_stream",
                    message: format!("status {status} from the producer of {}", self.name),
                })
            }))
        })
    }
}
