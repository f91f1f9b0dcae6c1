//! The C symbols of bitsandbytes' native library that other packages bind through `ctypes`.
//!
//! Names, arguments and their order are bitsandbytes' (0.50): [`dequantize`](macro@dequantize) and so on below say them once a
//! family. Pointers may be of the host or of a device; CUDA work goes to the stream that is given, to the default stream where
//! the name has none, as there. A call that cannot be done writes nothing, returns 1, and leaves its error for
//! [`take_c_error`]; there, it would end the process.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;
use std::sync::RwLock;

use halfbyte::codebook::Map;
use halfbyte::eight_bit::{self, Rounding};
use halfbyte::four_bit;
use halfbyte::layout::{Absmax, NESTED_BLOCK, Nested, block_count, check_four_bit_block, packed_len};
use halfbyte::{Element, Error, Kind, bf16, f16};
use pyo3::prelude::*;

use crate::dlpack::Place;
use crate::errors::raise;
use crate::four_bit::parse_kind;

type Done = Result<(), Error>;

thread_local! {
    static FAILED: RefCell<Option<Error>> = const { RefCell::new(None) };
}

/// Code tables in device memory whose values are known: those that Python shares and never frees.
static TABLES: RwLock<Vec<(usize, Kind)>> = RwLock::new(Vec::new());

/// Raises the error of the last C call of this thread, if it has one that nobody has taken.
#[pyfunction]
pub(crate) fn take_c_error() -> PyResult<()> {
    FAILED.take().map_or(Ok(()), |error| Err(raise(error)))
}

/// Says that the fp32 at `address`, which stay there for good, are the table of a 4-bit code.
#[pyfunction]
pub(crate) fn remember_code(address: usize, quant_type: &str) -> PyResult<()> {
    let kind = parse_kind(quant_type).map_err(raise)?;
    let mut tables = TABLES.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !tables.contains(&(address, kind)) {
        tables.push((address, kind));
    }
    Ok(())
}

/// Runs the body of a C function: 0, or 1 and an error left behind.
fn call(body: impl FnOnce() -> Done) -> c_int {
    let result =
        catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| Err(value("call", "one that ends", "a panic")));
    match result {
        Ok(()) => 0,
        Err(error) => {
            FAILED.set(Some(error));
            1
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "callers pass what they have: text, numbers")]
fn value(argument: &'static str, expected: &str, got: impl ToString) -> Error {
    Error::Value { argument, expected: expected.into(), got: got.to_string() }
}

fn size(argument: &'static str, number: c_int) -> Result<usize, Error> {
    usize::try_from(number).map_err(|_| value(argument, "a number that is not negative", number))
}

/// Where a call's memory is: where its result goes. Null pointers are refused.
fn place_of(pointers: &[(&'static str, *const c_void)]) -> Result<Place, Error> {
    for (name, pointer) in pointers {
        if pointer.is_null() {
            return Err(value(name, "an address", "null"));
        }
    }
    #[cfg(feature = "cuda")]
    if let Some(&(_, last)) = pointers.last()
        && let Some(device) = halfbyte::device::cuda::device_of(last as u64)?
    {
        return Ok(Place::Cuda(device));
    }
    Ok(Place::Cpu)
}

#[cfg(feature = "cuda")]
fn stream(device: i32, handle: *mut c_void) -> halfbyte::device::cuda::Stream {
    halfbyte::device::cuda::Stream { device, handle }
}

/// The error of device memory in a build without CUDA, which no pointer is taken for.
#[cfg(not(feature = "cuda"))]
fn no_cuda(_stream: *mut c_void) -> Error {
    crate::no_cuda()
}

/// # Safety
/// `count` values of `T` lie at `pointer`, unless there are none.
unsafe fn read<'a, T>(pointer: *const c_void, count: usize) -> &'a [T] {
    // SAFETY: the caller vouches for it.
    if count == 0 { &[] } else { unsafe { slice::from_raw_parts(pointer.cast(), count) } }
}

/// # Safety
/// As [`read`], and nobody else looks there meanwhile.
unsafe fn write<'a, T>(pointer: *mut c_void, count: usize) -> &'a mut [T] {
    // SAFETY: the caller vouches for it.
    if count == 0 { &mut [] } else { unsafe { slice::from_raw_parts_mut(pointer.cast(), count) } }
}

/// # Safety
/// 256 fp32 of the host lie at `pointer`.
unsafe fn map<'a>(pointer: *const c_void) -> &'a Map {
    // SAFETY: the caller vouches for it.
    <&Map>::try_from(unsafe { read::<f32>(pointer, 256) }).expect("256 entries")
}

unsafe fn dequantize_4bit<T: Element>(
    kind: Kind,
    (packed, absmax, out): (*const c_void, *const c_void, *mut c_void),
    (block, n): (c_int, c_int),
    handle: *mut c_void,
) -> Done {
    let (block, n) = (size("blocksize", block)?, size("n", n)?);
    check_four_bit_block(block)?;
    if n == 0 {
        return Ok(());
    }
    match place_of(&[("A", packed), ("absmax", absmax), ("out", out)])? {
        Place::Cpu => {
            // SAFETY: the caller of the C function vouches for memory of these sizes.
            let (packed, absmax, out) =
                unsafe { (read(packed, packed_len(n)), read(absmax, block_count(n, block)), write::<T>(out, n)) };
            four_bit::dequantize_into(packed, Absmax::Plain(absmax), kind, block, out)
        }
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let absmax = halfbyte::device::cuda::Absmax::Plain(absmax as u64);
            let target = (out as u64, T::DTYPE);
            // SAFETY: as above.
            unsafe {
                four_bit::cuda::dequantize(&stream(device, handle), packed as u64, absmax, kind, block, target, n)
            }
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(no_cuda(handle)),
    }
}

unsafe fn quantize_4bit<T: Element>(
    kind: Kind,
    (a, absmax, out): (*const c_void, *mut c_void, *mut c_void),
    (block, n): (c_int, c_int),
) -> Done {
    let (block, n) = (size("blocksize", block)?, size("n", n)?);
    check_four_bit_block(block)?;
    if n == 0 {
        return Ok(());
    }
    match place_of(&[("A", a), ("absmax", absmax), ("out", out)])? {
        Place::Cpu => {
            // SAFETY: the caller of the C function vouches for memory of these sizes.
            let (a, absmax, out) =
                unsafe { (read::<T>(a, n), write(absmax, block_count(n, block)), write(out, packed_len(n))) };
            four_bit::quantize_into(a, kind, block, out, absmax)
        }
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let stream = stream(device, std::ptr::null_mut());
            let (packed, absmax) = (out as u64, absmax as u64);
            // SAFETY: as above.
            unsafe { four_bit::cuda::quantize(&stream, (a as u64, T::DTYPE), n, kind, block, packed, absmax) }
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(no_cuda(std::ptr::null_mut())),
    }
}

unsafe fn dequantize_8bit<T: Element>(
    (code, codes, absmax, out): (*const c_void, *const c_void, *const c_void, *mut c_void),
    (block, n): (c_int, c_int),
    handle: *mut c_void,
) -> Done {
    let (block, n) = (size("blocksize", block)?, size("n", n)?);
    if n == 0 {
        return Ok(());
    }
    match place_of(&[("code", code), ("A", codes), ("absmax", absmax), ("out", out)])? {
        Place::Cpu if block == 0 => Err(value("blocksize", "a positive number", 0)),
        Place::Cpu => {
            // SAFETY: the caller of the C function vouches for memory of these sizes.
            let (map, codes, absmax, out) =
                unsafe { (map(code), read(codes, n), read(absmax, block_count(n, block)), write::<T>(out, n)) };
            eight_bit::dequantize_into(codes, map, absmax, block, 0.0, out)
        }
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let stream = stream(device, handle);
            let (codes, map, absmax, target) = (codes as u64, code as u64, absmax as u64, (out as u64, T::DTYPE));
            // SAFETY: as above.
            unsafe { eight_bit::cuda::dequantize(&stream, codes, map, absmax, block, None, target, n) }
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(no_cuda(handle)),
    }
}

unsafe fn quantize_8bit<T: Element>(
    (code, a, absmax, out): (*const c_void, *const c_void, *mut c_void, *mut c_void),
    (block, n): (c_int, c_int),
) -> Done {
    let (block, n) = (size("blocksize", block)?, size("n", n)?);
    if n == 0 {
        return Ok(());
    }
    match place_of(&[("code", code), ("A", a), ("absmax", absmax), ("out", out)])? {
        Place::Cpu if block == 0 => Err(value("blocksize", "a positive number", 0)),
        Place::Cpu => {
            // SAFETY: the caller of the C function vouches for memory of these sizes.
            let (map, a, absmax, out) =
                unsafe { (map(code), read::<T>(a, n), write(absmax, block_count(n, block)), write(out, n)) };
            eight_bit::quantize_into(a, map, block, 0.0, Rounding::Nearest, out, absmax)
        }
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let stream = stream(device, std::ptr::null_mut());
            let (map, codes, absmax) = (code as u64, out as u64, absmax as u64);
            // SAFETY: as above.
            unsafe { eight_bit::cuda::quantize(&stream, (a as u64, T::DTYPE), n, map, block, None, codes, absmax) }
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(no_cuda(std::ptr::null_mut())),
    }
}

/// A weight as the C functions get it: packed codes, scales and, unless those are plain, the codes, table and offset of scales.
struct Weight {
    packed: *const c_void,
    absmax: *const c_void,
    absmax_8bit: *const c_void,
    absmax_code: *const c_void,
    absmax_offset: *const c_void,
    kind: Kind,
    block: usize,
}

impl Weight {
    fn is_nested(&self) -> bool {
        !self.absmax_8bit.is_null()
    }

    /// # Safety
    /// All pointers are of the host, and a weight of `weights` elements lies there.
    unsafe fn host<'a>(&self, weights: usize) -> Absmax<'a> {
        let blocks = block_count(weights, self.block);
        // SAFETY: the caller vouches for it.
        unsafe {
            if !self.is_nested() {
                return Absmax::Plain(read(self.absmax, blocks));
            }
            Absmax::Nested(Nested {
                codes: read(self.absmax_8bit, blocks),
                absmax: read(self.absmax, block_count(blocks, NESTED_BLOCK)),
                map: map(self.absmax_code),
                offset: read::<f32>(self.absmax_offset, 1)[0],
                block: NESTED_BLOCK,
            })
        }
    }

    #[cfg(feature = "cuda")]
    fn device(&self) -> halfbyte::device::cuda::Absmax {
        use halfbyte::device::cuda::Absmax;
        if !self.is_nested() {
            return Absmax::Plain(self.absmax as u64);
        }
        Absmax::Nested {
            codes: self.absmax_8bit as u64,
            absmax: self.absmax as u64,
            map: self.absmax_code as u64,
            offset: self.absmax_offset as u64,
            log2_block: NESTED_BLOCK.trailing_zeros(),
        }
    }
}

unsafe fn multiply<T: Element>(
    x: *const c_void,
    weight: &Weight,
    (bias, out): (*const c_void, *mut c_void),
    (m, n, k): (usize, usize, usize),
    handle: *mut c_void,
) -> Done {
    check_four_bit_block(weight.block)?;
    if m == 0 || n == 0 {
        return Ok(());
    }
    if k == 0 {
        return Err(value("K", "a positive number", 0));
    }
    if weight.is_nested() {
        place_of(&[("absmax_code", weight.absmax_code), ("absmax_offset", weight.absmax_offset)])?;
    }
    match place_of(&[("A", x), ("B", weight.packed), ("absmax", weight.absmax), ("out", out)])? {
        Place::Cpu => {
            // SAFETY: the caller of the C function vouches for memory of these sizes.
            unsafe {
                let bias = (!bias.is_null()).then(|| read::<T>(bias, n));
                let (x, packed, out) = (read(x, m * k), read(weight.packed, packed_len(n * k)), write::<T>(out, m * n));
                four_bit::matmul_into(x, (m, n, k), packed, weight.host(n * k), weight.kind, weight.block, bias, out)
            }
        }
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            /// Rows that one launch takes.
            const ROWS: usize = 32;
            let stream = stream(device, handle);
            let (bias, step) = ((!bias.is_null()).then_some(bias as u64), T::DTYPE.size());
            for row in (0..m).step_by(ROWS) {
                let shape = (ROWS.min(m - row), n, k);
                let (x, out) = (x as u64 + (row * k * step) as u64, out as u64 + (row * n * step) as u64);
                let (packed, absmax) = (weight.packed as u64, weight.device());
                // SAFETY: as above.
                unsafe {
                    four_bit::cuda::matmul(
                        &stream,
                        T::DTYPE,
                        x,
                        shape,
                        packed,
                        absmax,
                        weight.kind,
                        weight.block,
                        bias,
                        out,
                        None,
                    )
                }?;
            }
            Ok(())
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(no_cuda(handle)),
    }
}

/// Which 4-bit code a table of 16 values is of. One in device memory that is not known is copied to the host, which waits.
unsafe fn kind_of(code: *const c_void, handle: *mut c_void) -> Result<Kind, Error> {
    let address = code as usize;
    let known = TABLES.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((_, kind)) = known.iter().find(|(at, _)| *at == address) {
        return Ok(*kind);
    }
    drop(known);
    let mut values = [0f32; 16];
    match place_of(&[("code", code)])? {
        // SAFETY: the caller of the C function vouches for 16 values.
        Place::Cpu => values.copy_from_slice(unsafe { read(code, 16) }),
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            // SAFETY: as above.
            unsafe { halfbyte::device::cuda::read(&stream(device, handle), code as u64, &mut values) }?;
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => return Err(no_cuda(handle)),
    }
    let same = |kind: &Kind| kind.values().iter().zip(&values).all(|(a, b)| a == b);
    let expected = "the table of nf4 or fp4";
    [Kind::Nf4, Kind::Fp4].into_iter().find(same).ok_or_else(|| value("code", expected, format!("{values:?}")))
}

/// `(code, A, absmax, out, blocksize, n, stream)`; the code of the 4-bit ones is not looked at.
macro_rules! dequantize {
    ($($name:ident: $T:ty, $kind:expr;)*) => {$(
        /// # Safety
        /// The pointers are of one place, and what the sizes say lies there.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            code: *const c_void, a: *const c_void, absmax: *const c_void, out: *mut c_void,
            blocksize: c_int, n: c_int, stream: *mut c_void,
        ) -> c_int {
            let kind: Option<Kind> = $kind;
            // SAFETY: passed on.
            call(|| unsafe { match kind {
                Some(kind) => dequantize_4bit::<$T>(kind, (a, absmax, out), (blocksize, n), stream),
                None => dequantize_8bit::<$T>((code, a, absmax, out), (blocksize, n), stream),
            }})
        }
    )*};
}

dequantize! {
    cdequantize_blockwise_fp32: f32, None;
    cdequantize_blockwise_fp16: f16, None;
    cdequantize_blockwise_bf16: bf16, None;
    cdequantize_blockwise_fp32_nf4: f32, Some(Kind::Nf4);
    cdequantize_blockwise_fp16_nf4: f16, Some(Kind::Nf4);
    cdequantize_blockwise_bf16_nf4: bf16, Some(Kind::Nf4);
    cdequantize_blockwise_fp32_fp4: f32, Some(Kind::Fp4);
    cdequantize_blockwise_fp16_fp4: f16, Some(Kind::Fp4);
    cdequantize_blockwise_bf16_fp4: bf16, Some(Kind::Fp4);
}

/// `(code, A, absmax, out, blocksize, n)`, on the default stream.
macro_rules! quantize {
    ($($name:ident: $T:ty, $kind:expr;)*) => {$(
        /// # Safety
        /// The pointers are of one place, and what the sizes say lies there.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            code: *const c_void, a: *const c_void, absmax: *mut c_void, out: *mut c_void, blocksize: c_int, n: c_int,
        ) -> c_int {
            let kind: Option<Kind> = $kind;
            // SAFETY: passed on.
            call(|| unsafe { match kind {
                Some(kind) => quantize_4bit::<$T>(kind, (a, absmax, out), (blocksize, n)),
                None => quantize_8bit::<$T>((code, a, absmax, out), (blocksize, n)),
            }})
        }
    )*};
}

quantize! {
    cquantize_blockwise_fp32: f32, None;
    cquantize_blockwise_fp16: f16, None;
    cquantize_blockwise_bf16: bf16, None;
    cquantize_blockwise_fp32_nf4: f32, Some(Kind::Nf4);
    cquantize_blockwise_fp16_nf4: f16, Some(Kind::Nf4);
    cquantize_blockwise_bf16_nf4: bf16, Some(Kind::Nf4);
    cquantize_blockwise_fp32_fp4: f32, Some(Kind::Fp4);
    cquantize_blockwise_fp16_fp4: f16, Some(Kind::Fp4);
    cquantize_blockwise_bf16_fp4: bf16, Some(Kind::Fp4);
}

/// `(N, 1, K, A, B, absmax, code, out, lda, ldb, ldc, blocksize, stream)`: one row of activations; the strides are not looked at.
macro_rules! gemv {
    ($($name:ident: $T:ty;)*) => {$(
        /// # Safety
        /// The pointers are of one place, and what the sizes say lies there.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            m: c_int, n: c_int, k: c_int, a: *const c_void, b: *const c_void, absmax: *const c_void, code: *const c_void,
            out: *mut c_void, _lda: c_int, _ldb: c_int, _ldc: c_int, blocksize: c_int, stream: *mut c_void,
        ) -> c_int {
            call(|| {
                let (rows, columns, k) = (size("n", n)?, size("m", m)?, size("k", k)?);
                if rows != 1 {
                    return Err(value("n", "1, the one row that this multiplies", rows));
                }
                // SAFETY: passed on.
                let (kind, block) = (unsafe { kind_of(code, stream) }?, size("blocksize", blocksize)?);
                let null = std::ptr::null();
                let weight = Weight {
                    packed: b, absmax, absmax_8bit: null, absmax_code: null, absmax_offset: null, kind, block,
                };
                // SAFETY: passed on.
                unsafe { multiply::<$T>(a, &weight, (null, out), (rows, columns, k), stream) }
            })
        }
    )*};
}

gemv! {
    cgemm_4bit_inference_naive_fp32: f32;
    cgemm_4bit_inference_naive_fp16: f16;
    cgemm_4bit_inference_naive_bf16: bf16;
}

/// `(A, B, absmax, absmax_8bit, absmax_code, absmax_offset, out, bias, M, N, K, blocksize, 1 for fp4 or 2 for nf4, stream)`;
/// the last three of the scales are null unless those are nested, and so is the bias where there is none.
macro_rules! gemm {
    ($($name:ident: $T:ty;)*) => {$(
        /// # Safety
        /// The pointers are of one place, and what the sizes say lies there.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            a: *const c_void, b: *const c_void, absmax: *const c_void, absmax_8bit: *const c_void,
            absmax_code: *const c_void, absmax_offset: *const c_void, out: *mut c_void, bias: *const c_void,
            m: c_int, n: c_int, k: c_int, blocksize: c_int, quant_type: c_int, stream: *mut c_void,
        ) -> c_int {
            call(|| {
                let kind = match quant_type {
                    1 => Kind::Fp4,
                    2 => Kind::Nf4,
                    other => return Err(value("quant_type", "1 for fp4 or 2 for nf4", other)),
                };
                let block = size("blocksize", blocksize)?;
                let weight = Weight { packed: b, absmax, absmax_8bit, absmax_code, absmax_offset, kind, block };
                let shape = (size("M", m)?, size("N", n)?, size("K", k)?);
                // SAFETY: passed on.
                unsafe { multiply::<$T>(a, &weight, (bias, out), shape, stream) }
            })
        }
    )*};
}

gemm! {
    cgemm_4bit_fp32: f32;
    cgemm_4bit_fp16: f16;
    cgemm_4bit_bf16: bf16;
}
