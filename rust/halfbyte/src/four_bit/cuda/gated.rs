//! Weights of which one half gates the other, as in most decoders' feed-forward layers.

use crate::codebook::Kind;
use crate::device::cuda::{Absmax, Arguments, Kernel, Launch, Pointer, Stream, THREADS, device, dtype_index};
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::layout::check_four_bit_block;

use super::aligned;
use super::group::GroupPiece;
use super::matmul::{check_columns, tensor_cores};
use super::matmul_stream;

/// What is done to the first half's sums before they are multiplied with the second's (Shazeer 2020, arXiv:2002.05202).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// `a · σ(a)`.
    Silu,
    /// GELU by its approximation with tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415).
    GeluTanh,
}

impl Gate {
    /// The gate that a name as torch's functions have it stands for: `silu` or `gelu_tanh`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "silu" => Some(Self::Silu),
            "gelu_tanh" => Some(Self::GeluTanh),
            _ => None,
        }
    }

    /// `Gate` of the kernel.
    pub(super) const fn number(self) -> u32 {
        match self {
            Self::Silu => 1,
            Self::GeluTanh => 2,
        }
    }
}

pub(super) static GATE: [Kernel; 3] =
    [Kernel::new("gate", "gate_bf16"), Kernel::new("gate", "gate_f16"), Kernel::new("gate", "gate_f32")];

/// Fewest rows of a half: the kernel's tiles.
const LEAST_ROWS: usize = 16;

/// `out[m, n] = gate(a[m, n]) · a[m, N + n]` with `a = x · wᵀ + bias` of a weight w [2N, K], by one launch and with no rounding in between. False,
/// with nothing written, where a product and then the gate is the better way: on compute capability 9.0 and later, for more than 8 rows and what the
/// kernel does not take; always on older ones. Then it is [`super::matmul`] and [`gate`].
///
/// # Safety
/// As [`super::matmul`], but `packed`, `absmax` and `bias` are of 2·N rows; `out` is [M, N].
pub unsafe fn matmul_gated(
    stream: &Stream,
    dtype: Dtype,
    x: Pointer,
    (m, n, k): (usize, usize, usize),
    packed: Pointer,
    absmax: Absmax,
    kind: Kind,
    block: usize,
    bias: Option<Pointer>,
    gate: Gate,
    out: Pointer,
) -> Result<bool> {
    check_four_bit_block(block)?;
    check_columns(2 * n, k)?;
    let gpu = device(stream.device)?;
    let few = m <= matmul_stream::COLUMN && matmul_stream::fits(gpu, dtype, m);
    if !few || n < LEAST_ROWS || !tensor_cores(gpu, dtype, k, block, &[x, packed]) {
        return Ok(false);
    }
    if m > 0 {
        let piece = GroupPiece { n, packed, absmax, bias, out };
        // SAFETY: passed on; shape and alignment are as the kernel wants them.
        unsafe { matmul_stream::launch(stream, gpu, dtype, x, (m, k), &[piece], kind, block, Some(gate))? };
    }
    Ok(true)
}

/// `out[m, n] = gate(a[m, n]) · a[m, N + n]` for `a` [M, 2N] and `out` [M, N], computed in fp32.
///
/// # Safety
/// As [`super::quantize`]; both are of `dtype`, row by row.
pub unsafe fn gate(
    stream: &Stream,
    dtype: Dtype,
    a: Pointer,
    (m, n): (usize, usize),
    gate: Gate,
    out: Pointer,
) -> Result<()> {
    if m == 0 || n == 0 {
        return Ok(());
    }
    check_columns(2 * n, 0)?;
    let count = m as u64 * n as u64;
    let eights = n.is_multiple_of(8) && aligned(&[(a, 16), (out, 16)]);
    let blocks = count.div_ceil(u64::from(THREADS) * if eights { 8 } else { 1 });
    let Ok(blocks) = i32::try_from(blocks) else {
        return Err(Error::shape("out", "fewer than 2^39 elements", count));
    };
    let programmatic = device(stream.device)?.capability >= 90;
    let launch = Launch { programmatic, ..Launch::new((blocks as u32, 1), THREADS) };
    let mut arguments =
        Arguments::default().u64(a).u64(out).u64(count).u32(n as u32).u32(u32::from(eights)).u32(gate.number());
    // SAFETY: the arguments are those of `gate_*`; the caller vouches for the pointers.
    unsafe { GATE[dtype_index(dtype)].launch(stream, launch, &mut arguments) }
}
