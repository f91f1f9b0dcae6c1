//! Several weights that the same activations are multiplied by.

use crate::codebook::Kind;
use crate::device::cuda::{Absmax, Pointer, Stream, device};
use crate::element::Dtype;
use crate::error::{Error, Result};

use super::matmul::{fused, matmul, tensor_cores};
use super::matmul_stream;

/// Most weights of a call of [`matmul_group`].
pub const MATMUL_GROUP_MOST: usize = 8;

/// One weight of a group, and where its product goes.
#[derive(Debug, Clone, Copy)]
pub struct GroupPiece {
    /// Rows of the weight.
    pub n: usize,
    /// Its codes.
    pub packed: Pointer,
    /// Its scales, of the same form for all weights of a group.
    pub absmax: Absmax,
    /// [N] of the activations' type.
    pub bias: Option<Pointer>,
    /// [M, N] of the activations' type.
    pub out: Pointer,
}

/// `out[m, n] = Σ_k x[m, k] · w[n, k] + bias[n]` for each of 1 to [`MATMUL_GROUP_MOST`] weights that have K, code, block size and
/// form of scales in common. False, with nothing written, where the product by each weight for itself is the better way.
///
/// # Safety
/// As [`super::quantize`]; `x` is [M, K] row by row, of `dtype`. `scratch` is as [`super::matmul`] has it, for any of the weights.
pub unsafe fn matmul_group(
    stream: &Stream,
    dtype: Dtype,
    x: Pointer,
    (m, k): (usize, usize),
    pieces: &[GroupPiece],
    kind: Kind,
    block: usize,
    scratch: Option<Pointer>,
) -> Result<bool> {
    if pieces.is_empty() || pieces.len() > MATMUL_GROUP_MOST {
        return Err(Error::value("pieces", format!("1 to {MATMUL_GROUP_MOST} weights"), pieces.len()));
    }
    let form = |absmax| match absmax {
        Absmax::Plain(_) => None,
        Absmax::Nested { log2_block, .. } => Some(log2_block),
    };
    if pieces.iter().any(|piece| form(piece.absmax) != form(pieces[0].absmax)) {
        return Err(Error::value(
            "pieces",
            "scales that are all plain or all nested in blocks of one size",
            "a mixture",
        ));
    }
    for piece in pieces {
        if !fused(stream.device, dtype, (m, piece.n, k), block)? {
            return Ok(false);
        }
    }
    let gpu = device(stream.device)?;
    let suits = |piece: &GroupPiece| piece.n > 0 && tensor_cores(gpu, dtype, k, block, &[x, piece.packed]);
    if m > 0 && matmul_stream::fits(gpu, dtype, m) && pieces.iter().all(suits) {
        // SAFETY: passed on; shape and alignment are as the kernel wants them.
        return unsafe { matmul_stream::launch(stream, gpu, dtype, x, (m, k), pieces, kind, block, None) }
            .map(|()| true);
    }
    for piece in pieces {
        let GroupPiece { n, packed, absmax, bias, out } = *piece;
        // SAFETY: passed on.
        unsafe { matmul(stream, dtype, x, (m, n, k), packed, absmax, kind, block, bias, out, scratch)? };
    }
    Ok(true)
}
